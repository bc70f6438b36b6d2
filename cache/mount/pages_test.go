package mount

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// streamedFixture mounts a large file whose first reader streamed it; from then on it can be leased.
func streamedFixture(t *testing.T, o Options) (want []byte, r *leasing, m *Server) {
	t.Helper()
	all := files{"large": content("large", pagesMin+1)}
	s := snapshotOf(t, all)
	r = newLeasing(t, s, all)
	o.Mode, o.closeWait = Passthrough, time.Minute
	m = mounted(t, s, r, o)
	needPassthrough(t, m)
	r.unleased()
	if err := sameBytes(filepath.Join(m.Dir(), "large"), all["large"]); err != nil {
		t.Fatal(err)
	}
	checkQuiet(t, m)
	r.lease.Store(nil)
	return all["large"], r, m
}

// unleased has no more leases.
func (r *leasing) unleased() {
	no := func(context.Context, string, time.Duration) error { return errNoLease }
	r.lease.Store(&no)
}

func TestWhoReadsAStreamedFileAgainHasItsPagesAndTheNextOneHasItPassedThrough(t *testing.T) {
	want, _, m := streamedFixture(t, Options{IdleTime: time.Hour})
	path := filepath.Join(m.Dir(), "large")
	before := m.Stats()
	if err := sameBytes(path, want); err != nil {
		t.Fatal(err)
	}
	if st := m.Stats(); st.PassthroughOpens != 0 || st.Reads != before.Reads {
		t.Errorf("the second: %d passed through, %d reads", st.PassthroughOpens, st.Reads-before.Reads)
	}
	for k := range 3 {
		checkQuiet(t, m)
		if err := sameBytes(path, want); err != nil {
			t.Fatal(err)
		}
		if st := m.Stats(); st.PassthroughOpens != int64(k+1) || st.Reads != before.Reads {
			t.Errorf("after it: %d passed through, %d reads", st.PassthroughOpens, st.Reads-before.Reads)
		}
	}
}

func TestAFileOfWhichLittleWasReadIsPassedThroughAtOnce(t *testing.T) {
	all := files{"large": content("large", pagesMin)}
	s := snapshotOf(t, all)
	r := newLeasing(t, s, all)
	m := mounted(t, s, r, Options{Mode: Passthrough, IdleTime: time.Hour, closeWait: time.Minute})
	needPassthrough(t, m)
	r.unleased()
	path := filepath.Join(m.Dir(), "large")
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(make([]byte, 100), 1<<20); err != nil {
		t.Error(err)
	}
	f.Close()
	checkQuiet(t, m)
	r.lease.Store(nil)
	if err := sameBytes(path, all["large"]); err != nil {
		t.Fatal(err)
	}
	if n := m.Stats().PassthroughOpens; n != 1 {
		t.Errorf("%d passed through", n)
	}
}

// Where nobody comes soon, the kernel may have dropped the pages.
func TestPagesAreNotCountedOnForLong(t *testing.T) {
	want, _, m := streamedFixture(t, Options{IdleTime: 20 * time.Millisecond})
	eventually(t, "the file is forgotten", func() bool {
		p := &m.fs.pass.pages
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.files) == 0
	})
	if err := sameBytes(filepath.Join(m.Dir(), "large"), want); err != nil {
		t.Fatal(err)
	}
	if n := m.Stats().PassthroughOpens; n != 1 {
		t.Errorf("%d passed through", n)
	}
}

// While it is open it is not forgotten, however long that takes.
func TestAFileThatIsOpenIsNotForgotten(t *testing.T) {
	want, _, m := streamedFixture(t, Options{IdleTime: time.Hour})
	path := filepath.Join(m.Dir(), "large")
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	m.fs.pass.pages.sweep(time.Now().Add(time.Minute))
	if err := sameAt(f, want); err != nil {
		t.Error(err)
	}
	f.Close()
	checkQuiet(t, m)
	if err := sameBytes(path, want); err != nil {
		t.Fatal(err)
	}
	if n := m.Stats().PassthroughOpens; n != 1 {
		t.Errorf("%d passed through", n)
	}
}
