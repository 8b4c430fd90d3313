// Package vm is the contract between a pod and its virtual machine. A Driver knows one hypervisor;
// a Machine is one VM of it, one process on the host.
//
// Rules of the lifecycle:
//
//   - Driver.Create only records; it starts nothing and makes no file. Start does, once.
//     A Machine is not reusable after Stop.
//   - If Start fails, everything it made is gone again: no process, no socket, no file except the
//     console log, which the caller deletes with the pod's directory.
//   - Spec.NICs[i].Tap and Spec.VsockFD are handed over: the machine closes its copies when the
//     hypervisor holds them, and on every failure of Start.
//   - Exited is closed when the hypervisor's process has been reaped (or, after Restore, when its
//     pidfd says so), whatever the cause. Nothing here waits for the guest's cooperation.
//   - All methods may be called at any time from several goroutines; after the end they fail with
//     an error that wraps ErrGone.
package vm

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"time"
)

// ErrGone is wrapped by the errors of a Machine whose process has ended.
var ErrGone = errors.New("the virtual machine is gone")

// Driver makes machines of one hypervisor. It is chosen by what the binary says of itself.
type Driver interface {
	// Name is the hypervisor and its version for people, such as "QEMU 7.2.22 (tcg)".
	Name() string
	// Create records the spec of a machine and checks it.
	Create(Spec) (Machine, error)
	// Restore takes over a machine that another daemon started, from what its State returned. It
	// fails with an error wrapping ErrGone if that process does not live any more, and never
	// mistakes somebody else's process for it.
	Restore(ctx context.Context, state json.RawMessage) (Machine, error)
}

// Machine is one virtual machine.
type Machine interface {
	// Start launches the hypervisor and returns when the guest's CPUs run. The deadline of ctx
	// bounds it. The agent is not up yet: see Dialer and package guestlink.
	Start(ctx context.Context) error
	// Endpoint says how the guest is reached. It is constant for the life of the machine.
	Endpoint() Endpoint
	// AttachDisk plugs a disk in and returns once the hypervisor accepted it; the guest finds it
	// by Disk.Serial.
	AttachDisk(ctx context.Context, d Disk) error
	// DetachDisk unplugs a disk by its serial and frees its slot. Unknown serials succeed.
	DetachDisk(ctx context.Context, serial string) error
	// Exited is closed when the process is gone; Exit is valid from then on.
	Exited() <-chan struct{}
	Exit() Exit
	// Stop ends the machine at once: quit by the monitor, then SIGKILL. It returns when the
	// process is gone and its sockets are removed. It is idempotent.
	Stop(ctx context.Context) error
	// State is what Restore needs; it is journalled by the pod.
	State() (State, error)
}

// State describes a running machine.
type State struct {
	// PID of the hypervisor on the host.
	PID int
	// Saved is opaque to everyone but the driver.
	Saved json.RawMessage
}

// Spec is what a machine is made of.
type Spec struct {
	// PodID names the process (-name sandbox-<PodID>) and its files.
	PodID string
	// Dir is the pod's state directory; it exists, mode 0700. The machine makes in it
	// console.sock, sandbox-<PodID>.log, sandbox-<PodID>.pid and sockets of its own.
	Dir string

	Kernel, Initrd, Image string   // Initrd or Image, as in the configuration
	KernelParams          []string // appended to the driver's own
	VCPUs                 int
	MemoryMiB             int
	MemoryPrealloc        bool

	Share Share
	NICs  []NIC
	// Vsock selects the transport: the fd of /dev/vhost-vsock with the claimed CID, or nil for
	// the serial multiplex.
	Vsock *Vsock

	// CgroupProcs lists the cgroup.procs files (one per hierarchy) into which the process is put
	// before it executes.
	CgroupProcs []string
}

// Share is the directory that the guest mounts as protocol.ShareTag.
type Share struct {
	// Dir on the host, exported by the hypervisor itself as 9p when Socket is empty.
	Dir string
	// Socket of a listening virtiofs daemon (vhost-user-fs).
	Socket string
}

// NIC is a cold-plugged network interface.
type NIC struct {
	// Tap is an open tap device with IFF_VNET_HDR, made in the pod's network namespace.
	Tap *os.File
	// MAC is the guest's, the one that CNI gave to the pod's interface.
	MAC net.HardwareAddr
	MTU int
}

// Vsock is a context id claimed on /dev/vhost-vsock.
type Vsock struct {
	CID uint32
	FD  *os.File
}

// Disk is a raw image or block device of the host.
type Disk struct {
	Path     string
	Serial   string // at most 20 characters, unique in the machine
	ReadOnly bool
}

// Endpoint says how the guest is reached: exactly one of SerialSocket and VsockCID is set.
type Endpoint struct {
	// SerialSocket is the Unix socket of the virtio-serial port that carries the multiplex.
	SerialSocket string
	// VsockCID is the guest's context id.
	VsockCID uint32
	// Restored says that an earlier daemon may have talked to this guest, so that the serial
	// multiplex may have to cut off what is left of that.
	Restored bool
}

// Exit says how the hypervisor ended.
type Exit struct {
	Time time.Time
	// Code is the exit status, 128+n for a signal, -1 when it could not be known (a restored
	// machine is no child of this process).
	Code int
	// Reason is a line for people: the guest's panic, the hypervisor's last words, or the signal.
	Reason string
}
