package client

import (
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
)

// Reading ahead across files. Behind a bucket a reader of small files waits a round trip for each of them,
// however fast the tier is. A reader that goes from file to file in the order of the tree (catalog.Walk), or
// takes every n-th of it as one of n steps does, can be told early what it reads next.
//
// Only reads count: looking names up or listing folders says nothing of what will be read. Nobody says which
// reader a read is of, so walks are found by the files alone: a read continues a walk if it was expected;
// it begins one if the files before it, in even steps, were read shortly before. What is expected is
// guessed, and guesses are cheap to be wrong about: few at first, more only while readers wait for them and it helps, and
// the workers fetch them only where that takes room and requests from nobody (wire.FlagGuess).
const (
	// smallFile is the size up to which a file is read ahead. From larger ones a reader has enough to do
	// while the next is found.
	smallFile = 1 << 20
	// evidence is how many files before it must have been read for a read to begin a walk.
	evidence = 4
	// maxStride is the widest step: one mount's share of a list that is dealt out to so many.
	maxStride = 128
	// A file read shortly before is one of the last readers that were under way. Files in a row may come in
	// any order among denseHorizon reads, since several readers may share one list; in wider steps each must
	// be the evenHorizon-th read after the one before it at most, so that random reads find no steps. In
	// small datasets chance would, so both shrink with it.
	denseHorizon, evenHorizon = 64, 32
	// recentFiles is how many of the latest reads are remembered.
	recentFiles = 4096
	// maxWalks bounds the walks that are followed, firstAhead and maxAhead the files that one has ahead,
	// aheadOfWalk their bytes of memory.
	maxWalks    = 32
	firstAhead  = 4
	maxAhead    = 128
	aheadOfWalk = 16 << 20
	// growGain is what a doubled window must gain to be kept, and growRest after how many turns of the window
	// one that was not kept is tried again.
	growGain, growRest = 1.25, 16
	// firstBeyond is how many files beyond its folder a walk has ahead that has never left one: most
	// readers of one folder read no other. It doubles with each folder that it goes on to.
	firstBeyond = 4
	// outOfOrder is how many expected files a walk may pass over that still come.
	outOfOrder = 8
	// searchSteps bounds the work that one read can cause.
	searchSteps = 1024
	// restAfterRefusal is how many reads pass before a new walk begins after a worker refused a guess.
	restAfterRefusal = 64
)

// walks recognises readers that go from one small file to the next.
type walks struct {
	snap   *catalog.Snapshot
	budget int64 // bytes that one walk may have ahead
	now    func() time.Time

	mu       sync.Mutex
	clock    int64                   // reads so far
	read     map[catalog.Index]int64 // when the latest files were read
	ring     []catalog.Index         // the same, by clock
	expected map[catalog.Index]*walk
	list     []*walk
	rest     int64 // no walk begins before this read
}

// walk is what is expected of one reader, or of several that share a list. Guarded by walks.mu.
type walk struct {
	stream // its flag wasted is the one that blocks sets
	stride int
	at     catalog.Index // the last file that was looked at
	ended  bool          // the tree ends there
	queue  []next        // expected and not read yet, in order
	bytes  int64         // of memory, of those in the queue
	window int           // files to have ahead
	hits   int
	grow   int // the number of hits from which on the window may grow again
	// was is the window before it grew last, rate what it gave in files a second, and from and began are when
	// the present one was first seen at work.
	was    int
	rate   float64
	from   int
	began  time.Time
	folder catalog.Index // of the last file read
	beyond int           // files that may be ahead in other folders
	again  bool          // files that were read lately are read again
	seen   int64         // the clock at its last read
}

// next is one expected file.
type next struct {
	index, folder catalog.Index
	bytes         int64
}

func newWalks(s *catalog.Snapshot, buffers int64, now func() time.Time) *walks {
	return &walks{
		snap: s, now: now, budget: min(aheadOfWalk, buffers/8), read: make(map[catalog.Index]int64), expected: make(map[catalog.Index]*walk),
	}
}

// begun records that the reading of a small file has begun, and returns the files that are to be read ahead for
// it and for which walk. late says that the reader has to wait for the file.
func (s *walks) begun(i catalog.Index, late bool) ([]catalog.Index, *walk) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, again := s.read[i]
	s.clock++
	w := s.expected[i]
	if w != nil {
		s.hit(w, i, late)
	} else if s.clock >= s.rest {
		w = s.find(i)
	}
	s.remember(i)
	if w == nil {
		return nil, nil
	}
	w.again, w.seen = again, s.clock
	if n, _ := s.snap.Node(i); n.Parent != w.folder {
		w.folder = n.Parent
		w.beyond = min(2*w.beyond, maxAhead)
	}
	if w.wasted.Swap(false) {
		w.window /= 2
	}
	out := s.extend(w)
	if len(w.queue) == 0 && (w.ended || w.window == 0) {
		s.end(w)
	}
	return out, w
}

// remember notes the time of a read, and forgets the oldest.
func (s *walks) remember(i catalog.Index) {
	if len(s.ring) < recentFiles {
		s.ring = append(s.ring, i)
	} else {
		k := (s.clock - 1) % recentFiles
		if old := s.ring[k]; s.read[old] <= s.clock-recentFiles {
			delete(s.read, old)
		}
		s.ring[k] = i
	}
	s.read[i] = s.clock
}

// hit takes a file that was expected off its walk.
func (s *walks) hit(w *walk, i catalog.Index, late bool) {
	delete(s.expected, i)
	at := 0
	for w.queue[at].index != i {
		at++
	}
	w.bytes -= w.queue[at].bytes
	w.queue = append(w.queue[:at], w.queue[at+1:]...)
	// What was passed over long ago does not come any more.
	for ; at > outOfOrder; at-- {
		s.drop(w)
		w.window = max(w.window/2, 1)
	}
	w.hits++
	if late && w.hits >= w.grow {
		s.grow(w)
	}
}

// grow doubles the window of a walk whose reader waits, or takes that back if it was no use: then it is not for
// the time that an answer takes that the reader waits, and more requests at once only make it longer.
func (s *walks) grow(w *walk) {
	now := s.now()
	rate := float64(w.hits-w.from) / max(now.Sub(w.began), time.Microsecond).Seconds()
	rest := 1 // turns of the window until the next look
	if w.was > 0 && rate < growGain*w.rate {
		w.window, w.was = max(1, min(w.window, w.was)), 0
		rest = growRest
	} else {
		w.was, w.rate = w.window, rate
		w.window = min(2*w.window, maxAhead)
	}
	w.grow = w.hits + rest*w.window
	w.from, w.began = w.hits, now
}

// drop gives up the first file that a walk expects.
func (s *walks) drop(w *walk) {
	delete(s.expected, w.queue[0].index)
	w.bytes -= w.queue[0].bytes
	w.queue = append(w.queue[:0], w.queue[1:]...)
}

// end forgets a walk.
func (s *walks) end(w *walk) {
	for len(w.queue) > 0 {
		s.drop(w)
	}
	for k, o := range s.list {
		if o == w {
			s.list = append(s.list[:k], s.list[k+1:]...)
			return
		}
	}
}

// find returns a new walk that a read of i begins, or nil.
func (s *walks) find(i catalog.Index) *walk {
	stride := s.stride(i)
	if stride == 0 {
		return nil
	}
	if len(s.list) == maxWalks {
		oldest := s.list[0]
		for _, w := range s.list {
			if w.seen < oldest.seen {
				oldest = w
			}
		}
		s.end(oldest)
	}
	n, _ := s.snap.Node(i)
	w := &walk{stride: stride, at: i, window: firstAhead, folder: n.Parent, beyond: firstBeyond, grow: firstAhead, began: s.now()}
	s.list = append(s.list, w)
	return w
}

// stride is the width of the even steps in which files up to i were read lately; 0 if there are none.
func (s *walks) stride(i catalog.Index) int {
	type step struct {
		read int64 // 0: not lately
		any  bool  // it would not be seen here if it were read
	}
	var before [searchSteps]step // files before i, nearest first
	have, at, more := 0, cursorAt(s.snap, i), true
	look := func(k int) (step, bool) {
		for have <= k && more && have < len(before) {
			if more = at.previous(); more {
				before[have] = step{s.read[at.index], unseen(&at.node)}
				have++
			}
		}
		if k >= have {
			return step{}, false
		}
		return before[k], true
	}
	dense := max(evidence, min(denseHorizon, s.snap.Files()/8))
	even := max(1, min(evenHorizon, s.snap.Files()/32))
	for stride := 1; stride <= maxStride; stride++ {
		found, last := 0, s.clock
		for k := stride - 1; found < evidence; k += stride {
			f, ok := look(k)
			if !ok || k >= (2*evidence)*stride {
				break
			}
			if f.any {
				continue
			}
			if f.read == 0 {
				break
			}
			if stride == 1 && s.clock-f.read > dense || stride > 1 && (f.read >= last || last-f.read > even) {
				break
			}
			last = f.read
			found++
		}
		if found == evidence {
			return stride
		}
	}
	return 0
}

// extend adds to what a walk expects, as far as its window and its budget go.
func (s *walks) extend(w *walk) (out []catalog.Index) {
	beyond := 0
	for _, n := range w.queue {
		if n.folder != w.folder {
			beyond++
		}
	}
	for steps := 0; len(w.queue) < w.window && !w.ended && steps < searchSteps; {
		at, ok := cursorAt(s.snap, w.at), true
		for k := 0; k < w.stride && ok; k++ {
			ok = at.next()
			steps++
		}
		if !ok {
			w.ended = true
			break
		}
		if _, lately := s.read[at.index]; unseen(&at.node) || s.expected[at.index] != nil || lately && !w.again {
			w.at = at.index
			continue
		}
		_, size := class(int(at.node.Size))
		if w.bytes+int64(size) > s.budget || at.node.Parent != w.folder && beyond >= w.beyond {
			break
		}
		if at.node.Parent != w.folder {
			beyond++
		}
		w.at = at.index
		w.queue = append(w.queue, next{at.index, at.node.Parent, int64(size)})
		w.bytes += int64(size)
		s.expected[at.index] = w
		out = append(out, at.index)
	}
	return out
}

// refused says that a worker does not take guesses now.
func (s *walks) refused(w *walk) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rest = s.clock + restAfterRefusal
	s.end(w)
}

// full says that there was no room in memory for what walk w wanted, from files on.
func (s *walks) full(w *walk, files []catalog.Index) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w.window /= 2
	for _, i := range files {
		if s.expected[i] == w { // the last of the queue, in the same order
			delete(s.expected, i)
			for k, n := range w.queue {
				if n.index == i {
					w.bytes -= n.bytes
					w.queue = append(w.queue[:k], w.queue[k+1:]...)
					break
				}
			}
		}
	}
}

// unseen says whether the reading of a file is not seen here, so that a walk may pass over it: nobody reads an
// empty one, and a large one may be read past this process.
func unseen(n *catalog.Node) bool { return n.Size == 0 || n.Size > smallFile }

// cursor goes over the files in the order of catalog.Walk over the whole tree, either way.
type cursor struct {
	snap   *catalog.Snapshot
	index  catalog.Index
	node   catalog.Node // that of index
	folder catalog.Node // its parent
}

func cursorAt(s *catalog.Snapshot, i catalog.Index) cursor {
	c := cursor{snap: s, index: i}
	c.node, _ = s.Node(i)
	c.folder, _ = s.Node(c.node.Parent)
	return c
}

// next goes to the file after; false after the last.
func (c *cursor) next() bool {
	for {
		if c.node.Dir && c.node.Count > 0 {
			c.index, c.folder = c.node.First, c.node
		} else {
			for c.index+1 >= c.folder.First+c.folder.Count { // of the node, or of the nearest folder above that has a neighbour
				if !c.up() {
					return false
				}
			}
			c.index++
		}
		if c.node, _ = c.snap.Node(c.index); !c.node.Dir {
			return true
		}
	}
}

// previous goes to the file before; false before the first.
func (c *cursor) previous() bool {
	for {
		for c.index <= c.folder.First {
			if !c.up() {
				return false
			}
		}
		c.index--
		for c.node, _ = c.snap.Node(c.index); c.node.Dir && c.node.Count > 0; c.node, _ = c.snap.Node(c.index) {
			c.index, c.folder = c.node.First+c.node.Count-1, c.node
		}
		if !c.node.Dir {
			return true
		}
	}
}

// up goes to the folder; false if that is the root, which has no neighbours.
func (c *cursor) up() bool {
	if c.node.Parent == 0 {
		return false
	}
	c.index, c.node = c.node.Parent, c.folder
	c.folder, _ = c.snap.Node(c.node.Parent)
	return true
}

// errGuess marks the failure of a fetch that nobody waited for: a reader that joined it meanwhile begins anew.
var errGuess = guessError{}

type guessError struct{}

func (guessError) Error() string { return "a guess that was not worth more" }

// nextFiles reads ahead across files, for a read at the beginning of a small file.
func (r *reading) nextFiles(late bool) {
	c := r.c
	files, w := c.walks.begun(r.index, late)
	for k, i := range files {
		o, ok := c.snapshot.Ring(i)
		if !ok {
			continue
		}
		n := reading{c: c, index: i, object: o, walk: w}
		if n.ready(0) {
			continue
		}
		_, hi := span(0, int(o.Size))
		if n.start(blockKey{i, 0}, 0, hi, int(o.Size), &w.stream) == nil {
			c.walks.full(w, files[k:])
			return
		}
	}
}

var _ [ring.BlockSize - smallFile]struct{} // a small file is one block
