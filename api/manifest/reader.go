package manifest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// reader collects objects and errors over all files.
type reader struct {
	set  *Set
	errs []error
	// seen is where each object was read, to tell of a second one and of where a reference stands.
	seen map[object]place
}

// object names an object; place is where one was read.
type object struct{ kind, namespace, name string }

func (o object) String() string { return fmt.Sprintf("%s %s/%s", o.kind, o.namespace, o.name) }

type place struct {
	file           string
	document, line int
}

func newReader() *reader {
	return &reader{set: &Set{Ignored: map[string]int{}}, seen: map[object]place{}}
}

func (r *reader) fail(e *Error) { r.errs = append(r.errs, e) }

func (p place) error(object string, err error) *Error {
	return &Error{File: p.file, Document: p.document, Line: p.line, Object: object, Err: err}
}

func (r *reader) content(name string, content []byte) {
	docs, err := documents(name, content)
	if err != nil {
		r.fail(&Error{File: name, Err: err})
	}
	for i, doc := range docs {
		at := place{file: name, document: i + 1, line: doc.line}
		u, err := doc.decode()
		if err != nil {
			r.fail(at.error("", err))
			continue
		}
		if u != nil {
			r.add(at, u, 0)
		}
	}
}

// add takes one object in; depth counts the Lists that it is in.
func (r *reader) add(at place, u map[string]any, depth int) {
	apiVersion, _ := u["apiVersion"].(string)
	kindName, _ := u["kind"].(string)
	if apiVersion == "" || kindName == "" {
		r.fail(at.error("", errors.New("not an object: it needs apiVersion and kind, such as apiVersion: "+v1alpha1.GroupVersion.String()+" and kind: Dataset")))
		return
	}
	gv, err := schema.ParseGroupVersion(apiVersion)
	if err != nil {
		r.fail(at.error(kindName, field.Invalid(field.NewPath("apiVersion"), apiVersion, "must be group/version")))
		return
	}
	switch {
	case apiVersion == "v1" && kindName == "List":
		r.list(at, u, depth)
	case apiVersion == "v1" && kindName == "Secret":
		r.secret(at, u)
	case gv.Group == v1alpha1.Group:
		r.own(at, gv, kindName, u)
	default:
		r.set.Ignored[apiVersion+", "+kindName]++
	}
}

func (r *reader) list(at place, u map[string]any, depth int) {
	items, ok := u["items"].([]any)
	if !ok || depth > 0 {
		r.fail(at.error("List", field.Invalid(field.NewPath("items"), "", "must be a list of objects that are no Lists themselves")))
		return
	}
	for i, item := range items {
		o, ok := item.(map[string]any)
		if !ok {
			r.fail(at.error("List", field.Invalid(field.NewPath("items").Index(i), "", "must be an object")))
			continue
		}
		r.add(at, o, depth+1)
	}
}

// own takes in an object of this group.
func (r *reader) own(at place, gv schema.GroupVersion, kindName string, u map[string]any) {
	if gv != v1alpha1.GroupVersion {
		r.fail(at.error(kindName, field.NotSupported(field.NewPath("apiVersion"), gv.String(), []string{v1alpha1.GroupVersion.String()})))
		return
	}
	load, ok := kinds[kindName]
	if !ok {
		r.fail(at.error("", noKind(kindName)))
		return
	}
	k, err := load()
	if err != nil {
		r.fail(at.error(kindName, err))
		return
	}
	id, ok := r.identify(at, kindName, u)
	if !ok {
		return
	}
	// No context: the rules' cost is bounded by their budget, and nothing is waited for.
	if errs := k.admit(context.Background(), u); len(errs) > 0 {
		for _, err := range tidy(errs) {
			r.fail(at.error(id.String(), err))
		}
		return
	}
	b, err := json.Marshal(u)
	if err != nil {
		r.fail(at.error(id.String(), err))
		return
	}
	switch kindName {
	case v1alpha1.KindDataset:
		d := &v1alpha1.Dataset{}
		if err := json.Unmarshal(b, d); err != nil {
			r.fail(at.error(id.String(), err))
			return
		}
		r.set.Datasets = append(r.set.Datasets, d)
	case v1alpha1.KindDataLoad:
		l := &v1alpha1.DataLoad{}
		if err := json.Unmarshal(b, l); err != nil {
			r.fail(at.error(id.String(), err))
			return
		}
		r.set.DataLoads = append(r.set.DataLoads, l)
	}
}

// noKind is the error for a kind that this group does not have. A Secret is read, too, but is of another group.
func noKind(name string) *field.Error {
	meant := ""
	if near := nearest(name, kinds); near != "" {
		meant = "did you mean " + near + "? "
	}
	return field.Forbidden(field.NewPath("kind"), fmt.Sprintf("there is no %q in %s; %swhat is read are %s and %s, and Secret of apiVersion: v1",
		name, v1alpha1.GroupVersion, meant, v1alpha1.KindDataset, v1alpha1.KindDataLoad))
}

// identify finds an object's name, sets the default namespace and refuses a second object of the name.
func (r *reader) identify(at place, kindName string, u map[string]any) (object, bool) {
	meta, ok := u["metadata"].(map[string]any)
	if !ok {
		r.fail(at.error(kindName, field.Required(field.NewPath("metadata", "name"), "name the object")))
		return object{}, false
	}
	name, _ := meta["name"].(string)
	if name == "" {
		detail := "name the object"
		if meta["name"] != nil {
			detail = "the name must be text; put it in quotes"
		} else if meta["generateName"] != nil {
			detail = "a name made by the API server (generateName) cannot be read from a file; set name"
		}
		r.fail(at.error(kindName, field.Required(field.NewPath("metadata", "name"), detail)))
		return object{}, false
	}
	if meta["namespace"] == nil || meta["namespace"] == "" {
		meta["namespace"] = DefaultNamespace
	}
	namespace, ok := meta["namespace"].(string)
	if !ok {
		r.fail(at.error(kindName+" "+name, field.TypeInvalid(field.NewPath("metadata", "namespace"), "", "must be text; put it in quotes")))
		return object{}, false
	}
	id := object{kindName, namespace, name}
	if before, ok := r.seen[id]; ok {
		r.fail(at.error(id.String(), fmt.Errorf("there already is one in %s, document %d (line %d); remove one or give it another name",
			before.file, before.document, before.line)))
		return object{}, false
	}
	r.seen[id] = at
	return id, true
}

// finish checks what holds between objects.
func (r *reader) finish() (*Set, error) {
	if len(r.errs) == 0 {
		r.link()
	}
	if more := len(r.errs) - maxErrors; more > 0 {
		r.errs = append(r.errs[:maxErrors], fmt.Errorf("and %d more errors", more))
	}
	if len(r.errs) > 0 {
		return nil, errors.Join(r.errs...)
	}
	return r.set, nil
}
