package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"iter"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/tier"
)

// sum adds up what workers of one Dataset say; figures of the dataset itself are the first's.
func sum(workers []wire.WorkerStatus) wire.WorkerStatus {
	var s wire.WorkerStatus
	for i, w := range workers {
		if i == 0 || s.Snapshot == "" {
			s.Dataset, s.Snapshot, s.Files, s.Bytes, s.Skipped = w.Dataset, w.Snapshot, w.Files, w.Bytes, w.Skipped
		}
		s.Quota += w.Quota
		s.Used += w.Used
		s.Pinned += w.Pinned
		s.SourceBytes += w.SourceBytes
		s.SourceRequests += w.SourceRequests
		s.ServedBytes += w.ServedBytes
		s.OpenedBytes += w.OpenedBytes
		s.Verified += w.Verified
		s.Unverified += w.Unverified
		s.Corrupt += w.Corrupt
		s.Refetched += w.Refetched
	}
	return s
}

func statusCommand() *cobra.Command {
	var t tierFlags
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what the workers hold and what they did",
		Long: `Shows each worker: what its memory holds, of how much it may, and what of that is pinned; what it fetched from
the bucket and sent to readers (reads of memory that it handed out, on the same machine, are not seen again); and how
many objects were checked against a digest of the bucket's, and how many have none (UNVERIFIED).`,
		Example: "  stepcache status\n  stepcache status -o json | jq .[].sourceBytes",
		Args:    args(cobra.NoArgs),
	}
	t.add(cmd)
	output := jsonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		folders, err := tier.All(t.dir)
		if err != nil {
			return err
		}
		if t.dataset != "" || len(folders) == 1 {
			f, err := t.one()
			if err != nil {
				return err
			}
			folders = []tier.Folder{f}
		}
		var all []wire.WorkerStatus
		for _, f := range folders {
			control, err := f.Control()
			if err != nil {
				return err
			}
			workers, err := control.Status(cmd.Context())
			control.Close()
			if err != nil && len(workers) == 0 {
				return err
			}
			if err != nil {
				fmt.Fprintln(os.Stderr, "stepcache:", err)
			}
			all = append(all, workers...)
		}
		if *output == "json" {
			return printJSON(cmd.OutOrStdout(), all)
		}
		w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 3, ' ', 0)
		fmt.Fprintln(w, "WORKER\tDATASET\tFILES\tIN MEMORY\tQUOTA\tPINNED\tFROM BUCKET\tSERVED\tVERIFIED\tUNVERIFIED\tPROBLEM")
		for _, s := range all {
			files, _ := listed(s)
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\t%d\t%s\n", s.ID, s.Dataset, files, size(s.Used), size(s.Quota),
				size(s.Pinned), size(s.SourceBytes), size(s.ServedBytes), s.Verified, s.Unverified, s.Problem)
		}
		for _, f := range folders {
			for _, s := range all {
				if s.Dataset == f.Dataset && len(s.Skipped) > 0 {
					fmt.Fprintf(w, "\n%s: keys that cannot be shown as files:\n", f.Dataset)
					for _, reason := range slices.Sorted(maps.Keys(s.Skipped)) {
						fmt.Fprintf(w, "  %d\t%s\n", s.Skipped[reason], reason)
					}
					break
				}
			}
		}
		return w.Flush()
	}
	return cmd
}

// listed is how many files and bytes a worker's listing has: not known yet, or never, of a Dataset that takes puts.
func listed(s wire.WorkerStatus) (files, bytes string) {
	if s.Snapshot == "" {
		return "-", "-"
	}
	return strconv.FormatInt(s.Files, 10), size(s.Bytes)
}

// dial connects a command to its tier, waiting a bounded time for a listing.
func (t *tierFlags) dial(ctx context.Context) (*client.Client, error) {
	f, err := t.one()
	if err != nil {
		return nil, err
	}
	ctx, cancel := t.bounded(ctx, f)
	defer cancel()
	c, err := f.Dial(ctx)
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("%w (%w)", context.Cause(ctx), err)
	}
	return c, err
}

// bounded is a context for connecting to a tier.
func (t *tierFlags) bounded(ctx context.Context, f tier.Folder) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, tier.DialTimeout, fmt.Errorf("dataset %s: no worker has a listing after %s; see `stepcache status`", f.Dataset, tier.DialTimeout))
}

// entry is one line of ls.
type entry struct {
	Path     string    `json:"path"`
	Quoted   string    `json:"quoted,omitempty"` // of a Path that is not UTF-8, which JSON cannot carry
	Dir      bool      `json:"dir,omitempty"`
	Size     int64     `json:"size"`
	Modified time.Time `json:"modified,omitzero"`
	Version  string    `json:"version,omitempty"`
}

func lsCommand() *cobra.Command {
	var t tierFlags
	var long, recursive bool
	cmd := &cobra.Command{
		Use:   "ls [PATH]",
		Short: "List files of a dataset",
		Long: `Lists a folder, or describes a file, as the workers' newest listing of the bucket has it. A Dataset with a refresh
interval gets newer ones; a mount keeps the one that it began with, so that no file changes under its readers. Of a
Dataset that takes puts it shows what is there now.
Folders end with a slash; names that would not print are quoted. -o json has them as they are; of
a path that is not UTF-8 it has U+FFFD for each byte that is not, and "quoted" as the path itself.`,
		Example: "  stepcache ls -l /shards\n  stepcache ls -R -o json /",
		Args:    args(cobra.MaximumNArgs(1)),
	}
	t.add(cmd)
	output := jsonFlag(cmd)
	cmd.Flags().BoolVarP(&long, "long", "l", false, "show size, time and version")
	cmd.Flags().BoolVarP(&recursive, "recursive", "R", false, "list all that is below")
	cmd.RunE = func(cmd *cobra.Command, a []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		all, done, err := t.entries(cmd.Context(), first(a, "/"), recursive)
		if err != nil {
			return err
		}
		defer done()
		if *output == "json" {
			entries := []entry{}
			return printJSON(cmd.OutOrStdout(), slices.AppendSeq(entries, all))
		}
		return printEntries(cmd.OutOrStdout(), all, long)
	}
	return cmd
}

func first(a []string, otherwise string) string {
	if len(a) > 0 {
		return a[0]
	}
	return otherwise
}

// entries are what ls shows of a path, until done is called.
func (t *tierFlags) entries(ctx context.Context, name string, recursive bool) (all iter.Seq[entry], done func(), err error) {
	n, err := t.names(ctx)
	if err != nil {
		return nil, nil, err
	}
	if n != nil {
		defer n.Close()
		what, err := lookupName(ctx, n, name)
		if err != nil {
			return nil, nil, err
		}
		var entries []entry
		if what.Dir {
			err = walkNames(ctx, n, what, recursive, func(w named) error {
				entries = append(entries, w.entry())
				return nil
			})
		} else {
			entries = append(entries, what.entry())
		}
		return slices.Values(entries), func() {}, err
	}
	c, err := t.dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	i, err := lookup(c, name)
	if err != nil {
		c.Close()
		return nil, nil, err
	}
	s := c.Snapshot() // once: a newer one may come while this is printed
	return func(f func(entry) bool) { list(s, i, recursive, f) }, func() { c.Close() }, nil
}

func noSuchPath(name string) error {
	return fmt.Errorf("no file or folder %s in the dataset; `stepcache ls` shows what there is", name)
}

// lookup finds a path, which may be written without the leading slash.
func lookup(c *client.Client, name string) (catalog.Index, error) {
	i, ok := c.Snapshot().Lookup(path.Clean("/" + name))
	if !ok {
		return 0, noSuchPath(name)
	}
	return i, nil
}

// printEntries writes a line for each entry. The columns of a long listing are as wide as the widest of all, which
// takes a pass of its own: there may be millions of entries, too many to keep as text.
func printEntries(out io.Writer, all iter.Seq[entry], long bool) error {
	sizes, versions := 0, 0
	if long {
		for e := range all {
			sizes = max(sizes, len(strconv.FormatInt(e.Size, 10)))
			versions = max(versions, utf8.RuneCountInString(e.Version))
		}
	}
	w := bufio.NewWriter(out)
	for e := range all {
		name := printable(e.Path)
		if e.Dir {
			name += "/"
		}
		if long {
			modified := "-"
			if !e.Modified.IsZero() {
				modified = e.Modified.UTC().Format(time.DateTime)
			}
			fmt.Fprintf(w, "%-*d  %-*s  %-*s  ", sizes, e.Size, len(time.DateTime), modified, versions, e.Version)
		}
		if _, err := fmt.Fprintln(w, name); err != nil {
			return err // nobody reads on
		}
	}
	return w.Flush()
}

// list calls f for a file, or for what a folder has, until f returns false.
func list(s *catalog.Snapshot, i catalog.Index, recursive bool, f func(entry) bool) {
	n, _ := s.Node(i)
	switch {
	case !n.Dir:
		f(describe(s, i))
	case recursive:
		s.WalkAll(i, func(j catalog.Index) bool { return f(describe(s, j)) })
	default:
		for j := n.First; j < n.First+n.Count; j++ {
			if !f(describe(s, j)) {
				return
			}
		}
	}
}

func newEntry(path string, dir bool, size int64, modified time.Time) entry {
	return entry{Path: path, Quoted: wire.Quoted(path), Dir: dir, Size: size, Modified: modified}
}

func describe(s *catalog.Snapshot, i catalog.Index) entry {
	n, _ := s.Node(i)
	e := newEntry(s.Path(i), n.Dir, n.Size, n.ModTime)
	if _, o, ok := s.Object(i); ok {
		e.Version = o.Version
	}
	return e
}
