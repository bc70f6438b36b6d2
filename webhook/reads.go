package webhook

import (
	"path"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// maxText bounds the text of one pod that is searched for paths.
	maxText = 256 << 10
	// maxPaths bounds what is made of it.
	maxPaths = 256
)

// reads guesses which files and folders of a Dataset the pod reads, as patterns: what AnnotationStagePaths
// says; the input artifacts of a workflow's step; and paths below the Dataset's mounts that stand in
// commands, arguments, variables and scripts. A guess may be wrong, so that no more than a preference rests on it.
func reads(pod *corev1.Pod, namespace string, n *need) []string {
	var patterns []string
	add := func(p string) {
		if len(patterns) < maxPaths && !slices.Contains(patterns, p) {
			patterns = append(patterns, p)
		}
	}
	if asked, err := parseStagePaths(pod.Annotations[AnnotationStagePaths], namespace); err == nil {
		name := types.NamespacedName{Namespace: n.dataset.Namespace, Name: n.dataset.Name}
		for _, a := range asked {
			if a.dataset == name || a.dataset == (types.NamespacedName{}) {
				add(a.pattern)
			}
		}
	}
	s, _ := stepOf(pod)
	for _, o := range s.objects {
		for _, p := range o.in(n.dataset) {
			add(escapePattern(p))
		}
	}
	left := maxText
	search := func(text string, mounts map[string]string) {
		text = text[:min(len(text), left)]
		left -= len(text)
		for at, sub := range mounts {
			for _, rest := range pathsBelow(text, at) {
				add(escapePattern(path.Join("/", sub, rest)))
			}
		}
	}
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		mounts := make(map[string]string) // where to what folder of the Dataset
		for _, m := range c.VolumeMounts {
			for _, i := range n.volumes {
				if m.Name == pod.Spec.Volumes[i].Name && m.SubPathExpr == "" {
					mounts[path.Clean(m.MountPath)] = m.SubPath
				}
			}
		}
		if len(mounts) == 0 {
			continue
		}
		for _, text := range slices.Concat(c.Command, c.Args) {
			search(text, mounts)
		}
		for _, e := range c.Env {
			if e.Name != argoTemplate {
				search(e.Value, mounts)
			}
		}
		search(s.script, mounts)
	}
	return patterns
}

// pathsBelow finds the paths below a folder in a text, and returns what follows the folder. A path that goes
// on with something that only a shell can tell is left out.
func pathsBelow(text, folder string) []string {
	const (
		ends    = " \t\r\n\"'`;|&<>(),:="
		unknown = "$*?[]{}\\"
	)
	var found []string
	for from := 0; ; {
		i := strings.Index(text[from:], folder+"/")
		if i < 0 {
			return found
		}
		i += from
		from = i + len(folder) + 1
		if i > 0 && !strings.ContainsRune(ends, rune(text[i-1])) && text[i-1] != '[' && text[i-1] != '{' {
			continue // in the middle of another path
		}
		end := strings.IndexAny(text[from:], ends+unknown)
		if end < 0 {
			end = len(text) - from
		}
		rest := text[from : from+end]
		next := from + end
		if next < len(text) && strings.IndexByte(unknown, text[next]) >= 0 && text[next] != ']' && text[next] != '}' {
			continue
		}
		if rest = strings.Trim(path.Clean("/"+rest), "/"); rest != "" {
			found = append(found, rest)
		}
	}
}
