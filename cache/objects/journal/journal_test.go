package journal_test

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/objects/journal"
	"github.com/stepcache/stepcache/cache/source"
)

func open(t *testing.T, dir string, limit int64) *journal.Journal {
	t.Helper()
	j, err := journal.Open(dir, limit, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func content(n int) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n)}).Read(p)
	return p
}

func put(t *testing.T, j *journal.Journal, key string, n uint64, p []byte) journal.Record {
	t.Helper()
	d, err := j.Begin(int64(len(p)))
	if err != nil {
		t.Fatal(err)
	}
	for q := p; len(q) > 0; {
		k := min(len(q), 50_001) // across the pieces
		if _, err := d.Write(q[:k]); err != nil {
			t.Fatal(err)
		}
		q = q[k:]
	}
	r := journal.Record{
		Key: key, Seq: journal.Seq{Epoch: 3, N: n}, ETag: "e", Time: time.Unix(1, 0).UTC(),
		Attrs: source.Attributes{ContentType: "text/plain", Metadata: map[string]string{"a": "b"}},
	}
	if err := d.Commit(r); err != nil {
		t.Fatal(err)
	}
	return r
}

func reads(t *testing.T, j *journal.Journal, key string, n uint64, want []byte) {
	t.Helper()
	c, err := j.Content(key, journal.Seq{Epoch: 3, N: n})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got, err := io.ReadAll(io.NewSectionReader(c, 0, int64(len(want))+1))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes of %d, %v", len(got), len(want), err)
	}
}

// What was committed is there for the next process, with all that was said of it.
func TestEntriesAndMarksOutliveTheProcess(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir, 10<<20)
	for i, size := range []int{0, 1, journal.SumSize, journal.SumSize + 1, 300_000} {
		put(t, j, "k", uint64(i+1), content(size))
	}
	put(t, j, "other", 7, content(9))
	if err := j.Mark("marked", journal.Seq{Epoch: 3, N: 5}); err != nil {
		t.Fatal(err)
	}
	again := open(t, dir, 10<<20)
	if a, b := j.Keys(), again.Keys(); !reflect.DeepEqual(a, b) || len(a) != 3 {
		t.Errorf("keys %q, before %q", b, a)
	}
	for _, k := range j.Keys() {
		if a, b := j.Of(k), again.Of(k); !reflect.DeepEqual(a, b) {
			t.Errorf("%s: %+v, before %+v", k, b, a)
		}
	}
	for i, size := range []int{0, 1, journal.SumSize, journal.SumSize + 1, 300_000} {
		reads(t, again, "k", uint64(i+1), content(size))
	}
	if j.Used() != again.Used() {
		t.Errorf("%d bytes are used, before %d", again.Used(), j.Used())
	}
}

// Whatever point of a write the process was killed at: what is not whole is not there, and its room is free.
func TestTornFilesAreRemoved(t *testing.T) {
	for name, damage := range map[string]func(path string, b []byte) error{
		"cut in the content": func(path string, b []byte) error { return os.Truncate(path, 1000) },
		"cut in the foot":    func(path string, b []byte) error { return os.Truncate(path, int64(len(b)-20)) },
		"without its end":    func(path string, b []byte) error { return os.Truncate(path, int64(len(b)-1)) },
		"empty":              func(path string, b []byte) error { return os.Truncate(path, 0) },
		"a byte of content":  func(path string, b []byte) error { b[70_000] ^= 1; return os.WriteFile(path, b, 0o600) },
		"a byte of the foot": func(path string, b []byte) error { b[len(b)-30] ^= 1; return os.WriteFile(path, b, 0o600) },
		"content cut out":    func(path string, b []byte) error { return os.WriteFile(path, b[100:], 0o600) },
		"never finished":     func(path string, b []byte) error { return os.Rename(path, filepath.Join(filepath.Dir(path), "9.new")) },
		"of another name": func(path string, b []byte) error {
			return os.Rename(path, filepath.Join(filepath.Dir(path), "0123-3-1.put"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			put(t, open(t, dir, 1<<20), "k", 1, content(100_000))
			files, err := os.ReadDir(dir)
			if err != nil || len(files) != 1 {
				t.Fatal(files, err)
			}
			path := filepath.Join(dir, files[0].Name())
			b, err := os.ReadFile(path)
			if err == nil {
				err = damage(path, b)
			}
			if err != nil {
				t.Fatal(err)
			}
			j := open(t, dir, 1<<20)
			if n, _ := j.Entries(); n != 0 || j.Used() != 0 {
				t.Errorf("%d entries, %d bytes used", n, j.Used())
			}
			if files, err := os.ReadDir(dir); err != nil || len(files) != 0 {
				t.Errorf("left: %v, %v", files, err)
			}
		})
	}
}

// A mark takes what it is about away, also for the next process; forgetting takes the mark too.
func TestMarkAndForget(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir, 1<<20)
	for n := range uint64(4) {
		put(t, j, "k", n+1, content(100))
	}
	seq := func(n uint64) journal.Seq { return journal.Seq{Epoch: 3, N: n} }
	for range 2 { // again is no harm
		if err := j.Mark("k", seq(2)); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for _, r := range open(t, dir, 1<<20).Of("k") {
		kind := "put"
		if r.Mark {
			kind = "mark"
		}
		got = append(got, kind+string(rune('0'+r.Seq.N)))
	}
	if strings.Join(got, " ") != "mark2 put3 put4" {
		t.Errorf("after the mark: %q", got)
	}
	if err := j.Forget("k", seq(3)); err != nil {
		t.Fatal(err)
	}
	if l := open(t, dir, 1<<20).Of("k"); len(l) != 1 || l[0].Seq != seq(4) {
		t.Errorf("after forgetting: %v", l)
	}
	if _, err := j.Content("k", seq(3)); !errors.Is(err, journal.ErrGone) {
		t.Errorf("what was forgotten: %v", err)
	}
	if err := j.Forget("k", seq(9)); err != nil {
		t.Fatal(err)
	}
	if j.Used() != 0 || len(j.Keys()) != 0 {
		t.Errorf("%d bytes used, keys %q", j.Used(), j.Keys())
	}
}

// The bound holds for drafts and entries together; what is aborted or dropped gives its room back.
func TestAFullJournalRefuses(t *testing.T) {
	j := open(t, t.TempDir(), 100_000)
	d, err := j.Begin(60_000)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := j.Begin(60_000); !errors.Is(err, journal.ErrFull) {
		t.Errorf("beyond the bound: %v", err)
	}
	if _, err := d.Write(content(60_001)); err == nil {
		t.Error("more than was promised was taken")
	}
	d.Abort()
	d.Abort()
	put(t, j, "k", 1, content(60_000))
	if _, err := j.Begin(60_000); !errors.Is(err, journal.ErrFull) {
		t.Errorf("beyond the bound: %v", err)
	}
	if err := j.Forget("k", journal.Seq{Epoch: 3, N: 1}); err != nil {
		t.Fatal(err)
	}
	if d, err = j.Begin(60_000); err != nil {
		t.Fatal(err)
	}
	d.Abort()
	if j.Used() != 0 {
		t.Errorf("%d bytes used", j.Used())
	}
}

// Memory that went bad is found whenever it is read, and only there.
func TestCorruptContentIsFoundByItsReader(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir, 1<<20)
	want := content(200_000)
	put(t, j, "k", 1, want)
	files, _ := os.ReadDir(dir)
	f, err := os.OpenFile(filepath.Join(dir, files[0].Name()), os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt([]byte{want[150_000] ^ 1}, 150_000)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c, err := j.Content("k", journal.Seq{Epoch: 3, N: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p := make([]byte, 1000)
	if _, err := c.ReadAt(p, 149_500); !errors.Is(err, journal.ErrCorrupt) {
		t.Errorf("a bad piece: %v", err)
	}
	if _, err := c.ReadAt(p, 1_000); err != nil || !bytes.Equal(p, want[1000:2000]) {
		t.Errorf("a good piece: %v", err)
	}
}

// What is put through after all is read from the draft, which lies in the same memory.
func TestCorruptContentOfADraftIsFoundByItsReader(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir, 1<<20)
	d, err := j.Begin(200_000)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	want := content(200_000)
	if _, err := d.Write(want); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(d.Content()); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes of a sound draft: %v", len(got), err)
	}
	files, _ := os.ReadDir(dir)
	if err := os.WriteFile(filepath.Join(dir, files[0].Name()), append([]byte{want[0] ^ 1}, want[1:]...), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(d.Content()); !errors.Is(err, journal.ErrCorrupt) || len(got) != 0 {
		t.Errorf("%d bytes of one whose first has changed: %v", len(got), err)
	}
}

// A copy that was on its way when its name was marked or forgotten does not come after, in this process or, after a
// mark, the next.
func TestACopyThatComesTooLateIsRefused(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir, 1<<20)
	late := func(j *journal.Journal, key string, n uint64) error {
		d, err := j.Begin(3)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Abort()
		if _, err := d.Write([]byte("old")); err != nil {
			t.Fatal(err)
		}
		return d.Commit(journal.Record{Key: key, Seq: journal.Seq{Epoch: 3, N: n}})
	}
	if err := j.Forget("forgotten", journal.Seq{Epoch: 3, N: 5}); err != nil {
		t.Fatal(err)
	}
	if err := j.Mark("marked", journal.Seq{Epoch: 3, N: 5}); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"forgotten", "marked"} {
		if err := late(j, key, 5); !errors.Is(err, journal.ErrGone) {
			t.Errorf("%s, of that sequence: %v", key, err)
		}
		if err := late(j, key, 6); err != nil {
			t.Errorf("%s, a newer one: %v", key, err)
		}
	}
	if err := late(open(t, dir, 1<<20), "marked", 4); !errors.Is(err, journal.ErrGone) {
		t.Errorf("marked, in the next process: %v", err)
	}
	if n, _ := open(t, dir, 1<<20).Entries(); n != 2 {
		t.Errorf("%d entries", n)
	}
}
