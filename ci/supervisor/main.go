// Command supervisor is a service manager in miniature, for tests of a daemon's restarts on machines
// without systemd: it keeps the daemon's descriptors and starts it again when it has ended.
//
//	supervisor PIDFILE PROGRAM ARGUMENTS...
//
// PIDFILE holds the daemon's process id from when it has said READY=1 until it has ended. SIGHUP ends
// the daemon with SIGTERM, and the next one begins; SIGTERM ends both.
package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/sandboxer/handover/handovertest"
)

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: supervisor PIDFILE PROGRAM ARGUMENTS...")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3:]); err != nil {
		fmt.Fprintln(os.Stderr, "supervisor:", err)
		os.Exit(1)
	}
}

func run(pidFile, program string, args []string) (err error) {
	// What this process happens to have inherited is not passed on: as the kept descriptors take its
	// numbers, the daemons would differ in what they have.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("cannot keep inherited descriptors to itself: %w", err)
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM, syscall.SIGINT)
	manager, err := handovertest.NewManager()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, manager.Close()) }()
	for failures := 0; ; {
		states := len(manager.States())
		cmd := exec.Command(program, args...)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if err := manager.Start(cmd); err != nil {
			return err
		}
		exited := make(chan error, 1)
		go func() { exited <- cmd.Wait() }()
		ready, stop := false, false
		for ended := false; !ended; {
			select {
			case s := <-signals:
				stop = stop || s != syscall.SIGHUP
				_ = cmd.Process.Signal(syscall.SIGTERM)
			case err := <-exited:
				ended = true
				fmt.Fprintf(os.Stderr, "supervisor: the daemon has ended: %v; %d descriptors are kept\n", err, len(manager.Names()))
			case <-time.After(5 * time.Millisecond):
				if !ready && slices.ContainsFunc(manager.States()[states:], isReady) {
					ready = true
					if err := writeFile(pidFile, strconv.Itoa(cmd.Process.Pid)); err != nil {
						return errors.Join(err, cmd.Process.Kill())
					}
				}
			}
		}
		_ = os.Remove(pidFile)
		if stop {
			return nil
		}
		// One that does not start is not started forever.
		if failures++; ready {
			failures = 0
		}
		if failures == 5 {
			return errors.New("the daemon does not get ready")
		}
	}
}

func isReady(state string) bool {
	return slices.Contains(strings.Split(state, "\n"), "READY=1")
}

func writeFile(path, text string) error {
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
