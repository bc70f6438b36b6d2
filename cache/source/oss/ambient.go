package oss

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/credentials"
)

const (
	// metadataAddress is where an ECS machine is told of its own RAM role.
	metadataAddress = "http://100.100.100.200"
	ambientTimeout  = 5 * time.Second
	// refreshBefore is how long before their end temporary credentials are replaced.
	refreshBefore = 5 * time.Minute
)

// What the pod identity webhook of ACK (RRSA) puts into a pod's environment.
const (
	envRole     = "ALIBABA_CLOUD_ROLE_ARN"
	envProvider = "ALIBABA_CLOUD_OIDC_PROVIDER_ARN"
	envToken    = "ALIBABA_CLOUD_OIDC_TOKEN_FILE"
)

// ambient gives the temporary credentials of the pod's role, or else of the machine's. It keeps them
// until shortly before they end; however many requests need new ones, they are asked for once.
type ambient struct {
	client   *http.Client
	getenv   func(string) string
	metadata string
	sts      string
	now      func() time.Time
	flight   singleflight.Group

	mu    sync.Mutex
	value credentials.Value
	until time.Time
}

// temporary is the form in which both services answer.
type temporary struct {
	AccessKeyID     string `json:"AccessKeyId"`
	AccessKeySecret string
	SecurityToken   string
	Expiration      time.Time
}

func newAmbient(d deps, e endpoint) *ambient {
	a := &ambient{client: &http.Client{Transport: &http.Transport{Proxy: source.CredentialsProxy(d.proxy), DialContext: d.dial,
		TLSHandshakeTimeout: tlsTimeout, DisableKeepAlives: true}},
		getenv: d.getenv, metadata: d.metadata, sts: d.sts, now: d.now}
	if a.sts == "" {
		// Where the bucket is reached from inside the region, so is the token service.
		a.sts = "https://sts." + e.region + providerDomain
		if strings.Contains(e.host, "-internal.") {
			a.sts = "https://sts-vpc." + e.region + providerDomain
		}
	}
	return a
}

// get returns credentials that are valid for a while.
func (a *ambient) get(ctx context.Context) (credentials.Value, error) {
	value, left := a.held()
	if left > refreshBefore {
		return value, nil
	}
	done := a.flight.DoChan("", func() (any, error) {
		if _, left := a.held(); left > refreshBefore {
			return nil, nil // another flight has just landed
		}
		// Not of the caller's context: others wait for the same answer.
		ctx, cancel := context.WithTimeout(context.Background(), ambientTimeout)
		defer cancel()
		return nil, a.refresh(ctx)
	})
	select {
	case <-ctx.Done():
		return credentials.Value{}, ctx.Err()
	case r := <-done:
		value, left = a.held()
		if left > 0 {
			return value, nil // an early refresh that failed is tried again by the next request
		}
		if r.Err == nil {
			r.Err = errors.New("the credentials given have already expired: check this machine's clock")
		}
		return credentials.Value{}, r.Err
	}
}

func (a *ambient) held() (credentials.Value, time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.value, a.until.Sub(a.now())
}

func (a *ambient) refresh(ctx context.Context) error {
	ask := a.fromMachine
	if a.getenv(envRole) != "" && a.getenv(envToken) != "" {
		ask = a.fromPod
	}
	t, err := ask(ctx)
	if err != nil {
		return err
	}
	if t.AccessKeyID == "" || t.AccessKeySecret == "" || t.SecurityToken == "" {
		return errors.New("the answer holds no complete credentials")
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.value = credentials.Value{AccessKeyID: t.AccessKeyID, AccessKeySecret: t.AccessKeySecret, SessionToken: t.SecurityToken}
	a.until = t.Expiration
	return nil
}

// fromPod exchanges the pod's service account token for credentials of its role.
func (a *ambient) fromPod(ctx context.Context) (temporary, error) {
	token, err := os.ReadFile(a.getenv(envToken))
	if err != nil {
		return temporary{}, fmt.Errorf("service account token of the pod's role %s: %w", a.getenv(envRole), err)
	}
	query := url.Values{"Action": {"AssumeRoleWithOIDC"}, "Version": {"2015-04-01"}, "Format": {"JSON"},
		"Timestamp": {a.now().UTC().Format("2006-01-02T15:04:05Z")}}
	form := url.Values{"RoleArn": {a.getenv(envRole)}, "OIDCProviderArn": {a.getenv(envProvider)},
		"OIDCToken": {strings.TrimSpace(string(token))}, "RoleSessionName": {"stepcache"}}
	r, err := http.NewRequestWithContext(ctx, "POST", a.sts+"/?"+query.Encode(), strings.NewReader(form.Encode()))
	if err != nil {
		return temporary{}, err
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	var out struct{ Credentials temporary }
	if err := a.ask(r, &out); err != nil {
		return temporary{}, fmt.Errorf("role %s: %w", a.getenv(envRole), err)
	}
	return out.Credentials, nil
}

// fromMachine asks the metadata service for credentials of the machine's role.
func (a *ambient) fromMachine(ctx context.Context) (temporary, error) {
	r, err := http.NewRequestWithContext(ctx, "PUT", a.metadata+"/latest/api/token", nil)
	if err != nil {
		return temporary{}, err
	}
	r.Header.Set("X-aliyun-ecs-metadata-token-ttl-seconds", "60")
	var token string
	if err := a.ask(r, &token); err != nil {
		return temporary{}, fmt.Errorf("metadata service of the machine: %w", err)
	}
	const roles = "/latest/meta-data/ram/security-credentials/"
	get := func(path string, into any) error {
		r, err := http.NewRequestWithContext(ctx, "GET", a.metadata+path, nil)
		if err != nil {
			return err
		}
		r.Header.Set("X-aliyun-ecs-metadata-token", token)
		if err := a.ask(r, into); err != nil {
			return fmt.Errorf("RAM role of the machine: %w", err)
		}
		return nil
	}
	var role string
	if err := get(roles, &role); err != nil {
		return temporary{}, err
	}
	var out temporary
	err = get(roles+url.PathEscape(strings.TrimSpace(role)), &out)
	return out, err
}

// ask sends a request and reads its answer: text into a *string, JSON into anything else.
func (a *ambient) ask(r *http.Request, into any) error {
	resp, err := a.client.Do(r)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err
		}
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		var said struct{ Code, Message string }
		if json.Unmarshal(text, &said) == nil && said.Code != "" {
			return fmt.Errorf("status %d %s: %s", resp.StatusCode, said.Code, said.Message)
		}
		return fmt.Errorf("%s %s: status %d", r.Method, r.URL.Path, resp.StatusCode)
	}
	if s, ok := into.(*string); ok {
		*s = string(text)
		return nil
	}
	return json.Unmarshal(text, into)
}
