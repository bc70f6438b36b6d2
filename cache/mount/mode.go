package mount

import "fmt"

// Mode is how the kernel opens files.
type Mode uint8

// Modes.
const (
	// Auto takes what ChooseMode says.
	Auto Mode = iota
	// Passthrough: the kernel asks at every open, and files that this node holds whole are read from where
	// they are.
	Passthrough
	// NoOpen: the kernel opens files without asking.
	NoOpen
)

// String names the mode as MarshalText does.
func (m Mode) String() string {
	switch m {
	case Auto:
		return "auto"
	case Passthrough:
		return "passthrough"
	case NoOpen:
		return "no-open"
	}
	return fmt.Sprintf("mode %d", uint8(m))
}

// MarshalText writes auto, passthrough or no-open.
func (m Mode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads what MarshalText writes.
func (m *Mode) UnmarshalText(b []byte) error {
	for _, v := range []Mode{Auto, Passthrough, NoOpen} {
		if string(b) == v.String() {
			*m = v
			return nil
		}
	}
	return fmt.Errorf("mount mode %q: want auto, passthrough or no-open", b)
}

const (
	// hugeFile is the size from which on one file makes a dataset one of large files.
	hugeFile = 64 << 20
	// largeFile is the size from which on passthrough is worth anything: below it, a file is one read.
	largeFile = 1 << 20
	// bytesPerOpen is the number of bytes whose reading gains by passthrough what an open costs: passthrough
	// reads at 1.0 N instead of 0.4 N, about 0.3 ns a byte; asking costs a first open about 150 µs.
	bytesPerOpen = 512 << 10
)

// ChooseMode says what is right for a dataset, given the number of its files by size: h[k] counts those of
// 2^(k-1) up to 2^k-1 bytes, h[0] the empty ones (bits.Len of the size). The rule:
//
//   - A file of 64 MiB or more: Passthrough. Reading one such file through this process, and a second copy of
//     it in the page cache, costs more than asking at open for some hundreds of small ones. So a mixed dataset,
//     a few large files beside thousands of small ones, can always pass its large files through.
//   - Otherwise, what saves more time when everything is read once: Passthrough if there are 512 KiB in files
//     of 1 MiB or more for each file of the dataset, else NoOpen.
//
// A mount whose reader leases nothing, or whose kernel or rights do not allow passthrough, is NoOpen anyway.
func ChooseMode(h []int64) Mode {
	var files, large float64
	for k, n := range h {
		files += float64(n)
		if n == 0 || k == 0 {
			continue
		}
		low := float64(uint64(1) << min(k-1, 63)) // the size of the smallest of them
		if low >= hugeFile {
			return Passthrough
		}
		if low >= largeFile {
			large += float64(n) * low * 1.5
		}
	}
	if large > 0 && large >= files*bytesPerOpen {
		return Passthrough
	}
	return NoOpen
}
