package lint

import (
	"bytes"
	"fmt"
	"reflect"
	"slices"
	"sort"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// change is one thing added to a document: a key of a mapping, or the first item of a sequence.
type change struct {
	to    at
	key   string   // empty for an item
	after []string // keys after which it reads best
	value string   // flow style
	json  string   // the same in JSON, for mappings that are written so
}

// insertion is a change as text.
type insertion struct {
	offset int
	text   string
}

// fix makes the changes of the findings, and marks those as fixable whose changes could be made.
func fix(file string, text []byte, docs []*yaml.Node, found []*finding) []byte {
	var able []*finding
	for _, f := range found {
		if len(f.changes) > 0 {
			able = append(able, f)
		}
	}
	if fixed, ok := attempt(file, text, docs, able); ok {
		for _, f := range able {
			f.Fixable = true
		}
		return fixed
	}
	// Something is written in a way that this package does not foresee: find out which, one by one.
	var done []*finding
	fixed := text
	for _, f := range able {
		if better, ok := attempt(file, text, docs, append(slices.Clip(done), f)); ok {
			f.Fixable = true
			done, fixed = append(done, f), better
		}
	}
	return fixed
}

// attempt makes the changes, and says whether the result means what it should.
func attempt(file string, text []byte, docs []*yaml.Node, found []*finding) ([]byte, bool) {
	if len(found) == 0 {
		return text, true
	}
	known, dropped := withoutSlashEscapes(text)
	s := newSource(known)
	var all []insertion
	want := make([]any, len(docs))
	for i, d := range docs {
		if err := d.Decode(&want[i]); err != nil {
			return nil, false
		}
	}
	made := map[string]bool{}
	for _, f := range found {
		for _, c := range f.changes {
			id := fmt.Sprint(c.to.doc, c.to.path, c.key, c.value)
			if made[id] {
				continue // two findings, one remedy
			}
			made[id] = true
			i, ok := s.insertion(c)
			if !ok || !apply(&want[c.to.doc], c) {
				return nil, false
			}
			all = append(all, i)
		}
	}
	sort.SliceStable(all, func(i, j int) bool { return all[i].offset < all[j].offset })
	var b bytes.Buffer
	last, before := 0, 0
	for _, i := range all {
		for before < len(dropped) && dropped[before]-before < i.offset {
			before++
		}
		b.Write(text[last : i.offset+before])
		b.WriteString(i.text)
		last = i.offset + before
	}
	b.Write(text[last:])
	got, err := parse(file, b.Bytes())
	if err != nil || len(got) != len(docs) {
		return nil, false
	}
	for i, d := range got {
		var v any
		if err := d.Decode(&v); err != nil || !reflect.DeepEqual(v, want[i]) {
			return nil, false
		}
	}
	return b.Bytes(), true
}

// apply makes a change to a decoded document.
func apply(doc *any, c change) bool {
	var value any
	if err := yaml.Unmarshal([]byte(c.value), &value); err != nil {
		return false
	}
	target, set := *doc, func(v any) { *doc = v }
	for _, step := range c.to.path {
		switch parent := target.(type) {
		case map[string]any:
			key, ok := step.(string)
			if !ok {
				return false
			}
			target, set = parent[key], func(v any) { parent[key] = v }
		case []any:
			i, ok := step.(int)
			if !ok || i >= len(parent) {
				return false
			}
			target, set = parent[i], func(v any) { parent[i] = v }
		default:
			return false
		}
	}
	switch t := target.(type) {
	case map[string]any:
		if _, there := t[c.key]; there || c.key == "" {
			return false
		}
		t[c.key] = value
		return true
	case []any:
		if c.key != "" {
			return false
		}
		set(append([]any{value}, t...))
		return true
	}
	return false
}

// source is the text of a file with its lines.
type source struct {
	text  []byte
	lines []int // offset of each line's beginning
	eol   string
}

func newSource(text []byte) *source {
	s := &source{text: text, lines: []int{0}, eol: "\n"}
	for i, b := range text {
		if b == '\n' {
			s.lines = append(s.lines, i+1)
		}
	}
	if bytes.Contains(text, []byte("\r\n")) {
		s.eol = "\r\n"
	}
	return s
}

// offset is where a node begins; columns count characters.
func (s *source) offset(n *yaml.Node) int {
	if n.Line < 1 || n.Line > len(s.lines) {
		return -1
	}
	o := s.lines[n.Line-1]
	if n.Line == 1 && bytes.HasPrefix(s.text, []byte("\ufeff")) {
		o += len("\ufeff")
	}
	for range n.Column - 1 {
		_, size := utf8.DecodeRune(s.text[o:])
		if size == 0 {
			return -1
		}
		o += size
	}
	return o
}

// lineEnd is where the line of an offset ends, without its line break.
func (s *source) lineEnd(o int) int {
	if i := bytes.IndexByte(s.text[o:], '\n'); i >= 0 {
		return o + len(bytes.TrimSuffix(s.text[o:o+i], []byte("\r")))
	}
	return len(s.text)
}

// scalarEnd is where a scalar of one line ends; not ok for any other, and where that is not certain.
func (s *source) scalarEnd(n *yaml.Node, flow bool) (int, bool) {
	o := s.offset(n)
	if n.Kind != yaml.ScalarNode || o < 0 || n.Anchor != "" || n.Style&(yaml.LiteralStyle|yaml.FoldedStyle|yaml.TaggedStyle) != 0 {
		return 0, false
	}
	line := s.text[o:s.lineEnd(o)]
	end := 0
	switch {
	case n.Style&yaml.DoubleQuotedStyle != 0, n.Style&yaml.SingleQuotedStyle != 0:
		if len(line) == 0 {
			return 0, false
		}
		quote := line[0]
		for end = 1; ; end++ {
			if end >= len(line) {
				return 0, false
			}
			if line[end] == '\\' && quote == '"' {
				end++
			} else if line[end] == quote && quote == '\'' && end+1 < len(line) && line[end+1] == quote {
				end++
			} else if line[end] == quote {
				break
			}
		}
		end++
	case bytes.HasPrefix(line, []byte(n.Value)):
		end = len(n.Value)
	default:
		return 0, false
	}
	rest := strings.TrimLeft(string(line[end:]), " \t")
	switch {
	case rest == "" && !flow, strings.HasPrefix(rest, "#") && !flow && len(rest) < len(line[end:]):
	case flow && rest != "" && strings.ContainsRune(",}]", rune(rest[0])):
	default:
		return 0, false
	}
	return o + end, true
}

// insertion turns a change into text. What the text then means is checked by attempt.
func (s *source) insertion(c change) (insertion, bool) {
	n := c.to.n
	if c.to.shared {
		return insertion{}, false
	}
	flow := n.Style&yaml.FlowStyle != 0
	o := s.offset(n)
	if o < 0 || o >= len(s.text) {
		return insertion{}, false
	}
	if n.Kind == yaml.SequenceNode {
		switch {
		case flow && s.text[o] == '[' && len(n.Content) == 0:
			return insertion{o + 1, c.value}, true
		case flow && s.text[o] == '[':
			return insertion{o + 1, s.item(n.Content[0], c) + ", "}, true
		case !flow && s.text[o] == '-':
			return insertion{o, "- " + c.value + s.eol + strings.Repeat(" ", n.Column-1)}, true
		}
		return insertion{}, false
	}
	if n.Kind != yaml.MappingNode {
		return insertion{}, false
	}
	if len(n.Content) == 0 {
		if !flow || s.text[o] != '{' {
			return insertion{}, false
		}
		return insertion{o + 1, c.key + ": " + c.value}, true
	}
	text := c.key + ": " + c.value
	if flow && n.Content[0].Style&yaml.DoubleQuotedStyle != 0 {
		text = `"` + c.key + `": ` + c.json
	}
	for _, after := range c.after {
		for i := 0; i+1 < len(n.Content); i += 2 {
			if k, v := n.Content[i], n.Content[i+1]; k.Value == after {
				if end, ok := s.scalarEnd(v, flow); ok && flow {
					return insertion{end, ", " + text}, true
				} else if ok && k.Line == v.Line {
					return insertion{s.lineEnd(end), s.eol + strings.Repeat(" ", n.Content[0].Column-1) + text}, true
				}
			}
		}
	}
	first := s.offset(n.Content[0])
	if first < 0 {
		return insertion{}, false
	}
	if flow {
		return insertion{first, text + ", "}, true
	}
	return insertion{first, text + s.eol + strings.Repeat(" ", n.Content[0].Column-1)}, true
}

// item is a sequence's new item in the style of one that it has.
func (s *source) item(like *yaml.Node, c change) string {
	if like.Kind == yaml.MappingNode && len(like.Content) > 0 && like.Content[0].Style&yaml.DoubleQuotedStyle != 0 {
		return c.json
	}
	return c.value
}
