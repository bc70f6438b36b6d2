package client

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// Progress tells how far Dial is.
type Progress struct {
	// Received and Size are bytes of the snapshot; Size is zero until a worker has it.
	Received, Size int64
	// Waiting is why there is no snapshot yet, in the workers' words; empty once it is being received.
	Waiting string
}

// maxSnapshot bounds what a client takes for a snapshot: some fifty million files.
const maxSnapshot = 8 << 30

// pull gets the snapshot named by want, or the current one if it is zero, from any worker, and waits
// while there is none. It ends with ctx, or when every worker refuses the client.
func (c *Client) pull(ctx context.Context, want catalog.Digest) (*catalog.Snapshot, error) {
	if s := c.cached(want); s != nil {
		return s, nil
	}
	var s *catalog.Snapshot
	var tooLarge error
	var at Progress
	err := c.fromAny(ctx, func(p *peer) (err error) {
		s, err = c.pullFrom(ctx, p, &want, &at)
		if errors.Is(err, errTooLarge) {
			tooLarge = err
			return nil // it is as large at the others
		}
		if err == nil {
			c.log.Info("snapshot", "digest", hex.EncodeToString(want[:6]), "files", s.Files(), "bytes", s.Bytes(), "worker", p.member.ID)
		}
		return err
	})
	if err == nil && tooLarge != nil {
		err = fmt.Errorf("dataset %s: %w", c.config.Dataset, tooLarge)
	}
	if err != nil && at.Received > 0 {
		err = fmt.Errorf("%w; %d of %d MiB of the snapshot were received", err, at.Received>>20, at.Size>>20)
	}
	return s, err
}

// fromAny tries get with one worker after another, round and round, until it succeeds, ctx ends, or every
// worker refuses the client.
func (c *Client) fromAny(ctx context.Context, get func(*peer) error) error {
	pause := c.pauses()
	last := errors.New("no worker is ready")
	for {
		changed := c.members.wait()
		peers := c.sources()
		answered, refused := false, 0
		for _, p := range peers {
			err := get(p)
			if err == nil {
				return nil
			}
			if ctx.Err() != nil {
				break
			}
			// What a worker says tells more than that another is down.
			if says := !errors.Is(err, errDown); says || !answered {
				last, answered = fmt.Errorf("worker %s: %w", p.member.ID, err), says
			}
			if wire.Refused(err) {
				refused++
			}
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("dataset %s: no worker answers: %w: %w", c.config.Dataset, context.Cause(ctx), last)
		}
		if refused > 0 && refused == len(peers) {
			return fmt.Errorf("dataset %s: %w", c.config.Dataset, last)
		}
		if c.config.Progress != nil {
			c.config.Progress(Progress{Waiting: last.Error()})
		}
		c.members.refresh()
		sleepUntil(ctx, pause.NextBackOff(), changed)
	}
}

// sources are the peers to ask for a snapshot: those of this node, then the others, then the seeds.
func (c *Client) sources() []*peer {
	v := c.members.view()
	var here, there []*peer
	for _, m := range v.Members {
		switch {
		case m.State != ring.Ready:
		case c.config.Node != "" && m.Node == c.config.Node:
			here = append(here, v.peers[m.ID])
		default:
			there = append(there, v.peers[m.ID])
		}
	}
	c.shuffle(there)
	return slices.Concat(here, there, c.members.seeds)
}

// pullFrom receives the snapshot from one worker, and goes on with what another worker, or an earlier pull, did not end.
// Once it knows the digest of the current one, want is that: the tier may move on meanwhile, but what is pulled is one
// snapshot. at is how far it came.
func (c *Client) pullFrom(ctx context.Context, p *peer, want *catalog.Digest, at *Progress) (s *catalog.Snapshot, err error) {
	digest := *want
	var (
		file     *os.File
		inMemory = c.config.SnapshotDir == ""
		have     int64
		size     int64 // zero until the first chunk tells
		resumed  bool
		corrupt  int
	)
	drop := func() {
		if file != nil && !inMemory {
			os.Remove(file.Name())
		}
		if file != nil {
			file.Close()
		}
		file = nil
	}
	defer func() {
		if err != nil {
			c.release()
		}
		if err != nil && file != nil && file.Name() != c.unfinishedPath(digest) {
			drop()
		}
		if file != nil {
			file.Close()
		}
	}()
	resume := func() {
		if digest != (catalog.Digest{}) && !inMemory {
			file, have = c.resume(digest)
			resumed = have > 0
		}
	}
	resume()
	// Where the folder takes no file memory serves, from the beginning on.
	elsewhere := func(err error) error {
		if inMemory {
			return err
		}
		c.log.Warn("snapshot is not kept on this node", "folder", c.config.SnapshotDir, "error", err)
		drop()
		inMemory, have, resumed = true, 0, false
		return nil
	}
	for {
		length := int64(wire.MaxPayload)
		if size > 0 {
			length = min(length, size-have)
		}
		ctx, cancel := context.WithTimeoutCause(ctx, c.timing.worker, wire.ErrLate)
		reply, body, err := p.small(ctx, wire.Request{Op: wire.OpSnapshot, Snapshot: digest, Off: have, Length: int32(length)})
		if err != nil && ctx.Err() != nil {
			err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
		cancel()
		switch {
		case errors.Is(err, wire.ErrCorrupt) && corrupt < 3:
			corrupt++
			c.count.refetched.Add(1)
			continue
		case resumed && (errors.Is(err, source.ErrInvalid) || err == nil && reply.Size <= have):
			drop() // the next try begins anew
			return nil, fmt.Errorf("%w: more was received of it before than it has", wire.ErrCorrupt)
		case err != nil:
			return nil, err
		case reply.Off != have, len(body) == 0, reply.Size > maxSnapshot, size > 0 && reply.Size != size,
			have+int64(len(body)) > reply.Size, digest != (catalog.Digest{}) && reply.Body != digest && reply.Body != (catalog.Digest{}):
			return nil, fmt.Errorf("%w: %d bytes at %d of a snapshot of %d", errWrong, len(body), reply.Off, reply.Size)
		}
		if digest == (catalog.Digest{}) {
			if digest = reply.Body; digest == (catalog.Digest{}) {
				return nil, fmt.Errorf("%w: a snapshot without a digest", errWrong)
			}
			if resume(); resumed {
				continue
			}
		}
		first := size == 0
		size = reply.Size
		if file == nil {
			file, err = c.newFile(digest, size, inMemory)
		}
		if err == nil && first && !inMemory { // also what is gone on with: whoever told its size then may have told less
			err = c.allocate(file, size)
		}
		if err == nil {
			_, err = file.WriteAt(body, have)
		}
		if err != nil {
			if err = elsewhere(err); err != nil {
				return nil, err
			}
			continue
		}
		have += int64(len(body))
		*at = Progress{Received: have, Size: size}
		if c.config.Progress != nil {
			c.config.Progress(*at)
		}
		if have < size {
			continue
		}
		s, err = catalog.OpenFile(fmt.Sprintf("/proc/self/fd/%d", file.Fd()))
		if err == nil && s.Digest() != digest {
			s.Close()
			err = fmt.Errorf("%w: it is not the snapshot %x", wire.ErrCorrupt, digest[:6])
		}
		if err != nil {
			c.count.corrupt.Add(1)
			drop() // the next try begins anew
			return nil, err
		}
		break
	}
	*want = digest
	if !inMemory {
		if err := os.Rename(file.Name(), c.snapshotPath(digest)); err != nil {
			c.log.Warn("snapshot is not kept on this node", "folder", c.config.SnapshotDir, "error", err)
			drop()
		} else {
			c.prune()
		}
	}
	return s, nil
}

// cached opens a snapshot that this node has already.
func (c *Client) cached(want catalog.Digest) *catalog.Snapshot {
	if c.config.SnapshotDir == "" || want == (catalog.Digest{}) {
		return nil
	}
	path := c.snapshotPath(want)
	s, err := catalog.OpenFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && s.Digest() == want {
		return s
	}
	if err == nil {
		s.Close()
		err = errors.New("its content has another digest")
	}
	c.log.Warn("cached snapshot is not usable, pulling it anew", "file", path, "error", err)
	return nil
}

// newFile is what a snapshot of so many bytes is received into: a file of the node's folder, whose memory the kernel can
// have back and the processes of the node share, or memory that this process alone has. A file rather than a growing
// slice: outgrown slices would stay with the process, several times the snapshot's size.
func (c *Client) newFile(d catalog.Digest, size int64, inMemory bool) (*os.File, error) {
	if !inMemory {
		if err := os.MkdirAll(c.config.SnapshotDir, 0o700); err != nil {
			return nil, err
		}
		return c.onDisk(d)
	}
	if err := c.reserve(size); err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("stepcache-snapshot", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "snapshot"), nil
}

// onDisk makes a file of the node's folder.
func (c *Client) onDisk(d catalog.Digest) (*os.File, error) {
	f, err := os.OpenFile(c.unfinishedPath(d), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		if _, err = claim(f); err != nil {
			f.Close()
		}
	}
	if err != nil { // another pull has it: it may be slower than this one
		return os.CreateTemp(c.config.SnapshotDir, "new-*")
	}
	return f, nil
}

// allocate gives a file of the node's folder all of the room for a snapshot, so that whoever looks next finds that taken.
func (c *Client) allocate(f *os.File, size int64) error {
	looking <- struct{}{}
	defer func() { <-looking }()
	var has unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &has); err != nil {
		return &fs.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	if err := c.disk(c.config.SnapshotDir, size, has.Blocks*512); err != nil {
		return err
	}
	err := error(unix.EINTR)
	for errors.Is(err, unix.EINTR) {
		err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, size)
	}
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return &fs.PathError{Op: "allocate", Path: f.Name(), Err: err}
	}
	return nil
}

// resume opens what there is of a snapshot whose pull did not come to its end, as where a pod waited for it for as long as it
// may, and says where to go on. Nil: there is nothing, or another pull has it.
func (c *Client) resume(d catalog.Digest) (f *os.File, have int64) {
	f, err := os.OpenFile(c.unfinishedPath(d), os.O_RDWR, 0)
	if err != nil {
		return nil, 0
	}
	if have, err = claim(f); err != nil {
		f.Close()
		return nil, 0
	}
	return f, max(have-1, 0) // so that there is something to ask for, and its length is told
}

// claim takes an unfinished file for one pull, until it is closed, and returns its length.
func claim(f *os.File) (length int64, err error) {
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return 0, err
	}
	mine, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if now, err := os.Lstat(f.Name()); err != nil || !os.SameFile(mine, now) {
		return 0, errors.Join(err, fs.ErrNotExist) // whoever had it has finished it, or removed it
	}
	return mine.Size(), nil
}

// looking is held from a look at the room of a disk until what goes there has it.
var looking = make(chan struct{}, 1)

// smallSnapshot is the size up to which a node's folder takes a snapshot however full its disk is.
const smallSnapshot = 16 << 20

// roomOnDisk is an error where a snapshot of so many bytes, of which the disk has some already, would leave less than 15 %
// of the folder's disk free. From there on the kubelet removes images, and from 10 % on it evicts pods (its defaults); and
// what a worker sends, which may be anybody's program, is charged to no pod.
func roomOnDisk(dir string, size, has int64) error {
	if size <= smallSnapshot {
		return nil
	}
	var disk unix.Statfs_t
	if err := unix.Statfs(dir, &disk); err != nil {
		return &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	free, all := int64(disk.Bavail)*disk.Bsize, int64(disk.Blocks)*disk.Bsize
	if more := size - has; more > 0 && free-more < all/20*3 {
		return fmt.Errorf("%d MiB more would leave less than 15 %% of its disk free, of which %d of %d MiB are", more>>20, free>>20, all>>20)
	}
	return nil
}

// unfinished is how old a file must be for nobody to go on with what it has of a snapshot.
const unfinished = time.Hour

// prune removes the oldest snapshots of the folder, as Config.SnapshotsKept says. Who has one open keeps it.
func (c *Client) prune() {
	if c.config.SnapshotsKept <= 0 {
		return
	}
	type file struct {
		path string
		made time.Time
	}
	var kept []file
	entries, err := os.ReadDir(c.config.SnapshotDir)
	for _, e := range entries {
		info, ierr := e.Info()
		if ierr != nil {
			continue // removed by another process
		}
		f := file{filepath.Join(c.config.SnapshotDir, e.Name()), info.ModTime()}
		switch {
		case strings.HasSuffix(f.path, snapshotSuffix):
			kept = append(kept, f)
		case strings.HasPrefix(e.Name(), "new-") && c.now().Sub(f.made) > unfinished:
			err = errors.Join(err, os.Remove(f.path))
		}
	}
	slices.SortFunc(kept, func(a, b file) int { return b.made.Compare(a.made) })
	for _, f := range kept[min(len(kept), c.config.SnapshotsKept):] {
		err = errors.Join(err, os.Remove(f.path))
	}
	if err != nil {
		c.log.Debug("old snapshots are not all removed", "folder", c.config.SnapshotDir, "error", err)
	}
}

const snapshotSuffix = ".snapshot"

func (c *Client) snapshotPath(d catalog.Digest) string {
	return filepath.Join(c.config.SnapshotDir, hex.EncodeToString(d[:])+snapshotSuffix)
}

// unfinishedPath is where a snapshot is received.
func (c *Client) unfinishedPath(d catalog.Digest) string {
	return filepath.Join(c.config.SnapshotDir, "new-"+hex.EncodeToString(d[:]))
}

// short is the snapshot's digest for people.
func (c *Client) short() string { return hex.EncodeToString(c.digest[:6]) }

// path is a file's name in a line of the log, looked up only if that is written.
func (c *Client) path(i catalog.Index) slog.LogValuer { return logPath{c.snapshot, i} }

type logPath struct {
	snapshot *catalog.Snapshot
	index    catalog.Index
}

// LogValue implements slog.LogValuer.
func (p logPath) LogValue() slog.Value { return slog.StringValue(p.snapshot.Path(p.index)) }

// name names file i for people: its path in the dataset and its object in the bucket.
func (c *Client) name(i catalog.Index) string {
	var b strings.Builder
	fmt.Fprintf(&b, "dataset %s: %s", c.config.Dataset, c.snapshot.Path(i))
	if mount, o, ok := c.snapshot.Object(i); ok {
		if mounts := c.snapshot.Mounts(); mount < len(mounts) {
			fmt.Fprintf(&b, " (%s/%s)", mounts[mount].URL, o.Key)
		}
	}
	return b.String()
}
