// Package lint finds what makes the artifacts of Argo workflows slow or wrong, and mends it.
//
// It owns the rules, and edits that leave everything else of a file byte for byte as it was: comments, order
// and style stay, since text is inserted at the places that the parser names, and the result is parsed and
// compared with what was meant before anyone sees it. Concurrency: its functions share nothing. Failure: a
// file that is no YAML is an *Error with its line; what is not of Argo, or cannot be known because a value is
// a placeholder, is no finding. It may import nothing of this module.
package lint

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"sort"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Severity of a finding.
type Severity string

const (
	// Warning: this is slow or wrong.
	Warning Severity = "warning"
	// Note: this is slow or wrong where the data is large; the file alone does not tell.
	Note Severity = "note"
)

// Rules, as a comment "# stepcache:ignore RULE, RULE" names them: on the line, above it, or above the
// document for all of it. Without names it means all rules.
const (
	Gzip   = "gzip"   // an output is compressed by one thread
	Volume = "volume" // an output lies outside every volume mount
	Mode   = "mode"   // a directory as input has no mode
	Stdout = "stdout" // a fan-out list comes from a step's stdout
	Claim  = "claim"  // an input is copied that could be mounted
)

// Finding is one place that should be changed.
type Finding struct {
	File     string   `json:"file"`
	Line     int      `json:"line"`
	Rule     string   `json:"rule"`
	Severity Severity `json:"severity"`
	Message  string   `json:"message"`
	// Fixable says that the corrected file has it no more.
	Fixable bool `json:"fixable"`
}

func (f Finding) String() string {
	return fmt.Sprintf("%s:%d: %s: %s [%s]", f.File, f.Line, f.Severity, f.Message, f.Rule)
}

// Error is a file that cannot be read as YAML.
type Error struct {
	File string
	Line int
	Err  error
}

func (e *Error) Error() string { return fmt.Sprintf("%s:%d: %v", e.File, e.Line, e.Err) }
func (e *Error) Unwrap() error { return e.Err }

// Report is what Check found in one file.
type Report struct {
	// Workflows counts the objects of Argo in the file.
	Workflows int
	// Findings are in the order of lines.
	Findings []Finding
	// Fixed is the file without its fixable findings; the file itself when there are none.
	Fixed []byte
}

// Check reads all documents of a file.
func Check(file string, text []byte) (Report, error) {
	docs, err := parse(file, text)
	if err != nil {
		return Report{}, err
	}
	r := Report{Fixed: text}
	var found []*finding
	ignored := ignores(text, docs)
	for i := range docs {
		for _, w := range workflows(docs[i], i) {
			r.Workflows++
			for _, f := range w.check() {
				if !ignored.has(f.Rule, f.Line, i) {
					f.File = file
					found = append(found, f)
				}
			}
		}
	}
	sort.SliceStable(found, func(i, j int) bool { return found[i].Line < found[j].Line })
	r.Fixed = fix(file, text, docs, found)
	for _, f := range found {
		r.Findings = append(r.Findings, f.Finding)
	}
	return r, nil
}

// finding is a Finding and the changes that mend it; none where that takes a person.
type finding struct {
	Finding
	changes []change
}

var lineOf = regexp.MustCompile(`line (\d+)`)

// parse reads the documents of a file.
func parse(file string, text []byte) (docs []*yaml.Node, err error) {
	fail := func(err error) ([]*yaml.Node, error) {
		e := &Error{File: file, Line: 1, Err: err}
		if m := lineOf.FindStringSubmatch(err.Error()); m != nil {
			e.Line, _ = strconv.Atoi(m[1])
		}
		var typed *yaml.TypeError
		if errors.As(err, &typed) { // its own text has a line for each
			e.Err = errors.New(strings.Join(typed.Errors, "; "))
		} else if bytes.Contains(text, []byte("{{")) {
			e.Err = fmt.Errorf("%w (a value that begins with {{ needs quotes; a Helm chart must be rendered first)", err)
		}
		return nil, e
	}
	known, _ := withoutSlashEscapes(text)
	d := yaml.NewDecoder(bytes.NewReader(known))
	for {
		var n yaml.Node
		err := d.Decode(&n)
		if errors.Is(err, io.EOF) {
			return docs, nil
		}
		if err != nil {
			return fail(err)
		}
		// What a node holds twice or cannot be a key is found only by decoding it.
		var v any
		if err := n.Decode(&v); err != nil {
			return fail(err)
		}
		docs = append(docs, &n)
	}
}

var escape = regexp.MustCompile(`\\.`)

// withoutSlashEscapes is a text as the parser takes it, which does not know JSON's escape \/. dropped are where
// the text has the backslashes that are left out.
func withoutSlashEscapes(text []byte) (known []byte, dropped []int) {
	if !json.Valid(text) {
		return text, nil
	}
	last := 0
	for _, m := range escape.FindAllIndex(text, -1) {
		if text[m[0]+1] == '/' {
			known = append(known, text[last:m[0]]...)
			dropped = append(dropped, m[0])
			last = m[0] + 1
		}
	}
	return append(known, text[last:]...), dropped
}
