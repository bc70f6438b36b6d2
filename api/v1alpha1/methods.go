package v1alpha1

import (
	"fmt"
	"strings"
	"time"

	"github.com/robfig/cron/v3"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// Scheme is the part of a mount's source before ://.
type Scheme string

// Schemes of a source.
const (
	SchemeS3      Scheme = "s3"
	SchemeOSS     Scheme = "oss"
	SchemeFile    Scheme = "file"
	SchemeDataset Scheme = "dataset"
)

// Scheme says what kind of source it is; empty when it has no ://.
func (m *Mount) Scheme() Scheme {
	s, _, ok := strings.Cut(m.Source, "://")
	if !ok {
		return ""
	}
	return Scheme(s)
}

// Bucket reports whether the source is a bucket, s3:// or oss://.
func (m *Mount) Bucket() bool {
	return m.Scheme() == SchemeS3 || m.Scheme() == SchemeOSS
}

// Dataset returns the Dataset that a dataset:// source names and the folder in it, "/" for all of it.
func (m *Mount) Dataset() (target types.NamespacedName, folder string, ok bool) {
	rest, ok := strings.CutPrefix(m.Source, "dataset://")
	if !ok {
		return types.NamespacedName{}, "", false
	}
	parts := strings.SplitN(rest, "/", 3)
	if len(parts) < 2 {
		return types.NamespacedName{}, "", false
	}
	folder = "/"
	if len(parts) == 3 {
		folder += strings.Trim(parts[2], "/")
	}
	return types.NamespacedName{Namespace: parts[0], Name: parts[1]}, folder, true
}

// ReaderSecret names the Secret with the read key of the Dataset that a dataset:// source names, for readers in
// the given namespace; empty for another source.
func (m *Mount) ReaderSecret(namespace string) string {
	target, _, ok := m.Dataset()
	switch {
	case !ok:
		return ""
	case target.Namespace == namespace:
		return ReaderName(target.Name)
	}
	return SharedReaderName(target.Namespace, target.Name)
}

// Map returns the key of the Secret for each of accessKeyID, accessKeySecret and sessionToken, the
// defaults included; also of a nil CredentialsRef.
func (r *CredentialsRef) Map() map[string]string {
	m := map[string]string{
		"accessKeyID":     "accessKeyID",
		"accessKeySecret": "accessKeySecret",
		"sessionToken":    "sessionToken",
	}
	if r == nil || r.Keys == nil {
		return m
	}
	for name, key := range map[string]SecretKey{
		"accessKeyID":     r.Keys.AccessKeyID,
		"accessKeySecret": r.Keys.AccessKeySecret,
		"sessionToken":    r.Keys.SessionToken,
	} {
		if key != "" {
			m[name] = string(key)
		}
	}
	return m
}

// MemoryBytes is what one worker may fill with cached data, in bytes, rounded up.
func (w *Workers) MemoryBytes() int64 { return w.Memory.Value() }

// TotalBytes is what all workers together hold; each cached block takes Copies times its size of it.
func (w *Workers) TotalBytes() int64 { return w.MemoryBytes() * int64(w.Replicas) }

// MemoryBytes is the cap for this Dataset on one node; ok is false where none is set and the node
// service's own budget is all that counts. A nil NodeCache sets none.
func (n *NodeCache) MemoryBytes() (bytes int64, ok bool) {
	if n == nil || n.Memory == nil {
		return 0, false
	}
	return n.Memory.Value(), true
}

// Every is the time between two listings; ok is false where the first listing stays.
func (r *Refresh) Every() (interval time.Duration, ok bool) {
	if r.Policy != RefreshInterval || r.Interval == nil {
		return 0, false
	}
	return r.Interval.Duration, true
}

// SharesWith reports whether pods and Datasets of the namespace may read the Dataset.
func (d *Dataset) SharesWith(namespace string) bool {
	if namespace == d.Namespace {
		return true
	}
	for _, ns := range d.Spec.ShareWith {
		if string(ns) == namespace {
			return true
		}
	}
	return false
}

// CopiesOf is how many workers hold what the load fetches.
func (l *DataLoad) CopiesOf(d *Dataset) int32 {
	if l.Spec.Copies != nil {
		return *l.Spec.Copies
	}
	return d.Spec.Workers.Copies
}

// Next is when the schedule comes after a time.
func (s Schedule) Next(after time.Time) (time.Time, error) {
	c, err := cron.ParseStandard("CRON_TZ=UTC " + string(s))
	if err != nil {
		return time.Time{}, fmt.Errorf("schedule %q: %w", s, err)
	}
	next := c.Next(after.UTC())
	if next.IsZero() {
		return time.Time{}, fmt.Errorf("schedule %q names no day that comes; choose one that its months have", s)
	}
	return next, nil
}

// Patterns are the paths of the load as doublestar patterns of files: a path that matches a folder stands
// for all in it. Nil means everything.
func (l *DataLoad) Patterns() []string {
	var patterns []string
	for _, p := range l.Spec.Paths {
		pattern := strings.TrimSuffix(string(p), "/")
		if !strings.HasSuffix(pattern, "/**") {
			pattern += "/**" // which matches zero folders too, and so the file itself
		}
		patterns = append(patterns, pattern)
	}
	return patterns
}

// CheckCluster returns what keeps a valid Dataset from working on a cluster though it may work in
// local mode: the one difference between the two. Its errors are for the user who applied the object.
func (d *Dataset) CheckCluster() field.ErrorList {
	var errs field.ErrorList
	for i := range d.Spec.Mounts {
		m := &d.Spec.Mounts[i]
		at := field.NewPath("spec", "mounts").Key(m.Path)
		switch {
		case m.Scheme() == SchemeFile:
			errs = append(errs, field.Forbidden(at.Child("source"), fmt.Sprintf(
				"%s is a folder of one machine, which a cluster's workers do not have; file:// is for local mode: mount a bucket (s3:// or oss://)", m.Source)))
		case m.Bucket() && m.CredentialsSecretRef == nil && !m.Anonymous && !m.Ambient:
			errs = append(errs, field.Required(at.Child("credentialsSecretRef"),
				"on a cluster a mount says where its credentials come from: name a Secret, or set anonymous: true for a public bucket, or ambient: true for the platform's own"))
		}
	}
	return errs
}
