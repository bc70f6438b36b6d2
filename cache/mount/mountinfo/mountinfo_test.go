package mountinfo

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const sample = `22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro
30 22 0:25 / /with\040blank\134back\011tab\012line rw,nosuid shared:3 master:2 - fuse.stepcache stepcache:a/b@01020304 ro,user_id=0
31 30 0:26 / /with\040blank\134back\011tab\012line ro - tmpfs  rw
32 22 0:27 /sub /mnt ro - tmpfs none rw,size=10k
33 32 0:28 / /mnt/deep rw - proc proc rw
34 22 0:29 / /mnt2 rw - proc proc rw
`

func TestParse(t *testing.T) {
	all, err := Parse(strings.NewReader(sample))
	if err != nil || len(all) != 6 {
		t.Fatalf("%d mounts, %v", len(all), err)
	}
	want := Mount{
		ID: 30, Parent: 22, Major: 0, Minor: 25, Root: "/", Point: "/with blank\\back\ttab\nline", Options: "rw,nosuid",
		Type: "fuse.stepcache", Source: "stepcache:a/b@01020304", SuperOptions: "ro,user_id=0",
	}
	if all[1] != want {
		t.Errorf("%+v", all[1])
	}
	if all[2].Source != "" || all[2].SuperOptions != "rw" || all[3].Root != "/sub" {
		t.Errorf("%+v %+v", all[2], all[3])
	}
	if at := Filter(all, want.Point); len(at) != 2 || at[0].ID != 31 || at[1].ID != 30 {
		t.Errorf("stack: %+v", at)
	}
	// The order of the lines says nothing.
	slices.Reverse(all)
	if at := Filter(all, want.Point); len(at) != 2 || at[0].ID != 31 || at[1].ID != 30 {
		t.Errorf("stack: %+v", at)
	}
	if at := Filter(all, "/with"); at != nil {
		t.Errorf("%+v", at)
	}
}

func TestParseRefusesGarbage(t *testing.T) {
	for _, s := range []string{
		"x", "1 2 3 4 5 6", "1 2 0:1 / / rw", "a 2 0:1 / / rw - t s o", "1 b 0:1 / / rw - t s o", "1 2 01 / / rw - t s o",
		"1 2 0:z / / rw - t s o", "1 2 0:1 / rw - t s o", "1 2 0:1 / / rw - t", "1 2 -1:1 / / rw - t s o",
	} {
		if m, err := Parse(strings.NewReader(s)); err == nil {
			t.Errorf("%q: %+v", s, m)
		}
	}
	if m, err := Parse(strings.NewReader("")); err != nil || m != nil {
		t.Errorf("%v %v", m, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(sample)
	f.Add(`1 1 0:1 / \0 rw - t s`)
	f.Fuzz(func(t *testing.T, s string) {
		all, err := Parse(strings.NewReader(s))
		if err != nil {
			return
		}
		for _, m := range all {
			if at := Filter(all, m.Point); len(at) > len(all) {
				t.Errorf("%d of %d mounts", len(at), len(all))
			}
		}
	})
}

// needRoot gives a folder that a test may mount at.
func needRoot(t *testing.T) string {
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("needs the right to mount: %v", err)
	}
	t.Cleanup(func() {
		for unix.Unmount(dir, unix.MNT_DETACH) == nil {
		}
	})
	// Mounts below must not travel to other mount namespaces while the test runs.
	_ = unix.Mount("", dir, "", unix.MS_PRIVATE, "")
	return dir
}

func TestAtBelowAndDetach(t *testing.T) {
	dir := needRoot(t)
	point := filepath.Join(dir, "a b\\c\n")
	if err := os.Mkdir(point, 0o700); err != nil {
		t.Fatal(err)
	}
	if at, err := At(point); err != nil || len(at) != 0 {
		t.Fatalf("%v %v", at, err)
	}
	for _, source := range []string{"one", "two", "three"} {
		if err := unix.Mount(source, point, "tmpfs", 0, "size=64k"); err != nil {
			t.Fatal(err)
		}
	}
	at, err := At(point)
	if err != nil || len(at) != 3 || at[0].Source != "three" || at[2].Source != "one" {
		t.Fatalf("%+v %v", at, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(point, &st); err != nil || unix.Major(st.Dev) != at[0].Major || unix.Minor(st.Dev) != at[0].Minor {
		t.Errorf("device %x, %+v", st.Dev, at[0])
	}
	below, err := Below(dir)
	if err != nil || len(below) != 4 || below[0].Source != "three" || below[3].Point != dir {
		t.Errorf("%+v %v", below, err)
	}
	busy, err := os.Create(filepath.Join(point, "busy"))
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	if n, err := Detach(point, func(m Mount) bool { return m.Source == "one" }); n != 2 || err != nil {
		t.Errorf("%d %v", n, err)
	}
	if n, err := Detach(point, nil); n != 1 || err != nil {
		t.Errorf("%d %v", n, err)
	}
	if n, err := Detach(point, nil); n != 0 || err != nil {
		t.Errorf("%d %v", n, err)
	}
	if _, err := busy.WriteString("still"); err != nil {
		t.Errorf("the user of a mount taken away: %v", err)
	}
}

func TestResolve(t *testing.T) {
	dir := t.TempDir()
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{"abs": filepath.Join(dir, "d"), "rel": "d", "two": "abs", "loop": "loop", "dead": "none"} {
		if err := os.Symlink(to, filepath.Join(dir, from)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"d", "abs", "rel", "two", "d/../rel", "d//"} {
		if got, err := Resolve(dir + "/" + name); err != nil || got != filepath.Join(dir, "d") {
			t.Errorf("%s: %s %v", name, got, err)
		}
	}
	for _, name := range []string{"loop", "dead", "none", "none/x"} {
		if got, err := Resolve(filepath.Join(dir, name)); err == nil {
			t.Errorf("%s: %s", name, got)
		}
	}
	if got, err := Resolve("/"); err != nil || got != "/" {
		t.Errorf("%s %v", got, err)
	}
}
