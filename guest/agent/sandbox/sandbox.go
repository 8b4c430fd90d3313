// Package sandbox is the private service by which the host sets the pod up: what belongs to the
// whole pod and not to one container.
package sandbox

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/agent/clock"
	"kuasar.io/kuasar/guest/agent/network"
	"kuasar.io/kuasar/guest/agent/shutdown"
	"kuasar.io/kuasar/guest/protocol"
)

// Containers is what the service needs of the containers.
type Containers interface {
	Prepare(context.Context, *protocol.PrepareContainerRequest) error
	Purge(ctx context.Context, id string) error
	PrepareProcess(context.Context, *protocol.PrepareProcessRequest) error
	PurgeProcess(context.Context, *protocol.PurgeProcessRequest) error
	// Deleted lists the direct containers that were deleted and not purged since.
	Deleted() []*protocol.Deleted
}

// Options of a Service.
type Options struct {
	Containers Containers
	// Namespaces makes the namespaces that the pod's containers share.
	Namespaces func(sharedPID bool, hostname string) error
	// Ready, if not nil, is called once when the pod is set up.
	Ready func()
	// Share is why the share could not be mounted, or nil.
	Share error
	// Quiesce stops everything; End ends the machine and does not return.
	Quiesce func(grace time.Duration)
	End     func(reason string)
	Log     *slog.Logger
}

// Service implements protocol.SandboxService. Its errors are gRPC status errors.
type Service struct {
	Options
	events queue

	mu    sync.Mutex // held by Setup
	ready bool
	// namespaces makes the containers' namespaces at its first call and returns what became of it
	// at every one; nil before Setup.
	namespaces func() error
	net        sync.Mutex // held while the network is changed
}

var _ protocol.SandboxService = (*Service)(nil)

// New returns a service for a pod that is not set up.
func New(o Options) *Service { return &Service{Options: o} }

const (
	maxFile    = 1 << 20 // of hosts and resolv.conf
	defaultShm = 64 << 20

	// namespaceDelay lets the answer of Setup go out first.
	namespaceDelay = 20 * time.Millisecond
)

// Setup applies what belongs to the pod. What a failed call had done is not undone: the host ends
// the machine.
func (s *Service) Setup(ctx context.Context, r *protocol.SetupRequest) (*protocol.SetupResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ready {
		return nil, errgrpc.ToGRPC(fmt.Errorf("cannot set the pod up: it is set up: %w", errdefs.ErrAlreadyExists))
	}
	if s.Share != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("cannot set the pod up: %w: %w", s.Share, errdefs.ErrFailedPrecondition))
	}
	if err := s.setup(ctx, r); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	s.ready = true
	if s.Ready != nil {
		s.Ready()
	}
	return &protocol.SetupResponse{}, nil
}

func (s *Service) setup(ctx context.Context, r *protocol.SetupRequest) error {
	if err := check(r); err != nil {
		return fmt.Errorf("cannot set the pod up: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	// Time and random numbers first: everything else may use them.
	if len(r.GetEntropy()) > 0 {
		if err := clock.Seed(r.GetEntropy()); err != nil {
			return err
		}
	}
	if r.GetUnixNanos() != 0 {
		behind, err := clock.Set(r.GetUnixNanos())
		if err != nil {
			return err
		}
		s.Log.Debug("clock set", "behind", behind)
	}
	if h := r.GetHostname(); h != "" {
		if err := unix.Sethostname([]byte(h)); err != nil {
			return fmt.Errorf("cannot set hostname %q: %w", h, err)
		}
	}
	if err := writeFiles(r); err != nil {
		return err
	}
	if err := mountShm(protocol.ShmPath, r.GetShmSize()); err != nil {
		return err
	}
	late, err := setSysctls(r.GetSysctls(), globalSysctl, writeSysctl)
	if err != nil {
		return err
	}
	s.net.Lock()
	err = network.Apply(ctx, r.GetNetwork())
	s.net.Unlock()
	if err != nil {
		return err
	}
	// Those of an interface exist only now.
	late, err = setSysctls(late, globalSysctl, writeSysctl)
	if err != nil {
		return err
	}
	s.namespaces = sync.OnceValue(func() error {
		return s.Namespaces(r.GetSharedPidNamespace(), r.GetHostname())
	})
	if len(late) == 0 {
		// They take as long as half of the rest, and nobody needs them before the first container:
		// they are made while the engine is still busy with telling that the pod is ready.
		time.AfterFunc(namespaceDelay, func() { s.namespaces() })
		return nil
	}
	if err := s.namespaces(); err != nil {
		return err
	}
	return setPodSysctls(late)
}

// check refuses a request before anything of it is applied.
func check(r *protocol.SetupRequest) error {
	if h := r.GetHostname(); len(h) > 64 {
		return fmt.Errorf("a hostname of %d characters, Linux allows 64", len(h))
	}
	if len(r.GetHosts()) > maxFile || len(r.GetResolvConf()) > maxFile {
		return fmt.Errorf("hosts or resolv.conf is longer than %d bytes", maxFile)
	}
	if r.GetShmSize() < 0 {
		return fmt.Errorf("a shared memory size of %d", r.GetShmSize())
	}
	for name := range r.GetSysctls() {
		if _, err := sysctlPath(name); err != nil {
			return err
		}
	}
	return nil
}

// writeFiles writes the files that containers mount, and shows them to the guest's own programs.
func writeFiles(r *protocol.SetupRequest) error {
	for path, content := range map[string][]byte{
		protocol.HostnamePath:   []byte(r.GetHostname() + "\n"),
		protocol.HostsPath:      r.GetHosts(),
		protocol.ResolvConfPath: r.GetResolvConf(),
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return fmt.Errorf("cannot write %s: %w", path, err)
		}
		if err := os.WriteFile(path, content, 0o644); err != nil {
			return fmt.Errorf("cannot write %s: %w", path, err)
		}
		// The initrd has links to these files in /etc. An image of somebody else may have files.
		etc := "/etc/" + filepath.Base(path)
		if fi, err := os.Lstat(etc); err == nil && fi.Mode().IsRegular() {
			if err := unix.Mount(path, etc, "", unix.MS_BIND, ""); err != nil {
				return fmt.Errorf("cannot mount %s on %s: %w", path, etc, err)
			}
		}
	}
	return nil
}

// mountShm mounts the pod's shared memory; size is in bytes, 0 means 64 MiB.
func mountShm(dir string, size int64) error {
	if size == 0 {
		size = defaultShm
	}
	if err := os.MkdirAll(dir, 0o1777); err != nil {
		return fmt.Errorf("cannot mount %s: %w", dir, err)
	}
	unix.Unmount(dir, unix.MNT_DETACH) // of a call that failed later on
	err := unix.Mount("shm", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, fmt.Sprintf("mode=1777,size=%d", size))
	if err != nil {
		return fmt.Errorf("cannot mount shared memory of %d bytes on %s: %w", size, dir, err)
	}
	return nil
}

// UpdateNetwork replaces what the pod's interfaces have.
func (s *Service) UpdateNetwork(ctx context.Context, r *protocol.UpdateNetworkRequest) (*protocol.UpdateNetworkResponse, error) {
	s.net.Lock()
	defer s.net.Unlock()
	if err := network.Apply(ctx, r.GetNetwork()); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &protocol.UpdateNetworkResponse{}, nil
}

// PrepareContainer announces a container.
func (s *Service) PrepareContainer(ctx context.Context, r *protocol.PrepareContainerRequest) (*protocol.PrepareContainerResponse, error) {
	s.mu.Lock()
	namespaces := s.namespaces
	s.mu.Unlock()
	if namespaces == nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("cannot prepare container %s: the pod is not set up: %w",
			r.GetContainerId(), errdefs.ErrFailedPrecondition))
	}
	if err := namespaces(); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	if err := s.Containers.Prepare(ctx, r); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &protocol.PrepareContainerResponse{}, nil
}

// PurgeContainer forgets a container.
func (s *Service) PurgeContainer(ctx context.Context, r *protocol.PurgeContainerRequest) (*protocol.PurgeContainerResponse, error) {
	if err := s.Containers.Purge(ctx, r.GetContainerId()); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &protocol.PurgeContainerResponse{}, nil
}

// PrepareProcess announces a process of a direct container.
func (s *Service) PrepareProcess(ctx context.Context, r *protocol.PrepareProcessRequest) (*protocol.PrepareProcessResponse, error) {
	if err := s.Containers.PrepareProcess(ctx, r); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &protocol.PrepareProcessResponse{}, nil
}

// PurgeProcess takes its announcement back.
func (s *Service) PurgeProcess(ctx context.Context, r *protocol.PurgeProcessRequest) (*protocol.PurgeProcessResponse, error) {
	if err := s.Containers.PurgeProcess(ctx, r); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &protocol.PurgeProcessResponse{}, nil
}

// SetClock steps the clock.
func (s *Service) SetClock(_ context.Context, r *protocol.SetClockRequest) (*protocol.SetClockResponse, error) {
	behind, err := clock.Set(r.GetUnixNanos())
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &protocol.SetClockResponse{DeltaNanos: int64(behind)}, nil
}

// OOM queues the event that the kernel killed a process of a container. It does not block; the id
// is one that Prepare has accepted.
func (s *Service) OOM(containerID string) {
	s.events.push(&protocol.Event{Event: &protocol.Event_OomContainerId{OomContainerId: containerID}})
}

// Deleted queues the event that a client has deleted a direct container. It does not block; the id is
// one that Prepare has accepted.
func (s *Service) Deleted(d *protocol.Deleted) { s.events.push(deleted(d)) }

func deleted(d *protocol.Deleted) *protocol.Event {
	return &protocol.Event{Event: &protocol.Event_Deleted{Deleted: d}}
}

// Events streams what happened since the last stream ended, and what happens. A second stream
// shares the events with the first: there is one host.
//
// Of deleted containers each stream tells all that are not purged: whoever took an earlier stream may
// have ended before it could do its part.
func (s *Service) Events(ctx context.Context, _ *protocol.EventsRequest, stream protocol.Sandbox_EventsServer) error {
	s.events.drop(func(e *protocol.Event) bool { return e.GetDeleted() != nil })
	for _, d := range s.Containers.Deleted() {
		if err := stream.Send(deleted(d)); err != nil {
			return err
		}
	}
	for {
		e, err := s.events.pop(ctx)
		if err != nil {
			return errgrpc.ToGRPC(err)
		}
		if err := stream.Send(e); err != nil {
			s.events.unpop(e)
			return err
		}
	}
}

// flushTime is how long the answer to PowerOff has to reach the host.
const flushTime = 50 * time.Millisecond

// PowerOff stops everything, answers, and ends the machine.
func (s *Service) PowerOff(_ context.Context, r *protocol.PowerOffRequest) (*protocol.PowerOffResponse, error) {
	// The caller may give up waiting; there is no way back from here.
	s.Quiesce(time.Duration(r.GetGraceMillis()) * time.Millisecond)
	time.AfterFunc(flushTime, func() {
		defer shutdown.Guard()
		s.End("the host asked for it")
	})
	return &protocol.PowerOffResponse{}, nil
}

// queue keeps events for the next stream. Of too many the oldest are dropped.
type queue struct {
	mu     sync.Mutex
	events []*protocol.Event
	filled chan struct{}
}

const maxEvents = 256

func (q *queue) push(e *protocol.Event) { q.add(func() { q.events = append(q.events, e) }) }

// unpop puts an event back that could not be delivered.
func (q *queue) unpop(e *protocol.Event) {
	q.add(func() { q.events = append([]*protocol.Event{e}, q.events...) })
}

// drop removes the events that are told in another way.
func (q *queue) drop(told func(*protocol.Event) bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.events = slices.DeleteFunc(q.events, told)
}

func (q *queue) add(change func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	change()
	if n := len(q.events) - maxEvents; n > 0 {
		q.events = q.events[n:]
	}
	if q.filled != nil {
		close(q.filled)
		q.filled = nil
	}
}

func (q *queue) pop(ctx context.Context) (*protocol.Event, error) {
	for {
		q.mu.Lock()
		if len(q.events) > 0 {
			e := q.events[0]
			q.events = q.events[1:]
			q.mu.Unlock()
			return e, nil
		}
		if q.filled == nil {
			q.filled = make(chan struct{})
		}
		filled := q.filled
		q.mu.Unlock()
		select {
		case <-filled:
		case <-ctx.Done():
			return nil, fmt.Errorf("the stream of events ended: %w", ctx.Err())
		}
	}
}
