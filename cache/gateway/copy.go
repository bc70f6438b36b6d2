package gateway

import (
	"context"
	"encoding/xml"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/stepcache/stepcache/cache/source"
)

// origin is what x-amz-copy-source names: /bucket/key or bucket/key, percent-encoded.
func (q *request) origin() (bucket, key string, objects Objects, err error) {
	raw, version, versioned := strings.Cut(q.r.Header.Get("X-Amz-Copy-Source"), "?versionId=")
	path, err := url.PathUnescape(raw)
	if err != nil {
		return "", "", nil, badArgument("Copy Source must be URL-encoded.")
	}
	bucket, key, ok := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	if !ok || bucket == "" || key == "" {
		return "", "", nil, badArgument("Copy Source must mention the source bucket and key: sourcebucket/sourcekey.")
	}
	if versioned {
		if err := current(version); err != nil {
			return "", "", nil, err
		}
	}
	if objects, ok = q.Buckets[bucket]; !ok {
		return "", "", nil, failure(http.StatusNotFound, "NoSuchBucket", "The bucket of the copy's source does not exist.")
	}
	return bucket, key, objects, ValidKey(key)
}

type copied struct {
	LastModified string
	ETag         string
}

// copyTries is how often a copy is begun anew because its source has another version by now.
const copyTries = 3

func (q *request) copy() error {
	w, err := q.mustWrite()
	if err != nil {
		return err
	}
	if err := q.ignore(); err != nil {
		return err
	}
	bucket, key, objects, err := q.origin()
	if err != nil {
		return err
	}
	o, err := q.options(true)
	if err != nil {
		return err
	}
	replace := false
	switch directive := q.r.Header.Get("X-Amz-Metadata-Directive"); directive {
	case "", "COPY":
		if bucket == q.bucket && key == q.key {
			return failure(http.StatusBadRequest, "InvalidRequest", "This copy request is illegal because it is trying to copy an object to itself without changing the object's metadata, storage class, website redirect location or encryption attributes.")
		}
	case "REPLACE":
		replace = true
	default:
		return badArgument("Unknown metadata directive.")
	}
	return q.slowly(func() (any, error) {
		var info Info
		var err error
		for range copyTries {
			if info, err = q.copyOnce(w, bucket == q.bucket, objects, key, o, replace); !errors.Is(err, source.ErrChanged) {
				break
			}
		}
		if err != nil {
			return nil, err
		}
		return struct {
			XMLName xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ CopyObjectResult"`
			copied
		}{copied: copied{stamp(info.ModTime), quote(info.ETag)}}, nil
	})
}

func (q *request) copyOnce(w Writer, same bool, objects Objects, key string, o PutOptions, replace bool) (Info, error) {
	from, err := objects.Stat(q.r.Context(), key)
	if err != nil {
		return Info{}, err
	}
	if err := conditions(q.r.Header, "X-Amz-Copy-Source-", from, errPrecondition); err != nil {
		return Info{}, err
	}
	if !replace {
		o.ContentType, o.Headers, o.Metadata = from.ContentType, maps.Clone(from.Headers), maps.Clone(from.Metadata)
	}
	if same {
		return w.Copy(q.r.Context(), from, q.key, o)
	}
	var info Info
	err = pipe(q.r.Context(), objects, from, 0, from.Size, func(r io.Reader) error {
		var err error
		info, err = w.Put(q.r.Context(), q.key, from.Size, r, o)
		return err
	})
	return info, err
}

// pipe gives put a reader of a range of the very version from names.
func pipe(ctx context.Context, objects Objects, from Info, off, n int64, put func(io.Reader) error) error {
	object, err := objects.Open(ctx, from.Key)
	if err != nil {
		return err
	}
	defer object.Close()
	if now := object.Info(); now.ETag != from.ETag || now.Size != from.Size {
		return source.ErrChanged
	}
	r, w := io.Pipe()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		var err error
		if n > 0 {
			err = object.WriteRange(ctx, w, off, n)
		}
		w.CloseWithError(err) // nil is the end
	}()
	defer func() {
		r.Close()
		<-ended
	}()
	return put(r)
}

// putPartCopy stores a range of an object as a part.
func (q *request) putPartCopy(m Multipart, upload string, number int) error {
	if err := q.ignore(); err != nil {
		return err
	}
	_, key, objects, err := q.origin()
	if err != nil {
		return err
	}
	return q.slowly(func() (any, error) {
		from, err := objects.Stat(q.r.Context(), key)
		if err != nil {
			return nil, err
		}
		if err := conditions(q.r.Header, "X-Amz-Copy-Source-", from, errPrecondition); err != nil {
			return nil, err
		}
		off, n, err := copyRange(q.r.Header.Get("X-Amz-Copy-Source-Range"), from.Size)
		if err != nil {
			return nil, err
		}
		var part Part
		err = pipe(q.r.Context(), objects, from, off, n, func(r io.Reader) error {
			var err error
			part, err = m.PutPart(q.r.Context(), q.key, upload, number, n, r, source.Sums{})
			return err
		})
		if err != nil {
			return nil, err
		}
		return struct {
			XMLName xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ CopyPartResult"`
			copied
		}{copied: copied{stamp(part.ModTime), quote(part.ETag)}}, nil
	})
}

// copyRange is stricter than a Range header: both ends are given, and lie within the object.
func copyRange(header string, size int64) (off, n int64, err error) {
	if header == "" {
		return 0, size, nil
	}
	first, last, _ := strings.Cut(strings.TrimPrefix(header, "bytes="), "-")
	from, err1 := strconv.ParseInt(first, 10, 64)
	to, err2 := strconv.ParseInt(last, 10, 64)
	if !strings.HasPrefix(header, "bytes=") || err1 != nil || err2 != nil || from < 0 || to < from {
		return 0, 0, badArgument("The x-amz-copy-source-range value must be of the form bytes=first-last where first and last are the zero-based offsets of the first and last bytes to copy.")
	}
	if to >= size {
		return 0, 0, badArgument("Range specified is not valid for source object of size: %d.", size)
	}
	return from, to - from + 1, nil
}
