package mount

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
)

func TestTableIsSharedByCopies(t *testing.T) {
	const n = 1_000_000
	a, err := newTable(n)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	f, err := dup(a.file)
	if err != nil {
		t.Fatal(err)
	}
	b, err := openTable(f, n)
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	ctx := context.Background()
	if err := a.lock(ctx); err != nil {
		t.Fatal(err)
	}
	for _, i := range []catalog.Index{0, 7, n - 1} {
		*a.at(i) = slot{backing: int32(i) + 1, opens: 3}
	}
	// The other waits, and gives up.
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if err := b.lock(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("locked twice: %v", err)
	}
	if err := a.lock(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("locked twice by one process: %v", err)
	}
	a.unlock()
	if err := b.lock(ctx); err != nil {
		t.Fatal(err)
	}
	got := map[catalog.Index]slot{}
	b.each(func(i catalog.Index, s *slot) { got[i] = *s })
	if len(got) != 3 || got[n-1] != (slot{n, 3}) || got[0] != (slot{1, 3}) {
		t.Errorf("%v", got)
	}
	b.unlock()
	var st unix.Stat_t
	if err := unix.Fstat(int(a.file.Fd()), &st); err != nil || st.Blocks*512 > 64<<10 {
		t.Errorf("a table with three entries holds %d bytes", st.Blocks*512)
	}
	if !a.succeed() || b.succeed() || !a.succeed() {
		t.Error("two servers are in charge")
	}
	a.close() // as when its process ends
	if err := a.lock(ctx); !errors.Is(err, os.ErrClosed) {
		t.Errorf("locked after its end: %v", err)
	}
	eventually(t, "the other is in charge", b.succeed)
}

func TestTableCountsARequestOnce(t *testing.T) {
	a, err := newTable(3)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	for _, c := range []struct {
		unique uint64
		want   bool
	}{{10, true}, {10 | unanswered, false}, {12 | unanswered, true}, {12, false}, {14, true}} {
		if got := a.once(c.unique); got != c.want {
			t.Errorf("request %x: %v", c.unique, got)
		}
	}
	for k := range uint64(ringSlots) {
		a.once(1000 + 2*k)
	}
	if a.once(1000+2*(ringSlots-1)|unanswered) || a.once(1000|unanswered) {
		t.Error("one of the last requests is counted twice")
	}
}

func TestTableRefusesForeignFiles(t *testing.T) {
	a, err := newTable(10)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	f, err := dup(a.file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openTable(f, 11); err == nil {
		t.Error("a table of another size is taken")
	}
	a.head().magic = 1
	if f, err = dup(a.file); err != nil {
		t.Fatal(err)
	}
	if _, err := openTable(f, 10); err == nil {
		t.Error("a table of another version is taken")
	}
	if err := a.file.Truncate(0); err == nil {
		t.Error("a table can be cut under its users")
	}
	plain, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openTable(plain, 10); err == nil {
		t.Error("an ordinary file is taken")
	}
}
