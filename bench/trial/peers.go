package trial

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// peer is another project's mount of a bucket, in the settings that its own documentation gives for reading many
// times what does not change: a cache with room for all of it, attributes and listings kept, many requests at once.
type peer struct {
	program string
	path    string
	// versionArgs ask it for its version.
	versionArgs []string
	// command mounts the bucket at dir in the foreground. state is a folder in memory for cache and settings.
	command func(b *Bucket, state, dir string) (args, env []string)
	// settle is how long after a reading it keeps to itself what it has cached: who mounts anew sooner has no cache.
	settle time.Duration
}

// Peers are the names of the other projects that are known here, which are those of their programs.
var Peers = []string{"rclone", "s3fs", "geesefs", "mount-s3"}

// peers are those that are on the PATH.
func peers() (found []*peer) {
	for _, p := range []*peer{
		// It closes a cached file, and writes down what it holds of it, five seconds after its reader has
		// (--vfs-handle-caching).
		{program: "rclone", versionArgs: []string{"version"}, command: rclone, settle: 6 * time.Second},
		{program: "s3fs", versionArgs: []string{"--version"}, command: s3fs},
		{program: "geesefs", versionArgs: []string{"--version"}, command: geesefs},
		{program: "mount-s3", versionArgs: []string{"--version"}, command: mountpoint},
	} {
		var err error
		if p.path, err = exec.LookPath(p.program); err == nil {
			found = append(found, p)
		}
	}
	return found
}

func (p *peer) name() string { return p.program }

func (p *peer) version(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, p.path, p.versionArgs...).CombinedOutput()
	if err != nil {
		return "version unknown"
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return line
}

func (p *peer) fresh(_ context.Context, d *Data) (session, error) {
	// In the scratch folder: it is in memory, as this project's cache is.
	scratch, err := os.MkdirTemp("", p.program)
	if err != nil {
		return nil, err
	}
	m := &mounts{scratch: scratch, settle: p.settle, command: func(dir string, k int) *exec.Cmd {
		// Mounts at the same time cannot share a cache: each is a pod with its own.
		state := filepath.Join(scratch, fmt.Sprintf("cache%d", k))
		_ = os.MkdirAll(state, 0o700) // the peer says what is wrong with it
		args, env := p.command(d.Bucket, state, dir)
		cmd := exec.Command(p.path, args...)
		cmd.Env = append(os.Environ(), env...)
		return cmd
	}}
	return &peerSession{m}, nil
}

type peerSession struct{ *mounts }

func (s *peerSession) groups() (mounts, workers []int) { return s.pids(), nil }

func (s *peerSession) close() {
	s.unmount()
	_ = os.RemoveAll(s.scratch)
}

func rclone(b *Bucket, state, dir string) (args, env []string) {
	env = []string{
		"RCLONE_CONFIG=" + filepath.Join(state, "none.conf"),
		"RCLONE_CONFIG_BENCH_TYPE=s3", "RCLONE_CONFIG_BENCH_PROVIDER=Other",
		"RCLONE_CONFIG_BENCH_ENDPOINT=" + b.Endpoint, "RCLONE_CONFIG_BENCH_REGION=" + b.Region,
		"RCLONE_CONFIG_BENCH_ACCESS_KEY_ID=" + b.AccessKey, "RCLONE_CONFIG_BENCH_SECRET_ACCESS_KEY=" + b.SecretKey,
		"RCLONE_CONFIG_BENCH_SESSION_TOKEN=" + b.Token,
		fmt.Sprintf("RCLONE_CONFIG_BENCH_FORCE_PATH_STYLE=%v", b.PathStyle),
	}
	return []string{"mount", "bench:" + b.Name + "/" + b.Prefix, dir, "--read-only",
		"--vfs-cache-mode", "full", "--cache-dir", filepath.Join(state, "vfs"), "--vfs-cache-max-age", "24h",
		"--vfs-fast-fingerprint", "--use-server-modtime", "--no-checksum",
		"--vfs-read-chunk-size", "16M", "--vfs-read-chunk-streams", "8", "--buffer-size", "16M", "--vfs-read-ahead", "128M",
		"--dir-cache-time", "24h", "--attr-timeout", "1h", "--poll-interval", "0", "--transfers", "64", "--checkers", "64"}, env
}

func s3fs(b *Bucket, state, dir string) (args, env []string) {
	bucket := b.Name
	if b.Prefix != "" {
		bucket += ":/" + strings.TrimSuffix(b.Prefix, "/")
	}
	cache := filepath.Join(state, "cache")
	_ = os.MkdirAll(cache, 0o700)
	options := []string{"url=" + b.Endpoint, "endpoint=" + b.Region, "ro", "use_cache=" + cache, "kernel_cache",
		"max_stat_cache_size=200000", "stat_cache_expire=86400", "enable_noobj_cache", "complement_stat",
		"parallel_count=16", "multipart_size=16", "multireq_max=64", "tmpdir=" + state}
	if b.PathStyle {
		options = append(options, "use_path_request_style")
	}
	env = []string{"AWS_ACCESS_KEY_ID=" + b.AccessKey, "AWS_SECRET_ACCESS_KEY=" + b.SecretKey}
	if b.Token != "" {
		env = append(env, "AWS_SESSION_TOKEN="+b.Token)
	}
	return []string{bucket, dir, "-f", "-o", strings.Join(options, ",")}, env
}

func geesefs(b *Bucket, state, dir string) (args, env []string) {
	bucket := b.Name
	if b.Prefix != "" {
		bucket += ":" + strings.TrimSuffix(b.Prefix, "/")
	}
	args = []string{"-f", "--endpoint", b.Endpoint, "--region", b.Region, "-o", "ro", "--list-type", "2",
		"--memory-limit", "4096", "--cache", filepath.Join(state, "cache"), "--stat-cache-ttl", "24h", "--no-checksum",
		"--read-ahead-large", "131072", "--read-ahead-parallel", "16384"}
	if !b.PathStyle {
		args = append(args, "--subdomain")
	}
	return append(args, bucket, dir), credentialsEnv(b)
}

func mountpoint(b *Bucket, state, dir string) (args, env []string) {
	cache := filepath.Join(state, "cache")
	_ = os.MkdirAll(cache, 0o700)
	args = []string{b.Name, dir, "--foreground", "--read-only", "--endpoint-url", b.Endpoint, "--region", b.Region,
		"--cache", cache, "--metadata-ttl", "indefinite"}
	if b.PathStyle {
		args = append(args, "--force-path-style")
	}
	if b.Prefix != "" {
		args = append(args, "--prefix", b.Prefix)
	}
	return args, credentialsEnv(b)
}

func credentialsEnv(b *Bucket) []string {
	env := []string{"AWS_ACCESS_KEY_ID=" + b.AccessKey, "AWS_SECRET_ACCESS_KEY=" + b.SecretKey}
	if b.Token != "" {
		env = append(env, "AWS_SESSION_TOKEN="+b.Token)
	}
	return env
}
