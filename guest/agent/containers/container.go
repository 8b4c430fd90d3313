package containers

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"
)

// maxExited is how many ended execs a container remembers. Some callers never delete theirs; the
// oldest are then forgotten, long after anyone waits for them.
const maxExited = 256

// container is one container from Create to Delete or Purge.
type container struct {
	service *Service
	log     *slog.Logger
	id      string
	bundle  string
	init    *process
	// direct says that a client makes the container's processes by itself, as announced: see direct.go.
	direct bool

	// ctx ends when the output of the container's processes is given up.
	ctx    context.Context
	cancel context.CancelFunc

	// busy holds a token while an operation changes the container as a whole.
	busy chan struct{}

	paused atomic.Bool

	mu          sync.Mutex
	lc          *libcontainer.Container
	cgroup      cgroup
	privatePID  bool
	resources   *specs.LinuxResources
	execs       map[string]*process
	exitedExecs []*process // in the order of their end
	oom         *oomWatch
}

func newContainer(s *Service, r *taskapi.CreateTaskRequest) *container {
	c := &container{
		service: s,
		log:     s.log.With("container", r.ID),
		id:      r.ID,
		bundle:  r.Bundle,
		busy:    make(chan struct{}, 1),
		execs:   map[string]*process{},
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.init = newProcess(c, "", stdioNames{stdin: r.Stdin, stdout: r.Stdout, stderr: r.Stderr, terminal: r.Terminal})
	return c
}

// acquire makes the caller the only one that changes the container as a whole.
func (c *container) acquire(ctx context.Context) (release func(), err error) {
	select {
	case c.busy <- struct{}{}:
		return func() { <-c.busy }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("container %s is busy with another request: %w", c.id, ctx.Err())
	}
}

// process finds the init process ("") or an exec.
func (c *container) process(execID string) (*process, error) {
	if execID == "" {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.execs[execID]; p != nil {
		return p, nil
	}
	if len(execID) > 160 {
		execID = execID[:160] + "..."
	}
	return nil, fmt.Errorf("exec %q of container %s: %w", execID, c.id, errdefs.ErrNotFound)
}

// library returns libcontainer's container, once it exists.
func (c *container) library() (*libcontainer.Container, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lc == nil {
		return nil, fmt.Errorf("container %s is not there yet or any more: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	return c.lc, nil
}

// create makes the container with its init process. After an error nothing is left of it, and
// the host has EOF on its streams.
func (c *container) create(ctx context.Context, announced *specs.Spec) error {
	release, err := c.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()

	spec, sysctls := guestSpec(announced, path.Join(c.service.cgroup, c.id), c.log)
	spec.Process.Terminal = c.init.stdio.terminal
	c.init.spec = spec.Process
	err = c.createFrom(spec, sysctls)
	if err != nil {
		if !c.init.launched {
			endStreams(c.init.streams, c.init.stdio)
		}
		c.init.fail()
		return fmt.Errorf("cannot create container %s: %w", c.id, err)
	}
	return nil
}

func (c *container) createFrom(spec *specs.Spec, sysctls map[string]string) error {
	config, err := libcontainerConfig(c.id, spec)
	if err != nil {
		return err
	}
	uid, gid, err := owner(config, spec.Process)
	if err != nil {
		return err
	}
	if err := setPodSysctls(sysctls); err != nil {
		return err
	}
	lc, err := libcontainer.Create(c.service.stateDir, c.id, config)
	if err != nil {
		return err
	}
	err = c.init.launch(lc.Start, uid, gid)
	if err != nil {
		c.destroy(lc)
		return err
	}

	paths := cgroupPaths(lc, config)
	watch, err := paths.watchOOM(func() { c.service.onOOM(c.id) })
	if err != nil {
		// The exit code 137 and Stats still tell of it.
		c.log.Warn("kills for want of memory will not be reported at once", "err", err)
	}
	c.mu.Lock()
	c.lc, c.cgroup, c.resources, c.oom = lc, paths, spec.Linux.Resources, watch
	c.privatePID = config.Namespaces.IsPrivate(configs.NEWPID)
	c.mu.Unlock()
	return nil
}

// cgroup is where a container's memory is accounted for.
type cgroup struct {
	unified bool   // version 2: one directory for everything
	dir     string // with version 1 that of the memory controller, "" without one
}

func cgroupPaths(lc *libcontainer.Container, config *configs.Config) cgroup {
	if cgroups.IsCgroup2UnifiedMode() {
		return cgroup{unified: true, dir: filepath.Join("/sys/fs/cgroup", config.Cgroups.Path)}
	}
	state, err := lc.State()
	if err != nil {
		return cgroup{}
	}
	return cgroup{dir: state.CgroupPaths["memory"]}
}

// owner is the user to whom the pipes of a process belong, in the guest's numbers.
func owner(config *configs.Config, p *specs.Process) (uid, gid int, err error) {
	uid, err = config.HostUID(int(p.User.UID))
	if err == nil {
		gid, err = config.HostGID(int(p.User.GID))
	}
	if err != nil {
		return 0, 0, fmt.Errorf("user %d:%d: %w: %w", p.User.UID, p.User.GID, err, errdefs.ErrInvalidArgument)
	}
	return uid, gid, nil
}

// destroy removes what libcontainer keeps of an ended container. It is called with busy held.
func (c *container) destroy(lc *libcontainer.Container) error {
	c.killRest()
	err := lc.Destroy()
	if err != nil {
		c.log.Error("cannot remove container", "err", err)
	}
	return err
}

// start lets init or an exec run.
func (c *container) start(ctx context.Context, p *process) error {
	if p != c.init {
		return c.startExec(p)
	}
	release, err := c.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	lc, err := c.library()
	if err != nil {
		return fmt.Errorf("cannot start container %s: %w", c.id, err)
	}
	if status := p.statusNow(); status != task.Status_CREATED {
		return fmt.Errorf("cannot start container %s: it is %s: %w", c.id, status, errdefs.ErrFailedPrecondition)
	}
	if err := lc.Exec(); err != nil {
		p.signal(unix.SIGKILL)
		<-p.exited
		if c.destroy(lc) == nil {
			c.gone()
		}
		return startError(p.spec.Args[0], c.id, err)
	}
	p.mu.Lock()
	if p.status == task.Status_CREATED {
		p.status = task.Status_RUNNING
	}
	p.mu.Unlock()
	return nil
}

// gone drops libcontainer's container after it was destroyed.
func (c *container) gone() {
	c.mu.Lock()
	watch := c.oom
	c.lc, c.oom = nil, nil
	c.mu.Unlock()
	watch.close()
}

// addExec announces an exec.
func (c *container) addExec(r *taskapi.ExecProcessRequest) error {
	if err := checkID("exec", r.ExecID); err != nil {
		return fmt.Errorf("cannot exec in container %s: %w", c.id, err)
	}
	a := announcement{names: stdioNames{stdin: r.Stdin, stdout: r.Stdout, stderr: r.Stderr}, streams: c.service.streams}
	if c.direct {
		announced, err := c.service.takeExec(c, r.ExecID)
		if err != nil {
			return fmt.Errorf("cannot exec in container %s: %w", c.id, err)
		}
		a = *announced
	}
	a.names.terminal = r.Terminal
	p, err := c.newExec(r, &a)
	if err != nil {
		a.end()
		return fmt.Errorf("cannot exec in container %s: %w", c.id, err)
	}
	c.mu.Lock()
	taken := c.execs[p.execID] != nil
	if !taken {
		c.execs[p.execID] = p
	}
	c.mu.Unlock()
	if taken {
		// The streams may be those of the first; they are left alone.
		return fmt.Errorf("cannot exec in container %s: exec %s exists: %w", c.id, p.execID, errdefs.ErrAlreadyExists)
	}
	return nil
}

func (c *container) newExec(r *taskapi.ExecProcessRequest, a *announcement) (*process, error) {
	if status := c.init.statusNow(); status != task.Status_RUNNING {
		return nil, fmt.Errorf("it is %s: %w", status, errdefs.ErrFailedPrecondition)
	}
	if c.paused.Load() {
		return nil, fmt.Errorf("it is paused: %w", errdefs.ErrFailedPrecondition)
	}
	spec, err := decodeProcess(r.Spec)
	if err != nil {
		return nil, err
	}
	for _, name := range a.names.all() {
		if name == "" {
			continue
		}
		if err := a.streams.check(name); err != nil {
			return nil, err
		}
	}
	p := newProcess(c, r.ExecID, a.names)
	p.streams, p.peers = a.streams, a.peers
	p.spec = spec
	return p, nil
}

func (c *container) startExec(p *process) error {
	if !p.claim() {
		return fmt.Errorf("cannot start %s: it has been started: %w", p, errdefs.ErrFailedPrecondition)
	}
	lc, err := c.library()
	if err == nil && c.init.hasExited() {
		err = fmt.Errorf("the container has ended: %w", errdefs.ErrFailedPrecondition)
	}
	if err == nil {
		config := lc.Config()
		var uid, gid int
		if uid, gid, err = owner(&config, p.spec); err == nil {
			err = p.launch(lc.Start, uid, gid)
		}
	}
	if err != nil {
		if !p.launched {
			endStreams(p.streams, p.stdio)
		}
		p.fail()
		go c.execExited(p)
		return fmt.Errorf("cannot start exec %s: %w", p.execID, err)
	}
	go c.execExited(p)
	return nil
}

// execExited notes the end of an exec and forgets the oldest beyond maxExited.
func (c *container) execExited(p *process) {
	<-p.done
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.execs[p.execID] != p {
		return
	}
	c.exitedExecs = append(c.exitedExecs, p)
	if p.purged {
		c.forgetSoon(p)
	}
	for len(c.exitedExecs) > maxExited {
		oldest := c.exitedExecs[0]
		c.exitedExecs = c.exitedExecs[1:]
		if c.execs[oldest.execID] == oldest {
			delete(c.execs, oldest.execID)
		}
	}
}

// kill sends sig to p, or with all to every process of the container.
func (c *container) kill(p *process, sig unix.Signal, all bool) error {
	if sig < 0 || sig > 64 {
		return fmt.Errorf("cannot send signal %d to %s: there is no such signal: %w", int(sig), p, errdefs.ErrInvalidArgument)
	}
	if err := p.signal(sig); err != nil {
		return err
	}
	if sig == unix.SIGKILL {
		// With cgroup v1 a frozen process dies only when it is thawed.
		c.thaw()
	}
	if !all || p != c.init || sig == 0 {
		return nil
	}
	if sig == unix.SIGKILL {
		c.killRest()
		return nil
	}
	pids, err := c.pids()
	if err != nil {
		return fmt.Errorf("cannot send signal %d to all of container %s: %w", int(sig), c.id, err)
	}
	for _, pid := range pids {
		if uint32(pid) != p.pidNow() {
			unix.Kill(pid, sig)
		}
	}
	return nil
}

// pids lists the processes of the container; it is not empty while init is there.
//
// Clients of direct containers look at the first one only and crash without: there it is init, also
// when it has ended, for as long as the container is not deleted.
func (c *container) pids() ([]int, error) {
	lc, err := c.library()
	first := int(c.init.pidNow())
	if err != nil {
		if c.direct && first != 0 {
			return []int{first}, nil
		}
		return nil, err
	}
	pids, err := lc.Processes()
	if c.direct && first != 0 {
		rest := slices.DeleteFunc(pids, func(pid int) bool { return pid == first })
		return append([]int{first}, rest...), nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list the processes of container %s: %w", c.id, err)
	}
	if len(pids) == 0 && !c.init.hasExited() {
		pids = append(pids, int(c.init.pidNow()))
	}
	return pids, nil
}

// initExited is called once, when the init process has been reaped.
func (c *container) initExited() {
	// A pid namespace of its own has taken everything with it.
	c.mu.Lock()
	private := c.privatePID || c.lc == nil
	c.mu.Unlock()
	if !private {
		c.killRest()
	}
}

// killRest kills every process in the container's cgroup, and those that they make meanwhile. It
// returns when none is left or it has tried for a second.
func (c *container) killRest() {
	c.mu.Lock()
	lc, cgroup := c.lc, c.cgroup
	c.mu.Unlock()
	if lc == nil {
		return
	}
	if cgroup.unified {
		// cgroup.kill exists since Linux 5.14; without it the loop does the work.
		os.WriteFile(filepath.Join(cgroup.dir, "cgroup.kill"), []byte("1"), 0)
	}
	for range 100 {
		pids, err := lc.Processes()
		if err != nil || len(pids) == 0 {
			return
		}
		for _, pid := range pids {
			unix.Kill(pid, unix.SIGKILL)
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.log.Warn("processes of the container outlive SIGKILL")
}

// remove deletes a container that has ended or was never started.
func (c *container) remove(ctx context.Context) error {
	release, err := c.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	switch c.init.statusNow() {
	case task.Status_RUNNING:
		return fmt.Errorf("cannot delete container %s: it is running: %w", c.id, errdefs.ErrFailedPrecondition)
	case task.Status_CREATED:
		if err := c.init.signal(unix.SIGKILL); err != nil && !errors.Is(err, errdefs.ErrNotFound) {
			return fmt.Errorf("cannot delete container %s: %w", c.id, err)
		}
	}
	if err := await(ctx, c.init.done); err != nil {
		return fmt.Errorf("cannot delete container %s: its output is not at the host yet: %w", c.id, err)
	}
	return c.finish()
}

// finish removes what is left of an ended container. busy is held.
func (c *container) finish() error {
	c.mu.Lock()
	var idle []*process
	for _, p := range c.execs {
		if p.claim() {
			idle = append(idle, p)
		}
	}
	c.mu.Unlock()
	for _, p := range idle {
		// Nobody can start it any more, but somebody may wait for it.
		endStreams(p.streams, p.stdio)
		p.fail()
	}
	if lc, err := c.library(); err == nil {
		if err := c.destroy(lc); err != nil {
			return fmt.Errorf("cannot delete container %s: %w", c.id, err)
		}
		c.gone()
	}
	c.giveUp()
	return nil
}

// removeExec forgets an exec that has ended or was never started.
func (c *container) removeExec(ctx context.Context, p *process) error {
	switch {
	case p.claim():
		endStreams(p.streams, p.stdio)
		p.fail()
	case p.statusNow() == task.Status_STOPPED:
		if err := await(ctx, p.done); err != nil {
			return fmt.Errorf("cannot delete %s: its output is not at the host yet: %w", p, err)
		}
	default:
		return fmt.Errorf("cannot delete %s: it is running: %w", p, errdefs.ErrFailedPrecondition)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.execs[p.execID] == p {
		delete(c.execs, p.execID)
	}
	return nil
}

// purge removes the container whatever it does.
func (c *container) purge(ctx context.Context) error {
	c.cancel()
	release, err := c.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	if !c.init.hasExited() {
		c.init.signal(unix.SIGKILL)
		c.killRest()
		c.thaw()
		if err := await(ctx, c.init.exited); err != nil {
			return fmt.Errorf("its init process (pid %d) does not end: %w", c.init.pidNow(), err)
		}
	}
	return c.finish()
}

// stop ends the container's processes: SIGTERM, after grace SIGKILL.
func (c *container) stop(ctx context.Context, grace time.Duration) {
	c.thaw()
	first := unix.SIGTERM
	if c.init.statusNow() != task.Status_RUNNING {
		first = unix.SIGKILL // it has not begun, so there is nothing that it could finish
	}
	c.init.signal(first)
	graced, cancel := context.WithTimeout(ctx, grace)
	err := await(graced, c.init.exited)
	cancel()
	if err != nil {
		c.init.signal(unix.SIGKILL)
		c.killRest()
		if err := await(ctx, c.init.exited); err != nil {
			c.log.Error("container does not end", "pid", c.init.pidNow())
			return
		}
	}
	// The last words are worth a moment, but a host that does not listen cannot hold up the end.
	last, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	await(last, c.init.done)
}

// freeze pauses or resumes.
func (c *container) freeze(ctx context.Context, frozen bool) error {
	verb := "resume"
	if frozen {
		verb = "pause"
	}
	release, err := c.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	lc, err := c.library()
	if err != nil {
		return fmt.Errorf("cannot %s: %w", verb, err)
	}
	if status := c.init.statusNow(); status != task.Status_RUNNING {
		return fmt.Errorf("cannot %s container %s: it is %s: %w", verb, c.id, status, errdefs.ErrFailedPrecondition)
	}
	if c.paused.Load() == frozen {
		return nil
	}
	if frozen {
		err = lc.Pause()
	} else {
		err = lc.Resume()
	}
	if err != nil {
		return fmt.Errorf("cannot %s container %s: %w", verb, c.id, err)
	}
	c.paused.Store(frozen)
	return nil
}

// thaw resumes a paused container that is about to be ended; busy may be held or not.
func (c *container) thaw() {
	if !c.paused.Load() {
		return
	}
	if lc, err := c.library(); err == nil {
		if err := lc.Resume(); err != nil {
			c.log.Warn("cannot resume container to end it", "err", err)
			return
		}
	}
	c.paused.Store(false)
}

// update changes the limits that resources names.
func (c *container) update(ctx context.Context, resources *anypb.Any) error {
	release, err := c.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	change, err := decodeResources(resources.GetValue())
	if err != nil {
		return fmt.Errorf("cannot update container %s: %w", c.id, err)
	}
	lc, err := c.library()
	if err != nil {
		return fmt.Errorf("cannot update: %w", err)
	}
	if c.init.hasExited() {
		return fmt.Errorf("cannot update container %s: it has ended: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	c.mu.Lock()
	merged := mergeResources(c.resources, guestResources(change, c.log))
	c.mu.Unlock()
	config := lc.Config()
	cgroup := *config.Cgroups
	if cgroup.Resources, err = cgroupResources(c.id, merged, config.Cgroups.Resources); err != nil {
		return fmt.Errorf("cannot update container %s: %w", c.id, err)
	}
	config.Cgroups = &cgroup
	if err := lc.Set(config); err != nil {
		return fmt.Errorf("cannot update container %s: %w", c.id, err)
	}
	c.mu.Lock()
	c.resources = merged
	c.mu.Unlock()
	return nil
}

// checkOOM reports kills for want of memory that have not been reported yet.
func (c *container) checkOOM() {
	c.mu.Lock()
	watch := c.oom
	c.mu.Unlock()
	watch.check()
}
