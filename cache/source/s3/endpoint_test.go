package s3

import (
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/source"
)

// Requests go to Amazon's endpoint as it is written: a network may lead to no other, as one does that has an interface
// endpoint of its own for S3.
func TestAmazonEndpoints(t *testing.T) {
	t.Setenv("AWS_ACCESS_KEY_ID", "AKID")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	for endpoint, want := range map[string]string{
		"":                           "name.s3.eu-west-3.amazonaws.com",
		"s3.eu-west-3.amazonaws.com": "name.s3.eu-west-3.amazonaws.com",
		"https://s3.dualstack.eu-west-3.amazonaws.com":                "name.s3.dualstack.eu-west-3.amazonaws.com",
		"https://bucket.vpce-0a1b-2c.s3.eu-west-3.vpce.amazonaws.com": "name.bucket.vpce-0a1b-2c.s3.eu-west-3.vpce.amazonaws.com",
	} {
		b, err := Open(t.Context(), source.Config{URL: "s3://name", Endpoint: endpoint, Region: "eu-west-3"})
		if err != nil {
			t.Fatal(err)
		}
		u, err := b.core.Presign(t.Context(), "GET", b.name, "key", time.Minute, nil)
		if err != nil {
			t.Fatal(err)
		}
		if u.Host != want {
			t.Errorf("endpoint %q: asked %s, want %s", endpoint, u.Host, want)
		}
	}
}
