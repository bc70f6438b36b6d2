package objects_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/test/bucket"
)

// control is the control endpoints of the members, whether they answer or not.
func (tr *tier) control() *client.Control {
	tr.t.Helper()
	keys, err := wire.LoadKeys(tr.path("keys"))
	if err != nil {
		tr.t.Fatal(err)
	}
	k, err := client.NewControl(client.ControlConfig{Dataset: dataset, MembershipFile: tr.path("members.json"), Keys: keys})
	if err != nil {
		tr.t.Fatal(err)
	}
	tr.t.Cleanup(k.Close)
	return k
}

// isReady is nil when worker i says to a probe that it can serve.
func (tr *tier) isReady(i int) error {
	resp, err := http.Get("http://" + tr.workers[i].m.Control + wire.PathReady)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("worker %d: status %d", i, resp.StatusCode)
	}
	return nil
}

// Nobody waits for a listing of what the bucket has by now, which may be millions of objects, and none is held: its
// names are asked for. What goes by a listing says so.
func TestAWritableDatasetIsNotListed(t *testing.T) {
	f := bucket.Faults(t, theServer(t))
	// The listing would never end.
	f.Set(func(r *http.Request) bucket.Fault {
		return bucket.Fault{Stall: r.URL.Query().Get("continuation-token") != "" || r.URL.Query().Get("start-after") != ""}
	})
	tr := newTier(t, f.Endpoint())
	for i := range 1001 { // more than a page
		if _, err := tr.direct.PutObject(t.Context(), tr.bucket, fmt.Sprintf("%sold/%04d", tr.prefix, i), strings.NewReader("old"), 3, minio.PutObjectOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	tr.start(2)
	for i := range tr.workers {
		eventually(t, "it is ready", func() error { return tr.isReady(i) })
		if s := tr.workers[i].inside.Status(); s.Snapshot != "" || s.Files != 0 || s.Problem != "" || s.Reason != "" {
			t.Errorf("worker %d: %+v", i, s)
		}
	}
	key := tr.keyOwnedBy(0, "new")
	tr.mustPut(0, key, []byte("new"))
	tr.reads(1, key, "new")
	tr.reads(1, "old/1000", "old")

	control := tr.control()
	if err := control.Load(t.Context(), wire.LoadRequest{ID: "l"}); err == nil || !strings.Contains(err.Error(), "no listing to load from") {
		t.Errorf("a load: %v", err)
	}
	if _, err := control.Refresh(t.Context()); err == nil || !strings.Contains(err.Error(), "has no snapshot") {
		t.Errorf("a refresh: %v", err)
	}
	keys, err := wire.LoadKeys(tr.path("keys"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	told := ""
	_, err = client.Dial(ctx, client.Config{
		Dataset: dataset, MembershipFile: tr.path("members.json"), Keys: keys,
		Progress: func(p client.Progress) {
			if strings.Contains(p.Waiting, "access: ReadWrite") {
				told = p.Waiting
				cancel()
			}
		},
	})
	if told == "" || !errors.Is(err, source.ErrInvalid) {
		t.Errorf("a reader of a snapshot is told %q, and in the end: %v", told, err)
	}

	// A member that leaves has nothing to hand over by a listing, and waits for none.
	tr.workers[0].m.State = ring.Leaving
	tr.publish()
	eventually(t, "it may go", func() error {
		if h := tr.workers[0].inside.Status().HandOver; h == nil || !h.Done || h.Handed != 0 || h.Dropped != h.Total || h.Total == 0 {
			return fmt.Errorf("%+v", h)
		}
		return nil
	})
}

// A bucket that refuses is told although nobody has asked for a name yet, and keeps nobody from the workers, who hold
// what they hold; so is one that is away.
func TestABucketThatRefusesAWritableDatasetIsTold(t *testing.T) {
	for _, fault := range []bucket.Fault{{Status: 403, Code: "AccessDenied"}, {Status: 404, Code: "NoSuchBucket"}, {Reset: true}} {
		t.Run(fault.Code, func(t *testing.T) {
			f := bucket.Faults(t, theServer(t))
			f.Set(func(*http.Request) bucket.Fault { return fault })
			tr := newTier(t, f.Endpoint())
			tr.add()
			tr.publish()
			tr.run(0)
			eventually(t, "it is ready", func() error { return tr.isReady(0) })
			want := map[string]wire.Status{"AccessDenied": wire.Denied, "NoSuchBucket": wire.NoBucket, "": wire.Unavailable}[fault.Code]
			eventually(t, "it is told", func() error {
				if s := tr.workers[0].inside.Status(); s.Reason != want.String() || !s.Serves {
					return fmt.Errorf("it says %q (%s), and that it serves: %v", s.Reason, s.Problem, s.Serves)
				}
				return nil
			})
			f.Set(func(*http.Request) bucket.Fault { return bucket.Fault{} })
			eventually(t, "it is over", func() error {
				if s := tr.workers[0].inside.Status(); s.Reason != "" {
					return errors.New(s.Problem)
				}
				return nil
			})
		})
	}
}
