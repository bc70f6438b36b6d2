package wire

import (
	"context"
	"io"
	"net"
	"time"
)

// Names of a writable dataset. A connection of the read role that asks for OpObjects carries HTTP requests for
// them from the OK reply on; all are GET, and name a path of the dataset without its leading slash.
const (
	// PathName (?path=) answers Name, as the name is now; "" is the dataset's folder.
	PathName = "/name"
	// PathNames (?path=&after=) answers Names: what is in a folder, in the order of the bucket's keys, from
	// the first that comes after the name after; that of a folder ends in a slash.
	PathNames = "/names"
	// PathBytes (?path=&version=&off=&length=) answers at most MaxBytes bytes of an object, if that is its
	// version now, and their CRC32C in HeaderSum.
	PathBytes = "/bytes"
)

// ToObjects asks for OpObjects over an authenticated connection, which carries HTTP requests after it. It takes as long
// as ctx lasts. The error of a reply that is not OK is its status's.
func ToObjects(ctx context.Context, conn net.Conn) error {
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	if _, err := conn.Write(AppendRequest(nil, Request{Op: OpObjects, ID: 1})); err != nil {
		return err
	}
	if _, err := accepted(conn); err != nil {
		return err
	}
	return conn.SetDeadline(time.Time{})
}

// accepted reads a reply without a payload. It does not read ahead: what follows may be no frame.
func accepted(conn net.Conn) (Reply, error) {
	rep, err := ReadReply(conn)
	if err != nil || rep.Status == OK {
		return rep, err
	}
	text := make([]byte, min(rep.Length, MaxMessage))
	if _, err := io.ReadFull(conn, text); err != nil {
		return rep, err
	}
	return rep, rep.Status.Err(string(text))
}

// NamesServed is the Index of a reply to OpMembers from a worker that answers those requests: the dataset is
// writable. From others, also those that do not know of them, it is zero.
const NamesServed = 1

const (
	// HeaderStatus has the Status of an answer that is not OK; its body is a message for people.
	HeaderStatus = "Stepcache-Status"
	// HeaderSum has the CRC32C of the body, in hex.
	HeaderSum = "Stepcache-Crc32c"
	// HeaderEpoch has the sender's membership epoch.
	HeaderEpoch = "Stepcache-Epoch"
)

const (
	// MaxBytes bounds the length of a PathBytes.
	MaxBytes = 1 << 20
	// MaxNames bounds an answer to PathName or PathNames in bytes.
	MaxNames = 4 << 20
)

// Name is a file or a folder of a writable dataset.
type Name struct {
	// Name is the last segment of the path.
	Name string `json:"name"`
	Dir  bool   `json:"dir,omitempty"`
	// Size, Version and ModTime are a file's.
	Size    int64     `json:"size,omitempty"`
	Version string    `json:"version,omitempty"`
	ModTime time.Time `json:"modTime,omitzero"`
}

// Names is a part of a folder.
type Names struct {
	Names []Name `json:"names"`
	// After is from where there is more; empty at the folder's end.
	After string `json:"after,omitempty"`
}
