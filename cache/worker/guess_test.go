package worker

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

func TestGuessesTakeTheRoomOfNothing(t *testing.T) {
	const size = 1 << 20
	files := map[string][]byte{"guess": content(size, 200)}
	for n := range 64 {
		files[fmt.Sprintf("f%02d", n)] = content(size, byte(n))
	}
	tr := newTier(t, files)
	tr.config = func(_ int, c *Config) { c.Memory = 32 << 20 }
	tr.start(1)
	snap := tr.snapshot()
	c := tr.dial(0)
	w := tr.workers[0]
	taken, refused := 0, 0
	for n := range 64 {
		p, err := c.read(index(t, snap, fmt.Sprintf("/f%02d", n)), 0, size, wire.FlagGuess)
		switch {
		case err == nil && string(p) == string(files[fmt.Sprintf("f%02d", n)]):
			taken++
		case errors.Is(err, wire.ErrNotResident):
			refused++
		default:
			t.Fatal(n, err)
		}
	}
	if s := w.store.Stats(); taken < 24 || refused < 24 || s.Evicted != 0 || s.Uncached != 0 || s.Blocks != int64(taken) {
		t.Fatalf("%d guesses taken, %d refused: %+v", taken, refused, s)
	}
	if gets, _ := tr.gates[0].counts(); gets != taken {
		t.Fatalf("%d requests to the bucket for %d guesses", gets, taken)
	}
	// What is held is given, and what somebody asks for is fetched, full or not.
	if _, err := c.read(index(t, snap, "/f00"), 0, size, wire.FlagGuess); err != nil {
		t.Fatal(err)
	}
	if _, err := c.read(index(t, snap, "/guess"), 0, size, 0); err != nil {
		t.Fatal(err)
	}
}

func TestGuessesUnderWayLeaveTheBucketToReaders(t *testing.T) {
	files := map[string][]byte{"wanted": content(ring.BlockSize, 1)}
	for n := range maxGuesses + 1 {
		files[fmt.Sprintf("f%02d", n)] = content(100, byte(n))
	}
	tr := newTier(t, files)
	tr.start(1)
	snap := tr.snapshot()
	begun, stuck := make(chan struct{}, maxGuesses), make(chan struct{})
	tr.gates[0].set(func(ctx context.Context, o source.Object, _ int64) error {
		if o.Key == "wanted" {
			return nil
		}
		begun <- struct{}{}
		select {
		case <-stuck:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(stuck)
	for n := range maxGuesses {
		c, i := tr.dial(0), index(t, snap, fmt.Sprintf("/f%02d", n))
		wg.Go(func() {
			if _, err := c.read(i, 0, 100, wire.FlagGuess); err != nil {
				t.Errorf("guess %d: %v", n, err)
			}
		})
	}
	for range maxGuesses {
		<-begun
	}
	c := tr.dial(0)
	if _, err := c.read(index(t, snap, fmt.Sprintf("/f%02d", maxGuesses)), 0, 100, wire.FlagGuess); !errors.Is(err, wire.ErrOverloaded) {
		t.Fatalf("one guess too many: %v", err)
	}
	if _, err := c.read(index(t, snap, "/wanted"), 0, ring.BlockSize, 0); err != nil {
		t.Fatal(err)
	}
}
