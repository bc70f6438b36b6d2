package gateway

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"net/textproto"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	algorithm  = "AWS4-HMAC-SHA256"
	amzTime    = "20060102T150405Z"
	maxSkew    = 15 * time.Minute
	maxExpires = 7 * 24 * time.Hour
	emptySHA   = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

	unsignedPayload   = "UNSIGNED-PAYLOAD"
	streaming         = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
	streamingTrailer  = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"
	streamingUnsigned = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
)

// identity is who signed a request, and with what its chunks are signed.
type identity struct {
	Credential
	key       []byte // the signing key of the scope
	time      string // as it was signed
	scope     string
	signature string // of the request: what the first chunk's signature follows
	payload   string // what the request says of its body: a digest, or one of the words above
}

// signed is what a request says of its signature, in its Authorization header or in its query.
type signed struct {
	credential, headers, signature string
	time                           time.Time
	payload                        string
	presigned                      bool
}

var (
	errSignature = failure(http.StatusForbidden, "SignatureDoesNotMatch", "The request signature we calculated does not match the signature you provided. Check your key and signing method.")
	errNoAuth    = failure(http.StatusForbidden, "AccessDenied", "Access Denied. Requests are signed with AWS Signature Version 4.")
	errUnknown   = failure(http.StatusForbidden, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records.")
	errWrite     = failure(http.StatusForbidden, "AccessDenied", "Access Denied. These credentials only read.")
)

// authenticate checks a request's signature. Every x-amz- header must be signed: an unsigned one could
// turn what a presigned address allows into something else.
func (q *request) authenticate() (identity, error) {
	s, err := q.signed()
	if err != nil {
		return identity{}, err
	}
	fields := strings.Split(s.credential, "/")
	if len(fields) < 5 {
		return identity{}, s.malformed(`the Credential is mal-formed; expecting "<ACCESS-KEY>/YYYYMMDD/REGION/SERVICE/aws4_request".`)
	}
	accessKey, scope := strings.Join(fields[:len(fields)-4], "/"), fields[len(fields)-4:]
	switch {
	case scope[0] != s.time.Format("20060102"):
		return identity{}, s.malformed("the date of the Credential is not that of the request.")
	case scope[1] == "":
		return identity{}, s.malformed("the region of the Credential is empty.")
	case scope[2] != "s3":
		return identity{}, s.malformed(`incorrect service %q. This endpoint belongs to "s3".`, scope[2])
	case scope[3] != "aws4_request":
		return identity{}, s.malformed(`incorrect terminal %q. This endpoint uses "aws4_request".`, scope[3])
	}
	if q.r.Header.Get("X-Amz-Security-Token") != "" || q.query.has("X-Amz-Security-Token") {
		return identity{}, failure(http.StatusBadRequest, "InvalidToken", "The credentials of this endpoint have no session token.")
	}
	headers, err := q.canonicalHeaders(s)
	if err != nil {
		return identity{}, err
	}
	except := ""
	if s.presigned {
		except = "X-Amz-Signature"
	}
	path := q.r.URL.Path
	if path == "" {
		path = "/"
	}
	canonical := strings.Join([]string{q.r.Method, escape(path, true), q.query.canonical(except), headers, s.headers, s.payload}, "\n")
	digest := sha256.Sum256([]byte(canonical))
	id := identity{time: s.time.Format(amzTime), scope: strings.Join(scope, "/"), signature: s.signature, payload: s.payload}
	toSign := strings.Join([]string{algorithm, id.time, id.scope, hex.EncodeToString(digest[:])}, "\n")

	known := false
	for _, c := range q.Keys() {
		if c.AccessKey != accessKey || c.AccessKey == "" || c.SecretKey == "" {
			continue
		}
		known = true
		// The same name with another secret may follow: old and new overlap in a rotation.
		key := []byte("AWS4" + c.SecretKey)
		for _, part := range scope {
			key = mac(key, part)
		}
		if hmac.Equal([]byte(hex.EncodeToString(mac(key, toSign))), []byte(s.signature)) {
			id.Credential, id.key = c, key
			if s.presigned {
				q.hoisted()
			}
			return id, nil
		}
	}
	if !known {
		return identity{}, errUnknown
	}
	return identity{}, errSignature
}

// signed reads what the request says of its signature, and checks its time.
func (q *request) signed() (signed, error) {
	header, inQuery := q.r.Header.Get("Authorization"), q.query.has("X-Amz-Algorithm")
	switch {
	case header != "" && inQuery:
		return signed{}, badArgument("Only one auth mechanism allowed; only the X-Amz-Algorithm query parameter or the Authorization header should be specified.")
	case inQuery:
		return q.signedQuery()
	case header == "" && q.query.has("Signature") || strings.HasPrefix(header, "AWS "):
		return signed{}, failure(http.StatusBadRequest, "InvalidRequest", "The authorization mechanism you have provided is not supported. Please use AWS4-HMAC-SHA256.")
	case header == "":
		return signed{}, errNoAuth
	}
	rest, ok := strings.CutPrefix(header, algorithm+" ")
	if !ok {
		return signed{}, failure(http.StatusBadRequest, "InvalidRequest", "The authorization mechanism you have provided is not supported. Please use AWS4-HMAC-SHA256.")
	}
	var s signed
	for part := range strings.SplitSeq(rest, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(part), "=")
		switch name {
		case "Credential":
			s.credential = value
		case "SignedHeaders":
			s.headers = value
		case "Signature":
			s.signature = value
		}
	}
	if s.credential == "" || s.headers == "" || s.signature == "" {
		return signed{}, s.malformed("it needs Credential, SignedHeaders and Signature.")
	}
	var err error
	if at := q.r.Header.Get("X-Amz-Date"); at != "" {
		s.time, err = time.Parse(amzTime, at)
	} else {
		s.time, err = http.ParseTime(q.r.Header.Get("Date"))
	}
	if err != nil {
		return signed{}, failure(http.StatusForbidden, "AccessDenied", "AWS authentication requires a valid Date or x-amz-date header.")
	}
	s.time = s.time.UTC()
	if skew := q.Clock().Sub(s.time); skew > maxSkew || skew < -maxSkew {
		return signed{}, failure(http.StatusForbidden, "RequestTimeTooSkewed", "The difference between the request time and the current time is too large.")
	}
	if s.payload = q.r.Header.Get("X-Amz-Content-Sha256"); s.payload == "" {
		return signed{}, failure(http.StatusBadRequest, "InvalidRequest", "Missing required header for this request: x-amz-content-sha256.")
	}
	return s, nil
}

func (q *request) signedQuery() (signed, error) {
	s := signed{presigned: true, payload: unsignedPayload}
	s.credential, s.headers, s.signature = q.query.get("X-Amz-Credential"), q.query.get("X-Amz-SignedHeaders"), q.query.get("X-Amz-Signature")
	if q.query.get("X-Amz-Algorithm") != algorithm {
		return signed{}, s.malformed(`X-Amz-Algorithm only supports "AWS4-HMAC-SHA256".`)
	}
	if s.credential == "" || s.headers == "" || s.signature == "" || !q.query.has("X-Amz-Expires") {
		return signed{}, s.malformed("Query-string authentication requires X-Amz-Algorithm, X-Amz-Credential, X-Amz-Signature, X-Amz-Date, X-Amz-SignedHeaders and X-Amz-Expires.")
	}
	for i, p := range q.query { // sorted: two of a name are neighbours
		if i > 0 && p.name == q.query[i-1].name && strings.HasPrefix(p.name, "X-Amz-") {
			return signed{}, s.malformed("%s is given twice.", p.name)
		}
	}
	var err error
	if s.time, err = time.Parse(amzTime, q.query.get("X-Amz-Date")); err != nil {
		return signed{}, s.malformed("X-Amz-Date must be in the ISO8601 Long Format \"yyyyMMdd'T'HHmmss'Z'\".")
	}
	seconds, err := strconv.Atoi(q.query.get("X-Amz-Expires"))
	if err != nil || seconds < 1 || time.Duration(seconds)*time.Second > maxExpires {
		return signed{}, s.malformed("X-Amz-Expires must be a number of seconds between 1 and 604800.")
	}
	switch now := q.Clock(); {
	case s.time.Sub(now) > maxSkew:
		return signed{}, failure(http.StatusForbidden, "AccessDenied", "Request is not valid yet.")
	case now.After(s.time.Add(time.Duration(seconds) * time.Second)):
		return signed{}, failure(http.StatusForbidden, "AccessDenied", "Request has expired.")
	}
	// Where a body's digest is given it was signed too: as a header that must be, or in the query.
	if sha := q.query.get("X-Amz-Content-Sha256"); sha != "" {
		s.payload = sha
	} else if sha := q.r.Header.Get("X-Amz-Content-Sha256"); sha != "" {
		s.payload = sha
	}
	return s, nil
}

func (s signed) malformed(format string, args ...any) *Failure {
	if s.presigned {
		return failure(http.StatusBadRequest, "AuthorizationQueryParametersError", "Error parsing the query: "+format, args...)
	}
	return failure(http.StatusBadRequest, "AuthorizationHeaderMalformed", "The authorization header is malformed: "+format, args...)
}

// canonicalHeaders are the headers that were signed, as they are signed.
func (q *request) canonicalHeaders(s signed) (string, error) {
	names := strings.Split(s.headers, ";")
	if !slices.Contains(names, "host") {
		return "", failure(http.StatusForbidden, "AccessDenied", "There were headers present in the request which were not signed: host.")
	}
	for name := range q.r.Header {
		if lower := strings.ToLower(name); strings.HasPrefix(lower, "x-amz-") && !slices.Contains(names, lower) {
			return "", failure(http.StatusForbidden, "AccessDenied", "There were headers present in the request which were not signed: %s.", lower)
		}
	}
	var b strings.Builder
	for _, name := range names {
		values := q.r.Header[textproto.CanonicalMIMEHeaderKey(name)]
		if values == nil {
			switch name { // net/http takes these out of the headers
			case "host":
				values = []string{q.r.Host}
			case "content-length":
				values = []string{strconv.FormatInt(q.r.ContentLength, 10)}
			case "transfer-encoding":
				values = q.r.TransferEncoding
			}
		}
		b.WriteString(name)
		b.WriteByte(':')
		for i, value := range values {
			if i > 0 {
				b.WriteByte(',')
			}
			b.WriteString(strings.Join(strings.Fields(value), " "))
		}
		b.WriteByte('\n')
	}
	return b.String(), nil
}

// hoisted makes headers of the x-amz- parameters of a presigned address: that is where signers put headers
// which the bearer need not send. All of the query is signed.
func (q *request) hoisted() {
	for _, p := range q.query {
		name := textproto.CanonicalMIMEHeaderKey(p.name)
		switch name {
		case "X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Date", "X-Amz-Expires", "X-Amz-Signedheaders", "X-Amz-Signature":
			continue
		}
		// A signer that has no body at hand (AWS's for JavaScript) signs the checksum of none: what the bearer will put is
		// not that.
		if c := newCheck(name); c != nil && p.value == encodeSum(c.hash.Sum(nil)) {
			continue
		}
		if strings.HasPrefix(name, "X-Amz-") && q.r.Header.Get(name) == "" {
			q.r.Header.Set(name, p.value)
		}
	}
}

// mustWrite refuses credentials that only read, and datasets that cannot be written.
func (q *request) mustWrite() (Writer, error) {
	if !q.who.Write {
		return nil, errWrite
	}
	w, ok := q.objects.(Writer)
	if !ok {
		return nil, ErrReadOnly
	}
	return w, nil
}

func mac(key []byte, text string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(text))
	return h.Sum(nil)
}
