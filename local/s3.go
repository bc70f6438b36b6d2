package local

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/worker"
)

// s3 is the S3 endpoint of a writable Dataset: one address a worker, and the access keys.
type s3 struct {
	bucket    string
	dir       string   // of the access keys
	addresses []string // of the workers
	domain    string   // Options.S3Domain
}

// s3Region is what clients sign for.
const s3Region = "us-east-1"

// makeWritable gives the Dataset's workers an S3 endpoint, with access keys made for this run.
func (d *dataset) makeWritable() error {
	for _, m := range d.base.Mounts {
		if strings.HasPrefix(m.URL, "file://") {
			d.tier.logf("dataset %s: %s is served read-only: access: ReadWrite needs a bucket, s3:// or oss://", name(d.object), m.URL)
			return nil
		}
	}
	s := &s3{bucket: d.object.Name, dir: filepath.Join(d.folder.Dir, "s3"), domain: d.tier.options.S3Domain}
	w := d.object.Spec.Write
	if w.Policy == v1alpha1.WriteBack {
		return fmt.Errorf("dataset %s: write.policy: Back keeps copies on several machines, and local mode has one; set Through, which acknowledges a write once the bucket has it", name(d.object))
	}
	d.base.Write = worker.WriteConfig{Policy: string(w.Policy), Exclusive: w.Exclusive}
	var err error
	if s.addresses, err = freeAddresses(int(d.object.Spec.Workers.Replicas)); err != nil {
		return err
	}
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		return err
	}
	id, secret := "local-"+rand.Text(), rand.Text()
	files := map[string]string{
		"accessKeyID": id, "secretAccessKey": secret,
		"readOnlyAccessKeyID": "local-read-" + rand.Text(), "readOnlySecretAccessKey": rand.Text(),
		// What the AWS CLI, its SDKs and most other clients take from the environment.
		"env": fmt.Sprintf("export AWS_ENDPOINT_URL=%s AWS_REGION=%s AWS_ACCESS_KEY_ID=%s AWS_SECRET_ACCESS_KEY=%s\n", s.endpoint(0), s3Region, id, secret),
	}
	for file, text := range files {
		err = errors.Join(err, os.WriteFile(filepath.Join(s.dir, file), []byte(text), 0o600))
	}
	d.s3 = s
	return err
}

// config is worker i's part.
func (s *s3) config(i int) *worker.GatewayConfig {
	c := &worker.GatewayConfig{Listen: s.addresses[i], Bucket: s.bucket, Region: s3Region, Credentials: s.dir}
	if s.domain != "" {
		c.Domains = []string{s.domain}
	}
	return c
}

// endpoint is worker i's, as clients are told.
func (s *s3) endpoint(i int) string {
	if _, port, err := net.SplitHostPort(s.addresses[i]); err == nil && s.domain != "" {
		return "http://" + net.JoinHostPort(s.domain, port)
	}
	return "http://" + s.addresses[i]
}

func (s *s3) envFile() string { return filepath.Join(s.dir, "env") }

// freeAddresses are ports that nobody listens at. A worker that starts again has its endpoint at the same
// one, since clients were told.
func freeAddresses(n int) ([]string, error) {
	var out []string
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, fmt.Errorf("find a free port: %w", err)
		}
		defer l.Close() // held until all are known, so that they differ
		out = append(out, l.Addr().String())
	}
	return out, nil
}
