package trial

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/stepcache/stepcache/local"
	"github.com/stepcache/stepcache/tier"
)

// own is this project: a tier of one worker on this machine, and `stepcache mount` beside it.
type own struct {
	program string
	// running is a tier that is there already, which then is not made anew; empty: one is made for each session.
	running string
	// manifests make the tier where there are some.
	manifests []string
}

func (o *own) name() string { return Own }

func (o *own) version(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, o.program, "version").Output()
	if err != nil {
		return "version unknown"
	}
	return strings.TrimSpace(string(out))
}

// errWarm is why a running tier has no cold figures.
var errWarm = errors.New("the tier runs already and cannot be made to forget")

func (o *own) fresh(ctx context.Context, d *Data) (s session, err error) {
	scratch, err := os.MkdirTemp("", "own")
	if err != nil {
		return nil, err
	}
	w := &ownSession{mounts: mounts{scratch: scratch}}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	dir := o.running
	if dir == "" {
		if dir, err = w.start(ctx, o.program, d, o.manifests); err != nil {
			return nil, err
		}
	}
	if d.Puts {
		return w.endpoint()
	}
	folder, err := tier.Open(dir)
	if err != nil {
		return nil, err
	}
	w.holds = Room(ctx, folder)
	w.mounts.command = func(at string, _ int) *exec.Cmd {
		return exec.Command(o.program, "mount", "--tier", dir, at)
	}
	return w, nil
}

type ownSession struct {
	mounts
	tier    *local.Tier
	workers []int
	holds   int64
}

func (s *ownSession) room() int64 { return s.holds }

// Room is how many bytes of files a tier holds for sure: seven eighths of its memory, since pages, inodes and a journal
// count, too, and a worker hands out no more of it than that. Of a tier whose workers are not to be asked, which takes a
// key that not every reader has, nothing is known: it is as large as can be.
func Room(ctx context.Context, folder tier.Folder) int64 {
	control, err := folder.Control()
	if err != nil {
		return math.MaxInt64
	}
	defer control.Close()
	workers, err := control.Status(ctx)
	if err != nil {
		return math.MaxInt64
	}
	memory := int64(0)
	for _, w := range workers {
		memory += w.Quota
	}
	return memory / int64(max(folder.Copies, 1)) / 8 * 7
}

// manifest is a tier of the data's bucket, in the words of a cluster's.
func manifest(d *Data) string {
	b, token := d.Bucket, ""
	if b.Token != "" {
		token = fmt.Sprintf(", sessionToken: %q", b.Token)
	}
	style := "Virtual"
	if b.PathStyle {
		style = "Path"
	}
	access := "ReadOnly"
	if d.Puts {
		access = "ReadWrite"
	}
	return fmt.Sprintf(`apiVersion: v1
kind: Secret
metadata: {name: access-key}
stringData: {accessKeyID: %q, accessKeySecret: %q%s}
---
apiVersion: data.stepcache.dev/v1alpha1
kind: Dataset
metadata: {name: bench}
spec:
  mounts:
  - {path: /, source: "s3://%s/%s", endpoint: %q, region: %q, addressingStyle: %s, credentialsSecretRef: {name: access-key}}
  access: %s
  workers: {replicas: 1, memory: %d}
`, b.AccessKey, b.SecretKey, token, b.Name, b.Prefix, b.Endpoint, b.Region, style, access, d.Memory)
}

// start brings up a tier of the dataset and returns its folder.
func (s *ownSession) start(ctx context.Context, program string, d *Data, manifests []string) (string, error) {
	memory := int64(0) // as the manifests and the machine allow
	if len(manifests) == 0 {
		file := filepath.Join(s.scratch, "dataset.yaml")
		if err := os.WriteFile(file, []byte(manifest(d)), 0o600); err != nil {
			return "", err
		}
		manifests, memory = []string{file}, d.Memory
	}
	before := workersOfThis()
	log := &bytes.Buffer{}
	var err error
	s.tier, err = local.Start(ctx, local.Options{Manifests: manifests, Program: program, Workers: 1, Memory: memory, Gather: true,
		Log: log, Problems: time.Minute})
	if err != nil {
		return "", fmt.Errorf("tier: %w\n%s", err, log)
	}
	for pid := range workersOfThis() {
		if !before[pid] {
			s.workers = append(s.workers, pid)
		}
	}
	for _, v := range s.tier.Env() {
		if dir, ok := strings.CutPrefix(v, tier.Env+"="); ok {
			return dir, nil
		}
	}
	return "", errors.New("the tier does not say where it is")
}

// workersOfThis are the workers that this process has started.
func workersOfThis() map[int]bool {
	found := map[int]bool{}
	children, err := os.ReadDir("/proc")
	if err != nil {
		return found
	}
	for _, e := range children {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		text, err := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if err != nil {
			continue
		}
		if args := strings.Split(string(text), "\x00"); len(args) > 1 && args[1] == "worker" {
			if s, err := statOf(pid); err == nil && s.parent == os.Getpid() {
				found[pid] = true
			}
		}
	}
	return found
}

func (s *ownSession) groups() (mounts, workers []int) { return s.pids(), s.workers }

func (s *ownSession) close() {
	s.unmount()
	if s.tier != nil {
		s.tier.Close()
	}
	_ = os.RemoveAll(s.scratch)
}
