package e2e

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
)

// other is a namespace with which nothing is shared at first.
const other = "e2e-other"

// image is that of the installation.
func image() string {
	if i := os.Getenv("STEPCACHE_IMAGE"); i != "" {
		return i
	}
	return "stepcache/stepcache:dev"
}

// sharing tries to read a Dataset from a namespace that may not, in every way there is; and then from one that may.
func sharing(t *testing.T, in input) {
	kubectl(t, "create", "namespace", other)
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if _, err := run(ctx, "", "delete", "namespace", other, "--timeout", patience.String()); err != nil {
			t.Errorf("%v\n%s", err, diagnosis())
		}
	}()
	t.Run("Claim", func(t *testing.T) { foreignClaim(t) })
	t.Run("InlineVolume", func(t *testing.T) { foreignVolume(t) })
	t.Run("WorkerPort", func(t *testing.T) { foreignReader(t) })
	t.Run("Source", func(t *testing.T) { foreignSource(t) })
	t.Run("Shared", func(t *testing.T) { shared(t, in) })
}

// event waits for an Event of an object that has a text.
func event(t *testing.T, namespace, kind, name, text string) {
	t.Helper()
	eventually(t, kind+" "+name+" has an event: "+text, func(ctx context.Context) error {
		out, err := run(ctx, "", "get", "events", "-n", namespace, "--field-selector", "involvedObject.kind="+kind+",involvedObject.name="+name, "-o", "jsonpath={range .items[*]}{.message}{'\\n'}{end}")
		if err == nil && !strings.Contains(out, text) {
			err = errors.New(out)
		}
		return err
	})
}

// neverStarted fails where a container of the pod has begun.
func neverStarted(t *testing.T, namespace, name string) {
	t.Helper()
	if out := kubectl(t, "get", "pod", "-n", namespace, name, "-o", "jsonpath={.status.phase} {.status.containerStatuses[*].state.running}"); strings.TrimSpace(out) != "Pending" {
		t.Errorf("pod %s, which may not read, is %q", name, out)
	}
	kubectl(t, "delete", "pod", "-n", namespace, name, "--grace-period=1")
}

// A claim is of one namespace, and a second claim is not bound to a Dataset's volume.
func foreignClaim(t *testing.T) {
	apply(t, other, `
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: demo}
spec:
  accessModes: [ReadOnlyMany]
  storageClassName: ""
  volumeName: stepcache.`+namespace+`.demo
  resources: {requests: {storage: 1Mi}}
`)
	apply(t, other, example(t, "quickstart/pod.yaml"))
	event(t, other, "PersistentVolumeClaim", "demo", "already bound to a different claim")
	event(t, other, "Pod", "demo-reader", "unbound")
	neverStarted(t, other, "demo-reader")
	kubectl(t, "delete", "pvc", "-n", other, "demo")
}

// An inline volume needs the key, which no other namespace has.
func foreignVolume(t *testing.T) {
	kubectl(t, "create", "secret", "generic", "-n", other, "made-up", "--from-literal=read="+strings.Repeat("0123456789abcdef", 4))
	for name, secret := range map[string]string{"keyless": "", "made-up": ", nodePublishSecretRef: {name: made-up}"} {
		apply(t, other, edit(t, example(t, "quickstart/pod.yaml"), "metadata: {name: demo-reader}", "metadata: {name: "+name+"}",
			"persistentVolumeClaim: {claimName: demo, readOnly: true}",
			"csi: {driver: csi.data.stepcache.dev, readOnly: true, volumeAttributes: {dataset: demo, namespace: "+namespace+"}"+secret+"}"))
		event(t, other, "Pod", name, "MountVolume.SetUp failed")
		neverStarted(t, other, name)
	}
}

// Who knows the workers' addresses still needs the key. The same pod reads once it has that, so the key is all
// that kept it out: NetworkPolicies, which would too, are not enforced on every cluster.
func foreignReader(t *testing.T) {
	ctx := t.Context()
	var tier struct{ Data map[string]string }
	out := kubectl(t, "get", "configmap", "-n", namespace, "demo-tier", "-o", "json")
	if err := json.Unmarshal([]byte(out), &tier); err != nil {
		t.Fatal(err)
	}
	copied, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]any{"name": "demo-tier"}, "data": tier.Data})
	if err != nil {
		t.Fatal(err)
	}
	apply(t, other, string(copied))
	encoded, err := get(ctx, namespace, "secret", "demo-reader", "{.data.read}")
	if err != nil {
		t.Fatal(err)
	}
	key, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil || len(key) == 0 {
		t.Fatalf("the read key: %v", err)
	}
	kubectl(t, "create", "secret", "generic", "-n", other, "stolen", "--from-literal=read="+string(key))
	const reader = `
apiVersion: v1
kind: Pod
metadata: {name: NAME}
spec:
  restartPolicy: Never
  containers:
  - name: main
    image: IMAGE
    command: [/stepcache, stage, --wait=15s, --tier=/tier, "--copy=NAMESPACE/demo=/out", "--path=NAMESPACE/demo=/shards/00.bin"]
    volumeMounts: [{name: tier, mountPath: /tier/demo}, {name: out, mountPath: /out}]
  volumes:
  - name: out
    emptyDir: {}
  - name: tier
    projected:
      sources:
      - configMap: {name: demo-tier}
      - secret: {name: NAME, items: [{key: read, path: keys/read}]}
`
	for _, name := range []string{"made-up", "stolen"} {
		apply(t, other, edit(t, reader, "NAMESPACE", namespace, "NAME", name, "IMAGE", image()))
	}
	waitPod(t, other, "stolen")
	eventually(t, "the reader with a key of its own fails", func(ctx context.Context) error {
		phase, err := get(ctx, other, "pod", "made-up", "{.status.phase}")
		if phase == "Succeeded" {
			t.Fatal("a reader with a key of its own read from the workers")
		}
		return want(phase, "Failed", err)
	})
	if log := kubectl(t, "logs", "-n", other, "made-up"); !strings.Contains(log, "key") {
		t.Errorf("a reader with a key of its own is told:\n%s\nwhich says nothing of its key", log)
	}
	kubectl(t, "delete", "pod", "-n", other, "made-up", "stolen")
	kubectl(t, "delete", "secret", "-n", other, "made-up", "stolen")
	policy := kubectl(t, "get", "networkpolicy", "-n", namespace, "demo-worker", "-o", "jsonpath={.spec.ingress}")
	if strings.Contains(policy, other) || strings.Contains(policy, `"namespaceSelector":{}`) {
		t.Errorf("the workers' NetworkPolicy lets others in: %s", policy)
	}
}

// A Dataset that names another one as its source needs its permission.
func foreignSource(t *testing.T) {
	dataset := fmt.Sprintf(`
apiVersion: data.stepcache.dev/v1alpha1
kind: Dataset
metadata: {name: mirror}
spec:
  mounts: [{source: "dataset://%s/demo", path: /}]
  workers: {replicas: 1, memory: 64Mi}
`, namespace)
	if _, err := run(t.Context(), dataset, "apply", "-n", other, "-f", "-"); err != nil {
		t.Logf("refused at once: %v", err)
		return
	}
	var conditions string
	eventually(t, "the Dataset says that it may not read its source", func(ctx context.Context) (err error) {
		conditions, err = get(ctx, other, "dataset", "mirror", `{.status.conditions[?(@.status=="False")].message}`)
		if err == nil && !strings.Contains(conditions, "dataset://") && !strings.Contains(conditions, "shareWith") {
			err = errors.New(conditions)
		}
		return err
	})
	t.Log(conditions)
	if ready, err := get(t.Context(), other, "dataset", "mirror", `{.status.conditions[?(@.type=="Ready")].status} {.status.files}`); err != nil || strings.HasPrefix(ready, "True") {
		t.Errorf("a Dataset of a source that is not shared is Ready: %s %v", ready, err)
	}
	kubectl(t, "delete", "dataset", "-n", other, "mirror", "--timeout", patience.String())
}

// shared reads what is shared, for as long as it is.
func shared(t *testing.T, in input) {
	pod := edit(t, example(t, "stage/pod.yaml"), "name: demo-stage", "name: guest", "inject: stage", "inject: csi",
		"mounts: demo=/data", "mounts: "+namespace+"/demo=/data", "    data.stepcache.dev/stage-paths: /large.bin\n", "")
	refused := func(when string) {
		t.Helper()
		eventually(t, "a pod of another namespace is refused "+when, func(ctx context.Context) error {
			out, err := run(ctx, pod, "create", "--dry-run=server", "-n", other, "-f", "-")
			if err == nil {
				return errors.New("it was admitted: " + out)
			}
			if !strings.Contains(err.Error(), "shareWith") {
				return err
			}
			return nil
		})
	}
	refused("before the Dataset is shared")
	kubectl(t, "patch", "dataset", "-n", namespace, "demo", "--type=merge", "-p", `{"spec":{"shareWith":["`+other+`"]}}`)
	eventually(t, "a pod of a namespace that the Dataset is shared with is admitted", func(ctx context.Context) error {
		_, err := run(ctx, pod, "create", "-n", other, "-f", "-")
		return err
	})
	if log := waitPod(t, other, "guest"); !strings.Contains(log, in.largeSum) {
		t.Errorf("the guest read:\n%s", log)
	}
	kubectl(t, "delete", "pod", "-n", other, "guest")
	kubectl(t, "patch", "dataset", "-n", namespace, "demo", "--type=json", "-p", `[{"op":"remove","path":"/spec/shareWith"}]`)
	refused("once the Dataset is not shared any more")
	eventually(t, "the key is not in the other namespace any more", func(ctx context.Context) error {
		out, err := run(ctx, "", "get", "secrets", "-n", other, "-o", "name")
		return want(out, "", err)
	})
	waitReady(t, namespace, "demo")
}
