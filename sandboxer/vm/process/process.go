// Package process runs a hypervisor's program: started inside its cgroups, watched and signalled through
// a pidfd, found again by a later daemon, and its serial console drained into a bounded log. It is what
// the drivers have in common.
package process

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/sandboxer/cgroup"
)

// Process is the hypervisor: a child, or after a restart of the daemon a stranger.
type Process struct {
	PID   int
	pidfd *os.File
}

// Command is a program to start.
type Command struct {
	Path string
	Args []string // without the program's name
	Env  []string // beside PATH
	// Stdio are the descriptors 0, 1 and 2; Files those from 3 on. The caller keeps them.
	Stdio [3]int
	Files []*os.File
	// CgroupProcs are the cgroup.procs files of the cgroups in which it executes its first instruction.
	CgroupProcs []string
}

// Spawn starts a program in a session of its own. It outlives this daemon. Close ends the watching.
func Spawn(c Command) (*Process, error) {
	if err := keepDescriptors(); err != nil {
		return nil, fmt.Errorf("cannot keep descriptors from the hypervisor: %w", err)
	}
	attr := &syscall.ProcAttr{
		Dir:   "/",
		Env:   append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, c.Env...),
		Files: []uintptr{uintptr(c.Stdio[0]), uintptr(c.Stdio[1]), uintptr(c.Stdio[2])},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	}
	for _, f := range c.Files {
		attr.Files = append(attr.Files, f.Fd())
	}
	pidfd := -1
	attr.Sys.PidFD = &pidfd

	var pid int
	err := cgroup.Start(c.CgroupProcs, attr.Sys, func() (err error) {
		pid, _, err = syscall.StartProcess(c.Path, append([]string{c.Path}, c.Args...), attr)
		return err
	})
	runtime.KeepAlive(c.Files)
	if err != nil {
		return nil, fmt.Errorf("cannot execute %s: %w", c.Path, err)
	}
	return Adopt(pid, pidfd)
}

// keepDescriptors makes everything beyond the standard streams close-on-exec. Whoever started this
// daemon may have left it descriptors that are not, and they are no business of a hypervisor.
func keepDescriptors() error {
	err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	if err != unix.ENOSYS && err != unix.EINVAL {
		return err
	}
	// Linux before 5.11.
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}

// Adopt wraps a process. It takes over pidfd, and makes one if that is negative.
func Adopt(pid, pidfd int) (*Process, error) {
	if pidfd < 0 {
		var err error
		if pidfd, err = unix.PidfdOpen(pid, 0); err != nil {
			return nil, fmt.Errorf("cannot watch process %d: %w", pid, err)
		}
	}
	// Lets the runtime poll it, so that waiting costs no thread.
	if err := unix.SetNonblock(pidfd, true); err != nil {
		unix.Close(pidfd)
		return nil, fmt.Errorf("cannot watch process %d: %w", pid, err)
	}
	return &Process{PID: pid, pidfd: os.NewFile(uintptr(pidfd), "pidfd")}, nil
}

// Close ends the watching; the process goes on.
func (p *Process) Close() error { return p.pidfd.Close() }

// Alive says whether the process runs; a zombie does not.
func (p *Process) Alive() bool {
	ended := true
	raw, err := p.pidfd.SyscallConn()
	if err == nil {
		raw.Control(func(fd uintptr) { ended = readable(int(fd)) })
	}
	return !ended
}

func readable(fd int) bool {
	set := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(set, 0)
		if err != unix.EINTR {
			return err != nil || n > 0
		}
	}
}

// Wait returns when the process has ended and, if it was a child, is reaped. known says whether it
// was.
func (p *Process) Wait() (status syscall.WaitStatus, known bool) {
	if raw, err := p.pidfd.SyscallConn(); err == nil {
		raw.Read(func(fd uintptr) bool { return readable(int(fd)) })
	}
	for {
		pid, err := syscall.Wait4(p.PID, &status, 0, nil)
		if err == syscall.EINTR {
			continue
		}
		return status, err == nil && pid == p.PID
	}
}

// Kill sends SIGKILL, to this process and never to a later one with its number.
func (p *Process) Kill() {
	if raw, err := p.pidfd.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
	}
}

// StartTime is when the process started, in clock ticks after the host's boot. With the pid it
// names a process for ever.
func (p *Process) StartTime() (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID))
	if err != nil {
		return 0, err
	}
	// The second field is the name in parentheses, which may contain anything.
	i := bytes.LastIndexByte(stat, ')')
	fields := strings.Fields(string(stat[i+1:]))
	if i < 0 || len(fields) < 20 {
		return 0, errors.New("cannot understand /proc/<pid>/stat")
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// Executable is the path of the program, without the kernel's remark that it was replaced.
func (p *Process) Executable() (string, error) {
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.PID))
	return strings.TrimSuffix(path, " (deleted)"), err
}

// Named says whether the process was started with -name name.
func (p *Process) Named(name string) bool {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.PID))
	args := strings.Split(string(b), "\x00")
	for i := range len(args) - 1 {
		if args[i] == "-name" && args[i+1] == name {
			return true
		}
	}
	return false
}

// ReadNow reads what is there; again says that there is nothing yet.
func ReadNow(fd int, p []byte) (n int, again bool) {
	for {
		n, err := unix.Read(fd, p)
		switch err {
		case nil:
			return n, false
		case unix.EINTR:
		case unix.EAGAIN:
			return 0, true
		default:
			return 0, false
		}
	}
}

// WriteFile replaces the file at path at once or not at all.
func WriteFile(path string, content []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, content, 0o600); err != nil {
		os.Remove(tmp)
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		os.Remove(tmp)
		return err
	}
	return nil
}

// ExitCode is the status as a shell would say it.
func ExitCode(ws syscall.WaitStatus) (code int, how string) {
	if ws.Signaled() {
		return 128 + int(ws.Signal()), fmt.Sprintf("was killed by %s", unix.SignalName(ws.Signal()))
	}
	return ws.ExitStatus(), fmt.Sprintf("exited with status %d", ws.ExitStatus())
}

// BootID names this boot of the host.
func BootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}

// Within waits for c at most d.
func Within(c <-chan struct{}, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-c:
		return true
	case <-timer.C:
		return false
	}
}

// Printable returns at most limit bytes of b with everything replaced that could disturb a terminal
// or a log.
func Printable(b []byte, limit int) string {
	cut := len(b) > limit
	if cut {
		b = b[:limit]
	}
	s := strings.Map(func(r rune) rune {
		switch {
		case r == '\t':
			return ' '
		case r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 || r == '\ufffd':
			return -1
		}
		return r
	}, strings.ToValidUTF8(string(b), ""))
	if cut {
		s += "…"
	}
	return s
}

// Remove deletes files that may not be there.
func Remove(paths ...string) error {
	var errs []error
	for _, p := range paths {
		if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
