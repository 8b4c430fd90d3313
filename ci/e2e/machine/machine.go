// Package machine boots a machine in namespaces of this one: a Debian root file system with its own
// systemd, package manager, network and cgroups, in which the appliance is installed and run as on
// a node. It needs root and util-linux, and no container engine.
//
// Programs in it see a node. The test sees their processes, files and sockets from the outside:
// process ids through PIDs, files and Unix sockets through Path.
package machine

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// boot is the script that makes the namespaces and becomes process 1.
//
//go:embed boot.sh
var boot []byte

// Bind is a file or directory of this machine that is in the booted one too.
type Bind struct {
	From, To string // absolute
	Writable bool
}

// Options say what a machine has beside its root file system.
type Options struct {
	Binds []Bind
	// Tmpfs are directories that are tmpfs. Without one, the root is an overlay, above which no
	// other overlay can lie.
	Tmpfs []string
	// Progress is told what takes long.
	Progress io.Writer
}

// Machine is a booted machine.
type Machine struct {
	// Init is its process 1, by this machine's number.
	Init int
	// Cgroup is the cgroup of all its processes in every hierarchy, as a path from the
	// hierarchy's root.
	Cgroup string

	dir     string
	cgroups []string
	output  string // file with what the boot script and systemd wrote
	exited  chan struct{}
	err     error // how process 1 ended; valid once exited is closed
	pid     int   // of the boot script
}

// name begins the names of a machine's directory in /tmp and of its cgroups. The process id of who
// made them follows.
const name = "kuasar-machine-"

// controllers of cgroup v1 that the machine gets, if this one has them.
var controllers = []string{"memory", "cpu", "cpuacct", "pids", "blkio", "devices", "freezer"}

// Start boots a machine and returns once systemd says that it runs. It dies with this process. If
// Start fails, nothing is left.
func Start(ctx context.Context, options Options) (_ *Machine, err error) {
	rootfs, err := Rootfs(ctx, options.Progress)
	if err != nil {
		return nil, err
	}
	sweepDead()
	m := &Machine{exited: make(chan struct{})}
	if m.dir, err = os.MkdirTemp("/tmp", fmt.Sprint(name, os.Getpid(), "-")); err != nil {
		return nil, fmt.Errorf("cannot boot a machine: %w", err)
	}
	m.Cgroup = "/" + filepath.Base(m.dir)
	m.output = filepath.Join(m.dir, "output")
	script := filepath.Join(m.dir, "boot.sh")
	work := filepath.Join(m.dir, "work")
	err = errors.Join(os.WriteFile(script, boot, 0o755), os.Mkdir(work, 0o755))
	legacy, cerr := m.makeCgroups()
	if err = errors.Join(err, cerr); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot boot a machine: %w", err), m.sweep())
	}
	var binds strings.Builder
	for _, b := range options.Binds {
		mode := "ro"
		if b.Writable {
			mode = "rw"
		}
		fmt.Fprintln(&binds, mode, b.From, b.To)
	}
	err = m.run(script, []string{
		"PATH=/usr/sbin:/usr/bin:/sbin:/bin",
		"LOWER=" + rootfs,
		"WORK=" + work,
		"CGROUPS=" + strings.Join(m.cgroups, " "),
		"LEGACY=" + strings.Join(legacy, " "),
		"DEVICES=net/tun fuse vsock vhost-vsock vhost-net",
		"TMPFS=" + strings.Join(options.Tmpfs, " "),
		"BINDS=" + binds.String(),
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot boot a machine: %w", err), m.sweep())
	}
	if err := m.waitRunning(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot boot a machine: %w", err), m.Close())
	}
	return m, nil
}

// run starts the script. Linux kills it when the thread that started it ends, so that thread is
// kept until then.
func (m *Machine) run(script string, env []string) error {
	output, err := os.Create(m.output)
	if err != nil {
		return err
	}
	defer output.Close()
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		cmd := exec.Command("/bin/sh", script, "enter")
		cmd.Env = env
		cmd.Stdout, cmd.Stderr = output, output
		// A group of its own, so that the interrupt of a terminal does not reach it.
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		m.pid = cmd.Process.Pid
		started <- nil
		m.err = cmd.Wait()
		close(m.exited)
	}()
	return <-started
}

// waitRunning finds process 1 and waits until its units are up.
func (m *Machine) waitRunning(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		// What unshare forked becomes systemd when the script has run.
		for _, child := range children(m.pid) {
			if path, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", child)); err == nil && strings.HasSuffix(path, "/systemd") {
				m.Init = child
			}
		}
		state := "systemd has not started"
		if m.Init != 0 {
			answer, _ := m.Run(ctx, "systemctl", "is-system-running")
			if state = strings.TrimSpace(answer); state == "running" {
				return nil
			}
			if state == "degraded" {
				failed, _ := m.Run(ctx, "systemctl", "--failed", "--no-legend", "--plain")
				return fmt.Errorf("units have failed:\n%s", failed)
			}
		}
		select {
		case <-m.exited:
			return fmt.Errorf("it has ended (%v): %s", m.err, m.written())
		case <-ctx.Done():
			return fmt.Errorf("%s: %w: %s", state, ctx.Err(), m.written())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (m *Machine) written() string {
	text, _ := os.ReadFile(m.output)
	return last(string(text), 2000)
}

// Command returns a command that runs in the machine, as root and without this process's
// environment; ctx ends it.
func (m *Machine) Command(ctx context.Context, command ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{
		"--target", strconv.Itoa(m.Init), "--mount", "--pid", "--ipc", "--uts", "--net", "--cgroup", "--root", "--wd",
		"--", "/usr/bin/env", "-i", "HOME=/root", "LC_ALL=C.UTF-8", "TERM=dumb", "SYSTEMD_PAGER=",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	}, command...)...)
	// What the command started in the background may hold its output open.
	cmd.WaitDelay = time.Second
	return cmd
}

// Run runs a command in the machine and returns what it wrote to both of its outputs, which the
// error repeats.
func (m *Machine) Run(ctx context.Context, command ...string) (string, error) {
	var output bytes.Buffer
	cmd := m.Command(ctx, command...)
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Run(); err != nil {
		return output.String(), fmt.Errorf("%s: %w: %s", strings.Join(command, " "), err, last(output.String(), 2000))
	}
	return output.String(), nil
}

// Path returns where a file of the machine is found from outside, for files and for Unix sockets.
// On its way to the last element, path must not cross an absolute symbolic link: that would lead
// to this machine's files.
func (m *Machine) Path(path string) string {
	return filepath.Join("/proc", strconv.Itoa(m.Init), "root", path)
}

// Write writes a file of the machine and makes its directory. See Path.
func (m *Machine) Write(path, text string) error {
	if err := os.MkdirAll(filepath.Dir(m.Path(path)), 0o755); err != nil {
		return err
	}
	return os.WriteFile(m.Path(path), []byte(text), 0o644)
}

// PIDs returns the machine's processes whose executable has this path in it, by this machine's
// numbers.
func (m *Machine) PIDs(executable string) ([]int, error) {
	var found []int
	for _, cgroup := range m.cgroups[:1] {
		err := filepath.WalkDir(cgroup, func(path string, entry fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // it ended meanwhile
			}
			if err != nil || entry.Name() != "cgroup.procs" {
				return err
			}
			list, err := os.ReadFile(path)
			if err != nil {
				return nil
			}
			for _, field := range strings.Fields(string(list)) {
				pid, err := strconv.Atoi(field)
				if err != nil {
					return fmt.Errorf("%s: %w", path, err)
				}
				target, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
				if err == nil && strings.TrimSuffix(target, " (deleted)") == executable {
					found = append(found, pid)
				}
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("cannot list the machine's processes: %w", err)
		}
	}
	slices.Sort(found)
	return found, nil
}

// Close powers the machine off, or kills it if that takes long, and removes what it was made of.
// That something is left is an error.
func (m *Machine) Close() error {
	if m == nil {
		return nil
	}
	var errs []error
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	select {
	case <-m.exited:
	default:
		if m.Init != 0 {
			// It may be killed before it has answered.
			m.Run(ctx, "systemctl", "--force", "poweroff")
		}
		select {
		case <-m.exited:
		case <-ctx.Done():
			errs = append(errs, fmt.Errorf("the machine did not power off within 30 s: %s", m.written()))
			syscall.Kill(m.pid, syscall.SIGKILL)
			<-m.exited
		}
	}
	return errors.Join(append(errs, m.sweep())...)
}

// makeCgroups makes a cgroup in each hierarchy that the machine uses. Without one, its systemd
// would sort this machine's own processes.
func (m *Machine) makeCgroups() (legacy []string, err error) {
	top := "/sys/fs/cgroup"
	if _, err := os.Stat(filepath.Join(top, "unified")); err == nil {
		m.cgroups = append(m.cgroups, filepath.Join(top, "unified", m.Cgroup))
		for _, c := range controllers {
			if _, err := os.Stat(filepath.Join(top, c, "cgroup.procs")); err == nil {
				legacy = append(legacy, c)
				m.cgroups = append(m.cgroups, filepath.Join(top, c, m.Cgroup))
			}
		}
	} else {
		m.cgroups = []string{filepath.Join(top, m.Cgroup)}
	}
	for _, dir := range m.cgroups {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, err
		}
	}
	return legacy, nil
}

// sweep removes the cgroups and the directory. The processes have been killed, but end when they
// do.
func (m *Machine) sweep() error {
	var errs []error
	deadline := time.Now().Add(10 * time.Second)
	for _, top := range m.cgroups {
		for {
			err := removeCgroup(top)
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				procs, _ := os.ReadFile(filepath.Join(top, "cgroup.procs"))
				errs = append(errs, fmt.Errorf("the machine's cgroup %s is left, with the processes %q: %w", top, procs, err))
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	return errors.Join(append(errs, os.RemoveAll(m.dir))...)
}

// sweepDead removes what machines have left whose makers were killed. They have died with them.
func sweepDead() {
	for _, pattern := range []string{"/tmp/", "/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		found, _ := filepath.Glob(pattern + name + "*")
		for _, path := range found {
			maker, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(path), name), "-")
			pid, err := strconv.Atoi(maker)
			if err != nil || !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
				continue
			}
			if pattern == "/tmp/" {
				os.RemoveAll(path)
			} else {
				removeCgroup(path)
			}
		}
	}
}

func removeCgroup(top string) error {
	var dirs []string
	err := filepath.WalkDir(top, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			dirs = append(dirs, path)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	for _, dir := range slices.Backward(dirs) {
		if rerr := os.Remove(dir); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}
	return err
}

// children returns the processes that a process started and that live.
func children(pid int) []int {
	entries, _ := os.ReadDir("/proc")
	var found []int
	for _, entry := range entries {
		child, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "stat"))
		if err != nil {
			continue // it has ended
		}
		// The name before it may hold anything, but the last parenthesis ends it.
		_, rest, _ := bytes.Cut(stat[bytes.LastIndexByte(stat, ')')+1:], []byte(" "))
		if fields := strings.Fields(string(rest)); len(fields) > 1 && fields[1] == strconv.Itoa(pid) {
			found = append(found, child)
		}
	}
	return found
}
