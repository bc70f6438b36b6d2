package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/csi"
	"github.com/stepcache/stepcache/csi/keeper"
	"github.com/stepcache/stepcache/sidecar"
)

// defaultKubelet is where the kubelet keeps its things.
const defaultKubelet = "/var/lib/kubelet"

func nodeCommand() *cobra.Command {
	c := csi.Config{Version: version}
	var memory, buffers, kubeconfig string
	var label bool
	var level slog.Level
	cmd := &cobra.Command{
		Use:   "node --node-name NAME",
		Short: "Mount datasets in the pods of this node (the CSI driver's node service)",
		Long: `Runs the CSI driver ` + v1alpha1.DriverName + ` on one node until SIGTERM: it registers with the kubelet, mounts
each Dataset's snapshot once (FUSE), binds it into pods, and gives workers their memory. It needs root, /dev/fuse,
the kubelet's folder at its own path with Bidirectional propagation, and "stepcache keeper" beside it, so that
running pods do not notice when this process is replaced.

With --label it sets the label ` + v1alpha1.LabelNodeReady + ` once the kubelet has registered the driver, and takes it away
at SIGTERM, unless a successor has taken over.`,
		Example: `  stepcache node --node-name "$NODE_NAME" --node-memory 4GiB --label --listen :7072`,
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, size := range []struct {
				flag, value string
				to          *int64
			}{{"node-memory", memory, &c.NodeMemory}, {"buffers", buffers, &c.BufferBytes}} {
				n, err := humanize.ParseBytes(size.value)
				if err != nil || n > 1<<46 {
					return usage{fmt.Errorf("node: --%s %q: want a size such as 2GiB", size.flag, size.value)}
				}
				*size.to = int64(n)
			}
			c.Logger = logger(level)
			if err := c.Validate(); err != nil {
				return usage{fmt.Errorf("node: %w", err)}
			}
			c.NodeMemory, c.BufferBytes, c.Buffers = keepMemory(c.NodeMemory, c.BufferBytes, c.Logger)
			if err := mount.Supported(); err != nil {
				return err
			}
			if label {
				client, err := kubernetesClient(kubeconfig)
				if err != nil {
					return fmt.Errorf("node: --label: %w", err)
				}
				c.Node = csi.NodeObject{Client: client, Name: c.NodeName}
			}
			// What pods with a mount of their own left on this node, in the folder that the webhook gives them.
			ctx, stop := context.WithCancel(cmd.Context())
			swept := make(chan struct{})
			go func() {
				defer close(swept)
				sidecar.SweepUntil(ctx, sidecar.NodeDir, c.Logger)
			}()
			err := csi.Run(ctx, c)
			stop()
			<-swept
			return err
		},
	}
	f := cmd.Flags()
	levelFlag(cmd, &level)
	f.StringVar(&c.NodeName, "node-name", os.Getenv("NODE_NAME"), "this node's name (default $NODE_NAME)")
	f.StringVar(&c.KubeletDir, "kubelet-dir", defaultKubelet, "the kubelet's folder, here as on the node")
	f.StringVar(&c.Keeper, "keeper", "", "the keeper's socket (default keeper.sock in the driver's folder)")
	f.StringVar(&c.CacheDir, "cache-dir", "/cache", "where the node's caches are mounted, seen by this process only")
	f.StringVar(&memory, "node-memory", "0", "memory for what other nodes' workers send, for all Datasets together; 0 streams. Less where the container's limit has no room for it")
	f.StringVar(&buffers, "buffers", "128MiB", "memory of each mount for blocks on their way; less where many are read at once and the container's limit is small")
	f.DurationVar(&c.Linger, "linger", time.Minute, "how long a mount is kept after its last pod")
	f.DurationVar(&c.KeeperWait, "keeper-wait", 10*time.Second, "how long a start waits for the keeper")
	f.StringVar(&c.Listen, "listen", ":7072", "address of /healthz, /readyz and /metrics; empty: none")
	f.BoolVar(&label, "label", false, "label the node while this serves, and send Events (needs a service account)")
	f.StringVar(&kubeconfig, "kubeconfig", "", "how to reach the API server for --label (default: as a pod does)")
	return cmd
}

func kubernetesClient(kubeconfig string) (kubernetes.Interface, error) {
	config, err := rest.InClusterConfig()
	if kubeconfig != "" {
		config, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(config)
}

func keeperCommand() *cobra.Command {
	var socket string
	var level slog.Level
	cmd := &cobra.Command{
		Use:   "keeper",
		Short: "Keep a node's mounts alive while its node service is replaced",
		Long: `Holds the descriptors of the mounts that "stepcache node" parks here, over a Unix socket, until SIGTERM. It
needs no right but to make the socket, does nothing by itself, and should run on when the node service is updated.`,
		Example: `  stepcache keeper`,
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !filepath.IsAbs(socket) {
				return usage{errors.New("keeper: --socket: want an absolute path")}
			}
			return keeper.Run(cmd.Context(), socket, logger(level))
		},
	}
	cmd.Flags().StringVar(&socket, "socket", filepath.Join(defaultKubelet, "plugins", v1alpha1.DriverName, "keeper.sock"), "the Unix socket")
	levelFlag(cmd, &level)
	return cmd
}
