// Package sidecar mounts Datasets for the other containers of a pod.
//
// # The model
//
// Where there is a node service, ServeLent serves what it lends (package broker) and has no right at all: one
// native sidecar, which says by ReadyLent when everything is served. The node service mounts, keeps what a
// successor needs when it is killed, and ends the mounts when it says that it leaves.
//
// Where there is none the sidecar mounts by itself, for which it must be privileged.
//
// Then two native sidecars of a pod share a folder of their node, which the webhook named so that no other pod
// has it. Serve mounts each Dataset in a folder of its own in it and answers for it; Keep, which begins first
// and is stopped last, holds the connections of the mounts (package keeper) and takes the mounts away at the
// end. So:
//
//   - A server that is killed, or ends with an error, is started again and goes on where it was: reads under way wait.
//     A mount that has ended, or lies in its folder no more, is made anew.
//   - A server that dies while the pod ends leaves no mount behind. A mount left behind would keep its pod
//     Terminating, were it in a volume that the kubelet takes away; in a folder of the node it would stay for
//     ever. Should both be killed, the node service sweeps up, or the next Keep on the node.
//
// Both end at once, without an error, when their context does.
//
// # Rules
//
// Concurrency: one ServeLent a pod; one Serve and one Keep a folder, each a process of its own; a lock tells whether there is a
// Keep. Failure: errors name the Dataset or the folder. Nothing here looks at a mount that may be unserved;
// mountinfo tells.
//
// It may import cache/client, cache/mount, cache/wire, csi/broker, csi/keeper and tier.
package sidecar
