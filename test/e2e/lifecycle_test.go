package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// unprivileged are the edits that have the pods of the hashing example pass the restricted level, Argo's own
// containers in them too.
var unprivileged = []string{
	"  entrypoint: main\n", `  entrypoint: main
  securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
  podSpecPatch: |
    initContainers: [{name: init, securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}}]
    containers: [{name: wait, securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}}]
`,
	"      image: busybox:1.35\n", "      image: busybox:1.35\n      securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}\n",
}

// scaled changes the number of workers while steps read: through mounts on every node, and copied by stage, which
// asks the workers for every byte.
func scaled(t *testing.T, in input) {
	workers(t, "cold", 2)
	whileReading(t, in, "cold", func() []string {
		before := sent(t)
		for _, n := range []int{3, 1, 2} {
			start, from := time.Now(), sent(t)
			kubectl(t, "patch", "dataset", "-n", namespace, "cold", "--type=merge", "-p", fmt.Sprintf(`{"spec":{"workers":{"replicas":%d}}}`, n))
			name := submit(t, "hashing/workflow.yaml", slices.Concat(hash("cold", few()), labelled("data.stepcache.dev/inject: stage"))...)
			oneDigest(t, in, waitWorkflow(t, name), few())
			workers(t, "cold", n)
			t.Logf("to %d workers: %.0f s, %d bytes left the bucket", n, time.Since(start).Seconds(), sent(t)-from)
		}
		if left := sent(t) - before; left > in.bytes {
			t.Errorf("scaling cost the bucket %d bytes, more than all that is cached (%d)", left, in.bytes)
		}
		return nil
	})
}

// upgraded applies the installation once more, which changes nothing, and then another version of it. Workers keep
// their pods and memory, and running steps notice nothing.
func upgraded(t *testing.T, in input) {
	// From workers, past every page cache.
	readAll := func(name string) {
		t.Helper()
		apply(t, namespace, edit(t, example(t, "stage/pod.yaml"), "name: demo-stage", "name: "+name, "stage-paths: /large.bin", "stage-paths: /**"))
		if log := waitPod(t, namespace, name); !strings.Contains(log, in.largeSum) {
			t.Errorf("pod %s read:\n%s", name, log)
		}
		kubectl(t, "delete", "pod", "-n", namespace, name)
	}
	readAll("before-upgrade") // a worker that a node took along has nothing
	tier := func() string { return uids(t, namespace, "data.stepcache.dev/component=worker") }
	installation := func() string { return uids(t, system, "data.stepcache.dev/component") }
	hadTier, had := tier(), installation()
	kubectl(t, "apply", "--server-side", "-k", "config/default")
	rolledOut(t)
	if now := installation(); now != had {
		t.Errorf("applying what is installed already changed its pods from\n%sto\n%s", had, now)
	}
	if !hasLab() {
		t.Skip("a second image is made on the nodes of test/cluster; this is another cluster")
	}
	next := strings.Split(image(), ":")[0] + ":e2e-next"
	lab(t, "tag-image", image(), next)
	whileReading(t, in, "cold", func() []string {
		manifests := edit(t, kubectl(t, "kustomize", "config/default"), image(), next)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		if _, err := run(ctx, manifests, "apply", "--server-side", "-f", "-"); err != nil {
			t.Fatal(err)
		}
		// Steps that start meanwhile are served too.
		oneDigest(t, in, waitWorkflow(t, submit(t, "hashing/workflow.yaml", hash("cold", few())...)), few())
		rolledOut(t)
		return nil
	})
	if out := kubectl(t, "get", "pods", "-n", system, "-l", "data.stepcache.dev/component!=keeper", "-o", "jsonpath={.items[*].spec.containers[*].image}"); strings.Contains(out+" ", image()+" ") {
		t.Errorf("pods run the old image: %s", out)
	}
	waitReady(t, namespace, "cold")
	if now := tier(); now != hadTier {
		t.Errorf("the upgrade changed the workers' pods from\n%sto\n%s", hadTier, now)
	}
	// All that they held they hold still.
	before := sent(t)
	readAll("after-upgrade")
	if left := sent(t) - before; left > 1<<20 {
		t.Errorf("%d bytes left the bucket for what was cached before the upgrade", left)
	}
}

// uninstall runs the command of that name.
func uninstall(t *testing.T, args ...string) string {
	t.Helper()
	program, err := filepath.Abs(root + "/.bin/linux/stepcache")
	if err == nil {
		_, err = os.Stat(program)
	}
	if err != nil {
		t.Fatalf("the program is not there; `make image` builds it: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, append([]string{"uninstall", "--timeout", patience.String()}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("uninstall: %v\n%s\n%s", err, out, diagnosis())
	}
	return string(out)
}

// uninstalled takes the product off the cluster though a pod reads still, and nothing of it is left then; and
// installs it again.
func uninstalled(t *testing.T, in input) {
	hold(t, "demo")
	if out := uninstall(t, "--dry-run"); !strings.Contains(out, "holder") {
		t.Errorf("it does not say that a pod is in the way:\n%s", out)
	}
	out := uninstall(t, "--delete-pods")
	t.Logf("%d lines of uninstall, the last: %s", strings.Count(out, "\n"), out[strings.LastIndex(strings.TrimSpace(out), "\n")+1:])
	for _, c := range []struct{ what, args string }{
		{"an object of a Dataset", "get all,pv,pvc,secrets,configmaps,networkpolicies,poddisruptionbudgets,endpointslices -A -l data.stepcache.dev/dataset -o name"},
		{"a labelled node", "get nodes -l data.stepcache.dev/node-ready -o name"},
		{"a labelled namespace", "get namespaces -l data.stepcache.dev/watched -o name"},
		{"the namespace", "get namespace " + system + " --ignore-not-found -o name"},
		{"a driver", "get csidrivers csi.data.stepcache.dev --ignore-not-found -o name"},
	} {
		eventually(t, c.what+" is not left", func(ctx context.Context) error {
			out, err := run(ctx, "", strings.Fields(c.args)...)
			return want(out, "", err)
		})
	}
	for _, kind := range []string{"customresourcedefinitions", "mutatingwebhookconfigurations", "validatingwebhookconfigurations", "clusterroles", "clusterrolebindings"} {
		if out := kubectl(t, "get", kind, "-o", "name"); strings.Contains(out, "stepcache") {
			t.Errorf("left: %s", out)
		}
	}
	if hasLab() {
		for _, node := range nodes(t) {
			eventually(t, "no mount is left on "+node, func(ctx context.Context) error {
				// Other than those of the lab itself, whose folder may have that name.
				out, err := labCommand(ctx, "exec-in-node", node, "sh", "-c", `grep -E 'fuse\.stepcache|/run/stepcache|csi\.data\.stepcache\.dev' /proc/self/mountinfo || true`)
				return want(out, "", err)
			})
		}
	}
	install(t)
	quickstart(t, in)
}
