package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// start runs a program in a network of the cluster so that it outlives this command: in a session of its
// own, without input, its output in a log. It is found again by name.
func (c *Cluster) start(name, network string, cmd *exec.Cmd) error {
	log, err := os.OpenFile(c.log(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = "/"
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setsid = true
	if err := c.inNetwork(network, cmd.Start); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	pid := cmd.Process.Pid
	began, err := startTime(pid)
	if err != nil {
		return fmt.Errorf("%s ended at once: %s", name, c.tail(name))
	}
	// Reaped here if it ends while this command still runs; else by the machine's first process.
	go func() { _ = cmd.Wait() }()
	return os.WriteFile(c.pidFile(name), fmt.Appendf(nil, "%d %s", pid, began), 0o644)
}

func (c *Cluster) pidFile(name string) string { return c.run(name + ".pid") }

// pid is the id of a running process that start began, or 0.
func (c *Cluster) pid(name string) int {
	text, err := os.ReadFile(c.pidFile(name))
	if err != nil {
		return 0
	}
	id, began, _ := strings.Cut(string(text), " ")
	pid, err := strconv.Atoi(id)
	if err != nil {
		return 0
	}
	if now, err := startTime(pid); err != nil || now != began {
		return 0
	}
	return pid
}

func (c *Cluster) running(name string) bool { return c.pid(name) != 0 }

// kill ends a process at once and waits until it is gone.
func (c *Cluster) kill(name string) error {
	deadline := time.Now().Add(30 * time.Second)
	for pid := c.pid(name); pid != 0; pid = c.pid(name) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("end %s: %w", name, err)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("end %s: process %d does not end; it hangs in the kernel", name, pid)
		}
		time.Sleep(10 * time.Millisecond)
	}
	err := os.Remove(c.pidFile(name))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// startTime tells a process from a later one with the same id. A process that has ended but was not waited
// for has none.
func startTime(pid int) (string, error) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return "", err
	}
	// The name, in brackets, may hold anything; the state and 18 more fields follow, then the start time.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return "", os.ErrProcessDone
	}
	return fields[19], nil
}

// tail is the end of a log, for errors.
func (c *Cluster) tail(name string) string {
	text, err := os.ReadFile(c.log(name))
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return fmt.Sprintf("the end of %s:\n%s", c.log(name), strings.Join(lines[max(0, len(lines)-8):], "\n"))
}
