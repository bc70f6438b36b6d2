// Package csi shows datasets in pods: the CSI identity and node service of one node.
//
// # The model
//
// A mount is one FUSE file system for one snapshot of one Dataset on this node, served by this process, in the
// driver's own folder; every pod that gets the snapshot gets a bind mount of it, so that they share its page
// cache. A pod keeps the snapshot that it began with; a pod that comes later gets the one that is current
// then. A mount without pods is kept for a while (Config.Linger), since steps of a workflow follow each other.
// A Dataset that takes puts has one mount, which shows its names as they are, in place of one a snapshot; another one
// takes its place for new pods when it has not much room for names left.
//
// Nothing is asked of the API server for a volume: the kubelet hands over the Dataset's name (the volume's
// attributes), the read key (its reader Secret) and whose pod it is. Possession of the read key is what
// admits: the workers are asked whether they take it, and only a key that they took opens a mount that
// is there already. Workers are found by the name of the Dataset's Service.
//
// # Restarts
//
// Each mount is parked in the keeper (package keeper): its connection, its table of open files, and a memfd
// with what else a successor must know (note.go). A node service that starts adopts what is parked; one that
// runs parks again at a keeper that was restarted. If this process and the keeper are gone at once, mounts are
// dead: pods that have them get errors and must be restarted, which the log and an Event say; new pods get a
// new mount. Two node services may run for a while (a DaemonSet's surge): the later one has the sockets, and
// the earlier leaves everything to it, and sends the pods' own servers there, until nobody answers there for a
// few seconds (the update was undone); then the earlier one makes the sockets anew and goes on.
//
// # Other volumes
//
// Other inline volumes give a worker its store (a tmpfs of huge pages, charged to the pod) and the folder of its
// socket, through which this process gets descriptors of files that the worker holds (passthrough).
//
// # Mounts that pods serve
//
// A pod may serve its mounts by itself (package sidecar), with its own memory and CPU, and needs no right for it:
// the lender lends them. An inline volume is the place of a mount, another is a folder with a socket (package
// broker). Until the pod's server claims the mount, its place is a dead file system, so that whoever comes too
// early gets an error and the kubelet never waits. The claim mounts a connection on top of it and passes its
// descriptor. Of the connection, and of what a successor of the server needs, there are copies here and at the
// keeper; what mountinfo says is all that is needed to know the volumes again. A server that is killed goes on
// when it is started again; one that says that it leaves, one that is missed for a minute, and one whose volume
// is unpublished has its connection aborted, so that no process waits for it and no pod stays Terminating.
//
// What a hostile pod gains by this. It can speak to the lender, and be the server of a mount, by volumes that it
// writes itself.
//
//   - It sees no mount but its own, since the socket is in its own volume, and what the kubelet says of the pod
//     cannot be forged. It gets no bytes of a Dataset: its server reads from the workers with the read key of its
//     own namespace, also over a worker's socket that it is connected to here.
//   - Its answers to the kernel reach whoever looks at its mount: its own containers, and the kubelet, which looks
//     only when it was restarted or has a subPath to bind. It can have those wait until the pod is deleted, as by
//     a file system of its own making it always can; the abort at unpublish, and after a minute, ends that. The
//     superblock is read-only, nosuid and nodev, whatever the server says.
//   - A file that is registered for passthrough is opened again by the kernel with this process's rights. So only
//     what the sender has open for reading, a regular file of the memory that the driver mounted for a worker, is
//     registered: no O_PATH, nothing of the node, of other pods' volumes, of its own image. The content is what it
//     has read or could. It can keep a worker's file from being freed as long as its mount lives, as it can by
//     keeping the descriptor that the worker gave it.
//   - A descriptor that it sends, also as the worker of a Dataset of its own, can be of a file whose server it is. It is
//     looked at without asking the file system, is never polled, and before it is closed, which would wait for that
//     server, its mount is aborted.
//   - Its requests cost this process time, one of them for each of at most 16 connections.
//
// # Rules
//
// Concurrency: calls of the kubelet run concurrently; one for a path that is busy gets Aborted, and mounts of
// one Dataset are made one at a time (dataset.turn). One mutex (service.mu) guards the tables and is never held
// over I/O. Failure: errors have the code that makes the kubelet do the right thing and a text for the pod's
// events; no path of a mount that may be dead or unserved is ever touched but through package mountinfo.
//
// It may import api/v1alpha1, cache/... and gRPC, the CSI and the kubelet's plugin definitions, and client-go
// for the node's label and Events.
package csi
