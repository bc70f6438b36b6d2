package lint_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/stepcache/stepcache/lint"
)

// found are findings as "LINE rule", with a + where they can be mended.
func found(t *testing.T, text string) ([]string, string) {
	t.Helper()
	r, err := lint.Check("w.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range r.Findings {
		s := strconv.Itoa(f.Line) + " " + f.Rule
		if f.Fixable {
			s += "+"
		}
		got = append(got, s)
	}
	holds(t, []byte(text), r)
	return got, string(r.Fixed)
}

// holds checks what must be true of every report: what is fixed has nothing left to fix, and is its own fix.
func holds(t *testing.T, text []byte, r lint.Report) {
	t.Helper()
	again, err := lint.Check("w.yaml", r.Fixed)
	if err != nil {
		t.Fatalf("the fixed file cannot be read: %v\n%s", err, r.Fixed)
	}
	if !bytes.Equal(again.Fixed, r.Fixed) {
		t.Errorf("a second fix changes more:\n%s", cmp.Diff(string(r.Fixed), string(again.Fixed)))
	}
	for _, f := range again.Findings {
		if f.Fixable {
			t.Errorf("fixable after the fix: %v", f)
		}
	}
	fixable := slices.ContainsFunc(r.Findings, func(f lint.Finding) bool { return f.Fixable })
	if changed := !bytes.Equal(text, r.Fixed); changed != fixable {
		t.Errorf("changed: %v, fixable findings: %v", changed, fixable)
	}
	if again.Workflows != r.Workflows || len(again.Findings) > len(r.Findings) {
		t.Errorf("%d workflows and %d findings became %d and %d", r.Workflows, len(r.Findings), again.Workflows, len(again.Findings))
	}
}

const head = `apiVersion: argoproj.io/v1alpha1
kind: Workflow
metadata: {generateName: w-}
spec:
  entrypoint: main
  templates:
`

// makesAndUses ends where the artifacts that its last template takes in begin.
const makesAndUses = head + `  - name: main
    steps:
    - - {name: make, template: make}
    - - name: use
        template: use
        arguments:
          artifacts:
          - {name: made, from: "{{steps.make.outputs.artifacts.dir}}"}
          - {name: file, from: "{{steps.make.outputs.artifacts.file}}"}
          - {name: parts, s3: {key: "{{workflow.name}}/parts/"}}
  - name: make
    script: {image: x, source: "mkdir -p /work/dir && touch /work/dir/a", volumeMounts: [{name: w, mountPath: /work}]}
    outputs: {artifacts: [{name: dir, path: /work/dir, archive: {none: {}}}, {name: file, path: /work/file, archive: {none: {}}}]}
  - name: use
    container: {image: x}
    inputs:
      artifacts:
`

func TestFix(t *testing.T) {
	for name, c := range map[string]struct {
		in, out string
		want    []string
	}{
		"block style": {
			head + `  # what this is for
  - name: main # the only one
    container:
      image: busybox # small

      command: [sh, -c, "echo > /tmp/out"]
    outputs:
      artifacts:
        # an output
        - name: out
          path: /tmp/out   # here
          # after it
        - {name: flow, path: '/tmp/it''s'}
`, head + `  # what this is for
  - name: main # the only one
    volumes: [{name: tmp, emptyDir: {}}]
    container:
      image: busybox # small
      volumeMounts: [{name: tmp, mountPath: /tmp}]

      command: [sh, -c, "echo > /tmp/out"]
    outputs:
      artifacts:
        # an output
        - name: out
          path: /tmp/out   # here
          archive: {tar: {compressionLevel: 0}}
          # after it
        - {name: flow, path: '/tmp/it''s', archive: {tar: {compressionLevel: 0}}}
`, []string{"16 gzip+", "16 volume+", "19 gzip+", "19 volume+"},
		},
		"lists that are there": {
			head + `  - name: main
    volumes:
    # the user's own
    - name: tmp
      emptyDir: {}
    script:
      image: busybox
      source: echo
      volumeMounts: [ {name: tmp, mountPath: /work} ]
    outputs: {artifacts: [{name: a, path: /work/a, archive: {none: {}}}, {name: b, path: /tmp/b, archive: {zip: {}}}]}
`, head + `  - name: main
    volumes:
    # the user's own
    - {name: tmp-artifacts, emptyDir: {}}
    - name: tmp
      emptyDir: {}
    script:
      image: busybox
      source: echo
      volumeMounts: [{name: tmp-artifacts, mountPath: /tmp},  {name: tmp, mountPath: /work} ]
    outputs: {artifacts: [{name: a, path: /work/a, archive: {none: {}}}, {name: b, path: /tmp/b, archive: {zip: {}}}]}
`, []string{"16 volume+"},
		},
		"tar that is asked for": {
			head + `  - name: main
    container: {image: x, volumeMounts: [{name: w, mountPath: /w}]}
    outputs:
      artifacts:
      - {name: a, path: /w/a, archive: {tar: {}}}
      - {name: b, path: /b, archive: {tar: {compressionLevel: 9}}}
      - name: c
        path: /c
        archive:
          tar: { }
      - {name: d, path: /d, archive: {tar: {compressionLevel: 0}}}
`, head + `  - name: main
    container: {image: x, volumeMounts: [{name: w, mountPath: /w}]}
    outputs:
      artifacts:
      - {name: a, path: /w/a, archive: {tar: {compressionLevel: 0}}}
      - {name: b, path: /b, archive: {tar: {compressionLevel: 9}}}
      - name: c
        path: /c
        archive:
          tar: {compressionLevel: 0 }
      - {name: d, path: /d, archive: {tar: {compressionLevel: 0}}}
`, []string{"11 gzip+", "13 gzip+", "13 volume", "17 volume"},
		},
		// What the next step gets is as it was: the tar keeps the executable's mode, a tarball within it is not
		// unpacked, and inputs that state their archive still find it.
		"outputs that the next step runs or unpacks": {
			head + `  - name: main
    steps:
    - - {name: build, template: build}
    - - {name: use, template: use, arguments: {artifacts: [{name: app, from: "{{steps.build.outputs.artifacts.app}}"}]}}
  - name: build
    container: {image: golang, command: [go, build, -o, /w/app, .], volumeMounts: [{name: w, mountPath: /w}]}
    outputs: {artifacts: [{name: app, path: /w/app}, {name: src, path: /w/src.tgz}]}
  - name: use
    container: {image: x, command: [/tmp/app]}
    inputs: {artifacts: [{name: app, path: /tmp/app, archive: {tar: {}}}]}
`, head + `  - name: main
    steps:
    - - {name: build, template: build}
    - - {name: use, template: use, arguments: {artifacts: [{name: app, from: "{{steps.build.outputs.artifacts.app}}"}]}}
  - name: build
    container: {image: golang, command: [go, build, -o, /w/app, .], volumeMounts: [{name: w, mountPath: /w}]}
    outputs: {artifacts: [{name: app, path: /w/app, archive: {tar: {compressionLevel: 0}}}, {name: src, path: /w/src.tgz, archive: {tar: {compressionLevel: 0}}}]}
  - name: use
    container: {image: x, command: [/tmp/app]}
    inputs: {artifacts: [{name: app, path: /tmp/app, archive: {tar: {}}}]}
`, []string{"13 gzip+", "13 gzip+"},
		},
		"directories without a mode": {
			makesAndUses + `      - {name: made, path: /in/made}
      - {name: file, path: /in/file}
      - {name: parts, path: /in/parts}
      - name: slash
        path: /in/slash/
      - {name: has, path: /in/has/, mode: 0700}
`, makesAndUses + `      - {name: made, path: /in/made, mode: 0755}
      - {name: file, path: /in/file}
      - {name: parts, path: /in/parts, mode: 0755}
      - name: slash
        path: /in/slash/
        mode: 0755
      - {name: has, path: /in/has/, mode: 0700}
`, []string{"24 mode+", "26 mode+", "27 mode+"},
		},
		"JSON": {
			`{"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "spec": {"templates": [
  {"name": "main", "container": {"image": "x"},
   "inputs": {"artifacts": [{"name": "d", "path": "/in/"}]},
   "outputs": {"artifacts": [{"name": "a", "path": "/tmp/a"}]}}]}}
`,
			`{"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "spec": {"templates": [
  {"name": "main", "volumes": [{"name": "tmp", "emptyDir": {}}], "container": {"image": "x", "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}]},
   "inputs": {"artifacts": [{"name": "d", "path": "/in/", "mode": 493}]},
   "outputs": {"artifacts": [{"name": "a", "path": "/tmp/a", "archive": {"tar": {"compressionLevel": 0}}}]}}]}}
`, []string{"3 mode+", "4 gzip+", "4 volume+"},
		},
		"JSON with escaped slashes": {
			`{"apiVersion": "argoproj.io\/v1alpha1", "kind": "Workflow", "spec": {"templates": [
  {"name": "main", "container": {"image": "a\/b", "args": ["\\/\"\/"]},
   "outputs": {"artifacts": [{"name": "a", "path": "\/tmp\/a"}, {"name": "b", "path": "\/tmp\/b"}]}}]}}
`,
			`{"apiVersion": "argoproj.io\/v1alpha1", "kind": "Workflow", "spec": {"templates": [
  {"name": "main", "volumes": [{"name": "tmp", "emptyDir": {}}], "container": {"image": "a\/b", "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}], "args": ["\\/\"\/"]},
   "outputs": {"artifacts": [{"name": "a", "path": "\/tmp\/a", "archive": {"tar": {"compressionLevel": 0}}}, {"name": "b", "path": "\/tmp\/b", "archive": {"tar": {"compressionLevel": 0}}}]}}]}}
`, []string{"3 gzip+", "3 volume+", "3 gzip+", "3 volume+"},
		},
		"inline templates, container sets and no name": {
			`apiVersion: argoproj.io/v1alpha1
kind: CronWorkflow
spec:
  workflowSpec:
    templates:
    - name: main
      dag:
        tasks:
        - name: a
          inline:
            containerSet:
              containers: [{name: main, image: x}]
            outputs: {artifacts: [{name: o, path: /tmp/o}]}
`, `apiVersion: argoproj.io/v1alpha1
kind: CronWorkflow
spec:
  workflowSpec:
    templates:
    - name: main
      dag:
        tasks:
        - name: a
          inline:
            volumes: [{name: tmp, emptyDir: {}}]
            containerSet:
              volumeMounts: [{name: tmp, mountPath: /tmp}]
              containers: [{name: main, image: x}]
            outputs: {artifacts: [{name: o, path: /tmp/o, archive: {tar: {compressionLevel: 0}}}]}
`, []string{"13 gzip+", "13 volume+"},
		},
		"several documents and a List, other objects between": {
			`kind: ConfigMap
data: {x: "outputs: {artifacts: [{name: a, path: /tmp/a}]}"}
---
apiVersion: argoproj.io/v1alpha1
kind: ClusterWorkflowTemplate
spec: {templates: [{name: m, container: {image: x, volumeMounts: [{name: w, mountPath: /w}]}, outputs: {artifacts: [{name: a, path: /w/a}]}}]}
---
---
apiVersion: v1
kind: List
items:
- apiVersion: argoproj.io/v1alpha1
  kind: WorkflowTemplate
  spec: {templates: [{name: m, container: {image: x, volumeMounts: [{name: w, mountPath: /w}]}, outputs: {artifacts: [{name: a, path: /w/a}]}}]}
`, `kind: ConfigMap
data: {x: "outputs: {artifacts: [{name: a, path: /tmp/a}]}"}
---
apiVersion: argoproj.io/v1alpha1
kind: ClusterWorkflowTemplate
spec: {templates: [{name: m, container: {image: x, volumeMounts: [{name: w, mountPath: /w}]}, outputs: {artifacts: [{name: a, path: /w/a, archive: {tar: {compressionLevel: 0}}}]}}]}
---
---
apiVersion: v1
kind: List
items:
- apiVersion: argoproj.io/v1alpha1
  kind: WorkflowTemplate
  spec: {templates: [{name: m, container: {image: x, volumeMounts: [{name: w, mountPath: /w}]}, outputs: {artifacts: [{name: a, path: /w/a, archive: {tar: {compressionLevel: 0}}}]}}]}
`, []string{"6 gzip+", "14 gzip+"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, fixed := found(t, c.in)
			if d := cmp.Diff(c.want, got); d != "" {
				t.Errorf("findings:\n%s", d)
			}
			if d := cmp.Diff(c.out, fixed); d != "" {
				t.Errorf("fixed:\n%s", d)
			}
			// The same with line breaks of Windows.
			_, fixed = found(t, strings.ReplaceAll(c.in, "\n", "\r\n"))
			if d := cmp.Diff(strings.ReplaceAll(c.out, "\n", "\r\n"), fixed); d != "" {
				t.Errorf("fixed, with CRLF:\n%s", d)
			}
		})
	}
}

// What is shared through anchors, aliases and merges is found, and mended only where that changes nothing
// else.
func TestAnchors(t *testing.T) {
	got, fixed := found(t, head+`  - name: a
    container: &box {image: x}
    outputs: {artifacts: [{name: o, path: /tmp/o}]}
  - name: b
    container: *box
    outputs: &outs {artifacts: [{name: p, path: /tmp/p, archive: {none: {}}}]}
  - name: c
    container: {image: y}
    outputs: *outs
  - name: d
    <<: {container: {image: z}}
    outputs: {artifacts: [&art {name: o, path: /data/o}, *art]}
`)
	want := []string{"9 gzip+", "9 volume", "12 volume", "12 volume+", "18 gzip", "18 volume", "18 gzip", "18 volume"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("findings:\n%s", d)
	}
	if strings.Count(fixed, "mountPath: /tmp") != 1 || !strings.Contains(fixed, "container: {image: y, volumeMounts: [{name: tmp, mountPath: /tmp}]}") {
		t.Errorf("fixed:\n%s", fixed)
	}
}

func TestFindingsThatTakeAPerson(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		want []string
	}{
		"an input deep in /tmp":    {"  - {name: m, container: {image: x}, inputs: {artifacts: [{name: i, path: /tmp/in/a}]}, outputs: {artifacts: [{name: a, path: /tmp/a, archive: {none: {}}}]}}\n", []string{"7 volume"}},
		"an input right in /tmp":   {"  - {name: m, container: {image: x}, inputs: {artifacts: [{name: i, path: /tmp/i}]}, outputs: {artifacts: [{name: a, path: /tmp/a, archive: {none: {}}}]}}\n", []string{"7 volume+"}},
		"the image's own in /tmp":  {"  - {name: m, container: {image: x, command: [sh, -c, \"mkdir -p /tmp/a && cp /tmp/seed /tmp/a\"]}, outputs: {artifacts: [{name: a, path: /tmp/a, archive: {none: {}}}]}}\n", []string{"7 volume"}},
		"nothing else in /tmp":     {"  - {name: m, container: {image: x, command: [sh, -c, \"cd /tmp; cp /tmp/i/b /opt/c '/tmp/a/b'; >/tmp/w/l\"], volumeMounts: [{name: w, mountPath: /tmp/w}]}, inputs: {artifacts: [{name: i, path: /tmp/i}]}, outputs: {artifacts: [{name: a, path: /tmp/a, archive: {none: {}}}]}}\n", []string{"7 volume+"}},
		"outside /tmp":             {"  - {name: m, container: {image: x}, outputs: {artifacts: [{name: a, path: /opt/a, archive: {none: {}}}, {name: b, path: /b, archive: {none: {}}}]}}\n", []string{"7 volume", "7 volume"}},
		"a placeholder as path":    {"  - {name: m, container: {image: x}, outputs: {artifacts: [{name: a, path: \"{{inputs.parameters.p}}\", archive: {none: {}}}]}}\n", nil},
		"a placeholder as mount":   {"  - {name: m, container: {image: x, volumeMounts: [{name: w, mountPath: \"{{inputs.parameters.p}}\"}]}, outputs: {artifacts: [{name: a, path: /tmp/a, archive: {none: {}}}]}}\n", nil},
		"where an input lies":      {"  - {name: m, container: {image: x}, inputs: {artifacts: [{name: i, path: /w}]}, outputs: {artifacts: [{name: a, path: /w/a, archive: {none: {}}}]}}\n", nil},
		"a sibling of a mount":     {"  - {name: m, container: {image: x, volumeMounts: [{name: w, mountPath: /w}]}, outputs: {artifacts: [{name: a, path: /ww/a, archive: {none: {}}}]}}\n", []string{"7 volume"}},
		"keys without values":      {"  - {name: m, volumes: , container: {image: x}, outputs: {artifacts: [{name: a, path: /tmp/a, archive: }]}}\n", []string{"7 volume"}},
		"an input from a bucket":   {"  - {name: m, container: {image: x}, inputs: {artifacts: [{name: i, path: /i, s3: {bucket: b, key: genomes/a}}]}}\n", []string{"7 claim"}},
		"an input from this run":   {"  - {name: m, container: {image: x}, inputs: {artifacts: [{name: i, path: /i, s3: {key: \"{{workflow.name}}/a\"}}]}}\n", nil},
		"an input of another step": {"  - {name: m, container: {image: x}, inputs: {artifacts: [{name: i, path: /i, s3: {key: a/b}}]}}\n  - {name: n, container: {image: x, volumeMounts: [{name: w, mountPath: /w}]}, outputs: {artifacts: [{name: i, path: /w/i, archive: {none: {}}, s3: {key: a}}]}}\n", nil},
		"a list from a script":     {"  - {name: m, steps: [[{name: l, template: l}], [{name: f, template: f, withParam: \"{{steps.l.outputs.result}}\"}]]}\n  - {name: l, script: {image: x, source: ls}}\n  - {name: f, container: {image: x}}\n", []string{"7 stdout"}},
		"a list in an expression":  {"  - {name: m, dag: {tasks: [{name: l, template: l}, {name: f, template: f, withParam: \"{{=tasks['l'].outputs.result}}\"}]}}\n  - {name: l, script: {image: x, source: ls}}\n  - {name: f, container: {image: x}}\n", []string{"7 stdout"}},
		"a list from data":         {"  - {name: m, steps: [[{name: l, template: l}], [{name: f, template: f, withParam: \"{{steps.l.outputs.result}}\"}]]}\n  - {name: l, data: {source: {artifactPaths: {name: x, s3: {key: k}}}}}\n  - {name: f, container: {image: x}}\n", nil},
		"no container":             {"  - {name: m, http: {url: x}, outputs: {artifacts: [{name: a, path: /a}]}}\n", nil},
		"template defaults":        {"  - {name: m, container: {image: x}, outputs: {artifacts: [{name: a, path: /w/a, archive: {none: {}}}]}}\n  templateDefaults: {container: {volumeMounts: [{name: w, mountPath: /w}]}}\n", nil},
		"odd shapes":               {"  - {name: [m], container: x, outputs: {artifacts: {a: b}}}\n  - just text\n  - {steps: [{name: x, template: m}, y, [z]], outputs: 7}\n  - null\n", nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, _ := found(t, head+c.text)
			if d := cmp.Diff(c.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestIgnored(t *testing.T) {
	body := head + `  - name: m
    container: {image: x}
    outputs:
      artifacts:
      - {name: a, path: /a} # stepcache:ignore gzip, volume
      # stepcache:ignore gzip because it is text
      # and small
      - {name: b, path: /b}
      - {name: c, path: /c} # stepcache:ignore
      - {name: d, path: /d} # says nothing of stepcache
`
	got, _ := found(t, body)
	if d := cmp.Diff([]string{"14 volume", "16 gzip+", "16 volume"}, got); d != "" {
		t.Error(d)
	}
	for comment, want := range map[string][]string{
		"# stepcache:ignore\n":              nil,
		"---\n# stepcache:ignore: volume\n": {"18 gzip+"},
	} {
		got, _ := found(t, comment+body)
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%q:\n%s", comment, d)
		}
	}
	// It counts for its own document only.
	if got, _ := found(t, "# stepcache:ignore\n"+body+"---\n"+body); len(got) != 3 {
		t.Errorf("%v", got)
	}
}

func TestFilesThatAreNoYAML(t *testing.T) {
	for text, want := range map[string]struct {
		line int
		says string
	}{
		head + "  - name: {{inputs.parameters.x}}\n":        {7, "needs quotes"},
		"{{- if .Values.x }}\nkind: Workflow\n{{- end }}\n": {1, "Helm"},
		"a: 1\n\tb: 2\n":                    {2, "tab"},
		"a: b: c\n":                         {1, "mapping values"},
		head + "  - name: m\n    name: m\n": {8, "already defined"},
		"a: *nobody\n":                      {1, "nobody"},
		"a: &a [*a]\n":                      {1, "a"},
		"kind: Workflow\n---\nkind: [\n":    {3, ""},
		"a: &a [x,x,x,x,x,x,x,x,x]\n" + strings.Repeat("\x00", 4): {2, "control characters"},
	} {
		_, err := lint.Check("w.yaml", []byte(text))
		var e *lint.Error
		if !errors.As(err, &e) || !strings.Contains(err.Error(), want.says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want %q", text, err, want.says)
		} else if e.File != "w.yaml" || e.Line < 1 || e.Line > strings.Count(text, "\n")+1 {
			t.Errorf("%q: %v", text, err)
		}
	}
	for _, text := range []string{"", "\n", "# only\n", "---\n---\n", "just text", "[1, 2]", "kind: Workflow\n", "\ufeff" + head} {
		if r, err := lint.Check("w.yaml", []byte(text)); err != nil || len(r.Findings) > 0 || string(r.Fixed) != text {
			t.Errorf("%q: %+v, %v", text, r, err)
		}
	}
}

// Columns count characters, not bytes, and a byte order mark is none.
func TestPlacesAfterOtherAlphabets(t *testing.T) {
	_, fixed := found(t, "\ufeff"+`{apiVersion: argoproj.io/v1alpha1, kind: Workflow, x: "日本 é", spec: {templates: [{name: é, container: {image: 日}, outputs: {artifacts: [{name: 本, path: /tmp/é}]}}]}}`)
	want := "\ufeff" + `{apiVersion: argoproj.io/v1alpha1, kind: Workflow, x: "日本 é", spec: {templates: [{name: é, volumes: [{name: tmp, emptyDir: {}}], container: {image: 日, volumeMounts: [{name: tmp, mountPath: /tmp}]}, outputs: {artifacts: [{name: 本, path: /tmp/é, archive: {tar: {compressionLevel: 0}}}]}}]}}`
	if d := cmp.Diff(want, fixed); d != "" {
		t.Error(d)
	}
}

// Whatever a file holds, a fix is final, and a file without findings is left as it is.
func FuzzCheck(f *testing.F) {
	files, err := filepath.Glob("../examples/*/*.yaml")
	if err != nil || len(files) == 0 {
		f.Fatalf("no examples: %v", err)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(head + "  - name: m\n    container: {image: x}\n    outputs: {artifacts: [{name: a, path: /tmp/a}, {name: \"b\", path: '/tmp/b'}]}\n"))
	f.Add([]byte(head + "  - &t\n    name: m\n    script:\n      source: |\n        mkdir /tmp/d\n    outputs:\n      artifacts:\n      - path: >-\n          /tmp/d\n        name: a\n  - *t\n"))
	f.Add([]byte(`{"apiVersion": "argoproj.io\/v1alpha1", "kind": "Workflow", "spec": {"templates": [{"name": "\/", "container": {"image": "a\\/"}, "outputs": {"artifacts": [{"name": "a", "path": "\/tmp\/a"}]}}]}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		r, err := lint.Check("w.yaml", text)
		if err == nil {
			holds(t, text, r)
		}
	})
}
