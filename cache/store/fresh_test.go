package store

import (
	"testing"

	"github.com/stepcache/stepcache/cache/ring"
)

// hotStore is a store that is full of objects of 64 KiB which were all read as often as the policy can count.
func hotStore(t *testing.T, held int) (s *Store, hotObjects []ring.Object) {
	t.Helper()
	const size = 64 << 10
	s = open(t, Options{Dir: memDir(t), Quota: max(minQuota, baseCost+int64(held)*(size+inodeCost+3*recordLen(size)+entryCost))})
	for range 20 {
		for i := range int((s.quota - baseCost) / s.weight(size)) {
			acquire(t, s, anObject(i, size), 0).Release()
		}
	}
	for i := range held + 1 {
		if o := anObject(i, size); s.Residency(o).Whole {
			hotObjects = append(hotObjects, o)
		}
	}
	return s, hotObjects
}

// put writes an object as a put does, and has it kept if keep says so.
func put(t *testing.T, s *Store, i int, size int64, keep bool) ring.Object {
	t.Helper()
	from, _ := stageT(t, s, size, "put")
	to := anObject(i, size)
	if !s.Rename(from, to) {
		t.Fatal("not renamed")
	}
	if keep {
		s.Keep(to)
	}
	s.Unpin("put")
	return to
}

func held(s *Store, objects []ring.Object) (n int) {
	for _, o := range objects {
		if s.Residency(o).Whole {
			n++
		}
	}
	return n
}

// Objects that are written into a store that is full of what is read all the time stay until they are read, of whatever
// size they are; without Keep they do not.
func TestWhatIsWrittenIntoAFullStoreStaysUntilItIsRead(t *testing.T) {
	for _, size := range []int64{1000, 64 << 10, ring.BlockSize, ring.BlockSize + 1} {
		for _, keep := range []bool{true, false} {
			s, hotObjects := hotStore(t, 3200) // 200 MiB
			var written []ring.Object
			for i := range 10 {
				written = append(written, put(t, s, 10_000+i, size, keep))
				for j := range 50 { // what is read all the time, and once
					acquire(t, s, hotObjects[(50*i+j)%len(hotObjects)], 0).Release()
					acquire(t, s, anObject(20_000+50*i+j, 64<<10), 0).Release()
				}
			}
			n := held(s, written)
			if keep && n != len(written) {
				t.Errorf("of %d objects of %d bytes that were written, %d are held", len(written), size, n)
			}
			if !keep && size == 64<<10 && n == len(written) {
				t.Error("they are held without being kept too: this test shows nothing")
			}
			checkBooks(t, s)
		}
	}
}

// However much is written, the greater part of what is read all the time is not driven out.
func TestWhatIsWrittenLeavesRoomForWhatIsRead(t *testing.T) {
	s, hotObjects := hotStore(t, 400)
	for i := range 2000 {
		put(t, s, 10_000+i, 64<<10, true)
		if s.freshBytes > (s.limit-s.pinned)/freshShare {
			t.Fatalf("%d bytes are kept beside the policy, of %d", s.freshBytes, s.limit)
		}
	}
	if n := held(s, hotObjects); n < len(hotObjects)*4/10 {
		t.Errorf("of %d objects that are read all the time, %d are held", len(hotObjects), n)
	}
	checkBooks(t, s)
}

// What was written is judged by the policy once as much as the quota was wanted, with what it was read meanwhile; what
// nobody wants any more leaves for what is wanted.
func TestWhatWasWrittenIsJudgedByWhatItWasReadMeanwhile(t *testing.T) {
	s, _ := hotStore(t, 400)
	read, unread := put(t, s, 10_000, 64<<10, true), put(t, s, 10_001, 64<<10, true)
	for range 20 {
		acquire(t, s, read, 0).Release()
	}
	if uses := s.objects[read.ID].blocks[0].uses; uses != hot {
		t.Errorf("it was read 20 times, of which %d are known", uses)
	}
	for i := 0; s.fresh.Len() > 0; i++ {
		if i > 1000 {
			t.Fatalf("still kept after %d bytes were wanted, of a quota of %d", s.missed, s.quota)
		}
		acquire(t, s, anObject(20_000+i, 64<<10), 0).Release()
	}
	if o := s.objects[read.ID]; o != nil && o.blocks[0].uses != 0 {
		t.Error("the policy was not told how often it was read")
	}
	for i := 0; s.Residency(unread).Whole; i++ { // others are read all the time
		if i > 20_000 {
			t.Fatal("what was written and never read is still held")
		}
		acquire(t, s, anObject(30_000+i%300, 64<<10), 0).Release()
	}
	checkBooks(t, s)
}

// Pins come first: what was written yields to them, down to nothing.
func TestWhatWasWrittenYieldsToPins(t *testing.T) {
	s, _ := hotStore(t, 400)
	for i := range 100 {
		put(t, s, 10_000+i, 64<<10, true)
	}
	var pinned []ring.Object
	for i := 0; ; i++ {
		o := anObject(40_000+i, 64<<10)
		if s.Pin(o, 0, "load") != nil {
			break
		}
		pinned = append(pinned, o)
		b := acquire(t, s, o, 0)
		if !b.Resident() {
			t.Fatalf("object %d is pinned and was not kept", i)
		}
		b.Release()
	}
	if n := held(s, pinned); n != len(pinned) || n < 350 {
		t.Errorf("of %d pinned objects %d are held", len(pinned), n)
	}
	checkBooks(t, s)
	s.Unpin("load")
	checkBooks(t, s)
}

// An object that is dropped while it is kept leaves nothing, and its room is free.
func TestDropOfWhatWasJustWrittenFreesItsRoom(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 64 * mib})
	before := s.Stats().Used
	o := put(t, s, 1, 9*mib, true)
	s.Keep(o) // once more
	s.Keep(anObject(2, 5))
	s.Keep(ring.Object{ID: o.ID, Size: 5})
	checkBooks(t, s)
	s.Drop(o)
	if st := s.Stats(); st.Used != before || st.Bytes != 0 || s.fresh.Len() != 0 || s.freshBytes != 0 {
		t.Errorf("%d bytes used, %d before; %d kept", st.Used, before, s.freshBytes)
	}
	checkBooks(t, s)
	put(t, s, 1, 9*mib, true)
	checkBooks(t, s)
}
