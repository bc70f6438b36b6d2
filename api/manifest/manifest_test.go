package manifest

import "testing"

func TestDesign(t *testing.T) {
	s, err := Read("testdata/design.yaml")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", s.Datasets[0].Spec)
	_, err = Parse("x.yaml", []byte(`
apiVersion: data.stepcache.dev/v1alpha1
kind: Dataset
metadata: {name: Genomes}
spec:
  mount: []
  mounts:
  - {source: "s3://AK:SK@b/", path: /a/../b, endpoint: "http://h/x"}
  - {source: http://x, path: "/a"}
  - {source: oss://bucket, path: "/a/c"}
  workers: {memory: 1Mi, replica: 3, copies: 3}
  access: ReadOnce
  write: {policy: Back}
  refresh: {policy: Interval}
---
apiVersion: data.stepcache.dev/v1alpha1
kind: Dataset
metadata: {name: genomes}
spec:
  mounts:
  - {source: "s3://bucket/"}
  workers: {memory: 12GB, replicas: 0}
---
apiVersion: data.stepcache.dev/v1alpha1
kind: Dataset
metadata: {name: genomes2}
spec:
  mounts:
  - {source: "s3://bucket/", path: /a}
  - {source: "s3://bucket/", path: /a}
  workers: {memory: 12.5, replicas: "2"}
  refresh: {policy: Interval, interval: 1x}
---
apiVersion: data.stepcache.dev/v1alpha1
kind: DataLoad
metadata: {name: genomes2}
spec:
  datasetRef: {name: genomes2}
  paths: ["/a/[b", "/a{b", "x"]
  schedule: "0 3 * *"
---
a: b
	c: d
`))
	t.Log(err)
}
