package store

import (
	"context"
	"errors"
	"io"
	"math"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
)

func TestBlocksOfAwkwardSizesAreHeldWhole(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 64 * mib})
	for i, size := range []int64{1, 4095, 4096, 4097, checksum.Size, checksum.Size + 1, ring.BlockSize - 1, ring.BlockSize, ring.BlockSize + 1, 2*ring.BlockSize + 17} {
		o := anObject(i, size)
		load(t, s, o)
		r := s.Residency(o)
		if !r.Whole || r.Bytes != size || r.Blocks != ring.Blocks(size) {
			t.Errorf("size %d: residency %+v", size, r)
		}
		for n := range ring.Blocks(size) {
			b, ok := s.Lookup(o, n)
			if !ok || !b.Resident() || b.Bytes() != nil {
				t.Fatalf("size %d block %d: not found resident", size, n)
			}
			check(t, o, n, b)
			f, off := b.File()
			p := make([]byte, b.Len())
			if _, err := f.ReadAt(p, off); err != nil && err != io.EOF {
				t.Error(err)
			}
			if !slices.Equal(checksum.All(p), b.Sums()) {
				t.Error("sums do not match the file")
			}
			if k, err := b.ReadAt(make([]byte, 2), int64(b.Len())-1); k != 1 || err != io.EOF {
				t.Errorf("read over the end: %d, %v", k, err)
			}
			if k, err := b.ReadAt(make([]byte, 1), int64(b.Len())); k != 0 || err != io.EOF {
				t.Errorf("read at the end: %d, %v", k, err)
			}
			if _, err := b.ReadAt(p, -1); !errors.Is(err, ErrInvalid) {
				t.Errorf("read at a negative offset: %v", err)
			}
			b.Release()
			b.Release()
		}
	}
	if st := s.Stats(); st.Uncached != 0 || st.Evicted != 0 || st.Used > st.Quota {
		t.Errorf("%+v", st)
	}
}

func TestZeroByteObjectsAreWholeAndLeased(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 8 * mib})
	o := anObject(1, 0)
	if r := s.Residency(o); !r.Whole || r.Total != 0 {
		t.Errorf("%+v", r)
	}
	if m := s.Bitmap(o); len(m) != 0 {
		t.Errorf("bitmap %v", m)
	}
	if _, err := s.Acquire(context.Background(), o, 0, filler(o, 0)); !errors.Is(err, ErrInvalid) {
		t.Errorf("a block of an empty object: %v", err)
	}
	l, err := s.Lease(o)
	if err != nil {
		t.Fatal(err)
	}
	if p, err := io.ReadAll(l.File); err != nil || len(p) != 0 {
		t.Errorf("%q %v", p, err)
	}
	l.Release()
	l.Release()
}

func TestCallsThatCanNeverSucceedAreRefused(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 16 * mib})
	o := anObject(1, ring.BlockSize+1)
	load(t, s, o)
	for _, n := range []int64{-1, 2, math.MaxInt64, math.MinInt64} {
		if _, err := s.Acquire(context.Background(), o, n, filler(o, n)); !errors.Is(err, ErrInvalid) {
			t.Errorf("acquire block %d: %v", n, err)
		}
		if err := s.Pin(o, n, "load"); !errors.Is(err, ErrInvalid) {
			t.Errorf("pin block %d: %v", n, err)
		}
		if _, ok := s.Lookup(o, n); ok {
			t.Errorf("found block %d", n)
		}
	}
	other := ring.Object{ID: o.ID, Size: o.Size + 1}
	if _, err := s.Acquire(context.Background(), other, 0, filler(other, 0)); !errors.Is(err, ErrInvalid) {
		t.Errorf("another size under a known ID: %v", err)
	}
	if _, ok := s.Lookup(other, 0); ok {
		t.Error("found under another size")
	}
	if _, err := s.Lease(other); !errors.Is(err, ErrNotWhole) {
		t.Errorf("lease under another size: %v", err)
	}
	s.Drop(other)
	if !s.Residency(o).Whole {
		t.Error("dropped under another size")
	}
	negative := ring.Object{ID: o.ID, Size: -1}
	if _, err := s.Acquire(context.Background(), negative, 0, nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("negative size: %v", err)
	}
	for _, opts := range []Options{{Dir: memDir(t)}, {Dir: memDir(t), Quota: -1}, {Dir: memDir(t), Quota: 1 << 30, BufferBytes: 1}} {
		if _, err := Open(context.Background(), opts); !errors.Is(err, ErrInvalid) {
			t.Errorf("open %+v: %v", opts, err)
		}
	}
}

func TestBitmapAndResidencyTellWhatIsHeld(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 64 * mib})
	o := anObject(1, 9*ring.BlockSize-5)
	for _, n := range []int64{0, 3, 8} {
		acquire(t, s, o, n).Release()
	}
	if m := s.Bitmap(o); !slices.Equal(m, []byte{0b00001001, 0b1}) {
		t.Errorf("bitmap %b", m)
	}
	r := s.Residency(o)
	if r != (Residency{Blocks: 3, Total: 9, Bytes: 3*ring.BlockSize - 5}) {
		t.Errorf("%+v", r)
	}
	if _, err := s.Lease(o); !errors.Is(err, ErrNotWhole) {
		t.Errorf("lease of a part: %v", err)
	}
	if _, ok := s.Lookup(o, 1); ok {
		t.Error("found an absent block")
	}
}

func TestDropFreesAtOnceAndKeepsWhatIsInUse(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	o := anObject(1, ring.BlockSize+100)
	empty := s.Stats().Used
	load(t, s, o)
	full := s.Stats().Used
	held := acquire(t, s, o, 0)

	s.Drop(o)
	s.Drop(o)
	if st := s.Stats(); st.Used != full || st.Zombie != full-empty || st.Blocks != 0 || st.Objects != 0 || st.Bytes != 0 {
		t.Errorf("dropped in use: %+v", st)
	}
	if _, ok := s.Lookup(o, 0); ok {
		t.Error("found after the drop")
	}
	load(t, s, o) // a new file
	check(t, o, 0, held)
	if st := s.Stats(); st.Used != 2*full-empty || st.Zombie != full-empty {
		t.Errorf("filled again: %+v", st)
	}
	held.Release()
	if st := s.Stats(); st.Used != full || st.Zombie != 0 {
		t.Errorf("released: %+v", st)
	}
	load(t, s, o)
	s.Drop(o)
	if st := s.Stats(); st.Used != empty {
		t.Errorf("%+v", st)
	}
	if n := files(t, s.dir); n != 0 {
		t.Errorf("%d files left", n)
	}
}

// stopping is a fill that stops after its first piece until it is let, or until nobody waits for it.
func stopping(o ring.Object, n int64, began chan<- struct{}, let <-chan struct{}) FillPlace {
	return func(ctx context.Context, w io.WriterAt) ([]uint64, error) {
		p := make([]byte, blockLen(o.Size, n))
		content(o, n, p)
		if _, err := w.WriteAt(p[:1], 0); err != nil {
			return nil, err
		}
		close(began)
		select {
		case <-let:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		_, err := w.WriteAt(p[1:], 1)
		return checksum.All(p), err
	}
}

// A fill takes as long as the bucket. Whoever drops its object does not wait for it, nor does whoever only asks what is
// held.
func TestADropDoesNotWaitForAFill(t *testing.T) {
	for name, place := range placers {
		t.Run(name, func(t *testing.T) {
			s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
			o := anObject(1, 2*ring.BlockSize)
			acquire(t, s, o, 0).Release()
			began, let, got := make(chan struct{}), make(chan struct{}), make(chan *Block, 1)
			go func() {
				b, err := place(s, context.Background(), o, 1, stopping(o, 1, began, let))
				if err != nil {
					t.Error(err)
				}
				got <- b
			}()
			<-began
			s.Drop(o)
			s.Drop(o)
			if _, ok := s.Lookup(o, 0); ok {
				t.Error("found after the drop")
			}
			for _, lease := range []func(ring.Object) (*Lease, error){s.Lease, s.LeaseEarly} {
				if _, err := lease(o); !errors.Is(err, ErrNotWhole) {
					t.Errorf("a lease: %v", err)
				}
			}
			if err := s.Pin(o, 0, "pin"); err != nil {
				t.Error(err)
			}
			close(let)
			b := <-got
			if b == nil {
				return
			}
			check(t, o, 1, b)
			load(t, s, o) // a new file
			b.Release()
			if !s.Residency(o).Whole || s.Stats().Pinned == 0 {
				t.Errorf("filled again: %+v, %+v", s.Residency(o), s.Stats())
			}
			if n := files(t, s.dir); n != 1 {
				t.Errorf("%d files", n)
			}
			checkBooks(t, s)
		})
	}
}

func TestAStoreClosesWhileADropWaitsForAFill(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	o := anObject(1, ring.BlockSize)
	began, ended := make(chan struct{}), make(chan error)
	go func() {
		_, err := s.AcquirePlaced(context.Background(), o, 0, stopping(o, 0, began, nil))
		ended <- err
	}()
	<-began
	s.Drop(o)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	if n := files(t, s.dir); n != 0 {
		t.Errorf("%d files left", n)
	}
}

// An object that turned out bad is dropped and fetched again: a load that pinned it does not have to notice.
func TestPinsOutliveADrop(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	o := anObject(1, 2*ring.BlockSize)
	for _, owner := range []string{"one", "two"} {
		for n := range int64(2) {
			if err := s.Pin(o, n, owner); err != nil {
				t.Fatal(err)
			}
		}
	}
	load(t, s, o)
	pinned := s.Stats().Pinned
	held := acquire(t, s, o, 1)
	s.Drop(o)
	if st := s.Stats(); st.Pinned != pinned || st.Blocks != 0 {
		t.Errorf("pinned %d, were %d; %d blocks", st.Pinned, pinned, st.Blocks)
	}
	load(t, s, o)
	for i := range 20 {
		load(t, s, anObject(100+i, 3*mib))
		load(t, s, anObject(100+i, 3*mib))
	}
	if !s.Residency(o).Whole {
		t.Error("a pinned block was evicted after a drop")
	}
	if s.Stats().Evicted == 0 {
		t.Fatal("nothing was evicted: the test tests nothing")
	}
	check(t, o, 1, held)
	held.Release()
	checkBooks(t, s)
	s.Unpin("one")
	if p := s.Stats().Pinned; p != pinned {
		t.Errorf("%d bytes pinned by the second owner, were %d", p, pinned)
	}
	s.Drop(o)
	s.Unpin("two")
	checkBooks(t, s)
	if st := s.Stats(); st.Pinned != 0 || len(s.owners) != 0 {
		t.Errorf("%d bytes are pinned by nobody", st.Pinned)
	}
	s.mu.Lock()
	if s.objects[o.ID] != nil {
		t.Error("an object of which nothing is held or pinned is remembered")
	}
	s.mu.Unlock()
}

// While many pins are ended others have their turn, and what the owner pins meanwhile is pinned after it.
func TestUnpinOfManyBlocksHoldsUpNobody(t *testing.T) {
	const many = 20 * unpinAtOnce
	s := open(t, Options{Dir: memDir(t), Quota: 64 * mib})
	for i := range many {
		acquire(t, s, anObject(i, 500), 0).Release()
	}
	one := s.weight(500)
	for deadline := time.Now().Add(time.Minute); ; {
		for i := range many {
			if err := s.Pin(anObject(i, 500), 0, "load"); err != nil {
				t.Fatal(err)
			}
		}
		begun, ended := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(ended)
			close(begun)
			s.Unpin("load")
		}()
		<-begun
		left := s.Stats().Pinned
		for left == many*one {
			left = s.Stats().Pinned
		}
		if left > 0 {
			for i := range many { // those that still are, too
				if err := s.Pin(anObject(i, 500), 0, "load"); err != nil {
					t.Error(err)
				}
			}
			<-ended
			if p := s.Stats().Pinned; p != many*one {
				t.Errorf("%d bytes are pinned, want %d", p, many*one)
			}
			break
		}
		<-ended
		if time.Now().After(deadline) {
			t.Fatal("nobody saw a part of the pins ended")
		}
	}
	s.Unpin("load")
	checkBooks(t, s)
	if p := s.Stats().Pinned; p != 0 || len(s.owners) != 0 || len(s.unpinning) != 0 {
		t.Errorf("%d bytes are pinned by nobody", p)
	}
}

// What a load brought in under pins is not weighed against what was read often as soon as they end.
func TestUnpinnedBlocksStayUntilTheirRoomIsNeeded(t *testing.T) {
	const size = 4096
	s := open(t, Options{Dir: memDir(t), Quota: 4 * mib})
	room := int((s.quota - baseCost) / s.weight(size))
	for range 20 {
		for i := range room {
			acquire(t, s, anObject(i, size), 0).Release()
		}
	}
	fresh := room / 4
	for i := range fresh {
		if err := s.Pin(anObject(-1-i, size), 0, "load"); err != nil {
			t.Fatal(err)
		}
		acquire(t, s, anObject(-1-i, size), 0).Release()
	}
	s.Unpin("load")
	acquire(t, s, anObject(room+1, size), 0).Release() // whatever the policy let go is evicted now
	left := 0
	for i := range fresh {
		if b, ok := s.Lookup(anObject(-1-i, size), 0); ok {
			left++
			b.Release()
		}
	}
	if left < fresh-2 {
		t.Errorf("%d of %d blocks are left once they are not pinned any more", left, fresh)
	}
	checkBooks(t, s)
}

func TestPinnedBlocksStayAndPinsFitTheQuota(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	o := anObject(1, 4*ring.BlockSize)
	acquire(t, s, o, 0).Release() // one pin after residency, the others before
	for n := range int64(4) {
		for range 2 {
			if err := s.Pin(o, n, "load"); err != nil {
				t.Fatal(err)
			}
		}
	}
	load(t, s, o)
	for i := range 20 {
		load(t, s, anObject(100+i, 3*mib))
		load(t, s, anObject(100+i, 3*mib))
	}
	if !s.Residency(o).Whole {
		t.Fatalf("a pinned block was evicted: %+v", s.Stats())
	}
	if s.Stats().Evicted == 0 {
		t.Fatal("nothing was evicted: the test tests nothing")
	}
	big := anObject(2, 8*ring.BlockSize)
	var err error
	for n := int64(0); n < 8 && err == nil; n++ {
		err = s.Pin(big, n, "second")
	}
	if !errors.Is(err, ErrFull) {
		t.Fatalf("pins above the quota: %v", err)
	}
	if st := s.Stats(); st.Pinned > st.Quota {
		t.Errorf("%+v", st)
	}
	// A second owner keeps what the first lets go.
	if err := s.Pin(o, 0, "second"); err != nil {
		t.Fatal(err)
	}
	s.Unpin("load")
	s.Unpin("load")
	s.Unpin("never heard of")
	for i := range 20 {
		for range 4 {
			load(t, s, anObject(200+i, 3*mib))
		}
	}
	if b := s.Bitmap(o); b[0]&1 == 0 {
		t.Error("evicted although a second owner pinned it")
	}
	if s.Residency(o).Whole {
		t.Error("nothing of the unpinned object was evicted")
	}
	s.Unpin("second")
	if st := s.Stats(); st.Pinned != 0 {
		t.Errorf("%+v", st)
	}
	checkBooks(t, s)
}

func TestAPinnedBlockIsAdmittedWhateverThePolicyThinks(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	for i := range 20 {
		for range 8 {
			acquire(t, s, anObject(i, 4*mib), 0).Release() // a cache full of often used blocks
		}
	}
	o := anObject(100, 6*ring.BlockSize)
	for n := range int64(6) {
		if err := s.Pin(o, n, "load"); err != nil {
			t.Fatal(err)
		}
		b := acquire(t, s, o, n)
		if !b.Resident() {
			t.Errorf("block %d is not resident", n)
		}
		b.Release()
	}
	checkBooks(t, s)
}

func TestFilesThatVanishedAreFetchedAgain(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 16 * mib})
	o := anObject(1, 100<<10)
	load(t, s, o)
	if err := os.Remove(s.path(o.ID)); err != nil {
		t.Fatal(err)
	}
	load(t, s, o)
	if !s.Residency(o).Whole {
		t.Error("not resident again")
	}
	checkBooks(t, s)
}

func TestNoDescriptorIsHeldForAResidentObject(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 64 * mib})
	before := descriptors(t)
	for i := range 2000 {
		acquire(t, s, anObject(i, 5000), 0).Release()
	}
	if after := descriptors(t); after > before+50 {
		t.Errorf("%d descriptors before, %d after 2000 objects", before, after)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip("needs /proc")
	}
	return len(d)
}

func TestAClosedStoreSaysSo(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 16 * mib})
	o := anObject(1, 100)
	load(t, s, o)
	b := acquire(t, s, o, 0)
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Acquire(context.Background(), o, 0, filler(o, 0)); !errors.Is(err, ErrClosed) {
		t.Errorf("acquire: %v", err)
	}
	if _, err := s.Lease(o); !errors.Is(err, ErrClosed) {
		t.Errorf("lease: %v", err)
	}
	if err := s.Pin(o, 0, "load"); !errors.Is(err, ErrClosed) {
		t.Errorf("pin: %v", err)
	}
	if _, ok := s.Lookup(o, 0); ok {
		t.Error("found")
	}
	check(t, o, 0, b) // what is in use stays readable
	b.Release()
}
