package mount

import (
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestALostLeaseIsReleasedOnceNobodyHasTheFileOpen(t *testing.T) {
	all, r, m := passthroughFixture(t, Options{})
	lost := make(chan struct{})
	r.lost.Store(&lost)
	path := filepath.Join(m.Dir(), "big")
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if m.Stats().Leased == 0 {
		t.Fatal("the file is not passed through")
	}
	close(lost)
	m.fs.pass.sweep(time.Now(), 64)
	if n := r.given.Load(); n != 0 {
		t.Fatalf("%d leases of an open file were released", n)
	}
	unix.Close(fd) // the kernel tells of it later
	eventually(t, "the lease is released", func() bool {
		m.fs.pass.sweep(time.Now(), 64)
		return r.given.Load() == r.taken.Load()&(1<<32-1) && m.Stats().Leased == 0
	})
	kept := make(chan struct{})
	r.lost.Store(&kept)
	if err := sameBytes(path, all["big"]); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the last close", func() bool { return m.fs.pass.idleNow() == 1 })
	m.fs.pass.sweep(time.Now(), 64)
	if m.Stats().Leased != 1 {
		t.Fatal("an idle lease that is not lost was released")
	}
}

func (p *passthrough) idleNow() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.idle()
}
