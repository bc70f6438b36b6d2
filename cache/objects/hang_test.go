package objects_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"golang.org/x/sys/unix"
)

// hangs stops the process of worker i, and returns what has it go on.
func (tr *tier) hangs(i int) (goOn func()) {
	tr.t.Helper()
	pid := tr.workers[i].outside.Pid()
	signal := func(s syscall.Signal) {
		tr.t.Helper()
		if err := syscall.Kill(pid, s); err != nil {
			tr.t.Fatal(err)
		}
	}
	tr.t.Cleanup(func() { syscall.Kill(pid, syscall.SIGCONT) }) // it may be gone by then
	signal(syscall.SIGSTOP)
	// kill(2) returns before the process has stopped. On a busy machine it goes on for a while, and what comes
	// to it in that time it may carry out, or pass on when it continues: it does not know that it hung.
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WSTOPPED|unix.WEXITED|unix.WNOWAIT, nil)
		if err == nil {
			break
		}
		if err != unix.EINTR {
			tr.t.Fatalf("worker %d does not stop: %v", i, err)
		}
	}
	return func() { signal(syscall.SIGCONT) }
}

// spawned are workers in processes of their own, settled.
func (tr *tier) spawned(n int) *tier {
	t := tr.t
	t.Helper()
	for range n {
		tr.add()
	}
	tr.publish()
	for i := range n {
		tr.spawn(i)
	}
	tr.ready()
	for i := range n {
		key := tr.keyOwnedBy(i, "settled")
		eventually(t, "the membership is settled", func() error {
			before := tr.metric(i, "stepcache_objects_waited_total")
			tr.mustPut(i, key, []byte("1"))
			if tr.metric(i, "stepcache_objects_waited_total") != before {
				return errors.New("a put waited")
			}
			return nil
		})
	}
	return tr
}

// What a worker finds when it goes on after it hung was given up by those who asked, and done by others
// since: it does nothing of it. Else it would delete, or write over, what was acknowledged meanwhile.
func TestAWorkerThatHungDoesNothingThatWasGivenUp(t *testing.T) {
	t.Parallel() // it waits most of the time
	tr := newTier(t, "").spawned(2)
	ctx := t.Context()
	const each = 24
	kinds := map[string]func(key string) error{
		"delete": func(key string) error {
			return tr.client(0).RemoveObject(ctx, "data", key, minio.RemoveObjectOptions{})
		},
		"copy": func(key string) error {
			_, err := tr.client(0).CopyObject(ctx, "data", "from", "data", key, nil, minio.CopySrcOptions{}, minio.PutObjectOptions{})
			return err
		},
		"put": func(key string) error {
			_, err := tr.put(0, key, []byte("given up"), minio.PutObjectOptions{})
			return err
		},
	}
	tr.mustPut(0, "from", []byte("copied"))
	var keys []string
	for kind := range kinds {
		for n := range each {
			key := tr.keyOwnedBy(1, fmt.Sprintf("%s/%d", kind, n))
			tr.mustPut(0, key, []byte("old"))
			keys = append(keys, key)
		}
	}
	goOn := tr.hangs(1)
	done := make(chan error, len(keys))
	for _, key := range keys {
		kind, _, _ := strings.Cut(key, "/")
		go func() {
			err := kinds[kind](key)
			if kind == "put" {
				err = nil // it fails or is done here: it may have happened, and must not once it was tried again
			} else if err != nil {
				err = fmt.Errorf("%s %s: %w", kind, key, err)
			}
			if err == nil {
				_, err = tr.put(0, key, []byte("new"), minio.PutObjectOptions{})
			}
			done <- err
		}()
	}
	for range keys {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	goOn()
	// Once it answers, it has taken what was in its connections.
	eventually(t, "the worker answers again", func() error {
		within, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		_, err := tr.client(1).ListObjectsV2("data", "", "", "", "", 1)
		if err == nil {
			_, _, _, err = tr.client(0).GetObject(within, "data", tr.keyOwnedBy(1, "settled"), minio.GetObjectOptions{})
		}
		return err
	})
	before := int64(-1)
	eventually(t, "the worker is idle", func() error {
		now := tr.metric(1, "stepcache_objects_deletes_total") + tr.metric(1, "stepcache_objects_puts_total") + tr.metric(1, "stepcache_objects_copies_total")
		same := now == before
		before = now
		if !same {
			return errors.New("it still works")
		}
		return nil
	})
	for _, key := range keys {
		if got, _, err := tr.inBucket(key); err != nil || !bytes.Equal(got, []byte("new")) {
			t.Errorf("%s was put last as %q, and is %q in the bucket, %v", key, "new", got, err)
		}
		for i := range 2 {
			tr.reads(i, key, "new")
		}
	}
}
