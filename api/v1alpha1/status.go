package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Conditions of a Dataset, in the order in which they come true.
const (
	// ConditionSourced: the workers reach every source with the credentials they have, and have listed it.
	ConditionSourced = "Sourced"
	// ConditionWorkersReady: every worker serves, with what the spec asks for now.
	ConditionWorkersReady = "WorkersReady"
	// ConditionVolumeReady: the claim can be mounted.
	ConditionVolumeReady = "VolumeReady"
	// ConditionReady sums up the others.
	ConditionReady = "Ready"
	// ConditionFlushed: the bucket has all that was acknowledged. Only a Dataset with write policy Back has it,
	// and Ready does not depend on it.
	ConditionFlushed = "Flushed"
	// ConditionShared: pods of every namespace in spec.shareWith can mount the Dataset. Only a Dataset that is
	// shared has it, and Ready does not depend on it.
	ConditionShared = "Shared"
)

// ReasonNameTaken: an object of somebody else has a name that the Dataset needs. Where VolumeReady has it, pods with a
// claim of the Dataset's name are not the Dataset's.
const ReasonNameTaken = "NameTaken"

// Conditions of a DataLoad.
const (
	ConditionComplete = "Complete"
	ConditionFailed   = "Failed"
)

// DatasetPhase sums up a Dataset for people; programs read conditions.
//
// +kubebuilder:validation:Enum=Pending;Ready;Degraded;Failed;Deleting
type DatasetPhase string

// Phases of a Dataset.
const (
	// DatasetPending: not readable yet.
	DatasetPending DatasetPhase = "Pending"
	// DatasetReady: readable, all workers serve, with what the spec asks for now.
	DatasetReady DatasetPhase = "Ready"
	// DatasetDegraded: readable, but a worker is missing or not updated yet, or a source does not answer.
	DatasetDegraded DatasetPhase = "Degraded"
	// DatasetFailed: cannot become readable without a change by the user.
	DatasetFailed DatasetPhase = "Failed"
	// DatasetDeleting: waits for the pods that use it.
	DatasetDeleting DatasetPhase = "Deleting"
)

// DatasetStatus is what the controller, or the local mode, saw last.
type DatasetStatus struct {
	// ObservedGeneration is the generation of the spec that this status is about.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// +optional
	Phase DatasetPhase `json:"phase,omitempty"`
	// Conditions are Sourced, WorkersReady, VolumeReady, Ready and, with shareWith, Shared, with write policy
	// Back, Flushed.
	//
	// +optional
	// +listType=map
	// +listMapKey=type
	// +patchStrategy=merge
	// +patchMergeKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty" patchStrategy:"merge" patchMergeKey:"type"`

	// Snapshot is the hex digest of the current listing. With access ReadWrite there is none, and nothing that counts
	// what is in it.
	//
	// +optional
	Snapshot string `json:"snapshot,omitempty"`
	// SnapshotTime is when the bucket was listed for it.
	//
	// +optional
	SnapshotTime *metav1.Time `json:"snapshotTime,omitempty"`
	// Refreshed is the value of the annotation data.stepcache.dev/refresh that the bucket was listed for last.
	//
	// +optional
	Refreshed string `json:"refreshed,omitempty"`
	// Files and Bytes count what the snapshot shows.
	//
	// +optional
	Files int64 `json:"files,omitempty"`
	// +optional
	Bytes int64 `json:"bytes,omitempty"`
	// Size is Bytes for people, such as 812.5Gi.
	//
	// +optional
	Size string `json:"size,omitempty"`
	// Skipped counts the keys that cannot be shown as files, by reason.
	//
	// +optional
	// +listType=map
	// +listMapKey=reason
	// +kubebuilder:validation:MaxItems=16
	Skipped []Skipped `json:"skipped,omitempty"`

	// Cached is how many bytes the workers hold, divided by workers.copies, and, with access ReadOnly, at most Bytes. What they hold of former
	// listings, and the further copies of a DataLoad, count too.
	//
	// +optional
	Cached int64 `json:"cached,omitempty"`
	// CachedPercentage is Cached of Bytes, rounded down; none with access ReadWrite. 100 means all of it only where
	// nothing of a former listing and no further copies are held: that the data of now is there a DataLoad says.
	//
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100
	CachedPercentage int32 `json:"cachedPercentage,omitempty"`
	// HitRatio is the share of the bytes opened that did not have to come from the bucket, 0.00 to 1.00.
	//
	// +optional
	HitRatio string `json:"hitRatio,omitempty"`
	// Unflushed is what was acknowledged and is not in the bucket yet (write policy Back).
	//
	// +optional
	Unflushed Unflushed `json:"unflushed,omitzero"`
	// SharedWith are the other namespaces that have, or are about to have, a copy of the Secret with the read
	// key, and with access ReadWrite one of the S3 endpoint's keys that only read.
	//
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=512
	SharedWith []Namespace `json:"sharedWith,omitempty"`
	// Integrity counts what checksums found.
	//
	// +optional
	Integrity Integrity `json:"integrity,omitzero"`
	// Workers counts the worker pods.
	//
	// +optional
	Workers WorkersStatus `json:"workers,omitzero"`
}

// Unflushed is what was acknowledged and is not in the bucket yet: the sum of the workers' own figures, which
// may count an object twice and is never zero while anything is pending.
type Unflushed struct {
	// +optional
	Objects int64 `json:"objects,omitempty"`
	// +optional
	Bytes int64 `json:"bytes,omitempty"`
	// Oldest is when the first of them was put.
	//
	// +optional
	Oldest *metav1.Time `json:"oldest,omitempty"`
}

// Skipped is one reason for which keys cannot be shown.
type Skipped struct {
	// +required
	Reason string `json:"reason"`
	// +optional
	Count int64 `json:"count,omitempty"`
}

// Integrity counts what checksums found.
type Integrity struct {
	// Verified objects agree with the digest that the bucket publishes of them.
	//
	// +optional
	Verified int64 `json:"verified,omitempty"`
	// Unverified objects have no such digest, or are spread over workers, none of which has all that it is of: what the
	// bucket sent is what readers get.
	//
	// +optional
	Unverified int64 `json:"unverified,omitempty"`
	// Corrupt objects disagreed with it and were dropped.
	//
	// +optional
	Corrupt int64 `json:"corrupt,omitempty"`
	// Refetched blocks failed their checksum inside the tier and were fetched again.
	//
	// +optional
	Refetched int64 `json:"refetched,omitempty"`
}

// WorkersStatus counts the worker pods; the scale subresource reads it.
type WorkersStatus struct {
	// +optional
	Replicas int32 `json:"replicas,omitempty"`
	// +optional
	Ready int32 `json:"ready,omitempty"`
	// Selector finds the worker pods, in the form of a label selector's text.
	//
	// +optional
	Selector string `json:"selector,omitempty"`
}

// DataLoadPhase sums up a DataLoad for people.
//
// +kubebuilder:validation:Enum=Pending;Running;Complete;Failed
type DataLoadPhase string

// Phases of a DataLoad. Complete means that every byte asked for is held; a load that could not have
// all of them is Failed and says which files and why.
const (
	DataLoadPending  DataLoadPhase = "Pending"
	DataLoadRunning  DataLoadPhase = "Running"
	DataLoadComplete DataLoadPhase = "Complete"
	DataLoadFailed   DataLoadPhase = "Failed"
)

// DataLoadStatus is what the controller, or the local mode, saw last. Of a scheduled load it is about
// the current or last run.
type DataLoadStatus struct {
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// +optional
	Phase DataLoadPhase `json:"phase,omitempty"`
	// Conditions are Complete and Failed.
	//
	// +optional
	// +listType=map
	// +listMapKey=type
	// +patchStrategy=merge
	// +patchMergeKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty" patchStrategy:"merge" patchMergeKey:"type"`
	// Snapshot is the hex digest of the listing that is loaded.
	//
	// +optional
	Snapshot string `json:"snapshot,omitempty"`
	// Run is what the current or last run was told to load: an edit applies from the next run.
	//
	// +optional
	Run *Run `json:"run,omitempty"`
	// +optional
	Progress Progress `json:"progress,omitzero"`
	// Failures are the first of the files that could not be loaded; FailedFiles counts all.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=20
	Failures []Failure `json:"failures,omitempty"`
	// +optional
	FailedFiles int64 `json:"failedFiles,omitempty"`
	// +optional
	StartTime *metav1.Time `json:"startTime,omitempty"`
	// +optional
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`
	// NextScheduleTime is when a scheduled load runs next.
	//
	// +optional
	NextScheduleTime *metav1.Time `json:"nextScheduleTime,omitempty"`
}

// Run is what a run was told to load when it began.
type Run struct {
	// Paths are patterns of files; absent: everything.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=64
	Paths []string `json:"paths,omitempty"`
	// +optional
	Copies int32 `json:"copies,omitempty"`
	// +optional
	Pin bool `json:"pin,omitempty"`
}

// Progress of a load, the sum of the workers' own counters.
type Progress struct {
	// Bytes are held now, of TotalBytes, all copies counted.
	//
	// +optional
	Bytes int64 `json:"bytes,omitempty"`
	// +optional
	TotalBytes int64 `json:"totalBytes,omitempty"`
	// Percent is Bytes of TotalBytes, rounded down.
	//
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100
	Percent int32 `json:"percent,omitempty"`
	// +optional
	BytesPerSecond int64 `json:"bytesPerSecond,omitempty"`
	// +optional
	EstimatedCompletion *metav1.Time `json:"estimatedCompletion,omitempty"`
}

// Failure is one file that could not be loaded.
type Failure struct {
	// +required
	Path string `json:"path"`
	// +required
	Reason string `json:"reason"`
}
