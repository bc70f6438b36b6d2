package worker

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// nameReader answers readers that follow the names of a writable dataset, over connections of the read role:
// mounts, whose files are the versions that the names have now. It sees what the S3 endpoint sees, through the
// same Objects.
type nameReader struct {
	w       *Worker
	objects gateway.Objects
	mounts  []string            // their paths, without a leading slash and with one behind; "/" for the dataset's folder
	memory  *semaphore.Weighted // of bytes on their way to readers

	mu sync.Mutex
	// within is of folders an object that each had: as long as there is that, there is the folder.
	within map[string]string
}

const (
	// nameBuffers bounds the bytes of objects that wait to be sent to such readers.
	nameBuffers = 64 << 20
	// folderPage is how many names are told at once.
	folderPage = 1000
	// maxWithin bounds what is remembered of folders, some hundred bytes each.
	maxWithin = 16 << 10
	// longName is the longest name that a file system can show.
	longName = 255
)

// namesHandler answers the requests of wire.PathName and so on.
func (w *Worker) namesHandler(o gateway.Objects, mounts []Mount) http.Handler {
	n := &nameReader{w: w, objects: o, memory: semaphore.NewWeighted(nameBuffers), within: make(map[string]string)}
	for _, m := range mounts {
		n.mounts = append(n.mounts, strings.Trim(m.Path, "/")+"/")
	}
	mux := http.NewServeMux()
	for path, answer := range map[string]func(context.Context, http.ResponseWriter, url.Values) error{
		wire.PathName: n.name, wire.PathNames: n.names, wire.PathBytes: n.bytes,
	} {
		mux.HandleFunc("GET "+path, func(rw http.ResponseWriter, r *http.Request) {
			ctx, cancel := context.WithTimeout(r.Context(), wire.WorkerTimeout)
			defer cancel()
			rw.Header().Set(wire.HeaderEpoch, strconv.FormatUint(w.members.view().Epoch, 10))
			if err := answer(ctx, rw, r.URL.Query()); err != nil {
				n.fail(rw, r, err)
			}
		})
	}
	return mux
}

func (n *nameReader) fail(rw http.ResponseWriter, r *http.Request, err error) {
	status := wire.StatusOf(err)
	if errors.Is(err, gateway.ErrBusy) {
		status = wire.Overloaded
	}
	if status == wire.Internal && r.Context().Err() == nil {
		n.w.log.Error("request failed", "path", r.URL.Path, "error", err)
	}
	n.w.counts.status(status)
	rw.Header().Set(wire.HeaderStatus, strconv.Itoa(int(status)))
	rw.WriteHeader(http.StatusUnprocessableEntity)
	rw.Write(wire.Text(err.Error())) // the reader may be gone
}

func answerJSON(rw http.ResponseWriter, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	rw.Header().Set("Content-Length", strconv.Itoa(len(b)))
	rw.Write(b) // the reader may be gone
	return nil
}

// checkPath refuses what cannot be a name; such a name is not there.
func checkPath(key string) error {
	if err := gateway.ValidKey(key); err != nil || strings.HasSuffix(key, "/") {
		return fmt.Errorf("%w: %q cannot be a file of the dataset", source.ErrNotFound, key)
	}
	return nil
}

func (n *nameReader) name(ctx context.Context, rw http.ResponseWriter, q url.Values) error {
	key := q.Get("path")
	if key == "" {
		return answerJSON(rw, wire.Name{Dir: true})
	}
	if err := checkPath(key); err != nil {
		return err
	}
	info, err := n.objects.Stat(ctx, key)
	if err == nil {
		return answerJSON(rw, wire.Name{Name: path.Base(key), Size: info.Size, Version: info.ETag, ModTime: info.ModTime})
	}
	if !errors.Is(err, source.ErrNotFound) {
		return err
	}
	// A folder is what something lies in, or a mount.
	for _, m := range n.mounts {
		if strings.HasPrefix(m, key+"/") {
			return answerJSON(rw, wire.Name{Name: path.Base(key), Dir: true})
		}
	}
	folder, lerr := n.folder(ctx, key)
	switch {
	case lerr != nil:
		return lerr
	case !folder:
		return err
	}
	return answerJSON(rw, wire.Name{Name: path.Base(key), Dir: true})
}

// folder says whether something lies below key. That of which it was known last is asked for first: what a name is, its
// owner remembers for all who ask, and forgets with each write. A listing would be one more for the bucket each time.
func (n *nameReader) folder(ctx context.Context, key string) (bool, error) {
	n.mu.Lock()
	object, ok := n.within[key]
	n.mu.Unlock()
	if ok {
		if _, err := n.objects.Stat(ctx, object); err == nil {
			return true, nil
		}
	}
	page, err := n.objects.List(ctx, key+"/", "", "", 1)
	if err != nil {
		return false, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.within, key)
	if len(page.Objects) == 0 {
		return false, nil
	}
	for k := range n.within {
		if len(n.within) < maxWithin {
			break
		}
		delete(n.within, k)
	}
	n.within[key] = page.Objects[0].Key
	return true, nil
}

func (n *nameReader) names(ctx context.Context, rw http.ResponseWriter, q url.Values) error {
	folder, after := q.Get("path"), q.Get("after")
	prefix := ""
	if folder != "" {
		if err := checkPath(folder); err != nil {
			return err
		}
		prefix = folder + "/"
	}
	if after != "" {
		after = prefix + after
	}
	page, err := n.objects.List(ctx, prefix, "/", after, folderPage)
	if err != nil {
		return err
	}
	var out wire.Names
	type entry struct {
		key string
		wire.Name
	}
	var all []entry
	for _, o := range page.Objects {
		all = append(all, entry{o.Key, wire.Name{Name: o.Key[len(prefix):], Size: o.Size, Version: o.ETag, ModTime: o.ModTime}})
	}
	folders := page.Prefixes
	for _, m := range n.mounts { // which are there while they are empty, with what is above them
		rel, ok := strings.CutPrefix(m, prefix)
		if name, _, below := strings.Cut(rel, "/"); ok && below && name != "" {
			key := prefix + name + "/"
			if key > after && (!page.More || key <= page.Next) && !slices.Contains(folders, key) {
				folders = append(folders, key)
			}
		}
	}
	for _, p := range folders {
		all = append(all, entry{p, wire.Name{Name: strings.TrimSuffix(p[len(prefix):], "/"), Dir: true}})
	}
	slices.SortFunc(all, func(a, b entry) int { return cmp.Compare(a.key, b.key) })
	file := make(map[string]bool, len(page.Objects))
	for _, e := range all {
		switch {
		case e.Name.Name == "", len(e.Name.Name) > longName, e.Name.Name == ".", e.Name.Name == "..":
			continue // the folder's own marker, and what no file system can show
		case e.Dir && file[e.Name.Name]:
			continue // of an object and a folder of one name, the object is what the name is
		}
		file[e.Name.Name] = !e.Dir
		out.Names = append(out.Names, e.Name)
	}
	if page.More {
		// Nothing must be taken for the end that is none.
		if out.After = strings.TrimPrefix(page.Next, prefix); out.After == "" || page.Next <= after {
			return fmt.Errorf("%w: the listing of %q says that there is more, and not after what", source.ErrUnavailable, folder)
		}
	}
	return answerJSON(rw, out)
}

func (n *nameReader) bytes(ctx context.Context, rw http.ResponseWriter, q url.Values) error {
	key, version := q.Get("path"), q.Get("version")
	off, err1 := strconv.ParseInt(q.Get("off"), 10, 64)
	length, err2 := strconv.ParseInt(q.Get("length"), 10, 64)
	if err1 != nil || err2 != nil || off < 0 || length <= 0 || length > wire.MaxBytes || version == "" {
		return fmt.Errorf("%w: a request for bytes of %q", source.ErrInvalid, key)
	}
	if err := checkPath(key); err != nil {
		return err
	}
	o, err := n.objects.Open(ctx, key)
	if err != nil {
		return err
	}
	defer o.Close()
	info := o.Info()
	if info.ETag != version {
		return fmt.Errorf("%w: %q has version %s, not %s", source.ErrChanged, key, info.ETag, version)
	}
	if length > info.Size-off {
		return fmt.Errorf("%w: %d bytes from %d of %q, which has %d", source.ErrInvalid, length, off, key, info.Size)
	}
	if err := n.memory.Acquire(ctx, length); err != nil {
		return fmt.Errorf("%w: %w", wire.ErrOverloaded, err)
	}
	defer n.memory.Release(length)
	var b bytes.Buffer
	b.Grow(int(length))
	if err := o.WriteRange(ctx, &b, off, length); err != nil {
		return err
	}
	rw.Header().Set(wire.HeaderSum, strconv.FormatUint(uint64(crc32.Checksum(b.Bytes(), castagnoli)), 16))
	rw.Header().Set("Content-Length", strconv.Itoa(b.Len()))
	// A reader that does not take it must not keep others from memory.
	http.NewResponseController(rw).SetWriteDeadline(time.Now().Add(writeTimeout))
	rw.Write(b.Bytes()) // the reader may be gone
	http.NewResponseController(rw).SetWriteDeadline(time.Time{})
	return nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)
