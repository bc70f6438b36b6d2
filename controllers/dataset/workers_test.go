package dataset

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// What a worker would end over is told before there is one.
func TestConfigurationThatAWorkerRefusesIsAnError(t *testing.T) {
	d := &v1alpha1.Dataset{}
	d.Namespace, d.Name = "argo", "artifacts"
	d.Spec.Access = v1alpha1.ReadWrite
	d.Spec.Mounts = []v1alpha1.Mount{{Source: "s3://data/", Path: "/"}}
	d.Spec.Workers = v1alpha1.Workers{Replicas: 2, Memory: resource.MustParse("64Mi")}
	r := &Reconciler{Options: Options{Store: StoreCSI}}
	c, err := r.workerConfig(d)
	if err != nil || c.Gateway == nil || c.Gateway.Bucket != "artifacts" || c.ID != "" {
		t.Fatalf("%+v, %v", c, err)
	}
	d.Spec.Write.Policy, d.Spec.Workers.Copies = v1alpha1.WriteBack, 2
	if c, err := r.workerConfig(d); err != nil || c.Write.Policy != "Back" || c.Write.Copies != 2 {
		t.Errorf("write policy Back: %+v, %v", c.Write, err)
	}
	d.Spec.Workers.Copies = 1
	if _, err := r.workerConfig(d); err == nil || !strings.Contains(err.Error(), "write.copies") {
		t.Errorf("write policy Back with one copy: %v", err)
	}
	d.Spec.Write.Policy = "Sometimes"
	if _, err := r.workerConfig(d); err == nil || !strings.Contains(err.Error(), "Sometimes") || !strings.Contains(err.Error(), "argo/artifacts") {
		t.Errorf("an unknown policy: %v", err)
	}
	d.Spec.Access = v1alpha1.ReadOnly
	if c, err := r.workerConfig(d); err != nil || c.Gateway != nil {
		t.Errorf("a Dataset that only reads: %+v, %v", c, err)
	}
}
