package webhook

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

func review(t *testing.T, object, old any) admission.Request {
	t.Helper()
	r := admission.Request{AdmissionRequest: admissionv1.AdmissionRequest{UID: "1", Namespace: "argo", Operation: admissionv1.Create}}
	r.Kind.Kind = v1alpha1.KindDataset
	if l, ok := object.(*v1alpha1.DataLoad); ok {
		r.Kind.Kind, r.Name = v1alpha1.KindDataLoad, l.Name
	}
	var err error
	if r.Object.Raw, err = json.Marshal(object); err != nil {
		t.Fatal(err)
	}
	if old != nil {
		r.Operation = admissionv1.Update
		if r.OldObject.Raw, err = json.Marshal(old); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

func load(name string, change ...func(*v1alpha1.DataLoad)) *v1alpha1.DataLoad {
	l := &v1alpha1.DataLoad{ObjectMeta: metav1.ObjectMeta{Namespace: "argo", Name: name}, Spec: v1alpha1.DataLoadSpec{DatasetRef: v1alpha1.Reference{Name: "genomes"}}}
	for _, c := range change {
		c(l)
	}
	return l
}

func after(name string) func(*v1alpha1.DataLoad) {
	return func(l *v1alpha1.DataLoad) { l.Spec.RunAfter = &v1alpha1.Reference{Name: name} }
}

func at(schedule v1alpha1.Schedule) func(*v1alpha1.DataLoad) {
	return func(l *v1alpha1.DataLoad) { l.Spec.Schedule = schedule }
}

func from(source string) func(*v1alpha1.Dataset) {
	return func(d *v1alpha1.Dataset) { d.Spec.Mounts = []v1alpha1.Mount{{Source: source, Path: "/"}} }
}

func TestValidation(t *testing.T) {
	copies := int32(5)
	for _, c := range []struct {
		name   string
		object any
		world  func(*world)
		denied string // empty: let in
		warned string // empty: without a warning
	}{
		{"Dataset", dataset("argo", "d"), nil, "", ""},
		{"local source", dataset("argo", "d", from("file:///x")), nil, "local mode", ""},
		{"no credentials", dataset("argo", "d", from("s3://x")), nil, "credentialsSecretRef", ""},
		{"itself as source", dataset("argo", "d", from("dataset://argo/d")), nil, "its own source", ""},
		{"unknown source", dataset("argo", "d", from("dataset://argo/x")), nil, "", "no Dataset argo/x yet"},
		{"source that is shared", dataset("argo", "d", from("dataset://ref/hg38/sub")), nil, "", ""},
		{"source that is not shared", dataset("argo", "d", from("dataset://ref/hg38")), func(w *world) { w.datasets[1].Spec.ShareWith = nil }, "spec.shareWith", ""},
		{"source elsewhere that is not there", dataset("argo", "d", from("dataset://ref/x")), nil, "spec.shareWith", ""},
		{"source that is writable", dataset("argo", "d", from("dataset://argo/genomes")), func(w *world) { w.datasets[0].Spec.Access = v1alpha1.ReadWrite }, "", "no listing by which another could read it"},
		{"circle", dataset("argo", "d", from("dataset://argo/genomes")), func(w *world) { from("dataset://argo/d")(w.datasets[0]) }, "wait for each other", ""},
		{"circle of others", dataset("argo", "d", from("dataset://argo/genomes")), func(w *world) { from("dataset://argo/genomes")(w.datasets[0]) }, "", ""},
		{"claim of another Dataset", dataset("argo", "d", func(d *v1alpha1.Dataset) { d.Spec.Replaces = []v1alpha1.Replaced{{ClaimName: "genomes"}} }), nil, "Dataset genomes's own", ""},
		{"claim replaced twice", dataset("argo", "d", func(d *v1alpha1.Dataset) { d.Spec.Replaces = []v1alpha1.Replaced{{ClaimName: "oss-data"}} }), nil, "only one of them", ""},
		{"shared with itself", dataset("argo", "d", func(d *v1alpha1.Dataset) { d.Spec.ShareWith = []v1alpha1.Namespace{"argo", "ref"} }), nil, "", "own namespace"},
		{"shared with nobody", dataset("argo", "d", func(d *v1alpha1.Dataset) { d.Spec.ShareWith = []v1alpha1.Namespace{"nope"} }), nil, "", "no namespace of that name"},
		{"worker too large", dataset("argo", "d"), func(w *world) { w.memory = []int64{1 << 30} }, "", "no node has room"},
		{"too many workers", dataset("argo", "d"), func(w *world) { w.memory = []int64{3 << 30} }, "", "at most 2 fit"},
		{"no nodes known", dataset("argo", "d"), func(w *world) { w.memory = nil }, "", ""},
		{"more copies than nodes", dataset("argo", "d", func(d *v1alpha1.Dataset) { d.Spec.Workers.Copies = 2 }), func(w *world) { w.memory = []int64{1 << 40} }, "", "distinct nodes"},
		{"everything everywhere", dataset("argo", "d", func(d *v1alpha1.Dataset) { d.Spec.Workers.Copies = 3 }), nil, "", "every worker holds everything"},

		{"load", load("l"), nil, "", ""},
		{"load of nothing", load("l", func(l *v1alpha1.DataLoad) { l.Spec.DatasetRef.Name = "x" }), nil, "", "there is: genomes"},
		{"too many copies", load("l", func(l *v1alpha1.DataLoad) { l.Spec.Copies = &copies }), nil, "", "cannot hold 5 copies"},
		{"too much", load("l"), func(w *world) { w.datasets[0].Status.Bytes = 1 << 40 }, "", "cannot complete"},
		{"a pattern that nothing ever ends to match", load("l", func(l *v1alpha1.DataLoad) {
			l.Spec.Paths = []v1alpha1.PathPattern{"/a", v1alpha1.PathPattern("/" + strings.Repeat("{,}", 40))}
		}), nil,
			`spec.paths[1]: Invalid value: "/` + strings.Repeat("{,}", 40) + `": the pattern`, ""},
		{"load of a writable Dataset", load("l"), func(w *world) { w.datasets[0].Spec.Access = v1alpha1.ReadWrite }, "", "no listing to load from"},
		{"at a time that comes", load("l", at("0 0 29 2 *")), nil, "", ""},
		{"at a time that never comes", load("l", at("0 0 30 2 *")), nil, "names no day that comes", ""},
		{"after one that is absent", load("l", after("x")), nil, "", "no DataLoad x"},
		{"after another", load("l", after("x")), func(w *world) { w.loads = []*v1alpha1.DataLoad{load("x")} }, "", ""},
		{"after each other", load("l", after("x")), func(w *world) { w.loads = []*v1alpha1.DataLoad{load("x", after("y")), load("y", after("l"))} }, "neither would ever begin", ""},
		{"after a circle", load("l", after("x")), func(w *world) { w.loads = []*v1alpha1.DataLoad{load("x", after("y")), load("y", after("x"))} }, "", ""},
	} {
		w := newWorld()
		if c.world != nil {
			c.world(w)
		}
		r := (&Validate{w}).Handle(context.Background(), review(t, c.object, nil))
		message := ""
		if r.Result != nil && !r.Allowed {
			message = r.Result.Message
		}
		if r.Allowed != (c.denied == "") || !strings.Contains(message, c.denied) {
			t.Errorf("%s: allowed %v: %q; want %q", c.name, r.Allowed, message, c.denied)
		}
		warned := strings.Join(r.Warnings, "\n")
		if (warned == "") != (c.warned == "") || !strings.Contains(warned, c.warned) {
			t.Errorf("%s: warned %q; want %q", c.name, warned, c.warned)
		}
	}
}

// An object that was let in before can be labelled, and its finalizers taken away, whatever is wrong with it.
func TestValidationOfUpdates(t *testing.T) {
	h := &Validate{newWorld()}
	old := dataset("argo", "d", from("file:///x"))
	same := old.DeepCopy()
	same.Finalizers = nil
	same.Labels = map[string]string{"a": "b"}
	if r := h.Handle(context.Background(), review(t, same, old)); !r.Allowed {
		t.Errorf("the same spec: %v", r.Result)
	}
	changed := old.DeepCopy()
	changed.Spec.Workers.Replicas++
	if r := h.Handle(context.Background(), review(t, changed, old)); r.Allowed {
		t.Error("another spec, still wrong, is let in")
	}
	now := metav1.Now()
	changed.DeletionTimestamp = &now
	if r := h.Handle(context.Background(), review(t, changed, old)); !r.Allowed {
		t.Errorf("on its way out: %v", r.Result)
	}
	r := review(t, old, nil)
	r.Object = runtime.RawExtension{Raw: []byte("{")}
	if a := h.Handle(context.Background(), r); a.Allowed {
		t.Error("what cannot be read is let in")
	}
}
