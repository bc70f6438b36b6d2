package main

import (
	"encoding/hex"
	"fmt"
	"os"

	"github.com/spf13/cobra"
)

func refreshCommand() *cobra.Command {
	var t tierFlags
	cmd := &cobra.Command{
		Use:   "refresh",
		Short: "List the bucket again",
		Long: `Has the workers list the bucket now, whatever the Dataset's refresh interval is, and waits for that. What is in memory
stays, where the object is still the same. A mount that is there keeps the listing that it began with, so that no file
changes under its readers; one that is made afterwards, and the other commands, have the new one.`,
		Example: "  stepcache refresh && stepcache ls -l /new",
		Args:    args(cobra.NoArgs),
	}
	t.add(cmd)
	output := jsonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		before, err := t.dialListed(cmd.Context(), "to renew: what it shows is what the bucket has")
		if err != nil {
			return err
		}
		old := before.Snapshot().Digest()
		before.Close()
		f, err := t.one()
		if err != nil {
			return err
		}
		control, err := f.Control()
		if err != nil {
			return err
		}
		defer control.Close()
		fmt.Fprintln(os.Stderr, "listing the bucket")
		if _, err := control.Refresh(cmd.Context()); err != nil {
			return err
		}
		after, err := t.dial(cmd.Context())
		if err != nil {
			return err
		}
		defer after.Close()
		snap := after.Snapshot()
		digest := snap.Digest()
		r := refreshed{Dataset: f.Dataset, Snapshot: hex.EncodeToString(digest[:]), Files: snap.Files(), Bytes: snap.Bytes(), Changed: old != digest}
		if *output == "json" {
			return printJSON(cmd.OutOrStdout(), r)
		}
		what := "as before"
		if r.Changed {
			what = "a new listing"
		}
		fmt.Fprintf(cmd.OutOrStdout(), "dataset %s: %d files, %s: %s\n", r.Dataset, r.Files, size(r.Bytes), what)
		return nil
	}
	return cmd
}

// refreshed is a new listing as -o json prints it.
type refreshed struct {
	Dataset  string `json:"dataset"`
	Snapshot string `json:"snapshot"`
	Files    int64  `json:"files"`
	Bytes    int64  `json:"bytes"`
	Changed  bool   `json:"changed"` // from the listing before
}
