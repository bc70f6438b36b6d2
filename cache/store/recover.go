package store

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
)

const (
	lockName  = "lock"
	probeName = "probe"
)

func (s *Store) file(name string) string { return filepath.Join(s.dir, name) }

// openDir makes the folder ready, takes its lock and finds out what its file system can do.
func (s *Store) openDir() error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return fmt.Errorf("store %s: cannot make the folder: %w", s.dir, err)
	}
	lock, err := os.OpenFile(s.file(lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("store %s: cannot write there; check its owner and mode, and that the file system has room: %w", s.dir, err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("store %s: another process has it open; stop it or choose another folder: %w", s.dir, ErrInUse)
		}
		return fmt.Errorf("store %s: cannot lock %s: %w", s.dir, lockName, err)
	}
	if err := s.probe(); err != nil {
		lock.Close()
		return fmt.Errorf("store %s: %w", s.dir, err)
	}
	s.lock = lock
	s.journal = &journal{path: s.file(journalName), kick: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{})}
	return nil
}

// probe finds out what kind of file system it is, how much it allocates at a time, and whether it can tell
// when a file is open elsewhere.
func (s *Store) probe() error {
	var about unix.Statfs_t
	if err := unix.Statfs(s.dir, &about); err != nil {
		return err
	}
	s.tmpfs = about.Type == unix.TMPFS_MAGIC
	if !s.tmpfs {
		s.log.Warn("store: not on a tmpfs: the cache will be as slow as this file system, and a full one hurts others; choose a folder in memory", "dir", s.dir)
	}
	mount, err := isMount(s.dir)
	if err != nil {
		return err
	}
	s.own = s.tmpfs && mount
	if size := int64(about.Blocks) * about.Bsize; s.own && size > 0 && size < s.quota {
		s.log.Warn("store: the tmpfs is smaller than the quota: it will be full before the quota is", "dir", s.dir, "size", size, "quota", s.quota)
	}

	empty, err := os.OpenFile(s.file(emptyName), os.O_RDONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	empty.Close()
	one, err := os.OpenFile(s.file(probeName), os.O_RDONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer one.Close()
	defer os.Remove(one.Name())
	var st unix.Stat_t
	if err := unix.Fstat(int(one.Fd()), &st); err != nil {
		return err
	}
	// An empty file's preferred block is a huge page exactly where every file gets huge pages, however
	// small it is (huge=always): then that is what a block really takes.
	s.unit = int64(os.Getpagesize())
	if s.tmpfs {
		s.unit = max(s.unit, int64(st.Blksize))
	}

	two, err := os.OpenFile(one.Name(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	s.wholeOnly = punchHole(two, 0, s.unit) != nil
	shared := !exclusive(one)
	two.Close()
	if two, err = os.Open(one.Name()); err != nil {
		return err
	}
	shared = shared && !exclusive(one)
	two.Close()
	if !shared || !exclusive(one) {
		s.noLease = "the file system cannot tell whether a file is open elsewhere (fcntl F_SETLEASE), so that its eviction could not be safe"
	}
	return nil
}

// recover finds what a former process left.
func (s *Store) recover(ctx context.Context) error {
	objects, err := s.readDir()
	if err != nil {
		return err
	}
	if err := verifyAll(ctx, s.dir, objects); err != nil {
		return err
	}
	// The last used first, in case not all fit.
	for _, f := range slices.Backward(objects) {
		if err := s.adopt(f); err != nil {
			return err
		}
	}
	s.raiseHeap(s.entries * entryCost)
	if err := s.compactJournal(); err != nil {
		return fmt.Errorf("cannot write the journal; the file system is full or read-only: %w", err)
	}
	s.findOrphans()
	return nil
}

// readDir returns the objects that have both journal and file, and removes files of this store that have
// no journal. Names that the store would never make are not its own, and left alone.
func (s *Store) readDir() ([]*found, error) {
	var objects []*found
	if f, err := os.Open(s.journal.path); err == nil {
		if st, err := f.Stat(); err == nil {
			s.raiseHeap(st.Size() / recordLen(1) * entryCost) // as many blocks at most
		}
		objects, err = readJournal(f)
		f.Close()
		if errors.Is(err, errOtherJournal) {
			s.log.Warn("store: what a former process held is fetched again: its journal is of another version", "dir", s.dir)
		} else if err != nil {
			return nil, err
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	objects = dropStaged(objects)
	known := make(map[source.ID]bool, len(objects))
	for _, f := range objects {
		known[f.id] = true
	}
	dir, err := os.Open(s.dir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	there := make(map[source.ID]bool, len(names))
	for _, n := range names {
		if n == journalTemp {
			if err := os.Remove(s.file(n)); err != nil {
				return nil, err
			}
		}
		id, ok := parseName(n)
		if !ok {
			continue
		}
		if known[id] {
			there[id] = true
		} else if err := os.Remove(s.file(n)); err != nil {
			return nil, err
		}
	}
	return slices.DeleteFunc(objects, func(f *found) bool { return !there[f.id] }), nil
}

// parseName is the reverse of name.
func parseName(n string) (id source.ID, ok bool) {
	if len(n) != 2*len(id) {
		return id, false
	}
	_, err := hex.Decode(id[:], []byte(n))
	return id, err == nil && name(id) == n
}

func sortFound(objects map[source.ID]*found, order map[source.ID]int) []*found {
	list := make([]*found, 0, len(objects))
	for _, f := range objects {
		list = append(list, f)
	}
	slices.SortFunc(list, func(a, b *found) int { return cmp.Compare(order[a.id], order[b.id]) })
	return list
}

// verifyAll takes from the objects what the files do not bear out, several pieces at a time.
func verifyAll(ctx context.Context, dir string, objects []*found) error {
	const piece = 16 // blocks
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	type result struct {
		o   *found
		bad []int64
	}
	var mu sync.Mutex
	var results []result
	for _, o := range objects {
		for blocks := range slices.Chunk(slices.Sorted(maps.Keys(o.sums)), piece) {
			g.Go(func() error {
				bad, err := verifyFile(ctx, filepath.Join(dir, name(o.id)), o, blocks)
				if len(bad) > 0 {
					mu.Lock()
					results = append(results, result{o, bad})
					mu.Unlock()
				}
				return err
			})
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, r := range results {
		for _, n := range r.bad {
			delete(r.o.sums, n)
		}
	}
	return nil
}

// verifyFile returns those of the blocks that the file does not hold as o's sums say.
func verifyFile(ctx context.Context, path string, o *found, blocks []int64) (bad []int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, openError(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() != o.size {
		return blocks, nil
	}
	for _, n := range blocks {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if n < 0 || n >= ring.Blocks(o.size) || !matches(offsetReader{f, n * ring.BlockSize}, blockLen(o.size, n), o.sums[n]) {
			bad = append(bad, n)
		}
	}
	return bad, nil
}

// offsetReader reads a file from an offset on.
type offsetReader struct {
	f   *os.File
	off int64
}

func (r offsetReader) ReadAt(p []byte, off int64) (int, error) { return r.f.ReadAt(p, r.off+off) }

// adopt makes what is left of one object resident as far as the quota allows, and frees the rest.
func (s *Store) adopt(f *found) error {
	path := s.path(f.id)
	file, err := os.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		return openError(err)
	}
	defer file.Close()
	// A reader of the former life may still have it open: then it is as if it had been lent in this one.
	lent := s.noLease == "" && !exclusive(file)

	var fits int64
	var keep []int64
	for _, n := range slices.Sorted(maps.Keys(f.sums)) {
		if w := s.weight(blockLen(f.size, n)); s.used+fits+w <= s.limit {
			fits += w
			keep = append(keep, n)
		}
	}
	if len(keep) == 0 || ((lent || s.wholeOnly) && int64(len(keep)) < ring.Blocks(f.size)) {
		return os.Remove(path)
	}
	if !lent {
		if err := s.punchOthers(file, f, keep); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	o, err := s.object(ring.Object{ID: f.id, Size: f.size})
	if err != nil {
		return err
	}
	o.exists, o.lent = true, lent
	for _, n := range keep {
		b := &block{obj: o, n: n, size: int32(blockLen(f.size, n)), sums: f.sums[n]}
		o.blocks[n] = b
		s.charge(b)
		s.setState(b, resident)
		s.policyAdd(b)
		s.stats.Recovered++
	}
	return nil
}

// punchOthers frees the pages of a file beside the blocks that are kept: what was written but not in the
// journal, or no longer matches.
func (s *Store) punchOthers(file *os.File, f *found, keep []int64) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return err
	}
	var pages int64
	for _, n := range keep {
		pages += s.roundUp(int64(blockLen(f.size, n)))
	}
	if st.Blocks*512 <= pages {
		return nil
	}
	w, err := os.OpenFile(s.path(f.id), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer w.Close()
	from := int64(0)
	for _, n := range append(slices.Clone(keep), ring.Blocks(f.size)) {
		if n > from {
			off, end := from*ring.BlockSize, min(n*ring.BlockSize, s.roundUp(f.size))
			if err := punchHole(w, off, end-off); err != nil {
				return err
			}
		}
		from = n + 1
	}
	return nil
}

// fsUsed is what the store's own file system holds, in bytes.
func (s *Store) fsUsed() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize, nil
}

// othersUsed is what files beside the store's own hold on its file system, in bytes.
func (s *Store) othersUsed() int64 {
	dir, err := os.Open(s.dir)
	if err != nil {
		return 0
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return 0
	}
	var n int64
	for _, entry := range names {
		if _, ok := parseName(entry); ok {
			continue
		}
		switch entry {
		case journalName, journalTemp, lockName, emptyName, probeName:
			continue
		}
		// What comes and goes meanwhile is no matter: the sum is only as good as the moment.
		_ = filepath.WalkDir(s.file(entry), func(path string, _ fs.DirEntry, err error) error {
			var st unix.Stat_t
			if err == nil && unix.Lstat(path, &st) == nil {
				n += st.Blocks * 512
			}
			return nil
		})
	}
	return n
}

// findOrphans counts what the file system holds beyond what was recovered and what others put there: files
// that were dropped in a former life and that readers still have open.
func (s *Store) findOrphans() {
	if !s.own {
		return
	}
	used, err := s.fsUsed()
	if err != nil {
		return
	}
	s.orphans = max(0, used-s.othersUsed()-s.pages-s.roundUp(s.journal.size))
	s.zombie += s.orphans
	s.used += s.orphans
}

// matches compares size bytes of r with their sums.
func matches(r io.ReaderAt, size int, sums []uint64) bool {
	if len(sums) != checksum.Count(size) {
		return false
	}
	buf := make([]byte, min(size, checksum.Size))
	for i, sum := range sums {
		p := buf[:min(checksum.Size, size-i*checksum.Size)]
		if k, _ := r.ReadAt(p, int64(i)*checksum.Size); k < len(p) || checksum.Of(p) != sum {
			return false
		}
	}
	return true
}
