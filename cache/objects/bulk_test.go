package objects_test

import (
	"bytes"
	"fmt"
	"net/http"
	"sync/atomic"
	"testing"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/test/bucket"
)

// deleteAll deletes keys with one request through worker i.
func (tr *tier) deleteAll(i int, keys []string) (failed map[string]string) {
	tr.t.Helper()
	objects := make(chan minio.ObjectInfo, len(keys))
	for _, key := range keys {
		objects <- minio.ObjectInfo{Key: key}
	}
	close(objects)
	failed = map[string]string{}
	for e := range tr.client(i).RemoveObjects(tr.t.Context(), "data", objects, minio.RemoveObjectsOptions{}) {
		failed[e.ObjectName] = code(e.Err)
	}
	return failed
}

// A bulk delete is one request to the bucket for each worker that owns some of the keys (it was one for each key), and
// frees what the workers hold of them; where the bucket takes no such request, or an owner cannot be reached, the keys
// are deleted one by one.
func TestABulkDeleteIsOneRequestForEachOwner(t *testing.T) {
	f := bucket.Faults(t, theServer(t))
	tr := newTier(t, f.Endpoint())
	tr.add()
	tr.add()
	tr.publish()
	tr.run(0)
	tr.spawn(1)
	tr.ready()
	for _, c := range []struct {
		what      string
		refuse    bool
		most, one int64 // requests for many keys, and for one
	}{
		{what: "as it is", most: 2},
		{what: "by a bucket that deletes one by one", refuse: true, most: 2, one: 50},
		{what: "an owner is gone", most: 1, one: 50},
	} {
		eventually(t, c.what, func() error {
			var keys []string
			p := content(10_000, 1)
			for k := range 40 {
				keys = append(keys, fmt.Sprintf("bulk/%d", k))
			}
			keys = append(keys, "bulk/a b&c<é>\"+%", "bulk/folder/")
			for k, key := range keys {
				if key == "bulk/folder/" {
					tr.mustPut(0, key, nil)
				} else if _, err := tr.put(k%2, key, p, minio.PutObjectOptions{}); err != nil {
					t.Fatal(err)
				}
				if key == "bulk/0" || key == "bulk/1" {
					if got, _, err := tr.get(1-k%2, key); err != nil || !bytes.Equal(got, p) {
						t.Fatalf("%d bytes, %v", len(got), err)
					}
				}
			}
			if c.what == "an owner is gone" {
				tr.workers[1].outside.Kill()
				<-tr.workers[1].outside.Done()
			}
			var many, one atomic.Int64
			f.Set(func(r *http.Request) bucket.Fault {
				switch {
				case r.Method == http.MethodPost && r.URL.Query().Has("delete"):
					many.Add(1)
					if c.refuse {
						return bucket.Fault{Status: http.StatusNotImplemented, Code: "NotImplemented"}
					}
				case r.Method == http.MethodDelete:
					one.Add(1)
				}
				return bucket.Fault{}
			})
			held := tr.metric(0, "stepcache_store_objects")
			// One that is not there, and one twice.
			if failed := tr.deleteAll(0, append(keys, "bulk/never", "bulk/3")); len(failed) > 0 {
				t.Errorf("%s: %v", c.what, failed)
			}
			t.Logf("%s: %d keys, %d requests for many and %d for one", c.what, len(keys), many.Load(), one.Load())
			if now := tr.metric(0, "stepcache_store_objects"); now >= held && held > 0 {
				t.Errorf("%s: %d objects are held, %d before", c.what, now, held)
			}
			f.Set(nil)
			for _, key := range keys {
				if _, _, err := tr.get(0, key); code(err) != "NoSuchKey" {
					t.Fatalf("%s: %s after its deletion: %v", c.what, key, err)
				}
			}
			if left := tr.keys(0, ""); len(left) > 0 {
				t.Errorf("%s: left are %q", c.what, left)
			}
			if many.Load() == 0 || many.Load() > c.most || one.Load() > c.one || c.one > 0 && one.Load() == 0 {
				err := fmt.Errorf("%d keys took %d requests for many and %d for one", len(keys), many.Load(), one.Load())
				if c.one > 0 {
					t.Fatalf("%s: %v", c.what, err)
				}
				return err // once more: the keys of a worker that seemed not to answer for a moment are deleted one by one
			}
			return nil
		})
	}
	tr.workers[1].state = "gone"

	// What cannot be deleted is told for each key.
	tr.mustPut(0, "kept/1", []byte("1"))
	tr.mustPut(0, "kept/2", []byte("2"))
	f.Set(func(r *http.Request) bucket.Fault {
		if r.Method == http.MethodDelete || r.Method == http.MethodPost {
			return bucket.Fault{Status: http.StatusForbidden, Code: "AccessDenied"}
		}
		return bucket.Fault{}
	})
	if failed := tr.deleteAll(0, []string{"kept/1", "kept/2"}); failed["kept/1"] != "AccessDenied" || failed["kept/2"] != "AccessDenied" {
		t.Errorf("refused by the bucket: %v", failed)
	}
	f.Set(nil)
	if keys := tr.keys(0, "kept/"); len(keys) != 2 {
		t.Errorf("left are %q", keys)
	}
}
