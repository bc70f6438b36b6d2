package csi

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"google.golang.org/grpc"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/test/bucket"
	"github.com/stepcache/stepcache/test/workers"
)

// A pod that mounts a writable Dataset sees what is put while it runs, also after the node service was killed; and
// all pods of the node share one mount, whatever was put between them.
func TestAPodSeesWhatIsPut(t *testing.T) {
	needMounts(t)
	server := bucket.StartT(t, bucket.Options{})
	if err := server.MakeBucket(t.Context(), "artifacts"); err != nil {
		t.Fatal(err)
	}
	running := workers.StartTier(t, server, "artifacts", "", 2)
	s3, err := minio.New(running.Endpoints[1], &minio.Options{Creds: credentials.NewStaticV4(workers.AccessKey, workers.SecretKey, ""), BucketLookup: minio.BucketLookupPath})
	if err != nil {
		t.Fatal(err)
	}
	put := func(key, text string) {
		t.Helper()
		if _, err := s3.PutObject(t.Context(), workers.Bucket, key, strings.NewReader(text), int64(len(text)), minio.PutObjectOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	m := newMachine(t, &tier{t: t, keys: running.Keys, gate: newGate(t, running.Membership.Members[0].Addr)})
	keeper := m.startKeeper()
	first, kube := m.startNode()
	publish := func(k *kubelet, pod string) string {
		t.Helper()
		r := k.request(pod)
		r.VolumeId = running.Dataset
		r.VolumeContext[v1alpha1.AttributeNamespace], r.VolumeContext[v1alpha1.AttributeDataset] = "ns", workers.Bucket
		r.VolumeContext[attributePodNamespace] = "ns"
		if _, err := k.NodePublishVolume(testContext(t), r, grpc.WaitForReady(true)); err != nil {
			t.Fatal(err)
		}
		return r.TargetPath
	}
	dir := publish(kube, "step")
	keeper.parked(t, 1)
	if _, err := os.Stat(filepath.Join(dir, "out/x")); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("before it is put: %v", err)
	}
	put("out/x", "first")
	sameFile(t, filepath.Join(dir, "out/x"), []byte("first"))
	open, err := os.Open(filepath.Join(dir, "out/x"))
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	put("out/y", "second")
	other := publish(kube, "another")
	sameFile(t, filepath.Join(other, "out/y"), []byte("second"))
	if deviceAt(t, dir) != deviceAt(t, other) {
		t.Error("two pods of one writable Dataset have two mounts")
	}
	if r, err := kube.NodeGetVolumeStats(testContext(t), &csi.NodeGetVolumeStatsRequest{VolumeId: running.Dataset, VolumePath: dir}); err != nil || len(r.Usage) == 0 {
		t.Errorf("volume stats: %v, %v", r, err)
	}
	first.kill()
	put("out/z", "third")
	_, kube = m.startNode()
	sameFile(t, filepath.Join(dir, "out/z"), []byte("third"))
	got := make([]byte, 5)
	if _, err := open.ReadAt(got, 0); err != nil || !bytes.Equal(got, []byte("first")) {
		t.Errorf("a file that was open when the node service was killed: %q, %v", got, err)
	}
	put("out/x", "another version")
	eventually(t, "the replaced file", func() bool {
		b, err := os.ReadFile(filepath.Join(dir, "out/x"))
		return err == nil && string(b) == "another version"
	})
	for _, pod := range []string{"step", "another"} {
		open.Close()
		if _, err := kube.NodeUnpublishVolume(testContext(t), &csi.NodeUnpublishVolumeRequest{VolumeId: running.Dataset, TargetPath: kube.target(pod)}, grpc.WaitForReady(true)); err != nil {
			t.Error(err)
		}
	}
}
