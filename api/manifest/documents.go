package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	yamlv2 "go.yaml.in/yaml/v2"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// document is one object's text within a file.
type document struct {
	line int // of its first line, from 1
	text []byte
}

// documents splits the content of a file, and leaves out what holds nothing but comments. A document of
// a YAML file ends at a line of --- or ..., which may have a comment behind it; a JSON file holds one
// value after another.
func documents(name string, content []byte) ([]document, error) {
	if len(content) > maxFile {
		return nil, fmt.Errorf("larger than %d MiB; a manifest is not data, split it into files", maxFile>>20)
	}
	content = bytes.TrimPrefix(content, []byte("\ufeff"))
	if bytes.IndexByte(content, 0) >= 0 {
		return nil, errors.New("holds a zero byte: this is not a text file in UTF-8")
	}
	if filepath.Ext(name) == ".json" {
		return jsonDocuments(content)
	}
	var docs []document
	current, blank := document{line: 1}, true
	end := func() {
		if !blank {
			docs = append(docs, current)
		}
	}
	line := 0
	for text := range bytes.Lines(content) {
		line++
		if rest, ok := separator(text); ok {
			end()
			current, blank = document{line: line + 1}, true
			if len(rest) == 0 {
				continue
			}
			// "--- {kind: Dataset}": the document begins on the separator's own line.
			current.line, text = line, rest
		}
		current.text = append(current.text, text...)
		// Directives such as %YAML stand before a document and make none.
		if t := bytes.TrimSpace(text); len(t) > 0 && t[0] != '#' && !(blank && text[0] == '%') {
			blank = false
		}
	}
	end()
	return docs, nil
}

// separator says whether a line ends a document, and returns what follows on it.
func separator(line []byte) (rest []byte, ok bool) {
	for _, mark := range []string{"---", "..."} {
		rest, ok := bytes.CutPrefix(line, []byte(mark))
		if !ok || len(rest) > 0 && !strings.ContainsRune(" \t\r\n", rune(rest[0])) {
			continue
		}
		if rest = bytes.TrimLeft(rest, " \t\r\n"); len(rest) > 0 && rest[0] == '#' {
			rest = nil
		}
		return rest, true
	}
	return nil, false
}

func jsonDocuments(content []byte) ([]document, error) {
	var docs []document
	d := json.NewDecoder(bytes.NewReader(content))
	for {
		var raw json.RawMessage
		before := d.InputOffset()
		err := d.Decode(&raw)
		if errors.Is(err, io.EOF) {
			return docs, nil
		}
		line := 1 + bytes.Count(content[:before], []byte("\n"))
		if err != nil {
			var syntax *json.SyntaxError
			if errors.As(err, &syntax) {
				line = 1 + bytes.Count(content[:min(syntax.Offset, int64(len(content)))], []byte("\n"))
			}
			return docs, fmt.Errorf("line %d: not JSON: %w", line, err)
		}
		gap := content[before:]
		line += bytes.Count(gap[:len(gap)-len(bytes.TrimLeft(gap, " \t\r\n"))], []byte("\n"))
		docs = append(docs, document{line: line, text: raw})
	}
}

// decode turns a document into an object; nil for one with nothing in it but comments.
func (d document) decode() (map[string]any, error) {
	if len(d.text) > MaxDocument {
		return nil, fmt.Errorf("the document is %.1f MiB, above the %d MiB that an API server takes; split it", float64(len(d.text))/(1<<20), MaxDocument>>20)
	}
	if json.Valid(d.text) {
		return d.decodeJSON()
	}
	// The YAML library bounds how many values aliases make, but not how long they are together.
	if bytes.IndexByte(d.text, '&') >= 0 && bytes.IndexByte(d.text, '*') >= 0 {
		var v any
		if err := yamlv2.Unmarshal(d.text, &v); err == nil && expanded(v, MaxDocument) < 0 {
			return nil, fmt.Errorf("the document's aliases expand it beyond the %d MiB that an API server takes; write the values out, or split it", MaxDocument>>20)
		}
	}
	// Strict: a key written twice is a mistake, whichever of the two would win.
	j, err := yaml.YAMLToJSONStrict(d.text)
	if err != nil {
		return nil, fmt.Errorf("not YAML: %s", d.explain(err))
	}
	return document{d.line, j}.decodeJSON()
}

// decodeJSON is decode of JSON, of which YAML lacks some escapes (\/, and a character as two of \u).
func (d document) decodeJSON() (map[string]any, error) {
	var v any
	strict, err := kjson.UnmarshalStrict(d.text, &v, kjson.DisallowDuplicateFields)
	if err != nil {
		return nil, fmt.Errorf("not an object: %w", err)
	}
	if len(strict) > 0 {
		return nil, fmt.Errorf("%w; remove one", errors.Join(strict...))
	}
	switch v := v.(type) {
	case nil:
		return nil, nil
	case map[string]any:
		return v, nil
	default:
		return nil, errors.New("not an object: a manifest begins with apiVersion, kind and metadata")
	}
}

// expanded takes the bytes of the text in v from budget and returns what remains, negative once there is
// none. The text of an alias counts each time, though in v it is there once.
func expanded(v any, budget int) int {
	switch v := v.(type) {
	case string:
		return budget - len(v)
	case []any:
		for _, e := range v {
			if budget = expanded(e, budget-1); budget < 0 {
				return budget
			}
		}
	case map[any]any:
		for k, e := range v {
			if budget = expanded(e, expanded(k, budget-1)); budget < 0 {
				return budget
			}
		}
	}
	return budget
}

// explain makes the text of a YAML error a user's.
func (d document) explain(err error) string {
	text := strings.TrimPrefix(err.Error(), "error converting YAML to JSON: ")
	text = strings.TrimPrefix(text, "yaml: ")
	text = strings.ReplaceAll(text, "\n", " ")
	if strings.HasPrefix(text, "invalid map key:") { // and the key in the syntax of Go
		text = "a key is a map or a list, and must be text"
	}
	var n int
	if _, scan := fmt.Sscanf(text, "line %d:", &n); scan == nil {
		// The YAML library counts within the document.
		_, rest, _ := strings.Cut(text, ":")
		text = fmt.Sprintf("line %d:%s", d.line+n-1, rest)
	}
	if strings.Contains(text, "tab character") || strings.Contains(text, "cannot start any token") && bytes.Contains(d.text, []byte("\t")) {
		text += " (indent with spaces, not tabs)"
	}
	if bytes.Contains(d.text, []byte("{{")) {
		text += " (a value that begins with {{ needs quotes; a Helm chart must be rendered first)"
	}
	return text
}
