package e2e

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/stepcache/stepcache/test/bucket"
)

// What one step saves, in the default archive and as it is, others load.
const artifactPassing = `
apiVersion: argoproj.io/v1alpha1
kind: Workflow
metadata: {generateName: artifacts-}
spec:
  entrypoint: main
  artifactRepositoryRef: {configMap: artifacts-s3}
  templates:
  - name: main
    steps:
    - - {name: produce, template: produce}
    - - name: consume
        template: consume
        withSequence: {count: "CONSUMERS"}
        arguments:
          artifacts:
          - {name: archived, from: "{{steps.produce.outputs.artifacts.archived}}"}
          - {name: plain, from: "{{steps.produce.outputs.artifacts.plain}}"}
          - {name: folder, from: "{{steps.produce.outputs.artifacts.folder}}"}
  - name: produce
    volumes: [{name: out, emptyDir: {}}]
    container:
      image: busybox:1.35
      command: [sh, -c]
      args:
      - |
        mkdir -p /out/folder/sub
        seq 1000000 > /out/archived
        seq 2000000 > /out/plain
        for i in $(seq 20); do echo $i > /out/folder/sub/$i; done
      volumeMounts: [{name: out, mountPath: /out}]
    outputs:
      artifacts:
      - {name: archived, path: /out/archived}
      - {name: plain, path: /out/plain, archive: {none: {}}}
      - {name: folder, path: /out/folder, archive: {none: {}}}
  - name: consume
    inputs:
      artifacts:
      - {name: archived, path: /in/archived}
      - {name: plain, path: /in/plain}
      - {name: folder, path: /in/folder}
    container:
      image: busybox:1.35
      command: [sh, -c]
      args:
      - |
        set -e
        [ "$(sha256sum < /in/archived)" = "$(seq 1000000 | sha256sum)" ] || { echo "WRONG archived"; exit 1; }
        [ "$(sha256sum < /in/plain)" = "$(seq 2000000 | sha256sum)" ] || { echo "WRONG plain"; exit 1; }
        [ "$(cat /in/folder/sub/* | sort -n | sha256sum)" = "$(seq 20 | sha256sum)" ] || { echo "WRONG folder"; exit 1; }
        echo right
`

// artifacts passes artifacts through a Dataset that takes puts: into the bucket, and back out of memory.
func artifacts(t *testing.T) {
	kubectl(t, "apply", "-n", namespace, "-k", "examples/artifacts")
	waitReady(t, namespace, "artifacts")
	// Argo's own example asks for the image's latest version, which the nodes do not have.
	passing := submit(t, "artifacts/artifact-passing.yaml", "image: busybox\n", "image: busybox:1.35\n")
	direct := submit(t, "artifacts/direct.yaml")
	mapped := submit(t, "artifacts/map-reduce.yaml")
	if lines := waitWorkflow(t, passing); !slices.Equal(lines, []string{"hello world", "hello world"}) {
		t.Errorf("artifact-passing.yaml printed %q", lines)
	}
	if lines := waitWorkflow(t, direct); !slices.Contains(lines, "as they were") {
		t.Errorf("direct.yaml printed %q", lines)
	}
	waitWorkflow(t, mapped) // its reducer fails by itself where something is missing
	produced(t)
	foreignKeys(t)
	kubectl(t, "delete", "dataset", "-n", namespace, "artifacts", "--timeout", patience.String())
}

// produced has many steps load what one saved: it leaves the bucket not even once, since it came by the tier.
func produced(t *testing.T) {
	before, start, consumers := sent(t), time.Now(), 2*few()
	name := create(t, edit(t, artifactPassing, "CONSUMERS", fmt.Sprint(consumers)))
	right := 0
	for _, line := range waitWorkflow(t, name) {
		if line == "right" {
			right++
		} else if strings.HasPrefix(line, "WRONG") {
			t.Error(line)
		}
	}
	if right != consumers {
		t.Errorf("%d of %d consumers got what was produced", right, consumers)
	}
	// The plain one alone is 14 MB, and 14 times that for the consumers.
	left := sent(t) - before
	t.Logf("%d consumers of artifacts: %.0f s, %d bytes left the bucket", consumers, time.Since(start).Seconds(), left)
	if left > 4<<20 {
		t.Errorf("%d bytes left the bucket for artifacts that were put through the tier", left)
	}
	bucketed, err := minio.New("bucket.bucket:9001", &minio.Options{
		Creds: credentials.NewStaticV4(bucket.AccessKey, bucket.SecretKey, ""), Region: bucket.Region, BucketLookup: minio.BucketLookupPath,
	})
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for o := range bucketed.ListObjects(t.Context(), "artifacts", minio.ListObjectsOptions{Recursive: true}) {
		if o.Err != nil {
			t.Fatal(o.Err)
		}
		if strings.Contains(o.Key, name) {
			found++
		}
	}
	if found < 22 {
		t.Errorf("the bucket has %d objects of the workflow, want the two files and the twenty of the folder at least", found)
	}
}

// foreignKeys knocks at the S3 endpoint with other keys than its own.
func foreignKeys(t *testing.T) {
	for who, creds := range map[string]*credentials.Credentials{
		"the bucket's keys": credentials.NewStaticV4(bucket.AccessKey, bucket.SecretKey, ""),
		"nobody":            credentials.NewStaticV4("", "", ""),
	} {
		c, err := minio.New("artifacts-s3."+namespace+":9000", &minio.Options{Creds: creds, Region: "us-east-1", BucketLookup: minio.BucketLookupPath})
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.StatObject(t.Context(), "artifacts", "anything", minio.StatObjectOptions{})
		if code := minio.ToErrorResponse(err).StatusCode; code != http.StatusForbidden {
			t.Errorf("a request with %s: %v", who, err)
		}
	}
}
