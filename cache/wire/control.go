package wire

import (
	"strconv"
	"time"
	"unicode/utf8"
)

// Role is what a key permits. Keys are separate: a reader's key cannot write or control.
type Role uint8

// Roles. Control includes read; Write includes read.
const (
	RoleRead Role = iota + 1
	RoleWrite
	RoleControl
)

// The HTTP control endpoint of a worker. /healthz and /readyz and /metrics answer anybody; everything
// else wants a request signed with the control key (SignRequest, VerifyRequest).
const (
	PathHealth  = "/healthz"
	PathReady   = "/readyz"
	PathMetrics = "/metrics"
	PathStatus  = "/v1/status"  // GET: WorkerStatus
	PathLoads   = "/v1/loads"   // POST LoadRequest; GET and DELETE /v1/loads/{id}
	PathRefresh = "/v1/refresh" // POST: list the bucket again now; answers the new snapshot's digest
	PathMembers = "/v1/members" // POST ring.Membership: follow this list if its epoch is greater
)

// MaxControl bounds each answer, in bytes.
const MaxControl = 256 << 10

// WorkerStatus is what one worker says of itself.
type WorkerStatus struct {
	Dataset  string `json:"dataset"`
	ID       string `json:"id"`
	Epoch    uint64 `json:"epoch"`
	Snapshot string `json:"snapshot,omitempty"` // hex digest; empty until there is one
	Files    int64  `json:"files"`
	Bytes    int64  `json:"bytes"`
	// Skipped counts keys that the snapshot cannot show, by reason.
	Skipped map[string]int64 `json:"skipped,omitempty"`
	// Quota, Used and Pinned are the store's, in bytes.
	Quota  int64 `json:"quota"`
	Used   int64 `json:"used"`
	Pinned int64 `json:"pinned"`
	// SourceBytes and SourceRequests count what was read from the bucket; ServedBytes what readers got.
	SourceBytes    int64 `json:"sourceBytes"`
	SourceRequests int64 `json:"sourceRequests"`
	ServedBytes    int64 `json:"servedBytes"`
	// OpenedBytes counts bytes of files handed out as descriptors: reads of those are not seen again.
	OpenedBytes int64 `json:"openedBytes"`
	// Verified, Unverified, Corrupt count whole objects checked against the bucket's own digest.
	Verified   int64 `json:"verified"`
	Unverified int64 `json:"unverified"`
	Corrupt    int64 `json:"corrupt"`
	// Refetched counts blocks whose checksum failed inside the tier and were fetched again.
	Refetched int64 `json:"refetched"`
	// Problem is what is wrong now (missing credentials, no bucket), for people; empty when nothing is.
	Problem string `json:"problem,omitempty"`
	// Reason is the kind of a problem of the bucket, or with which the worker cannot serve, for programs: a Status's name.
	Reason string `json:"reason,omitempty"`
	// Serves says that the worker serves what it holds in spite of a Reason.
	Serves bool `json:"serves,omitempty"`
	// Cached is how many bytes of content the store holds.
	Cached int64 `json:"cached"`
	// HandOver is how far a member that is Leaving is with giving its blocks to their new owners.
	HandOver *HandOver `json:"handOver,omitempty"`
	// Unflushed is what this worker has acknowledged, or holds for one that did and is not there, and the
	// bucket does not have yet. The sum over the workers may count an object twice, and is never zero while
	// anything is pending.
	Unflushed Unflushed `json:"unflushed,omitzero"`
}

// Unflushed is what was acknowledged and is not in the bucket yet (write policy Back).
type Unflushed struct {
	Objects int64 `json:"objects,omitempty"`
	Bytes   int64 `json:"bytes,omitempty"`
	// Oldest is when the first of them was put.
	Oldest time.Time `json:"oldest,omitzero"`
	// Problem is why the bucket does not take them, for people; empty while it does.
	Problem string `json:"problem,omitempty"`
}

// ListingProblem ends the Problem of a worker that cannot serve yet because the bucket is being listed, and
// that knows of no trouble: Files is how far that is.
const ListingProblem = "no snapshot yet"

// FollowingProblem is in the Problem of a worker that waits for the listing of another: what keeps that one is
// the cause.
const FollowingProblem = "no snapshot from worker"

// HandOver is a leaving worker's account of its blocks, in bytes.
type HandOver struct {
	// Epoch is the membership under which the new owners were found.
	Epoch uint64 `json:"epoch"`
	// Total is what it holds of the current snapshot; Handed what its new owners hold now, Dropped what
	// they have no room for or could not be given.
	Total   int64 `json:"total"`
	Handed  int64 `json:"handed"`
	Dropped int64 `json:"dropped"`
	Done    bool  `json:"done"`
}

// LoadRequest asks a worker to fetch the blocks it owns of the files that match.
type LoadRequest struct {
	ID string `json:"id"`
	// Snapshot is a hex digest; empty: the worker's current one.
	Snapshot string `json:"snapshot,omitempty"`
	// Paths are doublestar patterns matched against the path in the dataset ("/ref/**/*.fa"); one that matches a
	// folder ("/shards") stands for all in it; empty: all.
	Paths []string `json:"paths,omitempty"`
	// Copies makes the first N owners each hold the blocks; zero means the Dataset's.
	Copies int `json:"copies,omitempty"`
	// Pin keeps the blocks from eviction until the load is deleted.
	Pin bool `json:"pin,omitempty"`
}

// LoadStatus is one worker's part of a load.
type LoadStatus struct {
	ID       string `json:"id"`
	Snapshot string `json:"snapshot"`
	// Lost is set where what is missing cannot be had any more: nobody holds the snapshot, or the bucket has
	// other versions than it names.
	Lost     bool      `json:"lost,omitempty"`
	Started  time.Time `json:"started"`
	Finished time.Time `json:"finished,omitzero"`
	// Total is what this worker has to hold, Resident what it holds now of that, Fetched what it has read
	// from the bucket or a peer for it, all in bytes.
	Files    int64 `json:"files"`
	Total    int64 `json:"total"`
	Resident int64 `json:"resident"`
	Fetched  int64 `json:"fetched"`
	Done     bool  `json:"done"`
	// Failures are the first of what could not be loaded, as many as fit into the answer; FailedFiles counts all.
	Failures    []LoadFailure `json:"failures,omitempty"`
	FailedFiles int64         `json:"failedFiles,omitempty"`
	// Problem says why the load as a whole cannot succeed (does not fit memory, no snapshot).
	Problem string `json:"problem,omitempty"`
}

// LoadFailure is one file that could not be loaded, and why.
type LoadFailure struct {
	Path   string `json:"path"`
	Quoted string `json:"quoted,omitempty"` // see Quoted
	Reason string `json:"reason"`
}

// Quoted is a path that is not UTF-8, which JSON cannot carry, in quotes; empty for others.
func Quoted(path string) string {
	if utf8.ValidString(path) {
		return ""
	}
	return strconv.Quote(path)
}
