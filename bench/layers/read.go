package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// chunk is the buffer of a sequential read.
const chunk = 1 << 20

// perSecond is a rate of n of anything.
func perSecond(n int64, since time.Time) float64 { return float64(n) / time.Since(since).Seconds() }

// threads runs f n times at once, each on a thread that the Go scheduler does not have to win back from a
// system call first, and returns the seconds that all of it took.
func threads(ctx context.Context, n int, f func(ctx context.Context, k int) error) (float64, error) {
	if n > runtime.GOMAXPROCS(0) {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(n))
	}
	start := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for k := range n {
		g.Go(func() error { return f(ctx, k) })
	}
	err := g.Wait()
	return time.Since(start).Seconds(), err
}

// sequential reads a file from its start to its end, by so many readers at once, and returns the bytes a
// second of all.
func sequential(ctx context.Context, path string, size int64, readers int) (float64, error) {
	buffers := make([][]byte, readers)
	for k := range buffers {
		buffers[k] = touched(chunk)
	}
	s, err := threads(ctx, readers, func(ctx context.Context, k int) error {
		n, err := readAll(ctx, path, buffers[k])
		if err == nil && n != size {
			err = fmt.Errorf("%s: read %d bytes of %d", path, n, size)
		}
		return err
	})
	return float64(size) * float64(readers) / s, err
}

// touched is a buffer whose pages are there, so that no sample pays for them.
func touched(n int) []byte {
	p := make([]byte, n)
	for i := 0; i < n; i += 4096 {
		p[i] = 1
	}
	return p
}

func readAll(ctx context.Context, path string, p []byte) (int64, error) {
	fd, err := open(path)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	for total := int64(0); ; {
		n, err := unix.Read(fd, p)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return total, fmt.Errorf("read %s: %w", path, err)
		}
		if n == 0 {
			return total, nil
		}
		if total += int64(n); ctx.Err() != nil {
			return total, context.Cause(ctx)
		}
	}
}

func open(path string) (int, error) {
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

// random reads n aligned pieces of a file in no order, from one descriptor, and returns the reads a second.
func random(ctx context.Context, path string, size int64, piece, n int) (float64, error) {
	fd, err := open(path)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	p, r := touched(piece), rand.New(rand.NewPCG(1, uint64(piece)))
	start := time.Now()
	for k := range n {
		off := r.Int64N(size/int64(piece)) * int64(piece)
		got, err := unix.Pread(fd, p, off)
		if err != nil || got != piece {
			return 0, fmt.Errorf("read %s at %d: %d bytes, %w", path, off, got, err)
		}
		if k%256 == 0 && ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
	}
	return perSecond(int64(n), start), nil
}

// smallReads opens, reads and closes files below dir, by so many threads, and returns the files a second.
// A first reading reads all of a file; an opening again only its first 4 KiB, so that it shows what the
// opening costs.
func smallReads(ctx context.Context, dir string, names []string, size int64, n int, whole bool) (float64, error) {
	want := size
	if !whole {
		want = min(size, 4096)
	}
	s, err := threads(ctx, n, func(ctx context.Context, k int) error {
		p := touched(int(max(want, 1)))
		var path []byte
		for ; k < len(names); k += n {
			path = append(append(append(path[:0], dir...), '/'), names[k]...)
			fd, err := open(string(path))
			if err != nil {
				return err
			}
			var total int64
			for total < want {
				got, err := unix.Read(fd, p[total:])
				if err == unix.EINTR {
					continue
				}
				if err != nil || got == 0 {
					unix.Close(fd)
					return fmt.Errorf("read %s: %d bytes of %d: %v", path, total, want, err)
				}
				total += int64(got)
			}
			unix.Close(fd)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
		}
		return nil
	})
	return float64(len(names)) / s, err
}

// openStat opens, stats and closes files below dir and returns the files a second.
func openStat(ctx context.Context, dir string, names []string) (float64, error) {
	start := time.Now()
	for _, name := range names {
		fd, err := open(dir + "/" + name)
		if err != nil {
			return 0, err
		}
		var st unix.Stat_t
		err = unix.Fstat(fd, &st)
		unix.Close(fd)
		if err != nil {
			return 0, fmt.Errorf("stat %s: %w", name, err)
		}
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
	}
	return perSecond(int64(len(names)), start), nil
}

// walk lists a tree as `ls -lR` does, a stat for each entry, and returns the entries a second.
func walk(ctx context.Context, dir string, want int) (float64, error) {
	start := time.Now()
	n, err := walkDir(ctx, dir)
	if err == nil && n != want {
		err = fmt.Errorf("%s: %d entries instead of %d", dir, n, want)
	}
	return perSecond(int64(n), start), err
}

func walkDir(ctx context.Context, dir string) (n int, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	for _, e := range entries {
		path := dir + "/" + e.Name()
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return n, fmt.Errorf("stat %s: %w", path, err)
		}
		n++
		if !e.IsDir() {
			continue
		}
		below, err := walkDir(ctx, path)
		if n += below; err != nil {
			return n, err
		}
	}
	if ctx.Err() != nil {
		return n, context.Cause(ctx)
	}
	return n, nil
}

// noise is n bytes that do not repeat.
func noise(n int) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(p) // never fails
	return p
}

// writeRandom makes a file of bytes that do not repeat.
func writeRandom(path string, size int64, seed byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	r := rand.NewChaCha8([32]byte{seed})
	p := make([]byte, chunk)
	for left := size; left > 0; left -= int64(len(p)) {
		p = p[:min(left, chunk)]
		_, _ = r.Read(p) // never fails
		if _, err := f.Write(p); err != nil {
			f.Close()
			return fmt.Errorf("write %s: %w; a smaller --size needs less memory", path, err)
		}
	}
	return f.Close()
}

// perDir is how many files a directory of the trees has.
const perDir = 100

// treeNames are the names of n files, in directories of perDir.
func treeNames(n int) []string {
	names := make([]string, n)
	for k := range names {
		names[k] = fmt.Sprintf("d%05d/f%02d", k/perDir, k%perDir)
	}
	return names
}

// dirsOf is how many directories they have.
func dirsOf(n int) int { return (n + perDir - 1) / perDir }

// writeTree makes the files of a tree, all with the same content, or, with link, all being the same file.
func writeTree(ctx context.Context, dir string, names []string, content []byte, link bool) error {
	last := ""
	for k, name := range names {
		if d, _, _ := strings.Cut(name, "/"); d != last {
			if err := os.MkdirAll(dir+"/"+d, 0o755); err != nil {
				return err
			}
			if last = d; ctx.Err() != nil {
				return context.Cause(ctx)
			}
		}
		var err error
		if link && k > 0 {
			err = os.Link(dir+"/"+names[0], dir+"/"+name)
		} else {
			err = os.WriteFile(dir+"/"+name, content, 0o444)
		}
		if err != nil {
			return fmt.Errorf("%w; fewer --files need less memory", err)
		}
	}
	return nil
}
