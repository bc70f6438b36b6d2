package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// edit changes a text; what is replaced must be in it.
func edit(t *testing.T, text string, replace ...string) string {
	t.Helper()
	for i := 0; i < len(replace); i += 2 {
		if !strings.Contains(text, replace[i]) {
			t.Fatalf("there is no %q in\n%s", replace[i], text)
		}
		text = strings.ReplaceAll(text, replace[i], replace[i+1])
	}
	return text
}

// submit creates a workflow from an example, with changes to its text, and returns its name.
func submit(t *testing.T, file string, replace ...string) string {
	t.Helper()
	return create(t, edit(t, example(t, file), replace...))
}

// create creates a workflow and returns its name.
func create(t *testing.T, text string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	name, err := run(ctx, text, "create", "-n", namespace, "-f", "-", "-o", "jsonpath={.metadata.name}")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if _, err := run(ctx, "", "delete", "workflow", name, "-n", namespace, "--ignore-not-found"); err != nil {
			t.Error(err)
		}
	})
	return name
}

// hash are the edits that make the hashing example one of so many steps over a claim.
func hash(claim string, steps int) []string {
	return []string{"claimName: demo", "claimName: " + claim, `value: "100"`, `value: "` + strconv.Itoa(steps) + `"`}
}

// retrying are the edits that let the steps of the hashing example be tried again.
var retrying = []string{"  - name: hash\n", "  - name: hash\n    retryStrategy: {limit: \"20\", retryPolicy: Always, backoff: {duration: \"1\"}}\n"}

// labelled are the edits that have pods of a workflow carry labels.
func labelled(labels string) []string {
	return []string{"  entrypoint: main\n", "  entrypoint: main\n  podMetadata: {labels: {" + labels + "}}\n"}
}

// step is what a workflow says of one of its pods.
type step struct {
	ID, DisplayName, Type, Phase, Message string
	Node                                  string `json:"hostNodeName"`
	StartedAt, FinishedAt                 time.Time
}

// stepsOf are a workflow's phase and the steps that are pods.
func stepsOf(ctx context.Context, name string) (phase string, pods []step, err error) {
	out, err := run(ctx, "", "get", "workflow", "-n", namespace, name, "-o", "json")
	if err != nil {
		return "", nil, err
	}
	var w struct {
		Status struct {
			Phase string
			Nodes map[string]step
		}
	}
	if err := json.Unmarshal([]byte(out), &w); err != nil {
		return "", nil, err
	}
	for _, n := range w.Status.Nodes {
		if n.Type == "Pod" {
			pods = append(pods, n)
		}
	}
	slices.SortFunc(pods, func(a, b step) int { return strings.Compare(a.DisplayName, b.DisplayName) })
	return w.Status.Phase, pods, nil
}

// ended waits for a workflow to end, well or not.
func ended(t *testing.T, name string) (phase string, pods []step) {
	t.Helper()
	eventually(t, "workflow "+name+" ends", func(ctx context.Context) (err error) {
		phase, pods, err = stepsOf(ctx, name)
		if err == nil && phase != "Succeeded" && phase != "Failed" && phase != "Error" {
			err = fmt.Errorf("it is %s: %v", phase, pods)
		}
		return err
	})
	return phase, pods
}

// waitWorkflow waits for a workflow to succeed and returns what its steps printed, a line each.
func waitWorkflow(t *testing.T, name string) []string {
	t.Helper()
	if phase, pods := ended(t, name); phase != "Succeeded" {
		t.Fatalf("workflow %s: %s\n%s", name, phase, about(name, pods))
	}
	return printed(t, name)
}

// allEnd waits until nothing runs any more in the pods of a workflow.
func allEnd(t *testing.T, name string) {
	t.Helper()
	eventually(t, "the pods of workflow "+name+" have ended", func(ctx context.Context) error {
		out, err := run(ctx, "", "get", "pods", "-n", namespace, "-l", "workflows.argoproj.io/workflow="+name,
			"--field-selector", "status.phase!=Succeeded", "--no-headers")
		return want(out, "", err)
	})
}

// printed is what a workflow's steps printed, a line each.
func printed(t *testing.T, name string) (lines []string) {
	t.Helper()
	var out string
	// Of pods that are there still. One of a node that was lost may only now be on its way out.
	eventually(t, "the steps' logs can be read", func(ctx context.Context) (err error) {
		out, err = run(ctx, "", "logs", "-n", namespace, "-l", "workflows.argoproj.io/workflow="+name, "-c", "main", "--tail=-1", "--max-log-requests=200")
		return err
	})
	for line := range strings.Lines(out) {
		// The emissary's own log lines are not the step's.
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "time=") {
			lines = append(lines, line)
		}
	}
	return lines
}

// about says what became of a workflow's steps, with their pods and logs.
func about(name string, pods []step) string {
	var b strings.Builder
	for _, p := range pods {
		fmt.Fprintf(&b, "%s on %s: %s %s\n", p.DisplayName, p.Node, p.Phase, p.Message)
	}
	of := "workflows.argoproj.io/workflow=" + name
	b.WriteString(diagnosis(
		[]string{"describe", "pods", "-n", namespace, "-l", of},
		[]string{"logs", "-n", namespace, "-l", of, "--all-containers", "--prefix", "--tail=10", "--max-log-requests=500"},
	))
	return b.String()
}

// nodes are the names of the cluster's nodes.
func nodes(t *testing.T) []string {
	t.Helper()
	return strings.Fields(kubectl(t, "get", "nodes", "-o", "jsonpath={.items[*].metadata.name}"))
}

// A long reader reads on one node until it is told to stop: through the page cache, past it (which is also how
// it meets a file that its server has taken away), and in opens that are new each time.
const longReader = `
apiVersion: argoproj.io/v1alpha1
kind: Workflow
metadata: {generateName: readers-}
spec:
  entrypoint: main
  volumes:
  - name: data
    persistentVolumeClaim: {claimName: CLAIM, readOnly: true}
  - name: stop
    configMap: {name: STOP, optional: true}
  templates:
  - name: main
    steps:
    - - name: read
        template: read
        arguments: {parameters: [{name: node, value: "{{item}}"}]}
        withItems: NODES
  - name: read
    inputs: {parameters: [{name: node}]}
    nodeSelector: {kubernetes.io/hostname: "{{inputs.parameters.node}}"}
    container:
      image: busybox:1.35
      command: [sh, -c]
      args:
      - |
        set -o pipefail
        right() {
          sum=${2%% *}
          [ "$sum" = "$3" ] || { echo "WRONG BYTES in $1: $2"; exit 3; }
        }
        failed() { echo "READ FAILED: $1 in round $i"; exit 4; }
        i=0
        while [ ! -e /stop/stop ]; do
          i=$((i + 1))
          s=$(sha256sum /data/large.bin) || failed large.bin
          right large.bin "$s" LARGE
          s=$(dd if=/data/large.bin bs=1M iflag=direct 2>/dev/null | sha256sum) || failed "large.bin, direct"
          right "large.bin, direct" "$s" LARGE
          s=$(for f in /data/shards/*.bin; do dd if=$f bs=1M iflag=direct 2>/dev/null || exit 1; done | sha256sum) || failed shards
          right shards "$s" SHARDS
          [ $i -gt 1 ] || echo first
          sleep 1
        done
        echo "$sum after $i rounds on {{inputs.parameters.node}}"
      volumeMounts:
      - {name: data, mountPath: /data, readOnly: true}
      - {name: stop, mountPath: /stop}
`

// whileReading has a step read a claim's data on every node meanwhile, and fails where one does that was not
// expected to: those on the nodes that meanwhile returns. Labels are those of the pods.
func whileReading(t *testing.T, in input, claim string, meanwhile func() (lost []string), labels ...string) {
	t.Helper()
	on := nodes(t)
	stop := fmt.Sprintf("stop-%d", time.Now().UnixNano())
	list, _ := json.Marshal(on)
	text := longReader
	for _, l := range labels {
		text = edit(t, text, labelled(l)...)
	}
	name := create(t, edit(t, text, "CLAIM", claim, "STOP", stop, "NODES", string(list), "LARGE", in.largeSum, "SHARDS", in.shardsSum))
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		_, _ = run(ctx, "", "delete", "configmap", "-n", namespace, stop, "--ignore-not-found")
	}()
	eventually(t, "a step on every node has read all", func(ctx context.Context) error {
		phase, pods, err := stepsOf(ctx, name)
		if err != nil {
			return err
		}
		if phase == "Failed" || phase == "Error" {
			t.Fatalf("a reader failed before anything was done\n%s", about(name, pods))
		}
		out, err := run(ctx, "", "logs", "-n", namespace, "-l", "workflows.argoproj.io/workflow="+name, "-c", "main", "--tail=-1")
		if err == nil && strings.Count(out, "first\n") != len(on) {
			err = fmt.Errorf("%d of %d have: %v", strings.Count(out, "first\n"), len(on), pods)
		}
		return err
	})
	lost := meanwhile()
	kubectl(t, "create", "configmap", "-n", namespace, stop, "--from-literal=stop=1")
	phase, pods := ended(t, name)
	lines := printed(t, name)
	var wrong []string
	for _, line := range lines {
		if strings.HasPrefix(line, "WRONG BYTES") {
			wrong = append(wrong, line)
		}
	}
	for _, node := range on {
		i := slices.IndexFunc(pods, func(s step) bool { return strings.Contains(s.DisplayName, ":"+node+")") })
		switch {
		case slices.Contains(lost, node):
		case i < 0:
			wrong = append(wrong, "no step on node "+node)
		case pods[i].Phase != "Succeeded":
			wrong = append(wrong, fmt.Sprintf("the step on node %s: %s %s", node, pods[i].Phase, pods[i].Message))
		default:
			j := slices.IndexFunc(lines, func(line string) bool {
				return strings.HasPrefix(line, in.shardsSum) && strings.HasSuffix(line, " on "+node)
			})
			if j < 0 {
				wrong = append(wrong, "the step on node "+node+" did not tell what it read")
			} else {
				t.Log(lines[j][len(in.shardsSum)+1:])
			}
		}
	}
	if len(wrong) > 0 {
		t.Fatalf("%s\n%s: %s", strings.Join(wrong, "\n"), phase, about(name, pods))
	}
	kubectl(t, "delete", "workflow", "-n", namespace, name)
	eventually(t, "the readers' pods are gone", func(ctx context.Context) error {
		out, err := run(ctx, "", "get", "pods", "-n", namespace, "-l", "workflows.argoproj.io/workflow="+name, "-o", "wide", "--no-headers")
		return want(out, "", err)
	})
}

// want is an error where got is not what is wanted, or there was one.
func want(got, want string, err error) error {
	if err == nil && got != want {
		err = errors.New("it is " + strconv.Quote(got) + ", want " + strconv.Quote(want))
	}
	return err
}
