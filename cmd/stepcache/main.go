// Command stepcache is the one binary of Stepcache: the workers and mounts that serve a dataset, local
// mode, and the commands with which a person looks at a tier.
//
// Sub-commands are thin: they parse flags, call one package, and print. Exit status: 0 done, 1 failed,
// 2 wrong usage; `stepcache local` ends with its command's own.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/client-go/tools/clientcmd"
)

// version is set by the linker.
var version = "dev"

func main() {
	// Commands of a person speak through their own output; worker and mount log more (see logger).
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})))
	ctx, stop := signal.NotifyContext(context.Background(), endings()...)
	root := rootCommand()
	cmd, err := root.ExecuteContextC(ctx)
	if err != nil && cmd == root {
		err = usage{err} // it runs nothing itself: there is no such command
	}
	err = interrupted(context.Cause(ctx), err)
	stop()
	os.Exit(exitStatus(os.Stderr, cmd.CommandPath(), err))
}

// interrupted says of an error whose cause is a signal that it is, instead of what the code has for it.
func interrupted(signal, err error) error {
	switch {
	case signal == nil || err == nil:
		return err
	case err.Error() == signal.Error() || err == context.Canceled:
		return errors.New("interrupted")
	case errors.Is(err, signal) || errors.Is(err, context.Canceled):
		return fmt.Errorf("interrupted: %w", err)
	}
	return err
}

// endings are the signals that ask the program to end, which it does in order. A closed terminal is one of
// them, except under nohup, which has it ignored.
func endings() []os.Signal {
	all := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) {
		all = append(all, syscall.SIGHUP)
	}
	return all
}

// exit ends the program with a status and no word, since whoever failed has spoken.
type exit int

func (e exit) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// usage is an error in how the program was called.
type usage struct{ error }

// noCluster is the error of a command that cannot find out how to reach a cluster; way is how it is told.
func noCluster(command, way string, err error) error {
	if clientcmd.IsEmptyConfig(err) { // its text names a variable that no help does
		err = fmt.Errorf("this is not a pod, and there is no kubeconfig: name one with %s", way)
	}
	return fmt.Errorf("%s: no cluster: %w", command, err)
}

func exitStatus(stderr *os.File, command string, err error) int {
	var status exit
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status):
		return int(status)
	case errors.As(err, &usage{}):
		fmt.Fprintf(stderr, "stepcache: %v\nSee `%s --help`.\n", err, command)
		return 2
	default:
		fmt.Fprintln(stderr, "stepcache:", err)
		return 1
	}
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "stepcache",
		Short: "A data-locality cache for parallel workflow steps",
		Long: `Stepcache puts a tier of in-memory cache workers between a bucket and the steps that read it.

Start with "stepcache local": it runs the tier on this machine from the manifests a cluster takes.`,
		SilenceErrors: true, SilenceUsage: true,
		Version: version,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage{err} })
	root.AddCommand(
		localCommand(), workerCommand(), mountCommand(), sidecarCommand(), stageCommand(), webhookCommand(), controllerCommand(),
		nodeCommand(), keeperCommand(), uninstallCommand(), artifactCommand(), lintCommand(),
		loadCommand(), refreshCommand(), statusCommand(), lsCommand(), getCommand(), verifyCommand(), benchCommand(),
		&cobra.Command{
			Use: "version", Short: "Print the version", Args: args(cobra.NoArgs),
			Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), version) },
		},
	)
	checkArguments(root)
	return root
}

// checkArguments makes wrong arguments of the commands that cobra adds the errors that they are of all others.
func checkArguments(root *cobra.Command) {
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		switch c.Name() {
		case "help":
			c.Args = args(func(_ *cobra.Command, given []string) error {
				_, _, err := root.Find(given)
				return err
			})
		case "completion":
			var shells []string
			for _, shell := range c.Commands() {
				shell.Args = args(shell.Args)
				shells = append(shells, shell.Name())
			}
			c.Args = nil
			c.RunE = func(*cobra.Command, []string) error {
				return usage{fmt.Errorf("completion: name a shell, one of %s", strings.Join(shells, ", "))}
			}
		}
	}
}

// args makes wrong arguments a usage error.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, given []string) error {
		if err := check(cmd, given); err != nil {
			return usage{fmt.Errorf("%s: %w", cmd.Name(), err)}
		}
		return nil
	}
}
