package osstest

import (
	"bytes"
	"crypto/md5"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc64"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

var ecma = crc64.MakeTable(crc64.ECMA)

// bucket holds objects by key. An object is immutable once it is in the map, so that a reader that got
// one keeps its very bytes whatever is put or deleted meanwhile.
type bucket struct {
	dir    string // empty: in memory
	public bool   // guarded by Server.mu until served

	mu sync.Mutex
	// versioning is empty, Enabled or Suspended, of which only the effect on conditions and answers is served.
	versioning string
	objects    map[string]*object
	sorted     []string // keys in byte order; nil when out of date
	uploads    map[string]*upload

	forbid sync.Mutex // held by a put that must not overwrite
}

func newBucket() *bucket {
	return &bucket{objects: map[string]*object{}, uploads: map[string]*upload{}}
}

// object is one version of an object. Its exported fields are its record in a folder.
type object struct {
	Key         string
	ETag        string // upper-case hex, without quotes
	Type        string // Normal, Multipart or Symlink
	ContentType string
	Kept        map[string]string // Cache-Control and the like, and the user's metadata, by header
	Target      string            // of a symlink
	MD5         []byte            // of a Normal object
	CRC         uint64
	Modified    time.Time
	Blob        blob
}

// blob is content: in memory, or a file of the bucket's folder.
type blob struct {
	File string
	Size int64
	data []byte
}

// write stores what r holds, about size bytes if that is known (not negative), and sums it.
func (b *bucket) write(r io.Reader, size int64) (content blob, sum []byte, crc uint64, err error) {
	m, c := md5.New(), crc64.New(ecma)
	sums := io.MultiWriter(m, c)
	if b.dir == "" {
		var buf bytes.Buffer
		if size > 0 && size < 64<<20 { // a client may announce anything
			buf.Grow(int(size) + bytes.MinRead)
		}
		_, err = io.Copy(io.MultiWriter(&buf, sums), r)
		content = blob{Size: int64(buf.Len()), data: buf.Bytes()}
	} else {
		content, err = b.writeFile(r, sums)
	}
	return content, m.Sum(nil), c.Sum64(), err
}

func (b *bucket) writeFile(r io.Reader, sums io.Writer) (content blob, err error) {
	if err := os.MkdirAll(b.dir, 0o755); err != nil {
		return blob{}, err
	}
	content.File = random(16) + ".data"
	path := filepath.Join(b.dir, content.File)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return blob{}, err
	}
	content.Size, err = io.Copy(io.MultiWriter(f, sums), r)
	if err = errors.Join(err, f.Close()); err != nil {
		os.Remove(path)
	}
	return content, err
}

// open returns a reader of n bytes of the content from off.
func (b *bucket) open(c blob, off, n int64) (io.ReadCloser, error) {
	if c.File == "" {
		return io.NopCloser(bytes.NewReader(c.data[off : off+n])), nil
	}
	f, err := os.Open(filepath.Join(b.dir, c.File))
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.NewSectionReader(f, off, n), f}, nil
}

func (b *bucket) discard(c blob) {
	if c.File != "" {
		os.Remove(filepath.Join(b.dir, c.File))
	}
}

// record is the name of the file that describes the object with this content.
func (b *bucket) record(c blob) string {
	return filepath.Join(b.dir, strings.TrimSuffix(c.File, ".data")+".json")
}

// store makes o the current object of its key.
func (b *bucket) store(o *object) error {
	if b.dir != "" {
		text, err := json.Marshal(o)
		if err != nil {
			return err
		}
		if err := os.WriteFile(b.record(o.Blob), text, 0o644); err != nil {
			return err
		}
	}
	b.mu.Lock()
	old := b.objects[o.Key]
	b.objects[o.Key] = o
	if old == nil {
		b.sorted = nil
	}
	b.mu.Unlock()
	b.drop(old)
	return nil
}

func (b *bucket) remove(key string) {
	b.mu.Lock()
	old := b.objects[key]
	if old != nil {
		delete(b.objects, key)
		b.sorted = nil
	}
	b.mu.Unlock()
	b.drop(old)
}

func (b *bucket) drop(old *object) {
	if old != nil && b.dir != "" {
		os.Remove(b.record(old.Blob))
		b.discard(old.Blob)
	}
}

// versionID is what answers about an object say where there is versioning, and otherwise empty.
func (b *bucket) versionID() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch b.versioning {
	case "":
		return ""
	case "Suspended":
		return "null"
	}
	return random(16)
}

func (b *bucket) find(key string) *object {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.objects[key]
}

// keys returns all keys in byte order; the slice is never changed afterwards.
func (b *bucket) keys() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.sorted == nil {
		b.sorted = make([]string, 0, len(b.objects))
		for k := range b.objects {
			b.sorted = append(b.sorted, k)
		}
		slices.Sort(b.sorted)
	}
	return b.sorted
}

// load finds the buckets and objects of the server's folder. It runs before the server serves.
func (s *Server) load() error {
	if err := os.MkdirAll(s.options.Dir, 0o755); err != nil {
		return err
	}
	records, err := filepath.Glob(filepath.Join(s.options.Dir, "*", "*.json"))
	if err != nil {
		return err
	}
	for _, path := range records {
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		o := new(object)
		if err := json.Unmarshal(text, o); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		b := s.makeBucket(filepath.Base(filepath.Dir(path)), false)
		// Of two records of a key (a crash between writing the new and removing the old) the newer wins.
		if old := b.objects[o.Key]; old == nil || old.Modified.Before(o.Modified) {
			b.objects[o.Key] = o
		}
	}
	return nil
}

// Put stores an object behind the protocol's back and returns its ETag.
func (s *Server) Put(bucket, key string, content []byte) (etag string, err error) {
	b := s.makeBucket(bucket, false)
	c, sum, crc, err := b.write(bytes.NewReader(content), int64(len(content)))
	if err != nil {
		return "", err
	}
	o := s.normal(key, c, sum, crc)
	return o.ETag, b.store(o)
}

// Object returns the content of an object, and whether it exists.
func (s *Server) Object(bucket, key string) ([]byte, bool) {
	b := s.bucket(bucket)
	if b == nil {
		return nil, false
	}
	o := b.find(key)
	if o == nil {
		return nil, false
	}
	r, err := b.open(o.Blob, 0, o.Blob.Size)
	if err != nil {
		return nil, false
	}
	defer r.Close()
	content, err := io.ReadAll(r)
	return content, err == nil
}

func (s *Server) normal(key string, c blob, sum []byte, crc uint64) *object {
	return &object{Key: key, ETag: fmt.Sprintf("%X", sum), Type: "Normal", MD5: sum, CRC: crc, Blob: c,
		Modified: s.options.Now().UTC()}
}
