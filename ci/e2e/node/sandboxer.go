package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Settings are keys of the sandboxer's configuration, such as "kernel_path", with their values as
// TOML writes them. They replace those of defaults/config_qemu.toml; "path" is the hypervisor's, the
// first of that name.
type Settings map[string]string

// Sandboxer is a running vmm-sandboxer.
type Sandboxer struct {
	// Dir is its state directory, Socket where it listens, Config its configuration file, Log what
	// it wrote.
	Dir, Socket, Config, Log string
	process                  *process // the daemon, or its supervisor
	supervised               bool
	node                     *Node
	name                     string
}

// StartSandboxer starts a vmm-sandboxer behind the proxy plugin of that name, one of Plugins, and
// returns once it accepts connections. settings may be nil. The node's Close stops it. Nothing keeps
// its descriptors when it ends.
func (n *Node) StartSandboxer(ctx context.Context, plugin string, settings Settings) (*Sandboxer, error) {
	return n.startSandboxer(ctx, plugin, settings, false)
}

// StartSupervised is StartSandboxer below Config.Supervisor, which keeps the daemon's descriptors and
// starts it again whenever it ends.
func (n *Node) StartSupervised(ctx context.Context, plugin string, settings Settings) (*Sandboxer, error) {
	return n.startSandboxer(ctx, plugin, settings, true)
}

func (n *Node) startSandboxer(ctx context.Context, plugin string, settings Settings, supervised bool) (*Sandboxer, error) {
	s := &Sandboxer{
		supervised: supervised,
		Dir:        filepath.Join(n.Dir, plugin),
		Socket:     n.socket(plugin),
		Config:     filepath.Join(n.Dir, plugin+".toml"),
		node:       n,
		name:       plugin,
	}
	shipped, err := os.ReadFile(filepath.Join(n.config.Root, "defaults", "config_qemu.toml"))
	if err != nil {
		return nil, fmt.Errorf("cannot start the sandboxer: %w", err)
	}
	all := Settings{
		"kernel_path":   strconv.Quote(n.config.Kernel),
		"initrd_path":   strconv.Quote(n.config.Initrd),
		"kernel_params": strconv.Quote("task.log_level=debug task.sharefs_type=virtiofs task.debug"),
		"log_level":     strconv.Quote("debug"),
		"debug":         "true",
	}
	for key, value := range settings {
		all[key] = value
	}
	text := string(shipped)
	for key, value := range all {
		line := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(key) + ` = .*$`)
		at := line.FindStringIndex(text)
		if at == nil {
			return nil, fmt.Errorf("cannot start the sandboxer: defaults/config_qemu.toml has no key %s", key)
		}
		text = text[:at[0]] + key + " = " + value + text[at[1]:]
	}
	if err := os.WriteFile(s.Config, []byte(text), 0o644); err != nil {
		return nil, fmt.Errorf("cannot start the sandboxer: %w", err)
	}
	if err := s.Start(ctx); err != nil {
		return nil, err
	}
	n.sandboxers = append(n.sandboxers, s)
	return s, nil
}

// Start starts the sandboxer again after Stop or Kill, with the same files.
func (s *Sandboxer) Start(ctx context.Context) error {
	command := []string{s.node.config.Sandboxer, "--config", s.Config, "--dir", s.Dir, "--listen", s.Socket}
	if s.supervised {
		command = append([]string{s.node.config.Supervisor, s.pidFile()}, command...)
	}
	p, err := start(s.node.Dir, s.name, nil, command[0], command[1:]...)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if s.supervised {
		if err := p.waitFor(ctx, "the daemon is ready", func() bool { return s.PID() != 0 }); err != nil {
			p.kill()
			return err
		}
	}
	err = p.waitFor(ctx, s.Socket+" accepts", func() bool {
		conn, err := net.Dial("unix", s.Socket)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	if err != nil {
		p.kill()
		return err
	}
	s.process, s.Log = p, p.log
	return nil
}

func (s *Sandboxer) pidFile() string { return filepath.Join(s.node.Dir, s.name+".pid") }

// Stop ends the sandboxer with SIGTERM. Its pods live on.
func (s *Sandboxer) Stop() error { return s.process.stop() }

// Kill ends the sandboxer with SIGKILL. Its pods live on. One that is supervised is started again.
func (s *Sandboxer) Kill() {
	if !s.supervised {
		s.process.kill()
		return
	}
	if pid := s.PID(); pid != 0 {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// Restart ends a supervised sandboxer with SIGTERM, and the next one begins.
func (s *Sandboxer) Restart() { s.process.signal(syscall.SIGHUP) }

// AwaitSuccessor waits until a supervised daemon that is not process old is ready.
func (s *Sandboxer) AwaitSuccessor(ctx context.Context, old int) error {
	return s.process.waitFor(ctx, fmt.Sprintf("a daemon is ready after process %d", old), func() bool {
		pid := s.PID()
		return pid != 0 && pid != old
	})
}

// PID of the daemon; of one that is supervised 0 while it is not ready.
func (s *Sandboxer) PID() int {
	if !s.supervised {
		return s.process.pid
	}
	text, err := os.ReadFile(s.pidFile())
	if err != nil {
		return 0
	}
	pid, _ := strconv.Atoi(string(text))
	return pid
}

// Supervisor is the process that keeps a supervised sandboxer's descriptors.
func (s *Sandboxer) Supervisor() int { return s.process.pid }

// Metrics is the socket on which the daemon tells its counters.
func (s *Sandboxer) Metrics() string { return filepath.Join(s.Dir, ".metrics.sock") }

// Running says whether the daemon lives.
func (s *Sandboxer) Running() bool {
	select {
	case <-s.process.exited:
		return false
	default:
		return true
	}
}

// VMM returns the process id of a pod's virtual machine, by the name on its command line.
func (s *Sandboxer) VMM(pod string) (pid int, commandLine []string, err error) {
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return 0, nil, err
	}
	for _, entry := range processes {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		raw, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "cmdline"))
		if err != nil {
			continue
		}
		args := strings.Split(strings.TrimRight(string(raw), "\x00"), "\x00")
		for i := 1; i < len(args); i++ {
			if args[i-1] == "-name" && strings.HasPrefix(args[i]+",", "sandbox-"+pod) {
				return pid, args, nil
			}
		}
	}
	return 0, nil, fmt.Errorf("no process has -name sandbox-%s: %w", pod, os.ErrNotExist)
}

// Console runs one line in the shell of a pod's debug console and returns what it wrote. The
// sandboxer bridges <dir>/<pod>/debug.sock to the console's port in the guest.
func (s *Sandboxer) Console(ctx context.Context, pod, line string) (string, error) {
	socket := filepath.Join(s.Dir, pod, "debug.sock")
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", socket)
	if err != nil {
		return "", fmt.Errorf("cannot open the debug console: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	// The first line asks for a shell without a terminal and without echo; the marker ends the
	// answer, whatever it holds.
	const marker = "kuasar-console-end"
	if _, err := fmt.Fprintf(conn, "KSR_MODE exec\n%s\necho %s\n", line, marker); err != nil {
		return "", fmt.Errorf("cannot use the debug console: %w", err)
	}
	var output strings.Builder
	piece := make([]byte, 4096)
	for {
		count, err := conn.Read(piece)
		output.Write(piece[:count])
		if text, _, found := strings.Cut(output.String(), marker); found {
			return strings.ReplaceAll(text, "\r\n", "\n"), nil
		}
		if err != nil {
			return output.String(), errors.Join(fmt.Errorf("the debug console ended before its answer did (so far %q): %w", output.String(), err), ctx.Err())
		}
	}
}
