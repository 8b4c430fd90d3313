package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Start calls start, which makes one process with attr, in such a way that the process is in the
// cgroups of the given cgroup.procs files from its first instruction. Start fills the cgroup fields
// of attr; its other errors are start's.
//
// A daemon that the kernel is to spare when memory runs out passes that on to its children. Where
// attr asks for a pidfd, Start takes it from the process: a pod's share of the memory is in the
// hypervisor, and who is to be killed must be the kernel's choice among those.
//
// On v2 the child is cloned into its cgroup. On v1 every thread is in cgroups of its own, and a
// child inherits those of the thread that made it: start runs in a thread that has entered them and
// that ends afterwards. Moving a process that runs already would wait for a grace period in each
// hierarchy, ten milliseconds in all.
func Start(procs []string, attr *syscall.SysProcAttr, start func() error) error {
	started := start
	start = func() error {
		if err := started(); err != nil {
			return err
		}
		if attr.PidFD != nil && *attr.PidFD >= 0 {
			if err := unspare(*attr.PidFD); err != nil {
				slog.Warn("a process is spared like the daemon when memory runs out", "error", err)
			}
		}
		return nil
	}
	var tasks []string
	for _, file := range procs {
		dir := filepath.Dir(file)
		var fs unix.Statfs_t
		if err := unix.Statfs(file, &fs); err != nil {
			return fmt.Errorf("cannot enter the cgroup %s: %w", dir, err)
		}
		switch fs.Type {
		case unix.CGROUP2_SUPER_MAGIC:
			if attr.UseCgroupFD {
				return fmt.Errorf("cannot enter the cgroup %s: a process is in one cgroup v2 only", dir)
			}
			d, err := os.Open(dir)
			if err != nil {
				return fmt.Errorf("cannot enter the cgroup: %w", err)
			}
			defer d.Close()
			attr.UseCgroupFD, attr.CgroupFD = true, int(d.Fd())
		case unix.CGROUP_SUPER_MAGIC:
			tasks = append(tasks, filepath.Join(dir, "tasks"))
		default:
			return fmt.Errorf("cannot enter the cgroup %s: it is on no cgroup file system", dir)
		}
	}
	if len(tasks) == 0 {
		return start()
	}
	result := make(chan error, 1)
	go inTasks(tasks, start, result)
	return <-result
}

// unspare sets the OOM score adjustment of the process behind a pidfd to 0 if it is less. It needs no
// privilege.
func unspare(pidfd int) error {
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", pidfd))
	if err != nil {
		return err
	}
	// Negative once the process has been waited for.
	_, after, _ := strings.Cut(string(info), "\nPid:")
	line, _, _ := strings.Cut(after, "\n")
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		return fmt.Errorf("cannot tell the process of a pidfd: %w", err)
	}
	if pid <= 0 {
		return nil
	}
	path := fmt.Sprintf("/proc/%d/oom_score_adj", pid)
	text, err := os.ReadFile(path)
	if err == nil && strings.HasPrefix(string(text), "-") {
		err = os.WriteFile(path, []byte("0"), 0)
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil // it has ended
	}
	return err
}

func inTasks(tasks []string, start func() error, result chan<- error) {
	// No UnlockOSThread below: the thread ends with the goroutine.
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The main thread cannot end. While it is held here, another goroutine runs elsewhere.
		done := make(chan error, 1)
		go inTasks(tasks, start, done)
		err := <-done
		runtime.UnlockOSThread()
		result <- err
		return
	}
	for _, file := range tasks {
		if err := os.WriteFile(file, []byte("0"), 0); err != nil {
			result <- fmt.Errorf("cannot enter the cgroup: %w", err)
			return
		}
	}
	result <- start()
}
