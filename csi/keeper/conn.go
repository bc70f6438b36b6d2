package keeper

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/stepcache/stepcache/csi/packets"
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

// Conn is a connection to a keeper. Close ends it; what is parked stays.
type Conn struct{ *packets.Link[packet] }

// Dial connects to the keeper at a path.
func Dial(ctx context.Context, path string) (*Conn, error) {
	l, err := packets.Dial(ctx, path, receive, func(p packet) { p.close() }, ErrGone)
	if err != nil {
		return nil, fmt.Errorf("keeper: %w", err)
	}
	return &Conn{l}, nil
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
	next, err := c.Turn()
	if err != nil {
		return fmt.Errorf("keeper: %s: %w", name, err)
	}
	defer next()
	p, err := c.exchange(kind, name, files)
	if err != nil {
		return fmt.Errorf("keeper: %s: %w", name, err)
	}
	p.close()
	if p.kind != kindOK {
		c.End()
		return fmt.Errorf("keeper: %s: %w: answer %q", name, errProtocol, p.kind)
	}
	return nil
}

// List returns what is parked.
func (c *Conn) List() ([]Entry, error) {
	next, err := c.Turn()
	if err != nil {
		return nil, fmt.Errorf("keeper: list: %w", err)
	}
	defer next()
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
			c.End()
			return fail(fmt.Errorf("%w: answer %q", errProtocol, p.kind))
		}
		p, err = said(c.Answer(answerTimeout))
	}
}

func (c *Conn) exchange(kind byte, name string, files []*os.File) (packet, error) {
	return said(c.Ask(answerTimeout, func(nc *net.UnixConn) error { return send(nc, kind, name, files) }))
}

// said makes an error of an answer that is one.
func said(p packet, err error) (packet, error) {
	if err == nil && p.kind == kindErr {
		p.close()
		return packet{}, errors.New(p.text)
	}
	return p, err
}
