package wire

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestKeysWrittenAndLoaded(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	k := GenerateKeys()
	k.Read = append(k.Read, GenerateKeys().Read...)
	k.Write = nil
	if err := WriteKeys(dir, k); err != nil {
		t.Fatal(err)
	}
	got, err := LoadKeys(dir)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(k, got); d != "" {
		t.Fatal("keys differ")
	}
	fi, err := os.Stat(filepath.Join(dir, "read"))
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	if len(got.Write) > 0 {
		t.Error("there is a write key")
	}
	if len(got.Read) == 0 || got.Read[0] != k.Read[0] {
		t.Error("the current key is not the first")
	}
}

func TestKeyFilesThatAreWrong(t *testing.T) {
	good := strings.Repeat("ab", KeySize)
	for name, content := range map[string]string{
		"short": good[2:], "long": good + "00", "not hex": good[1:] + "x", "empty": "\n", "huge": strings.Repeat(good+"\n", 1000),
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "read"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := LoadKeys(dir)
		if err == nil || !strings.Contains(err.Error(), filepath.Join(dir, "read")) {
			t.Errorf("%s: %v does not name the file", name, err)
		} else if strings.Contains(err.Error(), good[2:20]) {
			t.Errorf("%s: %v tells the key", name, err)
		}
	}
	if _, err := LoadKeys(t.TempDir()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no files: %v", err)
	}
}

func TestKeysAreNotPrinted(t *testing.T) {
	k := GenerateKeys()
	for _, s := range []string{fmt.Sprint(k), fmt.Sprintf("%v %+v %#v", k, k.Read[0], k)} {
		if strings.Contains(s, hex.EncodeToString(k.Read[0][:8])) || strings.Contains(s, fmt.Sprint(k.Read[0][0], k.Read[0][1], k.Read[0][2])) {
			t.Errorf("%q tells the key", s)
		}
	}
}

func TestKeyWatcherFollowsARotation(t *testing.T) {
	dir, now := t.TempDir(), time.Unix(1000, 0)
	first, second := GenerateKeys(), GenerateKeys()
	if err := WriteKeys(dir, first); err != nil {
		t.Fatal(err)
	}
	w, err := WatchKeys(dir, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	second.Read = append(second.Read, first.Read...)
	if err := WriteKeys(dir, second); err != nil {
		t.Fatal(err)
	}
	if key := w.Keys().Read[0]; key != first.Read[0] {
		t.Error("read again before the interval was over")
	}
	now = now.Add(2 * time.Second)
	if key := w.Keys().Read[0]; key != second.Read[0] || len(w.Keys().Read) != 2 {
		t.Error("the new keys are not in force")
	}
	// A file that does not parse leaves the keys as they are.
	if err := os.WriteFile(filepath.Join(dir, "read"), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	now = now.Add(2 * time.Second)
	if key := w.Keys().Read[0]; key != second.Read[0] {
		t.Error("a malformed file changed the keys")
	}
	if w.Err() == nil {
		t.Error("a malformed file is not told")
	}
	if err := WriteKeys(dir, second); err != nil {
		t.Fatal(err)
	}
	now = now.Add(2 * time.Second)
	w.Keys()
	if w.Err() != nil {
		t.Errorf("still told after it was mended: %v", w.Err())
	}
}
