package keeper

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

// ErrGone: the keeper went away, and with it what was parked there.
var ErrGone = errors.New("the keeper is gone")

// answerTimeout is how long the keeper may take for an answer; it does no I/O but on the socket.
const answerTimeout = 10 * time.Second

// Entry is what is parked under a name. Its files belong to whoever has it.
type Entry struct {
	Name  string
	Files []*os.File
}

// Close closes the files.
func (e Entry) Close() {
	for _, f := range e.Files {
		f.Close()
	}
}

// Conn is a connection to a keeper.
type Conn struct {
	conn    *net.UnixConn
	turn    chan struct{} // one request at a time
	answers chan packet
	done    chan struct{}
	once    sync.Once
	ended   chan struct{} // closed by read
}

// Dial connects to the keeper at a path.
func Dial(ctx context.Context, path string) (*Conn, error) {
	nc, err := new(net.Dialer).DialContext(ctx, "unixpacket", path)
	if err != nil {
		return nil, fmt.Errorf("keeper: %w", err)
	}
	c := &Conn{conn: nc.(*net.UnixConn), turn: make(chan struct{}, 1), answers: make(chan packet), done: make(chan struct{}), ended: make(chan struct{})}
	go c.read() // ends with the connection; Close waits for it
	return c, nil
}

// read hands out what arrives; it also notices the keeper's end while nobody asks for anything.
func (c *Conn) read() {
	defer close(c.ended)
	defer c.end()
	for {
		p, err := receive(c.conn)
		if err != nil {
			return
		}
		select {
		case c.answers <- p:
		case <-c.done:
			p.close()
			return
		}
	}
}

// Done is closed when the connection has ended: the keeper is gone, or Close was called.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Close ends the connection; what is parked stays.
func (c *Conn) Close() {
	c.end()
	<-c.ended
}

func (c *Conn) end() {
	c.once.Do(func() {
		close(c.done)
		c.conn.Close()
	})
}

// Park has the keeper hold copies of the files under a name, in place of what it held there. The files stay the
// caller's.
func (c *Conn) Park(name string, files ...*os.File) error {
	if err := checkName(name); err != nil {
		return fmt.Errorf("park: %w", err)
	}
	if len(files) > MaxFiles {
		return fmt.Errorf("park %s: %d files are more than %d", name, len(files), MaxFiles)
	}
	return c.ask(kindPark, name, files)
}

// Drop has the keeper close what it holds under a name. A name that it does not have is no error.
func (c *Conn) Drop(name string) error { return c.ask(kindDrop, name, nil) }

// ask makes a request that is answered by an ok.
func (c *Conn) ask(kind byte, name string, files []*os.File) error {
	c.turn <- struct{}{}
	defer func() { <-c.turn }()
	p, err := c.exchange(kind, name, files)
	if err != nil {
		return fmt.Errorf("keeper: %s: %w", name, err)
	}
	p.close()
	if p.kind != kindOK {
		c.end()
		return fmt.Errorf("keeper: %s: %w: answer %q", name, errProtocol, p.kind)
	}
	return nil
}

// List returns what is parked.
func (c *Conn) List() ([]Entry, error) {
	c.turn <- struct{}{}
	defer func() { <-c.turn }()
	var all []Entry
	fail := func(err error) ([]Entry, error) {
		for _, e := range all {
			e.Close()
		}
		return nil, fmt.Errorf("keeper: list: %w", err)
	}
	p, err := c.exchange(kindList, "", nil)
	for {
		if err != nil {
			return fail(err)
		}
		switch p.kind {
		case kindItem:
			all = append(all, Entry{Name: p.text, Files: p.files})
		case kindEnd:
			p.close()
			return all, nil
		default:
			p.close()
			c.end()
			return fail(fmt.Errorf("%w: answer %q", errProtocol, p.kind))
		}
		p, err = c.answer()
	}
}

func (c *Conn) exchange(kind byte, name string, files []*os.File) (packet, error) {
	if err := c.conn.SetWriteDeadline(time.Now().Add(answerTimeout)); err != nil {
		c.end()
		return packet{}, fmt.Errorf("%w: %w", ErrGone, err)
	}
	if err := send(c.conn, kind, name, files); err != nil {
		c.end()
		return packet{}, fmt.Errorf("%w: %w", ErrGone, err)
	}
	return c.answer()
}

// answer waits for one packet. A late one would be taken for the next request's, so the connection ends.
func (c *Conn) answer() (packet, error) {
	t := time.NewTimer(answerTimeout)
	defer t.Stop()
	select {
	case p := <-c.answers:
		if p.kind == kindErr {
			p.close()
			return packet{}, errors.New(p.text)
		}
		return p, nil
	case <-c.done:
		return packet{}, ErrGone
	case <-t.C:
		c.end()
		return packet{}, fmt.Errorf("%w: no answer within %v", ErrGone, answerTimeout)
	}
}
