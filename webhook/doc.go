// Package webhook gives pods their data at admission, sends them to the nodes that hold it, and checks
// Datasets and DataLoads.
//
// # The model
//
// A pod asks for data by a label (LabelInject, or one of Fluid's) and says which by the claims that it
// mounts, the claims that a Dataset replaces, and the annotation AnnotationMounts. How it gets them is the
// mode: csi (the claim as it is), sidecar (a FUSE server in the pod: without any right where a node service lends
// it its mounts, privileged elsewhere) or stage (an init container that
// copies). A mode only changes where a volume comes from: names and mounts stay, since Argo's wait
// container repeats main's. Pods of workflows in watched namespaces get replaced claims (of Datasets that serve)
// and node affinity with no label of ours; node affinity also for input artifacts that they load from a Dataset's
// S3 endpoint.
//
// There are two mutating endpoints because they fail differently. PathInject fails closed: a pod without
// its data is worse than a refused one; but a label of Fluid in a namespace that is not watched is Fluid's to answer,
// too, and fails open. PathLocality fails open: a pod on another node is only slower.
// What a call needs is in memory: Datasets, namespaces, nodes and memberships in informers, snapshots
// pulled by digest in the background (Holdings). A call makes no request to anybody.
//
// # Rules
//
// A patch is made of the operations themselves, never by comparing two encodings of a pod, so that fields
// that this program's Kubernetes types do not know survive. Patching a patched pod changes nothing.
//
// Concurrency: handlers are safe for concurrent use and keep no state but the two caches. Failure: a denial
// says what the author of the pod can do; what goes wrong in the background is logged and tried again, and
// costs locality only.
//
// It may import api/v1alpha1 and, for the placement of files, cache/catalog, cache/client, cache/ring,
// cache/source and cache/wire.
package webhook
