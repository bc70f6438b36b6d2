// Package controllers assembles the reconcilers of a cluster's installation into one manager.
//
// It owns what they share: the scheme, what is cached and what is not, leader election, probes and metrics.
// The cache holds this installation's own objects only, and of pods the workers': a step costs the
// controller nothing. Secrets are never cached, since to list them is to read all of a cluster's.
//
// Concurrency and failure are the manager's: the first error of a runnable ends it. It may import the
// reconcilers and api; only cmd imports it.
package controllers

import (
	"fmt"
	"time"

	"github.com/go-logr/logr"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/selection"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/utils/ptr"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/controllers/dataload"
	"github.com/stepcache/stepcache/controllers/dataset"
	"github.com/stepcache/stepcache/controllers/node"
)

// Options of a manager.
type Options struct {
	// Dataset are the reconcilers' own. Its Poll is for Datasets; loads are asked every LoadPoll.
	Dataset  dataset.Options
	LoadPoll time.Duration
	// LeaderElection has several replicas agree on one that acts.
	LeaderElection bool
	// Metrics and Probes are addresses to listen at; "0" turns one off.
	Metrics, Probes string
	Logger          logr.Logger
}

// Scheme knows every type that the controllers handle.
func Scheme() *runtime.Scheme {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(s); err != nil {
			panic(err) // two types of one name: a mistake of this program
		}
	}
	return s
}

// New returns a manager with all reconcilers, to be started.
func New(cluster *rest.Config, o Options) (manager.Manager, error) {
	ours, err := labels.NewRequirement(v1alpha1.LabelDataset, selection.Exists, nil)
	if err != nil {
		return nil, err
	}
	mine := cache.ByObject{Label: labels.NewSelector().Add(*ours)}
	var namespaces map[string]cache.Config
	if o.Dataset.Only != "" {
		namespaces = map[string]cache.Config{o.Dataset.Only: {}}
	}
	m, err := ctrl.NewManager(cluster, ctrl.Options{
		Scheme: Scheme(), Logger: o.Logger,
		Cache: cache.Options{
			DefaultNamespaces: namespaces,
			DefaultTransform:  cache.TransformStripManagedFields(),
			ByObject: map[client.Object]cache.ByObject{
				&corev1.Pod{}:                   {Label: labels.SelectorFromSet(labels.Set{v1alpha1.LabelComponent: v1alpha1.ComponentWorker})},
				&corev1.ConfigMap{}:             mine,
				&corev1.Service{}:               mine,
				&corev1.PersistentVolume{}:      mine,
				&corev1.PersistentVolumeClaim{}: mine,
				&appsv1.StatefulSet{}:           mine,
				&policyv1.PodDisruptionBudget{}: mine,
				&networkingv1.NetworkPolicy{}:   mine,
				&corev1.Node{}:                  {Transform: slim},
				&appsv1.DaemonSet{}:             {Namespaces: map[string]cache.Config{o.Dataset.Namespace: {}}, Label: labels.SelectorFromSet(labels.Set(node.DaemonSets))},
			},
		},
		Client:                        client.Options{Cache: &client.CacheOptions{DisableFor: []client.Object{&corev1.Secret{}}}},
		Metrics:                       metricsserver.Options{BindAddress: o.Metrics},
		HealthProbeBindAddress:        o.Probes,
		LeaderElection:                o.LeaderElection,
		LeaderElectionID:              "stepcache-controller",
		LeaderElectionNamespace:       o.Dataset.Namespace,
		LeaderElectionReleaseOnCancel: true,
		Controller:                    config.Controller{SkipNameValidation: ptr.To(o.Dataset.Only != "")},
	})
	if err != nil {
		return nil, fmt.Errorf("controller: %w", err)
	}
	recorder := m.GetEventRecorder("stepcache-controller")
	if err := dataset.New(m.GetClient(), m.GetAPIReader(), recorder, o.Dataset).SetupWithManager(m); err != nil {
		return nil, fmt.Errorf("controller: %w", err)
	}
	loads := o.Dataset
	loads.Poll = o.LoadPoll
	if err := dataload.New(m.GetClient(), m.GetAPIReader(), recorder, loads).SetupWithManager(m); err != nil {
		return nil, fmt.Errorf("controller: %w", err)
	}
	counted := newCensus(m.GetClient())
	if o.Dataset.Only == "" { // nodes are of no namespace
		nodes := node.New(m.GetClient(), o.Dataset)
		if err := nodes.SetupWithManager(m); err != nil {
			return nil, fmt.Errorf("controller: %w", err)
		}
		counted.nodes = nodes.Census
	}
	if err := m.Add(counted); err != nil {
		return nil, err
	}
	if err := m.AddHealthzCheck("ping", healthz.Ping); err != nil {
		return nil, err
	}
	if err := m.AddReadyzCheck("ping", healthz.Ping); err != nil {
		return nil, err
	}
	return m, nil
}

// slim keeps of a node what is asked of it: nodes change often and are large.
func slim(o any) (any, error) {
	if n, ok := o.(*corev1.Node); ok {
		n.ManagedFields, n.Status.Images, n.Annotations = nil, nil, nil
	}
	return o, nil
}
