package lint

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
)

func (w *workflow) check() (all []*finding) {
	for _, t := range w.templates {
		all = append(all, w.outputs(t)...)
		all = append(all, w.inputs(t)...)
		for _, s := range t.steps() {
			all = append(all, w.fanOut(t, s)...)
		}
	}
	return append(all, w.arguments()...)
}

func report(line int, severity Severity, rule, format string, args ...any) *finding {
	return &finding{Finding: Finding{Line: line, Rule: rule, Severity: severity, Message: fmt.Sprintf(format, args...)}}
}

func unknown(s string) bool { return strings.Contains(s, "{{") }

// outputs checks how a template's output artifacts are packed and where they lie.
func (w *workflow) outputs(t *template) (all []*finding) {
	if !t.body.ok() {
		return nil
	}
	for _, a := range t.in("outputs", "artifacts").items() {
		p := a.get("path").str()
		if p == "" {
			continue
		}
		archive := a.get("archive")
		tar, level := archive.get("tar"), archive.in("tar", "compressionLevel")
		if !archive.ok() || tar.ok() && !level.ok() {
			f := report(a.line(), Warning, Gzip, "output %q is packed with tar and gzip, by one thread at some 30 MB/s: say archive: {tar: {compressionLevel: 0}} to pack it without compressing, with permissions and links; {none: {}} packs nothing, but the inputs that read it then need a mode, for a directory with recurseMode: true", a.get("name").str())
			// Only this leaves what the inputs get as it was, whoever reads them.
			c := change{to: a, key: "archive", after: []string{"path", "name"}, value: "{tar: {compressionLevel: 0}}", json: `{"tar": {"compressionLevel": 0}}`}
			if tar.ok() {
				c = change{to: tar, key: "compressionLevel", value: "0", json: "0"}
			}
			f.changes = []change{c}
			all = append(all, f)
		}
		if !level.ok() || level.str() == "0" { // else gzip is wanted
			all = append(all, w.volume(t, a, p)...)
		}
	}
	return all
}

// volume checks that an output lies in a volume.
func (w *workflow) volume(t *template, a at, p string) []*finding {
	if !path.IsAbs(p) || unknown(p) {
		return nil
	}
	for _, m := range t.mounts() {
		if unknown(m) || below(p, m) {
			return nil
		}
	}
	for _, in := range t.in("inputs", "artifacts").items() {
		if q := in.get("path").str(); q != "" && below(p, q) {
			return nil // where an input lies is a volume
		}
	}
	const scratch = "/tmp"
	parent := path.Dir(path.Clean(p))
	f := report(a.line(), Warning, Volume, "output %q (%s) lies in no volume of the template, so the step packs it with gzip, whatever archive says, and it is copied once before it is saved: ", a.get("name").str(), p)
	switch {
	case below(p, scratch):
		f.Message += "mount an emptyDir at /tmp (if the image has nothing there that the step needs), from which it is saved directly"
		name := "tmp"
		for slices.Contains(w.volumeNames(t), name) {
			name += "-artifacts"
		}
		f.changes = []change{
			addTo(t.at, "volumes", []string{"name"}, fmt.Sprintf("{name: %s, emptyDir: {}}", name), fmt.Sprintf(`{"name": %q, "emptyDir": {}}`, name)),
			addTo(t.body, "volumeMounts", []string{"image", "name"}, fmt.Sprintf("{name: %s, mountPath: %s}", name, scratch), fmt.Sprintf(`{"name": %q, "mountPath": %q}`, name, scratch)),
		}
		if slices.ContainsFunc(f.changes, func(c change) bool { return c.to.n == nil }) {
			f.changes = nil
		}
		if other := t.unaccounted(scratch); other != "" {
			f.Message += fmt.Sprintf("; the step names %s, which the emptyDir would hide if it is the image's", other)
			f.changes = nil
		}
		for _, in := range t.in("inputs", "artifacts").items() {
			if q := in.get("path").str(); unknown(q) || below(q, scratch) && path.Dir(path.Clean(q)) != scratch {
				f.Message += fmt.Sprintf("; first move the input %q right into /tmp or out of it, since Argo makes the folder of an input in a volume 0700, which a step that is not root cannot enter", in.get("name").str())
				f.changes = nil
				break
			}
		}
	case parent == "/":
		f.Message += "write it below /tmp or another folder, and mount an emptyDir there"
	default:
		f.Message += fmt.Sprintf("mount an emptyDir at %s (if the image has nothing there), or write it below /tmp and mount one there", parent)
	}
	return []*finding{f}
}

// addTo adds an item to the list of a mapping's key, which it makes where there is none.
func addTo(m at, key string, after []string, item, json string) change {
	list := m.get(key)
	switch {
	case !list.ok():
		return change{to: m, key: key, after: after, value: "[" + item + "]", json: "[" + json + "]"}
	case list.empty():
		return change{} // a key without a value: nothing to add to, nothing to make
	}
	return change{to: list, value: item, json: json}
}

// inputs checks directories without a mode, and inputs from a bucket that could be mounted.
func (w *workflow) inputs(t *template) (all []*finding) {
	for _, a := range t.in("inputs", "artifacts").items() {
		p, l, name := a.get("path").str(), location(a), a.get("name").str()
		if p == "" {
			continue
		}
		directory := strings.HasSuffix(p, "/") || strings.HasSuffix(l.get("key").str(), "/") || t.directories[name] || a.get("recurseMode").str() == "true"
		if directory && !a.get("mode").ok() {
			f := report(a.line(), Warning, Mode, "input %q is a directory without a mode: Argo then makes it 0666 (plugins) or 0700 (S3), which a step that is not root cannot enter: add mode: 0755", name)
			f.changes = []change{{to: a, key: "mode", after: []string{"path", "name"}, value: "0755", json: "493"}}
			all = append(all, f)
		}
		if f := w.mountable(a, t.fanOut); f != nil {
			all = append(all, f)
		}
	}
	return all
}

// arguments checks the artifacts that a workflow is submitted with.
func (w *workflow) arguments() (all []*finding) {
	for _, a := range w.spec.in("arguments", "artifacts").items() {
		if f := w.mountable(a, false); f != nil {
			all = append(all, f)
		}
	}
	return all
}

// mountable finds an input that comes from a bucket and not from a step.
func (w *workflow) mountable(a at, fanOut bool) *finding {
	l := location(a)
	key := l.get("key").str()
	if key == "" || strings.HasPrefix(key, "{{") {
		return nil
	}
	for _, t := range w.templates {
		for _, out := range t.in("outputs", "artifacts").items() {
			k := location(out).get("key").str()
			if k != "" && (below(key, k) || below(k, key)) {
				return nil // another step made it
			}
		}
	}
	who := "each pod that uses it"
	if fanOut {
		who = "every pod of a fan-out"
	}
	return report(a.line(), Note, Claim, "input %q (%s) is copied into %s before the step begins: if its bucket is a Dataset, mount the claim of the Dataset's name instead (volumes: persistentVolumeClaim) and read it in place", a.get("name").str(), key, who)
}

var resultOf = regexp.MustCompile(`\{\{-?\s*=?\s*(?:steps|tasks)(?:\.([A-Za-z0-9_-]+)|\[['"]([^'"]+)['"]\])\.outputs\.result\b`)

// fanOut checks where the list of a fan-out comes from.
func (w *workflow) fanOut(t *template, step at) []*finding {
	list := step.get("withParam")
	m := resultOf.FindStringSubmatch(list.str())
	if m == nil {
		return nil
	}
	for _, s := range t.steps() {
		if n := s.get("name").str(); n != m[1]+m[2] {
			continue
		}
		if p := w.target(s); p != nil && p.body.ok() {
			return []*finding{report(list.line(), Note, Stdout, "the list of this fan-out is the standard output of step %q, of which only the last 256 KB are kept, and it lies in the Workflow, which holds 1 MB: print few, short items (shards, ranges) and let each step find its files in the Dataset, or list them with a data template", m[1]+m[2])}
		}
	}
	return nil
}
