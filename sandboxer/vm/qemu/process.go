package qemu

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

// process is the hypervisor: a child, or after a restart of the daemon a stranger.
type process struct {
	pid   int
	pidfd *os.File
}

// spawn starts path with args in a session of its own, with the descriptors stdio (0, 1 and 2) and
// files (from 3 on), inside the cgroups of the given cgroup.procs files from its first instruction.
// It outlives this daemon.
func spawn(path string, args []string, stdio [3]int, files []*os.File, cgroupProcs []string) (*process, error) {
	if err := keepDescriptors(); err != nil {
		return nil, fmt.Errorf("cannot keep descriptors from the hypervisor: %w", err)
	}
	attr := &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Files: []uintptr{uintptr(stdio[0]), uintptr(stdio[1]), uintptr(stdio[2])},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	}
	for _, f := range files {
		attr.Files = append(attr.Files, f.Fd())
	}
	pidfd := -1
	attr.Sys.PidFD = &pidfd

	var pid int
	err := cgroup.Start(cgroupProcs, attr.Sys, func() (err error) {
		pid, _, err = syscall.StartProcess(path, append([]string{path}, args...), attr)
		return err
	})
	runtime.KeepAlive(files)
	if err != nil {
		return nil, fmt.Errorf("cannot execute %s: %w", path, err)
	}
	return adopt(pid, pidfd)
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

// adopt wraps a process. It takes over pidfd, and makes one if that is negative.
func adopt(pid, pidfd int) (*process, error) {
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
	return &process{pid: pid, pidfd: os.NewFile(uintptr(pidfd), "pidfd")}, nil
}

// alive says whether the process runs; a zombie does not.
func (p *process) alive() bool {
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

// wait returns when the process has ended and, if it was a child, is reaped. known says whether it
// was.
func (p *process) wait() (status syscall.WaitStatus, known bool) {
	if raw, err := p.pidfd.SyscallConn(); err == nil {
		raw.Read(func(fd uintptr) bool { return readable(int(fd)) })
	}
	for {
		pid, err := syscall.Wait4(p.pid, &status, 0, nil)
		if err == syscall.EINTR {
			continue
		}
		return status, err == nil && pid == p.pid
	}
}

// kill sends SIGKILL, to this process and never to a later one with its number.
func (p *process) kill() {
	if raw, err := p.pidfd.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
	}
}

// startTime is when the process started, in clock ticks after the host's boot. With the pid it
// names a process for ever.
func (p *process) startTime() (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.pid))
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

// executable is the path of the program, without the kernel's remark that it was replaced.
func (p *process) executable() (string, error) {
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.pid))
	return strings.TrimSuffix(path, " (deleted)"), err
}

// named says whether the process was started with -name name.
func (p *process) named(name string) bool {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.pid))
	args := strings.Split(string(b), "\x00")
	for i := range len(args) - 1 {
		if args[i] == "-name" && args[i+1] == name {
			return true
		}
	}
	return false
}

// readNow reads what is there; again says that there is nothing yet.
func readNow(fd int, p []byte) (n int, again bool) {
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

// writeFile replaces the file at path at once or not at all.
func writeFile(path string, content []byte) error {
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

// exitCode is the status as a shell would say it.
func exitCode(ws syscall.WaitStatus) (code int, how string) {
	if ws.Signaled() {
		return 128 + int(ws.Signal()), fmt.Sprintf("was killed by %s", unix.SignalName(ws.Signal()))
	}
	return ws.ExitStatus(), fmt.Sprintf("exited with status %d", ws.ExitStatus())
}

// bootID names this boot of the host.
func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}

// within waits for c at most d.
func within(c <-chan struct{}, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-c:
		return true
	case <-timer.C:
		return false
	}
}
