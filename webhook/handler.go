package webhook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// Paths of the endpoints.
const (
	PathInject   = "/inject"   // pods that ask for data
	PathLocality = "/locality" // pods of workflows that do not
	PathValidate = "/validate" // Datasets and DataLoads
)

// Inject answers PathInject.
type Inject struct {
	*Injector
	*Placer
	Logger *slog.Logger
}

// Handle implements admission.Handler.
func (h *Inject) Handle(ctx context.Context, r admission.Request) admission.Response {
	p, err := podOf(r)
	if p == nil {
		return refused(err)
	}
	defer func() { count(PathInject, p, err) }()
	needs, warnings, err := h.Injector.Inject(ctx, r.Namespace, p)
	if err != nil {
		if !errors.As(err, &denied{}) {
			h.Logger.Error("a pod could not be given its data", "pod", named(r, p.pod), "reason", err)
		}
		return refused(err)
	}
	warnings = append(warnings, draw(ctx, h.Injector, h.Placer, r.Namespace, p, needs)...)
	return admission.Patched("", p.ops...).WithWarnings(warnings...)
}

// Locality answers PathLocality. It lets every pod in: an answer that is an error refuses a pod whatever the
// configuration's failure policy, so there is none.
type Locality struct {
	*Injector
	*Placer
	Logger *slog.Logger
}

// Handle implements admission.Handler.
func (h *Locality) Handle(ctx context.Context, r admission.Request) admission.Response {
	p, _ := podOf(r)
	if p == nil {
		return admission.Allowed("")
	}
	if _, ok, _ := asks(p.pod); ok {
		return admission.Allowed("") // PathInject's
	}
	var err error
	defer func() { count(PathLocality, p, err) }()
	var warnings []string
	if _, ok := p.pod.Annotations[v1alpha1.AnnotationMounts]; ok {
		warnings = append(warnings, fmt.Sprintf("annotation %s has no effect without label %s", v1alpha1.AnnotationMounts, v1alpha1.LabelInject))
		delete(p.pod.Annotations, v1alpha1.AnnotationMounts) // of this copy only
	}
	more, err := h.Replace(ctx, r.Namespace, p)
	warnings = append(warnings, more...)
	if err != nil {
		h.Logger.Error("claims of a pod are not replaced", "pod", named(r, p.pod), "reason", err)
		return admission.Allowed("").WithWarnings(warnings...)
	}
	needs, err := h.needs(ctx, r.Namespace, p.pod)
	if err == nil {
		needs = slices.DeleteFunc(needs, func(n *need) bool { return kept(p.pod, n) })
		warnings = append(warnings, draw(ctx, h.Injector, h.Placer, r.Namespace, p, needs)...)
	}
	return admission.Patched("", p.ops...).WithWarnings(warnings...)
}

// draw places a pod on the nodes that hold what it reads, unless it runs on one that is made for it and holds
// nothing.
func draw(ctx context.Context, j *Injector, l *Placer, namespace string, p *patch, needs []*need) (warnings []string) {
	labels, err := j.Cluster.NamespaceLabels(ctx, namespace)
	if err != nil || serverless(p.pod, labels) {
		return nil
	}
	return l.Place(ctx, namespace, p, j.loads(ctx, namespace, p.pod, needs))
}

// podOf reads the pod of a request; nil where there is nothing to do, with an error if it cannot be read.
func podOf(r admission.Request) (*patch, error) {
	if r.Operation != admissionv1.Create || r.SubResource != "" {
		return nil, nil
	}
	pod := &corev1.Pod{}
	if err := json.Unmarshal(r.Object.Raw, pod); err != nil {
		return nil, fmt.Errorf("the pod cannot be read: %w", err)
	}
	return &patch{pod: pod}, nil
}

// refused answers with a denial, or lets the request in where there is no error.
func refused(err error) admission.Response {
	switch {
	case err == nil:
		return admission.Allowed("")
	case errors.As(err, &denied{}):
		return admission.Denied("stepcache: " + err.Error())
	}
	return failed(err)
}

// failed answers that this webhook, not the request, is at fault. Argo tries again on this status.
func failed(err error) admission.Response {
	return admission.Errored(http.StatusServiceUnavailable, fmt.Errorf("stepcache: %w", err))
}

func named(r admission.Request, pod *corev1.Pod) string {
	name := pod.Name
	if name == "" {
		name = pod.GenerateName + "…"
	}
	return r.Namespace + "/" + name
}
