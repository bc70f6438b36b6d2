package main

import (
	"context"
	"fmt"
	"os"
	"path"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/bench/access"
)

// smallGroup: datasets of many small files, opened for the first time and again.
func (b *bench) smallGroup() group {
	var v *view
	dir := b.dir + "/small"
	sizes := []int64{100 << 10, 16 << 10}
	sub := func(size int64) string { return fmt.Sprintf("k%d", size>>10) }

	var rows []*row
	for _, size := range sizes {
		files := access.Tree(b.o.files, size)
		for _, n := range []int{1, 4} {
			open := func(dir func() string, whole bool) func(context.Context) (float64, error) {
				return func(ctx context.Context) (float64, error) {
					return smallReads(ctx, dir()+"/"+sub(size), files, n, whole)
				}
			}
			mounted := func() string { return v.dir }
			native := func(whole bool) *base {
				return &base{name: "native files", run: open(func() string { return dir }, whole)}
			}
			rows = append(rows, &row{layer: "small files", name: fmt.Sprintf("first open and read, %d KiB, %s", size>>10, plural(n, "thread")),
				unit: each, of: native(true), reference: map[int]string{1: "≥ 5 K/s", 4: "none given"}[n],
				// The mount's process and the kernel's page cache.
				fills:   2 * size * int64(len(files)),
				prepare: func(ctx context.Context) error { return v.renew(ctx) },
				run:     open(mounted, true)})
			if n == 1 {
				listed := func(ctx context.Context) error {
					if err := v.renew(ctx); err != nil {
						return err
					}
					_, err := access.Walk(ctx, v.dir+"/"+sub(size), access.Entries(b.o.files), 0)
					return err
				}
				rows = append(rows, &row{layer: "small files", name: fmt.Sprintf("first open and read after a listing, %d KiB, 1 thread", size>>10),
					unit: each, of: native(true), reference: "none given", fills: 2 * size * int64(len(files)), prepare: listed, run: open(mounted, true)})
				rows = append(rows, &row{layer: "small files", name: fmt.Sprintf("first open and read after push, %d KiB, 1 thread", size>>10),
					unit: each, of: native(true), reference: "≥ 60 K/s",
					prepare: func(ctx context.Context) error {
						if err := listed(ctx); err != nil {
							return err
						}
						return pushed(ctx, v.dir+"/"+sub(size), files)
					},
					run: open(mounted, true)})
			}
			rows = append(rows, &row{layer: "small files", name: fmt.Sprintf("re-open, %d KiB, %s", size>>10, plural(n, "thread")),
				unit: each, of: native(false), reference: map[int]string{1: "≥ 120 K/s", 4: "≥ 250 K/s"}[n],
				prepare: func(ctx context.Context) error {
					if err := v.need(ctx); err != nil {
						return err
					}
					_, err := smallReads(ctx, v.dir+"/"+sub(size), files, 4, true)
					return err
				},
				run: open(mounted, false)})
		}
	}
	return group{
		setup: func(ctx context.Context, s *scope) error {
			if err := b.needMounts(); err != nil {
				return err
			}
			s.add(func() { _ = os.RemoveAll(dir) })
			total := int64(0)
			for _, size := range sizes {
				if err := access.WriteTree(ctx, dir+"/"+sub(size), access.Tree(b.o.files, size), access.Noise(int(size), 1), false); err != nil {
					return err
				}
				total += size * int64(b.o.files)
			}
			d, err := b.start(ctx, "", fromFolder(dir), total+total/4+int64(2*b.o.files)*(8<<10)+64<<20)
			if err != nil {
				return err
			}
			s.add(d.close)
			if _, err := d.load(ctx); err != nil {
				return err
			}
			v = b.view(s, d.folder)
			first := sub(sizes[0]) + "/" + access.Tree(1, 0)[0].Path
			return v.same(ctx, first, dir+"/"+first)
		},
		rows: rows,
	}
}

// pushed reads the first files of each listed folder, until the mount has pushed all others into the page cache.
func pushed(ctx context.Context, dir string, files []access.File) error {
	const quiet = 10 * time.Second // without a file more it will not come to an end
	last, since := -1, time.Now()
	for {
		var asked []access.File
		folders := map[string]bool{}
		missing := 0
		for _, f := range files {
			n, err := cached(dir + "/" + f.Path)
			if err != nil {
				return err
			}
			if n > 0 {
				continue
			}
			missing++
			if folder := path.Dir(f.Path); !folders[folder] {
				folders[folder] = true
				asked = append(asked, f)
			}
		}
		if missing == 0 {
			return nil
		}
		if missing != last {
			last, since = missing, time.Now()
		} else if time.Since(since) > quiet {
			return fmt.Errorf("%d of %d files are not pushed", missing, len(files))
		}
		if _, err := smallReads(ctx, dir, asked, 1, true); err != nil {
			return err
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// cached is how many pages of a file are in the page cache.
func cached(name string) (uint64, error) {
	fd, err := access.Open(name)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	var st unix.Cachestat_t
	if err := unix.Cachestat(uint(fd), &unix.CachestatRange{}, &st, 0); err != nil {
		return 0, cannot(fmt.Sprintf("needs cachestat(2), of Linux 6.5: %v", err))
	}
	return st.Cache, nil
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// treeGroup: a large tree's names, without its bytes.
func (b *bench) treeGroup() group {
	var v *view
	dir := b.dir + "/tree"
	n := 10 * b.o.files
	files := access.Tree(n, 0)
	entries := access.Entries(n)
	walkOf := &base{name: "native walk", run: func(ctx context.Context) (float64, error) { return walk(ctx, dir, entries) }}
	statOf := &base{name: "native open+stat", run: func(ctx context.Context) (float64, error) { return openStat(ctx, dir, files) }}
	walked := func(ctx context.Context) (float64, error) { return walk(ctx, v.dir, entries) }
	again := func(ctx context.Context) error {
		if err := v.need(ctx); err != nil {
			return err
		}
		_, err := walked(ctx)
		return err
	}
	return group{
		setup: func(ctx context.Context, s *scope) error {
			if err := b.needMounts(); err != nil {
				return err
			}
			s.add(func() { _ = os.RemoveAll(dir) })
			if err := access.WriteTree(ctx, dir, files, nil, false); err != nil {
				return err
			}
			d, err := b.start(ctx, "", fromFolder(dir), 0)
			if err != nil {
				return err
			}
			s.add(d.close)
			v = b.view(s, d.folder)
			return nil
		},
		rows: []*row{
			{layer: "tree", name: fmt.Sprintf("ls -lR of %d files, first", n), unit: each, of: walkOf, reference: "≥ 100 K/s",
				prepare: func(ctx context.Context) error { return v.renew(ctx) }, run: walked},
			{layer: "tree", name: fmt.Sprintf("ls -lR of %d files, again", n), unit: each, of: walkOf, reference: "≥ 100 K/s", prepare: again, run: walked},
			{layer: "tree", name: fmt.Sprintf("open and stat of %d files", n), unit: each, of: statOf, reference: "none given", prepare: again,
				run: func(ctx context.Context) (float64, error) { return openStat(ctx, v.dir, files) }},
		},
	}
}
