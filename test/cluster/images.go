package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// The images that every node has. There is no registry: pods that name another image, or that pull, fail.
const (
	pauseImage   = "docker.io/stepcache/pause:1"
	probeImage   = "docker.io/stepcache/probe:1"
	bucketImage  = "docker.io/stepcache/bucket:1"
	busyboxImage = "docker.io/library/busybox:1.35" // Debian's
)

func argoImages(version string) (controller, executor string) {
	return "quay.io/argoproj/workflow-controller:" + version, "quay.io/argoproj/argoexec:" + version
}

const loadedFolder = "images-loaded"

// images has the archives that up makes, loadedImages those of load-image.
func (c *Cluster) images() string             { return filepath.Join(c.state, "images") }
func (c *Cluster) loadedImages() string       { return filepath.Join(c.state, loadedFolder) }
func (c *Cluster) archive(name string) string { return filepath.Join(c.images(), name+".tar") }

// image is one image: programs and links in a folder /bin, and nothing else but what a program expects of
// any system.
type image struct {
	name       string // of its archive
	tag        string
	programs   map[string]string // name in /bin to file
	links      map[string]string // name in /bin to target
	entrypoint []string
	user       string
}

func (c *Cluster) buildImages(ctx context.Context) error {
	if err := os.MkdirAll(c.images(), 0o755); err != nil {
		return err
	}
	// Of the product's own module, so Go's cache decides whether there is anything to build.
	if err := building("./test/bucket/bucketd")(c, ctx, filepath.Join(c.source, "..", "..")); err != nil {
		return err
	}
	argo, err := moduleVersion(ctx, filepath.Join(c.source, argoFolder), argoModule)
	if err != nil {
		return err
	}
	controller, executor := argoImages(argo)
	applets, err := run(ctx, "/", "busybox", "--list")
	if err != nil {
		return err
	}
	links := map[string]string{}
	for applet := range strings.FieldsSeq(applets) {
		if applet != "busybox" {
			links[applet] = "busybox"
		}
	}
	for _, i := range []image{
		{name: "pause", tag: pauseImage, programs: map[string]string{"pause": c.bin("pause")}, entrypoint: []string{"/bin/pause"}, user: "65535:65535"},
		{name: "probe", tag: probeImage, programs: map[string]string{"probe": c.bin("probe")}, entrypoint: []string{"/bin/probe"}},
		{name: "busybox", tag: busyboxImage, programs: map[string]string{"busybox": "/bin/busybox"}, links: links},
		{name: "bucket", tag: bucketImage, programs: map[string]string{"bucketd": c.bin("bucketd"), "versitygw": c.bin("versitygw")}, entrypoint: []string{"/bin/bucketd"}},
		{name: "workflow-controller", tag: controller, programs: map[string]string{"workflow-controller": c.bin("workflow-controller")}, entrypoint: []string{"/bin/workflow-controller"}, user: "8737"},
		{name: "argoexec", tag: executor, programs: map[string]string{"argoexec": c.bin("argoexec")}, entrypoint: []string{"/bin/argoexec"}},
	} {
		if err := c.writeImage(i); err != nil {
			return fmt.Errorf("%s: %w", i.name, err)
		}
	}
	return nil
}

// writeImage writes an image's archive, unless one with the same content is there.
func (c *Cluster) writeImage(i image) error {
	layer, err := i.layer()
	if err != nil {
		return err
	}
	key := fmt.Sprintf("%x %s %v %s", sha256.Sum256(layer), i.tag, i.entrypoint, i.user)
	keyFile := c.imageKey(i.name)
	if have, _ := os.ReadFile(keyFile); string(have) == key {
		if _, err := os.Stat(c.archive(i.name)); err == nil {
			return nil
		}
	}
	img, err := mutate.AppendLayers(empty.Image, static.NewLayer(layer, types.DockerUncompressedLayer))
	if err != nil {
		return err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Config = v1.Config{Entrypoint: i.entrypoint, User: i.user, Env: []string{"PATH=/bin"}, WorkingDir: "/"}
	if i.entrypoint == nil {
		config.Config.Cmd = []string{"/bin/sh"}
	}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		return err
	}
	tag, err := name.NewTag(i.tag)
	if err != nil {
		return err
	}
	// Under another name first: a node that starts now must not read half an archive.
	if err := tarball.WriteToFile(c.archive(i.name)+".new", tag, img); err != nil {
		return err
	}
	if err := os.Rename(c.archive(i.name)+".new", c.archive(i.name)); err != nil {
		return err
	}
	return os.WriteFile(keyFile, []byte(key), 0o644)
}

func (c *Cluster) imageKey(name string) string { return filepath.Join(c.images(), "."+name) }

// imageKeys names the content of all images.
func (c *Cluster) imageKeys() (string, error) {
	files, err := filepath.Glob(c.imageKey("*"))
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for _, f := range files {
		key, err := os.ReadFile(f)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "%s\n", key)
	}
	return b.String(), nil
}

// layer is the image's content; the same programs give the same bytes.
func (i image) layer() ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	header := func(h tar.Header) error {
		h.ModTime = time.Unix(0, 0)
		return w.WriteHeader(&h)
	}
	for _, dir := range []tar.Header{{Name: "bin/", Mode: 0o755}, {Name: "etc/", Mode: 0o755}, {Name: "tmp/", Mode: 0o1777}} {
		dir.Typeflag = tar.TypeDir
		if err := header(dir); err != nil {
			return nil, err
		}
	}
	file := func(name string, mode int64, content []byte) error {
		if err := header(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(content))}); err != nil {
			return err
		}
		_, err := w.Write(content)
		return err
	}
	if err := file("etc/passwd", 0o644, []byte("root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")); err != nil {
		return nil, err
	}
	for _, name := range sorted(i.programs) {
		content, err := os.ReadFile(i.programs[name])
		if err != nil {
			return nil, err
		}
		if err := file(path.Join("bin", name), 0o755, content); err != nil {
			return nil, err
		}
	}
	for _, name := range sorted(i.links) {
		if err := header(tar.Header{Typeflag: tar.TypeSymlink, Name: path.Join("bin", name), Linkname: i.links[name], Mode: 0o777}); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), w.Close()
}

func sorted(m map[string]string) []string {
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// LoadImages puts archives onto every running node, and onto those that start later.
func (c *Cluster) LoadImages(ctx context.Context, archives []string) error {
	if !c.running("apiserver") {
		return errors.New("the cluster is not up; `cluster up` starts it")
	}
	for _, from := range archives {
		to := filepath.Join(c.loadedImages(), strings.TrimSuffix(filepath.Base(from), ".tar")+".tar")
		if err := copyFile(from, to); err != nil {
			return fmt.Errorf("load %s: %w", from, err)
		}
		err := c.onEachNode(func(node string) error {
			_, err := c.inNode(ctx, node, append([]string{c.bin("ctr")}, importArgs(to)...)...)
			return err
		})
		if err != nil {
			// Not a second time at the next start of a node.
			return fmt.Errorf("load %s: %w", from, errors.Join(err, os.Remove(to)))
		}
	}
	return nil
}

// TagImage gives an image a second name on every running node.
func (c *Cluster) TagImage(ctx context.Context, from, to string) error {
	f, err := name.ParseReference(from)
	if err != nil {
		return err
	}
	t, err := name.ParseReference(to)
	if err != nil {
		return err
	}
	return c.onEachNode(func(node string) error {
		_, err := c.inNode(ctx, node, c.bin("ctr"), "--namespace", "k8s.io", "images", "tag", "--local", "--force", containerdName(f), containerdName(t))
		return err
	})
}

// containerdName is how containerd writes a name: with Docker's registry where none is named.
func containerdName(r name.Reference) string {
	return strings.Replace(r.Name(), name.DefaultRegistry+"/", "docker.io/", 1)
}

// onEachNode runs f for every running node at once and returns the first error.
func (c *Cluster) onEachNode(f func(node string) error) error {
	done := make(chan error)
	n := 0
	for _, node := range nodes {
		if c.running(node.name) {
			n++
			go func() { done <- f(node.name) }()
		}
	}
	if n == 0 {
		return errors.New("no node runs; `cluster up` starts them")
	}
	var first error // the others say the same
	for range n {
		if err := <-done; first == nil {
			first = err
		}
	}
	return first
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	if info, err := in.Stat(); err != nil || info.Mode()&fs.ModeType != 0 {
		return errors.Join(err, fmt.Errorf("%s is no archive", from))
	}
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
