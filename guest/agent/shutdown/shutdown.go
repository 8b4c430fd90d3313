// Package shutdown ends the guest. PID 1 cannot just exit: the kernel would panic. Whatever happens,
// the machine is powered off, so that the host sees the end of the hypervisor, and the last lines
// on the console say why.
package shutdown

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
)

const (
	// MaxGrace bounds the time that containers get between SIGTERM and SIGKILL.
	MaxGrace = 60 * time.Second
	// killTime is what StopAll may take beyond its grace.
	killTime = 5 * time.Second
	// syncTime bounds the writing of what is in memory: the host may be the one who hangs.
	syncTime = 5 * time.Second
)

// Machine ends once.
type Machine struct {
	// Stop stops all containers: SIGTERM, after grace SIGKILL.
	Stop func(ctx context.Context, grace time.Duration)
	// Flush waits until what was logged is on the console.
	Flush func()
	Log   *slog.Logger

	quiesce sync.Once
}

// Quiesce stops the containers, unmounts the share and writes everything out. It returns after a
// bounded time, whether or not that worked. A second call waits for the first.
func (m *Machine) Quiesce(grace time.Duration) {
	m.quiesce.Do(func() {
		grace = max(0, min(grace, MaxGrace))
		m.Log.Info("stopping the containers", "grace", grace)
		bounded(grace+killTime, func(ctx context.Context) { m.Stop(ctx, grace) })
		bounded(syncTime, func(context.Context) { release(m.Log) })
	})
}

// release lets go of the file systems. Tests replace it.
var release = func(log *slog.Logger) {
	// Lazily: a container that could not be killed must not keep it. What was written through the
	// share is with the host already, and sync covers the disks.
	if err := unix.Unmount(protocol.SharePath, unix.MNT_DETACH); err != nil && err != unix.EINVAL {
		log.Warn("cannot unmount the share", "error", err)
	}
	unix.Sync()
}

// bounded runs f and waits for it at most for d.
func bounded(d time.Duration, f func(context.Context)) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(ctx)
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// PowerOff ends the machine. It does not return.
func (m *Machine) PowerOff(reason string) {
	m.Log.Info("powering off", "reason", reason)
	m.Flush()
	powerOff()
}

// Fatal prints why the agent cannot go on and powers the machine off. It does not return.
func Fatal(err error) {
	fmt.Fprintf(os.Stderr, "vmm-task: %v\n", err)
	powerOff()
}

// Guard is deferred by every goroutine of the agent. A panic ends the machine with its reason on
// the console, instead of a panic of the kernel about the death of PID 1.
func Guard() {
	if r := recover(); r != nil {
		fmt.Fprintf(os.Stderr, "vmm-task: panic: %v\n%s\n", r, debug.Stack())
		powerOff()
	}
}

// powerOff never returns. Only PID 1 of a machine may end it; anything else just exits.
func powerOff() {
	if os.Getpid() != 1 {
		os.Exit(1)
	}
	// The last words must have left the console.
	unix.IoctlSetInt(2, unix.TCSBRK, 1)
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	// Without a way to power off, a restart ends the machine as well: it is started to end then.
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	select {}
}
