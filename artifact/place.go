package artifact

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// shared are the folders below which argoexec names the paths of artifacts in the driver's container:
// mirrored volumes of the step, inputs, and staged outputs. The step writes there, so a link in them may
// lead within them but never out, to the driver's own files (its keys among them).
var shared = []string{"/mainctrfs", "/argo/inputs/artifacts", "/tmp/argo/outputs"}

// place is one path of a request: a name below a root that no link leaves.
type place struct {
	root *os.Root
	name string
}

// openPlace opens the root of a path: the shared folder above it, or else its own folder, which make says
// to make.
func openPlace(path string, bases []string, makeParent bool) (*place, error) {
	if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) {
		return nil, fmt.Errorf("path %q is not absolute", path)
	}
	path = filepath.Clean(path)
	base := filepath.Dir(path)
	for _, s := range bases {
		if path != s && strings.HasPrefix(path, s+"/") {
			base = s
			break
		}
	}
	if base == path {
		return nil, fmt.Errorf("path %q is not that of an artifact", path)
	}
	if makeParent {
		if err := os.MkdirAll(base, folderMode); err != nil {
			return nil, err
		}
	}
	root, err := os.OpenRoot(base)
	if err != nil {
		return nil, err
	}
	name, err := filepath.Rel(base, path)
	if err != nil {
		root.Close()
		return nil, err
	}
	p := &place{root: root, name: name}
	if dir := filepath.Dir(name); makeParent && dir != "." {
		if err := root.MkdirAll(dir, folderMode); err != nil {
			root.Close()
			return nil, err
		}
	}
	return p, nil
}

func (p *place) close() { _ = p.root.Close() }
