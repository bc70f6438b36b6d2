package oss

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/source"
)

// maxPage bounds a listing page's text: 1,000 keys of 1,023 bytes, each of them encoded in three.
const maxPage = 16 << 20

// List implements source.Lister.
func (b *Bucket) List(ctx context.Context, prefix string, yield func(source.Object) error) error {
	return source.ListPages(ctx, b, prefix, yield)
}

type listing struct {
	XMLName      xml.Name `xml:"ListBucketResult"`
	EncodingType string
	IsTruncated  bool
	Contents     []struct {
		Key          string
		Type         string
		Size         int64
		ETag         string
		LastModified time.Time
	}
	CommonPrefixes []struct{ Prefix string }
}

// Page implements source.Pager.
func (b *Bucket) Page(ctx context.Context, p source.PageRequest) (source.Page, error) {
	r := request{op: "list", method: "GET", params: map[string]string{
		"list-type": "2", "max-keys": strconv.Itoa(p.Keys()), "encoding-type": "url", "prefix": p.Prefix}}
	if p.After != "" {
		r.params["start-after"] = p.After
	}
	if p.Delimited {
		r.params["delimiter"] = "/"
	}
	var in listing
	if _, err := b.exchange(ctx, r, maxPage, &in); err != nil {
		return source.Page{}, err
	}
	decode := func(name string) (string, error) {
		if in.EncodingType != "url" {
			return name, nil
		}
		plain, err := url.QueryUnescape(name)
		if err != nil {
			return "", &source.Error{Op: "list", Name: b.url, Kind: source.ErrInvalid, Err: fmt.Errorf("listed name %q: %v", name, err)}
		}
		return plain, nil
	}
	out := source.Page{More: in.IsTruncated}
	var links []int // symlinks among the objects
	for _, c := range in.Contents {
		key, err := decode(c.Key)
		if err != nil {
			return source.Page{}, err
		}
		if c.Type == "Symlink" {
			links = append(links, len(out.Objects))
		}
		out.Objects = append(out.Objects, source.Object{Key: key, Size: c.Size, ModTime: c.LastModified,
			Version: b.version(c.ETag, c.LastModified)})
	}
	for _, c := range in.CommonPrefixes {
		prefix, err := decode(c.Prefix)
		if err != nil {
			return source.Page{}, err
		}
		// A page that starts within a common prefix names it once more.
		if prefix > p.After {
			out.Prefixes = append(out.Prefixes, prefix)
		}
	}
	return out, b.follow(ctx, out.Objects, links)
}

// unfollowed is why a link is no object that can be read, by the error of following it. Others end the listing.
var unfollowed = []struct {
	err error
	why string
}{
	{source.ErrNotFound, "a symbolic link to nothing"},
	{source.ErrDenied, "a symbolic link to what the credentials may not read"},
	{source.ErrInvalid, "a symbolic link to what the store does not give, such as an archived object"},
	{source.ErrUnversioned, "a symbolic link to an object without a version"},
}

// follow replaces symlinks by what reading them gives. A listing describes the link itself, whose ETag and
// size no read would match.
func (b *Bucket) follow(ctx context.Context, objects []source.Object, links []int) error {
	var refused atomic.Bool
	g, each := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for _, i := range links {
		g.Go(func() error {
			link := objects[i]
			// Each is tried again alone: one that fails must not have a thousand of them followed anew.
			err := source.Try(each, source.RetryOptions{}, func(ctx context.Context) (err error) {
				objects[i], err = b.Stat(ctx, link.Key)
				return err
			})
			for _, u := range unfollowed {
				if errors.Is(err, u.err) {
					if u.err == source.ErrDenied || u.err == source.ErrInvalid {
						refused.Store(true)
					}
					objects[i] = source.Object{Key: link.Key, Size: link.Size, ModTime: link.ModTime, Skip: u.why}
					return nil
				}
			}
			return err
		})
	}
	if err := g.Wait(); err != nil || !refused.Load() {
		return err
	}
	// The answer to HEAD has no word of why: a token that has ended since refuses all, and links must not be left out for that.
	_, err := b.exchange(ctx, request{op: "list", method: "GET", params: map[string]string{"list-type": "2", "max-keys": "1"}}, maxPage, new(listing))
	return err
}
