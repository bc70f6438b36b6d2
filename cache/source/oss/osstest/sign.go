package osstest

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	algorithm       = "OSS4-HMAC-SHA256"
	unsignedPayload = "UNSIGNED-PAYLOAD"
	scopeEnd        = "aliyun_v4_request"
	isoTime         = "20060102T150405Z"
	isoDay          = "20060102"
	maxSkew         = 15 * time.Minute
	maxExpires      = 7 * 24 * 60 * 60
)

// signature is what a request says about how it was signed.
type signature struct {
	credential string // key/day/region/product/aliyun_v4_request
	additional string // lower-case header names, sorted, joined by semicolons
	provided   string
	stamp      string // the date as it goes into the string to sign
	date       time.Time
	payload    string
	token      string
	query      bool
}

// verify checks the request's signature. It is anonymous when it has none at all.
func (s *Server) verify(c *call) (anonymous bool, err error) {
	now := s.options.Now().UTC()
	var sig signature
	switch {
	case c.r.Header.Get("Authorization") != "":
		sig, err = s.fromHeader(c, now)
	case c.query.Has("x-oss-signature") || c.query.Has("x-oss-signature-version") || c.query.Has("x-oss-credential"):
		sig, err = s.fromQuery(c, now)
	case c.query.Has("Signature"):
		return false, denied("Only V4 signatures are accepted.")
	default:
		return true, nil
	}
	if err != nil {
		return false, err
	}
	return false, s.check(c, sig, now)
}

func (s *Server) fromHeader(c *call, now time.Time) (sig signature, err error) {
	scheme, rest, _ := strings.Cut(c.r.Header.Get("Authorization"), " ")
	if scheme != algorithm {
		return sig, denied("Only V4 signatures are accepted.")
	}
	for field := range strings.SplitSeq(rest, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(field), "=")
		switch name {
		case "Credential":
			sig.credential = value
		case "AdditionalHeaders":
			sig.additional = value
		case "Signature":
			sig.provided = value
		default:
			return sig, invalid("Invalid Authorization header.")
		}
	}
	sig.token = c.r.Header.Get("x-oss-security-token")
	sig.payload = c.r.Header.Get("x-oss-content-sha256")
	if sig.payload != unsignedPayload {
		return sig, invalid("x-oss-content-sha256 must be " + unsignedPayload + ".")
	}
	sig.stamp = c.r.Header.Get("x-oss-date")
	if sig.stamp == "" {
		sig.stamp = c.r.Header.Get("Date")
	}
	if sig.date, err = time.Parse(isoTime, sig.stamp); err != nil {
		if sig.date, err = http.ParseTime(sig.stamp); err != nil {
			return sig, denied("OSS authentication requires a valid Date.")
		}
	}
	if skew := now.Sub(sig.date).Abs(); skew > maxSkew {
		return sig, &fault{Status: 403, Code: "RequestTimeTooSkewed", EC: "0002-00000504",
			Message:    "The difference between the request time and the current time is too large.",
			ServerTime: now.Format("2006-01-02T15:04:05.000Z")}
	}
	return sig, nil
}

func (s *Server) fromQuery(c *call, now time.Time) (sig signature, err error) {
	q := c.query
	if q.Get("x-oss-signature-version") != algorithm {
		return sig, denied("Only V4 signatures are accepted.")
	}
	sig = signature{credential: q.Get("x-oss-credential"), additional: q.Get("x-oss-additional-headers"),
		provided: q.Get("x-oss-signature"), stamp: q.Get("x-oss-date"), payload: unsignedPayload,
		token: q.Get("x-oss-security-token"), query: true}
	if sig.date, err = time.Parse(isoTime, sig.stamp); err != nil {
		return sig, invalid("Invalid x-oss-date.")
	}
	expires, err := strconv.ParseInt(q.Get("x-oss-expires"), 10, 64)
	if err != nil || expires < 1 || expires > maxExpires {
		return sig, invalid("Invalid x-oss-expires.")
	}
	if now.Before(sig.date.Add(-maxSkew)) {
		return sig, denied("Request is not valid yet.")
	}
	if now.After(sig.date.Add(time.Duration(expires) * time.Second)) {
		return sig, denied("Request has expired.")
	}
	return sig, nil
}

// check compares the scope with the server's and the signature with the one computed here.
func (s *Server) check(c *call, sig signature, now time.Time) error {
	where := "Authorization header"
	if sig.query {
		where = "x-oss-credential"
	}
	scope := strings.Split(sig.credential, "/")
	if len(scope) != 5 || scope[4] != scopeEnd {
		return invalid("Invalid credential in " + where + ".")
	}
	id, day, region, product := scope[0], scope[1], scope[2], scope[3]
	switch {
	case day != sig.date.Format(isoDay):
		return invalid("Invalid signing date in " + where + ".")
	case region != s.options.Region:
		return &fault{Status: 400, Code: "InvalidArgument", EC: "0002-00000226",
			Message: "Invalid signing region in " + where + "."}
	case product != "oss":
		return &fault{Status: 400, Code: "InvalidArgument", EC: "0002-00000227",
			Message: "Invalid signing product in " + where + "."}
	}
	known, err := s.credential(id, sig.token, now)
	if err != nil {
		return err
	}
	canonical := canonicalRequest(c, sig)
	digest := sha256.Sum256([]byte(canonical))
	toSign := strings.Join([]string{algorithm, sig.stamp, day + "/" + region + "/" + product + "/" + scopeEnd,
		hex.EncodeToString(digest[:])}, "\n")
	key := []byte("aliyun_v4" + known.AccessKeySecret)
	for _, part := range []string{day, region, product, scopeEnd, toSign} {
		key = mac(key, part)
	}
	if want := hex.EncodeToString(key); !hmac.Equal([]byte(want), []byte(sig.provided)) {
		return &fault{Status: 403, Code: "SignatureDoesNotMatch",
			Message:     "The request signature we calculated does not match the signature you provided. Check your key and signing method.",
			AccessKeyID: id, Provided: sig.provided, StringToSign: toSign, Canonical: canonical}
	}
	return nil
}

func mac(key []byte, s string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(s))
	return h.Sum(nil)
}

// credential finds the key pair with this id and checks the token that came with it.
func (s *Server) credential(id, token string, now time.Time) (Credential, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.credentials {
		if k.AccessKeyID != id {
			continue
		}
		switch {
		case k.Token != token:
			return k, &fault{Status: 403, Code: "InvalidSecurityToken", Message: "The security token you provided is not valid."}
		case !k.Expires.IsZero() && now.After(k.Expires):
			return k, &fault{Status: 403, Code: "SecurityTokenExpired", Message: "The security token you provided has expired."}
		}
		return k, nil
	}
	return Credential{}, &fault{Status: 403, Code: "InvalidAccessKeyId", EC: "0002-00000902", AccessKeyID: id,
		Message: "The OSS Access Key Id you provided does not exist in our records."}
}

// canonicalRequest is built from what arrived, decoded and encoded again, so that only the meaning of a
// request matters and not how its client wrote it.
func canonicalRequest(c *call, sig signature) string {
	uri := "/"
	if c.name != "" {
		uri += c.name + "/" + c.key
	}
	return strings.Join([]string{
		c.r.Method,
		escape(uri, true),
		canonicalQuery(c.query),
		canonicalHeaders(c.r, sig.additional),
		sig.additional,
		sig.payload,
	}, "\n")
}

func canonicalQuery(q url.Values) string {
	var pairs []string
	for name, values := range q {
		if name == "x-oss-signature" {
			continue
		}
		for _, v := range values {
			pair := escape(name, false)
			if v != "" {
				pair += "=" + escape(v, false)
			}
			pairs = append(pairs, pair)
		}
	}
	// By name first: "a=1" sorts after "a-b=1" by name, before it as a string.
	slices.SortFunc(pairs, func(a, b string) int {
		an, _, _ := strings.Cut(a, "=")
		bn, _, _ := strings.Cut(b, "=")
		if n := strings.Compare(an, bn); n != 0 {
			return n
		}
		return strings.Compare(a, b)
	})
	return strings.Join(pairs, "&")
}

// canonicalHeaders are x-oss-*, content-type and content-md5 where present, and the additional ones.
func canonicalHeaders(r *http.Request, additional string) string {
	values := map[string]string{}
	for name, v := range r.Header {
		name = strings.ToLower(name)
		if strings.HasPrefix(name, "x-oss-") || name == "content-type" || name == "content-md5" {
			trimmed := make([]string, len(v))
			for i := range v {
				trimmed[i] = strings.TrimSpace(v[i])
			}
			values[name] = strings.Join(trimmed, ",")
		}
	}
	if additional != "" {
		for name := range strings.SplitSeq(additional, ";") {
			switch name {
			case "host":
				values[name] = r.Host // net/http takes it out of the headers
			case "content-length":
				values[name] = strconv.FormatInt(r.ContentLength, 10)
			default:
				values[name] = strings.TrimSpace(strings.Join(r.Header.Values(name), ","))
			}
		}
	}
	names := make([]string, 0, len(values))
	for name := range values {
		names = append(names, name)
	}
	slices.Sort(names)
	var b strings.Builder
	for _, name := range names {
		b.WriteString(name + ":" + values[name] + "\n")
	}
	return b.String()
}

// escape encodes all but RFC 3986's unreserved characters, and the slash where it may stay.
func escape(s string, slash bool) string {
	const hexDigits = "0123456789ABCDEF"
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		ch := s[i]
		switch {
		case ch >= 'a' && ch <= 'z', ch >= 'A' && ch <= 'Z', ch >= '0' && ch <= '9',
			ch == '-', ch == '.', ch == '_', ch == '~', ch == '/' && slash:
			b.WriteByte(ch)
		default:
			b.Write([]byte{'%', hexDigits[ch>>4], hexDigits[ch&15]})
		}
	}
	return b.String()
}
