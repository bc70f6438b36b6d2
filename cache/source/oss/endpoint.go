package oss

import (
	"errors"
	"fmt"
	"net"
	"regexp"
	"strings"

	"github.com/stepcache/stepcache/cache/source"
)

// endpoint is where a bucket is reached and for which region requests are signed.
type endpoint struct {
	host      string // host[:port]
	secure    bool
	region    string
	pathStyle bool // http://host/bucket/key instead of http://bucket.host/key
	provider  bool // Alibaba Cloud's own, where a bucket's name is enough to know it
}

func (e endpoint) address() string {
	if e.secure {
		return "https://" + e.host
	}
	return "http://" + e.host
}

const providerDomain = ".aliyuncs.com"

var (
	// oss-cn-shanghai, oss-cn-shanghai-internal, vpc100-oss-cn-shanghai
	regional = regexp.MustCompile(`^(?:vpc100-)?oss-([a-z]+(?:-[a-z0-9]+)+?)(?:-internal)?\.aliyuncs\.com$`)
	// cn-shanghai.oss, cn-shanghai-internal.oss: reached over IPv4 and IPv6
	dualStack = regexp.MustCompile(`^([a-z]+(?:-[a-z0-9]+)+?)(?:-internal)?\.oss\.aliyuncs\.com$`)
	// A region's name is what remains of an endpoint's: people often write more.
	regionName = regexp.MustCompile(`^[a-z]+(?:-[a-z0-9]+)+$`)
)

// locate finds out the endpoint of a config's bucket.
func locate(config source.Config, bucket string) (endpoint, error) {
	bad := func(err error, hint string) (endpoint, error) {
		return endpoint{}, invalid(config.URL, err, hint)
	}
	region := config.Region
	if region != "" {
		if short := strings.TrimSuffix(strings.TrimPrefix(region, "oss-"), "-internal"); short != region {
			return bad(fmt.Errorf("region %q is an endpoint's name", region), fmt.Sprintf("write region %q", short))
		}
		if !regionName.MatchString(region) {
			return bad(fmt.Errorf("region %q is not a region's name", region), "write it as in cn-shanghai")
		}
	}
	if config.Endpoint == "" {
		if region == "" {
			return bad(errors.New("neither endpoint nor region"), "set endpoint, for example oss-cn-shanghai-internal.aliyuncs.com")
		}
		return endpoint{host: "oss-" + region + providerDomain, secure: true, region: region, provider: true}, nil
	}
	host, secure, err := source.Endpoint(config.Endpoint)
	if err != nil {
		return endpoint{}, err
	}
	host = strings.ToLower(host)
	e := endpoint{host: host, secure: secure, region: region}
	name, port, err := net.SplitHostPort(host)
	if err != nil {
		name, port = host, ""
	}
	ip := net.ParseIP(strings.Trim(name, "[]"))
	e.pathStyle = ip != nil || name == "localhost"
	e.provider = strings.HasSuffix(name, providerDomain)
	if e.provider {
		// The console shows a bucket's own address beside its endpoint, and the former gets copied.
		if bare, ok := strings.CutPrefix(name, bucket+"."); ok {
			name = bare
			e.host = bare
			if port != "" {
				e.host = net.JoinHostPort(bare, port)
			}
		}
		if strings.HasPrefix(name, "s3.") {
			return bad(fmt.Errorf("endpoint %s speaks the S3 protocol", name),
				fmt.Sprintf("write endpoint %s, or use an s3:// URL", strings.TrimPrefix(name, "s3.")))
		}
		derived := ""
		switch {
		case strings.HasPrefix(name, "oss-accelerate"): // any region's buckets
		case regional.MatchString(name):
			derived = regional.FindStringSubmatch(name)[1]
		case dualStack.MatchString(name):
			derived = dualStack.FindStringSubmatch(name)[1]
		default:
			return bad(fmt.Errorf("endpoint %s is not one of OSS", name),
				"write it as in oss-cn-shanghai.aliyuncs.com or oss-cn-shanghai-internal.aliyuncs.com, without the bucket's name")
		}
		if region != "" && derived != "" && region != derived {
			return bad(fmt.Errorf("endpoint %s is of region %s, not %s", name, derived, region), "correct one of them; the region may be left out")
		}
		if e.region == "" {
			e.region = derived
		}
	}
	if e.region == "" {
		return bad(fmt.Errorf("the region cannot be told from endpoint %s, and requests are signed for one", name),
			"set region to the bucket's, for example cn-shanghai")
	}
	return e, nil
}
