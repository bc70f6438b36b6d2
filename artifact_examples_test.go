package stepcache_test

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/artifact"
	"github.com/stepcache/stepcache/artifact/plugin"
	"github.com/stepcache/stepcache/lint"
)

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What users copy has nothing that `stepcache lint` would change or warn of.
func TestExamplesPassLint(t *testing.T) {
	workflows := 0
	err := filepath.WalkDir("examples", func(path string, d os.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".yaml" {
			return err
		}
		r, err := lint.Check(path, read(t, path))
		if err != nil {
			t.Error(err)
		}
		for _, f := range r.Findings {
			if f.Severity == lint.Warning || f.Fixable {
				t.Error(f)
			}
		}
		workflows += r.Workflows
		return nil
	})
	if err != nil || workflows < 5 {
		t.Errorf("%d workflows, %v", workflows, err)
	}
}

// Argo's own example of artifact passing, and the one line that the tier needs.
func TestArtifactPassingIsArgosOwn(t *testing.T) {
	const argos = `
apiVersion: argoproj.io/v1alpha1
kind: Workflow
metadata: {generateName: artifact-passing-}
spec:
  entrypoint: artifact-example
  templates:
  - name: artifact-example
    steps:
    - - {name: generate-artifact, template: hello-world-to-file}
    - - name: consume-artifact
        template: print-message-from-file
        arguments: {artifacts: [{name: message, from: "{{steps.generate-artifact.outputs.artifacts.hello-art}}"}]}
  - name: hello-world-to-file
    container: {image: busybox, command: [sh, -c], args: ["sleep 1; echo hello world | tee /tmp/hello_world.txt"]}
    outputs: {artifacts: [{name: hello-art, path: /tmp/hello_world.txt}]}
  - name: print-message-from-file
    inputs: {artifacts: [{name: message, path: /tmp/message}]}
    container: {image: busybox, command: [sh, -c], args: ["cat /tmp/message"]}
`
	var ours, theirs map[string]any
	if err := yaml.Unmarshal(read(t, "examples/artifacts/artifact-passing.yaml"), &ours); err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal([]byte(argos), &theirs); err != nil {
		t.Fatal(err)
	}
	spec := ours["spec"].(map[string]any)
	if d := cmp.Diff(map[string]any{"configMap": v1alpha1.S3Name("artifacts"), "key": "artifacts"}, spec["artifactRepositoryRef"]); d != "" {
		t.Error(d)
	}
	delete(spec, "artifactRepositoryRef")
	if d := cmp.Diff(theirs, ours); d != "" {
		t.Error(d)
	}
}

// documents are the documents of a file, strictly of these types.
func documents(t *testing.T, path string, into ...any) {
	t.Helper()
	parts := strings.Split(string(read(t, path)), "\n---\n")
	if len(parts) != len(into) {
		t.Fatalf("%s has %d documents, want %d", path, len(parts), len(into))
	}
	for i, p := range parts {
		if err := yaml.UnmarshalStrict([]byte(p), into[i]); err != nil {
			t.Fatalf("%s, document %d: %v", path, i, err)
		}
	}
}

func strict(t *testing.T, text string, into any) {
	t.Helper()
	if text == "" {
		t.Fatal("no such key")
	}
	if err := yaml.UnmarshalStrict([]byte(text), into); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
}

// The plugin's settings are taken as Argo v4 takes them: the driver is asked with the configuration and the
// environment that they give it, and what it then asks for is the Dataset's endpoint, signed with its key.
func TestArgoV4Example(t *testing.T) {
	var controller, repository corev1.ConfigMap
	var server appsv1.Deployment
	documents(t, "examples/artifacts/argo-v4.yaml", &controller, &repository, &server)
	var drivers []struct{ Name, Image string }
	strict(t, controller.Data["artifactDrivers"], &drivers)
	var images map[string]struct{ Entrypoint, Cmd []string }
	strict(t, controller.Data["images"], &images)
	var executor corev1.Container
	strict(t, controller.Data["executor"], &executor)
	var entry struct {
		Plugin struct{ Name, KeyFormat, Configuration string }
	}
	strict(t, repository.Data["artifacts"], &entry)
	if len(drivers) != 1 || drivers[0].Name != entry.Plugin.Name {
		t.Fatalf("%+v, %+v", drivers, entry)
	}
	if got := images[drivers[0].Image].Entrypoint; !slices.Equal(got, []string{"/stepcache", "artifact"}) {
		t.Errorf("entry point %v", got)
	}

	// The pod's environment, with the Secret's values being the names of their keys.
	env := map[string]string{}
	for _, e := range executor.Env {
		switch {
		case e.ValueFrom.SecretKeyRef != nil:
			if e.ValueFrom.SecretKeyRef.Name != v1alpha1.S3Name("artifacts") {
				t.Errorf("%s comes from the Secret %s", e.Name, e.ValueFrom.SecretKeyRef.Name)
			}
			env[e.Name] = e.ValueFrom.SecretKeyRef.Key
		case e.ValueFrom.FieldRef.FieldPath == "metadata.namespace":
			env[e.Name] = "argo"
		}
	}
	var asked atomic.Pointer[http.Request]
	gateway := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r)
		_, _ = w.Write([]byte(`<ListBucketResult></ListBucketResult>`))
	}))
	defer gateway.Close()
	driver := artifact.New(artifact.Options{
		Namespace: env["POD_NAMESPACE"], NodeAddress: strings.TrimPrefix(gateway.URL, "http://"),
		Getenv: func(k string) string { return env[k] },
	})
	reply, err := driver.IsDirectory(t.Context(), &plugin.IsDirectoryRequest{Artifact: &plugin.Artifact{Plugin: &plugin.PluginArtifact{
		Name: entry.Plugin.Name, Configuration: entry.Plugin.Configuration, Key: "argo/w/p/out",
	}}})
	if err != nil || reply.GetError() != "" {
		t.Fatalf("%v, %v", reply, err)
	}
	r := asked.Load()
	if r.Host != "artifacts-s3.argo.svc:9000" || r.URL.Path != "/artifacts/" || !strings.Contains(r.Header.Get("Authorization"), "Credential="+v1alpha1.KeyAccessKeyID+"/") {
		t.Errorf("%s %s, %s", r.Host, r.URL.Path, r.Header.Get("Authorization"))
	}
	if env["STEPCACHE_S3_SECRET_ACCESS_KEY"] != v1alpha1.KeySecretAccessKey {
		t.Errorf("%v", env)
	}

	// argo-server looks for the socket at a fixed place, and the driver for a folder of the Dataset's name.
	socket := "/tmp/artifact-plugins/" + entry.Plugin.Name
	for _, c := range server.Spec.Template.Spec.Containers {
		if !slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == socket }) {
			t.Errorf("container %s does not mount %s", c.Name, socket)
		}
		if c.Name == "argo-server" {
			continue
		}
		if !slices.Equal(c.Command, images[drivers[0].Image].Entrypoint) || !slices.Equal(c.Args, []string{socket + "/socket"}) || c.Image != drivers[0].Image {
			t.Errorf("%s %v %v", c.Image, c.Command, c.Args)
		}
		if !slices.Contains(c.Env, corev1.EnvVar{Name: artifact.EnvCredentials, Value: "/secrets"}) ||
			!slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == "/secrets/artifacts" }) {
			t.Errorf("credentials: %v, %v", c.Env, c.VolumeMounts)
		}
	}
}

// The fields are those that the launcher of Kubeflow Pipelines reads.
func TestKubeflowExample(t *testing.T) {
	var launcher corev1.ConfigMap
	documents(t, "examples/artifacts/kfp.yaml", &launcher)
	var providers struct {
		S3 struct {
			Default struct {
				Endpoint, Region           string
				DisableSSL, ForcePathStyle bool
				Credentials                struct {
					FromEnv   bool
					SecretRef struct{ SecretName, AccessKeyKey, SecretKeyKey string }
				}
			}
		}
	}
	strict(t, launcher.Data["providers"], &providers)
	d := providers.S3.Default
	ref := d.Credentials.SecretRef
	if launcher.Name != "kfp-launcher" || launcher.Data["defaultPipelineRoot"] != "s3://artifacts/pipelines" || d.Endpoint != "artifacts-s3:9000" ||
		!d.DisableSSL || !d.ForcePathStyle || ref.SecretName != v1alpha1.S3Name("artifacts") || ref.AccessKeyKey != v1alpha1.KeyAccessKeyID || ref.SecretKeyKey != v1alpha1.KeySecretAccessKey {
		t.Errorf("%+v, %+v", launcher, d)
	}
}

func TestMetaflowExample(t *testing.T) {
	text := string(read(t, "examples/README.md"))
	_, block, ok := strings.Cut(text, "```json\n")
	block, _, ended := strings.Cut(block, "```")
	var settings map[string]string
	if err := json.Unmarshal([]byte(block), &settings); !ok || !ended || err != nil {
		t.Fatalf("%v in %q", err, block)
	}
	want := map[string]string{
		"METAFLOW_DEFAULT_DATASTORE": "s3", "METAFLOW_DATASTORE_SYSROOT_S3": "s3://artifacts/metaflow",
		"METAFLOW_S3_ENDPOINT_URL": "http://artifacts-s3.argo.svc:9000", "METAFLOW_KUBERNETES_SECRETS": "metaflow-s3",
	}
	if d := cmp.Diff(want, settings); d != "" {
		t.Error(d)
	}
	for _, key := range []string{v1alpha1.KeyAccessKeyID, v1alpha1.KeySecretAccessKey} {
		if !strings.Contains(text, "{.data."+key+"}") {
			t.Errorf("no command reads %s", key)
		}
	}
}
