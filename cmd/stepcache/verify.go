package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/api/manifest"
	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/scheme"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/local"
)

// verified is what verify found of one file.
type verified struct {
	Path   string `json:"path"`
	Quoted string `json:"quoted,omitempty"` // see wire.Quoted
	Result string `json:"result"`           // equal, DIFFERENT, changed, failed
	How    string `json:"how,omitempty"`
	Reason string `json:"reason,omitempty"`
}

func verifyCommand() *cobra.Command {
	var t tierFlags
	var filenames []string
	var download bool
	cmd := &cobra.Command{
		Use:   "verify -f FILE|FOLDER [PATH ...]",
		Short: "Compare what the tier serves with the bucket",
		Long: `Reads files through the tier and compares them with the bucket: with the digest that the bucket publishes,
where its listing has one of the whole object, else with the object itself, downloaded again in the same version
(--download: always). The bucket is reached with the Dataset and Secret of the manifests named by -f.
The exit status is 1 when anything differs or could not be compared, or when it was interrupted: it tells what it
compared until then. -o json has a path that is not UTF-8 as ls does.`,
		Example: "  stepcache verify -f dataset.yaml\n  stepcache verify -f manifests/ --download /shards",
	}
	t.add(cmd)
	output := jsonFlag(cmd)
	cmd.Flags().StringArrayVarP(&filenames, "filename", "f", nil, "manifests with the Dataset and its Secret; may be repeated")
	cmd.Flags().BoolVar(&download, "download", false, "download every object again, also where the bucket publishes a digest")
	cmd.RunE = func(cmd *cobra.Command, paths []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		if len(filenames) == 0 {
			return usage{fmt.Errorf("verify: -f is missing: name the manifests that say how to reach the bucket")}
		}
		ctx := cmd.Context()
		folder, err := t.one()
		if err != nil {
			return err
		}
		set, err := manifest.Read(filenames...)
		if err != nil {
			return err
		}
		configs, remove, err := local.Sources(set, folder.Dataset)
		if err != nil {
			return err
		}
		defer remove()
		c, err := t.dialListed(ctx, "to compare. The bucket compares each put with its digest, and `stepcache status` counts what was checked")
		if err != nil {
			return err
		}
		defer c.Close()
		v, err := newVerifier(ctx, c, configs, download)
		if err != nil {
			return err
		}
		if len(paths) == 0 {
			paths = []string{"/"}
		}
		results, of, err := v.run(ctx, paths)
		if err != nil && ctx.Err() == nil {
			return err
		}
		reported := report(cmd, *output, results, of)
		if err != nil {
			return err
		}
		return reported
	}
	return cmd
}

// report tells the results of so many files, or of as many as were compared until the command was interrupted.
func report(cmd *cobra.Command, output string, results []verified, of int) error {
	bad := 0
	for _, r := range results {
		if r.Result != "equal" {
			bad++
			if output != "json" {
				fmt.Fprintf(cmd.OutOrStdout(), "%s: %s: %s\n", printable(r.Path), r.Result, r.Reason)
			}
		}
	}
	if output == "json" {
		if err := printJSON(cmd.OutOrStdout(), results); err != nil {
			return err
		}
	} else {
		ofAll := ""
		if len(results) < of {
			ofAll = fmt.Sprintf(" of %d", of)
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%d%s files compared, %d not equal\n", len(results), ofAll, bad)
	}
	if bad > 0 {
		return exit(1)
	}
	return nil
}

// verifier compares files of a client with their sources.
type verifier struct {
	client   *client.Client
	sources  []source.Source // by the snapshot's mounts
	secrets  []string        // folders of their credentials
	download bool
}

func newVerifier(ctx context.Context, c *client.Client, configs map[string]source.Config, download bool) (*verifier, error) {
	v := &verifier{client: c, download: download}
	for _, m := range c.Snapshot().Mounts() {
		config, ok := configs[m.Path]
		if !ok {
			return nil, fmt.Errorf("the manifests have no mount at %s, which the tier serves: name those it was started with", m.Path)
		}
		s, err := scheme.Open(ctx, config)
		if err != nil {
			return nil, err
		}
		if s.URL() != m.URL {
			return nil, fmt.Errorf("the mount at %s is %s in the manifests and %s in the tier: name those it was started with", m.Path, s.URL(), m.URL)
		}
		v.sources = append(v.sources, s)
		if config.CredentialsDir != "" {
			v.secrets = append(v.secrets, config.CredentialsDir)
		}
	}
	return v, nil
}

// forPeople names Secrets instead of the folders that they are put into for the time of the command.
func (v *verifier) forPeople(err error) string {
	text := err.Error()
	for _, dir := range v.secrets {
		text = strings.ReplaceAll(text, dir, "Secret "+filepath.Base(dir))
	}
	return text
}

// run compares the files at and below the paths. Where ctx ends it returns what was compared until then, of how many.
func (v *verifier) run(ctx context.Context, paths []string) (results []verified, of int, err error) {
	s := v.client.Snapshot()
	files := map[catalog.Index]bool{}
	var total int64
	add := func(i catalog.Index) bool {
		if n, _ := s.Node(i); !files[i] {
			files[i] = true
			total += n.Size
		}
		return true
	}
	for _, p := range paths {
		i, err := lookup(v.client, p)
		if err != nil {
			return nil, 0, err
		}
		if n, _ := s.Node(i); n.Dir {
			s.Walk(i, add)
		} else {
			add(i)
		}
	}
	p := newProgress("verify", total)
	defer p.finish()
	var mu sync.Mutex
	var compared atomic.Bool // something was read from the bucket: it lets us in
	results = []verified{}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i := range files {
		g.Go(func() error {
			mount, o, _ := s.Object(i)
			r := verified{Path: s.Path(i), Quoted: wire.Quoted(s.Path(i))}
			var equal bool
			var err error
			if hash := o.Digest.Algorithm.New(); hash != nil && !v.download {
				r.How = o.Digest.Algorithm.String()
				err = copyOut(ctx, v.client, i, hash, p)
				equal = bytes.Equal(hash.Sum(nil), o.Digest.Sum)
			} else {
				r.How = "downloaded again"
				if equal, err = v.compare(ctx, i, v.sources[mount], o, p); err == nil && o.Size > 0 {
					compared.Store(true)
				}
			}
			switch {
			case err != nil && ctx.Err() != nil:
				return context.Cause(ctx) // not of this file
			case (errors.Is(err, source.ErrDenied) || errors.Is(err, source.ErrNoBucket)) && !compared.Load():
				return errors.New(v.forPeople(err)) // as for every other file
			case errors.Is(err, source.ErrChanged), errors.Is(err, source.ErrNotFound):
				r.Result, r.Reason = "changed", v.forPeople(err)
			case err != nil:
				r.Result, r.Reason = "failed", v.forPeople(err)
			case equal:
				r.Result = "equal"
			default:
				r.Result, r.Reason = "DIFFERENT", "the tier and the bucket do not hold the same bytes"
			}
			mu.Lock()
			defer mu.Unlock()
			results = append(results, r)
			return nil
		})
	}
	err = g.Wait()
	sort.Slice(results, func(a, b int) bool { return results[a].Path < results[b].Path })
	return results, len(files), err
}

// compare downloads an object and holds it against what the tier serves.
func (v *verifier) compare(ctx context.Context, i catalog.Index, from source.Source, o source.Object, p *progress) (bool, error) {
	body, err := from.Get(ctx, o, 0, o.Size)
	if err != nil {
		return false, err
	}
	defer body.Close()
	c := &comparer{other: body}
	err = copyOut(ctx, v.client, i, c, p)
	if errors.Is(err, errDifferent) {
		return false, nil
	}
	return err == nil, err
}

var errDifferent = errors.New("different bytes")

// comparer is written one content and reads the other.
type comparer struct {
	other io.Reader
	buf   []byte
}

func (c *comparer) Write(p []byte) (int, error) {
	if len(c.buf) < len(p) {
		c.buf = make([]byte, len(p))
	}
	if _, err := io.ReadFull(c.other, c.buf[:len(p)]); err != nil {
		return 0, err
	}
	if !bytes.Equal(c.buf[:len(p)], p) {
		return 0, errDifferent
	}
	return len(p), nil
}
