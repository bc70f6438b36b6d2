package webhook

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
)

// Outcomes of a pod's admission, besides the mode in which it got its data.
const (
	outcomeUnchanged = "unchanged"
	outcomeReplaced  = "replaced" // claims
	outcomePlaced    = "placed"   // affinity alone
	outcomeDenied    = "denied"
	outcomeFailed    = "failed"
)

// pods is in the registry of the process, as the manager's own metrics are: latency and codes of calls are
// among those (controller_runtime_webhook_*).
var pods = prometheus.NewCounterVec(prometheus.CounterOpts{
	Name: "stepcache_webhook_pods_total",
	Help: "Pods that the webhook was asked about, by endpoint and what became of them: the mode in which they got their data, replaced, placed, unchanged, denied, failed.",
}, []string{"endpoint", "outcome"})

func init() {
	metrics.Registry.MustRegister(pods)
	// The series exist before the first of their kind, so that rates over them begin at zero.
	for _, o := range []string{string(csi), string(sidecar), string(stage), outcomeUnchanged, outcomeDenied, outcomeFailed} {
		pods.WithLabelValues(PathInject, o)
	}
	for _, o := range []string{outcomeReplaced, outcomePlaced, outcomeUnchanged, outcomeFailed} {
		pods.WithLabelValues(PathLocality, o)
	}
}

// count counts one pod by what the endpoint did to it.
func count(endpoint string, p *patch, err error) {
	outcome := outcomeUnchanged
	switch {
	case errors.As(err, &denied{}):
		outcome = outcomeDenied
	case err != nil:
		outcome = outcomeFailed
	case p == nil || len(p.ops) == 0:
	case p.pod.Annotations[AnnotationInjected] != "" && endpoint == PathInject:
		outcome = p.pod.Annotations[AnnotationInjected]
	case p.pod.Annotations[AnnotationInjected] != "":
		outcome = outcomeReplaced
	case p.pod.Annotations[AnnotationPlaced] != "":
		outcome = outcomePlaced
	}
	pods.WithLabelValues(endpoint, outcome).Inc()
}
