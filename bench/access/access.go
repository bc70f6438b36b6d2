// Package access reads files in the ways that steps do, and says how much it read in what time: from start to
// end, in no order, many small ones, names only.
//
// It owns the system calls of a bench's readers, which are the plain ones, with no more around them than a loop.
// Concurrency: functions are safe for concurrent use; each starts its readers on threads of their own and returns
// when all have ended. Failure: the first error ends a reading, and one that comes short is an error; with a limit
// a reading ends early and tells what it read until then.
//
// It may import the standard library, x/sync and x/sys.
package access

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Chunk is the buffer of a sequential read.
const Chunk = 1 << 20

// Amount is what was read.
type Amount struct {
	// Count is of files, pieces or entries; Bytes of them all.
	Count, Bytes int64
	Took         time.Duration
}

// PerSecond is the rate of Count.
func (a Amount) PerSecond() float64 { return float64(a.Count) / a.Took.Seconds() }

// BytesPerSecond is the rate of Bytes.
func (a Amount) BytesPerSecond() float64 { return float64(a.Bytes) / a.Took.Seconds() }

// File is one file, by its path below the folder of a reading.
type File struct {
	Path string `json:"path"`
	Size int64  `json:"size"`
}

// run reads n times at once, each reader on a thread that the Go scheduler does not have to win back from a
// system call first. A reader gives the function that it is handed what it has read, and ends when that says no.
func run(ctx context.Context, n int, limit time.Duration, read func(k int, more func(count, bytes int64) bool) error) (Amount, error) {
	if n > runtime.GOMAXPROCS(0) {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(n))
	}
	var count, bytes atomic.Int64
	start := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for k := range n {
		g.Go(func() error {
			err := read(k, func(c, b int64) bool {
				count.Add(c)
				bytes.Add(b)
				return ctx.Err() == nil && (limit == 0 || time.Since(start) < limit)
			})
			if err == nil {
				err = context.Cause(ctx)
			}
			return err
		})
	}
	err := g.Wait()
	return Amount{count.Load(), bytes.Load(), time.Since(start)}, err
}

// Sequential reads a file from its start to its end, by as many readers at once as it is given paths to it.
func Sequential(ctx context.Context, paths []string, size int64, limit time.Duration) (Amount, error) {
	buffers := make([][]byte, len(paths))
	for k := range buffers {
		buffers[k] = Touched(Chunk)
	}
	return run(ctx, len(paths), limit, func(k int, more func(int64, int64) bool) error {
		fd, err := Open(paths[k])
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for total := int64(0); ; {
			n, err := readInto(fd, buffers[k])
			if err != nil {
				return fmt.Errorf("read %s: %w", paths[k], err)
			}
			if total += int64(n); n == 0 {
				if total != size {
					return fmt.Errorf("%s: read %d bytes of %d", paths[k], total, size)
				}
				more(1, 0)
				return nil
			}
			if !more(0, int64(n)) {
				return nil
			}
		}
	})
}

// Random reads n aligned pieces of a file in no order, from one descriptor.
func Random(ctx context.Context, path string, size int64, piece, n int, limit time.Duration) (Amount, error) {
	if size < int64(piece) {
		return Amount{}, fmt.Errorf("%s: %d bytes are less than a piece of %d", path, size, piece)
	}
	p, r := Touched(piece), rand.New(rand.NewPCG(1, uint64(piece)))
	return run(ctx, 1, limit, func(_ int, more func(int64, int64) bool) error {
		fd, err := Open(path)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		const batch = 64 // a look at the clock for each of them would be dear
		for done := 0; done < n; {
			m := min(batch, n-done)
			for range m {
				off := r.Int64N(size/int64(piece)) * int64(piece)
				got, err := unix.Pread(fd, p, off)
				if err != nil || got != piece {
					return fmt.Errorf("read %s at %d: %d bytes, %w", path, off, got, err)
				}
			}
			if done += m; !more(int64(m), int64(m)*int64(piece)) {
				return nil
			}
		}
		return nil
	})
}

// Small opens, reads and closes files below dir, by so many readers. A whole reading reads all of a file; else
// only its first 4 KiB, so that it shows what opening costs.
func Small(ctx context.Context, dir string, files []File, readers int, whole bool, limit time.Duration) (Amount, error) {
	longest := int64(1)
	for _, f := range files {
		longest = max(longest, f.Size)
	}
	return run(ctx, readers, limit, func(k int, more func(int64, int64) bool) error {
		p := Touched(int(longest))
		var path []byte
		for ; k < len(files); k += readers {
			want := files[k].Size
			if !whole {
				want = min(want, 4096)
			}
			path = append(append(append(path[:0], dir...), '/'), files[k].Path...)
			fd, err := Open(string(path))
			if err != nil {
				return err
			}
			for total := int64(0); total < want; {
				got, err := readInto(fd, p[total:want])
				if err != nil || got == 0 {
					unix.Close(fd)
					return fmt.Errorf("read %s: %d bytes of %d: %v", path, total, want, err)
				}
				total += int64(got)
			}
			unix.Close(fd)
			if !more(1, want) {
				return nil
			}
		}
		return nil
	})
}

// OpenStat opens, stats and closes files below dir, one after the other.
func OpenStat(ctx context.Context, dir string, files []File, limit time.Duration) (Amount, error) {
	return run(ctx, 1, limit, func(_ int, more func(int64, int64) bool) error {
		for _, f := range files {
			fd, err := Open(dir + "/" + f.Path)
			if err != nil {
				return err
			}
			var st unix.Stat_t
			err = unix.Fstat(fd, &st)
			unix.Close(fd)
			if err != nil {
				return fmt.Errorf("stat %s: %w", f.Path, err)
			}
			if st.Size != f.Size {
				return fmt.Errorf("%s: has %d bytes instead of %d", f.Path, st.Size, f.Size)
			}
			if !more(1, 0) {
				return nil
			}
		}
		return nil
	})
}

// Walk lists a tree as `ls -lR` does, a stat for each entry. It finds as many entries as it should (zero: nobody
// knows), or fails.
func Walk(ctx context.Context, dir string, want int64, limit time.Duration) (Amount, error) {
	ended := false
	a, err := run(ctx, 1, limit, func(_ int, more func(int64, int64) bool) error {
		return walkDir(dir, func(c, b int64) bool { ended = !more(c, b); return !ended })
	})
	if err == nil && !ended && want > 0 && a.Count != want {
		err = fmt.Errorf("%s: %d entries instead of %d", dir, a.Count, want)
	}
	return a, err
}

func walkDir(dir string, more func(count, bytes int64) bool) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var below []string
	for _, e := range entries {
		path := dir + "/" + e.Name()
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return fmt.Errorf("stat %s: %w", path, err)
		}
		if e.IsDir() {
			below = append(below, path)
		}
		if !more(1, 0) {
			return nil
		}
	}
	for _, path := range below {
		if err := walkDir(path, more); err != nil {
			return err
		}
		if !more(0, 0) {
			return nil
		}
	}
	return nil
}

// Open opens a file to read it.
func Open(path string) (int, error) {
	for {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("open %s: %w", path, err)
		}
		return fd, nil
	}
}

func readInto(fd int, p []byte) (int, error) {
	for {
		n, err := unix.Read(fd, p)
		if err == unix.EINTR {
			continue
		}
		return n, err
	}
}

var discarded = sync.Pool{New: func() any { p := Touched(256 << 10); return &p }}

// Discard reads to the end, as much at a time as a worker does, and says how much that was. io.Discard's own buffers
// have 8 KiB: many more system calls than those with whom that is compared need.
func Discard(r io.Reader) (int64, error) {
	p := discarded.Get().(*[]byte)
	defer discarded.Put(p)
	return io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, *p)
}

// Touched is a buffer whose pages are there, so that no sample pays for them.
func Touched(n int) []byte {
	p := make([]byte, n)
	for i := 0; i < n; i += 4096 {
		p[i] = 1
	}
	return p
}
