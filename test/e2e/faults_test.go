package e2e

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

const system = "stepcache-system"

// few is how many steps a workflow has that runs while something is broken.
func few() int {
	if full() {
		return 20
	}
	return 3
}

// rolledOut waits until everything of the installation is as it should be.
func rolledOut(t *testing.T) {
	t.Helper()
	for _, w := range []string{"deploy/stepcache-controller", "deploy/stepcache-webhook", "ds/stepcache-node"} {
		eventually(t, w+" is rolled out", func(ctx context.Context) error {
			_, err := run(ctx, "", "rollout", "status", "-n", system, w, "--timeout=30s")
			return err
		})
	}
}

// uids are the ids of the pods with a label, and how often each was restarted.
func uids(t *testing.T, namespace, label string) string {
	t.Helper()
	return kubectl(t, "get", "pods", "-n", namespace, "-l", label, "-o",
		"jsonpath={range .items[*]}{.metadata.name} {.metadata.uid} {.status.containerStatuses[*].restartCount}{'\\n'}{end}")
}

// workers waits until a Dataset has so many workers, all ready and members.
func workers(t *testing.T, name string, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("Dataset %s has %d workers", name, n), func(ctx context.Context) error {
		got, err := get(ctx, namespace, "statefulset", name+"-worker", "{.spec.replicas} {.status.replicas} {.status.readyReplicas}")
		if err = want(got, fmt.Sprintf("%d %d %d", n, n, n), err); err != nil {
			return err
		}
		list, err := get(ctx, namespace, "configmap", name+"-tier", `{.data.membership\.json}`)
		if err == nil && (strings.Count(list, `"control"`) != n || strings.Count(list, `"leaving"`) > 0) {
			err = fmt.Errorf("the membership is %s", list)
		}
		return err
	})
	waitReady(t, namespace, name)
}

// killedPods ends parts of the product one after the other while steps read on every node and new ones start.
func killedPods(t *testing.T, in input) {
	whileReading(t, in, "cold", func() []string {
		crash := []string{"--grace-period=0", "--force"}
		for _, part := range []struct {
			name string
			args []string
		}{
			{"a killed worker", append(crash, "-n", namespace, "pod/cold-worker-0")},
			{"killed controllers", append(crash, "-n", system, "pods", "-l", "data.stepcache.dev/component=controller")},
			// In order, as an update does: what a crash of theirs costs is another story (csi's tests).
			{"restarted node services", []string{"-n", system, "pods", "-l", "data.stepcache.dev/component=node"}},
		} {
			start := time.Now()
			kubectl(t, append([]string{"delete", "--wait=false"}, part.args...)...)
			oneDigest(t, in, waitWorkflow(t, submit(t, "hashing/workflow.yaml", hash("cold", few())...)), few())
			t.Logf("%s: %d steps in %.0f s", part.name, few(), time.Since(start).Seconds())
			rolledOut(t)
			workers(t, "cold", 2)
		}
		return nil
	})
}

// lostWebhooks kills one replica, of which nothing may be seen, and then takes all away: pods that ask for data
// are refused, never run without, and go on when a replica is back. Others are not touched.
func lostWebhooks(t *testing.T, in input) {
	asks := func(steps int, more ...string) []string {
		return slices.Concat(hash("demo", steps), labelled("data.stepcache.dev/inject: csi"), more)
	}
	pod := strings.Fields(kubectl(t, "get", "pods", "-n", system, "-l", "data.stepcache.dev/component=webhook", "-o", "name"))[0]
	name := submit(t, "hashing/workflow.yaml", asks(few())...)
	kubectl(t, "delete", "-n", system, pod, "--wait=false", "--grace-period=0", "--force")
	oneDigest(t, in, waitWorkflow(t, name), few())
	rolledOut(t)

	kubectl(t, "scale", "-n", system, "deploy/stepcache-webhook", "--replicas=0")
	back := func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if _, err := run(ctx, "", "scale", "-n", system, "deploy/stepcache-webhook", "--replicas=2"); err != nil {
			t.Error(err)
		}
	}
	defer back()
	eventually(t, "no webhook is left", func(ctx context.Context) error {
		out, err := run(ctx, "", "get", "pods", "-n", system, "-l", "data.stepcache.dev/component=webhook", "-o", "name")
		return want(out, "", err)
	})
	asking := edit(t, example(t, "quickstart/pod.yaml"), "metadata: {name: demo-reader}", "metadata: {name: refused, labels: {data.stepcache.dev/inject: auto}}")
	if out, err := run(t.Context(), asking, "create", "-n", namespace, "-f", "-"); err == nil {
		t.Errorf("a pod that asks for data was admitted with no webhook there: %s", out)
	} else if !strings.Contains(err.Error(), "inject.data.stepcache.dev") {
		t.Errorf("a pod that asks for data was refused for another reason: %v", err)
	}
	// A workflow that does not ask runs from its claim as ever.
	oneDigest(t, in, waitWorkflow(t, submit(t, "hashing/workflow.yaml", hash("demo", 1)...)), 1)
	name = submit(t, "hashing/workflow.yaml", asks(2, retrying...)...)
	eventually(t, "a step was refused and is tried again", func(ctx context.Context) error {
		_, pods, err := stepsOf(ctx, name)
		if err == nil && !slices.ContainsFunc(pods, func(s step) bool { return strings.Contains(s.Message, "inject.data.stepcache.dev") }) {
			err = fmt.Errorf("its steps are %v", pods)
		}
		return err
	})
	if out := kubectl(t, "get", "pods", "-n", namespace, "-l", "workflows.argoproj.io/workflow="+name, "-o", "name"); out != "" {
		t.Errorf("steps run though nobody could give them their data: %s", out)
	}
	back()
	rolledOut(t)
	oneDigest(t, in, waitWorkflow(t, name), 2)
}

// lostNode breaks a node that holds a worker, while steps read on all of them and new ones start. Steps elsewhere
// do not fail; those that were on the node are tried again.
func lostNode(t *testing.T, in input, harm, mend string) {
	if !hasLab() {
		t.Skip("it breaks nodes of test/cluster; this is another cluster")
	}
	workers(t, "cold", 2)
	// What the cluster itself needs runs on n1.
	node := ""
	for _, n := range strings.Fields(kubectl(t, "get", "pods", "-n", namespace, "-l", "data.stepcache.dev/dataset=cold", "-o", "jsonpath={.items[*].spec.nodeName}")) {
		if n != "n1" {
			node = n
		}
	}
	if node == "" {
		t.Fatal("both workers are on n1")
	}
	mended := false
	back := func() {
		if mended {
			return
		}
		mended = true
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if _, err := labCommand(ctx, mend, node); err != nil {
			t.Error(err)
		}
	}
	defer back()
	whileReading(t, in, "cold", func() []string {
		before := sent(t)
		lab(t, harm, node)
		start := time.Now()
		name := submit(t, "hashing/workflow.yaml", append(hash("cold", few()), retrying...)...)
		eventually(t, "the node is known to be lost, and steps have run since", func(ctx context.Context) error {
			taints, err := run(ctx, "", "get", "node", node, "-o", `jsonpath={.spec.taints[*].key}`)
			if err == nil && !strings.Contains(taints, "node.kubernetes.io/unreachable") {
				err = fmt.Errorf("its taints are %q", taints)
			}
			if err != nil {
				return err
			}
			_, pods, err := stepsOf(ctx, name)
			done := 0
			for _, s := range pods {
				if s.Node != node && s.Phase == "Succeeded" {
					done++
				}
				if s.Node != node && (s.Phase == "Failed" || s.Phase == "Error") && s.Node != "" {
					t.Errorf("step %s on %s, a node that is well: %s", s.DisplayName, s.Node, s.Message)
				}
			}
			if err == nil && done == 0 {
				err = fmt.Errorf("none has succeeded: %v", pods)
			}
			return err
		})
		t.Logf("%s %s: noticed, and a step elsewhere had run, after %.0f s", harm, node, time.Since(start).Seconds())
		// New steps find their data without the node.
		oneDigest(t, in, waitWorkflow(t, submit(t, "hashing/workflow.yaml", hash("cold", 2)...)), 2)
		back()
		oneDigest(t, in, onlyDigests(waitWorkflow(t, name)), few())
		t.Logf("%s %s: all steps had run after %.0f s; %d bytes left the bucket", harm, node, time.Since(start).Seconds(), sent(t)-before)
		return []string{node}
	})
	rolledOut(t)
	workers(t, "cold", 2)
	// The node serves again, also to new steps.
	eventually(t, "the node's service is back", func(ctx context.Context) error {
		out, err := run(ctx, "", "get", "node", node, "-o", `jsonpath={.metadata.labels.data\.stepcache\.dev/node-ready} {.spec.taints}`)
		return want(strings.TrimSpace(out), "true", err)
	})
}

// onlyDigests leaves out what a step that was interrupted and tried again said.
func onlyDigests(lines []string) []string {
	return slices.DeleteFunc(lines, func(line string) bool {
		sum, _, _ := strings.Cut(line, " ")
		return len(sum) != 64
	})
}

// killedSidecars kills the servers of mounts that pods have of their own: reads wait until they are started again.
// Of pods that mount by themselves it kills the keepers too, after which reads fail; but pods end, and no mount is
// left.
func killedSidecars(t *testing.T, in input) {
	if !hasLab() {
		t.Skip("it kills processes on nodes of test/cluster; this is another cluster")
	}
	kill := func(alsoKeepers bool) {
		spared := `"/stepcache sidecar --keep "*) ;;`
		if alsoKeepers {
			spared = ""
		}
		for _, node := range nodes(t) {
			out := lab(t, "exec-in-node", node, "sh", "-c", `
				for p in /proc/[0-9]*; do
					c=$(tr '\0' ' ' <$p/cmdline 2>/dev/null) || continue
					case "$c" in
					"/stepcache sidecar "*" --check "*) ;;
					`+spared+`
					"/stepcache sidecar "*) kill -9 ${p#/proc/} && echo "$c" ;;
					esac
				done`)
			if strings.TrimSpace(out) == "" {
				t.Errorf("no sidecar ran on %s", node)
			}
		}
	}
	const label = "data.stepcache.dev/inject: sidecar"
	whileReading(t, in, "demo", func() []string {
		kill(false)
		// They are there again when each has been restarted and serves.
		restarted(t, "stepcache-sidecar")
		return nil
	}, label)
	noSidecarMounts(t)
	// Those that mount by themselves have another container that keeps the mounts meanwhile.
	whileReading(t, in, "demo", func() []string {
		if full() {
			kill(false)
			restarted(t, "stepcache-sidecar")
		}
		kill(true)
		return nodes(t) // no reader can go on
	}, label+", "+nobodyLends)
	noSidecarMounts(t)
}

// restarted waits until the container of that name in all pods that read with a sidecar has been restarted.
func restarted(t *testing.T, container string) {
	t.Helper()
	eventually(t, "the container "+container+" was restarted everywhere", func(ctx context.Context) error {
		out, err := run(ctx, "", "get", "pods", "-n", namespace, "-l", "data.stepcache.dev/inject=sidecar", "--field-selector", "status.phase=Running", "-o",
			`jsonpath={range .items[*]}{.status.initContainerStatuses[?(@.name=="`+container+`")].restartCount}{.status.initContainerStatuses[?(@.name=="`+container+`")].started}{"\n"}{end}`)
		if err != nil {
			return err
		}
		if out == "" {
			return errors.New("no such pod")
		}
		for line := range strings.Lines(out) {
			if line = strings.TrimSpace(line); line == "0true" || !strings.HasSuffix(line, "true") {
				return errors.New(out)
			}
		}
		return nil
	})
}

// noSidecarMounts waits until no pod with a sidecar is left, not even Terminating, nor any of their mounts.
func noSidecarMounts(t *testing.T) {
	t.Helper()
	eventually(t, "no pod with a sidecar is left", func(ctx context.Context) error {
		out, err := run(ctx, "", "get", "pods", "-n", namespace, "-l", "data.stepcache.dev/inject=sidecar", "-o", "wide", "--no-headers")
		return want(out, "", err)
	})
	if !hasLab() {
		return
	}
	for _, node := range nodes(t) {
		eventually(t, "no mount of a sidecar is left on "+node, func(ctx context.Context) error {
			out, err := labCommand(ctx, "exec-in-node", node, "sh", "-c", "grep -E '/run/stepcache/sidecars/|/var/lib/kubelet/pods/.* fuse' /proc/self/mountinfo || true")
			return want(out, "", err)
		})
	}
}
