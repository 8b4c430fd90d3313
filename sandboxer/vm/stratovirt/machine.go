package stratovirt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
	// quitTimeout is how long StratoVirt may take to obey "quit" before it is killed.
	quitTimeout = 2 * time.Second
	// killTimeout bounds the wait for a killed process, which only the kernel can hold up.
	killTimeout = 10 * time.Second
	// lastWordsTimeout bounds the wait for the console's end after StratoVirt's.
	lastWordsTimeout = 300 * time.Millisecond
	// monitorTimeout bounds the reconnection to the monitor.
	monitorTimeout = 3 * time.Second
	// bindInterval is how often a socket is looked for that StratoVirt has still to bind.
	bindInterval = 5 * time.Millisecond
	// consoleLines is how many of the guest's last lines an error carries.
	consoleLines = 10
	// messagesSize is how much of the end of StratoVirt's own messages is read, in bytes.
	messagesSize = 4096
	// messagesLimit bounds the file with those messages, in bytes, as a guest may provoke many; it is
	// looked at every messagesPeriod.
	messagesLimit = 1 << 20
)

// messagesPeriod is longer than a second for the sake of hosts with many pods.
var messagesPeriod = 5 * time.Second

type state int

const (
	created state = iota
	started
	stopped
)

// Machine is one virtual machine on StratoVirt.
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
	requested bool // somebody wants it to end
	reset     bool // the guest has rebooted
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
	}
	if spec.Vsock != nil {
		m.vsockCID = spec.Vsock.CID
	}
	m.disks.init()
	return m
}

func (m *Machine) path(name string) string { return filepath.Join(m.dir, name) }

// LogPath is the file with the guest's console.
func (m *Machine) LogPath() string { return m.path("sandbox-" + m.podID + ".log") }

func (m *Machine) pidPath() string { return m.path("sandbox-" + m.podID + ".pid") }

// Endpoint says how the guest is reached.
func (m *Machine) Endpoint() vm.Endpoint {
	return vm.Endpoint{VsockCID: m.vsockCID, Restored: m.restored}
}

// Exited is closed when the process has ended.
func (m *Machine) Exited() <-chan struct{} { return m.exited }

// Exit says how it ended; it is valid once Exited is closed.
func (m *Machine) Exit() vm.Exit {
	if m.gone() {
		return m.exit
	}
	return vm.Exit{}
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

// Start launches StratoVirt; see vm.Machine.
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
			err = fmt.Errorf("cannot start StratoVirt for pod %s: %w", m.podID, err)
			m.abandon()
		}
	}()

	// StratoVirt tries once to connect to the daemon, and 2.2 does not replace a socket of its own.
	if err := checkShare(spec.Share.Socket); err != nil {
		return err
	}
	if err := m.removeFiles(); err != nil {
		return fmt.Errorf("cannot remove what an earlier StratoVirt has left: %w", err)
	}
	if err := m.launch(spec); err != nil {
		return err
	}
	if err := m.connect(ctx); err != nil {
		// A lost connection is most likely the first sign of a StratoVirt that ends.
		m.mu.Lock()
		lost := m.client == nil || m.client.Err() != nil
		m.mu.Unlock()
		if lost && ctx.Err() == nil && process.Within(m.exited, time.Second) {
			return errors.New(m.exit.Reason)
		}
		if said := m.messages(); said != "" {
			err = fmt.Errorf("%w; it said: %s", err, said)
		}
		return err
	}
	return nil
}

// connect attaches the console and the monitor of a StratoVirt that was just launched.
func (m *Machine) connect(ctx context.Context) error {
	conn, err := m.dialWhenBound(ctx, m.path(qmpSocket))
	if err != nil {
		return fmt.Errorf("cannot connect to the monitor: %w", err)
	}
	// Before the greeting, which comes when the guest is about to run: what it prints while nobody is
	// connected is lost.
	serial, err := m.dialWhenBound(ctx, m.path(consoleSocket))
	if err != nil {
		conn.Close()
		return fmt.Errorf("cannot connect to the guest's console: %w", err)
	}
	console := process.NewConsole(serial, m.LogPath(), m.panicked, m.log)
	m.mu.Lock()
	m.console = console
	m.mu.Unlock()
	client, err := qmp.New(ctx, conn, m.onEvent)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.client = client
	m.mu.Unlock()
	var status struct {
		Status  string `json:"status"`
		Running bool   `json:"running"`
	}
	if err := client.Execute(ctx, "query-status", nil, &status); err != nil {
		return err
	}
	if !status.Running {
		return fmt.Errorf("the guest is not running but %q", status.Status)
	}
	return nil
}

// dialWhenBound connects to a socket that StratoVirt is about to bind.
func (m *Machine) dialWhenBound(ctx context.Context, path string) (*net.UnixConn, error) {
	var d net.Dialer
	tick := time.NewTicker(bindInterval)
	defer tick.Stop()
	for {
		conn, err := d.DialContext(ctx, "unix", path)
		if err == nil {
			return conn.(*net.UnixConn), nil
		}
		// It is not there yet, or bound and does not listen yet.
		if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ECONNREFUSED) {
			return nil, err
		}
		select {
		case <-tick.C:
		case <-m.exited:
			return nil, vm.ErrGone
		case <-ctx.Done():
			return nil, fmt.Errorf("it is not bound: %w", ctx.Err())
		}
	}
}

// checkShare says whether there is a socket at path; whether somebody listens cannot be tried, as
// the daemon serves the first that connects and no other.
func checkShare(path string) error {
	if path == "" {
		return nil
	}
	fi, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("the virtiofs daemon does not listen: %w", err)
	}
	if fi.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("the virtiofs daemon does not listen: %s is no socket", path)
	}
	return nil
}

// launch starts the process and watches it.
func (m *Machine) launch(spec vm.Spec) error {
	args, files := m.driver.commandLine(spec)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	// A file and no pipe: StratoVirt outlives this daemon, and a program in Rust may not survive that
	// it cannot write its messages.
	messages, err := os.OpenFile(m.path(messagesFile), os.O_WRONLY|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("cannot keep StratoVirt's messages: %w", err)
	}
	defer messages.Close()
	in, out := int(null.Fd()), int(messages.Fd())
	p, err := process.Spawn(process.Command{
		Path: m.driver.path, Args: args, Env: []string{"STRATOVIRT_LOG_LEVEL=error"},
		Stdio: [3]int{in, in, out}, Files: files, CgroupProcs: spec.CgroupProcs,
	})
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
	m.log.Info("StratoVirt started", "pid", p.PID, "version", m.driver.release)
	if err := process.WriteFile(m.pidPath(), []byte(strconv.Itoa(p.PID)+"\n")); err != nil {
		return fmt.Errorf("cannot write the pid file: %w", err)
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
	switch e.Name {
	case "DEVICE_DELETED":
		m.disks.onDeleted(e.Data)
	case "RESET":
		// StratoVirt would boot the guest anew; a pod does not survive that.
		m.mu.Lock()
		m.reset = true
		p := m.process
		m.mu.Unlock()
		if p != nil {
			p.Kill()
		}
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
			m.log.Error("StratoVirt does not die", "pid", p.PID)
		}
	} else {
		m.finish(vm.Exit{Time: time.Now(), Code: -1, Reason: "StratoVirt was never started"})
	}
	if c != nil {
		c.Close()
	}
	if console != nil {
		console.Close()
	}
	if err := m.removeFiles(); err != nil {
		m.log.Warn("cannot clean up after StratoVirt", "error", err)
	}
}

func (m *Machine) removeFiles() error {
	return process.Remove(m.path(qmpSocket), m.path(consoleSocket), m.pidPath(), m.path(messagesFile), m.path(disksFile))
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
	stop := m.boundMessages()
	status, known := p.Wait()
	stop()
	exit := vm.Exit{Time: time.Now(), Code: -1}
	m.mu.Lock()
	console, client, requested, reset := m.console, m.client, m.requested, m.reset
	m.mu.Unlock()
	said, how := m.messages(), "ended"
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
	case reset:
		exit.Reason = "the guest rebooted"
	case requested:
		exit.Reason = "the virtual machine was stopped"
	case said != "":
		exit.Reason = fmt.Sprintf("StratoVirt %s: %s", how, said)
	case exit.Code == 0:
		exit.Reason = "the guest powered off"
	default:
		exit.Reason = "StratoVirt " + how
	}
	if client != nil {
		client.Close()
	}
	m.disks.release()
	p.Close()
	m.log.Info("StratoVirt ended", "pid", p.PID, "code", exit.Code, "reason", exit.Reason)
	m.finish(exit)
}

// messages returns the last of what StratoVirt said, on one line.
func (m *Machine) messages() string {
	f, err := os.Open(m.path(messagesFile))
	if err != nil {
		return ""
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil && fi.Size() > messagesSize {
		f.Seek(-messagesSize, io.SeekEnd)
	}
	b, _ := io.ReadAll(io.LimitReader(f, messagesSize))
	said := strings.Join(process.LastLines(string(b), 3), "; ")
	if m.driver.version.atLeast(2, 5) && strings.Contains(strings.ToLower(said), "unsupported device") {
		said += "; from 2.5 on, StratoVirt must be built with its features vhost_vsock and virtio_rng"
	}
	return said
}

// boundMessages empties the file of StratoVirt's messages whenever it is too large, until stop is called.
// StratoVirt appends to it, so it goes on at the beginning.
func (m *Machine) boundMessages() (stop func()) {
	tick, done := time.NewTicker(messagesPeriod), make(chan struct{})
	go func() {
		for {
			select {
			case <-tick.C:
				if fi, err := os.Stat(m.path(messagesFile)); err == nil && fi.Size() > messagesLimit {
					m.log.Warn("StratoVirt says more than can be kept", "last", m.messages())
					os.Truncate(m.path(messagesFile), 0)
				}
			case <-done:
				return
			}
		}
	}()
	return func() { tick.Stop(); close(done) }
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
		m.finish(vm.Exit{Time: time.Now(), Code: -1, Reason: "StratoVirt was never started"})
		return nil
	}
	m.state, m.requested = stopped, true
	p, client := m.process, m.client
	m.mu.Unlock()

	if p != nil && !m.gone() {
		if client != nil {
			quit, cancel := context.WithTimeout(ctx, quitTimeout)
			// StratoVirt may be gone before it has answered.
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
				return fmt.Errorf("cannot stop StratoVirt of pod %s: process %d does not die", m.podID, p.PID)
			}
		}
	} else if p == nil {
		// A Start is under way and will see that it is not wanted any more.
		select {
		case <-m.exited:
		case <-ctx.Done():
			return fmt.Errorf("cannot stop StratoVirt of pod %s: %w", m.podID, ctx.Err())
		}
	}
	if err := m.removeFiles(); err != nil {
		return fmt.Errorf("cannot clean up after StratoVirt of pod %s: %w", m.podID, err)
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

// monitor returns the connection to StratoVirt's monitor and renews it if it was lost.
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
	c, err := qmp.Dial(ctx, m.path(qmpSocket), m.onEvent)
	if err != nil {
		if m.gone() {
			err = vm.ErrGone
		}
		return nil, err
	}
	m.mu.Lock()
	m.client = c
	m.mu.Unlock()
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
	VsockCID   uint32 `json:"vsock_cid"`
	// Version and MachineType are those of the running StratoVirt: the package may have been
	// upgraded and the configuration changed since.
	Version     string `json:"version"`
	MachineType string `json:"machine_type"`
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
		return vm.State{}, fmt.Errorf("cannot describe StratoVirt of pod %s: %w", m.podID, err)
	}
	exe, err := p.Executable()
	if err != nil {
		return vm.State{}, fmt.Errorf("cannot describe StratoVirt of pod %s: %w", m.podID, err)
	}
	b, err := json.Marshal(saved{
		Schema: savedSchema, BootID: process.BootID(), PodID: m.podID, Dir: m.dir,
		PID: p.PID, StartTime: start, Executable: exe, VsockCID: m.vsockCID,
		Version: m.driver.release, MachineType: m.driver.machineType,
	})
	return vm.State{PID: p.PID, Saved: b}, err
}

// Restore takes over a machine of an earlier daemon; see vm.Driver. A StratoVirt whose monitor does
// not answer is taken over all the same: it can be stopped.
func (d *Driver) Restore(ctx context.Context, state json.RawMessage) (vm.Machine, error) {
	var s saved
	if err := json.Unmarshal(state, &s); err != nil {
		return nil, fmt.Errorf("cannot restore a virtual machine: its record is damaged: %w", err)
	}
	was := *d
	if s.Schema != savedSchema || !podIDRE.MatchString(s.PodID) || s.PID <= 1 || was.setVersion("StratoVirt "+s.Version) != nil {
		return nil, fmt.Errorf("cannot restore a virtual machine: its record (schema %d) is not understood", s.Schema)
	}
	was.machineType = s.MachineType
	p, err := find(s)
	if err != nil {
		return nil, fmt.Errorf("cannot restore the virtual machine of pod %s: %w", s.PodID, err)
	}
	m := newMachine(&was, vm.Spec{PodID: s.PodID, Dir: s.Dir})
	m.vsockCID, m.restored, m.state, m.process = s.VsockCID, true, started, p
	if err := m.loadDisks(); err != nil {
		m.log.Warn("the disks that are plugged in are not known; none can be plugged in or out", "error", err)
	}
	if m.console, err = process.OpenConsole(ctx, m.path(consoleSocket), m.LogPath(), m.panicked, m.log); err != nil {
		m.log.Warn("the guest's console is not logged", "error", err)
		m.console = nil
	}
	go m.watch(p)
	if _, err := m.monitor(ctx); err != nil {
		m.log.Warn("StratoVirt's monitor does not answer; the virtual machine can only be stopped", "error", err)
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
		return nil, fmt.Errorf("process %d is not its StratoVirt any more: %w", s.PID, vm.ErrGone)
	}
	return p, nil
}
