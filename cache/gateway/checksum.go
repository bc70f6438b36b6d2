package gateway

import (
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"hash"
	"hash/crc32"
	"net/http"
	"slices"
	"strings"

	"github.com/minio/crc64nvme"
)

// checksums are the x-amz-checksum-* headers that S3 knows.
var checksums = []struct {
	name   string
	header string
	new    func() hash.Hash
}{
	{"CRC32", "X-Amz-Checksum-Crc32", func() hash.Hash { return crc32.NewIEEE() }},
	{"CRC32C", "X-Amz-Checksum-Crc32c", func() hash.Hash { return crc32.New(crc32.MakeTable(crc32.Castagnoli)) }},
	{"CRC64NVME", "X-Amz-Checksum-Crc64nvme", func() hash.Hash { return crc64nvme.New() }},
	{"SHA1", "X-Amz-Checksum-Sha1", sha1.New},
	{"SHA256", "X-Amz-Checksum-Sha256", sha256.New},
	{"SHA512", "X-Amz-Checksum-Sha512", sha512.New},
	{"MD5", "X-Amz-Checksum-Md5", md5.New},
}

// check is a digest that a body must have. want is empty until it is known: a trailer's comes last.
type check struct {
	name   string
	header string
	hash   hash.Hash
	want   []byte
	failed *Failure
}

func (c *check) holds() error {
	if got := c.hash.Sum(nil); !slices.Equal(got, c.want) {
		return c.failed
	}
	return nil
}

// newCheck is nil for a name that is no checksum's.
func newCheck(header string) *check {
	for _, c := range checksums {
		if strings.EqualFold(c.header, header) {
			return &check{name: c.name, header: c.header, hash: c.new(), failed: failure(http.StatusBadRequest, "BadDigest", "The %s you specified did not match the calculated checksum.", c.name)}
		}
	}
	return nil
}

// set takes a value as it stands in a header or trailer.
func (c *check) set(value string) error {
	sum, err := base64.StdEncoding.DecodeString(strings.TrimSpace(value))
	if err != nil || len(sum) != c.hash.Size() {
		return failure(http.StatusBadRequest, "InvalidRequest", "Value for %s header is invalid.", strings.ToLower(c.header))
	}
	c.want = sum
	return nil
}

// headerChecksum is the checksum that a request's headers give; nil without one. One that cannot be checked
// is refused: the client would believe that it was.
func headerChecksum(h http.Header) (*check, error) {
	var found *check
	for name, values := range h {
		switch name {
		case "X-Amz-Checksum-Algorithm", "X-Amz-Checksum-Type", "X-Amz-Checksum-Mode":
			continue
		}
		if !strings.HasPrefix(name, "X-Amz-Checksum-") {
			continue
		}
		c := newCheck(name)
		switch {
		case c == nil:
			return nil, notImplemented(strings.ToLower(name))
		case found != nil || len(values) > 1:
			return nil, failure(http.StatusBadRequest, "InvalidRequest", "Expecting a single x-amz-checksum- header. Multiple checksum Types are not allowed.")
		}
		if err := c.set(values[0]); err != nil {
			return nil, err
		}
		found = c
	}
	return found, nil
}

func encodeSum(sum []byte) string { return base64.StdEncoding.EncodeToString(sum) }
