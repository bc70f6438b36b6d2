package mount

import (
	"context"
	"errors"
	"os"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/ring"
)

// Tier is a connection with a dataset's workers for one mount: of a snapshot, or of the names where the dataset
// is writable. It must be closed after the mount has ended.
type Tier struct {
	client *client.Client // or
	names  *client.Names
}

// Connect connects. A config.Snapshot of Live is the names; one of another digest, or none in a read-only dataset,
// a snapshot.
func Connect(ctx context.Context, config client.Config) (*Tier, error) {
	names, err := dialNames(ctx, config)
	if err != nil {
		return nil, err
	}
	if names != nil {
		return &Tier{names: names}, nil
	}
	c, err := client.Dial(ctx, config)
	if err != nil {
		return nil, err
	}
	return &Tier{client: c}, nil
}

// Current is what a new mount would show, and proves that the workers take the read key.
func Current(ctx context.Context, config client.Config) (catalog.Digest, error) {
	config.Snapshot = catalog.Digest{}
	names, err := dialNames(ctx, config)
	if err != nil {
		return catalog.Digest{}, err
	}
	if names != nil {
		return Live, names.Close()
	}
	return client.Current(ctx, config)
}

// dialNames is nil where there is to be a snapshot.
func dialNames(ctx context.Context, config client.Config) (*client.Names, error) {
	if config.Snapshot != (catalog.Digest{}) && config.Snapshot != Live {
		return nil, nil
	}
	names, err := client.DialNames(ctx, config)
	if errors.Is(err, client.ErrNotWritable) && config.Snapshot != Live {
		return nil, nil
	}
	return names, err
}

// Shows names what a mount shows: the snapshot's digest, or Live.
func (t *Tier) Shows() catalog.Digest {
	if t.names == nil {
		return t.client.Snapshot().Digest()
	}
	return Live
}

// Members are the workers that are known.
func (t *Tier) Members() ring.Membership {
	if t.names == nil {
		return t.client.Members()
	}
	return t.names.Members()
}

// Client reads the snapshot; nil where the names are shown.
func (t *Tier) Client() *client.Client { return t.client }

// Mount is Mount or MountNames.
func (t *Tier) Mount(ctx context.Context, dir string, o Options) (*Server, error) {
	if t.names == nil {
		return Mount(ctx, dir, t.client.Snapshot(), FromClient(t.client), o)
	}
	return MountNames(ctx, dir, t.names, o)
}

// Serve is Serve or ServeNames. conn is used up.
func (t *Tier) Serve(ctx context.Context, conn *os.File, o Options) (*Server, error) {
	if t.names == nil {
		return Serve(ctx, conn, t.client.Snapshot(), FromClient(t.client), o)
	}
	return ServeNames(ctx, conn, t.names, o)
}

// Resume is Resume or ResumeNames. p is used up.
func (t *Tier) Resume(ctx context.Context, p *Parked, o Options) (*Server, error) {
	if t.names == nil {
		return Resume(ctx, p, t.client.Snapshot(), FromClient(t.client), o)
	}
	return ResumeNames(ctx, p, t.names, o)
}

// Close ends every read and connection.
func (t *Tier) Close() error {
	if t.names == nil {
		return t.client.Close()
	}
	return t.names.Close()
}

var (
	_ Names = (*client.Names)(nil)
)
