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
		if o.size == 0 {
			return archive.WriteHeader(h)
		}
		return b.copyTo(ctx, &o, &entry{archive, h, &o})
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

// entry is a file of an archive. Its header waits for the first bytes, whose answer tells the mode.
type entry struct {
	archive *tar.Writer
	header  *tar.Header // nil once it is written
	of      *object
}

func (e *entry) Write(p []byte) (int, error) {
	if e.header != nil {
		e.header.Mode |= int64(executable(e.of.mode))
		if err := e.archive.WriteHeader(e.header); err != nil {
			return 0, err
		}
		e.header = nil
	}
	return e.archive.Write(p)
}

func (b *bucket) copyTo(ctx context.Context, o *object, w io.Writer) error {
	return b.read(ctx, o, 0, o.size, func(p []byte) error {
		_, err := w.Write(p)
		return err
	})
}
