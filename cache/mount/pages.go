package mount

import (
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/catalog"
)

// pages knows of which large files the kernel has pages, because they were just read through this process.
//
// Opening a file by passthrough makes the kernel drop its pages first, which takes 0.17 CPU seconds a GB and is done
// before open(2) returns. Reading them takes less than that and the reading together, so who opens a file anew right
// after most of it was read has its pages. Whoever opens it after that has it passed through, which is faster from then
// on. Where nobody comes soon they are left to the kernel: it may have dropped them, or they may be all that is left of a
// file that the tier has no room for any more.
type pages struct {
	mu    sync.Mutex
	files map[catalog.Index]*streamed
}

// streamed is a file that was read through this process.
type streamed struct {
	bytes  int64     // that were asked for, some perhaps twice
	closed time.Time // when its last handle was; zero while there is one
	again  bool      // it was opened once more for its pages
}

// pagesMin is the size from which on it counts.
const pagesMin = closeMin

// noteRead notes that the kernel gets bytes of a file.
func (p *pages) noteRead(i catalog.Index, n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.files[i]
	if c == nil {
		if p.files == nil {
			p.files = map[catalog.Index]*streamed{}
		}
		c = &streamed{}
		p.files[i] = c
	}
	c.bytes += int64(n)
}

// once says whether who opens a file that has no handle had better read its pages, which it says once.
func (p *pages) once(i catalog.Index, size int64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.files[i]
	if c == nil || c.again || c.bytes < size/4*3 {
		return false
	}
	c.again = true
	return true
}

// opened and closed note that a file has a handle, and has none any more.
func (p *pages) opened(i catalog.Index) { p.mark(i, time.Time{}) }

func (p *pages) closed(i catalog.Index) { p.mark(i, time.Now()) }

func (p *pages) mark(i catalog.Index, closed time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.files[i]; c != nil {
		c.closed = closed
	}
}

// forget notes that the kernel drops the pages of a file.
func (p *pages) forget(i catalog.Index) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.files, i)
}

// sweep forgets the files that had no handle since then.
func (p *pages) sweep(since time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, c := range p.files {
		if !c.closed.IsZero() && c.closed.Before(since) {
			delete(p.files, i)
		}
	}
}
