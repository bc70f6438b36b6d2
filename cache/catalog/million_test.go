package catalog

import (
	"crypto/md5"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/source"
)

// maxBytesPerEntry is what a file may take in memory, its ETag included.
const maxBytesPerEntry = 150

// dataset yields n objects with names and ETags as data sets have them: a thousand files a folder, most of
// them put in one part.
func dataset(n int, yield func(source.Object)) {
	var b [8]byte
	for i := range n {
		binary.LittleEndian.PutUint64(b[:], uint64(i))
		sum := md5.Sum(b[:])
		o := source.Object{
			Key:     fmt.Sprintf("imagenet/train/n%08d/n%08d_%07d.JPEG", i/1000*37, i/1000*37, i),
			Size:    int64(binary.LittleEndian.Uint32(sum[:]) % (1 << 18)),
			Version: hex.EncodeToString(sum[:]),
			ModTime: day0.Add(time.Duration(i) * 1237 * time.Millisecond),
			Digest:  source.Digest{Algorithm: source.MD5, Sum: sum[:]},
		}
		if i%100 == 0 {
			o.Version, o.Digest = fmt.Sprintf("%s-%d", o.Version, 2+i%9000), source.Digest{}
		}
		yield(o)
	}
}

func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// The figures are asserted; the times are for the reader.
func TestMillionEntriesInBoundedMemory(t *testing.T) {
	const n = 1_000_000
	mounts := []Mount{{URL: "s3://bucket", Prefix: "imagenet/", Path: "/"}}
	empty := heap()
	begin := time.Now()
	b := NewBuilder(mounts)
	dataset(n, func(o source.Object) {
		if err := b.Add(0, o); err != nil {
			t.Fatal(err)
		}
	})
	builder := heap() - empty
	added := time.Now()
	encoded, err := b.Encode(day0)
	if err != nil {
		t.Fatal(err)
	}
	runtime.KeepAlive(b)
	b = nil
	built := time.Now()
	s, err := Open(encoded)
	if err != nil {
		t.Fatal(err)
	}
	opened := time.Since(built)
	held := heap() - empty
	if s.Files() != n {
		t.Errorf("%d files", s.Files())
	}
	path := filepath.Join(t.TempDir(), "snapshot")
	if err := os.WriteFile(path, encoded, 0o600); err != nil {
		t.Fatal(err)
	}
	before := heap()
	f, err := OpenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mapped := heap() - before
	if f.Digest() != s.Digest() {
		t.Error("the file is another snapshot")
	}
	t.Logf("%d files: encoded %.1f bytes each, held %.1f, builder %.1f; mapped file %d bytes of heap; added in %v, encoded in %v, opened in %v",
		n, float64(len(encoded))/n, float64(held)/n, float64(builder)/n, mapped, added.Sub(begin), built.Sub(added), opened)
	if len(encoded) > n*maxBytesPerEntry || held > n*maxBytesPerEntry {
		t.Errorf("encoded %.1f bytes a file, held %.1f; want at most %d", float64(len(encoded))/n, float64(held)/n, maxBytesPerEntry)
	}
	if builder > n*maxBytesPerEntry {
		t.Errorf("the builder holds %.1f bytes a file; want at most %d", float64(builder)/n, maxBytesPerEntry)
	}
	if mapped > 1<<20 {
		t.Errorf("a mapped snapshot takes %d bytes of heap", mapped)
	}
	runtime.KeepAlive(s)
}

func BenchmarkMillion(b *testing.B) {
	builder := NewBuilder([]Mount{{URL: "s3://bucket", Prefix: "imagenet/", Path: "/"}})
	dataset(1_000_000, func(o source.Object) {
		if err := builder.Add(0, o); err != nil {
			b.Fatal(err)
		}
	})
	encoded, err := builder.Encode(day0)
	if err != nil {
		b.Fatal(err)
	}
	s, err := Open(encoded)
	if err != nil {
		b.Fatal(err)
	}
	paths := make([]string, 0, 1000)
	for i := 0; i < cap(paths); i++ {
		paths = append(paths, s.Path(Index(s.Len()-1-i*991)))
	}
	b.Run("open", func(b *testing.B) {
		for b.Loop() {
			if _, err := Open(encoded); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("lookup", func(b *testing.B) {
		b.ReportAllocs()
		for i := range b.N {
			if _, ok := s.Lookup(paths[i%len(paths)]); !ok {
				b.Fatal(paths[i%len(paths)])
			}
		}
	})
	b.Run("node", func(b *testing.B) {
		b.ReportAllocs()
		for i := range b.N {
			s.Node(Index(i*7919) % Index(s.Len()))
		}
	})
	b.Run("object", func(b *testing.B) {
		b.ReportAllocs()
		for i := range b.N {
			s.Object(Index(i*7919) % Index(s.Len()))
		}
	})
	b.Run("ring", func(b *testing.B) {
		b.ReportAllocs()
		for i := range b.N {
			s.Ring(Index(i*7919) % Index(s.Len()))
		}
	})
	b.Run("walk", func(b *testing.B) {
		for b.Loop() {
			s.Walk(0, func(Index) bool { return true })
		}
	})
}
