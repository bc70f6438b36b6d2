package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Dataset declares what data to cache and the tier of memory that caches it.
//
// Each Dataset gives a set of workers, a claim of the Dataset's own name that pods mount, and, with
// access ReadWrite, an S3 endpoint.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:shortName=dset,categories=stepcache
// +kubebuilder:subresource:status
// +kubebuilder:subresource:scale:specpath=.spec.workers.replicas,statuspath=.status.workers.replicas,selectorpath=.status.workers.selector
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="Bytes",type=string,JSONPath=`.status.size`,description="Size of the data"
// +kubebuilder:printcolumn:name="Cached %",type=integer,JSONPath=`.status.cachedPercentage`,description="What the workers hold, of former listings and in further copies too, as a share of the data"
// +kubebuilder:printcolumn:name="Workers",type=integer,JSONPath=`.spec.workers.replicas`
// +kubebuilder:printcolumn:name="Ready",type=integer,JSONPath=`.status.workers.ready`,description="Workers that serve"
// +kubebuilder:printcolumn:name="Files",type=integer,JSONPath=`.status.files`,priority=1
// +kubebuilder:printcolumn:name="Hit ratio",type=string,JSONPath=`.status.hitRatio`,priority=1
// +kubebuilder:printcolumn:name="Unflushed",type=integer,JSONPath=`.status.unflushed.bytes`,priority=1,description="Bytes that the bucket does not have yet"
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="oldSelf.hasValue() || self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 40",optionalOldSelf=true,fieldPath=".metadata",message="the name of a Dataset also names its workers, Service and claim: at most 40 lower-case letters, digits and '-', beginning with a letter and not ending with '-'"
// +kubebuilder:validation:XValidation:rule="oldSelf.hasValue() || self.spec.access != 'ReadWrite' || (size(self.metadata.name) >= 3 && !self.metadata.name.matches('^(xn--|sthree-|amzn-s3-demo-)|(-s3alias|--[a-z]+-s3)$'))",optionalOldSelf=true,fieldPath=".metadata",message="the name of a Dataset with access: ReadWrite is also the name of its bucket: at least 3 characters, not beginning with xn--, sthree- or amzn-s3-demo-, and not ending with -s3alias or one like --x-s3, which clients of S3 take for other things than buckets"
// +kubebuilder:validation:XValidation:rule="!has(self.spec.replaces) || !self.spec.replaces.exists(r, r.claimName == self.metadata.name)",fieldPath=".spec.replaces",message="a Dataset cannot replace the claim of its own name; pods that use that claim already mount this Dataset"
type Dataset struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +required
	Spec DatasetSpec `json:"spec"`
	// +optional
	Status DatasetStatus `json:"status,omitzero"`
}

// DatasetList is a list of Datasets.
//
// +kubebuilder:object:root=true
type DatasetList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Dataset `json:"items"`
}

// DatasetSpec is what the user asks for.
//
// +kubebuilder:validation:XValidation:rule="self.write.policy != 'Back' || self.access == 'ReadWrite'",fieldPath=".write.policy",message="write policy Back needs access: ReadWrite; a ReadOnly Dataset takes no writes"
// +kubebuilder:validation:XValidation:rule="self.write.policy != 'Back' || self.workers.copies >= 2",fieldPath=".write.policy",message="write policy Back acknowledges a write before the bucket has it, so it needs workers.copies of at least 2"
// +kubebuilder:validation:XValidation:rule="!self.write.exclusive || self.access == 'ReadWrite'",fieldPath=".write.exclusive",message="write.exclusive needs access: ReadWrite; remove it or change access"
// +kubebuilder:validation:XValidation:rule="self.refresh.policy == 'Never' || self.access != 'ReadWrite'",fieldPath=".refresh.policy",message="a ReadWrite Dataset has no snapshot to refresh: its listing is always the bucket's; set refresh.policy to Never"
// +kubebuilder:validation:XValidation:rule="self.access != 'ReadWrite' || !self.mounts.exists(m, m.source.startsWith('dataset://'))",fieldPath=".mounts",message="access: ReadWrite cannot write into another Dataset; mount its bucket (s3:// or oss://) instead of dataset://"
// +kubebuilder:validation:XValidation:rule="!self.mounts.exists(m, has(m.ambient) && m.ambient) || (has(self.workers.template) && has(self.workers.template.spec) && has(self.workers.template.spec.serviceAccountName))",fieldPath=".mounts",message="a mount with ambient: true needs workers.template.spec.serviceAccountName, the service account whose platform identity the workers take"
type DatasetSpec struct {
	// Mounts say where the data comes from and where it appears. The paths of two mounts must not
	// overlap. Mounts may be added; a mount's path and source cannot change afterwards, since pods may be
	// reading them.
	//
	// +required
	// +listType=map
	// +listMapKey=path
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=32
	// +kubebuilder:validation:XValidation:rule="self.all(a, self.all(b, a.path == b.path || (a.path != '/' && !b.path.startsWith(a.path + '/'))))",message="the paths of mounts must not overlap: none may lie below another, and / leaves no room for a second mount"
	// +kubebuilder:validation:XValidation:rule="oldSelf.all(o, self.exists(n, n.path == o.path && n.source == o.source))",message="the path and source of a mount cannot change and a mount cannot be removed, since pods may be reading it; add a mount, or create another Dataset"
	Mounts []Mount `json:"mounts"`

	// Workers are the tier: pods that hold the cached bytes in memory.
	//
	// +required
	Workers Workers `json:"workers"`

	// Node limits what one node's service may hold of this Dataset in its own memory.
	//
	// +optional
	Node *NodeCache `json:"node,omitempty"`

	// Access is ReadOnly for input data, or ReadWrite where the tier accepts puts (artifacts). It cannot
	// change.
	//
	// +optional
	// +default="ReadOnly"
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="access cannot change; create another Dataset"
	Access Access `json:"access,omitempty"`

	// ShareWith lists the other namespaces whose pods and Datasets may read this one. A namespace that is taken out loses
	// its copy of the read key; what was kept of that key is good until the keys are changed, and the former ones ended.
	//
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=256
	ShareWith []Namespace `json:"shareWith,omitempty"`

	// Write says when a write counts as done; it matters with access ReadWrite only.
	//
	// +optional
	// +default={"policy":"Through","exclusive":false}
	Write Write `json:"write,omitzero"`

	// Refresh says when the bucket is listed again.
	//
	// +optional
	// +default={"policy":"Never"}
	Refresh Refresh `json:"refresh,omitzero"`

	// Locality says how pods are drawn to the nodes that hold their data. Prefer has the scheduler prefer the nodes
	// that hold most of what a pod seems to read. Require also keeps pods on nodes that have a worker of this Dataset when
	// they are made, up to 256 nodes; pods that no such node has room for wait. None leaves pods alone.
	//
	// +optional
	// +default="Prefer"
	Locality Locality `json:"locality,omitempty"`

	// Replaces lists claims that workflow pods of this namespace already use; they are given this
	// Dataset's claim instead, with no change to the workflow, as long as the Dataset is Ready or Degraded.
	//
	// +optional
	// +listType=map
	// +listMapKey=claimName
	// +kubebuilder:validation:MaxItems=64
	Replaces []Replaced `json:"replaces,omitempty"`
}

// Namespace is the name of a namespace.
//
// +kubebuilder:validation:MaxLength=63
// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",message="must be the name of a namespace: lower-case letters, digits and '-', at most 63"
type Namespace string

// Access is what pods may do with a Dataset.
//
// +kubebuilder:validation:Enum=ReadOnly;ReadWrite
type Access string

// Kinds of access.
const (
	ReadOnly  Access = "ReadOnly"
	ReadWrite Access = "ReadWrite"
)

// Locality is how strongly pods are drawn to their data.
//
// +kubebuilder:validation:Enum=Prefer;Require;None
type Locality string

// Kinds of locality. Prefer adds preferred node affinity, Require adds required, None adds nothing.
const (
	LocalityPrefer  Locality = "Prefer"
	LocalityRequire Locality = "Require"
	LocalityNone    Locality = "None"
)

// Workers describes the worker pods.
//
// +kubebuilder:validation:XValidation:rule="self.copies <= self.replicas",fieldPath=".copies",message="copies must not exceed replicas: each copy is on a worker of its own"
type Workers struct {
	// Replicas is the number of workers; kubectl scale and autoscalers set it.
	//
	// +optional
	// +default=1
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000
	Replicas int32 `json:"replicas,omitempty"`

	// Memory is what each worker may fill with cached data, such as 12Gi. The pod's memory request and
	// limit follow from it. One worker holds all of a file up to 1 GiB, and larger files are spread: give each more
	// than the largest file up to that has.
	//
	// +required
	// +kubebuilder:validation:XValidation:rule="string(self).matches('^[^eE]{1,32}([eE]([-+]?[0-9]{1,2}|i)?)?$')",message="must be a quantity such as 12Gi or 500Mi, of at most 32 digits, with a whole exponent of at most two"
	// +kubebuilder:validation:XValidation:rule="!string(self).matches('^[^eE]{1,32}([eE]([-+]?[0-9]{1,2}|i)?)?$') || !isQuantity(string(self)) || quantity(string(self)).compareTo(quantity('16Mi')) >= 0",message="memory of a worker must be at least 16Mi, four blocks"
	// +kubebuilder:validation:XValidation:rule="!string(self).matches('^[^eE]{1,32}([eE]([-+]?[0-9]{1,2}|i)?)?$') || !isQuantity(string(self)) || quantity(string(self)).compareTo(quantity('64Ti')) <= 0",message="memory of a worker must be at most 64Ti"
	Memory resource.Quantity `json:"memory"`

	// CPU is what each worker asks of its node, 250m where it is absent. On a node whose CPUs are all busy it is what
	// the worker gets, and a worker serves about 1 GB/s with one.
	//
	// +optional
	// +kubebuilder:validation:XValidation:rule="string(self).matches('^[^eE]{1,32}([eE]([-+]?[0-9]{1,2}|i)?)?$')",message="must be a quantity such as 250m or 2, of at most 32 digits, with a whole exponent of at most two"
	// +kubebuilder:validation:XValidation:rule="!string(self).matches('^[^eE]{1,32}([eE]([-+]?[0-9]{1,2}|i)?)?$') || !isQuantity(string(self)) || quantity(string(self)).compareTo(quantity('10m')) >= 0",message="cpu of a worker must be at least 10m"
	// +kubebuilder:validation:XValidation:rule="!string(self).matches('^[^eE]{1,32}([eE]([-+]?[0-9]{1,2}|i)?)?$') || !isQuantity(string(self)) || quantity(string(self)).compareTo(quantity('1k')) <= 0",message="cpu of a worker must be at most 1k"
	CPU *resource.Quantity `json:"cpu,omitempty"`

	// CPULimit bounds what each worker takes of CPUs that nobody else wants, for namespaces whose quota has limits.cpu. It
	// costs speed: where it is absent, which is best, nothing does. A worker asks for no more than this.
	//
	// +optional
	// +kubebuilder:validation:XValidation:rule="string(self).matches('^[^eE]{1,32}([eE]([-+]?[0-9]{1,2}|i)?)?$')",message="must be a quantity such as 250m or 2, of at most 32 digits, with a whole exponent of at most two"
	// +kubebuilder:validation:XValidation:rule="!string(self).matches('^[^eE]{1,32}([eE]([-+]?[0-9]{1,2}|i)?)?$') || !isQuantity(string(self)) || quantity(string(self)).compareTo(quantity('10m')) >= 0",message="cpuLimit of a worker must be at least 10m"
	// +kubebuilder:validation:XValidation:rule="!string(self).matches('^[^eE]{1,32}([eE]([-+]?[0-9]{1,2}|i)?)?$') || !isQuantity(string(self)) || quantity(string(self)).compareTo(quantity('1k')) <= 0",message="cpuLimit of a worker must be at most 1k"
	CPULimit *resource.Quantity `json:"cpuLimit,omitempty"`

	// Copies is how many workers hold each block, on distinct nodes where there are enough.
	//
	// +optional
	// +default=1
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=16
	Copies int32 `json:"copies,omitempty"`

	// Template adds to the worker pods what a user may choose of them, and nothing else.
	//
	// +optional
	Template *WorkerTemplate `json:"template,omitempty"`
}

// WorkerTemplate is the part of the worker pods that a user may choose.
type WorkerTemplate struct {
	// +optional
	Metadata WorkerMetadata `json:"metadata,omitzero"`
	// +optional
	Spec WorkerPod `json:"spec,omitzero"`
}

// WorkerMetadata adds labels and annotations to the worker pods.
type WorkerMetadata struct {
	// +optional
	// +kubebuilder:validation:MaxProperties=64
	// +kubebuilder:validation:XValidation:rule="!self.exists(k, k.startsWith('data.stepcache.dev/'))",message="labels under data.stepcache.dev/ are the controller's own"
	Labels map[string]LabelValue `json:"labels,omitempty"`
	// +optional
	// +kubebuilder:validation:MaxProperties=64
	// +kubebuilder:validation:XValidation:rule="!self.exists(k, k.startsWith('data.stepcache.dev/'))",message="annotations under data.stepcache.dev/ are the controller's own"
	Annotations map[string]string `json:"annotations,omitempty"`
}

// LabelValue is the value of a label.
//
// +kubebuilder:validation:MaxLength=63
// +kubebuilder:validation:XValidation:rule="self.matches('^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$')",message="the value of a label is at most 63 letters, digits, '-', '_' and '.', beginning and ending with a letter or digit"
type LabelValue string

// WorkerPod is an allow-list of a pod's spec: a Dataset's author places the workers and names their
// identity, and cannot give them other rights.
type WorkerPod struct {
	// +optional
	// +kubebuilder:validation:MaxProperties=64
	NodeSelector map[string]string `json:"nodeSelector,omitempty"`
	// +optional
	Affinity *corev1.Affinity `json:"affinity,omitempty"`
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=64
	Tolerations []corev1.Toleration `json:"tolerations,omitempty"`
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	SchedulerName string `json:"schedulerName,omitempty"`
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	PriorityClassName string `json:"priorityClassName,omitempty"`
	// ServiceAccountName gives the workers an identity of the platform; no API token is mounted.
	//
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	ServiceAccountName string `json:"serviceAccountName,omitempty"`
	// ImagePullSecrets name Secrets of the Dataset's namespace with which nodes pull the workers' image.
	//
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=16
	ImagePullSecrets []corev1.LocalObjectReference `json:"imagePullSecrets,omitempty"`
}

// NodeCache limits a node's own share of the cache.
type NodeCache struct {
	// Memory is the cap for this Dataset within the node service's one install-time budget, which is
	// also what applies when it is absent; 0 streams everything.
	//
	// +optional
	// +kubebuilder:validation:XValidation:rule="string(self).matches('^[^eE]{1,32}([eE]([-+]?[0-9]{1,2}|i)?)?$')",message="must be a quantity such as 12Gi or 500Mi, of at most 32 digits, with a whole exponent of at most two"
	// +kubebuilder:validation:XValidation:rule="!string(self).matches('^[^eE]{1,32}([eE]([-+]?[0-9]{1,2}|i)?)?$') || !isQuantity(string(self)) || quantity(string(self)).compareTo(quantity('0')) >= 0",message="memory of a node must not be negative; 0 streams everything"
	// +kubebuilder:validation:XValidation:rule="!string(self).matches('^[^eE]{1,32}([eE]([-+]?[0-9]{1,2}|i)?)?$') || !isQuantity(string(self)) || quantity(string(self)).compareTo(quantity('64Ti')) <= 0",message="memory of a node must be at most 64Ti"
	Memory *resource.Quantity `json:"memory,omitempty"`
}

// Write says when a write counts as done.
type Write struct {
	// Policy is Through: the bucket has the bytes before the write is acknowledged; or Back: as many
	// workers as workers.copies, at least 2, have them, and the bucket follows. With Back every worker stands
	// on a node of its own; deleting the Dataset, taking a worker away and replacing one wait for the bucket.
	//
	// +optional
	// +default="Through"
	Policy WritePolicy `json:"policy,omitempty"`

	// Exclusive promises that nothing writes below these prefixes but this Dataset, so that the tier
	// need not ask the bucket whether an object changed.
	//
	// +optional
	// +default=false
	Exclusive bool `json:"exclusive,omitempty"`
}

// WritePolicy is Through or Back.
//
// +kubebuilder:validation:Enum=Through;Back
type WritePolicy string

// Write policies.
const (
	WriteThrough WritePolicy = "Through"
	WriteBack    WritePolicy = "Back"
)

// Refresh says when the bucket is listed again. A running pod never sees its files change: the new
// listing is for pods that start afterwards.
//
// +kubebuilder:validation:XValidation:rule="self.policy != 'Interval' || has(self.interval)",message="refresh policy Interval needs an interval such as 1h"
// +kubebuilder:validation:XValidation:rule="self.policy == 'Interval' || !has(self.interval)",message="refresh.interval has no effect with policy Never; set policy: Interval or remove it"
type Refresh struct {
	// Policy is Never or Interval.
	//
	// +optional
	// +default="Never"
	Policy RefreshPolicy `json:"policy,omitempty"`

	// Interval is the time between two listings, such as 30m or 24h; at least 10s.
	//
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=16
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,6}h)?([0-9]{1,6}m)?([0-9]{1,6}s)?$') && self != '' && duration(self) >= duration('10s')",message="interval must be a duration of at least 10s in hours, minutes and seconds, such as 30m, 24h or 1h30m"
	Interval *metav1.Duration `json:"interval,omitempty"`
}

// RefreshPolicy is Never or Interval.
//
// +kubebuilder:validation:Enum=Never;Interval
type RefreshPolicy string

// Refresh policies.
const (
	RefreshNever    RefreshPolicy = "Never"
	RefreshInterval RefreshPolicy = "Interval"
)

// Replaced is a claim that pods already use.
type Replaced struct {
	// ClaimName is the name of a PersistentVolumeClaim of the Dataset's namespace.
	//
	// +required
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')",message="must be the name of a claim: lower-case letters, digits, '-' and '.'"
	ClaimName string `json:"claimName"`
}
