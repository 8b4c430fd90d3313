package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/sandboxer/cgroup"
)

// Kind is a dialect of the virtiofs daemon's command line.
type Kind string

const (
	// KindC is the daemon of QEMU up to version 7.
	KindC Kind = "qemu"
	// KindRust is the stand-alone daemon that replaced it.
	KindRust Kind = "rust"
	// KindStratoVirt is vhost_user_fs, which came with StratoVirt 2.2 and 2.3.
	KindStratoVirt Kind = "stratovirt"
)

// virtiofsdPaths is where distributions put the daemon.
var virtiofsdPaths = []string{
	"/usr/libexec/virtiofsd",  // openEuler, Fedora
	"/usr/lib/qemu/virtiofsd", // Debian 12
	"/usr/lib/virtiofsd",      // Arch
	"/usr/bin/virtiofsd",
}

// FindVirtiofsd finds a virtiofs daemon: the configured one if it exists, else the first of the
// usual places and of PATH. Without any the path is empty and there is no error; the machine then
// has to export the share itself. A daemon whose dialect is not known is passed over, for nothing
// can be said about its sandbox, and is an error only if there is no other.
func FindVirtiofsd(configured string) (path string, kind Kind, err error) {
	candidates := virtiofsdPaths
	if p, err := exec.LookPath("virtiofsd"); err == nil {
		candidates = append(slices.Clone(candidates), p)
	}
	if configured != "" {
		candidates = append([]string{configured}, candidates...)
	}
	return find(candidates)
}

func find(candidates []string) (string, Kind, error) {
	var errs []error
	for _, p := range candidates {
		if _, err := exec.LookPath(p); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		kind, err := probe(p)
		if err == nil {
			return p, kind, nil
		}
		errs = append(errs, err)
	}
	return "", "", errors.Join(errs...)
}

// probe asks a daemon for its version.
func probe(path string) (Kind, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").CombinedOutput()
	if kind := kindOfVersion(out); kind != "" {
		return kind, nil
	}
	// StratoVirt's refuses that option.
	if help, herr := exec.CommandContext(ctx, path, "-help").CombinedOutput(); herr == nil && isVhostUserFS(help) {
		return KindStratoVirt, nil
	}
	first, _, _ := bytes.Cut(out, []byte("\n"))
	if err != nil {
		return "", fmt.Errorf("cannot use %s: asked for its version it answered %q: %w", path, first, err)
	}
	return "", fmt.Errorf("cannot use %s: its version %q is neither that of QEMU's virtiofsd nor of the Rust one nor of StratoVirt's vhost_user_fs", path, first)
}

// isVhostUserFS tells StratoVirt's daemon by the options that it lists.
func isVhostUserFS(help []byte) bool {
	return bytes.Contains(help, []byte("-socket-path")) && bytes.Contains(help, []byte("-source"))
}

var rustVersion = regexp.MustCompile(`^virtiofsd (backend )?v?\d`)

func kindOfVersion(out []byte) Kind {
	switch {
	case bytes.Contains(out, []byte("FUSE kernel interface")), bytes.Contains(out, []byte("QEMU Project")):
		return KindC
	case rustVersion.Match(out):
		return KindRust
	}
	return ""
}

// Virtiofsd is what StartVirtiofsd starts.
type Virtiofsd struct {
	Path string
	// Kind is what FindVirtiofsd said, or empty to ask the daemon.
	Kind Kind
	// Share is the directory to export, Socket the Unix socket to make, at most 107 bytes long.
	Share, Socket string
	// CgroupProcs are the cgroup.procs files of the cgroups to run in.
	CgroupProcs []string
	Log         *slog.Logger
}

// listenFD is the number under which the daemon gets its listening socket.
const listenFD = 3

// argv is the command line. Both dialects keep a daemon that serves as root in its sandbox: mount,
// pid and network namespaces of its own, its root at the share, most capabilities dropped, and a
// seccomp filter that kills. Submounts are announced, so that files of different file systems on
// the host have different device numbers in the guest; equal inode numbers would pass for hard
// links otherwise.
func (v *Virtiofsd) argv(nofile uint64) ([]string, error) {
	if strings.ContainsAny(v.Share, ",\\\n\x00") {
		return nil, fmt.Errorf("the path %q has a comma, backslash or control character, which the daemon takes for its own", v.Share)
	}
	limit := fmt.Sprintf("--rlimit-nofile=%d", nofile)
	fd := fmt.Sprintf("--fd=%d", listenFD)
	switch v.Kind {
	case KindC:
		// Its seccomp filter cannot be turned off.
		return []string{v.Path, "-f", fd, limit,
			"-o", "source=" + v.Share,
			"-o", "sandbox=namespace",
			"-o", "cache=auto",
			"-o", "xattr",
			"-o", "announce_submounts",
			"-o", "log_level=warn"}, nil
	case KindRust:
		return []string{v.Path, fd, limit,
			"--shared-dir=" + v.Share,
			"--sandbox=namespace",
			"--seccomp=kill",
			"--cache=auto",
			"--xattr",
			"--announce-submounts",
			"--log-level=warn"}, nil
	case KindStratoVirt:
		// It binds the socket by itself. In a namespace of its own it would not see what is mounted
		// later; a filter that it brings along may miss what its C library calls and would then kill it.
		// Its capabilities, it drops unasked. Bare -D is its standard error.
		return []string{v.Path,
			"-source", v.Share,
			"-socket-path", v.Socket,
			"-sandbox", "chroot",
			"-rlimit-nofile", strconv.FormatUint(nofile, 10),
			"-D"}, nil
	default:
		return nil, fmt.Errorf("unknown kind %q of virtiofs daemon", v.Kind)
	}
}

// Daemon is a running virtiofs daemon. It serves one machine and ends when that does. It consists
// of two processes: the one that was started and, in its sandbox, the one that serves.
type Daemon struct {
	socket  string
	pid     int
	started uint64 // in clock ticks since the boot
	pidfd   *os.File
	cmd     *exec.Cmd // nil for a restored one
	output  output
	exited  chan struct{}
	stop    sync.Mutex
}

// SavedDaemon is a Daemon for the journal.
type SavedDaemon struct {
	PID int `json:"pid"`
	// Started is the process's start in clock ticks since the boot; with it a process id is
	// never taken for another process's.
	Started uint64 `json:"started"`
	Socket  string `json:"socket"`
}

// StartVirtiofsd starts a daemon that outlives this process. The socket accepts when it returns:
// the daemon inherits it listening. On failure neither process nor socket is left. The caller ends
// it with Stop.
func StartVirtiofsd(ctx context.Context, cfg Virtiofsd) (d *Daemon, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot start the virtiofs daemon %s: %w", cfg.Path, err)
		}
	}()
	if cfg.Kind == "" {
		if cfg.Kind, err = probe(cfg.Path); err != nil {
			return nil, err
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, err
	}
	// The daemon's own choice fails where the hard limit is lower and must not be raised.
	argv, err := cfg.argv(min(limit.Max, 1_000_000))
	if err != nil {
		return nil, err
	}
	var listener *os.File
	if cfg.Kind == KindStratoVirt {
		// What an earlier one has left it would not replace.
		if err := os.Remove(cfg.Socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	} else {
		if listener, err = listenOn(cfg.Socket); err != nil {
			return nil, err
		}
		defer listener.Close()
	}
	d = &Daemon{socket: cfg.Socket, exited: make(chan struct{})}
	defer func() {
		if err != nil {
			os.Remove(cfg.Socket)
		}
	}()
	if err := d.exec(argv, listener, cfg.CgroupProcs); err != nil {
		return nil, err
	}
	if d.started, err = startTime(d.pid); err != nil {
		return nil, errors.Join(err, d.Stop())
	}
	if listener == nil {
		if err := d.waitUntilItListens(ctx); err != nil {
			return nil, errors.Join(err, d.Stop())
		}
	}
	if cfg.Log != nil {
		cfg.Log.Debug("started the virtiofs daemon", "path", cfg.Path, "kind", cfg.Kind, "pid", d.pid)
	}
	return d, nil
}

const (
	// listenTimeout bounds the time that a daemon takes to bind its socket, looked for every listenPeriod.
	listenTimeout = 10 * time.Second
	listenPeriod  = 5 * time.Millisecond
)

// waitUntilItListens returns when a daemon that binds the socket itself accepts on it. It cannot be tried:
// the daemon serves the first that connects, and no other. Nor does its exit status tell a failure.
func (d *Daemon) waitUntilItListens(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, listenTimeout)
	defer cancel()
	tick := time.NewTicker(listenPeriod)
	defer tick.Stop()
	for {
		if ok, err := listens(d.socket); ok || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-d.exited:
			return fmt.Errorf("it ended before it listened on %s: %s", d.socket, d.output.read())
		case <-ctx.Done():
			return fmt.Errorf("it does not listen on %s: %w", d.socket, ctx.Err())
		}
	}
}

// listens says whether a Unix socket of that path accepts.
func listens(path string) (bool, error) {
	const accepts = "00010000" // __SO_ACCEPTCON in the column of the flags
	table, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) == 8 && f[3] == accepts && f[7] == path {
			return true, nil
		}
	}
	return false, nil
}

// listenOn makes a listening socket whose file stays until Stop.
func listenOn(path string) (*os.File, error) {
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() == fs.ModeSocket {
		// Of an earlier daemon that was killed; binding needs the name free.
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		if len(path) > 107 {
			err = fmt.Errorf("%w: a Unix socket's path has at most 107 bytes, this one has %d; use a shorter --dir", err, len(path))
		}
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	if err := os.Chmod(path, 0o600); err != nil {
		os.Remove(path)
		return nil, err
	}
	f, err := l.File()
	if err != nil {
		os.Remove(path)
	}
	return f, err
}

// exec starts the process and the goroutines that follow it.
func (d *Daemon) exec(argv []string, listener *os.File, cgroupProcs []string) error {
	// The daemon's words come through a pipe that it holds at both ends and writes to without
	// blocking: nothing that the guest makes it print fills a disk, and it neither stalls nor dies
	// while nobody reads, as after a restart of this process.
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return err
	}
	own, err := unix.FcntlInt(uintptr(p[1]), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		unix.Close(p[0])
		unix.Close(p[1])
		return err
	}
	defer unix.Close(own)
	reader, err := unix.FcntlInt(uintptr(p[0]), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		unix.Close(p[0])
		unix.Close(p[1])
		return err
	}
	theirRead, theirWrite := os.NewFile(uintptr(p[0]), "stderr"), os.NewFile(uintptr(p[1]), "stderr")
	defer theirRead.Close()
	defer theirWrite.Close()

	var pidfd int
	d.cmd = &exec.Cmd{
		Path: argv[0], Args: argv, Dir: "/", Env: []string{},
		Stdout: theirWrite, Stderr: theirWrite,
		ExtraFiles:  []*os.File{listener, theirRead}, // the first is listenFD; it may be nil
		SysProcAttr: &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd},
	}
	if err := cgroup.Start(cgroupProcs, d.cmd.SysProcAttr, d.cmd.Start); err != nil {
		unix.Close(reader)
		return err
	}
	// Package exec makes blocking what it hands over, the descriptions that ours share.
	if err := errors.Join(unix.SetNonblock(own, true), unix.SetNonblock(reader, true)); err != nil {
		unix.Close(reader)
		return errors.Join(err, d.cmd.Process.Kill(), d.cmd.Wait())
	}
	d.pid = d.cmd.Process.Pid
	d.pidfd, err = openPidfd(d.pid, pidfd)
	if err != nil {
		unix.Close(reader)
		d.cmd.Process.Kill()
		d.cmd.Wait()
		return err
	}
	d.output.pipe = os.NewFile(uintptr(reader), "stderr")
	go d.follow()
	return nil
}

// RestoreVirtiofsd takes over a daemon that an earlier process started. It fails with an error that
// wraps fs.ErrNotExist if that daemon has ended; its socket is then removed.
func RestoreVirtiofsd(s SavedDaemon) (*Daemon, error) {
	pidfd, err := openPidfd(s.PID, -1)
	if err == nil {
		var started uint64
		// The order matters: the descriptor keeps the id from being given to another process.
		if started, err = startTime(s.PID); err == nil && started == s.Started {
			d := &Daemon{socket: s.Socket, pid: s.PID, started: s.Started, pidfd: pidfd, exited: make(chan struct{})}
			go d.follow()
			return d, nil
		}
		pidfd.Close()
	}
	if err == nil || errors.Is(err, unix.ESRCH) {
		err = fs.ErrNotExist
	}
	if errors.Is(err, fs.ErrNotExist) {
		os.Remove(s.Socket)
	}
	return nil, fmt.Errorf("cannot take over the virtiofs daemon with pid %d: %w", s.PID, err)
}

// Saved returns what RestoreVirtiofsd needs.
func (d *Daemon) Saved() SavedDaemon {
	return SavedDaemon{PID: d.pid, Started: d.started, Socket: d.socket}
}

// PIDs lists the daemon's processes: the one that was started and, once a machine has connected,
// the one in the sandbox. It is empty after the end.
func (d *Daemon) PIDs() []int {
	select {
	case <-d.exited:
		return nil
	default:
	}
	return append([]int{d.pid}, children(d.pid)...)
}

// Exited is closed when the daemon has ended.
func (d *Daemon) Exited() <-chan struct{} { return d.exited }

// Output is the last of what the daemon printed, up to 4 KiB, as far as the pipe held it until
// somebody read it. A restored daemon's is not known.
func (d *Daemon) Output() string { return d.output.read() }

// follow waits for the end. It keeps no thread while it waits.
func (d *Daemon) follow() {
	awaitPidfd(d.pidfd)
	if d.cmd != nil {
		d.cmd.Wait() // how it ended says nothing: some versions exit 0 on errors
	}
	d.output.close()
	close(d.exited)
}

// Stop kills both processes, reaps them and removes the socket. It is idempotent. The machine
// should have ended before: its guest's file operations would hang.
func (d *Daemon) Stop() error {
	d.stop.Lock()
	defer d.stop.Unlock()
	// The process in the sandbox is the first one's child; killed first, it is reaped by it.
	pids := d.PIDs()
	for _, child := range pids[min(1, len(pids)):] {
		killChild(child, d.pid)
	}
	if len(pids) != 0 && (len(pids) == 1 || !d.waitExited(100*time.Millisecond)) {
		if err := signalPidfd(d.pidfd); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("cannot kill the virtiofs daemon with pid %d: %w", d.pid, err)
		}
		if !d.waitExited(10 * time.Second) {
			return fmt.Errorf("the virtiofs daemon with pid %d does not end after SIGKILL", d.pid)
		}
	}
	d.pidfd.Close()
	if err := os.Remove(d.socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove the socket of the virtiofs daemon: %w", err)
	}
	return nil
}

func (d *Daemon) waitExited(limit time.Duration) bool {
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-d.exited:
		return true
	case <-t.C:
		return false
	}
}

// openPidfd makes a descriptor of a process that Go's poller can wait on. fd is one that exists
// already, or -1.
func openPidfd(pid, fd int) (*os.File, error) {
	var err error
	if fd < 0 {
		fd, err = unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	} else {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return nil, fmt.Errorf("opening process %d: %w", pid, err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// awaitPidfd returns when the process has ended.
func awaitPidfd(f *os.File) {
	raw, err := f.SyscallConn()
	if err != nil {
		return // closed, which Stop does only after the end
	}
	raw.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 0)
		return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
	})
}

func signalPidfd(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	if err := raw.Control(func(fd uintptr) { sent = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) }); err != nil {
		return err
	}
	return sent
}

// killChild kills a child of parent, and nothing that has got its id since.
func killChild(pid, parent int) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if slices.Contains(children(parent), pid) {
		unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	}
}

// children lists the children of a process's first thread, which is the daemon's only one that forks.
func children(pid int) []int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return nil
	}
	var pids []int
	for f := range strings.FieldsSeq(string(text)) {
		if n, err := strconv.Atoi(f); err == nil {
			pids = append(pids, n)
		}
	}
	return pids
}

// startTime is when a process started, in clock ticks since the boot.
func startTime(pid int) (uint64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The name in parentheses may hold blanks; the start is the 22nd field, the 20th after it.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 20 {
		return 0, fmt.Errorf("cannot read /proc/%d/stat: %q", pid, text)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// output collects the end of what a process wrote to a pipe, when somebody asks for it: no
// goroutine waits for words that mostly never come.
type output struct {
	mu   sync.Mutex
	pipe *os.File // the reading end, non-blocking; nil when it is closed or there is none
	text []byte
}

const maxOutput = 4 << 10

func (o *output) read() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.drain()
	return strings.TrimSpace(string(o.text))
}

func (o *output) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.drain()
	if o.pipe != nil {
		o.pipe.Close()
		o.pipe = nil
	}
}

// drain takes what is in the pipe now, at most what it can hold.
func (o *output) drain() {
	if o.pipe == nil {
		return
	}
	raw, err := o.pipe.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) {
		buf := make([]byte, maxOutput)
		for range 64<<10/maxOutput + 1 {
			n, err := unix.Read(int(fd), buf)
			if n <= 0 || err != nil {
				return
			}
			o.text = append(o.text, buf[:n]...)
			if extra := len(o.text) - maxOutput; extra > 0 {
				o.text = append(o.text[:0], o.text[extra:]...)
			}
		}
	})
}
