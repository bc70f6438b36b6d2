package controllers_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/wire"
)

// cutOff is what the addresses of workers begin with that nobody reaches.
const cutOff = "192.0.2."

// control is how the controllers reach workers: through what changes their answers, where a test has that.
func (w *world) control(ctx context.Context, network, addr string) (net.Conn, error) {
	if strings.HasPrefix(addr, cutOff) {
		w.dialling.Add(1)
		defer w.dialling.Add(-1)
		ctx, cancel := context.WithTimeout(ctx, wire.DialTimeout)
		defer cancel()
		<-ctx.Done()
		return nil, ctx.Err()
	}
	w.mu.Lock()
	if w.teller != "" {
		addr = w.teller
	}
	w.mu.Unlock()
	return (&net.Dialer{}).DialContext(ctx, network, addr)
}

// between has the workers' answers to the controllers go through change first.
func (w *world) between(change func(*http.Response) error) {
	w.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	w.must(err)
	proxy := &httputil.ReverseProxy{
		Rewrite:        func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", r.In.Host },
		ErrorLog:       log.New(io.Discard, "", 0),
		ModifyResponse: change,
	}
	server := &http.Server{Handler: proxy, ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(l) }()
	w.Cleanup(func() { server.Close(); <-done })
	w.set(func(w *world) { w.teller = l.Addr().String() })
}

// tell has the workers of a Dataset be such as acknowledge writes before the bucket has them: their pods say so,
// and their real answers to the controllers are told again with what lags says.
func (w *world) tell(d *v1alpha1.Dataset) {
	w.Helper()
	w.set(func(w *world) { w.lags = make(map[string]wire.Unflushed) })
	w.between(func(r *http.Response) error {
		if r.Request.URL.Path != wire.PathStatus || r.StatusCode != http.StatusOK {
			return nil
		}
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return err
		}
		r.Body.Close()
		var s wire.WorkerStatus
		if err := json.Unmarshal(b, &s); err != nil {
			return err
		}
		w.mu.Lock()
		s.Unflushed = w.lags[s.ID]
		w.mu.Unlock()
		if b, err = json.Marshal(s); err != nil {
			return err
		}
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(b)), int64(len(b))
		r.Header.Del("Content-Length")
		return nil
	})
	pods := &corev1.PodList{}
	w.must(w.List(w.Context(), pods, client.InNamespace(w.ns), client.MatchingLabels{v1alpha1.LabelDataset: d.Name}))
	for i := range pods.Items {
		update(w, &pods.Items[i], func(p *corev1.Pod) {
			metav1.SetMetaDataAnnotation(&p.ObjectMeta, "data.stepcache.dev/write-policy", "Back")
		})
	}
	w.condition(d, v1alpha1.ConditionFlushed, metav1.ConditionTrue, "Flushed")
}

// lag has a worker say what the bucket does not have.
func (w *world) lag(worker string, u wire.Unflushed) {
	w.set(func(w *world) { w.lags[worker] = u })
}

// passes waits until the controllers have looked at a Dataset so many times more.
func (w *world) passes(d *v1alpha1.Dataset, n int) {
	w.Helper()
	_, from := w.requests.since(0)
	w.passesSince(d, from, n)
}

// acceptLoss is what the way out tells a user to do, of some generation.
func (w *world) acceptLoss(d *v1alpha1.Dataset, newer int64) {
	w.Helper()
	update(w, d, func(d *v1alpha1.Dataset) {
		metav1.SetMetaDataAnnotation(&d.ObjectMeta, "data.stepcache.dev/accept-loss", fmt.Sprint(d.Generation+newer))
	})
}

func TestDeletionWaitsUntilTheBucketHasEverything(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 2, 1, 1000)
	w.tell(d)
	since := time.Now().Add(-time.Hour).Truncate(time.Second)
	w.lag("genomes-worker-0", wire.Unflushed{Objects: 3, Bytes: 12 << 20, Oldest: since.Add(time.Minute)})
	w.lag("genomes-worker-1", wire.Unflushed{Objects: 1, Bytes: 1 << 20, Oldest: since})
	w.condition(d, v1alpha1.ConditionFlushed, metav1.ConditionFalse, "Pending", "4 objects", "13 MiB", since.UTC().Format(time.RFC3339))
	if u := d.Status.Unflushed; u.Objects != 4 || u.Bytes != 13<<20 || !u.Oldest.Time.Equal(since) {
		t.Errorf("status %s", asJSON(u))
	}
	if d.Status.Phase != v1alpha1.DatasetReady {
		t.Errorf("phase %s: what is pending is no reason not to be ready", d.Status.Phase)
	}
	w.must(w.Delete(t.Context(), d))
	w.condition(d, v1alpha1.ConditionReady, metav1.ConditionFalse, "Unflushed", fmt.Sprintf("accept-loss=%d", d.Generation+1))
	w.event("WaitsForBucket", "deletion waits", fmt.Sprintf("kubectl annotate dset -n %s genomes --overwrite data.stepcache.dev/accept-loss=%d", w.ns, d.Generation))

	w.lag("genomes-worker-0", wire.Unflushed{Objects: 3, Bytes: 12 << 20, Oldest: since.Add(time.Minute), Problem: "access denied by s3://data"})
	w.condition(d, v1alpha1.ConditionFlushed, metav1.ConditionFalse, "BucketUnavailable", "access denied by s3://data")
	w.event("BucketUnavailable", "access denied by s3://data")

	w.lag("genomes-worker-1", wire.Unflushed{})
	w.passes(d, 4)
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(d), d)) // one worker's are enough to wait for
	w.lag("genomes-worker-0", wire.Unflushed{})
	w.gone(d)
}

func TestDeletionGoesOnWhenTheUserAcceptsTheLoss(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 2, 1, 1000)
	w.tell(d)
	w.lag("genomes-worker-0", wire.Unflushed{Objects: 3, Bytes: 12 << 20, Oldest: time.Now()})
	w.acceptLoss(d, 0) // for what it was before: the deletion is another change
	w.condition(d, v1alpha1.ConditionFlushed, metav1.ConditionFalse, "Pending")
	w.must(w.Delete(t.Context(), d))
	w.condition(d, v1alpha1.ConditionReady, metav1.ConditionFalse, "Unflushed")
	w.passes(d, 3)
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(d), d))
	w.acceptLoss(d, 0)
	w.gone(d)
	w.event("LossAccepted", "deletion", "3 objects")
}

func TestDeletionWaitsForAWorkerThatCannotBeAsked(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 2, 1, 1000)
	w.tell(d)
	w.set(func(w *world) {
		w.deaf = true
		w.workers["genomes-worker-1"].cancel()
	})
	w.condition(d, v1alpha1.ConditionFlushed, metav1.ConditionUnknown, "NotAnswering", "genomes-worker-1 does not answer")
	w.must(w.Delete(t.Context(), d))
	w.condition(d, v1alpha1.ConditionReady, metav1.ConditionFalse, "Unflushed")
	w.event("WaitsForBucket", "genomes-worker-1 does not answer")
	w.passes(d, 4)
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(d), d))

	// Its memory is gone with its pod; the one that comes after it never ran. It is one of the workers for a
	// minute still, after which the others bring to the bucket what they hold for it.
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "genomes-worker-1"}}
	w.must(w.Delete(t.Context(), pod, client.GracePeriodSeconds(0)))
	w.passes(d, 4)
	w.clock.advance(2 * time.Minute)
	w.gone(d)
}

func TestScaleInWaitsForWhatWasWrittenBeforeIt(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 3, 1, 1000)
	w.tell(d)
	w.lag("genomes-worker-0", wire.Unflushed{Objects: 1, Bytes: 10, Oldest: w.clock.Now()})
	w.condition(d, v1alpha1.ConditionFlushed, metav1.ConditionFalse, "Pending")
	update(w, d, func(d *v1alpha1.Dataset) { d.Spec.Workers.Replicas = 2 })
	w.event("WaitsForBucket", "scaling in waits", "accept-loss=")
	w.passes(d, 4)
	set := &appsv1.StatefulSet{}
	w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: "genomes-worker"}, set))
	if *set.Spec.Replicas != 3 {
		t.Fatalf("%d replicas: it did not wait", *set.Spec.Replicas)
	}
	// What comes after it never is on the worker that leaves, so that writers cannot keep it.
	w.lag("genomes-worker-0", wire.Unflushed{Objects: 9, Bytes: 10, Oldest: w.clock.Now().Add(2 * time.Minute)})
	w.waitReady(d)
	w.event("ScaledIn", "to 2 workers")
	w.condition(d, v1alpha1.ConditionFlushed, metav1.ConditionFalse, "Pending", "9 objects")
}

func TestARolloutWaitsUntilTheBucketHasEverything(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 2, 1, 1000)
	w.tell(d)
	uids := func() (all []string) {
		pods := &corev1.PodList{}
		w.must(w.List(t.Context(), pods, client.InNamespace(w.ns), client.MatchingLabels{v1alpha1.LabelComponent: v1alpha1.ComponentWorker}))
		for _, p := range pods.Items {
			all = append(all, string(p.UID))
		}
		return all
	}
	before := asJSON(uids())
	w.lag("genomes-worker-0", wire.Unflushed{Objects: 1, Bytes: 10, Oldest: w.clock.Now()})
	w.condition(d, v1alpha1.ConditionFlushed, metav1.ConditionFalse, "Pending")
	w.eventually("a drain of nodes waits too", func() error {
		if got := w.evictsUnhealthy(); got != "" {
			return fmt.Errorf("pods that are not ready are evicted by policy %q", got)
		}
		return nil
	})
	update(w, d, func(d *v1alpha1.Dataset) {
		metav1.SetMetaDataAnnotation(&d.ObjectMeta, v1alpha1.AnnotationRollout, "1")
	})
	w.event("WaitsForBucket", "a restart of workers waits", "accept-loss=")
	w.passes(d, 4)
	if now := asJSON(uids()); now != before {
		t.Fatalf("pods %s, before %s: it did not wait", now, before)
	}
	w.lag("genomes-worker-0", wire.Unflushed{})
	w.eventually("every pod is another one", func() error {
		for _, uid := range uids() {
			if strings.Contains(before, uid) {
				return fmt.Errorf("%s is there still", uid)
			}
		}
		return nil
	})
	w.waitReady(d)
	// None of the new ones acknowledges a write before the bucket has it.
	w.eventually("nothing is said of writes any more", func() error {
		w.must(w.Get(t.Context(), client.ObjectKeyFromObject(d), d))
		if c := meta.FindStatusCondition(d.Status.Conditions, v1alpha1.ConditionFlushed); c != nil || d.Status.Unflushed.Objects != 0 {
			return fmt.Errorf("%s", asJSON(d.Status))
		}
		if got := w.evictsUnhealthy(); got != policyv1.AlwaysAllow {
			return fmt.Errorf("pods that are not ready are evicted by policy %q", got)
		}
		return nil
	})
}

func TestAWorkerOnADeadNodeIsReplacedOnceTheOthersHaveFlushed(t *testing.T) {
	w := newWorld(t)
	p := []byte("some bytes")
	w.bucket.PutT(t, "data", "file", p)
	w.must(w.Create(t.Context(), w.secret("access-key")))
	d := w.dataset("genomes", 2)
	d.Spec.Workers.Copies = 2
	w.must(w.Create(t.Context(), d))
	w.waitReady(d)
	w.tell(d)
	w.lag("genomes-worker-1", wire.Unflushed{Objects: 1, Bytes: 10, Oldest: w.clock.Now()})
	w.condition(d, v1alpha1.ConditionFlushed, metav1.ConditionFalse, "Pending")
	lost := w.members(d).Members[0]
	w.node(0, corev1.ConditionUnknown)
	w.set(func(w *world) { // the machine is gone
		w.workers[lost.ID].cancel()
		<-w.workers[lost.ID].done
	})
	w.condition(d, v1alpha1.ConditionWorkersReady, metav1.ConditionFalse, "NodeUnreachable", lost.ID)
	w.passes(d, 3) // in which the worker is asked in vain
	w.clock.advance(4 * time.Minute)
	w.condition(d, v1alpha1.ConditionFlushed, metav1.ConditionFalse, "Pending", lost.ID, lost.Node, "1 objects")
	w.event("WorkerUnreachable", lost.ID, lost.Node, "accept-loss=")
	pod := &corev1.Pod{}
	w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: lost.ID}, pod))
	uid := pod.UID
	w.lag("genomes-worker-1", wire.Unflushed{})
	w.event("WorkerReplaced", lost.ID, lost.Node)
	w.waitReady(d)
	w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: lost.ID}, pod))
	if pod.UID == uid || pod.Spec.NodeName == lost.Node {
		t.Errorf("pod %s on %s", pod.UID, pod.Spec.NodeName)
	}
}
