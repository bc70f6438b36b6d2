package meminfo

import (
	"os"
	"path/filepath"
	"testing"
)

func TestThisMachineHasMemory(t *testing.T) {
	m, err := Read()
	if err != nil {
		t.Fatal(err)
	}
	if m.Available <= 0 || m.Total < m.Available {
		t.Errorf("%+v", m)
	}
}

// The tightest of all limits counts, wherever it stands.
func TestRoomIsWhatTheTightestLimitLeaves(t *testing.T) {
	const unlimited = "9223372036854771712\n" // as version 1 says it
	for name, c := range map[string]struct {
		self  string
		files map[string]string
		left  int64
		limit int64
		ok    bool
	}{
		"no control groups":         {},
		"no limit":                  {"0::/\n", map[string]string{"memory.max": "max\n", "memory.current": "100\n"}, 0, 0, false},
		"in a container, version 2": {"0::/\n", map[string]string{"memory.max": "1000\n", "memory.current": "100\n"}, 900, 1000, true},
		"in a container, version 1": {"5:memory:/\n", map[string]string{"memory/memory.limit_in_bytes": "1000\n", "memory/memory.usage_in_bytes": "300\n"}, 700, 1000, true},
		"outside, version 2":        {"0::/a/b\n", map[string]string{"a/b/memory.max": "50\n", "a/b/memory.current": "20\n"}, 30, 50, true},
		"of a group above": {"0::/a/b\n", map[string]string{
			"a/memory.max": "60\n", "a/memory.current": "50\n", "a/b/memory.max": "max\n", "a/b/memory.current": "20\n",
		}, 10, 60, true},
		"outside, version 1": {"7:cpu:/x\n6:memory:/a\n", map[string]string{
			"memory/memory.limit_in_bytes": unlimited, "memory/memory.usage_in_bytes": "300\n",
			"memory/a/memory.limit_in_bytes": "400\n", "memory/a/memory.usage_in_bytes": "500\n",
		}, -100, 400, true},
		"no limit, version 1": {"5:memory:/\n", map[string]string{
			"memory/memory.limit_in_bytes": unlimited, "memory/memory.usage_in_bytes": "300\n",
		}, 0, 0, false},
		"what cannot be read": {"nonsense\n\n", map[string]string{"memory.max": "many\n", "memory.current": "1\n"}, 0, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			for name, text := range c.files {
				write(t, filepath.Join(root, name), text)
			}
			self := filepath.Join(t.TempDir(), "self")
			if c.self != "" {
				write(t, self, c.self)
			}
			if left, limit, ok := limits(root, self); left != c.left || limit != c.limit || ok != c.ok {
				t.Errorf("%d, %d, %v", left, limit, ok)
			}
		})
	}
}

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
