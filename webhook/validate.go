package webhook

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/catalog"
)

// Objects is what validation knows besides the Cluster.
type Objects interface {
	Cluster
	// Loads are the DataLoads of a namespace. They must not be changed.
	Loads(ctx context.Context, namespace string) ([]*v1alpha1.DataLoad, error)
	// Memory is what each node that takes pods can give to pods, in bytes.
	Memory(ctx context.Context) ([]int64, error)
}

// Validate answers PathValidate: it refuses what the API server's own rules let pass and can never work, and
// warns of what will not work as things are.
type Validate struct {
	Objects Objects
}

// verdict is what was found in one object.
type verdict struct {
	errs     field.ErrorList
	warnings []string
}

func (v *verdict) warn(format string, a ...any) {
	v.warnings = append(v.warnings, fmt.Sprintf(format, a...))
}

// Handle implements admission.Handler.
func (h *Validate) Handle(ctx context.Context, r admission.Request) admission.Response {
	if r.Operation != admissionv1.Create && r.Operation != admissionv1.Update {
		return admission.Allowed("")
	}
	var v verdict
	var err error
	switch r.Kind.Kind {
	case v1alpha1.KindDataset:
		d, old := &v1alpha1.Dataset{}, &v1alpha1.Dataset{}
		if err = decode(r, d, old); err == nil && d.DeletionTimestamp == nil {
			d.Namespace = r.Namespace
			err = h.dataset(ctx, d, &v)
			// What was let in before must not keep an object from being changed otherwise, or mended.
			if r.Operation == admissionv1.Update && sameJSON(d.Spec, old.Spec) {
				v.errs = nil
			}
		}
	case v1alpha1.KindDataLoad:
		l, old := &v1alpha1.DataLoad{}, &v1alpha1.DataLoad{}
		if err = decode(r, l, old); err == nil && l.DeletionTimestamp == nil {
			l.Namespace = r.Namespace
			err = h.load(ctx, l, &v)
			if r.Operation == admissionv1.Update && sameJSON(l.Spec, old.Spec) {
				v.errs = nil
			}
		}
	default:
		return admission.Allowed("")
	}
	if err != nil {
		return failed(err)
	}
	if len(v.errs) > 0 {
		return admission.Denied(v.errs.ToAggregate().Error()).WithWarnings(v.warnings...)
	}
	return admission.Allowed("").WithWarnings(v.warnings...)
}

func decode(r admission.Request, object, old any) error {
	if err := json.Unmarshal(r.Object.Raw, object); err != nil {
		return fmt.Errorf("%s %s/%s cannot be read: %w", r.Kind.Kind, r.Namespace, r.Name, err)
	}
	if len(r.OldObject.Raw) == 0 {
		return nil
	}
	return json.Unmarshal(r.OldObject.Raw, old)
}

func sameJSON(a, b any) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && string(x) == string(y)
}

// overhead is what a worker's pod takes besides its cache, roughly.
const overhead = 256 << 20

func (h *Validate) dataset(ctx context.Context, d *v1alpha1.Dataset, v *verdict) error {
	v.errs = append(v.errs, d.CheckCluster()...)
	spec := field.NewPath("spec")
	others, err := h.Objects.Datasets(ctx, d.Namespace)
	if err != nil {
		return err
	}
	for _, m := range d.Spec.Mounts {
		if err := h.target(ctx, d, &m, spec.Child("mounts").Key(m.Path).Child("source"), v); err != nil {
			return err
		}
	}
	for _, r := range d.Spec.Replaces {
		at := spec.Child("replaces").Key(r.ClaimName)
		if err := replaceable(d, r.ClaimName); err != nil {
			v.errs = append(v.errs, field.Forbidden(at, err.Error()))
		}
		for _, o := range others {
			if o.Name == d.Name {
				continue
			}
			if v1alpha1.ClaimName(o.Name) == r.ClaimName {
				v.errs = append(v.errs, field.Forbidden(at, fmt.Sprintf("the claim is Dataset %s's own, which pods that use it already read", o.Name)))
			}
			if slices.Contains(o.Spec.Replaces, r) {
				v.errs = append(v.errs, field.Forbidden(at, fmt.Sprintf("Dataset %s replaces this claim already: a pod can be given only one of them", o.Name)))
			}
		}
	}
	for _, ns := range d.Spec.ShareWith {
		at := spec.Child("shareWith").Key(string(ns))
		if string(ns) == d.Namespace {
			v.warn("%s: pods of the Dataset's own namespace may read it anyway", at)
			continue
		}
		labels, err := h.Objects.NamespaceLabels(ctx, string(ns))
		if err != nil {
			return err
		}
		if labels == nil {
			v.warn("%s: there is no namespace of that name yet; whoever creates it can read the Dataset", at)
		}
	}
	return h.room(ctx, d, v)
}

// target checks a mount of another Dataset.
func (h *Validate) target(ctx context.Context, d *v1alpha1.Dataset, m *v1alpha1.Mount, at *field.Path, v *verdict) error {
	name, _, ok := m.Dataset()
	if !ok {
		return nil
	}
	if name == (types.NamespacedName{Namespace: d.Namespace, Name: d.Name}) {
		v.errs = append(v.errs, field.Invalid(at, m.Source, "a Dataset cannot be its own source"))
		return nil
	}
	seen := map[types.NamespacedName]bool{}
	for reader, next := d.Namespace, []types.NamespacedName{name}; len(next) > 0; next = next[1:] {
		n := next[0]
		if seen[n] {
			continue
		}
		first := len(seen) == 0
		seen[n] = true
		all, err := h.Objects.Datasets(ctx, n.Namespace)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(all, func(o *v1alpha1.Dataset) bool { return o.Name == n.Name })
		switch {
		case first && n.Namespace != reader && (i < 0 || !all[i].SharesWith(reader)):
			v.errs = append(v.errs, field.Forbidden(at, fmt.Sprintf("there is no Dataset %s that is shared with namespace %s: its owner adds the namespace to spec.shareWith", n, reader)))
			return nil
		case first && i < 0:
			v.warn("%s: there is no Dataset %s yet", at, n)
		case first && all[i].Spec.Access == v1alpha1.ReadWrite:
			v.warn("%s: Dataset %s has access: ReadWrite, and so no listing by which another could read it: mount its bucket instead", at, n)
		}
		if i < 0 {
			continue
		}
		for k := range all[i].Spec.Mounts {
			if t, _, ok := all[i].Spec.Mounts[k].Dataset(); ok {
				if t.Namespace == d.Namespace && t.Name == d.Name {
					v.errs = append(v.errs, field.Invalid(at, m.Source, fmt.Sprintf("Dataset %s is made of this one: they would wait for each other", n)))
					return nil
				}
				next = append(next, t)
			}
		}
	}
	return nil
}

// room warns where the workers will not fit the nodes.
func (h *Validate) room(ctx context.Context, d *v1alpha1.Dataset, v *verdict) error {
	nodes, err := h.Objects.Memory(ctx)
	if err != nil || len(nodes) == 0 {
		return err
	}
	want := d.Spec.Workers.MemoryBytes() + overhead
	var fit int64
	for _, n := range nodes {
		fit += n / want
	}
	switch replicas := int64(d.Spec.Workers.Replicas); {
	case fit == 0:
		v.warn("spec.workers.memory: no node has room for a worker of %s; the largest gives %s to all of its pods", size(want), size(slices.Max(nodes)))
	case fit < replicas:
		v.warn("spec.workers.replicas: of %d workers of %s at most %d fit the nodes as they are", replicas, size(want), fit)
	}
	if int(d.Spec.Workers.Copies) > len(nodes) {
		v.warn("spec.workers.copies: %d copies cannot be on distinct nodes: there are %d", d.Spec.Workers.Copies, len(nodes))
	}
	if d.Spec.Workers.Copies > 1 && d.Spec.Workers.Copies == d.Spec.Workers.Replicas {
		v.warn("spec.workers.copies: every worker holds everything, so that the tier holds no more than %s", size(d.Spec.Workers.MemoryBytes()))
	}
	return nil
}

func (h *Validate) load(ctx context.Context, l *v1alpha1.DataLoad, v *verdict) error {
	spec := field.NewPath("spec")
	datasets, err := h.Objects.Datasets(ctx, l.Namespace)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(datasets, func(d *v1alpha1.Dataset) bool { return d.Name == l.Spec.DatasetRef.Name })
	if i < 0 {
		var names []string
		for _, d := range datasets {
			names = append(names, d.Name)
		}
		slices.Sort(names)
		v.warn("%s: there is no Dataset %s in namespace %s yet (there is: %s); the load waits for it", spec.Child("datasetRef"), l.Spec.DatasetRef.Name, l.Namespace, listed(names))
	} else {
		h.fits(datasets[i], l, v)
	}
	for i, p := range l.Spec.Paths {
		if err := catalog.CheckPattern(string(p)); err != nil {
			v.errs = append(v.errs, field.Invalid(spec.Child("paths").Index(i), p, err.Error()))
		}
	}
	if l.Spec.Schedule != "" {
		if _, err := l.Spec.Schedule.Next(time.Now()); err != nil {
			v.errs = append(v.errs, field.Invalid(spec.Child("schedule"), l.Spec.Schedule, err.Error()))
		}
	}
	if l.Spec.RunAfter == nil {
		return nil
	}
	loads, err := h.Objects.Loads(ctx, l.Namespace)
	if err != nil {
		return err
	}
	at := spec.Child("runAfter")
	seen := map[string]bool{}
	for name := l.Spec.RunAfter.Name; ; {
		if name == l.Name {
			v.errs = append(v.errs, field.Invalid(at, l.Spec.RunAfter.Name, "that load runs, by way of others, after this one: neither would ever begin"))
			return nil
		}
		if seen[name] {
			return nil // a circle that this load is not part of
		}
		seen[name] = true
		k := slices.IndexFunc(loads, func(o *v1alpha1.DataLoad) bool { return o.Name == name })
		if k < 0 {
			if name == l.Spec.RunAfter.Name {
				v.warn("%s: there is no DataLoad %s in namespace %s yet; the load waits for it", at, name, l.Namespace)
			}
			return nil
		}
		if loads[k].Spec.RunAfter == nil {
			return nil
		}
		name = loads[k].Spec.RunAfter.Name
	}
}

// fits warns of a load that its Dataset's workers cannot hold.
func (h *Validate) fits(d *v1alpha1.Dataset, l *v1alpha1.DataLoad, v *verdict) {
	copies := l.CopiesOf(d)
	if copies > d.Spec.Workers.Replicas {
		v.warn("spec.copies: Dataset %s has %d workers, which cannot hold %d copies", d.Name, d.Spec.Workers.Replicas, copies)
	}
	if d.Spec.Access == v1alpha1.ReadWrite {
		v.warn("spec.datasetRef: Dataset %s has access: ReadWrite: there is no listing to load from", d.Name)
	}
	if need := d.Status.Bytes * int64(copies); len(l.Spec.Paths) == 0 && need > d.Spec.Workers.TotalBytes() {
		v.warn("Dataset %s has %s in %d copies, and its workers hold %s: the load cannot complete; name paths, or give the workers more memory",
			d.Name, size(d.Status.Bytes), copies, size(d.Spec.Workers.TotalBytes()))
	}
}
