package osstest

import (
	"encoding/base64"
	"encoding/xml"
	"slices"
	"strconv"
	"strings"
)

type listed struct {
	Key          string
	LastModified string
	ETag         string
	Type         string
	Size         int64
	StorageClass string
}

type commonPrefix struct{ Prefix string }

type listing struct {
	XMLName               xml.Name `xml:"ListBucketResult"`
	Name                  string
	Prefix                string
	StartAfter            string
	Delimiter             string `xml:",omitempty"`
	EncodingType          string `xml:",omitempty"`
	ContinuationToken     string `xml:",omitempty"`
	NextContinuationToken string `xml:",omitempty"`
	MaxKeys               int
	KeyCount              int
	IsTruncated           bool
	Contents              []listed
	CommonPrefixes        []commonPrefix
}

func (s *Server) list(c *call, b *bucket) error {
	q := c.query
	limit := 100
	if text := q.Get("max-keys"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > 1000 {
			return invalid("Argument max-keys must be an integer between 1 and 1000.")
		}
		limit = n
	}
	if e := q.Get("encoding-type"); e != "" && e != "url" {
		return invalid("Argument encoding-type must be url.")
	}
	after := q.Get("start-after")
	if token := q.Get("continuation-token"); token != "" {
		text, err := base64.StdEncoding.DecodeString(token)
		if err != nil {
			return invalid("The continuation token provided is incorrect.")
		}
		after = string(text)
	}
	encode := func(s string) string { return s }
	if q.Get("encoding-type") == "url" {
		encode = func(s string) string { return escape(s, false) }
	}

	out := listing{Name: c.name, Prefix: encode(q.Get("prefix")), StartAfter: encode(q.Get("start-after")),
		Delimiter: encode(q.Get("delimiter")), EncodingType: q.Get("encoding-type"),
		ContinuationToken: q.Get("continuation-token"), MaxKeys: limit}
	objects, prefixes, next := b.page(q.Get("prefix"), q.Get("delimiter"), after, min(limit, s.options.Page))
	for _, o := range objects {
		out.Contents = append(out.Contents, listed{encode(o.Key), o.Modified.Format("2006-01-02T15:04:05.000Z"),
			`"` + o.ETag + `"`, o.Type, o.Blob.Size, "Standard"})
	}
	for _, p := range prefixes {
		out.CommonPrefixes = append(out.CommonPrefixes, commonPrefix{encode(p)})
	}
	out.KeyCount = len(objects) + len(prefixes)
	if next != "" {
		out.IsTruncated, out.NextContinuationToken = true, base64.StdEncoding.EncodeToString([]byte(next))
	}
	return c.answer(out)
}

// page lists up to limit objects and common prefixes that come after a name, in byte order. next is the
// last of them when there are more.
func (b *bucket) page(prefix, delimiter, after string, limit int) (objects []*object, prefixes []string, next string) {
	keys := b.keys()
	i, _ := slices.BinarySearch(keys, max(prefix, after))
	for i < len(keys) && keys[i] <= after && after != "" {
		i++
	}
	// A name that is a common prefix stands for all the keys under it: the page after it begins behind them.
	if delimiter != "" && after > prefix && strings.HasPrefix(after, prefix) && strings.HasSuffix(after, delimiter) {
		i = skip(keys, i, after)
	}
	last := ""
	for i < len(keys) && strings.HasPrefix(keys[i], prefix) {
		if len(objects)+len(prefixes) == limit {
			return objects, prefixes, last
		}
		key := keys[i]
		if delimiter != "" {
			if n := strings.Index(key[len(prefix):], delimiter); n >= 0 {
				last = key[:len(prefix)+n+len(delimiter)]
				prefixes = append(prefixes, last)
				i = skip(keys, i, last)
				continue
			}
		}
		i++
		if o := b.find(key); o != nil { // deleted since keys was taken otherwise
			objects = append(objects, o)
			last = key
		}
	}
	return objects, prefixes, ""
}

// skip returns the index of the first key from i on that does not start with prefix.
func skip(keys []string, i int, prefix string) int {
	n, _ := slices.BinarySearchFunc(keys[i:], prefix, func(key, prefix string) int {
		if key < prefix || strings.HasPrefix(key, prefix) {
			return -1
		}
		return 1
	})
	return i + n
}
