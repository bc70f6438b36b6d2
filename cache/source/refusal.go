package source

import (
	"regexp"
	"strings"
)

// Refusal is what a store answered to a request that it can never fulfil, fit to be passed on to whoever made that
// request of us: it tells nothing of our credentials, of the store's address, or of the URL that was asked.
type Refusal struct {
	// Status is the answer's, from 400 to 499.
	Status int `json:"status"`
	// Code is the store's word for it.
	Code string `json:"code"`
	// Message is empty where the store's own says more than a stranger may know.
	Message string `json:"message,omitempty"`
}

// Error implements error.
func (r *Refusal) Error() string { return r.Code + ": " + r.Message }

// Refusable says whether a store's answer with that code, which made the error, is about the request itself: what has a
// hint is about the Dataset's settings, but for an object that nobody can read as it is stored.
func (e *Error) Refusable(code string) bool {
	return e.Kind == ErrInvalid && (e.Hint == "" || code == "InvalidObjectState")
}

// ours are the codes about how we signed and sent a request, which tell nothing to whoever made it of us.
var ours = map[string]bool{
	"AuthorizationHeaderMalformed": true, "AuthorizationQueryParametersError": true, "BadDigest": true,
	"CredentialsNotSupported": true, "IncompleteBody": true, "InvalidDigest": true, "InvalidSecurity": true,
	"MissingAuthenticationToken": true, "MissingContentLength": true, "MissingSecurityHeader": true,
	"XAmzContentChecksumMismatch": true, "XAmzContentSHA256Mismatch": true,
}

var (
	plainCode = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9.]{0,63}$`)
	// telling finds what stores quote of a request: its URL, its signature, and what that was made of.
	telling = regexp.MustCompile(`(?i)://|sign|credential|authori[sz]|access[-_ ]?key|secret|token|x-(amz|oss)-|AWS4|AKIA|ASIA`)
)

// maxMessage bounds what is passed on of a message; S3's own have a sentence or two.
const maxMessage = 512

// Refused is the Refusal in an answer of a store, nil where the answer is not about the request itself. A message
// with one of hide in it (the endpoint, parts of the credentials) is left out.
func Refused(status int, code, message string, hide ...string) *Refusal {
	if status < 400 || status > 499 || !plainCode.MatchString(code) || ours[code] {
		return nil
	}
	message = strings.Join(strings.Fields(strings.ToValidUTF8(message, "\ufffd")), " ")
	if len(message) > maxMessage || telling.MatchString(message) {
		message = ""
	}
	for _, h := range hide {
		if h != "" && strings.Contains(strings.ToLower(message), strings.ToLower(h)) {
			message = ""
		}
	}
	return &Refusal{Status: status, Code: code, Message: message}
}
