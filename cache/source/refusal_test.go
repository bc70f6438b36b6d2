package source_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/stepcache/stepcache/cache/source"
)

func TestRefusedTellsNoSecrets(t *testing.T) {
	const id, secret = "GK31c2f218a2e44f485b94239e", "b892c0665f0ada8a4755dae98baa3b13"
	for _, c := range []struct {
		status               int
		code, message, wants string
	}{
		{409, "ObjectParentIsFile", "Object parent already exists as a file.", "Object parent already exists as a file."},
		{400, "KeyTooLongError", "two\nlines \xff", "two lines \ufffd"},
		{400, "InvalidArgument", "no such store: http://store/bucket/k?X-Amz-Signature=1", ""},
		{400, "InvalidArgument", "X-Amz-Date is wrong", ""},
		{400, "InvalidArgument", "The key " + id + " is odd", ""},
		{400, "InvalidArgument", "it is " + strings.ToUpper(secret), ""},
		{400, "InvalidArgument", "ask store.internal:9000", ""},
		{400, "InvalidArgument", "Credential=AKIAIOSFODNN7EXAMPLE/20130524", ""},
		{400, "InvalidArgument", strings.Repeat("x", 1000), ""},
	} {
		r := source.Refused(c.status, c.code, c.message, "store.internal:9000", id, secret, "")
		if r == nil || *r != (source.Refusal{Status: c.status, Code: c.code, Message: c.wants}) {
			t.Errorf("%q: %+v", c.message, r)
		}
	}
	for code, status := range map[string]int{
		"NotImplemented": 501, "InvalidRequest": 200, "400 Bad Request": 400, "": 400, "a/b": 400,
		"AuthorizationHeaderMalformed": 400, "XAmzContentSHA256Mismatch": 400,
	} {
		if r := source.Refused(status, code, "words"); r != nil {
			t.Errorf("%d %q is about no request of a client: %+v", status, code, r)
		}
	}
	wrapped := &source.Error{Kind: source.ErrInvalid, Refusal: &source.Refusal{Status: 400, Code: "X"}}
	if r := new(source.Refusal); !errors.Is(wrapped, source.ErrInvalid) || !errors.As(wrapped, &r) || r.Code != "X" {
		t.Errorf("%v", wrapped)
	}
}
