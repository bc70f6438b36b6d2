package oss

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/stepcache/stepcache/cache/source"
)

var _ source.Writer = (*Bucket)(nil)

const (
	// metaPrefix begins the headers of the user's own metadata.
	metaPrefix = "X-Oss-Meta-"
	// maxCopy is the most that one request copies.
	maxCopy = 5 << 30
	// copySlack is how long the store may take for that.
	copySlack = 5 * time.Minute
	// maxHeldPart is the largest part that is held to be sent again; a larger one cannot be sent: the SDK's
	// signature wants its length, and a stream cannot be repeated when the connection breaks.
	maxHeldPart = 64 << 20
	// maxList bounds the text of a list of parts or uploads.
	maxList = 4 << 20
)

// keptHeaders are the headers that the store keeps with an object besides Content-Type.
var keptHeaders = []string{"Cache-Control", "Content-Disposition", "Content-Encoding", "Content-Language", "Expires"}

// attributes are the headers of a request that makes an object.
func attributes(a source.Attributes) map[string]string {
	h := map[string]string{"Content-Type": contentType}
	if a.ContentType != "" {
		h["Content-Type"] = a.ContentType
	}
	for k, v := range a.Headers {
		h[k] = v
	}
	for k, v := range a.Metadata {
		h[http.CanonicalHeaderKey(metaPrefix+k)] = v // so that a put's nonce takes the place of one of its name
	}
	return h
}

// decides refuses a put with conditions that the store does not decide: it knows "only if absent" of a bucket without
// versioning, and nothing else.
func (b *Bucket) decides(ctx context.Context, key string, o source.WriteOptions) error {
	if o.IfMatch != "" {
		return &source.Error{Op: "put", Name: b.name(key), Kind: source.ErrInvalid,
			Err:  fmt.Errorf("%w: OSS puts an object only if it is absent, not only over a certain version", errors.ErrUnsupported),
			Hint: "put it without If-Match"}
	}
	if !o.IfAbsent {
		return nil
	}
	if err := b.askVersioning(ctx); err != nil {
		return fmt.Errorf("put %s only if it is absent, which takes a bucket without versioning: %w", b.name(key), err)
	}
	if b.versioned.Load() {
		return b.undecided(key, "")
	}
	return nil
}

// decided refuses to tell that a put was done on a condition, where the store's answers say that there is versioning: it
// could not be asked before, or was turned on since.
func (b *Bucket) decided(key string, o source.WriteOptions) error {
	if o.IfAbsent && b.versioned.Load() {
		return b.undecided(key, "; it was put all the same, perhaps over another")
	}
	return nil
}

func (b *Bucket) undecided(key, outcome string) error {
	return &source.Error{Op: "put", Name: b.name(key), Kind: source.ErrInvalid,
		Err:  fmt.Errorf(`%w: OSS knows no "only if absent" in a bucket whose versioning is enabled or suspended%s`, errors.ErrUnsupported, outcome),
		Hint: "put it without If-None-Match, or into a bucket that never had versioning"}
}

// askVersioning asks once whether the bucket has versioning. Credentials that may not ask and stores that do not know the
// question are no answer: then its other answers tell (see do).
func (b *Bucket) askVersioning(ctx context.Context) error {
	if b.asked.Load() || b.versioned.Load() {
		return nil
	}
	var out struct {
		XMLName xml.Name `xml:"VersioningConfiguration"`
		Status  string
	}
	err := source.Try(ctx, source.RetryOptions{}, func(ctx context.Context) error {
		_, err := b.exchange(ctx, request{op: "stat", method: "GET", params: map[string]string{"versioning": ""}}, maxAnswer, &out)
		return err
	})
	if err != nil && !errors.Is(err, source.ErrDenied) && !errors.Is(err, source.ErrInvalid) && !errors.Is(err, source.ErrNotFound) {
		return err
	}
	if err == nil && out.Status != "" { // it stays empty until it is enabled, and never is again
		b.versioned.Store(true)
	}
	b.asked.Store(true)
	return nil
}

// Describe implements source.Writer.
func (b *Bucket) Describe(ctx context.Context, key string) (source.Object, source.Attributes, error) {
	o, h, err := b.stat(ctx, key)
	if err != nil {
		return o, source.Attributes{}, err
	}
	a := source.Attributes{ContentType: h.Get("Content-Type"), Headers: map[string]string{}, Metadata: map[string]string{}}
	for _, k := range keptHeaders {
		if v := h.Get(k); v != "" {
			a.Headers[k] = v
		}
	}
	for k, v := range h {
		if name, ok := strings.CutPrefix(k, metaPrefix); ok && name != nonceMetadata {
			a.Metadata[strings.ToLower(name)] = strings.Join(v, ",")
		}
	}
	return o, a, nil
}

// PutObject implements source.Writer.
func (b *Bucket) PutObject(ctx context.Context, key string, r io.Reader, size int64, o source.WriteOptions) (source.Object, error) {
	return b.putWith(ctx, key, r, size, o)
}

// Copy implements source.Writer.
func (b *Bucket) Copy(ctx context.Context, from source.Object, key string, o source.WriteOptions) (source.Object, error) {
	if err := b.checkKey("put", key); err != nil {
		return source.Object{}, err
	}
	invalid := func(text string) (source.Object, error) {
		return source.Object{}, &source.Error{Op: "put", Name: b.name(key), Kind: source.ErrInvalid, Err: errors.New(text)}
	}
	switch {
	case from.Size > maxCopy:
		return invalid("it is larger than one request copies")
	case o.IfMatch != "" || o.IfAbsent:
		return invalid("a copy has no conditions")
	}
	h := attributes(o.Attributes)
	h["x-oss-copy-source"] = "/" + b.bucket.BucketName + "/" + strings.ReplaceAll(url.QueryEscape(from.Key), "+", "%20")
	h["x-oss-copy-source-if-match"] = `"` + from.Version + `"`
	h["x-oss-metadata-directive"] = "REPLACE"
	var out struct {
		XMLName      xml.Name `xml:"CopyObjectResult"`
		ETag         string
		LastModified time.Time
	}
	err := source.Try(ctx, source.RetryOptions{Slack: copySlack}, func(ctx context.Context) error {
		_, err := b.exchange(ctx, request{op: "put", method: "PUT", key: key, header: h}, maxAnswer, &out)
		return err
	})
	if err != nil {
		return source.Object{}, err
	}
	return source.Object{Key: key, Size: from.Size, Version: strings.Trim(out.ETag, `"`), ModTime: out.LastModified}, nil
}

// BeginUpload implements source.Writer. A try whose answer is lost may leave an upload without parts.
func (b *Bucket) BeginUpload(ctx context.Context, key string, a source.Attributes) (string, error) {
	if err := b.checkKey("put", key); err != nil {
		return "", err
	}
	return (&put{Bucket: b, key: key, options: source.WriteOptions{Attributes: a}}).initiate(ctx)
}

// PutPart implements source.Writer.
func (b *Bucket) PutPart(ctx context.Context, key, upload string, number int, r io.Reader, size int64, _ source.Sums) (source.Part, error) {
	if size < 0 || size > maxHeldPart {
		return source.Part{}, &source.Error{Op: "put", Name: b.name(key), Kind: source.ErrInvalid,
			Err: fmt.Errorf("a part of %d bytes", size), Hint: fmt.Sprintf("put parts of up to %d bytes", int64(maxHeldPart))}
	}
	p := &put{Bucket: b, key: key, in: r, size: size, part: int(size) + 1}
	content, err := p.next(nil)
	if err != nil {
		return source.Part{}, err
	}
	h, err := p.send(ctx, request{method: "PUT", params: map[string]string{"partNumber": strconv.Itoa(number), "uploadId": upload}}, content)
	if err != nil {
		return source.Part{}, err
	}
	return source.Part{Number: number, Version: strings.Trim(h.Get("ETag"), `"`), Size: size, ModTime: b.deps.now().UTC()}, nil
}

// PartHeld implements source.Writer.
func (b *Bucket) PartHeld(size int64) int64 { return size }

// Parts implements source.Writer.
func (b *Bucket) Parts(ctx context.Context, key, upload string, after, max int) ([]source.Part, bool, error) {
	var out struct {
		IsTruncated bool
		Part        []struct {
			PartNumber   int
			ETag         string
			Size         int64
			LastModified time.Time
		}
	}
	_, err := b.exchange(ctx, request{op: "list", method: "GET", key: key, params: map[string]string{
		"uploadId": upload, "part-number-marker": strconv.Itoa(after), "max-parts": strconv.Itoa(min(max, 1000))}}, maxList, &out)
	if err != nil {
		return nil, false, err
	}
	parts := make([]source.Part, 0, len(out.Part))
	for _, p := range out.Part {
		parts = append(parts, source.Part{Number: p.PartNumber, Version: strings.Trim(p.ETag, `"`), Size: p.Size, ModTime: p.LastModified})
	}
	return parts, out.IsTruncated, nil
}

// CompleteUpload implements source.Writer.
func (b *Bucket) CompleteUpload(ctx context.Context, key, upload string, parts []source.Part, o source.WriteOptions) (source.Object, error) {
	if err := b.decides(ctx, key, o); err != nil {
		return source.Object{}, err
	}
	p := &put{Bucket: b, key: key, options: o}
	etag, _, err := p.complete(ctx, upload, parts)
	if err == nil {
		err = b.decided(key, o)
	}
	if err != nil {
		return source.Object{}, err
	}
	etag = strings.Trim(etag, `"`)
	// The answer tells no size. Where it cannot be asked, or the object is another already, it was completed
	// all the same.
	if now, err := b.Stat(ctx, key); err == nil && (etag == "" || now.Version == etag) {
		return now, nil
	}
	return source.Object{Key: key, Size: -1, Version: etag, ModTime: b.deps.now().UTC()}, nil
}

// AbortUpload implements source.Writer.
func (b *Bucket) AbortUpload(ctx context.Context, key, upload string) error {
	a, err := b.do(ctx, request{op: "delete", method: "DELETE", key: key, params: map[string]string{"uploadId": upload}})
	if err != nil {
		return err
	}
	return a.body.Close()
}

// Uploads implements source.Writer.
func (b *Bucket) Uploads(ctx context.Context, prefix, after string, max int) (found []source.Upload, err error) {
	key, id := after, ""
	for len(found) < max {
		var out struct {
			IsTruncated        bool
			EncodingType       string
			NextKeyMarker      string
			NextUploadIDMarker string `xml:"NextUploadIdMarker"`
			Upload             []struct {
				Key       string
				UploadID  string `xml:"UploadId"`
				Initiated time.Time
			}
		}
		params := map[string]string{"uploads": "", "prefix": prefix, "max-uploads": strconv.Itoa(min(1000, max-len(found))), "encoding-type": "url"}
		if key != "" {
			params["key-marker"] = key
		}
		if id != "" {
			params["upload-id-marker"] = id
		}
		if _, err := b.exchange(ctx, request{op: "list", method: "GET", params: params}, maxList, &out); err != nil {
			return nil, err
		}
		for _, u := range out.Upload {
			name := u.Key
			if out.EncodingType == "url" {
				if name, err = url.QueryUnescape(u.Key); err != nil {
					return nil, &source.Error{Op: "list", Name: b.url, Kind: source.ErrInvalid, Err: fmt.Errorf("listed name %q: %w", u.Key, err)}
				}
			}
			found = append(found, source.Upload{Key: name, ID: u.UploadID, Started: u.Initiated})
		}
		next := out.NextKeyMarker
		if out.EncodingType == "url" {
			if next, err = url.QueryUnescape(next); err != nil {
				return nil, &source.Error{Op: "list", Name: b.url, Kind: source.ErrInvalid, Err: err}
			}
		}
		if !out.IsTruncated || next == key && out.NextUploadIDMarker == id {
			break
		}
		key, id = next, out.NextUploadIDMarker
	}
	return found, nil
}
