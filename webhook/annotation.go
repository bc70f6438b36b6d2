package webhook

import (
	"fmt"
	"iter"
	"path"
	"regexp"
	"strings"

	"k8s.io/apimachinery/pkg/types"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/catalog"
)

// Annotations of pods, besides v1alpha1.AnnotationMounts.
const (
	// AnnotationStagePaths is set by users: the patterns of files (as in a DataLoad) that the mode stage
	// copies, with commas between. One that begins with / is of every Dataset of the pod, NAME=/pattern of
	// one. It also tells locality what the pod reads.
	AnnotationStagePaths = v1alpha1.Group + "/stage-paths"
	// AnnotationInjected is set by the webhook: the mode in which the pod got its data.
	AnnotationInjected = v1alpha1.Group + "/injected"
	// AnnotationPlaced is set by the webhook on pods to whose node affinity it added: the Datasets.
	AnnotationPlaced = v1alpha1.Group + "/placed"
)

// annotationMount is one entry of AnnotationMounts.
type annotationMount struct {
	dataset types.NamespacedName
	path    string
}

var (
	datasetName   = regexp.MustCompile(`^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$`)
	namespaceName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
)

// parseMounts reads AnnotationMounts of a pod in the namespace. An error is for the author of the pod.
func parseMounts(value, namespace string) ([]annotationMount, error) {
	var all []annotationMount
	for entry := range strings.SplitSeq(value, ",") {
		if entry = strings.TrimSpace(entry); entry == "" {
			continue // a comma at the end
		}
		name, at, ok := strings.Cut(entry, "=")
		if !ok {
			return nil, badMounts("%q has no =", entry)
		}
		dataset, err := parseDataset(strings.TrimSpace(name), namespace)
		if err != nil {
			return nil, badMounts("%v", err)
		}
		at = strings.TrimSpace(at)
		switch {
		case !strings.HasPrefix(at, "/"):
			return nil, badMounts("the path %q of %s does not begin with /", at, name)
		case strings.Trim(at, "/") == "":
			return nil, badMounts("a Dataset cannot be mounted at /: choose a folder such as /data")
		case path.Clean(at) != strings.TrimSuffix(at, "/"):
			return nil, badMounts("the path %q has an empty, . or .. folder in it", at)
		case strings.ContainsFunc(at, func(r rune) bool { return r == ':' || r < ' ' || r == 0x7f }):
			return nil, badMounts("the path %q has a character that no mount path may have", at)
		}
		at = path.Clean(at)
		for _, o := range all {
			if o.path == at || below(o.path, at) || below(at, o.path) {
				return nil, badMounts("%s and %s overlap: give each Dataset a folder of its own", o.path, at)
			}
		}
		all = append(all, annotationMount{dataset, at})
	}
	if len(all) == 0 {
		return nil, badMounts("it names nothing")
	}
	return all, nil
}

func badMounts(format string, a ...any) error {
	return fmt.Errorf("annotation %s: %s; it is written NAME=/path or NAMESPACE/NAME=/path, with commas between",
		v1alpha1.AnnotationMounts, fmt.Sprintf(format, a...))
}

func parseDataset(name, namespace string) (types.NamespacedName, error) {
	if ns, n, ok := strings.Cut(name, "/"); ok {
		namespace, name = ns, n
	}
	if !namespaceName.MatchString(namespace) {
		return types.NamespacedName{}, fmt.Errorf("%q is not the name of a namespace", namespace)
	}
	if !datasetName.MatchString(name) {
		return types.NamespacedName{}, fmt.Errorf("%q is not the name of a Dataset", name)
	}
	return types.NamespacedName{Namespace: namespace, Name: name}, nil
}

// below says whether the path lies under the folder.
func below(folder, p string) bool {
	return folder == "/" || strings.HasPrefix(p, folder+"/")
}

// stagePath is one entry of AnnotationStagePaths; without a Dataset it is of all.
type stagePath struct {
	dataset types.NamespacedName
	pattern string
}

// parseStagePaths reads AnnotationStagePaths of a pod in the namespace.
func parseStagePaths(value, namespace string) ([]stagePath, error) {
	var all []stagePath
	for entry := range splitOutsideBraces(value) {
		if entry = strings.TrimSpace(entry); entry == "" {
			continue
		}
		var s stagePath
		s.pattern = entry
		if !strings.HasPrefix(entry, "/") {
			name, pattern, ok := strings.Cut(entry, "=")
			if !ok {
				return nil, badStagePaths("%q does not begin with /", entry)
			}
			var err error
			if s.dataset, err = parseDataset(strings.TrimSpace(name), namespace); err != nil {
				return nil, badStagePaths("%v", err)
			}
			s.pattern = strings.TrimSpace(pattern)
		}
		if err := checkPattern(s.pattern); err != nil {
			return nil, badStagePaths("%v", err)
		}
		all = append(all, s)
	}
	if len(all) == 0 {
		return nil, badStagePaths("it names nothing")
	}
	return all, nil
}

func badStagePaths(format string, a ...any) error {
	return fmt.Errorf("annotation %s: %s; it is written /pattern or NAME=/pattern, with commas between",
		AnnotationStagePaths, fmt.Sprintf(format, a...))
}

// splitOutsideBraces splits at commas that are not between braces, which have commas of their own.
func splitOutsideBraces(s string) iter.Seq[string] {
	return func(yield func(string) bool) {
		depth, from := 0, 0
		for i := 0; i < len(s); i++ {
			switch s[i] {
			case '\\':
				i++
			case '{':
				depth++
			case '}':
				depth--
			case ',':
				if depth <= 0 {
					if !yield(s[from:i]) {
						return
					}
					from = i + 1
				}
			}
		}
		yield(s[from:])
	}
}

func checkPattern(p string) error {
	switch {
	case !strings.HasPrefix(p, "/"):
		return fmt.Errorf("the pattern %q does not begin with /", p)
	case strings.Contains(p+"/", "/../") || strings.Contains(p+"/", "/./") || strings.Contains(p, "//"):
		return fmt.Errorf("the pattern %q has an empty, . or .. folder in it", p)
	case strings.ContainsFunc(p, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return fmt.Errorf("the pattern %q has a control character", p)
	}
	return catalog.CheckPattern(p)
}

// escapePattern makes a pattern of a path that matches just it.
func escapePattern(p string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`, `]`, `\]`, `{`, `\{`, `}`, `\}`).Replace(p)
}
