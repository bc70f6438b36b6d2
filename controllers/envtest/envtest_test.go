package envtest_test

import (
	"context"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/stepcache/stepcache/controllers/envtest"
)

// Built first by `make test`, by itself: it takes minutes once, which are no other test's.
func TestAPIServerStartsAndStops(t *testing.T) {
	cluster, stop, err := envtest.Start(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	c, err := kubernetes.NewForConfig(cluster)
	if err != nil {
		t.Fatal(err)
	}
	v, err := c.Discovery().ServerVersion()
	if err != nil || v.GitVersion == "" {
		t.Errorf("version %v, %v", v, err)
	}
	if _, err := c.CoreV1().Namespaces().Get(t.Context(), "default", metav1.GetOptions{}); err != nil {
		t.Error(err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}
