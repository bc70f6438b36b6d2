package lint

import (
	"path"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// workflow is one object of Argo: its specification and the templates in it.
type workflow struct {
	spec      at
	templates []*template
	byName    map[string]*template
}

// template is one template, named or inline.
type template struct {
	at
	name string
	// body is the container, script or containerSet that writes its outputs; not ok for all others.
	body     at
	bodyKind string
	// fanOut is set where a step runs it more than once.
	fanOut bool
	// directories are input artifacts that a step passes a directory to.
	directories map[string]bool
	// defaults is the specification's templateDefaults.
	defaults at
}

// workflows finds the objects of Argo in a document, which may be a List.
func workflows(doc *yaml.Node, index int) (all []*workflow) {
	if len(doc.Content) == 0 {
		return nil
	}
	root := at{doc: index}.step(doc.Content[0], "", false)
	root.path = nil
	objects := []at{root}
	if root.get("kind").str() == "List" {
		objects = root.get("items").items()
	}
	for _, o := range objects {
		if !strings.HasPrefix(o.get("apiVersion").str(), "argoproj.io/") {
			continue
		}
		switch o.get("kind").str() {
		case "Workflow", "WorkflowTemplate", "ClusterWorkflowTemplate":
			all = append(all, newWorkflow(o.get("spec")))
		case "CronWorkflow":
			all = append(all, newWorkflow(o.in("spec", "workflowSpec")))
		}
	}
	return all
}

func newWorkflow(spec at) *workflow {
	w := &workflow{spec: spec, byName: map[string]*template{}}
	for _, t := range spec.get("templates").items() {
		w.add(t)
	}
	for _, t := range w.templates {
		for _, s := range t.steps() {
			w.follow(t, s)
		}
	}
	return w
}

func (w *workflow) add(a at) *template {
	t := &template{at: a, name: a.get("name").str(), directories: map[string]bool{}, defaults: w.spec.get("templateDefaults")}
	for _, kind := range []string{"container", "script", "containerSet"} {
		if b := a.get(kind); b.ok() && b.n.Kind == yaml.MappingNode {
			t.body, t.bodyKind = b, kind
		}
	}
	w.templates = append(w.templates, t)
	if t.name != "" {
		w.byName[t.name] = t
	}
	for _, s := range t.steps() {
		if inline := s.get("inline"); inline.ok() {
			w.add(inline)
		}
	}
	return t
}

// steps are the steps or tasks of a template.
func (t *template) steps() (all []at) {
	for _, group := range t.get("steps").items() {
		if group.n.Kind == yaml.MappingNode { // Argo takes a step without its list, too
			all = append(all, group)
		}
		all = append(all, group.items()...)
	}
	return append(all, t.in("dag", "tasks").items()...)
}

var fromStep = regexp.MustCompile(`^\{\{-?\s*(?:steps|tasks)\.([^.}\s]+)\.outputs\.artifacts\.([^.}\s]+)\s*-?\}\}$`)

// follow notes what a step says about the template that it runs.
func (w *workflow) follow(t *template, step at) {
	target := w.target(step)
	if target == nil {
		return
	}
	for _, k := range []string{"withItems", "withParam", "withSequence"} {
		if !step.get(k).empty() {
			target.fanOut = true
		}
	}
	for _, a := range step.in("arguments", "artifacts").items() {
		m := fromStep.FindStringSubmatch(strings.TrimSpace(a.get("from").str()))
		if m == nil {
			if strings.HasSuffix(location(a).get("key").str(), "/") {
				target.directories[a.get("name").str()] = true
			}
			continue
		}
		for _, s := range t.steps() {
			if s.get("name").str() != m[1] {
				continue
			}
			if p := w.target(s); p != nil && p.outputIsDirectory(m[2]) {
				target.directories[a.get("name").str()] = true
			}
		}
	}
}

// target is the template that a step runs, where it is in this document.
func (w *workflow) target(step at) *template {
	if inline := step.get("inline"); inline.ok() {
		for _, t := range w.templates {
			if t.n == inline.n {
				return t
			}
		}
	}
	return w.byName[step.get("template").str()]
}

// location is the part of an artifact that says where it is kept.
func location(a at) at {
	for _, kind := range []string{"s3", "oss", "gcs", "azure", "plugin", "hdfs", "artifactory"} {
		if l := a.get(kind); l.ok() {
			return l
		}
	}
	return at{}
}

// mounts are the paths of the volumes in a template's main container.
func (t *template) mounts() (paths []string) {
	for _, body := range []at{t.body, t.defaults.get(t.bodyKind)} {
		for _, m := range body.get("volumeMounts").items() {
			if p := m.get("mountPath").str(); p != "" {
				paths = append(paths, p)
			}
		}
	}
	return paths
}

// volumeNames are the names that a template's volumes have.
func (w *workflow) volumeNames(t *template) (names []string) {
	for _, list := range []at{w.spec.get("volumes"), w.spec.get("volumeClaimTemplates"), t.get("volumes"), t.defaults.get("volumes")} {
		for _, v := range list.items() {
			names = append(names, v.get("name").str(), v.in("metadata", "name").str())
		}
	}
	return names
}

// below says whether a path is a folder or lies in it.
func below(p, folder string) bool {
	p, folder = path.Clean(p), path.Clean(folder)
	return p == folder || folder == "/" || strings.HasPrefix(p, folder+"/")
}

// outputIsDirectory says whether an output is certainly a directory: its name or its key says so, it is a
// mount itself, or the step makes it.
func (t *template) outputIsDirectory(name string) bool {
	for _, a := range t.in("outputs", "artifacts").items() {
		p := a.get("path").str()
		if a.get("name").str() != name || p == "" {
			continue
		}
		if strings.HasSuffix(p, "/") || strings.HasSuffix(location(a).get("key").str(), "/") {
			return true
		}
		if slices.ContainsFunc(t.mounts(), func(m string) bool { return path.Clean(m) == path.Clean(p) }) {
			return true
		}
		q := regexp.QuoteMeta(p)
		made := regexp.MustCompile(`mkdir\s+(?:-\S+\s+)*["']?` + q + `/?["']?(?:[\s;&|)]|$)|(?:mkdir|makedirs)\(\s*["']` + q + `/?["']`)
		return made.MatchString(t.command())
	}
	return false
}

// command is all that a template runs, as text.
func (t *template) command() string {
	var b strings.Builder
	for _, k := range []string{"command", "args"} {
		for _, s := range t.body.get(k).items() {
			b.WriteString(s.str() + "\n")
		}
	}
	b.WriteString(t.body.get("source").str())
	return b.String()
}

// aPath is an absolute path in a command.
var aPath = regexp.MustCompile(`/[^\s"'\x60;&|<>(){}$,:=]+`)

// unaccounted is a path below a folder that a template's command names and that has to do with none of its outputs, inputs
// and mounts, so that it may be a file of the image; empty where there is none.
func (t *template) unaccounted(folder string) string {
	known := t.mounts()
	for _, kind := range []string{"outputs", "inputs"} {
		for _, a := range t.in(kind, "artifacts").items() {
			if p := a.get("path").str(); p != "" {
				known = append(known, p)
			}
		}
	}
	for _, p := range aPath.FindAllString(t.command(), -1) {
		if p = path.Clean(p); p == folder || !below(p, folder) {
			continue
		}
		if !slices.ContainsFunc(known, func(k string) bool { return below(p, k) || below(k, p) }) {
			return p
		}
	}
	return ""
}
