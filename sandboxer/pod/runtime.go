package pod

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"time"

	"google.golang.org/protobuf/proto"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/container"
	"kuasar.io/kuasar/sandboxer/guestlink"
	"kuasar.io/kuasar/sandboxer/vm"
)

// Runtime is what pods are made with. The functions are called from several goroutines.
type Runtime struct {
	Driver vm.Driver
	// OpenLink opens the connection to the agent of a started machine.
	OpenLink func(ctx context.Context, e vm.Endpoint, log *slog.Logger) (guestlink.Link, error)
	// Vsock claims a context id for a pod; nil where the host has no vsock: the machine then gets
	// the serial multiplex.
	Vsock func() (*vm.Vsock, error)

	Attach         func(ctx context.Context, netns string) (Network, error)
	RestoreNetwork func(saved json.RawMessage) (Network, error)

	// NewShare makes the mount tree of a pod in its state directory; OpenShare takes over a whole one
	// that another daemon made; RemoveShare removes what there is of one, if anything.
	NewShare    func(dir string) (Share, error)
	OpenShare   func(dir string) (Share, error)
	RemoveShare func(dir string) error
	// StartVirtiofsd serves the share's directory on socket. Nil where no such daemon is installed:
	// the hypervisor exports the directory itself as 9p.
	StartVirtiofsd   func(ctx context.Context, c VirtiofsdConfig) (Virtiofsd, error)
	RestoreVirtiofsd func(saved json.RawMessage) (Virtiofsd, error)

	// NewCgroup makes the leaf name below parent, which is empty where the engine names none.
	NewCgroup func(parent, name string) (Cgroup, error)
	// LoadCgroup finds the leaf that NewCgroup made; that there is none is no error. An empty parent
	// may also mean that nobody knows the parent any more.
	LoadCgroup func(parent, name string) (Cgroup, error)
	// Cgroups lists the names of all leaves that this daemon or an earlier one made for pods in the
	// same base directory. Nil: they cannot be told from others.
	Cgroups func() ([]string, error)

	// NewContainers makes the host's side of a pod's containers. For a pod that another daemon left it
	// takes over the clients' connections that this one kept, and returns when every call that was
	// outstanding on them has found its container again. New clients are served after that only.
	NewContainers func(ContainersConfig) (Containers, error)

	// Listen returns the listener of a pod's task socket. At a recovery it is called as soon as the pod
	// is known to run, so that its clients wait until they are served instead of being refused. One that an earlier daemon kept is taken
	// over with the clients that wait on it, and the file at path is left alone then; otherwise it is
	// made as ListenUnix does. Closing the listener neither removes the file nor what is kept of it.
	// Nil: ListenUnix.
	Listen func(podID, path string) (net.Listener, error)
	// Unlisten forgets what is kept for another daemon in the pod's name: the listener, and the
	// clients' connections that no Containers had taken over. It is called when the task socket is
	// gone for good, also where nothing was kept. Nil: nothing is ever kept.
	Unlisten func(podID string) error
}

// Network is the attachment of a machine to the pod's network namespace. No two of its methods are
// called at the same time.
type Network interface {
	// NICs hands over the tap descriptors, once.
	NICs() []vm.NIC
	// Guest is what the guest has to configure.
	Guest() *protocol.Network
	// Adopted says whether the machine is joined to what CNI made.
	Adopted() bool
	// Adopt joins the machine to an interface that CNI has made since the attachment, and returns what
	// the guest has to configure then: nil, and no error, as long as there is none. Again it reads what
	// has changed. Until CNI is known to be complete, an interface without addresses is left alone.
	Adopt(ctx context.Context, complete bool) (*protocol.Network, error)
	// Watch tells when it is worth calling Adopt: the channel yields an element after one change of the
	// namespace or several. It ends with ctx.
	Watch(ctx context.Context) (<-chan struct{}, error)
	// Saved is what RestoreNetwork needs.
	Saved() (json.RawMessage, error)
	// Close removes everything from the namespace; a namespace that is gone is no error.
	Close() error
}

// Share is the directory tree that the guest sees.
type Share interface {
	// Exported is the directory on the host that is to be exported.
	Exported() string
	// Close unmounts and removes everything; it is idempotent.
	Close() error
}

// VirtiofsdConfig tells how to serve a share.
type VirtiofsdConfig struct {
	Dir         string   // the directory to export
	Socket      string   // the Unix socket to listen on
	CgroupProcs []string // files to which the daemon is added before it executes
	Log         *slog.Logger
}

// Virtiofsd is a running file system daemon.
type Virtiofsd interface {
	// PIDs lists its processes, none after its end.
	PIDs() []int
	Exited() <-chan struct{}
	Saved() (json.RawMessage, error)
	Stop() error
}

// Cgroup is the leaf that holds every process of a pod on the host.
type Cgroup interface {
	// Procs are the files into which a process is written to join, one per hierarchy.
	Procs() []string
	Metrics() (proto.Message, error)
	// PIDs lists the processes that are inside.
	PIDs() ([]int, error)
	// Delete kills what is inside and removes the leaf; a leaf that is gone is no error.
	Delete(ctx context.Context) error
}

// ContainersConfig is what the containers of a pod need.
type ContainersConfig struct {
	PodID string
	// Dir is the pod's state directory.
	Dir string
	// Address is where the task API will be served, in the form that clients get.
	Address string
	// Client is whose pod it is.
	Client Client
	// Direct says that Address leads the client to the guest itself: it makes the containers that it
	// has announced there.
	Direct bool
	// Guest is the connection to the agent. For a pod whose machine ended while no daemon was there
	// all its calls fail, and GuestGone follows at once.
	Guest *Guest
	// Share is nil in that case.
	Share     Share
	SharedPID bool
	// Records is what Journal was last called with, nil for a new pod.
	Records json.RawMessage
	// Journal keeps the containers' records over a restart of the daemon.
	Journal func(records json.RawMessage)
	// Fail reports that the guest broke the protocol; the pod is stopped.
	Fail func(error)
	Log  *slog.Logger
}

// Containers is the host's side of the containers of one pod.
type Containers interface {
	// Serve answers the task and streaming APIs on l until Close or HandOver, which close l.
	Serve(l net.Listener) error
	// Close forgets the containers together with their pod: the clients' connections end, and what
	// was kept for another daemon is kept no more.
	Close() error
	// HandOver lets go of the containers because this daemon ends and another is to go on: nothing
	// that it needs is removed or ended, and the last records are journalled. Where connections
	// cannot be kept they end without an answer to the calls on them. It returns within a few
	// seconds whatever the guest does. Neither Close nor anything else follows.
	HandOver() error
	// GuestGone ends every process at the given time and releases the containers' storage.
	GuestGone(exit time.Time)
	// OOM reports that the guest's kernel killed a process of the container for want of memory.
	OOM(containerID string)
	// Deleted reports that a client has deleted, at the guest's own task API, a container that was made
	// by the given announcement: see protocol.Deleted.
	Deleted(containerID, announcement string)

	// What a client announces: see controller.Containers. They fail where Client announces nothing.
	Announced() map[string][]string
	AnnounceContainer(ctx context.Context, c container.CreateRequest) error
	AnnounceProcess(ctx context.Context, p container.ExecRequest) error
	Withdraw(ctx context.Context, id, execID string) error

	// Len is the number of containers that are not deleted.
	Len() int
}

// ErrUnmanageable says that a pod lives and is whole, and that only another version of the daemon can
// manage it. NewContainers' errors wrap it where that is so: such a pod is not stopped for it.
var ErrUnmanageable = errors.New("another version of the daemon is needed")

// console is implemented by machines that follow their guest's console.
type console interface {
	// ConsoleTail returns the last lines, oldest first; none that were written before this daemon.
	ConsoleTail() []string
}

func (r *Runtime) listen(podID, path string) (net.Listener, error) {
	if r.Listen == nil {
		return ListenUnix(path)
	}
	return r.Listen(podID, path)
}

func (r *Runtime) unlisten(podID string) error {
	if r.Unlisten == nil {
		return nil
	}
	return r.Unlisten(podID)
}
