// Command probe does in a pod what `cluster check` wants to see done there.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const usage = `probe serve              answer http on port 8080 with the host's name, until asked to end
probe get URL            print what an URL answers; tries for a minute
probe lookup NAME        print the addresses of a name; tries for a minute
probe eat MIB            use that much memory, then end`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := do(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func do(ctx context.Context, args []string) error {
	switch {
	case len(args) == 1 && args[0] == "serve":
		return serve(ctx)
	case len(args) == 2 && args[0] == "get":
		return tries(ctx, func(ctx context.Context) (string, error) { return get(ctx, args[1]) })
	case len(args) == 2 && args[0] == "lookup":
		return tries(ctx, func(ctx context.Context) (string, error) {
			found, err := net.DefaultResolver.LookupHost(ctx, args[1])
			return strings.Join(found, " "), err
		})
	case len(args) == 2 && args[0] == "eat":
		mib, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		eaten := make([]byte, mib<<20)
		for i := 0; i < len(eaten); i += 4096 {
			eaten[i] = 1
		}
		fmt.Println("ate", len(eaten), "bytes")
		return nil
	}
	return fmt.Errorf("usage:\n%s", usage)
}

func serve(ctx context.Context) error {
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	s := &http.Server{Addr: ":8080", Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, host)
	})}
	context.AfterFunc(ctx, func() { _ = s.Close() })
	if err := s.ListenAndServe(); err != http.ErrServerClosed {
		return err
	}
	return nil
}

func get(ctx context.Context, url string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", url, resp.Status)
	}
	return strings.TrimSpace(string(body)), err
}

// tries lets an address that is still being set up appear.
func tries(ctx context.Context, f func(context.Context) (string, error)) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		answer, err := f(ctx)
		if err == nil {
			fmt.Println(answer)
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(500 * time.Millisecond):
		}
	}
}
