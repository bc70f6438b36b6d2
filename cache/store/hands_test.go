package store

import (
	"context"
	"sync"
	"testing"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
)

// No fill waits for another's end, however many there are, hands are used again, and none is left after close.
func TestHandsAreAsManyAsFills(t *testing.T) {
	var h hands
	var all, running sync.WaitGroup
	const fills = 3 * maxIdleHands
	for range 3 {
		var done sync.WaitGroup
		let := make(chan struct{})
		running.Add(fills)
		for range fills {
			done.Add(1)
			h.run(&all, func() {
				defer done.Done()
				running.Done()
				<-let
			})
		}
		running.Wait() // all at once
		close(let)
		done.Wait()
	}
	h.mu.Lock()
	if len(h.idle) > maxIdleHands {
		t.Errorf("%d idle hands", len(h.idle))
	}
	h.mu.Unlock()
	let, end := make(chan struct{}), make(chan struct{})
	h.run(&all, func() { <-let; close(end) })
	h.close()
	close(let)
	<-end      // a fill that is under way is ended by its own context
	all.Wait() // and its hand after it
}

// A block that was just filled is read by the fill's own descriptor: also when the file is dropped, and the
// descriptor is closed with the last who uses it, so that the object can be renamed at once.
func TestWaitersTakeOverTheFillsFile(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	o := anObject(1, checksum.Size+1)
	want := make([]byte, o.Size)
	content(o, 0, want)
	const waiters = 4
	begun := make(chan struct{})
	let := make(chan struct{})
	var wg sync.WaitGroup
	blocks := make([]*Block, waiters)
	fill := func(_ context.Context, p []byte) error {
		close(begun)
		<-let
		copy(p, want)
		return nil
	}
	for k := range waiters {
		wg.Go(func() {
			b, err := s.Acquire(context.Background(), o, 0, fill)
			if err != nil {
				t.Error(err)
				return
			}
			blocks[k] = b
		})
	}
	<-begun
	eventually(t, func() bool { return s.Stats().Shared == waiters-1 })
	close(let)
	wg.Wait()
	if t.Failed() {
		return
	}
	s.mu.Lock()
	refs := s.objects[o.ID].fileRefs
	s.mu.Unlock()
	if refs != waiters {
		t.Errorf("%d uses of the file by %d blocks", refs, waiters)
	}
	for _, b := range blocks[1:] {
		b.Release()
	}
	s.Drop(o)
	got := make([]byte, o.Size)
	if n, err := blocks[0].ReadAt(got, 0); n != len(got) || err != nil || string(got) != string(want) {
		t.Errorf("a block in use of a dropped object: %d bytes, %v", n, err)
	}
	blocks[0].Release()
	for range 100 {
		from := ring.Object{ID: Staging(), Size: o.Size}
		acquire(t, s, from, 0).Release()
		if !s.Rename(from, o) {
			t.Fatal("the object is still in use after its only block was released")
		}
		s.Drop(o)
	}
	checkBooks(t, s)
}
