package mount_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/mount"
	s3server "github.com/stepcache/stepcache/test/bucket"
	"github.com/stepcache/stepcache/test/workers"
)

// What is put through the S3 endpoint of one worker is there by path, in a mount that was there before.
func TestPutsAreSeenByPath(t *testing.T) {
	if err := mount.Supported(); err != nil {
		t.Skip(err)
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: the test mounts")
	}
	server := s3server.StartT(t, s3server.Options{})
	if err := server.MakeBucket(t.Context(), "artifacts"); err != nil {
		t.Fatal(err)
	}
	tier := workers.StartTier(t, server, "artifacts", "", 2)
	names, err := client.DialNames(t.Context(), client.Config{Dataset: tier.Dataset, Membership: tier.Membership, Keys: tier.Keys, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer names.Close()
	dir := t.TempDir()
	m, err := mount.MountNames(t.Context(), dir, names, mount.Options{Dataset: tier.Dataset})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Unmount(); err != nil {
			t.Error(err)
		}
		m.Wait()
	}()
	var s3 [2]*minio.Client
	for i, e := range tier.Endpoints {
		if s3[i], err = minio.New(e, &minio.Options{Creds: credentials.NewStaticV4(workers.AccessKey, workers.SecretKey, ""), BucketLookup: minio.BucketLookupPath}); err != nil {
			t.Fatal(err)
		}
	}
	put := func(i int, key string, data []byte) {
		t.Helper()
		if _, err := s3[i%2].PutObject(t.Context(), workers.Bucket, key, bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{PartSize: 5 << 20}); err != nil {
			t.Fatal(err)
		}
	}
	same := func(key string, want []byte) error {
		got, err := os.ReadFile(filepath.Join(dir, key))
		if err == nil && !bytes.Equal(got, want) {
			err = fmt.Errorf("%s: %d other bytes, of %d", key, len(got), len(want))
		}
		return err
	}
	// Nothing there yet; then at once what was not there, from either worker, small, in parts, and empty.
	if _, err := os.Stat(filepath.Join(dir, "step/out")); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("before: %v", err)
	}
	large := make([]byte, 11<<20+17)
	for i := range large {
		large[i] = byte(i * i >> 3)
	}
	all := map[string][]byte{"step/out": []byte("out"), "step/large": large, "step/empty": nil, "b c+d&e%41?=ü日本": []byte("odd")}
	for i := range 30 {
		all[fmt.Sprintf("many/%02d", i)] = fmt.Append(nil, i)
	}
	i := 0
	for key, data := range all {
		put(i, key, data)
		if err := same(key, data); err != nil {
			t.Errorf("right after the put: %v", err)
		}
		i++
	}
	var group errgroup.Group
	for key, data := range all {
		group.Go(func() error { return same(key, data) })
	}
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
	var listed []string
	if err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			listed = append(listed, strings.TrimPrefix(path, dir+"/"))
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	var want []string
	for key := range all {
		want = append(want, key)
	}
	slices.Sort(want)
	slices.Sort(listed)
	if !slices.Equal(listed, want) {
		t.Errorf("found %q, not %q", listed, want)
	}
	// Replaced: soon another file, and who has the old one open reads no byte of the new one.
	old, err := os.Open(filepath.Join(dir, "step/large"))
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	next := bytes.Repeat([]byte("next"), 3<<20)
	put(0, "step/large", next)
	eventually(t, func() error { return same("step/large", next) })
	got, err := io.ReadAll(old)
	if !bytes.Equal(got, large[:len(got)]) || len(got) < len(large) && !errors.Is(err, unix.EIO) {
		t.Errorf("what was open gave %d bytes, of %d, %v", len(got), len(large), err)
	}
	// By somebody else, past the tier, too.
	direct, err := server.Client()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := direct.PutObject(t.Context(), "artifacts", "outside", strings.NewReader("outside"), 7, minio.PutObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { return same("outside", []byte("outside")) })
	// Deleted: gone, soon.
	for key := range all {
		if err := s3[1].RemoveObject(t.Context(), workers.Bucket, key, minio.RemoveObjectOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func() error {
		for key := range all {
			if _, err := os.Stat(filepath.Join(dir, key)); !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("%s is still there: %v", key, err)
			}
		}
		return nil
	})
}

// A mount of a snapshot goes on showing that; whoever comes after the dataset began to take puts gets the names.
func TestASnapshotOfAWritableDatasetGivesWayToItsNames(t *testing.T) {
	server := s3server.StartT(t, s3server.Options{})
	if err := server.MakeBucket(t.Context(), "artifacts"); err != nil {
		t.Fatal(err)
	}
	running, takePuts := workers.StartReadOnly(t, server, "artifacts", "", 1)
	config := client.Config{Dataset: running.Dataset, Membership: running.Membership, Keys: running.Keys, Logger: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var err error
	if config.Snapshot, err = mount.Current(ctx, config); err != nil {
		t.Fatal(err)
	}
	takePuts()
	if digest, err := mount.Current(ctx, config); err != nil || digest != mount.Live {
		t.Errorf("a writable dataset shows %x, %v", digest, err)
	}
	old, err := mount.Connect(ctx, config)
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	if old.Client() == nil || config.Snapshot == mount.Live || old.Shows() != config.Snapshot {
		t.Errorf("asked for a snapshot, and shows %x", old.Shows())
	}
	now, err := mount.Current(ctx, config)
	if err != nil || now != mount.Live {
		t.Errorf("new mounts would show %x, %v", now, err)
	}
	config.Snapshot = now
	names, err := mount.Connect(ctx, config)
	if err != nil {
		t.Fatal(err)
	}
	defer names.Close()
	if names.Client() != nil || names.Shows() != mount.Live {
		t.Errorf("asked for the names, and shows %x", names.Shows())
	}
}

// eventually waits for what comes true soon.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}
