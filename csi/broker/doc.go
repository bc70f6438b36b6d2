// Package broker is what an unprivileged FUSE server and the node service of its node say to each other.
//
// # The model
//
// The server is a container of a pod, with no right but to run. Whatever needs one the node service does for
// it: it opens /dev/fuse, mounts, and passes the descriptor (OpClaim); it keeps copies of the descriptors that a
// successor of the server needs (OpServe); it registers files for passthrough (OpRegister) and connects to the
// sockets of workers of the node (OpDial), to which the pod has no path. The socket is in a volume of the pod:
// who can connect to it is of the pod, and gets nothing but the mounts of that pod. The connection over which a
// server said OpServe is the sign of its life.
//
// # Protocol
//
// A SOCK_SEQPACKET socket. A packet is JSON and carries descriptors. A connection has one request under way at
// a time, each answered by one packet.
//
// # Trust
//
// The node service takes whatever arrives for hostile. It gets descriptors as numbers (Request.FDs) and looks at
// them with Identify only, which asks nobody: a descriptor of a file system whose server is the peer would have
// a stat hang, and would have epoll hang, and with it everything, were it made an *os.File. The server trusts
// the node service.
//
// # Rules
//
// Concurrency: everything is safe for concurrent use. Failure: a connection that breaks, and one whose answer is
// late, is over (Conn.Done), and with it what it served; errors say what the node service said. It may import
// golang.org/x/sys/unix and csi/packets.
package broker
