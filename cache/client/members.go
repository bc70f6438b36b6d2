package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
)

// members keeps the newest membership that the client has heard of and a peer for each member.
//
// News comes from the file, when there is one, and from workers: a reply with a newer epoch makes the
// one goroutine (run) ask its sender for the list. Only a larger epoch replaces the list.
type members struct {
	c    *Client
	path string

	current atomic.Pointer[view]
	hints   chan *peer // peers that announced a newer epoch
	asked   chan struct{}

	mu      sync.Mutex
	changed chan struct{} // closed and replaced at every change, and when a peer came back
	seeds   []*peer
	stamp   stamp
	warned  string
}

// view is one membership with its peers.
type view struct {
	ring.Membership
	peers map[string]*peer
}

// stamp tells whether a file was written since.
type stamp struct {
	size  int64
	mtime time.Time
	inode any
}

func newMembers(c *Client) (*members, error) {
	m := &members{
		c: c, path: c.config.MembershipFile, hints: make(chan *peer, 16), asked: make(chan struct{}, 1),
		changed: make(chan struct{}),
	}
	m.current.Store(&view{})
	if err := c.config.Membership.Validate(); err != nil {
		return nil, err
	}
	m.install(c.config.Membership)
	if m.path != "" {
		if err := m.readFile(); err != nil && !(errors.Is(err, fs.ErrNotExist) && len(c.config.Seeds) > 0) {
			return nil, err
		}
	}
	for _, addr := range c.config.Seeds {
		m.seeds = append(m.seeds, c.newPeer(ring.Member{ID: addr, Addr: addr, State: ring.Ready}))
	}
	if len(m.view().Members) == 0 && len(m.seeds) == 0 && m.path == "" {
		return nil, errors.New("no workers to ask: give a membership, a membership file or seed addresses")
	}
	return m, nil
}

func (m *members) view() *view { return m.current.Load() }

// Members are the workers that the client knows: none before one of its seeds has answered.
func (c *Client) Members() ring.Membership { return c.members.view().Membership }

// Members are those of Client.
func (n *Names) Members() ring.Membership { return n.c.Members() }

// wait returns a channel that is closed at the next change.
func (m *members) wait() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.changed
}

// announce wakes everybody who waits for a change.
func (m *members) announce() {
	m.mu.Lock()
	defer m.mu.Unlock()
	close(m.changed)
	m.changed = make(chan struct{})
}

// saw is told the epoch of every reply.
func (m *members) saw(p *peer, epoch uint64) {
	// One question for each epoch that a peer announces: one that gives no such list is not asked again.
	if told := p.told.Load(); epoch <= m.view().Epoch || epoch <= told || !p.told.CompareAndSwap(told, epoch) {
		return
	}
	select {
	case m.hints <- p:
	default: // run has enough to ask
		p.told.Store(0)
	}
}

// refresh asks run to look for news now.
func (m *members) refresh() {
	select {
	case m.asked <- struct{}{}:
	default:
	}
}

// install makes list the current membership if it is newer. Peers whose address did not change keep
// their connections.
func (m *members) install(list ring.Membership) bool {
	m.mu.Lock()
	old := m.view()
	if len(list.Members) == 0 && list.Epoch == 0 || list.Epoch <= old.Epoch && old.peers != nil {
		m.mu.Unlock()
		return false
	}
	next := &view{Membership: list, peers: make(map[string]*peer, len(list.Members))}
	for _, member := range list.Members {
		if p := old.peers[member.ID]; p != nil && p.member.Addr == member.Addr {
			next.peers[member.ID] = p
		} else {
			next.peers[member.ID] = m.c.newPeer(member)
		}
	}
	var gone []*peer
	for id, p := range old.peers {
		if next.peers[id] != p {
			gone = append(gone, p)
		}
	}
	m.current.Store(next)
	m.mu.Unlock()
	for _, p := range gone {
		p.close()
	}
	m.announce()
	m.c.log.Debug("membership", "epoch", list.Epoch, "members", len(list.Members))
	return true
}

// run follows the news until ctx ends.
func (m *members) run(ctx context.Context) {
	tick := time.NewTicker(m.c.timing.file)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			m.poll()
		case p := <-m.hints:
			if err := m.ask(ctx, p); err != nil && ctx.Err() == nil {
				m.c.log.Debug("membership: a worker announced a newer epoch but gave no list", "worker", p.member.ID, "error", err)
			}
		case <-m.asked:
			m.poll()
			m.askAny(ctx)
		}
	}
}

// poll reads the file again if it was written. A file that does not parse leaves the list as it is.
func (m *members) poll() {
	if m.path == "" {
		return
	}
	err := m.readFile()
	switch {
	case err == nil:
		m.warned = ""
	case err.Error() != m.warned: // once, not at every tick
		m.warned = err.Error()
		m.c.log.Warn("membership file is not usable, keeping the last list", "error", err)
	}
}

func (m *members) readFile() error {
	info, err := os.Stat(m.path)
	if err != nil {
		return fmt.Errorf("membership: %w", err)
	}
	now := stamp{size: info.Size(), mtime: info.ModTime(), inode: inode(info)}
	if now == m.stamp {
		return nil
	}
	list, err := ring.Load(m.path)
	if err != nil {
		return err
	}
	m.stamp = now
	if have := m.view().Epoch; list.Epoch < have {
		return fmt.Errorf("membership file %s has epoch %d, older than %d which a worker gave", m.path, list.Epoch, have)
	}
	m.install(list)
	return nil
}

// ask gets the list from one peer.
func (m *members) ask(ctx context.Context, p *peer) error {
	ctx, cancel := context.WithTimeout(ctx, wire.DialTimeout+wire.PongTimeout)
	defer cancel()
	reply, body, err := p.small(ctx, wire.Request{Op: wire.OpMembers})
	if err != nil {
		p.told.Store(0)
		return err
	}
	list, err := ring.Parse(body)
	if err != nil {
		return err
	}
	if reply.Epoch > list.Epoch {
		// Asking again would only give this list again, at every reply.
		return fmt.Errorf("worker %s says epoch %d and gives a list of epoch %d", p.member.ID, reply.Epoch, list.Epoch)
	}
	m.install(list)
	return nil
}

// askAny asks one worker that answers, members first and the seeds last.
func (m *members) askAny(ctx context.Context) {
	var candidates []*peer
	for _, p := range m.view().peers {
		candidates = append(candidates, p) // in the random order of a map
	}
	for _, p := range slices.Concat(candidates, m.seeds) {
		if err := m.ask(ctx, p); err == nil || ctx.Err() != nil {
			return
		}
	}
}

func (m *members) close() {
	for _, p := range m.view().peers {
		p.close()
	}
	for _, p := range m.seeds {
		p.close()
	}
}
