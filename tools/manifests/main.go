// Command manifests reads what config/ holds as an installation's own programs would, for the tests of
// config/: kustomize builds it, Prometheus parses its expressions and rules and applies its relabelling, and
// the operator's definitions say which fields there are.
//
//	manifests build DIR    the objects of a kustomization, as YAML; unknown fields of monitoring.coreos.com fail
//	manifests selectors    of a JSON list of PromQL expressions: the series that each asks for
//	manifests rules        checks a rule file
//	manifests relabel      of {"configs": [...], "targets": [{...}]}: the labels of each target, null if dropped
//
// All but build read standard input. It is a module of its own, since Prometheus and kustomize bring much with
// them that nothing else needs.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/relabel"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/parser"
	yamlv2 "gopkg.in/yaml.v2"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "manifests:", err)
		os.Exit(1)
	}
}

func run(args []string, in io.Reader, out io.Writer) error {
	switch {
	case len(args) == 2 && args[0] == "build":
		return build(args[1], out)
	case len(args) == 1 && args[0] == "selectors":
		return selectors(in, out)
	case len(args) == 1 && args[0] == "rules":
		b, err := io.ReadAll(in)
		if err != nil {
			return err
		}
		return rules(b)
	case len(args) == 1 && args[0] == "relabel":
		return relabelled(in, out)
	}
	return errors.New("usage: manifests build DIR | selectors | rules | relabel")
}

func build(dir string, out io.Writer) error {
	objects, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		return err
	}
	for _, o := range objects.Resources() {
		b, err := o.AsYAML()
		if err != nil {
			return err
		}
		if err := monitoring(o.GetKind(), b); err != nil {
			return fmt.Errorf("%s %s: %w", o.GetKind(), o.GetName(), err)
		}
	}
	b, err := objects.AsYaml()
	if err != nil {
		return err
	}
	_, err = out.Write(b)
	return err
}

// monitoring checks objects of the Prometheus operator.
func monitoring(kind string, b []byte) error {
	switch kind {
	case monitoringv1.PodMonitorsKind:
		return yaml.UnmarshalStrict(b, &monitoringv1.PodMonitor{})
	case monitoringv1.ServiceMonitorsKind:
		return yaml.UnmarshalStrict(b, &monitoringv1.ServiceMonitor{})
	case monitoringv1.PrometheusRuleKind:
		if err := yaml.UnmarshalStrict(b, &monitoringv1.PrometheusRule{}); err != nil {
			return err
		}
		var o struct{ Spec json.RawMessage }
		if err := yaml.Unmarshal(b, &o); err != nil {
			return err
		}
		return rules(o.Spec)
	}
	return nil
}

func rules(b []byte) error {
	groups, errs := rulefmt.Parse(b, false)
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if len(groups.Groups) == 0 {
		return errors.New("no groups of rules")
	}
	return nil
}

type matcher struct {
	Name, Type, Value string
}

type selector struct {
	Metric   string
	Matchers []matcher
	// By are the labels by which the results around it are grouped.
	By []string
}

func selectors(in io.Reader, out io.Writer) error {
	var exprs []string
	if err := json.NewDecoder(in).Decode(&exprs); err != nil {
		return err
	}
	all := make([][]selector, len(exprs))
	for i, e := range exprs {
		tree, err := parser.ParseExpr(e)
		if err != nil {
			return fmt.Errorf("%s: %w", e, err)
		}
		parser.Inspect(tree, func(n parser.Node, path []parser.Node) error {
			v, ok := n.(*parser.VectorSelector)
			if !ok {
				return nil
			}
			s := selector{Metric: v.Name, Matchers: []matcher{}, By: []string{}}
			for _, m := range v.LabelMatchers {
				if m.Name != labels.MetricName {
					s.Matchers = append(s.Matchers, matcher{m.Name, m.Type.String(), m.Value})
				}
			}
			// Only the innermost aggregation sees the series' own labels.
			for k := len(path) - 1; k >= 0; k-- {
				if a, ok := path[k].(*parser.AggregateExpr); ok {
					if !a.Without {
						s.By = append(s.By, a.Grouping...)
					}
					break
				}
			}
			all[i] = append(all[i], s)
			return nil
		})
	}
	return json.NewEncoder(out).Encode(all)
}

func relabelled(in io.Reader, out io.Writer) error {
	var q struct {
		Configs json.RawMessage
		Targets []map[string]string
	}
	if err := json.NewDecoder(in).Decode(&q); err != nil {
		return err
	}
	text, err := yaml.JSONToYAML(q.Configs)
	if err != nil {
		return err
	}
	var configs []*relabel.Config
	d := yamlv2.NewDecoder(bytes.NewReader(text))
	d.SetStrict(true)
	if err := d.Decode(&configs); err != nil {
		return err
	}
	for _, c := range configs {
		if err := c.Validate(); err != nil {
			return err
		}
	}
	var all []map[string]string
	for _, t := range q.Targets {
		l, keep := relabel.Process(labels.FromMap(t), configs...)
		if !keep {
			all = append(all, nil)
			continue
		}
		m := l.Map()
		for name := range m {
			if strings.HasPrefix(name, model.MetaLabelPrefix) {
				delete(m, name)
			}
		}
		all = append(all, m)
	}
	return json.NewEncoder(out).Encode(all)
}
