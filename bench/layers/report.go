package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
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

// report is what the run tells.
type report struct {
	b          *bench
	machine    host.Machine
	start, end time.Time
	rows       []*row
	whole      bool // false: it was interrupted
}

func newReport(ctx context.Context, b *bench) *report {
	return &report{b: b, machine: host.Describe(ctx, b.o.stepcache), start: time.Now()}
}

// finish notes the end, of all rows or not.
func (rep *report) finish(whole bool) {
	rep.end, rep.whole = time.Now(), whole
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
	s, of := host.SpreadOf(r.ratios), "N"
	if r.of.name != "N" {
		of = "×"
	}
	return fmt.Sprintf("%.2f %s (%.2f..%.2f)", s.Median, of, s.Min, s.Max)
}

// absolute is the row's own figure; without a ratio it has the spread.
func (r *row) absolute() string {
	s := host.SpreadOf(r.samples)
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
	return r.of.name + " " + r.unit.format(host.SpreadOf(r.bases).Median)
}

func (rep *report) heading() []string {
	n := host.SpreadOf(rep.b.native.samples)
	lines := []string{
		fmt.Sprintf("%s, %d rounds, files of %s, %d small files, in %s", rep.start.UTC().Format("2006-01-02 15:04 MST"),
			rep.b.o.rounds, humanize.IBytes(uint64(rep.b.o.bytes)), rep.b.o.files, rep.end.Sub(rep.start).Round(time.Second)),
		rep.machine.String(),
	}
	if len(rep.b.native.samples) > 0 {
		lines = append(lines, fmt.Sprintf("N, a native sequential read: %s (%s..%s in %d samples)%s",
			bytesPerSecond.format(n.Median), bytesPerSecond.format(n.Min), bytesPerSecond.format(n.Max), len(rep.b.native.samples), host.InRuns(rep.b.file)))
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
	if !rep.whole {
		fmt.Fprintln(out, "Interrupted: these are not all rows.")
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
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", r.layer, r.name, host.Dash(r.ratio()), r.absolute(), host.Dash(r.compared()), r.reference)
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

// rowJSON is a row as a program reads it.
type rowJSON struct {
	Layer     string       `json:"layer"`
	Name      string       `json:"name"`
	Unit      unit         `json:"unit"`
	Reference string       `json:"reference"`
	Figure    *host.Spread `json:"figure,omitempty"`
	Of        string       `json:"of,omitempty"`
	Base      *host.Spread `json:"base,omitempty"`
	Ratio     *host.Spread `json:"ratio,omitempty"`
	Samples   []float64    `json:"samples,omitempty"`
	Bases     []float64    `json:"bases,omitempty"`
	Reason    string       `json:"reason,omitempty"`
	Failed    bool         `json:"failed,omitempty"`
}

func (rep *report) json(out io.Writer) error {
	some := func(v []float64) *host.Spread {
		if len(v) == 0 {
			return nil
		}
		s := host.SpreadOf(v)
		return &s
	}
	all := struct {
		Date    time.Time    `json:"date"`
		Seconds float64      `json:"seconds"`
		Machine host.Machine `json:"machine"`
		Root    bool         `json:"root"`
		Whole   bool         `json:"whole"`
		Rounds  int          `json:"rounds"`
		Size    int64        `json:"sizeBytes"`
		Files   int          `json:"files"`
		Native  *host.Spread `json:"nativeBytesPerSecond,omitempty"`
		Rows    []rowJSON    `json:"rows"`
	}{rep.start.UTC(), rep.end.Sub(rep.start).Seconds(), rep.machine, rep.b.mounts, rep.whole, rep.b.o.rounds, rep.b.o.bytes, rep.b.o.files, some(rep.b.native.samples), nil}
	for _, r := range rep.rows {
		j := rowJSON{Layer: r.layer, Name: r.name, Unit: r.unit, Reference: r.reference, Figure: some(r.samples), Base: some(r.bases),
			Ratio: some(r.ratios), Samples: r.samples, Bases: r.bases, Reason: r.reason, Failed: r.failed}
		if r.of != nil {
			j.Of = r.of.name
		}
		all.Rows = append(all.Rows, j)
	}
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	return e.Encode(all)
}

// markdown writes the table for a README.
func (rep *report) markdown(out io.Writer) {
	for _, line := range rep.heading() {
		fmt.Fprintf(out, "%s  \n", line)
	}
	fmt.Fprint(out, "\n| layer | what | ratio (min..max) | figure | compared with | to reach |\n|---|---|---|---|---|---|\n")
	for _, r := range rep.rows {
		figure := r.absolute()
		if r.reason != "" {
			figure = r.outcome()
		}
		fmt.Fprintf(out, "| %s | %s | %s | %s | %s | %s |\n", r.layer, r.name, host.Dash(r.ratio()), strings.ReplaceAll(figure, "\n", " "), host.Dash(r.compared()), r.reference)
	}
}
