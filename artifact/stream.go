package artifact

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/stepcache/stepcache/cache/source"
)

// frameSize is what one message of OpenStream carries. A client takes 4 MiB at most.
const frameSize = 1 << 20

// stream writes the object of a key to w, or, where there is none but a directory, a tar archive of that.
func (b *bucket) stream(ctx context.Context, key string, w io.Writer) error {
	if !strings.HasSuffix(key, "/") {
		o, _, err := b.stat(ctx, key)
		if err == nil {
			return b.copyTo(ctx, &o, w)
		}
		if !errors.Is(err, source.ErrNotFound) {
			return err
		}
	}
	prefix := strings.TrimSuffix(key, "/") + "/"
	found := false
	archive := tar.NewWriter(w)
	err := b.list(ctx, prefix, func(o object) error {
		found = true
		name := strings.TrimPrefix(o.key, prefix)
		if name == "" {
			return nil
		}
		if !cleanName(strings.TrimSuffix(name, "/")) {
			return &source.Error{Op: "get", Name: b.object(o.key), Kind: source.ErrInvalid,
				Err: fmt.Errorf("%q cannot be a file below the artifact's directory", name), Hint: "remove or rename the object"}
		}
		h := &tar.Header{Name: name, Size: o.size, Mode: 0o644, ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
		if strings.HasSuffix(name, "/") {
			h.Typeflag, h.Size, h.Mode = tar.TypeDir, 0, 0o755
			return archive.WriteHeader(h)
		}
		if err := archive.WriteHeader(h); err != nil {
			return err
		}
		return b.copyTo(ctx, &o, archive)
	})
	if err != nil {
		return err
	}
	if !found {
		return &source.Error{Op: "get", Name: b.object(strings.TrimSuffix(prefix, "/")), Kind: source.ErrNotFound,
			Err: errors.New("there is no object of this name and none below it")}
	}
	return archive.Close()
}

func (b *bucket) copyTo(ctx context.Context, o *object, w io.Writer) error {
	return b.read(ctx, o, 0, o.size, func(p []byte) error {
		_, err := w.Write(p)
		return err
	})
}
