package machine

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/process"
)

// Saved is what is written down of a machine, as the content of vm.State.Saved; a driver may add to it.
// Its names are those of journals that exist.
type Saved struct {
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

// Saved describes the machine; that does not change while it runs.
func (m *Machine) Saved() (Saved, error) {
	m.mu.Lock()
	p := m.process
	m.mu.Unlock()
	if p == nil || m.Gone() {
		return Saved{}, vm.ErrGone
	}
	start, err := p.StartTime()
	var exe string
	if err == nil {
		exe, err = p.Executable()
	}
	if err != nil {
		return Saved{}, fmt.Errorf("cannot describe %s of pod %s: %w", m.kind.Program, m.podID, err)
	}
	return Saved{
		Schema: savedSchema, BootID: process.BootID(), PodID: m.podID, Dir: m.dir,
		PID: p.PID, StartTime: start, Executable: exe, VsockCID: m.vsockCID,
	}, nil
}

// Check says whether a record can be understood.
func (s Saved) Check() error {
	if s.Schema != savedSchema || !podIDRE.MatchString(s.PodID) || s.PID <= 1 {
		return fmt.Errorf("cannot restore a virtual machine: its record (schema %d) is not understood", s.Schema)
	}
	return nil
}

// Spec is what a driver makes the machine of a record from, to take its process over.
func (s Saved) Spec() vm.Spec { return vm.Spec{PodID: s.PodID, Dir: s.Dir} }

// Find returns the process of a record if it still lives and is the very same.
func (s Saved) Find() (*process.Process, error) {
	p, err := s.find()
	if err != nil {
		return nil, fmt.Errorf("cannot restore the virtual machine of pod %s: %w", s.PodID, err)
	}
	return p, nil
}

func (s Saved) find() (*process.Process, error) {
	if s.BootID != process.BootID() {
		return nil, fmt.Errorf("the host has booted since: %w", vm.ErrGone)
	}
	fd, err := unix.PidfdOpen(s.PID, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, fmt.Errorf("process %d: %w: %w", s.PID, err, vm.ErrGone)
	}
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", s.PID, err)
	}
	p, err := process.Adopt(s.PID, fd)
	if err != nil {
		return nil, err
	}
	start, err := p.StartTime()
	exe, _ := p.Executable()
	same := err == nil && start == s.StartTime && exe == s.Executable && p.Named(ProcessName(s.PodID))
	// Only if it lives now, what was read was about the process behind the descriptor.
	if !same || !p.Alive() {
		p.Close()
		return nil, fmt.Errorf("process %d is not its hypervisor any more: %w", s.PID, vm.ErrGone)
	}
	return p, nil
}

// TakeOver makes m the machine of a record, whose process p is. A hypervisor whose monitor does not
// answer is taken over all the same: it can be stopped.
func (m *Machine) TakeOver(ctx context.Context, s Saved, p *process.Process) {
	m.vsockCID, m.restored, m.state, m.process = s.VsockCID, true, started, p
	m.spec = vm.Spec{}
	if err := m.OpenConsole(ctx); err != nil {
		m.Log.Warn("the guest's console is not logged", "error", err)
	}
	go m.watch(p)
	if _, err := m.monitor(ctx); err != nil {
		m.Log.Warn(m.kind.Program+"'s monitor does not answer; the virtual machine can only be stopped", "error", err)
	}
}
