package manifest

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation/field"
)

// tidy drops errors that only repeat another one: the schema library says several times, from each of
// its parts, that a field has the wrong type, and an API server that a name is not even one of any object,
// which allows what a Dataset's does not.
func tidy(errs field.ErrorList) field.ErrorList {
	if slices.ContainsFunc(errs, func(e *field.Error) bool { return strings.HasPrefix(e.Detail, datasetName) }) {
		errs = slices.DeleteFunc(errs, func(e *field.Error) bool { return e.Field == "metadata.name" })
	}
	var out field.ErrorList
	mistyped := map[string]bool{}
	for _, e := range errs {
		if e.Type == field.ErrorTypeTypeInvalid {
			if mistyped[e.Field] {
				continue
			}
			mistyped[e.Field] = true
		}
		out = append(out, e)
	}
	if len(mistyped) == 0 {
		return out
	}
	errs, out = out, nil
	for _, e := range errs {
		if strings.Contains(e.Detail, "at least one schema (anyOf)") || strings.HasPrefix(e.Detail, "Checked value must be") {
			continue
		}
		out = append(out, e)
	}
	return out
}

// datasetName begins the message of the rule for a Dataset's name.
const datasetName = "the name of a Dataset also names"

// describe is the text of an error for a user; a field error loses the API machinery's phrases.
func describe(err error) string {
	var e *field.Error
	if !errors.As(err, &e) {
		return err.Error()
	}
	detail := e.Detail
	// The schema library writes "spec.workers.replicas in body should be ...".
	if _, rest, ok := strings.Cut(detail, " in body "); ok {
		detail = rest
	}
	if strings.Contains(detail, quantityPattern) {
		detail = "must be a quantity such as 12Gi or 500Mi"
	}
	switch e.Type {
	case field.ErrorTypeRequired:
		if detail == "" {
			detail = "add it"
		}
		return e.Field + " is missing: " + detail
	case field.ErrorTypeNotSupported, field.ErrorTypeTooLong, field.ErrorTypeTooMany:
		detail = e.ErrorBody()
	case field.ErrorTypeDuplicate:
		return fmt.Sprintf("%s: %v is there twice; remove one", e.Field, text(e.BadValue))
	case field.ErrorTypeTypeInvalid:
		for _, t := range typeHints {
			if strings.Contains(detail, "must be of type "+t.name+":") {
				detail = t.hint
			}
		}
	case field.ErrorTypeInvalid:
		switch e.BadValue.(type) {
		case string, int, int32, int64, float64, bool:
			if e.BadValue != "" && e.BadValue != "object" && e.BadValue != "array" {
				detail = fmt.Sprintf("%v: %s", text(e.BadValue), detail)
			}
		}
	}
	if e.Field == "" || e.Field == "<nil>" {
		return detail
	}
	return e.Field + ": " + detail
}

// typeHints say for each type of the schema what to write.
var typeHints = []struct{ name, hint string }{
	{"string", "must be text; put it in quotes"},
	{"integer", "must be a whole number, without quotes"},
	{"int32", fmt.Sprintf("must be a whole number of at most %d", math.MaxInt32)},
	{"int64", fmt.Sprintf("must be a whole number of at most %d", math.MaxInt64)},
	{"integer,string", "must be a quantity such as 12Gi or 500Mi"},
	{"boolean", "must be true or false, without quotes"},
	{"array", "must be a list"},
	{"object", "must be a map of fields"},
}

// quantityPattern is a part of the pattern that the schema of a quantity has.
const quantityPattern = `(([KMGTPE]i)|[numkMGTPE]`

func text(v any) string {
	if s, ok := v.(string); ok {
		return fmt.Sprintf("%q", s)
	}
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Sprint(v)
	}
	return string(b)
}
