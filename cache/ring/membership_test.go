package ring

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	const ok = `{"id":"w-0","addr":"10.0.0.1:7000","control":"w-0.genomes:7001","state":"Ready","weight":3,"node":"n"}`
	for _, c := range []struct{ name, in, want string }{
		{"not JSON", `{"epoch":`, "not a valid list"},
		{"trailing", `{"epoch":1} x`, "not a valid list"},
		{"negative epoch", `{"epoch":-1}`, "not a valid list"},
		{"weight too large", `{"members":[{"id":"a","addr":"a:1","state":"Ready","weight":4294967296}]}`, "not a valid list"},
		{"no id", `{"epoch":7,"members":[` + ok + `,{"addr":"a:1","state":"Ready"}]}`, "a member has no id"},
		{"same id", `{"members":[` + ok + `,` + ok + `]}`, `members 0 and 1 have the same id "w-0"`},
		{"no addr", `{"members":[{"id":"a","state":"Ready"}]}`, `member "a": addr "": is missing`},
		{"no port", `{"members":[{"id":"a","addr":"a","state":"Ready"}]}`, `addr "a": want host:port`},
		{"no host", `{"members":[{"id":"a","addr":":1","state":"Ready"}]}`, `addr ":1": want host:port`},
		{"bad control", `{"members":[{"id":"a","addr":"a:1","control":"a","state":"Ready"}]}`, `control "a": want host:port`},
		{"no state", `{"members":[{"id":"a","addr":"a:1"}]}`, `state "" is not known; want Ready or Leaving`},
		{"state", `{"members":[{"id":"a","addr":"a:1","state":"ready"}]}`, `state "ready" is not known`},
	} {
		if m, err := Parse([]byte(c.in)); err == nil || !strings.Contains(err.Error(), c.want) || len(m.Members) > 0 {
			t.Errorf("%s: %v, %v; want %q", c.name, m, err, c.want)
		}
	}

	m, err := Parse([]byte(`{"epoch":9,"later":true,"members":[` + ok + `,{"id":"w-1","addr":"[::1]:7000","state":"Leaving"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	want := Membership{Epoch: 9, Members: []Member{
		{ID: "w-0", Addr: "10.0.0.1:7000", Control: "w-0.genomes:7001", State: Ready, Weight: 3, Node: "n"},
		{ID: "w-1", Addr: "[::1]:7000", State: Leaving},
	}}
	if diff := cmp.Diff(want, m); diff != "" {
		t.Error(diff)
	}
	b, _ := json.Marshal(m)
	if again, err := Parse(b); err != nil || !cmp.Equal(m, again) {
		t.Errorf("written and read again: %v, %v", again, err)
	}
	if m, err := Parse([]byte(`{"epoch":1,"members":[]}`)); err != nil || m.Epoch != 1 {
		t.Errorf("nobody there yet: %v, %v", m, err)
	}
}

func TestLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "members.json")
	if _, err := Load(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	os.WriteFile(path, []byte(`{"members":[{}]}`), 0o600)
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("error does not name the file: %v", err)
	}
	os.WriteFile(path, make([]byte, maxList+1), 0o600)
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("huge file: %v", err)
	}
	os.WriteFile(path, []byte(`{"epoch":3,"members":[{"id":"a","addr":"a:1","state":"Ready"}]}`), 0o600)
	if m, err := Load(path); err != nil || m.Epoch != 3 || len(m.Members) != 1 {
		t.Errorf("%v, %v", m, err)
	}
}

// What a worker sends is not unpacked to many times its size before it is refused.
func TestMembersThatAreNothing(t *testing.T) {
	for _, member := range []string{"{}", "null", `{"addr":"a:1"}`} {
		list := []byte(`{"epoch":1,"members":[` + strings.Repeat(member+",", 1<<20) + member + `]}`)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := Parse(list)
		runtime.ReadMemStats(&after)
		if took := after.TotalAlloc - before.TotalAlloc; err == nil || took > 1<<20 {
			t.Errorf("%s: %d bytes taken, %v", member, took, err)
		}
	}
}
