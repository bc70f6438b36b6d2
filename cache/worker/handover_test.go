package worker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/scheme"
	"github.com/stepcache/stepcache/cache/wire"
)

// What only readers of an old snapshot read, since the bucket has another version of it, moves as well, and what is in
// both snapshots moves once.
func TestALeavingWorkerHandsOverWhatTheBucketHasReplaced(t *testing.T) {
	files := manyFiles(8, 100_000)
	tr := newTier(t, files)
	tr.start(2)
	snap := tr.snapshot()
	old := snap.Digest()
	c := tr.dial(0)
	var total int64
	var mine []string
	for name, want := range files {
		if tr.owners(snap, "/"+name, 0)[0] == 0 {
			if _, err := c.file(index(t, snap, "/"+name), int64(len(want)), 0); err != nil {
				t.Fatal(err)
			}
			total += int64(len(want))
			mine = append(mine, name)
		}
	}
	for _, name := range mine[:len(mine)/2+1] {
		if err := os.WriteFile(filepath.Join(tr.root, name), []byte("another version"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	tr.relist("new")
	eventually(t, "all have the new snapshot", func() error {
		for _, w := range tr.workers {
			if n := w.Status().Files; n != int64(len(files))+1 {
				return fmt.Errorf("%d files", n)
			}
		}
		return nil
	})
	tr.tell(nil, 0)
	if h := tr.handedOver(0); h.Total != total || h.Handed != total {
		t.Errorf("handed over %+v of %d bytes", h, total)
	}
	c = tr.dial(1)
	for _, name := range mine {
		_, p, err := c.ask(wire.Request{Op: wire.OpRead, Flags: wire.FlagResidentOnly, Snapshot: old, Index: index(t, snap, "/"+name), Length: int32(len(files[name]))})
		if err != nil || !bytes.Equal(p, files[name]) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// tell posts the list of the running workers, of which some leave, with the next epoch to all of them.
func (tr *tier) tell(extra []ring.Member, leaving ...int) ring.Membership {
	tr.t.Helper()
	tr.epoch++
	list := tr.list(extra, leaving...)
	// Who leaves is told last: the workers' clock is quick, so that it is soon tired of others which do not follow yet.
	var order []int
	for i := range tr.workers {
		if !slices.Contains(leaving, i) {
			order = append(order, i)
		}
	}
	for _, i := range append(order, leaving...) {
		if tr.workers[i] != nil {
			tr.tellOne(i, list)
		}
	}
	return list
}

// list is what tell posts.
func (tr *tier) list(extra []ring.Member, leaving ...int) ring.Membership {
	list := ring.Membership{Epoch: tr.epoch, Members: extra}
	for i, w := range tr.workers {
		if w == nil {
			continue
		}
		m := ring.Member{ID: fmt.Sprintf("w%d", i), Node: fmt.Sprintf("n%d", i), Addr: w.Addr().String(), Control: w.ControlAddr().String(), State: ring.Ready}
		m.Joined = tr.joined[i]
		for _, l := range leaving {
			if l == i {
				m.State = ring.Leaving
			}
		}
		list.Members = append(list.Members, m)
	}
	return list
}

// tellOne posts a list to worker i, which is to follow it then.
func (tr *tier) tellOne(i int, list ring.Membership) {
	tr.t.Helper()
	if code, err := tr.control(i, http.MethodPost, wire.PathMembers, list, nil); err != nil || code != http.StatusNoContent {
		tr.t.Fatalf("worker %d was told: %d %v", i, code, err)
	}
	if e := tr.workers[i].members.view().Epoch; e != list.Epoch {
		tr.t.Fatalf("worker %d follows epoch %d, told was %d", i, e, list.Epoch)
	}
}

// handedOver waits until worker i has handed over under the epoch in force.
func (tr *tier) handedOver(i int) wire.HandOver {
	tr.t.Helper()
	var h *wire.HandOver
	eventually(tr.t, "the blocks are handed over", func() error {
		if h = tr.workers[i].Status().HandOver; h == nil || !h.Done || h.Epoch != tr.epoch {
			return fmt.Errorf("%+v", h)
		}
		return nil
	})
	if h.Handed+h.Dropped != h.Total {
		tr.t.Errorf("handed and dropped do not add up: %+v", h)
	}
	return *h
}

// all reads every file from worker i, which reads through what it does not own.
func (tr *tier) all(i int, snap *catalog.Snapshot, files map[string][]byte) {
	tr.t.Helper()
	c := tr.dial(i)
	for name, want := range files {
		p, err := c.file(index(tr.t, snap, "/"+name), int64(len(want)), wire.FlagReadThrough)
		if err != nil || !bytes.Equal(p, want) {
			tr.t.Fatalf("%s: %v", name, err)
		}
	}
}

func manyFiles(n int, size int64) map[string][]byte {
	files := map[string][]byte{}
	for i := range n {
		files[fmt.Sprintf("f%02d", i)] = content(size+int64(i), byte(i))
	}
	return files
}

func TestALeavingWorkerHandsItsBlocksToTheirNewOwnersAndTheBucketSendsNothing(t *testing.T) {
	files := manyFiles(20, 100_000)
	files["large"] = content(2*ring.BlockSize+5, 99)
	tr := newTier(t, files)
	tr.start(3)
	snap := tr.snapshot()
	c := tr.dial(0)
	var total int64
	for name, want := range files {
		if tr.owners(snap, "/"+name, 0)[0] == 0 {
			if _, err := c.file(index(t, snap, "/"+name), int64(len(want)), 0); err != nil {
				t.Fatal(err)
			}
			total += int64(len(want))
		}
	}
	tr.tell(nil, 0)
	if h := tr.handedOver(0); h.Total != total || h.Handed != total {
		t.Errorf("handed over %+v of %d bytes", h, total)
	}
	for _, i := range []int{1, 2} {
		if gets, _ := tr.gates[i].counts(); gets != 0 {
			t.Errorf("worker %d asked the bucket %d times for what the leaving one holds", i, gets)
		}
	}
	// What the leaving one held is its new owners': they serve it although it is gone.
	held := map[string][]byte{}
	for name := range files {
		if r, _ := snap.Ring(index(t, snap, "/"+name)); tr.workers[0].store.Residency(r).Whole {
			held[name] = files[name]
		}
	}
	tr.stop(0)
	for name, want := range held {
		r, _ := snap.Ring(index(t, snap, "/"+name))
		owner := tr.workers[1].members.view().Owners(r, 0, 1)[0].ID
		i := int(owner[1] - '0')
		p, err := tr.dial(i).file(index(t, snap, "/"+name), int64(len(want)), wire.FlagResidentOnly)
		if err != nil || !bytes.Equal(p, want) {
			t.Errorf("%s from %s: %v", name, owner, err)
		}
	}
	// A worker that is to stay after all has nothing to report.
	tr.tell(nil, 1)
	tr.handedOver(1)
	tr.tell(nil)
	eventually(t, "no account of a hand-over is left", func() error {
		if h := tr.workers[1].Status().HandOver; h != nil {
			return fmt.Errorf("%+v", h)
		}
		return nil
	})
}

// patient waits a tenth, not a fiftieth.
type patient struct{ quick }

func (patient) After(d time.Duration) <-chan time.Time { return time.After(d / 10) }

// The mounted list reaches one node a minute after another: a new owner that does not follow it yet is waited
// for, though not for ever.
func TestALeavingWorkerWaitsForANewOwnerThatFollowsAnOlderMembership(t *testing.T) {
	want := content(1000, 1)
	for name, follows := range map[string]bool{"it follows later": true, "it never does": false} {
		t.Run(name, func(t *testing.T) {
			tr := newTier(t, map[string][]byte{"f": want})
			if follows {
				tr.deps = func(int) Deps { return Deps{Clock: patient{}} }
			}
			tr.start(2)
			snap := tr.snapshot()
			leaver := tr.owners(snap, "/f", 0)[0]
			heir := 1 - leaver
			if _, err := tr.dial(leaver).read(index(t, snap, "/f"), 0, len(want), 0); err != nil {
				t.Fatal(err)
			}
			tr.epoch++
			list := tr.list(nil, leaver)
			tr.tellOne(leaver, list)
			handed := int64(0)
			if follows {
				eventually(t, "it is asked again and again", func() error {
					if n := tr.workers[heir].counts.statuses[wire.NotOwner].Load(); n <= handOverTries {
						return fmt.Errorf("%d times", n)
					}
					return nil
				})
				tr.tellOne(heir, list)
				handed = int64(len(want))
			}
			if h := tr.handedOver(leaver); h.Handed != handed || h.Handed+h.Dropped != int64(len(want)) {
				t.Errorf("%+v", h)
			}
			if gets, _ := tr.gates[heir].counts(); gets != 0 {
				t.Errorf("the bucket was asked %d times", gets)
			}
		})
	}
}

// Who restarts while it leaves holds what it held, but does not know of what snapshot until its sources are open.
func TestALeavingWorkerThatRestartsHandsOverOnceItHasItsSnapshot(t *testing.T) {
	files := manyFiles(20, 1000)
	tr := newTier(t, files)
	tr.start(2)
	snap := tr.snapshot()
	tr.all(0, snap, files)
	held := tr.workers[0].store.Stats().Bytes
	tr.stop(0)

	open := make(chan struct{})
	tr.deps = func(int) Deps {
		return Deps{OpenSource: func(ctx context.Context, c source.Config) (*scheme.Source, error) {
			select {
			case <-open:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			return scheme.Open(ctx, c)
		}}
	}
	tr.add(0)
	tr.tell(nil, 0)
	for range 20 { // many times as long as it takes to look
		if h := tr.workers[0].Status().HandOver; h != nil && h.Done {
			t.Fatalf("before it knows its snapshot: %+v", h)
		}
		time.Sleep(pollInterval / 50)
	}
	close(open)
	if h := tr.handedOver(0); h.Total != held || h.Handed != held || held == 0 {
		t.Errorf("%+v of %d bytes", h, held)
	}
}

// Before anything is handed over, a new owner that is asked for a block gets it from the one that leaves.
func TestAMissAtANewOwnerIsServedByTheLeavingOne(t *testing.T) {
	want := content(1000, 1)
	tr := newTier(t, map[string][]byte{"f": want})
	tr.start(2)
	snap := tr.snapshot()
	i := index(t, snap, "/f")
	owners := tr.owners(snap, "/f", 0)
	if _, err := tr.dial(owners[0]).read(i, 0, 1000, 0); err != nil {
		t.Fatal(err)
	}
	tr.workers[owners[0]].handedOver.Store(nil)
	tr.tell(nil, owners[0])
	if p, err := tr.dial(owners[1]).read(i, 0, 1000, 0); err != nil || !bytes.Equal(p, want) {
		t.Fatal(err)
	}
	if gets, _ := tr.gates[owners[1]].counts(); gets != 0 {
		t.Errorf("the new owner asked the bucket %d times", gets)
	}
}

// Workers that come to others get what is theirs from whoever held it, also when several come at once, or one
// just after the other.
func TestBlocksThatMoveToNewWorkersComeFromTheirFormerOwners(t *testing.T) {
	for name, apart := range map[string]uint64{"at once": 0, "one after the other": 1} {
		t.Run(name, func(t *testing.T) { blocksMove(t, apart) })
	}
}

func blocksMove(t *testing.T, apart uint64) {
	files := manyFiles(40, 50_000)
	files["large"] = content(6*ring.BlockSize+5, 99)
	tr := newTier(t, files)
	tr.start(2)
	snap := tr.snapshot()
	load := func() {
		for name, want := range files {
			i := index(t, snap, "/"+name)
			for block := int64(0); blockOff(block) < int64(len(want)); block++ {
				off, n := blockOff(block), blockLen(int64(len(want)), block)
				p, err := tr.dial(tr.owners(snap, "/"+name, block)[0]).read(i, off, int(n), 0)
				if err != nil || !bytes.Equal(p, want[off:off+n]) {
					t.Fatalf("%s, block %d: %v", name, block, err)
				}
			}
		}
	}
	load()
	tr.add(2)
	tr.add(3)
	tr.joined = map[int]uint64{2: tr.epoch + 1, 3: tr.epoch + 1 - apart}
	tr.tell(nil)
	tr.snapshot()
	load()
	var got int64
	for _, i := range []int{2, 3} {
		if gets, _ := tr.gates[i].counts(); gets != 0 {
			t.Errorf("new worker %d asked the bucket %d times for what the others hold", i, gets)
		}
		got += tr.workers[i].counts.peerBytes.Load()
	}
	if got == 0 {
		t.Error("nothing moved to the new workers")
	}
	// What nobody holds comes from the bucket all the same.
	name := ""
	for n := range files {
		if tr.owners(snap, "/"+n, 0)[0] == 2 && len(files[n]) < ring.BlockSize {
			name = n
		}
	}
	if name == "" {
		t.Fatal("no file is worker 2's")
	}
	for i := range tr.workers {
		r, _ := snap.Ring(index(t, snap, "/"+name))
		tr.workers[i].store.Drop(r)
	}
	p, err := tr.dial(2).read(index(t, snap, "/"+name), 0, len(files[name]), 0)
	if err != nil || !bytes.Equal(p, files[name]) {
		t.Errorf("%s: %v", name, err)
	}
	if gets, _ := tr.gates[2].counts(); gets != 1 {
		t.Errorf("the bucket was asked %d times for what nobody held", gets)
	}
}

func TestAHandOverDisplacesNothing(t *testing.T) {
	files := manyFiles(12, 2<<20)
	tr := newTier(t, files)
	tr.config = func(i int, c *Config) {
		if i == 1 {
			c.Memory = 12 << 20
		}
	}
	tr.start(2)
	snap := tr.snapshot()
	tr.all(0, snap, files)
	// Fill worker 1 with what it can hold.
	tr.all(1, snap, files)
	before := map[string]bool{}
	for name := range files {
		r, _ := snap.Ring(index(t, snap, "/"+name))
		before[name] = tr.workers[1].store.Residency(r).Whole
	}
	tr.tell(nil, 0)
	h := tr.handedOver(0)
	if h.Dropped == 0 {
		t.Errorf("a full successor took everything: %+v", h)
	}
	for name, held := range before {
		r, _ := snap.Ring(index(t, snap, "/"+name))
		if held && !tr.workers[1].store.Residency(r).Whole {
			t.Errorf("%s was displaced", name)
		}
	}
	if st := tr.workers[1].store.Stats(); st.Used > st.Quota {
		t.Errorf("%d bytes used of %d", st.Used, st.Quota)
	}
}

// A new owner that cannot be reached costs its own blocks, once, and not the wait of every one of them.
func TestAHandOverDoesNotWaitForAMemberThatIsGoneBlockByBlock(t *testing.T) {
	files := manyFiles(2000, 100)
	tr := newTier(t, files)
	tr.start(1)
	snap := tr.snapshot()
	tr.all(0, snap, files)
	var dials atomic.Int64
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			dials.Add(1)
			c.Close()
		}
	}()
	tr.tell([]ring.Member{{ID: "gone", Addr: l.Addr().String(), State: ring.Ready}}, 0)
	if h := tr.handedOver(0); h.Dropped != h.Total || h.Total == 0 {
		t.Errorf("%+v", h)
	}
	// The worker's own questions for snapshots are among them, hence the slack.
	if n := dials.Load(); n > int64(len(files))/2 {
		t.Errorf("%d attempts to reach a member that is gone, for %d blocks", n, len(files))
	}
}

func TestHostileHandOversAreInvalid(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(2*ring.BlockSize+7, 1)})
	tr.start(1)
	i := index(t, tr.snapshot(), "/f")
	c := tr.dial(0)
	for _, r := range []struct {
		off    int64
		length int32
	}{{0, 7}, {1, ring.BlockSize}, {2 * ring.BlockSize, ring.BlockSize}, {ring.BlockSize, 2 * ring.BlockSize}, {-ring.BlockSize, ring.BlockSize}, {3 * ring.BlockSize, 7}, {3 * ring.BlockSize, 7 - ring.BlockSize}} {
		_, _, err := c.ask(wire.Request{Op: wire.OpHandOver, Flags: wire.FlagHandOver, Index: i, Off: r.off, Length: r.length})
		if wire.StatusOf(err) != wire.Invalid {
			t.Errorf("%d bytes from %d: %v", r.length, r.off, err)
		}
	}
	if gets, _ := tr.gates[0].counts(); gets != 0 {
		t.Errorf("the bucket was asked %d times", gets)
	}
}

func TestAToldMembershipCountsWhereItIsNewer(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(10, 1)})
	tr.start(1)
	tr.snapshot()
	w := tr.workers[0]
	list := tr.tell(nil)

	// The file still has the list from before: that is no problem to report, and changes nothing.
	for range 3 {
		if err := w.members.reload(); err != nil {
			t.Errorf("an older file beside a told list: %v", err)
		}
	}
	if e := w.members.view().Epoch; e != list.Epoch {
		t.Errorf("epoch %d, told was %d", e, list.Epoch)
	}
	older := list
	older.Epoch, older.Members = 1, nil
	if _, err := tr.control(0, http.MethodPost, wire.PathMembers, older, nil); err != nil {
		t.Errorf("an older list: %v", err)
	}
	same := list
	same.Members = nil
	if _, err := tr.control(0, http.MethodPost, wire.PathMembers, same, nil); err != nil {
		t.Errorf("another list of the same epoch: %v", err)
	}
	if v := w.members.view(); v.Epoch != list.Epoch || len(v.Members) != 1 {
		t.Errorf("epoch %d with %d members is in force", v.Epoch, len(v.Members))
	}
	// Lists that are wrong, and senders that may not tell.
	for what, body := range map[string]any{
		"no list":      "x",
		"no id":        ring.Membership{Epoch: 99, Members: []ring.Member{{Addr: "a:1", State: ring.Ready}}},
		"two of an id": ring.Membership{Epoch: 99, Members: []ring.Member{{ID: "a", Addr: "a:1", State: ring.Ready}, {ID: "a", Addr: "a:2", State: ring.Ready}}},
		"odd state":    ring.Membership{Epoch: 99, Members: []ring.Member{{ID: "a", Addr: "a:1", State: "Odd"}}},
	} {
		if code, err := tr.control(0, http.MethodPost, wire.PathMembers, body, nil); code != http.StatusBadRequest {
			t.Errorf("%s: %d %v", what, code, err)
		}
	}
	next := list
	next.Epoch = 99
	for what, key := range map[string]wire.Key{"a reader": tr.keys.Read[0], "a writer": tr.keys.Write[0], "a stranger": wire.GenerateKeys().Control[0]} {
		if code, err := tr.controlWith(0, key, http.MethodPost, wire.PathMembers, next, nil); code != http.StatusUnauthorized {
			t.Errorf("%s told the membership: %d %v", what, code, err)
		}
	}
	if e := w.members.view().Epoch; e != list.Epoch {
		t.Errorf("epoch %d is in force", e)
	}
	// Once the file has caught up, a file that goes back is a mistake to report again.
	b, err := json.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	if err := replaceFile(tr.membersFile(), b); err != nil {
		t.Fatal(err)
	}
	if err := w.members.reload(); err != nil {
		t.Error(err)
	}
	if b, err = json.Marshal(older); err != nil {
		t.Fatal(err)
	}
	if err := replaceFile(tr.membersFile(), b); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the file that goes back is told", func() error {
		if p := w.Status().Problem; !strings.Contains(p, "raise the epoch") {
			return errors.New(p)
		}
		return nil
	})
}
