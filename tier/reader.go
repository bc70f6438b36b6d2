package tier

import (
	"context"
	"os"
	"time"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/mount"
)

// Reader is a client as a mount reads it.
type Reader struct{ *client.Client }

var (
	_ mount.Reader   = Reader{}
	_ mount.Leaser   = Reader{}
	_ mount.Resident = Reader{}
)

// Lease implements mount.Leaser.
func (r Reader) Lease(ctx context.Context, i catalog.Index, wait time.Duration) (mount.Lease, error) {
	l, err := r.Client.Lease(ctx, i, wait)
	if err != nil {
		return nil, err
	}
	return lease{l}, nil
}

type lease struct{ *client.Lease }

func (l lease) File() *os.File { return l.Lease.File }
