package artifact_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/stepcache/stepcache/artifact"
	"github.com/stepcache/stepcache/artifact/plugin"
	"github.com/stepcache/stepcache/test/bucket"
	"github.com/stepcache/stepcache/test/workers"
)

const bucketName = "artifacts"

// fixture is a driver before a real S3 server, and a client as argoexec has one.
type fixture struct {
	*argoexec
	server *bucket.Server
	faults *bucket.FaultProxy
	dir    string
	// configuration is what artifacts say.
	configuration string
	// prefix is what the keys of artifacts begin with in the bucket; others are the configurations of all
	// workers, of a tier.
	prefix string
	others []string
}

// keys are the test server's, as a container's environment has them.
func keys(name string) string {
	return map[string]string{
		"STEPCACHE_S3_ACCESS_KEY_ID": bucket.AccessKey, "STEPCACHE_S3_SECRET_ACCESS_KEY": bucket.SecretKey,
	}[name]
}

func start(t *testing.T, o artifact.Options) *fixture {
	t.Helper()
	f := &fixture{server: bucket.StartT(t, bucket.Options{}), dir: t.TempDir()}
	if err := f.server.MakeBucket(t.Context(), bucketName); err != nil {
		t.Fatal(err)
	}
	f.faults = bucket.Faults(t, f.server)
	f.configuration = fmt.Sprintf("endpoint: %s\nbucket: %s\n", f.faults.Endpoint(), bucketName)
	if o.Getenv == nil && o.CredentialsDir == "" {
		o.Getenv = keys
	}
	f.argoexec = connect(t, serve(t, o))
	return f
}

// startTier is start with two workers before the bucket: artifacts go to the first.
func startTier(t *testing.T, o artifact.Options) *fixture {
	t.Helper()
	f := &fixture{server: bucket.StartT(t, bucket.Options{}), dir: t.TempDir(), prefix: "team/artifacts/"}
	if err := f.server.MakeBucket(t.Context(), bucketName); err != nil {
		t.Fatal(err)
	}
	for _, endpoint := range workers.Start(t, f.server, bucketName, f.prefix, 2) {
		f.others = append(f.others, fmt.Sprintf("endpoint: http://%s\nbucket: %s\n", endpoint, workers.Bucket))
	}
	f.configuration = f.others[0]
	o.Getenv = func(name string) string {
		return map[string]string{
			"STEPCACHE_S3_ACCESS_KEY_ID": workers.AccessKey, "STEPCACHE_S3_SECRET_ACCESS_KEY": workers.SecretKey,
		}[name]
	}
	f.argoexec = connect(t, serve(t, o))
	return f
}

// overBoth runs a test with a driver before a bucket and with one before the tier.
func overBoth(t *testing.T, o artifact.Options, test func(t *testing.T, f *fixture)) {
	t.Run("bucket", func(t *testing.T) { test(t, start(t, o)) })
	t.Run("tier", func(t *testing.T) { test(t, startTier(t, o)) })
}

// serve runs a driver for the length of the test and returns its socket.
func serve(t *testing.T, o artifact.Options) string {
	t.Helper()
	if o.Logger == nil {
		o.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	// A socket's path is short; a test's folder need not be.
	dir, err := os.MkdirTemp("", "artifact-")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "stepcache", "socket")
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- artifact.New(o).Serve(ctx, socket) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("driver: %v", err)
		}
		os.RemoveAll(dir)
	})
	waitFor(t, "the socket", func() bool { _, err := os.Stat(socket); return err == nil })
	return socket
}

func waitFor(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !f() {
		if time.Now().After(deadline) {
			t.Fatalf("waited for %s in vain", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// argoexec speaks to a driver as Argo's own client does: default limits of a message, no deadlines, and
// errors read from replies before they are wrapped.
type argoexec struct {
	conn   *grpc.ClientConn
	client plugin.ArtifactServiceClient
}

func connect(t *testing.T, socket string) *argoexec {
	t.Helper()
	info, err := os.Stat(socket)
	if err != nil || info.Mode()&os.ModeSocket == 0 {
		t.Fatalf("%v, %v", info, err)
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			return (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "unix", strings.TrimPrefix(addr, "unix://"))
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &argoexec{conn, plugin.NewArtifactServiceClient(conn)}
}

func (a *argoexec) load(ctx context.Context, art *plugin.Artifact, path string) error {
	r, err := a.client.Load(ctx, &plugin.LoadArtifactRequest{InputArtifact: art, Path: path})
	if err == nil && !r.GetSuccess() {
		err = errors.New(r.GetError())
	}
	return err
}

func (a *argoexec) save(ctx context.Context, path string, art *plugin.Artifact) error {
	r, err := a.client.Save(ctx, &plugin.SaveArtifactRequest{Path: path, OutputArtifact: art})
	if err == nil && !r.GetSuccess() {
		err = errors.New(r.GetError())
	}
	return err
}

func (a *argoexec) delete(ctx context.Context, art *plugin.Artifact) error {
	r, err := a.client.Delete(ctx, &plugin.DeleteArtifactRequest{Artifact: art})
	if err == nil && !r.GetSuccess() {
		err = errors.New(r.GetError())
	}
	return err
}

func (a *argoexec) list(ctx context.Context, art *plugin.Artifact) ([]string, error) {
	r, err := a.client.ListObjects(ctx, &plugin.ListObjectsRequest{Artifact: art})
	if err == nil && r.GetError() != "" {
		err = errors.New(r.GetError())
	}
	return r.GetObjects(), err
}

func (a *argoexec) isDirectory(ctx context.Context, art *plugin.Artifact) (bool, error) {
	r, err := a.client.IsDirectory(ctx, &plugin.IsDirectoryRequest{Artifact: art})
	if err == nil && r.GetError() != "" {
		err = errors.New(r.GetError())
	}
	return r.GetIsDirectory(), err
}

// open streams an artifact to w.
func (a *argoexec) open(ctx context.Context, art *plugin.Artifact, w io.Writer) error {
	s, err := a.client.OpenStream(ctx, &plugin.OpenStreamRequest{Artifact: art})
	if err != nil {
		return err
	}
	for {
		r, err := s.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return errors.New("the stream ended without its last message")
		case err != nil:
			return err
		case r.GetError() != "":
			return errors.New(r.GetError())
		case r.GetIsEnd():
			return nil
		}
		if _, err := w.Write(r.GetData()); err != nil {
			return err
		}
	}
}

const saveStreamChunk = 2 << 20

// saveStream asks for the capability, then sends a first message that names the artifact and chunks of
// 2 MiB. When the server ends the stream the cause comes from CloseAndRecv only.
func (a *argoexec) saveStream(ctx context.Context, r io.Reader, art *plugin.Artifact) error {
	capable, err := a.client.GetCapabilities(ctx, &plugin.GetCapabilitiesRequest{})
	if err != nil || !capable.GetSupportsSaveStream() {
		return fmt.Errorf("no SaveStream: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := a.client.SaveStream(ctx)
	if err != nil {
		return err
	}
	send := func(m *plugin.SaveStreamArtifactRequest) error {
		err := s.Send(m)
		if err == nil {
			return nil
		}
		if _, rerr := s.CloseAndRecv(); rerr != nil {
			return rerr
		}
		return err
	}
	if err := send(&plugin.SaveStreamArtifactRequest{OutputArtifact: art}); err != nil {
		return err
	}
	buf := make([]byte, saveStreamChunk)
	for {
		n, rerr := r.Read(buf)
		if n > 0 {
			if err := send(&plugin.SaveStreamArtifactRequest{Chunk: append([]byte(nil), buf[:n]...)}); err != nil {
				return err
			}
		}
		if errors.Is(rerr, io.EOF) {
			break
		}
		if rerr != nil {
			return rerr
		}
	}
	reply, err := s.CloseAndRecv()
	if err == nil && !reply.GetSuccess() {
		err = errors.New(reply.GetError())
	}
	return err
}

// artifact is what argoexec sends for an artifact with this key.
func (f *fixture) artifact(key string) *plugin.Artifact {
	return &plugin.Artifact{Name: "art", Plugin: &plugin.PluginArtifact{Name: "stepcache", Configuration: f.configuration, Key: key}}
}

func (f *fixture) path(name string) string { return filepath.Join(f.dir, name) }

func (f *fixture) write(t *testing.T, name string, content []byte, mode os.FileMode) string {
	t.Helper()
	path := f.path(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

// objects are the keys in the bucket, uploads the multipart uploads that nobody ended.
func (f *fixture) objects(t *testing.T) (keys []string) {
	t.Helper()
	c, err := f.server.Client()
	if err != nil {
		t.Fatal(err)
	}
	for o := range c.ListObjects(t.Context(), bucketName, minio.ListObjectsOptions{Recursive: true}) {
		if o.Err != nil {
			t.Fatal(o.Err)
		}
		key, ok := strings.CutPrefix(o.Key, f.prefix)
		if !ok {
			t.Errorf("%q lies beside the prefix %q", o.Key, f.prefix)
		}
		keys = append(keys, key)
	}
	return keys
}

func (f *fixture) uploads(t *testing.T) (keys []string) {
	t.Helper()
	c, err := f.server.Client()
	if err != nil {
		t.Fatal(err)
	}
	r, err := (minio.Core{Client: c}).ListMultipartUploads(t.Context(), bucketName, "", "", "", "", 1000)
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range r.Uploads {
		keys = append(keys, u.Key)
	}
	return keys
}

// wantError fails unless the error says every part.
func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want one that says %q", parts)
		return
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("does not say %q: %v", p, err)
		}
	}
}

func wantCode(t *testing.T, err error, code codes.Code) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("%v, want %v", err, code)
	}
}
