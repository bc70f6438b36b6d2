package worker

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// impostor is a member that holds the key and behaves as answer says; answer nil hangs.
func impostor(t *testing.T, keys wire.Keys, answer func(c net.Conn, req wire.Request)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				stop := context.AfterFunc(t.Context(), func() { c.Close() })
				defer stop()
				if _, _, err := wire.ServerHandshake(c, dataset, keys); err != nil {
					return
				}
				for {
					req, err := wire.ReadRequest(c)
					if err != nil {
						return
					}
					if answer == nil {
						<-done
						return
					}
					answer(c, req)
				}
			})
		}
	})
	t.Cleanup(func() { close(done); l.Close(); wg.Wait() })
	return l.Addr().String()
}

// withImpostor starts worker 0 with copies 2 beside an impostor, and returns a file whose first owner the
// impostor is.
func withImpostor(t *testing.T, answer func(c net.Conn, req wire.Request)) (tr *tier, i uint32, want []byte) {
	t.Helper()
	files := map[string][]byte{}
	for n := range 30 {
		files[fmt.Sprintf("f%d", n)] = content(1000, byte(n))
	}
	tr = newTier(t, files)
	tr.config = func(_ int, c *Config) { c.Copies = 2 }
	w := tr.add(0)
	tr.setMembers()
	snap := tr.snapshot()
	tr.epoch++
	list := ring.Membership{Epoch: tr.epoch, Members: append([]ring.Member{
		{ID: "impostor", Addr: impostor(t, tr.keys, answer), State: ring.Ready},
	}, w.members.view().Members...)}
	b, err := json.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	if err := replaceFile(tr.membersFile(), b); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the list is in force", func() error {
		if len(w.members.view().Members) != 2 {
			return errors.New("not yet")
		}
		return nil
	})
	for n := range 30 {
		i = index(t, snap, fmt.Sprintf("/f%d", n))
		r, _ := snap.Ring(i)
		if w.members.view().Owners(r, 0, 1)[0].ID == "impostor" {
			return tr, i, files[fmt.Sprintf("f%d", n)]
		}
	}
	t.Fatal("the impostor owns nothing")
	return nil, 0, nil
}

func TestAHungEarlierOwnerIsLeftForTheBucket(t *testing.T) {
	tr, i, want := withImpostor(t, nil)
	if p, err := tr.dial(0).read(i, 0, 1000, 0); err != nil || !bytes.Equal(p, want) {
		t.Fatal(err)
	}
}

func TestAnEarlierOwnerThatOnlyWaitsIsWaitedFor(t *testing.T) {
	var mu sync.Mutex
	waiting := map[net.Conn]wire.Request{}
	pings := map[net.Conn]int{}
	tr, i, want := withImpostor(t, func(c net.Conn, req wire.Request) {
		mu.Lock()
		defer mu.Unlock()
		switch req.Op {
		case wire.OpRead: // answered only after pings showed that it is alive
			waiting[c] = req
		case wire.OpPing:
			c.Write(wire.AppendFrame(nil, wire.Reply{ID: req.ID}, nil))
			if held, ok := waiting[c]; ok {
				if pings[c]++; pings[c] == 2 {
					c.Write(wire.AppendFrame(nil, wire.Reply{ID: held.ID, Index: held.Index, Off: held.Off}, bytes.Repeat([]byte{7}, 1000)))
				}
			}
		default:
			c.Write(wire.AppendFrame(nil, wire.Reply{ID: req.ID, Status: wire.UnknownSnapshot}, nil))
		}
	})
	p, err := tr.dial(0).read(i, 0, 1000, 0)
	if err != nil || !bytes.Equal(p, bytes.Repeat([]byte{7}, 1000)) {
		t.Fatalf("%v; the bucket has %x", err, want[:4])
	}
}

func TestAnEarlierOwnerThatAnswersWronglyIsLeftForTheBucket(t *testing.T) {
	for name, answer := range map[string]func(c net.Conn, req wire.Request){
		"flipped bit": func(c net.Conn, req wire.Request) {
			b := wire.AppendFrame(nil, wire.Reply{ID: req.ID, Index: req.Index, Off: req.Off}, make([]byte, 1000))
			b[len(b)-1] ^= 1
			c.Write(b)
		},
		"short": func(c net.Conn, req wire.Request) {
			c.Write(wire.AppendFrame(nil, wire.Reply{ID: req.ID, Index: req.Index, Off: req.Off}, make([]byte, 999)))
		},
		"empty": func(c net.Conn, req wire.Request) {
			c.Write(wire.AppendFrame(nil, wire.Reply{ID: req.ID, Index: req.Index, Off: req.Off}, nil))
		},
		"other file": func(c net.Conn, req wire.Request) {
			c.Write(wire.AppendFrame(nil, wire.Reply{ID: req.ID, Index: req.Index + 1, Off: req.Off}, make([]byte, 1000)))
		},
		"not asked for": func(c net.Conn, req wire.Request) {
			c.Write(wire.AppendFrame(nil, wire.Reply{ID: req.ID + 1}, make([]byte, 1000)))
		},
		"endless message": func(c net.Conn, req wire.Request) {
			c.Write(wire.AppendFrame(nil, wire.Reply{ID: req.ID, Status: wire.Unavailable}, make([]byte, wire.MaxMessage+1)))
		},
		"garbage": func(c net.Conn, req wire.Request) { c.Write(bytes.Repeat([]byte("x"), 4096)) },
		"closes":  func(c net.Conn, req wire.Request) { c.Close() },
		"internal": func(c net.Conn, req wire.Request) {
			c.Write(wire.AppendFrame(nil, wire.Reply{ID: req.ID, Status: wire.Internal}, []byte("bug")))
		},
	} {
		t.Run(name, func(t *testing.T) {
			tr, i, want := withImpostor(t, answer)
			if p, err := tr.dial(0).read(i, 0, 1000, 0); err != nil || !bytes.Equal(p, want) {
				t.Fatal(err)
			}
			if n := tr.workers[0].Status().Refetched; name == "flipped bit" && n != 1 {
				t.Errorf("%d blocks counted as refetched", n)
			}
		})
	}
	// What the bucket said of the object to the earlier owner is final.
	tr, i, _ := withImpostor(t, func(c net.Conn, req wire.Request) {
		c.Write(wire.AppendFrame(nil, wire.Reply{ID: req.ID, Status: wire.Changed}, []byte("file:///x: object changed")))
	})
	if _, err := tr.dial(0).read(i, 0, 1000, 0); !errors.Is(err, source.ErrChanged) {
		t.Errorf("changed: %v", err)
	}
}

// TestStoppingFinishesWhatIsUnderWay: a reader that waits when the worker is told to stop gets its answer.
func TestStoppingFinishesWhatIsUnderWay(t *testing.T) {
	noGoroutines(t)
	want := content(1000, 1)
	tr := newTier(t, map[string][]byte{"f": want})
	tr.start(1)
	i := index(t, tr.snapshot(), "/f")
	began, free := make(chan struct{}), make(chan struct{})
	tr.gates[0].set(func(ctx context.Context, o source.Object, off int64) error {
		close(began)
		<-free
		return nil
	})
	c, idle := tr.dial(0), tr.dial(0)
	c.SetDeadline(time.Now().Add(patience))
	c.Write(wire.AppendRequest(nil, wire.Request{Op: wire.OpRead, ID: 1, Index: i, Length: 1000}))
	<-began
	w := tr.workers[0]
	closed := make(chan struct{})
	go func() { w.Close(); close(closed) }()
	<-w.stopping
	close(free)
	if _, p, err := wire.ReadFrame(c.r); err != nil || !bytes.Equal(p, want) {
		t.Fatalf("%v", err)
	}
	<-closed
	if err := <-tr.done[0]; err != nil {
		t.Error(err)
	}
	idle.SetDeadline(time.Now().Add(patience))
	if _, err := idle.r.ReadByte(); err == nil {
		t.Error("an idle connection was left open")
	}
	if err := w.blocks.Close(); !errors.Is(err, net.ErrClosed) { // at its address another process may listen by now
		t.Errorf("the port was still open: %v", err)
	}
}

// TestAWorkerThatCannotStartLeavesNothing: what New took before it failed is given back.
func TestAWorkerThatCannotStartLeavesNothing(t *testing.T) {
	noGoroutines(t)
	tr := newTier(t, nil)
	c := tr.configOf(0)
	c.Control = "127.0.0.1:99999"
	if _, err := New(context.Background(), c, Deps{}); err == nil || !strings.Contains(err.Error(), "control") {
		t.Fatalf("%v", err)
	}
	c = tr.configOf(0)
	c.KeysDir += "x"
	if _, err := New(context.Background(), c, Deps{}); err == nil || !strings.Contains(err.Error(), c.KeysDir) {
		t.Fatalf("%v", err)
	}
	w, err := New(context.Background(), tr.configOf(0), Deps{}) // the store's folder is free again
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	if err := w.Serve(context.Background()); err == nil {
		t.Error("it serves after Close")
	}
}

// TestAnEarlierOwnerThatHungIsNotAskedForEveryBlock: who found out spares the others the wait, for a while.
func TestAnEarlierOwnerThatHungIsNotAskedForEveryBlock(t *testing.T) {
	keys := wire.GenerateKeys()
	var asked atomic.Int64
	arrived := make(chan struct{})
	hang := func(c net.Conn, req wire.Request) {
		if req.Op == wire.OpRead && asked.Add(1) == 1 {
			close(arrived)
		}
		<-t.Context().Done()
	}
	now := time.Unix(1000, 0)
	p := &peers{
		dataset: dataset, keys: func() wire.Keys { return keys }, dial: (&net.Dialer{}).DialContext,
		now: func() time.Time { return now }, idle: map[string][]*peerConn{}, down: map[string]down{},
		ping: 100 * time.Millisecond, pong: time.Second,
	}
	defer p.close()
	m := ring.Member{ID: "hung", Addr: impostor(t, keys, hang), State: ring.Ready}
	read := func(ctx context.Context) error {
		return p.read(ctx, m, wire.Request{Op: wire.OpRead, Length: 10}, make([]byte, 10))
	}
	// A reader that gives up says nothing of the peer. It does so once it has asked, or its question would be
	// counted at any time later.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		select {
		case <-arrived:
			cancel()
		case <-t.Context().Done():
		}
	})
	if err := read(ctx); err == nil {
		t.Error("a read that was given up succeeded")
	}
	const first = 1
	if err := read(context.Background()); !errors.Is(err, errHung) {
		t.Fatal(err)
	}
	for range 100 {
		if err := read(context.Background()); !errors.Is(err, errHung) {
			t.Fatal(err)
		}
	}
	times := func(want int64) {
		t.Helper()
		eventually(t, fmt.Sprintf("it is asked %d times", want), func() error { // it may count late
			if n := asked.Load() - first; n != want {
				return fmt.Errorf("%d times", n)
			}
			return nil
		})
	}
	times(1)
	now = now.Add(downFor)
	if err := read(context.Background()); !errors.Is(err, errHung) {
		t.Errorf("after a while it is not asked again: %v", err)
	}
	times(2)
	p.keep(nil)
	if len(p.down) != 0 {
		t.Error("a member that left is remembered")
	}
}

// stopped is a connection of a process that is stopped while it reads, for longer than a peer may be silent: its
// deadline has passed when it goes on, although the answer is there.
type stopped struct {
	net.Conn
	reads int
}

func (c *stopped) Read(p []byte) (int, error) {
	switch c.reads++; c.reads {
	case 1:
		return 0, os.ErrDeadlineExceeded
	case 2:
		time.Sleep(100 * time.Millisecond)
		return 0, os.ErrDeadlineExceeded
	}
	return c.Conn.Read(p)
}

func (c *stopped) SetReadDeadline(time.Time) error { return nil } // the first reads are what is tested

func TestAWorkerThatWasStoppedDoesNotTakeItsPeerForHung(t *testing.T) {
	us, them := net.Pipe()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer us.Close()
	wg.Go(func() {
		defer them.Close()
		for {
			req, err := wire.ReadRequest(them)
			if err != nil {
				return
			}
			if req.Op == wire.OpPing { // in order, as over a network: the answer comes after the pong
				them.Write(wire.AppendFrame(nil, wire.Reply{ID: req.ID}, nil))
				them.Write(wire.AppendFrame(nil, wire.Reply{ID: 1}, nil))
			}
		}
	})
	conn := &stopped{Conn: us}
	c := &peerConn{Conn: conn, r: bufio.NewReader(conn), ping: 20 * time.Millisecond, pong: 60 * time.Millisecond}
	rep, _, _, err := c.exchange(t.Context(), wire.Request{Op: wire.OpMembers}, func(wire.Reply) []byte { return []byte{} })
	if err != nil || rep.ID != 1 || conn.reads < 3 {
		t.Fatalf("%+v, %v after %d reads", rep, err, conn.reads)
	}
}

// TestConnectionsToFormerMembersAreClosed: a worker's address changes with every restart of its pod.
func TestConnectionsToFormerMembersAreClosed(t *testing.T) {
	keys := wire.GenerateKeys()
	ended := make(chan struct{}, 2)
	list := func() ring.Member {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			if _, _, err := wire.ServerHandshake(c, dataset, keys); err != nil {
				return
			}
			for {
				req, err := wire.ReadRequest(c)
				if err != nil {
					ended <- struct{}{}
					return
				}
				c.Write(wire.AppendFrame(nil, wire.Reply{ID: req.ID}, nil))
			}
		}()
		return ring.Member{ID: "m", Addr: l.Addr().String(), State: ring.Ready}
	}
	p := &peers{
		dataset: dataset, keys: func() wire.Keys { return keys }, dial: (&net.Dialer{}).DialContext,
		now: time.Now, idle: map[string][]*peerConn{}, down: map[string]down{},
		ping: wire.PingInterval, pong: patience,
	}
	defer p.close()
	stays, goes := list(), list()
	for _, m := range []ring.Member{stays, goes} {
		if _, _, err := p.frame(context.Background(), m, wire.Request{Op: wire.OpPing}); err != nil {
			t.Fatal(err)
		}
	}
	p.keep([]ring.Member{stays})
	select {
	case <-ended:
	case <-time.After(patience):
		t.Fatal("the connection to a member that left is kept")
	}
	if len(p.idle) != 1 || len(p.idle[stays.Addr]) != 1 {
		t.Errorf("kept: %v", p.idle)
	}
}

// TestWorkersReachEachOtherDuringAKeyRotation: the kubelets bring a new key to the workers one after the
// other, and for a minute or so some have it and some do not.
func TestWorkersReachEachOtherDuringAKeyRotation(t *testing.T) {
	tr := newTier(t, manyFiles(30, 1000))
	dirs := make([]string, 2)
	for i := range dirs {
		dirs[i] = filepath.Join(tr.dir, fmt.Sprintf("keys%d", i))
		if err := wire.WriteKeys(dirs[i], tr.keys); err != nil {
			t.Fatal(err)
		}
	}
	tr.config = func(i int, c *Config) { c.Copies, c.KeysDir = 2, dirs[i] }
	tr.start(2)
	snap := tr.snapshot()
	behind := tr.lister()
	rotated := 1 - behind
	both := wire.GenerateKeys()
	both.Read = append(both.Read, tr.keys.Read...)
	both.Control = append(both.Control, tr.keys.Control...)
	if err := wire.WriteKeys(dirs[rotated], both); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new key is in force", func() error {
		if k := tr.workers[rotated].keys.Keys().Read[0]; k != both.Read[0] {
			return errors.New("it is the old one")
		}
		return nil
	})
	tr.workers[rotated].peers.close() // from now on each question takes a connection of its own, and a key
	for name := range 30 {
		path := fmt.Sprintf("/f%02d", name)
		if tr.owners(snap, path, 0)[0] != behind {
			continue
		}
		i := index(t, snap, path)
		if _, err := tr.dial(rotated).read(i, 0, 1000+name, 0); err != nil {
			t.Fatal(err)
		}
	}
	if gets, _ := tr.gates[rotated].counts(); gets != 0 {
		t.Errorf("the worker with the new key went to the bucket %d times for what the other holds", gets)
	}
	var done refreshed
	if code, err := tr.control(rotated, http.MethodPost, wire.PathRefresh, nil, &done); err != nil || done.Snapshot == "" {
		t.Errorf("a refresh passed on to the worker with the old key: %d %v", code, err)
	}
}
