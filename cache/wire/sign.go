package wire

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// The headers of a signed request. The signature is HMAC-SHA256 under the control key over the member id of
// the worker that it is for, method, path with query, timestamp, nonce and the SHA-256 of the body, one a line.
const (
	headerAuthorization = "Authorization"
	headerTimestamp     = "Stepcache-Timestamp" // seconds since 1970
	headerNonce         = "Stepcache-Nonce"     // 16 random bytes in hex
	scheme              = "Stepcache-HMAC-SHA256"
)

// MaxSkew is how far the clocks of both sides may differ, and so how long a nonce must be remembered.
const MaxSkew = 5 * time.Minute

// MaxBody bounds the body of a control request.
const MaxBody = 1 << 20

func signature(r *http.Request, key Key, worker, timestamp, nonce string, body []byte) []byte {
	mac := hmac.New(sha256.New, key[:])
	sum := sha256.Sum256(body)
	// RequestURI as the client's Write sends it: neither a path nor a method can hold a line feed.
	fmt.Fprintf(mac, "stepcache control 2\n%q\n%s\n%s\n%s\n%s\n%x\n", worker, r.Method, r.URL.RequestURI(), timestamp, nonce, sum)
	return mac.Sum(nil)
}

// SignRequest signs r, which is for the worker with that member id and no other, with the control key as of now.
// It reads the body, at most MaxBody, and leaves r one that can be sent again.
func SignRequest(r *http.Request, key Key, worker string, now time.Time) error {
	body, err := takeBody(r)
	if err != nil {
		return fmt.Errorf("sign %s %s: %w", r.Method, r.URL.Path, err)
	}
	r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
	var nonce [16]byte
	rand.Read(nonce[:])
	ts, n := strconv.FormatInt(now.Unix(), 10), hex.EncodeToString(nonce[:])
	r.Header.Set(headerTimestamp, ts)
	r.Header.Set(headerNonce, n)
	r.Header.Set(headerAuthorization, scheme+" "+hex.EncodeToString(key.id())+" "+hex.EncodeToString(signature(r, key, worker, ts, n, body)))
	return nil
}

// VerifyRequest checks the signature of a request to a worker against the control keys. It reads the
// body, at most MaxBody, and leaves r one with the same bytes. Errors wrap ErrUnauthorized, except a
// body that is too long or ends early. It does not refuse a replay: Nonces does.
func VerifyRequest(r *http.Request, keys Keys, worker string, now time.Time) error {
	refuse := func(format string, a ...any) error {
		return fmt.Errorf("%w: "+format, append([]any{ErrUnauthorized}, a...)...)
	}
	auth := r.Header.Get(headerAuthorization)
	if auth == "" {
		return refuse("the request is not signed: use the stepcache command with the Dataset's control key")
	}
	parts := strings.Split(auth, " ")
	if len(parts) != 3 || parts[0] != scheme {
		return refuse("the Authorization header is not %s", scheme)
	}
	id, err := hex.DecodeString(parts[1])
	if err != nil || len(id) != len(KeyID{}) {
		return refuse("malformed key id")
	}
	sig, err := hex.DecodeString(parts[2])
	if err != nil || len(sig) != sha256.Size {
		return refuse("malformed signature")
	}
	ts := r.Header.Get(headerTimestamp)
	sec, err := strconv.ParseInt(ts, 10, 64)
	if err != nil {
		return refuse("malformed timestamp")
	}
	// Compared in whole seconds: a difference of far-away times would overflow a Duration.
	if d := now.Unix() - sec; d > int64(MaxSkew/time.Second) || d < -int64(MaxSkew/time.Second) {
		return refuse("the request's time differs by more than %v from this worker's: check both clocks", MaxSkew)
	}
	nonce := r.Header.Get(headerNonce)
	if b, err := hex.DecodeString(nonce); err != nil || len(b) != 16 {
		return refuse("malformed nonce")
	}
	key, ok := keys.find(RoleControl, KeyID(id))
	if !ok {
		return refuse("unknown control key: check that both sides use the Dataset's current keys")
	}
	// Only a sender that knows the name of a control key gets its body read at all.
	body, err := takeBody(r)
	if err != nil {
		return fmt.Errorf("%s %s: %w", r.Method, r.URL.Path, err)
	}
	if !hmac.Equal(sig, signature(r, key, worker, ts, nonce, body)) {
		return refuse("the signature is wrong, or for another worker than %s", worker)
	}
	return nil
}

// takeBody reads the body of r and puts back one with the same bytes.
func takeBody(r *http.Request) ([]byte, error) {
	if r.Body == nil || r.Body == http.NoBody {
		return nil, nil
	}
	b, err := io.ReadAll(io.LimitReader(r.Body, MaxBody+1))
	r.Body.Close()
	if err != nil {
		return nil, fmt.Errorf("read the body: %w", err)
	}
	if len(b) > MaxBody {
		return nil, fmt.Errorf("the body is longer than %d bytes", MaxBody)
	}
	r.Body = io.NopCloser(bytes.NewReader(b))
	r.ContentLength = int64(len(b))
	return b, nil
}

// Nonces remembers the nonces of verified requests, so that each is served once. It is safe for
// concurrent use; the zero value is ready. Memory is bounded: only holders of a control key can add to
// it, and when it is full new requests are refused until old nonces expire.
type Nonces struct {
	mu   sync.Mutex
	seen map[string]time.Time // nonce to when it may be forgotten
}

const maxNonces = 1 << 16

// Use records the nonce of a request that VerifyRequest accepted and refuses one that was used before.
// Requests that change nothing (GET, HEAD) need no nonce of their own and always pass.
func (n *Nonces) Use(r *http.Request, now time.Time) error {
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	nonce := strings.ToLower(r.Header.Get(headerNonce)) // hex has two spellings
	if until, ok := n.seen[nonce]; ok && now.Before(until) {
		return fmt.Errorf("%w: the request was sent before: sign it anew", ErrUnauthorized)
	}
	if len(n.seen) >= maxNonces {
		for k, until := range n.seen {
			if !now.Before(until) {
				delete(n.seen, k)
			}
		}
		if len(n.seen) >= maxNonces {
			return fmt.Errorf("%w: too many control requests within %v", ErrOverloaded, 2*MaxSkew)
		}
	}
	if n.seen == nil {
		n.seen = make(map[string]time.Time)
	}
	// A timestamp may lie MaxSkew ahead of now and stays valid until MaxSkew behind.
	n.seen[nonce] = now.Add(2*MaxSkew + time.Second)
	return nil
}
