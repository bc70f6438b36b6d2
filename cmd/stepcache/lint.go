package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/stepcache/stepcache/lint"
)

func lintCommand() *cobra.Command {
	var output string
	var fix bool
	cmd := &cobra.Command{
		Use:   "lint WORKFLOW...",
		Short: "Find what makes the artifacts of Argo workflows slow or wrong, and mend it",
		Long: `Reads Workflows, WorkflowTemplates, ClusterWorkflowTemplates and CronWorkflows, several documents a file, and
prints FILE:LINE: what it found, what to do and why. A folder stands for the .yaml, .yml and .json files in it,
"-" for standard input.

  gzip     an output is packed with tar and gzip, Argo's default: one thread, some 30 MB/s
  volume   an output lies outside every volume mount, so the step packs it with gzip, and it is copied once more
  mode     a directory as input has no mode, so that only root can enter it
  stdout   a fan-out list is a step's standard output, of which Argo keeps the last 256 KB (note)
  claim    an input is copied from a bucket into each pod that could mount it (note)

--fix writes the corrected files; -o yaml prints them. Both change only what the findings name: comments and
order stay. An output stays a tar, packed without compressing: archive: {none: {}} is faster still, but loses
permissions.

A comment "# stepcache:ignore RULE, RULE" on a line, above it, or above a document takes its findings away;
without names, all of them.

Exit status: 0 where nothing is left to do, or only notes; 1 where warnings are left; 2 where a file cannot be
read.`,
		Example: `  stepcache lint workflow.yaml
  stepcache lint --fix workflows/
  kubectl get workflowtemplates -o yaml | stepcache lint -o json -`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			switch {
			case !slices.Contains([]string{"text", "json", "yaml"}, output):
				return usage{fmt.Errorf("-o %s: want text, json or yaml", output)}
			case fix && output == "yaml":
				return usage{errors.New("--fix and -o yaml do not go together: one writes the files, the other prints them")}
			case fix && slices.Contains(given, "-"):
				return usage{errors.New("--fix cannot write standard input: use -o yaml")}
			}
			l := linting{cmd: cmd, output: output, fix: fix, findings: []lint.Finding{}}
			for _, name := range given {
				l.add(name)
			}
			return l.end()
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text, json, or yaml for the corrected files")
	cmd.Flags().BoolVar(&fix, "fix", false, "write the corrected files")
	return cmd
}

// linting is one run of the command.
type linting struct {
	cmd      *cobra.Command
	output   string
	fix      bool
	findings []lint.Finding
	failed   bool // a file could not be read or written
	files    int
	objects  int // of Argo
}

func (l *linting) fail(err error) {
	fmt.Fprintln(l.cmd.ErrOrStderr(), "stepcache:", err)
	l.failed = true
}

// add takes one argument: a file, a folder or standard input.
func (l *linting) add(name string) {
	if name == "-" {
		text, err := io.ReadAll(l.cmd.InOrStdin())
		if err != nil {
			l.fail(fmt.Errorf("standard input: %w", err))
			return
		}
		l.check("-", text)
		return
	}
	info, err := os.Stat(name)
	if err != nil {
		l.fail(err)
		return
	}
	if !info.IsDir() {
		if l.fix && !info.Mode().IsRegular() {
			l.fail(fmt.Errorf("%s: --fix cannot write what is not a regular file: use -o yaml", name))
			return
		}
		l.file(name)
		return
	}
	before := l.files
	err = filepath.WalkDir(name, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if ext := strings.ToLower(filepath.Ext(path)); d.Type().IsRegular() && (ext == ".yaml" || ext == ".yml" || ext == ".json") {
			l.file(path)
		}
		return nil
	})
	if err != nil {
		l.fail(err)
	} else if l.files == before {
		l.fail(fmt.Errorf("%s: no .yaml, .yml or .json file in it", name))
	}
}

func (l *linting) file(name string) {
	text, err := os.ReadFile(name)
	if err != nil {
		l.fail(err)
		return
	}
	l.check(name, text)
}

func (l *linting) check(name string, text []byte) {
	l.files++
	r, err := lint.Check(name, text)
	if err != nil {
		l.fail(err)
		return
	}
	l.objects += r.Workflows
	changed := !bytes.Equal(r.Fixed, text)
	if l.fix && changed {
		if err := rewrite(name, r.Fixed); err != nil {
			l.fail(err)
			return
		}
	}
	if l.output == "yaml" {
		printed := r.Fixed
		if l.files > 1 && !bytes.HasPrefix(printed, []byte("---")) {
			printed = append([]byte("---\n"), printed...)
		}
		if _, err := l.cmd.OutOrStdout().Write(printed); err != nil {
			l.fail(err)
		}
	}
	mended := 0
	var left []lint.Finding
	for _, f := range r.Findings {
		if f.Fixable && (l.fix || l.output == "yaml") {
			mended++
		} else {
			left = append(left, f)
		}
	}
	if l.fix && changed {
		// What was added moved lines: those that are left are told as the file has them now.
		now, err := lint.Check(name, r.Fixed)
		if err != nil {
			l.fail(err)
			return
		}
		left = now.Findings
	}
	for _, f := range left {
		l.findings = append(l.findings, f)
		switch l.output {
		case "text":
			fmt.Fprintln(l.cmd.OutOrStdout(), f)
		case "yaml":
			fmt.Fprintln(l.cmd.ErrOrStderr(), f)
		}
	}
	if l.fix && mended > 0 && l.output == "text" {
		fmt.Fprintf(l.cmd.ErrOrStderr(), "%s: %d mended\n", name, mended)
	}
}

// rewrite replaces a file at once, under its own name and mode; a link stays a link.
func rewrite(name string, text []byte) error {
	name, err := filepath.EvalSymlinks(name)
	if err != nil {
		return err
	}
	info, err := os.Stat(name)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(name), ".stepcache-lint-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // it has another name by then if all went well
	_, err = f.Write(text)
	if err == nil {
		err = f.Chmod(info.Mode().Perm())
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}

func (l *linting) end() error {
	if l.output == "json" {
		if err := printJSON(l.cmd.OutOrStdout(), l.findings); err != nil {
			return err
		}
	}
	fixable, warnings := 0, 0
	for _, f := range l.findings {
		if f.Fixable {
			fixable++
		}
		if f.Severity == lint.Warning {
			warnings++
		}
	}
	if fixable > 0 && l.output == "text" {
		fmt.Fprintf(l.cmd.ErrOrStderr(), "%d of %d can be mended with --fix\n", fixable, len(l.findings))
	}
	if l.objects == 0 && !l.failed {
		files := "files"
		if l.files == 1 {
			files = "file"
		}
		fmt.Fprintf(l.cmd.ErrOrStderr(), "no workflow of Argo in %d %s\n", l.files, files)
	}
	switch {
	case l.failed:
		return exit(2)
	case warnings > 0:
		return exit(1)
	}
	return nil
}
