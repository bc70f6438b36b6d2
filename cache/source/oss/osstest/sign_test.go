package osstest_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/xml"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	sdk2 "github.com/aliyun/alibabacloud-oss-go-sdk-v2/oss"
	"github.com/aliyun/alibabacloud-oss-go-sdk-v2/oss/credentials"
	"github.com/aliyun/alibabacloud-oss-go-sdk-v2/oss/retry"
	sdk1 "github.com/aliyun/aliyun-oss-go-sdk/oss"

	"github.com/stepcache/stepcache/cache/source/oss/osstest"
)

const (
	name   = "genomes"
	region = "cn-shanghai"
)

var (
	plain = osstest.Credential{AccessKeyID: "LTAIplain", AccessKeySecret: "first secret"}
	sts   = osstest.Credential{AccessKeyID: "STS.NUxyz", AccessKeySecret: "second secret", Token: "a+token/with=signs"}
)

// awkward are keys whose encoding differs between careless clients.
var awkward = []string{
	"plain", "a/b/c.txt", "space in it", "plus+sign", "percent%20", "100%", "q?a=b&c", "frag#ment", "new\nline",
	"/leading", "trailing/", "dots/../up", "a//b", "tilde~star*", "unicode-é-基因组-🧬", "quote\"and'", "semi;colon:comma,", "back\\slash",
	strings.Repeat("k", 1023),
}

func start(t *testing.T) *osstest.Server {
	s := osstest.StartT(t, osstest.Options{Region: region, Credentials: []osstest.Credential{plain, sts}})
	s.MakeBucket(name)
	return s
}

func bucket1(t *testing.T, s *osstest.Server, c osstest.Credential, options ...sdk1.ClientOption) *sdk1.Bucket {
	t.Helper()
	options = append([]sdk1.ClientOption{sdk1.AuthVersion(sdk1.AuthV4), sdk1.Region(region), sdk1.SecurityToken(c.Token)}, options...)
	client, err := sdk1.New(s.Endpoint(), c.AccessKeyID, c.AccessKeySecret, options...)
	if err != nil {
		t.Fatal(err)
	}
	b, err := client.Bucket(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func client2(s *osstest.Server, c osstest.Credential, change ...func(*sdk2.Config)) *sdk2.Client {
	config := sdk2.LoadDefaultConfig().WithRegion(region).WithEndpoint(s.Endpoint()).WithUsePathStyle(true).
		WithCredentialsProvider(credentials.NewStaticCredentialsProvider(c.AccessKeyID, c.AccessKeySecret, c.Token)).
		WithRetryer(retry.NopRetryer{})
	for _, f := range change {
		f(config)
	}
	return sdk2.NewClient(config)
}

// TestBothSDKsAreAccepted: two clients with independent signers write and read each other's objects, with
// every key, with a long-lived and a temporary credential.
func TestBothSDKsAreAccepted(t *testing.T) {
	s := start(t)
	for _, c := range []osstest.Credential{plain, sts} {
		one, two := bucket1(t, s, c), client2(s, c)
		for _, key := range awkward {
			content := []byte("content of " + key)
			if err := one.PutObject(key, bytes.NewReader(content)); err != nil {
				t.Fatalf("first SDK, put %q: %v", key, err)
			}
			got, err := two.GetObject(t.Context(), &sdk2.GetObjectRequest{Bucket: sdk2.Ptr(name), Key: sdk2.Ptr(key),
				Range: sdk2.Ptr("bytes=3-8"), RangeBehavior: sdk2.Ptr("standard")})
			if err != nil {
				t.Fatalf("second SDK, get %q: %v", key, err)
			}
			b, err := io.ReadAll(got.Body)
			got.Body.Close()
			if err != nil || string(b) != "tent o" {
				t.Errorf("second SDK, get %q: %q, %v", key, b, err)
			}
			if _, err := two.PutObject(t.Context(), &sdk2.PutObjectRequest{Bucket: sdk2.Ptr(name), Key: sdk2.Ptr(key),
				Body: strings.NewReader("second " + key), Metadata: map[string]string{"who": "two"}}); err != nil {
				t.Fatalf("second SDK, put %q: %v", key, err)
			}
			r, err := one.GetObject(key) // checks the CRC64 by itself
			if err != nil {
				t.Fatalf("first SDK, get %q: %v", key, err)
			}
			b, err = io.ReadAll(r)
			r.Close()
			if err != nil || string(b) != "second "+key {
				t.Errorf("first SDK, get %q: %q, %v", key, b, err)
			}
		}
		listBoth(t, one, two)
		multipartBoth(t, one, two)
	}
}

func listBoth(t *testing.T, one *sdk1.Bucket, two *sdk2.Client) {
	t.Helper()
	seen := map[string]int{}
	token := ""
	for {
		out, err := one.ListObjectsV2(sdk1.MaxKeys(3), sdk1.ContinuationToken(token))
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range out.Objects {
			seen[o.Key]++
		}
		if token = out.NextContinuationToken; !out.IsTruncated {
			break
		}
	}
	pages := two.NewListObjectsV2Paginator(&sdk2.ListObjectsV2Request{Bucket: sdk2.Ptr(name), MaxKeys: 3, EncodingType: sdk2.Ptr("url")})
	for pages.HasNext() {
		page, err := pages.NextPage(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range page.Contents {
			seen[sdk2.ToString(o.Key)]++
		}
	}
	for _, key := range awkward {
		if seen[key] != 2 {
			t.Errorf("key %q was listed %d times by two clients", key, seen[key])
		}
	}
	if len(seen) != len(awkward) {
		t.Errorf("%d keys listed, %d put", len(seen), len(awkward))
	}
}

func multipartBoth(t *testing.T, one *sdk1.Bucket, two *sdk2.Client) {
	t.Helper()
	const key = "in parts/two words"
	part := bytes.Repeat([]byte("0123456789"), 20<<10)
	up, err := one.InitiateMultipartUpload(key)
	if err != nil {
		t.Fatal(err)
	}
	var parts []sdk1.UploadPart
	for i := range 2 {
		p, err := one.UploadPart(up, bytes.NewReader(part), int64(len(part)), i+1)
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, p)
	}
	if _, err := one.CompleteMultipartUpload(up, parts); err != nil {
		t.Fatal(err)
	}
	up2, err := two.InitiateMultipartUpload(t.Context(), &sdk2.InitiateMultipartUploadRequest{Bucket: sdk2.Ptr(name), Key: sdk2.Ptr(key)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := two.AbortMultipartUpload(t.Context(), &sdk2.AbortMultipartUploadRequest{Bucket: sdk2.Ptr(name), Key: sdk2.Ptr(key),
		UploadId: up2.UploadId}); err != nil {
		t.Fatal(err)
	}
	head, err := two.HeadObject(t.Context(), &sdk2.HeadObjectRequest{Bucket: sdk2.Ptr(name), Key: sdk2.Ptr(key)})
	if err != nil || head.ContentLength != int64(2*len(part)) {
		t.Errorf("head: %+v, %v", head, err)
	}
	if _, err := two.DeleteObject(t.Context(), &sdk2.DeleteObjectRequest{Bucket: sdk2.Ptr(name), Key: sdk2.Ptr(key)}); err != nil {
		t.Fatal(err)
	}
}

// TestQuerySignatures: presigned URLs of both SDKs are accepted, with headers signed and a token.
func TestQuerySignatures(t *testing.T) {
	s := start(t)
	for _, c := range []osstest.Credential{plain, sts} {
		one, two := bucket1(t, s, c), client2(s, c)
		for _, key := range awkward {
			if _, err := s.Put(name, key, []byte(key)); err != nil {
				t.Fatal(err)
			}
			url1, err := one.SignURL(key, sdk1.HTTPGet, 60)
			if err != nil {
				t.Fatal(err)
			}
			signed, err := two.Presign(t.Context(), &sdk2.GetObjectRequest{Bucket: sdk2.Ptr(name), Key: sdk2.Ptr(key)})
			if err != nil {
				t.Fatal(err)
			}
			for who, url := range map[string]string{"first": url1, "second": signed.URL} {
				if status, body := get(t, url, nil); status != 200 || body != key {
					t.Errorf("%s SDK's URL of %q: %d %s", who, key, status, body)
				}
			}
		}
	}
}

func get(t *testing.T, url string, change func(*http.Request)) (int, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), "GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(r)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestTamperedQuery(t *testing.T) {
	s := start(t)
	for _, key := range []string{"object", "other"} {
		if _, err := s.Put(name, key, []byte(key)); err != nil {
			t.Fatal(err)
		}
	}
	url1, err := bucket1(t, s, sts).SignURL("object", sdk1.HTTPGet, 60)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := client2(s, sts).Presign(t.Context(), &sdk2.GetObjectRequest{Bucket: sdk2.Ptr(name), Key: sdk2.Ptr("object")})
	if err != nil {
		t.Fatal(err)
	}
	for who, url := range map[string]string{"first": url1, "second": signed.URL} {
		for what, c := range map[string]struct {
			change func(*http.Request)
			code   string
		}{
			"path":    {func(r *http.Request) { r.URL.Path, r.URL.RawPath = "/"+name+"/other", "" }, "SignatureDoesNotMatch"},
			"method":  {func(r *http.Request) { r.Method = "DELETE" }, "SignatureDoesNotMatch"},
			"query":   {func(r *http.Request) { r.URL.RawQuery += "&x-oss-process=image" }, "SignatureDoesNotMatch"},
			"expires": {func(r *http.Request) { r.URL.RawQuery = replace(t, r.URL.RawQuery, "x-oss-expires", "604800") }, "SignatureDoesNotMatch"},
			"token":   {func(r *http.Request) { r.URL.RawQuery = replace(t, r.URL.RawQuery, "x-oss-security-token", "another") }, "InvalidSecurityToken"},
			"header":  {func(r *http.Request) { r.Header.Set("x-oss-range-behavior", "standard") }, "SignatureDoesNotMatch"},
		} {
			status, body := get(t, url, c.change)
			if got := code(body); got != c.code {
				t.Errorf("%s SDK's URL with another %s: %d %q, want %s", who, what, status, got, c.code)
			}
		}
	}
}

// replace gives a query's parameter another value.
func replace(t *testing.T, query, name, value string) string {
	t.Helper()
	var out []string
	found := false
	for _, p := range strings.Split(query, "&") {
		if strings.HasPrefix(p, name+"=") {
			p, found = name+"="+value, true
		}
		out = append(out, p)
	}
	if !found {
		t.Fatalf("no %s in %s", name, query)
	}
	return strings.Join(out, "&")
}

func code(body string) string {
	var e struct {
		XMLName xml.Name `xml:"Error"`
		Code    string
	}
	if xml.Unmarshal([]byte(body), &e) != nil {
		return ""
	}
	return e.Code
}

// changing is a transport that changes requests after they were signed.
type changing func(*http.Request)

func (f changing) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	f(r)
	return http.DefaultTransport.RoundTrip(r)
}

// TestTamperedHeader: a request that is not what was signed is refused, with OSS's codes.
func TestTamperedHeader(t *testing.T) {
	s := start(t)
	for _, key := range []string{"object", "other"} {
		if _, err := s.Put(name, key, []byte(key)); err != nil {
			t.Fatal(err)
		}
	}
	cases := map[string]struct {
		change func(*http.Request)
		code   string
	}{
		"nothing": {func(*http.Request) {}, ""},
		"path": {func(r *http.Request) {
			r.URL.Path, r.URL.RawPath = "/"+name+"/other", ""
		}, "SignatureDoesNotMatch"},
		"method":           {func(r *http.Request) { r.Method = "DELETE" }, "SignatureDoesNotMatch"},
		"query added":      {func(r *http.Request) { r.URL.RawQuery = "x-oss-process=image" }, "SignatureDoesNotMatch"},
		"signed header":    {func(r *http.Request) { r.Header.Set("x-oss-range-behavior", "other") }, "SignatureDoesNotMatch"},
		"header added":     {func(r *http.Request) { r.Header.Set("x-oss-meta-a", "b") }, "SignatureDoesNotMatch"},
		"header removed":   {func(r *http.Request) { r.Header.Del("x-oss-range-behavior") }, "SignatureDoesNotMatch"},
		"content type":     {func(r *http.Request) { r.Header.Set("Content-Type", "text/x") }, "SignatureDoesNotMatch"},
		"token":            {func(r *http.Request) { r.Header.Set("x-oss-security-token", "another") }, "InvalidSecurityToken"},
		"no token":         {func(r *http.Request) { r.Header.Del("x-oss-security-token") }, "InvalidSecurityToken"},
		"signature":        {func(r *http.Request) { auth(r, "Signature=", "Signature=00") }, "SignatureDoesNotMatch"},
		"key id":           {func(r *http.Request) { auth(r, sts.AccessKeyID, "LTAIother") }, "InvalidAccessKeyId"},
		"another's key id": {func(r *http.Request) { auth(r, sts.AccessKeyID, plain.AccessKeyID) }, "InvalidSecurityToken"},
		"region":           {func(r *http.Request) { auth(r, "/"+region+"/", "/cn-beijing/") }, "InvalidArgument"},
		"product":          {func(r *http.Request) { auth(r, "/oss/", "/oss-cloudbox/") }, "InvalidArgument"},
		"payload":          {func(r *http.Request) { r.Header.Set("x-oss-content-sha256", "00") }, "InvalidArgument"},
		"scheme":           {func(r *http.Request) { auth(r, "OSS4-HMAC-SHA256 ", "OSS ") }, "AccessDenied"},
		"no signature":     {func(r *http.Request) { r.Header.Del("Authorization") }, "AccessDenied"},
		// The first SDK signs Date, the second x-oss-date and sends both.
		"no date": {func(r *http.Request) { r.Header.Del("Date"); r.Header.Del("x-oss-date") }, "AccessDenied"},
		"old date": {func(r *http.Request) {
			old := time.Now().Add(-20 * time.Minute).UTC()
			r.Header.Set("Date", old.Format(http.TimeFormat))
			if r.Header.Get("x-oss-date") != "" {
				r.Header.Set("x-oss-date", old.Format("20060102T150405Z"))
			}
		}, "RequestTimeTooSkewed"},
		"moved date": {func(r *http.Request) {
			r.Header.Set("Date", time.Now().Add(time.Minute).UTC().Format(http.TimeFormat))
			if r.Header.Get("x-oss-date") != "" {
				r.Header.Set("x-oss-date", time.Now().Add(time.Minute).UTC().Format("20060102T150405Z"))
			}
		}, "SignatureDoesNotMatch"},
	}
	for what, c := range cases {
		t.Run(what, func(t *testing.T) {
			httpClient := &http.Client{Transport: changing(c.change)}
			one := bucket1(t, s, sts, sdk1.HTTPClient(httpClient))
			if got := code1(do1(one, "object")); got != c.code {
				t.Errorf("first SDK: %q, want %q", got, c.code)
			}
			two := client2(s, sts, func(config *sdk2.Config) { config.WithHttpClient(httpClient) })
			if got := code2(do2(t.Context(), two, "object")); got != c.code {
				t.Errorf("second SDK: %q, want %q", got, c.code)
			}
		})
	}
	if _, ok := s.Object(name, "object"); !ok {
		t.Error("a refused request deleted the object")
	}
}

func auth(r *http.Request, old, new string) {
	a := r.Header.Get("Authorization")
	if !strings.Contains(a, old) {
		panic(a + " has no " + old)
	}
	r.Header.Set("Authorization", strings.Replace(a, old, new, 1))
}

func do1(b *sdk1.Bucket, key string) error {
	r, err := b.GetObject(key, sdk1.RangeBehavior("standard"), sdk1.Range(0, 2), sdk1.ContentType("text/plain"))
	if err == nil {
		r.Close()
	}
	return err
}

func do2(ctx context.Context, c *sdk2.Client, key string) error {
	request := &sdk2.GetObjectRequest{Bucket: sdk2.Ptr(name), Key: sdk2.Ptr(key),
		Range: sdk2.Ptr("bytes=0-2"), RangeBehavior: sdk2.Ptr("standard")}
	request.Headers = map[string]string{"Content-Type": "text/plain"}
	out, err := c.GetObject(ctx, request)
	if err == nil {
		out.Body.Close()
	}
	return err
}

func code1(err error) string {
	if err == nil {
		return ""
	}
	if e, ok := err.(sdk1.ServiceError); ok {
		return e.Code
	}
	return err.Error()
}

func code2(err error) string {
	if err == nil {
		return ""
	}
	var e *sdk2.ServiceError
	if errors.As(err, &e) {
		return e.Code
	}
	return err.Error()
}

// TestWrongSecretAndRegion: a client that signs with what it was given wrongly.
func TestWrongSecretAndRegion(t *testing.T) {
	s := start(t)
	if _, err := s.Put(name, "object", []byte("object")); err != nil {
		t.Fatal(err)
	}
	wrong := osstest.Credential{AccessKeyID: plain.AccessKeyID, AccessKeySecret: "another"}
	if got := code1(do1(bucket1(t, s, wrong), "object")); got != "SignatureDoesNotMatch" {
		t.Errorf("first SDK, wrong secret: %q", got)
	}
	if got := code2(do2(t.Context(), client2(s, wrong), "object")); got != "SignatureDoesNotMatch" {
		t.Errorf("second SDK, wrong secret: %q", got)
	}
	if got := code1(do1(bucket1(t, s, plain, sdk1.Region("cn-beijing")), "object")); got != "InvalidArgument" {
		t.Errorf("first SDK, wrong region: %q", got)
	}
	two := client2(s, plain, func(c *sdk2.Config) { c.WithRegion("cn-beijing") })
	if got := code2(do2(t.Context(), two, "object")); got != "InvalidArgument" {
		t.Errorf("second SDK, wrong region: %q", got)
	}
	if got := code1(do1(bucket1(t, s, plain, sdk1.AuthVersion(sdk1.AuthV1)), "object")); got != "AccessDenied" {
		t.Errorf("V1 signature: %q", got)
	}
}

// TestAdditionalHeaders: headers that a client chose to sign as well are part of what is verified.
func TestAdditionalHeaders(t *testing.T) {
	s := start(t)
	if _, err := s.Put(name, "object", []byte("object")); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		change func(*http.Request)
		code   string
	}{
		"untouched": {func(*http.Request) {}, ""},
		"changed":   {func(r *http.Request) { r.Header.Set("Range", "bytes=1-3") }, "SignatureDoesNotMatch"},
		"removed":   {func(r *http.Request) { r.Header.Del("Range") }, "SignatureDoesNotMatch"},
	} {
		t.Run(what, func(t *testing.T) {
			httpClient := &http.Client{Transport: changing(c.change)}
			one := bucket1(t, s, plain, sdk1.HTTPClient(httpClient), sdk1.AdditionalHeaders([]string{"Range", "host"}))
			if got := code1(do1(one, "object")); got != c.code {
				t.Errorf("first SDK: %q, want %q", got, c.code)
			}
			two := client2(s, plain, func(config *sdk2.Config) {
				config.WithHttpClient(httpClient).WithAdditionalHeaders([]string{"range"})
			})
			if got := code2(do2(t.Context(), two, "object")); got != c.code {
				t.Errorf("second SDK: %q, want %q", got, c.code)
			}
		})
	}
}

// TestExpiry: temporary credentials and presigned URLs end.
func TestExpiry(t *testing.T) {
	now := time.Now()
	ending := sts
	ending.Expires = now.Add(time.Hour)
	s := osstest.StartT(t, osstest.Options{Region: region, Credentials: []osstest.Credential{plain, ending},
		Now: func() time.Time { return now }})
	if _, err := s.Put(name, "object", []byte("object")); err != nil {
		t.Fatal(err)
	}
	url, err := bucket1(t, s, plain).SignURL("object", sdk1.HTTPGet, 600)
	if err != nil {
		t.Fatal(err)
	}
	if status, body := get(t, url, nil); status != 200 {
		t.Errorf("in time: %d %s", status, body)
	}
	late := osstest.StartT(t, osstest.Options{Region: region, Credentials: []osstest.Credential{plain, ending},
		Now: func() time.Time { return now.Add(11 * time.Minute) }})
	if _, err := late.Put(name, "object", []byte("object")); err != nil {
		t.Fatal(err)
	}
	if status, body := get(t, strings.Replace(url, s.Addr(), late.Addr(), 1), nil); status != 403 || code(body) != "AccessDenied" ||
		!strings.Contains(body, "expired") {
		t.Errorf("too late: %d %s", status, body)
	}
	ending.Expires = now.Add(-time.Minute)
	s.SetCredentials(ending)
	if got := code1(do1(bucket1(t, s, sts), "object")); got != "SecurityTokenExpired" {
		t.Errorf("expired token: %q", got)
	}
}

// TestHeadErrors: an answer without a body carries its error in a header.
func TestHeadErrors(t *testing.T) {
	s := start(t)
	_, err := bucket1(t, s, plain).GetObjectDetailedMeta("missing")
	if got := code1(err); got != "NoSuchKey" {
		t.Errorf("head: %q", got)
	}
	resp, err := http.Head(s.Endpoint() + "/" + name + "/missing")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := base64.StdEncoding.DecodeString(resp.Header.Get("x-oss-err"))
	if err != nil || code(string(text)) != "AccessDenied" || resp.Header.Get("x-oss-request-id") == "" {
		t.Errorf("unsigned head: %v %q %v", resp.Header, text, err)
	}
}
