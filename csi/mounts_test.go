package csi

import (
	"fmt"
	"strings"
	"testing"
)

func TestPodsToRestartAreNamed(t *testing.T) {
	at := func(uid, where string) string { return "/var/lib/kubelet/pods/" + uid + "/" + where }
	got := toRestart([]string{at("b", "volumes/kubernetes.io~csi/data/mount"), at("a", "volumes/kubernetes.io~csi/data/mount"), at("b", "volume-subpaths/data/main/0")})
	if want := "2 pods of this node that have it must be restarted; their UIDs: a, b"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	var many []string
	for i := range 300 {
		many = append(many, at(fmt.Sprintf("%036d", i), "volumes/kubernetes.io~csi/data/mount"))
	}
	if got := toRestart(many); !strings.HasPrefix(got, "300 pods") || len(got) > 600 {
		t.Errorf("of many pods: %q", got)
	}
}
