package gateway_test

import (
	"cmp"
	"context"
	"crypto/md5"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/source"
)

// memory implements Objects, Writer and Multipart as the contract says.
type memory struct {
	mu      sync.Mutex
	objects map[string]*version
	uploads map[string]*upload
	tick    int // makes times differ
	// openErr and writeErr are returned by reads, the latter after the first bytes.
	fail func(op string) error
	told source.Sums // of the content put last
}

type version struct {
	info gateway.Info
	data []byte
}

type upload struct {
	gateway.Upload
	o     gateway.PutOptions
	parts map[int]*part
}

type part struct {
	gateway.Part
	data []byte
}

func newMemory() *memory {
	return &memory{objects: map[string]*version{}, uploads: map[string]*upload{}}
}

// readOnly hides the methods of Writer and Multipart.
type readOnly struct{ gateway.Objects }

func (m *memory) failing(op string) error {
	m.mu.Lock()
	f := m.fail
	m.mu.Unlock()
	if f == nil {
		return nil
	}
	return f(op)
}

func (m *memory) setFail(f func(op string) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = f
}

// state counts what is stored: objects, uploads and parts.
func (m *memory) state() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	parts := 0
	for _, u := range m.uploads {
		parts += len(u.parts)
	}
	return fmt.Sprintf("%d objects, %d uploads, %d parts", len(m.objects), len(m.uploads), parts)
}

func (m *memory) get(key string) (*version, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if v := m.objects[key]; v != nil {
		return v, nil
	}
	return nil, fmt.Errorf("memory %s: %w", key, source.ErrNotFound)
}

func (m *memory) Stat(ctx context.Context, key string) (gateway.Info, error) {
	if err := m.failing("stat"); err != nil {
		return gateway.Info{}, err
	}
	v, err := m.get(key)
	if err != nil {
		return gateway.Info{}, err
	}
	return v.info, nil
}

type opened struct {
	m *memory
	*version
}

func (m *memory) Open(ctx context.Context, key string) (gateway.Object, error) {
	if err := m.failing("open"); err != nil {
		return nil, err
	}
	v, err := m.get(key)
	if err != nil {
		return nil, err
	}
	return opened{m, v}, nil
}

func (o opened) Info() gateway.Info { return o.info }
func (o opened) Close() error       { return nil }

func (o opened) WriteRange(ctx context.Context, w io.Writer, off, n int64) error {
	if err := o.m.failing("read"); err != nil {
		return err
	}
	part := o.data[off : off+n]
	if err := o.m.failing("read half"); err != nil {
		w.Write(part[:n/2])
		return err
	}
	_, err := w.Write(part)
	return err
}

func (m *memory) List(ctx context.Context, prefix, delimiter, after string, most int) (gateway.Page, error) {
	if err := m.failing("list"); err != nil {
		return gateway.Page{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var page gateway.Page
	for _, key := range slices.Sorted(maps.Keys(m.objects)) {
		if !strings.HasPrefix(key, prefix) {
			continue
		}
		entry, common := key, false
		if i := strings.Index(key[len(prefix):], delimiter); delimiter != "" && i >= 0 {
			entry, common = key[:len(prefix)+i+len(delimiter)], true
		}
		if entry <= after || common && len(page.Prefixes) > 0 && page.Prefixes[len(page.Prefixes)-1] == entry {
			continue
		}
		if len(page.Objects)+len(page.Prefixes) == most {
			page.More = true
			break
		}
		if page.Next = entry; common {
			page.Prefixes = append(page.Prefixes, entry)
		} else {
			page.Objects = append(page.Objects, m.objects[key].info)
		}
	}
	return page, nil
}

func (m *memory) now() time.Time {
	m.tick++
	return time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC).Add(time.Duration(m.tick) * time.Second)
}

func readBody(r io.Reader, size int64) ([]byte, string, error) {
	data, err := io.ReadAll(r)
	if err != nil {
		return nil, "", fmt.Errorf("memory: %w", err)
	}
	if int64(len(data)) != size {
		return nil, "", fmt.Errorf("memory: %d bytes of %d: %w", len(data), size, io.ErrUnexpectedEOF)
	}
	sum := md5.Sum(data)
	return data, hex.EncodeToString(sum[:]), nil
}

func (m *memory) Put(ctx context.Context, key string, size int64, r io.Reader, o gateway.PutOptions) (gateway.Info, error) {
	data, etag, err := readBody(r, size)
	if err != nil {
		return gateway.Info{}, err
	}
	if err := m.failing("put"); err != nil {
		return gateway.Info{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.told = o.Sums
	return m.store(key, data, etag, o)
}

func (m *memory) store(key string, data []byte, etag string, o gateway.PutOptions) (gateway.Info, error) {
	now := m.objects[key]
	switch {
	case o.IfNoneMatch == "*" && now != nil:
		return gateway.Info{}, gateway.ErrPrecondition
	case o.IfMatch != "" && now == nil:
		return gateway.Info{}, source.ErrNotFound
	case o.IfMatch != "" && o.IfMatch != "*" && o.IfMatch != now.info.ETag:
		return gateway.Info{}, gateway.ErrPrecondition
	}
	v := &version{data: data, info: gateway.Info{
		Key: key, Size: int64(len(data)), ETag: etag, ModTime: m.now(), ContentType: o.ContentType, Headers: o.Headers, Metadata: o.Metadata,
	}}
	m.objects[key] = v
	return v.info, nil
}

func (m *memory) Delete(ctx context.Context, key string) error {
	if err := m.failing("delete"); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.objects, key)
	return nil
}

func (m *memory) Copy(ctx context.Context, from gateway.Info, to string, o gateway.PutOptions) (gateway.Info, error) {
	if err := m.failing("copy"); err != nil {
		return gateway.Info{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	v := m.objects[from.Key]
	if v == nil || v.info.ETag != from.ETag {
		return gateway.Info{}, source.ErrChanged
	}
	return m.store(to, v.data, v.info.ETag, o)
}

func (m *memory) Create(ctx context.Context, key string, o gateway.PutOptions) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	u := &upload{Upload: gateway.Upload{Key: key, ID: rand.Text(), Started: m.now()}, o: o, parts: map[int]*part{}}
	m.uploads[u.ID] = u
	return u.ID, nil
}

func (m *memory) upload(key, id string) (*upload, error) {
	if u := m.uploads[id]; u != nil && u.Key == key {
		return u, nil
	}
	return nil, fmt.Errorf("memory %s: %w", key, gateway.ErrNoUpload)
}

func (m *memory) PutPart(ctx context.Context, key, id string, number int, size int64, r io.Reader, sums source.Sums) (gateway.Part, error) {
	data, etag, err := readBody(r, size)
	if err != nil {
		return gateway.Part{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	u, err := m.upload(key, id)
	if err != nil {
		return gateway.Part{}, err
	}
	m.told = sums
	p := &part{gateway.Part{Number: number, ETag: etag, Size: size, ModTime: m.now()}, data}
	u.parts[number] = p
	return p.Part, nil
}

func (m *memory) Complete(ctx context.Context, key, id string, parts []gateway.Part, o gateway.PutOptions) (gateway.Info, error) {
	if err := m.failing("complete"); err != nil {
		return gateway.Info{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	u, err := m.upload(key, id)
	if err != nil {
		return gateway.Info{}, err
	}
	var data []byte
	sums := md5.New()
	for _, p := range parts {
		have := u.parts[p.Number]
		if have == nil || have.ETag != p.ETag {
			return gateway.Info{}, fmt.Errorf("memory: part %d: %w", p.Number, gateway.ErrBadPart)
		}
		data = append(data, have.data...)
		sum := md5.Sum(have.data)
		sums.Write(sum[:])
	}
	u.o.IfMatch, u.o.IfNoneMatch = o.IfMatch, o.IfNoneMatch
	info, err := m.store(key, data, fmt.Sprintf("%x-%d", sums.Sum(nil), len(parts)), u.o)
	if err == nil {
		delete(m.uploads, id)
	}
	return info, err
}

func (m *memory) Abort(ctx context.Context, key, id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, err := m.upload(key, id); err != nil {
		return err
	}
	delete(m.uploads, id)
	return nil
}

func (m *memory) Parts(ctx context.Context, key, id string, after, most int) ([]gateway.Part, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	u, err := m.upload(key, id)
	if err != nil {
		return nil, false, err
	}
	var found []gateway.Part
	for _, number := range slices.Sorted(maps.Keys(u.parts)) {
		if number <= after {
			continue
		}
		if len(found) == most {
			return found, true, nil
		}
		found = append(found, u.parts[number].Part)
	}
	return found, false, nil
}

func (m *memory) Uploads(ctx context.Context, prefix string) ([]gateway.Upload, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var found []gateway.Upload
	for _, u := range m.uploads {
		if strings.HasPrefix(u.Key, prefix) {
			found = append(found, u.Upload)
		}
	}
	slices.SortFunc(found, func(a, b gateway.Upload) int { return cmp.Compare(a.Key, b.Key) })
	return found, false, nil
}

var errDisk = errors.New("disk on fire")

var (
	_ gateway.Objects   = (*memory)(nil)
	_ gateway.Writer    = (*memory)(nil)
	_ gateway.Multipart = (*memory)(nil)
)
