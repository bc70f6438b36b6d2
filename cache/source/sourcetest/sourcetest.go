// Package sourcetest is the conformance suite of source.Source: every implementation passes it, against
// a server that checks signatures, with fixtures put through the store's own API.
//
// It owns what the contract of package source means in practice. Concurrency: subtests of one Run may
// run at once. Failure: a subtest that does not apply to a store (a local folder has no network) is
// skipped and says why. It may import cache/source and test/bucket; only tests import it.
package sourcetest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stepcache/stepcache/cache/source"
)

// Fixture is one empty bucket, or folder, and how to reach it.
type Fixture struct {
	// Config opens the bucket. A store with a network has an Endpoint of the form http://host:port, and
	// credentials in CredentialsDir. The URL names the bucket without a prefix.
	Config source.Config
	// Open is the implementation's Open. The suite also calls it with changed copies of Config: another
	// bucket, other credentials, a proxy as the endpoint, anonymous.
	Open func(context.Context, source.Config) (source.Source, error)
	// Digest is what Stat and a whole Get of an object put in one request publish; None for no digest.
	Digest source.Algorithm
	// PutByHand, when set, overwrites key past the source (with another client where there is one), so
	// that the source cannot know.
	PutByHand func(t *testing.T, key string, content []byte)
	// Leftovers, when set, counts the parts or temporary files that unfinished puts left behind.
	Leftovers func(t *testing.T) int
	// Part is the size of the parts that Open's sources put large objects in; zero means 16 MiB. Small ones
	// make the suite quick.
	Part int
	// NoKey, when set, says why the server cannot hold a key (a folder has no "a//b"), which then is not
	// tried; empty means it can.
	NoKey func(key string) string
}

// Run runs the suite. open is called once a subtest and gives it a bucket of its own, cleaned up by t.
func Run(t *testing.T, open func(t *testing.T) Fixture) {
	for _, c := range []struct {
		name string
		test func(*testing.T, *suite)
	}{
		{"PutStatGet", testPutStatGet},
		{"AwkwardSizes", testAwkwardSizes},
		{"OddKeys", testOddKeys},
		{"Digest", testDigest},
		{"Missing", testMissing},
		{"DeleteIsIdempotent", testDeleteIsIdempotent},
		{"ChangedUnderReader", testChangedUnderReader},
		{"Canceled", testCanceled},
		{"List", testList},
		{"ListEmpty", testListEmpty},
		{"PutStreams", testPutStreams},
		{"FailedPutLeavesNothing", testFailedPutLeavesNothing},
		{"NoBucket", testNoBucket},
		{"WrongCredentials", testWrongCredentials},
		{"MissingCredentials", testMissingCredentials},
		{"Authority", testAuthority},
		{"OneRequestARead", testOneRequestARead},
		{"StoreFaults", testStoreFaults},
		{"TruncatedBody", testTruncatedBody},
		{"AnswerToAnotherQuestion", testAnswerToAnotherQuestion},
		{"FlippedBitShowsInDigest", testFlippedBitShowsInDigest},
		{"StallEndsWithContext", testStallEndsWithContext},
		{"RetryThroughFaults", testRetryThroughFaults},
		{"PutThroughFaults", testPutThroughFaults},
		{"PlainStoreNamedWithoutHTTP", testPlainStoreNamedWithoutHTTP},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := open(t)
			s, err := f.Open(t.Context(), f.Config)
			if err != nil {
				t.Fatalf("open %s: %v", f.Config.URL, err)
			}
			c.test(t, &suite{Fixture: f, src: s})
		})
	}
}

// suite is one subtest's bucket, opened.
type suite struct {
	Fixture
	src source.Source
}

// content is n bytes that differ from those of any other seed and do not repeat.
func content(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24)})
	_, _ = r.Read(b) // never fails
	return b
}

func name(s source.Source, key string) string { return fmt.Sprintf("%s/%q", s.URL(), key) }
