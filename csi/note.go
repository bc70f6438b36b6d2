package csi

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/cache/wire"
)

// note is what a successor must know of a mount besides its descriptors. It travels in a memfd: it holds keys,
// which must not get to a disk, and may be longer than a packet.
type note struct {
	// Version is raised when an older reader would go wrong; fields may be added without.
	Version   int            `json:"version"`
	Namespace string         `json:"namespace"`
	Dataset   string         `json:"dataset"`
	Keys      string         `json:"keys"` // as in a key file
	Copies    int            `json:"copies"`
	Memory    int64          `json:"memory"`
	Settings  mount.Settings `json:"settings"`
}

const (
	noteVersion = 1
	maxNote     = 1 << 20
)

var errForeign = errors.New("parked by another version of the node service")

// write puts the note into a new memfd.
func (n note) write() (*os.File, error) {
	n.Version = noteVersion
	b, err := json.Marshal(n)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("stepcache-note", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("note: %w", err)
	}
	f := os.NewFile(uintptr(fd), "note")
	if _, err = f.Write(b); err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE|unix.F_SEAL_SEAL)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("note: %w", err)
	}
	return f, nil
}

// readNote reads one. The offset of f is shared with others, so it is not used.
func readNote(f *os.File) (note, error) {
	b, err := io.ReadAll(io.NewSectionReader(f, 0, maxNote))
	if err != nil {
		return note{}, fmt.Errorf("note: %w", err)
	}
	var n note
	if err := json.Unmarshal(b, &n); err != nil {
		return note{}, fmt.Errorf("note: %w", err)
	}
	if n.Version != noteVersion {
		return note{}, fmt.Errorf("%w: version %d", errForeign, n.Version)
	}
	return n, nil
}

// volume is the note as a volume of the Dataset.
func (n note) volume() (volume, error) {
	keys, err := wire.ParseKeys([]byte(n.Keys))
	if err != nil {
		return volume{}, fmt.Errorf("note: %w", err)
	}
	return volume{namespace: n.Namespace, dataset: n.Dataset, keys: keys, copies: n.Copies, memory: n.Memory}, nil
}
