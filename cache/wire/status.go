package wire

import (
	"context"
	"errors"
	"io"

	"github.com/stepcache/stepcache/cache/source"
)

// statusError is a reply that is not OK: the worker's own words, and the error that callers test for.
type statusError struct {
	msg string
	err error
}

func (e *statusError) Error() string {
	if e.msg == "" {
		return e.err.Error()
	}
	return e.msg
}

func (e *statusError) Unwrap() error { return e.err }

// Err is the error of a reply with this status whose payload is msg; nil for OK. It wraps the error of
// the status (ErrNotOwner, source.ErrChanged and so on). A status that this version does not know is
// ErrInternal: another worker may serve the request.
func (s Status) Err(msg string) error {
	if s == OK {
		return nil
	}
	err := statusErrors[s]
	if err == nil {
		err = ErrInternal
	}
	return &statusError{msg: msg, err: err}
}

// order is the order in which StatusOf tests, so that its answer does not depend on a map: an error
// that says two things is the more final one of them.
var order = []Status{
	Changed, NotFound, Denied, NoBucket, Unversioned, Invalid, UnknownSnapshot, NotOwner, NotResident,
	Overloaded, Throttled, Unavailable, Late, Internal,
}

// StatusOf is the status that tells a reader of err.
func StatusOf(err error) Status {
	if err == nil {
		return OK
	}
	for _, s := range order {
		if errors.Is(err, statusErrors[s]) {
			return s
		}
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return Late
	case errors.Is(err, context.Canceled), errors.Is(err, io.ErrUnexpectedEOF):
		return Unavailable
	case errors.Is(err, source.ErrReadOnly):
		return Invalid
	}
	return Internal
}

// Text bounds a message for people to what a reply may carry.
func Text(msg string) []byte {
	if len(msg) > MaxMessage {
		msg = msg[:MaxMessage]
	}
	return []byte(msg)
}

// String names the status in messages and metrics.
func (s Status) String() string {
	if s == OK {
		return "ok"
	}
	if err := statusErrors[s]; err != nil {
		return err.Error()
	}
	return "unknown status"
}
