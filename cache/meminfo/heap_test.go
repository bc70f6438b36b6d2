package meminfo

import (
	"math"
	"runtime/debug"
	"testing"
)

func TestHeapIsMoved(t *testing.T) {
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(math.MaxInt64))
	move := func(by, want int64) {
		t.Helper()
		if got := MoveHeap(by); got != want || debug.SetMemoryLimit(-1) != want {
			t.Errorf("moved by %d it is %d, and said to be %d; want %d", by, debug.SetMemoryLimit(-1), got, want)
		}
	}
	move(100, math.MaxInt64) // nothing to move
	move(-100, math.MaxInt64)
	debug.SetMemoryLimit(1000)
	move(-100, 900)
	move(300, 1200)
	move(-1100, 250)
	move(900, 1000)
	debug.SetMemoryLimit(2000) // set by somebody else, with nothing moved
	move(10, 2010)
	move(-10, 2000)
}
