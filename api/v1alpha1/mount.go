package v1alpha1

// Mount is one source of a Dataset and the path at which it appears.
//
// +kubebuilder:validation:XValidation:rule="self.source.startsWith('s3://') || self.source.startsWith('oss://') || !(has(self.endpoint) || has(self.region) || has(self.credentialsSecretRef) || (has(self.anonymous) && self.anonymous) || (has(self.ambient) && self.ambient) || (has(self.allowUnversioned) && self.allowUnversioned))",message="endpoint, region, credentialsSecretRef, anonymous, ambient and allowUnversioned are for s3:// and oss:// sources; remove them"
// +kubebuilder:validation:XValidation:rule="self.source.startsWith('s3://') || !has(self.addressingStyle)",message="addressingStyle is for s3:// sources; remove it"
// +kubebuilder:validation:XValidation:rule="!has(self.addressingStyle) || self.addressingStyle != 'Virtual' || !has(self.endpoint) || !self.endpoint.matches('^(https?://)?([[]|[0-9.]+(:|/|$))')",fieldPath=".addressingStyle",message="with Virtual the bucket's name comes before the endpoint's, and this endpoint is an address; write its name, or leave addressingStyle out"
// +kubebuilder:validation:XValidation:rule="(has(self.credentialsSecretRef) ? 1 : 0) + (has(self.anonymous) && self.anonymous ? 1 : 0) + (has(self.ambient) && self.ambient ? 1 : 0) <= 1",message="set at most one of credentialsSecretRef, anonymous and ambient"
// +kubebuilder:validation:XValidation:rule="!self.source.startsWith('oss://') || has(self.region) || has(self.endpoint)",message="an oss:// source needs an endpoint or a region, such as region: cn-shanghai"
// +kubebuilder:validation:XValidation:rule="!self.source.startsWith('oss://') || has(self.region) || !has(self.endpoint) || (self.endpoint.matches('[.]aliyuncs[.]com(:[0-9]+)?/?$') && !self.endpoint.contains('accelerate'))",fieldPath=".region",message="the region cannot be told from this endpoint, and requests to OSS are signed with it; set region, such as cn-shanghai"
// +kubebuilder:validation:XValidation:rule="!self.source.startsWith('oss://') || !has(self.region) || (self.region.matches('^[a-z]+(-[a-z0-9]+)+$') && !self.region.startsWith('oss-') && !self.region.endsWith('-internal'))",fieldPath=".region",message="the region of OSS is written without oss- and -internal, such as cn-shanghai"
// +kubebuilder:validation:XValidation:rule="!self.source.startsWith('oss://') || !has(self.region) || !has(self.endpoint) || !self.endpoint.matches('[.]aliyuncs[.]com(:[0-9]+)?/?$') || self.endpoint.contains('accelerate') || self.endpoint.contains(self.region)",fieldPath=".region",message="the endpoint is of another region; correct one of them, or leave the region out"
type Mount struct {
	// Source is s3://bucket/prefix/, oss://bucket/prefix/, dataset://namespace/name/folder, or in local
	// mode file:///folder. The prefix is a folder of keys (a slash is added where it has none) or the key
	// of one object, written as it is, without %-escapes.
	//
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=1100
	// +kubebuilder:validation:XValidation:rule="['s3://', 'oss://', 'dataset://', 'file://'].exists(s, self.startsWith(s))",message="source must begin with s3://, oss:// or dataset:// (or file:// in local mode)"
	// +kubebuilder:validation:XValidation:rule="!self.startsWith('s3://') || self.matches('^s3://[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9](/.*)?$')",message="an S3 source is s3://bucket/prefix/: a bucket's name has 3 to 63 letters, digits, '.', '-' and '_'; credentials and the endpoint's host do not belong in it"
	// +kubebuilder:validation:XValidation:rule="!self.startsWith('oss://') || self.matches('^oss://[a-z0-9][a-z0-9-]{1,61}[a-z0-9](/.*)?$')",message="an OSS source is oss://bucket/prefix/: a bucket's name has 3 to 63 lower-case letters, digits and '-'; credentials and the endpoint's host do not belong in it"
	// +kubebuilder:validation:XValidation:rule="!self.startsWith('dataset://') || self.matches('^dataset://[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?/[a-z]([-a-z0-9]{0,38}[a-z0-9])?(/[^/]+)*/?$')",message="a source in another Dataset is dataset://namespace/name, optionally with /folder"
	// +kubebuilder:validation:XValidation:rule="!self.startsWith('file://') || self.matches('^file://(/|(/[^/]+)+/?)$')",message="a local source is file:// and an absolute path: file:///data/genomes"
	// +kubebuilder:validation:XValidation:rule="!(self.startsWith('file://') || self.startsWith('dataset://')) || !self.matches('/[.][.]?(/|$)')",message="the path in a dataset:// or file:// source must not have . or .. in it"
	// +kubebuilder:validation:XValidation:rule="!self.matches('[[:cntrl:]]')",message="source must not have control characters"
	Source string `json:"source"`

	// Path is where the source appears in the Dataset: / for all of it, or /some/folder.
	//
	// +optional
	// +default="/"
	// +kubebuilder:validation:MaxLength=255
	// +kubebuilder:validation:XValidation:rule="self.matches('^(/|(/[^/[:cntrl:]]+)+)$')",message="path must be / or begin with / and not end with it, such as /reference/hg38"
	// +kubebuilder:validation:XValidation:rule="!self.matches('/[.][.]?(/|$)')",message="path must not have . or .. in it"
	Path string `json:"path,omitempty"`

	// Endpoint is the object store's host[:port], with http:// in front for a plain connection. Absent:
	// the provider's own for the region. A network with IPv6 only reaches Amazon's S3 at
	// s3.dualstack.REGION.amazonaws.com.
	//
	// +optional
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="self.matches('^(https?://)?([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|[[][0-9A-Fa-f:.]+[]])(:([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?/?$')",message="endpoint must be host or host:port with a port of 1 to 65535, optionally with http:// or https:// in front, and without a path"
	Endpoint string `json:"endpoint,omitempty"`

	// Region signs requests. Absent: derived from a known endpoint, or asked of the store.
	//
	// +optional
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:XValidation:rule="self.matches('^[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?$')",message="region must be a name such as cn-shanghai or us-east-1"
	Region string `json:"region,omitempty"`

	// AddressingStyle is how requests name the bucket of an s3:// source: in the path (https://host/bucket), or in
	// the host (https://bucket.host), which is all that some stores take: Volcengine TOS, Huawei OBS, Tencent COS. The
	// endpoint is without the bucket in either case. Absent or Auto: in the host at the endpoints of Amazon, Google and
	// Alibaba Cloud, else in the path.
	//
	// +optional
	AddressingStyle AddressingStyle `json:"addressingStyle,omitempty"`

	// CredentialsSecretRef names a Secret of the Dataset's namespace; only the workers see it. Its key
	// ca.crt, where it has one, holds the certificates (PEM) of authorities that the store's may be of,
	// beside the system's. In local mode the Secret may also come from the manifests' folder or from the
	// environment.
	//
	// +optional
	CredentialsSecretRef *CredentialsRef `json:"credentialsSecretRef,omitempty"`

	// Anonymous sends unsigned requests, for public buckets.
	//
	// +optional
	Anonymous bool `json:"anonymous,omitempty"`

	// Ambient takes the platform's own credentials, those of the workers' service account, which must
	// then be named in workers.template.
	//
	// +optional
	Ambient bool `json:"ambient,omitempty"`

	// AllowUnversioned accepts objects that the store gives neither an ETag nor a version; their bytes
	// are bound to size and time only, so that some changes cannot be seen.
	//
	// +optional
	AllowUnversioned bool `json:"allowUnversioned,omitempty"`
}

// AddressingStyle is Auto, Path or Virtual, as the tools of Amazon have it.
//
// +kubebuilder:validation:Enum=Auto;Path;Virtual
type AddressingStyle string

// Addressing styles.
const (
	AddressingAuto    AddressingStyle = "Auto"
	AddressingPath    AddressingStyle = "Path"
	AddressingVirtual AddressingStyle = "Virtual"
)

// CredentialsRef names a Secret with credentials of a bucket.
type CredentialsRef struct {
	// +required
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')",message="must be the name of a Secret: lower-case letters, digits, '-' and '.'"
	Name string `json:"name"`

	// Keys maps to other key names where the Secret does not have accessKeyID, accessKeySecret and
	// optionally sessionToken; one that is left out keeps its name.
	//
	// +optional
	Keys *CredentialKeys `json:"keys,omitempty"`
}

// CredentialKeys are the keys of a Secret that hold credentials.
type CredentialKeys struct {
	// +optional
	AccessKeyID SecretKey `json:"accessKeyID,omitempty"`
	// +optional
	AccessKeySecret SecretKey `json:"accessKeySecret,omitempty"`
	// SessionToken is the key of a temporary credential's token; the Secret need not have it.
	//
	// +optional
	SessionToken SecretKey `json:"sessionToken,omitempty"`
}

// SecretKey is a key of a Secret.
//
// +kubebuilder:validation:MaxLength=253
// +kubebuilder:validation:XValidation:rule="self.matches('^[-._a-zA-Z0-9]+$') && self != '.' && !self.startsWith('..')",message="must be a key of a Secret: letters, digits, '-', '_' and '.'"
type SecretKey string
