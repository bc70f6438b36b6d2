package oss

import (
	"errors"
	"strings"
	"testing"

	"github.com/stepcache/stepcache/cache/source"
)

func TestEndpoints(t *testing.T) {
	for _, c := range []struct {
		endpoint, region string
		want             endpoint
		url              string
	}{
		{"oss-cn-shanghai-internal.aliyuncs.com", "", endpoint{"oss-cn-shanghai-internal.aliyuncs.com", true, "cn-shanghai", false, true}, "oss://genomes"},
		{"oss-cn-shanghai.aliyuncs.com", "cn-shanghai", endpoint{"oss-cn-shanghai.aliyuncs.com", true, "cn-shanghai", false, true}, "oss://genomes"},
		{"http://oss-ap-southeast-1-internal.aliyuncs.com", "", endpoint{"oss-ap-southeast-1-internal.aliyuncs.com", false, "ap-southeast-1", false, true}, "oss://genomes"},
		{"https://OSS-cn-Shanghai.aliyuncs.com/", "", endpoint{"oss-cn-shanghai.aliyuncs.com", true, "cn-shanghai", false, true}, "oss://genomes"},
		{"oss-cn-shanghai-finance-1-internal.aliyuncs.com", "", endpoint{"oss-cn-shanghai-finance-1-internal.aliyuncs.com", true, "cn-shanghai-finance-1", false, true}, "oss://genomes"},
		{"vpc100-oss-cn-hangzhou.aliyuncs.com", "", endpoint{"vpc100-oss-cn-hangzhou.aliyuncs.com", true, "cn-hangzhou", false, true}, "oss://genomes"},
		{"cn-hangzhou.oss.aliyuncs.com", "", endpoint{"cn-hangzhou.oss.aliyuncs.com", true, "cn-hangzhou", false, true}, "oss://genomes"},
		{"genomes.oss-cn-shanghai.aliyuncs.com", "", endpoint{"oss-cn-shanghai.aliyuncs.com", true, "cn-shanghai", false, true}, "oss://genomes"},
		{"oss-accelerate.aliyuncs.com", "cn-shanghai", endpoint{"oss-accelerate.aliyuncs.com", true, "cn-shanghai", false, true}, "oss://genomes"},
		{"oss-accelerate-overseas.aliyuncs.com", "ap-southeast-1", endpoint{"oss-accelerate-overseas.aliyuncs.com", true, "ap-southeast-1", false, true}, "oss://genomes"},
		{"", "cn-beijing", endpoint{"oss-cn-beijing.aliyuncs.com", true, "cn-beijing", false, true}, "oss://genomes"},
		{"http://127.0.0.1:9000", "cn-test", endpoint{"127.0.0.1:9000", false, "cn-test", true, false}, "oss://127.0.0.1:9000/genomes"},
		{"http://[::1]:9000", "cn-test", endpoint{"[::1]:9000", false, "cn-test", true, false}, "oss://[::1]:9000/genomes"},
		{"http://localhost:9000", "cn-test", endpoint{"localhost:9000", false, "cn-test", true, false}, "oss://localhost:9000/genomes"},
		{"oss.example.com", "cn-private-1", endpoint{"oss.example.com", true, "cn-private-1", false, false}, "oss://oss.example.com/genomes"},
	} {
		b, err := Open(t.Context(), source.Config{URL: "oss://genomes/human/", Endpoint: c.endpoint, Region: c.region})
		if err != nil {
			t.Errorf("%s: %v", c.endpoint, err)
			continue
		}
		if b.endpoint != c.want || b.URL() != c.url {
			t.Errorf("%s: %+v %s, want %+v %s", c.endpoint, b.endpoint, b.URL(), c.want, c.url)
		}
	}
}

// TestBadSettings: what can never work is refused by Open, and the error says what to write instead.
func TestBadSettings(t *testing.T) {
	for _, c := range []struct {
		url, endpoint, region, says string
	}{
		{"oss://genomes", "", "", "set endpoint"},
		{"oss://genomes", "oss-accelerate.aliyuncs.com", "", "set region"},
		{"oss://genomes", "http://127.0.0.1:9000", "", "set region"},
		{"oss://genomes", "oss-cn-shanghai.aliyuncs.com", "cn-beijing", "of region cn-shanghai"},
		{"oss://genomes", "oss-cn-shanghai.aliyuncs.com", "oss-cn-shanghai", `write region "cn-shanghai"`},
		{"oss://genomes", "oss-cn-shanghai.aliyuncs.com", "cn-shanghai-internal", `write region "cn-shanghai"`},
		{"oss://genomes", "oss-cn-shanghai.aliyuncs.com", "Shanghai", "cn-shanghai"},
		{"oss://genomes", "s3.oss-cn-shanghai.aliyuncs.com", "", "write endpoint oss-cn-shanghai.aliyuncs.com"},
		{"oss://genomes", "other.oss-cn-shanghai.aliyuncs.com", "", "without the bucket's name"},
		{"oss://genomes", "oss-cn-shanghai.aliyuncs.com/genomes", "", "host[:port]"},
		{"oss://genomes", "ftp://oss-cn-shanghai.aliyuncs.com", "", "host[:port]"},
		{"oss://genomes", "id:secret@oss-cn-shanghai.aliyuncs.com", "", "host[:port]"},
		{"oss://Genomes", "oss-cn-shanghai.aliyuncs.com", "", "lowercase"},
		{"oss://g", "oss-cn-shanghai.aliyuncs.com", "", "len"},
		{"oss://", "oss-cn-shanghai.aliyuncs.com", "", "no bucket"},
		{"s3://genomes", "oss-cn-shanghai.aliyuncs.com", "", "oss://"},
	} {
		b, err := Open(t.Context(), source.Config{URL: c.url, Endpoint: c.endpoint, Region: c.region})
		if err == nil {
			t.Errorf("%+v was opened: %+v", c, b.endpoint)
			continue
		}
		if !errors.Is(err, source.ErrInvalid) || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "secret@") {
			t.Errorf("%+v: %v", c, err)
		}
	}
}
