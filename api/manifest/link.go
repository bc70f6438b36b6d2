package manifest

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// link checks the references between the objects that were read. A cluster reports these in the
// objects' conditions, since there they may be applied in any order; here nothing comes later.
func (r *reader) link() {
	for _, d := range r.set.Datasets {
		r.linkMounts(d)
	}
	loads := r.set.loads()
	for _, l := range r.set.DataLoads {
		r.linkLoad(l, loads)
	}
	if len(r.errs) == 0 {
		r.linkOrder(loads)
	}
}

func (r *reader) wrong(kind, namespace, name string, err *field.Error) {
	id := object{kind, namespace, name}
	r.fail(r.seen[id].error(id.String(), err))
}

func (r *reader) linkMounts(d *v1alpha1.Dataset) {
	for i := range d.Spec.Mounts {
		target, _, ok := d.Spec.Mounts[i].Dataset()
		if !ok {
			continue
		}
		path := field.NewPath("spec", "mounts").Index(i).Child("source")
		source := d.Spec.Mounts[i].Source
		t, found := r.set.Dataset(target)
		switch {
		case !found:
			r.wrong(v1alpha1.KindDataset, d.Namespace, d.Name, field.Invalid(path, source,
				fmt.Sprintf("there is no Dataset %s in these manifests; add it%s", target, r.otherGroup(v1alpha1.KindDataset))))
		case t == d:
			r.wrong(v1alpha1.KindDataset, d.Namespace, d.Name, field.Invalid(path, source, "a Dataset cannot mount itself"))
		case !t.SharesWith(d.Namespace):
			r.wrong(v1alpha1.KindDataset, d.Namespace, d.Name, field.Invalid(path, source,
				fmt.Sprintf("Dataset %s does not share with namespace %s; add it to that Dataset's shareWith", target, d.Namespace)))
		case r.reaches(t, d, map[*v1alpha1.Dataset]bool{}):
			r.wrong(v1alpha1.KindDataset, d.Namespace, d.Name, field.Invalid(path, source,
				fmt.Sprintf("Dataset %s leads back to this one", target)))
		}
	}
}

// reaches says whether from mounts to, directly or through others.
func (r *reader) reaches(from, to *v1alpha1.Dataset, seen map[*v1alpha1.Dataset]bool) bool {
	if seen[from] {
		return false
	}
	seen[from] = true
	for i := range from.Spec.Mounts {
		target, _, ok := from.Spec.Mounts[i].Dataset()
		if !ok {
			continue
		}
		if t, found := r.set.Dataset(target); found && (t == to || r.reaches(t, to, seen)) {
			return true
		}
	}
	return false
}

func (r *reader) linkLoad(l *v1alpha1.DataLoad, loads map[types.NamespacedName]*v1alpha1.DataLoad) {
	spec := field.NewPath("spec")
	d, ok := r.set.Dataset(types.NamespacedName{Namespace: l.Namespace, Name: l.Spec.DatasetRef.Name})
	if !ok {
		r.wrong(v1alpha1.KindDataLoad, l.Namespace, l.Name, field.Invalid(spec.Child("datasetRef", "name"), l.Spec.DatasetRef.Name,
			fmt.Sprintf("there is no Dataset of that name in namespace %s in these manifests; add it or correct the name%s", l.Namespace, r.otherGroup(v1alpha1.KindDataset))))
	} else if c := l.CopiesOf(d); c > d.Spec.Workers.Replicas {
		r.wrong(v1alpha1.KindDataLoad, l.Namespace, l.Name, field.Invalid(spec.Child("copies"), c,
			fmt.Sprintf("must not exceed the %d workers of Dataset %s/%s: each copy is on a worker of its own", d.Spec.Workers.Replicas, d.Namespace, d.Name)))
	}
	if l.Spec.RunAfter != nil && loads[before(l)] == nil {
		r.wrong(v1alpha1.KindDataLoad, l.Namespace, l.Name, field.Invalid(spec.Child("runAfter", "name"), l.Spec.RunAfter.Name,
			fmt.Sprintf("there is no DataLoad of that name in namespace %s in these manifests; add it or correct the name%s", l.Namespace, r.otherGroup(v1alpha1.KindDataLoad))))
	}
}

// otherGroup is what follows the error for an object that is not there, where one of its kind stands in the manifests
// with another apiVersion: it was passed over, as another system's or with a mistake in it.
func (r *reader) otherGroup(kind string) string {
	for _, ignored := range slices.Sorted(maps.Keys(r.set.Ignored)) {
		if apiVersion, ok := strings.CutSuffix(ignored, ", "+kind); ok {
			return fmt.Sprintf(" (a %s of apiVersion %s is there, which is not used: it would have to be %s)", kind, apiVersion, v1alpha1.GroupVersion)
		}
	}
	return ""
}

// linkOrder refuses loads that wait for each other.
func (r *reader) linkOrder(loads map[types.NamespacedName]*v1alpha1.DataLoad) {
	for _, l := range r.set.DataLoads {
		path := field.NewPath("spec", "runAfter", "name")
		seen := map[*v1alpha1.DataLoad]bool{l: true}
		for at := l; at.Spec.RunAfter != nil; {
			at = loads[before(at)]
			if seen[at] {
				r.wrong(v1alpha1.KindDataLoad, l.Namespace, l.Name, field.Invalid(path, l.Spec.RunAfter.Name,
					"these loads wait for each other, so that none would run; remove one runAfter"))
				break
			}
			seen[at] = true
		}
	}
}

// loads indexes the loads by name.
func (s *Set) loads() map[types.NamespacedName]*v1alpha1.DataLoad {
	m := make(map[types.NamespacedName]*v1alpha1.DataLoad, len(s.DataLoads))
	for _, l := range s.DataLoads {
		m[types.NamespacedName{Namespace: l.Namespace, Name: l.Name}] = l
	}
	return m
}

// before names the load that l, which has one, runs after.
func before(l *v1alpha1.DataLoad) types.NamespacedName {
	return types.NamespacedName{Namespace: l.Namespace, Name: l.Spec.RunAfter.Name}
}

// Loads returns the loads so that each comes after the one it runs after, else as they were read.
func (s *Set) Loads() []*v1alpha1.DataLoad {
	loads := s.loads()
	done := make(map[*v1alpha1.DataLoad]bool, len(s.DataLoads))
	ordered := make([]*v1alpha1.DataLoad, 0, len(s.DataLoads))
	var visit func(l *v1alpha1.DataLoad)
	visit = func(l *v1alpha1.DataLoad) {
		if l == nil || done[l] {
			return
		}
		done[l] = true
		if l.Spec.RunAfter != nil {
			visit(loads[before(l)])
		}
		ordered = append(ordered, l)
	}
	for _, l := range s.DataLoads {
		visit(l)
	}
	return ordered
}
