package gateway

import (
	"cmp"
	"encoding/xml"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// maxCompleteBody is enough for MaxParts parts with an ETag and a checksum each.
const maxCompleteBody = 8 << 20

// mustMultipart is mustWrite for uploads in parts.
func (q *request) mustMultipart() (Multipart, error) {
	w, err := q.mustWrite()
	if err != nil {
		return nil, err
	}
	m, ok := w.(Multipart)
	if !ok {
		return nil, notImplemented("Multipart upload to this Dataset")
	}
	return m, nil
}

func (q *request) create() error {
	m, err := q.mustMultipart()
	if err != nil {
		return err
	}
	if err := q.ignore(); err != nil {
		return err
	}
	o, err := q.options(false)
	if err != nil {
		return err
	}
	upload, err := m.Create(q.r.Context(), q.key, o)
	if err != nil {
		return err
	}
	return q.answer(http.StatusOK, struct {
		XMLName     xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ InitiateMultipartUploadResult"`
		Bucket, Key string
		UploadID    string `xml:"UploadId"`
	}{Bucket: q.bucket, Key: q.key, UploadID: upload})
}

func (q *request) putPart(upload string) error {
	m, err := q.mustMultipart()
	if err != nil {
		return err
	}
	number, err := strconv.Atoi(q.query.get("partNumber"))
	if err != nil || number < 1 || number > MaxParts {
		return badArgument("Part number must be an integer between 1 and %d, inclusive.", MaxParts)
	}
	if err := unsupported(q.r.Header); err != nil {
		return err
	}
	if q.r.Header.Get("X-Amz-Copy-Source") != "" {
		return q.putPartCopy(m, upload, number)
	}
	b, err := q.sized()
	if err != nil {
		return err
	}
	part, err := m.PutPart(q.r.Context(), q.key, upload, number, b.size, b, b.sums())
	if err != nil {
		return q.refused(b, err)
	}
	if err := b.verified(); err != nil {
		return err
	}
	q.stored(part.ETag, b)
	return nil
}

func (q *request) complete(upload string) error {
	m, err := q.mustMultipart()
	if err != nil {
		return err
	}
	var asked struct {
		XMLName xml.Name `xml:"CompleteMultipartUpload"`
		Parts   []struct {
			PartNumber int
			ETag       string
		} `xml:"Part"`
	}
	var o PutOptions
	if err := q.putConditions(&o); err != nil {
		return err
	}
	if err := q.parse(maxCompleteBody, &asked); err != nil {
		return err
	}
	if len(asked.Parts) == 0 || len(asked.Parts) > MaxParts {
		return errXML
	}
	parts := make([]Part, 0, len(asked.Parts))
	for i, p := range asked.Parts {
		if p.PartNumber < 1 || p.PartNumber > MaxParts {
			return badArgument("Part number must be an integer between 1 and %d, inclusive.", MaxParts)
		}
		if i > 0 && p.PartNumber <= parts[i-1].Number {
			return failure(http.StatusBadRequest, "InvalidPartOrder", "The list of parts was not in ascending order. Parts must be ordered by part number.")
		}
		parts = append(parts, Part{Number: p.PartNumber, ETag: unquote(p.ETag)})
	}
	scheme := "http://"
	if q.r.TLS != nil {
		scheme = "https://"
	}
	location := scheme + q.r.Host + escape(q.r.URL.Path, true)
	return q.slowly(func() (any, error) {
		if err := q.addUp(m, upload, parts); err != nil {
			return nil, err
		}
		info, err := m.Complete(q.r.Context(), q.key, upload, parts, o)
		if err != nil {
			return nil, err
		}
		return struct {
			XMLName                     xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ CompleteMultipartUploadResult"`
			Location, Bucket, Key, ETag string
		}{Location: location, Bucket: q.bucket, Key: q.key, ETag: quote(info.ETag)}, nil
	})
}

// addUp refuses parts that are not as large together as the client says the object is, which is how AWS's transfer
// managers find that one was left out. What else is wrong with the parts, Complete tells, also where they cannot be listed
// since the upload was completed before.
func (q *request) addUp(m Multipart, upload string, parts []Part) error {
	text := q.r.Header.Get("X-Amz-Mp-Object-Size")
	if text == "" {
		return nil
	}
	left, err := strconv.ParseInt(text, 10, 64)
	if err != nil || left < 0 {
		return failure(http.StatusBadRequest, "InvalidRequest", "Value for x-amz-mp-object-size header is invalid.")
	}
	for after, more := 0, true; more && len(parts) > 0; {
		from := after
		var found []Part
		if found, more, err = m.Parts(q.r.Context(), q.key, upload, after, maxPage); errors.Is(err, ErrNoUpload) {
			return nil
		} else if err != nil {
			return err
		}
		for _, p := range found {
			if after = p.Number; len(parts) > 0 && p.Number == parts[0].Number {
				left -= p.Size
				parts = parts[1:]
			}
		}
		more = more && after > from // whatever the bucket says
	}
	if len(parts) == 0 && left != 0 {
		return failure(http.StatusBadRequest, "InvalidRequest", "The provided 'x-amz-mp-object-size' header value %s does not match what was computed.", text)
	}
	return nil
}

func (q *request) abort(upload string) error {
	m, err := q.mustMultipart()
	if err != nil {
		return err
	}
	if err := q.ignore(); err != nil {
		return err
	}
	if err := q.unconditional(); err != nil {
		return err
	}
	if err := m.Abort(q.r.Context(), q.key, upload); err != nil {
		return err
	}
	q.w.WriteHeader(http.StatusNoContent)
	return nil
}

type partEntry struct {
	PartNumber   int
	LastModified string
	ETag         string
	Size         int64
}

func (q *request) parts(upload string) error {
	m, ok := q.objects.(Multipart)
	if !ok {
		return ErrNoUpload
	}
	if err := q.ignore(); err != nil {
		return err
	}
	most, err := q.most("max-parts", maxPage)
	if err != nil {
		return err
	}
	after := 0
	if marker := q.query.get("part-number-marker"); marker != "" {
		if after, err = strconv.Atoi(marker); err != nil || after < 0 {
			return badArgument("Argument part-number-marker must be an integer between 0 and 2147483647.")
		}
	}
	found, more, err := m.Parts(q.r.Context(), q.key, upload, after, max(most, 1))
	if err != nil {
		return err
	}
	if most == 0 { // asked only whether the upload is there
		found, more = nil, false
	}
	answer := struct {
		XMLName              xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListPartsResult"`
		Bucket, Key          string
		UploadID             string `xml:"UploadId"`
		Initiator, Owner     owner
		StorageClass         string
		PartNumberMarker     int
		NextPartNumberMarker int
		MaxParts             int
		IsTruncated          bool
		Part                 []partEntry
	}{
		Bucket: q.bucket, Key: q.key, UploadID: upload, Initiator: stepcache, Owner: stepcache, StorageClass: "STANDARD",
		PartNumberMarker: after, MaxParts: most, IsTruncated: more,
	}
	for _, p := range found {
		answer.Part = append(answer.Part, partEntry{p.Number, stamp(p.ModTime), quote(p.ETag), p.Size})
		answer.NextPartNumberMarker = p.Number
	}
	return q.answer(http.StatusOK, answer)
}

type uploadEntry struct {
	Key              string
	UploadID         string `xml:"UploadId"`
	Initiator, Owner owner
	StorageClass     string
	Initiated        string
}

// uploads lists uploads under way: in order of key, and of time within one.
func (q *request) uploads() error {
	if err := q.ignore(); err != nil {
		return err
	}
	most, err := q.most("max-uploads", maxPage)
	if err != nil {
		return err
	}
	encode, encoding, err := q.encoding()
	if err != nil {
		return err
	}
	prefix, delimiter := q.query.get("prefix"), q.query.get("delimiter")
	keyMarker, idMarker := q.query.get("key-marker"), q.query.get("upload-id-marker")
	for _, s := range []string{prefix, delimiter, keyMarker, idMarker} {
		if s != xmlText(s) {
			return badArgument("prefix, delimiter and markers must be UTF-8 that XML can carry.")
		}
	}
	var found []Upload
	var more bool
	if m, ok := q.objects.(Multipart); ok {
		if found, more, err = m.Uploads(q.r.Context(), prefix); err != nil {
			return err
		}
	}
	found = slices.Clone(found)
	slices.SortFunc(found, func(a, b Upload) int { return cmp.Or(cmp.Compare(a.Key, b.Key), cmp.Compare(a.ID, b.ID)) })
	answer := struct {
		XMLName            xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListMultipartUploadsResult"`
		Bucket, KeyMarker  string
		UploadIDMarker     string `xml:"UploadIdMarker"`
		NextKeyMarker      string `xml:",omitempty"`
		NextUploadIDMarker string `xml:"NextUploadIdMarker,omitempty"`
		Prefix             string
		Delimiter          string `xml:",omitempty"`
		EncodingType       string `xml:",omitempty"`
		MaxUploads         int
		IsTruncated        bool
		Upload             []uploadEntry
		CommonPrefixes     []commonPrefix
	}{
		Bucket: q.bucket, KeyMarker: encode(keyMarker), UploadIDMarker: idMarker, Prefix: encode(prefix), Delimiter: encode(delimiter),
		EncodingType: encoding, MaxUploads: most,
	}
	group := "" // the common prefix listed last
	for _, u := range found {
		if !strings.HasPrefix(u.Key, prefix) || u.Key < keyMarker || u.Key == keyMarker && (idMarker == "" || u.ID <= idMarker) {
			continue
		}
		below := ""
		if i := strings.Index(u.Key[len(prefix):], delimiter); delimiter != "" && i >= 0 {
			below = u.Key[:len(prefix)+i+len(delimiter)]
			if below == group || strings.HasPrefix(keyMarker, below) {
				continue
			}
		}
		if len(answer.Upload)+len(answer.CommonPrefixes) >= most {
			answer.IsTruncated = most > 0
			break
		}
		if below != "" {
			group = below
			answer.CommonPrefixes = append(answer.CommonPrefixes, commonPrefix{encode(below)})
			answer.NextKeyMarker, answer.NextUploadIDMarker = encode(below), ""
			continue
		}
		answer.Upload = append(answer.Upload, uploadEntry{encode(u.Key), u.ID, stepcache, stepcache, "STANDARD", stamp(u.Started)})
		answer.NextKeyMarker, answer.NextUploadIDMarker = encode(u.Key), u.ID
	}
	if more && !answer.IsTruncated && most > 0 {
		// All that is known is told; the end of it is no end of the list.
		if len(found) == 0 {
			// So the store takes no prefix and told of others.
			return failure(http.StatusBadRequest, "InvalidRequest", "There are more uploads under way in the bucket than can be listed, and none of those that it tells is asked for here: complete or abort some of them at the bucket.")
		}
		if len(answer.Upload)+len(answer.CommonPrefixes) == 0 {
			return failure(http.StatusBadRequest, "InvalidRequest", "There are more uploads under way than can be listed, and no others to tell: complete or abort some, or ask for a longer prefix.")
		}
		answer.IsTruncated = true
	}
	if !answer.IsTruncated {
		answer.NextKeyMarker, answer.NextUploadIDMarker = "", ""
	}
	return q.answer(http.StatusOK, answer)
}
