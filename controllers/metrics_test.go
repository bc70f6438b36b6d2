package controllers

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// datasets lists Datasets, and nothing else.
type datasets struct {
	client.Reader
	all []v1alpha1.Dataset
}

func (d datasets) List(_ context.Context, into client.ObjectList, _ ...client.ListOption) error {
	if l, ok := into.(*v1alpha1.DatasetList); ok {
		l.Items = d.all
	}
	return nil
}

// Alerts go by the reason: a Dataset whose workers are being updated, as somebody asked, is no trouble.
func TestConditionsAreExportedWithTheirReason(t *testing.T) {
	d := v1alpha1.Dataset{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "data"}}
	d.Status.Conditions = []metav1.Condition{
		{Type: v1alpha1.ConditionReady, Status: metav1.ConditionFalse, Reason: "Updating"},
		{Type: v1alpha1.ConditionVolumeReady, Status: metav1.ConditionTrue, Reason: "Bound"},
	}
	registry := prometheus.NewPedanticRegistry()
	deleted := d.DeepCopy()
	deleted.Name, deleted.DeletionTimestamp = "deleted", &metav1.Time{Time: time.Now()} // a pod uses it
	registry.MustRegister(newCensus(datasets{all: []v1alpha1.Dataset{d, *deleted}}))
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	for _, f := range families {
		for _, m := range f.Metric {
			if f.GetName() == "stepcache_dataset_condition" {
				var labels []string
				for _, l := range m.Label { // sorted by name
					labels = append(labels, l.GetValue())
				}
				got[fmt.Sprint(strings.Join(labels, ","), " ", m.Gauge.GetValue())] = true
			}
		}
	}
	want := []string{"Ready,ns/data,Updating 0", "Sourced,ns/data, 0", "VolumeReady,ns/data,Bound 1", "WorkersReady,ns/data, 0"}
	if got := slices.Sorted(maps.Keys(got)); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
