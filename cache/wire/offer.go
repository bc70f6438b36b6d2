package wire

import (
	"net"
	"time"
)

// Offer gives a worker a snapshot that it does not hold any more, over an authenticated connection, which is of no use
// afterwards: a reader outlives the workers that it had the snapshot from, and nobody can list the bucket as it was.
// An OK reply to the request tells in Size how much of it to send, as it is and without frames: all of it, or nothing
// where the worker has it by now. A second reply says whether it is held. The error of one that is not OK is its
// status's: Overloaded while another is being received, Invalid for one that this dataset cannot have made. No step,
// of at most MaxPayload bytes, may take longer than WorkerTimeout.
func Offer(conn net.Conn, d Digest, encoded []byte) error {
	step := func() error { return conn.SetDeadline(time.Now().Add(WorkerTimeout)) }
	if err := step(); err != nil {
		return err
	}
	if _, err := conn.Write(AppendRequest(nil, Request{Op: OpOffer, ID: 1, Snapshot: d, Off: int64(len(encoded))})); err != nil {
		return err
	}
	rep, err := accepted(conn)
	if err != nil || rep.Size == 0 {
		return err
	}
	for len(encoded) > 0 {
		n := min(len(encoded), MaxPayload)
		if err := step(); err != nil {
			return err
		}
		if _, err := conn.Write(encoded[:n]); err != nil {
			return err
		}
		encoded = encoded[n:]
	}
	if err := step(); err != nil {
		return err
	}
	_, err = accepted(conn)
	return err
}
