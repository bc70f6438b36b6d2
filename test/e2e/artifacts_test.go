package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/stepcache/stepcache/test/bucket"
)

// artifacts passes artifacts through a Dataset that takes puts: into the bucket, and back out of memory.
func artifacts(t *testing.T) {
	kubectl(t, "apply", "-n", namespace, "-k", "examples/artifacts")
	waitReady(t, namespace, "artifacts")
	// While there is room in the tier: the large file of the long form takes all of it.
	fannedOut(t)
	apply(t, namespace, collector)
	// Argo's own example asks for the image's latest version, which the nodes do not have.
	documented := submit(t, "artifacts/artifact-passing.yaml", "image: busybox\n", "image: busybox:1.35\n")
	direct := submit(t, "artifacts/direct.yaml")
	mapped := submit(t, "artifacts/map-reduce.yaml")
	missing := create(t, missingInput)
	passing := create(t, passingText())
	if lines := waitWorkflow(t, documented); !slices.Equal(lines, []string{"hello world", "hello world"}) {
		t.Errorf("artifact-passing.yaml printed %q", lines)
	}
	if lines := waitWorkflow(t, direct); !slices.Contains(lines, "as they were") {
		t.Errorf("direct.yaml printed %q", lines)
	}
	waitWorkflow(t, mapped) // its reducer fails by itself where something is missing
	inputMissing(t, missing)
	followed(t)
	foreignKeys(t)
	passed(t, passing)
	collected(t, passing)
	kubectl(t, "delete", "dataset", "-n", namespace, "artifacts", "--timeout", patience.String())
}

// archives are the ways in which an artifact is packed, as its fields say them.
var archives = map[string]string{"tgz": "", "none": ", archive: {none: {}}", "zip": ", archive: {zip: {}}"}

// passedOn is what is passed from one step to the next, and in which archives.
var passedOn = map[string][]string{
	"file":    {"tgz", "none", "zip"},
	"nothing": {"tgz", "none", "zip"}, // a file of no bytes
	"many":    {"tgz", "none", "zip"}, // a folder
	"void":    {"tgz", "zip"},         // a folder without files: Argo's driver makes no object of it as it is
	"large":   {"none"},               // gzip would take minutes, and prove nothing more
}

// many is how many files the folder has. As it is it takes a put for each, one behind the other, all of which wait
// for the bucket (20 ms and more), and as many deletes: ten thousand are for the long form.
func many() int {
	if full() {
		return 10_000
	}
	return 200
}

// large is the size of the large file: in the long form it is more than the whole tier holds.
func large() int {
	if full() {
		return 2 << 30
	}
	return 160 << 20
}

// The steps tell digests; they are compared by the test, since they have come to it by another way than the
// artifacts.
const passing = `
apiVersion: argoproj.io/v1alpha1
kind: Workflow
metadata: {generateName: passing-}
spec:
  entrypoint: main
  artifactRepositoryRef: {configMap: artifacts-s3}
  # Forced, so that a failed test can still delete it. What it left is looked for in the bucket.
  artifactGC: {strategy: OnWorkflowDeletion, serviceAccountName: artifact-gc, forceFinalizerRemoval: true}
  templates:
  - name: main
    steps:
    - - {name: produce, template: produce}
    - - name: consume
        template: consume
        arguments:
          artifacts:
ARGUMENTS
  - name: produce
    volumes: [{name: out, emptyDir: {}}]
    container:
      image: busybox:1.35
      command: [sh, -c]
      args:
      - |
        set -e
        mkdir -p /out/many /out/void
        seq 1000000 > /out/file
        : > /out/nothing
        head -c LARGE /dev/urandom > /out/large
        for d in $(seq 0 49); do mkdir -p /out/many/$d/sub; done
        for i in $(seq MANY); do echo "this is $i" > /out/many/$((i % 50))/sub/$i; done
        SUM
        for x in file nothing many void large; do echo "made $x $(sum /out/$x)"; done
      volumeMounts: [{name: out, mountPath: /out}]
    outputs:
      artifacts:
      - {name: kept, path: /out/file, archive: {none: {}}, artifactGC: {strategy: Never}}
OUTPUTS
  - name: consume
    inputs:
      artifacts:
      # Of these there is only a key; where that is the repository says.
      - {name: key-file, path: /in/key-file, s3: {key: "{{workflow.name}}/none/file"}}
      - {name: key-many, path: /in/key-many, s3: {key: "{{workflow.name}}/none/many/"}}
      - {name: missing, path: /in/missing, optional: true, s3: {key: "{{workflow.name}}/nowhere"}}
INPUTS
    container:
      image: busybox:1.35
      command: [sh, -c]
      args:
      - |
        set -e
        SUM
        for x in WANTED; do echo "got $x $(sum /in/$x)"; done
        [ ! -f /in/missing ] && [ -z "$(ls -A /in/missing)" ] && echo "got missing nothing"
`

// sum is a function for steps: the digest of a file, or of a folder's names and their contents.
const sum = `sum() { if [ -d $1 ]; then (echo folder; cd $1; find . -type f | sort | xargs -r sha256sum); else cat $1; fi | sha256sum | cut -d ' ' -f 1; }`

// inPath is where a step finds something below /in. Argo packs a single file into a zip with the path that it has
// in its own container, and takes only the first folder of it off again.
func inPath(what, archive string) string {
	if archive == "zip" && (what == "file" || what == "nothing") {
		return what + "-zip/out/" + what
	}
	return what + "-" + archive
}

func passingText() string {
	var outputs, arguments, inputs, wanted []string
	for _, what := range slices.Sorted(maps.Keys(passedOn)) {
		for _, archive := range passedOn[what] {
			name := what + "-" + archive
			// A slash at the end has Argo's collector take the key for a folder.
			key := "{{workflow.name}}/" + archive + "/" + what
			if what == "many" && archive == "none" {
				key += "/"
			}
			outputs = append(outputs, fmt.Sprintf("      - {name: %s, path: /out/%s, s3: {key: %q}%s}", name, what, key, archives[archive]))
			arguments = append(arguments, fmt.Sprintf("          - {name: %s, from: \"{{steps.produce.outputs.artifacts.%[1]s}}\"}", name))
			inputs = append(inputs, fmt.Sprintf("      - {name: %s, path: /in/%[1]s}", name))
			wanted = append(wanted, inPath(what, archive))
		}
	}
	return strings.NewReplacer("OUTPUTS", strings.Join(outputs, "\n"), "ARGUMENTS", strings.Join(arguments, "\n"),
		"INPUTS", strings.Join(inputs, "\n"), "WANTED", strings.Join(wanted, " ")+" key-file key-many", "SUM", sum,
		"LARGE", fmt.Sprint(large()), "MANY", fmt.Sprint(many())).Replace(passing)
}

// passed compares what was produced with what arrived.
func passed(t *testing.T, name string) {
	start := time.Now()
	made, got := digests(waitWorkflow(t, name))
	want := map[string]string{"key-file": "file", "key-many": "many"}
	for what, packed := range passedOn {
		if made[what] == nil {
			t.Errorf("nothing was told of %s", what)
		}
		for _, archive := range packed {
			want[inPath(what, archive)] = what
		}
	}
	for path, what := range want {
		if !slices.Equal(got[path], made[what]) || len(got[path]) != 1 {
			t.Errorf("%s arrived as %q, and was made as %q", path, got[path], made[what])
		}
	}
	if got["missing"] == nil {
		t.Error("the consumer did not tell that it went without the optional input")
	}
	t.Logf("%d artifacts, one of them a folder of %d files and one a file of %d MiB: the last %.0f s", len(want), many(), large()>>20, time.Since(start).Seconds())
}

// digests are what steps told of what they made and got.
func digests(lines []string) (made, got map[string][]string) {
	made, got = map[string][]string{}, map[string][]string{}
	for _, line := range lines {
		if f := strings.Fields(line); len(f) >= 3 {
			switch f[0] {
			case "made":
				made[f[1]] = append(made[f[1]], f[2])
			case "got":
				got[f[1]] = append(got[f[1]], f[2])
			}
		}
	}
	return made, got
}

// collector is the account with which Argo collects artifacts, with what its documentation says that it needs.
const collector = `
apiVersion: v1
kind: ServiceAccount
metadata: {name: artifact-gc}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: artifact-gc}
rules:
- {apiGroups: [argoproj.io], resources: [workflowartifactgctasks], verbs: [list, watch]}
- {apiGroups: [argoproj.io], resources: [workflowartifactgctasks/status], verbs: [patch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: artifact-gc}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: artifact-gc}
subjects: [{kind: ServiceAccount, name: artifact-gc}]
`

// collected deletes a workflow: Argo's collector deletes its artifacts through the tier, and leaves that which it
// is told to.
func collected(t *testing.T, name string) {
	saved := many() // of the folder as it is, where the others are one object each; and one more that stays
	for _, packed := range passedOn {
		saved += len(packed)
	}
	if found := keys(t, atBucket(t), name); len(found) != saved {
		t.Errorf("the bucket has %d objects of the workflow, want %d: %s", len(found), saved, brief(strings.Join(found, " ")))
	}
	start := time.Now()
	kubectl(t, "delete", "workflow", "-n", namespace, name)
	t.Logf("%d objects of artifacts collected in %.0f s", saved-1, time.Since(start).Seconds())
	for where, c := range map[string]*minio.Client{"the bucket": atBucket(t), "the tier": atTier(t)} {
		if left := keys(t, c, name); len(left) != 1 || !strings.HasSuffix(left[0], "/file") {
			t.Errorf("%s still has %d objects of a workflow that was collected: %s", where, len(left), brief(strings.Join(left, " ")))
		}
	}
}

const missingInput = `
apiVersion: argoproj.io/v1alpha1
kind: Workflow
metadata: {generateName: missing-}
spec:
  entrypoint: main
  artifactRepositoryRef: {configMap: artifacts-s3}
  templates:
  - name: main
    inputs:
      artifacts: [{name: missing, path: /in/missing, s3: {key: nowhere/at/all}}]
    container: {image: "busybox:1.35", command: ["true"]}
`

// inputMissing has a step without an input that is not optional: it fails, and says so.
func inputMissing(t *testing.T, name string) {
	phase, pods := ended(t, name)
	if phase == "Succeeded" || len(pods) != 1 || !strings.Contains(pods[0].Message, "artifact missing failed to load") {
		t.Errorf("a step without its input: %s %v", phase, pods)
	}
}

// One step makes an artifact, and another was put into the bucket by somebody else. Many steps load both.
const loadedByMany = `
apiVersion: argoproj.io/v1alpha1
kind: Workflow
metadata: {generateName: fan-out-}
spec:
  entrypoint: main
  artifactRepositoryRef: {configMap: REPOSITORY}
  templates:
  - name: main
    steps:
    - - {name: produce, template: produce}
    - - name: consume
        template: consume
        withSequence: {count: "CONSUMERS"}
        arguments:
          artifacts: [{name: made, from: "{{steps.produce.outputs.artifacts.made}}"}]
  - name: produce
    volumes: [{name: out, emptyDir: {}}]
    container:
      image: busybox:1.35
      command: [sh, -c]
      args:
      - |
        set -e
        SUM
        head -c SIZE /dev/urandom > /out/made
        echo "made made $(sum /out/made)"
      volumeMounts: [{name: out, mountPath: /out}]
    outputs:
      artifacts: [{name: made, path: /out/made, archive: {none: {}}}]
  - name: consume
    inputs:
      artifacts:
      - {name: made, path: /in/made}
      - {name: found, path: /in/found, archive: {none: {}}, s3: {key: fan-out/found}}
    volumes: [{name: in, emptyDir: {medium: Memory}}] # else they would wait for the nodes' disk, all the same one here
    container:
      image: busybox:1.35
      volumeMounts: [{name: in, mountPath: /in}]
      command: [sh, -c]
      args:
      - |
        set -e
        SUM
        for x in made found; do echo "got $x $(sum /in/$x)"; done
`

// directRepository is the same bucket without the tier.
const directRepository = `
apiVersion: v1
kind: ConfigMap
metadata:
  name: direct
  annotations: {workflows.argoproj.io/default-artifact-repository: direct}
data:
  direct: |
    s3:
      endpoint: bucket.bucket:9000
      insecure: true
      bucket: artifacts
      region: us-east-1
      keyFormat: "direct/{{workflow.name}}/{{pod.name}}"
      accessKeySecret: {name: access-key, key: accessKeyID}
      secretKeySecret: {name: access-key, key: accessKeySecret}
`

// fannedOut has many steps load what one saved, and what lay in the bucket: each byte leaves the bucket at most once.
// Then the same steps do it without the tier.
func fannedOut(t *testing.T) {
	const size = 32 << 20
	found := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{7}).Read(found)
	if _, err := atBucket(t).PutObject(t.Context(), "artifacts", "fan-out/found", bytes.NewReader(found), size, minio.PutObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	sumFound := sha256.Sum256(found)
	apply(t, namespace, directRepository)
	var took [2]time.Duration
	for k, repository := range []string{"artifacts-s3", "direct"} {
		before := sent(t)
		name := create(t, edit(t, loadedByMany, "REPOSITORY", repository, "CONSUMERS", fmt.Sprint(steps()), "SIZE", fmt.Sprint(size), "SUM", sum))
		made, got := digests(waitWorkflow(t, name))
		left := sent(t) - before
		made["found"] = []string{hex.EncodeToString(sumFound[:])}
		for _, what := range []string{"made", "found"} {
			if len(made[what]) != 1 || len(got[what]) != steps() || slices.ContainsFunc(got[what], func(d string) bool { return d != made[what][0] }) {
				t.Errorf("by %s, %q was made and %d of %d consumers got %q", repository, made[what], len(got[what]), steps(), slices.Compact(slices.Sorted(slices.Values(got[what]))))
			}
		}
		took[k] = consumersTook(t, name)
		t.Logf("%d consumers of two artifacts of %d MiB by %s: %.0f s, each %.1f s for loading; %d bytes left the bucket",
			steps(), size>>20, repository, took[k].Seconds(), loading(t, name), left)
		// What was made came in parts, which the tier fetches back once. Answers without content leave the bucket, too.
		switch most := int64(2*(size+size/50) + steps()*32<<10); {
		case repository == "direct" && left < int64(2*steps()*size):
			t.Errorf("%d bytes left the bucket for consumers without the tier, less than they read", left)
		case repository != "direct" && left > most:
			t.Errorf("%d bytes left the bucket, more than once a byte (%d)", left, most)
		}
	}
	t.Logf("consumers' wall time by the tier to that at the bucket: %.2f", took[0].Seconds()/took[1].Seconds())
}

// consumersTook is the time from the first consumer's start to the last one's end.
func consumersTook(t *testing.T, name string) time.Duration {
	t.Helper()
	_, pods, err := stepsOf(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	var first, last time.Time
	for _, p := range pods {
		if strings.HasPrefix(p.DisplayName, "consume") {
			if first.IsZero() || p.StartedAt.Before(first) {
				first = p.StartedAt
			}
			if p.FinishedAt.After(last) {
				last = p.FinishedAt
			}
		}
	}
	if first.IsZero() || last.Before(first) {
		t.Fatalf("workflow %s has no times of its consumers: %+v", name, pods)
	}
	return last.Sub(first)
}

// loading is how many seconds a workflow's consumers took on average to load their inputs.
func loading(t *testing.T, name string) float64 {
	t.Helper()
	var pods struct {
		Items []struct {
			Metadata struct{ Annotations map[string]string }
			Status   struct {
				InitContainerStatuses []struct {
					Name  string
					State struct {
						Terminated struct{ StartedAt, FinishedAt time.Time }
					}
				}
			}
		}
	}
	text := kubectl(t, "get", "pods", "-n", namespace, "-l", "workflows.argoproj.io/workflow="+name, "-o", "json")
	if err := json.Unmarshal([]byte(text), &pods); err != nil {
		t.Fatal(err)
	}
	var all time.Duration
	n := 0
	for _, p := range pods.Items {
		for _, c := range p.Status.InitContainerStatuses {
			if c.Name == "init" && strings.Contains(p.Metadata.Annotations["workflows.argoproj.io/node-name"], ".consume(") {
				all += c.State.Terminated.FinishedAt.Sub(c.State.Terminated.StartedAt)
				n++
			}
		}
	}
	return all.Seconds() / float64(max(n, 1))
}

// atBucket is a client of the bucket, past its limits.
func atBucket(t *testing.T) *minio.Client {
	return s3Client(t, "bucket.bucket:9001", credentials.NewStaticV4(bucket.AccessKey, bucket.SecretKey, ""))
}

// atTier is a client of the S3 endpoint of the Dataset artifacts, with its keys.
func atTier(t *testing.T) *minio.Client {
	var secret struct{ Data map[string][]byte }
	if err := json.Unmarshal([]byte(kubectl(t, "get", "secret", "-n", namespace, "artifacts-s3", "-o", "json")), &secret); err != nil {
		t.Fatal(err)
	}
	return s3Client(t, "artifacts-s3."+namespace+":9000",
		credentials.NewStaticV4(string(secret.Data["accessKeyID"]), string(secret.Data["secretAccessKey"]), ""))
}

func s3Client(t *testing.T, address string, keys *credentials.Credentials) *minio.Client {
	t.Helper()
	c, err := minio.New(address, &minio.Options{Creds: keys, Region: bucket.Region, BucketLookup: minio.BucketLookupPath})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// keys are those of a workflow's artifacts.
func keys(t *testing.T, c *minio.Client, workflow string) (found []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for o := range c.ListObjects(ctx, "artifacts", minio.ListObjectsOptions{Recursive: true}) {
		if o.Err != nil {
			t.Fatal(o.Err)
		}
		if strings.Contains(o.Key, workflow+"/") {
			found = append(found, o.Key)
		}
	}
	return found
}

// followed has two pods, one by the node's mount and one by a sidecar's, look for an object that is put, replaced and
// deleted while they run.
func followed(t *testing.T) {
	const key = "by-path/out"
	// A pod says what it sees whenever that is something else. A version that is replaced while it is read is an error.
	holder := edit(t, example(t, "quickstart/pod.yaml"), "demo-reader", "holder", "claimName: demo", "claimName: artifacts",
		`"ls -l /data && sha256sum /data/large.bin"`,
		`"while :; do if s=$(sha256sum /data/`+key+`); then s=${s%% *}; elif [ ! -e /data/`+key+` ]; then s=nothing; else s=$last; fi; [ $s = \"$last\" ] || echo saw $s; last=$s; sleep 1; done"`)
	apply(t, namespace, holder)
	apply(t, namespace, edit(t, holder, "{name: holder}", "{name: holder-sidecar, labels: {data.stepcache.dev/inject: sidecar}}"))
	var want []string
	sees := func(what string) {
		t.Helper()
		want = append(want, "saw "+what)
		for _, pod := range []string{"holder", "holder-sidecar"} {
			eventually(t, "pod "+pod+", which mounts the claim of the Dataset artifacts, sees "+what, func(ctx context.Context) error {
				out, err := run(ctx, "", "logs", "-n", namespace, pod, "-c", "main")
				if err != nil {
					return err
				}
				var saw []string
				for line := range strings.Lines(out) {
					if strings.HasPrefix(line, "saw ") {
						saw = append(saw, strings.TrimSpace(line))
					}
				}
				if !slices.Equal(saw, want) {
					err = fmt.Errorf("it saw %q, not %q", saw, want)
				}
				return err
			})
		}
	}
	sees("nothing")
	tier := atTier(t)
	for version, size := range []int{3<<20 + 1, 1000} {
		data := make([]byte, size)
		_, _ = rand.NewChaCha8([32]byte{byte(version), 9}).Read(data)
		if _, err := tier.PutObject(t.Context(), "artifacts", key, bytes.NewReader(data), int64(size), minio.PutObjectOptions{}); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(data)
		sees(hex.EncodeToString(sum[:]))
	}
	if err := tier.RemoveObject(t.Context(), "artifacts", key, minio.RemoveObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	sees("nothing")
	kubectl(t, "delete", "pods", "-n", namespace, "holder", "holder-sidecar", "--grace-period=1")
}

// foreignKeys knocks at the S3 endpoint with other keys than its own.
func foreignKeys(t *testing.T) {
	for who, creds := range map[string]*credentials.Credentials{
		"the bucket's keys": credentials.NewStaticV4(bucket.AccessKey, bucket.SecretKey, ""),
		"nobody":            credentials.NewStaticV4("", "", ""),
	} {
		_, err := s3Client(t, "artifacts-s3."+namespace+":9000", creds).StatObject(t.Context(), "artifacts", "anything", minio.StatObjectOptions{})
		if code := minio.ToErrorResponse(err).StatusCode; code != http.StatusForbidden {
			t.Errorf("a request with %s: %v", who, err)
		}
	}
}
