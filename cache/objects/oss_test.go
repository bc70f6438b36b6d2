package objects_test

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/source/oss/osstest"
)

// overOSS has a tier write to a bucket of OSS in the place of its own.
func (tr *tier) overOSS() *osstest.Server {
	tr.t.Helper()
	s := osstest.StartT(tr.t, osstest.Options{})
	s.MakeBucket("artifacts")
	c := s.Credential()
	tr.files("oss", map[string]string{"accessKeyID": c.AccessKeyID, "accessKeySecret": c.AccessKeySecret})
	m := &tr.mounts[0]
	m.URL, m.Endpoint, m.Region, m.CredentialsDir = "oss://artifacts/runs/", s.Endpoint(), s.Region(), tr.path("oss")
	return s
}

// Two who put a lock in a bucket with versioning, which OSS does not decide, are both told that it is none; what is
// written back comes there all the same.
func TestOverOSSWithVersioning(t *testing.T) {
	for _, mayAsk := range []bool{true, false} {
		bt := newBackTier(t)
		s := bt.overOSS()
		s.SetVersioning("artifacts", "Enabled")
		if !mayAsk {
			s.Inject(osstest.Fault{Kind: osstest.Refused, Op: "GetBucketVersioning"})
		}
		bt.start(2)
		onlyIfAbsent := minio.PutObjectOptions{}
		onlyIfAbsent.SetMatchETagExcept("*")
		for i := range 2 {
			if _, err := bt.put(i, "lock", []byte("mine"), onlyIfAbsent); err == nil || mayAsk && code(err) != "InvalidRequest" {
				t.Errorf("worker %d, who may ask %v: %v", i, mayAsk, err)
			}
		}
		bt.writesBack()
		for i := range 2 {
			for _, p := range []string{"1", "2"} {
				bt.mustPut(i, bt.keyOwnedBy(i, "new"), []byte(p))
			}
		}
		bt.nothingHeld()
		for i := range 2 {
			if got, _ := s.Object("artifacts", "runs/"+bt.keyOwnedBy(i, "new")); string(got) != "2" {
				t.Errorf("the bucket has %q of the name of worker %d", got, i)
			}
		}
	}
}

// A bucket of OSS takes writes as one of S3 does, with its own ETags.
func TestOverOSS(t *testing.T) {
	tr := newTier(t, "")
	s := tr.overOSS()
	tr.start(2)
	for n, size := range []int{0, 1000, 20 << 20} {
		key, p := fmt.Sprintf("out/%d", size), content(size, n)
		info, err := tr.put(n%2, key, p, minio.PutObjectOptions{ContentType: "text/x-step", UserMetadata: map[string]string{"Step": "map"}})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 2 {
			got, at, err := tr.get(i, key)
			if err != nil || !bytes.Equal(got, p) || at.ETag != info.ETag || at.ContentType != "text/x-step" || at.UserMetadata["Step"] != "map" {
				t.Errorf("%s through worker %d: %d bytes, %+v, %v", key, i, len(got), at, err)
			}
		}
	}
	if keys := tr.keys(1, "out/"); len(keys) != 3 {
		t.Errorf("listed %q", keys)
	}
	core := tr.client(0)
	upload, err := core.NewMultipartUpload(t.Context(), "data", "parts", minio.PutObjectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	p := content(6<<20, 5)
	part, err := tr.client(1).PutObjectPart(t.Context(), "data", "parts", upload, 1, bytes.NewReader(p), int64(len(p)), minio.PutObjectPartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := core.CompleteMultipartUpload(t.Context(), "data", "parts", upload, []minio.CompletePart{{PartNumber: 1, ETag: part.ETag}}, minio.PutObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	if got, _, err := tr.get(1, "parts"); err != nil || !bytes.Equal(got, p) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if err := core.RemoveObject(t.Context(), "data", "parts", minio.RemoveObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := tr.get(1, "parts"); code(err) != "NoSuchKey" {
		t.Errorf("after its deletion: %v", err)
	}
	if n := s.Uploads("artifacts"); n > 0 {
		t.Errorf("%d uploads are left", n)
	}
}
