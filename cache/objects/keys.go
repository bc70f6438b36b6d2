package objects

import (
	"cmp"
	"errors"
	"slices"
	"strings"
	"unicode/utf8"
)

// maxKey is the protocol's bound of a key in bytes.
const maxKey = 1024

// pathOf is a mount's path as the start of keys.
func pathOf(path string) string {
	if p := strings.Trim(path, "/"); p != "" {
		return p + "/"
	}
	return ""
}

// sortMounts puts the mounts in the order of their keys. No path starts another, so that the keys of each
// lie together.
func sortMounts(m []*mount) {
	slices.SortFunc(m, func(a, b *mount) int { return cmp.Compare(a.path, b.path) })
}

// checkKey refuses what no bucket should have made of a name: whoever copies the bucket to a file system
// would write elsewhere.
func checkKey(key string) error {
	switch {
	case key == "":
		return errors.New("it is empty")
	case len(key) > maxKey:
		return errors.New("it is longer than 1024 bytes")
	case !utf8.ValidString(key):
		return errors.New("it is not UTF-8")
	case strings.IndexByte(key, 0) >= 0:
		return errors.New("it has a zero byte")
	}
	for s := range strings.SplitSeq(key, "/") {
		if s == "." || s == ".." {
			return errors.New(`it has a segment "." or ".."`)
		}
	}
	return nil
}
