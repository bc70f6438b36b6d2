// Package scheme opens a source by the scheme of its URL.
//
// It owns the choice of the implementation and the order of the decorators, and nothing else.
// Concurrency and failure: as package source says. It may import cache/source and its sub-packages.
package scheme

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/file"
	"github.com/stepcache/stepcache/cache/source/oss"
	"github.com/stepcache/stepcache/cache/source/s3"
)

const (
	// stallAfter is how long a request may show no sign of life: three tries fit into the time of a retry.
	stallAfter = 6 * time.Second
	// slowAfter is the same for a page of a list and a bulk delete: S3 has been seen to take two minutes to find its way
	// past the markers of deleted versions. That nobody is there to connect to shows before, within seconds.
	slowAfter = 150 * time.Second
)

// Source is an opened source with its decorators: retry around limit around measure around stall around the store.
// Measure is innermost, so that its figures are what the store saw, tries that failed included; retry is
// outermost, so that a try that waits holds no place among the requests under way.
type Source struct {
	source.Source
	// Meter counts what the store was asked and what it sent.
	Meter *source.Meter
}

// Option changes how Open decorates.
type Option func(*source.RetryOptions)

// Elapsed bounds the time that one operation is retried for.
func Elapsed(d time.Duration) Option { return func(o *source.RetryOptions) { o.Elapsed = d } }

// Logger is told of stores that are slow or unreachable, at a low rate.
func Logger(l *slog.Logger) Option { return func(o *source.RetryOptions) { o.Logger = l } }

// Open opens the source of c.URL. It sends no request, and missing credentials are no error yet: they
// may come later, and each request says what is missing until then.
func Open(ctx context.Context, c source.Config, options ...Option) (*Source, error) {
	var retry source.RetryOptions
	for _, o := range options {
		o(&retry)
	}
	s, err := open(ctx, c)
	if err != nil {
		return nil, err
	}
	meter := source.NewMeter(s.URL())
	s = source.Measure(source.Stall(s, stallAfter, slowAfter), meter)
	s = source.Limit(s, source.LimitOptions{Requests: c.MaxRequests, BytesPerSecond: c.BytesPerSecond, Meter: meter})
	return &Source{Source: source.Retry(s, retry), Meter: meter}, nil
}

func open(ctx context.Context, c source.Config) (source.Source, error) {
	scheme, _, _, err := source.Split(c.URL)
	if err != nil {
		return nil, err
	}
	// Each Open returns a pointer of its own type, which must not become an interface when it is nil.
	switch scheme {
	case "s3":
		s, err := s3.Open(ctx, c)
		if err != nil {
			return nil, err
		}
		return s, nil
	case "oss":
		s, err := oss.Open(ctx, c)
		if err != nil {
			return nil, err
		}
		return s, nil
	case "dataset":
		return nil, &source.Error{Op: "open", Name: c.URL, Kind: source.ErrInvalid, Err: errors.New("another Dataset's tier is no object store"), Hint: "only workers on a cluster read it; mount its bucket here"}
	default: // Split knows no other
		s, err := file.Open(ctx, c)
		if err != nil {
			return nil, err
		}
		return s, nil
	}
}

// Prefix is the key prefix that a listing of the source with this URL starts from: what follows the
// bucket, or nothing for a local folder.
func Prefix(url string) string {
	scheme, _, prefix, err := source.Split(url)
	if err != nil || scheme == "file" {
		return ""
	}
	return prefix
}
