package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/bench/access"
	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/store"
	"github.com/stepcache/stepcache/cache/wire"
)

// object is the n-th object of a store that the bench fills.
func object(n uint64, size int64) ring.Object {
	var id source.ID
	binary.BigEndian.PutUint64(id[:], n)
	// A ring object's id is a digest: its bits are spread.
	binary.BigEndian.PutUint64(id[8:], n*0x9e3779b97f4a7c15)
	return ring.Object{ID: id, Size: size}
}

// openStore opens an empty store on huge pages, or on pages of 4 KiB, that is gone with s.
func (b *bench) openStore(ctx context.Context, s *scope, huge bool, quota int64) (*store.Store, string, error) {
	dir, err := os.MkdirTemp(b.dir, "s")
	if err != nil {
		return nil, "", err
	}
	s.add(func() { _ = os.RemoveAll(dir) })
	if huge {
		if !b.mounts {
			return nil, "", cannot("needs root (CAP_SYS_ADMIN) to mount a tmpfs with huge pages")
		}
		note, err := store.MountTmpfs(dir, quota)
		if err != nil {
			return nil, "", err
		}
		s.add(func() { _ = store.Unmount(dir) })
		if note != "" {
			return nil, "", cannot(note)
		}
	}
	st, err := store.Open(ctx, store.Options{Dir: dir, Quota: quota})
	if err != nil {
		return nil, "", err
	}
	s.add(func() { _ = st.Close() })
	return st, dir, nil
}

// insert fills one block of an object, as a worker that has received it does.
func insert(ctx context.Context, st *store.Store, o ring.Object, block int64) error {
	bl, err := st.Acquire(ctx, o, block, func(context.Context, []byte) error { return nil })
	if err != nil {
		return err
	}
	defer bl.Release()
	if !bl.Resident() {
		return errors.New("the store did not keep a block that fits its quota")
	}
	return nil
}

// storeGroup: the store's own speed, by one thread, in a file as large as the native one.
func (b *bench) storeGroup() group {
	var rows []*row
	for _, huge := range []bool{true, false} {
		pages := map[bool]string{true: "huge pages", false: "4 KiB pages"}[huge]
		size := b.o.bytes
		blocks := ring.Blocks(size)
		o := object(1, size)
		with := func(f func(ctx context.Context, st *store.Store) (float64, error)) func(context.Context) (float64, error) {
			return func(ctx context.Context) (float64, error) {
				var s scope
				defer s.close()
				st, _, err := b.openStore(ctx, &s, huge, size+size/8+64<<20)
				if err != nil {
					return 0, err
				}
				return f(ctx, st)
			}
		}
		fill := func(ctx context.Context, st *store.Store) (float64, error) {
			start := time.Now()
			for n := range blocks {
				if err := insert(ctx, st, o, n); err != nil {
					return 0, err
				}
			}
			return perSecond(size, start), nil
		}
		rows = append(rows,
			&row{layer: "store", name: "insert, " + pages, unit: bytesPerSecond, of: b.native,
				reference: map[bool]string{true: "≥ 5 GB/s; 24 in C without sums", false: "2.5 GB/s without sums"}[huge], fills: size + size/8,
				run: with(func(ctx context.Context, st *store.Store) (float64, error) {
					// The store's buffers are made by the first fills of a process, not by each.
					if err := insert(ctx, st, object(2, ring.BlockSize), 0); err != nil {
						return 0, err
					}
					return fill(ctx, st)
				})},
			&row{layer: "store", name: "read, " + pages, unit: bytesPerSecond, of: b.native,
				reference: map[bool]string{true: "3.4 N", false: "0.99 N"}[huge],
				run: with(func(ctx context.Context, st *store.Store) (float64, error) {
					if _, err := fill(ctx, st); err != nil {
						return 0, err
					}
					p := access.Touched(access.Chunk)
					start := time.Now()
					for n := range blocks {
						bl, ok := st.Lookup(o, n)
						if !ok {
							return 0, fmt.Errorf("block %d is not resident", n)
						}
						for off := int64(0); off < int64(bl.Len()); off += access.Chunk {
							if _, err := bl.ReadAt(p[:min(access.Chunk, int64(bl.Len())-off)], off); err != nil {
								bl.Release()
								return 0, err
							}
						}
						bl.Release()
					}
					return perSecond(size, start), nil
				})})
	}
	return group{rows: rows}
}

// wireGroup: frames through a socket pair: headers made and decoded, payloads sent as they are with the sums
// that the store keeps, and checked by the receiver.
func (b *bench) wireGroup() group {
	var rows []*row
	for _, size := range []int{1 << 20, ring.BlockSize} {
		rows = append(rows, &row{layer: "wire", name: fmt.Sprintf("frames of %d MiB, socket pair, sums checked", size>>20), unit: bytesPerSecond,
			of: b.native, reference: "4.3–5.8 GB/s by TCP without sums",
			run: func(ctx context.Context) (float64, error) {
				return frames(ctx, size, int(max(b.o.bytes/int64(size), 1)))
			}})
	}
	return group{rows: rows}
}

func frames(ctx context.Context, size, n int) (float64, error) {
	from, to, err := socketPair()
	if err != nil {
		return 0, err
	}
	defer from.Close()
	defer to.Close()
	payload := make([]byte, size)
	for i := range payload {
		payload[i] = byte(i * 7)
	}
	sums, got := checksum.All(payload), access.Touched(size)
	start := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	defer context.AfterFunc(ctx, func() { from.Close(); to.Close() })()
	g.Go(func() error {
		var header []byte
		for k := range n {
			header = wire.AppendReply(header[:0], wire.Reply{ID: uint32(k), Length: int32(size), Sums: sums})
			buffers := net.Buffers{header, payload}
			if _, err := buffers.WriteTo(from); err != nil {
				return fmt.Errorf("send frame %d: %w", k, err)
			}
		}
		return nil
	})
	g.Go(func() error {
		r := bufio.NewReaderSize(to, 64<<10)
		for k := range n {
			reply, err := wire.ReadReply(r)
			if err == nil && int(reply.Length) != size {
				err = fmt.Errorf("%d bytes", reply.Length)
			}
			if err == nil {
				_, err = io.ReadFull(r, got)
			}
			if err == nil {
				err = wire.CheckSums(got, reply.Sums)
			}
			if err != nil {
				return fmt.Errorf("receive frame %d: %w", k, err)
			}
		}
		return nil
	})
	err = g.Wait()
	return perSecond(int64(size)*int64(n), start), err
}

func socketPair() (a, b net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socket pair: %w", err)
	}
	conns := make([]net.Conn, 2)
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket pair")
		c, fileErr := net.FileConn(f)
		f.Close() // the connection has a copy
		conns[i], err = c, errors.Join(err, fileErr)
	}
	if err != nil {
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
	}
	return conns[0], conns[1], err
}
