// Package keeper keeps descriptors for a process that may die.
//
// # The model
//
// A FUSE mount lives as long as somebody has its connection open, not as long as somebody serves it. So the
// node service parks, for each of its mounts, a few descriptors in another, very small process, the keeper:
// under a name, over a Unix socket. The node service that comes after it lists them and goes on. The keeper
// looks into none of them, so that it can stay the same, and running, over many versions of the node service.
// What a successor needs to know besides goes into a memfd, as one more descriptor.
//
// # Protocol
//
// A SOCK_SEQPACKET socket; a packet is one byte for the kind, then the name, and carries the descriptors. A
// park or a drop is answered by an ok or an error with a text; a list by one item for each name and an end.
// A connection has one request under way at a time.
//
// # Rules
//
// Only processes of the keeper's own user and root may connect. Everything is safe for concurrent use.
// Failure: a keeper that goes away ends the connections to it (Conn.Done); it keeps nothing on disk, and whoever
// parked parks again at the next one. A client that breaks the protocol loses its connection and nothing else.
//
// It may import golang.org/x/sys/unix and csi/packets.
package keeper
