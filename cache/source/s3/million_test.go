package s3_test

import (
	"bufio"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/s3"
)

// counted is a bucket of n keys "fNNN/NNNNNNN", 1,000 a folder, that exist only as their numbers. It
// answers ListObjectsV2 as S3 does; signatures are not looked at.
type counted struct {
	n     int
	pages atomic.Int64
	keys  atomic.Int64
}

func (c *counted) key(i int) string { return fmt.Sprintf("f%05d/%07d", i/1000, i) }

// from is the number of the first key above after.
func (c *counted) from(after string) int {
	lo, hi := 0, c.n
	for lo < hi {
		if mid := (lo + hi) / 2; c.key(mid) > after {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	return lo
}

func (c *counted) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	if q.Get("list-type") != "2" || q.Get("encoding-type") != "url" || q.Get("continuation-token") != "" {
		http.Error(w, "not a first page of ListObjectsV2", http.StatusNotImplemented)
		return
	}
	c.pages.Add(1)
	most, _ := strconv.Atoi(q.Get("max-keys"))
	out := bufio.NewWriter(w)
	defer out.Flush()
	fmt.Fprint(out, `<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name><EncodingType>url</EncodingType>`)
	prefix, i, n := q.Get("prefix"), c.from(q.Get("start-after")), 0
	for ; i < c.n && n < most; n++ {
		key := c.key(i)
		if !strings.HasPrefix(key, prefix) {
			break
		}
		if d := strings.IndexByte(key[len(prefix):], '/'); q.Get("delimiter") == "/" && d >= 0 {
			folder := key[:len(prefix)+d+1]
			fmt.Fprintf(out, `<CommonPrefixes><Prefix>%s</Prefix></CommonPrefixes>`, url.QueryEscape(folder))
			i = (i/1000 + 1) * 1000
			continue
		}
		fmt.Fprintf(out, `<Contents><Key>%s</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified><ETag>&quot;%032x&quot;</ETag><Size>%d</Size><StorageClass>STANDARD</StorageClass></Contents>`,
			url.QueryEscape(key), i, i)
		c.keys.Add(1)
		i++
	}
	more := i < c.n && strings.HasPrefix(c.key(i), prefix)
	fmt.Fprintf(out, `<KeyCount>%d</KeyCount><MaxKeys>%d</MaxKeys><IsTruncated>%v</IsTruncated>`, n, most, more)
	if more {
		fmt.Fprint(out, `<NextContinuationToken>next</NextContinuationToken>`)
	}
	fmt.Fprint(out, `</ListBucketResult>`)
}

// A million keys are listed completely, once each, with hardly more pages than they fill, and in memory
// for a few pages. With the race detector, under which XML is ten times as slow, a fiftieth of that;
// package source has the same test of a million keys without XML.
func TestMillionKeysInBoundedMemory(t *testing.T) {
	n := 1_000_000
	if raceEnabled || testing.Short() {
		n = 20_000
	}
	c := &counted{n: n}
	server := httptest.NewServer(c)
	defer server.Close()
	b, err := s3.Open(t.Context(), source.Config{URL: "s3://bucket", Endpoint: server.URL, Region: "r", Anonymous: true})
	if err != nil {
		t.Fatal(err)
	}
	live := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	seen := make([]uint64, n/64+1) // a bit a key
	listed, before := 0, live()
	var most uint64
	err = b.List(t.Context(), "", func(o source.Object) error {
		i := int(o.Size)
		if o.Key != c.key(i) || seen[i/64]&(1<<(i%64)) != 0 || o.Version == "" {
			return fmt.Errorf("listed %+v", o)
		}
		seen[i/64] |= 1 << (i % 64)
		if listed++; listed%(n/10) == 0 {
			most = max(most, live())
		}
		return nil
	})
	if err != nil || listed != n {
		t.Fatalf("listed %d of %d: %v", listed, n, err)
	}
	// All of a million held would be 200 MB at least.
	if grown := int64(most) - int64(before); grown > 48<<20 {
		t.Errorf("%d bytes live while listing %d keys", grown, n)
	}
	if pages := c.pages.Load(); pages > int64(n)/1000*12/10+100 {
		t.Errorf("%d pages for %d keys", pages, n)
	}
	t.Logf("%d keys, %d pages, %d keys sent, %d bytes more live", n, c.pages.Load(), c.keys.Load(), int64(most)-int64(before))
}
