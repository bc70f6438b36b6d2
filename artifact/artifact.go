// Package artifact is a driver of Argo Workflows v4's artifacts: it loads and saves them through the S3
// gateway of a Dataset with access ReadWrite, or of any bucket.
//
// It owns how an artifact lies in a bucket: a file is one object; a directory is one object a file below
// KEY/, as Argo's own S3 driver has it; an empty directory is an empty object whose name ends in a slash.
// Files that may be executed keep that in the object's metadata. Links that stay within a directory are
// saved as the files they name; others, and special files, are left out with a line in the log.
//
// Argoexec neither sets deadlines nor tries again. So the driver does: what may pass is repeated for
// Patience without progress, a connection that says nothing for Stall is given up, and a cancelled call
// ends at once and leaves no parts behind. Nothing that a step or a bucket holds makes it read or write
// outside the paths it was given.
//
// Concurrency: a Driver is safe for concurrent use; transfers of all calls together are bounded, and with
// them memory, whatever the size of files and directories. Failure: an answer carries the error, which
// names the object and what to do; a call whose stream broke fails with a gRPC status. It talks to nothing
// but the bucket. It may import artifact/plugin, cache/source and cache/source/credentials.
package artifact

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/stepcache/stepcache/artifact/plugin"
	"github.com/stepcache/stepcache/cache/source"
)

// Options of a Driver. The zero value is right in a pod of Argo.
type Options struct {
	// CredentialsDir is the folder of a mounted Secret with the keys accessKeyID and secretAccessKey, or one
	// with such a folder for each Dataset. Empty: keys come from the environment.
	CredentialsDir string
	// Namespace is where a Dataset is looked for whose configuration names none.
	Namespace string
	// NodeAddress is a service on this node to talk to instead of the endpoint, if it answers: host:port or
	// unix:///path.
	NodeAddress string
	// Parallel bounds the files, and the ranges of files, under way at once; zero means 16.
	Parallel int
	// Patience is for how long one operation is repeated without progress; zero means two minutes, in which
	// a gateway is replaced.
	Patience time.Duration
	// Stall is how long a connection may be silent; zero means 30 s.
	Stall time.Duration
	// Getenv replaces os.Getenv, for credentials.
	Getenv func(string) string
	// Logger is told what was moved; nil means slog.Default().
	Logger *slog.Logger

	shared []string
	// files, slots and streams bound, over all calls, the files being saved, the ranges and parts under way,
	// and the streams whose parts are held in memory. Who holds one of a kind waits only for later ones.
	files, slots, streams *semaphore.Weighted
}

// Driver is the service.
type Driver struct {
	plugin.UnimplementedArtifactServiceServer
	options Options
	mu      sync.Mutex
	buckets map[configuration]*bucket
}

var _ plugin.ArtifactServiceServer = (*Driver)(nil)

// New returns a driver. It sends no request.
func New(o Options) *Driver {
	if o.Parallel <= 0 {
		o.Parallel = 16
	}
	if o.Patience <= 0 {
		o.Patience = 2 * time.Minute
	}
	if o.Stall <= 0 {
		o.Stall = 30 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.Getenv == nil {
		o.Getenv = os.Getenv
	}
	o.shared = shared
	o.files, o.slots, o.streams = semaphore.NewWeighted(int64(o.Parallel)), semaphore.NewWeighted(int64(o.Parallel)), semaphore.NewWeighted(4)
	return &Driver{options: o, buckets: map[configuration]*bucket{}}
}

// maxBuckets bounds the clients that are kept: the driver beside argo-server sees many configurations.
const maxBuckets = 32

// bucket is the client of an artifact's configuration.
func (d *Driver) bucket(a *plugin.Artifact) (b *bucket, key string, err error) {
	p := a.GetPlugin()
	if p == nil {
		return nil, "", errors.New("the artifact says nothing about a plugin: write plugin: {name, configuration, key} (a data template takes nothing from the artifact repository)")
	}
	if err := checkKey(p.GetKey()); err != nil {
		return nil, "", err
	}
	c, err := parseConfiguration(p.GetConfiguration(), d.options.Namespace)
	if err != nil {
		return nil, "", err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if b := d.buckets[c]; b != nil {
		return b, p.GetKey(), nil
	}
	if b, err = openBucket(c, &d.options); err != nil {
		return nil, "", err
	}
	if len(d.buckets) >= maxBuckets {
		for old, o := range d.buckets { // any: a client costs little to make again
			o.idle()
			delete(d.buckets, old)
			break
		}
	}
	d.buckets[c] = b
	return b, p.GetKey(), nil
}

// reply makes an error the text of a reply, and that of a cancelled call its status.
func reply(ctx context.Context, err error) (text string, status error) {
	switch {
	case err == nil:
		return "", nil
	case ctx.Err() != nil:
		return "", ended(ctx)
	}
	return strings.ToValidUTF8(err.Error(), "?"), nil // a message takes nothing else
}

func ended(ctx context.Context) error { return status.FromContextError(ctx.Err()).Err() }

// Load implements plugin.ArtifactServiceServer. Of an optional input that is missing it makes an empty
// directory: argoexec cannot be told by a plugin that an input is missing (it looks for an error of its
// own, which does not cross gRPC), and that is what a step finds there with Argo's own drivers.
func (d *Driver) Load(ctx context.Context, r *plugin.LoadArtifactRequest) (*plugin.LoadArtifactResponse, error) {
	err := d.load(ctx, r.GetInputArtifact(), r.GetPath())
	text, status := reply(ctx, err)
	return &plugin.LoadArtifactResponse{Success: err == nil, Error: text}, status
}

func (d *Driver) load(ctx context.Context, a *plugin.Artifact, path string) error {
	b, key, err := d.bucket(a)
	if err != nil {
		return err
	}
	start := time.Now()
	l, err := b.load(ctx, key, path)
	if errors.Is(err, source.ErrNotFound) && l.files == 0 && a.GetOptional() {
		d.options.Logger.Info("optional artifact is missing: an empty directory is in its place", "artifact", a.GetName(), "object", b.object(key), "path", path)
		return b.loadNothing(path)
	}
	if err != nil {
		return err
	}
	d.moved("loaded", a, b.object(key), path, l, start)
	return nil
}

func (d *Driver) moved(what string, a *plugin.Artifact, object, path string, l loaded, start time.Time) {
	d.options.Logger.Info(what, "artifact", a.GetName(), "object", object, "path", path, "files", l.files, "bytes", l.bytes, "took", time.Since(start).Round(time.Millisecond))
}

// Save implements plugin.ArtifactServiceServer.
func (d *Driver) Save(ctx context.Context, r *plugin.SaveArtifactRequest) (*plugin.SaveArtifactResponse, error) {
	err := d.save(ctx, r.GetOutputArtifact(), r.GetPath())
	text, status := reply(ctx, err)
	return &plugin.SaveArtifactResponse{Success: err == nil, Error: text}, status
}

func (d *Driver) save(ctx context.Context, a *plugin.Artifact, path string) error {
	b, key, err := d.bucket(a)
	if err != nil {
		return err
	}
	start := time.Now()
	l, err := b.save(ctx, path, key)
	if err != nil {
		return err
	}
	d.moved("saved", a, b.object(key), path, l, start)
	return nil
}

// Delete implements plugin.ArtifactServiceServer: it removes the object of the key, or where there is
// none everything below it.
func (d *Driver) Delete(ctx context.Context, r *plugin.DeleteArtifactRequest) (*plugin.DeleteArtifactResponse, error) {
	b, key, err := d.bucket(r.GetArtifact())
	if err == nil {
		err = b.delete(ctx, key)
	}
	text, status := reply(ctx, err)
	return &plugin.DeleteArtifactResponse{Success: err == nil, Error: text}, status
}

func (b *bucket) delete(ctx context.Context, key string) error {
	if !strings.HasSuffix(key, "/") {
		_, _, err := b.stat(ctx, key)
		if err == nil {
			return b.remove(ctx, key)
		}
		if !errors.Is(err, source.ErrNotFound) {
			return err
		}
	}
	prefix := strings.TrimSuffix(key, "/") + "/"
	for after := ""; ; {
		page, err := b.page(ctx, prefix, after, pageSize)
		if err != nil || len(page) == 0 {
			return err
		}
		keys := make([]string, len(page))
		for i, o := range page {
			keys[i] = o.key
		}
		if err := b.removeAll(ctx, keys); err != nil {
			return err
		}
		if len(page) < pageSize {
			return nil
		}
		after = keys[len(keys)-1]
	}
}

// maxReply is what the names of a listing may take: a client of Argo takes 4 MiB.
const maxReply = 4<<20 - 64<<10

// ListObjects implements plugin.ArtifactServiceServer: full keys of the objects below the artifact's, without
// the markers of directories.
func (d *Driver) ListObjects(ctx context.Context, r *plugin.ListObjectsRequest) (*plugin.ListObjectsResponse, error) {
	b, key, err := d.bucket(r.GetArtifact())
	var names []string
	if err == nil {
		names, err = b.names(ctx, key)
	}
	text, status := reply(ctx, err)
	if err != nil {
		names = nil
	}
	return &plugin.ListObjectsResponse{Objects: names, Error: text}, status
}

func (b *bucket) names(ctx context.Context, key string) (names []string, err error) {
	prefix := strings.TrimSuffix(key, "/") + "/"
	found, size := false, 0
	err = b.list(ctx, prefix, func(o object) error {
		found = true
		if strings.HasSuffix(o.key, "/") {
			return nil
		}
		size += protowire.SizeTag(1) + protowire.SizeBytes(len(o.key))
		if size > maxReply {
			return &source.Error{Op: "list", Name: b.object(prefix), Kind: source.ErrInvalid,
				Err:  fmt.Errorf("more than the %d names that fit into an answer to argoexec, which takes 4 MiB", len(names)),
				Hint: "list a directory below it, or mount the Dataset and list it in the step"}
		}
		names = append(names, o.key)
		return nil
	})
	if err != nil || found {
		return names, err
	}
	// A file has nothing below it; only what is missing altogether is an error.
	if !strings.HasSuffix(key, "/") {
		_, _, err := b.stat(ctx, key)
		return nil, err
	}
	return nil, &source.Error{Op: "list", Name: b.object(prefix), Kind: source.ErrNotFound}
}

// IsDirectory implements plugin.ArtifactServiceServer.
func (d *Driver) IsDirectory(ctx context.Context, r *plugin.IsDirectoryRequest) (*plugin.IsDirectoryResponse, error) {
	b, key, err := d.bucket(r.GetArtifact())
	var page []object
	if err == nil {
		page, err = b.page(ctx, strings.TrimSuffix(key, "/")+"/", "", 1)
	}
	text, status := reply(ctx, err)
	return &plugin.IsDirectoryResponse{IsDirectory: len(page) > 0, Error: text}, status
}

// OpenStream implements plugin.ArtifactServiceServer. A directory is streamed as a tar archive.
func (d *Driver) OpenStream(r *plugin.OpenStreamRequest, s grpc.ServerStreamingServer[plugin.OpenStreamResponse]) error {
	ctx := s.Context()
	b, key, err := d.bucket(r.GetArtifact())
	if err == nil {
		w := &frames{stream: s}
		if err = b.stream(ctx, key, w); err == nil {
			err = w.flush()
		}
	}
	text, status := reply(ctx, err)
	if status != nil {
		return status
	}
	return s.Send(&plugin.OpenStreamResponse{IsEnd: err == nil, Error: text})
}

// frames gathers what is written into messages.
type frames struct {
	stream grpc.ServerStreamingServer[plugin.OpenStreamResponse]
	buf    []byte
}

func (f *frames) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		if f.buf == nil {
			f.buf = make([]byte, 0, frameSize) // gRPC keeps a message: each has a buffer of its own
		}
		k := min(len(p), frameSize-len(f.buf))
		f.buf, p, n = append(f.buf, p[:k]...), p[k:], n+k
		if len(f.buf) == frameSize {
			if err := f.flush(); err != nil {
				return n, err
			}
		}
	}
	return n, nil
}

func (f *frames) flush() error {
	if len(f.buf) == 0 {
		return nil
	}
	err := f.stream.Send(&plugin.OpenStreamResponse{Data: f.buf})
	f.buf = nil
	return err
}

// SaveStream implements plugin.ArtifactServiceServer. A failure is a status, not a reply: where a reply
// comes early argoexec reports only that the stream ended.
func (d *Driver) SaveStream(s grpc.ClientStreamingServer[plugin.SaveStreamArtifactRequest, plugin.SaveArtifactResponse]) error {
	first, err := s.Recv()
	if err != nil {
		return status.Error(codes.InvalidArgument, "the stream ended before it named an artifact")
	}
	a := first.GetOutputArtifact()
	if a == nil {
		return status.Error(codes.InvalidArgument, "the stream's first message names no artifact")
	}
	b, key, err := d.bucket(a)
	if err == nil && strings.HasSuffix(key, "/") {
		err = fmt.Errorf("the key %q ends in a slash, as only a directory's may; remove the slash", key)
	}
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	start := time.Now()
	n, err := b.putStream(s.Context(), key, &chunks{stream: s, rest: first.GetChunk()})
	if err != nil {
		if s.Context().Err() != nil {
			return ended(s.Context())
		}
		if st, ok := status.FromError(err); ok {
			return st.Err() // of the stream itself
		}
		if source.Temporary(err) {
			return status.Error(codes.Unavailable, err.Error())
		}
		return status.Error(codes.FailedPrecondition, err.Error())
	}
	d.moved("saved", a, b.object(key), "", loaded{1, n}, start)
	return s.SendAndClose(&plugin.SaveArtifactResponse{Success: true})
}

// chunks reads the bytes of a stream's messages.
type chunks struct {
	stream grpc.ClientStreamingServer[plugin.SaveStreamArtifactRequest, plugin.SaveArtifactResponse]
	rest   []byte
}

func (c *chunks) Read(p []byte) (int, error) {
	for len(c.rest) == 0 {
		m, err := c.stream.Recv()
		if errors.Is(err, io.EOF) {
			return 0, io.EOF
		}
		if err != nil {
			return 0, err
		}
		if m.GetOutputArtifact() != nil {
			return 0, status.Error(codes.InvalidArgument, "the stream names a second artifact")
		}
		c.rest = m.GetChunk()
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// GetCapabilities implements plugin.ArtifactServiceServer.
func (d *Driver) GetCapabilities(context.Context, *plugin.GetCapabilitiesRequest) (*plugin.GetCapabilitiesResponse, error) {
	return &plugin.GetCapabilitiesResponse{SupportsSaveStream: true}, nil
}
