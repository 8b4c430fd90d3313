package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/process"
	"kuasar.io/kuasar/sandboxer/vm/qmp"
)

const (
	// quitTimeout is how long QEMU may take to obey "quit" before it is killed.
	quitTimeout = 2 * time.Second
	// killTimeout bounds the wait for a killed process, which only the kernel can hold up.
	killTimeout = 10 * time.Second
	// lastWordsTimeout bounds the wait for the console's end after QEMU's.
	lastWordsTimeout = 300 * time.Millisecond
	// stderrSize is how much of QEMU's own messages is kept, in bytes: one page of a pipe.
	stderrSize = 4096
	// monitorTimeout bounds the reconnection to the monitor.
	monitorTimeout = 3 * time.Second
	// consoleLines is how many of the guest's last lines an error carries.
	consoleLines = 10
)

type state int

const (
	created state = iota
	started
	stopped
)

// Machine is one virtual machine on QEMU.
type Machine struct {
	driver   *Driver
	podID    string
	dir      string
	vsockCID uint32
	restored bool
	log      *slog.Logger

	exited   chan struct{}
	exit     vm.Exit     // valid once exited is closed
	panicked chan string // has room for one

	// plugging is held by the one operation on disks that is under way.
	plugging chan struct{}
	disks    disks

	mu        sync.Mutex
	state     state
	spec      vm.Spec // until Start
	process   *process.Process
	client    *qmp.Client
	console   *process.Console
	stderr    int // our end of the pipe, -1 if there is none
	requested bool
}

func newMachine(d *Driver, spec vm.Spec) *Machine {
	m := &Machine{
		driver:   d,
		podID:    spec.PodID,
		dir:      spec.Dir,
		log:      d.log.With("pod", spec.PodID),
		exited:   make(chan struct{}),
		panicked: make(chan string, 1),
		plugging: make(chan struct{}, 1),
		spec:     spec,
		stderr:   -1,
	}
	if spec.Vsock != nil {
		m.vsockCID = spec.Vsock.CID
	}
	m.disks.changed = make(chan struct{}, 1)
	return m
}

func (m *Machine) path(name string) string { return filepath.Join(m.dir, name) }

// LogPath is the file with the guest's console.
func (m *Machine) LogPath() string { return m.path("sandbox-" + m.podID + ".log") }

func (m *Machine) pidPath() string { return m.path("sandbox-" + m.podID + ".pid") }

// Endpoint says how the guest is reached.
func (m *Machine) Endpoint() vm.Endpoint {
	e := vm.Endpoint{Restored: m.restored}
	if m.vsockCID != 0 {
		e.VsockCID = m.vsockCID
	} else {
		e.SerialSocket = m.path(agentSocket)
	}
	return e
}

// Exited is closed when the process has ended.
func (m *Machine) Exited() <-chan struct{} { return m.exited }

// Exit says how it ended; it is valid once Exited is closed.
func (m *Machine) Exit() vm.Exit {
	select {
	case <-m.exited:
		return m.exit
	default:
		return vm.Exit{}
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

// Start launches QEMU; see vm.Machine.
func (m *Machine) Start(ctx context.Context) (err error) {
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
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot start QEMU for pod %s: %w", m.podID, err)
			m.abandon()
		}
	}()

	var listening sockets
	for _, s := range []struct {
		name string
		file **os.File
		used bool
	}{
		{qmpSocket, &listening.qmp, true},
		{consoleSocket, &listening.console, true},
		{agentSocket, &listening.agent, spec.Vsock == nil},
	} {
		if !s.used {
			continue
		}
		if *s.file, err = listen(m.path(s.name)); err != nil {
			return err
		}
		defer (*s.file).Close()
	}
	// Connected before QEMU runs: it finds us waiting, and nothing of the console is missed.
	console, err := process.OpenConsole(ctx, m.path(consoleSocket), m.LogPath(), m.panicked, m.log)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.console = console
	m.mu.Unlock()
	var dialer net.Dialer
	monitor, err := dialer.DialContext(ctx, "unix", m.path(qmpSocket))
	if err != nil {
		return fmt.Errorf("cannot connect to the monitor: %w", err)
	}
	if err := m.launch(spec, listening); err != nil {
		monitor.Close()
		return err
	}
	// QEMU has its own copies now. With ours open, the connections of a dead QEMU would not end.
	for _, f := range []*os.File{listening.qmp, listening.console, listening.agent} {
		if f != nil {
			f.Close()
		}
	}
	client, err := qmp.New(ctx, monitor.(*net.UnixConn), m.disks.onEvent)
	if err == nil {
		m.setClient(client)
		err = m.checkRunning(ctx, client)
	}
	if err == nil {
		return nil
	}
	// A lost connection is most likely the first sign of a QEMU that ends.
	if lost := client == nil || client.Err() != nil; lost && ctx.Err() == nil && process.Within(m.exited, time.Second) {
		return errors.New(m.exit.Reason)
	}
	return m.explain(err)
}

// explain adds what QEMU has said so far to an error about its silence.
func (m *Machine) explain(err error) error {
	m.mu.Lock()
	said := readPipe(m.stderr)
	m.mu.Unlock()
	if said != "" {
		return fmt.Errorf("%w; it said: %s", err, said)
	}
	return err
}

// launch starts the process and watches it.
func (m *Machine) launch(spec vm.Spec, listening sockets) error {
	args, files := m.driver.commandLine(spec, listening)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	// Nobody reads QEMU's messages before it ends. The pipe is small and never blocks its
	// writer, so what does not fit is lost and costs nothing.
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return fmt.Errorf("cannot make a pipe: %w", err)
	}
	unix.FcntlInt(uintptr(pipe[1]), unix.F_SETPIPE_SZ, stderrSize)
	defer unix.Close(pipe[1])

	fd := int(null.Fd())
	p, err := process.Spawn(process.Command{
		Path: m.driver.path, Args: args, Stdio: [3]int{fd, fd, pipe[1]}, Files: files, CgroupProcs: spec.CgroupProcs,
	})
	if err != nil {
		unix.Close(pipe[0])
		return err
	}
	m.mu.Lock()
	m.process, m.stderr = p, pipe[0]
	abandoned := m.state == stopped
	m.mu.Unlock()
	go m.watch(p)
	if abandoned {
		p.Kill()
		return vm.ErrGone
	}
	m.log.Info("QEMU started", "pid", p.PID, "accelerator", m.driver.Accelerator())
	if err := process.WriteFile(m.pidPath(), []byte(strconv.Itoa(p.PID)+"\n")); err != nil {
		return fmt.Errorf("cannot write the pid file: %w", err)
	}
	return nil
}

func (m *Machine) checkRunning(ctx context.Context, c *qmp.Client) error {
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

// listen makes a listening Unix socket, for root only, that stays when the daemon's descriptor is
// closed.
func listen(path string) (*os.File, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("cannot make a socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	if err := os.Chmod(path, 0o600); err != nil {
		os.Remove(path)
		return nil, fmt.Errorf("cannot make a socket: %w", err)
	}
	return l.File()
}

func closeHandedOver(spec vm.Spec) {
	for _, n := range spec.NICs {
		n.Tap.Close()
	}
	if spec.Vsock != nil {
		spec.Vsock.FD.Close()
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
			m.log.Error("QEMU does not die", "pid", p.PID)
		}
	} else {
		m.finish(vm.Exit{Time: time.Now(), Code: -1, Reason: "QEMU was never started"})
	}
	if c != nil {
		c.Close()
	}
	if console != nil {
		console.Close()
	}
	m.removeFiles()
}

func (m *Machine) removeFiles() error {
	return process.Remove(m.path(qmpSocket), m.path(consoleSocket), m.path(agentSocket), m.pidPath())
}

// finish records the end, once.
func (m *Machine) finish(e vm.Exit) {
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-m.exited:
	default:
		m.exit = e
		close(m.exited)
	}
}

// watch waits for the end of the process and says why it came.
func (m *Machine) watch(p *process.Process) {
	status, known := p.Wait()
	exit := vm.Exit{Time: time.Now(), Code: -1}
	m.mu.Lock()
	console, client, requested := m.console, m.client, m.requested
	said := readPipe(m.stderr)
	if m.stderr >= 0 {
		unix.Close(m.stderr)
		m.stderr = -1
	}
	m.mu.Unlock()
	how := "ended"
	if known {
		exit.Code, how = process.ExitCode(status)
	}
	panicked := ""
	if console != nil {
		process.Within(console.Done(), lastWordsTimeout)
		panicked = console.PanicLine()
	}
	switch {
	case panicked != "":
		exit.Reason = "the guest's kernel panicked: " + panicked
	case requested:
		exit.Reason = "the virtual machine was stopped"
	case said != "":
		exit.Reason = fmt.Sprintf("QEMU %s: %s", how, said)
	case exit.Code == 0:
		exit.Reason = "the guest powered off or rebooted"
	default:
		exit.Reason = "QEMU " + how
	}
	if client != nil {
		client.Close()
	}
	p.Close()
	m.log.Info("QEMU ended", "pid", p.PID, "code", exit.Code, "reason", exit.Reason)
	m.finish(exit)
}

// readPipe returns what QEMU said, on one line.
func readPipe(fd int) string {
	if fd < 0 {
		return ""
	}
	buf := make([]byte, stderrSize)
	n, _ := process.ReadNow(fd, buf)
	return strings.Join(process.LastLines(string(buf[:max(n, 0)]), 3), "; ")
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
		m.finish(vm.Exit{Time: time.Now(), Code: -1, Reason: "QEMU was never started"})
		return nil
	}
	m.state, m.requested = stopped, true
	p, client := m.process, m.client
	m.mu.Unlock()

	if p != nil && !m.gone() {
		if client != nil {
			quit, cancel := context.WithTimeout(ctx, quitTimeout)
			// QEMU may be gone before it has answered.
			if client.Execute(quit, "quit", nil, nil); quit.Err() == nil {
				select {
				case <-m.exited:
				case <-quit.Done():
				}
			}
			cancel()
		}
		if !m.gone() {
			p.Kill()
			if !process.Within(m.exited, killTimeout) {
				return fmt.Errorf("cannot stop QEMU of pod %s: process %d does not die", m.podID, p.PID)
			}
		}
	} else if p == nil {
		// A Start is under way and will see that it is not wanted any more.
		select {
		case <-m.exited:
		case <-ctx.Done():
			return fmt.Errorf("cannot stop QEMU of pod %s: %w", m.podID, ctx.Err())
		}
	}
	if err := m.removeFiles(); err != nil {
		return fmt.Errorf("cannot clean up after QEMU of pod %s: %w", m.podID, err)
	}
	return nil
}

func (m *Machine) gone() bool {
	select {
	case <-m.exited:
		return true
	default:
		return false
	}
}

func (m *Machine) setClient(c *qmp.Client) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.client = c
}

// monitor returns the connection to QEMU's monitor and renews it if it was lost.
func (m *Machine) monitor(ctx context.Context) (*qmp.Client, error) {
	m.mu.Lock()
	c, st := m.client, m.state
	m.mu.Unlock()
	if st != started || m.gone() {
		return nil, vm.ErrGone
	}
	if c != nil && c.Err() == nil {
		return c, nil
	}
	ctx, cancel := context.WithTimeout(ctx, monitorTimeout)
	defer cancel()
	c, err := qmp.Dial(ctx, m.path(qmpSocket), m.disks.onEvent)
	if err != nil {
		if m.gone() {
			err = vm.ErrGone
		}
		return nil, err
	}
	// What happened while nobody listened, QEMU remembers.
	if err := m.findDisks(ctx, c); err != nil {
		c.Close()
		return nil, err
	}
	m.setClient(c)
	return c, nil
}

// saved is the content of vm.State.Saved.
type saved struct {
	Schema     int    `json:"schema"`
	BootID     string `json:"boot_id"`
	PodID      string `json:"pod_id"`
	Dir        string `json:"dir"`
	PID        int    `json:"pid"`
	StartTime  uint64 `json:"start_time"`
	Executable string `json:"executable"`
	VsockCID   uint32 `json:"vsock_cid,omitempty"`
}

const savedSchema = 1

// State is what Restore needs. It does not change while the machine runs.
func (m *Machine) State() (vm.State, error) {
	m.mu.Lock()
	p := m.process
	m.mu.Unlock()
	if p == nil || m.gone() {
		return vm.State{}, vm.ErrGone
	}
	start, err := p.StartTime()
	if err != nil {
		return vm.State{}, fmt.Errorf("cannot describe QEMU of pod %s: %w", m.podID, err)
	}
	exe, err := p.Executable()
	if err != nil {
		return vm.State{}, fmt.Errorf("cannot describe QEMU of pod %s: %w", m.podID, err)
	}
	b, err := json.Marshal(saved{
		Schema: savedSchema, BootID: process.BootID(), PodID: m.podID, Dir: m.dir,
		PID: p.PID, StartTime: start, Executable: exe, VsockCID: m.vsockCID,
	})
	return vm.State{PID: p.PID, Saved: b}, err
}

// Restore takes over a machine of an earlier daemon; see vm.Driver. A QEMU whose monitor does not
// answer is taken over all the same: it can be stopped.
func (d *Driver) Restore(ctx context.Context, state json.RawMessage) (vm.Machine, error) {
	var s saved
	if err := json.Unmarshal(state, &s); err != nil {
		return nil, fmt.Errorf("cannot restore a virtual machine: its record is damaged: %w", err)
	}
	if s.Schema != savedSchema || !podIDRE.MatchString(s.PodID) || s.PID <= 1 {
		return nil, fmt.Errorf("cannot restore a virtual machine: its record (schema %d) is not understood", s.Schema)
	}
	p, err := find(s)
	if err != nil {
		return nil, fmt.Errorf("cannot restore the virtual machine of pod %s: %w", s.PodID, err)
	}
	m := newMachine(d, vm.Spec{PodID: s.PodID, Dir: s.Dir})
	m.vsockCID, m.restored, m.state, m.process = s.VsockCID, true, started, p
	if m.console, err = process.OpenConsole(ctx, m.path(consoleSocket), m.LogPath(), m.panicked, m.log); err != nil {
		m.log.Warn("the guest's console is not logged", "error", err)
		m.console = nil
	}
	go m.watch(p)
	if _, err := m.monitor(ctx); err != nil {
		m.log.Warn("QEMU's monitor does not answer; the virtual machine can only be stopped", "error", err)
	}
	return m, nil
}

// find returns the process of a record if it still lives and is the very same.
func find(s saved) (*process.Process, error) {
	if s.BootID != process.BootID() {
		return nil, fmt.Errorf("the host has booted since: %w", vm.ErrGone)
	}
	fd, err := unix.PidfdOpen(s.PID, 0)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w: %w", s.PID, err, vm.ErrGone)
	}
	p, err := process.Adopt(s.PID, fd)
	if err != nil {
		return nil, err
	}
	start, err := p.StartTime()
	exe, _ := p.Executable()
	same := err == nil && start == s.StartTime && exe == s.Executable && p.Named(processName(s.PodID))
	// Only if it lives now, what was read was about the process behind the descriptor.
	if !same || !p.Alive() {
		p.Close()
		return nil, fmt.Errorf("process %d is not its QEMU any more: %w", s.PID, vm.ErrGone)
	}
	return p, nil
}
