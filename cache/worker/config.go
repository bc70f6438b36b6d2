package worker

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/scheme"
)

// Config is what `stepcache worker --config FILE` reads, in JSON. The controller and local mode write it.
type Config struct {
	// Dataset is the name that handshakes are bound to: namespace/name.
	Dataset string `json:"dataset"`
	// ID is this worker's member id.
	ID string `json:"id"`
	// Mounts are the sources and where they appear in the dataset.
	Mounts []Mount `json:"mounts"`
	// Memory is the store's quota in bytes. The folder Dir needs a little more: snapshots are kept there too.
	Memory int64 `json:"memory"`
	// Dir is a folder on tmpfs that belongs to this worker. What it holds is served again after a restart.
	Dir string `json:"dir"`
	// MembershipFile holds the ring.Membership; read again when it changes. Empty: this worker is alone.
	MembershipFile string `json:"membershipFile,omitempty"`
	// KeysDir has the files read, write and control (wire.LoadKeys); read again when they change.
	KeysDir string `json:"keysDir"`
	// Listen is the address of the block protocol, Control that of HTTP. A port of 0 picks a free one.
	Listen  string `json:"listen"`
	Control string `json:"control"`
	// Socket is the path of the Unix socket that hands out descriptors. Empty: none.
	Socket string `json:"socket,omitempty"`
	// Copies is how many workers hold each block; zero means 1.
	Copies int `json:"copies,omitempty"`
	// Refresh is how often the bucket is listed again; zero means never (only on request).
	Refresh Duration `json:"refresh,omitempty"`
	// ScrubBytesPerSecond bounds how fast whole objects are hashed again to compare them with the bucket's
	// digest; zero means 64 MiB/s, negative turns it off.
	ScrubBytesPerSecond int64 `json:"scrubBytesPerSecond,omitempty"`
	// Gateway serves the dataset over S3's protocol and accepts writes. nil: it is read-only.
	Gateway *GatewayConfig `json:"gateway,omitempty"`
	// Write says when a write is acknowledged.
	Write WriteConfig `json:"write,omitzero"`
}

// Mount is one source and its place in the dataset.
type Mount struct {
	source.Config
	// Path is where the mount appears: "/" or "/a/b".
	Path string `json:"path"`
}

// Duration is a time.Duration that is written like "10m" in JSON.
type Duration time.Duration

// MarshalJSON implements json.Marshaler.
func (d Duration) MarshalJSON() ([]byte, error) { return json.Marshal(time.Duration(d).String()) }

// UnmarshalJSON implements json.Unmarshaler.
func (d *Duration) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("a duration is written like \"10m\": %w", err)
	}
	if s == "" {
		*d = 0
		return nil
	}
	v, err := time.ParseDuration(s)
	if err != nil {
		return err
	}
	*d = Duration(v)
	return nil
}

// LoadConfig reads and validates a Config. A field that it does not know is an error: a misspelt setting
// must not be a silent default. set, which may be nil, fills in what the file, which the workers of a
// dataset share, cannot say.
func LoadConfig(path string, set func(*Config)) (Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return Config{}, fmt.Errorf("worker config: %w", err)
	}
	defer f.Close()
	var c Config
	d := json.NewDecoder(f)
	d.DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return Config{}, fmt.Errorf("worker config %s: %w", path, err)
	}
	if set != nil {
		set(&c)
	}
	if err := c.Validate(); err != nil {
		return Config{}, fmt.Errorf("worker config %s: %w", path, err)
	}
	return c, nil
}

// defaultScrub is the default of ScrubBytesPerSecond: a tenth of one core's hashing.
const defaultScrub = 64 << 20

// Validate says everything that is wrong with c at once.
func (c Config) Validate() error {
	var errs []error
	need := func(value, field, why string) {
		if value == "" {
			errs = append(errs, fmt.Errorf("%s is empty: %s", field, why))
		}
	}
	need(c.Dataset, "dataset", "set namespace/name")
	need(c.ID, "id", "set this worker's member id")
	need(c.Dir, "dir", "set a folder on tmpfs")
	need(c.KeysDir, "keysDir", "set the folder of the Dataset's key Secret")
	need(c.Listen, "listen", "set host:port for the block protocol")
	need(c.Control, "control", "set host:port for HTTP")
	if c.Memory < ring.BlockSize {
		errs = append(errs, fmt.Errorf("memory is %d bytes: a worker needs at least one block of %d", c.Memory, ring.BlockSize))
	}
	if len(c.Mounts) == 0 {
		errs = append(errs, errors.New("mounts is empty: set at least one source"))
	}
	if c.Copies < 0 {
		errs = append(errs, fmt.Errorf("copies is %d: set 1 or more", c.Copies))
	}
	if c.Refresh < 0 {
		errs = append(errs, fmt.Errorf("refresh is %v: set a positive duration, or none for never", time.Duration(c.Refresh)))
	}
	// The kernel's sun_path holds 108 bytes with its ending zero, and listenSocket needs one.
	if len(c.Socket) > 106 {
		errs = append(errs, fmt.Errorf("socket %s has %d characters: the path of a Unix socket may have 106 here", c.Socket, len(c.Socket)))
	}
	for i, m := range c.Mounts {
		if _, _, _, err := source.Split(m.URL); err != nil {
			errs = append(errs, fmt.Errorf("mounts[%d]: %w", i, err))
		}
		if !strings.HasPrefix(m.Path, "/") || filepath.Clean(m.Path) != m.Path {
			errs = append(errs, fmt.Errorf("mounts[%d]: path %q is not a clean absolute path such as / or /a/b", i, m.Path))
		}
		for j, o := range c.Mounts[:i] {
			if overlap(m.Path, o.Path) {
				errs = append(errs, fmt.Errorf("mounts[%d] and mounts[%d]: paths %q and %q overlap", j, i, o.Path, m.Path))
			}
		}
	}
	return errors.Join(append(errs, c.validateGateway()...)...)
}

// overlap says whether one path is the other or above it.
func overlap(a, b string) bool {
	below := func(a, b string) bool { return a == b || b == "/" || strings.HasPrefix(a, b+"/") }
	return below(a, b) || below(b, a)
}

// catalogMount is m as a listing sees it; url is the canonical name of its opened source.
func (m Mount) catalogMount(url string) catalog.Mount {
	return catalog.Mount{URL: url, Prefix: scheme.Prefix(m.URL), Path: m.Path, AllowUnversioned: m.AllowUnversioned}
}
