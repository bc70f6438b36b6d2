package e2e

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// placed warms a Dataset that one node holds and runs steps that could run anywhere: nearly all should be on that
// node; and it counts what those steps cost the API server in requests of ours.
func placed(t *testing.T, in input) {
	dataset := edit(t, example(t, "quickstart/dataset.yaml"), "metadata: {name: demo}", "metadata: {name: near}", "replicas: 2", "replicas: 1")
	load := edit(t, example(t, "quickstart/dataload.yaml"), "name: demo-warm", "name: near-warm", "datasetRef: {name: demo}", "datasetRef: {name: near}")
	apply(t, namespace, dataset+"\n---\n"+load)
	waitReady(t, namespace, "near")
	waitLoaded(t, namespace, "near-warm")
	holder := kubectl(t, "get", "pod", "-n", namespace, "near-worker-0", "-o", "jsonpath={.spec.nodeName}")

	var before, after, later map[string]int
	const quiet = 30 * time.Second // what is done every half minute is done once
	if hasLab() {
		before = requests(t)
	}
	left, start := sent(t), time.Now()
	name := submit(t, "hashing/workflow.yaml", hash("near", steps())...)
	oneDigest(t, in, waitWorkflow(t, name), steps())
	took := time.Since(start)
	if left = sent(t) - left; left > 1<<20 {
		t.Errorf("%d bytes left the bucket for what was loaded before", left)
	}
	t.Logf("%d steps over near, warm: %.1f s, %d bytes left the bucket", steps(), took.Seconds(), left)
	if hasLab() {
		after = requests(t)
		time.Sleep(quiet) // what is asked for in this time is asked for no step
		later = requests(t)
	}

	_, pods, err := stepsOf(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	on := 0
	for _, s := range pods {
		if s.Node == holder {
			on++
		}
	}
	chance := 1 / float64(len(nodes(t)))
	share := float64(on) / float64(len(pods))
	t.Logf("%d of %d steps (%.0f %%) ran on the node that holds the data; chance is %.0f %%", on, len(pods), 100*share, 100*chance)
	if len(nodes(t)) > 1 && share < chance+(1-chance)/3 {
		t.Errorf("%.0f %% of the steps ran on the node that holds the data, hardly more than chance (%.0f %%)", 100*share, 100*chance)
	}

	if !hasLab() {
		return
	}
	// What is asked for by the clock is asked for in both times.
	for _, k := range slices.Sorted(maps.Keys(later)) {
		n, rest := after[k]-before[k], later[k]-after[k]
		if n == 0 {
			continue
		}
		more := (float64(n) - float64(rest)*took.Seconds()/quiet.Seconds()) / float64(steps())
		t.Logf("%3d requests in %.0f s of %d steps, %d in %.0f quiet s, %.2f more a step: %s", n, took.Seconds(), steps(), rest, quiet.Seconds(), more, k)
		if more > 0.6 {
			t.Errorf("steps cost the API server requests: %s", k)
		}
		// What a step could be the reason of; one or two are of something that has just become ready.
		for _, of := range []string{" pods", " events", " persistentvolumeclaims", " nodes", " tokenreviews", " subjectaccessreviews", " workflow", " csi"} {
			if strings.Contains(k, of) && n > steps()/5 {
				t.Errorf("%d requests while %d steps ran: %s", n, steps(), k)
			}
		}
	}
	kubectl(t, "delete", "dataset,dataload", "-n", namespace, "near", "near-warm", "--ignore-not-found", "--timeout", patience.String())
}

// requests counts the API server's requests of our service accounts, but for leases, which are renewed all the
// time.
func requests(t *testing.T) map[string]int {
	t.Helper()
	counts := make(map[string]int)
	for line := range strings.Lines(lab(t, "requests")) {
		f := strings.Fields(line)
		if len(f) < 4 || !strings.HasPrefix(f[1], "system:serviceaccount:"+system+":") || len(f) > 4 && strings.HasPrefix(f[4], "leases.") {
			continue
		}
		n, err := strconv.Atoi(f[0])
		if err != nil {
			t.Fatalf("cluster requests: %q", line)
		}
		counts[f[1]+" "+strings.Join(f[3:], " ")] += n
	}
	if len(counts) == 0 {
		t.Fatal("the audit log has no request of ours")
	}
	return counts
}
