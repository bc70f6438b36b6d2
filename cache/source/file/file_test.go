package file_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/file"
	"github.com/stepcache/stepcache/cache/source/sourcetest"
)

func open(ctx context.Context, c source.Config) (source.Source, error) {
	f, err := file.Open(ctx, c)
	if err != nil {
		return nil, err
	}
	return f, nil
}

func TestConformance(t *testing.T) {
	sourcetest.Run(t, func(t *testing.T) sourcetest.Fixture {
		dir := t.TempDir()
		return sourcetest.Fixture{
			Config: source.Config{URL: "file://" + dir}, Open: open, Part: 1 << 20,
			PutByHand: func(t *testing.T, key string, content []byte) { // in place: the inode stays
				f, err := os.OpenFile(filepath.Join(dir, key), os.O_WRONLY|os.O_TRUNC, 0)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if _, err := f.Write(content); err != nil {
					t.Fatal(err)
				}
			},
			Leftovers: func(t *testing.T) int {
				n := 0
				err := filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
					if strings.Contains(p, ".stepcache-put-") {
						n++
					}
					return err
				})
				if err != nil {
					t.Fatal(err)
				}
				return n
			},
			NoKey: func(key string) string {
				switch {
				case strings.HasSuffix(key, "/"), strings.HasPrefix(key, "/"), strings.Contains(key, "//"):
					return "no name between slashes"
				case strings.HasPrefix(key, "./"), strings.Contains(key, "/../"):
					return "dots are folders"
				}
				return ""
			},
		}
	})
}
