// Package s3 reads and writes the objects of a bucket (being built).
package s3

import (
	"context"
	"errors"
	"io"

	"github.com/stepcache/stepcache/cache/source"
)

// Bucket is one bucket.
type Bucket struct{}

var _ source.Source = (*Bucket)(nil)

var errUnbuilt = errors.New("s3: being built")

// Open checks config and returns the bucket it names. It sends no request.
func Open(ctx context.Context, config source.Config) (*Bucket, error) { return nil, errUnbuilt }

// URL is the canonical name of the bucket.
func (b *Bucket) URL() string { return "" }

// List implements source.Lister.
func (b *Bucket) List(ctx context.Context, prefix string, yield func(source.Object) error) error {
	return errUnbuilt
}

// Stat implements source.Stater.
func (b *Bucket) Stat(ctx context.Context, key string) (source.Object, error) {
	return source.Object{}, errUnbuilt
}

// Get implements source.Getter.
func (b *Bucket) Get(ctx context.Context, o source.Object, off, length int64) (source.Body, error) {
	return source.Body{}, errUnbuilt
}

// Put implements source.Putter.
func (b *Bucket) Put(ctx context.Context, key string, r io.Reader, size int64) (source.Object, error) {
	return source.Object{}, errUnbuilt
}

// Delete implements source.Deleter.
func (b *Bucket) Delete(ctx context.Context, key string) error { return errUnbuilt }
