// Command cluster runs a real Kubernetes cluster of three nodes on one machine, for end-to-end tests:
// without Docker, a registry or a way out of the machine. README.md tells how to use it.
//
// It owns everything it starts: the programs it builds (build.go), their images (images.go), the network
// (network.go), the control plane (controlplane.go), the nodes (node.go from outside, nodeinit.go from
// inside) and what runs on them (addons.go). What is made lies in one state folder; nothing else of the
// machine is written to, except that missing Debian packages are installed.
//
// Concurrency: commands that change the cluster hold a lock on the state folder, so that two of them run one
// after the other. Processes outlive the command that started them and are found again by their recorded id
// and start time, so that another process that got the id is never touched.
//
// Failure: a command that fails says which part failed and shows the end of its log. Whatever state a crash
// left, `up` and `down` sweep it. It imports nothing of the product's module.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	// Started as a node's first process, it is not a command line (nodeinit.go).
	if len(os.Args) == 3 && os.Args[1] == nodeInitArg {
		runNodeInit(os.Args[2])
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "cluster",
		Short:         "a real Kubernetes cluster of three nodes on this machine, for end-to-end tests",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	c, openErr := open()
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		if openErr != nil {
			return openErr
		}
		return c.goHome()
	}

	add := func(use, short string, args cobra.PositionalArgs, run func(context.Context, []string) error) *cobra.Command {
		cmd := &cobra.Command{Use: use, Short: short, Args: args, RunE: func(cmd *cobra.Command, args []string) error {
			return run(cmd.Context(), args)
		}}
		root.AddCommand(cmd)
		return cmd
	}
	// passing hands every argument on, flags too.
	passing := func(use, short string, args cobra.PositionalArgs, run func(context.Context, []string) error) {
		add(use, short, args, run).DisableFlagParsing = true
	}
	node := func(use, short string, run func(context.Context, string) error) {
		add(use+" NODE", short, nodeArg, func(ctx context.Context, args []string) error {
			return c.locked(func() error { return run(ctx, args[0]) })
		})
	}

	add("up", "build what is missing, start the cluster and wait until it is ready; nothing to do is no error", cobra.NoArgs,
		func(ctx context.Context, _ []string) error { return c.locked(func() error { return c.Up(ctx) }) })
	add("down", "end every process, network namespace, mount and control group of the cluster; builds are kept", cobra.NoArgs,
		func(ctx context.Context, _ []string) error { return c.locked(func() error { return c.Down(ctx) }) })
	add("able", "try what the cluster needs of this machine, installing missing packages, and say all that it has not", cobra.NoArgs,
		func(ctx context.Context, _ []string) error { return c.Able(ctx) })
	add("build", "build the programs and images only", cobra.NoArgs,
		func(ctx context.Context, _ []string) error { return c.locked(func() error { return c.Build(ctx) }) })
	add("assets", "build etcd, kube-apiserver and kubectl only, and print their folder (envtest's KUBEBUILDER_ASSETS)", cobra.NoArgs,
		func(ctx context.Context, _ []string) error {
			if err := c.locked(func() error { return c.buildComponent(ctx, kubernetes) }); err != nil {
				return err
			}
			fmt.Println(c.bin(""))
			return nil
		})
	add("status", "print what runs; fails if anything is missing", cobra.NoArgs,
		func(ctx context.Context, _ []string) error { return c.Status(ctx) })
	add("check", "prove that the cluster does what the end-to-end tests need (about two minutes; kills and restarts n3)", cobra.NoArgs,
		func(ctx context.Context, _ []string) error { return c.locked(func() error { return c.Check(ctx) }) })
	add("kubeconfig", "print the path of the administrator's kubeconfig (its server is reachable by exec-in-lab only)", cobra.NoArgs,
		func(context.Context, []string) error {
			fmt.Println(c.kubeconfig("admin"))
			return nil
		})
	add("load-image TAR...", "put image archives (OCI or Docker) onto every node; steps need imagePullPolicy Never or IfNotPresent", cobra.MinimumNArgs(1),
		func(ctx context.Context, args []string) error {
			return c.locked(func() error { return c.LoadImages(ctx, args) })
		})
	add("tag-image IMAGE NAME", "give an image that is on the nodes a second name", cobra.ExactArgs(2),
		func(ctx context.Context, args []string) error {
			return c.locked(func() error { return c.TagImage(ctx, args[0], args[1]) })
		})
	add("requests", "count the API server's requests by who made them, from its audit log", cobra.NoArgs,
		func(context.Context, []string) error { return c.Requests(os.Stdout) })
	add("bucket", "print how many bytes and answers have left the bucket (JSON)", cobra.NoArgs,
		func(ctx context.Context, _ []string) error { return c.BucketCounters(ctx, os.Stdout) })
	passing("kubectl ARG...", "run kubectl, of the cluster's version, against the cluster", cobra.ArbitraryArgs,
		func(_ context.Context, args []string) error {
			return c.Exec(append([]string{c.bin("kubectl")}, args...))
		})
	passing("exec-in-lab COMMAND...", "run a command in the cluster's network, where pods, Services and their names are reachable", cobra.MinimumNArgs(1),
		func(_ context.Context, args []string) error { return c.Exec(args) })
	passing("exec-in-node NODE COMMAND...", "run a command as a process of a node, with its mounts, network and process ids", cobra.MinimumNArgs(2),
		func(_ context.Context, args []string) error { return c.ExecInNode(args[0], args[1:]) })
	node("kill-node", "end a node at once, with all its pods, as a power cut does", c.KillNode)
	node("start-node", "start a killed node again and wait until it is ready", c.StartNode)
	node("pause-node", "freeze every process of a node", c.PauseNode)
	node("resume-node", "let a frozen node go on", c.ResumeNode)
	node("cut-node", "take a node off the network; its processes go on", c.CutNode)
	node("join-node", "give a cut node its network back", c.JoinNode)
	return root
}

func nodeArg(cmd *cobra.Command, args []string) error {
	if err := cobra.ExactArgs(1)(cmd, args); err != nil {
		return err
	}
	if _, ok := nodeNamed(args[0]); !ok {
		return fmt.Errorf("there is no node %q: name one of %s", args[0], strings.Join(nodeNames(), ", "))
	}
	return nil
}

// stateFolder is where everything is kept.
func stateFolder() (string, error) {
	if dir := os.Getenv("STEPCACHE_CLUSTER_STATE"); dir != "" {
		return filepath.Abs(dir)
	}
	cache, err := os.UserCacheDir() // XDG_CACHE_HOME, or ~/.cache
	if err != nil {
		return "", fmt.Errorf("no folder for the cluster's state: %w; set STEPCACHE_CLUSTER_STATE", err)
	}
	return filepath.Join(cache, "stepcache-cluster"), nil
}
