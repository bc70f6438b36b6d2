package dataset

import (
	"testing"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

func TestFootprintLeavesRoomForEverythingBesideTheCache(t *testing.T) {
	for _, c := range []struct{ quota, store, heap int64 }{
		{16 * mi, 80 * mi, 320*mi + mi/4},
		{512 * mi, 576 * mi, 328 * mi},
		{12 << 30, 13 << 30, 1280*mi + 192*mi},
		{64 << 40, 64<<40 + 1<<30, 1280*mi + 1<<40},
	} {
		store, heap := footprint(c.quota)
		if store != c.store || heap != c.heap {
			t.Errorf("quota %d: store %d and heap %d, want %d and %d", c.quota, store, heap, c.store, c.heap)
		}
		if store <= c.quota || heap < 256*mi {
			t.Errorf("quota %d: no room beside it", c.quota)
		}
	}
}

func TestMessagesNameTheSecretAndNotAFolderOfThePod(t *testing.T) {
	ref := &v1alpha1.CredentialsRef{Name: "access-key"}
	d := &v1alpha1.Dataset{Spec: v1alpha1.DatasetSpec{Mounts: []v1alpha1.Mount{{CredentialsSecretRef: ref}, {CredentialsSecretRef: ref}}}}
	got := forPeople(d, "folder /etc/stepcache/credentials/access-key has no key accessKeyID; make /etc/stepcache/credentials/access-key readable")
	if want := `secret "access-key" has no key accessKeyID; make secret "access-key" readable`; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestSizesAreInTheUnitsOfManifests(t *testing.T) {
	for bytes, want := range map[int64]string{0: "0", 1023: "1023", 1024: "1Ki", 1536: "1.5Ki", 12 << 30: "12Gi", 1 << 62: "4Ei"} {
		if got := size(bytes); got != want {
			t.Errorf("%d: %s, want %s", bytes, got, want)
		}
	}
}
