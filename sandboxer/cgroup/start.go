package cgroup

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// Start calls start, which makes one process with attr, in such a way that the process is in the
// cgroups of the given cgroup.procs files from its first instruction. Start fills the cgroup fields
// of attr; its other errors are start's.
//
// On v2 the child is cloned into its cgroup. On v1 every thread is in cgroups of its own, and a
// child inherits those of the thread that made it: start runs in a thread that has entered them and
// that ends afterwards. Moving a process that runs already would wait for a grace period in each
// hierarchy, ten milliseconds in all.
func Start(procs []string, attr *syscall.SysProcAttr, start func() error) error {
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
