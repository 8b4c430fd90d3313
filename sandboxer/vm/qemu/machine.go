package qemu

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"regexp"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/machine"
	"kuasar.io/kuasar/sandboxer/vm/process"
	"kuasar.io/kuasar/sandboxer/vm/qmp"
)

// stderrSize is how much of QEMU's own messages is kept, in bytes: one page of a pipe.
const stderrSize = 4096

// interruptedRE is what QEMU says when it obeys a signal.
var interruptedRE = regexp.MustCompile(`terminating on signal [^;]*`)

// Machine is one virtual machine on QEMU.
type Machine struct {
	*machine.Machine
	driver     *Driver
	rootFSType string

	mu     sync.Mutex
	stderr int // our end of the pipe, -1 if there is none
	words  string
}

func newMachine(d *Driver, spec vm.Spec) *Machine {
	m := &Machine{driver: d, stderr: -1}
	m.Machine = machine.New(spec, machine.Kind{
		Program:     "QEMU",
		Said:        m.said,
		Interrupted: interruptedRE,
		PoweredOff:  "the guest powered off or rebooted",
		Renewed:     m.findDisks,
		Ended:       m.closeStderr,
	}, machine.NewDisks(d.diskKind()), d.log)
	return m
}

// Start launches QEMU; see vm.Machine.
func (m *Machine) Start(ctx context.Context) error { return m.Run(ctx, m.start) }

func (m *Machine) start(ctx context.Context, spec vm.Spec) (err error) {
	var listening sockets
	for _, s := range []struct {
		name string
		file **os.File
		used bool
	}{
		{machine.QMPSocket, &listening.qmp, true},
		{machine.ConsoleSocket, &listening.console, true},
		{machine.AgentSocket, &listening.agent, spec.Vsock == nil},
	} {
		if !s.used {
			continue
		}
		if *s.file, err = listen(m.Path(s.name)); err != nil {
			return err
		}
		defer (*s.file).Close()
	}
	// Connected before QEMU runs: it finds us waiting, and nothing of the console is missed.
	if err := m.OpenConsole(ctx); err != nil {
		return err
	}
	var dialer net.Dialer
	monitor, err := dialer.DialContext(ctx, "unix", m.Path(machine.QMPSocket))
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
	return m.Connected(ctx, func(onEvent func(qmp.Event)) (*qmp.Client, error) {
		return qmp.New(ctx, monitor.(*net.UnixConn), onEvent)
	})
}

// launch starts the process and watches it.
func (m *Machine) launch(spec vm.Spec, listening sockets) error {
	vhost, err := m.driver.openVhostNets(len(spec.NICs))
	if err != nil {
		return err
	}
	defer vhost.close()
	args, files := m.driver.commandLine(spec, m.rootFSType, listening, vhost)
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
	m.mu.Lock()
	m.stderr = pipe[0]
	m.mu.Unlock()

	fd := int(null.Fd())
	err = m.Launch(process.Command{
		Path: m.driver.path, Args: args, Stdio: [3]int{fd, fd, pipe[1]}, Files: files, CgroupProcs: spec.CgroupProcs,
	})
	if err != nil && !m.Launched() {
		m.closeStderr()
	}
	return err
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

// said returns what QEMU has said so far, on one line.
func (m *Machine) said() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stderr >= 0 {
		buf := make([]byte, stderrSize)
		n, _ := process.ReadNow(m.stderr, buf)
		m.words += string(buf[:max(n, 0)])
	}
	return strings.Join(process.LastLines(m.words, 3), "; ")
}

func (m *Machine) closeStderr() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stderr >= 0 {
		unix.Close(m.stderr)
		m.stderr = -1
	}
}

// saved is the content of vm.State.Saved.
type saved struct {
	machine.Saved
	// SCSI says that the machine was made with a controller for its disks, whatever is configured since.
	SCSI bool `json:"scsi,omitempty"`
}

// State is what Restore needs. It does not change while the machine runs.
func (m *Machine) State() (vm.State, error) {
	s, err := m.Saved()
	if err != nil {
		return vm.State{}, err
	}
	b, err := json.Marshal(saved{s, m.driver.scsi})
	return vm.State{PID: s.PID, Saved: b}, err
}

// Restore takes over a machine of an earlier daemon; see vm.Driver. A QEMU whose monitor does not
// answer is taken over all the same: it can be stopped.
func (d *Driver) Restore(ctx context.Context, state json.RawMessage) (vm.Machine, error) {
	var s saved
	if err := json.Unmarshal(state, &s); err != nil {
		return nil, fmt.Errorf("cannot restore a virtual machine: its record is damaged: %w", err)
	}
	if err := s.Check(); err != nil {
		return nil, err
	}
	p, err := s.Find()
	if err != nil {
		return nil, err
	}
	was := *d
	was.scsi = s.SCSI
	m := newMachine(&was, s.Spec())
	m.TakeOver(ctx, s.Saved, p)
	return m, nil
}
