package objects_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/ring"
)

// op is one operation on one key, as its client saw it: a write of a value (empty: a deletion), or a read
// that got one.
type op struct {
	write      bool
	value      string
	begin, end int64
	maybe      bool // a write that failed: it may have happened, at any time since
	by         string
}

func (o op) String() string {
	kind := "read"
	if o.write {
		kind = "write"
	}
	return fmt.Sprintf("[%d, %d] %s %q %s maybe=%v", o.begin, o.end, kind, o.value, o.by, o.maybe)
}

// linearizable says whether one order of the operations explains them all: each takes effect at one moment
// between its beginning and its end, and a read gets what the last write before it wrote. It is the search
// of Wing and Gong, which remembers where it has been.
func linearizable(ops []op) bool {
	if len(ops) > 256 {
		panic("too many operations for one key")
	}
	sort.Slice(ops, func(i, j int) bool { return ops[i].begin < ops[j].begin })
	type place struct {
		done  [4]uint64
		value string
	}
	seen := map[place]bool{}
	var search func(p place) bool
	search = func(p place) bool {
		if seen[p] {
			return false
		}
		seen[p] = true
		first := int64(math.MaxInt64) // the earliest end of what is not done
		all := true
		for i, o := range ops {
			if p.done[i/64]&(1<<(i%64)) == 0 && !o.maybe {
				all = false
				first = min(first, o.end)
			}
		}
		if all {
			return true
		}
		for i, o := range ops {
			if p.done[i/64]&(1<<(i%64)) != 0 {
				continue
			}
			if o.begin > first {
				break // something ended before it began
			}
			next := p
			next.done[i/64] |= 1 << (i % 64)
			if o.write {
				next.value = o.value
			} else if o.value != p.value {
				continue
			}
			if search(next) {
				return true
			}
		}
		return false
	}
	return search(place{})
}

// sound says whether every read got what the last write acknowledged before it wrote, or what another wrote
// that was under way: for each one there is an order of the writes and it that explains it. Two reads may
// see a write that is still under way in another order: who could not reach a name's owner sees in the
// bucket what the owner may not yet have asked for again.
func sound(ops []op) bool {
	var writes []op
	for _, o := range ops {
		if o.write {
			writes = append(writes, o)
		}
	}
	for _, o := range ops {
		if !o.write && !linearizable(append(slices.Clone(writes), o)) {
			return false
		}
	}
	return true
}

// The checker itself must find what is wrong.
func TestTheCheckerFindsStaleReads(t *testing.T) {
	w := func(v string, b, e int64) op { return op{write: true, value: v, begin: b, end: e} }
	r := func(v string, b, e int64) op { return op{value: v, begin: b, end: e} }
	for _, c := range []struct {
		name string
		ops  []op
		want bool
	}{
		{"in order", []op{w("a", 0, 1), r("a", 2, 3)}, true},
		{"stale", []op{w("a", 0, 1), w("b", 2, 3), r("a", 4, 5)}, false},
		{"at the same time", []op{w("a", 0, 1), w("b", 2, 6), r("a", 3, 4), r("b", 3, 5)}, true},
		{"deleted", []op{w("a", 0, 1), w("", 2, 3), r("", 4, 5)}, true},
		{"not deleted", []op{w("a", 0, 1), w("", 2, 3), r("a", 4, 5)}, false},
		{"failed, and happened", []op{w("a", 0, 1), {write: true, value: "b", begin: 2, end: 3, maybe: true}, r("a", 4, 5), r("b", 6, 7)}, true},
		{"failed, and did not", []op{w("a", 0, 1), {write: true, value: "b", begin: 2, end: 3, maybe: true}, r("a", 4, 5)}, true},
		{"failed, and before it began", []op{w("a", 0, 1), r("b", 2, 3), {write: true, value: "b", begin: 4, end: 5, maybe: true}}, false},
	} {
		if got := linearizable(c.ops); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
		if got := sound(c.ops); got != c.want {
			t.Errorf("%s: sound: %v", c.name, got)
		}
	}
	backAndForth := []op{w("a", 0, 1), w("b", 2, 9), r("b", 3, 4), r("a", 5, 6)}
	if linearizable(backAndForth) || !sound(backAndForth) {
		t.Error("back and forth during a write")
	}
}

// history is what clients did with some keys of a tier.
type history struct {
	tr    *tier
	began time.Time
	count atomic.Int64

	mu  sync.Mutex
	ops map[string][]op
}

func newHistory(tr *tier) *history {
	return &history{tr: tr, began: time.Now(), ops: map[string][]op{}}
}

func (h *history) now() int64 { return int64(time.Since(h.began)) }

func (h *history) add(key string, o op) {
	h.mu.Lock()
	h.ops[key] = append(h.ops[key], o)
	h.mu.Unlock()
	h.count.Add(1)
}

// do does one operation through worker i.
func (h *history) do(i int, key, value string, kind int) {
	o := op{begin: h.now(), by: fmt.Sprintf("w%d", i)}
	switch kind {
	case 0, 1: // put
		o.write, o.value = true, value
		_, err := h.tr.put(i, key, []byte(value), minio.PutObjectOptions{})
		o.maybe = err != nil
	case 2: // delete
		o.write = true
		o.maybe = h.tr.client(i).RemoveObject(h.tr.t.Context(), "data", key, minio.RemoveObjectOptions{}) != nil
	case 3: // list
		o.by += " list"
		for e := range h.tr.client(i).ListObjectsIter(h.tr.t.Context(), "data", minio.ListObjectsOptions{Prefix: key, Recursive: true}) {
			if e.Err != nil {
				return
			}
			if e.Key == key {
				o.value = e.ETag
			}
		}
		// A listing tells only whether there is one, by its ETag: checked as a read of that.
		o.value = etagValue(h, key, o.value)
	default:
		p, _, err := h.tr.get(i, key)
		if err != nil && code(err) != "NoSuchKey" {
			return // tells nothing
		}
		o.value = string(p)
	}
	o.end = h.now()
	h.add(key, o)
}

// etags are the values of what was put, by ETag: the MD5 of the value.
var etags sync.Map

func etagValue(_ *history, _, etag string) string {
	if etag == "" {
		return ""
	}
	v, ok := etags.Load(etag)
	if !ok {
		return "a value that nobody wrote: " + etag
	}
	return v.(string)
}

// check reports the keys whose operations no order explains.
func (h *history) check() {
	h.tr.t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	for key, ops := range h.ops {
		if sound(ops) {
			continue
		}
		var b strings.Builder
		for _, o := range ops {
			fmt.Fprintf(&b, "%v\n", o)
		}
		h.tr.t.Errorf("of the %d operations on %s a read is explained by no order of the writes:\n%s", len(ops), key, b.String())
	}
}

// clients runs n clients until every one has done its operations, each on a random key through a random
// worker of those that run.
func (h *history) clients(wg *sync.WaitGroup, n, each, keys int, running func(r *rand.Rand) int) {
	for c := range n {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(c), 7))
			for k := range each {
				value := fmt.Sprintf("%d-%d", c, k)
				etags.Store(md5Hex(value), value)
				h.do(running(r), fmt.Sprintf("key-%d", r.IntN(keys)), value, r.IntN(8))
			}
		})
	}
}

// Reads and listings see every acknowledged write through every worker, also while the membership changes,
// which each worker learns at another time.
func TestReadsSeeEveryWriteWhileTheMembershipChanges(t *testing.T) {
	tr := newTier(t, "").start(4)
	h := newHistory(tr)
	var wg sync.WaitGroup
	const clients, each, changes = 6, 16, 4
	h.clients(&wg, clients, each, 3, func(r *rand.Rand) int { return r.IntN(4) })
	// Members leave and come back, while they run and serve on. Each worker is told as the clients get on, so
	// that there are always operations between two that disagree.
	r := rand.New(rand.NewPCG(1, 2))
	tell := int64(0)
	for change := range changes {
		w := tr.workers[r.IntN(4)]
		switch {
		case w.state == "gone":
			w.state = ""
		case w.m.State == ring.Leaving:
			w.m.State = ring.Ready
		case change%2 == 0:
			w.m.State = ring.Leaving
		default:
			w.state = "gone"
		}
		list := tr.next()
		for _, i := range r.Perm(4) {
			tell += clients * each / (changes*4 + 4)
			for h.count.Load() < tell {
				time.Sleep(time.Millisecond)
			}
			tr.tell(i, list)
		}
	}
	wg.Wait()
	h.check()
	var waited, forwarded int64
	for i := range tr.workers {
		waited += tr.metric(i, "stepcache_objects_waited_total")
		forwarded += tr.metric(i, "stepcache_objects_forwarded_total")
	}
	if waited == 0 || forwarded == 0 {
		t.Errorf("%d writes waited, %d operations were passed on: the test shows nothing", waited, forwarded)
	}
}

// The same while workers die and come back, and hang.
func TestReadsSeeEveryWriteWhileWorkersHang(t *testing.T) {
	t.Parallel() // it waits most of the time
	tr := newTier(t, "")
	for range 3 {
		tr.add()
	}
	tr.publish()
	for i := range 3 {
		tr.spawn(i)
	}
	tr.ready()
	h := newHistory(tr)
	for i := range 3 { // every key has a version that its owner remembers
		for k := range 3 {
			h.do(i, fmt.Sprintf("key-%d", k), "", 4)
		}
	}
	hung := tr.owner("key-0")
	goOn := tr.hangs(hung)
	var wg sync.WaitGroup
	h.clients(&wg, 4, 12, 3, func(r *rand.Rand) int {
		for {
			if i := r.IntN(3); i != hung {
				return i
			}
		}
	})
	wg.Wait()
	written := false
	h.mu.Lock()
	for _, o := range h.ops["key-0"] {
		written = written || o.write && !o.maybe
	}
	h.mu.Unlock()
	if !written {
		t.Error("no write of a name whose owner hangs succeeded")
	}
	goOn()
	h.clients(&wg, 4, 12, 3, func(r *rand.Rand) int { return r.IntN(3) })
	wg.Wait()
	h.check()
}
