package tier

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/worker"
)

func TestFolders(t *testing.T) {
	dir := t.TempDir()
	if _, err := Open(""); err == nil || !strings.Contains(err.Error(), Env) {
		t.Errorf("no folder: %v", err)
	}
	if _, err := All(dir); err == nil || !strings.Contains(err.Error(), "stepcache local") {
		t.Errorf("an empty folder: %v", err)
	}
	var want []Folder
	for _, name := range []string{"a", "b"} {
		f := Folder{Dir: filepath.Join(dir, name), Dataset: "ns/" + name, Node: "n1", Copies: 2}
		if err := os.Mkdir(f.Dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := f.Write(); err != nil {
			t.Fatal(err)
		}
		want = append(want, f)
	}
	got, err := All(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("folders (-want +got):\n%s", diff)
	}
	if got, err = All(want[1].Dir); err != nil || len(got) != 1 || got[0] != want[1] {
		t.Errorf("one folder: %v, %v", got, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "a", "tier.json"), []byte(`{"dataset":""}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := All(dir); err == nil || !strings.Contains(err.Error(), "does not name a Dataset") {
		t.Errorf("a broken folder: %v", err)
	}
}

func TestWorkerConfig(t *testing.T) {
	d := &v1alpha1.Dataset{}
	d.Namespace, d.Name = "argo", "genomes"
	d.Spec.Mounts = []v1alpha1.Mount{
		{Source: "s3://b/p/", Path: "/a", Endpoint: "http://s3:9000", Region: "r", AddressingStyle: "Virtual", CredentialsSecretRef: &v1alpha1.CredentialsRef{Name: "key"}},
		{Source: "oss://c/", Path: "/b", Region: "cn-shanghai", Anonymous: true, AllowUnversioned: true},
	}
	d.Spec.Workers = v1alpha1.Workers{Replicas: 3, Copies: 2, Memory: resource.MustParse("1Gi")}
	got, err := WorkerConfig(d, func(name string) string { return "/secrets/" + name })
	if err != nil {
		t.Fatal(err)
	}
	want := worker.Config{Dataset: "argo/genomes", Memory: 1 << 30, Copies: 2, Mounts: []worker.Mount{
		{Path: "/a", Config: source.Config{URL: "s3://b/p/", Endpoint: "http://s3:9000", Region: "r", Addressing: source.AddressingVirtual, CredentialsDir: "/secrets/key",
			CredentialKeys: map[string]string{"accessKeyID": "accessKeyID", "accessKeySecret": "accessKeySecret", "sessionToken": "sessionToken"}}},
		{Path: "/b", Config: source.Config{URL: "oss://c/", Region: "cn-shanghai", Anonymous: true, AllowUnversioned: true}},
	}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("config (-want +got):\n%s", diff)
	}
	d.Spec.Mounts[0] = v1alpha1.Mount{Source: "dataset://argo/other", Path: "/a"}
	for source, want := range map[string]string{"dataset://argo/other": "/secrets/other-reader", "dataset://ref/hg38/x": "/secrets/ref.hg38-reader"} {
		d.Spec.Mounts[0].Source = source
		got, err := WorkerConfig(d, func(name string) string { return "/secrets/" + name })
		if err != nil || got.Mounts[0].CredentialsDir != want || got.Mounts[0].URL != source {
			t.Errorf("%s: %+v, %v", source, got.Mounts, err)
		}
	}
}
