// Package containers runs the containers of the pod inside the guest: it is the Task API of
// containerd on top of libcontainer, which runs in this process instead of a runtime binary.
//
// A static runc beside the agent would be the plainer choice. Two measurements decided against it:
// the binary is 9.3 MB of memory in every guest, and a Go program of that size, with which each
// create, start and exec would begin, takes about 30 ms to start on QEMU's emulation. Whole
// containers by the one and the other were about equally fast.
//
// A container goes through Prepare (its spec and what must be mounted for it are announced),
// Create, Start, Delete and Purge. Prepare comes from the daemon of the host; the rest does, too, or
// from a client of the host that makes its containers here by itself: those are the direct ones, see
// direct.go. Everything that the Task API reports of a process - its state,
// its exit - is kept in memory, so that State and Wait never touch a cgroup or a file system: a
// share that hangs stops only the call that uses it.
//
// Locks: Service.mu guards the maps, container.mu and process.mu the fields of theirs; none is
// held over a system call that can block. What must not run twice at once on one container
// (Create, Start, Delete, ...) is serialised by container.busy, a semaphore that honours the
// caller's context.
package containers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/guest/protocol/stdio"
)

// Defaults of Options.
const (
	// DefaultStateDir is where libcontainer keeps its state. It must be on a file system that
	// ends with the guest, such as tmpfs.
	DefaultStateDir = "/run/kuasar/containers"
	// DefaultCgroup is the parent of the containers' cgroups, in every hierarchy.
	DefaultCgroup = "/kuasar"
)

// purgeTimeout bounds how long Purge waits for a killed container to be gone. A process in an
// uninterruptible sleep can outlive it; then Purge fails and can be repeated.
const purgeTimeout = 10 * time.Second

// Options of a Service.
type Options struct {
	// Hub carries the standard streams of processes whose stdio strings are stdio:// tokens.
	Hub *stdio.Hub
	Log *slog.Logger
	// OnOOM is told of each container in which the kernel killed a process for want of memory,
	// before the exit of that process is reported. It must not block.
	OnOOM func(containerID string)

	// OnDelete is told of each direct container that its client has deleted, once nothing uses its
	// files any more. It must not block.
	OnDelete func(*protocol.Deleted)
	// Listen listens for connections of the host, and of nobody else, on a vsock port of this guest,
	// whose context id ContextID returns. Without them processes cannot have streams for which the
	// guest listens.
	Listen    func(port uint32) (net.Listener, error)
	ContextID func() (uint32, error)

	// StateDir, Cgroup and StorageDir are for tests; empty means DefaultStateDir, DefaultCgroup
	// and protocol.StorageDir.
	StateDir   string
	Cgroup     string
	StorageDir string
}

// Service implements the Task API, both versions of it: see Register. Its errors are gRPC status
// errors. Prepare, Purge and StopAll are for the agent and return plain errors of the classes of
// errdefs.
type Service struct {
	log        *slog.Logger
	onOOM      func(string)
	onDelete   func(*protocol.Deleted)
	listen     func(port uint32) (net.Listener, error)
	contextID  func() (uint32, error)
	limits     limits
	streams    streams
	stateDir   string
	cgroup     string
	storageDir string

	// announcing is held while processes are announced. It comes before mu.
	announcing sync.Mutex

	mu         sync.Mutex
	listening  map[uint32]*peer
	prepared   map[string]*preparation
	containers map[string]*container
	stopping   bool
}

var _ taskapi.TTRPCTaskService = (*Service)(nil)

// preparation is what Prepare announced for a container and Purge undoes.
type preparation struct {
	spec   *specs.Spec
	mounts *storageMounts

	// The rest is of direct containers.

	// main is the announcement of the init process; nil says that the container is not direct.
	main *announcement
	// made says that the container was created, or its creation failed. It is not created again.
	made bool
	// deleted is the container once its client has deleted it. Its output may still be on its way.
	deleted *container
	// freed says that it is deleted and that its storages are unmounted.
	freed bool
	// execs are the announced ones that are not made, by their ids.
	execs map[string]*announcement
}

// New returns a Service without containers.
func New(opts Options) *Service {
	s := &Service{
		log:        opts.Log,
		onOOM:      opts.OnOOM,
		stateDir:   opts.StateDir,
		cgroup:     opts.Cgroup,
		storageDir: opts.StorageDir,
		prepared:   map[string]*preparation{},
		containers: map[string]*container{},
		onDelete:   opts.OnDelete,
		listen:     opts.Listen,
		contextID:  opts.ContextID,
		limits:     defaultLimits,
		listening:  map[uint32]*peer{},
		streams:    hubStreams{opts.Hub},
	}
	if s.onDelete == nil {
		s.onDelete = func(*protocol.Deleted) {}
	}
	if s.log == nil {
		s.log = slog.Default()
	}
	if s.onOOM == nil {
		s.onOOM = func(string) {}
	}
	if s.stateDir == "" {
		s.stateDir = DefaultStateDir
	}
	if s.cgroup == "" {
		s.cgroup = DefaultCgroup
	}
	if s.storageDir == "" {
		s.storageDir = protocol.StorageDir
	}
	forwardLibraryLog(s.log)
	return s
}

// isName tells whether s has 1 to max of A-Z a-z 0-9 _ . - and begins with one of first. No regular
// expression does it, because compiling one is a noticeable part of the start of libcontainer's
// init, which runs this package's initialisation for every process of a container.
func isName(s string, max int, first func(byte) bool) bool {
	if s == "" || len(s) > max || !first(s[0]) {
		return false
	}
	for i := range len(s) {
		if c := s[i]; !alphanumeric(c) && c != '_' && c != '.' && c != '-' {
			return false
		}
	}
	return true
}

func alphanumeric(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

// checkID refuses what could not be a name of a file or a cgroup.
func checkID(kind, id string) error {
	if !isName(id, 128, alphanumeric) {
		if len(id) > 160 {
			id = id[:160] + "..."
		}
		return fmt.Errorf("%s id %q: must be 1 to 128 of A-Z a-z 0-9 _ . - and begin with a letter or digit: %w",
			kind, id, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Prepare announces a container: its spec, rewritten for the guest, and what the guest has to
// mount for it, which is mounted when Prepare returns. Before the container is created a second
// call replaces the first; afterwards it fails with ErrAlreadyExists.
func (s *Service) Prepare(_ context.Context, r *protocol.PrepareContainerRequest) error {
	id := r.GetContainerId()
	if err := checkID("container", id); err != nil {
		return fmt.Errorf("cannot prepare container: %w", err)
	}
	spec := new(specs.Spec)
	if err := json.Unmarshal(r.GetSpec(), spec); err != nil {
		return fmt.Errorf("cannot prepare container %s: its spec is not an OCI runtime spec: %w: %w", id, err, errdefs.ErrInvalidArgument)
	}
	if err := checkSpec(spec); err != nil {
		return fmt.Errorf("cannot prepare container %s: %w", id, err)
	}

	s.mu.Lock()
	if s.stopping {
		s.mu.Unlock()
		return fmt.Errorf("cannot prepare container %s: the guest is shutting down: %w", id, errdefs.ErrUnavailable)
	}
	if s.containers[id] != nil {
		s.mu.Unlock()
		return fmt.Errorf("cannot prepare container %s: it exists: %w", id, errdefs.ErrAlreadyExists)
	}
	old := s.prepared[id]
	delete(s.prepared, id)
	var unmade []*announcement
	if old != nil {
		unmade = old.unmade()
	}
	s.mu.Unlock()
	if old != nil {
		for _, a := range unmade {
			a.replaced()
		}
		if err := old.mounts.unmount(); err != nil {
			return fmt.Errorf("cannot prepare container %s again: %w", id, err)
		}
	}

	mounts, err := mountStorages(s.storageDir, r.GetStorages())
	if err != nil {
		return fmt.Errorf("cannot prepare container %s: %w", id, err)
	}
	p := &preparation{spec: spec, mounts: mounts}
	if r.GetDirect() != nil {
		if p.main, err = s.announce(r.GetDirect()); err != nil {
			mounts.unmount()
			return fmt.Errorf("cannot prepare container %s: %w", id, err)
		}
	}
	s.mu.Lock()
	raced := s.prepared[id] != nil || s.containers[id] != nil
	if !raced {
		s.prepared[id] = p
	}
	s.mu.Unlock()
	if raced {
		for _, a := range p.unmade() {
			a.replaced()
		}
		mounts.unmount()
		return fmt.Errorf("cannot prepare container %s: it is being prepared by another call: %w", id, errdefs.ErrAlreadyExists)
	}
	return nil
}

// Purge forgets a container: it kills what runs of it, gives up output that the host has not
// taken, and unmounts what Prepare mounted. Purging an unknown id succeeds.
func (s *Service) Purge(ctx context.Context, id string) error {
	if err := checkID("container", id); err != nil {
		return fmt.Errorf("cannot purge container: %w", err)
	}
	s.mu.Lock()
	c := s.containers[id]
	s.mu.Unlock()
	if c != nil {
		ctx, cancel := context.WithTimeout(ctx, purgeTimeout)
		defer cancel()
		if err := c.purge(ctx); err != nil {
			return fmt.Errorf("cannot purge container %s: %w", id, err)
		}
		s.forget(c)
	}
	s.mu.Lock()
	p := s.prepared[id]
	delete(s.prepared, id)
	var unmade []*announcement
	if p != nil {
		unmade = p.unmade()
		p.main, p.execs = nil, nil
		if p.deleted != nil {
			p.deleted.cancel()
			p.deleted, p.freed = nil, false
		}
	}
	s.mu.Unlock()
	if p == nil {
		return nil
	}
	for _, a := range unmade {
		a.end()
	}
	if err := p.mounts.unmount(); err != nil {
		s.mu.Lock()
		if s.prepared[id] == nil {
			s.prepared[id] = p
		}
		s.mu.Unlock()
		return fmt.Errorf("cannot purge container %s: %w", id, err)
	}
	return nil
}

// StopAll ends all containers before the machine goes off: it sends SIGTERM, after grace SIGKILL,
// and returns when all are gone or ctx ends. No container can be prepared or created afterwards.
func (s *Service) StopAll(ctx context.Context, grace time.Duration) {
	s.mu.Lock()
	s.stopping = true
	all := make([]*container, 0, len(s.containers))
	for _, c := range s.containers {
		all = append(all, c)
	}
	s.mu.Unlock()

	var group sync.WaitGroup
	for _, c := range all {
		group.Go(func() { c.stop(ctx, grace) })
	}
	group.Wait()
}

// forget removes c from the containers, unless its id has been taken again.
func (s *Service) forget(c *container) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.containers[c.id] == c {
		delete(s.containers, c.id)
	}
}

func (s *Service) container(id string) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.containers[id]; c != nil {
		return c, nil
	}
	if len(id) > 160 {
		id = id[:160] + "..."
	}
	return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
}

func (s *Service) process(id, execID string) (*container, *process, error) {
	c, err := s.container(id)
	if err != nil {
		return nil, nil, err
	}
	p, err := c.process(execID)
	return c, p, err
}

// Create makes the container that Prepare announced, with its init process waiting for Start.
// Bundle, rootfs and options of the request are the host's business and are ignored, and so are the
// streams if the container is a direct one: then those of the announcement count.
func (s *Service) Create(ctx context.Context, r *taskapi.CreateTaskRequest) (*taskapi.CreateTaskResponse, error) {
	c, err := s.create(ctx, r)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &taskapi.CreateTaskResponse{Pid: c.init.pidNow()}, nil
}

func (s *Service) create(ctx context.Context, r *taskapi.CreateTaskRequest) (*container, error) {
	if err := checkID("container", r.ID); err != nil {
		return nil, fmt.Errorf("cannot create container: %w", err)
	}
	if r.Checkpoint != "" || r.ParentCheckpoint != "" {
		return nil, fmt.Errorf("cannot create container %s from a checkpoint: %w", r.ID, errdefs.ErrNotImplemented)
	}
	c := newContainer(s, r)
	s.mu.Lock()
	prepared := s.prepared[r.ID]
	var err error
	switch {
	case s.stopping:
		err = fmt.Errorf("cannot create container %s: the guest is shutting down: %w", r.ID, errdefs.ErrUnavailable)
	case s.containers[r.ID] != nil:
		err = fmt.Errorf("cannot create container %s: it exists: %w", r.ID, errdefs.ErrAlreadyExists)
	case prepared == nil:
		err = fmt.Errorf("cannot create container %s: it was not announced with PrepareContainer: %w", r.ID, errdefs.ErrFailedPrecondition)
	case prepared.made:
		err = fmt.Errorf("cannot create container %s: it was created before as announced, and its streams have ended: announce it again: %w",
			r.ID, errdefs.ErrFailedPrecondition)
	default:
		s.containers[r.ID] = c
		if prepared.main != nil {
			prepared.made = true
			c.serveDirectly(prepared.main)
		}
	}
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if err := c.create(ctx, prepared.spec); err != nil {
		s.deleted(c) // there is nothing for the client to delete, and it may never purge
		return nil, err
	}
	return c, nil
}

// Start lets the init process or an exec process run.
func (s *Service) Start(ctx context.Context, r *taskapi.StartRequest) (*taskapi.StartResponse, error) {
	c, p, err := s.process(r.ID, r.ExecID)
	if err == nil {
		err = c.start(ctx, p)
	}
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &taskapi.StartResponse{Pid: p.pidNow()}, nil
}

// State reports what is known of a process; it never blocks.
func (s *Service) State(_ context.Context, r *taskapi.StateRequest) (*taskapi.StateResponse, error) {
	c, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	response := &taskapi.StateResponse{
		ID:         c.id,
		Bundle:     c.bundle,
		Pid:        p.pid,
		Status:     p.status,
		Stdin:      p.stdio.stdin,
		Stdout:     p.stdio.stdout,
		Stderr:     p.stdio.stderr,
		Terminal:   p.stdio.terminal,
		ExitStatus: p.exitStatus,
		ExecID:     p.execID,
	}
	if !p.exitedAt.IsZero() {
		response.ExitedAt = timestamppb.New(p.exitedAt)
	}
	if response.Status == task.Status_RUNNING && c.paused.Load() {
		response.Status = task.Status_PAUSED
	}
	return response, nil
}

// Wait returns when the process has exited and the host has taken all of its output. Of a direct
// container it does not wait long for the latter: see process.reportAfter.
func (s *Service) Wait(ctx context.Context, r *taskapi.WaitRequest) (*taskapi.WaitResponse, error) {
	_, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return nil, errgrpc.ToGRPC(ctx.Err())
	}
	status, at := p.exit()
	return &taskapi.WaitResponse{ExitStatus: status, ExitedAt: timestamppb.New(at)}, nil
}

// Kill sends a signal to a process, or with all to every process of the container. Signal 0 only
// asks whether the process is alive. A process that has exited is NotFound.
func (s *Service) Kill(_ context.Context, r *taskapi.KillRequest) (*emptypb.Empty, error) {
	c, p, err := s.process(r.ID, r.ExecID)
	if err == nil {
		err = c.kill(p, unix.Signal(r.Signal), r.All)
	}
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &emptypb.Empty{}, nil
}

// Delete removes a process that has ended or was never started, and with the init process the
// container. A running one is FailedPrecondition.
func (s *Service) Delete(ctx context.Context, r *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	c, p, err := s.process(r.ID, r.ExecID)
	if err == nil {
		if p == c.init {
			if err = c.remove(ctx); err == nil {
				s.deleted(c)
			}
		} else {
			err = c.removeExec(ctx, p)
		}
	}
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	status, at := p.exit()
	response := &taskapi.DeleteResponse{Pid: p.pidNow(), ExitStatus: status}
	if !at.IsZero() {
		response.ExitedAt = timestamppb.New(at)
	}
	return response, nil
}

// Exec announces a further process of a running container; Start runs it.
func (s *Service) Exec(_ context.Context, r *taskapi.ExecProcessRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.ID)
	if err == nil {
		err = c.addExec(r)
	}
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &emptypb.Empty{}, nil
}

// ResizePty sets the size of a process's terminal. Before Start it is remembered.
func (s *Service) ResizePty(_ context.Context, r *taskapi.ResizePtyRequest) (*emptypb.Empty, error) {
	_, p, err := s.process(r.ID, r.ExecID)
	if err == nil {
		err = p.resize(r.Width, r.Height)
	}
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &emptypb.Empty{}, nil
}

// CloseIO ends the process's standard input once what the host sent before has been delivered.
func (s *Service) CloseIO(_ context.Context, r *taskapi.CloseIORequest) (*emptypb.Empty, error) {
	_, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	if r.Stdin {
		p.closeStdin()
	}
	return &emptypb.Empty{}, nil
}

// Pids lists the processes of a container by their numbers in the guest.
func (s *Service) Pids(_ context.Context, r *taskapi.PidsRequest) (*taskapi.PidsResponse, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	pids, err := c.pids()
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	response := &taskapi.PidsResponse{}
	for _, pid := range pids {
		response.Processes = append(response.Processes, &task.ProcessInfo{Pid: uint32(pid)})
	}
	return response, nil
}

// Pause freezes all processes of a container.
func (s *Service) Pause(ctx context.Context, r *taskapi.PauseRequest) (*emptypb.Empty, error) {
	return s.freeze(ctx, r.ID, true)
}

// Resume undoes Pause.
func (s *Service) Resume(ctx context.Context, r *taskapi.ResumeRequest) (*emptypb.Empty, error) {
	return s.freeze(ctx, r.ID, false)
}

func (s *Service) freeze(ctx context.Context, id string, frozen bool) (*emptypb.Empty, error) {
	c, err := s.container(id)
	if err == nil {
		err = c.freeze(ctx, frozen)
	}
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &emptypb.Empty{}, nil
}

// Update changes the limits of a container to those that the request names; others stay.
func (s *Service) Update(ctx context.Context, r *taskapi.UpdateTaskRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.ID)
	if err == nil {
		err = c.update(ctx, r.Resources)
	}
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &emptypb.Empty{}, nil
}

// Stats measures a container by its cgroup. It works until the container is deleted.
func (s *Service) Stats(_ context.Context, r *taskapi.StatsRequest) (*taskapi.StatsResponse, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	stats, err := c.stats()
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &taskapi.StatsResponse{Stats: stats}, nil
}

// Connect tells the process ids of the agent and of the container's init process.
func (s *Service) Connect(_ context.Context, r *taskapi.ConnectRequest) (*taskapi.ConnectResponse, error) {
	response := &taskapi.ConnectResponse{ShimPid: uint32(os.Getpid()), Version: "v3"}
	c, err := s.container(r.ID)
	switch {
	case err == nil:
		response.TaskPid = c.init.pidNow()
	case !errors.Is(err, errdefs.ErrNotFound):
		return nil, errgrpc.ToGRPC(err)
	}
	return response, nil
}

// Shutdown does nothing: callers send it per container, and the agent lives as long as the guest.
func (s *Service) Shutdown(context.Context, *taskapi.ShutdownRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// Checkpoint is not implemented: CRIU is not in the guest.
func (s *Service) Checkpoint(context.Context, *taskapi.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, errgrpc.ToGRPC(fmt.Errorf("cannot checkpoint a container in a guest: %w", errdefs.ErrNotImplemented))
}

// IDs lists the containers that exist, sorted.
func (s *Service) IDs() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	ids := make([]string, 0, len(s.containers))
	for id := range s.containers {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}
