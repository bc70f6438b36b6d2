package worker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/store"
	"github.com/stepcache/stepcache/cache/wire"
)

const (
	// maxLeaseFill is the largest file that is filled for a lease; larger ones are leased when whole, which is waited for
	// where they have a crowd of readers.
	maxLeaseFill = 256 << 20
	// leaseFills is how many blocks of a file are filled at once.
	leaseFills      = 8
	maxLeaseWaiting = 64 // requests under way on one connection
)

// listenSocket makes the Unix socket at path, in place of what an earlier worker left there. It is made
// beside and renamed, so that there is never a moment without a socket nor one with too wide a mode.
func listenSocket(path string) (*net.UnixListener, error) {
	if fi, err := os.Lstat(path); err == nil && fi.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("socket %s: there is something else at this path: remove it or choose another", path)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("socket: %w", err)
	}
	tmp := path + "~"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("socket: %w", err)
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: tmp, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	// The file goes by removeSocket, which looks whose it is: a successor may have put its own there.
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(tmp, 0o660), os.Rename(tmp, path)); err != nil {
		l.Close()
		os.Remove(tmp)
		return nil, fmt.Errorf("socket: %w", err)
	}
	return l, nil
}

// removeSocket removes the socket's file unless a successor has replaced it.
func removeSocket(path string, made fs.FileInfo) {
	if now, err := os.Lstat(path); err == nil && os.SameFile(now, made) {
		os.Remove(path)
	}
}

// acceptLeases serves the Unix socket until it is closed, and returns once every connection has ended.
func (w *Worker) acceptLeases(ctx context.Context, l *net.UnixListener) error {
	return w.accept(ctx, l, func(ctx context.Context, nc net.Conn) {
		uc := nc.(*net.UnixConn)
		uid, err := wire.PeerUID(uc)
		if err == nil && uid != 0 && int(uid) != os.Getuid() {
			err = fmt.Errorf("%w: user %d may not ask for descriptors", wire.ErrUnauthorized, uid)
		}
		var role wire.Role
		var id wire.KeyID
		if err == nil {
			role, id, err = wire.ServerHandshake(uc, w.config.Dataset, w.keys.Keys())
		}
		if err != nil {
			w.counts.refused.Add(1)
			w.log.Warn("connection to the socket refused", "error", err)
			return
		}
		w.serveLeases(ctx, uc, &permit{keys: w.keys.Keys, now: w.clock.Now, role: role, id: id, checked: w.clock.Now()})
	})
}

// leaseConn is one receiver of descriptors. Its leases end with it.
type leaseConn struct {
	*net.UnixConn
	worker *Worker
	turn   chan struct{}

	mu     sync.Mutex
	leases map[int64]lent
	last   int64
	closed bool
}

// lent is a lease that a receiver has, and of which file.
type lent struct {
	*store.Lease
	file file
}

func (w *Worker) serveLeases(ctx context.Context, uc *net.UnixConn, permit *permit) {
	// Leases outlive no worker: there is nothing to drain.
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { uc.Close() })
	c := &leaseConn{UnixConn: uc, worker: w, turn: make(chan struct{}, 1), leases: make(map[int64]lent)}
	var wg sync.WaitGroup
	defer func() {
		cancel()
		wg.Wait()
		stop()
		c.end()
	}()
	slots := make(chan struct{}, maxLeaseWaiting)
	buf := make([]byte, wire.RequestSize+1) // a longer packet shows as one byte too many
	for {
		n, err := uc.Read(buf)
		if err != nil {
			return
		}
		req, err := wire.DecodeRequest(buf[:n])
		if err != nil {
			w.log.Warn("bad packet on the socket", "error", err)
			return
		}
		if (req.Op == wire.OpLease || req.Op == wire.OpBlock) && !permit.valid() {
			w.counts.refused.Add(1)
			if c.fail(ctx, req, fmt.Errorf("%w: the key is not one of the dataset's any more", source.ErrDenied)) != nil {
				return
			}
			continue // what can be read of what was leased before goes on until it is released
		}
		switch req.Op {
		case wire.OpPing:
			err = c.reply(ctx, req, wire.Reply{}, nil, nil)
		case wire.OpRelease:
			err = c.release(ctx, req)
		case wire.OpLease, wire.OpBlock:
			answer := c.lease
			if req.Op == wire.OpBlock {
				answer = c.block
			}
			select {
			case slots <- struct{}{}:
				wg.Go(func() {
					defer func() { <-slots }()
					answer(ctx, req)
				})
			default:
				err = c.fail(ctx, req, fmt.Errorf("%w: too many files and blocks are waited for", wire.ErrOverloaded))
			}
		default:
			err = c.fail(ctx, req, fmt.Errorf("%w: operation %d is not served on the socket", source.ErrInvalid, req.Op))
		}
		if err != nil {
			return
		}
	}
}

// lease answers one OpLease. An error of its reply closes the connection, which the reader sees.
func (c *leaseConn) lease(ctx context.Context, req wire.Request) {
	l, f, err := c.worker.lease(ctx, req)
	if err != nil {
		c.fail(ctx, req, err)
		return
	}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		l.Release()
		return
	}
	c.last++
	id := c.last
	c.leases[id] = lent{l, f}
	c.mu.Unlock()
	// Until this request is answered nobody knows id, and the connection's end waits for it, so that the
	// file is open while it is sent.
	if err := c.reply(ctx, req, wire.Reply{Index: req.Index, Off: id, Size: f.ring.Size}, nil, l.File); err != nil {
		return
	}
	if req.Flags&wire.FlagEarly == 0 {
		c.worker.counts.opened.Add(f.ring.Size)
	}
}

// block answers one OpBlock.
func (c *leaseConn) block(ctx context.Context, req wire.Request) {
	c.mu.Lock()
	l, ok := c.leases[int64(req.Index)]
	c.mu.Unlock()
	if !ok {
		c.fail(ctx, req, fmt.Errorf("%w: there is no lease %d", source.ErrInvalid, req.Index))
		return
	}
	sums, err := c.worker.block(ctx, req, l)
	if err != nil {
		c.fail(ctx, req, err)
		return
	}
	if c.reply(ctx, req, wire.Reply{Index: req.Index, Off: req.Off}, checksum.Encode(nil, sums), nil) == nil {
		c.worker.counts.opened.Add(int64(req.Length))
	}
}

// block makes a block of a leased file readable through the lease's descriptor.
func (w *Worker) block(ctx context.Context, req wire.Request, l lent) ([]uint64, error) {
	n := req.Off / ring.BlockSize
	if req.Off < 0 || req.Off%ring.BlockSize != 0 || req.Off >= l.file.ring.Size || int64(req.Length) != blockLen(l.file.ring.Size, n) {
		return nil, fmt.Errorf("%w: %s: %d bytes from %d are not one block", source.ErrInvalid, l.file, req.Length, req.Off)
	}
	if sums, ok := l.Sums(n); ok {
		return sums, nil
	}
	// What is not kept would have left the bucket for nothing: the receiver reads it with OpRead then. So where it would
	// take the place of other blocks, which is for the policy to decide once it is here, it is not fetched for this.
	end, ok := w.promise(l.file, n, 0)
	defer end()
	if !ok {
		return nil, fmt.Errorf("%w: no room for block %d of %s but that of others", wire.ErrNotResident, n, l.file)
	}
	ctx, cancel := context.WithTimeout(ctx, waitOf(req))
	defer cancel()
	b, done, err := w.acquire(ctx, l.file, n, 0, budget{})
	if err != nil {
		return nil, err
	}
	defer done()
	defer b.Release()
	sums, ok := l.Sums(n)
	switch {
	case ok:
		return sums, nil
	case b.Resident():
		return nil, fmt.Errorf("%w: %s was dropped since it was leased", source.ErrInvalid, l.file)
	}
	return nil, fmt.Errorf("%w: block %d of %s is not kept", wire.ErrNotResident, n, l.file)
}

// lease makes a file whole, if it may and must, and leases it.
func (w *Worker) lease(ctx context.Context, req wire.Request) (*store.Lease, file, error) {
	snap, f, err := w.resolve(req)
	if err != nil {
		return nil, f, err
	}
	snap.release()
	l, err := w.store.Lease(f.ring)
	if err == nil {
		return l, f, nil
	}
	if errors.Is(err, store.ErrNotWhole) && req.Flags&wire.FlagEarly != 0 {
		l, err := w.leaseEarly(f)
		return l, f, err
	}
	if !errors.Is(err, store.ErrNotWhole) || req.WaitMillis == 0 {
		return nil, f, fmt.Errorf("%w: %s: %w", wire.ErrNotResident, f, err)
	}
	if err := w.keepsWhole(f); err != nil {
		return nil, f, err
	}
	wait := min(time.Duration(req.WaitMillis)*time.Millisecond, wire.ClientTimeout)
	within, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	if f.ring.Size > w.leaseFill {
		if !w.awaitWhole(ctx, f, wait) {
			return nil, f, fmt.Errorf("%w: %s: files larger than %d bytes are not filled for a lease", wire.ErrNotResident, f, w.leaseFill)
		}
	} else if err := w.fillFile(within, f); err != nil {
		if within.Err() != nil {
			err = fmt.Errorf("%w: %s: not filled within %v: %w", wire.ErrNotResident, f, wait, err)
		}
		return nil, f, err
	}
	if l, err = w.store.Lease(f.ring); err != nil {
		// Evicted meanwhile, or there was no room to keep all of it.
		return nil, f, fmt.Errorf("%w: %s: %w", wire.ErrNotResident, f, err)
	}
	return l, f, nil
}

// keepsWhole is an error unless all of a file is this worker's to fill.
func (w *Worker) keepsWhole(f file) error {
	v := w.members.view()
	_, place := v.owners(w.config.ID, f.ring, 0, w.config.Copies)
	if place < 0 || f.ring.Size > ring.StripeThreshold && len(v.Owners(f.ring, 0, 0)) > w.config.Copies {
		return fmt.Errorf("%w: %s", wire.ErrNotOwner, f)
	}
	return nil
}

// leaseEarly leases a file that may be incomplete.
func (w *Worker) leaseEarly(f file) (*store.Lease, error) {
	if err := w.keepsWhole(f); err != nil {
		return nil, err
	}
	l, err := w.store.LeaseEarly(f.ring)
	if err != nil {
		err = fmt.Errorf("%w: %s: %w", wire.ErrNotResident, f, err)
	}
	return l, err
}

// fillFile makes all blocks of a file resident, if they fit.
func (w *Worker) fillFile(ctx context.Context, f file) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(leaseFills)
	for block := range ring.Blocks(f.ring.Size) {
		if ctx.Err() != nil {
			break
		}
		g.Go(func() error {
			b, done, err := w.acquire(ctx, f, block, 0, budget{})
			if err != nil {
				return err
			}
			kept := b.Resident()
			b.Release()
			done()
			if !kept {
				return fmt.Errorf("%w: %s: there is no room to keep it", wire.ErrNotResident, f)
			}
			return nil
		})
	}
	return g.Wait()
}

func (c *leaseConn) release(ctx context.Context, req wire.Request) error {
	c.mu.Lock()
	l, ok := c.leases[req.Off]
	delete(c.leases, req.Off)
	c.mu.Unlock()
	if !ok {
		return c.fail(ctx, req, fmt.Errorf("%w: there is no lease %d", source.ErrInvalid, req.Off))
	}
	l.Release()
	return c.reply(ctx, req, wire.Reply{Off: req.Off}, nil, nil)
}

// end releases what the connection still holds.
func (c *leaseConn) end() {
	c.mu.Lock()
	c.closed = true
	leases := c.leases
	c.leases = nil
	c.mu.Unlock()
	for _, l := range leases {
		l.Release()
	}
}

func (c *leaseConn) fail(ctx context.Context, req wire.Request, err error) error {
	status := wire.StatusOf(err)
	c.worker.counts.status(status)
	return c.reply(ctx, req, wire.Reply{Status: status, Index: req.Index}, wire.Text(err.Error()), nil)
}

func (c *leaseConn) reply(ctx context.Context, req wire.Request, rep wire.Reply, p []byte, f *os.File) error {
	rep.ID, rep.Epoch = req.ID, c.worker.members.view().Epoch
	packet := wire.AppendFrame(nil, rep, p)
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-c.turn }()
	err := c.SetWriteDeadline(time.Now().Add(writeTimeout))
	if err == nil {
		err = wire.SendWithFD(c.UnixConn, packet, f)
	}
	if err != nil {
		c.Close()
		c.worker.log.Debug("reply on the socket not written", "error", err)
	}
	return err
}
