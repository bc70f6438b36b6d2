// Package generate pins the generators of this repository (see its go.mod), and checks what they
// write with code that is too heavy to be a dependency of the product.
package generate

import (
	"os"
	"path/filepath"
	"testing"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation"
	"sigs.k8s.io/yaml"
)

// An API server refuses a definition whose rules do not compile, whose schema is not structural, or
// whose rules could cost too much for the largest object that the schema allows.
func TestAPIServerAcceptsDefinitions(t *testing.T) {
	files, err := filepath.Glob("../../config/crd/data.stepcache.dev_*.yaml")
	if err != nil || len(files) != 2 {
		t.Fatalf("config/crd holds %d definitions (%v), want 2; run make generate", len(files), err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			crd := &apiextensionsv1.CustomResourceDefinition{}
			if err := yaml.UnmarshalStrict(b, crd); err != nil {
				t.Fatal(err)
			}
			apiextensionsv1.SetDefaults_CustomResourceDefinition(crd)
			apiextensionsv1.SetDefaults_CustomResourceDefinitionSpec(&crd.Spec)
			in := &apiextensions.CustomResourceDefinition{}
			if err := apiextensionsv1.Convert_v1_CustomResourceDefinition_To_apiextensions_CustomResourceDefinition(crd, in, nil); err != nil {
				t.Fatal(err)
			}
			in.Status.StoredVersions = []string{"v1alpha1"}
			for _, err := range validation.ValidateCustomResourceDefinition(t.Context(), in) {
				t.Error(err)
			}
		})
	}
}
