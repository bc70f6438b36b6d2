// Command awsgo makes a round trip with the AWS SDK for Go v2: put with every checksum, as header and as trailer,
// parts by the transfer manager, range, list, copy, copied parts, presigned addresses, conditions, delete.
// Settings come from the environment (package s3clients); the exit code tells whether every byte was equal.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/feature/s3/transfermanager"
	manager "github.com/aws/aws-sdk-go-v2/feature/s3/transfermanager/types"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"
)

func main() {
	log.SetFlags(0)
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Second)
	defer cancel()
	if err := trip(ctx); err != nil {
		log.Fatal(err)
	}
}

type client struct {
	*s3.Client
	bucket, prefix string
}

// stream hides that a reader can be read again: over TLS the SDK then sends the checksum as a trailer.
type stream struct{ io.Reader }

func trip(ctx context.Context) error {
	settings, err := config.LoadDefaultConfig(ctx)
	if err != nil {
		return err
	}
	do := http.DefaultClient.Do
	if settings.HTTPClient != nil { // made for AWS_CA_BUNDLE
		do = settings.HTTPClient.Do
	}
	endpoint := os.Getenv("ENDPOINT")
	c := client{bucket: os.Getenv("BUCKET"), prefix: os.Getenv("PREFIX") + "/", Client: s3.NewFromConfig(settings, func(o *s3.Options) {
		o.BaseEndpoint, o.UsePathStyle = &endpoint, true
	})}
	small, err := os.ReadFile("small")
	if err != nil {
		return err
	}
	large, err := os.ReadFile("large")
	if err != nil {
		return err
	}
	return errors.Join(
		named("checksums", c.checksums(ctx, small, strings.HasPrefix(endpoint, "https://"))),
		named("parts", c.parts(ctx, large)),
		named("listing", c.listing(ctx, small)),
		named("copies", c.copies(ctx, large)),
		named("presigned", c.presigned(ctx, do, small)),
		named("conditions", c.conditions(ctx, small)),
		named("delete", c.deleteAll(ctx)),
	)
}

func named(name string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func (c client) key(name string) *string { return aws.String(c.prefix + name) }

func (c client) same(ctx context.Context, name string, want []byte) error {
	got, err := c.GetObject(ctx, &s3.GetObjectInput{Bucket: &c.bucket, Key: c.key(name)})
	if err != nil {
		return fmt.Errorf("get %s: %w", name, err)
	}
	defer got.Body.Close()
	b, err := io.ReadAll(got.Body)
	if err != nil {
		return fmt.Errorf("get %s: %w", name, err)
	}
	if !bytes.Equal(b, want) {
		return fmt.Errorf("get %s: %d other bytes", name, len(b))
	}
	return nil
}

func (c client) checksums(ctx context.Context, data []byte, secure bool) error {
	algorithms := append([]types.ChecksumAlgorithm{""}, "CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256")
	for _, algorithm := range algorithms {
		bodies := map[string]io.Reader{"seekable": bytes.NewReader(data)}
		if secure {
			bodies["stream"] = stream{bytes.NewReader(data)}
		}
		for kind, body := range bodies {
			name := fmt.Sprintf("sums/%s %s", algorithm, kind)
			put, err := c.PutObject(ctx, &s3.PutObjectInput{
				Bucket: &c.bucket, Key: c.key(name), Body: body, ContentLength: aws.Int64(int64(len(data))), ChecksumAlgorithm: algorithm,
				ContentType: aws.String("text/x-test"), Metadata: map[string]string{"origin": "step 1"},
			})
			if err != nil {
				return fmt.Errorf("put %s: %w", name, err)
			}
			if err := c.same(ctx, name, data); err != nil {
				return err
			}
			head, err := c.HeadObject(ctx, &s3.HeadObjectInput{Bucket: &c.bucket, Key: c.key(name)})
			if err != nil {
				return err
			}
			if *head.ETag != *put.ETag || *head.ContentType != "text/x-test" || head.Metadata["origin"] != "step 1" || *head.ContentLength != int64(len(data)) {
				return fmt.Errorf("head %s: %+v", name, head)
			}
		}
	}
	return nil
}

func (c client) parts(ctx context.Context, large []byte) error {
	m := transfermanager.New(c.Client, func(o *transfermanager.Options) {
		o.PartSizeBytes, o.MultipartUploadThreshold = 5<<20, 5<<20
	})
	for _, algorithm := range []manager.ChecksumAlgorithm{"", "CRC64NVME", "SHA256"} {
		name := "parts " + string(algorithm)
		up := &transfermanager.UploadObjectInput{Bucket: &c.bucket, Key: c.key(name), Body: bytes.NewReader(large), ChecksumAlgorithm: algorithm}
		if _, err := m.UploadObject(ctx, up); err != nil {
			return fmt.Errorf("upload %s: %w", name, err)
		}
		if err := c.same(ctx, name, large); err != nil {
			return err
		}
	}
	got, err := m.GetObject(ctx, &transfermanager.GetObjectInput{Bucket: &c.bucket, Key: c.key("parts ")})
	if err != nil {
		return fmt.Errorf("download: %w", err)
	}
	b, err := io.ReadAll(got.Body)
	if err != nil {
		return fmt.Errorf("download: %w", err)
	}
	if !bytes.Equal(b, large) {
		return fmt.Errorf("download: %d other bytes", len(b))
	}
	part, err := c.GetObject(ctx, &s3.GetObjectInput{Bucket: &c.bucket, Key: c.key("parts "), Range: aws.String("bytes=5242870-5242889")})
	if err != nil {
		return err
	}
	defer part.Body.Close()
	if b, err := io.ReadAll(part.Body); err != nil || !bytes.Equal(b, large[5242870:5242890]) {
		return fmt.Errorf("range: %d other bytes, %v", len(b), err)
	}
	return nil
}

func (c client) listing(ctx context.Context, data []byte) error {
	names := []string{"list/b c+d&e=ü日本", "list/deep/er", "list/last"}
	for _, name := range names {
		if _, err := c.PutObject(ctx, &s3.PutObjectInput{Bucket: &c.bucket, Key: c.key(name), Body: bytes.NewReader(data)}); err != nil {
			return err
		}
	}
	for _, size := range []int32{1, 2, 1000} {
		var got []string
		for pages := s3.NewListObjectsV2Paginator(c.Client, &s3.ListObjectsV2Input{Bucket: &c.bucket, Prefix: c.key("list/"), Delimiter: aws.String("/"), MaxKeys: &size}); pages.HasMorePages(); {
			page, err := pages.NextPage(ctx)
			if err != nil {
				return err
			}
			for _, o := range page.Contents {
				got = append(got, strings.TrimPrefix(*o.Key, c.prefix))
			}
			for _, p := range page.CommonPrefixes {
				got = append(got, strings.TrimPrefix(*p.Prefix, c.prefix))
			}
		}
		slices.Sort(got)
		if want := []string{names[0], "list/deep/", names[2]}; !slices.Equal(got, want) {
			return fmt.Errorf("pages of %d: %q, not %q", size, got, want)
		}
	}
	return nil
}

func (c client) copies(ctx context.Context, large []byte) error {
	source := c.bucket + "/" + strings.ReplaceAll(c.prefix+"parts ", " ", "%20")
	if _, err := c.CopyObject(ctx, &s3.CopyObjectInput{Bucket: &c.bucket, Key: c.key("copy"), CopySource: &source}); err != nil {
		return err
	}
	if err := c.same(ctx, "copy", large); err != nil {
		return err
	}
	up, err := c.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: &c.bucket, Key: c.key("composed")})
	if err != nil {
		return err
	}
	var parts []types.CompletedPart
	for i, r := range []string{"bytes=0-5242879", "bytes=5242880-5243000"} {
		part, err := c.UploadPartCopy(ctx, &s3.UploadPartCopyInput{Bucket: &c.bucket, Key: c.key("composed"), UploadId: up.UploadId, PartNumber: aws.Int32(int32(i + 1)), CopySource: &source, CopySourceRange: &r})
		if err != nil {
			return err
		}
		parts = append(parts, types.CompletedPart{PartNumber: aws.Int32(int32(i + 1)), ETag: part.CopyPartResult.ETag})
	}
	if _, err := c.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{Bucket: &c.bucket, Key: c.key("composed"), UploadId: up.UploadId, MultipartUpload: &types.CompletedMultipartUpload{Parts: parts}}); err != nil {
		return err
	}
	return c.same(ctx, "composed", large[:5243001])
}

func (c client) presigned(ctx context.Context, do func(*http.Request) (*http.Response, error), data []byte) error {
	sign := s3.NewPresignClient(c.Client)
	put, err := sign.PresignPutObject(ctx, &s3.PutObjectInput{Bucket: &c.bucket, Key: c.key("presigned"), Metadata: map[string]string{"origin": "step 2"}}, func(o *s3.PresignOptions) {
		// A checksum of the body that it does not have yet would be part of the address.
		o.ClientOptions = append(o.ClientOptions, func(o *s3.Options) { o.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenRequired })
	})
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, put.Method, put.URL, bytes.NewReader(data))
	if err != nil {
		return err
	}
	for name, values := range put.SignedHeader {
		request.Header[name] = values
	}
	answer, err := do(request)
	if err != nil {
		return err
	}
	text, _ := io.ReadAll(answer.Body)
	answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("put: %s %s", answer.Status, text)
	}
	get, err := sign.PresignGetObject(ctx, &s3.GetObjectInput{Bucket: &c.bucket, Key: c.key("presigned"), ResponseContentType: aws.String("text/y")})
	if err != nil {
		return err
	}
	request, err = http.NewRequestWithContext(ctx, get.Method, get.URL, nil)
	if err != nil {
		return err
	}
	if answer, err = do(request); err != nil {
		return err
	}
	defer answer.Body.Close()
	got, err := io.ReadAll(answer.Body)
	if err != nil || !bytes.Equal(got, data) || answer.Header.Get("Content-Type") != "text/y" || answer.Header.Get("X-Amz-Meta-Origin") != "step 2" {
		return fmt.Errorf("get: %s, %d bytes, %v, %v", answer.Status, len(got), answer.Header, err)
	}
	return nil
}

func (c client) conditions(ctx context.Context, data []byte) error {
	put := &s3.PutObjectInput{Bucket: &c.bucket, Key: c.key("once"), IfNoneMatch: aws.String("*")}
	put.Body = bytes.NewReader(data)
	first, err := c.PutObject(ctx, put)
	if err != nil {
		return err
	}
	put.Body = bytes.NewReader(data)
	_, err = c.PutObject(ctx, put)
	if err := refused(err, "PreconditionFailed"); err != nil {
		return err
	}
	if _, err := c.PutObject(ctx, &s3.PutObjectInput{Bucket: &c.bucket, Key: c.key("once"), IfMatch: first.ETag, Body: bytes.NewReader(data[1:])}); err != nil {
		return fmt.Errorf("put on its own ETag: %w", err)
	}
	_, err = c.PutObject(ctx, &s3.PutObjectInput{Bucket: &c.bucket, Key: c.key("once"), IfMatch: first.ETag, Body: bytes.NewReader(data)})
	if err := refused(err, "PreconditionFailed"); err != nil {
		return err
	}
	_, err = c.GetObject(ctx, &s3.GetObjectInput{Bucket: &c.bucket, Key: c.key("once"), IfMatch: first.ETag})
	if err := refused(err, "PreconditionFailed"); err != nil {
		return err
	}
	_, err = c.GetObject(ctx, &s3.GetObjectInput{Bucket: &c.bucket, Key: c.key("never")})
	if err := refused(err, "NoSuchKey"); err != nil {
		return err
	}
	_, err = c.HeadObject(ctx, &s3.HeadObjectInput{Bucket: &c.bucket, Key: c.key("never")})
	return refused(err, "NotFound")
}

func refused(err error, code string) error {
	var api smithy.APIError
	if !errors.As(err, &api) || api.ErrorCode() != code {
		return fmt.Errorf("not refused with %s: %v", code, err)
	}
	return nil
}

func (c client) deleteAll(ctx context.Context) error {
	page, err := c.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: &c.bucket, Prefix: &c.prefix})
	if err != nil {
		return err
	}
	var all []types.ObjectIdentifier
	for _, o := range page.Contents {
		all = append(all, types.ObjectIdentifier{Key: o.Key})
	}
	if len(all) < 10 {
		return fmt.Errorf("only %d objects to delete", len(all))
	}
	if _, err := c.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &c.bucket, Key: all[0].Key}); err != nil {
		return err
	}
	out, err := c.DeleteObjects(ctx, &s3.DeleteObjectsInput{Bucket: &c.bucket, Delete: &types.Delete{Objects: all}})
	if err != nil || len(out.Errors) > 0 {
		return fmt.Errorf("%v %v", err, out)
	}
	if page, err = c.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: &c.bucket, Prefix: &c.prefix}); err != nil || len(page.Contents) > 0 {
		return fmt.Errorf("left: %v, %v", page, err)
	}
	return nil
}
