package client

import (
	"sync"
	"sync/atomic"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
)

const (
	// maxWindow is how many blocks a stream is read ahead at most.
	maxWindow = 8
	// maxStreams and maxFiles bound what is remembered: streams of a file, and files with streams.
	maxStreams = 16
	maxFiles   = 4096
	// reorder is how far from where a stream stands a read may fall and still belong to it: the kernel
	// sends several reads of one reader at once, and they arrive in any order.
	reorder = 1 << 20
	// proof is how much must have been read in order before whole blocks are fetched for it. Until then a
	// read may be a look at a header.
	proof = 128 << 10
)

// streams recognises sequential readers, several of each file.
type streams struct {
	mu    sync.Mutex
	files map[catalog.Index]*fileStreams
}

type fileStreams struct {
	list  []*stream
	clock int64
}

// stream is one sequential reader of one file. All but wasted is guarded by streams.mu.
type stream struct {
	next   int64 // where it stands
	run    int64 // bytes read in order
	block  int64 // the last block that it read of
	window int64 // blocks to have ahead
	used   int64 // the file's clock at the last read
	// wasted is set when a block that was read ahead for it was evicted unread.
	wasted atomic.Bool
}

// advice is what to do about a read.
type advice struct {
	// whole: the reader is sequential, so fetch whole blocks rather than the range.
	whole bool
	// stream and window: read that many blocks ahead for it.
	stream *stream
	window int64
}

func newStreams() *streams { return &streams{files: make(map[catalog.Index]*fileStreams)} }

// observe records a read of n bytes at off of a file of the given size. ready says whether a block is in
// memory or on its way, which tells whether reading ahead keeps up.
func (s *streams) observe(i catalog.Index, size, off, n int64, ready func(block int64) bool) advice {
	if size <= proof {
		return advice{whole: true}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.files[i]
	if f == nil {
		if len(s.files) >= maxFiles {
			for other := range s.files { // any: what is lost is a guess, made anew in a few reads
				delete(s.files, other)
				break
			}
		}
		f = &fileStreams{}
		s.files[i] = f
	}
	f.clock++
	end := off + n
	st := f.match(off, end)
	if st == nil {
		st = f.fresh()
		st.next, st.block, st.used = end, off/ring.BlockSize, f.clock
		if off == 0 {
			st.run = n
		}
		return advice{whole: st.run >= proof, stream: st}
	}
	st.used = f.clock
	if st.wasted.Swap(false) {
		st.window = st.window / 2
	}
	if end > st.next {
		st.run += end - max(off, st.next)
		st.next = end
	}
	if st.run < proof {
		return advice{stream: st}
	}
	if block := (end - 1) / ring.BlockSize; block > st.block {
		// It came to the next block. Look further ahead if that was worth it.
		if st.window > 0 && ready(block) {
			st.window = min(2*st.window, maxWindow)
		}
		st.block = block
	}
	st.window = max(st.window, 1)
	return advice{whole: true, stream: st, window: st.window}
}

// match finds the stream that a read continues: the nearest one.
func (f *fileStreams) match(off, end int64) *stream {
	var best *stream
	var least int64
	for _, s := range f.list {
		d := off - s.next
		if d < 0 {
			d = max(0, s.next-end)
		}
		if d <= reorder && (best == nil || d < least) {
			best, least = s, d
		}
	}
	return best
}

// fresh returns room for a new stream, the least recently used one's if there are many.
func (f *fileStreams) fresh() *stream {
	if len(f.list) < maxStreams {
		f.list = append(f.list, &stream{})
		return f.list[len(f.list)-1]
	}
	oldest := 0
	for i, s := range f.list {
		if s.used < f.list[oldest].used {
			oldest = i
		}
	}
	f.list[oldest] = &stream{} // a new one: extents still point to the old
	return f.list[oldest]
}

func (s *streams) forget(i catalog.Index) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.files, i)
}
