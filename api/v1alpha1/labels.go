package v1alpha1

import corev1 "k8s.io/api/core/v1"

// What the parts of an installation call each other's objects: the controller makes them, the CSI driver,
// the webhook and the manifests of an installation refer to them. Nothing of it is for users to type but
// the labels and annotations that say so.

// Labels of the objects that the controller makes, and of pods.
const (
	// LabelDataset is on every object of a Dataset; its value is the Dataset's name.
	LabelDataset = Group + "/dataset"
	// LabelUID is beside it on every object in the Dataset's namespace, and on its volume; its value is the
	// Dataset's UID, which says that the object is not somebody else's, nor of another Dataset of that name.
	LabelUID = Group + "/dataset-uid"
	// LabelSharedFrom is on the copies of a Dataset's Secrets in other namespaces; its value is the
	// Dataset's namespace. LabelDataset is beside it.
	LabelSharedFrom = Group + "/shared-from"
	// LabelComponent says what a pod or object is: one of the Component values.
	LabelComponent = Group + "/component"
	// LabelReader is on every pod that reads from workers over the network by itself (sidecar, stage),
	// with value "true": the workers' NetworkPolicy lets such pods in, from the Dataset's own namespace and
	// those it is shared with. The webhook sets it.
	LabelReader = Group + "/reader"
	// LabelNodeReady is on nodes with a serving node service, which sets it, with value "true", and on nodes that are
	// without, with value "false": the controller's word. Without either value nothing is known yet, as of a new node.
	LabelNodeReady = Group + "/node-ready"
	// LabelWatched is on namespaces that have a Dataset with replaces or locality, with value "true": there
	// the webhook also looks at workflow pods that do not carry LabelInject, and pods with a label of Fluid are
	// refused while it is away.
	LabelWatched = Group + "/watched"
	// LabelMonitoring is set by users, with value "true", on the namespace of whoever collects metrics: the
	// workers' NetworkPolicy lets its pods in.
	LabelMonitoring = Group + "/monitoring"
	// LabelInject is set by users on pods that want their data: auto, csi, sidecar or stage.
	LabelInject = Group + "/inject"
)

// NodesForPods is what nodes must be like to take pods with the driver's volumes: the volumes of Datasets, workers
// with a store and pods with inline volumes have affinity to it, as one term, since autoscalers may look at one only
// (Karpenter before v1.12 at the first of a volume).
//
// A node that nobody has labelled is among them, so that an autoscaler adds one. What else the DaemonSets of config/node
// exclude is left to the label: of a key that it does not know Karpenter makes a label with a number for a value on the
// nodes that it adds (LabelNodeReady has one until the node service is there), and before v1.9 it adds no node at all
// for one of kubernetes.io other than os and its like.
func NodesForPods() []corev1.NodeSelectorRequirement {
	return []corev1.NodeSelectorRequirement{
		{Key: corev1.LabelOSStable, Operator: corev1.NodeSelectorOpIn, Values: []string{"linux"}},
		{Key: LabelNodeReady, Operator: corev1.NodeSelectorOpNotIn, Values: []string{"false"}},
	}
}

// Values of LabelComponent.
const (
	ComponentWorker     = "worker"
	ComponentController = "controller"
	ComponentNode       = "node"
	ComponentKeeper     = "keeper"
	ComponentWebhook    = "webhook"
)

// Annotations.
const (
	// AnnotationMounts is set by users on pods: NAME=/path, or NAMESPACE/NAME=/path, with commas between.
	AnnotationMounts = Group + "/mounts"
	// AnnotationRotateKeys is set by users on a Dataset. A value that was not there before makes new keys;
	// the old ones are accepted until the value changes again or the annotation is removed.
	AnnotationRotateKeys = Group + "/rotate-keys"
	// AnnotationRotated, on the keys' Secret, is the value of AnnotationRotateKeys that it was made for.
	AnnotationRotated = Group + "/rotated"
	// AnnotationRollout is set by users on a Dataset. A new value moves its workers to the image of the
	// installed version, one at a time; without it an upgrade leaves running workers and their memory alone, which
	// readers of the new version can use unless its protocol is another (config/README.md, "Upgrading").
	AnnotationRollout = Group + "/rollout"
	// AnnotationRefresh is set by users on a Dataset. A value that was not there before has the bucket listed once more,
	// whatever spec.refresh says; status.refreshed is the value once that is done.
	AnnotationRefresh = Group + "/refresh"
	// AnnotationAcceptLoss is set by users on a Dataset with write policy Back whose change or deletion waits for
	// the bucket. Its value is the metadata.generation at which writes that the bucket does not have may be lost;
	// it means nothing after the next change.
	AnnotationAcceptLoss = Group + "/accept-loss"
)

// Finalizer keeps a Dataset until no pod uses it, and a DataLoad until its pins are gone.
const Finalizer = Group + "/in-use"

// DriverName is the CSI driver's.
const DriverName = "csi." + Group

// Attributes of the driver's volumes.
const (
	// AttributeVolume says what an inline volume is: one of the Volume values. Absent: VolumeDataset.
	AttributeVolume = "volume"
	// AttributeDataset and AttributeNamespace name the Dataset.
	AttributeDataset   = "dataset"
	AttributeNamespace = "namespace"
	// AttributeSize is the size of a store in bytes, as a decimal number.
	AttributeSize = "size"
	// AttributeCopies and AttributeNodeMemory are the Dataset's workers.copies and node.memory, the latter in
	// bytes. A Dataset's volume has them; where its reader Secret has values of these names, those count, since
	// a PersistentVolume cannot be changed.
	AttributeCopies     = "copies"
	AttributeNodeMemory = "nodeMemory"
)

// Values of AttributeVolume.
const (
	// VolumeDataset shows the files of a Dataset.
	VolumeDataset = "dataset"
	// VolumeStore is memory for a worker: a tmpfs of AttributeSize bytes.
	VolumeStore = "store"
	// VolumeSocket is a folder that a worker and the node service of its node share, for the worker's
	// socket; on the node it is NodeSocketDir of the pod.
	VolumeSocket = "socket"
	// VolumeLent shows the files of a Dataset that a container of the pod serves, and VolumeLender is the folder
	// of the socket, LenderSocketName, over which it gets the mounts of its pod that it serves.
	VolumeLent   = "lent"
	VolumeLender = "lender"
)

// Ports of a worker.
const (
	PortData    = 7070 // block protocol
	PortControl = 7071 // HTTP: health, metrics, control
	PortGateway = 9000 // S3, with access ReadWrite
)

// Keys of the ConfigMap TierName: what tier.Open reads.
const (
	KeyMembership = "membership.json"
	KeyTier       = "tier.json"
)

// Keys of the Secrets KeysName (all three) and ReaderName (KeyRead only): wire.LoadKeys reads them.
const (
	KeyRead    = "read"
	KeyWrite   = "write"
	KeyControl = "control"
)

// Keys of the Secret S3Name, besides endpoint, bucket and region: a pair of access keys that reads and writes,
// and one that only reads.
const (
	KeyAccessKeyID             = "accessKeyID"
	KeySecretAccessKey         = "secretAccessKey"
	KeyReadOnlyAccessKeyID     = "readOnlyAccessKeyID"
	KeyReadOnlySecretAccessKey = "readOnlySecretAccessKey"
)

// WorkersName names a Dataset's StatefulSet, headless Service, worker configuration, PodDisruptionBudget
// and NetworkPolicy.
func WorkersName(dataset string) string { return dataset + "-worker" }

// TierName names the ConfigMap that readers and workers mount: who the workers are.
func TierName(dataset string) string { return dataset + "-tier" }

// KeysName names the Secret with all keys of a Dataset; only its workers and the controller read it.
func KeysName(dataset string) string { return dataset + "-keys" }

// ReaderName names the Secret with the read key alone, for readers in pods and on nodes.
func ReaderName(dataset string) string { return dataset + "-reader" }

// SharedReaderName names the copy of a Dataset's reader Secret in a namespace that it is shared with; inline
// volumes of pods there refer to it. A dot keeps it apart from the names of that namespace's own Datasets.
func SharedReaderName(namespace, dataset string) string { return namespace + "." + dataset + "-reader" }

// S3Name names what clients of a Dataset with access ReadWrite find its S3 endpoint by: the Service, the Secret
// with access keys, and the ConfigMap with an artifact repository for Argo, whose one entry has the Dataset's
// name.
func S3Name(dataset string) string { return dataset + "-s3" }

// SharedS3Name names the Secret that clients in a namespace that a Dataset with access ReadWrite is shared with
// find its S3 endpoint by: that of S3Name, with the keys that only read as its KeyAccessKeyID and
// KeySecretAccessKey, and no others.
func SharedS3Name(namespace, dataset string) string { return namespace + "." + dataset + "-s3" }

// ClaimName names a Dataset's claim.
func ClaimName(dataset string) string { return dataset }

// VolumeName names a Dataset's PersistentVolume. Neither part can hold a dot, so that no two Datasets share
// one.
func VolumeName(namespace, dataset string) string { return "stepcache." + namespace + "." + dataset }

// VolumeHandle is the id of a Dataset's volume for the driver.
func VolumeHandle(namespace, dataset string) string { return namespace + "/" + dataset }

// NodeSocketDir is the folder on the node that a VolumeSocket of the pod shows. It is short: a Unix socket's
// path holds 107 bytes.
func NodeSocketDir(podUID string) string { return "/run/stepcache/workers/" + podUID }

// SocketName is the worker's socket in its VolumeSocket.
const SocketName = "worker.sock"

// LenderSocketName is the node service's socket in a VolumeLender.
const LenderSocketName = "node.sock"
