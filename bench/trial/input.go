package trial

import "github.com/stepcache/stepcache/bench/access"

// Bucket is where the objects are.
type Bucket struct {
	Endpoint  string `json:"endpoint"` // a URL
	Region    string `json:"region"`
	Name      string `json:"name"`
	Prefix    string `json:"prefix,omitempty"` // with a slash at its end
	PathStyle bool   `json:"pathStyle"`
	AccessKey string `json:"accessKey"`
	SecretKey string `json:"secretKey"`
	Token     string `json:"token,omitempty"`

	// Sent and Requests count what has left the bucket; nil where nobody counts it.
	Sent     func() int64 `json:"-"`
	Requests func() int64 `json:"-"`
}

// Data is a dataset, or a part of one, that a section reads.
type Data struct {
	// Bucket holds it; nil: nothing can be read but what runs already.
	Bucket *Bucket
	// Native is a folder in memory with the same files.
	Native string
	// Files are what is read of it, by their paths below the bucket's prefix.
	Files []access.File
	// Entries is how many files and folders there are in all; zero: not known, and nothing is listed.
	Entries int64
	// Memory is what a cache of it needs, in bytes.
	Memory int64
	// Puts says that objects are put into the bucket, too.
	Puts bool
}

// Input is what the sections read; a nil one is left out.
type Input struct {
	// Large has one large file, Small many small ones, Tree a great many that are only listed.
	Large, Small, Tree *Data
	// Limited has one file behind a bucket with a bandwidth, which eight pods want; Steps one that a hundred do.
	Limited, Steps *Data
	// Artifacts are put and got.
	Artifacts *Artifacts
}
