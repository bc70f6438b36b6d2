package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// steps is how many steps the hashing workflows have.
func steps() int {
	if full() {
		return 100
	}
	return 20
}

// some is how many steps the workflows of the other modes have.
func some() int {
	if full() {
		return 100
	}
	return 3
}

// TestCluster is one story, told in order: each part builds on those before it.
func TestCluster(t *testing.T) {
	need(t)
	part := func(name string, f func(t *testing.T)) {
		t.Helper()
		start := time.Now()
		ran := false
		if !t.Run(name, func(t *testing.T) { ran = true; f(t) }) {
			t.Fatalf("%s failed; what follows builds on it", name)
		}
		if ran { // -test.run selects parts
			t.Logf("%s: %.0f s", name, time.Since(start).Seconds())
		}
	}
	var in input
	part("Install", func(t *testing.T) {
		clean(t)
		install(t)
	})
	part("Input", func(t *testing.T) { in = put(t) })
	part("Quickstart", func(t *testing.T) { quickstart(t, in) })
	part("Warm", func(t *testing.T) { placed(t, in) })
	part("Cold", func(t *testing.T) { cold(t, in) })
	part("FanOut", func(t *testing.T) { fanOut(t, in) })
	part("MapReduce", mapReduce)
	part("Job", func(t *testing.T) { job(t, in) })
	part("Stage", func(t *testing.T) { stage(t, in) })
	part("Sidecar", func(t *testing.T) { sidecar(t, in) })
	part("Replaces", func(t *testing.T) { replaces(t, in) })
	part("Artifacts", artifacts)
	part("WrittenBack", writtenBack)
	part("Sharing", func(t *testing.T) { sharing(t, in) })
	part("KilledSidecars", func(t *testing.T) { killedSidecars(t, in) })
	part("KilledPods", func(t *testing.T) { killedPods(t, in) })
	part("LostWebhooks", func(t *testing.T) { lostWebhooks(t, in) })
	part("KilledNode", func(t *testing.T) { lostNode(t, in, "kill-node", "start-node") })
	if full() {
		part("FrozenNode", func(t *testing.T) { lostNode(t, in, "pause-node", "resume-node") })
		part("CutNode", func(t *testing.T) { lostNode(t, in, "cut-node", "join-node") })
	}
	part("Scaled", func(t *testing.T) { scaled(t, in) })
	part("Upgraded", func(t *testing.T) { upgraded(t, in) })
	part("DeletedInUse", deletedInUse)
	part("Uninstalled", func(t *testing.T) { uninstalled(t, in) })
}

// clean takes away what a former run left, the installation too: it may be of another build. On a cluster that is
// not the test's own it does so only when told to.
func clean(t *testing.T) {
	if found := kubectl(t, "get", "namespaces", system, other, "--ignore-not-found", "-o", "name"); found != "" && !hasLab() && os.Getenv("STEPCACHE_E2E") != "replace" {
		t.Fatalf("this cluster has %s: STEPCACHE_E2E=replace lets the test delete all Datasets, the installation, and the workflows of namespace %s",
			strings.Join(strings.Fields(found), " and "), namespace)
	}
	kubectl(t, "delete", "namespace", other, "--ignore-not-found", "--timeout", patience.String())
	kubectl(t, "label", "namespace", namespace, "pod-security.kubernetes.io/enforce-")
	kubectl(t, "delete", "workflows,jobs", "-n", namespace, "--all", "--timeout", patience.String())
	kubectl(t, "delete", "pods", "-n", namespace, "--ignore-not-found", "demo-reader", "demo-stage", "demo-sidecar", "holder", "holder-sidecar", "before-upgrade", "after-upgrade")
	if kubectl(t, "get", "namespace", system, "--ignore-not-found", "-o", "name") != "" {
		uninstall(t, "--delete-pods")
	}
}

// install applies everything and waits until it serves.
func install(t *testing.T) {
	kubectl(t, "apply", "--server-side", "-k", "config/default")
	for _, w := range []string{"deploy/stepcache-controller", "deploy/stepcache-webhook", "ds/stepcache-node"} {
		kubectl(t, "rollout", "status", "-n", "stepcache-system", w, "--timeout", patience.String())
	}
}

func quickstart(t *testing.T, in input) {
	kubectl(t, "apply", "-n", namespace, "-k", "examples/quickstart")
	waitReady(t, namespace, "demo")
	waitLoaded(t, namespace, "demo-warm")
	eventually(t, "the status tells that all is cached", func(ctx context.Context) error {
		got, err := get(ctx, namespace, "dataset", "demo", "{.status.bytes} {.status.cached}")
		if want := fmt.Sprintf("%d %d", in.bytes, in.bytes); err == nil && got != want {
			err = fmt.Errorf("bytes and cached: got %q, want %q", got, want)
		}
		return err
	})
	apply(t, namespace, example(t, "quickstart/pod.yaml"))
	if log := waitPod(t, namespace, "demo-reader"); !strings.Contains(log, in.largeSum) {
		t.Errorf("the pod read:\n%s\nwant the digest %s", log, in.largeSum)
	}
	kubectl(t, "delete", "pod", "-n", namespace, "demo-reader")
}

// hashing runs the hashing workflow over a claim: every step finds the one digest, and the bucket sends at
// most the given bytes.
func hashing(t *testing.T, in input, claim string, most int64) {
	before, start := sent(t), time.Now()
	name := submit(t, "hashing/workflow.yaml", hash(claim, steps())...)
	oneDigest(t, in, waitWorkflow(t, name), steps())
	left := sent(t) - before
	t.Logf("%d steps over %s, cold: %.1f s, %d bytes left the bucket", steps(), claim, time.Since(start).Seconds(), left)
	if most += 1 << 20; left > most+most/50 {
		t.Errorf("%d bytes left the bucket, more than once a byte (%d)", left, most)
	}
}

func oneDigest(t *testing.T, in input, lines []string, want int) {
	t.Helper()
	n := 0
	for _, line := range lines {
		if sum, _, ok := strings.Cut(line, " "); ok && sum == in.largeSum {
			n++
		} else {
			t.Errorf("a step printed %q, want the digest %s", line, in.largeSum)
		}
	}
	if n != want {
		t.Errorf("%d steps printed the digest, want %d", n, want)
	}
}

// cold makes a Dataset that nothing has warmed: the steps fetch it, each byte once.
func cold(t *testing.T, in input) {
	apply(t, namespace, strings.ReplaceAll(example(t, "quickstart/dataset.yaml"), "name: demo}", "name: cold}"))
	waitReady(t, namespace, "cold")
	hashing(t, in, "cold", in.bytes)
}

func fanOut(t *testing.T, in input) {
	lines := waitWorkflow(t, submit(t, "fan-out/workflow.yaml"))
	sums := 0
	for _, line := range lines {
		if strings.Contains(line, "/data/shards/") {
			sums++
		}
	}
	if sums != in.shards {
		t.Errorf("%d shards were hashed, want %d:\n%s", sums, in.shards, strings.Join(lines, "\n"))
	}
}

func mapReduce(t *testing.T) {
	// The reducer fails by itself where the sums differ.
	waitWorkflow(t, submit(t, "map-reduce/workflow.yaml"))
}

func job(t *testing.T, in input) {
	apply(t, namespace, example(t, "job/job.yaml"))
	kubectl(t, "wait", "-n", namespace, "job/demo-job", "--for=condition=complete", "--timeout", patience.String())
	out := kubectl(t, "logs", "-n", namespace, "-l", "job-name=demo-job", "--tail=-1", "--max-log-requests=20")
	if n := strings.Count(out, in.largeSum); n != 8 {
		t.Errorf("%d of 8 pods found the digest:\n%s", n, out)
	}
	kubectl(t, "delete", "job", "-n", namespace, "demo-job")
}

// stage reads without any privilege, in a namespace that enforces the restricted level.
func stage(t *testing.T, in input) {
	const level = "pod-security.kubernetes.io/enforce"
	kubectl(t, "label", "namespace", namespace, "--overwrite", level+"=restricted")
	defer kubectl(t, "label", "namespace", namespace, level+"-")
	apply(t, namespace, example(t, "stage/pod.yaml"))
	if log := waitPod(t, namespace, "demo-stage"); !strings.Contains(log, in.largeSum) {
		t.Errorf("the staged pod read:\n%s", log)
	}
	kubectl(t, "delete", "pod", "-n", namespace, "demo-stage")
	n := some()
	name := submit(t, "hashing/workflow.yaml", slices.Concat(hash("demo", n), unprivileged, labelled("data.stepcache.dev/inject: stage"))...)
	oneDigest(t, in, waitWorkflow(t, name), n)
	allEnd(t, name)
	// The level holds: where nobody lends a sidecar its mounts it must be privileged, and is refused.
	alone := edit(t, example(t, "sidecar/pod.yaml"), "inject: sidecar}", "inject: sidecar, "+nobodyLends+"}")
	if out, err := run(t.Context(), alone, "create", "-n", namespace, "-f", "-"); err == nil {
		t.Errorf("a privileged pod was admitted: %s", out)
	} else if !strings.Contains(err.Error(), "use stage") {
		t.Errorf("a privileged pod was refused for another reason: %v", err)
	}
	// What has its mounts lent needs no right.
	name = submit(t, "hashing/workflow.yaml", slices.Concat(hash("demo", n), unprivileged, labelled("data.stepcache.dev/inject: sidecar"))...)
	oneDigest(t, in, waitWorkflow(t, name), n)
	allEnd(t, name)
}

// nobodyLends is a label of pods on nodes that are made for them, where no node service is: their sidecars mount by
// themselves, on any node.
const nobodyLends = `alibabacloud.com/eci: "true"`

// sidecar reads through mounts of the pods' own, lent ones and such as they make themselves, and leaves none on the
// nodes.
func sidecar(t *testing.T, in input) {
	apply(t, namespace, example(t, "sidecar/pod.yaml"))
	if log := waitPod(t, namespace, "demo-sidecar"); !strings.Contains(log, in.largeSum) {
		t.Errorf("the pod with a sidecar read:\n%s", log)
	}
	// A mount that is left would keep the pod Terminating.
	kubectl(t, "delete", "pod", "-n", namespace, "demo-sidecar", "--timeout", patience.String())
	n := some()
	for _, more := range []string{"", ", " + nobodyLends} {
		name := submit(t, "hashing/workflow.yaml", slices.Concat(hash("demo", n), labelled("data.stepcache.dev/inject: sidecar"+more),
			[]string{"  entrypoint: main\n", "  entrypoint: main\n  parallelism: 12\n"})...)
		oneDigest(t, in, waitWorkflow(t, name), n)
		allEnd(t, name)
		kubectl(t, "delete", "workflow", "-n", namespace, name)
		noSidecarMounts(t)
	}
}

// replaces adopts a claim that workflows have always used.
func replaces(t *testing.T, in input) {
	apply(t, namespace, example(t, "replaces/dataset.yaml"))
	waitReady(t, namespace, "adopted")
	eventually(t, "the namespace is watched", func(ctx context.Context) error {
		got, err := run(ctx, "", "get", "namespace", namespace, "-o", `jsonpath={.metadata.labels.data\.stepcache\.dev/watched}`)
		if err == nil && got != "true" {
			err = fmt.Errorf("label watched is %q", got)
		}
		return err
	})
	oneDigest(t, in, waitWorkflow(t, submit(t, "replaces/workflow.yaml")), 1)
	kubectl(t, "delete", "dataset", "-n", namespace, "adopted")
}

// hold starts a pod that has a claim mounted until it is deleted.
func hold(t *testing.T, claim string) {
	t.Helper()
	apply(t, namespace, edit(t, example(t, "quickstart/pod.yaml"), "demo-reader", "holder", "claimName: demo", "claimName: "+claim,
		`"ls -l /data && sha256sum /data/large.bin"`, `"exec sleep 3600"`))
	kubectl(t, "wait", "-n", namespace, "pod/holder", "--for=condition=Ready", "--timeout", patience.String())
}

// deletedInUse deletes a Dataset that a pod uses: it waits and names the pod, and goes when the pod has.
func deletedInUse(t *testing.T) {
	hold(t, "cold")
	kubectl(t, "delete", "dataset", "-n", namespace, "cold", "--wait=false")
	eventually(t, "the Dataset says who uses it", func(ctx context.Context) error {
		got, err := get(ctx, namespace, "dataset", "cold", "{.status.conditions[*].message}")
		if err == nil && !strings.Contains(got, "holder") {
			err = errors.New(got)
		}
		return err
	})
	kubectl(t, "delete", "pod", "-n", namespace, "holder", "--grace-period=1")
	eventually(t, "the Dataset is gone, and its volume", func(ctx context.Context) error {
		out, err := run(ctx, "", "get", "dataset,pvc,statefulset", "-n", namespace, "-o", "name")
		if err == nil && strings.Contains(out, "cold") {
			err = errors.New(out)
		}
		return err
	})
}
