// Package manifest reads the manifests that a cluster takes, without a cluster.
//
// It owns reading files and folders of YAML or JSON, and running on each Dataset and DataLoad what an
// API server runs at apply: refusal of unknown fields, defaults, the schema and its CEL rules, all from
// the very definitions in config/crd, which are embedded. On top it checks what a cluster would find out
// only later: references between the objects.
//
// A Set holds what was read. Secrets come from the manifests or, where they hold none of that name,
// from the environment: key accessKeyID of Secret access-key is STEPCACHE_SECRET_ACCESS_KEY_ACCESSKEYID
// (EnvName says which variable).
//
// Concurrency: all functions may be called at once; a Set is not changed after it is made. Failure:
// reading goes on after an error to report all of them (the first fifty); each is an *Error that names the file, the
// document and the object, and says what to do. Secret values are never part of an error. The schemas
// and rules are compiled at first use (some 40 ms), so that importing the package costs nothing but
// its dependencies' own initialisation.
//
// It may import api/v1alpha1 and nothing else of this module.
package manifest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// DefaultNamespace is the namespace of an object that names none.
const DefaultNamespace = "default"

// MaxDocument is the size in bytes above which a document is refused, an API server's own limit.
const MaxDocument = 3 << 20

// maxError bounds the bytes of one error's text, maxErrors how many are reported.
const (
	maxError  = 2000
	maxErrors = 50
)

// maxFile bounds what is read from one file.
const maxFile = 64 << 20

// Set is what a number of manifests hold, each kind in the order in which it was read.
type Set struct {
	Datasets  []*v1alpha1.Dataset
	DataLoads []*v1alpha1.DataLoad
	Secrets   []*corev1.Secret
	// Ignored counts the objects of other kinds, by "apiVersion, Kind".
	Ignored map[string]int
}

// Error is what is wrong with one place of a manifest.
type Error struct {
	File string
	// Document counts from 1 within the file; Line is where the document begins. Zero for an error of
	// the file as a whole.
	Document, Line int
	// Object is "Dataset argo/genomes", as far as it could be told.
	Object string
	// Err says what is wrong and what to do; a *field.Error where it is about a field.
	Err error
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.File)
	if e.Document > 0 {
		fmt.Fprintf(&b, ": document %d (line %d)", e.Document, e.Line)
	}
	if e.Object != "" {
		b.WriteString(": " + e.Object)
	}
	b.WriteString(": " + describe(e.Err))
	// A value of the file may be part of it, and be of any length.
	if b.Len() > maxError {
		return strings.ToValidUTF8(b.String()[:maxError], "") + "…"
	}
	return b.String()
}

func (e *Error) Unwrap() error { return e.Err }

// Read reads manifests from files and folders; "-" is standard input. Of a folder it reads the files
// named *.yaml, *.yml and *.json, in the order of their names, and no folders in it.
func Read(paths ...string) (*Set, error) {
	if len(paths) == 0 {
		return nil, errors.New("no manifest given: name a file or a folder that holds a Dataset")
	}
	r := newReader()
	for _, path := range paths {
		r.path(path)
	}
	return r.finish()
}

// Parse reads manifests from the content of one file; name is for errors and its extension.
func Parse(name string, content []byte) (*Set, error) {
	r := newReader()
	r.content(name, content)
	return r.finish()
}

func (r *reader) path(path string) {
	if path == "-" {
		b, err := io.ReadAll(io.LimitReader(os.Stdin, maxFile+1))
		if err != nil {
			r.fail(&Error{File: "standard input", Err: err})
			return
		}
		r.content("standard input", b)
		return
	}
	info, err := os.Stat(path)
	if err != nil {
		r.fail(&Error{File: path, Err: cause(err)})
		return
	}
	if !info.IsDir() {
		r.file(path)
		return
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		r.fail(&Error{File: path, Err: cause(err)})
		return
	}
	found := false
	for _, entry := range entries {
		name := entry.Name()
		if strings.HasPrefix(name, ".") || !slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(name)) {
			continue
		}
		file := filepath.Join(path, name)
		// A link is followed, as the files of a mounted ConfigMap are links.
		if info, err := os.Stat(file); err == nil && info.IsDir() {
			continue
		}
		found = true
		r.file(file)
	}
	if !found {
		r.fail(&Error{File: path, Err: errors.New("the folder holds no file named *.yaml, *.yml or *.json (folders in it are not read)")})
	}
}

func (r *reader) file(path string) {
	f, err := os.Open(path)
	if err != nil {
		r.fail(&Error{File: path, Err: cause(err)})
		return
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		r.fail(&Error{File: path, Err: cause(err)})
		return
	}
	r.content(path, b)
}

// cause drops the path from an error of the file system, since Error names it.
func cause(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}

// Dataset finds a Dataset.
func (s *Set) Dataset(name types.NamespacedName) (*v1alpha1.Dataset, bool) {
	i := slices.IndexFunc(s.Datasets, func(d *v1alpha1.Dataset) bool {
		return d.Namespace == name.Namespace && d.Name == name.Name
	})
	if i < 0 {
		return nil, false
	}
	return s.Datasets[i], true
}
