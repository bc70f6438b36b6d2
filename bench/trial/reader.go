package trial

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/zeebo/xxh3"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/bench/access"
	"github.com/stepcache/stepcache/bench/host"
)

// What a reader does.
const (
	opSequential = "sequential"
	opRandom     = "random"
	opSmall      = "small"
	opOpenStat   = "open-stat"
	opWalk       = "walk"
	opHash       = "hash"   // by the machine's own tool, a process for each reader
	opDigest     = "digest" // of all files, to compare them with the originals; not timed
	opPut        = "put"    // objects, of which the job's reader knows the content
	opGet        = "get"    // what was put, comparing it
	opShare      = "share"  // one is put, then got by all readers at once
)

// Job is what one reader's process is to do.
type Job struct {
	Op string `json:"op"`
	// Dirs are where to read; readers take them in turn. Bucket is read where there are none.
	Dirs   []string `json:"dirs,omitempty"`
	Bucket *Bucket  `json:"bucket,omitempty"`

	Files   []access.File `json:"files"`
	Readers int           `json:"readers"`
	Piece   int           `json:"piece,omitempty"`
	Count   int           `json:"count,omitempty"`
	Entries int64         `json:"entries,omitempty"`
	Whole   bool          `json:"whole,omitempty"`
	Tool    string        `json:"tool,omitempty"`
	// Limit ends a reading early: its rate is that until then. Zero: none.
	Limit time.Duration `json:"limit,omitempty"`
}

// Done is what it did.
type Done struct {
	access.Amount
	// Digests are those found, each once.
	Digests []string `json:"digests,omitempty"`
	// Compared says that the reader itself knew what it had to get; Wrong is what it got wrong.
	Compared bool   `json:"compared,omitempty"`
	Wrong    string `json:"wrong,omitempty"`
}

// Read does a job that comes as JSON, and tells what was done as JSON. A program that runs trials has a way to be
// started for it (Options.Reader).
func Read(ctx context.Context, in io.Reader, out io.Writer) error {
	var j Job
	if err := json.NewDecoder(in).Decode(&j); err != nil {
		return fmt.Errorf("the job of a bench's reader: %w", err)
	}
	if len(j.Files) == 0 && j.Op != opWalk {
		return errors.New("the job of a bench's reader: no files")
	}
	j.Readers = max(j.Readers, 1)
	var d Done
	var err error
	if j.Bucket != nil && (j.Op == opPut || j.Op == opGet || j.Op == opShare) {
		d, err = j.artifacts(ctx)
	} else if len(j.Dirs) > 0 {
		d, err = j.files(ctx)
	} else if j.Bucket != nil {
		d, err = j.objects(ctx)
	} else {
		err = errors.New("the job of a bench's reader: nowhere to read")
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(d)
}

func (j *Job) files(ctx context.Context) (d Done, err error) {
	path := func(k int) string { return j.Dirs[k%len(j.Dirs)] + "/" + j.Files[0].Path }
	switch j.Op {
	case opSequential:
		var paths []string
		for k := range j.Readers {
			paths = append(paths, path(k))
		}
		d.Amount, err = access.Sequential(ctx, paths, j.Files[0].Size, j.Limit)
	case opRandom:
		d.Amount, err = access.Random(ctx, path(0), j.Files[0].Size, j.Piece, j.Count, j.Limit)
	case opSmall:
		d.Amount, err = access.Small(ctx, j.Dirs[0], j.Files, j.Readers, j.Whole, j.Limit)
	case opOpenStat:
		d.Amount, err = access.OpenStat(ctx, j.Dirs[0], j.Files, j.Limit)
	case opWalk:
		d.Amount, err = access.Walk(ctx, j.Dirs[0], j.Entries, j.Limit)
	case opHash:
		d, err = j.tool(ctx, path)
	case opDigest:
		d, err = j.digest(ctx, func(_ context.Context, f access.File) (io.ReadCloser, error) {
			return os.Open(j.Dirs[0] + "/" + f.Path)
		})
	default:
		err = fmt.Errorf("the job of a bench's reader: no operation %q", j.Op)
	}
	return d, err
}

// tool hashes the first file in as many processes at once as there are readers.
func (j *Job) tool(ctx context.Context, path func(k int) string) (d Done, err error) {
	said := make([]bytes.Buffer, j.Readers)
	start := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for k := range j.Readers {
		g.Go(func() error {
			cmd := exec.CommandContext(ctx, j.Tool, path(k))
			var stderr bytes.Buffer
			cmd.Stdout, cmd.Stderr = &said[k], &stderr
			if err := cmd.Run(); err != nil {
				return fmt.Errorf("%s: %w: %s", j.Tool, err, strings.TrimSpace(stderr.String()))
			}
			return nil
		})
	}
	err = g.Wait()
	n := int64(j.Readers)
	d.Amount = access.Amount{Count: n, Bytes: n * j.Files[0].Size, Took: time.Since(start)}
	for k := range said {
		digest, _, _ := strings.Cut(said[k].String(), " ")
		d.add(digest)
	}
	return d, err
}

// add notes a digest once.
func (d *Done) add(digest string) {
	for _, have := range d.Digests {
		if have == digest {
			return
		}
	}
	d.Digests = append(d.Digests, digest)
}

// digest reads all files and sums them up, in their order.
func (j *Job) digest(ctx context.Context, open func(context.Context, access.File) (io.ReadCloser, error)) (d Done, err error) {
	sums := make([]xxh3.Uint128, len(j.Files))
	start := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for k := range j.Readers {
		g.Go(func() error {
			p := make([]byte, access.Chunk)
			for n := k; n < len(j.Files) && ctx.Err() == nil; n += j.Readers {
				r, err := open(ctx, j.Files[n])
				if err != nil {
					return err
				}
				h := xxh3.New()
				_, err = io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{r}, p)
				r.Close()
				if err != nil {
					return fmt.Errorf("read %s: %w", j.Files[n].Path, err)
				}
				sums[n] = h.Sum128()
			}
			return context.Cause(ctx)
		})
	}
	err = g.Wait()
	all := sha256.New()
	for k, s := range sums {
		b := s.Bytes()
		all.Write(b[:])
		d.Bytes += j.Files[k].Size
	}
	d.Count, d.Took = int64(len(j.Files)), time.Since(start)
	d.add(hex.EncodeToString(all.Sum(nil)))
	return d, err
}

// result is what a reader's process did and took.
type result struct {
	Done
	cpu time.Duration
}

// read runs a job in a process of its own and gives up on it after a while.
func (t *trial) read(ctx context.Context, j *Job) (r result, err error) {
	job, err := json.Marshal(j)
	if err != nil {
		return r, err
	}
	var out, said bytes.Buffer
	cmd := exec.Command(t.o.Reader[0], t.o.Reader[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(job), &out, &said
	cmd.WaitDelay = stopTimeout // tools that it has started hold its output
	p, err := startReader(cmd)
	if err != nil {
		return r, err
	}
	limit := time.NewTimer(t.o.Patience)
	defer limit.Stop()
	select {
	case <-p.Done():
	case <-limit.C:
		err = hang{fmt.Errorf("no end after %s", t.o.Patience)}
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		// What it waits for is given up first: a read of a FUSE mount ends with its connection.
		for _, dir := range j.Dirs {
			host.Abort(dir)
		}
		_ = unix.Kill(-p.Pid(), unix.SIGKILL)
		select {
		case <-p.Done():
		case <-time.After(stopTimeout):
		}
		return r, err
	}
	if s := cmd.ProcessState; s != nil {
		r.cpu = s.UserTime() + s.SystemTime()
	}
	if p.Err() != nil {
		text := strings.TrimSpace(said.String())
		if text == "" {
			text = p.Err().Error()
		}
		return r, errors.New(text)
	}
	if err := json.Unmarshal(out.Bytes(), &r.Done); err != nil {
		return r, fmt.Errorf("what the reader says: %w: %q", err, out.String())
	}
	return r, nil
}
