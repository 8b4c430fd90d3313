// Package machine is what a virtual machine is whatever its hypervisor: one process with a monitor and a
// console, started once, watched to its end, stopped, written down and found again, with disks in its
// slots. The drivers embed Machine and add only what their hypervisors do differently.
package machine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"time"

	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/process"
	"kuasar.io/kuasar/sandboxer/vm/qmp"
)

const (
	// quitTimeout is how long a hypervisor may take to obey "quit" before it is killed.
	quitTimeout = 2 * time.Second
	// killTimeout bounds the wait for a killed process, which only the kernel can hold up.
	killTimeout = 10 * time.Second
	// lastWordsTimeout bounds the wait for the console's end after the hypervisor's.
	lastWordsTimeout = 300 * time.Millisecond
	// lostTimeout bounds the wait for the end of a hypervisor whose connection broke.
	lostTimeout = time.Second
	// monitorTimeout bounds the reconnection to the monitor, and the undoing of what it has refused.
	monitorTimeout = 3 * time.Second
	// consoleLines is how many of the guest's last lines an error carries.
	consoleLines = 10
	// maxSocketPath is Linux's, in bytes.
	maxSocketPath = 107
)

// Files in the pod's directory, beside sandbox-<id>.log and sandbox-<id>.pid.
const (
	ConsoleSocket = "console.sock"
	QMPSocket     = "qmp.sock"
	AgentSocket   = "agent.sock"
)

// ProcessName is what follows -name on the command line of a pod's machine.
func ProcessName(podID string) string { return "sandbox-" + podID }

var podIDRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// Kind is how one hypervisor differs from the others once it runs. The functions are called without any
// lock held; those that may be nil say so.
type Kind struct {
	// Program is the hypervisor's name for people.
	Program string
	// Files are the names, in the pod's directory, of what is removed with the machine beside the
	// sockets of this package and the pid file.
	Files []string
	// Said returns the last of what the hypervisor said, on one line. Not all of it is about an end.
	Said func() string
	// Interrupted matches, in what Said returns, the words on an end with status 0 that the guest did not
	// bring about.
	Interrupted *regexp.Regexp
	// PoweredOff is why a hypervisor ended with status 0 that nobody stopped.
	PoweredOff string
	// OnEvent is told every event of the monitor that is not about disks; it must not block. It may be nil.
	OnEvent func(qmp.Event)
	// Renewed is called with every new connection to the monitor but the first. It may be nil.
	Renewed func(ctx context.Context, c *qmp.Client) error
	// Ended is called when the process has ended, before Exited is closed. It may be nil.
	Ended func()
}

type state int

const (
	created state = iota
	started
	stopped
)

// Machine is the common part of a vm.Machine.
type Machine struct {
	Log   *slog.Logger
	Disks *Disks

	kind     Kind
	podID    string
	dir      string
	vsockCID uint32
	restored bool

	exited   chan struct{}
	exit     vm.Exit     // valid once exited is closed
	panicked chan string // has room for one

	mu        sync.Mutex
	state     state
	spec      vm.Spec // until Start
	process   *process.Process
	client    *qmp.Client
	console   *process.Console
	requested bool // somebody wants it to end
	reset     bool // the guest has rebooted where that does not end the process
}

// New makes the machine of a spec, which a driver has checked; log is that of the pod.
func New(spec vm.Spec, kind Kind, disks *Disks, log *slog.Logger) *Machine {
	m := &Machine{
		Log:      log.With("pod", spec.PodID),
		Disks:    disks,
		kind:     kind,
		podID:    spec.PodID,
		dir:      spec.Dir,
		exited:   make(chan struct{}),
		panicked: make(chan string, 1),
		spec:     spec,
	}
	if spec.Vsock != nil {
		m.vsockCID = spec.Vsock.CID
	}
	return m
}

// CheckSpec checks what does not depend on the hypervisor.
func CheckSpec(s vm.Spec) error {
	switch {
	case !podIDRE.MatchString(s.PodID):
		return errors.New("the pod's id is not one")
	case s.Kernel == "":
		return errors.New("no kernel is configured (hypervisor.kernel_path)")
	case s.Initrd == "" && s.Image == "":
		return errors.New("neither an initrd nor an image is configured (hypervisor.initrd_path, hypervisor.image_path)")
	case s.Vsock != nil && (s.Vsock.CID < 3 || s.Vsock.CID == 1<<32-1 || s.Vsock.FD == nil):
		return errors.New("a vsock without a context id or its descriptor")
	}
	for _, socket := range []string{filepath.Join(s.Dir, ConsoleSocket), s.Share.Socket} {
		if len(socket) > maxSocketPath {
			return fmt.Errorf("the path %s is longer than the %d bytes of a Unix socket's address; use a shorter --dir", socket, maxSocketPath)
		}
	}
	for i, n := range s.NICs {
		if n.Tap == nil || len(n.MAC) != 6 {
			return fmt.Errorf("network interface %d lacks its tap or its MAC", i)
		}
		if n.MTU != 0 && (n.MTU < 68 || n.MTU > 65535) {
			return fmt.Errorf("network interface %d has the MTU %d", i, n.MTU)
		}
	}
	for _, p := range s.KernelParams {
		for _, r := range p {
			if r == '\n' || r == 0 {
				return fmt.Errorf("the kernel parameter %q has a line break", p)
			}
		}
	}
	return nil
}

// PodID names the machine.
func (m *Machine) PodID() string { return m.podID }

// Path returns the path of a file in the pod's directory.
func (m *Machine) Path(name string) string { return filepath.Join(m.dir, name) }

// LogPath is the file with the guest's console.
func (m *Machine) LogPath() string { return m.Path("sandbox-" + m.podID + ".log") }

func (m *Machine) pidPath() string { return m.Path("sandbox-" + m.podID + ".pid") }

// Endpoint says how the guest is reached.
func (m *Machine) Endpoint() vm.Endpoint {
	e := vm.Endpoint{VsockCID: m.vsockCID, Restored: m.restored}
	if m.vsockCID == 0 {
		e.SerialSocket = m.Path(AgentSocket)
	}
	return e
}

// Exited is closed when the process has ended.
func (m *Machine) Exited() <-chan struct{} { return m.exited }

// Exit says how it ended; it is valid once Exited is closed.
func (m *Machine) Exit() vm.Exit {
	if m.Gone() {
		return m.exit
	}
	return vm.Exit{}
}

// Gone says whether it has ended.
func (m *Machine) Gone() bool {
	select {
	case <-m.exited:
		return true
	default:
		return false
	}
}

// Panicked yields the line with which the guest's kernel panicked, if it does while this daemon
// watches.
func (m *Machine) Panicked() <-chan string { return m.panicked }

// ConsoleTail returns the last lines of the guest's console, oldest first, at most 10, fit for an
// error message.
func (m *Machine) ConsoleTail() []string {
	m.mu.Lock()
	c := m.console
	m.mu.Unlock()
	if c == nil {
		return nil
	}
	return c.Lines(consoleLines)
}

// Run is Start of vm.Machine around what a driver does for it: launch must call Launch and, in the end,
// Connected. Whatever it returns, what was handed over is closed; if that is an error, all else is gone.
func (m *Machine) Run(ctx context.Context, launch func(context.Context, vm.Spec) error) error {
	m.mu.Lock()
	if m.state != created {
		m.mu.Unlock()
		return fmt.Errorf("cannot start the virtual machine of pod %s a second time: %w", m.podID, vm.ErrGone)
	}
	m.state = started
	spec := m.spec
	m.spec = vm.Spec{}
	m.mu.Unlock()

	defer closeHandedOver(spec)
	err := launch(ctx, spec)
	if err != nil {
		err = fmt.Errorf("cannot start %s for pod %s: %w", m.kind.Program, m.podID, err)
		m.abandon()
	}
	return err
}

// Launch starts the process and watches it.
func (m *Machine) Launch(c process.Command) error {
	p, err := process.Spawn(c)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.process = p
	abandoned := m.state == stopped
	m.mu.Unlock()
	go m.watch(p)
	if abandoned {
		p.Kill()
		return vm.ErrGone
	}
	m.Log.Info(m.kind.Program+" started", "pid", p.PID)
	if err := process.WriteFile(m.pidPath(), []byte(strconv.Itoa(p.PID)+"\n")); err != nil {
		return fmt.Errorf("cannot write the pid file: %w", err)
	}
	return nil
}

// Launched says whether there is or was a process.
func (m *Machine) Launched() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.process != nil
}

// OpenConsole connects to the console's socket and drains it into the log.
func (m *Machine) OpenConsole(ctx context.Context) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", m.Path(ConsoleSocket))
	if err != nil {
		return fmt.Errorf("cannot connect to the guest's console: %w", err)
	}
	m.DrainConsole(conn.(*net.UnixConn))
	return nil
}

// DrainConsole drains a connection to the guest's console into the log. It takes over the connection.
func (m *Machine) DrainConsole(conn *net.UnixConn) {
	c := process.NewConsole(conn, m.LogPath(), m.panicked, m.Log)
	m.mu.Lock()
	m.console = c
	m.mu.Unlock()
}

// Connected finishes a start: with the greeting of the monitor and a guest that runs.
func (m *Machine) Connected(ctx context.Context, connect func(onEvent func(qmp.Event)) (*qmp.Client, error)) error {
	client, err := connect(m.onEvent)
	if err == nil {
		m.setClient(client)
		err = checkRunning(ctx, client)
	}
	if err == nil {
		return nil
	}
	return m.Explain(ctx, err)
}

// Explain says why a hypervisor that was launched could not be connected to, as far as it tells.
func (m *Machine) Explain(ctx context.Context, err error) error {
	m.mu.Lock()
	lost := m.client == nil || m.client.Err() != nil
	m.mu.Unlock()
	// A lost connection is most likely the first sign of a hypervisor that ends.
	if lost && ctx.Err() == nil && process.Within(m.exited, lostTimeout) {
		return errors.New(m.exit.Reason)
	}
	if said := m.kind.Said(); said != "" {
		err = fmt.Errorf("%w; it said: %s", err, said)
	}
	return err
}

func checkRunning(ctx context.Context, c *qmp.Client) error {
	var status struct {
		Status  string `json:"status"`
		Running bool   `json:"running"`
	}
	if err := c.Execute(ctx, "query-status", nil, &status); err != nil {
		return err
	}
	if !status.Running {
		return fmt.Errorf("the guest is not running but %q", status.Status)
	}
	return nil
}

func closeHandedOver(spec vm.Spec) {
	for _, n := range spec.NICs {
		n.Tap.Close()
	}
	if spec.Vsock != nil {
		spec.Vsock.FD.Close()
	}
}

// onEvent is called for every event of the monitor.
func (m *Machine) onEvent(e qmp.Event) {
	if e.Name == "DEVICE_DELETED" {
		m.Disks.onDeleted(e.Data)
	} else if m.kind.OnEvent != nil {
		m.kind.OnEvent(e)
	}
}

// Reset ends a machine whose guest reboots and whose hypervisor would boot it anew.
func (m *Machine) Reset() {
	m.mu.Lock()
	m.reset = true
	p := m.process
	m.mu.Unlock()
	if p != nil {
		p.Kill()
	}
}

// abandon ends a start that failed: the process, the sockets, the pid file.
func (m *Machine) abandon() {
	m.mu.Lock()
	m.state = stopped
	p, c, console := m.process, m.client, m.console
	m.mu.Unlock()
	if p != nil {
		p.Kill()
		if !process.Within(m.exited, killTimeout) {
			m.Log.Error(m.kind.Program+" does not die", "pid", p.PID)
		}
	} else {
		m.finish(vm.Exit{Time: time.Now(), Code: -1, Reason: m.kind.Program + " was never started"})
	}
	if c != nil {
		c.Close()
	}
	if console != nil {
		console.Close()
	}
	if err := m.RemoveFiles(); err != nil {
		m.Log.Warn("cannot clean up after "+m.kind.Program, "error", err)
	}
}

// RemoveFiles deletes what a machine, perhaps an earlier one, has left in the pod's directory beside
// its log.
func (m *Machine) RemoveFiles() error {
	paths := []string{m.pidPath()}
	for _, name := range append([]string{QMPSocket, ConsoleSocket, AgentSocket}, m.kind.Files...) {
		paths = append(paths, m.Path(name))
	}
	return process.Remove(paths...)
}

// finish records the end, once.
func (m *Machine) finish(e vm.Exit) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.Gone() {
		m.exit = e
		close(m.exited)
	}
}

// watch waits for the end of the process and says why it came.
func (m *Machine) watch(p *process.Process) {
	status, known := p.Wait()
	exit := vm.Exit{Time: time.Now(), Code: -1}
	said, how := m.kind.Said(), "ended"
	m.mu.Lock()
	console, client, requested, reset := m.console, m.client, m.requested, m.reset
	m.mu.Unlock()
	if known {
		exit.Code, how = process.ExitCode(status)
	}
	panicked := ""
	if console != nil {
		process.Within(console.Done(), lastWordsTimeout)
		panicked = console.PanicLine()
	}
	if exit.Code == 0 {
		said = m.kind.Interrupted.FindString(said) // all else it has survived
	}
	switch {
	case panicked != "":
		exit.Reason = "the guest's kernel panicked: " + panicked
	case reset:
		exit.Reason = "the guest rebooted"
	case requested:
		exit.Reason = "the virtual machine was stopped"
	case said == "" && exit.Code == 0:
		exit.Reason = m.kind.PoweredOff
	case said == "":
		exit.Reason = m.kind.Program + " " + how
	case known && status.Exited():
		exit.Reason = fmt.Sprintf("%s %s: %s", m.kind.Program, how, said)
	default: // its last words need not be about a signal, or an end that nobody saw
		exit.Reason = fmt.Sprintf("%s %s; it said: %s", m.kind.Program, how, said)
	}
	if client != nil {
		client.Close()
	}
	m.Disks.release()
	if m.kind.Ended != nil {
		m.kind.Ended()
	}
	p.Close()
	m.Log.Info(m.kind.Program+" ended", "pid", p.PID, "code", exit.Code, "reason", exit.Reason)
	m.finish(exit)
}

// Stop ends the machine; see vm.Machine.
func (m *Machine) Stop(ctx context.Context) error {
	m.mu.Lock()
	if m.state == created {
		m.state = stopped
		spec := m.spec
		m.spec = vm.Spec{}
		m.mu.Unlock()
		closeHandedOver(spec)
		m.finish(vm.Exit{Time: time.Now(), Code: -1, Reason: m.kind.Program + " was never started"})
		return nil
	}
	m.state, m.requested = stopped, true
	p, client := m.process, m.client
	m.mu.Unlock()

	if p != nil && !m.Gone() {
		if client != nil {
			quit, cancel := context.WithTimeout(ctx, quitTimeout)
			// It may be gone before it has answered.
			if client.Execute(quit, "quit", nil, nil); quit.Err() == nil {
				select {
				case <-m.exited:
				case <-quit.Done():
				}
			}
			cancel()
		}
		if !m.Gone() {
			p.Kill()
			if !process.Within(m.exited, killTimeout) {
				return fmt.Errorf("cannot stop %s of pod %s: process %d does not die", m.kind.Program, m.podID, p.PID)
			}
		}
	} else if p == nil {
		// A Start is under way and will see that it is not wanted any more.
		select {
		case <-m.exited:
		case <-ctx.Done():
			return fmt.Errorf("cannot stop %s of pod %s: %w", m.kind.Program, m.podID, ctx.Err())
		}
	}
	if err := m.RemoveFiles(); err != nil {
		return fmt.Errorf("cannot clean up after %s of pod %s: %w", m.kind.Program, m.podID, err)
	}
	return nil
}

func (m *Machine) setClient(c *qmp.Client) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.client = c
}

// monitor returns the connection to the monitor and renews it if it was lost.
func (m *Machine) monitor(ctx context.Context) (*qmp.Client, error) {
	m.mu.Lock()
	c, st := m.client, m.state
	m.mu.Unlock()
	if st != started || m.Gone() {
		return nil, vm.ErrGone
	}
	if c != nil && c.Err() == nil {
		return c, nil
	}
	ctx, cancel := context.WithTimeout(ctx, monitorTimeout)
	defer cancel()
	c, err := qmp.Dial(ctx, m.Path(QMPSocket), m.onEvent)
	if err != nil {
		if m.Gone() {
			err = vm.ErrGone
		}
		return nil, err
	}
	if m.kind.Renewed != nil {
		if err := m.kind.Renewed(ctx, c); err != nil {
			c.Close()
			return nil, err
		}
	}
	m.setClient(c)
	return c, nil
}

// DropMonitor closes the connections to the monitor and the console, as the end of this daemon does.
func (m *Machine) DropMonitor() {
	m.mu.Lock()
	client, console := m.client, m.console
	m.mu.Unlock()
	if client != nil {
		client.Close()
	}
	if console != nil {
		console.Close()
	}
}
