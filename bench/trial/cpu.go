package trial

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// tick is the kernel's unit of CPU time in /proc (USER_HZ), which is the same on every architecture that Go runs on.
const tick = 10 * time.Millisecond

// stat is what /proc tells of a process.
type stat struct {
	parent, group int
	cpu           time.Duration
}

func statOf(pid int) (s stat, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return s, err
	}
	// The name, in brackets, may hold anything.
	_, after, ok := strings.Cut(string(text), ") ")
	for i := strings.Index(after, ") "); ok && i >= 0; i = strings.Index(after, ") ") {
		after = after[i+2:]
	}
	f := strings.Fields(after)
	if !ok || len(f) < 15 {
		return s, fmt.Errorf("/proc/%d/stat: %q", pid, text)
	}
	n := make([]int64, 15)
	for i := 1; i < len(n); i++ {
		n[i], _ = strconv.ParseInt(f[i], 10, 64)
	}
	s.parent, s.group = int(n[1]), int(n[2])
	// Of its own, and of the children that it has waited for.
	s.cpu = time.Duration(n[11]+n[12]+n[13]+n[14]) * tick
	return s, nil
}

// cpuOf is what the processes of some groups have taken of the CPU.
func cpuOf(groups []int) (sum time.Duration) {
	if len(groups) == 0 {
		return 0
	}
	all, err := os.ReadDir("/proc")
	if err != nil {
		return 0
	}
	for _, e := range all {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if s, err := statOf(pid); err == nil && slices.Contains(groups, s.group) {
			sum += s.cpu
		}
	}
	return sum
}
