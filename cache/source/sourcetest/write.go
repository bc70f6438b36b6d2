package sourcetest

import (
	"bytes"
	"crypto/md5"
	"crypto/sha256"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/stepcache/stepcache/cache/source"
)

// Writer checks what a store that is a source.Writer promises. src is below an empty bucket; conditions
// says whether it can put over a certain version only.
func Writer(t *testing.T, src source.Source, conditions bool) {
	w, ok := source.WriterOf(source.Retry(source.Limit(src, source.LimitOptions{}), source.RetryOptions{}))
	if !ok {
		t.Fatal("the source is no Writer")
	}
	for name, test := range map[string]func(*testing.T, source.Source, source.Writer, bool){
		"attributes are kept": writeAttributes, "conditions": writeConditions, "copy": writeCopy,
		"parts": writeParts, "content that fails": writeBroken, "a part whose content fails": writeBrokenPart, "uploads": writeUploads,
	} {
		t.Run(name, func(t *testing.T) { test(t, src, w, conditions) })
	}
}

var someAttributes = source.Attributes{
	ContentType: "text/x-step",
	// An Expires that is no date is what says "already".
	Headers: map[string]string{"Cache-Control": "no-cache", "Content-Disposition": `attachment; filename="x"`, "Expires": "0"},
	// Also of the names of headers that say something of the object themselves, or to the store.
	Metadata: map[string]string{"step": "map", "run-id": "7", "content-type": "x", "cache-control": "y", "x-amz-acl": "public-read", "x-amz-storage-class": "COLD"},
}

func hasAttributes(t *testing.T, w source.Writer, key string, want source.Attributes) source.Object {
	t.Helper()
	o, a, err := w.Describe(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	if a.ContentType != want.ContentType || !maps.Equal(a.Headers, want.Headers) || !maps.Equal(a.Metadata, want.Metadata) {
		t.Errorf("%s has %+v, want %+v", key, a, want)
	}
	return o
}

func writeAttributes(t *testing.T, src source.Source, w source.Writer, _ bool) {
	for key, size := range map[string]int{"attributes/small": 1000, "attributes/parts": 20 << 20} {
		p := content(1, size)
		o, err := w.PutObject(t.Context(), key, bytes.NewReader(p), int64(size), source.WriteOptions{Attributes: someAttributes})
		if err != nil {
			t.Fatal(err)
		}
		if at := hasAttributes(t, w, key, someAttributes); at.Version != o.Version || at.Size != o.Size {
			t.Errorf("described as %+v, put as %+v", at, o)
		}
		if got, err := read(t.Context(), src, o, 0, o.Size); err != nil || !bytes.Equal(got, p) {
			t.Errorf("%s: %d bytes, %v", key, len(got), err)
		}
	}
	if _, _, err := w.Describe(t.Context(), "attributes/missing"); !errors.Is(err, source.ErrNotFound) {
		t.Errorf("nothing is described: %v", err)
	}
}

func writeConditions(t *testing.T, _ source.Source, w source.Writer, conditions bool) {
	put := func(size int, o source.WriteOptions) (source.Object, error) {
		return w.PutObject(t.Context(), "conditions", bytes.NewReader(content(2, size)), int64(size), o)
	}
	first, err := put(10, source.WriteOptions{IfAbsent: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{10, 11, 20 << 20} { // also the very bytes that are there
		if _, err := put(size, source.WriteOptions{IfAbsent: true}); !errors.Is(err, source.ErrChanged) {
			t.Errorf("%d bytes put over what must be absent: %v", size, err)
		}
	}
	if !conditions {
		if _, err := put(10, source.WriteOptions{IfMatch: first.Version}); !errors.Is(err, source.ErrInvalid) {
			t.Errorf("a condition that the store does not know: %v", err)
		}
		return
	}
	if _, err := put(12, source.WriteOptions{IfMatch: strings.Repeat("0", 32)}); !errors.Is(err, source.ErrChanged) {
		t.Errorf("put over another version: %v", err)
	}
	if _, err := put(13, source.WriteOptions{IfMatch: first.Version}); err != nil {
		t.Errorf("put over the version it names: %v", err)
	}
}

func writeCopy(t *testing.T, src source.Source, w source.Writer, _ bool) {
	p := content(3, 1000)
	from, err := w.PutObject(t.Context(), "copy/fröm a+b", bytes.NewReader(p), int64(len(p)), source.WriteOptions{})
	if err != nil {
		t.Fatal(err)
	}
	o, err := w.Copy(t.Context(), from, "copy/to", source.WriteOptions{Attributes: someAttributes})
	if err != nil {
		t.Fatal(err)
	}
	if at := hasAttributes(t, w, "copy/to", someAttributes); at.Version != o.Version {
		t.Errorf("described as %+v, copied as %+v", at, o)
	}
	if got, err := read(t.Context(), src, o, 0, o.Size); err != nil || !bytes.Equal(got, p) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	other := from
	other.Version = strings.Repeat("0", 32)
	if _, err := w.Copy(t.Context(), other, "copy/other", source.WriteOptions{}); !errors.Is(err, source.ErrChanged) {
		t.Errorf("a copy of another version: %v", err)
	}
	from.Key = "copy/missing"
	if _, err := w.Copy(t.Context(), from, "copy/other", source.WriteOptions{}); !errors.Is(err, source.ErrNotFound) {
		t.Errorf("a copy of nothing: %v", err)
	}
}

func writeParts(t *testing.T, src source.Source, w source.Writer, _ bool) {
	ctx, key := t.Context(), "parts/whole"
	upload, err := w.BeginUpload(ctx, key, someAttributes)
	if err != nil {
		t.Fatal(err)
	}
	var whole []byte
	var parts []source.Part
	for n, size := range []int{5 << 20, 17 << 20, 99} {
		p := content(uint64(10+n), size)
		whole = append(whole, p...)
		for range 2 { // the same again takes its place
			part, err := w.PutPart(ctx, key, upload, n+1, onlyReader{bytes.NewReader(p)}, int64(size), source.Sums{})
			if err != nil {
				t.Fatal(err)
			}
			parts = append(parts[:n], part)
		}
	}
	listed, more, err := w.Parts(ctx, key, upload, 1, 1)
	if err != nil || !more || len(listed) != 1 || listed[0].Number != 2 || listed[0].Size != 17<<20 || listed[0].Version != parts[1].Version {
		t.Errorf("parts after the first: %+v, more %v, %v", listed, more, err)
	}
	bad := slices.Clone(parts)
	bad[0].Version = strings.Repeat("0", 32)
	if _, err := w.CompleteUpload(ctx, key, upload, bad, source.WriteOptions{}); !errors.Is(err, source.ErrBadPart) {
		t.Errorf("complete with a part that was not put: %v", err)
	}
	o, err := w.CompleteUpload(ctx, key, upload, parts, source.WriteOptions{})
	if err != nil || o.Size != int64(len(whole)) {
		t.Fatalf("%+v, %v", o, err)
	}
	hasAttributes(t, w, key, someAttributes)
	if got, err := read(ctx, src, o, 0, o.Size); err != nil || !bytes.Equal(got, whole) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if _, err := w.PutPart(ctx, key, upload, 1, bytes.NewReader(nil), 0, source.Sums{}); !errors.Is(err, source.ErrNoUpload) {
		t.Errorf("a part of an upload that is complete: %v", err)
	}
}

// brokenContents calls f for contents of size bytes that are none, with and without sums that are right as far as they come.
func brokenContents(t *testing.T, size int, f func(what string, r io.Reader, sums source.Sums, want error)) {
	p := content(1, size)
	m, h := md5.Sum(p), sha256.Sum256(p)
	for told, sums := range map[string]source.Sums{"": {}, ", its MD5 told": {MD5: m[:]}, ", its sums told": {MD5: m[:], SHA256: h[:]}} {
		ending := func(n int, err error) io.Reader {
			return io.MultiReader(bytes.NewReader(p[:n]), &brokenReader{0, func() error { return err }})
		}
		f("an error at its end"+told, ending(size, errContent), sums, errContent)
		f("an error before its end"+told, ending(size-1, errContent), sums, errContent)
		f("cut off at its end"+told, ending(size, io.ErrUnexpectedEOF), sums, io.ErrUnexpectedEOF)
		f("cut off before its end"+told, ending(size-1, io.ErrUnexpectedEOF), sums, io.ErrUnexpectedEOF)
		f("too short"+told, bytes.NewReader(p[:size-1]), sums, source.ErrInvalid)
		f("too long"+told, io.MultiReader(bytes.NewReader(p), strings.NewReader("x")), sums, source.ErrInvalid)
	}
}

func writeBroken(t *testing.T, src source.Source, w source.Writer, _ bool) {
	meter := source.NewMeter(src.URL())
	w, _ = source.WriterOf(source.Measure(src, meter))
	for _, size := range []int64{0, 1, 1000, 1 << 20, 17 << 20} {
		brokenContents(t, int(max(size, 1)), func(what string, r io.Reader, sums source.Sums, want error) {
			if size == 0 { // one byte, or an error, where none is to come
				r = io.MultiReader(&brokenReader{0, func() error { return errContent }}, r)
				want = errContent
			}
			if _, err := w.PutObject(t.Context(), "broken", r, size, source.WriteOptions{Sums: sums}); err == nil || !errors.Is(err, want) {
				t.Errorf("%d bytes, %s: %v", size, what, err)
			}
		})
	}
	if o, err := src.Stat(t.Context(), "broken"); !errors.Is(err, source.ErrNotFound) {
		t.Errorf("it is there: %+v, %v", o, err)
	}
	if c := meter.Counts(); c.Errors["sender"] == 0 || c.Errors["other"] != 0 {
		t.Errorf("the store is blamed for contents that broke: %v", c.Errors)
	}
}

func writeBrokenPart(t *testing.T, _ source.Source, w source.Writer, _ bool) {
	ctx, key := t.Context(), "parts/broken"
	upload, err := w.BeginUpload(ctx, key, source.Attributes{})
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{1, 1000, 17 << 20} {
		brokenContents(t, int(size), func(what string, r io.Reader, sums source.Sums, want error) {
			if _, err := w.PutPart(ctx, key, upload, 1, r, size, sums); err == nil || !errors.Is(err, want) {
				t.Errorf("%d bytes, %s: %v", size, what, err)
			}
		})
	}
	if parts, _, err := w.Parts(ctx, key, upload, 0, 10); err != nil || len(parts) > 0 {
		t.Errorf("parts: %+v, %v", parts, err)
	}
	if err := w.AbortUpload(ctx, key, upload); err != nil {
		t.Fatal(err)
	}
}

func writeUploads(t *testing.T, _ source.Source, w source.Writer, _ bool) {
	ctx := t.Context()
	want := map[string]string{}
	for _, key := range []string{"uploads/a b", "uploads/ü", "other/c"} {
		id, err := w.BeginUpload(ctx, key, source.Attributes{})
		if err != nil {
			t.Fatal(err)
		}
		want[key] = id
	}
	found, err := w.Uploads(ctx, "uploads/", "", 100)
	if err != nil || len(found) != 2 {
		t.Fatalf("%+v, %v", found, err)
	}
	for _, u := range found {
		if want[u.Key] != u.ID || u.Started.IsZero() {
			t.Errorf("%+v, want %q", u, want)
		}
	}
	if found, err := w.Uploads(ctx, "uploads/", "uploads/a b", 100); err != nil || len(found) != 1 || found[0].Key != "uploads/ü" {
		t.Errorf("after the first key: %+v, %v", found, err)
	}
	for key, id := range want {
		if err := w.AbortUpload(ctx, key, id); err != nil {
			t.Error(err)
		}
		if err := w.AbortUpload(ctx, key, id); !errors.Is(err, source.ErrNoUpload) {
			t.Errorf("aborted twice: %v", err)
		}
	}
	if found, err := w.Uploads(ctx, "", "", 100); err != nil || len(found) > 0 {
		t.Errorf("left: %+v, %v", found, err)
	}
}
