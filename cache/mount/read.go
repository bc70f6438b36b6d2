package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/source"
)

// Read answers with the whole range, up to the end of the file, or with an errno.
func (f *fileSystem) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	i, n, ok := f.node(in.NodeId)
	if !ok {
		return nil, f.fail(unix.ESTALE)
	}
	if n.Dir {
		return nil, f.fail(unix.EISDIR)
	}
	f.count.reads.Add(1)
	if in.Offset >= uint64(n.Size) {
		return fuse.ReadResultData(nil), fuse.OK
	}
	off := int64(in.Offset)
	buf = buf[:min(int64(len(buf)), n.Size-off)]
	if p := f.push.offers.peek(i, off, len(buf)); p != nil {
		f.count.bytes.Add(int64(len(buf)))
		return p, fuse.OK
	}
	f.push.read(i, &n)
	if f.mode == Passthrough && n.Size >= max(pagesMin, f.opt.LeaseMin) { // as Open and Release tell of
		f.pass.pages.noteRead(i, len(buf))
	}
	if f.peeker != nil && len(buf) > 0 {
		if pieces, release, ok := f.peeker.Peek(i, off, buf); ok {
			f.count.bytes.Add(int64(len(buf)))
			return &peeked{pieces, len(buf), release}, fuse.OK
		}
	}
	ctx, stop := f.requestContext(cancel, in.Pid)
	defer stop()
	if in.Flags&unix.O_DIRECT != 0 {
		turns := f.direct[i%directFiles]
		select {
		case turns <- struct{}{}:
		default:
			dropPages(buf)
			select {
			case turns <- struct{}{}:
			case <-ctx.Done():
				return nil, f.failed(ctx, "read", i, ctx.Err())
			}
		}
		defer func() { <-turns }()
	}
	k, err := f.reader.ReadAt(ctx, i, buf, off)
	if k < len(buf) {
		if err == nil || err == io.EOF {
			err = fmt.Errorf("%w: it has %d bytes, not %d", errShort, off+int64(k), n.Size)
		}
		return nil, f.failed(ctx, "read", i, err)
	}
	f.count.bytes.Add(int64(k))
	return fuse.ReadResultVector([][]byte{buf}), fuse.OK
}

// dropPages gives the memory of p back to the kernel, which makes it anew, zeroed, once something is written to it.
func dropPages(p []byte) {
	page := uintptr(os.Getpagesize())
	p = p[:cap(p)]
	start := -uintptr(unsafe.Pointer(unsafe.SliceData(p))) % page
	if whole := (uintptr(len(p)) - min(start, uintptr(len(p)))) / page * page; whole > 0 {
		_ = unix.Madvise(p[start:start+whole], unix.MADV_DONTNEED) // which fails where memory is locked, and stays then
	}
}

// peeked is an answer that the kernel copies from where the reader has it.
type peeked struct {
	pieces  [][]byte
	size    int
	release func()
}

func (p *peeked) Size() int { return p.size }

// Slices is what go-fuse looks for to write the pieces as they are.
func (p *peeked) Slices() ([][]byte, fuse.Status) { return p.pieces, fuse.OK }

func (p *peeked) Bytes(buf []byte) ([]byte, fuse.Status) {
	buf = buf[:0]
	for _, piece := range p.pieces {
		buf = append(buf, piece...)
	}
	return buf, fuse.OK
}

func (p *peeked) Done() { p.release() }

// Causes of a request's end.
var (
	errInterrupted = errors.New("interrupted")
	errTimeout     = fmt.Errorf("no answer in time: %w", os.ErrDeadlineExceeded)
	errShort       = fmt.Errorf("%w: the file ends early", source.ErrUnavailable)
)

const (
	// interruptGrace is how long a request goes on after a signal that does not kill its sender.
	interruptGrace = time.Second
	// blindGrace is how long it does after a signal to a sender that cannot be seen.
	blindGrace = 10 * time.Second
)

// requestContext ends after the mount's ReadTimeout, with the connection, or by an interrupt.
//
// The kernel says interrupt for every signal, though most of them (timers, the Go runtime's preemption) are no
// wish to stop; a failed read is what many programs do not expect from a file, and a failed page fault kills
// them. So a request goes on for a while, in which nearly all of them finish. Only for a sender that is being
// killed, and waits for nothing but this answer, it ends at once.
func (f *fileSystem) requestContext(cancel <-chan struct{}, pid uint32) (context.Context, func()) {
	return f.boundContext(cancel, pid, f.opt.grace)
}

// patientContext is requestContext of a question for names: no signal ends it but one that kills its sender, whenever
// that comes. A shell gets a signal whenever a child of it ends, and hardly any program asks again for a name or the
// rest of a folder that it was told EINTR for.
func (f *fileSystem) patientContext(cancel <-chan struct{}, pid uint32) (context.Context, func()) {
	return f.boundContext(cancel, pid, f.opt.ReadTimeout)
}

// boundContext ends after the mount's ReadTimeout, with the connection, or after an interrupt: once the sender is being
// killed, or has had so much time.
//
// Nobody knows whether a sender that cannot be seen was killed, and a server in a pod sees none: the others have PID
// namespaces of their own. So it has blindGrace, in which nearly all is answered. One that was killed waits that long
// at most, which is less than the time that a pod has to end; one that was not would get an error for a timer.
func (f *fileSystem) boundContext(cancel <-chan struct{}, pid uint32, grace time.Duration) (context.Context, func()) {
	ctx, done := context.WithTimeoutCause(f.ctx, f.opt.ReadTimeout, errTimeout)
	ctx, fail := context.WithCancelCause(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		select {
		case <-ctx.Done():
			return
		case <-cancel:
		}
		for since := time.Now(); ; { // the kernel tells of the first signal only
			dies, seen := fate(pid)
			most := grace
			if !seen {
				most = f.opt.blindGrace
			}
			if dies || time.Since(since) >= most || over(f.conn) { // whose end interrupts all that is under way
				break
			}
			if f.opt.goesOn != nil {
				f.opt.goesOn()
			}
			t := time.NewTimer(f.opt.grace)
			select {
			case <-ctx.Done():
				t.Stop()
				return
			case <-t.C:
			}
		}
		fail(errInterrupted)
	}()
	return ctx, func() {
		fail(nil)
		done()
		<-ended
	}
}

// fate says whether a thread can be seen, as one outside of the mount's PID namespace cannot (the kernel calls it 0),
// and has SIGKILL pending, as it has once a signal has decided that it dies.
func fate(tid uint32) (dies, seen bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if tid == 0 || err != nil {
		return false, false
	}
	_, b, _ = bytes.Cut(b, []byte("SigPnd:"))
	line, _, _ := bytes.Cut(b, []byte("\n"))
	var pending uint64
	if _, err := fmt.Sscanf(string(line), "%x", &pending); err != nil {
		return false, false
	}
	return pending&(1<<(unix.SIGKILL-1)) != 0, true
}

// failed counts and reports a failure, and gives its errno.
func (f *fileSystem) failed(ctx context.Context, what string, i catalog.Index, err error) fuse.Status {
	e := errnoOf(ctx, err)
	if e != unix.EINTR {
		f.report(what, i, err)
	}
	return f.fail(e)
}

// errnoOf translates the failure of a request.
func errnoOf(ctx context.Context, err error) unix.Errno {
	// A cause tells more than what came of it.
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	switch {
	case errors.Is(err, errInterrupted):
		return unix.EINTR
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return unix.ETIMEDOUT
	case errors.Is(err, source.ErrDenied):
		return unix.EACCES
	case errors.Is(err, context.Canceled):
		return unix.ENOTCONN // The connection is at its end.
	}
	return unix.EIO
}

// report logs a failed request, some of them a second at most, and counts those whose object is not the one of
// the snapshot any more.
func (f *fileSystem) report(what string, i catalog.Index, err error) {
	changed := errors.Is(err, source.ErrChanged) || errors.Is(err, source.ErrNotFound)
	if changed {
		f.count.changed.Add(1)
	}
	if f.ctx.Err() != nil {
		return
	}
	if !f.limit.Allow() {
		f.count.unlogged.Add(1)
		return
	}
	attrs := []any{"path", f.snap.Path(i), "object", f.object(i), "error", err}
	if n := f.count.unlogged.Swap(0); n > 0 {
		attrs = append(attrs, "unlogged", n)
	}
	msg := what + " failed"
	switch {
	case changed && f.live != nil:
		msg = "the object was replaced or deleted since the file was opened"
	case changed:
		msg = "the object has changed in the bucket since the dataset was listed; start the step again with a newer listing"
	}
	f.log.Error(msg, attrs...)
}

// object names the object of a file: scheme://bucket/key.
func (f *fileSystem) object(i catalog.Index) string {
	m, o, ok := f.snap.Object(i)
	if !ok {
		return ""
	}
	return f.snap.Mounts()[m].URL + "/" + o.Key
}
