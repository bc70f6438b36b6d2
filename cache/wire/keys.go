package wire

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// KeySize is the length of a key in bytes.
const KeySize = 32

// Key is a secret that both sides share.
type Key [KeySize]byte

// KeyID names a key without telling it, so that the old and the new one both work during a rotation.
type KeyID [8]byte

// ID is the key's name.
func (k Key) ID() KeyID {
	mac := hmac.New(sha256.New, k[:])
	mac.Write([]byte("stepcache key id"))
	return KeyID(mac.Sum(nil)[:8])
}

// String keeps keys out of logs.
func (k Key) String() string { return "key " + hex.EncodeToString(k.id()) }

// GoString keeps keys out of %#v.
func (k Key) GoString() string { return k.String() }

func (k Key) id() []byte { id := k.ID(); return id[:] }

// Keys are the keys of one Dataset by role. The first of each is the current one, which is what a
// client uses; a server accepts all.
type Keys struct {
	Read, Write, Control []Key
}

// Of are the keys of one role.
func (k Keys) Of(r Role) []Key {
	switch r {
	case RoleRead:
		return k.Read
	case RoleWrite:
		return k.Write
	case RoleControl:
		return k.Control
	}
	return nil
}

// Has says whether there is a key of role r with the given name.
func (k Keys) Has(r Role, id KeyID) bool {
	_, ok := k.find(r, id)
	return ok
}

// find is the key of role r with the given name.
func (k Keys) find(r Role, id KeyID) (Key, bool) {
	for _, key := range k.Of(r) {
		if key.ID() == id {
			return key, true
		}
	}
	return Key{}, false
}

func (r Role) String() string {
	switch r {
	case RoleRead:
		return "read"
	case RoleWrite:
		return "write"
	case RoleControl:
		return "control"
	}
	return "unknown role"
}

// GenerateKeys makes one random key for each role.
func GenerateKeys() Keys {
	one := func() []Key {
		var k Key
		rand.Read(k[:]) // never fails: the runtime aborts rather than return an error
		return []Key{k}
	}
	return Keys{Read: one(), Write: one(), Control: one()}
}

// roles are the key files, by role.
var roles = []Role{RoleRead, RoleWrite, RoleControl}

// maxKeyFile bounds a key file; it is far more keys than a rotation needs.
const maxKeyFile = 16 << 10

// WriteKeys writes the files read, write and control into dir, one hex key a line, readable by the
// owner only. A role without keys gets no file. Each file is replaced at once, never half.
func WriteKeys(dir string, k Keys) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("keys: %w", err)
	}
	for _, r := range roles {
		path := filepath.Join(dir, r.String())
		if len(k.Of(r)) == 0 {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("keys: %w", err)
			}
			continue
		}
		tmp := path + ".new"
		if err := os.WriteFile(tmp, FormatKeys(k.Of(r)), 0o600); err != nil {
			return fmt.Errorf("keys: %w", err)
		}
		if err := os.Rename(tmp, path); err != nil {
			return fmt.Errorf("keys: %w", err)
		}
	}
	return nil
}

// FormatKeys is the content of a key file, or of a key of a Secret that is mounted as one.
func FormatKeys(keys []Key) []byte {
	var b bytes.Buffer
	for _, key := range keys {
		b.WriteString(hex.EncodeToString(key[:]))
		b.WriteByte('\n')
	}
	return b.Bytes()
}

// LoadKeys reads the files read, write and control of dir (a mounted Secret). Some may be missing: a
// reader is given the read key only. Errors name the file and the line, never the key.
func LoadKeys(dir string) (Keys, error) {
	var k Keys
	found := false
	for _, r := range roles {
		path := filepath.Join(dir, r.String())
		b, err := readBounded(path, maxKeyFile)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return Keys{}, fmt.Errorf("keys: %w", err)
		}
		keys, err := ParseKeys(b)
		if err != nil {
			return Keys{}, fmt.Errorf("keys: %s: %w", path, err)
		}
		found = true
		switch r {
		case RoleRead:
			k.Read = keys
		case RoleWrite:
			k.Write = keys
		case RoleControl:
			k.Control = keys
		}
	}
	if !found {
		return Keys{}, fmt.Errorf("keys: %s has none of the files read, write and control: mount the Dataset's key Secret there: %w", dir, fs.ErrNotExist)
	}
	return k, nil
}

func readBounded(path string, limit int64) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > limit {
		return nil, fmt.Errorf("%s is not a regular file of at most %d bytes", path, limit)
	}
	return os.ReadFile(path)
}

// ParseKeys reads what a key file holds: one hex key a line. Errors name the line, never the key.
func ParseKeys(b []byte) ([]Key, error) {
	var keys []Key
	for i, line := range bytes.Split(b, []byte("\n")) {
		line = bytes.TrimSpace(line)
		if len(line) == 0 {
			continue
		}
		var k Key
		if len(line) != hex.EncodedLen(KeySize) {
			return nil, fmt.Errorf("line %d has %d characters: a key is %d hex digits", i+1, len(line), hex.EncodedLen(KeySize))
		}
		if _, err := hex.Decode(k[:], line); err != nil {
			return nil, fmt.Errorf("line %d: a key is %d hex digits", i+1, hex.EncodedLen(KeySize))
		}
		keys = append(keys, k)
	}
	if len(keys) == 0 {
		return nil, errors.New("no key in it: write one of 64 hex digits on a line")
	}
	return keys, nil
}

// KeyWatcher holds the keys of a folder and reads them again when asked, at most once in an interval,
// so that a rotation needs no restart. It has no goroutine. Files that no longer parse leave the keys
// as they were; Err tells.
type KeyWatcher struct {
	dir   string
	every time.Duration
	now   func() time.Time

	mu      sync.Mutex
	keys    Keys
	checked time.Time
	reading bool
	err     error
}

// WatchKeys loads the keys of dir and watches them. now is the clock; nil means time.Now.
func WatchKeys(dir string, now func() time.Time) (*KeyWatcher, error) {
	if now == nil {
		now = time.Now
	}
	k, err := LoadKeys(dir)
	if err != nil {
		return nil, err
	}
	return &KeyWatcher{dir: dir, every: time.Second, now: now, keys: k, checked: now()}, nil
}

// Keys are the keys in force.
func (w *KeyWatcher) Keys() Keys {
	w.mu.Lock()
	if w.reading || w.now().Sub(w.checked) < w.every {
		defer w.mu.Unlock()
		return w.keys
	}
	w.reading = true
	w.mu.Unlock()

	// Not under the lock: a folder that hangs must not stop the handshakes of others.
	k, err := LoadKeys(w.dir)

	w.mu.Lock()
	defer w.mu.Unlock()
	w.reading, w.checked, w.err = false, w.now(), err
	if err == nil {
		w.keys = k
	}
	return w.keys
}

// Err is why the keys could not be read again the last time; nil when they could.
func (w *KeyWatcher) Err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}
