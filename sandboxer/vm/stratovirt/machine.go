package stratovirt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/machine"
	"kuasar.io/kuasar/sandboxer/vm/process"
	"kuasar.io/kuasar/sandboxer/vm/qmp"
)

const (
	// bindInterval is how often a socket is looked for that StratoVirt has still to bind.
	bindInterval = 5 * time.Millisecond
	// greetingTimeout bounds the time from a monitor that accepts to its greeting, in which StratoVirt makes
	// the machine: with -mem-prealloc it touches all of the memory.
	greetingTimeout = 30 * time.Second
	// messagesSize is how much of the end of StratoVirt's own messages is read, in bytes.
	messagesSize = 4096
	// messagesLimit bounds the file with those messages, in bytes, as a guest may provoke many; it is
	// looked at every messagesPeriod.
	messagesLimit = 1 << 20
)

// messagesPeriod is longer than a second for the sake of hosts with many pods.
var messagesPeriod = 5 * time.Second

// interruptedRE is what StratoVirt says of SIGTERM and its like, which from 2.3 on it obeys with status 0,
// and of a call that seccomp forbids, from 2.4 on.
var interruptedRE = regexp.MustCompile(`Received (kill signal|a bad system call)[^;]*`)

// Machine is one virtual machine on StratoVirt.
type Machine struct {
	*machine.Machine
	driver     Driver // a copy: with the version of the StratoVirt that runs
	rootFSType string
	stopBounds func()
}

func newMachine(d *Driver, spec vm.Spec) *Machine {
	m := &Machine{driver: *d, stopBounds: func() {}}
	m.Machine = machine.New(spec, machine.Kind{
		Program:     "StratoVirt",
		Files:       []string{messagesFile, disksFile},
		Said:        m.messages,
		Interrupted: interruptedRE,
		PoweredOff:  "the guest powered off",
		OnEvent: func(e qmp.Event) {
			if e.Name == "RESET" { // it would boot the guest anew; a pod does not survive that
				m.Reset()
			}
		},
		Ended: func() { m.stopBounds() },
	}, machine.NewDisks(m.diskKind()), d.log)
	return m
}

// Start launches StratoVirt; see vm.Machine.
func (m *Machine) Start(ctx context.Context) error { return m.Run(ctx, m.start) }

func (m *Machine) start(ctx context.Context, spec vm.Spec) error {
	// StratoVirt tries once to connect to the daemon, and 2.2 does not replace a socket of its own.
	if err := checkShare(spec.Share.Socket); err != nil {
		return err
	}
	if err := m.RemoveFiles(); err != nil {
		return fmt.Errorf("cannot remove what an earlier StratoVirt has left: %w", err)
	}
	if err := m.launch(spec); err != nil {
		return err
	}
	monitor, err := m.dialWhenBound(ctx, m.Path(machine.QMPSocket))
	if err != nil {
		return m.Explain(ctx, fmt.Errorf("cannot connect to the monitor: %w", err))
	}
	// Before the greeting, which comes when the guest is about to run: what it prints while nobody is
	// connected is lost.
	console, err := m.dialWhenBound(ctx, m.Path(machine.ConsoleSocket))
	if err != nil {
		monitor.Close()
		return m.Explain(ctx, fmt.Errorf("cannot connect to the guest's console: %w", err))
	}
	m.DrainConsole(console)
	return m.Connected(ctx, func(onEvent func(qmp.Event)) (*qmp.Client, error) {
		greeted, cancel := context.WithTimeout(ctx, greetingTimeout)
		defer cancel()
		client, err := qmp.New(greeted, monitor, onEvent)
		if err == nil {
			m.adoptVersion(client.Package())
		}
		return client, err
	})
}

// adoptVersion takes the version from the greeting of the StratoVirt that runs: the package may have been
// upgraded since the daemon asked its program.
func (m *Machine) adoptVersion(said string) {
	was := m.driver.release
	if said == "" {
		return
	}
	if err := m.driver.setVersion(said); err != nil {
		m.Log.Warn("StratoVirt's greeting is not understood", "error", err)
	} else if m.driver.release != was {
		m.Log.Warn("StratoVirt was replaced; restart the daemon to make full use of it", "before", was, "now", m.driver.release)
	}
}

// dialWhenBound connects to a socket that StratoVirt is about to bind.
func (m *Machine) dialWhenBound(ctx context.Context, path string) (*net.UnixConn, error) {
	return dialWhenBound(ctx, path, m.Exited())
}

func dialWhenBound(ctx context.Context, path string, exited <-chan struct{}) (*net.UnixConn, error) {
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
		case <-exited:
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
	args, files := m.driver.commandLine(spec, m.rootFSType)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	// A file and no pipe: StratoVirt outlives this daemon, and a program in Rust may not survive that
	// it cannot write its messages.
	messages, err := os.OpenFile(m.Path(messagesFile), os.O_WRONLY|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("cannot keep StratoVirt's messages: %w", err)
	}
	defer messages.Close()
	m.boundMessages()
	in, out := int(null.Fd()), int(null.Fd())
	if !m.driver.version.atLeast(2, 3) {
		// Its log. Later ones log to the standard error and print to the standard output only that they
		// could not, which must not fail as well: it would hang them.
		out = int(messages.Fd())
	}
	err = m.Launch(process.Command{
		Path: m.driver.path, Args: args, Env: []string{"STRATOVIRT_LOG_LEVEL=error"},
		Stdio: [3]int{in, out, int(messages.Fd())}, Files: files, CgroupProcs: spec.CgroupProcs,
	})
	if err != nil && !m.Launched() {
		m.stopBounds()
	}
	return err
}

// messages returns the last of what StratoVirt said, on one line.
func (m *Machine) messages() string {
	f, err := os.Open(m.Path(messagesFile))
	if err != nil {
		return ""
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil && fi.Size() > messagesSize {
		f.Seek(-messagesSize, io.SeekEnd)
	}
	b, _ := io.ReadAll(io.LimitReader(f, messagesSize))
	said := strings.Join(process.LastLines(string(b), 3), "; ")
	if strings.Contains(strings.ToLower(said), "unsupported device") {
		said += "; from 2.5 on, StratoVirt must be built with its features vhost_vsock and virtio_rng"
	}
	return said
}

// boundMessages empties the file of StratoVirt's messages whenever it is too large, until stopBounds is
// called. StratoVirt appends to it, so it goes on at the beginning.
func (m *Machine) boundMessages() {
	tick, done := time.NewTicker(messagesPeriod), make(chan struct{})
	go func() {
		for {
			select {
			case <-tick.C:
				if fi, err := os.Stat(m.Path(messagesFile)); err == nil && fi.Size() > messagesLimit {
					m.Log.Warn("StratoVirt says more than can be kept", "last", m.messages())
					os.Truncate(m.Path(messagesFile), 0)
				}
			case <-done:
				return
			}
		}
	}()
	m.stopBounds = sync.OnceFunc(func() { tick.Stop(); close(done) })
}

// saved is the content of vm.State.Saved.
type saved struct {
	machine.Saved
	// Version and MachineType are those of the running StratoVirt: the package may have been
	// upgraded and the configuration changed since.
	Version     string `json:"version"`
	MachineType string `json:"machine_type"`
}

// State is what Restore needs. It does not change while the machine runs.
func (m *Machine) State() (vm.State, error) {
	s, err := m.Saved()
	if err != nil {
		return vm.State{}, err
	}
	b, err := json.Marshal(saved{Saved: s, Version: m.driver.release, MachineType: m.driver.machineType})
	return vm.State{PID: s.PID, Saved: b}, err
}

// Restore takes over a machine of an earlier daemon; see vm.Driver. A StratoVirt whose monitor does
// not answer is taken over all the same: it can be stopped.
func (d *Driver) Restore(ctx context.Context, state json.RawMessage) (vm.Machine, error) {
	var s saved
	if err := json.Unmarshal(state, &s); err != nil {
		return nil, fmt.Errorf("cannot restore a virtual machine: its record is damaged: %w", err)
	}
	if err := s.Check(); err != nil {
		return nil, err
	}
	was := *d
	if err := was.setVersion("StratoVirt " + s.Version); err != nil {
		return nil, fmt.Errorf("cannot restore a virtual machine: its record is not understood: %w", err)
	}
	was.machineType = s.MachineType
	p, err := s.Find()
	if err != nil {
		return nil, err
	}
	m := newMachine(&was, s.Spec())
	m.loadDisks()
	m.boundMessages()
	m.TakeOver(ctx, s.Saved, p)
	return m, nil
}
