package keeper

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// Kinds of packets.
const (
	kindPark = 'P'
	kindDrop = 'D'
	kindList = 'L'
	kindOK   = 'K'
	kindErr  = 'E'
	kindItem = 'I'
	kindEnd  = 'Z'
)

const (
	// MaxName is the longest name in bytes.
	MaxName = 255
	// MaxFiles is how many descriptors a name may have.
	MaxFiles = 8

	maxPacket = 1024
)

var errProtocol = errors.New("not the keeper's protocol")

// packet is one packet; its files belong to whoever has it.
type packet struct {
	kind  byte
	text  string
	files []*os.File
}

func (p *packet) close() {
	for _, f := range p.files {
		f.Close()
	}
	p.files = nil
}

func send(c *net.UnixConn, kind byte, text string, files []*os.File) error {
	if len(text) >= maxPacket {
		text = text[:maxPacket-1]
	}
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		oob = unix.UnixRights(fds...)
	}
	_, _, err := c.WriteMsgUnix(append([]byte{kind}, text...), oob, nil)
	return err
}

// receive reads one packet. Every descriptor that came is in it, or closed with an error.
func receive(c *net.UnixConn) (packet, error) {
	b := make([]byte, maxPacket)
	oob := make([]byte, unix.CmsgSpace(4*(MaxFiles+1)))
	n, oobn, flags, _, err := c.ReadMsgUnix(b, oob)
	p := packet{}
	if oobn > 0 {
		msgs, perr := unix.ParseSocketControlMessage(oob[:oobn])
		for i := range msgs {
			fds, rerr := unix.ParseUnixRights(&msgs[i])
			if rerr != nil {
				perr = errors.Join(perr, rerr)
				continue
			}
			for _, fd := range fds {
				unix.CloseOnExec(fd)
				p.files = append(p.files, os.NewFile(uintptr(fd), "parked"))
			}
		}
		if err == nil && perr != nil {
			err = fmt.Errorf("%w: %w", errProtocol, perr)
		}
	}
	switch {
	case err != nil:
	case n == 0:
		err = fmt.Errorf("%w: an empty packet", errProtocol)
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0, len(p.files) > MaxFiles:
		err = fmt.Errorf("%w: a packet that is too long", errProtocol)
	}
	if err != nil {
		p.close()
		return packet{}, err
	}
	p.kind, p.text = b[0], string(b[1:n])
	return p, nil
}
