package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
)

// controlled is the control endpoint of a few workers, signatures checked.
type controlled struct {
	keys   wire.Keys
	list   ring.Membership
	mu     sync.Mutex
	answer map[string]func(id string, r *http.Request) (int, any) // by worker
	seen   []string
}

func newControlled(t *testing.T, ids ...string) *controlled {
	k := &controlled{keys: wire.GenerateKeys(), answer: make(map[string]func(string, *http.Request) (int, any))}
	k.list.Epoch = 1
	for _, id := range ids {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if err := wire.VerifyRequest(r, k.keys, id, time.Now()); err != nil {
				w.WriteHeader(http.StatusUnauthorized)
				json.NewEncoder(w).Encode(map[string]string{"error": err.Error()})
				return
			}
			k.mu.Lock()
			k.seen = append(k.seen, id+" "+r.Method+" "+r.URL.RequestURI())
			f := k.answer[id]
			k.mu.Unlock()
			code, v := f(id, r)
			w.WriteHeader(code)
			if v != nil {
				json.NewEncoder(w).Encode(v)
			}
		}))
		t.Cleanup(srv.Close)
		addr := strings.TrimPrefix(srv.URL, "http://")
		k.list.Members = append(k.list.Members, ring.Member{ID: id, Addr: addr, Control: addr, State: ring.Ready})
	}
	return k
}

func (k *controlled) set(id string, f func(id string, r *http.Request) (int, any)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, m := range k.list.Members {
		if id == "" || m.ID == id {
			k.answer[m.ID] = f
		}
	}
}

func (k *controlled) control(t *testing.T, change func(*ControlConfig)) *Control {
	c := ControlConfig{Dataset: testDataset, Membership: k.list, Keys: k.keys}
	if change != nil {
		change(&c)
	}
	ctl, err := NewControl(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ctl.Close)
	return ctl
}

func TestStatusNamesWorkersThatCannotBeReached(t *testing.T) {
	ctx := testContext(t)
	k := newControlled(t, "a", "b")
	k.set("", func(id string, r *http.Request) (int, any) { return 200, wire.WorkerStatus{ID: id, Files: 3} })
	ctl := k.control(t, nil)
	all, err := ctl.Status(ctx)
	if err != nil || len(all) != 2 || all[0].ID != "a" || all[1].Files != 3 {
		t.Fatal(all, err)
	}
	k.list.Members = append(k.list.Members, ring.Member{ID: "gone", Addr: "127.0.0.1:1", Control: "127.0.0.1:1", State: ring.Ready})
	all, err = k.control(t, nil).Status(ctx)
	var miss *Missing
	if len(all) != 2 || !errors.As(err, &miss) || len(miss.Errors) != 1 || miss.Errors["gone"] == nil || !strings.Contains(err.Error(), "worker gone") {
		t.Fatal(all, err)
	}
	if _, err := k.control(t, func(c *ControlConfig) { c.Keys = wire.GenerateKeys() }).Status(ctx); !errors.Is(err, wire.ErrUnauthorized) {
		t.Fatal(err)
	}
	// Those that refuse have answered.
	for want, change := range map[string]func(*ControlConfig){
		"1 of 3 workers did not answer:":            func(*ControlConfig) {},
		"3 of 3 workers did not answer or refused:": func(c *ControlConfig) { c.Keys = wire.GenerateKeys() },
		"2 of 2 workers refused:": func(c *ControlConfig) {
			c.Keys, c.Membership.Members = wire.GenerateKeys(), c.Membership.Members[:2]
		},
	} {
		if _, err := k.control(t, change).Status(ctx); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %q", err, want)
		}
	}
	// During a rotation the workers may know only the older key.
	rotated := func(c *ControlConfig) {
		c.Keys.Control = append(wire.GenerateKeys().Control, c.Keys.Control...)
		c.Membership.Members = c.Membership.Members[:2]
	}
	if _, err := k.control(t, rotated).Status(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := k.control(t, func(c *ControlConfig) { c.Membership = ring.Membership{} }).Status(ctx); err == nil {
		t.Fatal("nobody to ask, and no error")
	}
}

func TestALoadIsDoneOnlyWhenEveryWorkerIsDone(t *testing.T) {
	ctx := testContext(t)
	k := newControlled(t, "a", "b")
	begun := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	part := map[string]wire.LoadStatus{
		"a": {ID: "warm", Snapshot: "s", Started: begun, Finished: begun.Add(time.Minute), Files: 2, Total: 10, Resident: 10, Fetched: 10, Done: true},
		"b": {ID: "warm", Snapshot: "s", Started: begun.Add(time.Second), Files: 3, Total: 20, Resident: 5, Fetched: 7,
			FailedFiles: 1, Failures: []wire.LoadFailure{{Path: "/x", Reason: "gone"}}},
	}
	k.set("", func(id string, r *http.Request) (int, any) { return 200, part[id] })
	ctl := k.control(t, nil)
	sum, err := ctl.LoadStatus(ctx, "warm")
	if err != nil {
		t.Fatal(err)
	}
	want := wire.LoadStatus{ID: "warm", Snapshot: "s", Started: begun, Files: 5, Total: 30, Resident: 15, Fetched: 17,
		FailedFiles: 1, Failures: part["b"].Failures}
	if d := cmp.Diff(want, sum.LoadStatus); d != "" {
		t.Fatal(d)
	}
	b := part["b"]
	b.Done, b.Finished = true, begun.Add(2*time.Minute)
	k.set("b", func(string, *http.Request) (int, any) { return 200, b })
	if sum, err = ctl.LoadStatus(ctx, "warm"); err != nil || !sum.Done || !sum.Finished.Equal(begun.Add(2*time.Minute)) {
		t.Fatal(sum, err)
	}
	// One that cannot be asked is named, and the load is not done, whatever the others say.
	k.set("b", func(string, *http.Request) (int, any) { return 500, map[string]string{"error": "on fire"} })
	sum, err = ctl.LoadStatus(ctx, "warm")
	if err != nil || sum.Done || !sum.Finished.IsZero() || sum.Missing["b"] == nil || !strings.Contains(sum.Missing["b"].Error(), "on fire") {
		t.Fatal(sum, err)
	}
	k.set("", func(string, *http.Request) (int, any) { return 404, map[string]string{"error": "no load"} })
	if _, err = ctl.LoadStatus(ctx, "warm"); !errors.Is(err, ErrNoLoad) {
		t.Fatal(err)
	}
	if err := ctl.DeleteLoad(ctx, "warm"); err != nil {
		t.Fatalf("deleting what is not there: %v", err)
	}
	if err := ctl.Load(ctx, wire.LoadRequest{ID: "a/b"}); err == nil {
		t.Fatal("a load id with a slash")
	}
}

func TestWaitTellsAWorkerThatLostTheLoadAgain(t *testing.T) {
	ctx := testContext(t)
	k := newControlled(t, "a", "b")
	polls := make(map[string]int)
	started := make(map[string]bool)
	var mu sync.Mutex
	k.set("", func(id string, r *http.Request) (int, any) {
		mu.Lock()
		defer mu.Unlock()
		if r.Method == http.MethodPost {
			var req wire.LoadRequest
			if err := json.NewDecoder(r.Body).Decode(&req); err != nil || req.ID != "warm" || !req.Pin {
				return 400, nil
			}
			started[id] = true
			return 200, wire.LoadStatus{ID: "warm"}
		}
		polls[id]++
		if !started[id] || id == "b" && polls[id] == 2 {
			started[id] = false // it restarted
			return 404, nil
		}
		return 200, wire.LoadStatus{ID: "warm", Total: 10, Resident: int64(min(10, polls[id])), Done: polls[id] >= 6}
	})
	ctl := k.control(t, nil)
	req := wire.LoadRequest{ID: "warm", Pin: true}
	if err := ctl.Load(ctx, req); err != nil {
		t.Fatal(err)
	}
	var sums []LoadSum
	sum, err := ctl.Wait(ctx, req, time.Millisecond, func(s LoadSum) { sums = append(sums, s) })
	if err != nil || !sum.Done || sum.Total != 20 || len(sums) < 3 {
		t.Fatal(sum, err, len(sums))
	}
	// It ends with its context and names who is missing, and with a problem that time does not mend.
	k.set("", func(string, *http.Request) (int, any) { return 200, wire.LoadStatus{ID: "warm"} })
	k.set("b", func(string, *http.Request) (int, any) { return 500, nil })
	short, cancel := context.WithCancel(ctx)
	_, err = ctl.Wait(short, req, time.Millisecond, func(LoadSum) { cancel() })
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "worker b") {
		t.Fatal(err)
	}
	k.set("", func(id string, _ *http.Request) (int, any) {
		return 200, wire.LoadStatus{ID: "warm", Done: id == "a", Finished: time.Now(), Problem: "does not fit memory"}
	})
	if _, err = ctl.Wait(ctx, req, time.Millisecond, nil); err == nil || !strings.Contains(err.Error(), "does not fit memory") {
		t.Fatal(err)
	}
}

func TestRefreshAsksTheListerAndWaitsForTheOthers(t *testing.T) {
	ctx := testContext(t)
	k := newControlled(t, "a", "b", "c")
	lister, _ := k.list.Lister(testDataset)
	var mu sync.Mutex
	posts, asked := 0, map[string]int{}
	has := func(id string) string { // the others get it a while later
		switch asked[id]++; {
		case id == lister.ID || asked[id] > 2:
			return "abcd"
		}
		return "old"
	}
	k.set("", func(id string, r *http.Request) (int, any) {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case r.Method == http.MethodGet:
			return 200, wire.WorkerStatus{ID: id, Snapshot: has(id)}
		case id != lister.ID:
			return 500, nil
		}
		if posts++; posts == 1 {
			return 503, map[string]string{"error": "being settled"}
		}
		return 200, map[string]string{"snapshot": "abcd"}
	})
	ctl := k.control(t, nil)
	digest, err := ctl.Refresh(ctx)
	if err != nil || digest != "abcd" || posts != 2 {
		t.Fatal(digest, posts, err)
	}
	mu.Lock()
	for _, id := range []string{"a", "b", "c"} {
		if id != lister.ID && asked[id] != 3 {
			t.Errorf("worker %s was asked %d times for what it has", id, asked[id])
		}
	}
	// One that had it and lists again meanwhile has the others follow that. One that did not list itself, since another
	// still did for it, has an older one at first.
	for _, first := range []string{"abcd", "old", ""} {
		clear(asked)
		has = func(id string) string {
			switch asked[id]++; {
			case id == lister.ID && asked[id] == 1:
				return first
			case id == lister.ID && asked[id] == 2:
				return "abcd"
			case id == lister.ID:
				return "newer"
			}
			return "old"
		}
		mu.Unlock()
		digest, err := ctl.Refresh(ctx)
		mu.Lock()
		if err != nil || digest != "abcd" || asked[lister.ID] != 3 {
			t.Errorf("first %q: %q after %d looks, %v", first, digest, asked[lister.ID], err)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	has = func(id string) string {
		if id == lister.ID {
			return "abcd"
		}
		cancel()
		return "old"
	}
	mu.Unlock()
	if _, err := ctl.Refresh(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, though the others have not got it and nobody waits any more", err)
	}
}

func TestControlAnswersThatAreNoJSONOrRedirectsAreErrors(t *testing.T) {
	ctx := testContext(t)
	k := newControlled(t, "a")
	k.set("", func(id string, r *http.Request) (int, any) { return 200, "not a status" })
	if _, err := k.control(t, nil).Status(ctx); err == nil || !strings.Contains(err.Error(), "JSON") {
		t.Fatal(err)
	}
	k.set("", func(id string, r *http.Request) (int, any) { return 307, nil })
	if _, err := k.control(t, nil).Status(ctx); err == nil || !strings.Contains(err.Error(), "307") {
		t.Fatal(err)
	}
}

// A pod that calls itself a worker must not take the controller's memory.
func TestControlKeepsLittleOfWhatWorkersSay(t *testing.T) {
	ctx := testContext(t)
	k := newControlled(t, "a")
	most := wire.LoadStatus{ID: "l", Problem: strings.Repeat("x", wire.MaxControl-1024)}
	k.set("", func(id string, r *http.Request) (int, any) { return 200, most })
	if sum, err := k.control(t, nil).LoadStatus(ctx, "l"); err != nil || len(sum.Problem) < len(most.Problem) {
		t.Fatalf("%d bytes, %v", len(sum.Problem), err)
	}
	k.set("", func(id string, r *http.Request) (int, any) { return 200, strings.Repeat("x", wire.MaxControl) })
	if _, err := k.control(t, nil).Status(ctx); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Fatalf("%.200v", err)
	}
	k.set("", func(id string, r *http.Request) (int, any) {
		return 500, map[string]string{"error": "no: " + strings.Repeat("x", wire.MaxControl/2)}
	})
	if _, err := k.control(t, nil).Status(ctx); err == nil || !strings.Contains(err.Error(), "no: x") || len(err.Error()) > 2*maxSaid {
		t.Fatalf("%.200v", err)
	}
}

func TestControlReadsAFewAnswersAtATime(t *testing.T) {
	ctx := testContext(t)
	var ids []string
	for i := range maxReads + 4 {
		ids = append(ids, fmt.Sprintf("w%02d", i))
	}
	k := newControlled(t, ids...)
	k.set("", func(id string, r *http.Request) (int, any) { return 200, wire.WorkerStatus{ID: id} })
	ctl := k.control(t, nil)
	for range maxReads {
		ctl.read <- struct{}{}
	}
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	if all, err := ctl.Status(short); len(all) > 0 || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("%d answers read beside %d, %v", len(all), maxReads, err)
	}
	for range maxReads {
		<-ctl.read
	}
	if all, err := ctl.Status(ctx); len(all) != len(ids) || err != nil {
		t.Fatalf("%d answers, %v", len(all), err)
	}
}
