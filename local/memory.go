package local

import (
	"bufio"
	"errors"
	"fmt"
	"os"
)

// availableMemory is what the kernel says programs can take without swapping, in bytes.
func availableMemory() (int64, error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("read the machine's memory: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		var kib int64
		if n, _ := fmt.Sscanf(lines.Text(), "MemAvailable: %d kB", &kib); n == 1 {
			return kib << 10, nil
		}
	}
	return 0, errors.Join(errors.New("/proc/meminfo has no MemAvailable"), lines.Err())
}
