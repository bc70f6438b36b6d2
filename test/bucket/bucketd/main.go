// Command bucketd is a bucket in a pod, for tests on a cluster: the S3 server of package bucket behind its
// limits, on fixed ports.
//
// Port 9000 is the bucket, limited; port 9001 is the same without limits, to put fixtures; port 9002 tells
// by HTTP how many bytes and answers have left the bucket through port 9000. `bucketd check HOST` proves
// from another pod that the bucket at that host is what it says.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/stepcache/stepcache/test/bucket"
)

const (
	limitedPort = "9000"
	directPort  = "9001"
	countsPort  = "9002"
)

func main() {
	dir := flag.String("dir", "", "folder of the objects (empty: in memory)")
	server := flag.String("server", "", "the S3 server's program, versitygw")
	rate := flag.Int64("bytes-per-second", 200_000_000, "what all readers together receive; 0: no limit")
	first := flag.Duration("first-byte", 20*time.Millisecond, "waited before the first byte of every answer")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	switch {
	case flag.NArg() == 2 && flag.Arg(0) == "check":
		err = check(ctx, flag.Arg(1), *rate)
	case flag.NArg() == 0:
		err = serve(ctx, bucket.Options{
			Dir: *dir, Binary: *server, BytesPerSecond: *rate, FirstByte: *first,
			Listen: ":" + limitedPort, ListenDirect: ":" + directPort,
		})
	default:
		err = errors.New("usage: bucketd [flags] | bucketd [flags] check HOST")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bucketd:", err)
		os.Exit(1)
	}
}

// serve runs the bucket until ctx ends.
func serve(ctx context.Context, o bucket.Options) error {
	s, err := bucket.Start(ctx, o)
	if err != nil {
		return err
	}
	defer s.Close()
	h := &http.Server{Addr: ":" + countsPort, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]int64{"sent": s.Sent(), "answers": s.Requests()})
	})}
	context.AfterFunc(ctx, func() { _ = h.Close() })
	if err := h.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// check puts an object past the limits, reads it back through them, and compares the bytes and the rate.
func check(ctx context.Context, host string, rate int64) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	direct, err := client(host, directPort)
	if err != nil {
		return err
	}
	const name, key, size = "check", "object", 64 << 20
	content := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(content)
	ok, err := direct.BucketExists(ctx, name)
	if err == nil && !ok {
		err = direct.MakeBucket(ctx, name, minio.MakeBucketOptions{Region: bucket.Region})
	}
	if err != nil {
		return err
	}
	if _, err := direct.PutObject(ctx, name, key, bytes.NewReader(content), size, minio.PutObjectOptions{}); err != nil {
		return err
	}
	limited, err := client(host, limitedPort)
	if err != nil {
		return err
	}
	began := time.Now()
	o, err := limited.GetObject(ctx, name, key, minio.GetObjectOptions{})
	if err != nil {
		return err
	}
	got, err := io.ReadAll(o)
	if err = errors.Join(err, o.Close()); err != nil {
		return err
	}
	took := time.Since(began)
	if !bytes.Equal(got, content) {
		return fmt.Errorf("%s/%s: read %d bytes that are not those that were put", name, key, len(got))
	}
	have := float64(size) / took.Seconds()
	fmt.Printf("read %d MiB in %v, %.0f MB/s\n", size>>20, took.Round(time.Millisecond), have/1e6)
	if rate > 0 && have > 1.05*float64(rate) {
		return fmt.Errorf("the bucket sends %.0f bytes a second, more than its limit of %d", have, rate)
	}
	return direct.RemoveObject(ctx, name, key, minio.RemoveObjectOptions{})
}

func client(host, port string) (*minio.Client, error) {
	return minio.New(net.JoinHostPort(host, port), &minio.Options{
		Creds: credentials.NewStaticV4(bucket.AccessKey, bucket.SecretKey, ""), Region: bucket.Region,
		BucketLookup: minio.BucketLookupPath,
	})
}
