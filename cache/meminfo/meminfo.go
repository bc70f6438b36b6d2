// Package meminfo tells how much memory can be had: of the machine, and within the limit of the control groups that this
// process is in. It moves the limit of the process's heap for those who share that. It imports nothing of this module.
package meminfo

import (
	"bufio"
	"errors"
	"fmt"
	"math"
	"os"
	"path"
	"strconv"
	"strings"
)

// Machine is the memory of the machine in bytes, as proc(5) has it.
type Machine struct {
	Total int64
	// Available is what programs can take without swapping: page caches count as such.
	Available int64
}

// Read reads /proc/meminfo.
func Read() (Machine, error) {
	var m Machine
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return m, fmt.Errorf("read the machine's memory: %w", err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var kib int64
		switch line := lines.Text(); {
		case scan(line, "MemTotal: %d kB", &kib):
			m.Total = kib << 10
		case scan(line, "MemAvailable: %d kB", &kib):
			m.Available = kib << 10
			return m, nil // it comes later
		}
	}
	return m, errors.New("read the machine's memory: /proc/meminfo has no MemAvailable")
}

func scan(line, format string, n *int64) bool {
	k, _ := fmt.Sscanf(line, format, n)
	return k == 1
}

// Room is what is left of the tightest limit of this process's control groups, in bytes; what they use includes the page
// caches that they can give back. ok is false where no limit is to be seen.
func Room() (left int64, ok bool) {
	left, _, ok = limits("/sys/fs/cgroup", "/proc/self/cgroup")
	return left, ok
}

// Limit is the tightest limit of this process's control groups, in bytes. ok is false where none is to be seen.
func Limit() (limit int64, ok bool) {
	_, limit, ok = limits("/sys/fs/cgroup", "/proc/self/cgroup")
	return limit, ok
}

func limits(root, self string) (left, least int64, ok bool) {
	for _, dir := range groups(root, self) {
		for _, names := range [][2]string{{"memory.max", "memory.current"}, {"memory.limit_in_bytes", "memory.usage_in_bytes"}} {
			limit, limited := number(path.Join(dir, names[0]))
			used, known := number(path.Join(dir, names[1]))
			if !limited || !known || limit > math.MaxInt64/2 { // version 1 says "none" with the largest number of pages
				continue
			}
			if !ok {
				left, least, ok = limit-used, limit, true
			}
			left, least = min(left, limit-used), min(least, limit)
		}
	}
	return left, least, ok
}

// groups are the folders that may tell of this process's control groups and those above: as seen in a container, and outside.
func groups(root, self string) []string {
	dirs := []string{root, path.Join(root, "memory")}
	text, _ := os.ReadFile(self)
	for line := range strings.Lines(string(text)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		top := root
		switch {
		case len(f) < 3 || f[0] != "0" && f[1] != "memory":
			continue
		case f[0] != "0":
			top = path.Join(root, "memory")
		}
		for group := path.Clean("/" + f[2]); group != "/"; group = path.Dir(group) {
			dirs = append(dirs, path.Join(top, group))
		}
	}
	return dirs
}

// number reads a file that holds one; "max" is none.
func number(name string) (int64, bool) {
	text, err := os.ReadFile(name)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	return n, err == nil
}
