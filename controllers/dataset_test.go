package controllers_test

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/controllers"
	"github.com/stepcache/stepcache/test/bucket"
)

func TestDatasetBecomesReadyWithAllItsParts(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 2, 6, 100_000)
	if d.Status.Files != 6 || d.Status.Bytes != 600_000 || d.Status.Size != "585.9Ki" || d.Status.Snapshot == "" || d.Status.SnapshotTime == nil {
		t.Errorf("status %s", asJSON(d.Status))
	}
	for _, kind := range []string{v1alpha1.ConditionSourced, v1alpha1.ConditionWorkersReady, v1alpha1.ConditionVolumeReady, v1alpha1.ConditionReady} {
		w.condition(d, kind, metav1.ConditionTrue, map[string]string{"Sourced": "Listed", "WorkersReady": "AllReady", "VolumeReady": "Bound", "Ready": "Ready"}[kind])
	}
	w.event("Ready", "can be read")
	events := &eventsv1.EventList{}
	w.must(w.List(t.Context(), events, client.InNamespace(w.ns)))
	for _, e := range events.Items {
		if e.Type == corev1.EventTypeWarning {
			t.Errorf("a start without trouble warned: %s: %s", e.Reason, e.Note)
		}
	}

	// The scale subresource's selector finds the worker pods and nothing else.
	sel, err := labels.Parse(d.Status.Workers.Selector)
	w.must(err)
	pods := &corev1.PodList{}
	w.must(w.List(t.Context(), pods, client.InNamespace(w.ns), client.MatchingLabelsSelector{Selector: sel}))
	if len(pods.Items) != 2 {
		t.Errorf("selector %s finds %d pods", d.Status.Workers.Selector, len(pods.Items))
	}

	m := w.members(d)
	if len(m.Members) != 2 || m.Members[0].ID != "genomes-worker-0" || m.Members[0].State != ring.Ready || m.Members[0].Node == m.Members[1].Node || m.Epoch == 0 {
		t.Errorf("membership %s", asJSON(m))
	}
	if want := "/run/stepcache/workers/" + string(pods.Items[0].UID) + "/worker.sock"; m.Members[0].Socket != want {
		t.Errorf("socket %q, want %q", m.Members[0].Socket, want)
	}

	// Keys: all three for workers, the read key alone for readers.
	keys, reader := &corev1.Secret{}, &corev1.Secret{}
	w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: "genomes-keys"}, keys))
	w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: "genomes-reader"}, reader))
	if len(keys.Data) != 3 || reader.Data["write"] != nil || reader.Data["control"] != nil || string(reader.Data["read"]) != string(keys.Data["read"]) {
		t.Errorf("keys' Secret has %d keys, reader's %d", len(keys.Data), len(reader.Data))
	}
	if string(keys.Data["read"]) == string(keys.Data["control"]) {
		t.Error("the read key is the control key")
	}

	// The volume says which Dataset and is only for nodes that have the node service or may get it; workers too.
	pv, claim := &corev1.PersistentVolume{}, &corev1.PersistentVolumeClaim{}
	w.must(w.Get(t.Context(), client.ObjectKey{Name: v1alpha1.VolumeName(w.ns, "genomes")}, pv))
	w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: "genomes"}, claim))
	if c := pv.Spec.CSI; c == nil || c.Driver != "csi.data.stepcache.dev" || c.VolumeAttributes["dataset"] != "genomes" || c.VolumeAttributes["namespace"] != w.ns || !c.ReadOnly {
		t.Errorf("volume %s", asJSON(pv.Spec))
	}
	nodes := &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: v1alpha1.NodesForPods()}}}
	if got := pv.Spec.NodeAffinity.Required; !equality.Semantic.DeepEqual(got, nodes) {
		t.Errorf("affinity %s", asJSON(got))
	}
	if *claim.Spec.StorageClassName != "" || claim.Spec.AccessModes[0] != corev1.ReadOnlyMany || claim.Spec.VolumeName != pv.Name {
		t.Errorf("claim %s", asJSON(claim.Spec))
	}
	w.eventually("the volume tells the data's size", func() error {
		w.must(w.Get(t.Context(), client.ObjectKeyFromObject(pv), pv))
		if got := pv.Spec.Capacity.Storage().Value(); got != 1<<20 {
			return fmt.Errorf("capacity %d", got) // of less than a mebibyte it says one
		}
		return nil
	})

	pod := pods.Items[0].Spec
	if got := pod.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution; !equality.Semantic.DeepEqual(got, nodes) {
		t.Errorf("a worker's affinity %s", asJSON(got))
	}
	c := pod.Containers[0]
	if limit, request := c.Resources.Limits.Memory(), c.Resources.Requests.Memory(); !limit.Equal(*request) || limit.Value() <= 128<<20 {
		t.Errorf("memory limit %v, request %v", limit, request)
	}
	for _, v := range pod.Volumes {
		if v.Name == "store" && (v.CSI == nil || v.CSI.VolumeAttributes["size"] != "134217728" || v.CSI.VolumeAttributes["volume"] != "store") {
			t.Errorf("store volume %s", asJSON(v))
		}
	}
	if pod.AutomountServiceAccountToken == nil || *pod.AutomountServiceAccountToken {
		t.Error("workers mount an API token")
	}

	np := &networkingv1.NetworkPolicy{}
	w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: "genomes-worker"}, np))
	if len(np.Spec.Ingress) != 3 {
		t.Errorf("policy %s", asJSON(np.Spec))
	}
	if got := w.evictsUnhealthy(); got != policyv1.AlwaysAllow {
		t.Errorf("pods that are not ready are evicted by policy %q", got)
	}
	svc := &corev1.Service{}
	w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: "genomes-worker"}, svc))
	if svc.Spec.ClusterIP != corev1.ClusterIPNone || !svc.Spec.PublishNotReadyAddresses {
		t.Errorf("service %s", asJSON(svc.Spec))
	}
	ns := &corev1.Namespace{}
	w.must(w.Get(t.Context(), client.ObjectKey{Name: w.ns}, ns))
	if ns.Labels[v1alpha1.LabelWatched] != "true" {
		t.Error("the namespace is not labelled for the webhook")
	}

	// What somebody deletes or changes comes back.
	w.must(w.Delete(t.Context(), np))
	update(w, svc, func(s *corev1.Service) { s.Spec.PublishNotReadyAddresses = false })
	w.eventually("drift is mended", func() error {
		if err := w.Get(t.Context(), client.ObjectKeyFromObject(np), np); err != nil {
			return err
		}
		if err := w.Get(t.Context(), client.ObjectKeyFromObject(svc), svc); err != nil || !svc.Spec.PublishNotReadyAddresses {
			return fmt.Errorf("service %s: %v", asJSON(svc.Spec), err)
		}
		return nil
	})
}

// evictsUnhealthy is what the workers' budget says of pods that are not ready; empty where it says nothing.
func (w *world) evictsUnhealthy() policyv1.UnhealthyPodEvictionPolicyType {
	w.Helper()
	pdb := &policyv1.PodDisruptionBudget{}
	w.must(w.Get(w.Context(), client.ObjectKey{Namespace: w.ns, Name: "genomes-worker"}, pdb))
	return ptr.Deref(pdb.Spec.UnhealthyPodEvictionPolicy, "")
}

func TestDatasetNamesWhatIsWrongWithItsSourceAndRecovers(t *testing.T) {
	w := newWorld(t)
	w.bucket.PutT(t, "other", "x", []byte("x"))
	d := w.dataset("genomes", 1)
	w.must(w.Create(t.Context(), d))
	w.condition(d, v1alpha1.ConditionSourced, metav1.ConditionFalse, "CredentialsMissing", `secret "access-key"`, "accessKeyID")
	w.condition(d, v1alpha1.ConditionReady, metav1.ConditionFalse, "CredentialsMissing", `secret "access-key"`)
	w.event("CredentialsMissing", `secret "access-key"`)
	if d.Status.Phase != v1alpha1.DatasetPending {
		t.Errorf("phase %s", d.Status.Phase)
	}

	s := w.secret("access-key")
	delete(s.StringData, "accessKeySecret")
	w.must(w.Create(t.Context(), s))
	w.condition(d, v1alpha1.ConditionSourced, metav1.ConditionFalse, "AccessDenied", "has no key accessKeySecret")

	update(w, s, func(s *corev1.Secret) { s.StringData = map[string]string{"accessKeySecret": "wrong"} })
	w.condition(d, v1alpha1.ConditionSourced, metav1.ConditionFalse, "AccessDenied")
	w.eventually("the message is the bucket's refusal", func() error {
		w.must(w.Get(t.Context(), client.ObjectKeyFromObject(d), d))
		if strings.Contains(asJSON(d.Status.Conditions), "has no key") {
			return fmt.Errorf("conditions %s", asJSON(d.Status.Conditions))
		}
		return nil
	})

	update(w, s, func(s *corev1.Secret) { s.StringData = map[string]string{"accessKeySecret": w.bucket.SecretKey} })
	w.condition(d, v1alpha1.ConditionSourced, metav1.ConditionFalse, "NoSuchBucket", "data")

	w.bucket.PutT(t, "data", "file", []byte("content"))
	w.waitReady(d)
	w.condition(d, v1alpha1.ConditionSourced, metav1.ConditionTrue, "Listed", "1 files")
}

func TestDatasetThatCannotWorkOnAClusterFails(t *testing.T) {
	w := newWorld(t)
	d := w.dataset("local", 1)
	d.Spec.Mounts[0] = v1alpha1.Mount{Source: "file:///data", Path: "/"}
	w.must(w.Create(t.Context(), d))
	w.condition(d, v1alpha1.ConditionSourced, metav1.ConditionFalse, "InvalidSpec", "file:///data", "local mode")
	if d.Status.Phase != v1alpha1.DatasetFailed {
		t.Errorf("phase %s", d.Status.Phase)
	}
	w.event("InvalidSpec", "file:///data")

	// It has made nothing, and can be deleted.
	err := w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: "local-worker"}, &appsv1.StatefulSet{})
	if !apierrors.IsNotFound(err) {
		t.Errorf("a StatefulSet of an invalid Dataset: %v", err)
	}
	w.must(w.Delete(t.Context(), d))
	w.gone(d)
}

func (w *world) gone(o client.Object) {
	w.Helper()
	w.eventually(o.GetName()+" is gone", func() error {
		err := w.Get(w.Context(), client.ObjectKeyFromObject(o), o)
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(err, fmt.Errorf("%s", asJSON(o)))
	})
}

func TestWorkersThatAreCutOffLeaveTurnsToOtherDatasets(t *testing.T) {
	w := newWorld(t)
	w.must(w.Create(t.Context(), w.secret("access-key")))
	w.set(func(w *world) { w.pending = true })
	const datasets = 12
	for i := range datasets {
		d := w.dataset(fmt.Sprintf("cut-%d", i), 1)
		w.must(w.Create(t.Context(), d))
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: d.Name + "-worker-0"}}
		ip := fmt.Sprint(cutOff, i+1)
		w.eventually("pod status", func() error {
			if err := w.Get(t.Context(), client.ObjectKeyFromObject(pod), pod); err != nil {
				return err
			}
			pod.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}},
				Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}}
			return w.Status().Update(t.Context(), pod)
		})
	}
	w.eventually("all are asked at the same time", func() error {
		if n := w.dialling.Load(); n < datasets {
			return fmt.Errorf("%d of %d", n, datasets)
		}
		return nil
	})
}

func TestDatasetSaysWhyItsWorkersDoNotRun(t *testing.T) {
	w := newWorld(t)
	w.bucket.PutT(t, "data", "file", []byte("content"))
	w.must(w.Create(t.Context(), w.secret("access-key")))
	w.set(func(w *world) { w.pending = true })
	d := w.dataset("big", 1)
	w.must(w.Create(t.Context(), d))
	w.condition(d, v1alpha1.ConditionWorkersReady, metav1.ConditionFalse, "Starting")
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "big-worker-0"}}
	for _, c := range []struct {
		reason string
		says   []string
		status corev1.PodStatus
	}{
		{"Unschedulable", []string{"Insufficient memory", "a worker needs 449Mi", "cache of 64Mi", "spec.workers.memory"}, corev1.PodStatus{Phase: corev1.PodPending, Conditions: []corev1.PodCondition{
			{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: "Unschedulable", Message: "0/3 nodes are available: 3 Insufficient memory."}}}},
		{"ImageNotPulled", []string{"stepcache:v1", "no such image"}, corev1.PodStatus{Phase: corev1.PodPending, ContainerStatuses: []corev1.ContainerStatus{
			{Name: "worker", Image: "stepcache:v1", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff", Message: "no such image"}}}}}},
		{"OutOfMemory", []string{"memory limit of"}, corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{
			{Name: "worker", LastTerminationState: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{Reason: "OOMKilled", ExitCode: 137}}}}}},
		{"Crashing", []string{"kubectl logs big-worker-0"}, corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{
			{Name: "worker", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff", Message: "back-off"}}}}}},
	} {
		w.eventually("pod status", func() error {
			if err := w.Get(t.Context(), client.ObjectKeyFromObject(pod), pod); err != nil {
				return err
			}
			pod.Status = c.status
			return w.Status().Update(t.Context(), pod)
		})
		w.condition(d, v1alpha1.ConditionWorkersReady, metav1.ConditionFalse, c.reason, c.says...)
		w.event(c.reason, c.says...)
	}
	// Once there is room for it, it runs. In this order: a pod that is made while pods are left without a node
	// would never get one.
	w.set(func(w *world) { w.pending = false })
	w.must(w.Delete(t.Context(), pod, client.GracePeriodSeconds(0)))
	w.waitReady(d)
}

func TestNameThatIsTakenIsToldAndLeftAlone(t *testing.T) {
	w := newWorld(t)
	// Whose labels are a Dataset's is not yet its own.
	claim := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "genomes", Labels: map[string]string{
		v1alpha1.LabelDataset: "genomes", v1alpha1.LabelComponent: v1alpha1.ComponentNode, "app.kubernetes.io/managed-by": "stepcache",
	}}, Spec: corev1.PersistentVolumeClaimSpec{
		AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
		Resources:   corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}},
	}}
	w.must(w.Create(t.Context(), claim))
	w.bucket.PutT(t, "data", "file", []byte("content"))
	w.must(w.Create(t.Context(), w.secret("access-key")))
	d := w.dataset("genomes", 1)
	w.must(w.Create(t.Context(), d))
	w.condition(d, v1alpha1.ConditionVolumeReady, metav1.ConditionFalse, "NameTaken", `PersistentVolumeClaim "genomes"`)
	// Pods that use it are not the Dataset's and keep it from nothing.
	w.must(w.Create(t.Context(), w.pod("theirs", corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "genomes"}})))
	w.must(w.Delete(t.Context(), d))
	w.gone(d)

	// The claim is told of also where another name that is taken keeps the Dataset from having workers.
	w.must(w.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "genomes-worker"}}))
	d = w.dataset("genomes", 1)
	w.must(w.Create(t.Context(), d))
	w.condition(d, v1alpha1.ConditionWorkersReady, metav1.ConditionFalse, "NameTaken", `ConfigMap "genomes-worker"`)
	w.condition(d, v1alpha1.ConditionVolumeReady, metav1.ConditionFalse, "NameTaken", `PersistentVolumeClaim "genomes"`)
	w.must(w.Delete(t.Context(), d))
	w.gone(d)
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(claim), claim))
	if claim.DeletionTimestamp != nil {
		t.Error("somebody else's claim was deleted")
	}
}

// Who deleted it would have new keys in its place, and no credentials any more.
func TestASecretOfTheUserWithTheNameOfTheKeysIsNotToBeDeleted(t *testing.T) {
	w := newWorld(t)
	s := w.secret("genomes-keys")
	w.must(w.Create(t.Context(), s))
	d := w.dataset("genomes", 1)
	d.Spec.Mounts[0].CredentialsSecretRef.Name = s.Name
	w.must(w.Create(t.Context(), d))
	w.condition(d, v1alpha1.ConditionWorkersReady, metav1.ConditionFalse, "NameTaken", `Secret "genomes-keys"`, "under another name")
	w.condition(d, v1alpha1.ConditionReady, metav1.ConditionFalse, "NameTaken", `Secret "genomes-keys"`)
	w.must(w.Delete(t.Context(), d))
	w.gone(d)
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(s), s))
}

func TestClaimThatIsMadeAnewMayBind(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 1, 1, 1000)
	pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.VolumeName(w.ns, "genomes")}}
	claim := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "genomes"}}
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(claim), claim))
	// What the cluster writes when it binds: the reference first, the phase after it.
	refer := func() {
		w.Helper()
		update(w, pv, func(pv *corev1.PersistentVolume) {
			pv.Spec.ClaimRef.UID, pv.Spec.ClaimRef.ResourceVersion = claim.UID, claim.ResourceVersion
		})
	}
	phase := func(phase corev1.PersistentVolumePhase) {
		w.Helper()
		w.eventually("the volume is "+string(phase), func() error {
			w.must(w.Get(t.Context(), client.ObjectKeyFromObject(pv), pv))
			pv.Status.Phase = phase
			return w.Status().Update(t.Context(), pv)
		})
	}
	refer()
	phase(corev1.VolumeBound)
	old := claim.UID
	w.must(w.Delete(t.Context(), claim))
	w.condition(d, v1alpha1.ConditionVolumeReady, metav1.ConditionFalse, "ClaimDeleted", `"genomes"`, "made anew")
	w.condition(d, v1alpha1.ConditionReady, metav1.ConditionFalse, "ClaimDeleted")
	w.event("ClaimDeleted", "no new pod")
	w.eventually("the claim is made anew", func() error {
		err := w.Get(t.Context(), client.ObjectKeyFromObject(claim), claim)
		if err != nil || claim.UID != old {
			return err
		}
		claim.Finalizers = nil // no pod uses it
		return errors.Join(errors.New("it is the old one"), w.Update(t.Context(), claim))
	})
	phase(corev1.VolumeReleased)
	w.eventually("the volume is free for the new claim", func() error {
		w.must(w.Get(t.Context(), client.ObjectKeyFromObject(pv), pv))
		if ref := pv.Spec.ClaimRef; ref == nil || ref.Namespace != w.ns || ref.Name != "genomes" || ref.UID != "" || ref.ResourceVersion != "" {
			return fmt.Errorf("claimRef %s", asJSON(ref))
		}
		return nil
	})
	// A claim whose volume does not have its UID any more is Lost, also while the volume is not called Bound yet.
	refer()
	w.passes(d, 3)
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(pv), pv))
	if pv.Spec.ClaimRef.UID != claim.UID {
		t.Errorf("claimRef %s of claim %s", asJSON(pv.Spec.ClaimRef), claim.UID)
	}
	w.waitReady(d)
}

func TestVolumeOfAnEarlierVersionKeepsItsAffinity(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 1, 1, 1000)
	w.stopManager()
	pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.VolumeName(w.ns, "genomes")}}
	update(w, pv, func(pv *corev1.PersistentVolume) { pv.Finalizers = nil })
	w.must(w.Delete(t.Context(), pv))
	const managed = "app.kubernetes.io/managed-by"
	old := pv.DeepCopy()
	old.ObjectMeta = metav1.ObjectMeta{Name: pv.Name, Labels: pv.Labels, Annotations: map[string]string{"data.stepcache.dev/applied": "by an earlier version"}}
	delete(old.Labels, managed)
	old.Spec.NodeAffinity.Required.NodeSelectorTerms[0].MatchExpressions = []corev1.NodeSelectorRequirement{
		{Key: v1alpha1.LabelNodeReady, Operator: corev1.NodeSelectorOpIn, Values: []string{"true"}},
	}
	w.eventually("the volume is as an earlier version made it", func() error { return w.Create(t.Context(), old) })
	_, from := w.requests.since(0)
	w.start()
	w.eventually("the rest is made anew", func() error {
		w.must(w.Get(t.Context(), client.ObjectKeyFromObject(pv), pv))
		if pv.Labels[managed] == "" {
			return fmt.Errorf("labels %v", pv.Labels)
		}
		return nil
	})
	w.waitReady(d)
	if !equality.Semantic.DeepEqual(pv.Spec.NodeAffinity, old.Spec.NodeAffinity) {
		t.Errorf("affinity %s", asJSON(pv.Spec.NodeAffinity))
	}
	all, _ := w.passesSince(d, from, 5)
	writes := slices.DeleteFunc(all, func(q string) bool { return q != "PUT /api/v1/persistentvolumes/"+pv.Name })
	if len(writes) != 1 {
		t.Errorf("%d writes of the volume, want 1", len(writes))
	}
}

// allowNone has a quota refuse objects of the kind of o in a namespace.
func (w *world) allowNone(namespace string, what corev1.ResourceName, o client.Object) *corev1.ResourceQuota {
	w.Helper()
	none := corev1.ResourceList{what: resource.MustParse("0")}
	quota := &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "none"}, Spec: corev1.ResourceQuotaSpec{Hard: none}}
	w.must(w.Create(w.Context(), quota))
	quota.Status = corev1.ResourceQuotaStatus{Hard: none, Used: none}
	w.must(w.Status().Update(w.Context(), quota))
	o.SetNamespace(namespace)
	o.SetName("other")
	w.eventually("the quota holds", func() error {
		err := w.Create(w.Context(), o, client.DryRunAll)
		if err == nil || !strings.Contains(err.Error(), "exceeded quota") {
			return fmt.Errorf("refused with %v", err)
		}
		return nil
	})
	return quota
}

func TestWhatTheAPIServerRefusesIsTold(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 1, 1, 1000)
	quota := w.allowNone(w.ns, "count/poddisruptionbudgets.policy", &policyv1.PodDisruptionBudget{})
	w.must(w.DeleteAllOf(t.Context(), &policyv1.PodDisruptionBudget{}, client.InNamespace(w.ns)))
	w.condition(d, v1alpha1.ConditionReady, metav1.ConditionFalse, "Refused", `"genomes-worker"`, "exceeded quota: none")
	w.must(w.Delete(t.Context(), quota))
	w.waitReady(d)
}

// A quota on pods refuses the StatefulSet, which tells it in an Event only.
func TestWorkersWhosePodsAreRefusedAreToldWithTheWords(t *testing.T) {
	w := newWorld(t)
	w.set(func(w *world) { w.podless = true })
	w.bucket.PutT(t, "data", "file", []byte("content"))
	w.must(w.Create(t.Context(), w.secret("access-key")))
	d := w.dataset("genomes", 1)
	w.must(w.Create(t.Context(), d))
	w.condition(d, v1alpha1.ConditionWorkersReady, metav1.ConditionFalse, "Starting", "no pod yet", "StatefulSet genomes-worker")
	set := &appsv1.StatefulSet{}
	w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: "genomes-worker"}, set))
	tell := func(name, reason, message string, uid types.UID, ago time.Duration) {
		w.Helper()
		w.must(w.Create(t.Context(), &corev1.Event{
			ObjectMeta:     metav1.ObjectMeta{Namespace: w.ns, Name: name},
			InvolvedObject: corev1.ObjectReference{APIVersion: "apps/v1", Kind: "StatefulSet", Namespace: w.ns, Name: set.Name, UID: uid},
			Type:           corev1.EventTypeWarning, Reason: reason, Message: message, LastTimestamp: metav1.NewTime(w.clock.Now().Add(-ago)),
		}))
	}
	tell("old", "FailedCreate", "of an hour ago", set.UID, time.Hour)
	tell("another", "FailedCreate", "of a set before it", "another", time.Second)
	tell("else", "SuccessfulCreate", "no trouble", set.UID, 0)
	w.clock.advance(time.Minute) // it is not looked at all the time
	w.passes(d, 3)
	w.condition(d, v1alpha1.ConditionWorkersReady, metav1.ConditionFalse, "Starting")
	long := strings.Repeat("x", 960) // an Event's note has 1,024 bytes at most
	tell("b", "FailedCreate", `pods "genomes-worker-0" is forbidden: exceeded quota: none `+long, set.UID, 5*time.Minute)
	tell("a", "FailedCreate", "what was before it", set.UID, 6*time.Minute)
	w.clock.advance(time.Minute)
	w.condition(d, v1alpha1.ConditionWorkersReady, metav1.ConditionFalse, "Refused", "0 of 1 workers serve", "exceeded quota: none", long)
	w.event("Refused", "exceeded quota: none")
	tell("c", "FailedCreate", `pods "genomes-worker-0" is forbidden: failed quota: cpus: must specify limits.cpu for: worker`, set.UID, 4*time.Minute)
	w.clock.advance(2 * time.Minute)
	w.condition(d, v1alpha1.ConditionWorkersReady, metav1.ConditionFalse, "Refused", "failed quota: cpus", "set spec.workers.cpuLimit")

	// Once there is a newer pod than the refusal it is over.
	w.set(func(w *world) { w.podless = false })
	w.waitReady(d)
	w.set(func(w *world) { w.podless = true })
	update(w, d, func(d *v1alpha1.Dataset) { d.Spec.Workers.Replicas = 2 })
	w.condition(d, v1alpha1.ConditionWorkersReady, metav1.ConditionFalse, "Starting", "1 of 2 workers serve", "no pod yet")
	// And it is over also when that pod goes.
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "genomes-worker-0"}}
	w.must(w.Delete(t.Context(), pod, client.GracePeriodSeconds(0)))
	w.condition(d, v1alpha1.ConditionWorkersReady, metav1.ConditionFalse, "Starting", "0 of 2 workers serve", "no pod yet")
	w.set(func(w *world) { w.podless = false })
	w.waitReady(d)
}

// The label of a namespace is needed for replaced artifacts; that pods are drawn to their data can wait for it.
func TestNamespaceThatMayNotBeLabelledIsTold(t *testing.T) {
	w := newWorld(t)
	w.requests.refusing(v1alpha1.LabelWatched + `":"true"`) // the patch, and not what is said of it
	d := w.ready("genomes", 1, 1, 1000)
	w.event("NamespaceNotLabelled", w.ns, "spec.locality", "not supported")
	update(w, d, func(d *v1alpha1.Dataset) {
		d.Spec.Replaces = []v1alpha1.Replaced{{ClaimName: "old"}}
	})
	w.condition(d, v1alpha1.ConditionReady, metav1.ConditionFalse, "Refused", w.ns, "spec.replaces", "locality: None", "not supported")
	w.requests.refusing("")
	w.waitReady(d)
	ns := &corev1.Namespace{}
	w.must(w.Get(t.Context(), client.ObjectKey{Name: w.ns}, ns))
	if ns.Labels[v1alpha1.LabelWatched] != "true" {
		t.Error("the namespace is not labelled once it may be")
	}
}

// pod is a user's, admitted in the test's namespace.
func (w *world) pod(name string, v corev1.VolumeSource) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: name}, Spec: corev1.PodSpec{
		SecurityContext: &corev1.PodSecurityContext{RunAsNonRoot: ptr.To(true), RunAsUser: ptr.To[int64](1000), SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}},
		Containers: []corev1.Container{{Name: "main", Image: "busybox", SecurityContext: &corev1.SecurityContext{
			AllowPrivilegeEscalation: ptr.To(false), Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}}}},
		Volumes: []corev1.Volume{{Name: "data", VolumeSource: v}},
	}}
}

func TestDeletionWaitsForThePodsThatUseTheDataset(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 1, 1, 1000)
	byClaim := w.pod("by-claim", corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "genomes"}})
	inline := w.pod("inline", corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: v1alpha1.DriverName, ReadOnly: ptr.To(true),
		VolumeAttributes: map[string]string{v1alpha1.AttributeDataset: "genomes"}}})
	other := w.pod("other", corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "else"}})
	// What the webhook adds to pods (sidecar, stage) reads by itself, and finds the workers by these.
	injected := w.pod("injected", corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
		{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "genomes-tier"}}},
		{Secret: &corev1.SecretProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "genomes-reader"}}},
	}}})
	for _, p := range []*corev1.Pod{byClaim, inline, injected, other} {
		w.must(w.Create(t.Context(), p))
	}
	w.must(w.Delete(t.Context(), d))
	w.condition(d, v1alpha1.ConditionReady, metav1.ConditionFalse, "InUse", "3 pods", w.ns+"/by-claim", w.ns+"/inline", w.ns+"/injected")
	if d.Status.Phase != v1alpha1.DatasetDeleting || strings.Contains(asJSON(d.Status.Conditions), "/other") {
		t.Errorf("status %s", asJSON(d.Status))
	}
	w.event("InUse", w.ns+"/by-claim")
	// The workers serve on, whatever becomes of them meanwhile.
	if len(w.statuses()) != 1 {
		t.Error("a Dataset in use has lost its worker")
	}
	// A pod that has ended does not count, and one that is gone neither. Workers that are gone do not
	// hinder.
	byClaim.Status.Phase = corev1.PodSucceeded
	w.must(w.Status().Update(t.Context(), byClaim))
	injected.Status.Phase = corev1.PodFailed
	w.must(w.Status().Update(t.Context(), injected))
	w.set(func(w *world) {
		w.deaf = true
		for name, r := range w.workers {
			r.stop()
			delete(w.workers, name)
		}
	})
	w.condition(d, v1alpha1.ConditionReady, metav1.ConditionFalse, "InUse", "1 pods", "/inline")
	w.must(w.Delete(t.Context(), inline, client.GracePeriodSeconds(0)))
	w.gone(d)
	pv := &corev1.PersistentVolume{}
	if err := w.Get(t.Context(), client.ObjectKey{Name: v1alpha1.VolumeName(w.ns, "genomes")}, pv); err == nil && pv.DeletionTimestamp == nil {
		t.Error("the volume is left behind")
	}
	ns := &corev1.Namespace{}
	w.must(w.Get(t.Context(), client.ObjectKey{Name: w.ns}, ns))
	if _, ok := ns.Labels[v1alpha1.LabelWatched]; ok {
		t.Error("the namespace kept its label")
	}
}

// cached is the sum of what the workers hold.
func (w *world) cached() (sum int64) {
	for _, s := range w.statuses() {
		sum += s.Cached
	}
	return sum
}

func (w *world) scale(d *v1alpha1.Dataset, n int32) {
	w.Helper()
	update(w, d, func(d *v1alpha1.Dataset) { d.Spec.Workers.Replicas = n })
	w.waitReady(d)
}

func TestScaleInHandsOverWhatFits(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 1, 12, 500_000)
	w.scale(d, 3)
	w.load(d, "all", nil)
	if got := w.cached(); got != 6_000_000 {
		t.Fatalf("%d bytes cached", got)
	}
	sent, epoch := w.bucket.Requests(), w.members(d).Epoch
	w.scale(d, 1)
	if got := w.cached(); got != 6_000_000 {
		t.Errorf("%d bytes cached after scale-in, want all 6,000,000", got)
	}
	if now := w.bucket.Requests(); now != sent {
		t.Errorf("the bucket was asked %d times for what the leaving workers held", now-sent)
	}
	w.event("ScaledIn", "to 1 workers", "0 B dropped")
	m := w.members(d)
	if len(m.Members) != 1 || m.Epoch <= epoch {
		t.Errorf("membership %s", asJSON(m))
	}
	w.eventually("status counts what is held", func() error {
		w.must(w.Get(t.Context(), client.ObjectKeyFromObject(d), d))
		if d.Status.Cached != 6_000_000 || d.Status.CachedPercentage != 100 {
			return fmt.Errorf("status %s", asJSON(d.Status))
		}
		return nil
	})
}

// allCached waits until the status says that the tier holds all of a Dataset.
func (w *world) allCached(d *v1alpha1.Dataset) {
	w.Helper()
	w.eventually("the status counts what is held", func() error {
		w.must(w.Get(w.Context(), client.ObjectKeyFromObject(d), d))
		if d.Status.CachedPercentage != 100 {
			return fmt.Errorf("status %s", asJSON(d.Status))
		}
		return nil
	})
}

func TestScaleOutMovesBytesBetweenWorkers(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 1, 30, 200_000)
	w.load(d, "all", nil)
	w.allCached(d)
	w.scale(d, 3)
	m := w.members(d)
	if m.Members[0].Joined != 0 || m.Members[1].Joined == 0 || m.Members[2].Joined == 0 {
		t.Errorf("membership %s", asJSON(m))
	}
	sent := w.bucket.Sent()
	w.load(d, "again", nil)
	if more := w.bucket.Sent() - sent; more > 100_000 { // less than one file: there are questions without bytes
		t.Errorf("the bucket sent %d bytes of what a worker held", more)
	}
	moved := int64(0)
	for name, s := range w.statuses() {
		if name != "genomes-worker-0" {
			moved += s.Cached
		}
	}
	if moved == 0 {
		t.Error("the new workers hold nothing")
	}
}

func TestScaleInReportsWhatItDrops(t *testing.T) {
	w := newWorld(t)
	// Many files, so that whatever their places the two workers hold about half each, all of them fit two
	// workers and do not fit one.
	p := make([]byte, 400<<10)
	for i := range 120 {
		p[0] = byte(i)
		w.bucket.PutT(t, "data", fmt.Sprintf("f%d", i), p)
	}
	w.must(w.Create(t.Context(), w.secret("access-key")))
	d := w.dataset("genomes", 2)
	d.Spec.Workers.Memory = resource.MustParse("40Mi")
	w.must(w.Create(t.Context(), d))
	w.waitReady(d)
	w.load(d, "all", nil)
	w.scale(d, 1)
	w.event("ScaledIn", "to 1 workers", "have no room")
	for name, s := range w.statuses() {
		if s.Used > s.Quota {
			t.Errorf("worker %s holds %d of %d", name, s.Used, s.Quota)
		}
		if s.Cached < 32<<20 {
			t.Errorf("worker %s took only %d bytes over", name, s.Cached)
		}
	}
}

// load creates a load of everything and waits until it is complete.
func (w *world) load(d *v1alpha1.Dataset, name string, change func(*v1alpha1.DataLoad)) *v1alpha1.DataLoad {
	w.Helper()
	l := &v1alpha1.DataLoad{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: name}, Spec: v1alpha1.DataLoadSpec{DatasetRef: v1alpha1.Reference{Name: d.Name}}}
	if change != nil {
		change(l)
	}
	w.must(w.Create(w.Context(), l))
	w.condition(l, v1alpha1.ConditionComplete, metav1.ConditionTrue, "Loaded")
	return l
}

// uids are those of the pods whose workers run, by name.
func (w *world) uids() map[string]string {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := make(map[string]string)
	for name, r := range w.workers {
		out[name] = r.uid
	}
	return out
}

// renewed waits until none of a Dataset's workers is one of before, and all are ready.
func (w *world) renewed(d *v1alpha1.Dataset, before map[string]string) {
	w.Helper()
	w.eventually("all workers are new", func() error {
		now := w.uids()
		for name, uid := range before {
			if now[name] == uid || now[name] == "" {
				return fmt.Errorf("%d workers run, %s is the old one", len(now), name)
			}
		}
		return nil
	})
	w.waitReady(d)
}

func TestWorkersAreUpdatedOneAtATimeAndNotByUpgrades(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 2, 8, 200_000)
	w.load(d, "all", nil)
	set := &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "genomes-worker"}}
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(set), set))
	before, generation, members := w.uids(), set.Generation, w.members(d)

	// Another version of the controller starts: nothing happens to workers, membership or status.
	w.stopManager()
	w.image = "stepcache:v2"
	w.start()
	update(w, d, func(d *v1alpha1.Dataset) { d.Spec.ShareWith = []v1alpha1.Namespace{"elsewhere"} })
	np := &networkingv1.NetworkPolicy{}
	w.eventually("the new controller acts", func() error {
		if err := w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: "genomes-worker"}, np); err != nil {
			return err
		}
		if !strings.Contains(asJSON(np.Spec), "elsewhere") {
			return errors.New("the policy does not let the other namespace in")
		}
		return nil
	})
	w.waitReady(d)
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(set), set))
	if after := w.uids(); fmt.Sprint(after) != fmt.Sprint(before) || set.Generation != generation || set.Spec.Template.Spec.Containers[0].Image != "stepcache:v1" {
		t.Errorf("an upgrade changed the workers: %v to %v, generation %d to %d", before, after, generation, set.Generation)
	}
	if now := w.members(d); asJSON(now) != asJSON(members) {
		t.Errorf("an upgrade changed the membership from %s to %s", asJSON(members), asJSON(now))
	}

	// What a new version says of new workers' pods does not touch those that run.
	w.stopManager()
	const mesh = "sidecar.istio.io/inject"
	update(w, set, func(s *appsv1.StatefulSet) {
		delete(s.Spec.Template.Labels, mesh)
		s.Spec.Template.Spec.Affinity = nil
	})
	w.start()
	w.eventually("new workers are kept out of a mesh and off nodes without the node service", func() error {
		w.must(w.Get(t.Context(), client.ObjectKeyFromObject(set), set))
		if got := set.Spec.Template.Labels[mesh]; got != "false" || set.Spec.Template.Spec.Affinity == nil {
			return fmt.Errorf("label %q, affinity %s", got, asJSON(set.Spec.Template.Spec.Affinity))
		}
		return nil
	})
	w.passes(d, 3)
	if after := w.uids(); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("another template changed the workers: %v to %v", before, after)
	}

	// The user asks: one after the other, and what they hold is kept.
	update(w, d, func(d *v1alpha1.Dataset) {
		metav1.SetMetaDataAnnotation(&d.ObjectMeta, v1alpha1.AnnotationRollout, "v2")
	})
	w.renewed(d, before)
	w.event("WorkerUpdated", "genomes-worker-0")
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(set), set))
	if got := set.Spec.Template.Spec.Containers[0].Image; got != "stepcache:v2" {
		t.Errorf("image %s after a rollout", got)
	}
	if got := w.cached(); got == 0 {
		t.Error("a rollout of two workers lost everything")
	}
}

// Who waits for a Dataset after a change, and a load that is applied with it, goes on once all workers have the change.
func TestADatasetIsReadyOnceAllWorkersHaveWhatItAsksFor(t *testing.T) {
	w := newWorld(t)
	w.bucket.PutT(t, "data", "file", []byte("content"))
	w.bucket.PutT(t, "more", "file", []byte("content"))
	w.must(w.Create(t.Context(), w.secret("access-key")))
	d := w.dataset("genomes", 3)
	d.Spec.Mounts[0].Path = "/data"
	w.must(w.Create(t.Context(), d))
	w.waitReady(d)
	before := w.uids()
	c, err := client.NewWithWatch(cluster, client.Options{Scheme: controllers.Scheme()})
	w.must(err)
	written, err := c.Watch(t.Context(), &v1alpha1.DatasetList{}, client.InNamespace(w.ns))
	w.must(err)
	defer written.Stop()
	update(w, d, func(d *v1alpha1.Dataset) {
		more := d.Spec.Mounts[0]
		more.Source, more.Path = "s3://more/", "/more"
		d.Spec.Mounts = append(d.Spec.Mounts, more)
	})
	seen, patience := map[string]bool{}, time.After(time.Minute)
	for !seen["True"] {
		var now *v1alpha1.Dataset
		select {
		case e := <-written.ResultChan():
			var ok bool
			if now, ok = e.Object.(*v1alpha1.Dataset); !ok {
				t.Fatalf("the watch ended: %s", asJSON(e))
			}
		case <-patience:
			t.Fatalf("not Ready within a minute; seen %v", seen)
		}
		st := now.Status
		ready := meta.FindStatusCondition(st.Conditions, v1alpha1.ConditionReady)
		if now.Generation != d.Generation || st.ObservedGeneration != d.Generation && ready.ObservedGeneration != d.Generation {
			continue // of what it was before
		}
		seen[string(ready.Status)] = true
		switch {
		case ready.Status == metav1.ConditionTrue:
			for name, uid := range w.uids() {
				if before[name] == uid {
					t.Errorf("Ready with %s as it was: %s", name, asJSON(st))
				}
			}
			if st.Files != 2 {
				t.Errorf("Ready with %d files of 2", st.Files)
			}
		case ready.Reason == "Updating":
			seen[ready.Reason] = true
			if st.Phase != v1alpha1.DatasetDegraded || !strings.Contains(ready.Message, "of 3 workers have") {
				t.Errorf("while workers are updated: %s", asJSON(st))
			}
		}
	}
	if !seen["Updating"] {
		t.Errorf("seen %v", seen)
	}
}

func TestWhatAWorkerHandedOverComesBackToItsNewPodFromTheOthers(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 3, 30, 200_000)
	w.load(d, "all", nil)
	w.allCached(d)
	before, sent := w.uids(), w.bucket.Sent()
	update(w, d, func(d *v1alpha1.Dataset) {
		metav1.SetMetaDataAnnotation(&d.ObjectMeta, v1alpha1.AnnotationRollout, "v2")
	})
	w.renewed(d, before)
	w.load(d, "again", nil)
	if more := w.bucket.Sent() - sent; more > 100_000 { // less than one file: there are questions without bytes
		t.Errorf("the bucket sent %d bytes of what was handed over", more)
	}
	for _, m := range w.members(d).Members {
		if m.Joined == 0 {
			t.Errorf("%s came with nothing, which its place in the list does not say: %s", m.ID, asJSON(w.members(d)))
		}
	}
}

func TestWorkersThatAreNotReadyAreUpdatedWithoutLossOfWhatTheyHold(t *testing.T) {
	w := newWorld(t)
	refusing := bucket.Faults(t, w.bucket)
	d := w.dataset("genomes", 3)
	d.Spec.Mounts[0].Endpoint = refusing.Endpoint()
	p := make([]byte, 100_000)
	for i := range 60 {
		p[0] = byte(i)
		w.bucket.PutT(t, "data", fmt.Sprintf("dir%d/file%d", i%2, i), p)
	}
	w.must(w.Create(t.Context(), w.secret("access-key")))
	w.must(w.Create(t.Context(), d))
	w.waitReady(d)
	half := func(l *v1alpha1.DataLoad) { l.Spec.Paths = []v1alpha1.PathPattern{"/dir0"} }
	w.load(d, "half", half)
	before := w.uids()
	refusing.Set(func(*http.Request) bucket.Fault {
		return bucket.Fault{Status: http.StatusForbidden, Code: "AccessDenied"}
	})
	c := w.reader(d)
	for i := 1; i < 60; i += 2 { // which every worker asks the bucket for
		file, _ := c.Snapshot().Lookup(fmt.Sprintf("dir1/file%d", i))
		if _, err := c.ReadAt(t.Context(), file, p, 0); err == nil {
			t.Fatal("a bucket that refuses was read")
		}
	}
	w.eventually("no worker is ready", func() error {
		pods := &corev1.PodList{}
		w.must(w.List(t.Context(), pods, client.InNamespace(w.ns), client.MatchingLabels{v1alpha1.LabelComponent: v1alpha1.ComponentWorker}))
		for _, p := range pods.Items {
			if p.Status.Conditions[0].Status == corev1.ConditionTrue {
				return fmt.Errorf("pod %s is ready", p.Name)
			}
		}
		return nil
	})

	// What has no worker start stops at the first, which has handed over.
	w.set(func(w *world) { w.deaf = true })
	update(w, d, func(d *v1alpha1.Dataset) {
		metav1.SetMetaDataAnnotation(&d.ObjectMeta, v1alpha1.AnnotationRollout, "broken")
	})
	w.event("WorkerUpdated")
	w.eventually("the first has ended", func() error {
		if now := w.uids(); len(now) != 2 {
			return fmt.Errorf("workers %v", now)
		}
		return nil
	})
	w.passes(d, 4)
	if now := w.uids(); len(now) != 2 || w.cached() != 3_000_000 {
		t.Fatalf("of workers %v %v are left, and %d bytes of 3,000,000", before, now, w.cached())
	}

	key := w.secret("new-key")
	key.StringData["sessionToken"] = "new"
	w.must(w.Create(t.Context(), key))
	sent := w.bucket.Sent()
	update(w, d, func(d *v1alpha1.Dataset) { d.Spec.Mounts[0].CredentialsSecretRef.Name = "new-key" })
	w.set(func(w *world) { w.deaf = false })
	w.renewed(d, before)
	w.load(d, "again", half)
	if more := w.bucket.Sent() - sent; more > 50_000 { // less than one file: there are questions without bytes
		t.Errorf("the bucket sent %d bytes of what the workers held", more)
	}
}

func TestWorkersOnNodesThatDoNotAnswerAreReplaced(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 3, 4, 1000)
	m := w.members(d)
	lost, gone := m.Members[0], m.Members[:2]
	for i, m := range gone {
		w.node(i, corev1.ConditionUnknown)
		if m.Node != w.nodeName(i) {
			t.Fatalf("worker %d is on %s", i, m.Node)
		}
		w.set(func(w *world) { // the machine is gone
			w.workers[m.ID].cancel()
			<-w.workers[m.ID].done
		})
	}
	w.condition(d, v1alpha1.ConditionWorkersReady, metav1.ConditionFalse, "NodeUnreachable", lost.ID, lost.Node)
	if d.Status.Phase != v1alpha1.DatasetDegraded {
		t.Errorf("phase %s", d.Status.Phase)
	}
	w.event("NodeUnreachable", lost.ID)
	w.passes(d, 3) // in which the worker is asked in vain
	w.clock.advance(3 * time.Minute)
	update(w, d, func(d *v1alpha1.Dataset) { metav1.SetMetaDataAnnotation(&d.ObjectMeta, "poke", "1") })
	w.waitReady(d)
	m = w.members(d)
	if len(m.Members) != 3 {
		t.Errorf("membership %s", asJSON(m))
	}
	for i, lost := range gone { // each is told, also of those that one pass replaced
		w.event("WorkerReplaced", lost.ID, lost.Node)
		if m.Members[i].Node == lost.Node {
			t.Errorf("membership %s", asJSON(m))
		}
	}
}

func TestWorkersThatAnswerAreKeptThoughTheirNodesDoNot(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 3, 6, 100_000)
	w.load(d, "all", nil)
	before, list := w.uids(), asJSON(w.members(d))
	for i := range 3 { // the way to the control plane is cut
		w.node(i, corev1.ConditionUnknown)
	}
	w.condition(d, v1alpha1.ConditionWorkersReady, metav1.ConditionFalse, "NodeUnreachable")
	for range 3 {
		w.clock.advance(3 * time.Minute)
		w.passes(d, 2)
	}
	for i := range 3 {
		w.node(i, corev1.ConditionTrue)
	}
	w.waitReady(d)
	if now := w.uids(); fmt.Sprint(now) != fmt.Sprint(before) || w.cached() != 600_000 {
		t.Errorf("workers %v hold %d bytes, before it were %v and 600,000", now, w.cached(), before)
	}
	if now := asJSON(w.members(d)); now != list {
		t.Errorf("membership %s, before it was %s", now, list)
	}
}

func TestKeysRotateWithoutShuttingAnyoneOut(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 2, 2, 1000)
	keys := func(name string) map[string][]byte {
		s := &corev1.Secret{}
		w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: name}, s))
		return s.Data
	}
	old := keys("genomes-keys")
	update(w, d, func(d *v1alpha1.Dataset) {
		metav1.SetMetaDataAnnotation(&d.ObjectMeta, v1alpha1.AnnotationRotateKeys, "today")
	})
	w.event("KeysRotated", "new keys are in use for \"today\"")
	now := keys("genomes-keys")
	for _, role := range []string{"read", "write", "control"} {
		k, err := wire.ParseKeys(now[role])
		w.must(err)
		was, err := wire.ParseKeys(old[role])
		w.must(err)
		if len(k) != 2 || k[1] != was[0] || k[0] == was[0] {
			t.Errorf("role %s has %d keys, the old one is not the second", role, len(k))
		}
	}
	w.eventually("readers use the new key", func() error {
		k, _ := wire.ParseKeys(keys("genomes-reader")["read"])
		all, _ := wire.ParseKeys(keys("genomes-keys")["read"])
		if len(k) != 1 || k[0] != all[0] {
			return fmt.Errorf("reader has %d keys, not the new one", len(k))
		}
		return nil
	})
	w.waitReady(d)
	update(w, d, func(d *v1alpha1.Dataset) { delete(d.Annotations, v1alpha1.AnnotationRotateKeys) })
	w.eventually("the old keys end", func() error {
		if k, err := wire.ParseKeys(keys("genomes-keys")["control"]); err != nil || len(k) != 1 {
			return fmt.Errorf("%d keys: %v", len(k), err)
		}
		return nil
	})
	w.waitReady(d)
}

func TestTheBucketIsListedAgainOnRequest(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 2, 2, 1000)
	ask := func(value string) {
		t.Helper()
		update(w, d, func(d *v1alpha1.Dataset) {
			metav1.SetMetaDataAnnotation(&d.ObjectMeta, v1alpha1.AnnotationRefresh, value)
		})
	}
	done := func(value string) {
		t.Helper()
		w.eventually("refresh "+value, func() error {
			if err := w.Get(w.Context(), client.ObjectKeyFromObject(d), d); err != nil || d.Status.Refreshed != value {
				return fmt.Errorf("status %s: %v", asJSON(d.Status), err)
			}
			return nil
		})
	}
	for n, value := range []string{"1", "2"} {
		w.bucket.PutT(t, "data", "new"+value, []byte("new"))
		ask(value)
		done(value)
		// What is told of it is what was listed, by all workers.
		if want := int64(3 + n); d.Status.Files != want || d.Status.Phase != v1alpha1.DatasetReady {
			t.Errorf("once %q is done the status tells %d files, want %d: %s", value, d.Status.Files, want, asJSON(d.Status))
		}
		for name, s := range w.statuses() {
			if s.Snapshot != d.Status.Snapshot {
				t.Errorf("worker %s has listing %.8s, the status tells %.8s", name, s.Snapshot, d.Status.Snapshot)
			}
		}
	}
	// Not again for the same value: what came since is not listed.
	w.bucket.PutT(t, "data", "unseen", []byte("new"))
	w.passes(d, 3)
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(d), d))
	if d.Status.Files != 4 {
		t.Errorf("%d files, want 4", d.Status.Files)
	}
	// A bucket that refuses is told, and asked again.
	secret := w.secret("access-key")
	right := secret.StringData["accessKeySecret"]
	change := func(key string) {
		s := w.secret("access-key")
		update(w, s, func(s *corev1.Secret) { s.Data["accessKeySecret"] = []byte(key) })
	}
	change("wrong")
	w.eventually("the workers have the wrong key", func() error {
		ask(fmt.Sprint("denied", time.Now().UnixNano()))
		list := &eventsv1.EventList{}
		w.must(w.List(t.Context(), list, client.InNamespace(w.ns)))
		for _, e := range list.Items {
			if e.Reason == "RefreshFailed" && strings.Contains(e.Note, "denied") {
				return nil
			}
		}
		return errors.New("no event")
	})
	change(right)
	ask("3")
	done("3")
	if d.Status.Files != 5 {
		t.Errorf("%d files, want 5", d.Status.Files)
	}
	update(w, d, func(d *v1alpha1.Dataset) { delete(d.Annotations, v1alpha1.AnnotationRefresh) })
	w.waitReady(d)
}

func TestMembershipThatWasDeletedComesBackWithAGreaterEpoch(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 2, 2, 1000)
	before := w.members(d)
	cm := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "genomes-tier"}}
	w.must(w.Delete(t.Context(), cm))
	w.eventually("workers follow the new list", func() error {
		if err := w.Get(t.Context(), client.ObjectKeyFromObject(cm), cm); err != nil {
			return err
		}
		m := w.members(d)
		if m.Epoch <= before.Epoch || len(m.Members) != 2 {
			return fmt.Errorf("membership %s", asJSON(m))
		}
		for name, s := range w.statuses() {
			if s.Epoch != m.Epoch {
				return fmt.Errorf("worker %s follows epoch %d, not %d", name, s.Epoch, m.Epoch)
			}
		}
		return nil
	})
}

// anew ends a worker's pod as a drain of its node does, and waits until the list has the one that comes after it.
func (w *world) anew(d *v1alpha1.Dataset, i int) {
	w.Helper()
	before := w.members(d)
	w.must(w.Delete(w.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: before.Members[i].ID}}))
	w.eventually("the list has the new worker", func() error {
		if m := w.members(d); len(m.Members) != len(before.Members) || m.Members[i].Addr == before.Members[i].Addr {
			return fmt.Errorf("list %s", asJSON(m))
		}
		return nil
	})
}

func TestReadersFindTheWorkersWhileADeletionWaitsForThem(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 1, 1, 1000)
	pod := w.pod("reader", corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "genomes"}})
	w.must(w.Create(t.Context(), pod))
	w.must(w.Delete(t.Context(), d))
	w.condition(d, v1alpha1.ConditionReady, metav1.ConditionFalse, "InUse", "reader")
	w.anew(d, 0)
	w.condition(d, v1alpha1.ConditionReady, metav1.ConditionFalse, "InUse", "reader")
	w.must(w.Delete(t.Context(), pod, client.GracePeriodSeconds(0)))
	w.gone(d)
}

func TestReadersFindTheWorkersOfADatasetThatCannotGoOn(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 2, 1, 1000)
	update(w, d, func(d *v1alpha1.Dataset) { d.Spec.Mounts[0].CredentialsSecretRef = nil })
	w.condition(d, v1alpha1.ConditionSourced, metav1.ConditionFalse, "InvalidSpec")
	w.anew(d, 1)
	// What is wanted of pods is not known: none is taken for one that leaves.
	w.eventually("both serve", func() error {
		for name, s := range w.statuses() {
			if s.Epoch != w.members(d).Epoch {
				return fmt.Errorf("worker %s follows %d", name, s.Epoch)
			}
		}
		return nil
	})
	w.passes(d, 4)
	for _, m := range w.members(d).Members {
		if m.State != ring.Ready {
			t.Errorf("member %s", asJSON(m))
		}
	}
	// A policy that does not take one of its Secrets is no different.
	update(w, d, func(d *v1alpha1.Dataset) {
		d.Spec.Mounts[0].CredentialsSecretRef = &v1alpha1.CredentialsRef{Name: "access-key"}
	})
	w.waitReady(d)
	w.requests.refusing(v1alpha1.AttributeNodeMemory)
	update(w, d, func(d *v1alpha1.Dataset) {
		d.Spec.Node = &v1alpha1.NodeCache{Memory: ptr.To(resource.MustParse("1Gi"))}
	})
	w.condition(d, v1alpha1.ConditionReady, metav1.ConditionFalse, "Refused", "genomes-reader")
	w.anew(d, 0)
}
