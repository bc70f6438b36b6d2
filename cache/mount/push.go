package mount

import (
	"context"
	"errors"
	"math"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/meminfo"
)

// Pushing: in NoOpen mode the kernel asks for a small file with one request, and its reader waits for that. Where it
// can be told that a folder is being read, its files are put into the page cache before they are asked for, many
// at once, and opening them then costs no request. How the kernel is made to take them is in entrance.go.
//
// What is known: that a folder was listed to its end, so that the kernel knows its files (no others can be pushed),
// and which of them were asked for. A listing alone is no sign that bytes are wanted; two files of a
// listed folder are. A process that has taken the mount over knows of no listing before, and the kernel may make none
// again: it tries. From then on every request that still comes for a file of the folder, which says that the
// reader came to what was not pushed, is answered with a push of twice as much as the last, of the files after it.
//
// What is pushed is of the snapshot, which never changes, whole, compared with its sums, and held by the tier: for
// no push anything leaves the bucket. It is the kernel's to drop whenever it needs the memory, is pushed once, at
// most PushBytes of it in all, and only while there is memory that nobody needs. It ends with the connection, and with
// this process.
const (
	// pushEvidence is how many files of a listed folder are asked for before others of it are pushed.
	pushEvidence = 2
	// pushFirst and pushMax are what the first push has, in bytes, and what any has at most.
	pushFirst, pushMax = 4 << 20, 64 << 20
	// pushFile is the size up to which files are pushed: larger ones are not read at once.
	pushFile = 1 << 20
	// pushCost is what a file takes beyond its pages, in the kernel, about.
	pushCost = 2 << 10
	// pushers is how many files are fetched and offered at once.
	pushers = 16
	// pushMisses in a row end a push: the tier does not hold these files, or the kernel does not know them.
	pushMisses = 32
	// pushQueue bounds the pushes that wait.
	pushQueue = 64
	// pushPatience is how long the kernel may take to ask for a file, and to have all of it; it asks at once or, where it
	// has it already, never.
	pushPatience = time.Second
	// pushEnd is how long who ends all pushes waits for those under way.
	pushEnd = time.Second
	// pushFolders bounds the listed folders that are remembered.
	pushFolders = 1 << 16
	// pushSpare is what of the memory of the machine stays free.
	pushSpare = 4
)

// pusher puts files into the kernel's page cache.
type pusher struct {
	f      *fileSystem
	holder Holder
	offers offers
	left   func() int64              // bytes of memory that can be had
	heir   bool                      // another process has served the mount before, and told the kernel of folders
	enter  func() (*entrance, error) // of the mount
	queue  chan push
	off    atomic.Bool // nothing is pushed, or not any more
	budget atomic.Int64
	stop   context.CancelFunc // ends what start began
	ended  chan struct{}      // closed when that has ended

	mu      sync.Mutex
	folders map[catalog.Index]*pushed
}

// pushed is a folder that was listed, or may have been. Guarded by pusher.mu.
type pushed struct {
	listed bool
	asked  int // files that were asked for
	need   int // how many must have been for a push
	window int64
	under  bool // a push is under way or waits
	// had has a bit for each child that was asked for, pushed or never is. It is made with the first one.
	had []uint64
}

// bits makes had, for so many children, if it is not there.
func (d *pushed) bits(n uint32) {
	if d.had == nil {
		d.had = make([]uint64, (n+63)/64)
	}
}

// push is of the files of a folder that follow its child at.
type push struct {
	dir catalog.Index
	at  uint32
	n   int64
}

func newPusher(f *fileSystem) *pusher {
	p := &pusher{f: f, queue: make(chan push, pushQueue), left: f.opt.memoryLeft, folders: map[catalog.Index]*pushed{}}
	p.holder, _ = f.reader.(Holder)
	p.budget.Store(f.opt.PushBytes)
	p.off.Store(p.holder == nil || f.opt.PushBytes <= 0)
	return p
}

// start begins to push, until ctx ends or end is called. heir says that another process has served the mount before.
func (p *pusher) start(ctx context.Context, enter func() (*entrance, error), heir bool) {
	if p.off.Load() {
		return
	}
	release, kept := p.f.snap.Keep() // end may leave this behind
	if !kept {
		p.off.Store(true)
		return
	}
	p.enter, p.heir = enter, heir
	ctx, p.stop = context.WithCancel(ctx)
	p.ended = make(chan struct{})
	go func() {
		defer release()
		defer close(p.ended)
		for {
			select {
			case <-ctx.Done():
				return
			case w := <-p.queue:
				p.push(ctx, w)
			}
		}
	}()
}

// end ends all pushes, and with them this process's use of its own mount, in a moment: what waits for the kernel, which
// may wait for the tier, is left behind.
func (p *pusher) end() {
	p.off.Store(true)
	if p.ended == nil {
		return
	}
	p.stop()
	wait := time.NewTimer(pushEnd)
	defer wait.Stop()
	select {
	case <-p.ended:
	case <-wait.C:
	}
}

// refused ends all pushes, for good, and says why.
func (p *pusher) refused(err error) {
	if p.off.CompareAndSwap(false, true) {
		p.f.log.Info("small files are not put into the page cache before they are asked for", "reason", err)
	}
}

// list notes that the kernel knows the files of a folder.
func (p *pusher) list(dir catalog.Index, n *catalog.Node) {
	if p.off.Load() || n.Count == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.folders[dir]
	if d == nil {
		d = p.note(dir)
	}
	if d.listed {
		return
	}
	d.listed, d.need = true, pushEvidence
}

// note begins to know of a folder. p.mu is held.
func (p *pusher) note(dir catalog.Index) *pushed {
	for other, d := range p.folders { // any: what is lost is a guess
		if len(p.folders) < pushFolders {
			break
		}
		if !d.under {
			delete(p.folders, other)
		}
	}
	d := &pushed{need: pushEvidence, window: pushFirst}
	p.folders[dir] = d
	return d
}

// read notes that a file is asked for, and has others pushed.
func (p *pusher) read(i catalog.Index, n *catalog.Node) {
	if p.off.Load() || n.Size > pushFile || p.budget.Load() <= 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.folders[n.Parent]
	if d == nil {
		if !p.heir {
			return
		}
		d = p.note(n.Parent)
	}
	parent, ok := p.f.snap.Node(n.Parent)
	if !ok || i < parent.First || i-parent.First >= parent.Count {
		return
	}
	d.bits(parent.Count)
	at := i - parent.First
	if d.had[at/64]&(1<<(at%64)) != 0 {
		return // the kernel had it and dropped it, so that memory is short, or it is read once more
	}
	d.had[at/64] |= 1 << (at % 64)
	if d.asked++; d.asked < d.need || d.under {
		return
	}
	select {
	case p.queue <- push{n.Parent, at, d.window}:
		d.under = true
	default: // others wait; it is asked again
	}
}

// take returns the files of a push.
func (p *pusher) take(w push) (files []catalog.Index) {
	room := min(w.n, p.budget.Load(), p.left())
	parent, _ := p.f.snap.Node(w.dir)
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.folders[w.dir]
	d.bits(parent.Count)
	end := parent.Count
	if !d.listed {
		end -= w.at + 1 // those before were most likely read already, or pushed by who was here before
	}
	for k := uint32(0); k < end; k++ {
		at := (w.at + 1 + k) % parent.Count
		if at%64 == 0 && d.had[at/64] == math.MaxUint64 && k+63 < end {
			k += 63
			continue
		}
		bit := uint64(1) << (at % 64)
		if d.had[at/64]&bit != 0 {
			continue
		}
		n, ok := p.f.snap.Node(parent.First + at)
		if ok && !n.Dir && n.Size > 0 && n.Size <= pushFile {
			if room -= pushWeight(n.Size); room < 0 {
				break
			}
			files = append(files, parent.First+at)
		}
		d.had[at/64] |= bit
	}
	return files
}

// pushWeight is what a file takes of the memory.
func pushWeight(size int64) int64 {
	page := int64(os.Getpagesize())
	return (size+page-1)/page*page + pushCost
}

// push pushes files of a folder.
func (p *pusher) push(ctx context.Context, w push) {
	files := p.take(w)
	begun := 0
	var taken, misses atomic.Int64
	defer func() {
		parent, _ := p.f.snap.Node(w.dir)
		p.mu.Lock()
		defer p.mu.Unlock()
		d := p.folders[w.dir]
		d.under = false
		switch {
		case taken.Load() > 0:
			d.window = min(2*d.window, pushMax)
		case !d.listed: // so far the kernel knows none of it, or the tier holds none
			d.need, begun = 4*d.asked, 0
		}
		for _, i := range files[begun:] { // perhaps later
			at := i - parent.First
			d.had[at/64] &^= 1 << (at % 64)
		}
	}()
	if len(files) == 0 || p.off.Load() {
		return
	}
	in, err := p.enter()
	switch {
	case errors.Is(err, errRefused):
		p.refused(err)
		return
	case err != nil:
		return
	}
	defer in.close()
	var g errgroup.Group
	g.SetLimit(pushers)
	for begun < len(files) && ctx.Err() == nil && !p.off.Load() && misses.Load() < pushMisses {
		i := files[begun]
		begun++
		g.Go(func() error {
			switch err := p.one(ctx, in, i); {
			case err == nil:
				misses.Store(0)
				taken.Add(1)
			case errors.Is(err, errRefused):
				p.refused(err)
			default:
				misses.Add(1)
			}
			return nil
		})
	}
	_ = g.Wait()
}

// pushBuffers hold a file each.
var pushBuffers = sync.Pool{New: func() any { return new([]byte) }}

// one pushes one file.
func (p *pusher) one(ctx context.Context, in *entrance, i catalog.Index) error {
	n, ok := p.f.snap.Node(i)
	if !ok {
		return os.ErrNotExist
	}
	fd, err := in.open(strings.TrimPrefix(p.f.snap.Path(i), "/"))
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	buf := pushBuffers.Get().(*[]byte)
	if int64(cap(*buf)) < n.Size {
		*buf = make([]byte, n.Size)
	}
	b := (*buf)[:n.Size]
	if err := p.holder.ReadHeld(ctx, i, b); err != nil {
		pushBuffers.Put(buf)
		return err
	}
	o := p.offers.put(i, b)
	p.budget.Add(-pushWeight(n.Size))
	if err = in.readAhead(fd, n.Size); err != nil {
		p.budget.Add(pushWeight(n.Size))
	} else {
		wait := time.NewTimer(p.f.opt.pushPatience)
		select {
		case <-o.taken:
		case <-wait.C:
			err = errNotTaken
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
		wait.Stop()
	}
	if p.offers.withdraw(i) {
		pushBuffers.Put(buf)
	}
	if err != nil {
		return err
	}
	p.f.count.pushed.Add(1)
	p.f.count.pushedBytes.Add(n.Size)
	return nil
}

// errNotTaken: the kernel asked for none, or not for all of a file's bytes: it has them, or has no memory now.
var errNotTaken = errors.New("the kernel did not ask for the file")

// memoryLeft is what of the memory can be had: of the machine's all that is available but for a part of it, of the
// control group's half. Where it cannot be found out it is nothing.
func memoryLeft() int64 {
	m, err := meminfo.Read()
	if err != nil {
		return 0
	}
	left := m.Available - m.Total/pushSpare
	if room, limited := meminfo.Room(); limited {
		left = min(left, room/2)
	}
	return left
}
