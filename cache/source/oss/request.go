package oss

import (
	"bytes"
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"

	sdk "github.com/aliyun/aliyun-oss-go-sdk/oss"

	"github.com/stepcache/stepcache/cache/source/credentials"
)

// request is one request to the bucket.
type request struct {
	op     string // for errors: list, stat, get, put, delete
	method string
	key    string            // empty: on the bucket itself
	params map[string]string // of the query
	header map[string]string
	body   []byte
}

// answer is a request's good answer. Whoever gets one closes its body.
type answer struct {
	status int
	header http.Header
	body   io.ReadCloser
}

// do sends one request, signed with the credentials as they are now, and returns its answer once its
// header is there and says success.
func (b *Bucket) do(ctx context.Context, r request) (*answer, error) {
	if b.config.Ambient {
		// The SDK asks without a context; what is got here is kept until then.
		if _, err := b.credentials.Get(ctx); err != nil {
			return nil, err
		}
	}
	options := []sdk.Option{sdk.WithContext(ctx)}
	for k, v := range r.header {
		options = append(options, sdk.SetHeader(k, v))
	}
	params := make(map[string]any, len(r.params))
	for k, v := range r.params {
		params[k] = v
	}
	var body io.Reader
	if len(r.body) > 0 {
		body = bytes.NewReader(r.body)
	}
	resp, err := b.bucket.Do(r.method, r.key, params, options, body, nil)
	if resp != nil && resp.Headers.Get("x-oss-version-id") != "" {
		b.versioned.Store(true)
	}
	if err != nil {
		if resp != nil {
			resp.Body.Close()
		}
		return nil, b.fail(ctx, r, resp, err)
	}
	return &answer{status: resp.StatusCode, header: resp.Headers, body: resp.Body}, nil
}

// maxAnswer bounds the text of an answer that is not a listing.
const maxAnswer = 1 << 20

// exchange sends one request and decodes the XML of its answer, of up to limit bytes, into out.
func (b *Bucket) exchange(ctx context.Context, r request, limit int64, out any) (http.Header, error) {
	a, err := b.do(ctx, r)
	if err != nil {
		return nil, err
	}
	defer a.body.Close()
	text, err := io.ReadAll(io.LimitReader(a.body, limit+1))
	if err != nil {
		return nil, b.broken(ctx, r, int64(len(text)), err)
	}
	if int64(len(text)) > limit {
		return nil, b.strange(r, a, fmt.Sprintf("it is longer than %d bytes", limit), "")
	}
	// A store that fails after it began to answer says so under a status of success: judged as the 500 that it is.
	failed := sdk.ServiceError{StatusCode: http.StatusInternalServerError}
	if xml.Unmarshal(text, &failed) == nil {
		return nil, b.fail(ctx, r, &sdk.Response{Headers: a.header}, failed)
	}
	if err := xml.Unmarshal(text, out); err != nil {
		return nil, b.strange(r, a, err.Error(), fmt.Sprintf("is %s the endpoint of an OSS bucket?", b.endpoint.host))
	}
	return a.header, nil
}

// signer gives the SDK the credentials of the moment, so that a rotated Secret needs no restart.
type signer struct{ reader *credentials.Reader }

// GetCredentialsE implements sdk.CredentialsProviderE.
func (s signer) GetCredentialsE() (sdk.Credentials, error) {
	v, err := s.reader.Get(context.Background())
	return keys(v), err
}

// GetCredentials implements sdk.CredentialsProvider; the SDK calls GetCredentialsE where it exists.
func (s signer) GetCredentials() sdk.Credentials {
	k, _ := s.GetCredentialsE()
	return k
}

type keys credentials.Value

func (k keys) GetAccessKeyID() string     { return k.AccessKeyID }
func (k keys) GetAccessKeySecret() string { return k.AccessKeySecret }
func (k keys) GetSecurityToken() string   { return k.SessionToken }

// unsigned takes the signature off requests, which the SDK makes even without a key.
type unsigned struct{ http.RoundTripper }

func (u unsigned) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	for _, h := range []string{"Authorization", "x-oss-content-sha256", "x-oss-security-token"} {
		r.Header.Del(h)
	}
	return u.RoundTripper.RoundTrip(r)
}
