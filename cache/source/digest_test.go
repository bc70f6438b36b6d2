package source_test

import (
	"encoding/hex"
	"testing"

	"github.com/stepcache/stepcache/cache/source"
)

// The check values of "123456789" (the catalogue of parametrised CRC algorithms; RFC 1321 and FIPS 180
// for the others) say that each algorithm and its byte order are what stores publish.
func TestDigestAlgorithms(t *testing.T) {
	for a, want := range map[source.Algorithm]string{
		source.MD5:       "25f9e794323b453885f5181f1b624d0b",
		source.CRC64ECMA: "995dc9bbdf1939fa",
		source.CRC32C:    "e3069283",
		source.CRC64NVME: "ae8b14860a799888",
		source.CRC32:     "cbf43926",
		source.SHA256:    "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225",
	} {
		h := a.New()
		h.Write([]byte("123456789"))
		if got := hex.EncodeToString(h.Sum(nil)); got != want {
			t.Errorf("%v: got %s, want %s", a, got, want)
		}
	}
	if source.None.New() != nil {
		t.Error("None has a hash")
	}
}
