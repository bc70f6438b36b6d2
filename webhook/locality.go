package webhook

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

const (
	// maxNodes bounds how many nodes one pod's preferred affinity names.
	maxNodes = 64
	// maxRequired bounds how many its required affinity names: 16 KiB of every pod, at the longest names.
	maxRequired = 256
)

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
func (l *Placer) Place(ctx context.Context, namespace string, p *patch, needs []*need) (warnings []string) {
	if _, done := p.pod.Annotations[AnnotationPlaced]; done {
		return nil
	}
	if p.pod.Spec.NodeName != "" {
		return nil
	}
	sum, total := make(map[string]float64), 0.0
	var placed []string
	for _, n := range needs {
		if n.dataset.Spec.Locality == v1alpha1.LocalityNone {
			continue
		}
		share, bytes := l.share(ctx, n, reads(p.pod, namespace, n))
		if len(share) == 0 && n.dataset.Spec.Locality != v1alpha1.LocalityRequire {
			continue
		}
		placed = append(placed, n.String())
		total += bytes
		for host, bytes := range share {
			sum[host] += bytes
		}
	}
	required, warnings := l.required(ctx, needs)
	preferred := terms(sum, total)
	if len(required) == 0 && len(preferred) == 0 {
		return warnings
	}
	if len(required) > 0 {
		p.require(hostnames(required))
	}
	if len(preferred) > 0 {
		p.prefer(preferred)
	}
	p.annotate(AnnotationPlaced, strings.Join(placed, ","))
	return warnings
}

// required are the hosts on which the pod may run: those of all workers of each Dataset that wants it so, whatever the
// pod seems to read of it, since a guess must not keep a pod waiting. None: on all.
func (l *Placer) required(ctx context.Context, needs []*need) (hosts, warnings []string) {
	var by []string
	for _, n := range needs {
		if n.dataset.Spec.Locality != v1alpha1.LocalityRequire {
			continue
		}
		all := l.hosts(ctx, n.dataset)
		switch {
		case len(all) == 0:
			continue
		case len(all) > maxRequired:
			warnings = append(warnings, fmt.Sprintf("locality: Require of Dataset %s has no effect: its workers are on %d nodes, and a pod can be told no more than %d: the pod runs on any node",
				n, len(all), maxRequired))
			continue
		case len(by) > 0:
			all = slices.DeleteFunc(all, func(host string) bool { return !slices.Contains(hosts, host) })
		}
		if by = append(by, n.String()); len(all) == 0 {
			return nil, append(warnings, fmt.Sprintf("locality: Require of Datasets %s has no effect: no node has workers of all of them, so that the pod runs on any node: give them the same nodes by spec.workers.template.spec, or one of them locality: Prefer",
				strings.Join(by, " and ")))
		}
		hosts = all
	}
	return hosts, warnings
}

// hosts are the hostnames of the nodes with Ready workers of the Dataset, in order, of those that take pods.
func (l *Placer) hosts(ctx context.Context, d *v1alpha1.Dataset) []string {
	var all []string
	for _, node := range l.Holdings.Nodes(d) {
		if host, ok := l.Nodes.Hostname(ctx, node); ok {
			all = append(all, host)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// share is what each node that takes pods holds of a Dataset, by hostname.
func (l *Placer) share(ctx context.Context, n *need, patterns []string) (byHost map[string]float64, total float64) {
	byHost = make(map[string]float64)
	byNode, total := l.Holdings.Share(ctx, n.dataset, patterns)
	if len(n.keys) > 0 { // told for certain, while of a mount of such a Dataset no file is known
		byNode, total = l.Holdings.Names(n.dataset, n.keys)
	}
	for node, bytes := range byNode {
		if host, ok := l.Nodes.Hostname(ctx, node); ok && bytes > 0 {
			byHost[host] += bytes
		}
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
// term. Where all are too many, those of the least weights are left out, of one weight all: to name some of those that
// nothing sets apart would send the pods of all steps there, as the scheduler counts the greatest weight as 100.
func terms(byHost map[string]float64, total float64) []corev1.PreferredSchedulingTerm {
	var all []corev1.PreferredSchedulingTerm
	for _, host := range most(byHost) {
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
	left := maxNodes
	for i := range all {
		values := all[i].Preference.MatchExpressions[0].Values
		if left -= len(values); left < 0 {
			return all[:i]
		}
		slices.Sort(values)
	}
	return all
}

func hostnames(hosts []string) corev1.NodeSelectorRequirement {
	return corev1.NodeSelectorRequirement{Key: corev1.LabelHostname, Operator: corev1.NodeSelectorOpIn, Values: hosts}
}
