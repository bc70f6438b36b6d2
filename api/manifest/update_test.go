package manifest

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

func typed[T any](t *testing.T, kindName, spec string) *T {
	t.Helper()
	o := new(T)
	text := "apiVersion: data.stepcache.dev/v1alpha1\nkind: " + kindName + "\nmetadata: {name: genomes, namespace: argo}\nspec: " + spec
	if err := yaml.UnmarshalStrict([]byte(text), o); err != nil {
		t.Fatal(err)
	}
	return o
}

func TestUpdateRules(t *testing.T) {
	dataset := func(spec string) runtime.Object { return typed[v1alpha1.Dataset](t, "Dataset", spec) }
	load := func(spec string) runtime.Object { return typed[v1alpha1.DataLoad](t, "DataLoad", spec) }
	for _, c := range []struct {
		name     string
		old, new runtime.Object
		want     string
	}{
		{"scale", dataset(withWorkers("memory: 64Mi")), dataset(withWorkers("memory: 1Gi, replicas: 3, copies: 2")), ""},
		{"scale below copies", dataset(withWorkers("memory: 64Mi, replicas: 3, copies: 3")), dataset(withWorkers("memory: 64Mi, replicas: 2, copies: 3")), "copies must not exceed replicas"},
		{"source", dataset(mount(`source: "s3://bucket"`)), dataset(mount(`source: "s3://bucket/"`)), "the path and source of a mount cannot change"},
		{"path", dataset(paths("/a")), dataset(paths("/b")), "the path and source of a mount cannot change"},
		{"mount removed", dataset(paths("/a", "/b")), dataset(paths("/b")), "a mount cannot be removed"},
		{"mount added", dataset(paths("/a", "/b")), dataset(paths("/c", "/b", "/a")), ""},
		{"endpoint and credentials", dataset(mount(`source: "s3://bucket", endpoint: a`)), dataset(mount(`source: "s3://bucket", endpoint: b, credentialsSecretRef: {name: a}`)), ""},
		{"access", dataset(with("access: ReadWrite")), dataset(with("access: ReadOnly")), "access cannot change"},
		{"access to the default", dataset(with("access: ReadWrite")), dataset(mount(`source: "s3://bucket/"`)), "access cannot change"},
		{"refresh", dataset(with("refresh: {policy: Interval, interval: 1h}")), dataset(with("refresh: {policy: Never}")), ""},
		{"share and locality", dataset(with("shareWith: [a]")), dataset(with("shareWith: [b], locality: None, replaces: [{claimName: x}]")), ""},

		{"load unchanged", load("{datasetRef: {name: a}, paths: [/a], copies: 2, pin: true}"), load("{datasetRef: {name: a}, paths: [/a], copies: 2, pin: true}"), ""},
		{"load's ttl", load("{datasetRef: {name: a}}"), load("{datasetRef: {name: a}, ttlSecondsAfterFinished: 5}"), ""},
		{"load's dataset", load("{datasetRef: {name: a}}"), load("{datasetRef: {name: b}}"), "datasetRef cannot change"},
		{"load's paths", load("{datasetRef: {name: a}, paths: [/a]}"), load("{datasetRef: {name: a}, paths: [/b]}"), "of a load that runs once cannot change"},
		{"load's paths removed", load("{datasetRef: {name: a}, paths: [/a]}"), load("{datasetRef: {name: a}}"), "of a load that runs once cannot change"},
		{"load's copies", load("{datasetRef: {name: a}}"), load("{datasetRef: {name: a}, copies: 2}"), "of a load that runs once cannot change"},
		{"load's pin", load("{datasetRef: {name: a}}"), load("{datasetRef: {name: a}, pin: true}"), "of a load that runs once cannot change"},
		{"scheduled load", load("{datasetRef: {name: a}, schedule: '@daily', paths: [/a]}"), load("{datasetRef: {name: a}, schedule: '@hourly', paths: [/b], pin: true, copies: 2}"), ""},
		{"scheduled load's dataset", load("{datasetRef: {name: a}, schedule: '@daily'}"), load("{datasetRef: {name: b}, schedule: '@daily'}"), "datasetRef cannot change"},
		{"schedule added", load("{datasetRef: {name: a}}"), load("{datasetRef: {name: a}, schedule: '@daily'}"), "cannot become a scheduled one"},
		{"schedule removed", load("{datasetRef: {name: a}, schedule: '@daily'}"), load("{datasetRef: {name: a}}"), "cannot become a scheduled one"},
		{"runAfter changed", load("{datasetRef: {name: a}, runAfter: {name: x}}"), load("{datasetRef: {name: a}, runAfter: {name: y}}"), "runAfter cannot change"},
		{"runAfter added", load("{datasetRef: {name: a}}"), load("{datasetRef: {name: a}, runAfter: {name: y}}"), "runAfter cannot be added or removed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := ValidateUpdate(t.Context(), c.new, c.old).ToAggregate()
			if c.want != "" {
				refused(t, err, c.want)
			} else if err != nil {
				t.Error(err)
			}
		})
	}
	// An object from before a rule existed can still be scaled, as long as what breaks the rule stays.
	before := typed[v1alpha1.Dataset](t, "Dataset", mount(`source: "s3://b"`))
	after := before.DeepCopy()
	after.Spec.Workers.Replicas = 2
	if errs := ValidateUpdate(t.Context(), after, before); len(errs) > 0 {
		t.Error(errs)
	}
	if errs := Validate(t.Context(), after); len(errs) == 0 {
		t.Error("the object is valid as a new one, so that the test tells nothing")
	}
	before = typed[v1alpha1.Dataset](t, "Dataset", mount(`source: "s3://bucket", endpoint: "host:99999"`))
	after = before.DeepCopy()
	after.Spec.Workers.Replicas, after.Finalizers = 2, []string{"example.com/kept"}
	if errs := ValidateUpdate(t.Context(), after, before); len(errs) > 0 {
		t.Error(errs)
	}
	if errs := Validate(t.Context(), after); len(errs) == 0 {
		t.Error("the port is valid of a new object, so that the test tells nothing")
	}
	before, after = typed[v1alpha1.Dataset](t, "Dataset", with("access: ReadWrite")), typed[v1alpha1.Dataset](t, "Dataset", with("access: ReadWrite"))
	before.Name, after.Name = "ab", "ab"
	after.Finalizers = []string{"example.com/kept"}
	if errs := ValidateUpdate(t.Context(), after, before); len(errs) > 0 {
		t.Error(errs)
	}
	if errs := Validate(t.Context(), after); len(errs) == 0 {
		t.Error("the name is valid of a new object, so that the test tells nothing")
	}
	if errs := ValidateUpdate(t.Context(), before, load("{datasetRef: {name: a}}")); len(errs) == 0 {
		t.Error("a Dataset became a DataLoad")
	}
	if errs := Validate(t.Context(), &v1alpha1.DatasetList{}); len(errs) == 0 {
		t.Error("a list passed as an object")
	}
}

// Validate checks as Parse does, and leaves the object alone.
func TestValidateTyped(t *testing.T) {
	d := typed[v1alpha1.Dataset](t, "Dataset", with("access: ReadOnly"))
	d.TypeMeta.Kind, d.Namespace = "", "" // as a client returns them
	before := d.DeepCopy()
	if errs := Validate(t.Context(), d); len(errs) > 0 {
		t.Error(errs)
	}
	if d.Spec.Workers.Replicas != 0 || d.Namespace != before.Namespace {
		t.Errorf("the object was changed: %+v", d)
	}
	d.Spec.Workers.Copies = 4
	if err := Validate(t.Context(), d).ToAggregate(); err == nil || !strings.Contains(err.Error(), "copies must not exceed replicas") {
		t.Errorf("got %v", err)
	}
}
