package s3

import (
	"encoding/base64"
	"encoding/hex"
	"strconv"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/source"
)

// timePrefix starts the version of an object without an ETag, which is its time of modification in
// seconds (all that every answer tells); the size is part of an object's identity anyway. No ETag of a
// known store looks so.
const timePrefix = "mtime="

func timeVersion(t time.Time) string { return timePrefix + strconv.FormatInt(t.Unix(), 10) }

// version is what binds later reads to the object that was answered.
func (b *Bucket) version(op, key string, o minio.ObjectInfo) (string, error) {
	if o.ETag != "" {
		return o.ETag, nil
	}
	if b.unversioned && !o.LastModified.IsZero() {
		return timeVersion(o.LastModified), nil
	}
	return "", &source.Error{Op: op, Name: b.object(key), Kind: source.ErrUnversioned,
		Hint: "the store gives it no ETag; copy it through the S3 API, or set allowUnversioned to bind it by size and time"}
}

// digest is the whole-object digest that came with an answer. Checksums are used only when the answer
// is about the whole object, since for a range some stores send that of a part; the cheapest that cannot
// be mistaken wins. An ETag is the MD5 of an object put in one part, unless a customer's key encrypts it.
func digest(o minio.ObjectInfo, whole bool) source.Digest {
	single := len(o.ETag) == 32 && !strings.Contains(o.ETag, "-")
	if whole && (o.ChecksumMode == "FULL_OBJECT" || o.ChecksumMode == "" && single) {
		for _, c := range []struct {
			algorithm source.Algorithm
			value     string
			size      int
		}{
			{source.CRC64NVME, o.ChecksumCRC64NVME, 8}, {source.CRC32C, o.ChecksumCRC32C, 4},
			{source.CRC32, o.ChecksumCRC32, 4}, {source.SHA256, o.ChecksumSHA256, 32},
		} {
			if sum, err := base64.StdEncoding.DecodeString(c.value); err == nil && len(sum) == c.size {
				return source.Digest{Algorithm: c.algorithm, Sum: sum}
			}
		}
	}
	h := o.Headers
	if !single || strings.HasPrefix(h.Get("x-amz-server-side-encryption"), "aws:kms") ||
		h.Get("x-amz-server-side-encryption-customer-algorithm") != "" {
		return source.Digest{}
	}
	sum, err := hex.DecodeString(o.ETag)
	if err != nil {
		return source.Digest{}
	}
	return source.Digest{Algorithm: source.MD5, Sum: sum}
}
