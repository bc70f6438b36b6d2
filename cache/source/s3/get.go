package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/source"
)

// Get implements source.Getter: one GET, bound by If-Match. A store or a proxy may ignore If-Match or
// Range, so the answer must itself be of the version and range asked for.
func (b *Bucket) Get(ctx context.Context, o source.Object, off, length int64) (source.Body, error) {
	if off < 0 || length < 0 || off+length < off || off+length > o.Size {
		return source.Body{}, b.invalid("get", o.Key, fmt.Errorf("range %d+%d is not within %d bytes", off, length, o.Size))
	}
	var options minio.GetObjectOptions
	switch {
	case o.Version == "":
		return source.Body{}, &source.Error{Op: "get", Name: b.object(o.Key), Kind: source.ErrUnversioned,
			Hint: "stat it first, or set allowUnversioned"}
	case strings.HasPrefix(o.Version, timePrefix):
		// No If-Unmodified-Since: stores compare it with a finer time than they tell. check compares.
	default:
		options.Set("If-Match", `"`+o.Version+`"`)
	}
	if length == 0 {
		return source.Body{ReadCloser: http.NoBody}, nil
	}
	whole := length == o.Size
	if whole {
		options.Set("x-amz-checksum-mode", "ENABLED")
	} else {
		options.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+length-1))
	}
	ctx, seen := watch(ctx)
	body, info, header, err := b.core.GetObject(ctx, b.name, o.Key, options)
	if err == nil && decoded(seen, info) {
		_ = body.Close() // its bytes may be others than the store holds
		asStored(&options)
		body, info, header, err = b.core.GetObject(ctx, b.name, o.Key, options)
	}
	if err != nil {
		err = b.fail(ctx, "get", o.Key, seen, err)
		var e *source.Error
		if errors.As(err, &e) && seen.status == http.StatusRequestedRangeNotSatisfiable {
			e.Kind = source.ErrChanged // the range lies within the size of the version asked for
		}
		return source.Body{}, err
	}
	b.has()
	if err := b.check(o, off, length, whole, seen, info, header); err != nil {
		_ = body.Close() // its bytes are not those asked for
		return source.Body{}, err
	}
	return source.Body{
		ReadCloser: &reader{body: body, bucket: b, ctx: ctx, key: o.Key, left: length, bounded: info.Size >= 0},
		Digest:     digest(info, whole),
	}, nil
}

// decoded says whether an answer may be about other bytes than are stored: the stores of Google and Cloudflare decode an
// object with a Content-Encoding for who does not accept it, and then leave its length out. A range tells its own.
func decoded(seen *answer, info minio.ObjectInfo) bool {
	return info.Size < 0 && seen.status == http.StatusOK
}

// asStored asks not to decode. It is not asked always, since Cloudflare's store then tells no length of other objects.
func asStored(options *minio.GetObjectOptions) { options.Set("Accept-Encoding", "gzip") }

// noLength refuses an answer whose bytes nothing bounds.
func (b *Bucket) noLength(op, key string) error {
	return &source.Error{Op: op, Name: b.object(key), Kind: source.ErrInvalid,
		Err:  errors.New("the answer tells no length, as where a Content-Encoding is decoded on the way"),
		Hint: "put the object without Content-Encoding, or use the store's own endpoint"}
}

// check compares the answer with the question.
func (b *Bucket) check(o source.Object, off, length int64, whole bool, seen *answer, info minio.ObjectInfo, header http.Header) error {
	changed := func(format string, args ...any) error {
		return &source.Error{Op: "get", Name: b.object(o.Key), Kind: source.ErrChanged, Err: fmt.Errorf(format, args...)}
	}
	if decoded(seen, info) {
		return b.noLength("get", o.Key)
	}
	version, err := b.version("get", o.Key, info)
	if err != nil {
		return err
	}
	if version != o.Version {
		return changed("the store has version %s, asked was %s", version, o.Version)
	}
	if enc := header.Get("Content-Encoding"); seen.uncompressed {
		return b.invalid("get", o.Key, fmt.Errorf("the answer was decoded from %q on the way", enc))
	}
	if whole {
		if seen.status != http.StatusOK {
			return b.invalid("get", o.Key, fmt.Errorf("status %d for the whole object", seen.status))
		}
		if info.Size != o.Size {
			return changed("the store has %d bytes, asked were %d", info.Size, o.Size)
		}
		return nil
	}
	want := fmt.Sprintf("bytes %d-%d/", off, off+length-1)
	total, ok := strings.CutPrefix(header.Get("Content-Range"), want)
	if seen.status != http.StatusPartialContent || !ok {
		return &source.Error{Op: "get", Name: b.object(o.Key), Kind: source.ErrInvalid,
			Err:  fmt.Errorf("asked for %s%d, answered %d with range %q", want, o.Size, seen.status, header.Get("Content-Range")),
			Hint: "the store or a proxy before it does not keep to Range requests; use its own endpoint"}
	}
	if total != "*" && total != strconv.FormatInt(o.Size, 10) {
		return changed("the store has %s bytes, asked was a version of %d", total, o.Size)
	}
	if info.Size >= 0 && info.Size != length {
		return b.invalid("get", o.Key, fmt.Errorf("asked for %d bytes, answered %d", length, info.Size))
	}
	return nil
}

// reader yields exactly the bytes asked for.
type reader struct {
	body   io.ReadCloser
	bucket *Bucket
	ctx    context.Context
	key    string
	left   int64
	// bounded says that the answer told its length, which body does not exceed.
	bounded bool
	err     error
}

func (r *reader) Read(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	if r.left == 0 {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), r.left)]
	n, err := r.body.Read(p)
	r.left -= int64(n)
	if n > 0 && r.left == 0 && !r.bounded {
		if more, _ := io.ReadFull(r.body, make([]byte, 1)); more > 0 { // the last bytes are kept back: who has them asks no more
			r.err = r.bucket.invalid("get", r.key, errors.New("the answer is longer than what was asked for"))
			return 0, r.err
		}
	}
	switch {
	case r.left == 0:
		err = nil // all that was asked for is here, however the connection ended
	case errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		kind := source.ContextKind(r.ctx)
		if kind == nil {
			kind = source.ErrUnavailable
		}
		r.err = &source.Error{Op: "get", Name: r.bucket.object(r.key), Kind: kind, Err: err}
		return n, r.err
	}
	if r.left == 0 {
		return n, io.EOF
	}
	return n, nil
}

func (r *reader) Close() error { return r.body.Close() }
