package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/bench/access"
)

// memoryGroup: what the store takes for each byte that it holds: pages of its tmpfs, the kernel's own for the
// files, and heap.
func (b *bench) memoryGroup() group {
	var rows []*row
	for _, size := range []int64{16 << 10, 100 << 10, 256 << 10} {
		rows = append(rows, &row{layer: "memory", name: fmt.Sprintf("bytes per cached byte, files of %d KiB", size>>10), unit: times,
			reference: map[int64]string{16 << 10: "≤ 1.3", 100 << 10: "none given", 256 << 10: "≤ 1.05"}[size],
			run:       func(ctx context.Context) (float64, error) { return b.perByte(ctx, size) }})
	}
	return group{rows: rows}
}

func (b *bench) perByte(ctx context.Context, size int64) (float64, error) {
	perFile, err := kernelObjects("shmem_inode_cache", "dentry")
	if err != nil {
		return 0, err
	}
	var s scope
	defer s.close()
	total := b.o.bytes
	st, dir, err := b.openStore(ctx, &s, true, 2*total+64<<20)
	if err != nil {
		return 0, err
	}
	pages, inodes, err := used(dir)
	if err != nil {
		return 0, err
	}
	// The first fills make the buffers, which then serve all others.
	if err := insert(ctx, st, object(0, size), 0); err != nil {
		return 0, err
	}
	heap := liveHeap()
	n := uint64(total / size)
	for k := range n {
		if err := insert(ctx, st, object(k+1, size), 0); err != nil {
			return 0, err
		}
	}
	grown := liveHeap() - heap
	pagesAfter, inodesAfter, err := used(dir)
	if err != nil {
		return 0, err
	}
	all := pagesAfter - pages + (inodesAfter-inodes)*perFile + max(grown, 0)
	runtime.KeepAlive(st)
	return float64(all) / float64(int64(n+1)*size), nil
}

// used is what a tmpfs holds, in bytes and files.
func used(dir string) (bytes, inodes int64, err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return 0, 0, fmt.Errorf("statfs %s: %w", dir, err)
	}
	// A tmpfs without a limit of its inodes does not count them: the folder is read instead.
	inodes, err = files(dir)
	return int64(fs.Blocks-fs.Bfree) * fs.Bsize, inodes, err
}

func files(dir string) (n int64, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	for _, e := range entries {
		n++
		if e.IsDir() {
			below, err := files(dir + "/" + e.Name())
			if err != nil {
				return 0, err
			}
			n += below
		}
	}
	return n, nil
}

// liveHeap is what this process's heap holds.
func liveHeap() int64 {
	runtime.GC()
	runtime.GC() // what has finalizers goes the second time
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// kernelObjects sums the sizes of one object of each of these of the kernel's caches.
func kernelObjects(names ...string) (int64, error) {
	f, err := os.Open("/proc/slabinfo")
	if err != nil {
		return 0, cannot(fmt.Sprintf("the kernel's own memory of a file is not told: %v", err))
	}
	defer f.Close()
	sum, found := int64(0), 0
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var name string
		var active, all, size int64
		if _, err := fmt.Sscan(lines.Text(), &name, &active, &all, &size); err != nil {
			continue
		}
		for _, n := range names {
			if n == name {
				sum += size
				found++
			}
		}
	}
	if found != len(names) {
		return 0, cannot("the kernel's own memory of a file is not told: /proc/slabinfo lacks " + strings.Join(names, " or "))
	}
	return sum, nil
}

// idleGroup: the memory of a mount that nobody has read yet, of a dataset of very many files.
func (b *bench) idleGroup() group {
	n := 100 * b.o.files
	dir := b.dir + "/many"
	var d *dataset
	var v *view
	var snapshot int64
	return group{
		setup: func(ctx context.Context, s *scope) error {
			if err := b.needMounts(); err != nil {
				return err
			}
			s.add(func() { _ = os.RemoveAll(dir) })
			if err := access.WriteTree(ctx, dir, access.Tree(n, 0), nil, true); err != nil {
				return err
			}
			var err error
			if d, err = b.start(ctx, "", fromFolder(dir), 0); err != nil {
				return err
			}
			s.add(d.close)
			c, err := d.folder.Dial(ctx)
			if err != nil {
				return err
			}
			defer c.Close()
			snapshot = int64(len(c.Snapshot().Encoded()))
			v = b.view(s, d.folder)
			return nil
		},
		rows: []*row{
			{layer: "memory", name: fmt.Sprintf("snapshot of %d files, bytes each", n), unit: bytes_, reference: "≤ 150",
				run: func(context.Context) (float64, error) { return float64(snapshot) / float64(n), nil }},
			{layer: "memory", name: fmt.Sprintf("idle mount of %d files, beyond the snapshot", n), unit: mib, reference: "≤ 64 MiB",
				run: func(ctx context.Context) (float64, error) {
					if err := v.renew(ctx); err != nil {
						return 0, err
					}
					defer v.close()
					// What the program's file itself maps is shared by all of them and can be dropped at any time.
					rss, err := resident(v.process.Pid())
					return float64(rss - snapshot), err
				}},
		},
	}
}

// resident is a process's memory without its pages of files on disk, in bytes.
func resident(pid int) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	sum, found := int64(0), 0
	for line := range strings.Lines(string(text)) {
		var kb int64
		if n, _ := fmt.Sscanf(line, "RssAnon: %d", &kb); n == 0 {
			if n, _ = fmt.Sscanf(line, "RssShmem: %d", &kb); n == 0 {
				continue
			}
		}
		sum += kb << 10
		found++
	}
	if found != 2 {
		return 0, cannot("this kernel does not tell RssAnon and RssShmem of a process")
	}
	return sum, nil
}
