package lint

import (
	"bytes"
	"regexp"
	"strings"

	"go.yaml.in/yaml/v3"
)

var ignoreComment = regexp.MustCompile(`(?:^|\s)#\s*stepcache:ignore\b[: ]*([^#]*)`)

// ignoring says which rules are off: on lines, and in whole documents.
type ignoring struct {
	lines, docs map[int][]string
}

// ignores reads the comments. One counts on its own line; one that stands alone, for the next line that is
// not a comment; one before a document's first line, for that document.
func ignores(text []byte, docs []*yaml.Node) ignoring {
	ig := ignoring{map[int][]string{}, map[int][]string{}}
	first := map[int]int{}
	for i, d := range docs {
		if len(d.Content) > 0 {
			first[d.Content[0].Line] = i
		}
	}
	var waiting []string
	for i, line := range bytes.Split(text, []byte("\n")) {
		number := i + 1
		var rules []string
		if m := ignoreComment.FindSubmatch(line); m != nil {
			rules = strings.FieldsFunc(string(m[1]), func(r rune) bool { return r == ',' || r == ' ' || r == '\t' || r == '\r' })
			if len(rules) == 0 {
				rules = []string{"all"}
			}
		}
		trimmed := bytes.TrimSpace(line)
		if len(trimmed) == 0 || trimmed[0] == '#' || bytes.HasPrefix(trimmed, []byte("---")) {
			waiting = append(waiting, rules...)
			continue
		}
		if doc, ok := first[number]; ok {
			ig.docs[doc] = append(ig.docs[doc], waiting...)
		}
		ig.lines[number] = append(waiting, rules...)
		waiting = nil
	}
	return ig
}

func (ig ignoring) has(rule string, line, doc int) bool {
	for _, r := range append(ig.lines[line], ig.docs[doc]...) {
		if r == rule || r == "all" {
			return true
		}
	}
	return false
}
