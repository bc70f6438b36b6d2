package trial

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/stepcache/stepcache/bench/access"
	"github.com/stepcache/stepcache/bench/host"
)

// Unit is what a row's figures count.
type Unit string

// Units.
const (
	BytesPerSecond Unit = "bytes/s"
	PerSecond      Unit = "1/s"
	Seconds        Unit = "s" // less is better
)

// of is a reading in the unit.
func (u Unit) of(a access.Amount) float64 {
	switch u {
	case BytesPerSecond:
		return a.BytesPerSecond()
	case PerSecond:
		return a.PerSecond()
	}
	return a.Took.Seconds()
}

// Format writes a figure for people.
func (u Unit) Format(v float64) string {
	switch {
	case u == BytesPerSecond:
		return fmt.Sprintf("%.2f GB/s", v/1e9)
	case u == PerSecond && v >= 10_000:
		return fmt.Sprintf("%.0f K/s", v/1000)
	case u == PerSecond:
		return fmt.Sprintf("%.0f /s", v)
	}
	return fmt.Sprintf("%.1f s", v)
}

// Kind is what is cached when a row begins.
type Kind string

// Kinds.
const (
	Cold Kind = "cold" // nothing
	Warm Kind = "warm" // all of it, by the contender; the kernel knows nothing, but for a re-read
	Any  Kind = "any"  // what the row's name says
)

// Report is what a run tells.
type Report struct {
	Date    time.Time    `json:"date"`
	Seconds float64      `json:"seconds"`
	Machine host.Machine `json:"machine"`
	Rounds  int          `json:"rounds"` // at most: a figure has its samples
	// Whole is false of what an interrupted run has found.
	Whole      bool        `json:"whole"`
	Contenders []Contender `json:"contenders"`
	Rows       []*Row      `json:"rows"`
	// Digests is how many readings were compared with the originals, all equal but for figures that say Wrong.
	Digests int `json:"digestsEqual"`
}

// Contender is one of those measured.
type Contender struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

// Row is one line: a figure for each contender.
type Row struct {
	Section string `json:"section"`
	Name    string `json:"name"`
	Unit    Unit   `json:"unit"`
	Kind    Kind   `json:"kind"`
	// Of names the row whose native figure is N here; empty: this one.
	Of string `json:"of,omitempty"`
	// To is the contender whose figure is N in place of the native one; it and this project are all that are measured.
	To string `json:"to,omitempty"`
	// Reach is the figure that this project wants, as a ratio to N where nothing else is said.
	Reach string `json:"reach,omitempty"`
	// Without names a contender that is not measured here.
	Without string             `json:"without,omitempty"`
	Figures map[string]*Figure `json:"figures"`
}

// wants says whether a contender has a figure here.
func (r *Row) wants(contender string) bool {
	switch {
	case contender == r.Without:
		return false
	case r.To != "":
		return contender == r.To || contender == Own
	case contender == Native:
		return r.Kind != Cold
	case contender == Direct: // what caches nothing is never warm
		return r.Kind != Warm
	}
	return true
}

// Base is the contender to whom a row's ratios are.
func (r *Row) Base() string {
	if r.To != "" {
		return r.To
	}
	return Native
}

func (r *Row) of(contender string) *Figure {
	if r.Figures == nil {
		r.Figures = map[string]*Figure{}
	}
	f := r.Figures[contender]
	if f == nil {
		f = &Figure{}
		r.Figures[contender] = f
	}
	return f
}

// Figure is what was measured of one contender.
type Figure struct {
	Samples []float64 `json:"samples,omitempty"`
	CPUs    []CPU     `json:"cpuSecondsPerGB,omitempty"`
	// LeftBucket is what left the bucket in the last sample over what one reader read, Requests the requests for
	// each small file; negative: nobody counted.
	LeftBucket float64 `json:"leftBucket"`
	Requests   float64 `json:"requestsEach"`

	Reason string `json:"reason,omitempty"` // why there is nothing, or not all
	Failed bool   `json:"failed,omitempty"`
	Wrong  bool   `json:"wrongBytes,omitempty"`
}

// CPU is what processes took for a GB that was read, in seconds; where only names were, for a million of them.
type CPU struct {
	Reader float64 `json:"reader"`
	Mount  float64 `json:"mount"`
	Worker float64 `json:"worker"`
}

func (f *Figure) add(v float64, c CPU) {
	f.Samples, f.CPUs = append(f.Samples, v), append(f.CPUs, c)
	f.LeftBucket, f.Requests = -1, -1
}

// left notes what left the bucket for a reading.
func (f *Figure) left(bytes, requests int64, op string, got result) {
	if got.Bytes > 0 && op != opPut {
		f.LeftBucket = float64(bytes) / float64(got.Bytes)
		if op == opSequential || op == opHash || op == opShare {
			f.LeftBucket *= float64(got.Count) // each reader read all of it
		}
	}
	if got.Count > 0 && op == opSmall {
		f.Requests = float64(requests) / float64(got.Count)
	}
}

// Ratio is a contender's figure to the native one, by rounds where both have all of them.
func (rep *Report) Ratio(r *Row, contender string) (s host.Spread, ok bool) {
	f, native := r.Figures[contender], rep.base(r)
	if f == nil || native == nil || len(f.Samples) == 0 || len(native.Samples) == 0 {
		return s, false
	}
	if len(f.Samples) != len(native.Samples) {
		of := host.SpreadOf(native.Samples).Median
		s = host.SpreadOf(f.Samples)
		return host.Spread{Median: s.Median / of, Min: s.Min / of, Max: s.Max / of}, true
	}
	ratios := make([]float64, len(f.Samples))
	for k := range ratios {
		ratios[k] = f.Samples[k] / native.Samples[k]
	}
	return host.SpreadOf(ratios), true
}

// base is the figure to which a row's ratios are.
func (rep *Report) base(r *Row) *Figure {
	of := r.Of
	if of == "" {
		of = r.Name
	}
	for _, other := range rep.Rows {
		if other.Section == r.Section && other.Name == of {
			return other.Figures[r.Base()]
		}
	}
	return nil
}

// BestPeer is how many times better than the best other project this one is, and who that is.
func (rep *Report) BestPeer(r *Row) (times float64, peer string, ok bool) {
	own := r.Figures[Own]
	if own == nil || len(own.Samples) == 0 {
		return 0, "", false
	}
	v := host.SpreadOf(own.Samples).Median
	for _, c := range rep.Contenders {
		f := r.Figures[c.Name]
		if c.Name == Native || c.Name == Direct || c.Name == Own || f == nil || len(f.Samples) == 0 {
			continue
		}
		x := v / host.SpreadOf(f.Samples).Median
		if r.Unit == Seconds {
			x = 1 / x
		}
		if peer == "" || x < times {
			times, peer = x, c.Name
		}
	}
	return times, peer, peer != ""
}

// wrong is the error of a run that cannot be trusted.
func (rep *Report) wrong() error {
	for _, r := range rep.Rows {
		if f := r.Figures[Own]; f != nil && f.Failed {
			return fmt.Errorf("%s: %s: %s", r.Section, r.Name, f.Reason)
		}
		for name, f := range r.Figures {
			if f.Wrong && name == Direct {
				return fmt.Errorf("%s: %s: %s: %s", r.Section, r.Name, name, f.Reason)
			}
		}
	}
	return nil
}

// JSON writes the report for programs.
func (rep *Report) JSON(out io.Writer) error {
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	return e.Encode(rep)
}

// Heading names date, machine and versions.
func (rep *Report) Heading() []string {
	lines := []string{
		fmt.Sprintf("%s, at most %d rounds, in %s, %d digests equal", rep.Date.Format("2006-01-02 15:04 MST"), rep.Rounds,
			(time.Duration(rep.Seconds) * time.Second), rep.Digests),
		rep.Machine.String(),
	}
	var versions []string
	for _, c := range rep.Contenders {
		versions = append(versions, c.Name+": "+c.Version)
	}
	return append(lines, strings.Join(versions, "; "))
}

// columns are the contenders that have a figure, or a reason, somewhere.
func (rep *Report) columns() (names []string) {
	for _, c := range rep.Contenders {
		if slices.ContainsFunc(rep.Rows, func(r *Row) bool { return r.Figures[c.Name] != nil }) {
			names = append(names, c.Name)
		}
	}
	return names
}

// tables are the report's tables, each with its heading as first row.
func (rep *Report) tables() [][][]string {
	names := rep.columns()
	speed := [][]string{append(append([]string{"what"}, names...), "to the best peer", "to reach")}
	cpu := [][]string{append([]string{"CPU seconds per GB (names: per million), reader + mount + worker"}, names...)}
	left := [][]string{append([]string{"left the bucket, × what one reader read; requests a small file"}, names...)}
	for _, r := range rep.Rows {
		title := r.Section + ": " + r.Name
		a, b, c := []string{title}, []string{title}, []string{title}
		counted := false
		for _, n := range names {
			a = append(a, rep.cell(r, n))
			b = append(b, r.Figures[n].cpu())
			text := r.Figures[n].bucket(r)
			counted = counted || text != "-"
			c = append(c, text)
		}
		best := "-"
		if times, peer, ok := rep.BestPeer(r); ok {
			best = fmt.Sprintf("%.1f × %s", times, peer)
		}
		speed = append(speed, append(a, best, host.Dash(r.Reach)))
		cpu = append(cpu, b)
		if counted {
			left = append(left, c)
		}
	}
	all := [][][]string{speed, cpu}
	if len(left) > 1 {
		all = append(all, left)
	}
	return all
}

func (rep *Report) cell(r *Row, name string) string {
	f := r.Figures[name]
	if f == nil || len(f.Samples) == 0 && f.Reason == "" {
		return "-"
	}
	if len(f.Samples) == 0 {
		return "none (see below)"
	}
	text := r.Unit.Format(host.SpreadOf(f.Samples).Median)
	if s, ok := rep.Ratio(r, name); ok && (name != r.Base() || r.Of != "") {
		text += fmt.Sprintf(", %.2f", s.Median)
		if s.Min != s.Max {
			text += fmt.Sprintf(" (%.2f..%.2f)", s.Min, s.Max)
		}
	}
	return text
}

func (f *Figure) cpu() string {
	if f == nil || len(f.CPUs) == 0 {
		return "-"
	}
	median := func(of func(CPU) float64) float64 {
		var v []float64
		for _, c := range f.CPUs {
			v = append(v, of(c))
		}
		return host.SpreadOf(v).Median
	}
	return fmt.Sprintf("%.2f + %.2f + %.2f", median(func(c CPU) float64 { return c.Reader }),
		median(func(c CPU) float64 { return c.Mount }), median(func(c CPU) float64 { return c.Worker }))
}

func (f *Figure) bucket(r *Row) string {
	if f == nil || len(f.Samples) == 0 || f.LeftBucket < 0 {
		return "-"
	}
	// What was said to be cached is told where it was fetched, or asked for, all the same.
	if r.Kind == Warm && f.LeftBucket < 0.05 && f.Requests < 0.5 {
		return "-"
	}
	text := fmt.Sprintf("%.2f ×", f.LeftBucket)
	if f.Requests >= 0 {
		text += fmt.Sprintf("; %.2f", f.Requests)
	}
	return text
}

// reasons tells what has no figure, each reason once.
func (rep *Report) reasons() (lines []string) {
	where := map[string][]string{}
	var order []string
	for _, r := range rep.Rows {
		for _, n := range rep.columns() {
			f := r.Figures[n]
			if f == nil || f.Reason == "" {
				continue
			}
			key := n + ": " + strings.ReplaceAll(f.Reason, "\n", " ")
			if where[key] == nil {
				order = append(order, key)
			}
			where[key] = append(where[key], r.Section+": "+r.Name)
		}
	}
	for _, key := range order {
		lines = append(lines, fmt.Sprintf("%s [%s]", key, strings.Join(where[key], "; ")))
	}
	return lines
}

// Print writes the report for people.
func (rep *Report) Print(out io.Writer) error {
	if !rep.Whole {
		fmt.Fprintln(out, "Interrupted: these are not all rows and rounds.")
	}
	for _, line := range rep.Heading() {
		fmt.Fprintln(out, line)
	}
	for _, table := range rep.tables() {
		fmt.Fprintln(out)
		w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
		for _, row := range table {
			fmt.Fprintln(w, strings.Join(row, "\t"))
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	for _, line := range rep.reasons() {
		fmt.Fprintf(out, "\n%s\n", line)
	}
	return nil
}

// Markdown writes it for a README.
func (rep *Report) Markdown(out io.Writer) {
	for _, line := range rep.Heading() {
		fmt.Fprintf(out, "%s  \n", line)
	}
	for _, table := range rep.tables() {
		fmt.Fprintf(out, "\n| %s |\n|%s\n", strings.Join(table[0], " | "), strings.Repeat("---|", len(table[0])))
		for _, row := range table[1:] {
			fmt.Fprintf(out, "| %s |\n", strings.Join(row, " | "))
		}
	}
	for _, line := range rep.reasons() {
		fmt.Fprintf(out, "\n%s\n", line)
	}
}
