package access

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
)

// Noise is n bytes that do not repeat, others for each seed.
func Noise(n int, seed uint64) []byte {
	p := make([]byte, n)
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	_, _ = rand.NewChaCha8(key).Read(p) // never fails
	return p
}

// WriteNoise makes a file of bytes that do not repeat.
func WriteNoise(path string, size int64, seed byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	r := rand.NewChaCha8([32]byte{seed})
	p := make([]byte, Chunk)
	for left := size; left > 0; left -= int64(len(p)) {
		p = p[:min(left, Chunk)]
		_, _ = r.Read(p) // never fails
		if _, err := f.Write(p); err != nil {
			f.Close()
			return fmt.Errorf("write %s: %w; a smaller --size needs less memory", path, err)
		}
	}
	return f.Close()
}

// perDir is how many files a directory of a tree has.
const perDir = 100

// Tree are n files of one size, in directories of a hundred.
func Tree(n int, size int64) []File {
	files := make([]File, n)
	for k := range files {
		files[k] = File{fmt.Sprintf("d%05d/f%02d", k/perDir, k%perDir), size}
	}
	return files
}

// Entries is how many entries a Tree of n files has, directories included.
func Entries(n int) int64 { return int64(n + (n+perDir-1)/perDir) }

// WriteTree makes the files of a Tree, all with the same content, or, with link, all being the same file.
func WriteTree(ctx context.Context, dir string, files []File, content []byte, link bool) error {
	last := ""
	for k, f := range files {
		if d, _, _ := strings.Cut(f.Path, "/"); d != last {
			if err := os.MkdirAll(dir+"/"+d, 0o755); err != nil {
				return err
			}
			if last = d; ctx.Err() != nil {
				return context.Cause(ctx)
			}
		}
		var err error
		if link && k > 0 {
			err = os.Link(dir+"/"+files[0].Path, dir+"/"+f.Path)
		} else {
			err = os.WriteFile(dir+"/"+f.Path, content, 0o444)
		}
		if err != nil {
			return fmt.Errorf("%w; fewer --files need less memory", err)
		}
	}
	return nil
}
