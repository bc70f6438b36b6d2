package artifact_test

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/stepcache/stepcache/artifact"
	"github.com/stepcache/stepcache/artifact/plugin"
	"github.com/stepcache/stepcache/test/bucket"
)

// hasty gives up soon, for tests of what lasts.
var hasty = artifact.Options{Patience: time.Second}

// large is content of several parts and ranges.
var large = bytes.Repeat([]byte("0123456789abcde"), 9<<18) // 34 MiB

func TestBucketThatThrottlesIsWaitedFor(t *testing.T) {
	f := start(t, artifact.Options{})
	f.write(t, "out/a", []byte("1"), 0o644)
	f.write(t, "out/b", large, 0o644)
	var n atomic.Int32
	f.faults.Set(func(*http.Request) bucket.Fault {
		if n.Add(1)%2 == 1 {
			return bucket.Fault{Status: 503, Code: "SlowDown"}
		}
		return bucket.Fault{}
	})
	art := f.artifact("k")
	if err := f.save(t.Context(), f.path("out"), art); err != nil {
		t.Fatal(err)
	}
	if err := f.load(t.Context(), art, f.path("in")); err != nil {
		t.Fatal(err)
	}
	if got := tree(t, f.path("in")); got["a"] != "1" || got["b"] != string(large) {
		t.Errorf("%d bytes of a, %d of b", len(got["a"]), len(got["b"]))
	}
	if names, err := f.list(t.Context(), art); len(names) != 2 || err != nil {
		t.Errorf("%v, %v", names, err)
	}
	if err := f.saveStream(t.Context(), bytes.NewReader(large), f.artifact("s")); err != nil {
		t.Error(err)
	}
	if err := f.delete(t.Context(), art); err != nil {
		t.Error(err)
	}
	if got := f.objects(t); len(got) != 1 || got[0] != "s" {
		t.Errorf("%v", got)
	}
}

func TestBucketThatThrottlesForEverIsGivenUp(t *testing.T) {
	f := start(t, hasty)
	path := f.write(t, "out", []byte("1"), 0o644)
	f.faults.Set(func(*http.Request) bucket.Fault { return bucket.Fault{Status: 503, Code: "SlowDown"} })
	wantError(t, f.save(t.Context(), path, f.artifact("k")), "throttled", "gave up", bucketName+"/k")
	wantError(t, f.load(t.Context(), f.artifact("k"), f.path("in")), "unavailable", "gave up") // HEAD tells no code
	if _, err := os.Stat(f.path("in")); err == nil {
		t.Error("a file was made")
	}
	if left := f.objects(t); len(left) > 0 {
		t.Errorf("stored: %v", left)
	}
}

func TestKilledBucket(t *testing.T) {
	f := start(t, hasty)
	art := f.artifact("k")
	if err := f.save(t.Context(), f.write(t, "out", large, 0o644), art); err != nil {
		t.Fatal(err)
	}
	// It dies while it answers: nothing half is left, and the call ends.
	var gets atomic.Int32
	f.faults.Set(func(r *http.Request) bucket.Fault {
		if r.Method == http.MethodGet && gets.Add(1) == 3 {
			f.server.Close()
		}
		return bucket.Fault{}
	})
	wantError(t, f.load(t.Context(), art, f.path("in")), "unavailable", bucketName+"/k")
	if _, err := os.Stat(f.path("in")); err == nil {
		t.Error("half a file is left")
	}
	wantError(t, f.save(t.Context(), f.path("out"), art), "unavailable")
	wantError(t, f.delete(t.Context(), art), "unavailable")
	_, err := f.list(t.Context(), art)
	wantError(t, err, "unavailable")
	_, err = f.isDirectory(t.Context(), art)
	wantError(t, err, "unavailable")
	wantError(t, f.open(t.Context(), art, io.Discard), "unavailable")
	wantError(t, f.saveStream(t.Context(), bytes.NewReader(large), art), "unavailable")
}

func TestBucketThatSaysNothingIsAskedAgain(t *testing.T) {
	f := start(t, artifact.Options{Stall: 2 * time.Second})
	path := f.write(t, "out", large, 0o644)
	var gets atomic.Int32
	f.faults.Set(func(r *http.Request) bucket.Fault {
		if r.Method == http.MethodGet && gets.Add(1) <= 2 {
			return bucket.Fault{Stall: true}
		}
		return bucket.Fault{}
	})
	if err := f.save(t.Context(), path, f.artifact("k")); err != nil {
		t.Fatal(err)
	}
	if err := f.load(t.Context(), f.artifact("k"), f.path("in")); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(f.path("in")); err != nil || !bytes.Equal(got, large) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// A gateway that takes a connection and then hangs is asked again whatever it was asked for: a deletion, too,
// and the removal of an upload's parts.
func TestDeletionThatIsNotAnsweredIsAskedAgain(t *testing.T) {
	f := start(t, artifact.Options{Stall: 2 * time.Second})
	f.write(t, "out/a", []byte("1"), 0o644)
	f.write(t, "out/b", large, 0o644)
	for _, c := range []struct {
		what string
		call func() error
		is   func(*http.Request) bool
	}{
		{"one object", func() error { return f.delete(t.Context(), f.artifact("k/a")) },
			func(r *http.Request) bool { return r.Method == http.MethodDelete }},
		{"a directory", func() error { return f.delete(t.Context(), f.artifact("k")) },
			func(r *http.Request) bool { return r.Method == http.MethodPost && r.URL.Query().Has("delete") }},
	} {
		if err := f.save(t.Context(), f.path("out"), f.artifact("k")); err != nil {
			t.Fatal(err)
		}
		var asked atomic.Int32
		f.faults.Set(func(r *http.Request) bucket.Fault {
			return bucket.Fault{Stall: c.is(r) && asked.Add(1) == 1}
		})
		if err := c.call(); err != nil || asked.Load() < 2 {
			t.Errorf("%s: asked %d times, %v", c.what, asked.Load(), err)
		}
		f.faults.Set(nil)
	}
	if left := f.objects(t); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	var asked atomic.Int32
	f.faults.Set(func(r *http.Request) bucket.Fault {
		switch q := r.URL.Query(); {
		case q.Get("partNumber") == "2":
			return bucket.Fault{Status: 403, Code: "AccessDenied"}
		case r.Method == http.MethodDelete && q.Has("uploadId"):
			return bucket.Fault{Stall: asked.Add(1) == 1}
		}
		return bucket.Fault{}
	})
	wantError(t, f.save(t.Context(), f.path("out/b"), f.artifact("k")), "denied")
	if left := f.uploads(t); len(left) > 0 || asked.Load() < 2 {
		t.Errorf("parts left after %d tries: %v", asked.Load(), left)
	}
}

func TestAnswersCutShortAreGoneOnWith(t *testing.T) {
	f := start(t, artifact.Options{})
	if err := f.save(t.Context(), f.write(t, "out", large, 0o644), f.artifact("k")); err != nil {
		t.Fatal(err)
	}
	var gets atomic.Int32
	cut := func(r *http.Request) bucket.Fault {
		if r.Method == http.MethodGet && gets.Add(1)%2 == 1 {
			return bucket.Fault{Truncate: 3<<20 + 17}
		}
		return bucket.Fault{}
	}
	f.faults.Set(cut)
	if err := f.load(t.Context(), f.artifact("k"), f.path("in")); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(f.path("in")); err != nil || !bytes.Equal(got, large) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	var streamed bytes.Buffer
	if err := f.open(t.Context(), f.artifact("k"), &streamed); err != nil || !bytes.Equal(streamed.Bytes(), large) {
		t.Errorf("streamed %d bytes, %v", streamed.Len(), err)
	}
}

func TestObjectReplacedWhileItIsReadIsNeverAMixture(t *testing.T) {
	f := start(t, artifact.Options{})
	if err := f.save(t.Context(), f.write(t, "out", large, 0o644), f.artifact("k")); err != nil {
		t.Fatal(err)
	}
	var gets atomic.Int32
	f.faults.Set(func(r *http.Request) bucket.Fault {
		if r.Method == http.MethodGet && gets.Add(1) == 3 {
			f.server.PutT(t, bucketName, "k", bytes.Repeat([]byte("x"), len(large)))
		}
		return bucket.Fault{}
	})
	wantError(t, f.load(t.Context(), f.artifact("k"), f.path("in")), "changed", "k")
	if _, err := os.Stat(f.path("in")); err == nil {
		t.Error("a file is left")
	}
}

func TestCompletionWhoseAnswerIsLost(t *testing.T) {
	f := start(t, artifact.Options{})
	var completions atomic.Int32
	f.faults.Set(func(r *http.Request) bucket.Fault {
		if r.Method == http.MethodPost && r.URL.Query().Has("uploadId") && completions.Add(1) == 1 {
			return bucket.Fault{Truncate: 1}
		}
		return bucket.Fault{}
	})
	if err := f.save(t.Context(), f.write(t, "out", large, 0o644), f.artifact("k")); err != nil || completions.Load() < 2 {
		t.Fatalf("%d completions, %v", completions.Load(), err)
	}
	if err := f.load(t.Context(), f.artifact("k"), f.path("in")); err != nil {
		t.Error(err)
	}
}

func TestFailedSaveLeavesNothing(t *testing.T) {
	f := start(t, hasty)
	path := f.write(t, "out", large, 0o644)
	for name, fault := range map[string]bucket.Fault{
		"denied": {Status: 403, Code: "AccessDenied"}, "reset": {Reset: true}, "no room": {Status: 507, Code: "InsufficientStorage"},
	} {
		f.faults.Set(func(r *http.Request) bucket.Fault {
			if r.URL.Query().Get("partNumber") == "2" {
				return fault
			}
			return bucket.Fault{}
		})
		wantError(t, f.save(t.Context(), path, f.artifact("k")), bucketName+"/k")
		wantError(t, f.saveStream(t.Context(), bytes.NewReader(large), f.artifact("s")), bucketName+"/s")
		if keys, uploads := f.objects(t), f.uploads(t); len(keys)+len(uploads) > 0 {
			t.Errorf("%s: objects %v, uploads %v", name, keys, uploads)
		}
	}
}

// What argoexec reports of a stream that the driver gave up is the driver's own reason.
func TestSaveStreamThatFailsSaysWhy(t *testing.T) {
	f := start(t, artifact.Options{})
	f.faults.Set(func(r *http.Request) bucket.Fault {
		if r.Method == http.MethodPut {
			return bucket.Fault{Status: 403, Code: "AccessDenied"}
		}
		return bucket.Fault{}
	})
	endless := readerFunc(func(p []byte) (int, error) { return len(p), nil })
	wantError(t, f.saveStream(t.Context(), endless, f.artifact("k")), "denied", "check the keys of the environment")
	bad := f.artifact("k")
	bad.Plugin.Configuration = "bukket: x"
	wantError(t, f.saveStream(t.Context(), endless, bad), "bukket")
}

func TestSaveStreamWithWrongMessages(t *testing.T) {
	f := start(t, artifact.Options{})
	for name, messages := range map[string][]*plugin.SaveStreamArtifactRequest{
		"none": nil, "a chunk first": {{Chunk: []byte("x")}},
		"two artifacts": {{OutputArtifact: f.artifact("a")}, {OutputArtifact: f.artifact("b")}},
		"a directory":   {{OutputArtifact: f.artifact("a/")}},
	} {
		s, err := f.client.SaveStream(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range messages {
			_ = s.Send(m) // io.EOF where the driver was faster; CloseAndRecv says why
		}
		_, err = s.CloseAndRecv()
		if err == nil {
			t.Errorf("%s: accepted", name)
			continue
		}
		wantCode(t, err, codes.InvalidArgument)
	}
	if keys := f.objects(t); len(keys) > 0 {
		t.Errorf("stored %v", keys)
	}
}

func TestCancelledCallsLeaveNothing(t *testing.T) {
	f := start(t, artifact.Options{})
	path := f.write(t, "out", large, 0o644)
	if err := f.save(t.Context(), path, f.artifact("there")); err != nil {
		t.Fatal(err)
	}
	// The call is cancelled once the bucket holds some of it and is asked for more, which it never answers.
	during := func(stalled func(*http.Request) bool, call func(context.Context) error) {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		f.faults.Set(func(r *http.Request) bucket.Fault {
			if stalled(r) {
				cancel()
				return bucket.Fault{Stall: true}
			}
			return bucket.Fault{}
		})
		wantCode(t, call(ctx), codes.Canceled)
		f.faults.Set(nil)
	}
	second := func(r *http.Request) bool { return r.URL.Query().Get("partNumber") == "2" }
	during(second, func(ctx context.Context) error { return f.save(ctx, path, f.artifact("k")) })
	during(second, func(ctx context.Context) error { return f.saveStream(ctx, bytes.NewReader(large), f.artifact("s")) })
	var gets atomic.Int32
	during(func(r *http.Request) bool { return r.Method == http.MethodGet && gets.Add(1) == 3 },
		func(ctx context.Context) error { return f.load(ctx, f.artifact("there"), f.path("in")) })
	// The driver tidies up after the client has its answer.
	waitFor(t, "the uploads and the file to be gone", func() bool {
		_, err := os.Stat(f.path("in"))
		return len(f.uploads(t)) == 0 && os.IsNotExist(err)
	})
	if keys := f.objects(t); len(keys) != 1 {
		t.Errorf("objects: %v", keys)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// A missing optional input is an empty directory, as with Argo's own drivers: nothing else can be told to
// argoexec. Any other failure fails.
func TestMissingInput(t *testing.T) {
	f := start(t, hasty)
	art := f.artifact("none")
	wantError(t, f.load(t.Context(), art, f.path("a.tmp")), "not found", bucketName+"/none")
	if _, err := os.Stat(f.path("a.tmp")); err == nil {
		t.Error("something was made of a missing input")
	}
	_, err := f.list(t.Context(), art)
	wantError(t, err, "not found")
	wantError(t, f.open(t.Context(), art, io.Discard), "not found")
	if is, err := f.isDirectory(t.Context(), art); is || err != nil {
		t.Errorf("%v, %v", is, err)
	}

	art.Optional = true
	if err := f.load(t.Context(), art, f.path("b.tmp")); err != nil {
		t.Errorf("optional: %v", err)
	}
	if got, err := os.ReadDir(f.path("b.tmp")); err != nil || len(got) > 0 {
		t.Errorf("%v, %v", got, err)
	}

	for name, c := range map[string]struct {
		fault bucket.Fault
		says  string
	}{
		"denied":      {bucket.Fault{Status: 403, Code: "AccessDenied"}, "denied"},
		"unavailable": {bucket.Fault{Status: 500, Code: "InternalError"}, "unavailable"},
		"no bucket":   {bucket.Fault{Status: 404, Code: "NoSuchBucket"}, "bucket not found"},
	} {
		f.faults.Set(func(*http.Request) bucket.Fault { return c.fault })
		wantError(t, f.load(t.Context(), art, f.path("c.tmp")), c.says)
		if _, err := os.Stat(f.path("c.tmp")); err == nil {
			t.Errorf("%s: a failure was taken for a missing input", name)
		}
	}
	f.faults.Set(nil)
	art.Plugin.Configuration = strings.Replace(f.configuration, bucketName, "other-bucket", 1)
	wantError(t, f.load(t.Context(), art, f.path("d.tmp")), "bucket", "access: ReadWrite")
}

// A directory whose load fails half way is an error, whatever is there by then.
func TestDirectoryThatLoadsInPartFails(t *testing.T) {
	f := start(t, hasty)
	for _, name := range []string{"a", "b", "c"} {
		f.write(t, filepath.Join("out", name), []byte(name), 0o644)
	}
	if err := f.save(t.Context(), f.path("out"), f.artifact("k")); err != nil {
		t.Fatal(err)
	}
	f.faults.Set(func(r *http.Request) bucket.Fault {
		if strings.HasSuffix(r.URL.Path, "/k/b") {
			return bucket.Fault{Status: 404, Code: "NoSuchKey"}
		}
		return bucket.Fault{}
	})
	art := f.artifact("k")
	art.Optional = true
	wantError(t, f.load(t.Context(), art, f.path("in")), "k/b", "not found")
}
