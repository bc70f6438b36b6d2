package mount

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
)

// Settings are what a successor must know of a mount besides its descriptors, fit for JSON.
type Settings struct {
	// Dir is where the file system is mounted.
	Dir string `json:"dir"`
	// Major and Minor are its device there.
	Major uint32 `json:"major"`
	Minor uint32 `json:"minor"`
	// Snapshot is the digest of what it shows.
	Snapshot catalog.Digest `json:"snapshot"`
	Mode     Mode           `json:"mode"`
	MaxWrite int            `json:"maxWrite"`
	// Kernel is the kernel's INIT request, which it makes only once.
	Kernel []byte `json:"kernel"`
}

// Parked is a mount as somebody can keep it who serves nothing: as long as the descriptors are open the mount
// lives, requests wait, and Resume in any process goes on serving. The table tells which files are open. Its
// descriptors can be sent over a Unix socket.
type Parked struct {
	Settings Settings
	// Conn is the connection with the kernel, Table a sealed memfd.
	Conn, Table *os.File
}

// Close closes the descriptors. When they were the last and nobody serves the mount, it is dead.
func (p *Parked) Close() {
	for _, f := range []*os.File{p.Conn, p.Table} {
		if f != nil {
			f.Close()
		}
	}
}

// Served says whether a process is there that serves the mount, and answers what it has read.
func (p *Parked) Served() (bool, error) {
	if err := checkDevice(p.Conn); err != nil {
		return false, fmt.Errorf("parked: %w", err)
	}
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: successionByte, Len: 1}
	if err := unix.FcntlFlock(p.Table.Fd(), unix.F_OFD_GETLK, &l); err != nil {
		return false, fmt.Errorf("parked table of open files: %w", err)
	}
	return l.Type != unix.F_UNLCK, nil
}

// Park gives what a keeper needs so that the mount outlives this process. The mount goes on being served here;
// when this process ends, without an Unmount, somebody can Resume it. Whoever unmounts it tells the keeper.
func (m *Server) Park() (*Parked, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fuse == nil {
		return nil, fmt.Errorf("park %s: it is unmounted", m.dir)
	}
	p := &Parked{Settings: m.settings}
	p.Settings.Kernel = append([]byte(nil), m.settings.Kernel...)
	var err error
	if p.Conn, err = dup(m.fuse); err == nil {
		p.Table, err = dup(m.fs.table.file)
	}
	if err != nil {
		p.Close()
		return nil, fmt.Errorf("park %s: %w", m.dir, err)
	}
	return p, nil
}

// Resume serves a mount that another process made, or another process resumed, in its place: files that are
// open stay open, and requests that the other did not answer are answered. The other may still be there: both
// then answer, each what it reads. snap must be the very snapshot of the mount. The descriptors of p become the
// Server's, or are closed with an error. ctx bounds the resuming only.
//
// o.Mode counts for nothing: the kernel was told once.
func Resume(ctx context.Context, p *Parked, snap *catalog.Snapshot, r Reader, o Options) (*Server, error) {
	return resume(ctx, p, snap.Digest(), snap.Len(), func(*table) (tree, Reader) { return snap, r }, o.withDefaults())
}

// ResumeNames is Resume of what MountNames mounted.
func ResumeNames(ctx context.Context, p *Parked, n Names, o Options) (*Server, error) {
	o = o.withDefaults()
	return resume(ctx, p, Live, liveSlots, func(t *table) (tree, Reader) { l := newLive(n, t, o); return l, l }, o)
}

func resume(ctx context.Context, p *Parked, shows catalog.Digest, entries int, show func(*table) (tree, Reader), o Options) (*Server, error) {
	fail := func(err error) (*Server, error) {
		p.Close()
		return nil, fmt.Errorf("resume the mount of dataset %q at %s: %w", o.Dataset, p.Settings.Dir, err)
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	if err := p.Settings.check(shows); err != nil {
		return fail(err)
	}
	if p.Conn == nil || p.Table == nil {
		return fail(errors.New("a descriptor is missing"))
	}
	if err := checkDevice(p.Conn); err != nil {
		return fail(fmt.Errorf("parked: %w", err))
	}
	table, err := openTable(p.Table, entries)
	p.Table = nil
	if err != nil {
		return fail(err)
	}
	snap, r := show(table)
	m, err := serve(p.Settings.Dir, p.Conn, table, snap, r, o, &p.Settings)
	p.Conn = nil
	if err != nil {
		return fail(err)
	}
	return m, nil
}

// check refuses settings that cannot be right.
func (s *Settings) check(d catalog.Digest) error {
	switch {
	case s.Snapshot != d:
		return fmt.Errorf("it shows the snapshot %s, not %s", hex.EncodeToString(s.Snapshot[:]), hex.EncodeToString(d[:]))
	case s.Mode != Passthrough && s.Mode != NoOpen:
		return fmt.Errorf("unknown %v", s.Mode)
	case s.MaxWrite < 4096 || s.MaxWrite > 1<<26:
		return fmt.Errorf("requests of %d bytes make no sense", s.MaxWrite)
	case len(s.Kernel) != int(unsafe.Sizeof(fuse.InitIn{})):
		return fmt.Errorf("the kernel's settings have %d bytes, not %d", len(s.Kernel), unsafe.Sizeof(fuse.InitIn{}))
	}
	const opInit = 26
	in := fuse.InitIn{}
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&in)), unsafe.Sizeof(in)), s.Kernel)
	if in.Opcode != opInit || in.Major != 7 || int(in.Length) != len(s.Kernel) {
		return errors.New("the kernel's settings are not an INIT request")
	}
	return nil
}

// dup copies a descriptor.
func dup(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
