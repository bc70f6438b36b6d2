package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/stepcache/stepcache/bench/host"
)

// unit is what a figure counts.
type unit string

// Units.
const (
	bytesPerSecond unit = "bytes/s"
	each           unit = "1/s"
	times          unit = "times"
	bytes_         unit = "bytes"
	mib            unit = "bytes of memory"
	percent        unit = "%"
)

func (u unit) format(v float64) string {
	switch u {
	case bytesPerSecond:
		return fmt.Sprintf("%.2f GB/s", v/1e9)
	case each:
		if v >= 10_000 {
			return fmt.Sprintf("%.0f K/s", v/1000)
		}
		return fmt.Sprintf("%.1f K/s", v/1000)
	case times:
		return fmt.Sprintf("%.3f ×", v)
	case bytes_:
		return fmt.Sprintf("%.0f B", v)
	case mib:
		return fmt.Sprintf("%.1f MiB", v/(1<<20))
	case percent:
		return fmt.Sprintf("%.1f %%", v)
	}
	return fmt.Sprint(v)
}

// spread is what is told of some samples.
type spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

func spreadOf(samples []float64) (s spread) {
	if len(samples) == 0 {
		return s
	}
	v := slices.Sorted(slices.Values(samples))
	s.Min, s.Max = v[0], v[len(v)-1]
	s.Median = (v[(len(v)-1)/2] + v[len(v)/2]) / 2
	return s
}

// report is what the run tells.
type report struct {
	b          *bench
	machine    host.Machine
	start, end time.Time
	rows       []*row
}

func newReport(ctx context.Context, b *bench) *report {
	return &report{b: b, machine: host.Describe(ctx, b.o.stepcache), start: time.Now()}
}

// finish notes the end.
func (rep *report) finish() {
	rep.end = time.Now()
	rep.machine.Finish()
}

// outcome is a row in a few words.
func (r *row) outcome() string {
	switch {
	case r.failed:
		return "FAILED: " + r.reason
	case r.reason != "":
		return "not measured: " + r.reason
	case len(r.ratios) > 0:
		return r.ratio() + " (" + r.absolute() + ")"
	}
	return r.absolute()
}

// ratio is the row's ratio with its spread.
func (r *row) ratio() string {
	if len(r.ratios) == 0 {
		return ""
	}
	s, of := spreadOf(r.ratios), "N"
	if r.of.name != "N" {
		of = "×"
	}
	return fmt.Sprintf("%.2f %s (%.2f..%.2f)", s.Median, of, s.Min, s.Max)
}

// absolute is the row's own figure; without a ratio it has the spread.
func (r *row) absolute() string {
	s := spreadOf(r.samples)
	if len(r.ratios) > 0 || s.Min == s.Max {
		return r.unit.format(s.Median)
	}
	return fmt.Sprintf("%s (%s..%s)", r.unit.format(s.Median), r.unit.format(s.Min), r.unit.format(s.Max))
}

// compared is what the row was compared with.
func (r *row) compared() string {
	if r.of == nil || len(r.bases) == 0 {
		return ""
	}
	return r.of.name + " " + r.unit.format(spreadOf(r.bases).Median)
}

func (rep *report) heading() []string {
	n := spreadOf(rep.b.native.samples)
	lines := []string{
		fmt.Sprintf("%s, %d rounds, files of %s, %d small files, in %s", rep.start.UTC().Format("2006-01-02 15:04 MST"),
			rep.b.o.rounds, humanize.IBytes(uint64(rep.b.o.bytes)), rep.b.o.files, rep.end.Sub(rep.start).Round(time.Second)),
		rep.machine.String(),
	}
	if len(rep.b.native.samples) > 0 {
		lines = append(lines, fmt.Sprintf("N, a native sequential read: %s (%s..%s in %d samples)",
			bytesPerSecond.format(n.Median), bytesPerSecond.format(n.Min), bytesPerSecond.format(n.Max), len(rep.b.native.samples)))
	}
	if !rep.b.mounts {
		lines = append(lines, "Not root: N is read from /dev/shm, whatever its pages are, and rows that mount were skipped.")
	}
	return lines
}

func (rep *report) print(out io.Writer) error {
	if rep.b.o.output == "json" {
		return rep.json(out)
	}
	for _, line := range rep.heading() {
		fmt.Fprintln(out, line)
	}
	fmt.Fprintln(out)
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "layer\twhat\tratio (min..max)\tfigure\tcompared with\tto reach")
	for _, r := range rep.rows {
		if r.reason != "" {
			fmt.Fprintf(w, "%s\t%s\t-\t-\t-\t%s\n", r.layer, r.name, r.reference)
			continue
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", r.layer, r.name, dash(r.ratio()), r.absolute(), dash(r.compared()), r.reference)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	rep.reasons(out)
	return nil
}

// reasons lists what was not measured, and why: one reason is often that of many rows.
func (rep *report) reasons(out io.Writer) {
	rows := map[string][]string{}
	var order []string
	for _, r := range rep.rows {
		if r.reason == "" {
			continue
		}
		why := r.outcome()
		if rows[why] == nil {
			order = append(order, why)
		}
		rows[why] = append(rows[why], r.title())
	}
	for _, why := range order {
		fmt.Fprintf(out, "\n%s\n  %s\n", why, strings.Join(rows[why], "\n  "))
	}
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// rowJSON is a row as a program reads it.
type rowJSON struct {
	Layer     string    `json:"layer"`
	Name      string    `json:"name"`
	Unit      unit      `json:"unit"`
	Reference string    `json:"reference"`
	Figure    *spread   `json:"figure,omitempty"`
	Of        string    `json:"of,omitempty"`
	Base      *spread   `json:"base,omitempty"`
	Ratio     *spread   `json:"ratio,omitempty"`
	Samples   []float64 `json:"samples,omitempty"`
	Bases     []float64 `json:"bases,omitempty"`
	Reason    string    `json:"reason,omitempty"`
	Failed    bool      `json:"failed,omitempty"`
}

func (rep *report) json(out io.Writer) error {
	some := func(v []float64) *spread {
		if len(v) == 0 {
			return nil
		}
		s := spreadOf(v)
		return &s
	}
	all := struct {
		Date    time.Time    `json:"date"`
		Seconds float64      `json:"seconds"`
		Machine host.Machine `json:"machine"`
		Root    bool         `json:"root"`
		Rounds  int          `json:"rounds"`
		Size    int64        `json:"sizeBytes"`
		Files   int          `json:"files"`
		Native  *spread      `json:"nativeBytesPerSecond,omitempty"`
		Rows    []rowJSON    `json:"rows"`
	}{rep.start.UTC(), rep.end.Sub(rep.start).Seconds(), rep.machine, rep.b.mounts, rep.b.o.rounds, rep.b.o.bytes, rep.b.o.files, some(rep.b.native.samples), nil}
	for _, r := range rep.rows {
		j := rowJSON{Layer: r.layer, Name: r.name, Unit: r.unit, Reference: r.reference, Figure: some(r.samples), Base: some(r.bases),
			Ratio: some(r.ratios), Samples: r.samples, Bases: r.bases, Reason: r.reason, Failed: r.failed}
		if r.of != nil {
			j.Of = r.of.name
		}
		all.Rows = append(all.Rows, j)
	}
	text, err := jsonText(all)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%s\n", text)
	return err
}

func jsonText(v any) ([]byte, error) { return json.MarshalIndent(v, "", "  ") }

// The table's place in a README.
const (
	tableBegin = "<!-- table:begin -->\n"
	tableEnd   = "<!-- table:end -->"
)

// markers finds the table's place.
func markers(text []byte) (from, to int, err error) {
	from = bytes.Index(text, []byte(tableBegin))
	to = bytes.Index(text, []byte(tableEnd))
	if from < 0 || to < from {
		return 0, 0, errors.New("no lines " + strings.TrimSpace(tableBegin) + " and " + tableEnd + " to write the table between")
	}
	return from + len(tableBegin), to, nil
}

// intoReadme writes the table between the markers of a file.
func (rep *report) intoReadme(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	from, to, err := markers(text)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	var out bytes.Buffer
	out.Write(text[:from])
	for _, line := range rep.heading() {
		fmt.Fprintf(&out, "%s  \n", line)
	}
	fmt.Fprint(&out, "\n| layer | what | ratio (min..max) | figure | compared with | to reach |\n|---|---|---|---|---|---|\n")
	for _, r := range rep.rows {
		figure := r.absolute()
		if r.reason != "" {
			figure = r.outcome()
		}
		fmt.Fprintf(&out, "| %s | %s | %s | %s | %s | %s |\n", r.layer, r.name, dash(r.ratio()), strings.ReplaceAll(figure, "\n", " "), dash(r.compared()), r.reference)
	}
	out.Write(text[to:])
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	return os.WriteFile(path, out.Bytes(), info.Mode().Perm())
}
