package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// What needs a running cluster is proven by `cluster check`, which `make e2e` runs; here is what does not.

func testCluster(t *testing.T) *Cluster {
	t.Helper()
	t.Setenv("STEPCACHE_CLUSTER_STATE", t.TempDir())
	c, err := open()
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"run", "log", "pki", "images", "bin"} {
		if err := os.MkdirAll(filepath.Join(c.state, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func TestStateFolder(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", "/cache")
	t.Setenv("STEPCACHE_CLUSTER_STATE", "")
	if got, err := stateFolder(); err != nil || got != "/cache/stepcache-cluster" {
		t.Errorf("got %q, %v", got, err)
	}
	t.Setenv("STEPCACHE_CLUSTER_STATE", "/elsewhere/x/")
	if got, err := stateFolder(); err != nil || got != "/elsewhere/x" {
		t.Errorf("got %q, %v", got, err)
	}
	if clusterName("/a") == clusterName("/b") {
		t.Error("two state folders have one name: their clusters would be one")
	}
}

func TestStateFolderThatNodesHideIsRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: another user is refused before")
	}
	c := &Cluster{state: "/var/lib/stepcache"}
	err := c.locked(func() error { return nil })
	if err == nil || !strings.Contains(err.Error(), "set STEPCACHE_CLUSTER_STATE") {
		t.Errorf("got %v", err)
	}
}

// What a machine has not is said in the words of the program that found out.
func TestTrialsSayWhatFailed(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to make namespaces")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := apart("true")(ctx); err != nil {
		t.Skipf("no namespaces here: %v", err)
	}
	err := apart("echo what is missing >&2; exit 3")(ctx)
	if err == nil || !strings.Contains(err.Error(), "what is missing") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("got %v", err)
	}
}

func TestCommandLine(t *testing.T) {
	t.Setenv("STEPCACHE_CLUSTER_STATE", t.TempDir())
	for args, want := range map[string]string{
		"kill-node n9":         `there is no node "n9": name one of n1, n2, n3`,
		"start-node":           "accepts 1 arg",
		"up now":               "unknown command",
		"load-image":           "requires at least 1 arg",
		"frobnicate":           "unknown command",
		"exec-in-node n1":      "requires at least 2 arg",
		"exec-in-node n9 true": `there is no node "n9"`,
		"exec-in-node n1 true": "node n1 does not run",
		"exec-in-lab true":     "the cluster is not up",
		"requests":             "there is no audit log yet",
	} {
		cmd := command()
		cmd.SetArgs(strings.Fields(args))
		cmd.SetOut(io.Discard)
		cmd.SetErr(io.Discard)
		if err := cmd.Execute(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", args, err, want)
		}
	}
}

func TestOnAClusterThatIsDown(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	c := testCluster(t)
	ctx := t.Context()
	for name, err := range map[string]error{
		"start-node": c.StartNode(ctx, "n2"), "kill-node": c.KillNode(ctx, "n2"), "pause-node": c.PauseNode(ctx, "n2"),
		"check": c.Check(ctx), "load-image": c.onEachNode(func(string) error { return nil }),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	// Down of nothing is no error, twice.
	if err := errors.Join(c.Down(ctx), c.Down(ctx)); err != nil {
		t.Errorf("down: %v", err)
	}
}

// A recorded id that another process has by now must never be signalled.
func TestPidOfAnotherProcessIsNotOurs(t *testing.T) {
	c := testCluster(t)
	other := exec.Command("sleep", "1000")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- other.Wait() }()
	t.Cleanup(func() { _ = other.Process.Kill(); <-ended })
	began, err := startTime(other.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"other start": fmt.Sprintf("%d %s0", other.Process.Pid, began),
		"no start":    fmt.Sprint(other.Process.Pid),
		"half":        "12",
		"empty":       "",
		"text":        "x y",
	} {
		if err := os.WriteFile(c.pidFile("p"), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if pid := c.pid("p"); pid != 0 {
			t.Errorf("%s: process %d taken for ours", name, pid)
		}
		if err := c.kill("p"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A signal would still reach one that was killed, until it is waited for.
	if now, err := startTime(other.Process.Pid); err != nil || now != began {
		t.Fatalf("the other process was killed: %v", err)
	}
	// And ours is found and killed.
	if err := os.WriteFile(c.pidFile("p"), fmt.Appendf(nil, "%d %s", other.Process.Pid, began), 0o644); err != nil {
		t.Fatal(err)
	}
	if c.pid("p") != other.Process.Pid {
		t.Fatal("a running process is not found")
	}
	if err := c.kill("p"); err != nil || c.running("p") {
		t.Fatalf("kill: %v, running %v", err, c.running("p"))
	}
}

func TestNetworkIsMadeAndSwept(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("needs ip, of Debian's package iproute2")
	}
	c := testCluster(t)
	down := func() error { return c.Down(t.Context()) }
	t.Cleanup(func() { _ = down() })
	if err := c.makeNetwork(); err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		if err := c.makeNodeNetwork(n); err != nil {
			t.Fatal(err)
		}
	}
	// A process that a crashed command forgot.
	if err := c.start("forgotten", c.nodeNetwork("n1"), exec.Command("sleep", "1000")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(c.pidFile("forgotten")); err != nil {
		t.Fatal(err)
	}
	// Two nodes reach each other over the control plane's bridge, and a cut one does not.
	n3, _ := nodeNamed("n3")
	var server net.Listener
	err := c.inNetwork(c.nodeNetwork("n3"), func() (err error) {
		server, err = net.Listen("tcp", n3.ip+":7000")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	reach := func() error {
		return c.inNetwork(c.nodeNetwork("n2"), func() error {
			conn, err := net.DialTimeout("tcp", server.Addr().String(), 5*time.Second)
			if err != nil {
				return err
			}
			return conn.Close()
		})
	}
	if err := until(t.Context(), time.Minute, func(context.Context) error { return reach() }); err != nil {
		t.Errorf("n2 does not reach n3: %v", err)
	}
	if err := c.CutNode(t.Context(), "n3"); err != nil {
		t.Fatal(err)
	}
	if err := reach(); err == nil {
		t.Error("n2 reaches n3, which is cut off")
	}
	if err := c.JoinNode(t.Context(), "n3"); err != nil {
		t.Fatal(err)
	}
	if err := until(t.Context(), time.Minute, func(context.Context) error { return reach() }); err != nil {
		t.Errorf("n3 joined again: %v", err)
	}
	if err := down(); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob("/run/netns/" + c.name + "*"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestKeys(t *testing.T) {
	c := testCluster(t)
	if err := c.makeKeys(); err != nil {
		t.Fatal(err)
	}
	read := func(file string) *x509.Certificate {
		t.Helper()
		text, err := os.ReadFile(c.pki(file))
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(text)
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	pool := func(file string) *x509.CertPool {
		p := x509.NewCertPool()
		p.AddCert(read(file))
		return p
	}
	server := read("apiserver.crt")
	for _, host := range []string{controlPlaneIP, "kubernetes.default.svc"} {
		if _, err := server.Verify(x509.VerifyOptions{Roots: pool("ca.crt"), DNSName: host}); err != nil {
			t.Errorf("API server as %s: %v", host, err)
		}
	}
	client := x509.VerifyOptions{Roots: pool("ca.crt"), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	node := read("n2.crt")
	if _, err := node.Verify(client); err != nil || node.Subject.CommonName != "system:node:n2" || node.Subject.Organization[0] != "system:nodes" {
		t.Errorf("n2 is %v, %v", node.Subject, err)
	}
	// Whoever holds a client certificate of the cluster must not pass for kube-apiserver at an aggregated API.
	if _, err := node.Verify(x509.VerifyOptions{Roots: pool("front-proxy-ca.crt"), KeyUsages: client.KeyUsages}); err == nil {
		t.Error("a node's certificate is trusted as the front proxy's")
	}
}

func TestImageArchive(t *testing.T) {
	c := testCluster(t)
	program := filepath.Join(t.TempDir(), "p")
	if err := os.WriteFile(program, []byte("program"), 0o755); err != nil {
		t.Fatal(err)
	}
	i := image{name: "x", tag: busyboxImage, programs: map[string]string{"busybox": program}, links: map[string]string{"sh": "busybox", "cat": "busybox"}}
	if err := c.writeImage(i); err != nil {
		t.Fatal(err)
	}
	first, err := os.Stat(c.archive("x"))
	if err != nil {
		t.Fatal(err)
	}
	img, err := tarball.ImageFromPath(c.archive("x"), nil)
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil || len(layers) != 1 {
		t.Fatalf("%d layers, %v", len(layers), err)
	}
	content, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer content.Close()
	found := map[string]string{}
	for r := tar.NewReader(content); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(r)
		found[h.Name] = string(text) + h.Linkname
	}
	for name, want := range map[string]string{"bin/busybox": "program", "bin/sh": "busybox", "bin/cat": "busybox", "tmp/": ""} {
		if got, ok := found[name]; !ok || got != want {
			t.Errorf("%s is %q, %v", name, got, ok)
		}
	}
	// The same again is not written again: nodes take a new file for a new image.
	if err := c.writeImage(i); err != nil {
		t.Fatal(err)
	}
	if again, err := os.Stat(c.archive("x")); err != nil || !os.SameFile(first, again) {
		t.Errorf("written again though nothing changed: %v", err)
	}
	if err := os.WriteFile(program, []byte("changed"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := c.writeImage(i); err != nil {
		t.Fatal(err)
	}
	if again, err := os.Stat(c.archive("x")); err != nil || os.SameFile(first, again) {
		t.Errorf("not written though its program changed: %v", err)
	}
	i.programs = map[string]string{"gone": program + ".gone"}
	if err := c.writeImage(i); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a program that is missing: %v", err)
	}
}

func TestWhatIsNotAnArchiveIsNotLoaded(t *testing.T) {
	dir := t.TempDir()
	for _, from := range []string{dir, filepath.Join(dir, "none.tar")} {
		if err := copyFile(from, filepath.Join(dir, "to.tar")); err == nil {
			t.Errorf("%s: no error", from)
		}
		if _, err := os.Stat(filepath.Join(dir, "to.tar")); err == nil {
			t.Errorf("%s: left a file", from)
		}
	}
}

func TestFolderDigestFollowsItsFiles(t *testing.T) {
	dir := t.TempDir()
	seen := map[string]string{}
	step := func(name string, do func() error) {
		t.Helper()
		if err := do(); err != nil {
			t.Fatal(err)
		}
		sum, err := hashFolder(dir)
		if err != nil {
			t.Fatal(err)
		}
		if of, ok := seen[sum]; ok {
			t.Errorf("%s: the same digest as %s", name, of)
		}
		seen[sum] = name
	}
	write := func(file, text string) func() error {
		return func() error { return os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644) }
	}
	step("empty", func() error { return nil })
	step("a file", write("go.mod", "a"))
	step("other content", write("go.mod", "b"))
	step("second file", write("go.sum", "c"))
	step("renamed", func() error { return os.Rename(filepath.Join(dir, "go.sum"), filepath.Join(dir, "go.mod2")) })
	if _, err := hashFolder(filepath.Join(dir, "none")); err == nil || !strings.Contains(err.Error(), "without -trimpath") {
		t.Errorf("a folder that is missing: %v", err)
	}
}

func TestComponentsArePinned(t *testing.T) {
	c := testCluster(t)
	for _, p := range components {
		if _, err := c.componentKey(p); err != nil {
			t.Error(err)
		}
	}
	version, err := moduleVersion(t.Context(), filepath.Join(c.source, argoFolder), argoModule)
	if err != nil || version == "" {
		t.Errorf("Argo Workflows %q, %v", version, err)
	}
}

func TestManifestTemplates(t *testing.T) {
	for name, text := range map[string]string{"kubelet": kubeletConfig, "cni": cniConfig, "containerd": string(containerdConfig)} {
		values := map[string]string{"Name": "n1", "PodCIDR": "P", "ControlGroup": "G", "DNS": "D", "PKI": "K", "CNI": "C", "Pause": "I"}
		if out, err := expand(text, values); err != nil || bytes.Contains(out, []byte("{{")) {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
		if _, err := expand(text, nil); err == nil {
			t.Errorf("%s: a missing value is no error", name)
		}
	}
}

func TestAuditLog(t *testing.T) {
	const log = `{"kind":"Event","verb":"get","userAgent":"kubelet/v1.36.3","user":{"username":"system:node:n1"},"objectRef":{"resource":"secrets","namespace":"x"}}
{"kind":"Event","verb":"create","userAgent":"a/b/c","user":{"username":"u"},"objectRef":{"resource":"pods","apiGroup":"","subresource":"binding"}}
{"kind":"Event","verb":"get","userAgent":"kubelet/v1.36.3","user":{"username":"system:node:n1"},"objectRef":{"resource":"secrets","namespace":"y"}}
{"kind":"Event","verb":"get","userAge`
	c := testCluster(t)
	if err := os.WriteFile(c.auditLog(), []byte(log), 0o644); err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := c.Requests(&b); err != nil {
		t.Fatal(err)
	}
	var got [][]string
	for line := range strings.Lines(b.String()) {
		got = append(got, strings.Fields(line))
	}
	want := "[[REQUESTS USER PROGRAM VERB OBJECT] [2 system:node:n1 kubelet get secrets] [1 u a create pods/binding]]"
	if fmt.Sprint(got) != want {
		t.Errorf("got  %v\nwant %s", got, want)
	}
	if err := readAudit(strings.NewReader("not json\n"), func(auditEvent) {}); err == nil {
		t.Error("a line that is no event: no error")
	}
}
