package catalog

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/stepcache/stepcache/cache/source"
)

// bucket is a source that lists and stats what it is given; the other verbs are not the catalog's.
type bucket struct {
	source.Source
	url     string
	objects []source.Object
	err     error // ends a listing after all objects
	statErr error
	hold    chan struct{} // closed when a listing may begin
	began   chan struct{} // told when a listing begins
	listed  []string      // prefixes
	stats   atomic.Int64
}

func (b *bucket) URL() string { return b.url }

func (b *bucket) List(ctx context.Context, prefix string, yield func(source.Object) error) error {
	b.listed = append(b.listed, prefix)
	if b.began != nil {
		b.began <- struct{}{}
	}
	if b.hold != nil {
		select {
		case <-b.hold:
		case <-ctx.Done():
			return fmt.Errorf("%s/%s: %w", b.url, prefix, ctx.Err())
		}
	}
	for _, i := range rand.Perm(len(b.objects)) { // the order is not promised
		if strings.HasPrefix(b.objects[i].Key, prefix) {
			if err := yield(b.objects[i]); err != nil {
				return err
			}
		}
	}
	if b.err != nil {
		return fmt.Errorf("%s/%s: %w", b.url, prefix, b.err)
	}
	return nil
}

func (b *bucket) Stat(ctx context.Context, key string) (source.Object, error) {
	b.stats.Add(1)
	for _, o := range b.objects {
		if o.Key == key {
			return o, nil
		}
	}
	return source.Object{}, fmt.Errorf("%s/%s: %w", b.url, key, cmp.Or(b.statErr, source.ErrNotFound))
}

func list(t *testing.T, mounts []Mount, sources ...source.Source) *Snapshot {
	t.Helper()
	s, err := List(t.Context(), mounts, sources, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestListManyMounts(t *testing.T) {
	one, two := &bucket{url: "s3://one"}, &bucket{url: "s3://two"}
	var size int64
	for i := range 5000 {
		o := object(fmt.Sprintf("p/%d/%d", i%70, i), int64(i))
		one.objects = append(one.objects, o)
		size += o.Size
	}
	two.objects = objects("a", "b/c")
	var calls, files, bytes int64
	s, err := List(t.Context(), []Mount{{Prefix: "p/", Path: "/one"}, {Path: "/two"}}, []source.Source{one, two}, 0, func(f, b int64) {
		if f < files || b < bytes {
			t.Errorf("progress went back from %d to %d", files, f)
		}
		calls, files, bytes = calls+1, f, b
	})
	if err != nil {
		t.Fatal(err)
	}
	tree(t, s)
	if s.Files() != 5002 || files != 5002 || bytes != size+3 || calls < 5 {
		t.Errorf("%d files; %d files and %d bytes in %d calls", s.Files(), files, bytes, calls)
	}
	if s.Created().IsZero() {
		t.Error("no time of creation")
	}
	if again := list(t, []Mount{{Prefix: "p/", Path: "/one"}, {Path: "/two"}}, one, two); again.Digest() != s.Digest() {
		t.Error("listed again, it is another snapshot")
	}
	for i := range Index(s.Len()) {
		if m, o, ok := s.Object(i); ok && o.Key == "b/c" && (s.Path(i) != "/two/b/c" || s.Mounts()[m].URL != "s3://two") {
			t.Errorf("%s of %+v", s.Path(i), s.Mounts()[m])
		}
	}
}

func TestListMountsAtOnce(t *testing.T) {
	hold, began := make(chan struct{}), make(chan struct{}, 2)
	one := &bucket{url: "s3://one", objects: objects("a"), hold: hold, began: began}
	two := &bucket{url: "s3://two", objects: objects("a"), hold: hold, began: began}
	go func() { // neither ends before both have begun
		<-began
		<-began
		close(hold)
	}()
	if s := list(t, []Mount{{Path: "/one"}, {Path: "/two"}}, one, two); s.Files() != 2 {
		t.Errorf("%d files", s.Files())
	}
}

func TestPrefixIsAFolder(t *testing.T) {
	b := &bucket{url: "s3://bucket", objects: objects("data/x", "data/y/z", "data2/x", "data", "dat")}
	for _, prefix := range []string{"data", "data/"} {
		b.listed = nil
		s := list(t, []Mount{{Prefix: prefix, Path: "/"}}, b)
		if diff := gocmp.Diff([]string{"/", "/x", "/y/", "/y/z"}, tree(t, s)); diff != "" {
			t.Error(diff)
		}
		if !slices.Equal(b.listed, []string{"data/"}) || b.stats.Load() != 0 || len(s.Notes())+len(s.Skipped()) != 0 {
			t.Errorf("listed %q, %d stats, notes %q", b.listed, b.stats.Load(), s.Notes())
		}
	}
}

func TestSingleObjectMount(t *testing.T) {
	b := &bucket{url: "s3://bucket", objects: objects("dir/data.bin", "dir/data.bin2", "top")}
	for prefix, want := range map[string]string{"dir/data.bin": "dir/", "top": ""} {
		s := list(t, []Mount{{Prefix: prefix, Path: "/m"}}, b)
		name := prefix[len(want):]
		if diff := gocmp.Diff([]string{"/", "/m/", "/m/" + name}, tree(t, s)); diff != "" {
			t.Error(diff)
		}
		i, _ := s.Lookup("/m/" + name)
		if _, o, _ := s.Object(i); o.Key != prefix || s.Mounts()[0].Prefix != want || len(s.Notes()) != 0 {
			t.Errorf("%+v of %+v", o, s.Mounts())
		}
	}
	// With a slash the user means the folder, and nothing else is looked for.
	if s := list(t, []Mount{{Prefix: "top/", Path: "/"}}, b); s.Files() != 0 || b.stats.Load() != 2 || len(s.Notes()) != 1 {
		t.Errorf("%d files, %d stats, notes %q", s.Files(), b.stats.Load(), s.Notes())
	}
}

func TestNothingBelowThePrefixIsAnEmptyDirectoryAndANote(t *testing.T) {
	b := &bucket{url: "s3://bucket", objects: objects("data2/x")}
	for _, prefix := range []string{"data", "data/", "other/deep"} {
		s := list(t, []Mount{{Prefix: prefix, Path: "/a/b"}}, b)
		if diff := gocmp.Diff([]string{"/", "/a/", "/a/b/"}, tree(t, s)); diff != "" {
			t.Error(diff)
		}
		if notes := s.Notes(); len(notes) != 1 || !strings.Contains(notes[0], "s3://bucket/"+prefix) {
			t.Errorf("%s: notes %q", prefix, notes)
		}
	}
	// An empty folder with its marker is what it says.
	b.objects = []source.Object{object("data/", 0)}
	if s := list(t, []Mount{{Prefix: "data", Path: "/"}}, b); len(s.Notes()) != 0 || s.Len() != 1 {
		t.Errorf("%d nodes, notes %q", s.Len(), s.Notes())
	}
}

func TestListFailsWhole(t *testing.T) {
	bare := object("u", 1)
	bare.Version = ""
	var many []source.Object
	for i := range 5 * batchSize {
		many = append(many, object(fmt.Sprint(i), 1))
	}
	for _, c := range []struct {
		name string
		b    *bucket
		want error
		says string
	}{
		{"in the middle", &bucket{objects: many, err: source.ErrUnavailable}, source.ErrUnavailable, "s3://bad/"},
		{"denied", &bucket{err: source.ErrDenied}, source.ErrDenied, "s3://bad/"},
		{"unversioned", &bucket{objects: append(many, bare)}, source.ErrUnversioned, "s3://bad/u"},
		{"broken source", &bucket{objects: []source.Object{object("x", -1)}}, source.ErrInvalid, "s3://bad/x"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.b.url = "s3://bad"
			// The other mount would list for ever: the failure must end it.
			other := &bucket{url: "s3://good", hold: make(chan struct{})}
			s, err := List(t.Context(), []Mount{{Path: "/bad"}, {Path: "/good"}}, []source.Source{c.b, other}, 0, nil)
			if s != nil || !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v", err)
			}
		})
	}

	// A refused Stat of what may be a single object is not "nothing there".
	b := &bucket{url: "s3://bad", statErr: source.ErrDenied}
	if _, err := List(t.Context(), []Mount{{Prefix: "x", Path: "/"}}, []source.Source{b}, 0, nil); !errors.Is(err, source.ErrDenied) {
		t.Errorf("stat refused: %v", err)
	}
	if _, err := List(t.Context(), []Mount{{Path: "/"}, {Path: "/a"}}, []source.Source{b, b}, 0, nil); err == nil || !strings.Contains(err.Error(), "overlap") {
		t.Errorf("overlapping mounts: %v", err)
	}
	if _, err := List(t.Context(), []Mount{{Path: "/"}}, nil, 0, nil); err == nil {
		t.Error("a mount without a source was accepted")
	}
}

func TestListEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	began := make(chan struct{}, 1)
	b := &bucket{url: "s3://slow", hold: make(chan struct{}), began: began}
	go func() { <-began; cancel() }()
	if _, err := List(ctx, []Mount{{Path: "/"}}, []source.Source{b}, 0, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// A snapshot that would take more of the heap than it may is not made, and all that there is counts for how much it takes.
func TestAListingTooLargeForTheHeapSaysHowMuchItTakes(t *testing.T) {
	b := &bucket{url: "s3://b"}
	const files = 40 * batchSize
	dataset(files, func(o source.Object) { b.objects = append(b.objects, o) })
	mounts, sources := []Mount{{Path: "/"}}, []source.Source{b}
	s, err := List(t.Context(), mounts, sources, 64<<20, nil)
	if err != nil || s.Files() != files {
		t.Fatal(s, err)
	}
	_, err = List(t.Context(), mounts, sources, 1<<20, nil)
	var large *LargeError
	if !errors.As(err, &large) || large.Files != files || large.Need < files*100 || large.Need > files*400 {
		t.Errorf("%v: %+v", err, large)
	}
}

// What the builder says that it takes is what it takes, with what it encodes.
func TestTheBuilderKnowsWhatItTakes(t *testing.T) {
	before := heap()
	b := NewBuilder([]Mount{{URL: "s3://bucket", Prefix: "imagenet/", Path: "/"}})
	dataset(200_000, func(o source.Object) {
		if err := b.Add(0, o); err != nil {
			t.Fatal(err)
		}
	})
	skipped := b.skips.clone()
	order, firsts := b.order(skipped)
	encoded, err := b.Encode(day0)
	if err != nil {
		t.Fatal(err)
	}
	took := heap() - before + int64(len(order))*12 // what order itself has while it runs
	if need := b.Need(); need < took || need > took*3/2 {
		t.Errorf("%d bytes, and it took %d", need, took)
	}
	runtime.KeepAlive([]any{b, order, firsts, encoded})
}
