// Package host is the machine that a bench runs on, and what all benches do there: begin, be interrupted, keep what
// they have found, and leave nothing behind.
//
// It owns what a report says of machine and versions, the isolation of what a bench mounts (as root a bench runs in a
// child with a mount namespace of its own, so that nothing is left however it ends), memory that a virtual machine's host
// has to back before it is filled, the exit status, and where results go. Concurrency: a Machine is for one goroutine, the
// rest safe for concurrent use; who has memory backed says when it is done. Failure: what cannot be
// read of the machine is told as unknown, and without the right to mount a bench runs with what can be measured all
// the same.
//
// It may import the standard library, cobra, golang.org/x/sys, go-humanize and cache/mount/mountinfo.
package host

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"
)

// Machine is where figures are from.
type Machine struct {
	CPU       string `json:"cpu"`
	Cores     int    `json:"cores"`
	Memory    uint64 `json:"memoryBytes"`
	Kernel    string `json:"kernel"`
	Go        string `json:"go"`
	Stepcache string `json:"stepcache"`
	// Load is the load average of the minute before the run: a figure above the number of cores says that
	// others were at work, and that ratios are less certain.
	Load string `json:"loadBefore"`
	// Huge is what /proc/vmstat says of huge pages of files during the run: taken, and refused.
	Huge [2]int64 `json:"hugePagesTakenAndRefused"`

	before [2]int64 // what it said when the run began
}

// Describe describes this machine before a run of the given stepcache program.
func Describe(ctx context.Context, program string) Machine {
	m := Machine{CPU: "unknown", Cores: runtime.NumCPU(), Go: runtime.Version(), Load: "unknown", before: hugePages()}
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				m.CPU = strings.TrimSpace(v)
				break
			}
		}
	}
	if text, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.Load, _, _ = strings.Cut(string(text), " ")
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		m.Memory = uint64(info.Totalram) * uint64(info.Unit)
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Sysname[:]) + " " + unix.ByteSliceToString(u.Release[:]) + " " + unix.ByteSliceToString(u.Machine[:])
	}
	if out, err := exec.CommandContext(ctx, program, "version").Output(); err == nil {
		m.Stepcache = strings.TrimSpace(string(out))
	}
	return m
}

// Finish counts the huge pages since Describe.
func (m *Machine) Finish() {
	for i, now := range hugePages() {
		m.Huge[i] = now - m.before[i]
	}
}

// hugePages are the machine's counters: huge pages of files that were taken, and that were asked for in vain.
func hugePages() (n [2]int64) {
	text, err := os.ReadFile("/proc/vmstat")
	if err != nil {
		return n
	}
	for line := range strings.Lines(string(text)) {
		for i, name := range []string{"thp_file_alloc ", "thp_file_fallback "} {
			if v, ok := strings.CutPrefix(line, name); ok {
				n[i], _ = strconv.ParseInt(strings.TrimSpace(v), 10, 64)
			}
		}
	}
	return n
}

func (m Machine) String() string {
	return fmt.Sprintf("%s, %d cores, %s, %s, %s, stepcache %s, load %s before the run, %d huge pages taken and %d refused", m.CPU, m.Cores,
		humanize.IBytes(m.Memory), m.Kernel, m.Go, m.Stepcache, m.Load, m.Huge[0], m.Huge[1])
}
