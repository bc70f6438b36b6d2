package webhook

import (
	"cmp"
	"context"
	"maps"
	"math"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// maxNodes bounds how many nodes one pod's affinity names.
const maxNodes = 64

// Nodes is what locality knows of nodes.
type Nodes interface {
	// Hostname is the value of a node's label kubernetes.io/hostname; false for a node that is not there, or
	// takes no pods.
	Hostname(ctx context.Context, node string) (string, bool)
}

// Placer draws pods to the nodes that hold their data.
type Placer struct {
	Nodes    Nodes
	Holdings *Holdings
}

// Place appends node affinity for the Datasets that the pod reads. It never fails: a pod that is not
// placed is only slower.
func (l *Placer) Place(ctx context.Context, namespace string, p *patch, needs []*need) {
	if _, done := p.pod.Annotations[AnnotationPlaced]; done {
		return
	}
	if p.pod.Spec.NodeName != "" {
		return
	}
	sum, total := make(map[string]float64), 0.0
	var placed []string
	for _, n := range needs {
		if n.dataset.Spec.Locality == v1alpha1.LocalityNone {
			continue
		}
		share, bytes := l.share(ctx, n, reads(p.pod, namespace, n))
		if len(share) == 0 {
			continue
		}
		placed = append(placed, n.String())
		total += bytes
		for host, bytes := range share {
			sum[host] += bytes
		}
		if n.dataset.Spec.Locality == v1alpha1.LocalityRequire {
			p.require(hostnames(slices.Sorted(maps.Keys(share))))
		}
	}
	if len(placed) == 0 {
		return
	}
	p.prefer(terms(sum, total))
	p.annotate(AnnotationPlaced, strings.Join(placed, ","))
}

// share is what each node that takes pods holds of a Dataset, by hostname, for the nodes that hold most.
func (l *Placer) share(ctx context.Context, n *need, patterns []string) (byHost map[string]float64, total float64) {
	byHost = make(map[string]float64)
	byNode, total := l.Holdings.Share(n.dataset, patterns)
	if len(n.keys) > 0 { // told for certain, while of a mount of such a Dataset no file is known
		byNode, total = l.Holdings.Names(n.dataset, n.keys)
	}
	for node, bytes := range byNode {
		if host, ok := l.Nodes.Hostname(ctx, node); ok && bytes > 0 {
			byHost[host] += bytes
		}
	}
	if len(byHost) <= maxNodes {
		return byHost, total
	}
	for _, host := range most(byHost)[maxNodes:] {
		delete(byHost, host)
	}
	return byHost, total
}

// most are the hosts, those that hold most first.
func most(byHost map[string]float64) []string {
	return slices.SortedFunc(maps.Keys(byHost), func(a, b string) int {
		return cmp.Or(cmp.Compare(byHost[b], byHost[a]), strings.Compare(a, b))
	})
}

// terms prefers each host by the share of the bytes that it holds, in percent; hosts of one weight are in one
// term.
func terms(byHost map[string]float64, total float64) []corev1.PreferredSchedulingTerm {
	var all []corev1.PreferredSchedulingTerm
	hosts := most(byHost)
	for _, host := range hosts[:min(len(hosts), maxNodes)] {
		w := int32(min(max(math.Round(100*byHost[host]/total), 1), 100))
		if last := len(all) - 1; last >= 0 && all[last].Weight == w {
			values := &all[last].Preference.MatchExpressions[0].Values
			*values = append(*values, host)
			continue
		}
		all = append(all, corev1.PreferredSchedulingTerm{Weight: w, Preference: corev1.NodeSelectorTerm{
			MatchExpressions: []corev1.NodeSelectorRequirement{hostnames([]string{host})},
		}})
	}
	for i := range all {
		slices.Sort(all[i].Preference.MatchExpressions[0].Values)
	}
	return all
}

func hostnames(hosts []string) corev1.NodeSelectorRequirement {
	return corev1.NodeSelectorRequirement{Key: corev1.LabelHostname, Operator: corev1.NodeSelectorOpIn, Values: hosts}
}
