package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// process is a daemon of the node with its log.
type process struct {
	name   string
	log    string
	pid    int
	exited chan struct{}
	err    error // why it ended; valid once exited is closed
}

// start runs a daemon whose output is appended to <dir>/<name>.log. It is in a process group of its
// own, so that the interrupt of a terminal does not reach it before its node shuts it down.
func start(dir, name string, env []string, path string, args ...string) (*process, error) {
	p := &process{name: name, log: filepath.Join(dir, name+".log"), exited: make(chan struct{})}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("cannot start %s: %w", name, err)
	}
	defer log.Close()
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("cannot start %s: %w", name, err)
	}
	p.pid = cmd.Process.Pid
	go func() {
		p.err = cmd.Wait()
		close(p.exited)
	}()
	return p, nil
}

// adopt takes over a daemon that another process started and left running. executable guards
// against the number having become somebody else's.
func adopt(dir, name string, pid int, executable string) *process {
	p := &process{name: name, log: filepath.Join(dir, name+".log"), pid: pid, exited: make(chan struct{})}
	go func() {
		for p.is(executable) {
			time.Sleep(20 * time.Millisecond)
		}
		p.err = errors.New("ended, how is not known")
		close(p.exited)
	}()
	return p
}

// is says whether the process lives and runs the executable.
func (p *process) is(executable string) bool {
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.pid))
	return err == nil && strings.TrimSuffix(path, " (deleted)") == executable
}

// stop ends the daemon with SIGTERM, after ten seconds with SIGKILL, which is an error.
func (p *process) stop() error {
	if p == nil {
		return nil
	}
	p.signal(syscall.SIGTERM)
	select {
	case <-p.exited:
		return nil
	case <-time.After(10 * time.Second):
	}
	p.kill()
	return fmt.Errorf("%s did not end within 10 s of SIGTERM; its log is %s", p.name, p.log)
}

// kill ends the daemon with SIGKILL.
func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	<-p.exited
}

// signal does nothing to a process that has ended.
func (p *process) signal(signal syscall.Signal) {
	select {
	case <-p.exited:
	default:
		syscall.Kill(p.pid, signal)
	}
}

// waitFor polls until done says true, the daemon ends or ctx does.
func (p *process) waitFor(ctx context.Context, what string, done func() bool) error {
	for !done() {
		select {
		case <-p.exited:
			return fmt.Errorf("%s ended before %s: %v\n%s", p.name, what, p.err, Tail(p.log, 20))
		case <-ctx.Done():
			return fmt.Errorf("%s: waiting until %s: %w\n%s", p.name, what, ctx.Err(), Tail(p.log, 20))
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}

// Tail returns the last lines of a file, or why it has none.
func Tail(path string, lines int) string {
	file, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer file.Close()
	const most = 64 << 10
	if info, err := file.Stat(); err == nil && info.Size() > most {
		file.Seek(-most, io.SeekEnd)
	}
	data, err := io.ReadAll(file)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(string(bytes.TrimRight(data, "\n")), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// isSocket says whether path is a Unix socket.
func isSocket(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode()&os.ModeSocket != 0
}
