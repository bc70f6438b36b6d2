package client

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/test/bucket"
)

// smallFiles are n files of a few bytes, perFolder to a folder, with a name that is sorted by its number.
func smallFiles(n, perFolder int) (map[string][]byte, []string) {
	files, names := make(map[string][]byte), make([]string, n)
	for k := range n {
		names[k] = fmt.Sprintf("d%03d/f%05d", k/perFolder, k)
		files[names[k]] = content(uint64(k), 100+k%50)
	}
	return files, names
}

// requests are the files that a worker was asked for as a guess, and how often it was asked for each file.
func requests(w *fake) (guessed []catalog.Index, asked map[catalog.Index]int) {
	asked = make(map[catalog.Index]int)
	for _, r := range w.seen() {
		asked[r.Index]++
		if r.Flags&wire.FlagGuess != 0 {
			guessed = append(guessed, r.Index)
		}
	}
	return guessed, asked
}

func readWhole(t testing.TB, c *Client, k *tier, name string) {
	t.Helper()
	if err := checkRead(testContext(t), c, k.index(name), k.data[name], 0, len(k.data[name])); err != nil {
		t.Fatal(err)
	}
}

func TestSmallFilesInEvenStepsAreReadAheadAndNoOthers(t *testing.T) {
	files, names := smallFiles(1500, 7)
	for _, stride := range []int{1, 3, 100} {
		t.Run(fmt.Sprint(stride), func(t *testing.T) {
			k := newTier(t, files)
			k.start("a")
			c := k.dial(nil)
			steps := make(map[catalog.Index]bool)
			for n := 2; n < len(names); n += stride {
				steps[k.index(names[n])] = true
			}
			reads := 0
			for n := 2; n < len(names); n += stride {
				readWhole(t, c, k, names[n])
				reads++
			}
			guessed, asked := requests(k.worker("a"))
			for _, i := range guessed {
				if !steps[i] {
					t.Fatalf("%s was guessed, which is on no step", k.snap.Path(i))
				}
			}
			if want := reads - evidence - 1; len(guessed) != want {
				t.Errorf("%d of %d files were guessed, want all but the first few: %d", len(guessed), reads, want)
			}
			for i, n := range asked {
				if n != 1 {
					t.Errorf("%s was asked for %d times", k.snap.Path(i), n)
				}
			}
		})
	}
}

func TestManyReadersThatShareATreeAreReadAheadOnceEach(t *testing.T) {
	files, names := smallFiles(1200, 10)
	read := map[string]func(next func(r int), readers int){
		// Each takes every n-th, and some run ahead of others.
		"in steps that drift apart": func(next func(int), readers int) {
			for round := range len(names) / readers {
				for r := range readers {
					if r%2 == 0 || round >= 40 {
						next(r)
					}
				}
			}
			for range 40 {
				for r := 1; r < readers; r += 2 {
					next(r)
				}
			}
		},
	}
	for name, order := range read {
		t.Run(name, func(t *testing.T) {
			k := newTier(t, files)
			k.start("a")
			c := k.dial(nil)
			const readers = 8
			var at [readers]int
			order(func(r int) {
				readWhole(t, c, k, names[at[r]*readers+r])
				at[r]++
			}, readers)
			guessed, asked := requests(k.worker("a"))
			if len(guessed) < len(names)*9/10 {
				t.Errorf("%d of %d files were guessed", len(guessed), len(names))
			}
			if len(asked) != len(names) {
				t.Errorf("%d files were asked for", len(asked))
			}
			for i, n := range asked {
				if n != 1 {
					t.Errorf("%s was asked for %d times", k.snap.Path(i), n)
				}
			}
		})
	}
	t.Run("at once from one list", func(t *testing.T) {
		k := newTier(t, files)
		k.start("a")
		c := k.dial(nil)
		var wg sync.WaitGroup
		list := make(chan string)
		for range 8 {
			wg.Go(func() {
				for name := range list {
					if err := checkRead(testContext(t), c, k.index(name), k.data[name], 0, 200); err != nil {
						t.Error(err)
					}
				}
			})
		}
		for _, name := range names {
			list <- name
		}
		close(list)
		wg.Wait()
		// How many are guessed depends on the scheduler; that none is fetched twice does not.
		_, asked := requests(k.worker("a"))
		for i, n := range asked {
			if n != 1 {
				t.Errorf("%s was asked for %d times", k.snap.Path(i), n)
			}
		}
	})
}

func TestRandomReadsOfSmallFilesGuessNothing(t *testing.T) {
	for _, n := range []int{100, 3000} {
		files, names := smallFiles(n, 50)
		k := newTier(t, files)
		k.start("a")
		c := k.dial(nil)
		rnd := rand.New(rand.NewPCG(1, uint64(n)))
		for _, at := range rnd.Perm(n) {
			readWhole(t, c, k, names[at])
		}
		for range n {
			readWhole(t, c, k, names[rnd.IntN(n)])
		}
		if guessed, _ := requests(k.worker("a")); len(guessed) > n/100 {
			t.Errorf("%d guesses for random reads of %d files", len(guessed), n)
		}
	}
}

func TestOneFolderReadInOrderGuessesLittleOfTheNext(t *testing.T) {
	files, names := smallFiles(400, 200)
	k := newTier(t, files)
	k.start("a")
	c := k.dial(nil)
	for _, name := range names[:200] {
		readWhole(t, c, k, name)
	}
	_, asked := requests(k.worker("a"))
	if others := len(asked) - 200; others > firstBeyond {
		t.Errorf("%d files of the next folder were asked for", others)
	}
}

func TestAWalkPassesOverWhatIsNotRead(t *testing.T) {
	files, names := smallFiles(200, 10)
	for n := range names {
		switch n % 10 {
		case 3:
			files[names[n]] = nil // nobody reads an empty file
		case 7:
			files[names[n]] = content(uint64(n), smallFile+1) // a large one may be read past the client
		}
	}
	k := newTier(t, files)
	k.start("a")
	c := k.dial(nil)
	for n, name := range names {
		if n%10 != 3 && n%10 != 7 {
			readWhole(t, c, k, name)
		}
	}
	guessed, asked := requests(k.worker("a"))
	if len(guessed) < 140 || len(asked) != 160 {
		t.Errorf("%d guesses, %d files asked for", len(guessed), len(asked))
	}
}

func TestARefusedGuessCostsNothingAndTheyRestAfterIt(t *testing.T) {
	files, names := smallFiles(600, 20)
	for _, status := range []wire.Status{wire.NotResident, wire.Overloaded, wire.Internal, wire.NotOwner} {
		k := newTier(t, files)
		k.start("a")
		c := k.dial(nil)
		k.worker("a").set(func(r wire.Request) *answer {
			if r.Flags&wire.FlagGuess != 0 {
				return &answer{status: status, text: "not for a guess"}
			}
			return nil
		})
		for _, name := range names[:100] {
			readWhole(t, c, k, name)
		}
		guessed, _ := requests(k.worker("a"))
		if s := c.Stats(); s.Fallbacks != 0 || s.Corrupt != 0 {
			t.Errorf("%v: %+v", status, s)
		}
		if status != wire.Overloaded && len(guessed) > 100/restAfterRefusal*2*2*firstAhead {
			t.Errorf("status %v: %d guesses were refused in 100 reads", status, len(guessed))
		}
	}
}

func TestAReaderThatJoinsAGuessGetsItsBytesWhateverBecomesOfIt(t *testing.T) {
	files, names := smallFiles(200, 200)
	for status, times := range map[wire.Status]int{wire.OK: 1, wire.NotResident: 2, wire.Overloaded: 2, wire.Internal: 2} {
		k := newTier(t, files)
		k.start("a")
		c := k.dial(nil)
		hold, held := make(chan struct{}), make(chan struct{}, 1000)
		k.worker("a").set(func(r wire.Request) *answer {
			if r.Flags&wire.FlagGuess != 0 {
				held <- struct{}{}
				return &answer{status: status, text: "not for a guess", wait: hold}
			}
			return nil
		})
		for _, name := range names[:evidence+1] {
			readWhole(t, c, k, name)
		}
		<-held
		joined := make(chan error, 1)
		next := names[evidence+1]
		before := c.Stats().Joins
		go func() { joined <- checkRead(testContext(t), c, k.index(next), k.data[next], 0, 200) }()
		eventually(t, "the reader joins", func() bool { return c.Stats().Joins > before })
		close(hold)
		if err := <-joined; err != nil {
			t.Errorf("status %v: %v", status, err)
		}
		if _, asked := requests(k.worker("a")); asked[k.index(next)] > times {
			t.Errorf("status %v: the file was asked for %d times", status, asked[k.index(next)])
		}
	}
}

func TestGuessesAreBoundedInFilesAndBytes(t *testing.T) {
	files, names := smallFiles(1000, 1000)
	for n := range names {
		if n >= 500 {
			files[names[n]] = content(uint64(n), smallFile)
		}
	}
	s := makeSnapshot(t, files, "v1")
	now := time.Unix(1, 0)
	ws := newWalks(s, 256<<20, func() time.Time { now = now.Add(time.Millisecond); return now })
	most, bytes := 0, int64(0)
	for n := range names {
		i, _ := s.Lookup("/" + names[n])
		_, w := ws.begun(i, true)
		if w == nil {
			continue
		}
		most, bytes = max(most, len(w.queue)), max(bytes, w.bytes)
		if len(w.queue) > maxAhead || w.bytes > aheadOfWalk {
			t.Fatalf("%d files of %d bytes ahead", len(w.queue), w.bytes)
		}
		if n < 5*firstAhead && len(w.queue) > 4*firstAhead {
			t.Fatalf("%d files ahead after %d", len(w.queue), n)
		}
	}
	if most < maxAhead/4 || bytes < aheadOfWalk/2 {
		t.Errorf("never more than %d files of %d bytes ahead, although the reader always waited", most, bytes)
	}
	// A reader that never waits needs no more than it has.
	ws = newWalks(s, 256<<20, func() time.Time { return now })
	for n := range names {
		i, _ := s.Lookup("/" + names[n])
		if _, w := ws.begun(i, false); w != nil && len(w.queue) > firstAhead {
			t.Fatalf("%d files ahead of a reader that does not wait", len(w.queue))
		}
	}
}

func TestMoreGuessesAtOnceAreKeptOnlyIfTheyHelp(t *testing.T) {
	files, names := smallFiles(3000, 3000)
	s := makeSnapshot(t, files, "v1")
	now := time.Unix(1, 0)
	ws := newWalks(s, 256<<20, func() time.Time { return now })
	over := 0
	for n := range names {
		i, _ := s.Lookup("/" + names[n])
		now = now.Add(time.Millisecond) // however many are asked for at once
		if _, w := ws.begun(i, true); w != nil && w.window > 2*firstAhead {
			over++
		}
	}
	if over > 0 {
		t.Errorf("the window was widened at %d reads although it was no use", over)
	}
}

func TestFilesFollowEachOtherInTheOrderOfTheTree(t *testing.T) {
	files := map[string][]byte{"a": nil, "b/c/d": nil, "b/c/e/f": nil, "b.x": nil, "b/z": nil, "q/": nil, "r/": nil, "s/t": nil, "u": nil, "z/": nil}
	s := makeSnapshot(t, files, "v1")
	var order []catalog.Index
	s.Walk(0, func(i catalog.Index) bool { order = append(order, i); return true })
	if len(order) != 7 {
		t.Fatalf("%d files", len(order))
	}
	for n, i := range order {
		next := cursorAt(s, i)
		if ok, last := next.next(), n == len(order)-1; ok == last || !last && next.index != order[n+1] {
			t.Errorf("after %s: %s, %v", s.Path(i), s.Path(next.index), ok)
		}
		before := cursorAt(s, i)
		if ok, first := before.previous(), n == 0; ok == first || !first && before.index != order[n-1] {
			t.Errorf("before %s: %s, %v", s.Path(i), s.Path(before.index), ok)
		}
	}
	there, back := cursorAt(s, order[0]), cursorAt(s, order[len(order)-1])
	for n := 1; n < len(order); n++ {
		if !there.next() || there.index != order[n] || !back.previous() || back.index != order[len(order)-1-n] {
			t.Fatalf("step %d leads to %s, back to %s", n, s.Path(there.index), s.Path(back.index))
		}
	}
}

func TestColdSmallFilesCostTheBucketOneRequestEach(t *testing.T) {
	const n, size = 400, 20_000
	s := bucket.StartT(t, bucket.Options{})
	data := make(map[string][]byte)
	var names []string
	for k := range n {
		names = append(names, fmt.Sprintf("d%d/f%04d", k/50, k))
		data[names[k]] = content(uint64(k), size)
		s.PutT(t, "data", names[k], data[names[k]])
	}
	for _, readers := range []int{1, 8} {
		k := overBucket(t, s, s.Endpoint())
		k.start("a", "b")
		c := k.dial(nil)
		k.settled()
		k.connected(c)
		sent, asked := s.Sent(), s.Requests()
		var wg sync.WaitGroup
		for r := range readers {
			wg.Go(func() {
				for j := r; j < n; j += readers {
					if err := checkRead(testContext(t), c, lookup(t, c, names[j]), data[names[j]], 0, size); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		late := c.Stats().Fallbacks // answers that a very busy machine gave too late: the other worker was asked
		if got := s.Requests() - asked; got < n || got > n+late || late > n/50 {
			t.Errorf("%d readers of %d files: %d requests to the bucket, %d files from another worker", readers, n, got, late)
		}
		// An answer's header has some 700 bytes.
		if got := s.Sent() - sent; got > (n+late)*(size+1000) {
			t.Errorf("%d readers: the bucket sent %d bytes for %d", readers, got, n*size)
		}
		if st := c.Stats(); readers == 1 && st.Misses > evidence+1 {
			t.Errorf("a reader waited for %d files that were not guessed", st.Misses)
		}
		k.stop("a")
		k.stop("b")
	}
}
