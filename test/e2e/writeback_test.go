package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// writingBack is a Dataset whose puts are acknowledged before its bucket has them. The bucket is its own, so that it can
// be taken away for a while.
const writingBack = `
apiVersion: data.stepcache.dev/v1alpha1
kind: Dataset
metadata: {name: back}
spec:
  access: ReadWrite
  write: {policy: Back}
  mounts:
  - source: s3://back/
    path: /
    endpoint: http://bucket.bucket:9000
    region: us-east-1
    credentialsSecretRef: {name: access-key}
  workers:
    replicas: 3
    copies: 2
    memory: 128Mi
`

// writtenBack puts through a Dataset with write policy Back while its bucket takes nothing, kills the worker that owns
// what was put, with its memory, and finds it again, in the tier at once and in the bucket once that takes it. The
// Dataset's deletion waits for the bucket.
func writtenBack(t *testing.T) {
	direct := atBucket(t)
	makeBucket := func() {
		t.Helper()
		if err := direct.MakeBucket(t.Context(), "back", minio.MakeBucketOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	// What the bucket has is taken away with it, as no user of the tier would see: it is of other names.
	takeBucket := func() {
		t.Helper()
		eventually(t, "the bucket is taken away", func(ctx context.Context) error {
			for o := range direct.ListObjects(ctx, "back", minio.ListObjectsOptions{Recursive: true}) {
				if o.Err != nil {
					return o.Err
				}
				if err := direct.RemoveObject(ctx, "back", o.Key, minio.RemoveObjectOptions{}); err != nil {
					return err
				}
			}
			return direct.RemoveBucket(ctx, "back")
		})
	}
	if ok, err := direct.BucketExists(t.Context(), "back"); err != nil {
		t.Fatal(err)
	} else if ok { // of a former run
		takeBucket()
	}
	makeBucket()
	apply(t, namespace, writingBack)
	workers(t, "back", 3)
	var secret struct{ Data map[string][]byte }
	if err := json.Unmarshal([]byte(kubectl(t, "get", "secret", "-n", namespace, "back-s3", "-o", "json")), &secret); err != nil {
		t.Fatal(err)
	}
	tier := s3Client(t, "back-s3."+namespace+":9000",
		credentials.NewStaticV4(string(secret.Data["accessKeyID"]), string(secret.Data["secretAccessKey"]), ""))
	put := func(key, text string) {
		t.Helper()
		eventually(t, "put "+key, func(ctx context.Context) error {
			_, err := tier.PutObject(ctx, "back", key, strings.NewReader(text), int64(len(text)), minio.PutObjectOptions{})
			return err
		})
	}
	read := func(from *minio.Client, key, text string) {
		t.Helper()
		eventually(t, "read "+key, func(ctx context.Context) error {
			o, err := from.GetObject(ctx, "back", key, minio.GetObjectOptions{})
			if err != nil {
				return err
			}
			defer o.Close()
			b, err := io.ReadAll(o)
			if err == nil && !bytes.Equal(b, []byte(text)) {
				t.Fatalf("%s has %q, not %q", key, b, text)
			}
			return err
		})
	}
	// So many that every worker owns some of the names. From the first put of one of its own it learns how the bucket
	// makes ETags.
	const names = 30
	each := func(do func(key, text string), what string) {
		t.Helper()
		for n := range names {
			do(fmt.Sprintf("%s/%d", what, n), fmt.Sprintf("%s %d", what, n))
		}
	}
	fromTier := func(key, text string) { t.Helper(); read(tier, key, text) }
	fromBucket := func(key, text string) { t.Helper(); read(direct, key, text) }
	each(put, "learn")
	each(fromBucket, "learn")

	takeBucket()
	each(put, "held")
	pending(t, "back")
	list := func(ctx context.Context) error {
		for o := range tier.ListObjects(ctx, "back", minio.ListObjectsOptions{Recursive: true}) {
			if o.Err != nil {
				return o.Err
			}
		}
		return nil
	}
	if err := list(t.Context()); err == nil {
		t.Error("the tier lists a bucket that is not there")
	}
	each(fromTier, "held")
	kubectl(t, "delete", "pod", "-n", namespace, "back-worker-0", "--grace-period=0", "--force")
	each(fromTier, "held")
	makeBucket()
	each(fromBucket, "held")
	workers(t, "back", 3)
	eventually(t, "the bucket has everything", func(ctx context.Context) error {
		got, err := get(ctx, namespace, "dataset", "back", `{.status.conditions[?(@.type=="Flushed")].status}{.status.unflushed.objects}`)
		return want(strings.TrimSuffix(got, "0"), "True", err)
	})
	eventually(t, "it is listed", list)

	each(put, "again") // the worker that came has to learn too
	each(fromBucket, "again")
	takeBucket()
	put("last", "last")
	pending(t, "back")
	kubectl(t, "delete", "dataset", "-n", namespace, "back", "--wait=false")
	event(t, namespace, "Dataset", "back", "waits until the bucket has all that was written")
	if got, err := get(t.Context(), namespace, "dataset", "back", "{.metadata.name}"); got != "back" {
		t.Fatalf("it is gone, and its bucket does not have what was put: %v", err)
	}
	read(tier, "last", "last")
	makeBucket()
	eventually(t, "it is deleted", func(ctx context.Context) error {
		got, err := run(ctx, "", "get", "dataset", "-n", namespace, "back", "--ignore-not-found", "-o", "name")
		return want(got, "", err)
	})
	read(direct, "last", "last")
	takeBucket()
}

// pending waits until a Dataset says that its bucket lacks something.
func pending(t *testing.T, name string) {
	t.Helper()
	eventually(t, "Dataset "+name+" says what its bucket lacks", func(ctx context.Context) error {
		got, err := get(ctx, namespace, "dataset", name, `{.status.conditions[?(@.type=="Flushed")].status} {.status.unflushed.objects}`)
		if err == nil && (!strings.HasPrefix(got, "False ") || strings.HasSuffix(got, " ")) {
			err = errors.New(got)
		}
		return err
	})
}
