package stepcache_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/stepcache/stepcache/"

// mayImport says, for each folder, which folders of this module its packages may depend on, directly or
// not (CONTRIBUTING.md, "Import rules"). A folder's own sub-folders are always allowed. A folder that is
// not here may not exist.
var mayImport = map[string][]string{
	"api/v1alpha1": {},
	"api/manifest": {"api/v1alpha1"},
	"cache/source": {},
	// The conformance suite runs against the real S3 server.
	"cache/source/sourcetest": {"cache/source", "test/bucket", "local/process"},
	"cache/ring":              {"cache/source"},
	"cache/catalog":           {"cache/source", "cache/ring"},
	"cache/checksum":          {},
	"cache/meminfo":           {},
	"cache/store":             {"cache/meminfo", "cache/source", "cache/ring", "cache/checksum"},
	"cache/wire":              {"cache/source", "cache/ring", "cache/checksum"},
	"cache/objects":           {"cache/meminfo", "cache/source", "cache/ring", "cache/checksum", "cache/store", "cache/wire", "cache/gateway"},
	"cache/worker":            {"cache/meminfo", "cache/source", "cache/ring", "cache/checksum", "cache/catalog", "cache/store", "cache/wire", "cache/gateway", "cache/objects"},
	"cache/client":            {"cache/meminfo", "cache/source", "cache/ring", "cache/checksum", "cache/catalog", "cache/store", "cache/wire"},
	"cache/gateway":           {"cache/source"},
	"cache/mount":             {"cache/meminfo", "cache/source", "cache/ring", "cache/checksum", "cache/catalog", "cache/store", "cache/wire", "cache/client"},
	"tier":                    {"api", "cache"},
	"local":                   {"api", "cache", "tier"},
	"csi":                     {"api/v1alpha1", "cache"},
	"sidecar":                 {"api", "cache", "csi/broker", "csi/keeper", "csi/packets", "tier"},
	"webhook":                 {"api/v1alpha1", "cache"},
	"controllers":             {"api", "cache", "tier"},
	"artifact":                {"cache/source"},
	"lint":                    {},
	"config":                  {}, // tests only
	"test/bucket":             {"local/process"},
	"test/s3clients":          {},
	"test/ports":              {},
	"test/workers":            {"cache", "test/bucket", "test/ports", "local/process"},
	"test/e2e":                {"test/bucket", "local/process"},
	"bench":                   {"api", "cache", "tier", "local", "test"},
	"cmd":                     {""},
}

// The data path knows nothing of Kubernetes: it runs on one machine as it does on a cluster.
var notInCache = []string{"k8s.io/", "sigs.k8s.io/"}

func TestImportRules(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}} {{join .Deps " "}}`, "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	seen := 0
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		name, ok := strings.CutPrefix(fields[0], module)
		if !ok {
			continue // the root holds tests only
		}
		seen++
		folder, allowed := rule(name)
		if folder == "" {
			t.Errorf("%s: no rule for this folder; add one here and in CONTRIBUTING.md", name)
			continue
		}
		for _, dep := range fields[1:] {
			if of, ours := strings.CutPrefix(dep, module); ours && !below(of, folder) && !anyBelow(of, allowed) {
				t.Errorf("%s imports %s, which %s may not", name, of, folder)
			}
			for _, prefix := range notInCache {
				if below(name, "cache") && strings.HasPrefix(dep, prefix) {
					t.Errorf("%s imports %s: cache/... knows nothing of Kubernetes", name, dep)
				}
			}
		}
	}
	if seen < len(mayImport) {
		t.Errorf("go list named %d packages, fewer than there are rules (%d): a rule has no folder left", seen, len(mayImport))
	}
}

func rule(name string) (folder string, allowed []string) {
	for f, a := range mayImport {
		if below(name, f) && len(f) > len(folder) {
			folder, allowed = f, a
		}
	}
	return folder, allowed
}

func below(name, folder string) bool {
	return folder == "" || name == folder || strings.HasPrefix(name, folder+"/")
}

func anyBelow(name string, folders []string) bool {
	for _, f := range folders {
		if below(name, f) {
			return true
		}
	}
	return false
}

// A proxy in the environment is for buckets: it knows nothing of workers, whose connections to each other and to readers
// must not use it. net/http does unless it is given a transport of one's own.
func TestOnlyBucketsAreReachedThroughAProxy(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{$i := .ImportPath}}{{range .GoFiles}}{{$i}}/{{.}} {{end}}`, "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	seen := 0
	for _, file := range strings.Fields(string(out)) {
		file, ok := strings.CutPrefix(file, module)
		if !ok || anyBelow(file, []string{"cache/source", "test", "bench"}) {
			continue
		}
		seen++
		files := token.NewFileSet()
		parsed, err := parser.ParseFile(files, file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			proxies := ""
			switch n := n.(type) {
			case *ast.SelectorExpr:
				switch name := nameOf(n); name {
				case "http.ProxyFromEnvironment", "http.DefaultTransport", "http.DefaultClient", "http.Get", "http.Head", "http.Post", "http.PostForm", "minio.DefaultTransport":
					proxies = name
				}
			case *ast.CompositeLit:
				if name := nameOf(n.Type); (name == "http.Client" || name == "minio.Options") && !slices.ContainsFunc(n.Elts, func(e ast.Expr) bool {
					kv, ok := e.(*ast.KeyValueExpr)
					return ok && fmt.Sprint(kv.Key) == "Transport"
				}) {
					proxies = name + " without a Transport"
				}
			}
			if proxies != "" {
				t.Errorf("%s: %s uses the environment's proxy", files.Position(n.Pos()), proxies)
			}
			return true
		})
	}
	if seen < len(mayImport) {
		t.Errorf("go list named %d files, fewer than there are rules (%d)", seen, len(mayImport))
	}
}

// nameOf is package.name, or nothing.
func nameOf(e ast.Node) string {
	s, ok := e.(*ast.SelectorExpr)
	if !ok {
		return ""
	}
	return fmt.Sprintf("%v.%s", s.X, s.Sel.Name)
}
