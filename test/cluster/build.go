package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// component is a set of programs that one folder builds. It is built again only when a file of the folder
// (its go.mod pins all that goes in) or the Go version changed.
type component struct {
	name  string
	dir   string // from this one's
	build func(c *Cluster, ctx context.Context, dir string) error
}

var (
	kubernetes = component{"kubernetes", "components/kubernetes", buildKubernetes}
	components = []component{
		kubernetes,
		{"containerd", "components/containerd", building("tool")},
		{"argo", argoFolder, buildArgo},
		{"versitygw", "../../tools/bucket", building("github.com/versity/versitygw/cmd/versitygw")},
		{"probe", "images", building("./...")},
	}
)

func building(pkg string) func(*Cluster, context.Context, string) error {
	return func(c *Cluster, ctx context.Context, dir string) error {
		return c.goBuild(ctx, dir, "-ldflags", "-s -w", "-o", c.bin("")+"/", pkg)
	}
}

// Build makes every program and image that is missing or out of date.
func (c *Cluster) Build(ctx context.Context) error {
	for _, p := range components {
		if err := c.buildComponent(ctx, p); err != nil {
			return err
		}
	}
	if err := c.buildImages(ctx); err != nil {
		return fmt.Errorf("build the images: %w", err)
	}
	return nil
}

func (c *Cluster) buildComponent(ctx context.Context, p component) error {
	dir := filepath.Join(c.source, p.dir)
	key, err := c.componentKey(p)
	if err != nil {
		return err
	}
	if have, _ := os.ReadFile(c.builtFile(p)); string(have) == key {
		return nil
	}
	if err := os.MkdirAll(c.bin(""), 0o755); err != nil {
		return err
	}
	c.say("building %s", p.name)
	began, cpu := time.Now(), childTime()
	if err := p.build(c, ctx, dir); err != nil {
		return fmt.Errorf("build %s: %w", p.name, err)
	}
	c.say("built %s in %v, %v of processor time", p.name, time.Since(began).Round(time.Second), (childTime() - cpu).Round(time.Second))
	return os.WriteFile(c.builtFile(p), []byte(key), 0o644)
}

func (c *Cluster) builtFile(p component) string { return c.bin("." + p.name + ".built") }

func (c *Cluster) componentKey(p component) (string, error) {
	return hashFolder(filepath.Join(c.source, p.dir))
}

// key names all that a running cluster consists of.
func (c *Cluster) key() (string, error) {
	var keys []string
	for _, p := range components {
		k, err := c.componentKey(p)
		if err != nil {
			return "", err
		}
		keys = append(keys, k)
	}
	manifests, err := hashFolder(filepath.Join(c.source, "manifests"))
	if err != nil {
		return "", err
	}
	images, err := c.imageKeys()
	if err != nil {
		return "", err
	}
	keys = append(keys, manifests, images)
	return strings.Join(keys, "\n"), nil
}

// hashFolder is the digest of a folder's files and of what else decides what is made of them.
func hashFolder(dir string) (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, runtime.Version(), runtime.GOARCH)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		fmt.Fprintln(h, strings.TrimPrefix(path, dir))
		_, err = io.Copy(h, f)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%s is not there: build this program from its checkout, without -trimpath: %w", dir, err)
	}
	return fmt.Sprintf("%x", h.Sum(nil)), err
}

// goBuild runs go build gently: builds take long, and others work on this machine.
func (c *Cluster) goBuild(ctx context.Context, dir string, args ...string) error {
	cmd := exec.CommandContext(ctx, "nice", append([]string{"-n", "10", "go", "build", "-buildvcs=false"}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build in %s: %w\n%s", dir, err, out)
	}
	return nil
}

// kubeParts are the names by which the program kube knows what it is.
var kubeParts = []string{"kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet"}

func buildKubernetes(c *Cluster, ctx context.Context, dir string) error {
	// Without a version that parses, clients and admission take the cluster for another.
	version, err := moduleVersion(ctx, dir, "k8s.io/kubernetes")
	if err != nil {
		return err
	}
	numbers := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
	if len(numbers) != 3 {
		return fmt.Errorf("k8s.io/kubernetes has the odd version %q", version)
	}
	const pkg = "k8s.io/component-base/version"
	flags := fmt.Sprintf("-s -w -X %[1]s.gitVersion=%[2]s -X %[1]s.gitMajor=%[3]s -X %[1]s.gitMinor=%[4]s -X %[1]s.gitTreeState=clean",
		pkg, version, numbers[0], numbers[1])
	if err := c.goBuild(ctx, dir, "-ldflags", flags, "-o", c.bin("")+"/", "./..."); err != nil {
		return err
	}
	for _, name := range kubeParts {
		_ = os.Remove(c.bin(name))
		if err := os.Symlink("kube", c.bin(name)); err != nil {
			return err
		}
	}
	return nil
}

const (
	argoModule = "github.com/argoproj/argo-workflows/v3"
	argoFolder = "components/argo"
)

// argoSource is the module's source as it is built and whose manifests are applied.
func (c *Cluster) argoSource() string { return filepath.Join(c.state, "build", "argo", "source") }

// buildArgo builds Argo Workflows from a copy of its module, to which it adds the one file that the module's
// zip lacks: Go refuses to replace files inside its module cache.
func buildArgo(c *Cluster, ctx context.Context, dir string) error {
	out, err := run(ctx, dir, "go", "mod", "download", argoModule)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	from, err := run(ctx, dir, "go", "list", "-m", "-f", "{{.Dir}}", argoModule)
	if err != nil {
		return err
	}
	work := filepath.Dir(c.argoSource())
	if err := os.RemoveAll(work); err != nil {
		return err
	}
	if err := os.CopyFS(c.argoSource(), os.DirFS(from)); err != nil {
		return err
	}
	for name, to := range map[string]string{
		"go.mod": "go.mod", "go.sum": "go.sum",
		"signal_linux.go.txt": "source/workflow/executor/osspecific/signal_linux.go",
	} {
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(work, to), content, 0o644); err != nil {
			return err
		}
	}
	if out, err := run(ctx, work, "go", "mod", "edit", "-replace", argoModule+"=./source"); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return c.goBuild(ctx, work, "-ldflags", "-s -w", "-o", c.bin("")+"/", "tool")
}

// moduleVersion is the version of a module that a go.mod pins.
func moduleVersion(ctx context.Context, dir, module string) (string, error) {
	return run(ctx, dir, "go", "list", "-m", "-f", "{{.Version}}", module)
}

// run runs a command and returns its output without the last newline.
func run(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=")
	var problems strings.Builder
	cmd.Stderr = &problems
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(problems.String()))
	}
	return strings.TrimSpace(string(out)), nil
}

// childTime is the processor time of all processes that this one has waited for, and theirs.
func childTime() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_CHILDREN, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
