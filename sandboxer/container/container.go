// Package container is the host's truth about the containers of one pod and their processes: what
// exists, in which state it is, how it ended, and where its standard streams go.
//
// The guest is asked to do things, but it is never the source of a state. Queries are answered
// from memory, so that a slow or dead guest cannot make a client wait; clean-up never needs the
// guest's cooperation; and everything that the guest says is checked before it is believed. What
// cannot be explained by a slow guest is a violation, reported once by Options.Fail.
//
// A process goes through Created, Running (or Paused) and Stopped. It is Stopped only after all of
// its output was handed to the client and the client's streams have seen their end, so that a
// client that learns of the exit has, or will find, every byte.
//
// Errors wrap the classes of package errdefs.
package container

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"regexp"
	"slices"
	"sync"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/handover"
)

// Guest is what a Set needs of the pod's guest. After a lost connection the methods return what
// belongs to the new one. Errors of Dial that wrap net.ErrClosed say that the guest is gone.
type Guest interface {
	Task() task.TTRPCTaskService
	Sandbox() protocol.SandboxService
	// Dial opens a stream to a port of the guest (protocol.PortStdio). The caller closes it.
	Dial(ctx context.Context, port uint32) (net.Conn, error)
}

// Storage brings files of the host into the pod's share; *storage.Share does.
type Storage interface {
	// Rootfs mounts a container's root file system into the share and returns its guest path.
	Rootfs(ctx context.Context, containerID string, mounts []Mount) (string, error)
	// Volume brings a directory or regular file of the host into the share and returns its guest
	// path.
	Volume(ctx context.Context, containerID, source string, readOnly bool) (string, error)
	// Release undoes all of that for one container. It is idempotent and needs no guest.
	Release(containerID string) error
}

// Options of a Set. Guest and Storage are required.
type Options struct {
	PodID   string
	Guest   Guest
	Storage Storage
	// SharedPID says that the pod's containers share one pid namespace.
	SharedPID bool
	// Announced says that the pod's client announces containers and processes before it makes them,
	// as iSulad does: Create and Exec take spec, root file system and limits from there.
	Announced bool
	// Direct says that it makes them at the guest's own task API, not here. It implies Announced.
	Direct bool
	// Journal, if set, is called with all records after every change worth remembering. Calls
	// do not overlap and are in order.
	Journal func([]Record)
	// Fail, if set, is called at most once, when the guest did what no honest guest does. It must
	// not block: it is meant to stop the pod, which ends in GuestGone.
	Fail func(error)
	// Store keeps what the clients' ends of the standard streams need beyond this daemon's life. Nil
	// keeps nothing.
	Store *handover.Store
	Log   *slog.Logger
}

// Bounds of what the guest is waited for.
const (
	// createTimeout covers creating or starting a process, whose time depends on the machine;
	// clients have shorter deadlines of their own.
	createTimeout = 2 * time.Minute
	controlLimit  = 10 * time.Second
	cleanUpLimit  = 5 * time.Second
	// drainLimit bounds how long output may arrive after the guest reported the exit, which it
	// must not do before everything was acknowledged.
	drainLimit = 5 * time.Second
	// takenLimit is how long the exit is kept from a client that has been told the end of its output
	// and does not close the connection.
	takenLimit = 5 * time.Second
	// killGrace is how long a client that does not read its output delays the exit of a process
	// that was killed with SIGKILL.
	killGrace = 5 * time.Second
	// goneGrace is the same for what had already arrived when the guest died.
	goneGrace = time.Second
)

// firstPID is above every process id that Linux hands out (PID_MAX_LIMIT is 4194304), so that the
// pids that clients see cannot be mistaken for processes of the host.
const firstPID = 4194304 + 1

// maxGuestPID is the largest process id that a Linux guest can report.
const maxGuestPID = 4194304

// ExitLost is the exit status of a process whose guest ended before it: as if killed.
const ExitLost = 137

// exitUnknown is the status of a process that the guest does not know any more.
const exitUnknown = 255

var validID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// CheckID tells whether an id can name a container or process; its error names the field that held it.
func CheckID(field, id string) error {
	if !validID.MatchString(id) {
		if len(id) > 160 {
			id = id[:160] + "..."
		}
		return fmt.Errorf("%s %q is not valid, want 1 to 128 letters, digits, '_', '.' or '-', beginning with a letter or digit: %w",
			field, id, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Status is the state of a process.
type Status uint8

// The states of a process. The zero value is none of them.
const (
	Created Status = iota + 1
	Running
	Paused
	Stopped
)

func (s Status) String() string {
	switch s {
	case Created:
		return "CREATED"
	case Running:
		return "RUNNING"
	case Paused:
		return "PAUSED"
	case Stopped:
		return "STOPPED"
	}
	return fmt.Sprintf("status %d", uint8(s))
}

// Exit says how a process ended.
type Exit struct {
	// Status is the exit code, 128+n for signal n, ExitLost when the guest ended first.
	Status uint32
	At     time.Time
}

// IO names the client's ends of a process's standard streams, as the client gave them: empty for
// none, the path of a FIFO, or <scheme>://<address>?streaming_id=<id>.
type IO struct {
	Stdin, Stdout, Stderr string
	Terminal              bool
}

// State is what a client may know about a process.
type State struct {
	ID, ExecID, Bundle string
	// PID is invented: stable, not zero, and no process id of the host. 0 before an exec started.
	PID    uint32
	Status Status
	IO     IO
	Exit   Exit // valid when Stopped
}

// Set is the containers of one pod. Its methods may be called from several goroutines.
type Set struct {
	opts    Options
	log     *slog.Logger
	life    context.Context // ends with GuestGone or Close
	end     context.CancelCauseFunc
	violate sync.Once
	shelf   *shelf
	streams streamTable
	making  sync.WaitGroup // Create and Exec calls; added to with mu held and before the end of life

	killGrace time.Duration

	journaling sync.Mutex // orders calls of Options.Journal

	mu         sync.Mutex
	containers map[string]*container
	announced  map[string]*announcement
	deletions  []deletion // the oldest first
	lastPID    uint32
	gone       bool
}

// container is one container. Its fields are guarded by Set.mu; stdio and channels have locks of
// their own.
type container struct {
	id, bundle string
	init       *process
	execs      map[string]*process

	creating     chan struct{} // closed when Create has ended, either way
	cancelCreate context.CancelFunc

	stats statistics
}

// process is a container's first process (empty execID) or one that Exec added.
type process struct {
	container *container
	execID    string
	io        *stdio
	pid       uint32
	born      time.Time

	// Guarded by Set.mu.
	status   Status
	ready    bool // the guest has created it
	starting bool
	ending   bool // finish has begun
	// withdrawn says that the client has no use for the process any more, whose end nobody waits for.
	withdrawn bool
	started   bool // the guest said so; its status may not show it yet
	deleting  bool
	exit      Exit
	ended     *Exit // as exit, but before the client's streams have seen their end

	finishing sync.Once
	exited    chan struct{} // closed after status became Stopped
	watching  context.Context
	unwatch   context.CancelFunc
}

func (p *process) String() string {
	if p.execID == "" {
		return "container " + p.container.id
	}
	return fmt.Sprintf("process %s of container %s", p.execID, p.container.id)
}

// NewSet returns a Set without containers.
func NewSet(opts Options) *Set {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	s := &Set{
		opts:       opts,
		log:        opts.Log.With("pod", opts.PodID),
		containers: map[string]*container{},
		announced:  map[string]*announcement{},
		lastPID:    firstPID - 1,
		killGrace:  killGrace,
	}
	s.shelf = newShelf(opts.Store, opts.PodID)
	s.streams.shelf, s.streams.restored = s.shelf, make(chan struct{})
	if !s.shelf.inherited() {
		s.streams.allRestored() // there is nothing that Restore would be called for
	}
	s.life, s.end = context.WithCancelCause(context.Background())
	return s
}

// Finished tells whether a client that announces its containers is through with one, once it says so:
// the container is gone. Of clients that announce nothing it cannot be told.
func (s *Set) Finished(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.opts.Announced && s.containers[id] == nil
}

// Len is the number of containers, including those being created or deleted, and those announced.
func (s *Set) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.containers)
	for id := range s.announced {
		if s.containers[id] == nil {
			n++
		}
	}
	return n
}

// newProcess makes a process that nobody sees yet. s.mu is held.
func (s *Set) newProcess(c *container, execID string) *process {
	s.lastPID++
	p := &process{
		container: c, execID: execID, pid: s.lastPID, born: time.Now(),
		status: Created, exited: make(chan struct{}),
	}
	p.watching, p.unwatch = context.WithCancel(s.life)
	return p
}

func notFound(id, execID string) error {
	if execID == "" {
		return fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
	}
	return fmt.Errorf("process %s of container %s: %w", execID, id, errdefs.ErrNotFound)
}

// find returns a process. One that is still being made does not exist yet. s.mu is held.
func (s *Set) find(id, execID string) (*process, error) {
	c := s.containers[id]
	if c == nil {
		return nil, notFound(id, "")
	}
	p := c.init
	if execID != "" {
		p = c.execs[execID]
	}
	if p == nil {
		return nil, notFound(id, execID)
	}
	if !p.ready {
		return nil, fmt.Errorf("%v is still being created: %w", p, errdefs.ErrUnavailable)
	}
	return p, nil
}

// lookup is find for callers without the lock.
func (s *Set) lookup(id, execID string) (*process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.find(id, execID)
}

// State tells the state of a process, from memory. An empty execID is the container's first one.
func (s *Set) State(id, execID string) (State, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.find(id, execID)
	if err != nil {
		return State{}, err
	}
	st := State{
		ID: id, ExecID: execID, Bundle: p.container.bundle, PID: p.pid,
		Status: p.status, IO: p.io.client, Exit: p.exit,
	}
	if execID != "" && p.status == Created {
		st.PID = 0
	}
	return st, nil
}

// Pids lists the processes of a container that the host knows: the first one, always, so that a
// client that looks for live tasks keeps it until it is deleted, and the running execs.
func (s *Set) Pids(id string) ([]uint32, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.find(id, "")
	if err != nil {
		return nil, err
	}
	pids := []uint32{p.pid}
	for _, e := range p.container.execs {
		if e.ready && e.status == Running {
			pids = append(pids, e.pid)
		}
	}
	return pids, nil
}

// Wait returns when a process has ended and its output has been delivered. It may be called
// before the start and after the exit; the guest dying ends it, too.
func (s *Set) Wait(ctx context.Context, id, execID string) (Exit, error) {
	p, err := s.lookup(id, execID)
	if err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		if d, ok := s.deleted(id, execID); ok && replayed(ctx) {
			return d.exit, nil
		}
		return Exit{}, err
	}
	select {
	case <-p.exited:
		s.mu.Lock()
		defer s.mu.Unlock()
		return p.exit, nil
	case <-ctx.Done():
		return Exit{}, context.Cause(ctx)
	}
}

// ran tells whether a process has been started. Set.mu is held.
func (p *process) ran() bool { return p.started || p.status != Created }

// Start runs a created process.
func (s *Set) Start(ctx context.Context, id, execID string) (pid uint32, err error) {
	s.mu.Lock()
	p, err := s.find(id, execID)
	if err == nil && replayed(ctx) && p.ran() {
		defer s.mu.Unlock()
		return p.pid, nil
	}
	if err == nil {
		switch {
		case p.starting || p.deleting || p.status != Created:
			err = fmt.Errorf("cannot start %v: it is %v already: %w", p, p.status, errdefs.ErrFailedPrecondition)
		default:
			p.starting = true
		}
	}
	s.mu.Unlock()
	if err != nil {
		return 0, err
	}
	ctx, cancel := s.operation(ctx, createTimeout)
	defer cancel()
	answer, err := s.opts.Guest.Task().Start(ctx, &task.StartRequest{ID: id, ExecID: execID})
	switch {
	case err == nil:
		err = s.checkPID(p, answer.GetPid())
	case replayed(ctx) && status.Code(err) == codes.FailedPrecondition:
		// When this daemon looked the guest was still at the earlier one's call.
		err = s.begun(ctx, p, err)
	}
	s.mu.Lock()
	p.starting = false
	if err == nil && p.status == Created {
		p.status = Running
	}
	s.mu.Unlock()
	if err != nil {
		return 0, s.guestError(ctx, fmt.Sprintf("start %v", p), err)
	}
	s.journal()
	return p.pid, nil
}

// startPoll is how often the guest is asked whether a process has begun that it is starting.
const startPoll = 20 * time.Millisecond

// begun waits until the guest has done what an earlier daemon asked of it: to start a process. It
// returns refused if the guest is not at it.
func (s *Set) begun(ctx context.Context, p *process, refused error) error {
	for {
		state, err := s.guestState(ctx, p.container.id, p.execID)
		switch {
		case err != nil:
			return err
		case state == tasktypes.Status_UNKNOWN:
			return refused
		case state != tasktypes.Status_CREATED:
			return nil
		}
		select {
		case <-time.After(startPoll):
		case <-ctx.Done():
			return refused
		}
	}
}

// Kill sends a signal to a process; all is for every process of the container. A process that has
// ended is NotFound. Signal 0 only asks whether the process lives.
func (s *Set) Kill(ctx context.Context, id, execID string, signal uint32, all bool) error {
	const maxSignal = 64
	if signal > maxSignal {
		return fmt.Errorf("signal %d is not valid, the largest is %d: %w", signal, maxSignal, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	p, err := s.find(id, execID)
	if err == nil && p.status == Stopped {
		err = fmt.Errorf("%v has already finished: %w", p, errdefs.ErrNotFound)
	}
	s.mu.Unlock()
	if err != nil {
		return gone(ctx, err)
	}
	if signal == 9 {
		// Whatever the guest answers: nothing may hold up the end of a process that was told to
		// die, least of all a client that has stopped reading.
		p.io.abandonAfter(s.killGrace)
	}
	ctx, cancel := s.operation(ctx, controlLimit)
	defer cancel()
	_, err = s.opts.Guest.Task().Kill(ctx, &task.KillRequest{ID: id, ExecID: execID, Signal: signal, All: all})
	if err != nil {
		return gone(ctx, s.guestError(ctx, fmt.Sprintf("send signal %d to %v", signal, p), err))
	}
	return nil
}

// gone takes NotFound for an answer to a call that was done before: what it was about has ended
// since. Replay says what else is no error.
func gone(ctx context.Context, err error) error {
	if replayed(ctx) && errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// Pause freezes a running container.
func (s *Set) Pause(ctx context.Context, id string) error {
	return s.freeze(ctx, id, "pause", Running, Paused, func(ctx context.Context) error {
		_, err := s.opts.Guest.Task().Pause(ctx, &task.PauseRequest{ID: id})
		return err
	})
}

// Resume lets a paused container run on.
func (s *Set) Resume(ctx context.Context, id string) error {
	return s.freeze(ctx, id, "resume", Paused, Running, func(ctx context.Context) error {
		_, err := s.opts.Guest.Task().Resume(ctx, &task.ResumeRequest{ID: id})
		return err
	})
}

func (s *Set) freeze(ctx context.Context, id, verb string, from, to Status, call func(context.Context) error) error {
	s.mu.Lock()
	p, err := s.find(id, "")
	if err == nil && replayed(ctx) && (p.status == to || p.status == Stopped) {
		s.mu.Unlock()
		return nil
	}
	if err == nil && p.status != from {
		err = fmt.Errorf("cannot %s %v: it is %v: %w", verb, p, p.status, errdefs.ErrFailedPrecondition)
	}
	s.mu.Unlock()
	if err != nil {
		return gone(ctx, err)
	}
	ctx, cancel := s.operation(ctx, controlLimit)
	defer cancel()
	if err := call(ctx); err != nil {
		return gone(ctx, s.guestError(ctx, fmt.Sprintf("%s %v", verb, p), err))
	}
	s.mu.Lock()
	if p.status == from {
		p.status = to
	}
	s.mu.Unlock()
	s.journal()
	return nil
}

// ResizePty sets the size of a process's terminal, in characters.
func (s *Set) ResizePty(ctx context.Context, id, execID string, width, height uint32) error {
	const max = 1<<16 - 1
	if width > max || height > max {
		return fmt.Errorf("terminal size %dx%d is not valid, the largest is %dx%d: %w", width, height, max, max, errdefs.ErrInvalidArgument)
	}
	p, err := s.lookup(id, execID)
	if err != nil {
		return gone(ctx, err)
	}
	if !p.io.client.Terminal {
		return fmt.Errorf("cannot resize %v: it has no terminal: %w", p, errdefs.ErrFailedPrecondition)
	}
	ctx, cancel := s.operation(ctx, controlLimit)
	defer cancel()
	_, err = s.opts.Guest.Task().ResizePty(ctx, &task.ResizePtyRequest{ID: id, ExecID: execID, Width: width, Height: height})
	if err != nil {
		return gone(ctx, s.guestError(ctx, fmt.Sprintf("resize the terminal of %v", p), err))
	}
	return nil
}

// CloseIO ends the standard input of a process after what the client has written.
func (s *Set) CloseIO(ctx context.Context, id, execID string, stdin bool) error {
	p, err := s.lookup(id, execID)
	if err != nil {
		return gone(ctx, err)
	}
	if stdin && p.io.closeStdin() {
		s.journal()
	}
	return nil
}

// Delete forgets a process that is not running and says how it ended. For a container that
// releases its storage; what the guest does about it is bounded and only logged.
func (s *Set) Delete(ctx context.Context, id, execID string) (State, error) {
	if err := s.endCreate(ctx, id, execID); err != nil {
		return State{}, err
	}
	s.mu.Lock()
	p, err := s.find(id, execID)
	if d, ok := s.deleted(id, execID); err != nil && ok && replayed(ctx) {
		s.mu.Unlock()
		return State{ID: id, ExecID: execID, Bundle: d.bundle, PID: d.pid, Status: Stopped, Exit: d.exit}, nil
	}
	if err == nil {
		switch {
		case p.deleting:
			err = fmt.Errorf("%v is being deleted: %w", p, errdefs.ErrFailedPrecondition)
		case p.starting || p.status == Running || p.status == Paused:
			err = fmt.Errorf("cannot delete %v: it is %v: %w", p, p.status, errdefs.ErrFailedPrecondition)
		default:
			p.deleting = true
		}
	}
	s.mu.Unlock()
	if err != nil {
		return State{}, err
	}
	if execID == "" {
		err = s.deleteContainer(p.container)
	} else {
		s.deleteExec(p)
	}
	s.mu.Lock()
	if err != nil {
		p.deleting = false
	}
	st := State{ID: id, ExecID: execID, Bundle: p.container.bundle, PID: p.pid, Status: p.status, IO: p.io.client, Exit: p.exit}
	if a := s.announced[id]; err == nil && execID == "" && a != nil {
		// iSulad takes no announcement back of a container that ended by itself: one that is restarted
		// for ever, each time by a new name, would fill the journal with specs.
		a.request.Spec, a.request.Rootfs = nil, nil
	}
	s.mu.Unlock()
	if err != nil {
		return State{}, err
	}
	s.journal()
	return st, nil
}

// endCreate makes a Create that is still under way give up, and waits for it: a client deletes
// what it could not create without knowing whether the attempt has ended.
func (s *Set) endCreate(ctx context.Context, id, execID string) error {
	s.mu.Lock()
	c := s.containers[id]
	if c == nil || execID != "" || c.init.ready {
		s.mu.Unlock()
		return nil
	}
	s.mu.Unlock()
	c.cancelCreate()
	select {
	case <-c.creating:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *Set) deleteExec(p *process) {
	s.askGuest(fmt.Sprintf("delete %v", p), func(ctx context.Context) error {
		_, err := s.opts.Guest.Task().Delete(ctx, &task.DeleteRequest{ID: p.container.id, ExecID: p.execID})
		return err
	})
	s.finish(p, Exit{Status: ExitLost, At: time.Now()}, true)
	p.io.close()
	s.mu.Lock()
	delete(p.container.execs, p.execID)
	s.remember(p)
	s.mu.Unlock()
}

func (s *Set) deleteContainer(c *container) error {
	if c.init.statusOf(s) == Stopped {
		s.askGuest("delete container "+c.id, func(ctx context.Context) error {
			_, err := s.opts.Guest.Task().Delete(ctx, &task.DeleteRequest{ID: c.id})
			return err
		})
	}
	s.purge(c.id)
	for _, p := range s.processes(c) {
		s.finish(p, Exit{Status: ExitLost, At: time.Now()}, true)
		p.io.close()
	}
	if err := s.opts.Storage.Release(c.id); err != nil {
		return fmt.Errorf("cannot release the storage of container %s: %w", c.id, err)
	}
	s.mu.Lock()
	delete(s.containers, c.id)
	s.remember(c.init)
	s.mu.Unlock()
	return nil
}

func (p *process) statusOf(s *Set) Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return p.status
}

// processes lists a container's processes, the first one first. One that is still being made is
// left to its Exec, which finds the container gone.
func (s *Set) processes(c *container) []*process {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := []*process{c.init}
	for _, e := range c.execs {
		if e.ready {
			all = append(all, e)
		}
	}
	return all
}

// purge makes the guest forget a container.
func (s *Set) purge(id string) {
	s.askGuest("purge container "+id, func(ctx context.Context) error {
		_, err := s.opts.Guest.Sandbox().PurgeContainer(ctx, &protocol.PurgeContainerRequest{ContainerId: id})
		return err
	})
}

// askGuest makes a call of a clean-up: bounded, and its failure is no failure of the clean-up.
func (s *Set) askGuest(what string, call func(context.Context) error) {
	ctx, cancel := s.operation(context.Background(), cleanUpLimit)
	defer cancel()
	if ctx.Err() != nil {
		return
	}
	if err := call(ctx); err != nil {
		err = s.guestError(ctx, what, err)
		if !errdefs.IsNotFound(err) && s.life.Err() == nil {
			s.log.Warn("the guest did not clean up", "error", err)
		}
	}
}

// watch waits for the exit of a process in the guest. It is the only Wait that the guest sees for
// it.
func (s *Set) watch(p *process) {
	const minPause, maxPause = 50 * time.Millisecond, 5 * time.Second
	pause := minPause
	for {
		answer, err := s.opts.Guest.Task().Wait(p.watching, &task.WaitRequest{ID: p.container.id, ExecID: p.execID})
		switch {
		case p.watching.Err() != nil:
			return
		case err == nil:
			if answer.GetExitStatus() > 255 {
				s.misbehaved(fmt.Errorf("it reported exit status %d of %v", answer.GetExitStatus(), p))
				return // GuestGone ends the process
			}
			at := p.born
			if t := answer.GetExitedAt(); t != nil && t.IsValid() {
				at = t.AsTime()
			}
			s.finish(p, Exit{Status: answer.GetExitStatus(), At: s.clamp(at, p.born)}, false)
			return
		}
		err = s.guestError(p.watching, fmt.Sprintf("wait for %v", p), err)
		if errdefs.IsNotFound(err) {
			s.log.Error("the guest has lost a process", "error", err)
			s.finish(p, Exit{Status: exitUnknown, At: time.Now()}, false)
			return
		}
		s.log.Warn("waiting again", "error", err, "pause", pause)
		select {
		case <-time.After(pause):
			pause = min(2*pause, maxPause)
		case <-p.watching.Done():
			return
		}
	}
}

// clamp moves a time of the guest, whose clock is its own, between the process's creation and now.
func (s *Set) clamp(t, born time.Time) time.Time {
	now := time.Now()
	if t.Before(born) || t.After(now) {
		return now
	}
	return t
}

// finish ends a process: its streams first, so that whoever learns of the exit finds their end.
// The first call decides how it ended; abrupt calls do not wait for output of the guest, nor long for
// the client. Between HandOver and the end of the daemon a process does not end.
func (s *Set) finish(p *process, exit Exit, abrupt bool) {
	if abrupt {
		p.io.abandonAfter(goneGrace) // also for a call that waits for the client
	}
	p.finishing.Do(func() {
		p.unwatch()
		s.mu.Lock()
		p.ending = true
		withdrawn := p.withdrawn
		s.mu.Unlock()
		if withdrawn {
			p.io.abandonAfter(s.killGrace)
		}
		if p.execID == "" && exit.Status == ExitLost && !abrupt {
			s.lastStats(p.container)
		}
		if abrupt {
			p.io.cut(goneGrace)
		} else if !p.io.drain(drainLimit) {
			return
		}
		// Recorded before the client's streams end: another daemon must not look for their rest.
		s.mu.Lock()
		p.ended = &exit
		s.mu.Unlock()
		s.journal()
		p.io.cut(0)
		if !abrupt && !withdrawn {
			// containerd cancels its reading of a stream when it learns of the exit. Of a FIFO it reads on.
			ctx, cancel := context.WithTimeout(s.life, takenLimit)
			p.io.awaitTaken(ctx)
			cancel()
		}
		s.mu.Lock()
		p.status = Stopped
		p.exit = exit
		withdrawn = p.withdrawn && !p.deleting
		s.mu.Unlock()
		close(p.exited)
		if withdrawn && !abrupt {
			go s.dropExec(p)
		}
	})
}

// OOM records that the kernel of the guest killed a process of the container for want of memory.
// Unknown containers are ignored.
func (s *Set) OOM(containerID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.containers[containerID]; c != nil {
		c.stats.oomKills++
	}
}

// GuestGone says that the virtual machine has ended: every process that has not is lost then, with
// ExitLost, its streams closed, and all storage is released. Containers stay until they are deleted. It
// returns when that is done; the guest is not used any more.
func (s *Set) GuestGone(exit time.Time) {
	s.mu.Lock()
	s.gone = true
	s.mu.Unlock()
	s.end(fmt.Errorf("the pod's virtual machine has ended: %w", errdefs.ErrUnavailable))

	var all []*process
	var creating []chan struct{}
	var ids []string
	s.mu.Lock()
	for id, c := range s.containers {
		ids = append(ids, id)
		if !c.init.ready {
			creating = append(creating, c.creating)
			continue
		}
		all = append(all, c.init)
		for _, e := range c.execs {
			if e.ready {
				all = append(all, e)
			}
		}
	}
	s.mu.Unlock()
	announced := s.announcements()
	var wg sync.WaitGroup
	for _, p := range all {
		wg.Go(func() { s.finish(p, Exit{Status: ExitLost, At: exit}, true) })
	}
	for _, a := range announced {
		wg.Go(func() { s.cutAnnounced(a) })
	}
	wg.Wait()
	for _, done := range creating {
		<-done
	}
	for _, a := range announced {
		if !slices.Contains(ids, a.id) {
			ids = append(ids, a.id)
		}
	}
	for _, id := range ids {
		if err := s.opts.Storage.Release(id); err != nil {
			s.log.Error("cannot release the storage of a container", "container", id, "error", err)
		}
	}
}

// Close forgets the containers with their pod: all streams end, and what Options.Store keeps of them
// goes. Nothing is asked of the guest, nothing is journalled.
func (s *Set) Close() {
	for _, t := range s.quit() {
		t.close()
	}
	s.shelf.clear()
}

// HandOver lets go of the guest and of all clients' streams without ending any process, as another
// daemon is to go on. The records of a last call of Journal, and Options.Store, say where the streams
// are.
func (s *Set) HandOver() {
	s.shelf.left.Store(true)
	var wg sync.WaitGroup
	for _, t := range s.quit() {
		wg.Go(t.detach)
	}
	wg.Wait()
	s.journal()
}

// quit ends all work and returns the streams.
func (s *Set) quit() []*stdio {
	s.end(fmt.Errorf("the daemon is stopping: %w", errdefs.ErrUnavailable))
	s.mu.Lock()
	//lint:ignore SA2001 what is under way with the lock held comes first; from here on no process is added
	s.mu.Unlock()
	made := make(chan struct{})
	go func() {
		s.making.Wait()
		close(made)
	}()
	select {
	case <-made:
	case <-time.After(cleanUpLimit):
		s.log.Warn("a process that is being created is left behind")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*stdio
	for _, c := range s.containers {
		if c.init.ready {
			all = append(all, c.init.io)
		}
		for _, e := range c.execs {
			if e.ready {
				all = append(all, e.io)
			}
		}
	}
	for _, a := range s.announced {
		all = append(all, a.streams()...)
	}
	return all
}

// operation bounds a call to the guest by the caller, by time, and by the guest's life.
func (s *Set) operation(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancelTimeout := context.WithTimeout(ctx, limit)
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.life, func() { cancel(context.Cause(s.life)) })
	if s.life.Err() != nil {
		cancel(context.Cause(s.life))
	}
	return ctx, func() {
		stop()
		cancel(nil)
		cancelTimeout()
	}
}

// misbehaved reports a violation of the guest and returns it as an error.
func (s *Set) misbehaved(err error) error {
	err = fmt.Errorf("the guest misbehaves: %w", err)
	s.violate.Do(func() {
		s.log.Error("the pod is stopped", "error", err)
		if s.opts.Fail != nil {
			s.opts.Fail(err)
		}
	})
	return errors.Join(err, errdefs.ErrInternal)
}
