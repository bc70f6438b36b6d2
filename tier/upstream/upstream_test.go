package upstream_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/file"
	"github.com/stepcache/stepcache/cache/source/sourcetest"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/tier/upstream"
)

// quick is a worker's clock whose waits are a fiftieth of what they are.
type quick struct{}

func (quick) Now() time.Time                         { return time.Now() }
func (quick) After(d time.Duration) <-chan time.Time { return time.After(d / 50) }

// world is a tier of one worker over a folder, and the folder of its read key.
type world struct {
	*testing.T
	root, keys string
	control    *client.Control
	opener     *upstream.Opener
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{T: t, root: t.TempDir(), keys: t.TempDir()}
	log := slog.New(slog.DiscardHandler)
	keys := wire.GenerateKeys()
	all := t.TempDir()
	must(t, wire.WriteKeys(all, keys))
	must(t, wire.WriteKeys(w.keys, wire.Keys{Read: keys.Read}))
	must(t, os.WriteFile(filepath.Join(w.keys, "copies"), []byte("1"), 0o600))
	dir, err := os.MkdirTemp("/dev/shm", "stepcache-upstream-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	wk, err := worker.New(context.Background(), worker.Config{
		Dataset: "ref/hg38", ID: "w", Memory: 64 << 20, Dir: filepath.Join(dir, "w"), KeysDir: all, Listen: "127.0.0.1:0", Control: "127.0.0.1:0",
		Mounts: []worker.Mount{{Path: "/", Config: source.Config{URL: "file://" + w.root}}},
	}, worker.Deps{Clock: quick{}, Logger: log})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- wk.Serve(ctx) }()
	w.opener = &upstream.Opener{Logger: log, Address: func(string, string) string { return wk.Addr().String() }}
	w.control, err = client.NewControl(client.ControlConfig{Dataset: "ref/hg38", Keys: keys, Membership: ring.Membership{Epoch: 1, Members: []ring.Member{
		{ID: "w", Addr: wk.Addr().String(), Control: wk.ControlAddr().String(), State: ring.Ready},
	}}})
	must(t, err)
	t.Cleanup(func() {
		w.opener.Close()
		w.control.Close()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return w
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (w *world) config() source.Config {
	return source.Config{URL: "dataset://ref/hg38", CredentialsDir: w.keys}
}

func (w *world) write(name, content string) {
	w.Helper()
	must(w.T, os.WriteFile(filepath.Join(w.root, name), []byte(content), 0o600))
}

// refresh lists the folder again.
func (w *world) refresh() {
	w.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		_, err := w.control.Refresh(w.Context())
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			w.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond) // the worker has not opened its source yet
	}
}

// behind is the upstream as a source that can be written: into the folder behind it.
type behind struct {
	*upstream.Dataset
	w     *world
	to    *file.Folder
	dirty atomic.Bool
}

func (b *behind) Put(ctx context.Context, key string, r io.Reader, size int64) (source.Object, error) {
	o, err := b.to.Put(ctx, key, r, size)
	b.dirty.Store(true)
	id := source.Identify(b.to.URL(), o)
	o.Version = hex.EncodeToString(id[:])
	return o, err
}

func (b *behind) Delete(ctx context.Context, key string) error {
	b.dirty.Store(true)
	return b.to.Delete(ctx, key)
}

func (b *behind) fresh() {
	if b.dirty.CompareAndSwap(true, false) {
		b.w.refresh()
	}
}

func (b *behind) Stat(ctx context.Context, key string) (source.Object, error) {
	b.fresh()
	return b.Dataset.Stat(ctx, key)
}

func (b *behind) List(ctx context.Context, prefix string, yield func(source.Object) error) error {
	b.fresh()
	return b.Dataset.List(ctx, prefix, yield)
}

func (b *behind) Get(ctx context.Context, o source.Object, off, length int64) (source.Body, error) {
	b.fresh()
	return b.Dataset.Get(ctx, o, off, length)
}

func TestConformance(t *testing.T) {
	sourcetest.Run(t, func(t *testing.T) sourcetest.Fixture {
		// What the suite asks of stores: a bucket that is not there, keys that are wrong. Here the one is a
		// tier that does not answer, the other is tested below.
		if strings.HasSuffix(t.Name(), "/NoBucket") || strings.HasSuffix(t.Name(), "Credentials") {
			t.Skip("an upstream has no buckets and keys of its own kind")
		}
		w := newWorld(t)
		return sourcetest.Fixture{
			Config: w.config(),
			Open: func(ctx context.Context, c source.Config) (source.Source, error) {
				d, err := w.opener.Dataset(c)
				if err != nil {
					return nil, err
				}
				to, err := file.Open(ctx, source.Config{URL: "file://" + w.root})
				return &behind{Dataset: d, w: w, to: to}, err
			},
			NoKey: func(key string) string {
				if strings.ContainsAny(key, "\t\n") || strings.HasPrefix(key, "/") || strings.HasSuffix(key, "/") || strings.Contains(key, "//") || strings.Contains(key, "../") || strings.HasPrefix(key, "./") {
					return "a Dataset has no such path"
				}
				return ""
			},
		}
	})
}

func read(t *testing.T, s source.Source, o source.Object) (string, error) {
	t.Helper()
	b, err := s.Get(t.Context(), o, 0, o.Size)
	if err != nil {
		return "", err
	}
	defer b.Close()
	p, err := io.ReadAll(b)
	return string(p), err
}

func TestAVersionThatIsNoMoreIsNeverMixedWithTheNext(t *testing.T) {
	w := newWorld(t)
	w.write("a", "before")
	w.write("b", "stays")
	w.refresh()
	d, err := w.opener.Dataset(w.config())
	must(t, err)
	before, err := d.Stat(t.Context(), "a")
	must(t, err)
	stays, err := d.Stat(t.Context(), "b")
	must(t, err)
	w.write("a", "after!")
	w.refresh()
	after, err := d.Stat(t.Context(), "a")
	must(t, err)
	if after.Version == before.Version || after.Size != before.Size {
		t.Fatalf("%+v and %+v", before, after)
	}
	if got, err := read(t, d, after); err != nil || got != "after!" {
		t.Errorf("the new version: %q, %v", got, err)
	}
	if got, err := read(t, d, before); !errors.Is(err, source.ErrChanged) {
		t.Errorf("the old version: %q, %v", got, err)
	}
	if got, err := read(t, d, stays); err != nil || got != "stays" {
		t.Errorf("what did not change: %q, %v", got, err)
	}
}

func TestAReaderOfAnOldListingFindsWhatANewOneHas(t *testing.T) {
	w := newWorld(t)
	w.write("a", "1")
	w.refresh()
	old, err := w.opener.Dataset(w.config())
	must(t, err)
	if _, err := old.Stat(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	w.write("b", "2")
	w.refresh()
	other, err := w.opener.Dataset(w.config())
	must(t, err)
	b, err := other.Stat(t.Context(), "b")
	must(t, err)
	if got, err := read(t, old, b); err != nil || got != "2" {
		t.Errorf("%q, %v", got, err)
	}
}

// Many readers that miss at once all wait for the listing that one of them looks for, also where the last look was a
// moment ago. What is no more is still said to be so.
func TestManyReadersOfAnOldListingFindWhatANewOneHas(t *testing.T) {
	w := newWorld(t)
	const files = 32
	name := func(n int) string { return fmt.Sprintf("f%02d", n) }
	for n := range files {
		w.write(name(n), "0")
	}
	w.write("gone", "0")
	w.refresh()
	old, err := w.opener.Dataset(w.config())
	must(t, err)
	other, err := w.opener.Dataset(w.config())
	must(t, err)
	gone, err := old.Stat(t.Context(), "gone")
	must(t, err)
	must(t, os.Remove(filepath.Join(w.root, "gone")))
	changed, err := old.Stat(t.Context(), name(0))
	must(t, err)
	for round := range 3 {
		want := fmt.Sprint("round ", round)
		for n := range files {
			w.write(name(n), want)
		}
		w.refresh()
		var objects []source.Object
		must(t, other.List(t.Context(), "f", func(o source.Object) error {
			objects = append(objects, o)
			return nil
		}))
		if len(objects) != files {
			t.Fatalf("%d files are listed", len(objects))
		}
		var wg sync.WaitGroup
		for _, o := range objects {
			wg.Go(func() {
				if got, err := read(t, old, o); err != nil || got != want {
					t.Errorf("%s, %s: %q, %v", want, o.Key, got, err)
				}
			})
		}
		wg.Go(func() {
			if got, err := read(t, old, gone); !errors.Is(err, source.ErrNotFound) {
				t.Errorf("%s, what was deleted: %q, %v", want, got, err)
			}
		})
		wg.Go(func() {
			if got, err := read(t, old, changed); !errors.Is(err, source.ErrChanged) {
				t.Errorf("%s, what was changed: %q, %v", want, got, err)
			}
		})
		wg.Wait()
	}
}

func TestWithoutTheReadKeyNothingIsRead(t *testing.T) {
	w := newWorld(t)
	w.write("a", "1")
	w.refresh()
	c := w.config()
	c.CredentialsDir = t.TempDir()
	none, err := w.opener.Dataset(c)
	must(t, err)
	if _, err := none.Stat(t.Context(), "a"); !errors.Is(err, source.ErrDenied) || !strings.Contains(err.Error(), "spec.shareWith") {
		t.Errorf("no key: %v", err)
	}
	must(t, wire.WriteKeys(c.CredentialsDir, wire.Keys{Read: wire.GenerateKeys().Read}))
	if _, err := none.Stat(t.Context(), "a"); !errors.Is(err, source.ErrDenied) {
		t.Errorf("another's key: %v", err)
	}
	// Once it is there it works, and without it no new connection is made.
	b, err := os.ReadFile(filepath.Join(w.keys, "read"))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(c.CredentialsDir, "read"), b, 0o600))
	o, err := none.Stat(t.Context(), "a")
	must(t, err)
	if got, err := read(t, none, o); err != nil || got != "1" {
		t.Errorf("with the key: %q, %v", got, err)
	}
	must(t, os.Remove(filepath.Join(c.CredentialsDir, "read")))
	if _, err := none.Stat(t.Context(), "a"); !errors.Is(err, source.ErrDenied) {
		t.Errorf("after the key was taken away: %v", err)
	}
}

func TestItIsNotWritten(t *testing.T) {
	w := newWorld(t)
	s, err := w.opener.Open(t.Context(), w.config())
	must(t, err)
	if _, err := s.Put(t.Context(), "a", bytes.NewReader(nil), 0); !errors.Is(err, source.ErrReadOnly) {
		t.Errorf("put: %v", err)
	}
	if err := s.Delete(t.Context(), "a"); !errors.Is(err, source.ErrReadOnly) {
		t.Errorf("delete: %v", err)
	}
	if _, err := w.opener.Open(t.Context(), source.Config{URL: "dataset://ref"}); !errors.Is(err, source.ErrInvalid) {
		t.Errorf("no name: %v", err)
	}
}

// Many readers that wait for an upstream that then refuses them do not each ask it in turn.
func TestALookThatFailsIsForAllWhoWaited(t *testing.T) {
	const readers = 16
	w := newWorld(t)
	c := w.config()
	c.CredentialsDir = t.TempDir()
	must(t, wire.WriteKeys(c.CredentialsDir, wire.Keys{Read: wire.GenerateKeys().Read}))
	var looks atomic.Int64
	var hold atomic.Pointer[chan struct{}]
	w.opener.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		looks.Add(1)
		select {
		case <-*hold.Load():
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		return new(net.Dialer).DialContext(ctx, network, addr)
	}
	denied, err := w.opener.Dataset(c)
	must(t, err)
	round := func() int64 {
		open := make(chan struct{})
		hold.Store(&open)
		looks.Store(0)
		var wg sync.WaitGroup
		for range readers {
			wg.Go(func() {
				if _, err := denied.Stat(t.Context(), "a"); !errors.Is(err, source.ErrDenied) {
					t.Error(err)
				}
			})
		}
		time.Sleep(20 * time.Millisecond) // so that most have come; those that have not look once more
		close(open)
		wg.Wait()
		return looks.Load()
	}
	n := round()
	for end := time.Now().Add(time.Minute); n > readers/2 && time.Now().Before(end); n = round() {
	}
	if n > readers/2 {
		t.Errorf("%d readers asked %d times", readers, n)
	}
}
