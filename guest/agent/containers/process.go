package containers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runc/libcontainer"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// unknownExit is the exit status of a process whose status could not be learned.
const unknownExit = 255

// process is the init process of a container or an exec. What is in the first group does not
// change once the process has been launched.
type process struct {
	c      *container
	execID string // "" for init
	stdio  stdioNames
	// streams are where those of stdio are found. peers are those among them for which the guest
	// listens; nil for none.
	streams streams
	peers   *peers
	spec    *specs.Process
	lp      *libcontainer.Process
	io      *processIO

	exited chan struct{} // closed when the process has been reaped
	// done is closed when also its output is at the host, or need not be for the exit to be reported:
	// see reportAfter. delivered is closed when it is there, or is given up.
	done      chan struct{}
	delivered chan struct{}

	launched bool // launch has been called and looks after the streams

	// purged says that the announcement of an exec was taken back. It is guarded by the container's mu.
	purged bool

	mu         sync.Mutex
	status     task.Status
	claimed    bool // an exec that is being started or dropped
	pid        uint32
	exitStatus uint32
	exitedAt   time.Time
	width      uint32 // wished for before there was a terminal
	height     uint32
}

func newProcess(c *container, execID string, names stdioNames) *process {
	return &process{
		c:         c,
		execID:    execID,
		stdio:     names,
		streams:   c.service.streams,
		exited:    make(chan struct{}),
		done:      make(chan struct{}),
		delivered: make(chan struct{}),
		status:    task.Status_CREATED,
	}
}

// String names the process in errors.
func (p *process) String() string {
	if p.execID == "" {
		return "container " + p.c.id
	}
	return "exec " + p.execID + " of container " + p.c.id
}

func (p *process) pidNow() uint32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pid
}

// exit returns how and when the process ended; the time is zero while it has not.
func (p *process) exit() (uint32, time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exitStatus, p.exitedAt
}

func (p *process) statusNow() task.Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status
}

// claim gives the caller the say over an exec that has not been started: it alone starts it or
// drops it.
func (p *process) claim() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.status != task.Status_CREATED || p.claimed {
		return false
	}
	p.claimed = true
	return true
}

func (p *process) hasExited() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

// launch lets libcontainer make the process and takes charge of it: from here on reap waits for
// it. After an error nothing is left of it, and the host has EOF on its streams.
func (p *process) launch(lc func(*libcontainer.Process) error, uid, gid int) error {
	lp, err := libcontainerProcess(p.spec)
	if err != nil {
		return err
	}
	p.launched = true
	lp.Init = p.execID == ""
	streams, err := openIO(p.stdio, p.streams, lp, uid, gid)
	if err != nil {
		return err
	}
	p.mu.Lock()
	if p.width > 0 && p.height > 0 {
		lp.ConsoleWidth, lp.ConsoleHeight = clamp16(p.width), clamp16(p.height)
	}
	p.mu.Unlock()
	if err := lc(lp); err != nil {
		streams.abort()
		return startError(p.spec.Args[0], p.c.id, err)
	}
	pid, err := lp.Pid()
	if err == nil {
		err = streams.begin(p.c.ctx)
	}
	if err != nil {
		lp.Signal(unix.SIGKILL)
		lp.Wait()
		streams.abort()
		return fmt.Errorf("cannot start %s: %w", p, err)
	}
	p.mu.Lock()
	p.lp, p.io, p.pid = lp, streams, uint32(pid)
	width, height := p.width, p.height
	if p.execID != "" {
		p.status = task.Status_RUNNING
	}
	p.mu.Unlock()
	if p.stdio.terminal && width > 0 && height > 0 {
		p.resize(width, height)
	}
	go p.reap()
	return nil
}

// fail ends a process that could not be started, so that Wait and Delete have an answer.
func (p *process) fail() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.status == task.Status_STOPPED {
		return
	}
	p.status, p.exitStatus, p.exitedAt = task.Status_STOPPED, startFailed, time.Now()
	close(p.exited)
	close(p.done)
	close(p.delivered)
	if p.peers != nil {
		// The client's end of an exec that failed waits for its streams as it does for those of others.
		go p.peers.finish(func() {})
	}
}

// startFailed is the exit status of a process that never ran; containerd reports 128 as well.
const startFailed = 128

// reap waits for the process. Everything that must be true before its exit is reported happens
// here, in this order.
func (p *process) reap() {
	state, err := p.lp.Wait()
	at := time.Now()
	status := exitStatus(state)
	if state == nil {
		p.c.log.Error("cannot learn how a process ended", "process", p.String(), "err", err)
	}
	p.c.checkOOM()

	p.mu.Lock()
	p.status, p.exitStatus, p.exitedAt = task.Status_STOPPED, status, at
	p.mu.Unlock()
	close(p.exited)

	if p.execID == "" {
		p.c.initExited()
	}
	go func() {
		defer close(p.delivered)
		p.peers.finish(p.io.finish)
	}()
	p.reported()
	close(p.done)
}

// reported returns when the exit may be told: see reportAfter.
func (p *process) reported() {
	limit, bounded := p.reportAfter()
	if !bounded {
		<-p.delivered
		return
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-p.delivered:
	case <-timer.C:
	}
}

// reportAfter is how long at most after a process's exit it is reported although not all of its
// output is at the host. A daemon that makes a process takes its output, too, and nobody is told of
// the exit before: there is no bound. The client of a direct container must learn of the exit even
// while the daemon is away that takes the output. And a client for which the guest listens reads
// until the streams end, whenever it is told: it may not have connected yet, or never do so.
func (p *process) reportAfter() (limit time.Duration, bounded bool) {
	if !p.c.direct {
		return 0, false
	}
	for _, name := range p.stdio.all()[1:] {
		if name != "" && (p.peers == nil || p.peers.all[name] == nil) {
			return p.c.service.limits.report, true
		}
	}
	return 0, p.peers != nil
}

// exitStatus is the code that a shell would report: of a signal, 128 more than its number.
func exitStatus(state *os.ProcessState) uint32 {
	if state == nil {
		return unknownExit
	}
	status, ok := state.Sys().(syscall.WaitStatus)
	switch {
	case !ok:
		return unknownExit
	case status.Signaled():
		return 128 + uint32(status.Signal())
	}
	return uint32(status.ExitStatus())
}

// signal sends sig, or with 0 only asks whether the process is there.
func (p *process) signal(sig unix.Signal) error {
	if p.hasExited() {
		return fmt.Errorf("%s: process has already finished: %w", p, errdefs.ErrNotFound)
	}
	p.mu.Lock()
	lp := p.lp
	p.mu.Unlock()
	if lp == nil {
		return fmt.Errorf("%s: process has not been started: %w", p, errdefs.ErrFailedPrecondition)
	}
	err := lp.Signal(sig)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrProcessDone), errors.Is(err, unix.ESRCH):
		return fmt.Errorf("%s: process has already finished: %w", p, errdefs.ErrNotFound)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("cannot send signal %d to %s: %w: %w", int(sig), p, err, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("cannot send signal %d to %s: %w", int(sig), p, err)
}

func (p *process) resize(width, height uint32) error {
	if !p.stdio.terminal {
		return fmt.Errorf("%s has no terminal to resize: %w", p, errdefs.ErrFailedPrecondition)
	}
	p.mu.Lock()
	p.width, p.height = width, height
	streams := p.io
	p.mu.Unlock()
	if streams == nil {
		return nil
	}
	raw, err := streams.master.SyscallConn()
	if err == nil {
		controlErr := raw.Control(func(fd uintptr) {
			err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Col: clamp16(width), Row: clamp16(height)})
		})
		err = errors.Join(controlErr, err)
	}
	if errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("%s: process has already finished: %w", p, errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("cannot resize the terminal of %s to %dx%d: %w", p, width, height, err)
	}
	return nil
}

func clamp16(n uint32) uint16 { return uint16(min(n, 0xffff)) }

func (p *process) closeStdin() {
	p.mu.Lock()
	streams := p.io
	p.mu.Unlock()
	if streams != nil && streams.input != nil {
		streams.input.closeSoon()
	}
}

// await returns when ch is closed, or with the error of ctx.
func await(ctx context.Context, ch <-chan struct{}) error {
	select {
	case <-ch:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
