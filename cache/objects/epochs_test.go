package objects_test

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/worker"
)

// network lets a test cut the connections between workers, not those of clients.
type network struct {
	mu    sync.Mutex
	cut   bool
	conns []net.Conn
}

func (n *network) deps(_ int, d *worker.Deps) {
	d.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.cut {
			if err == nil {
				c.Close()
			}
			return nil, errors.New("the network is cut")
		}
		if err == nil {
			n.conns = append(n.conns, c)
		}
		return c, err
	}
}

func (n *network) set(cut bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut = cut
	for _, c := range n.conns {
		c.Close()
	}
	n.conns = nil
}

// twoWorkers are a settled tier of two, and a key that the first owns and remembers to be "1".
func twoWorkers(t *testing.T) (tr *tier, n *network, key string) {
	t.Helper()
	n = &network{}
	tr = newTier(t, "")
	tr.deps = n.deps
	tr.start(2)
	key = tr.keyOwnedBy(0, "k")
	// Settled once a put need not wait.
	eventually(t, "the membership is settled", func() error {
		before := tr.metric(0, "stepcache_objects_waited_total")
		tr.mustPut(0, key, []byte("1"))
		if tr.metric(0, "stepcache_objects_waited_total") != before {
			return errors.New("a put waited")
		}
		return nil
	})
	tr.reads(0, key, "1")
	return tr, n, key
}

func (tr *tier) reads(i int, key, want string) {
	tr.t.Helper()
	if p, _, err := tr.get(i, key); err != nil || string(p) != want {
		tr.t.Errorf("worker %d reads %q of %s, want %q, %v", i, p, key, want, err)
	}
}

// handOver is a membership in which the second worker owns all.
func (tr *tier) handOver() []byte {
	tr.workers[0].m.State = ring.Leaving
	return tr.next()
}

// In each of these the two workers cannot reach each other, so that neither learns from the other.

func TestAFormerOwnerThatKnowsNothingOfTheNewOneReadsItsWrites(t *testing.T) {
	tr, n, key := twoWorkers(t)
	n.set(true)
	tr.tell(1, tr.handOver())
	tr.reads(0, key, "1")
	tr.mustPut(1, key, []byte("2"))
	tr.reads(0, key, "2")
	if err := tr.client(1).RemoveObject(t.Context(), "data", key, minio.RemoveObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := tr.get(0, key); code(err) != "NoSuchKey" {
		t.Errorf("after the deletion: %v", err)
	}
}

func TestANewOwnerReadsTheWritesOfAFormerOneThatKnowsNothingOfIt(t *testing.T) {
	tr, n, key := twoWorkers(t)
	n.set(true)
	tr.tell(1, tr.handOver())
	for _, v := range []string{"2", "3"} {
		tr.mustPut(0, key, []byte(v))
		tr.reads(1, key, v)
	}
}

func TestAnOwnerThatCannotBeReachedReadsTheWritesOfOthers(t *testing.T) {
	tr, n, key := twoWorkers(t)
	n.set(true)
	tr.reads(0, key, "1")
	tr.mustPut(1, key, []byte("2"))
	tr.reads(0, key, "2")
	tr.mustPut(0, key, []byte("3"))
	tr.reads(1, key, "3")
}

// gate is a reader that is at its end once it is opened.
type gate chan struct{}

func (g gate) Read([]byte) (int, error) {
	<-g
	return 0, io.EOF
}

// A put that was begun under one membership and ends under the next is seen by the new owner's readers once
// it is acknowledged, although that remembers the version before it.
func TestAPutThatOutlivesItsMembership(t *testing.T) {
	tr, _, key := twoWorkers(t)
	half := make(gate)
	puts := tr.metric(0, "stepcache_objects_puts_total")
	done := make(chan error, 1)
	go func() {
		body := io.MultiReader(strings.NewReader("2"), half, strings.NewReader("2"))
		_, err := tr.client(0).PutObject(context.Background(), "data", key, body, 2, "", "", minio.PutObjectOptions{DisableContentSha256: true})
		done <- err
	}()
	eventually(t, "the put is under way", func() error {
		if tr.metric(0, "stepcache_objects_puts_total") == puts {
			return errors.New("not yet")
		}
		return nil
	})
	list := tr.handOver()
	tr.tell(1, list)
	tr.tell(0, list)
	// Settled once the new owner remembers: a second read asks the bucket for nothing.
	eventually(t, "the new owner remembers", func() error {
		tr.reads(1, key, "1")
		before := theServer(t).Requests()
		tr.reads(1, key, "1")
		if theServer(t).Requests() != before {
			return errors.New("the bucket was asked")
		}
		return nil
	})
	close(half)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	tr.reads(1, key, "22")
}
