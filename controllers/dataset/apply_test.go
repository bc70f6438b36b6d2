package dataset

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// An object that is as it should be costs the API server no request.
func TestUnchangedObjectsAreLeftAlone(t *testing.T) {
	want := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "a", Labels: map[string]string{"l": "1"}}, Data: map[string]string{"k": "v"}}
	have := want.DeepCopy()
	have.UID, have.ResourceVersion, have.CreationTimestamp = "u", "7", metav1.NewTime(time.Unix(1, 0))
	have.Labels["of somebody else"] = "2"
	if !unchanged(want, have) {
		t.Error("what the server adds counts as a change")
	}
	have.Data["k"] = "other"
	if unchanged(want, have) {
		t.Error("a field that somebody else changed counts as none")
	}
}
