// Package v1alpha1 holds the objects that a user writes: Dataset and DataLoad, group
// data.stepcache.dev.
//
// It owns their fields, defaults and validation rules, as markers from which controller-gen writes
// config/crd and zz_generated.deepcopy.go (`make generate`). A rule that an API server can check is a
// marker here and nowhere else; package manifest runs the very same rules in process. What no rule can
// say because it depends on where the object is used (file:// works in local mode only) is a method,
// such as Dataset.CheckCluster. An API server asks a rule of the object as a whole again whenever its status or a
// finalizer is written, also of an object from before the rule, which could then not even be deleted: such a rule that
// comes later is for new objects only (oldSelf.hasValue(), as of names).
//
// Concurrency: the types are plain values; methods do not modify their receiver. Failure: methods
// that read a quantity or a duration assume an object that has passed validation, and say what they
// return otherwise.
//
// It imports the Kubernetes API types and nothing else of this module.
//
// +kubebuilder:object:generate=true
// +groupName=data.stepcache.dev
package v1alpha1

//go:generate go tool -modfile=../../tools/generate/go.mod controller-gen object crd paths=. output:object:dir=. output:crd:dir=../../config/crd
//go:generate go tool -modfile=../../tools/generate/go.mod controller-gen crd paths=. output:crd:dir=../manifest/crd
