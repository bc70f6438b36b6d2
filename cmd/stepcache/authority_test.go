package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stepcache/stepcache/bench/trial"
	"github.com/stepcache/stepcache/test/bucket"
)

// A bucket whose certificate is of an authority that only its Secret names: workers, verify and bench reach it.
func TestBucketOfAnotherAuthority(t *testing.T) {
	f := newFixture(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ours, other := bucket.NewAuthority(t), bucket.NewAuthority(t)
	store := bucket.TLSAt(t, f.server.Endpoint(), ours.Certificate(t, "127.0.0.1", time.Hour))
	secret := func(authorities string) {
		t.Helper()
		f.write(t, bucket.SecretKey, "64Mi", false)
		f.replace(t, f.server.Endpoint(), store.Endpoint())
		if authorities != "" {
			f.replace(t, "accessKeySecret: "+bucket.SecretKey, fmt.Sprintf("accessKeySecret: %s, ca.crt: %q", bucket.SecretKey, authorities))
		}
	}
	for _, c := range []struct{ name, authorities, says string }{
		{"none", "", "put that of its authority (PEM) into key ca.crt of Secret access-key"},
		{"of another store", string(other.PEM), "put that of its authority (PEM) into key ca.crt of Secret access-key"},
		{"words", "ours", "key ca.crt in folder Secret access-key: it holds no certificate"},
	} {
		secret(c.authorities)
		_, stderr, status := run(t, f.dir, "local", "-f", f.manifests, "--give-up", (10 * patience).String(), "--", "true")
		if last := lastLine(stderr); status != 1 || !strings.Contains(last, c.says) {
			t.Errorf("%s: status %d, want 1 and %q in the last line of:\n%s", c.name, status, c.says, stderr)
		}
	}
	verify := []string{"local", "-f", f.manifests, "--", self, "verify", "-f", f.manifests, "--download"}
	secret(string(ours.PEM))
	if stdout, stderr, status := run(t, f.dir, verify...); status != 0 || !strings.Contains(stdout, "3 files compared, 0 not equal") {
		t.Errorf("verify: status %d, %q: %s", status, stdout, stderr)
	}
	stdout, stderr, status := run(t, f.dir, "bench", "-f", f.manifests, "--rounds", "1", "--contenders", "direct,stepcache", "--only", "^large file: cold, 1", "-o", "json")
	var rep trial.Report
	if err := json.Unmarshal([]byte(stdout), &rep); status != 0 || err != nil || len(rep.Rows) != 1 {
		t.Fatalf("bench: status %d, %v, %q: %s", status, err, stdout, stderr)
	}
	for name, may := range map[string]bool{trial.Direct: true, trial.Own: os.Geteuid() == 0} {
		if fig := rep.Rows[0].Figures[name]; may && (fig == nil || len(fig.Samples) != 1) {
			t.Errorf("bench: %s: %+v", name, fig)
		}
	}
	// The system's authorities are trusted as well.
	secret(string(other.PEM))
	system := f.dir + "/system.crt"
	if err := os.WriteFile(system, ours.PEM, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := program(t, f.dir, "local", "-f", f.manifests, "--", "true")
	cmd.Env = append(cmd.Env, "SSL_CERT_FILE="+system)
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Run(); err != nil {
		t.Errorf("of the system's: %v: %s", err, said.String())
	}
	f.nothingLeft(t)
}
