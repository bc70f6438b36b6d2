package objects

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// kinds are the errors that travel between workers, by name. The first that fits tells.
var kinds = []struct {
	name string
	err  error
}{
	{"no_upload", gateway.ErrNoUpload}, {"bad_part", gateway.ErrBadPart}, {"part_too_small", gateway.ErrPartTooSmall},
	{"too_large", gateway.ErrTooLarge}, {"precondition", gateway.ErrPrecondition}, {"busy", gateway.ErrBusy},
	{"not_found", source.ErrNotFound}, {"no_bucket", source.ErrNoBucket}, {"changed", source.ErrChanged},
	{"denied", source.ErrDenied}, {"unversioned", source.ErrUnversioned}, {"throttled", source.ErrThrottled},
	{"unavailable", source.ErrUnavailable}, {"invalid", source.ErrInvalid}, {"read_only", source.ErrReadOnly},
	{"corrupt", wire.ErrCorrupt}, {"cut_off", io.ErrUnexpectedEOF},
}

func kindOf(err error) string {
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			return k.name
		}
	}
	if canceled(err) {
		return "unavailable"
	}
	return "internal"
}

func canceled(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// remoteError is what another worker answered: its words, and the error that callers test for.
type remoteError struct {
	member string
	text   string
	kind   error
	bucket *source.Refusal // what the bucket answered; may be nil
}

func (e *remoteError) Error() string { return "worker " + e.member + ": " + e.text }
func (e *remoteError) Unwrap() []error {
	if e.bucket == nil {
		return []error{e.kind}
	}
	return []error{e.kind, e.bucket}
}

func remote(m ring.Member, r refusal) error {
	e := &remoteError{member: m.ID, text: r.Text, kind: wire.ErrInternal, bucket: r.Bucket}
	for _, k := range kinds {
		if k.name == r.Kind {
			e.kind = k.err
		}
	}
	return e
}

// errPeer is what went wrong on the way to another worker, as against what it answered.
type errPeer struct {
	member ring.Member
	err    error
}

func (e *errPeer) Error() string {
	return fmt.Sprintf("worker %s at %s: %v", e.member.ID, e.member.Addr, e.err)
}
func (e *errPeer) Unwrap() error { return e.err }

// errStale: the other worker follows another membership.
type errStale struct {
	member ring.Member
	epoch  uint64
}

func (e *errStale) Error() string {
	return fmt.Sprintf("worker %s follows membership epoch %d", e.member.ID, e.epoch)
}

// told turns an error of the source into the one that the gateway's contract has for it.
func told(err error) error {
	for _, k := range [][2]error{
		{source.ErrNoUpload, gateway.ErrNoUpload}, {source.ErrBadPart, gateway.ErrBadPart},
		{source.ErrPartTooSmall, gateway.ErrPartTooSmall},
	} {
		if errors.Is(err, k[0]) {
			return fmt.Errorf("%w: %w", k[1], err)
		}
	}
	return err
}

// refused is told for a write that may have had conditions.
func refused(err error, o source.WriteOptions) error {
	if (o.IfMatch != "" || o.IfAbsent) && errors.Is(err, source.ErrChanged) {
		return fmt.Errorf("%w: %w", gateway.ErrPrecondition, err)
	}
	return told(err)
}
