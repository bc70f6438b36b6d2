package controllers_test

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/controllers"
	"github.com/stepcache/stepcache/controllers/dataset"
	"github.com/stepcache/stepcache/controllers/envtest"
)

// The Events of leader election are of the older kind.
func TestWhoLeadsIsTold(t *testing.T) {
	t.Parallel()
	c, err := client.New(cluster, client.Options{Scheme: controllers.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	const system = envtest.System
	m, err := controllers.New(rights, controllers.Options{
		Dataset:        dataset.Options{Namespace: system, Image: "stepcache:v1", Store: dataset.StoreCSI, Only: system},
		LeaderElection: true, Metrics: "0", Probes: "0", Logger: logr.Discard(),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Start(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	envtest.Eventually(t, "an Event of leader election", func() error {
		list := &corev1.EventList{}
		if err := c.List(t.Context(), list, client.InNamespace(system)); err != nil {
			return err
		}
		if !slices.ContainsFunc(list.Items, func(e corev1.Event) bool { return e.Reason == "LeaderElection" }) {
			return errors.New("there is none")
		}
		return nil
	})
}
