package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// Interrupted is the exit status of a bench that was interrupted, so that a script that runs several does not go on.
const Interrupted = 130

// Main runs a bench's command and ends the program with its status: 0 where all went well, Interrupted, or 1. What
// interrupts it is an end of the command's context; the command tells what there is and stops what it has started.
func Main(command *cobra.Command) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	// The packages under measurement speak through the report.
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})))
	command.SilenceUsage, command.SilenceErrors = true, true
	err := command.ExecuteContext(ctx)
	if err == nil {
		return
	}
	status := 1
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err, status = errors.New("interrupted; everything is stopped and removed"), Interrupted
	}
	fmt.Fprintf(os.Stderr, "%s: %v\n", command.Name(), err)
	os.Exit(status)
}
