package osstest

import (
	"crypto/md5"
	"encoding/xml"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// minPart is the least size of a part that is not the last.
const minPart = 100 << 10

type upload struct {
	key         string
	contentType string
	kept        map[string]string
	begun       time.Time
	parts       map[int]part
}

type part struct {
	blob blob
	sum  []byte
}

func (s *Server) initiate(c *call, b *bucket) error {
	id := strings.ToUpper(random(16))
	b.mu.Lock()
	b.uploads[id] = &upload{key: c.key, contentType: c.r.Header.Get("Content-Type"), kept: kept(c.r.Header), begun: time.Now().UTC(), parts: map[int]part{}}
	b.mu.Unlock()
	return c.answer(struct {
		XMLName  xml.Name `xml:"InitiateMultipartUploadResult"`
		Bucket   string
		Key      string
		UploadID string `xml:"UploadId"`
	}{Bucket: c.name, Key: c.key, UploadID: id})
}

// upload finds the upload a request names. The caller holds b.mu.
func (b *bucket) upload(c *call) (*upload, error) {
	u := b.uploads[c.query.Get("uploadId")]
	if u == nil || u.key != c.key {
		return nil, &fault{Status: 404, Code: "NoSuchUpload", Message: "The specified upload does not exist."}
	}
	return u, nil
}

func (s *Server) uploadPart(c *call, b *bucket) error {
	number, err := strconv.Atoi(c.query.Get("partNumber"))
	if err != nil || number < 1 || number > 10000 {
		return invalid("Part number must be an integer between 1 and 10000.")
	}
	content, sum, _, err := s.receive(c, b)
	if err != nil {
		return err
	}
	b.mu.Lock()
	u, err := b.upload(c)
	old := content
	if err == nil {
		old = u.parts[number].blob
		u.parts[number] = part{content, sum}
	}
	b.mu.Unlock()
	b.discard(old)
	if err != nil {
		return err
	}
	c.w.WriteHeader(http.StatusOK)
	return nil
}

func (s *Server) complete(c *call, b *bucket) error {
	var request struct {
		XMLName xml.Name `xml:"CompleteMultipartUpload"`
		Part    []struct {
			PartNumber int
			ETag       string
		}
	}
	text, err := io.ReadAll(io.LimitReader(c.r.Body, 4<<20))
	if err != nil {
		return err
	}
	if err := xml.Unmarshal(text, &request); err != nil || len(request.Part) == 0 {
		return &fault{Status: 400, Code: "MalformedXML", Message: "The XML you provided was not well-formed or did not list a part."}
	}
	b.mu.Lock()
	u, err := b.upload(c)
	var chosen []part
	if err == nil {
		chosen, err = u.choose(len(request.Part), func(i int) (int, string) {
			return request.Part[i].PartNumber, strings.Trim(request.Part[i].ETag, `"`)
		})
	}
	b.mu.Unlock()
	if err != nil {
		return err
	}

	sums := md5.New()
	var readers []io.Reader
	size := int64(0)
	for _, p := range chosen {
		size += p.blob.Size
		r, err := b.open(p.blob, 0, p.blob.Size)
		if err != nil {
			return err
		}
		defer r.Close()
		readers = append(readers, r)
		sums.Write(p.sum)
	}
	content, _, crc, err := b.write(io.MultiReader(readers...), size)
	if err != nil {
		b.discard(content)
		return err
	}
	o := s.normal(c.key, content, nil, crc)
	o.Type, o.ContentType, o.Kept = "Multipart", u.contentType, u.kept
	o.ETag = fmt.Sprintf("%X-%d", sums.Sum(nil), len(chosen))
	if err := b.storeIf(c, o); err != nil {
		return err
	}
	b.end(c.query.Get("uploadId"))
	c.w.Header().Set("ETag", `"`+o.ETag+`"`)
	c.w.Header().Set("x-oss-hash-crc64ecma", strconv.FormatUint(o.CRC, 10))
	return c.answer(struct {
		XMLName  xml.Name `xml:"CompleteMultipartUploadResult"`
		Location string
		Bucket   string
		Key      string
		ETag     string
	}{Location: "http://" + c.r.Host + c.r.URL.Path, Bucket: c.name, Key: c.key, ETag: `"` + o.ETag + `"`})
}

// choose picks the parts that a completion lists: in ascending order, there, with the ETag they got, and
// none but the last too small.
func (u *upload) choose(n int, listed func(int) (number int, etag string)) (parts []part, err error) {
	before := 0
	for i := range n {
		number, etag := listed(i)
		if number <= before {
			return nil, &fault{Status: 400, Code: "InvalidPartOrder", Message: "The list of parts was not in ascending order."}
		}
		before = number
		p, ok := u.parts[number]
		if !ok || !strings.EqualFold(etag, fmt.Sprintf("%X", p.sum)) {
			return nil, &fault{Status: 400, Code: "InvalidPart", Message: "One or more of the specified parts could not be found or its ETag did not match."}
		}
		if i < n-1 && p.blob.Size < minPart {
			return nil, &fault{Status: 400, Code: "EntityTooSmall", Message: "Your proposed upload is smaller than the minimum allowed size."}
		}
		parts = append(parts, p)
	}
	return parts, nil
}

func (s *Server) abort(c *call, b *bucket) error {
	b.mu.Lock()
	_, err := b.upload(c)
	b.mu.Unlock()
	if err != nil {
		return err
	}
	b.end(c.query.Get("uploadId"))
	c.w.WriteHeader(http.StatusNoContent)
	return nil
}

// end forgets an upload and its parts.
func (b *bucket) end(id string) {
	b.mu.Lock()
	u := b.uploads[id]
	delete(b.uploads, id)
	b.mu.Unlock()
	if u != nil {
		for _, number := range slices.Sorted(maps.Keys(u.parts)) {
			b.discard(u.parts[number].blob)
		}
	}
}

// listParts lists the parts of an upload.
func (s *Server) listParts(c *call, b *bucket) error {
	type item struct {
		PartNumber   int
		ETag         string
		Size         int64
		LastModified time.Time
	}
	out := struct {
		XMLName     xml.Name `xml:"ListPartsResult"`
		IsTruncated bool
		Part        []item
	}{}
	after, _ := strconv.Atoi(c.query.Get("part-number-marker"))
	most, err := strconv.Atoi(c.query.Get("max-parts"))
	if err != nil || most < 1 || most > 1000 {
		return invalid("max-parts must be between 1 and 1000.")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	u, err := b.upload(c)
	if err != nil {
		return err
	}
	for _, n := range slices.Sorted(maps.Keys(u.parts)) {
		if n <= after {
			continue
		}
		if len(out.Part) == most {
			out.IsTruncated = true
			break
		}
		p := u.parts[n]
		out.Part = append(out.Part, item{n, fmt.Sprintf(`"%X"`, p.sum), p.blob.Size, u.begun})
	}
	return c.answer(out)
}

// listUploads lists the uploads of a bucket, in one page.
func (s *Server) listUploads(c *call, b *bucket) error {
	type item struct {
		Key       string
		UploadID  string `xml:"UploadId"`
		Initiated time.Time
	}
	out := struct {
		XMLName      xml.Name `xml:"ListMultipartUploadsResult"`
		EncodingType string
		IsTruncated  bool
		Upload       []item
	}{EncodingType: c.query.Get("encoding-type")}
	b.mu.Lock()
	defer b.mu.Unlock()
	for id, u := range b.uploads {
		if strings.HasPrefix(u.key, c.query.Get("prefix")) && u.key > c.query.Get("key-marker") {
			key := u.key
			if out.EncodingType == "url" {
				key = url.QueryEscape(key)
			}
			out.Upload = append(out.Upload, item{key, id, u.begun})
		}
	}
	slices.SortFunc(out.Upload, func(a, b item) int { return strings.Compare(a.Key+a.UploadID, b.Key+b.UploadID) })
	return c.answer(out)
}
