package keeper

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/csi/packets"
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
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = int(f.Fd())
	}
	return packets.Send(c, append([]byte{kind}, text...), fds)
}

// receive reads one packet. Every descriptor that came is in it, or closed with an error.
func receive(c *net.UnixConn) (packet, error) {
	b := make([]byte, maxPacket)
	n, fds, err := packets.Receive(c, b, MaxFiles, errProtocol, packets.CloseAll)
	if err == nil && n == 0 {
		packets.CloseAll(fds)
		err = fmt.Errorf("%w: an empty packet", errProtocol)
	}
	if err != nil {
		return packet{}, err
	}
	p := packet{kind: b[0], text: string(b[1:n])}
	for _, fd := range fds {
		unix.CloseOnExec(fd)
		p.files = append(p.files, os.NewFile(uintptr(fd), "parked"))
	}
	return p, nil
}
