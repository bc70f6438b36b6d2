package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Group is the API group of every object of this module, and the prefix of its labels and annotations.
const Group = "data.stepcache.dev"

// Kinds of the group.
const (
	KindDataset  = "Dataset"
	KindDataLoad = "DataLoad"
)

var (
	// GroupVersion is the version that this package holds.
	GroupVersion = schema.GroupVersion{Group: Group, Version: "v1alpha1"}

	schemeBuilder = runtime.NewSchemeBuilder(func(s *runtime.Scheme) error {
		s.AddKnownTypes(GroupVersion, &Dataset{}, &DatasetList{}, &DataLoad{}, &DataLoadList{})
		metav1.AddToGroupVersion(s, GroupVersion)
		return nil
	})

	// AddToScheme registers the types with a scheme.
	AddToScheme = schemeBuilder.AddToScheme
)
