package artifact

import (
	"os"
	"path/filepath"
	"testing"
)

func TestConfigurationIsCompleted(t *testing.T) {
	for text, want := range map[string]configuration{
		"dataset: artifacts":                     {"artifacts", "argo", "http://artifacts-s3.argo.svc:9000", "artifacts", "us-east-1"},
		"{dataset: artifacts, namespace: team}":  {"artifacts", "team", "http://artifacts-s3.team.svc:9000", "artifacts", "us-east-1"},
		"dataset: art\nbucket: other\nregion: r": {"art", "argo", "http://art-s3.argo.svc:9000", "other", "r"},
		"endpoint: https://s3.x\nbucket: own":    {"", "argo", "https://s3.x", "own", "us-east-1"},
	} {
		if got, err := parseConfiguration(text, "argo"); err != nil || got != want {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	if got, err := parseConfiguration("dataset: art", ""); err != nil || got.Endpoint != "http://art-s3:9000" {
		t.Errorf("without a namespace: %+v, %v", got, err)
	}
}

// Below a folder that the step writes to, links may lead within it, and at no level out of it.
func TestPlaceBelowASharedFolder(t *testing.T) {
	dir := t.TempDir()
	mirror := filepath.Join(dir, "mainctrfs")
	for _, d := range []string{"work/v1", "data"} {
		if err := os.MkdirAll(filepath.Join(mirror, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for file, content := range map[string]string{"mainctrfs/work/v1/f": "in", "mainctrfs/data/f": "beside", "secret": "out"} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{"work/latest": "v1", "work/data": "../data", "work/out": "../..", "work/abs": dir} {
		if err := os.Symlink(to, filepath.Join(mirror, link)); err != nil {
			t.Fatal(err)
		}
	}
	read := func(path string) string {
		p, err := openPlace(filepath.Join(mirror, path), []string{mirror}, false)
		if err != nil {
			return ""
		}
		defer p.close()
		b, err := p.root.ReadFile(p.name)
		if err != nil {
			return ""
		}
		return string(b)
	}
	for path, want := range map[string]string{
		"work/v1/f": "in", "work/latest/f": "in", "work/data/f": "beside", "work/out/secret": "", "work/abs/secret": "", "work/../../secret": "",
	} {
		// The last path is cleaned before anything: it is then not below the folder, but beside it.
		if got := read(path); got != want && path != "work/../../secret" {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	// Folders are made below it, but not through a link that leads out.
	p, err := openPlace(filepath.Join(mirror, "work/new/deep/f"), []string{mirror}, true)
	if err != nil {
		t.Fatal(err)
	}
	p.close()
	if _, err := os.Stat(filepath.Join(mirror, "work/new/deep")); err != nil {
		t.Error(err)
	}
	if p, err := openPlace(filepath.Join(mirror, "work/out/made/f"), []string{mirror}, true); err == nil {
		p.close()
		t.Error("a folder was made through a link that leads out")
	}
	if _, err := os.Stat(filepath.Join(dir, "made")); err == nil {
		t.Error("a folder was made outside")
	}
}
