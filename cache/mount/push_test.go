package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
)

// holder is a Reader of a tier that holds files, but for some.
type holder struct {
	*memory
	absent string // files whose path has this are not held
	held   atomic.Int64
	before func(ctx context.Context, path string) error
}

func (h *holder) ReadHeld(ctx context.Context, i catalog.Index, p []byte) error {
	name := h.snap.Path(i)[1:]
	if h.before != nil {
		if err := h.before(ctx, name); err != nil {
			return err
		}
	}
	if h.absent != "" && bytes.Contains([]byte(name), []byte(h.absent)) {
		return errors.New("not held")
	}
	if len(p) != len(h.all[name]) {
		return errors.New("not the whole file")
	}
	copy(p, h.all[name])
	h.held.Add(1)
	return nil
}

// plenty is memory that the machine of a test need not have.
func plenty() int64 { return 1 << 40 }

// smallFiles are n files of a folder, of all sizes around a page and one that is too large to be pushed.
func smallFiles(n int) files {
	all := files{"d/large": content("large", pushFile+1), "d/empty": nil, "d/edge": content("edge", pushFile), "e/other": content("other", 10)}
	for k := range n {
		name := fmt.Sprintf("d/f%04d", k)
		all[name] = content(name, []int{1, 4095, 4096, 4097, 100_000}[k%5])
	}
	return all
}

// begin lists a folder and reads two of its files, which has others pushed.
func begin(t testing.TB, m *Server, dir string, names ...string) {
	t.Helper()
	if _, err := os.ReadDir(filepath.Join(m.Dir(), dir)); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if _, err := os.ReadFile(filepath.Join(m.Dir(), dir, name)); err != nil {
			t.Fatal(err)
		}
	}
}

// same reads every file and compares it.
func same(t testing.TB, m *Server, all files) {
	t.Helper()
	for name, want := range all {
		got, err := os.ReadFile(filepath.Join(m.Dir(), name))
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%s: %d bytes of %d, %v", name, len(got), len(want), err)
		}
	}
}

func TestTheRestOfAFolderIsPushed(t *testing.T) {
	const n = 60
	all := smallFiles(n)
	s := snapshotOf(t, all)
	r := &holder{memory: newMemory(s, all)}
	m := mounted(t, s, r, Options{Mode: NoOpen, memoryLeft: plenty, pushPatience: patience})
	begin(t, m, "d", "f0000", "f0001")
	eventually(t, "the others are pushed", func() bool { return m.Stats().Pushed == n-2+1 })
	before := m.Stats()
	pushed := files{}
	for name, want := range all {
		if name != "d/large" && name != "e/other" {
			pushed[name] = want
		}
	}
	same(t, m, pushed)
	if st := m.Stats(); st.Reads != before.Reads || st.Lookups != before.Lookups {
		t.Errorf("%d reads and %d lookups came for files that were pushed", st.Reads-before.Reads, st.Lookups-before.Lookups)
	}
	same(t, m, all)
}

func TestNothingIsPushedWithoutEvidence(t *testing.T) {
	all := smallFiles(20)
	s := snapshotOf(t, all)
	for name, c := range map[string]struct {
		o    Options
		what func(m *Server)
	}{
		"a listing":                   {Options{Mode: NoOpen, memoryLeft: plenty}, func(m *Server) { begin(t, m, "d") }},
		"a listing and one file":      {Options{Mode: NoOpen, memoryLeft: plenty}, func(m *Server) { begin(t, m, "d", "f0003") }},
		"files without a listing":     {Options{Mode: NoOpen, memoryLeft: plenty}, func(m *Server) { same(t, m, all) }},
		"files of another folder":     {Options{Mode: NoOpen, memoryLeft: plenty}, func(m *Server) { begin(t, m, "d"); begin(t, m, "e", "other") }},
		"a mount that is asked":       {Options{Mode: Passthrough, memoryLeft: plenty}, func(m *Server) { begin(t, m, "d", "f0001", "f0002", "f0003") }},
		"a mount that is told not to": {Options{Mode: NoOpen, memoryLeft: plenty, PushBytes: -1}, func(m *Server) { begin(t, m, "d", "f0001", "f0002", "f0003") }},
	} {
		t.Run(name, func(t *testing.T) {
			r := &holder{memory: newMemory(s, all)}
			m := mounted(t, s, r, c.o)
			c.what(m)
			eventually(t, "no push is under way", m.fs.push.idle)
			if r.held.Load() > 0 || m.Stats().Pushed > 0 {
				t.Errorf("%d files were pushed", m.Stats().Pushed)
			}
			same(t, m, all)
		})
	}
}

// A push takes no more than its budget, whatever is left of the memory of the machine, and none when none is.
func TestPushesKeepToTheirBudget(t *testing.T) {
	all := files{}
	for k := range 64 {
		all[fmt.Sprintf("d/f%02d", k)] = content("x", 100_000)
	}
	s := snapshotOf(t, all)
	r := &holder{memory: newMemory(s, all)}
	m := mounted(t, s, r, Options{Mode: NoOpen, memoryLeft: plenty, PushBytes: 10 * pushWeight(100_000), pushPatience: patience})
	begin(t, m, "d", "f00", "f01")
	eventually(t, "the budget is spent", func() bool { return m.Stats().Pushed == 10 })
	if left := m.fs.push.budget.Load(); left != 0 {
		t.Errorf("%d bytes are left of it", left)
	}
	same(t, m, all) // asks for others, again and again
	eventually(t, "the pushes have ended", m.fs.push.idle)
	if st := m.Stats(); st.Pushed != 10 {
		t.Errorf("%d files were pushed", st.Pushed)
	}

	r = &holder{memory: newMemory(s, all)}
	f := newFileSystem(t.Context(), s, r, nil, Options{memoryLeft: func() int64 { return -1 }}.withDefaults())
	d, _ := s.Lookup("/d")
	n, _ := s.Node(d)
	f.push.list(d, &n)
	if files := f.push.take(push{d, 0, pushMax}); len(files) > 0 {
		t.Errorf("%d files would be pushed without memory", len(files))
	}
}

// idle says whether no push is under way or waits.
func (p *pusher) idle() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, d := range p.folders {
		if d.under {
			return false
		}
	}
	return true
}

func TestWhatTheTierDoesNotHoldIsNotPushed(t *testing.T) {
	all := files{}
	for k := range 3 * pushMisses {
		all[fmt.Sprintf("d/f%03d", k)] = content("x", 5000)
	}
	s := snapshotOf(t, all)
	r := &holder{memory: newMemory(s, all), absent: "f"}
	m := mounted(t, s, r, Options{Mode: NoOpen, memoryLeft: plenty})
	begin(t, m, "d", "f000", "f001")
	eventually(t, "the push has ended", m.fs.push.idle)
	if st := m.Stats(); st.Pushed != 0 {
		t.Errorf("%d files were pushed", st.Pushed)
	}
	same(t, m, all)
}

// Readers of the very files that are being pushed get the right bytes, and both come to an end.
func TestReadersRaceWithPushes(t *testing.T) {
	all := files{}
	for k := range 400 {
		name := fmt.Sprintf("d/f%03d", k)
		all[name] = content(name, 1+k*97%20_000)
	}
	s := snapshotOf(t, all)
	r := &holder{memory: newMemory(s, all)}
	m := mounted(t, s, r, Options{Mode: NoOpen, memoryLeft: plenty})
	begin(t, m, "d", "f000", "f001")
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for name, want := range all { // in no order
				got, err := os.ReadFile(filepath.Join(m.Dir(), name))
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes of %d, %v", name, len(got), len(want), err)
					return
				}
			}
		})
	}
	wg.Wait()
	eventually(t, "the pushes have ended", m.fs.push.idle)
	same(t, m, all)
}

// A push that waits for the tier ends with the mount, and does not keep it.
func TestAPushEndsWithTheMount(t *testing.T) {
	for _, how := range []string{"unmount", "abort"} {
		t.Run(how, func(t *testing.T) {
			all := smallFiles(40)
			s := snapshotOf(t, all)
			var once sync.Once
			begun := make(chan struct{})
			r := &holder{memory: newMemory(s, all), before: func(ctx context.Context, _ string) error {
				once.Do(func() { close(begun) })
				<-ctx.Done()
				return ctx.Err()
			}}
			m := mounted(t, s, r, Options{Mode: NoOpen, memoryLeft: plenty})
			begin(t, m, "d", "f0000", "f0001")
			<-begun
			if how == "abort" {
				if err := m.Abort(); err != nil {
					t.Skip(err)
				}
				m.Wait()
			}
			if err := m.Unmount(); err != nil {
				t.Fatal(err)
			}
			m.Wait()
		})
	}
}

// A kernel that refuses, or a mount that cannot be entered, is not tried again.
func TestAKernelThatRefusesIsLeftAlone(t *testing.T) {
	all := smallFiles(100)
	s := snapshotOf(t, all)
	for name, enter := range map[string]func() (*entrance, error){
		"no entrance":    (&Server{}).enter,
		"gone":           (&Server{dir: t.TempDir(), dev: device{0, 1}}).enter,
		"no way to open": func() (*entrance, error) { return &entrance{-1, leastReadAhead}, nil },
	} {
		t.Run(name, func(t *testing.T) {
			r := &holder{memory: newMemory(s, all)}
			f := newFileSystem(t.Context(), s, r, nil, Options{memoryLeft: plenty}.withDefaults())
			f.push.enter = enter
			d, _ := s.Lookup("/d")
			n, _ := s.Node(d)
			f.push.list(d, &n)
			f.push.push(t.Context(), push{d, 0, pushMax})
			if most := int64(2 * pushers); name != "no way to open" && r.held.Load() != 0 || r.held.Load() > most {
				t.Errorf("%d files were fetched", r.held.Load())
			}
			if !f.push.off.Load() || f.count.pushed.Load() != 0 || len(f.push.offers.files) > 0 || f.push.budget.Load() != f.opt.PushBytes {
				t.Errorf("off %v, %d pushed, budget %d", f.push.off.Load(), f.count.pushed.Load(), f.push.budget.Load())
			}
		})
	}
}

// Copying a mount needs a right, which a mount by fusermount3 is without.
func TestWithoutTheRightToCopyTheMountNothingIsPushed(t *testing.T) {
	all := smallFiles(10)
	s := snapshotOf(t, all)
	m := mounted(t, s, &holder{memory: newMemory(s, all)}, Options{Mode: NoOpen, memoryLeft: plenty})
	refused := make(chan error)
	go func() {
		runtime.LockOSThread() // and never let go: the thread ends with its rights
		head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		err := unix.Capget(&head, &data[0])
		data[0].Effective &^= 1 << unix.CAP_SYS_ADMIN
		if err = errors.Join(err, unix.Capset(&head, &data[0])); err == nil {
			_, err = m.enter()
		}
		refused <- err
	}()
	if err := <-refused; !errors.Is(err, errRefused) || !errors.Is(err, unix.EPERM) {
		t.Errorf("without the right: %v", err)
	}
}

// A moment without descriptors does not end it for good.
func TestAnEntranceThatCannotBeNowIsTriedAgain(t *testing.T) {
	all := smallFiles(20)
	s := snapshotOf(t, all)
	f := newFileSystem(t.Context(), s, &holder{memory: newMemory(s, all)}, nil, Options{memoryLeft: plenty}.withDefaults())
	f.push.enter = func() (*entrance, error) { return nil, unix.EMFILE }
	d, _ := s.Lookup("/d")
	n, _ := s.Node(d)
	f.push.list(d, &n)
	w := push{d, 0, pushMax}
	f.push.push(t.Context(), w)
	if files := f.push.take(w); f.push.off.Load() || len(files) != 20+1 {
		t.Errorf("off %v, and %d files would be pushed", f.push.off.Load(), len(files))
	}
}

// The kernel takes no bytes for a file that it does not know (any more), which is no reason to stop.
func TestAFileThatTheKernelDoesNotKnowIsPassedOver(t *testing.T) {
	all := smallFiles(10)
	s := snapshotOf(t, all)
	m := mounted(t, s, &holder{memory: newMemory(s, all)}, Options{Mode: NoOpen, memoryLeft: plenty})
	begin(t, m, "d")
	in, err := m.enter()
	if err != nil {
		t.Fatal(err)
	}
	defer in.close()
	before := m.Stats()
	for _, name := range []string{"e/other", "e", "d/none", "none/none"} {
		if _, err := in.open(name); !errors.Is(err, unix.EAGAIN) || errors.Is(err, errRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if st := m.Stats(); st.Lookups != before.Lookups || st.Reads != before.Reads {
		t.Errorf("the kernel asked: %+v, before %+v", st, before)
	}
	same(t, m, all)
}

// What is mounted and unmounted elsewhere changes nothing of what the kernel knows.
func TestAFileThatTheKernelKnowsIsOpenedWhateverIsMountedElsewhere(t *testing.T) {
	all := smallFiles(10)
	s := snapshotOf(t, all)
	m := mounted(t, s, &holder{memory: newMemory(s, all)}, Options{Mode: NoOpen, memoryLeft: plenty})
	begin(t, m, "d", "f0000")
	in, err := m.enter()
	if err != nil {
		t.Fatal(err)
	}
	defer in.close()
	from, to := t.TempDir(), t.TempDir()
	over := make(chan error, 1)
	go func() {
		var err error
		for n := 0; n < 1000 && err == nil; n++ {
			if err = unix.Mount(from, to, "", unix.MS_BIND, ""); err == nil {
				err = unix.Unmount(to, unix.MNT_DETACH)
			}
		}
		over <- err
	}()
	unknown := 0
	for {
		fd, err := in.open("d/f0000")
		if err == nil {
			unix.Close(fd)
		} else {
			unknown++
		}
		select {
		case err := <-over:
			if err != nil || unknown > 0 {
				t.Errorf("%d times it was not opened; %v", unknown, err)
			}
			return
		default:
		}
	}
}

// A process that is killed while the kernel reads a file ahead for it, and a reader of the file waits for it too, ends.
// Another one that takes the mount over answers both.
func TestAServerThatIsKilledWhileItPushesEnds(t *testing.T) {
	needFUSE(t)
	all := served()
	dir := t.TempDir()
	cleanMount(t, dir)
	o := order{Path: dir, Mode: NoOpen, Dir: t.TempDir(), Block: "slow", Ahead: true}
	first, parked := startServer(t, o, nil)
	slow := make(chan error, 1)
	go func() { slow <- sameBytes(filepath.Join(dir, "slow"), all["slow"]) }()
	first.expect(t, "blocked")
	first.expect(t, "read ahead")
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		first.kill()
	}()
	select {
	case <-ended:
	case <-time.After(patience):
		at, _ := mountinfo.At(dir)
		abort(at[0].Minor)
		t.Fatal("the process did not end before its mount was aborted")
	}
	o.Block = ""
	startServer(t, o, parked)
	if err := <-slow; err != nil {
		t.Error(err)
	}
	if err := sameBytes(filepath.Join(dir, "slow"), all["slow"]); err != nil {
		t.Error(err)
	}
}

// Who unmounts finds nobody but other users there, whatever is being pushed.
func TestAPushDoesNotKeepTheMountBusy(t *testing.T) {
	all := smallFiles(40)
	s := snapshotOf(t, all)
	begun, goOn := make(chan struct{}, 100), make(chan struct{})
	r := &holder{memory: newMemory(s, all), before: func(context.Context, string) error {
		begun <- struct{}{}
		<-goOn
		return nil
	}}
	m := mounted(t, s, r, Options{Mode: NoOpen, memoryLeft: plenty})
	begin(t, m, "d", "f0000", "f0001")
	<-begun
	if err := unix.Unmount(m.Dir(), unix.UMOUNT_NOFOLLOW); err != nil {
		t.Errorf("somebody else's unmount: %v", err)
	}
	close(goOn)
	m.Wait() // with the last copy of the mount
	if len(m.fs.push.offers.files) != 0 || m.fs.push.offers.n.Load() != 0 {
		t.Error("there are offers left")
	}
}

// A tier that hangs may have taken all the room that the kernel has for reading ahead: pushes wait for it, and no
// unmount does for them.
func TestAnUnmountDoesNotWaitForTheTier(t *testing.T) {
	all := smallFiles(40)
	for k := range maxBackground + 16 {
		all[fmt.Sprintf("g/%02d", k)] = content("g", 100)
	}
	s := snapshotOf(t, all)
	r := &holder{memory: newMemory(s, all)}
	m := mounted(t, s, r, Options{Mode: NoOpen, memoryLeft: plenty, ReadTimeout: time.Hour})
	goOn := make(chan struct{})
	var stuck atomic.Int64
	r.hook(func(_ context.Context, path string, _ int64) error {
		if path[0] == 'g' {
			stuck.Add(1)
			<-goOn
		}
		return nil
	})
	if _, err := os.ReadDir(filepath.Join(m.Dir(), "d")); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(goOn)
	for name := range all {
		if name[0] == 'g' {
			wg.Go(func() {
				if fd, err := unix.Open(filepath.Join(m.Dir(), name), unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
					_ = unix.Fadvise(fd, 0, 0, unix.FADV_WILLNEED)
					unix.Close(fd)
				}
			})
		}
	}
	eventually(t, "all room is taken", func() bool { return stuck.Load() >= maxBackground })
	d, _ := s.Lookup("/d")
	m.fs.push.mu.Lock()
	m.fs.push.folders[d].under = true
	m.fs.push.mu.Unlock()
	m.fs.push.queue <- push{d, 0, pushMax}
	eventually(t, "files wait to be pushed", func() bool { return m.fs.push.offers.n.Load() == pushers })
	if busy, err := m.unmount(); err != nil || !busy {
		t.Errorf("busy %v, %v", busy, err)
	}
}

// What the kernel drops, because memory is short, is asked for again, and is not pushed again.
func TestPagesThatTheKernelDroppedAreReadAgain(t *testing.T) {
	all := smallFiles(30)
	s := snapshotOf(t, all)
	m := mounted(t, s, &holder{memory: newMemory(s, all)}, Options{Mode: NoOpen, memoryLeft: plenty, pushPatience: patience})
	begin(t, m, "d", "f0000", "f0001")
	eventually(t, "the others are pushed", func() bool { return m.Stats().Pushed == 30-2+1 })
	before := m.Stats().Reads
	for name := range all {
		fd, err := unix.Open(filepath.Join(m.Dir(), name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		err = unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)
		unix.Close(fd)
		if err != nil {
			t.Fatal(err)
		}
	}
	same(t, m, all)
	if st := m.Stats(); st.Reads == before || st.Pushed != 30-2+1 {
		t.Errorf("%d reads, %d pushed", st.Reads-before, st.Pushed)
	}
}

// The kernel asks nobody twice for what is in a folder, so that a process that takes a mount over hears of no listing.
func TestAnHeirPushesOfFoldersThatWereListedBefore(t *testing.T) {
	needFUSE(t)
	all := served()
	dir := t.TempDir()
	cleanMount(t, dir)
	first, parked := startServer(t, order{Path: dir, Mode: NoOpen, Dir: t.TempDir()}, nil)
	if _, err := os.ReadDir(dir + "/dir"); err != nil {
		t.Fatal(err)
	}
	first.kill()
	s := snapshotOf(t, all)
	r := &holder{memory: newMemory(s, all)}
	m, err := Resume(t.Context(), parked, s, r, Options{Dataset: "served", Mode: NoOpen, memoryLeft: plenty, pushPatience: patience})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Unmount() })

	// Of the root's files the kernel knows those that were asked for.
	same(t, m, files{"big": all["big"], "small": all["small"], "other": all["other"], "slow": all["slow"]})
	eventually(t, "no push is under way", m.fs.push.idle)
	if r.held.Load() != 0 {
		t.Errorf("%d files of a folder that was not listed were asked for", r.held.Load())
	}
	same(t, m, files{"dir/f20": all["dir/f20"], "dir/f21": all["dir/f21"]})
	eventually(t, "those behind them are pushed", func() bool { return m.Stats().Pushed == 28 })
	before := m.Stats()
	for k := 22; k < 50; k++ {
		name := fmt.Sprintf("dir/f%02d", k)
		same(t, m, files{name: all[name]})
	}
	if st := m.Stats(); st.Reads != before.Reads {
		t.Errorf("%d reads came for files that were pushed", st.Reads-before.Reads)
	}
	same(t, m, all)
}

// Where a push finds that the kernel knows nothing of a folder it is tried again, but ever more rarely; a listing ends that.
func TestAnHeirDoesNotTryForEver(t *testing.T) {
	all := files{}
	const n = 300
	for k := range n {
		all[fmt.Sprintf("d/f%04d", k)] = content("x", 10)
	}
	s := snapshotOf(t, all)
	r := &holder{memory: newMemory(s, all)}
	m := mounted(t, s, r, Options{Mode: NoOpen, memoryLeft: plenty, pushPatience: patience})
	p := m.fs.push
	var tries atomic.Int64
	p.mu.Lock()
	enter := p.enter
	p.heir, p.enter = true, func() (*entrance, error) { tries.Add(1); return enter() }
	p.mu.Unlock()
	for k := range 100 {
		name := fmt.Sprintf("d/f%04d", k)
		same(t, m, files{name: all[name]})
		eventually(t, "no push is under way", p.idle)
	}
	if tries.Load() != 3 || r.held.Load() != 0 || m.Stats().Pushed != 0 { // after 2, 8 and 32 files
		t.Errorf("%d pushes, %d files asked for, %d pushed", tries.Load(), r.held.Load(), m.Stats().Pushed)
	}
	begin(t, m, "d", "f0200")
	eventually(t, "the others are pushed", func() bool { return m.Stats().Pushed == n-101 })
	same(t, m, all)
}
