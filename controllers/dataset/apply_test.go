package dataset

import (
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
)

// An object that is as it should be costs the API server no request.
func TestUnchangedObjectsAreLeftAlone(t *testing.T) {
	want := &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Name: "a", Labels: map[string]string{"l": "1"}},
		Spec: appsv1.StatefulSetSpec{Replicas: ptr.To[int32](2), Template: corev1.PodTemplateSpec{Spec: corev1.PodSpec{
			Containers: []corev1.Container{{Name: "c", Image: "i", LivenessProbe: &corev1.Probe{PeriodSeconds: 10}}},
		}}},
	}
	have := want.DeepCopy()
	have.UID, have.ResourceVersion, have.Generation, have.CreationTimestamp = "u", "7", 1, metav1.NewTime(time.Unix(1, 0))
	have.Labels["of somebody else"] = "2"
	have.Spec.RevisionHistoryLimit = ptr.To[int32](10)
	have.Spec.Template.Spec.Containers[0].LivenessProbe.SuccessThreshold = 1
	have.Status.ReadyReplicas = 2
	if same, err := unchanged(want, have); err != nil || !same {
		t.Errorf("what the server adds counts as a change (%v)", err)
	}
	for name, change := range map[string]func(){
		"a number": func() { have.Spec.Replicas = ptr.To[int32](3) },
		"a text":   func() { have.Spec.Template.Spec.Containers[0].Image = "other" },
		"one more of a list": func() {
			have.Spec.Template.Spec.Containers = append(have.Spec.Template.Spec.Containers, corev1.Container{Name: "d"})
		},
		"a field that is gone": func() { have.Spec.Template.Spec.Containers[0].LivenessProbe = nil },
		"a label":              func() { delete(have.Labels, "l") },
	} {
		before := have.DeepCopy()
		change()
		if same, err := unchanged(want, have); err != nil || same {
			t.Errorf("%s that somebody else changed counts as none (%v)", name, err)
		}
		have = before
	}
}
