package webhook

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// The patches as they are, applied, and applied again: the second time there is nothing left to do.
func TestPatches(t *testing.T) {
	restricted := func(w *world) { w.namespaces["argo"][labelEnforce] = "restricted" }
	noService := func(w *world) { w.service = false }
	for _, c := range []struct {
		name, pod string
		change    []func(map[string]any)
		world     func(*world)
		mode      string
	}{
		{"argo-csi", "argo-v3.7", []func(map[string]any){inject("auto")}, nil, "csi"},
		{"argo-sidecar", "argo-v3.7", []func(map[string]any){inject("sidecar")}, restricted, "sidecar"},
		{"argo-sidecar-privileged", "argo-v3.7", []func(map[string]any){inject("sidecar")}, noService, "sidecar"},
		{"argo-stage", "argo-v3.7", []func(map[string]any){inject("stage")}, restricted, "stage"},
		{"argo-stage-artifacts", "argo-v3.7", []func(map[string]any){inject("stage")}, func(w *world) { w.datasets[0].Status.Bytes = 5 << 30 }, "stage"},
		{"argo-fluid-serverless", "argo-v3.7", []func(map[string]any){put("labels", labelFluidTarget, "eci")}, nil, "stage"},
		{"argo-fluid-inject", "argo-v3.7", []func(map[string]any){put("labels", labelFluid, "true")}, nil, "csi"},
		{"initless-csi", "argo-v4-initless", nil, nil, "csi"},
		{"initless-sidecar", "argo-v4-initless", nil, noService, "sidecar"},
		{"initless-stage", "argo-v4-initless", nil, func(w *world) { noService(w); restricted(w) }, "stage"},
		{"plain-csi", "plain", nil, nil, "csi"},
		{"plain-sidecar", "plain", []func(map[string]any){inject("sidecar")}, nil, "sidecar"},
		{"plain-stage", "plain", []func(map[string]any){inject("stage"), put("annotations", AnnotationStagePaths, "/shards/{0001,0002}.bin,genomes=/ref/empty")}, nil, "stage"},
		{"shared-csi", "affinity", nil, nil, "csi"},
		{"require", "plain", nil, func(w *world) { w.datasets[0].Spec.Locality = v1alpha1.LocalityRequire }, "csi"},
		{"require-affinity", "affinity", []func(map[string]any){mounts("genomes=/data")}, func(w *world) { w.datasets[0].Spec.Locality = v1alpha1.LocalityRequire }, "csi"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld()
			if c.world != nil {
				c.world(w)
			}
			h := injectHandler(t, w)
			raw := readPod(t, c.pod, c.change...)
			r := h.Handle(context.Background(), request("argo", raw))
			after := apply(t, raw, r)
			golden(t, c.name, r)
			pod := decodePod(t, after)
			if got := pod.Annotations[AnnotationInjected]; got != c.mode {
				t.Errorf("mode %q, want %q", got, c.mode)
			}
			if strings.Contains(string(raw), "fromTheFuture") && (!strings.Contains(string(after), `"fromTheFuture":{"keep":true}`) || !strings.Contains(string(after), `"futureField":7`)) {
				t.Errorf("a field that is not known got lost: %s", after)
			}
			before := decodePod(t, raw)
			for i, v := range before.Spec.Volumes {
				if pod.Spec.Volumes[i].Name != v.Name {
					t.Errorf("volume %d is %s, was %s", i, pod.Spec.Volumes[i].Name, v.Name)
				}
			}
			again := h.Handle(context.Background(), request("argo", after))
			if !again.Allowed || len(again.Patches) > 0 {
				b, _ := json.Marshal(again.Patches)
				t.Errorf("patched again: %s (%v)", b, again.Result)
			}
		})
	}
}

// What the pod security level "restricted" asks of every container that is added.
func TestWhatIsAddedIsRestricted(t *testing.T) {
	for _, m := range []string{"stage", "sidecar"} {
		h := injectHandler(t, newWorld())
		raw := readPod(t, "plain", inject(m))
		pod := decodePod(t, apply(t, raw, h.Handle(context.Background(), request("argo", raw))))
		if len(pod.Spec.InitContainers) != 1 {
			t.Fatalf("%s: %d init containers", m, len(pod.Spec.InitContainers))
		}
		c := pod.Spec.InitContainers[0]
		s := c.SecurityContext
		if s.Privileged != nil || *s.AllowPrivilegeEscalation || !*s.RunAsNonRoot || *s.RunAsUser == 0 ||
			!slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || len(s.Capabilities.Add) > 0 || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
			t.Errorf("%s: not restricted: %+v", m, s)
		}
		for _, v := range pod.Spec.Volumes {
			if v.HostPath != nil {
				t.Errorf("%s: volume %s is a folder of the node", m, v.Name)
			}
		}
		for _, v := range c.VolumeMounts {
			if v.MountPropagation != nil {
				t.Errorf("%s: mounts of %s propagate", m, v.Name)
			}
		}
	}
}

// What is added must not cost the pod its QoS class, nor have a quota or the API server refuse it.
func TestWhatIsAddedAsksForResourcesAsThePodDoes(t *testing.T) {
	list := func(cpu, memory string) map[string]any { return map[string]any{"cpu": cpu, "memory": memory} }
	main := func(requests, limits map[string]any) func(map[string]any) {
		return func(pod map[string]any) {
			pod["spec"].(map[string]any)["containers"].([]any)[0].(map[string]any)["resources"] = map[string]any{"requests": requests, "limits": limits}
		}
	}
	whole := func(requests, limits map[string]any) func(map[string]any) {
		return func(pod map[string]any) {
			pod["spec"].(map[string]any)["resources"] = map[string]any{"requests": requests, "limits": limits}
		}
	}
	write := func(r *corev1.ResourceRequirements) string {
		if r == nil {
			return ""
		}
		return fmt.Sprintf("%s %s of %s %s", r.Requests.Cpu(), r.Requests.Memory(), r.Limits.Cpu(), r.Limits.Memory())
	}
	for name, c := range map[string]struct {
		change      func(map[string]any)
		want, whole string
	}{
		"nothing said":    {func(map[string]any) {}, "100m 192Mi of 0 512Mi", ""},
		"Guaranteed":      {main(list("4", "1Gi"), list("4", "1Gi")), "1 512Mi of 1 512Mi", ""},
		"CPU limited":     {main(list("1", "1Gi"), list("4", "2Gi")), "100m 192Mi of 4 512Mi", ""},
		"no CPU limit":    {main(list("1", "1Gi"), map[string]any{"memory": "1Gi"}), "100m 192Mi of 0 512Mi", ""},
		"pod":             {whole(list("1", "1Gi"), list("2", "2Gi")), "100m 192Mi of 0 512Mi", "1100m 1216Mi of 2100m 2560Mi"},
		"Guaranteed pod":  {whole(list("2", "1Gi"), list("2", "1Gi")), "1 512Mi of 1 512Mi", "3 1536Mi of 3 1536Mi"},
		"pod's CPU alone": {whole(map[string]any{"cpu": "1"}, map[string]any{}), "100m 192Mi of 0 512Mi", "1100m 0 of 0 0"},
	} {
		t.Run(name, func(t *testing.T) {
			raw := readPod(t, "plain", inject("sidecar"), c.change)
			pod := decodePod(t, apply(t, raw, injectHandler(t, newWorld()).Handle(context.Background(), request("argo", raw))))
			if got := write(&pod.Spec.InitContainers[0].Resources); got != c.want {
				t.Errorf("the sidecar asks for %s, want %s", got, c.want)
			}
			if got := write(pod.Spec.Resources); got != c.whole {
				t.Errorf("the pod asks for %s, want %s", got, c.whole)
			}
		})
	}
}

// The server of lent mounts must not have them: it would be looked at before it serves, which hangs. And the pod
// must come to a node with a node service, whatever else it wants of its node.
func TestLentMountsAreTheOthers(t *testing.T) {
	h := injectHandler(t, newWorld())
	raw := readPod(t, "affinity", inject("sidecar"), mounts("genomes=/data"))
	pod := decodePod(t, apply(t, raw, h.Handle(context.Background(), request("argo", raw))))
	kinds := map[string]string{}
	for _, v := range pod.Spec.Volumes {
		if v.CSI != nil {
			kinds[v.Name] = v.CSI.VolumeAttributes[v1alpha1.AttributeVolume]
		}
	}
	if len(kinds) != 2 {
		t.Fatalf("inline volumes %v", kinds)
	}
	for _, m := range pod.Spec.InitContainers[0].VolumeMounts {
		if kinds[m.Name] == v1alpha1.VolumeLent {
			t.Errorf("the server mounts %s", m.Name)
		}
	}
	for _, c := range pod.Spec.Containers {
		for _, m := range c.VolumeMounts {
			if kinds[m.Name] == v1alpha1.VolumeLender {
				t.Errorf("container %s gets the node service's socket", c.Name)
			}
		}
	}
	terms := pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
	for _, term := range terms {
		if len(term.MatchExpressions)+len(term.MatchFields) == 0 {
			continue // it matches no node
		}
		if !slices.ContainsFunc(term.MatchExpressions, func(r corev1.NodeSelectorRequirement) bool { return r.Key == v1alpha1.LabelNodeReady }) {
			t.Errorf("it may come to a node without a node service: %+v", term)
		}
	}
	if len(terms) == 0 {
		t.Error("it may come to any node")
	}
}

// A node that is made for one pod runs no DaemonSet, though other nodes of the cluster do.
func TestServerlessPodsAreNotLentMounts(t *testing.T) {
	w := newWorld()
	w.namespaces["argo"][labelEnforce] = "privileged"
	h := injectHandler(t, w)
	for _, mode := range []string{"auto", "sidecar"} {
		raw := readPod(t, "plain", inject(mode), put("labels", "alibabacloud.com/eci", "true"))
		pod := decodePod(t, apply(t, raw, h.Handle(context.Background(), request("argo", raw))))
		if len(pod.Spec.InitContainers) != 2 || pod.Spec.InitContainers[0].Name != keeperName {
			t.Errorf("%s: not the privileged form: %+v", mode, pod.Spec.InitContainers)
		}
	}
	w.namespaces["argo"][labelEnforce] = "baseline"
	raw := readPod(t, "plain", inject("sidecar"), put("labels", "alibabacloud.com/eci", "true"))
	if got := denial(t, h.Handle(context.Background(), request("argo", raw))); !strings.Contains(got, "use stage") {
		t.Error(got)
	}
}

// Init containers of the pod read the Dataset too: what serves it comes before them.
func TestSidecarIsFirstOfAll(t *testing.T) {
	for _, lent := range []bool{true, false} {
		w := newWorld()
		w.service = lent
		sidecarIsFirst(t, w, lent)
	}
}

// A writable Dataset has no listing to copy from, but its names can be read one by one.
func TestSidecarOfAWritableDataset(t *testing.T) {
	w := newWorld()
	w.datasets[0].Spec.Access, w.datasets[0].Spec.Replaces = v1alpha1.ReadWrite, nil
	sidecarIsFirst(t, w, w.service, mounts("genomes=/more"))
}

func sidecarIsFirst(t *testing.T, w *world, lent bool, more ...func(map[string]any)) {
	h := injectHandler(t, w)
	raw := readPod(t, "argo-v3.7", append(more, inject("sidecar"))...)
	pod := decodePod(t, apply(t, raw, h.Handle(context.Background(), request("argo", raw))))
	var names []string
	for _, c := range pod.Spec.InitContainers {
		names = append(names, c.Name)
	}
	want := []string{keeperName, sidecarName, "init"}
	if lent {
		want = want[1:]
	}
	if !slices.Equal(names, want) {
		t.Fatalf("init containers %v, want %v", names, want)
	}
	ours := pod.Spec.InitContainers[:len(want)-1]
	for _, c := range ours {
		if c.RestartPolicy == nil || *c.RestartPolicy != corev1.ContainerRestartPolicyAlways {
			t.Errorf("%s is no native sidecar", c.Name)
		}
	}
	if ours[len(ours)-1].StartupProbe == nil {
		t.Error("nothing waits for the sidecar")
	}
	if pod.Labels[v1alpha1.LabelReader] != "true" {
		t.Error("workers would not let the pod in")
	}
}

func TestArgoContainersGetNoMounts(t *testing.T) {
	h := injectHandler(t, newWorld())
	raw := readPod(t, "argo-v3.7", inject("csi"), mounts("genomes=/more"))
	pod := decodePod(t, apply(t, raw, h.Handle(context.Background(), request("argo", raw))))
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		has := slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == "/more" && m.Name == "data" })
		if want := c.Name == "main"; has != want {
			t.Errorf("%s has the mount: %v", c.Name, has)
		}
	}
	if got, want := volumeNames(pod), "data tmp-dir-argo var-run-argo"; got != want {
		t.Errorf("volumes %s, want %s", got, want)
	}
}

func TestDenials(t *testing.T) {
	hostNetwork := func(pod map[string]any) { pod["spec"].(map[string]any)["hostNetwork"] = true }
	deleting := metav1.NewTime(time.Unix(1, 0))
	volume := func(pod map[string]any) {
		c := pod["spec"].(map[string]any)["containers"].([]any)[0].(map[string]any)
		c["volumeMounts"] = []any{map[string]any{"name": "v", "mountPath": "/data"}, map[string]any{"name": "v", "mountPath": "/in/deep"}, map[string]any{"name": "v", "mountPath": "/ro", "readOnly": true}}
		pod["spec"].(map[string]any)["volumes"] = []any{map[string]any{"name": "v", "emptyDir": map[string]any{}}}
	}
	for _, c := range []struct {
		name   string
		change []func(map[string]any)
		world  func(*world)
		says   []string
	}{
		{"unknown mode", []func(map[string]any){inject("fuse")}, nil, []string{`"fuse"`, "auto, csi, sidecar or stage"}},
		{"unknown Dataset", []func(map[string]any){mounts("genome=/data")}, nil, []string{`no Dataset "genome"`, "there is: genomes"}},
		{"no Dataset at all", nil, func(w *world) { w.datasets = nil }, []string{"there is: none"}},
		{"not shared", []func(map[string]any){mounts("ref/hg38=/ref")}, func(w *world) { w.datasets[1].Spec.ShareWith = nil }, []string{"ref/hg38", "spec.shareWith"}},
		{"unknown elsewhere", []func(map[string]any){mounts("ref/nothing=/ref")}, nil, []string{"ref/nothing", "spec.shareWith"}},
		{"no path", []func(map[string]any){mounts("genomes")}, nil, []string{`"genomes" has no =`, "NAME=/path"}},
		{"relative path", []func(map[string]any){mounts("genomes=data")}, nil, []string{"does not begin with /"}},
		{"the root", []func(map[string]any){mounts("genomes=/")}, nil, []string{"cannot be mounted at /"}},
		{"dots", []func(map[string]any){mounts("genomes=/data/../etc")}, nil, []string{".. folder"}},
		{"colon", []func(map[string]any){mounts("genomes=/a:b")}, nil, []string{"no mount path may have"}},
		{"bad name", []func(map[string]any){mounts("Genomes=/data")}, nil, []string{"not the name of a Dataset"}},
		{"nothing named", []func(map[string]any){mounts(" , ")}, nil, []string{"names nothing"}},
		{"twice", []func(map[string]any){mounts("genomes=/data,genomes=/data/")}, nil, []string{"overlap"}},
		{"nested", []func(map[string]any){mounts("genomes=/data/x,ref/hg38=/data")}, nil, []string{"overlap"}},
		{"path taken", []func(map[string]any){volume}, nil, []string{"container main already mounts volume v", "another path"}},
		{"above a mount", []func(map[string]any){volume, mounts("genomes=/in")}, nil, []string{"below it, at /in/deep", "read-only"}},
		{"below a read-only mount", []func(map[string]any){volume, mounts("genomes=/ro/data")}, nil, []string{"read-only above it"}},
		{"being deleted", nil, func(w *world) { w.datasets[0].DeletionTimestamp = &deleting }, []string{"is being deleted"}},
		{"sidecar where it is not allowed", []func(map[string]any){inject("sidecar")}, func(w *world) { w.namespaces["argo"][labelEnforce], w.service = "baseline", false }, []string{"privileged", "baseline", "use stage"}},
		{"sidecar in a user namespace", []func(map[string]any){inject("sidecar"), func(pod map[string]any) { pod["spec"].(map[string]any)["hostUsers"] = false }}, func(w *world) { w.service = false }, []string{"hostUsers", "use stage", "install the node service"}},
		{"sidecar of another namespace", []func(map[string]any){inject("sidecar"), mounts("ref/hg38=/ref")}, nil, []string{"ref/hg38 is of another namespace", "use the mode csi"}},
		{"stage of another namespace", []func(map[string]any){inject("stage"), mounts("ref/hg38=/ref")}, nil, []string{"use the mode csi"}},
		{"sidecar in the node's network", []func(map[string]any){inject("sidecar"), hostNetwork}, nil, []string{"hostNetwork", "use csi"}},
		{"stage in the node's network", []func(map[string]any){inject("stage"), hostNetwork}, nil, []string{"hostNetwork", "use csi"}},
		{"stage of a writable Dataset", []func(map[string]any){inject("stage")}, func(w *world) { w.datasets[0].Spec.Access = v1alpha1.ReadWrite }, []string{"ReadWrite", "use the mode csi or sidecar"}},
		{"a replaced claim of a writable Dataset", []func(map[string]any){mounts(""), claimed("oss-data")}, func(w *world) { w.datasets[0].Spec.Access = v1alpha1.ReadWrite }, []string{"claim oss-data", "access: ReadWrite", "spec.replaces", "S3 endpoint"}},
		{"stage of too much", []func(map[string]any){inject("stage")}, func(w *world) { w.datasets[0].Status.Bytes = 5 << 30 }, []string{"5.0 GiB", "4.0 GiB", AnnotationStagePaths}},
		{"bad stage paths", []func(map[string]any){inject("stage"), put("annotations", AnnotationStagePaths, "shards")}, nil, []string{AnnotationStagePaths, "does not begin with /"}},
		{"bad pattern", []func(map[string]any){inject("stage"), put("annotations", AnnotationStagePaths, "/shards/[")}, nil, []string{"not closed"}},
		{"dots in stage paths", []func(map[string]any){inject("stage"), put("annotations", AnnotationStagePaths, "/a/../b")}, nil, []string{".. folder"}},
		{"stage paths of another Dataset", []func(map[string]any){inject("stage"), put("annotations", AnnotationStagePaths, "other=/a")}, nil, []string{"argo/other", "does not mount"}},
		{"reserved name", []func(map[string]any){func(pod map[string]any) {
			pod["spec"].(map[string]any)["containers"].([]any)[0].(map[string]any)["name"] = stageName
		}}, nil, []string{stageName, "the webhook's own"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld()
			if c.world != nil {
				c.world(w)
			}
			got := denial(t, injectHandler(t, w).Handle(context.Background(), request("argo", readPod(t, "plain", c.change...))))
			for _, want := range append(c.says, "stepcache: ") {
				if !strings.Contains(got, want) {
					t.Errorf("%q does not say %q", got, want)
				}
			}
		})
	}
}

// claimed gives the pod a volume of a claim.
func claimed(name string) func(map[string]any) {
	return func(pod map[string]any) {
		pod["spec"].(map[string]any)["volumes"] = []any{map[string]any{"name": "v", "persistentVolumeClaim": map[string]any{"claimName": name}}}
	}
}

// The kubelet waits for ever for the second of two volumes of one claim.
func TestOneVolumeOfAPodHasTheClaim(t *testing.T) {
	w := newWorld()
	w.datasets[0].Spec.Replaces = append(w.datasets[0].Spec.Replaces, v1alpha1.Replaced{ClaimName: "oss-old"})
	for _, names := range [][]string{{"oss-data", "oss-old"}, {"oss-data", "genomes"}, {"genomes", "oss-data"}, {"oss-data", "oss-old", "genomes"}} {
		volumes := func(pod map[string]any) {
			var all []any
			for i, name := range names {
				all = append(all, map[string]any{"name": fmt.Sprint("v", i), "persistentVolumeClaim": map[string]any{"claimName": name}})
			}
			pod["spec"].(map[string]any)["volumes"] = all
			delete(pod["metadata"].(map[string]any), "annotations")
		}
		asksNot := func(pod map[string]any) { delete(pod["metadata"].(map[string]any), "labels") }
		for _, c := range []struct {
			h      admission.Handler
			change []func(map[string]any)
		}{
			{localityHandler(t, w), []func(map[string]any){volumes, asksNot}},
			{injectHandler(t, w), []func(map[string]any){volumes, inject("csi")}},
		} {
			raw := readPod(t, "plain", c.change...)
			pod := decodePod(t, apply(t, raw, c.h.Handle(t.Context(), request("argo", raw))))
			own := 0
			for i, v := range pod.Spec.Volumes {
				switch {
				case v.Name != fmt.Sprint("v", i):
					t.Errorf("%v: volume %d is %s", names, i, v.Name)
				case v.PersistentVolumeClaim != nil && v.PersistentVolumeClaim.ClaimName == "genomes":
					own++
				case v.CSI == nil || v.CSI.VolumeAttributes[v1alpha1.AttributeDataset] != "genomes" || v.CSI.NodePublishSecretRef.Name != v1alpha1.ReaderName("genomes"):
					t.Errorf("%v: volume %d is %+v", names, i, v)
				}
			}
			if own != 1 || len(pod.Spec.Volumes) != len(names) {
				t.Errorf("%v: %d volumes of the claim: %+v", names, own, pod.Spec.Volumes)
			}
			if a := pod.Spec.Affinity; a == nil || a.NodeAffinity == nil || a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
				t.Errorf("%v: the inline volume may come to a node without a node service", names)
			}
		}
	}
}

// Its own claim is no replacement: it is mounted as everybody's is.
func TestWritableDatasetsOwnClaimIsMounted(t *testing.T) {
	w := newWorld()
	w.datasets[0].Spec.Access = v1alpha1.ReadWrite
	r := injectHandler(t, w).Handle(context.Background(), request("argo", readPod(t, "plain", mounts(""), claimed("genomes"))))
	if !r.Allowed {
		t.Error(r.Result)
	}
}

// takenName has the claim genomes be somebody else's.
func takenName(w *world) {
	st := &w.datasets[0].Status
	st.Conditions = append(st.Conditions, metav1.Condition{Type: v1alpha1.ConditionVolumeReady, Status: metav1.ConditionFalse, Reason: v1alpha1.ReasonNameTaken})
}

// Pods write to a claim of somebody else that happens to have a Dataset's name, Fluid's for example.
func TestPodsKeepAClaimOfSomebodyElse(t *testing.T) {
	w := newWorld()
	takenName(w)
	w.datasets[0].Spec.Locality = v1alpha1.LocalityRequire
	asked := func(change ...func(map[string]any)) []byte {
		return readPod(t, "plain", append(change, mounts(""), claimed("genomes"))...)
	}
	for name, raw := range map[string][]byte{
		"stage": asked(inject("stage")), "sidecar": asked(inject("sidecar")), "auto": asked(),
		"serverless": asked(put("labels", "alibabacloud.com/eci", "true")), "Fluid's label": asked(inject(""), put("labels", labelFluidTarget, "eci")),
	} {
		r := injectHandler(t, w).Handle(t.Context(), request("argo", raw))
		if !r.Allowed || len(r.Patches) > 0 {
			t.Errorf("%s: patched: %v %v", name, r.Patches, r.Result)
		}
		if ours := name != "Fluid's label"; ours && len(r.Warnings) != 1 {
			t.Errorf("%s: warnings %q", name, r.Warnings)
		}
	}
	r := localityHandler(t, w).Handle(t.Context(), request("argo", asked(inject(""))))
	if !r.Allowed || len(r.Patches) > 0 {
		t.Errorf("a pod that reads nothing of the Dataset is placed: %v %v", r.Patches, r.Result)
	}
	// Nor is that claim given to pods that want the Dataset.
	want := "claim genomes is somebody else's"
	for name, raw := range map[string][]byte{"annotation": readPod(t, "plain"), "replaced": readPod(t, "plain", mounts(""), claimed("oss-data"))} {
		if got := denial(t, injectHandler(t, w).Handle(t.Context(), request("argo", raw))); !strings.Contains(got, want) {
			t.Errorf("%s: %q does not say %q", name, got, want)
		}
	}
	raw := readPod(t, "plain", inject("sidecar"))
	if pod := decodePod(t, apply(t, raw, injectHandler(t, w).Handle(t.Context(), request("argo", raw)))); pod.Annotations[AnnotationInjected] != "sidecar" {
		t.Errorf("a sidecar, which needs no claim, is not added: %v", pod.Annotations)
	}
}

// Who pulls the image of what is added: the pod's own Secrets, and those of the installation.
func TestPullSecrets(t *testing.T) {
	secrets := func(names ...string) func(map[string]any) {
		return func(pod map[string]any) {
			var all []any
			for _, n := range names {
				all = append(all, map[string]any{"name": n})
			}
			pod["spec"].(map[string]any)["imagePullSecrets"] = all
		}
	}
	for _, c := range []struct {
		name   string
		mode   string
		change func(map[string]any)
		want   string
	}{
		{"none of its own", "sidecar", func(map[string]any) {}, "ours"},
		{"its own", "stage", secrets("mine"), "mine ours"},
		{"the same", "sidecar", secrets("ours", "mine"), "ours mine"},
		{"no container of ours", "csi", secrets("mine"), "mine"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := injectHandler(t, newWorld())
			h.PullSecrets = []string{"ours"}
			raw := readPod(t, "plain", inject(c.mode), c.change)
			after := apply(t, raw, h.Handle(context.Background(), request("argo", raw)))
			var got []string
			for _, s := range decodePod(t, after).Spec.ImagePullSecrets {
				got = append(got, s.Name)
			}
			if strings.Join(got, " ") != c.want {
				t.Errorf("%v, want %s", got, c.want)
			}
			if again := h.Handle(context.Background(), request("argo", after)); len(again.Patches) > 0 {
				t.Errorf("patched again: %v", again.Patches)
			}
		})
	}
}

// What is added runs before a mesh's proxy, and so must not be redirected to it; what the user excludes stays.
func TestWhatIsAddedPassesTheMesh(t *testing.T) {
	for _, c := range []struct{ mode, has, want string }{
		{"stage", "", "7070"},
		{"sidecar", "", "7070"},
		{"stage", "443, 17070,", "443,17070,7070"},
		{"sidecar", "7070,443", "7070,443"},
		{"csi", "", ""},
		{"csi", "443", "443"},
	} {
		for _, lent := range []bool{true, false} {
			w := newWorld()
			w.service = lent
			h := injectHandler(t, w)
			raw := readPod(t, "plain", inject(c.mode), put("annotations", istioPorts, c.has), put("annotations", linkerdPorts, c.has))
			after := apply(t, raw, h.Handle(t.Context(), request("argo", raw)))
			for _, key := range []string{istioPorts, linkerdPorts} {
				if got := decodePod(t, after).Annotations[key]; got != c.want {
					t.Errorf("%s, lent %v: %s is %q, was %q, want %q", c.mode, lent, key, got, c.has, c.want)
				}
			}
			if again := h.Handle(t.Context(), request("argo", after)); len(again.Patches) > 0 {
				t.Errorf("%s, lent %v: patched again: %v", c.mode, lent, again.Patches)
			}
		}
	}
}

// Another webhook adds containers after ours, in front and behind, and the API server asks again.
func TestReinvocation(t *testing.T) {
	for _, m := range []string{"csi", "sidecar", "stage"} {
		h := injectHandler(t, newWorld())
		raw := readPod(t, "argo-v3.7", inject(m))
		var pod map[string]any
		if err := json.Unmarshal(apply(t, raw, h.Handle(context.Background(), request("argo", raw))), &pod); err != nil {
			t.Fatal(err)
		}
		spec := pod["spec"].(map[string]any)
		other := func(name string) any { return map[string]any{"name": name, "image": "mesh"} }
		spec["initContainers"] = append([]any{other("mesh-init")}, spec["initContainers"].([]any)...)
		spec["containers"] = append(spec["containers"].([]any), other("mesh"))
		raw, err := json.Marshal(pod)
		if err != nil {
			t.Fatal(err)
		}
		if again := h.Handle(context.Background(), request("argo", raw)); !again.Allowed || len(again.Patches) > 0 {
			t.Errorf("%s: patched again: %v %v", m, again.Patches, again.Result)
		}
	}
}

func counted(t *testing.T, c prometheus.Metric) float64 {
	t.Helper()
	var m dto.Metric
	if err := c.Write(&m); err != nil {
		t.Fatal(err)
	}
	return m.GetCounter().GetValue()
}

// What became of pods is counted.
func TestPodsAreCounted(t *testing.T) {
	h := injectHandler(t, newWorld())
	for outcome, raw := range map[string][]byte{
		"csi":            readPod(t, "plain"),
		"stage":          readPod(t, "plain", inject("stage")),
		outcomeUnchanged: readPod(t, "plain", mounts("")),
		outcomeDenied:    readPod(t, "plain", inject("fuse")),
	} {
		c := pods.WithLabelValues(PathInject, outcome)
		before := counted(t, c)
		h.Handle(context.Background(), request("argo", raw))
		if got := counted(t, c) - before; got != 1 {
			t.Errorf("%s: counted %v times", outcome, got)
		}
	}
	broken := newWorld()
	broken.fails = errors.New("no cache")
	c := pods.WithLabelValues(PathInject, outcomeFailed)
	before := counted(t, c)
	injectHandler(t, broken).Handle(context.Background(), request("argo", readPod(t, "plain")))
	if counted(t, c)-before != 1 {
		t.Error("a fault of ours is not counted")
	}
	c = pods.WithLabelValues(PathLocality, outcomeReplaced)
	before = counted(t, c)
	localityHandler(t, newWorld()).Handle(context.Background(), request("argo", readPod(t, "argo-v3.7")))
	if counted(t, c)-before != 1 {
		t.Error("a replaced claim is not counted")
	}
}

// What another namespace has is not told.
func TestDenialTellsNothingOfOthers(t *testing.T) {
	w := newWorld()
	w.datasets[1].Spec.ShareWith = nil
	h := injectHandler(t, w)
	there := denial(t, h.Handle(context.Background(), request("argo", readPod(t, "plain", mounts("ref/hg38=/ref")))))
	absent := denial(t, h.Handle(context.Background(), request("argo", readPod(t, "plain", mounts("ref/hg39=/ref")))))
	if strings.ReplaceAll(there, "hg38", "X") != strings.ReplaceAll(absent, "hg39", "X") {
		t.Errorf("%q tells another story than %q", there, absent)
	}
}

func TestPodsThatWantNothing(t *testing.T) {
	h := injectHandler(t, newWorld())
	ctx := context.Background()
	for name, raw := range map[string][]byte{
		"no label":       readPod(t, "plain", inject("")),
		"no Dataset":     readPod(t, "plain", mounts("")),
		"Fluid says no":  readPod(t, "plain", inject(""), put("labels", labelFluid, "false")),
		"Fluid, nothing": readPod(t, "plain", inject(""), mounts(""), put("labels", labelFluid, "true")),
	} {
		r := h.Handle(ctx, request("argo", raw))
		if !r.Allowed || len(r.Patches) > 0 {
			t.Errorf("%s: %v %v", name, r.Patches, r.Result)
		}
		if (name == "no Dataset") != (len(r.Warnings) > 0) {
			t.Errorf("%s: warnings %v", name, r.Warnings)
		}
	}
	update := request("argo", readPod(t, "plain"))
	update.Operation = admissionv1.Update
	if r := h.Handle(ctx, update); !r.Allowed || len(r.Patches) > 0 {
		t.Errorf("an update is patched: %v", r.Patches)
	}
	// An unreadable pod must not run without its data.
	if r := h.Handle(ctx, request("argo", []byte(`{"spec":[]}`))); r.Allowed {
		t.Error("a pod that cannot be read is let in")
	}
}

// A fault of ours is told as one that goes away, so that Argo tries again.
func TestOurFault(t *testing.T) {
	w := newWorld()
	w.fails = errors.New("no cache")
	r := injectHandler(t, w).Handle(context.Background(), request("argo", readPod(t, "plain")))
	if r.Allowed || r.Result.Code != http.StatusServiceUnavailable {
		t.Errorf("allowed %v, %v", r.Allowed, r.Result)
	}
	if r := localityHandler(t, w).Handle(context.Background(), request("argo", readPod(t, "argo-v3.7"))); !r.Allowed {
		t.Errorf("locality refuses a pod: %v", r.Result)
	}
}

func TestModes(t *testing.T) {
	pod := func(change func(*corev1.Pod)) *corev1.Pod {
		p := &corev1.Pod{}
		if change != nil {
			change(p)
		}
		return p
	}
	term := func(key, value string) corev1.NodeSelectorTerm {
		return corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: key, Operator: corev1.NodeSelectorOpIn, Values: []string{value}}}}
	}
	required := func(terms ...corev1.NodeSelectorTerm) *corev1.Pod {
		return pod(func(p *corev1.Pod) {
			p.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: terms}}}
		})
	}
	hostNetwork := pod(func(p *corev1.Pod) { p.Spec.HostNetwork = true })
	no := false
	apart := pod(func(p *corev1.Pod) { p.Spec.HostUsers = &no })
	virtual := pod(func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{"type": "virtual-kubelet"} })
	for _, c := range []struct {
		name    string
		asked   mode
		pod     *corev1.Pod
		labels  map[string]string
		service bool
		want    mode
	}{
		{"node service", auto, pod(nil), nil, true, csi},
		{"node service, restricted", auto, pod(nil), map[string]string{labelEnforce: "restricted"}, true, csi},
		{"none", auto, pod(nil), nil, false, sidecar},
		{"none, privileged", auto, pod(nil), map[string]string{labelEnforce: "privileged"}, false, sidecar},
		{"none, baseline", auto, pod(nil), map[string]string{labelEnforce: "baseline"}, false, stage},
		{"virtual kubelet", auto, virtual, nil, true, stage},
		{"virtual kubelet, privileged", auto, virtual, map[string]string{labelEnforce: "privileged"}, true, sidecar},
		{"ECI label", auto, pod(func(p *corev1.Pod) { p.Labels = map[string]string{"alibabacloud.com/eci": "true"} }), nil, true, stage},
		{"ECI namespace", auto, pod(nil), map[string]string{"alibabacloud.com/eci": "true"}, true, stage},
		{"scheduler", auto, pod(func(p *corev1.Pod) { p.Spec.SchedulerName = "eci-scheduler" }), nil, true, stage},
		{"affinity", auto, required(term("type", "virtual-kubelet")), nil, true, stage},
		{"affinity that allows both", auto, required(term("type", "virtual-kubelet"), term("zone", "a")), nil, true, csi},
		{"asked for csi", csi, virtual, nil, false, csi},
		{"asked for stage", stage, pod(nil), nil, true, stage},
		{"asked for sidecar", sidecar, pod(nil), nil, true, sidecar},
		{"node's network", auto, hostNetwork, nil, true, csi},
		{"user namespace", auto, apart, nil, true, csi},
		{"user namespace, no node service", auto, apart, nil, false, stage},
		{"user namespace, no node service, privileged", auto, apart, map[string]string{labelEnforce: "privileged"}, false, stage},
		{"user namespace, virtual kubelet, privileged", auto, apart, map[string]string{"alibabacloud.com/eci": "true", labelEnforce: "privileged"}, true, stage},
		{"user namespace, lent its mounts", sidecar, apart, nil, true, sidecar},
		{"node's network, without another way", sidecar, hostNetwork, nil, false, sidecar},
	} {
		got, err := choose(c.asked, c.pod, "argo", c.labels, c.service)
		if err != nil || got != c.want {
			t.Errorf("%s: %s, %v; want %s", c.name, got, err, c.want)
		}
	}
}

// Replaced claims and placement need no label in watched namespaces.
func TestLocalityHandler(t *testing.T) {
	h := localityHandler(t, newWorld())
	ctx := context.Background()
	raw := readPod(t, "argo-v3.7")
	r := h.Handle(ctx, request("argo", raw))
	after := apply(t, raw, r)
	golden(t, "argo-locality", r)
	if again := h.Handle(ctx, request("argo", after)); len(again.Patches) > 0 {
		t.Errorf("patched again: %v", again.Patches)
	}
	if r := h.Handle(ctx, request("argo", readPod(t, "argo-v3.7", inject("csi")))); len(r.Patches) > 0 {
		t.Error("a labelled pod is the other endpoint's")
	}
	if r := h.Handle(ctx, request("argo", readPod(t, "argo-v3.7", mounts("genomes=/x")))); len(r.Warnings) != 1 {
		t.Errorf("an annotation without a label: warnings %v", r.Warnings)
	}
	if r := h.Handle(ctx, request("elsewhere", raw)); len(r.Patches) > 0 {
		t.Errorf("a claim of another namespace is replaced: %v", r.Patches)
	}
	if r := h.Handle(ctx, request("argo", []byte("{"))); !r.Allowed {
		t.Error("what cannot be read is refused")
	}
	// A writable Dataset's claim would be read-only: the pod keeps what it has, and its author is told.
	writable := newWorld()
	writable.datasets[0].Spec.Access = v1alpha1.ReadWrite
	r = localityHandler(t, writable).Handle(ctx, request("argo", raw))
	if pod := decodePod(t, apply(t, raw, r)); pod.Spec.Volumes[2].PersistentVolumeClaim.ClaimName != "oss-data" {
		t.Errorf("the claim is replaced: %+v", pod.Spec.Volumes[2])
	}
	if len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "access: ReadWrite") {
		t.Errorf("warnings %q", r.Warnings)
	}
	if len(r.Patches) > 0 {
		t.Errorf("a pod that reads nothing of the Dataset is placed: %v", r.Patches)
	}
	// Without a node service the claim that the pod has works, and ours would not.
	w := newWorld()
	w.service = false
	r = localityHandler(t, w).Handle(ctx, request("argo", raw))
	if pod := decodePod(t, apply(t, raw, r)); pod.Spec.Volumes[2].PersistentVolumeClaim.ClaimName != "oss-data" {
		t.Errorf("the claim is replaced: %+v", pod.Spec.Volumes[2])
	}
}

// A workflow that worked with the claim that it has is not stopped by a Dataset that does not work yet, or no more.
func TestOnlyDatasetsThatServeReplaceClaims(t *testing.T) {
	for phase, want := range map[v1alpha1.DatasetPhase]bool{
		"": false, v1alpha1.DatasetPending: false, v1alpha1.DatasetFailed: false, v1alpha1.DatasetDeleting: false,
		v1alpha1.DatasetReady: true, v1alpha1.DatasetDegraded: true,
	} {
		w := newWorld()
		w.datasets[0].Status.Phase, w.datasets[0].Spec.Locality = phase, v1alpha1.LocalityRequire
		raw := readPod(t, "argo-v3.7")
		r := localityHandler(t, w).Handle(t.Context(), request("argo", raw))
		claim := decodePod(t, apply(t, raw, r)).Spec.Volumes[2].PersistentVolumeClaim.ClaimName
		if want {
			if claim != "genomes" || len(r.Warnings) > 0 {
				t.Errorf("phase %q: claim %s, warnings %q", phase, claim, r.Warnings)
			}
			continue
		}
		if len(r.Patches) > 0 {
			t.Errorf("phase %q: patched: %v", phase, r.Patches)
		}
		says := []string{"Dataset argo/genomes", string(cmp.Or(phase, v1alpha1.DatasetPending)), "the pod keeps the claim that it has"}
		if len(r.Warnings) != 1 || slices.ContainsFunc(says, func(s string) bool { return !strings.Contains(r.Warnings[0], s) }) {
			t.Errorf("phase %q: warnings %q, want %q", phase, r.Warnings, says)
		}
	}
}

// One whose only worker is away for a moment is waited for: the pod may have no other claim.
func TestADatasetThatServedAMomentAgoReplacesClaims(t *testing.T) {
	for _, c := range []struct {
		name     string
		snapshot string
		since    time.Duration
		taken    bool
		want     string
	}{
		{"just now", "5e1d", time.Second, false, "genomes"},
		{"for long", "5e1d", time.Hour, false, "oss-data"},
		{"it never served", "", time.Second, false, "oss-data"},
		{"its claim is somebody else's", "5e1d", time.Second, true, "oss-data"},
	} {
		w := newWorld()
		w.datasets[0].Status = v1alpha1.DatasetStatus{Phase: v1alpha1.DatasetPending, Snapshot: c.snapshot, Conditions: []metav1.Condition{{
			Type: v1alpha1.ConditionReady, Status: metav1.ConditionFalse, LastTransitionTime: metav1.NewTime(time.Now().Add(-c.since)),
		}}}
		if c.taken {
			takenName(w)
		}
		raw := readPod(t, "argo-v3.7")
		r := localityHandler(t, w).Handle(t.Context(), request("argo", raw))
		if claim := decodePod(t, apply(t, raw, r)).Spec.Volumes[2].PersistentVolumeClaim.ClaimName; claim != c.want {
			t.Errorf("%s: claim %s", c.name, claim)
		}
	}
}

// A node that is made for one pod mounts no Dataset and holds nothing: the pod keeps its claim, and goes where it
// would go without us.
func TestServerlessPodsKeepTheirClaims(t *testing.T) {
	none := func(map[string]any) {}
	for _, c := range []struct {
		name   string
		change func(map[string]any)
		labels map[string]string // the namespace's
	}{
		{"ECI", put("labels", "alibabacloud.com/eci", "true"), nil},
		{"Fargate", put("labels", "eks.amazonaws.com/fargate-profile", "steps"), nil},
		{"ECI namespace", none, map[string]string{"alibabacloud.com/eci": "true"}},
	} {
		w := newWorld()
		w.namespaces["argo"] = c.labels
		w.datasets[0].Spec.Locality = v1alpha1.LocalityRequire
		h := localityHandler(t, w)
		r := h.Handle(t.Context(), request("argo", readPod(t, "argo-v3.7", c.change)))
		if !r.Allowed || len(r.Patches) > 0 {
			t.Errorf("%s: patched: %v %v", c.name, r.Patches, r.Result)
		}
		if len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "the pod keeps the claim that it has") {
			t.Errorf("%s: warnings %q", c.name, r.Warnings)
		}
		raw := readPod(t, "plain", inject("stage"), c.change)
		if pod := decodePod(t, apply(t, raw, injectHandler(t, w).Handle(t.Context(), request("argo", raw)))); pod.Spec.Affinity != nil {
			t.Errorf("%s: a staged pod is drawn to %+v", c.name, pod.Spec.Affinity)
		}
		// Nor is a step that loads artifacts drawn anywhere.
		w.datasets = append(w.datasets, dataset("argo", "results", func(d *v1alpha1.Dataset) { d.Spec.Access = v1alpha1.ReadWrite }))
		h.Holdings.set(types.NamespacedName{Namespace: "argo", Name: "results"}, &holding{members: members("n1", "n2")})
		step := map[string]any{}
		if err := json.Unmarshal(stepPod(t, "results-s3.argo.svc:9000", "results", "out"), &step); err != nil {
			t.Fatal(err)
		}
		c.change(step)
		if raw, err := json.Marshal(step); err != nil {
			t.Fatal(err)
		} else if r := h.Handle(t.Context(), request("argo", raw)); len(r.Patches) > 0 {
			t.Errorf("%s: a step that loads artifacts is patched: %v", c.name, r.Patches)
		}
	}
}

// A step that runs on Windows has its claim's data by SMB, say.
func TestWindowsPodsKeepTheirClaims(t *testing.T) {
	spec := func(key string, value any) func(map[string]any) {
		return func(pod map[string]any) { pod["spec"].(map[string]any)[key] = value }
	}
	required := func(system string) func(map[string]any) {
		return spec("affinity", map[string]any{"nodeAffinity": map[string]any{"requiredDuringSchedulingIgnoredDuringExecution": map[string]any{"nodeSelectorTerms": []any{
			map[string]any{"matchExpressions": []any{map[string]any{"key": "kubernetes.io/os", "operator": "In", "values": []any{system}}}},
		}}}})
	}
	for _, c := range []struct {
		name   string
		change func(map[string]any)
		claim  string
	}{
		{"its own word", spec("os", map[string]any{"name": "windows"}), "oss-data"},
		{"selector", spec("nodeSelector", map[string]any{"kubernetes.io/os": "windows"}), "oss-data"},
		{"affinity", required("windows"), "oss-data"},
		{"Linux by its own word", spec("os", map[string]any{"name": "linux"}), "genomes"},
		{"Linux by selector", spec("nodeSelector", map[string]any{"kubernetes.io/os": "linux"}), "genomes"},
		{"Linux by affinity", required("linux"), "genomes"},
	} {
		raw := readPod(t, "argo-v3.7", c.change)
		r := localityHandler(t, newWorld()).Handle(t.Context(), request("argo", raw))
		if claim := decodePod(t, apply(t, raw, r)).Spec.Volumes[2].PersistentVolumeClaim.ClaimName; claim != c.claim {
			t.Errorf("%s: claim %s", c.name, claim)
		}
		if c.claim == "genomes" {
			continue
		}
		if len(r.Patches) > 0 || len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "Windows") {
			t.Errorf("%s: patched %v, warnings %q", c.name, r.Patches, r.Warnings)
		}
	}
}

var _ admission.Handler = (*Locality)(nil)
