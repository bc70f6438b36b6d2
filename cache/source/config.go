package source

// Config says how to reach one bucket, or the part of one below a prefix. It is what a Dataset's mount
// becomes once its Secret is resolved to a folder of files; scheme.Open turns it into a Source.
type Config struct {
	// URL is s3://bucket/prefix/, oss://bucket/prefix/, file:///folder, or dataset://namespace/name/folder, which
	// is no store and which scheme.Open does not open. The prefix is optional; keys of
	// the Source stay full keys, and Prefix(URL) is what a listing starts from.
	URL string `json:"url"`
	// Endpoint is the store's host[:port], with http:// in front for a plain connection. Empty means the
	// provider's own for the region.
	Endpoint string `json:"endpoint,omitempty"`
	// Region signs requests. Empty: derived from a known endpoint, or asked of the store.
	Region string `json:"region,omitempty"`
	// Addressing is how requests of S3 name the bucket. Empty: as is known of the endpoint.
	Addressing Addressing `json:"addressingStyle,omitempty"`
	// CredentialsDir is a folder with the files accessKeyID, accessKeySecret and optionally sessionToken and
	// ca.crt (a mounted Secret). It is read again when the files change, so that a rotation needs no restart.
	// Empty: the environment, then the platform's ambient chain where Ambient is set.
	CredentialsDir string `json:"credentialsDir,omitempty"`
	// CredentialKeys maps accessKeyID, accessKeySecret and sessionToken to other file names.
	CredentialKeys map[string]string `json:"credentialKeys,omitempty"`
	// Ambient allows the platform's own credentials (instance or pod identity).
	Ambient bool `json:"ambient,omitempty"`
	// Anonymous sends unsigned requests (public buckets).
	Anonymous bool `json:"anonymous,omitempty"`
	// AllowUnversioned accepts objects without ETag and version id; they are bound by size and time.
	AllowUnversioned bool `json:"allowUnversioned,omitempty"`
	// MaxRequests bounds the requests under way at once; zero means 64.
	MaxRequests int `json:"maxRequests,omitempty"`
	// BytesPerSecond bounds what is read from the bucket; zero means no bound.
	BytesPerSecond int64 `json:"bytesPerSecond,omitempty"`
}

// Addressing is where a request names the bucket.
type Addressing string

// In the path, or in the host.
const (
	AddressingPath    Addressing = "Path"
	AddressingVirtual Addressing = "Virtual"
)
