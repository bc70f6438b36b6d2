package envtest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// System is the namespace of an installation.
const System = "stepcache-system"

// Rights gives the controller's service account what config/rbac does, and nothing else, in a cluster that Start
// started.
func Rights(ctx context.Context, cluster *rest.Config) (*rest.Config, error) {
	admin, err := client.New(cluster, client.Options{})
	if err != nil {
		return nil, err
	}
	if err := admin.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: System}}); err != nil {
		return nil, err
	}
	for _, file := range []string{"role.yaml", "binding.yaml"} {
		b, err := os.ReadFile(filepath.Join(root(), "config", "rbac", file))
		if err != nil {
			return nil, err
		}
		for d := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(b), 4096); ; {
			o := &unstructured.Unstructured{}
			if err := d.Decode(&o.Object); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				return nil, err
			}
			if len(o.Object) == 0 {
				continue // what is before the first separator
			}
			if err := admin.Create(ctx, o); err != nil {
				return nil, err
			}
		}
	}
	limited := rest.CopyConfig(cluster)
	limited.Impersonate.UserName = "system:serviceaccount:" + System + ":stepcache-controller"
	return limited, nil
}
