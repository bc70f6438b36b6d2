package worker

import (
	"context"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// shelf are the objects of a writable dataset, by key.
type shelf map[string]string

func (s shelf) info(key string) gateway.Info {
	return gateway.Info{Key: key, Size: int64(len(s[key])), ETag: fmt.Sprintf("%x", crc32.ChecksumIEEE([]byte(s[key]))), ModTime: time.Unix(1e9, 0).UTC()}
}

func (s shelf) Stat(ctx context.Context, key string) (gateway.Info, error) {
	if _, ok := s[key]; !ok {
		return gateway.Info{}, fmt.Errorf("%q: %w", key, source.ErrNotFound)
	}
	if s[key] == "busy" {
		return gateway.Info{}, gateway.ErrBusy
	}
	return s.info(key), nil
}

func (s shelf) Open(ctx context.Context, key string) (gateway.Object, error) {
	info, err := s.Stat(ctx, key)
	return book{info, s[key]}, err
}

func (s shelf) List(ctx context.Context, prefix, delimiter, after string, max int) (gateway.Page, error) {
	var page gateway.Page
	var keys []string
	for key := range s {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	last := ""
	for _, key := range keys {
		rest, ok := strings.CutPrefix(key, prefix)
		if !ok {
			continue
		}
		common := ""
		if i := strings.Index(rest, delimiter); delimiter != "" && i >= 0 {
			common = prefix + rest[:i+1]
		}
		name := key
		if common != "" {
			name = common
		}
		if name <= after || name == last || strings.HasSuffix(after, "/") && strings.HasPrefix(name, after) {
			continue
		}
		if len(page.Objects)+len(page.Prefixes) == max {
			page.More = true
			break
		}
		last, page.Next = name, name
		if common != "" {
			page.Prefixes = append(page.Prefixes, common)
		} else {
			page.Objects = append(page.Objects, s.info(key))
		}
	}
	return page, nil
}

type book struct {
	info gateway.Info
	text string
}

func (b book) Info() gateway.Info { return b.info }
func (b book) Close() error       { return nil }
func (b book) WriteRange(ctx context.Context, w io.Writer, off, n int64) error {
	_, err := io.WriteString(w, b.text[off:off+n])
	return err
}

func TestNamesAreToldToReaders(t *testing.T) {
	tr := newTier(t, map[string][]byte{"x": nil})
	tr.start(1)
	all := shelf{"a": "first", "dir/b": "second", "dir/": "", "dir/sub/c": "third", "both": "file", "both/d": "hidden", "busy": "busy", "dir/" + strings.Repeat("n", 300): "long"}
	for i := range 2500 {
		all[fmt.Sprintf("many/%04d", i)] = "x"
	}
	h := tr.workers[0].namesHandler(all, nil)
	get := func(path string, query ...string) (wire.Status, *httptest.ResponseRecorder) {
		t.Helper()
		q := url.Values{}
		for i := 0; i < len(query); i += 2 {
			q.Set(query[i], query[i+1])
		}
		r := httptest.NewRecorder()
		h.ServeHTTP(r, httptest.NewRequest(http.MethodGet, path+"?"+q.Encode(), nil))
		if r.Header().Get(wire.HeaderEpoch) != "1" {
			t.Errorf("%s %v: epoch %q", path, query, r.Header().Get(wire.HeaderEpoch))
		}
		n, _ := strconv.Atoi(r.Header().Get(wire.HeaderStatus))
		if (n == 0) != (r.Code == http.StatusOK) {
			t.Errorf("%s %v: %d with status %d", path, query, r.Code, n)
		}
		return wire.Status(n), r
	}
	first, both := all.info("a").ETag, all.info("both").ETag
	for path, want := range map[string]string{
		"":        `{"name":"","dir":true}`,
		"a":       `{"name":"a","size":5,"version":"` + first + `","modTime":"2001-09-09T01:46:40Z"}`,
		"dir":     `{"name":"dir","dir":true}`,
		"dir/sub": `{"name":"sub","dir":true}`,
		"both":    `{"name":"both","size":4,"version":"` + both + `","modTime":"2001-09-09T01:46:40Z"}`,
	} {
		if s, r := get(wire.PathName, "path", path); s != wire.OK || r.Body.String() != want {
			t.Errorf("name %q: %v %s", path, s, r.Body)
		}
	}
	for _, path := range []string{"none", "dir/none", "a/b", "../a", "/a", "a//b", "dir/../a", "dir/", ".", "\x00", "\xff"} {
		if s, r := get(wire.PathName, "path", path); s != wire.NotFound {
			t.Errorf("name %q: %v %s", path, s, r.Body)
		}
	}
	if s, _ := get(wire.PathName, "path", "busy"); s != wire.Overloaded {
		t.Errorf("a name that nobody can decide on now: %v", s)
	}
	list := func(folder, after string) (names []string, next string) {
		t.Helper()
		s, r := get(wire.PathNames, "path", folder, "after", after)
		var out wire.Names
		if err := json.Unmarshal(r.Body.Bytes(), &out); s != wire.OK || err != nil {
			t.Fatalf("list of %q after %q: %v %s", folder, after, s, r.Body)
		}
		for _, n := range out.Names {
			if n.Dir {
				n.Name += "/"
			}
			names = append(names, n.Name)
		}
		return names, out.After
	}
	if got, _ := list("", ""); !slices.Equal(got, []string{"a", "both", "busy", "dir/", "many/"}) {
		t.Errorf("the dataset's folder: %q", got)
	}
	if got, next := list("dir", ""); !slices.Equal(got, []string{"b", "sub/"}) || next != "" {
		t.Errorf("a folder with its marker and a name that is too long: %q, %q", got, next)
	}
	if got, _ := list("dir", "b"); !slices.Equal(got, []string{"sub/"}) {
		t.Errorf("after b: %q", got)
	}
	if got, _ := list("", "dir/"); !slices.Equal(got, []string{"many/"}) {
		t.Errorf("after dir/: %q", got)
	}
	var many []string
	for after, pages := "", 0; ; pages++ {
		some, next := list("many", after)
		many = append(many, some...)
		if after = next; next == "" {
			if pages != 2 {
				t.Errorf("%d pages", pages+1)
			}
			break
		}
	}
	if len(many) != 2500 || !slices.IsSorted(many) {
		t.Errorf("%d of 2500 names", len(many))
	}
	if s, _ := get(wire.PathNames, "path", "../x"); s != wire.NotFound {
		t.Errorf("a folder above: %v", s)
	}

	s, r := get(wire.PathBytes, "path", "dir/b", "version", all.info("dir/b").ETag, "off", "2", "length", "3")
	if sum := fmt.Sprintf("%x", crc32.Checksum([]byte("con"), castagnoli)); s != wire.OK || r.Body.String() != "con" || r.Header().Get(wire.HeaderSum) != sum {
		t.Errorf("bytes: %v %q %v", s, r.Body, r.Header())
	}
	for what, c := range map[string]struct {
		query []string
		want  wire.Status
	}{
		"another version":     {[]string{"path", "a", "version", "other", "off", "0", "length", "5"}, wire.Changed},
		"what is gone":        {[]string{"path", "none", "version", first, "off", "0", "length", "5"}, wire.NotFound},
		"no version":          {[]string{"path", "a", "off", "0", "length", "5"}, wire.Invalid},
		"a byte too many":     {[]string{"path", "a", "version", first, "off", "1", "length", "5"}, wire.Invalid},
		"past the end":        {[]string{"path", "a", "version", first, "off", "9223372036854775807", "length", "5"}, wire.Invalid},
		"a negative offset":   {[]string{"path", "a", "version", first, "off", "-1", "length", "5"}, wire.Invalid},
		"nothing":             {[]string{"path", "a", "version", first, "off", "0", "length", "0"}, wire.Invalid},
		"more than an answer": {[]string{"path", "a", "version", first, "off", "0", "length", "1048577"}, wire.Invalid},
		"no number":           {[]string{"path", "a", "version", first, "off", "x", "length", "5"}, wire.Invalid},
		"a path that is none": {[]string{"path", "../a", "version", first, "off", "0", "length", "5"}, wire.NotFound},
		"a folder":            {[]string{"path", "dir", "version", first, "off", "0", "length", "5"}, wire.NotFound},
	} {
		if s, r := get(wire.PathBytes, c.query...); s != c.want {
			t.Errorf("bytes of %s: %v %s", what, s, r.Body)
		}
	}
}

// asked counts the listings of a shelf.
type asked struct {
	shelf
	lists *int
}

func (a asked) List(ctx context.Context, prefix, delimiter, after string, max int) (gateway.Page, error) {
	*a.lists++
	return a.shelf.List(ctx, prefix, delimiter, after, max)
}

// A folder is listed again once what it was known by is gone, not each time that somebody asks for it.
func TestAFolderIsKnownByWhatIsInIt(t *testing.T) {
	tr := newTier(t, map[string][]byte{"x": nil})
	tr.start(1)
	all, lists := shelf{"a/b/c": "first", "a/b/d": "second"}, 0
	h := tr.workers[0].namesHandler(asked{all, &lists}, nil)
	for _, c := range []struct {
		when  string
		do    func()
		want  wire.Status
		lists int
	}{
		{"at first", func() {}, wire.OK, 1},
		{"again", func() {}, wire.OK, 1},
		{"without an object", func() { delete(all, "a/b/c") }, wire.OK, 2},
		{"once more", func() {}, wire.OK, 2},
		{"empty", func() { delete(all, "a/b/d") }, wire.NotFound, 3},
		{"not empty any more", func() { all["a/b/z/z"] = "third" }, wire.OK, 4},
		{"as a file", func() { all["a/b"] = "fourth" }, wire.OK, 4},
	} {
		c.do()
		r := httptest.NewRecorder()
		h.ServeHTTP(r, httptest.NewRequest(http.MethodGet, wire.PathName+"?path=a/b", nil))
		n, _ := strconv.Atoi(r.Header().Get(wire.HeaderStatus))
		if dir := strings.Contains(r.Body.String(), `"dir":true`); wire.Status(n) != c.want || lists != c.lists || c.want == wire.OK && dir != (c.when != "as a file") {
			t.Errorf("%s: %d %s, after %d listings", c.when, n, r.Body, lists)
		}
	}
}

// halting is a listing that breaks off: it says that there is more, and not after what.
type halting struct{ shelf }

func (h halting) List(ctx context.Context, prefix, delimiter, after string, max int) (gateway.Page, error) {
	page, err := h.shelf.List(ctx, prefix, delimiter, after, max)
	page.More, page.Next = true, after
	return page, err
}

// Nothing is taken for the end of a folder but its end.
func TestAListingThatBreaksOffIsAnError(t *testing.T) {
	tr := newTier(t, map[string][]byte{"x": nil})
	tr.start(1)
	h := tr.workers[0].namesHandler(halting{shelf{"a": "first", "dir/b": "second"}}, nil)
	for _, query := range []string{"path=", "path=dir", "path=&after=a"} {
		r := httptest.NewRecorder()
		h.ServeHTTP(r, httptest.NewRequest(http.MethodGet, wire.PathNames+"?"+query, nil))
		if n, _ := strconv.Atoi(r.Header().Get(wire.HeaderStatus)); wire.Status(n) != wire.Unavailable {
			t.Errorf("%s: %d %s", query, n, r.Body)
		}
	}
}

// Mounts below the dataset's folder are there while they are empty, with the folders above them.
func TestEmptyMountsAreFolders(t *testing.T) {
	tr := newTier(t, map[string][]byte{"x": nil})
	tr.start(1)
	h := tr.workers[0].namesHandler(shelf{"a/c/file": "x", "m": "y"}, []Mount{{Path: "/a/b"}, {Path: "/a/c"}, {Path: "/z"}})
	get := func(path, query string) (wire.Status, string) {
		r := httptest.NewRecorder()
		h.ServeHTTP(r, httptest.NewRequest(http.MethodGet, path+"?"+query, nil))
		n, _ := strconv.Atoi(r.Header().Get(wire.HeaderStatus))
		return wire.Status(n), r.Body.String()
	}
	for _, folder := range []string{"a", "a/b", "a/c", "z"} {
		if s, body := get(wire.PathName, "path="+folder); s != wire.OK || !strings.Contains(body, `"dir":true`) {
			t.Errorf("%s: %v %s", folder, s, body)
		}
	}
	for _, none := range []string{"a/b/x", "b", "zz"} {
		if s, body := get(wire.PathName, "path="+none); s != wire.NotFound {
			t.Errorf("%s: %v %s", none, s, body)
		}
	}
	for query, want := range map[string]string{"path=": "a m z", "path=a": "b c", "path=a/b": "", "path=a/c": "file", "path=&after=a/": "m z", "path=&after=z/": ""} {
		s, body := get(wire.PathNames, query)
		var out wire.Names
		if err := json.Unmarshal([]byte(body), &out); s != wire.OK || err != nil {
			t.Fatalf("%s: %v %s", query, s, body)
		}
		var names []string
		for _, n := range out.Names {
			names = append(names, n.Name)
		}
		if got := strings.Join(names, " "); got != want {
			t.Errorf("%s lists %q, not %q", query, got, want)
		}
	}
}

// A read-only dataset has no names to be asked for, whoever asks; and the control key is not for them.
func TestNamesOfAReadOnlyDatasetAreRefused(t *testing.T) {
	tr := newTier(t, map[string][]byte{"x": nil})
	tr.start(1)
	c := dial(t, tr.workers[0], tr.keys.Read[0])
	if rep, _, err := c.ask(wire.Request{Op: wire.OpMembers}); err != nil || rep.Index == wire.NamesServed {
		t.Errorf("it says that it has: %+v, %v", rep, err)
	}
	if _, _, err := c.ask(wire.Request{Op: wire.OpObjects}); wire.StatusOf(err) != wire.Invalid {
		t.Errorf("a reader of a read-only dataset: %v", err)
	}
	writable := &Worker{gateway: &gatewayServer{}}
	if _, err := writable.namesFor(&permit{role: wire.RoleControl}); wire.StatusOf(err) != wire.Denied {
		t.Errorf("the control key: %v", err)
	}
}
