package manifest

import (
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestAwkwardYAMLAccepted(t *testing.T) {
	for name, manifest := range map[string]string{
		"empty documents":         "---\n---\n# nothing\n---\n" + dataset + "---\n\n---\n",
		"separator with comment":  dataset + "--- # the load\n" + load,
		"text on the separator":   "--- {apiVersion: v1, kind: ConfigMap}\n--- \n" + dataset,
		"directive":               "%YAML 1.1\n---\n" + dataset,
		"end of document":         dataset + "...\n" + load,
		"end, then separator":     dataset + "...\n---\n" + load,
		"carriage returns":        strings.ReplaceAll(dataset+"---\n"+load, "\n", "\r\n"),
		"byte order mark":         "\ufeff" + dataset,
		"no final line end":       strings.TrimSuffix(dataset, "\n"),
		"anchors":                 strings.Replace(dataset, "genomes}", "genomes, labels: &l {a: b}, annotations: *l}", 1),
		"merge key":               strings.Replace(dataset, "{memory: 64Mi}", "{<<: {memory: 64Mi}, replicas: 2}", 1),
		"JSON as YAML":            `{"apiVersion":"v1","kind":"ConfigMap"}` + "\n---\n" + dataset,
		"separator in text":       "apiVersion: v1\nkind: ConfigMap\ndata:\n  a: |\n    ---\n    b\n---\n" + dataset,
		"dashes that are no mark": "apiVersion: v1\nkind: ConfigMap\n---a: b\n---\n" + dataset,
		"only ignored fields":     strings.Replace(dataset, "genomes}", "genomes}\nstatus: {phase: Whatever}", 1),
	} {
		t.Run(name, func(t *testing.T) {
			s, err := Parse("m.yaml", []byte(manifest))
			if err != nil {
				t.Fatal(err)
			}
			if len(s.Datasets) != 1 {
				t.Errorf("read %d Datasets", len(s.Datasets))
			}
		})
	}
	for _, nothing := range []string{"", "\n", "# only a comment\n", "---\n", "---\n---\n", "null\n", "%YAML 1.1\n---\n"} {
		if s, err := Parse("m.yaml", []byte(nothing)); err != nil || len(s.Datasets) != 0 {
			t.Errorf("%q: %+v, %v", nothing, s, err)
		}
	}
}

func TestAwkwardYAMLRefused(t *testing.T) {
	// Each level has ten of the one before: ten million values in all.
	bomb := "apiVersion: v1\nkind: ConfigMap\na0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
	for i := 1; i < 7; i++ {
		bomb += fmt.Sprintf("a%d: &a%d [%s]\n", i, i, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*a%d,", i-1), 10), ","))
	}
	long := strings.Repeat("y", 1<<17)
	for name, c := range map[string]struct{ manifest, want string }{
		"tab":                {dataset + "---\na:\n\tb: c\n", "line 9: found character that cannot start any token (indent with spaces, not tabs)"},
		"tab after key":      {"a: b\n\tc: d\n", "(indent with spaces, not tabs)"},
		"key twice":          {strings.Replace(dataset, "{memory: 64Mi}", "{memory: 64Mi, memory: 65Mi}", 1), `key "memory" already set in map`},
		"unclosed":           {"---\napiVersion: [\n", "not YAML: line 2"},
		"unknown anchor":     {"apiVersion: *nothing\n", "not YAML: unknown anchor"},
		"alias bomb":         {bomb, "alias"},
		"alias of much text": {"apiVersion: v1\nkind: ConfigMap\na: &a " + long + "\nb: [" + strings.TrimSuffix(strings.Repeat("*a,", 10000), ",") + "]\n", "aliases expand it beyond the 3 MiB"},
		"deep":               {"a: " + strings.Repeat("[", 20000) + "\n", "depth"},
		"huge":               {dataset + "---\napiVersion: v1\nkind: ConfigMap\ndata: {a: " + strings.Repeat("x", MaxDocument) + "}\n", "document 2 (line 8): the document is 3.0 MiB"},
		"zero byte":          {"apiVersion: v1\x00", "holds a zero byte"},
		"not UTF-8":          {"apiVersion: \xff\xfe\n", "not YAML"},
		"control character":  {"apiVersion: \x01\n", "control characters"},
		"not a number":       {strings.Replace(dataset, "64Mi", ".nan", 1), "m.yaml: document 1"},
		"infinite":           {strings.Replace(dataset, "64Mi", ".inf", 1), "m.yaml: document 1"},
		"key is a list":      {"[a]: b\n", "not YAML: a key is a map or a list, and must be text"},
		"Helm's value":       {strings.Replace(dataset, "64Mi", "{{ .Values.memory }}", 1), "not YAML: a key is a map or a list, and must be text (a value that begins with {{ needs quotes; a Helm chart must be rendered first)"},
		"Helm's condition":   {"{{- if .Values.cache }}\n" + dataset + "{{- end }}\n", "a Helm chart must be rendered first"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse("m.yaml", []byte(c.manifest))
			refused(t, err, c.want)
			if err != nil && len(err.Error()) > 4000 {
				t.Errorf("the error is %d bytes long", len(err.Error()))
			}
		})
	}
}

func TestErrorsStayReadable(t *testing.T) {
	long := strings.Repeat("é", 1<<17)
	for name, manifest := range map[string]string{
		"value": strings.Replace(dataset, "spec:", "spec:\n  access: "+long, 1),
		"field": strings.Replace(dataset, "spec:", "spec:\n  "+long[:100000]+": 1", 1),
		"name":  strings.Replace(dataset, "genomes", long, 1),
		"kind":  strings.Replace(dataset, "Dataset", long, 1),
		"many":  strings.Repeat(load+"---\n", 1000),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse("m.yaml", []byte(manifest))
			if err == nil {
				t.Fatal("accepted")
			}
			if n := len(err.Error()); n > 60*maxError || !utf8.ValidString(err.Error()) {
				t.Errorf("the error is %d bytes long", n)
			}
		})
	}
	_, err := Parse("m.yaml", []byte(strings.Repeat(load+"---\n", 1000)))
	refused(t, err, "and 949 more errors")
}

func TestJSONDocuments(t *testing.T) {
	s, err := Parse("m.json", []byte("\n{\"apiVersion\":\"v1\",\"kind\":\"ConfigMap\"}\n\n{\"apiVersion\":\"v1\",\"kind\":\"Pod\"}"))
	if err != nil || len(s.Ignored) != 2 {
		t.Errorf("%+v, %v", s, err)
	}
	_, err = Parse("m.json", []byte("{\"apiVersion\":\"v1\",\"kind\":\"Pod\"}\n\n{\"apiVersion\":\"v1\"}\n"))
	refused(t, err, "m.json: document 2 (line 3): not an object")
	_, err = Parse("m.json", []byte("{\"apiVersion\":\"v1\",\n\"kind\":}\n"))
	refused(t, err, "m.json: line 2: not JSON")
	_, err = Parse("m.json", []byte("{\"apiVersion\":"))
	refused(t, err, "m.json: line 1: not JSON: unexpected EOF")
	_, err = Parse("m.json", []byte(`{"kind":"Pod","apiVersion":"v1","kind":"Pod"}`))
	refused(t, err, `duplicate field "kind"; remove one`)
	_, err = Parse("m.json", []byte(`{"kind":"Pod","apiVersion":"v1","spec":{"a":1,"a":2}}`))
	refused(t, err, `duplicate field "spec.a"; remove one`)
	// What JSON has and YAML has not, in a file of either name.
	for _, name := range []string{"m.json", "m.yaml"} {
		s, err := Parse(name, []byte(`{"apiVersion":"data.stepcache.dev\/v1alpha1","kind":"Dataset","metadata":{"name":"genomes","annotations":{"a":"\ud83d\ude00"}},
			"spec":{"mounts":[{"source":"s3:\/\/bucket\/prefix\/"}],"workers":{"memory":"64Mi","replicas":2}}}`))
		if err != nil || len(s.Datasets) != 1 || s.Datasets[0].Spec.Mounts[0].Source != "s3://bucket/prefix/" || s.Datasets[0].Annotations["a"] != "😀" {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
	if s, err := Parse("m.json", nil); err != nil || len(s.Datasets) != 0 {
		t.Errorf("%+v, %v", s, err)
	}
}
