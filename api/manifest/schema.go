package manifest

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	structuralschema "k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel/model"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/listtype"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/objectmeta"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/pruning"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	apivalidation "k8s.io/apimachinery/pkg/api/validation"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation/field"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"k8s.io/apiserver/pkg/cel/common"
	"sigs.k8s.io/yaml"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// crds are copies of config/crd, since an embedded file has to lie below its package.
//
//go:embed crd/*.yaml
var crds embed.FS

// kind is what an API server makes of one definition.
type kind struct {
	structural *structuralschema.Structural
	openapi    validation.SchemaValidator
	rules      *cel.Validator
}

var kinds = map[string]func() (*kind, error){
	v1alpha1.KindDataset:  sync.OnceValues(func() (*kind, error) { return compile("crd/data.stepcache.dev_datasets.yaml") }),
	v1alpha1.KindDataLoad: sync.OnceValues(func() (*kind, error) { return compile("crd/data.stepcache.dev_dataloads.yaml") }),
}

func compile(file string) (*kind, error) {
	b, err := crds.ReadFile(file)
	if err != nil {
		return nil, err
	}
	crd := &apiextensionsv1.CustomResourceDefinition{}
	if err := yaml.Unmarshal(b, crd); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	for _, v := range crd.Spec.Versions {
		if v.Name != v1alpha1.GroupVersion.Version || v.Schema == nil {
			continue
		}
		in := &apiextensions.CustomResourceValidation{}
		if err := apiextensionsv1.Convert_v1_CustomResourceValidation_To_apiextensions_CustomResourceValidation(v.Schema, in, nil); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		s, err := structuralschema.NewStructural(in.OpenAPIV3Schema)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		s = s.DeepCopy()
		if err := defaulting.PruneDefaults(s); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		openapi, _, err := validation.NewSchemaValidator(in.OpenAPIV3Schema)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		return &kind{structural: s, openapi: openapi, rules: cel.NewValidator(s, true, celconfig.PerCallLimit)}, nil
	}
	return nil, fmt.Errorf("%s: no version %s", file, v1alpha1.GroupVersion.Version)
}

// admit does to an object what an API server does on create: it refuses unknown fields, sets defaults
// in place and validates.
func (k *kind) admit(ctx context.Context, object map[string]any) field.ErrorList {
	errs := k.prune(object)
	defaulting.Default(object, k.structural)
	return append(errs, k.validate(ctx, object, nil)...)
}

// prune removes fields that the schema does not have and reports each.
func (k *kind) prune(object map[string]any) field.ErrorList {
	// A client does not write the status: an API server drops it.
	delete(object, "status")
	var errs field.ErrorList
	options := objectmeta.ObjectMetaOptions{ReturnUnknownFieldPaths: true}
	meta, found, unknown, err := objectmeta.GetObjectMetaWithOptions(object, options)
	if err != nil {
		errs = append(errs, malformed(object["metadata"], err))
		// What is wrong with the rest is told too.
		options.DropMalformedFields = true
		if meta, found, unknown, err = objectmeta.GetObjectMetaWithOptions(object, options); err != nil {
			return errs
		}
	}
	apiVersion, kindName := object["apiVersion"], object["kind"]
	unknown = append(unknown, pruning.PruneWithOptions(object, k.structural, true, structuralschema.UnknownFieldPathOptions{TrackUnknownFieldPaths: true})...)
	defaulting.PruneNonNullableNullsWithoutDefaults(object, k.structural)
	object["apiVersion"], object["kind"] = apiVersion, kindName
	if found {
		if err := objectmeta.SetObjectMeta(object, meta); err != nil {
			return field.ErrorList{field.TypeInvalid(field.NewPath("metadata"), "", err.Error())}
		}
	}
	for _, path := range unknown {
		errs = append(errs, k.unknown(path))
	}
	return errs
}

// malformed is the error for metadata that could not be decoded for the reason err. Where a field has the wrong type, it
// is put as the schema library puts it of the other fields.
func malformed(metadata any, err error) *field.Error {
	at := field.NewPath("metadata")
	var mistyped *json.UnmarshalTypeError
	if b, e := json.Marshal(metadata); e == nil && errors.As(json.Unmarshal(b, &metav1.ObjectMeta{}), &mistyped) && mistyped.Field != "" {
		if name, ok := schemaTypes[mistyped.Type.Kind()]; ok {
			return field.TypeInvalid(at.Child(mistyped.Field), "", fmt.Sprintf("must be of type %s: %q", name, mistyped.Value))
		}
	}
	return field.TypeInvalid(at, "", "cannot be read: "+err.Error())
}

// schemaTypes are the names that a schema has for the types of the metadata's fields.
var schemaTypes = map[reflect.Kind]string{
	reflect.String: "string", reflect.Int64: "integer", reflect.Bool: "boolean",
	reflect.Slice: "array", reflect.Map: "object", reflect.Struct: "object",
}

// validate runs the checks of an API server's create strategy, or with old those of its update strategy.
func (k *kind) validate(ctx context.Context, object, old map[string]any) field.ErrorList {
	var errs field.ErrorList
	meta, found, err := objectmeta.GetObjectMeta(object, false)
	if err != nil || !found {
		return field.ErrorList{field.Required(field.NewPath("metadata", "name"), "name the object")}
	}
	errs = append(errs, apivalidation.ValidateObjectMeta(meta, true, apivalidation.NameIsDNSSubdomain, field.NewPath("metadata"))...)

	var openapiOptions []validation.ValidationOption
	var celOptions []cel.Option
	if old != nil {
		// What an update leaves as it was is not refused, even if the rules became stricter meanwhile.
		same := common.NewCorrelatedObject(object, old, &model.Structural{Structural: k.structural})
		openapiOptions = append(openapiOptions, validation.WithRatcheting(same))
		celOptions = append(celOptions, cel.WithRatcheting(same))
		errs = append(errs, validation.ValidateCustomResourceUpdate(nil, object, old, k.openapi, openapiOptions...)...)
	} else {
		errs = append(errs, validation.ValidateCustomResource(nil, object, k.openapi)...)
	}
	if old == nil || len(listtype.ValidateListSetsAndMaps(nil, k.structural, old)) == 0 {
		errs = append(errs, listtype.ValidateListSetsAndMaps(nil, k.structural, object)...)
	}
	for _, e := range errs {
		switch e.Type {
		case field.ErrorTypeRequired, field.ErrorTypeTooLong, field.ErrorTypeTooMany, field.ErrorTypeTypeInvalid:
			return errs // the rules assume these: an API server does not run them either
		}
	}
	var oldObject any
	if old != nil {
		oldObject = old
	}
	ruleErrs, _ := k.rules.Validate(ctx, nil, k.structural, object, oldObject, celconfig.RuntimeCELCostBudget, celOptions...)
	return append(errs, ruleErrs...)
}

// unknown is the error for a field that the schema does not have, with the name that was meant, if one
// is near.
func (k *kind) unknown(path string) *field.Error {
	parent, name := "", path
	if i := strings.LastIndexByte(path, '.'); i >= 0 {
		parent, name = path[:i], path[i+1:]
	}
	s := k.structural
	for _, step := range strings.FieldsFunc(parent, func(r rune) bool { return r == '.' || r == '[' }) {
		if strings.HasSuffix(step, "]") {
			s = s.Items
		} else if p, ok := s.Properties[step]; ok {
			s = &p
		} else if s.AdditionalProperties != nil {
			s = s.AdditionalProperties.Structural
		} else {
			s = nil
		}
		if s == nil {
			break
		}
	}
	detail := "there is no such field; remove it"
	if s != nil {
		if near := nearest(name, s.Properties); near != "" {
			detail = fmt.Sprintf("there is no such field; did you mean %s?", near)
		}
	}
	return &field.Error{Type: field.ErrorTypeForbidden, Field: path, Detail: detail}
}

// Validate returns what an API server would find wrong with creating the object, a *v1alpha1.Dataset or
// a *v1alpha1.DataLoad, after setting its defaults. The object is not changed.
func Validate(ctx context.Context, object runtime.Object) field.ErrorList {
	k, u, err := untyped(object)
	if err != nil {
		return field.ErrorList{field.InternalError(nil, err)}
	}
	return k.admit(ctx, u)
}

// ValidateUpdate returns what an API server would find wrong with changing old to object.
func ValidateUpdate(ctx context.Context, object, old runtime.Object) field.ErrorList {
	k, u, err := untyped(object)
	if err != nil {
		return field.ErrorList{field.InternalError(nil, err)}
	}
	oldKind, oldU, err := untyped(old)
	if err != nil {
		return field.ErrorList{field.InternalError(nil, err)}
	}
	if k != oldKind {
		return field.ErrorList{field.InternalError(nil, errors.New("an update cannot change the kind"))}
	}
	for _, o := range []map[string]any{u, oldU} {
		if errs := k.prune(o); len(errs) > 0 {
			return errs
		}
		defaulting.Default(o, k.structural)
	}
	return k.validate(ctx, u, oldU)
}

func untyped(object runtime.Object) (*kind, map[string]any, error) {
	var name string
	switch object.(type) {
	case *v1alpha1.Dataset:
		name = v1alpha1.KindDataset
	case *v1alpha1.DataLoad:
		name = v1alpha1.KindDataLoad
	default:
		return nil, nil, fmt.Errorf("%T is not validated here", object)
	}
	k, err := kinds[name]()
	if err != nil {
		return nil, nil, err
	}
	u, err := runtime.DefaultUnstructuredConverter.ToUnstructured(object)
	if err != nil {
		return nil, nil, err
	}
	u["apiVersion"], u["kind"] = v1alpha1.GroupVersion.String(), name
	if meta, ok := u["metadata"].(map[string]any); ok && meta["namespace"] == nil {
		meta["namespace"] = DefaultNamespace
	}
	return k, u, nil
}
