package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/stepcache/stepcache/sidecar"
)

func sidecarCommand() *cobra.Command {
	var o sidecar.Options
	var keep, check bool
	var buffer, socket string
	var level slog.Level
	cmd := &cobra.Command{
		Use:   "sidecar (--dir DIR | --node-socket PATH) --tier DIR --dataset NAMESPACE/NAME ...",
		Short: "Mount Datasets for the other containers of a pod",
		Long: `Serves each Dataset until SIGTERM, and then ends at once. The webhook adds it to pods.

With --node-socket it has no right and mounts nothing: the node service, whose socket is in a volume of the pod,
mounts and keeps, and lends it the mounts. With --dir, where there is no node service, it is privileged and mounts
at DIR/NAME; a second container with --keep holds the mounts, so that they outlive a server that is killed, and
takes them away at the end. With --check it says by its exit status whether everything is mounted: the startup
probe.`,
		Example: `  stepcache sidecar --keep --dir /run/stepcache/sidecars/0123
  stepcache sidecar --dir /run/stepcache/sidecars/0123 --tier /stepcache/tier --dataset argo/genomes
  stepcache sidecar --node-socket /run/stepcache/node/node.sock --tier /stepcache/tier --dataset argo/genomes`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case (o.Dir == "") == (socket == ""):
				return usage{errors.New("sidecar: want either --dir, the folder of this pod's mounts, or --node-socket, the node service's socket")}
			case check && keep, keep && socket != "":
				return usage{errors.New("sidecar: --keep goes with --dir alone, not with --check or --node-socket")}
			case check && socket != "":
				return sidecar.ReadyLent(cmd.Context(), socket)
			case check:
				return sidecar.Ready(o.Dir)
			case keep:
				return sidecar.Keep(cmd.Context(), o.Dir, logger(level))
			}
			n, err := humanize.ParseBytes(buffer)
			if err != nil || n > 1<<50 {
				return usage{fmt.Errorf("sidecar: --buffer %q: want a size such as 128MiB", buffer)}
			}
			var names []string
			for _, d := range o.Datasets {
				namespace, name, ok := strings.Cut(d, "/")
				if !ok || namespace == "" || name == "" || strings.Contains(name, "/") || slices.Contains(names, name) {
					return usage{fmt.Errorf("sidecar: --dataset %q: want NAMESPACE/NAME, each name once", d)}
				}
				names = append(names, name)
			}
			if o.Tier == "" || len(names) == 0 {
				return usage{errors.New("sidecar: --tier or --dataset is missing: say what to mount")}
			}
			o.BufferBytes, o.Logger = int64(n), logger(level)
			_, o.BufferBytes, o.Buffers = keepMemory(0, o.BufferBytes, o.Logger)
			if socket != "" {
				return sidecar.ServeLent(cmd.Context(), sidecar.LentOptions{
					Socket: socket, Tier: o.Tier, Datasets: o.Datasets, Node: o.Node,
					BufferBytes: o.BufferBytes, Buffers: o.Buffers, Logger: o.Logger,
				})
			}
			return sidecar.Serve(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	levelFlag(cmd, &level)
	f.StringVar(&o.Dir, "dir", "", "folder of this pod's mounts")
	f.StringVar(&socket, "node-socket", "", "socket of the node service that lends this pod its mounts")
	f.StringVar(&o.Tier, "tier", "", "folder with the folder of a tier for each Dataset")
	f.StringArrayVar(&o.Datasets, "dataset", nil, "a Dataset to mount, as namespace/name")
	f.StringVar(&o.Node, "node", os.Getenv("NODE_NAME"), "name of this node (default $NODE_NAME)")
	f.StringVar(&buffer, "buffer", "128MiB", "memory for what is read of each Dataset; less where the container's limit is small")
	f.BoolVar(&keep, "keep", false, "hold the mounts of another sidecar")
	f.BoolVar(&check, "check", false, "say whether everything is mounted")
	return cmd
}
