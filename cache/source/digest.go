package source

import (
	"crypto/md5"
	"crypto/sha256"
	"hash"
	"hash/crc32"
	"hash/crc64"

	"github.com/minio/crc64nvme"
)

// New returns a hash whose Sum is what Digest.Sum holds for the algorithm; nil for None.
func (a Algorithm) New() hash.Hash {
	switch a {
	case MD5:
		return md5.New()
	case CRC64ECMA:
		return crc64.New(crc64.MakeTable(crc64.ECMA))
	case CRC32C:
		return crc32.New(crc32.MakeTable(crc32.Castagnoli))
	case CRC64NVME:
		return crc64nvme.New()
	case CRC32:
		return crc32.NewIEEE()
	case SHA256:
		return sha256.New()
	default:
		return nil
	}
}

// String is the algorithm's usual name; empty for None.
func (a Algorithm) String() string {
	return [...]string{None: "", MD5: "MD5", CRC64ECMA: "CRC64 ECMA", CRC32C: "CRC32C", CRC64NVME: "CRC64 NVME", CRC32: "CRC32", SHA256: "SHA-256"}[a]
}
