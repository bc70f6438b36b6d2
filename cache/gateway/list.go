package gateway

import (
	"encoding/base64"
	"encoding/xml"
	"net/http"
	"strconv"
)

const maxPage = 1000

type listed struct {
	Key          string
	LastModified string
	ETag         string
	Size         int64
	StorageClass string
	Owner        *owner `xml:",omitempty"`
}

type commonPrefix struct{ Prefix string }

// listing is the answer to both versions of List; what is nil is left out.
type listing struct {
	XMLName               xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListBucketResult"`
	Name                  string
	Prefix                string
	Marker                *string `xml:",omitempty"`
	NextMarker            string  `xml:",omitempty"`
	StartAfter            string  `xml:",omitempty"`
	ContinuationToken     string  `xml:",omitempty"`
	NextContinuationToken string  `xml:",omitempty"`
	KeyCount              *int    `xml:",omitempty"`
	MaxKeys               int
	Delimiter             string `xml:",omitempty"`
	EncodingType          string `xml:",omitempty"`
	IsTruncated           bool
	Contents              []listed
	CommonPrefixes        []commonPrefix
}

func (q *request) list() error {
	if err := q.ignore(); err != nil {
		return err
	}
	prefix, delimiter := q.query.get("prefix"), q.query.get("delimiter")
	most, err := q.most("max-keys", maxPage)
	if err != nil {
		return err
	}
	encode, encoding, err := q.encoding()
	if err != nil {
		return err
	}
	l := listing{Name: q.bucket, Prefix: encode(prefix), Delimiter: encode(delimiter), EncodingType: encoding, MaxKeys: most}
	var after string
	withOwner := true
	v2 := false
	switch v := q.query.get("list-type"); v {
	case "":
		after = q.query.get("marker")
		marker := encode(after)
		l.Marker = &marker
	case "2":
		v2 = true
		withOwner = q.query.get("fetch-owner") == "true"
		after = q.query.get("start-after")
		l.StartAfter = encode(after)
		if q.query.has("continuation-token") {
			l.ContinuationToken = q.query.get("continuation-token")
			if after, err = parseToken(l.ContinuationToken); err != nil {
				return err
			}
		}
	default:
		return badArgument("Invalid List Type specified in Request.")
	}
	// Not so what the page begins after: that may be a name of the bucket's that a page before ended at.
	for _, s := range []string{prefix, delimiter} {
		if len(s) > MaxKey || s != xmlText(s) {
			return badArgument("prefix and delimiter must be UTF-8 that XML can carry, of at most %d bytes.", MaxKey)
		}
	}
	var page Page
	if most > 0 {
		if page, err = q.objects.List(q.r.Context(), prefix, delimiter, after, most); err != nil {
			return err
		}
	}
	if page.More && !v2 && encoding == "" && page.Next != xmlText(page.Next) {
		return badArgument("The page ends at a name that XML cannot carry, so that none could follow it: list with encoding-type=url or list-type=2.")
	}
	for _, o := range page.Objects {
		e := listed{Key: encode(o.Key), LastModified: stamp(o.ModTime), ETag: quote(o.ETag), Size: o.Size, StorageClass: "STANDARD"}
		if withOwner {
			e.Owner = &stepcache
		}
		l.Contents = append(l.Contents, e)
	}
	for _, p := range page.Prefixes {
		l.CommonPrefixes = append(l.CommonPrefixes, commonPrefix{encode(p)})
	}
	l.IsTruncated = page.More
	if v2 {
		count := len(l.Contents) + len(l.CommonPrefixes)
		l.KeyCount = &count
		if page.More {
			l.NextContinuationToken = token(page.Next)
		}
	} else if page.More {
		l.NextMarker = encode(page.Next)
	}
	return q.answer(http.StatusOK, l)
}

// most is a parameter that bounds a page.
func (q *request) most(name string, limit int) (int, error) {
	text := q.query.get(name)
	if text == "" {
		return limit, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 || n > 1<<31-1 {
		return 0, badArgument("Argument %s must be an integer between 0 and 2147483647.", name)
	}
	return min(n, limit), nil
}

// encoding is how a listing's names are written, which encoding-type says.
func (q *request) encoding() (encode func(string) string, name string, err error) {
	switch name = q.query.get("encoding-type"); name {
	case "":
		return func(s string) string { return s }, name, nil
	case "url":
		return func(s string) string { return escape(s, true) }, name, nil
	}
	return nil, "", badArgument("Invalid Encoding Method specified in Request.")
}

// A token is where the next page begins. Any worker understands it.
func token(after string) string { return base64.RawURLEncoding.EncodeToString([]byte(after)) }

func parseToken(t string) (string, error) {
	after, err := base64.RawURLEncoding.DecodeString(t)
	if err != nil || t == "" {
		return "", badArgument("The continuation token provided is incorrect.")
	}
	return string(after), nil
}
