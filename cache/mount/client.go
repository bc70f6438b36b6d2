package mount

import (
	"context"
	"os"
	"time"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/client"
)

// FromClient reads, leases and asks for residency through a client of the tier.
func FromClient(c *client.Client) Reader { return clientReader{c} }

type clientReader struct{ *client.Client }

var (
	_ Reader   = clientReader{}
	_ Peeker   = clientReader{}
	_ Leaser   = clientReader{}
	_ Resident = clientReader{}
	_ Holder   = clientReader{}
)

func (r clientReader) Peek(i catalog.Index, off int64, p []byte) ([][]byte, func(), bool) {
	v := r.Client.Peek(i, off, p)
	if v == nil {
		return nil, nil, false
	}
	return v.Pieces, v.Release, true
}

func (r clientReader) Lease(ctx context.Context, i catalog.Index, wait time.Duration) (Lease, error) {
	l, err := r.Client.Lease(ctx, i, wait)
	if err != nil {
		return nil, err
	}
	return clientLease{l}, nil
}

type clientLease struct{ *client.Lease }

func (l clientLease) File() *os.File { return l.Lease.File }

func (l clientLease) Lost() <-chan struct{} { return l.Lease.Lost }
