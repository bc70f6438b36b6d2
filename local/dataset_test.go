package local

import (
	"errors"
	"strings"
	"testing"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/tier"
)

func TestReadiness(t *testing.T) {
	d := &dataset{object: &v1alpha1.Dataset{}, folder: tier.Folder{Dir: "/run/d0"}}
	d.object.Namespace, d.object.Name = "ns", "data"
	d.object.Spec.Workers.Replicas = 2
	lists := wire.WorkerStatus{ID: "data-0", Problem: wire.ListingProblem, Files: 1000}
	waits := wire.WorkerStatus{ID: "data-1", Problem: "dataset ns/data: " + wire.FollowingProblem + " data-0, which lists: unknown snapshot: worker data-0: " + wire.ListingProblem}
	early := wire.WorkerStatus{ID: "data-1", Problem: "dataset ns/data: " + wire.FollowingProblem + " data-0, which lists: connection refused"}
	denied := wire.WorkerStatus{ID: "data-0", Problem: "dataset ns/data: list: list s3://b/: access denied; check the access key of /run/d0/secrets/key", Reason: "access denied"}
	repeats := wire.WorkerStatus{ID: "data-1", Problem: "dataset ns/data: " + wire.FollowingProblem + " data-0, which lists: worker data-0: " + denied.Problem}
	away := wire.WorkerStatus{ID: "data-0", Problem: "dataset ns/data: list: list s3://b/: store unavailable", Reason: "store unavailable"}
	absent := wire.WorkerStatus{ID: "data-0", Problem: "dataset ns/data: list: list s3://b/: bucket not found", Reason: "bucket not found"}
	invalid := wire.WorkerStatus{ID: "data-0", Problem: "dataset ns/data: mount /: invalid request", Reason: "invalid request"}
	source := wire.WorkerStatus{ID: "data-0", Problem: wire.ListingProblem + "; dataset ns/data: mount /: no such folder"}
	ready := wire.WorkerStatus{ID: "data-0", Snapshot: "00", Files: 3}
	silent := errors.New("1 of 2 workers did not answer")
	for _, c := range []struct {
		name   string
		status []wire.WorkerStatus
		err    error
		want   readiness
	}{
		{"a listing that takes its time is no problem", []wire.WorkerStatus{lists, waits}, nil, readiness{files: 1000}},
		{"nor is a worker that starts before the one that lists", []wire.WorkerStatus{lists, early}, nil, readiness{files: 1000}},
		{"the cause, not its repetition", []wire.WorkerStatus{repeats, denied}, nil,
			readiness{problem: "list s3://b/: access denied; check the access key of Secret key", reason: denied.Reason}},
		{"a bucket that does not answer", []wire.WorkerStatus{away, waits}, nil, readiness{problem: "list s3://b/: store unavailable", reason: away.Reason}},
		{"a bucket that is not there", []wire.WorkerStatus{absent, waits}, nil, readiness{problem: "list s3://b/: bucket not found", reason: absent.Reason}},
		{"a setting that is wrong", []wire.WorkerStatus{invalid, waits}, nil, readiness{problem: "mount /: invalid request", reason: invalid.Reason}},
		{"a source that cannot be opened", []wire.WorkerStatus{source, waits}, nil, readiness{problem: "mount /: no such folder"}},
		{"a follower that cannot get what there is", []wire.WorkerStatus{ready, early}, nil,
			readiness{files: 3, problem: strings.TrimPrefix(early.Problem, "dataset ns/data: ")}},
		{"nobody answers", nil, silent, readiness{problem: silent.Error(), silent: true}},
		{"one does not answer", []wire.WorkerStatus{ready}, silent, readiness{files: 3, problem: silent.Error(), silent: true}},
		{"ready", []wire.WorkerStatus{ready, ready}, nil, readiness{ready: true, files: 3}},
	} {
		if got := d.judge(c.status, c.err); got != c.want {
			t.Errorf("%s: got %+v, want %+v", c.name, got, c.want)
		}
	}
}
