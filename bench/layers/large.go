package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/stepcache/stepcache/bench/access"
	"github.com/stepcache/stepcache/cache/client"
)

// waitMax is the size up to which a mount brings a file in whole when it is opened (mount.Options).
const waitMax = 256 << 20

// largeGroup: one large file and a larger one, by client and by mount, from the same node and another.
func (b *bench) largeGroup() group {
	var d *dataset
	var here, buffered, far, cached *view
	var connect func(ctx context.Context) (*client.Client, error)
	var c *client.Client

	size, larger := b.o.bytes, 2*b.o.bytes
	dir := b.dir + "/large"
	file, big := dir+"/file", dir+"/larger"
	memory := (size + larger) + (size+larger)/8 + 64<<20

	// Views appear with the first row that wants them, and each is checked once.
	ready := func(v **view) func(context.Context) error {
		checked := false
		return func(ctx context.Context) error {
			if err := b.needMounts(); err != nil {
				return err
			}
			if !checked {
				if err := (*v).same(ctx, "file", file); err != nil {
					return err
				}
				checked = true
			}
			return nil
		}
	}
	hereReady, bufferedReady, farReady, cachedReady := ready(&here), ready(&buffered), ready(&far), ready(&cached)
	first := func(ok func(context.Context) error, v **view) func(context.Context) error {
		return func(ctx context.Context) error {
			if err := ok(ctx); err != nil {
				return err
			}
			return (*v).renew(ctx)
		}
	}
	again := func(ok func(context.Context) error, v **view) func(context.Context) error {
		return func(ctx context.Context) error {
			if err := ok(ctx); err != nil {
				return err
			}
			if err := (*v).need(ctx); err != nil {
				return err
			}
			_, err := sequential(ctx, (*v).dir+"/file", size, 1)
			return err
		}
	}
	read := func(v **view, name string, size int64, readers int) func(context.Context) (float64, error) {
		return func(ctx context.Context) (float64, error) {
			return sequential(ctx, (*v).dir+"/"+name, size, readers)
		}
	}
	native8 := &base{name: "native, 8 readers", run: func(ctx context.Context) (float64, error) {
		return sequential(ctx, b.file, size, 8)
	}}
	randomly := func(piece int) (of *base, run func(context.Context) (float64, error)) {
		n := int(min(max(size/int64(piece), 500), 100_000))
		of = &base{name: "native random", run: func(ctx context.Context) (float64, error) {
			return random(ctx, b.file, size, piece, n)
		}}
		return of, func(ctx context.Context) (float64, error) { return random(ctx, here.dir+"/file", size, piece, n) }
	}
	native4k, here4k := randomly(4 << 10)
	native64k, here64k := randomly(64 << 10)
	streamed := func(ok func(context.Context) error, v **view) func(context.Context) error {
		f := first(ok, v)
		return func(ctx context.Context) error {
			if larger <= waitMax {
				return cannot(fmt.Sprintf("the larger file has %d bytes: up to %d a mount with a cache fetches it whole; raise --size", larger, int64(waitMax)))
			}
			return f(ctx)
		}
	}

	return group{
		setup: func(ctx context.Context, s *scope) error {
			s.add(func() { _ = os.RemoveAll(dir) })
			if err := os.Mkdir(dir, 0o755); err != nil {
				return err
			}
			if err := access.WriteNoise(file, size, 2); err != nil {
				return err
			}
			if err := access.WriteNoise(big, larger, 3); err != nil {
				return err
			}
			var err error
			if d, err = b.start(ctx, "", fromFolder(dir), memory); err != nil {
				return err
			}
			s.add(d.close)
			if _, err := d.load(ctx); err != nil {
				return err
			}
			other, err := b.elsewhere(ctx, d)
			if err != nil {
				return err
			}
			s.add(func() { _ = os.RemoveAll(other.Dir) })
			here = b.view(s, d.folder, "--mode", "passthrough")
			buffered = b.view(s, d.folder, "--mode", "no-open")
			far = b.view(s, other)
			cached = b.view(s, other, "--cache-size", fmt.Sprint(max(memory, 4*size)))
			connect = other.Dial
			s.add(func() {
				if c != nil {
					c.Close()
				}
			})
			return nil
		},
		rows: []*row{
			{layer: "client", name: "sequential, over loopback TCP", unit: bytesPerSecond, of: b.native,
				reference: "4.3–5.8 GB/s without sums", fills: 2 * size,
				prepare: func(ctx context.Context) (err error) {
					if c != nil {
						c.Close()
					}
					c, err = connect(ctx)
					return err
				},
				run: func(ctx context.Context) (float64, error) { return clientRead(ctx, c, "/file", size) }},

			{layer: "same node", name: "first read, 1 stream", unit: bytesPerSecond, of: b.native,
				reference: "≥ 0.95 N on 4 KiB pages, ≥ 2.5 N on huge", prepare: first(hereReady, &here), run: read(&here, "file", size, 1)},
			{layer: "same node", name: "first read, 8 readers", unit: bytesPerSecond, of: native8,
				reference: "≥ 0.9 of native", prepare: first(hereReady, &here), run: read(&here, "file", size, 8)},
			{layer: "same node", name: "re-read", unit: bytesPerSecond, of: b.native,
				reference: "≥ 0.95 N", prepare: again(hereReady, &here), run: read(&here, "file", size, 1)},
			{layer: "same node", name: "random 4 KiB", unit: each, of: native4k,
				reference: "≥ 0.8 of native; 840 K/s", prepare: again(hereReady, &here), run: here4k},
			{layer: "same node", name: "random 64 KiB", unit: each, of: native64k,
				reference: "none given", prepare: again(hereReady, &here), run: here64k},
			{layer: "same node", name: "first read without passthrough", unit: bytesPerSecond, of: b.native,
				reference: "0.40 N", fills: 2 * size, prepare: first(bufferedReady, &buffered), run: read(&buffered, "file", size, 1)},
			{layer: "same node", name: "re-read without passthrough", unit: bytesPerSecond, of: b.native,
				reference: "≥ 0.55 N", prepare: again(bufferedReady, &buffered), run: read(&buffered, "file", size, 1)},

			{layer: "other node", name: "first read", unit: bytesPerSecond, of: b.native,
				reference: "≥ 0.28 N", fills: 2 * size, prepare: first(farReady, &far), run: read(&far, "file", size, 1)},
			{layer: "other node", name: "first read, twice as large", unit: bytesPerSecond, of: b.native,
				reference: "≥ 0.28 N", fills: 2 * larger, prepare: first(farReady, &far), run: read(&far, "larger", larger, 1)},
			{layer: "other node", name: "re-read", unit: bytesPerSecond, of: b.native,
				reference: "≥ 0.55 N", prepare: again(farReady, &far), run: read(&far, "file", size, 1)},

			{layer: "other node, --cache-size", name: "first read", unit: bytesPerSecond, of: b.native,
				reference: "≥ 0.45 N up to 256 MiB", fills: 2 * size, prepare: first(cachedReady, &cached), run: read(&cached, "file", size, 1)},
			{layer: "other node, --cache-size", name: "first read, twice as large", unit: bytesPerSecond, of: b.native,
				reference: "≥ 0.28 N", fills: 2 * larger, prepare: streamed(cachedReady, &cached), run: read(&cached, "larger", larger, 1)},
			{layer: "other node, --cache-size", name: "re-read", unit: bytesPerSecond, of: b.native,
				reference: "≥ 0.95 N", prepare: again(cachedReady, &cached), run: read(&cached, "file", size, 1)},
		},
	}
}

// clientRead reads a file through a client from its start to its end.
func clientRead(ctx context.Context, c *client.Client, path string, size int64) (float64, error) {
	i, ok := c.Snapshot().Lookup(path)
	if !ok {
		return 0, fmt.Errorf("%s is not in the dataset", path)
	}
	p := access.Touched(access.Chunk)
	start := time.Now()
	for off := int64(0); off < size; {
		n, err := c.ReadAt(ctx, i, p[:min(size-off, access.Chunk)], off)
		if err != nil && err != io.EOF {
			return 0, err
		}
		off += int64(n)
	}
	return perSecond(size, start), nil
}
