package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// DataLoad warms a Dataset: its workers fetch the bytes that they own before steps ask for them.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:shortName=dload,categories=stepcache
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Dataset",type=string,JSONPath=`.spec.datasetRef.name`
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="Loaded %",type=integer,JSONPath=`.status.progress.percent`
// +kubebuilder:printcolumn:name="Until",type=string,JSONPath=`.status.progress.estimatedCompletion`,description="When it should be done",priority=1
// +kubebuilder:printcolumn:name="Failed files",type=integer,JSONPath=`.status.failedFiles`,priority=1
// +kubebuilder:printcolumn:name="Schedule",type=string,JSONPath=`.spec.schedule`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="!has(self.spec.runAfter) || self.spec.runAfter.name != self.metadata.name",fieldPath=".spec.runAfter.name",message="a DataLoad cannot run after itself"
type DataLoad struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +required
	Spec DataLoadSpec `json:"spec"`
	// +optional
	Status DataLoadStatus `json:"status,omitzero"`
}

// DataLoadList is a list of DataLoads.
//
// +kubebuilder:object:root=true
type DataLoadList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []DataLoad `json:"items"`
}

// DataLoadSpec is what the user asks for. Like a Job's, it cannot change once it runs; of a scheduled
// load paths, copies and pin may, and apply from its next run.
//
// +kubebuilder:validation:XValidation:rule="!has(self.schedule) || !has(self.runAfter)",message="set schedule or runAfter, not both"
// +kubebuilder:validation:XValidation:rule="has(self.schedule) == has(oldSelf.schedule)",message="a load that runs once cannot become a scheduled one, nor the reverse; create another DataLoad"
// +kubebuilder:validation:XValidation:rule="has(self.runAfter) == has(oldSelf.runAfter)",message="runAfter cannot be added or removed; create another DataLoad"
// +kubebuilder:validation:XValidation:rule="has(self.schedule) || (has(self.paths) == has(oldSelf.paths) && (!has(self.paths) || self.paths == oldSelf.paths) && has(self.copies) == has(oldSelf.copies) && (!has(self.copies) || self.copies == oldSelf.copies) && self.pin == oldSelf.pin)",message="paths, copies and pin of a load that runs once cannot change; create another DataLoad"
type DataLoadSpec struct {
	// DatasetRef names the Dataset, in the same namespace. It cannot change.
	//
	// +required
	// +kubebuilder:validation:XValidation:rule="self.name == oldSelf.name",message="datasetRef cannot change; create another DataLoad"
	DatasetRef Reference `json:"datasetRef"`

	// Paths are patterns of files to load, matched against the path in the Dataset: * and ? stay within
	// a folder, ** crosses folders, and [a-z] and {a,b} are understood: /shards, /ref/**/*.fa. A pattern
	// that matches a folder loads all in it. Braces stand for no more than 256 patterns, of all their
	// combinations. Absent: everything.
	//
	// +optional
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	Paths []PathPattern `json:"paths,omitempty"`

	// Copies is how many workers hold each block that this load fetches. Absent: the Dataset's
	// workers.copies.
	//
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=16
	Copies *int32 `json:"copies,omitempty"`

	// Pin keeps the loaded data from eviction until the DataLoad is deleted.
	//
	// +optional
	// +default=false
	Pin bool `json:"pin,omitempty"`

	// Schedule repeats the load: minute, hour, day of the month, month and day of the week as in
	// crontab(5), in UTC, or @hourly, @daily, @weekly, @monthly, @yearly. Absent: it runs once.
	//
	// +optional
	Schedule Schedule `json:"schedule,omitempty"`

	// RunAfter names another DataLoad of the namespace that must complete first. It cannot change.
	//
	// +optional
	// +kubebuilder:validation:XValidation:rule="self.name == oldSelf.name",message="runAfter cannot change; create another DataLoad"
	RunAfter *Reference `json:"runAfter,omitempty"`

	// TTLSecondsAfterFinished deletes the DataLoad, and with it its pins, so long after it completed or
	// failed, and once every other that runs after it has begun. A scheduled load never finishes. Absent: it
	// is kept.
	//
	// +optional
	// +kubebuilder:validation:Minimum=0
	TTLSecondsAfterFinished *int32 `json:"ttlSecondsAfterFinished,omitempty"`
}

// Reference names an object of the same namespace.
type Reference struct {
	// +required
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')",message="must be the name of an object: lower-case letters, digits, '-' and '.'"
	Name string `json:"name"`
}

// PathPattern is a pattern of paths in a Dataset.
//
// +kubebuilder:validation:MaxLength=512
// +kubebuilder:validation:XValidation:rule="self.startsWith('/') && !self.matches('//|/[.][.]?(/|$)|[[:cntrl:]]')",message="a pattern begins with / and has no empty, . or .. folder in it, such as /shards/**"
// +kubebuilder:validation:XValidation:rule="!self.matches('[^/{,][*][*]|[*][*][^/},]')",message="** crosses folders only as a folder's whole name: write /shards/**/*.fa, not /shards/**.fa"
// +kubebuilder:validation:XValidation:rule=`self.matches('^([^]\\\\{}[]|[\\\\].|[[][!^]?(([^]\\\\^!-]|[\\\\].)(-([^]\\\\^!-]|[\\\\].))?)+[]]|[{]([^]\\\\{}[]|[\\\\].|[[][!^]?(([^]\\\\^!-]|[\\\\].)(-([^]\\\\^!-]|[\\\\].))?)+[]])*[}])*$')`,message="a bracket or brace of the pattern is not closed, or braces are nested; a literal one has a backslash before it"
type PathPattern string

// Schedule is a crontab expression.
//
// +kubebuilder:validation:MaxLength=128
// +kubebuilder:validation:XValidation:rule="self.matches('^(@(hourly|daily|midnight|weekly|monthly|yearly|annually)|[^ @]+( [^ ]+){4})$')",message="schedule must be five fields with single spaces between, minute hour day-of-month month day-of-week, such as '0 3 * * *', or @hourly, @daily, @weekly, @monthly or @yearly"
// +kubebuilder:validation:XValidation:rule="!self.matches('^[^ @]+( [^ ]+){4}$') || self.matches('^(([*]|[0-5]?[0-9](-[0-5]?[0-9])?)(/[1-9][0-9]?)?)(,(([*]|[0-5]?[0-9](-[0-5]?[0-9])?)(/[1-9][0-9]?)?))* (([*]|([01]?[0-9]|2[0-3])(-([01]?[0-9]|2[0-3]))?)(/[1-9][0-9]?)?)(,(([*]|([01]?[0-9]|2[0-3])(-([01]?[0-9]|2[0-3]))?)(/[1-9][0-9]?)?))* (([*]|(0?[1-9]|[12][0-9]|3[01])(-(0?[1-9]|[12][0-9]|3[01]))?)(/[1-9][0-9]?)?)(,(([*]|(0?[1-9]|[12][0-9]|3[01])(-(0?[1-9]|[12][0-9]|3[01]))?)(/[1-9][0-9]?)?))* (([*]|(0?[1-9]|1[0-2])(-(0?[1-9]|1[0-2]))?|(?i:JAN|FEB|MAR|APR|MAY|JUN|JUL|AUG|SEP|OCT|NOV|DEC)(-(?i:JAN|FEB|MAR|APR|MAY|JUN|JUL|AUG|SEP|OCT|NOV|DEC))?)(/[1-9][0-9]?)?)(,(([*]|(0?[1-9]|1[0-2])(-(0?[1-9]|1[0-2]))?|(?i:JAN|FEB|MAR|APR|MAY|JUN|JUL|AUG|SEP|OCT|NOV|DEC)(-(?i:JAN|FEB|MAR|APR|MAY|JUN|JUL|AUG|SEP|OCT|NOV|DEC))?)(/[1-9][0-9]?)?))* (([*]|0?[0-6](-0?[0-6])?|(?i:SUN|MON|TUE|WED|THU|FRI|SAT)(-(?i:SUN|MON|TUE|WED|THU|FRI|SAT))?)(/[1-9][0-9]?)?)(,(([*]|0?[0-6](-0?[0-6])?|(?i:SUN|MON|TUE|WED|THU|FRI|SAT)(-(?i:SUN|MON|TUE|WED|THU|FRI|SAT))?)(/[1-9][0-9]?)?))*$')",message="a field of schedule is not understood: minute 0-59, hour 0-23, day of the month 1-31, month 1-12 or JAN-DEC, day of the week 0-6 or SUN-SAT; each a number, a range 1-5, a list 1,3 or *, with a step such as */15"
// +kubebuilder:validation:XValidation:rule="self.findAll('[0-9]{1,2}-[0-9]{1,2}').all(r, int(r.split('-')[0]) <= int(r.split('-')[1]))",message="a range of schedule ends before it begins"
// +kubebuilder:validation:XValidation:rule="self.upperAscii().findAll('[A-Z]{3}-[A-Z]{3}').all(r, 'SUN MON TUE WED THU FRI SAT JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC'.indexOf(r.substring(0, 3)) <= 'SUN MON TUE WED THU FRI SAT JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC'.indexOf(r.substring(4, 7)))",message="a range of schedule ends before it begins; the week begins with SUN"
type Schedule string
