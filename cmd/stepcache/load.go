package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/wire"
)

func loadCommand() *cobra.Command {
	var t tierFlags
	r := wire.LoadRequest{}
	var unload bool
	cmd := &cobra.Command{
		Use:   "load [PATTERN ...]",
		Short: "Warm the tier: its workers fetch what they own",
		Long: `Makes files resident: each worker fetches the blocks that it owns, so that each byte leaves the bucket once.
Patterns match paths in the dataset (/ref/**/*.fa; a folder, /shards, is all in it); without one everything is loaded. With
--pin the files stay until "stepcache load --unload --id ID". Interrupting the command leaves the load running.
-o json has a path that is not UTF-8 as ls does; with --unload it tells the load as it was when it was ended.`,
		Example: "  stepcache load\n  stepcache load --pin --id shards /shards",
	}
	t.add(cmd)
	output := jsonFlag(cmd)
	f := cmd.Flags()
	f.StringVar(&r.ID, "id", "", "name of the load (default: one made from the time)")
	f.IntVar(&r.Copies, "copies", 0, "workers that hold each block (default: the Dataset's)")
	f.BoolVar(&r.Pin, "pin", false, "keep the files from eviction")
	f.BoolVar(&unload, "unload", false, "end the load with this --id and its pins")
	cmd.RunE = func(cmd *cobra.Command, patterns []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		if unload && r.ID == "" {
			return usage{fmt.Errorf("load --unload: name the load with --id")}
		}
		if r.Copies < 0 {
			return usage{fmt.Errorf("load: --copies %d: want 1 or more", r.Copies)}
		}
		folder, err := t.one()
		if err != nil {
			return err
		}
		control, err := folder.Control()
		if err != nil {
			return err
		}
		defer control.Close()
		ctx, start := cmd.Context(), time.Now()
		if unload {
			ended, err := control.LoadStatus(ctx, r.ID)
			if errors.Is(err, client.ErrNoLoad) {
				return fmt.Errorf("%w: no worker knows it, so that nothing was ended", err)
			}
			if err := control.DeleteLoad(ctx, r.ID); err != nil {
				return err
			}
			if *output == "json" {
				return printJSON(cmd.OutOrStdout(), newLoadReport(ended))
			}
			fmt.Fprintf(cmd.OutOrStdout(), "load %s has ended, with its pins\n", r.ID)
			return nil
		}
		if r.ID == "" {
			r.ID = "cli-" + start.UTC().Format("20060102T150405.000")
		}
		r.Paths = patterns
		var last client.LoadSum
		if err := control.Load(ctx, r); err != nil {
			if ctx.Err() != nil {
				fmt.Fprintf(os.Stderr, "load %s: workers may have begun, and `stepcache load --unload --id %s` ends it\n", r.ID, r.ID)
			}
			return err
		}
		p := newProgress("load "+r.ID, 0)
		_, err = control.Wait(ctx, r, 200*time.Millisecond, func(s client.LoadSum) {
			p.set(s.Resident, s.Total)
			last = s
		})
		p.finish()
		if err != nil && ctx.Err() != nil {
			fmt.Fprintf(os.Stderr, "load %s: %s; it goes on in the workers, and `stepcache load --unload --id %s` ends it\n",
				r.ID, loadLine(last, time.Since(start)), r.ID)
		}
		if *output == "json" {
			if e := printJSON(cmd.OutOrStdout(), newLoadReport(last)); err == nil {
				err = e
			}
		} else if err == nil {
			fmt.Fprintf(cmd.OutOrStdout(), "load %s: %s\n", r.ID, loadLine(last, time.Since(start)))
		}
		if n := len(last.Workers); err == nil && r.Copies > n {
			fmt.Fprintf(os.Stderr, "there are %d workers, so that there are %d copies instead of %d\n", n, n, r.Copies)
		}
		if err == nil && !r.Pin {
			// Nothing to keep: the bytes stay by themselves, as long as there is room.
			err = control.DeleteLoad(ctx, r.ID)
		}
		return err
	}
	return cmd
}

// loadReport is a load as -o json prints it.
type loadReport struct {
	wire.LoadStatus
	Workers map[string]wire.LoadStatus `json:"workers"`
	Missing map[string]string          `json:"missing,omitempty"` // workers that did not answer, and why
}

func newLoadReport(s client.LoadSum) loadReport {
	r := loadReport{LoadStatus: s.LoadStatus, Workers: s.Workers}
	for id, err := range s.Missing {
		if r.Missing == nil {
			r.Missing = make(map[string]string)
		}
		r.Missing[id] = err.Error()
	}
	return r
}
