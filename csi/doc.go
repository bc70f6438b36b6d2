// Package csi shows datasets in pods: the CSI identity and node service of one node.
//
// # The model
//
// A mount is one FUSE file system for one snapshot of one Dataset on this node, served by this process, in the
// driver's own folder; every pod that gets the snapshot gets a bind mount of it, so that they share its page
// cache. A pod keeps the snapshot that it began with; a pod that comes later gets the one that is current
// then. A mount without pods is kept for a while (Config.Linger), since steps of a workflow follow each other.
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
// the earlier leaves everything to it.
//
// # Other volumes
//
// Inline volumes give a worker its store (a tmpfs of huge pages, charged to the pod) and the folder of its
// socket, through which this process gets descriptors of files that the worker holds (passthrough).
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
