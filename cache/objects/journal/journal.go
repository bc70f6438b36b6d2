// Package journal keeps what was written to a dataset and is not in its bucket yet, so that it outlives the
// process that took it.
//
// It owns one folder, on the worker's tmpfs: a file for each entry (the content of one version of one name, and
// a foot that says what it is) and for each mark (everything of the name up to a sequence is in the bucket). A
// file is written under a passing name and renamed into place when it is whole. So there is no append-only log
// that could be torn, or that would have to be rewritten to give back the memory of what was flushed: an entry
// is there as a whole or not at all, whenever the process is killed, and removing its file frees its pages.
// tmpfs loses nothing that was written when a process dies, so nothing is synced; a machine that goes down loses
// the folder, which is what the copies at other workers are for.
//
// Concurrency: a Journal is safe for concurrent use. A Draft is for one goroutine. No lock is held over I/O but
// the making and removing of names. Failure: Open removes what is not whole, which was never acknowledged, and
// fails only when the folder cannot be used. Content is checked against the CRC32C of each piece of it whenever it
// is read. ErrFull when the bound of bytes or files is reached.
//
// It may import cache/source (attributes) and nothing else of this module.
package journal

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/source"
)

// Errors.
var (
	// ErrFull: there is no room for another entry.
	ErrFull = errors.New("the journal is full")
	// ErrCorrupt: content does not match its sums.
	ErrCorrupt = errors.New("an entry of the journal is corrupt")
	// ErrGone: there is no such entry (any more).
	ErrGone = errors.New("no such entry")
)

// Seq orders the writes of one name, across its owners: those of a later membership come later.
type Seq struct {
	Epoch, N uint64
}

// Compare is negative when s comes before o.
func (s Seq) Compare(o Seq) int { return cmp.Or(cmp.Compare(s.Epoch, o.Epoch), cmp.Compare(s.N, o.N)) }

// Record is an entry or a mark.
type Record struct {
	Key string
	Seq Seq
	// Mark: everything of Key up to Seq is in the bucket. The rest is empty then.
	Mark bool `json:",omitempty"`

	Size  int64             `json:",omitempty"`
	ETag  string            `json:",omitempty"`
	Time  time.Time         `json:",omitzero"`
	Attrs source.Attributes `json:",omitzero"`
	// Sums are the CRC32C of each SumSize bytes of the content.
	Sums []uint32 `json:",omitempty"`
}

// SumSize is how many bytes one sum covers.
const SumSize = 64 << 10

const (
	// overhead is what a file takes beside its content: its foot, its last page and the kernel's inode.
	overhead = 8 << 10
	// maxFoot bounds a foot, of which the key, the attributes and the sums make most.
	maxFoot   = 1 << 20
	footMagic = "stepjnl1"
	tailSize  = 4 + 4 + len(footMagic)
	passing   = ".new"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Journal is an open journal.
type Journal struct {
	dir   string
	limit int64

	mu     sync.Mutex
	used   int64               // bytes of files and drafts
	drafts int64               // drafts begun so far, for their names
	byKey  map[string][]Record // in order
	bytes  int64               // content of entries
	count  int                 // entries
	// forgot is up to where the names were marked or forgotten lately, before the same of the time before: a copy
	// that was on its way then must not come after. since is when forgot began.
	forgot, before map[string]Seq
	since          time.Time
}

// forgetAfter is longer than a copy can be on its way.
const forgetAfter = 5 * time.Minute

// Open opens the journal in dir, which it makes, and finds what a former process left. limit bounds its bytes.
func Open(dir string, limit int64, log *slog.Logger) (*Journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	j := &Journal{dir: dir, limit: limit, byKey: make(map[string][]Record), forgot: make(map[string]Seq)}
	for _, f := range files {
		path := filepath.Join(dir, f.Name())
		var r Record
		err := fmt.Errorf("%w: it was not finished", ErrCorrupt)
		if !strings.HasSuffix(f.Name(), passing) {
			r, err = read(path)
		}
		if err == nil && name(r) != f.Name() {
			err = fmt.Errorf("%w: it is that of another name", ErrCorrupt)
		}
		switch {
		case err == nil:
			j.add(r)
			j.used += cost(r.Size)
		case errors.Is(err, ErrCorrupt):
			log.Warn("journal: removed what was not written whole, and so never acknowledged", "file", f.Name(), "error", err)
			if err := os.RemoveAll(path); err != nil {
				return nil, fmt.Errorf("journal: %w", err)
			}
		default:
			return nil, fmt.Errorf("journal: %w", err)
		}
	}
	return j, nil
}

// read reads the foot of a file and checks its content.
func read(path string) (Record, error) {
	f, err := os.Open(path)
	if err != nil {
		return Record{}, err
	}
	defer f.Close()
	about, err := f.Stat()
	if err != nil {
		return Record{}, err
	}
	tail := make([]byte, tailSize)
	at := about.Size() - int64(tailSize)
	if at < 0 || !about.Mode().IsRegular() {
		return Record{}, fmt.Errorf("%w: it has no foot", ErrCorrupt)
	}
	if _, err := f.ReadAt(tail, at); err != nil {
		return Record{}, err
	}
	n := int64(binary.LittleEndian.Uint32(tail))
	if string(tail[8:]) != footMagic || n > maxFoot || n > at {
		return Record{}, fmt.Errorf("%w: it has no foot", ErrCorrupt)
	}
	foot := make([]byte, n)
	if _, err := f.ReadAt(foot, at-n); err != nil {
		return Record{}, err
	}
	var r Record
	if crc32.Checksum(foot, castagnoli) != binary.LittleEndian.Uint32(tail[4:]) || json.Unmarshal(foot, &r) != nil {
		return Record{}, fmt.Errorf("%w: its foot is damaged", ErrCorrupt)
	}
	if r.Size != at-n || r.Size > 0 && int64(len(r.Sums)) != (r.Size-1)/SumSize+1 {
		return Record{}, fmt.Errorf("%w: it has %d bytes of %d", ErrCorrupt, at-n, r.Size)
	}
	buf := make([]byte, SumSize)
	for i, want := range r.Sums {
		p := buf[:min(SumSize, r.Size-int64(i)*SumSize)]
		if _, err := f.ReadAt(p, int64(i)*SumSize); err != nil {
			return Record{}, err
		}
		if crc32.Checksum(p, castagnoli) != want {
			return Record{}, fmt.Errorf("%w: byte %d and on", ErrCorrupt, i*SumSize)
		}
	}
	return r, nil
}

// name is the file of a record.
func name(r Record) string {
	sum := sha256.Sum256([]byte(r.Key))
	kind := "put"
	if r.Mark {
		kind = "mark"
	}
	return fmt.Sprintf("%s-%d-%d.%s", hex.EncodeToString(sum[:12]), r.Seq.Epoch, r.Seq.N, kind)
}

func cost(size int64) int64 { return size + overhead }

// add puts a record into the index. The caller holds the mutex, or nobody else knows j.
func (j *Journal) add(r Record) {
	l := j.byKey[r.Key]
	i, _ := slices.BinarySearchFunc(l, r, func(a, b Record) int { return a.Seq.Compare(b.Seq) })
	j.byKey[r.Key] = slices.Insert(l, i, r)
	if !r.Mark {
		j.bytes += r.Size
		j.count++
	}
}

// Draft is an entry that is being written.
type Draft struct {
	j    *Journal
	f    *os.File
	path string
	size int64 // promised
	n    int64 // written
	sums []uint32
	sum  uint32 // of the last, unfinished piece
}

// Begin begins an entry of so many bytes: ErrFull when there is no room. Commit or Abort must be called.
func (j *Journal) Begin(size int64) (*Draft, error) {
	j.mu.Lock()
	if j.used+cost(size) > j.limit {
		j.mu.Unlock()
		return nil, ErrFull
	}
	j.used += cost(size)
	j.drafts++
	path := filepath.Join(j.dir, fmt.Sprintf("%d%s", j.drafts, passing))
	j.mu.Unlock()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err != nil {
		j.release(size)
		return nil, fmt.Errorf("journal: %w", err)
	}
	return &Draft{j: j, f: f, path: path, size: size}, nil
}

func (j *Journal) release(size int64) {
	j.mu.Lock()
	j.used -= cost(size)
	j.mu.Unlock()
}

// Write appends content.
func (d *Draft) Write(p []byte) (int, error) {
	if d.n+int64(len(p)) > d.size {
		return 0, fmt.Errorf("journal: more than the %d bytes that were said to come", d.size)
	}
	n, err := d.f.Write(p)
	for q := p[:n]; len(q) > 0; {
		k := min(int64(len(q)), SumSize-d.n%SumSize)
		d.sum = crc32.Update(d.sum, castagnoli, q[:k])
		d.n += k
		if q = q[k:]; d.n%SumSize == 0 {
			d.sums, d.sum = append(d.sums, d.sum), 0
		}
	}
	if err != nil {
		return n, fmt.Errorf("journal: %w", err)
	}
	return n, nil
}

// Sums are those of what was written, which must be all.
func (d *Draft) Sums() []uint32 {
	if d.n%SumSize == 0 {
		return d.sums
	}
	return append(slices.Clip(d.sums), d.sum)
}

// Content is what was written so far. Its pieces are checked as they are read.
func (d *Draft) Content() io.Reader {
	return io.NewSectionReader(&Content{d.f, Record{Size: d.n, Sums: d.Sums()}}, 0, d.n)
}

// Commit makes the draft the entry that r says; its Size and Sums are filled in. After an error it is aborted.
func (d *Draft) Commit(r Record) error {
	r.Size, r.Sums = d.n, d.Sums()
	err := d.j.put(d.f, d.path, r)
	if err == nil {
		d.j.mu.Lock()
		d.j.used -= d.size - d.n
		d.j.mu.Unlock()
		err = d.f.Close()
		d.f = nil
		return err
	}
	d.Abort()
	return err
}

// Abort drops the draft. After Commit it does nothing.
func (d *Draft) Abort() {
	if d.f == nil {
		return
	}
	_ = d.f.Close() // of no use any more
	_ = os.Remove(d.path)
	d.j.release(d.size)
	d.f = nil
}

// put writes the foot of f and gives it its name.
func (j *Journal) put(f *os.File, path string, r Record) error {
	foot, err := json.Marshal(r)
	if err == nil && len(foot) > maxFoot {
		err = fmt.Errorf("a foot of %d bytes", len(foot))
	}
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	tail := binary.LittleEndian.AppendUint32(nil, uint32(len(foot)))
	tail = binary.LittleEndian.AppendUint32(tail, crc32.Checksum(foot, castagnoli))
	if _, err := f.WriteAt(append(append(foot, tail...), footMagic...), r.Size); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, m := range []map[string]Seq{j.forgot, j.before} {
		if f, ok := m[r.Key]; ok && !r.Mark && r.Seq.Compare(f) <= 0 {
			return fmt.Errorf("journal: %q: %w: the bucket has it by now", r.Key, ErrGone)
		}
	}
	if slices.ContainsFunc(j.byKey[r.Key], func(o Record) bool { return o.Mark && !r.Mark && r.Seq.Compare(o.Seq) <= 0 }) {
		return fmt.Errorf("journal: %q: %w: the bucket has it by now", r.Key, ErrGone)
	}
	if err := os.Rename(path, filepath.Join(j.dir, name(r))); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	if !slices.ContainsFunc(j.byKey[r.Key], func(o Record) bool { return o.Seq == r.Seq && o.Mark == r.Mark }) {
		j.add(r)
	} else {
		j.used -= cost(r.Size) // it took the place of the same
	}
	return nil
}

// Mark says that everything of key up to seq is in the bucket, and drops that. Marks have room of their own.
func (j *Journal) Mark(key string, seq Seq) error {
	r := Record{Key: key, Seq: seq, Mark: true}
	j.mu.Lock()
	j.note(key, seq)
	for _, o := range j.byKey[key] {
		if o.Mark && o.Seq.Compare(seq) >= 0 {
			j.mu.Unlock()
			return nil
		}
	}
	j.used += cost(0)
	j.drafts++
	path := filepath.Join(j.dir, fmt.Sprintf("%d%s", j.drafts, passing))
	j.mu.Unlock()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err == nil {
		err = errors.Join(j.put(f, path, r), f.Close())
	}
	if err != nil {
		j.release(0)
		return fmt.Errorf("journal: mark: %w", err)
	}
	return j.drop(key, func(o Record) bool { return o.Seq.Compare(seq) < 0 || o.Seq == seq && !o.Mark })
}

// Forget drops everything of key up to seq, marks too.
func (j *Journal) Forget(key string, seq Seq) error {
	j.mu.Lock()
	j.note(key, seq)
	j.mu.Unlock()
	// Entries first: a mark must not go before what it is about.
	if err := j.drop(key, func(o Record) bool { return !o.Mark && o.Seq.Compare(seq) <= 0 }); err != nil {
		return err
	}
	return j.drop(key, func(o Record) bool { return o.Seq.Compare(seq) <= 0 })
}

// Drop drops one entry.
func (j *Journal) Drop(key string, seq Seq) error {
	return j.drop(key, func(o Record) bool { return !o.Mark && o.Seq == seq })
}

// note notes up to where a name is in the bucket. The caller holds the mutex.
func (j *Journal) note(key string, seq Seq) {
	if now := time.Now(); now.Sub(j.since) > forgetAfter {
		j.before, j.forgot, j.since = j.forgot, make(map[string]Seq), now
	}
	if old, ok := j.forgot[key]; !ok || old.Compare(seq) < 0 {
		j.forgot[key] = seq
	}
}

func (j *Journal) drop(key string, which func(Record) bool) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	var errs []error
	l := slices.DeleteFunc(slices.Clone(j.byKey[key]), func(r Record) bool {
		if !which(r) {
			return false
		}
		if err := os.Remove(filepath.Join(j.dir, name(r))); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("journal: %w", err))
			return false
		}
		j.used -= cost(r.Size)
		if !r.Mark {
			j.bytes -= r.Size
			j.count--
		}
		return true
	})
	if len(l) == 0 {
		delete(j.byKey, key)
	} else {
		j.byKey[key] = l
	}
	return errors.Join(errs...)
}

// Of are the records of key, in order.
func (j *Journal) Of(key string) []Record {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(j.byKey[key])
}

// Keys are the keys that have records, in order.
func (j *Journal) Keys() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	out := make([]string, 0, len(j.byKey))
	for k := range j.byKey {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// Entries is how many entries there are, and the bytes of their content.
func (j *Journal) Entries() (n int, bytes int64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.count, j.bytes
}

// Used are the bytes that count against the limit.
func (j *Journal) Used() int64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.used
}

// Content is the content of an entry, which stays readable when the entry is dropped.
type Content struct {
	f *os.File
	r Record
}

// Content opens an entry's content: ErrGone when there is none.
func (j *Journal) Content(key string, seq Seq) (*Content, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, r := range j.byKey[key] {
		if r.Seq == seq && !r.Mark {
			f, err := os.Open(filepath.Join(j.dir, name(r)))
			if err != nil {
				return nil, fmt.Errorf("journal: %w", err)
			}
			return &Content{f, r}, nil
		}
	}
	return nil, fmt.Errorf("journal: %q: %w", key, ErrGone)
}

// Close gives it back.
func (c *Content) Close() error { return c.f.Close() }

// ReadAt implements io.ReaderAt. Every piece that p touches is read whole and checked.
func (c *Content) ReadAt(p []byte, off int64) (n int, err error) {
	buf := make([]byte, SumSize)
	for n < len(p) {
		if off >= c.r.Size {
			return n, io.EOF
		}
		i := off / SumSize
		piece := buf[:min(SumSize, c.r.Size-i*SumSize)]
		if _, err := c.f.ReadAt(piece, i*SumSize); err != nil {
			return n, fmt.Errorf("journal: %q: %w", c.r.Key, err)
		}
		if crc32.Checksum(piece, castagnoli) != c.r.Sums[i] {
			return n, fmt.Errorf("journal: %q: %w: byte %d and on", c.r.Key, ErrCorrupt, i*SumSize)
		}
		k := copy(p[n:], piece[off-i*SumSize:])
		n, off = n+k, off+int64(k)
	}
	return n, nil
}
