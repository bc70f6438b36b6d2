package controllers

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// census exports the status of Datasets and DataLoads beside the metrics that a manager has. Every replica has
// it, the leader or not: what it reads is the cache. Workers export what they do themselves.
type census struct {
	reader client.Reader
	nodes  func(context.Context) (map[string]int, error) // nil: nodes are not looked at

	condition, bytes, cached, unflushed, workers, phase, progress, total, failed, ready *prometheus.Desc
}

func newCensus(r client.Reader) *census {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("stepcache_"+name, help, labels, nil)
	}
	return &census{
		reader:    r,
		condition: desc("dataset_condition", "Whether a condition of a Dataset is True, with its reason.", "dataset", "condition", "reason"),
		bytes:     desc("dataset_bytes", "Bytes that a Dataset shows.", "dataset"),
		cached:    desc("dataset_cached_bytes", "Bytes that a Dataset's workers hold, of former listings and in further copies too.", "dataset"),
		unflushed: desc("dataset_unflushed_bytes", "Bytes acknowledged and not yet in the bucket.", "dataset"),
		workers:   desc("dataset_workers", "Worker pods of a Dataset, by state: wanted, ready.", "dataset", "state"),
		phase:     desc("dataload_phase", "1 for the phase that a DataLoad is in, 0 for the others.", "dataload", "dataset", "phase"),
		progress:  desc("dataload_bytes", "Bytes that are held of what a DataLoad wants.", "dataload", "dataset"),
		total:     desc("dataload_total_bytes", "Bytes that a DataLoad wants.", "dataload", "dataset"),
		failed:    desc("dataload_failed_files", "Files that a DataLoad could not load.", "dataload", "dataset"),
		ready:     desc("nodes", "Nodes that the node service is to run on, by their label node-ready: true, false, or unknown where it may still come.", "ready"),
	}
}

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (c *census) NeedLeaderElection() bool { return false }

// Start implements manager.Runnable: the manager calls it when its cache is filled. The registry is the
// process's, so that of several managers in one process, which only tests have, the first exports.
func (c *census) Start(ctx context.Context) error {
	if err := metrics.Registry.Register(c); errors.As(err, new(prometheus.AlreadyRegisteredError)) {
		return nil
	} else if err != nil {
		return err
	}
	defer metrics.Registry.Unregister(c)
	<-ctx.Done()
	return nil
}

// Describe implements prometheus.Collector.
func (c *census) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.condition, c.bytes, c.cached, c.unflushed, c.workers, c.phase, c.progress, c.total, c.failed, c.ready} {
		ch <- d
	}
}

// censusTimeout bounds reads of a cache, which are from memory.
const censusTimeout = 5 * time.Second

// Collect implements prometheus.Collector.
func (c *census) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), censusTimeout)
	defer cancel()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	var sets v1alpha1.DatasetList
	if err := c.reader.List(ctx, &sets); err != nil {
		ch <- prometheus.NewInvalidMetric(c.condition, err) // the scrape fails and says why
		return
	}
	for i := range sets.Items {
		d := &sets.Items[i]
		name := d.Namespace + "/" + d.Name
		conditions := []string{v1alpha1.ConditionSourced, v1alpha1.ConditionWorkersReady, v1alpha1.ConditionVolumeReady, v1alpha1.ConditionReady}
		if !d.DeletionTimestamp.IsZero() {
			conditions = nil // it is not to become Ready any more
		}
		for _, condition := range conditions {
			v, reason := 0.0, ""
			if has := apimeta.FindStatusCondition(d.Status.Conditions, condition); has != nil {
				reason = has.Reason
				if has.Status == metav1.ConditionTrue {
					v = 1
				}
			}
			gauge(c.condition, v, name, condition, reason)
		}
		gauge(c.bytes, float64(d.Status.Bytes), name)
		gauge(c.cached, float64(d.Status.Cached), name)
		gauge(c.unflushed, float64(d.Status.Unflushed.Bytes), name)
		gauge(c.workers, float64(d.Spec.Workers.Replicas), name, "wanted")
		gauge(c.workers, float64(d.Status.Workers.Ready), name, "ready")
	}
	var loads v1alpha1.DataLoadList
	if err := c.reader.List(ctx, &loads); err != nil {
		ch <- prometheus.NewInvalidMetric(c.phase, err)
		return
	}
	for i := range loads.Items {
		l := &loads.Items[i]
		name, set := l.Namespace+"/"+l.Name, l.Namespace+"/"+l.Spec.DatasetRef.Name
		phase := l.Status.Phase
		if phase == "" {
			phase = v1alpha1.DataLoadPending
		}
		for _, p := range []v1alpha1.DataLoadPhase{v1alpha1.DataLoadPending, v1alpha1.DataLoadRunning, v1alpha1.DataLoadComplete, v1alpha1.DataLoadFailed} {
			in := 0.0
			if p == phase {
				in = 1
			}
			gauge(c.phase, in, name, set, string(p))
		}
		gauge(c.progress, float64(l.Status.Progress.Bytes), name, set)
		gauge(c.total, float64(l.Status.Progress.TotalBytes), name, set)
		gauge(c.failed, float64(l.Status.FailedFiles), name, set)
	}
	if c.nodes == nil {
		return
	}
	nodes, err := c.nodes(ctx)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(c.ready, err)
		return
	}
	for label, value := range map[string]string{"true": "true", "false": "false", "": "unknown"} {
		gauge(c.ready, float64(nodes[label]), value)
	}
}
