package host

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Results is where a bench's results go: while it runs, into a partial file, which is what is left of a run that was
// interrupted or killed; at its end into the one that keeps the last whole run until then.
type Results struct{ whole, partial string }

// ResultsIn are those of the named bench in a folder, which it makes.
func ResultsIn(dir, name string) (*Results, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, name)
	return &Results{path + ".json", path + ".partial.json"}, nil
}

// Partial writes what there is so far.
func (r *Results) Partial(write func(io.Writer) error) error { return Replace(r.partial, 0o644, write) }

// Whole writes the results of a run that has come to its end.
func (r *Results) Whole(write func(io.Writer) error) error {
	if err := Replace(r.whole, 0o644, write); err != nil {
		return err
	}
	if err := os.Remove(r.partial); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Replace writes a file anew: as a whole, or not at all.
func Replace(path string, mode fs.FileMode, write func(io.Writer) error) error {
	var b bytes.Buffer
	if err := write(&b); err != nil {
		return err
	}
	tmp := path + "~"
	if err := os.WriteFile(tmp, b.Bytes(), mode); err != nil {
		return err
	}
	return errors.Join(os.Chmod(tmp, mode), os.Rename(tmp, path)) // the mode whatever the umask
}

// Place is where a file has a bench's table: between two lines of its own.
type Place struct{ path, begin, end string }

// PlaceIn finds the named table's place in a file, or says what is missing: better now than after ten minutes.
func PlaceIn(path, name string) (*Place, error) {
	p := &Place{path, "<!-- " + name + ":begin -->\n", "<!-- " + name + ":end -->"}
	if _, _, err := p.around(); err != nil {
		return nil, err
	}
	return p, nil
}

// around is what is before and behind the table.
func (p *Place) around() (before, after string, err error) {
	text, err := os.ReadFile(p.path)
	if err != nil {
		return "", "", fmt.Errorf("--readme: %w", err)
	}
	before, rest, ok := strings.Cut(string(text), p.begin)
	_, after, ok2 := strings.Cut(rest, p.end)
	if !ok || !ok2 {
		return "", "", fmt.Errorf("--readme %s: no lines %s and %s to write the table between", p.path, strings.TrimSpace(p.begin), p.end)
	}
	return before + p.begin, p.end + after, nil
}

// Write puts the table there; the rest of the file is what it is by now.
func (p *Place) Write(table func(io.Writer)) error {
	before, after, err := p.around()
	if err != nil {
		return err
	}
	info, err := os.Stat(p.path)
	if err != nil {
		return err
	}
	return Replace(p.path, info.Mode().Perm(), func(out io.Writer) error {
		_, err := io.WriteString(out, before)
		table(out)
		_, err2 := io.WriteString(out, after)
		return errors.Join(err, err2)
	})
}

// Spread is what is told of some samples.
type Spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

// SpreadOf sums samples up; of none it is zero.
func SpreadOf(samples []float64) Spread {
	if len(samples) == 0 {
		return Spread{}
	}
	v := slices.Sorted(slices.Values(samples))
	return Spread{(v[(len(v)-1)/2] + v[len(v)/2]) / 2, v[0], v[len(v)-1]}
}

// Dash is a cell of a table: a dash where there is nothing to say.
func Dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
