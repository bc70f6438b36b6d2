package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/stepcache/stepcache/controllers/envtest"
)

// Controller and webhook take the image that their pod has, whatever else runs in it.
func TestOwnImage(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a kube-apiserver, which -short leaves out")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	cluster, stop, err := envtest.Start(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	}()
	c, err := kubernetes.NewForConfig(cluster)
	if err != nil {
		t.Fatal(err)
	}
	no := false
	if _, err := c.CoreV1().Pods("default").Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "webhook-0"},
		Spec: corev1.PodSpec{
			AutomountServiceAccountToken: &no,
			Containers:                   []corev1.Container{{Name: "mesh", Image: "mesh:v1"}, {Name: "webhook", Image: "registry.example/stepcache:v9"}},
		},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Setenv(envPod, "webhook-0")
	if got, err := ownImage(ctx, cluster, "default", "webhook"); err != nil || got != "registry.example/stepcache:v9" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := ownImage(ctx, cluster, "default", "controller"); !errors.As(err, &usage{}) || !strings.Contains(err.Error(), "no container named controller") {
		t.Errorf("a pod without the container: %v", err)
	}
	t.Setenv(envPod, "gone")
	if _, err := ownImage(ctx, cluster, "default", "webhook"); err == nil || !strings.Contains(err.Error(), `"gone" not found`) {
		t.Errorf("a pod that is not there: %v", err)
	}
}
