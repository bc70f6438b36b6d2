package main

import (
	"context"
	"slices"
	"time"

	"github.com/stepcache/stepcache/bench/access"
)

// perSecond is a rate of n of anything.
func perSecond(n int64, since time.Time) float64 { return float64(n) / time.Since(since).Seconds() }

// sequential reads a file from its start to its end, by so many readers at once, and returns the bytes a
// second of all.
func sequential(ctx context.Context, path string, size int64, readers int) (float64, error) {
	a, err := access.Sequential(ctx, slices.Repeat([]string{path}, readers), size, 0)
	return a.BytesPerSecond(), err
}

// random reads n aligned pieces of a file in no order and returns the reads a second.
func random(ctx context.Context, path string, size int64, piece, n int) (float64, error) {
	a, err := access.Random(ctx, path, size, piece, n, 0)
	return a.PerSecond(), err
}

// smallReads opens, reads and closes files below dir, by so many readers, and returns the files a second.
func smallReads(ctx context.Context, dir string, files []access.File, readers int, whole bool) (float64, error) {
	a, err := access.Small(ctx, dir, files, readers, whole, 0)
	return a.PerSecond(), err
}

// openStat opens, stats and closes files below dir and returns the files a second.
func openStat(ctx context.Context, dir string, files []access.File) (float64, error) {
	a, err := access.OpenStat(ctx, dir, files, 0)
	return a.PerSecond(), err
}

// walk lists a tree as `ls -lR` does and returns the entries a second.
func walk(ctx context.Context, dir string, want int64) (float64, error) {
	a, err := access.Walk(ctx, dir, want, 0)
	return a.PerSecond(), err
}
