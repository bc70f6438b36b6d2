package lint

import (
	"slices"

	"go.yaml.in/yaml/v3"
)

// at is a place in a document: a node, the way to it, and whether other places share the node (through an
// anchor, an alias or a merge), so that a change here would be one there too.
type at struct {
	n      *yaml.Node
	doc    int
	path   []any // keys and indexes
	shared bool
}

func (a at) ok() bool { return a.n != nil }

func (a at) step(n *yaml.Node, key any, shared bool) at {
	shared = shared || a.shared
	for n != nil && n.Kind == yaml.AliasNode {
		n, shared = n.Alias, true
	}
	if n == nil {
		return at{}
	}
	return at{n, a.doc, append(slices.Clip(a.path), key), shared || n.Anchor != ""}
}

// get is the value of a mapping's key, its own or one merged in; not ok where there is none.
func (a at) get(key string) at {
	if !a.ok() || a.n.Kind != yaml.MappingNode {
		return at{}
	}
	var merged at
	for i := 0; i+1 < len(a.n.Content); i += 2 {
		k, v := a.n.Content[i], a.n.Content[i+1]
		if k.Value == key && k.Kind == yaml.ScalarNode {
			return a.step(v, key, false)
		}
		if k.Tag == "!!merge" || k.Value == "<<" && k.Style == 0 {
			if v.Kind == yaml.AliasNode {
				v = v.Alias
			}
			from := []*yaml.Node{v}
			if v.Kind == yaml.SequenceNode {
				from = v.Content
			}
			for _, n := range from {
				if n.Kind == yaml.AliasNode {
					n = n.Alias
				}
				if got := (at{n, a.doc, a.path, true}).get(key); got.ok() && !merged.ok() {
					merged = got
				}
			}
		}
	}
	return merged
}

func (a at) in(keys ...string) at {
	for _, k := range keys {
		a = a.get(k)
	}
	return a
}

// items are the elements of a sequence.
func (a at) items() (all []at) {
	if !a.ok() || a.n.Kind != yaml.SequenceNode {
		return nil
	}
	for i, n := range a.n.Content {
		all = append(all, a.step(n, i, false))
	}
	return all
}

// str is a scalar's text; empty for anything else.
func (a at) str() string {
	if !a.ok() || a.n.Kind != yaml.ScalarNode || a.n.Tag == "!!null" {
		return ""
	}
	return a.n.Value
}

// empty says that there is nothing: no such key, or one without a value.
func (a at) empty() bool { return !a.ok() || a.n.Tag == "!!null" }

func (a at) line() int { return a.n.Line }
