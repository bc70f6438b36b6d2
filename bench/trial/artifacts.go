package trial

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/minio/minio-go/v7"
	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/bench/access"
)

// Artifacts are objects that steps put and that others get, through this project's S3 endpoint and at the bucket
// itself.
type Artifacts struct {
	Data
	// Small are the sizes of small ones, of which there are up to Count each; Large is that of a large one, and
	// Shared of one that many get.
	Small         []int64
	Count         int
	Large, Shared int64
}

// consumers are how many get what one step has put.
var consumers = []int{1, 10, 100}

// artifactWorkers is how many small artifacts are put or got at once.
const artifactWorkers = 8

// artifactsSection: puts, gets of what was put, and many who want the same. Both ways end in the same bucket, which
// has a bandwidth; ratios are to the bucket itself.
func (t *trial) artifactsSection() *section {
	s := &section{name: "artifacts", rounds: t.o.Rounds}
	a := t.in.Artifacts
	if a == nil {
		return s
	}
	s.data = &a.Data
	put := func(size int64) string { return "put " + words(size) }
	get := func(size int64) string { return "get " + words(size) }
	share := func(n int) string {
		if n == 1 {
			return "producer to 1 consumer"
		}
		return fmt.Sprintf("producer to %d consumers", n)
	}
	row := func(name string, u Unit, reach string) {
		s.rows = append(s.rows, &Row{Name: name, Unit: u, Kind: Any, To: Direct, Reach: reach})
	}
	for _, size := range a.Small {
		row(put(size), PerSecond, "")
		row(get(size), PerSecond, "nothing from the bucket")
	}
	row(put(a.Large), BytesPerSecond, "")
	// Of what was put in parts (from 16 MiB) the tier fetches back what it could not keep, once.
	row(get(a.Large), BytesPerSecond, "at most once from the bucket")
	for _, n := range consumers {
		row(share(n), Seconds, "at most once from the bucket")
	}
	s.run = func(ctx context.Context, v *visit) error {
		do := &doing{ctx: ctx, v: v}
		// Beside each other in the bucket, so that neither way is helped or disturbed by the other's objects.
		files := func(kind string, n int, size int64) (files []access.File) {
			for k := range n {
				files = append(files, access.File{Path: fmt.Sprintf("%s/%s-%d/%d", v.c.name(), kind, size, k), Size: size})
			}
			return files
		}
		both := func(files []access.File, workers int) {
			first, then := put(files[0].Size), get(files[0].Size)
			job := Job{Op: opPut, Files: files, Readers: workers, Limit: t.o.Limit}
			var n int64
			if v.takes(first) {
				n = do.put(first, job).Count
			} else {
				n = do.untimed(job).Count // what is got must be there all the same
			}
			if n > 0 {
				do.put(then, Job{Op: opGet, Files: files[:n], Readers: workers, Limit: t.o.Limit})
			} else if do.takes(then) {
				f := v.row(then).of(v.c.name())
				f.Reason, f.Failed = "nothing was put", true
			}
		}
		for _, size := range a.Small {
			if v.takes(put(size)) || v.takes(get(size)) {
				both(files("small", a.Count, size), artifactWorkers)
			}
		}
		if v.takes(put(a.Large)) || v.takes(get(a.Large)) {
			both(files("large", 1, a.Large), 1)
		}
		for _, n := range consumers {
			do.put(share(n), Job{Op: opShare, Files: files(fmt.Sprint("to", n), 1, a.Shared), Readers: n})
		}
		return do.err
	}
	return s
}

// words is a size as people write it.
func words(size int64) string { return strings.Replace(humanize.IBytes(uint64(size)), ".0 ", " ", 1) }

// endpoint is this project's S3 endpoint over a tier that takes puts.
type endpoint struct {
	*ownSession
	bucket *Bucket
}

func (e *endpoint) mount(context.Context, int) error { return nil }
func (e *endpoint) where(j *Job)                     { j.Dirs, j.Bucket = nil, e.bucket }

// endpoint is how clients reach the tier, which says so in its environment.
func (s *ownSession) endpoint() (session, error) {
	b := &Bucket{PathStyle: true, Region: "us-east-1"}
	folder := ""
	for _, v := range s.tier.Env() {
		name, value, _ := strings.Cut(v, "=")
		switch name {
		case "STEPCACHE_S3_ENDPOINT":
			b.Endpoint = value
		case "STEPCACHE_S3_BUCKET":
			b.Name = value
		case "STEPCACHE_S3_CREDENTIALS":
			folder = value
		}
	}
	if folder == "" {
		return nil, errors.New("the tier does not say where its S3 endpoint is")
	}
	for file, to := range map[string]*string{"accessKeyID": &b.AccessKey, "secretAccessKey": &b.SecretKey} {
		text, err := os.ReadFile(filepath.Join(folder, file))
		if err != nil {
			return nil, err
		}
		*to = string(text)
	}
	return &endpoint{s, b}, nil
}

// contents are those of a job's objects: each is another window of the same noise.
type contents []byte

func (j *Job) contents() contents {
	size := int64(0)
	for _, f := range j.Files {
		size = max(size, f.Size)
	}
	return access.Noise(int(size)+len(j.Files), uint64(size))
}

func (c contents) of(k int, size int64) []byte { return c[k : k+int(size)] }

// artifacts does the jobs that put, and those that compare what they get with what was put.
func (j *Job) artifacts(ctx context.Context) (d Done, err error) {
	all := j.contents()
	client, err := j.Bucket.Client()
	if err != nil {
		return d, err
	}
	var count, read atomic.Int64
	var start time.Time
	switch j.Op {
	case opPut:
		start = time.Now()
		g, ctx := errgroup.WithContext(ctx)
		g.SetLimit(j.Readers)
		// Those that were put are the first ones, wherever the limit ends it.
		for k, f := range j.Files {
			if ctx.Err() != nil || j.Limit > 0 && time.Since(start) >= j.Limit {
				break
			}
			g.Go(func() error {
				err := j.put(ctx, client, f, all.of(k, f.Size))
				count.Add(1)
				read.Add(f.Size)
				return err
			})
		}
		err = g.Wait()
	case opGet:
		start = time.Now()
		err = each(ctx, j.Readers, len(j.Files), func(ctx context.Context, k int) error {
			if j.Limit > 0 && time.Since(start) >= j.Limit {
				return nil
			}
			f := j.Files[k]
			err := j.compared(ctx, client, f, all.of(k, f.Size))
			count.Add(1)
			read.Add(f.Size)
			return err
		})
	case opShare:
		// A client each, with connections of its own, as steps have.
		clients := make([]*minio.Core, j.Readers)
		for k := range clients {
			if clients[k], err = j.Bucket.Client(); err != nil {
				return d, err
			}
		}
		f := j.Files[0]
		start = time.Now()
		if err := j.put(ctx, client, f, all.of(0, f.Size)); err != nil {
			return d, err
		}
		err = each(ctx, j.Readers, j.Readers, func(ctx context.Context, k int) error {
			err := j.compared(ctx, clients[k], f, all.of(0, f.Size))
			count.Add(1)
			read.Add(f.Size)
			return err
		})
	}
	d.Amount = access.Amount{Count: count.Load(), Bytes: read.Load(), Took: time.Since(start)}
	var w wrongBytes
	if errors.As(err, &w) {
		d.Wrong, err = w.Error(), nil
	} else if j.Op != opPut {
		d.Compared = true
	}
	return d, err
}

// wrongBytes are others than those that were put.
type wrongBytes struct{ path string }

func (w wrongBytes) Error() string { return "WRONG BYTES: " + w.path + " is not what was put" }

// put puts as Argo's own driver does: with an MD5, and in parts from 16 MiB.
func (j *Job) put(ctx context.Context, c *minio.Core, f access.File, content []byte) error {
	_, err := c.Client.PutObject(ctx, j.Bucket.Name, j.Bucket.Prefix+f.Path, bytes.NewReader(content), f.Size, minio.PutObjectOptions{SendContentMd5: true})
	if err != nil {
		return fmt.Errorf("put %s: %w", f.Path, err)
	}
	return nil
}

// compared gets an object and compares it on the way.
func (j *Job) compared(ctx context.Context, c *minio.Core, f access.File, want []byte) error {
	body, err := j.get(ctx, c, f, 0, f.Size)
	if err != nil {
		return err
	}
	defer body.Close()
	p := make([]byte, min(256<<10, len(want)))
	for len(want) > 0 {
		n, err := io.ReadFull(body, p[:min(len(p), len(want))])
		if err != nil {
			return fmt.Errorf("get %s: %w", f.Path, err)
		}
		if !bytes.Equal(p[:n], want[:n]) {
			return wrongBytes{f.Path}
		}
		want = want[n:]
	}
	return nil
}
