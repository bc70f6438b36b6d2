package main

import (
	"fmt"
	"image/color"
	"io"
	"math"
	"path/filepath"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"

	"github.com/stepcache/stepcache/bench/host"
	"github.com/stepcache/stepcache/bench/trial"
)

// colors are those of the contenders, in the order of the report: this project's stands out.
var colors = []color.Color{
	color.RGBA{0x99, 0x99, 0x99, 0xff}, color.RGBA{0xcc, 0xbb, 0x88, 0xff}, color.RGBA{0x1f, 0x77, 0xb4, 0xff},
	color.RGBA{0xd6, 0x8a, 0x3a, 0xff}, color.RGBA{0x8a, 0xb0, 0x5f, 0xff}, color.RGBA{0xb0, 0x6f, 0x9f, 0xff}, color.RGBA{0x7f, 0x5f, 0x4f, 0xff},
}

// charts writes one SVG for each section that has figures.
func charts(rep *trial.Report, dir string) error {
	var order []string
	rows := map[string][]*trial.Row{}
	for _, r := range rep.Rows {
		if rows[r.Section] == nil {
			order = append(order, r.Section)
		}
		rows[r.Section] = append(rows[r.Section], r)
	}
	for _, section := range order {
		path := filepath.Join(dir, strings.ReplaceAll(section, " ", "-")+".svg")
		err := host.Replace(path, 0o644, func(out io.Writer) error { return chart(rep, section, rows[section], out) })
		if err != nil {
			return fmt.Errorf("chart of %s: %w", section, err)
		}
	}
	return nil
}

// chart draws a section: a group of bars for each row, a bar for each contender, how high its figure is to that of
// the contender with whom the row compares, on a logarithmic scale. For times it is the other way round, so that
// higher is better everywhere.
func chart(rep *trial.Report, section string, rows []*trial.Row, out io.Writer) error {
	p := plot.New()
	base := rows[0].Base() // of a section's rows it is the same
	p.Title.Text = section + ": times " + base + " (1 = as fast; logarithmic)"
	p.Y.Label.Text = "times " + base
	p.Legend.Top = true
	p.BackgroundColor = color.White
	var names []string
	low, high := 0.1, 2.0
	value := func(r *trial.Row, name string) (float64, bool) {
		s, ok := rep.Ratio(r, name)
		if !ok || s.Median <= 0 {
			return 0, false
		}
		if r.Unit == trial.Seconds {
			return 1 / s.Median, true
		}
		return s.Median, true
	}
	for _, r := range rows {
		names = append(names, strings.ReplaceAll(r.Name, ", ", "\n"))
		for _, c := range rep.Contenders {
			if v, ok := value(r, c.Name); ok {
				low, high = min(low, v), max(high, v)
			}
		}
	}
	low = math.Pow(10, math.Floor(math.Log10(low)))
	n := len(rep.Contenders)
	width := vg.Points(60 / float64(max(n, 1)))
	for k, c := range rep.Contenders {
		bars := make(plotter.Values, len(rows))
		any := false
		for i, r := range rows {
			if v, ok := value(r, c.Name); ok {
				bars[i], any = math.Log10(v/low), true
			}
		}
		if !any {
			continue
		}
		b, err := plotter.NewBarChart(bars, width)
		if err != nil {
			return err
		}
		b.Color, b.LineStyle.Width = colors[k%len(colors)], 0
		b.Offset = width * vg.Length(float64(k)-float64(n-1)/2)
		p.Add(b)
		p.Legend.Add(c.Name, b)
	}
	p.NominalX(names...)
	p.X.Min, p.X.Max = -0.6, float64(len(rows))+0.2 // the legend is on the right
	p.Y.Min, p.Y.Max = 0, math.Log10(high/low)*1.15
	p.Y.Tick.Marker = plot.TickerFunc(func(_, to float64) (ticks []plot.Tick) {
		for e := 0.0; e <= to; e++ {
			ticks = append(ticks, plot.Tick{Value: e, Label: fmt.Sprintf("%g", low*math.Pow(10, e))})
		}
		return ticks
	})
	p.Add(plotter.NewGrid())
	canvas := vgsvg.New(vg.Points(max(360, 110*float64(len(rows)))), vg.Points(300))
	p.Draw(draw.New(canvas))
	_, err := canvas.WriteTo(out)
	return err
}
