// Package process runs child processes that never outlive this one.
//
// It owns starting, asking to stop and killing; what the child is for is its caller's. Concurrency: a
// Process is safe for concurrent use. Failure: Start fails if the program cannot run; a child that ends
// later closes Done, and Err and Tail say how. It imports nothing of this module.
package process

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
)

// Process is a running child.
type Process struct {
	cmd  *exec.Cmd
	log  string
	from int64 // where its part of the log begins
	done chan struct{}
	err  error // set before done is closed
}

// Start runs the command in a process group of its own, so that a terminal's Ctrl-C reaches this process
// only, which then stops its children in order. Standard output and error go to the file named log
// (appended; empty: thrown away). The kernel kills the child when this process dies.
func Start(cmd *exec.Cmd, log string) (*Process, error) {
	p := &Process{cmd: cmd, log: log, done: make(chan struct{})}
	var out *os.File
	if log != "" {
		var err error
		if out, err = os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
			return nil, err
		}
		if info, err := out.Stat(); err == nil {
			p.from = info.Size()
		}
		cmd.Stdout, cmd.Stderr = out, out
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	started := make(chan error, 1)
	go func() {
		// The parent-death signal is sent when the *thread* that forked ends: it must live as long as the
		// child (prctl(2), PR_SET_PDEATHSIG).
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(p.done)
		if out != nil {
			defer out.Close()
		}
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	return p, nil
}

// Done is closed when the child has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err says how the child ended (nil: status 0); call it after Done.
func (p *Process) Err() error { return p.err }

// Pid is the child's process id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Signal sends a signal; a child that has ended is no error.
func (p *Process) Signal(s os.Signal) { _ = p.cmd.Process.Signal(s) }

// Stop asks the child to end and kills it when ctx ends first; it returns when the child is gone.
func (p *Process) Stop(ctx context.Context) {
	p.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return
	case <-ctx.Done():
	}
	p.Kill()
}

// Kill kills the child and waits for it.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// Tail is the end of the child's log, for an error message.
func (p *Process) Tail() string {
	const lines, most = 5, 4 << 10
	b, err := os.ReadFile(p.log)
	if err != nil {
		return ""
	}
	b = bytes.TrimSpace(b[max(0, len(b)-most, min(int(p.from), len(b))):])
	all := bytes.Split(b, []byte("\n"))
	return string(bytes.Join(all[max(0, len(all)-lines):], []byte("\n")))
}
