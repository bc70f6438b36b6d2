// Package tier turns a Dataset into what its processes read, and is how a reader finds a running tier.
//
// It owns two translations: from the API's Dataset to a worker's configuration, and from a folder (a
// ConfigMap and a Secret on a cluster, files of `stepcache local` on one machine) to a connected client.
// Concurrency: functions are pure but for the files they read. Failure: errors name the Dataset or the
// folder and the way out.
//
// It may import api/v1alpha1 and cache/...; local, cmd and the controllers import it.
package tier

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/cache/worker"
)

// Env is the environment variable that names the folder of a running tier.
const Env = "STEPCACHE_TIER"

// Names of the files of a tier's folder.
const (
	infoFile       = "tier.json"
	membershipFile = "membership.json"
	keysDir        = "keys"
)

// Folder is where a reader finds one Dataset's tier.
type Folder struct {
	// Dir is the folder itself.
	Dir string `json:"-"`
	// Dataset is namespace/name.
	Dataset string `json:"dataset"`
	// Node is the name of this machine among the members' nodes: workers of the same node hand out
	// descriptors. Empty: none is.
	Node string `json:"node,omitempty"`
	// Copies is how many workers hold each block; zero means 1.
	Copies int `json:"copies,omitempty"`
	// Snapshots is a folder in which the readers of this machine share listings, mapped. Empty: each has
	// its own in memory.
	Snapshots string `json:"snapshots,omitempty"`
}

// MembershipFile is the list of workers (ring.Membership as JSON).
func (f Folder) MembershipFile() string { return filepath.Join(f.Dir, membershipFile) }

// KeysDir is the folder of the keys that this reader was given.
func (f Folder) KeysDir() string { return filepath.Join(f.Dir, keysDir) }

// Write makes the folder's own file.
func (f Folder) Write() error {
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(f.Dir, infoFile), append(b, '\n'), 0o600)
}

// Open reads a folder; one above the folders of several tiers is an error that lists them.
func Open(dir string) (Folder, error) {
	if dir == "" {
		return Folder{}, fmt.Errorf("no tier given: set --tier or %s to the folder that `stepcache local` prints", Env)
	}
	b, err := os.ReadFile(filepath.Join(dir, infoFile))
	if errors.Is(err, fs.ErrNotExist) {
		return Folder{}, fmt.Errorf("%s is not the folder of a tier (it has no %s); is `stepcache local` still running?", dir, infoFile)
	}
	if err != nil {
		return Folder{}, fmt.Errorf("tier: %w", err)
	}
	f := Folder{}
	if err := json.Unmarshal(b, &f); err != nil || f.Dataset == "" {
		return Folder{}, fmt.Errorf("tier %s: %s does not name a Dataset: %v", dir, infoFile, err)
	}
	f.Dir = dir
	return f, nil
}

// All are the tiers below a folder: the folder itself, or those one level down.
func All(dir string) ([]Folder, error) {
	f, err := Open(dir)
	if err == nil {
		return []Folder{f}, nil
	}
	inside, globErr := filepath.Glob(filepath.Join(dir, "*", infoFile))
	if globErr != nil || len(inside) == 0 {
		return nil, err
	}
	var all []Folder
	for _, path := range inside {
		f, err := Open(filepath.Dir(path))
		if err != nil {
			return nil, err
		}
		all = append(all, f)
	}
	return all, nil
}

// snapshotsKept is how many snapshots the readers of a tier on one machine leave to each other: some, since a
// Dataset that is refreshed has mounts of older ones.
const snapshotsKept = 8

// ClientConfig is what client.Dial needs to read the dataset.
func (f Folder) ClientConfig() (client.Config, error) {
	keys, err := wire.LoadKeys(f.KeysDir())
	if err != nil {
		return client.Config{}, fmt.Errorf("tier %s: %w", f.Dataset, err)
	}
	return client.Config{
		Dataset: f.Dataset, MembershipFile: f.MembershipFile(), Keys: keys, Node: f.Node, Copies: f.Copies,
		SnapshotDir: f.Snapshots, SnapshotsKept: snapshotsKept,
	}, nil
}

// Dial connects a reader.
func (f Folder) Dial(ctx context.Context) (*client.Client, error) {
	c, err := f.ClientConfig()
	if err != nil {
		return nil, err
	}
	return client.Dial(ctx, c)
}

// Control asks the workers' control endpoints; it needs the control key in the folder.
func (f Folder) Control() (*client.Control, error) {
	keys, err := wire.LoadKeys(f.KeysDir())
	if err != nil {
		return nil, fmt.Errorf("tier %s: %w", f.Dataset, err)
	}
	return client.NewControl(client.ControlConfig{Dataset: f.Dataset, MembershipFile: f.MembershipFile(), Keys: keys})
}

// WorkerConfig is the part of a worker's configuration that follows from the Dataset alone. secrets
// names the folder that holds the files of a Secret.
func WorkerConfig(d *v1alpha1.Dataset, secrets func(name string) string) (worker.Config, error) {
	c := worker.Config{
		Dataset: d.Namespace + "/" + d.Name,
		Memory:  d.Spec.Workers.MemoryBytes(),
		Copies:  int(d.Spec.Workers.Copies),
	}
	if every, ok := d.Spec.Refresh.Every(); ok {
		c.Refresh = worker.Duration(every)
	}
	for i := range d.Spec.Mounts {
		m := &d.Spec.Mounts[i]
		w := worker.Mount{Path: m.Path, Config: source.Config{
			URL: m.Source, Endpoint: m.Endpoint, Region: m.Region,
			Addressing: addressing(m.AddressingStyle),
			Ambient:    m.Ambient, Anonymous: m.Anonymous, AllowUnversioned: m.AllowUnversioned,
		}}
		if ref := m.CredentialsSecretRef; ref != nil {
			w.CredentialsDir, w.CredentialKeys = secrets(ref.Name), ref.Map()
		}
		if name := m.ReaderSecret(d.Namespace); name != "" {
			w.CredentialsDir = secrets(name)
		}
		c.Mounts = append(c.Mounts, w)
	}
	return c, nil
}

func addressing(s v1alpha1.AddressingStyle) source.Addressing {
	if s == v1alpha1.AddressingAuto {
		return ""
	}
	return source.Addressing(s)
}

// DialTimeout is how long a command of a person waits for the workers to have listed the bucket.
const DialTimeout = 2 * time.Minute
