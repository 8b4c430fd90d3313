// Package isulad is a client that behaves towards a sandboxer and its guests as iSulad does: byte
// for byte in what it sends, and in what it makes of the answers. Its methods are those of a small
// CRI. It knows both generations of iSulad's sandbox interface.
package isulad

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A Version of iSulad, as far as versions differ.
type Version int

const (
	V213 Version = iota // 2.1.3: Gen-A, streams over FIFOs only
	V214                // 2.1.4: Gen-A, an exec's streams over vsock
	V215                // 2.1.5: as 2.1.4
	V216                // 2.1.6 and later: Gen-B
)

// A Generation of the sandbox interface.
type Generation int

const (
	GenA Generation = iota
	GenB
)

// Generation returns the interface that the version speaks.
func (v Version) Generation() Generation {
	if v == V216 {
		return GenB
	}
	return GenA
}

// Config says which iSulad this is, and where.
type Config struct {
	Version   Version
	Shim      Shim
	Sandboxer string // the sandboxer's name in daemon.json, such as vmm
	Socket    string // the sandboxer's Unix socket
	Runtime   string // io.containerd.vmm.v1 if empty
	State     string // iSulad's state folder; tests use one of their own

	// Record, if set, is told every request to the sandboxer before it is sent. Calls may overlap.
	Record func(method string, request []byte)

	// DialVsock makes one attempt to connect; nil for AF_VSOCK.
	DialVsock func(cid, port uint32) (net.Conn, error)
	// PlatformInterval, WaitTick and VsockRetry are iSulad's 5 s, 200 ms and 1 s if zero.
	PlatformInterval, WaitTick, VsockRetry time.Duration

	// now and execID are the clock and the maker of ids; tests have their own.
	now    func() time.Time
	execID func() string
}

// A State of a pod in iSulad's view.
type State string

const (
	Running State = "running"
	Pending State = "pending" // the sandboxer cannot be reached
	Stopped State = "stopped"
)

// ExecConfig is a process to run in a container. A stream that is nil is not attached.
type ExecConfig struct {
	Args           []string
	Terminal       bool
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Resize brings the sizes of the terminal, from when the process has started; may be nil.
	Resize <-chan Size
	// Names, if not nil, are told as the names of stdin, stdout and stderr in place of those of streams
	// that iSulad opens: nobody is at their other ends. What an iSulad with a defect would do.
	Names *[3]string
}

// Pod is what RunPod starts.
type Pod struct {
	ID    string // 64 hexadecimal digits
	NetNS string // empty for the host's network
	// Config is kubelet's. What iSulad adds to it is added when the pod runs.
	Config *runtimeapi.PodSandboxConfig
	// Network sets up the network namespace; nil for nothing to do. It is called before Create by
	// Gen-A and where the annotation cri.sandbox.network.setup.v2 is true, else after Start.
	Network func() error
	// Teardown takes it back, after the containers have ended and before Stop; nil for nothing to do.
	Teardown func() error
}

// Container is what CreateContainer makes known.
type Container struct {
	ID       string
	RootFS   string // the mounted root file system on the host
	Spec     []byte // the OCI spec, see Spec
	Terminal bool
}

// A Daemon is one iSulad. The methods may be called concurrently.
type Daemon struct {
	config Config

	mu         sync.Mutex
	changed    chan struct{} // closed and replaced when a state changes
	client     *sandboxer
	end        context.CancelFunc // ends the monitors
	life       context.Context
	pods       map[string]*pod
	containers map[string]*container
	monitors   sync.WaitGroup
}

type pod struct {
	Pod
	started    started
	state      State
	networked  bool // what Network did has to be taken back
	exit       exit
	announcing sync.Mutex // held while tasks change and are announced
	tasks      map[string]*task
	ports      map[uint32]bool
}

type container struct {
	Container
	pod     *pod
	address string // a copy of the pod's at creation
	conn    *ttrpc.Client
	running bool
	code    uint32
	done    chan struct{} // closed when the exit is known and cleaned up after
}

// New returns an iSulad that has no pods. It does not connect yet. The caller closes it.
func New(c Config) (*Daemon, error) {
	if c.Runtime == "" {
		c.Runtime = "io.containerd.vmm.v1"
	}
	if c.DialVsock == nil {
		c.DialVsock = dialVsock
	}
	if c.PlatformInterval == 0 {
		c.PlatformInterval = 5 * time.Second
	}
	if c.WaitTick == 0 {
		c.WaitTick = 200 * time.Millisecond
	}
	if c.VsockRetry == 0 {
		c.VsockRetry = time.Second
	}
	if c.now == nil {
		c.now = time.Now
	}
	if c.execID == nil {
		c.execID = NewID
	}
	d := &Daemon{
		config: c, changed: make(chan struct{}),
		pods: make(map[string]*pod), containers: make(map[string]*container),
	}
	return d, d.connect()
}

func (d *Daemon) connect() error {
	client, err := dialSandboxer(d.config)
	if err != nil {
		return err
	}
	d.client = client
	d.life, d.end = context.WithCancel(context.Background())
	return nil
}

// Close ends iSulad's process: its connections go, pods and containers stay.
func (d *Daemon) Close() error {
	d.end()
	err := d.client.conn.Close()
	d.mu.Lock()
	for _, c := range d.containers {
		if c.conn != nil {
			c.conn.Close()
		}
	}
	d.mu.Unlock()
	d.monitors.Wait()
	return err
}

func (d *Daemon) generation() Generation { return d.config.Version.Generation() }

func (d *Daemon) call(method, id string, own message) ([]byte, error) {
	return d.client.call(method, d.generation().request(d.config.Sandboxer, id, own))
}

func (d *Daemon) set(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
	close(d.changed)
	d.changed = make(chan struct{})
}

// RunPod runs a pod. A pod that fails is deleted, and the first error returned.
func (d *Daemon) RunPod(p Pod) error {
	edited, err := p.edited()
	if err != nil {
		return fmt.Errorf("cannot complete the configuration of pod %s: %w", p.ID, err)
	}
	config, err := proto.MarshalOptions{Deterministic: true}.Marshal(edited)
	if err != nil {
		return fmt.Errorf("cannot encode the configuration of pod %s: %w", p.ID, err)
	}
	one := &pod{Pod: p, state: Stopped, tasks: make(map[string]*task), ports: make(map[uint32]bool)}
	first := d.generation() == GenA || edited.Annotations["cri.sandbox.network.setup.v2"] == "true"
	if first && p.Network != nil {
		if err := p.Network(); err != nil {
			return fmt.Errorf("cannot set up the network of pod %s: %w", p.ID, err)
		}
		one.networked = true
	}
	fail := func(err error) error { return errors.Join(err, d.teardown(one), d.remove(one)) }
	if _, err := d.client.call("Create", d.generation().createRequest(d.config.Sandboxer, p.ID, p.NetNS, config)); err != nil {
		return fail(err)
	}
	answer, err := d.call("Start", p.ID, nil)
	if err != nil {
		return fail(err)
	}
	if one.started, err = decodeStarted(answer); err == nil && one.started.address == "" {
		err = fmt.Errorf("the sandboxer started pod %s without a task address", p.ID)
	}
	if err != nil {
		return fail(err)
	}
	d.set(func() { d.pods[p.ID], one.state = one, Running })
	d.watch(one)
	if !first && p.Network != nil {
		if err := p.Network(); err != nil {
			return fail(fmt.Errorf("cannot set up the network of pod %s: %w", p.ID, err))
		}
		d.mu.Lock()
		one.networked = true
		d.mu.Unlock()
	}
	return nil
}

// watch follows the pod until it has exited.
func (d *Daemon) watch(p *pod) {
	client, life := d.client, d.life
	move := func(to State, end exit) func() {
		return func() {
			d.set(func() {
				if p.state != Stopped { // the first exit wins
					p.state, p.exit = to, end
				}
			})
		}
	}
	d.monitors.Go(func() {
		client.monitor(life, p.ID, move(Pending, exit{}), move(Running, exit{}), func(e exit) { move(Stopped, e)() })
	})
}

// PodState returns a pod's state, its task address, and how it ended if it has.
func (d *Daemon) PodState(id string) (state State, address string, exitStatus int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := d.pods[id]
	if p == nil {
		return "", "", 0
	}
	return p.state, p.started.address, p.exit.status
}

// PodPID is the process that Start named, of which iSulad makes paths of namespaces.
func (d *Daemon) PodPID(id string) uint32 {
	d.mu.Lock()
	defer d.mu.Unlock()
	if p := d.pods[id]; p != nil {
		return p.started.pid
	}
	return 0
}

// WaitPod returns when the pod has the state.
func (d *Daemon) WaitPod(ctx context.Context, id string, want State) error {
	for {
		d.mu.Lock()
		p, changed := d.pods[id], d.changed
		reached := p != nil && p.state == want
		d.mu.Unlock()
		if reached {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			state, _, _ := d.PodState(id)
			return fmt.Errorf("pod %s is %q, not %q: %w", id, state, want, ctx.Err())
		}
	}
}

// StopPod kills the containers that run, takes the network back, and sends Stop if the pod is running
// in iSulad's view; it has stopped once its Wait returns.
func (d *Daemon) StopPod(id string) error {
	d.mu.Lock()
	p := d.pods[id]
	d.mu.Unlock()
	if p == nil {
		return nil
	}
	if err := d.killContainers(p); err != nil {
		return err
	}
	if err := d.teardown(p); err != nil {
		return err
	}
	return d.stop(p, false)
}

// teardown takes the network of a pod back, once.
func (d *Daemon) teardown(p *pod) error {
	d.mu.Lock()
	teardown := p.Teardown
	if !p.networked {
		teardown = nil
	}
	p.networked = false
	d.mu.Unlock()
	if teardown == nil {
		return nil
	}
	if err := teardown(); err != nil {
		return fmt.Errorf("cannot take back the network of pod %s: %w", p.ID, err)
	}
	return nil
}

func (d *Daemon) stop(p *pod, always bool) error {
	d.mu.Lock()
	running := p.state == Running
	d.mu.Unlock()
	if !running && !always {
		return nil
	}
	_, err := d.client.call("Stop", d.generation().stopRequest(d.config.Sandboxer, p.ID, 10))
	return err
}

// RemovePod removes a pod, and what is known of its containers.
func (d *Daemon) RemovePod(id string) error {
	d.mu.Lock()
	p := d.pods[id]
	d.mu.Unlock()
	if p == nil {
		return nil
	}
	return d.remove(p)
}

func (d *Daemon) remove(p *pod) error {
	if err := d.stop(p, d.generation() == GenA); err != nil {
		return err
	}
	if _, err := d.call("Shutdown", p.ID, nil); err != nil {
		return err
	}
	d.set(func() {
		p.state = Stopped
		delete(d.pods, p.ID)
		for id, c := range d.containers {
			if c.pod == p {
				delete(d.containers, id)
				if c.conn != nil {
					c.conn.Close()
				}
			}
		}
	})
	return nil
}

// CreateContainer makes a container known to iSulad; nothing is announced.
func (d *Daemon) CreateContainer(podID string, c Container) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := d.pods[podID]
	if p == nil {
		return fmt.Errorf("there is no pod %s for container %s", podID, c.ID)
	}
	if p.state == Pending && d.generation() == GenB {
		return fmt.Errorf("pod %s is pending: container %s is refused", podID, c.ID)
	}
	d.containers[c.ID] = &container{Container: c, pod: p, address: p.started.address}
	return nil
}

func (d *Daemon) container(id string) (*container, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if c := d.containers[id]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("there is no container %s", id)
}

// announce changes the pod's tasks and, in Gen-B, sends them all. A change that is refused stays
// out of the list.
func (d *Daemon) announce(p *pod, change func(map[string]*task)) error {
	p.announcing.Lock()
	defer p.announcing.Unlock()
	before, err := snapshot(p.tasks)
	if err != nil {
		return err
	}
	change(p.tasks)
	list, err := snapshot(p.tasks)
	if err == nil {
		_, err = d.client.call("Update", updateRequest(d.config.Sandboxer, p.ID, d.config.Runtime,
			sandboxName(p.Config.GetMetadata()), p.started.created, d.config.now(), list))
	}
	if err == nil {
		err = d.save(p, list)
	}
	if err != nil {
		old, parsed := parseSnapshot(before)
		if parsed == nil {
			p.tasks = old
		}
		return fmt.Errorf("cannot announce the tasks of pod %s: %w", p.ID, err)
	}
	return nil
}

// Announce sends a list of tasks as it is, which may be no such list at all. Only Gen-B has it.
func (d *Daemon) Announce(pod string, list []byte) error {
	now := d.config.now()
	_, err := d.client.call("Update", updateRequest(d.config.Sandboxer, pod, d.config.Runtime, "k8s_POD", now, now, list))
	return err
}

// Purge says of a container, or of a process in it if exec is not empty, that it is gone; also of such
// as have never been. Only Gen-A has it.
func (d *Daemon) Purge(pod, container, exec string) error {
	_, err := d.client.call("Purge", purgeRequest(d.config.Sandboxer, pod, container, exec))
	return err
}

func (d *Daemon) tasksFile(p *pod) string {
	return filepath.Join(d.config.State, "sandbox", p.ID, "sandbox_tasks.json")
}

func (d *Daemon) save(p *pod, list []byte) error {
	path := d.tasksFile(p)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return os.WriteFile(path, list, 0o600)
}

func (d *Daemon) prepare(c *container) error {
	if d.generation() == GenA {
		_, err := d.client.call("Prepare", prepareRequest(d.config.Sandboxer, c.pod.ID, c.ID, "", c.Spec, c.RootFS,
			stdio{terminal: c.Terminal}))
		return err
	}
	return d.announce(c.pod, func(tasks map[string]*task) {
		tasks[c.ID] = &task{TaskID: c.ID, Spec: c.Spec, RootFS: []mount{{Type: "bind", Source: c.RootFS}}}
	})
}

func (d *Daemon) purge(c *container) error {
	if d.generation() == GenA {
		_, err := d.client.call("Purge", purgeRequest(d.config.Sandboxer, c.pod.ID, c.ID, ""))
		return err
	}
	return d.announce(c.pod, func(tasks map[string]*task) { delete(tasks, c.ID) })
}

// connectTask makes the container's own connection: one attempt, no retry.
func (d *Daemon) connectTask(c *container) error {
	to, err := d.config.Shim.parse(c.address)
	if err != nil {
		return err
	}
	var conn net.Conn
	if to.unix != "" {
		conn, err = net.Dial("unix", to.unix)
	} else {
		conn, err = d.config.DialVsock(to.cid, to.port)
	}
	if err != nil {
		return fmt.Errorf("cannot connect to the task service at %s for container %s: %w", c.address, c.ID, err)
	}
	d.mu.Lock()
	c.conn = ttrpc.NewClient(conn)
	d.mu.Unlock()
	return nil
}

func (c *container) task() taskapi.TTRPCTaskService { return taskapi.NewTTRPCTaskClient(c.conn) }

// StartContainer announces a container, creates and starts its task, and follows it to its end.
func (d *Daemon) StartContainer(id string) error {
	c, err := d.container(id)
	if err != nil {
		return err
	}
	if err := d.prepare(c); err != nil {
		return err
	}
	if err := d.startTask(c); err != nil {
		if d.generation() == GenB { // Gen-A does not purge here
			err = errors.Join(err, d.purge(c))
		}
		return err
	}
	return nil
}

func (d *Daemon) startTask(c *container) error {
	if err := d.connectTask(c); err != nil {
		return err
	}
	ctx := context.Background()
	if _, err := c.task().Create(ctx, &taskapi.CreateTaskRequest{
		ID: c.ID, Bundle: filepath.Join("/var/lib/isulad/engines", d.config.Runtime, c.ID), Terminal: c.Terminal,
	}); err != nil {
		_, _ = c.task().Kill(ctx, &taskapi.KillRequest{ID: c.ID, Signal: 9})
		return fmt.Errorf("cannot create the task of container %s: %w", c.ID, err)
	}
	if _, err := c.task().Start(ctx, &taskapi.StartRequest{ID: c.ID}); err != nil {
		return fmt.Errorf("cannot start the task of container %s: %w", c.ID, err)
	}
	d.follow(c)
	return nil
}

// follow waits for the container's end and cleans up after it.
func (d *Daemon) follow(c *container) {
	life := d.life
	d.mu.Lock()
	done := make(chan struct{})
	c.running, c.done = true, done
	d.mu.Unlock()
	d.monitors.Go(func() {
		ctx := context.Background()
		// iSulad takes an exit that it cannot learn for 0.
		var code uint32
		answer, err := c.task().Wait(ctx, &taskapi.WaitRequest{ID: c.ID})
		if life.Err() != nil {
			return // it is iSulad that ends, not the container
		}
		if err == nil {
			code = answer.ExitStatus
		}
		for range 10 {
			if _, err := c.task().Kill(ctx, &taskapi.KillRequest{ID: c.ID}); err != nil {
				break
			}
			_, _ = c.task().Kill(ctx, &taskapi.KillRequest{ID: c.ID, Signal: 9})
			if !sleep(life, 100*time.Millisecond) {
				return
			}
		}
		_, _ = c.task().Delete(ctx, &taskapi.DeleteRequest{ID: c.ID})
		_, _ = c.task().Shutdown(ctx, &taskapi.ShutdownRequest{ID: c.ID})
		d.set(func() { c.running, c.code = false, code })
		close(done)
	})
}

// WaitContainer returns the exit status of a started container as iSulad records it.
func (d *Daemon) WaitContainer(ctx context.Context, id string) (uint32, error) {
	c, err := d.container(id)
	if err != nil {
		return 0, err
	}
	d.mu.Lock()
	done := c.done
	d.mu.Unlock()
	select {
	case <-done:
		d.mu.Lock()
		defer d.mu.Unlock()
		return c.code, nil
	case <-ctx.Done():
		return 0, fmt.Errorf("container %s has not exited: %w", id, ctx.Err())
	}
}

// StopContainer ends a container: with SIGTERM, after the timeout with SIGKILL. A container that was
// running when this was called is purged; of one that had exited by itself nothing is said.
func (d *Daemon) StopContainer(ctx context.Context, id string, timeout time.Duration) error {
	c, err := d.container(id)
	if err != nil {
		return err
	}
	d.mu.Lock()
	running, done := c.running, c.done
	d.mu.Unlock()
	if !running {
		return nil
	}
	_, _ = c.task().Kill(context.Background(), &taskapi.KillRequest{ID: id, Signal: 15})
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		_, _ = c.task().Kill(context.Background(), &taskapi.KillRequest{ID: id, Signal: 9})
		select {
		case <-done:
		case <-time.After(killWait):
			return fmt.Errorf("container %s does not end", id)
		case <-ctx.Done():
			return ctx.Err()
		}
	case <-ctx.Done():
		return ctx.Err()
	}
	return d.purge(c)
}

// RemoveContainer forgets a container that has stopped; nothing is announced.
func (d *Daemon) RemoveContainer(id string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.containers[id]
	if c == nil {
		return nil
	}
	if c.running {
		return fmt.Errorf("container %s is running", id)
	}
	delete(d.containers, id)
	if c.conn != nil {
		c.conn.Close()
	}
	return nil
}

// NewID returns an id as iSulad makes them for pods, containers and processes.
func NewID() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // it never fails
	return hex.EncodeToString(b[:])
}

// Exec runs a process in a container and returns its exit status, after its streams have ended. The
// process of an exec that attaches no stream is not waited for by Gen-B. A terminal has no stderr.
func (d *Daemon) Exec(id string, e ExecConfig) (_ uint32, err error) {
	if e.Terminal && e.Stderr != nil {
		return 0, errors.New("an exec with a terminal has no stderr")
	}
	c, err := d.running(id)
	if err != nil {
		return 0, err
	}
	spec, err := execSpec(c.Spec, e)
	if err != nil {
		return 0, err
	}
	exec := d.config.execID()
	io, release, err := d.open(c, exec, e)
	if err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			io.stop()
		}
		// A failing purge is only logged by iSulad. The join comes after it.
		_ = d.purgeExec(c, exec)
		io.join()
		release()
	}()
	if err := d.prepareExec(c, exec, spec, io.stdio); err != nil {
		return 0, err
	}
	ctx := context.Background()
	if _, err := c.task().Exec(ctx, &taskapi.ExecProcessRequest{
		ID: id, ExecID: exec, Terminal: e.Terminal, Stdin: io.stdin, Stdout: io.stdout, Stderr: io.stderr,
		Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: spec},
	}); err != nil {
		return 0, fmt.Errorf("cannot make exec %s in container %s: %w", exec, id, err)
	}
	if _, err := c.task().Start(ctx, &taskapi.StartRequest{ID: id, ExecID: exec}); err != nil {
		return 0, fmt.Errorf("cannot start exec %s in container %s: %w", exec, id, err)
	}
	ended := make(chan struct{})
	defer close(ended)
	if e.Resize != nil {
		go resize(c, exec, e.Resize, ended)
	}
	attached := e.Names != nil || e.Stdin != nil || e.Stdout != nil || e.Stderr != nil
	if !attached && d.generation() == GenB {
		return 0, nil
	}
	answer, err := c.task().Wait(ctx, &taskapi.WaitRequest{ID: id, ExecID: exec})
	if err != nil {
		return 0, fmt.Errorf("cannot wait for exec %s in container %s: %w", exec, id, err)
	}
	return answer.ExitStatus, nil
}

func (d *Daemon) prepareExec(c *container, exec string, spec []byte, io stdio) error {
	if d.generation() == GenA {
		_, err := d.client.call("Prepare", prepareRequest(d.config.Sandboxer, c.pod.ID, c.ID, exec, spec, c.RootFS, io))
		return err
	}
	return d.announce(c.pod, func(tasks map[string]*task) {
		if t := tasks[c.ID]; t != nil {
			if t.Processes == nil {
				t.Processes = new([]process)
			}
			*t.Processes = append(*t.Processes,
				process{ExecID: exec, Spec: spec, Stdin: io.stdin, Stdout: io.stdout, Stderr: io.stderr})
		}
	})
}

func (d *Daemon) purgeExec(c *container, exec string) error {
	if d.generation() == GenA {
		_, err := d.client.call("Purge", purgeRequest(d.config.Sandboxer, c.pod.ID, c.ID, exec))
		return err
	}
	return d.announce(c.pod, func(tasks map[string]*task) {
		if t := tasks[c.ID]; t != nil && t.Processes != nil {
			kept := []process{} // an empty list is written as one
			for _, p := range *t.Processes {
				if p.ExecID != exec {
					kept = append(kept, p)
				}
			}
			t.Processes = &kept
		}
	})
}

// open opens the streams of an exec. release gives their ports back.
func (d *Daemon) open(c *container, exec string, e ExecConfig) (_ *streams, release func(), err error) {
	if e.Names != nil || e.Stdin == nil && e.Stdout == nil && e.Stderr == nil {
		s := &streams{done: make(chan struct{}), cancel: func() {}}
		close(s.done)
		s.terminal = e.Terminal
		if e.Names != nil {
			s.stdin, s.stdout, s.stderr = e.Names[0], e.Names[1], e.Names[2]
		}
		return s, func() {}, nil
	}
	cid, vsock := d.config.Version.stdioCID(c.address)
	if !vsock {
		dir := filepath.Join(d.config.State, d.config.Runtime, c.ID, "exec", exec[:16])
		s, err := openFIFOs(dir, e)
		return s, func() {}, err
	}
	ports := [3]uint32{}
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, attached := range []bool{e.Stdin != nil, e.Stdout != nil, e.Stderr != nil} {
		if !attached {
			continue
		}
		for port := uint32(2000); ; port++ {
			if port >= 65535 {
				return nil, nil, fmt.Errorf("no vsock port is free in pod %s", c.pod.ID)
			}
			if !c.pod.ports[port] {
				ports[i], c.pod.ports[port] = port, true
				break
			}
		}
	}
	return d.config.dialStreams(cid, ports, e), func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		for _, port := range ports {
			delete(c.pod.ports, port)
		}
	}, nil
}

// Restart ends iSulad and starts it again: it loads the pods, asks for their state, waits for them
// again, and makes new connections to the tasks. No call may be under way.
func (d *Daemon) Restart() error {
	if err := d.Close(); err != nil {
		return err
	}
	if err := d.connect(); err != nil {
		return err
	}
	var lost []error
	for id, p := range d.pods {
		if err := d.restore(p); err != nil {
			lost = append(lost, err)
			if d.generation() == GenA { // and its folders are deleted
				delete(d.pods, id)
			}
		}
	}
	for _, c := range d.containers {
		if c.running {
			d.restoreContainer(c)
		}
	}
	return errors.Join(lost...)
}

func (d *Daemon) restore(p *pod) error {
	p.ports = make(map[uint32]bool) // known in memory only
	if d.generation() == GenB {
		p.tasks = make(map[string]*task)
		if list, err := os.ReadFile(d.tasksFile(p)); err == nil {
			if p.tasks, err = parseSnapshot(list); err != nil {
				return fmt.Errorf("cannot read the saved tasks of pod %s: %w", p.ID, err)
			}
		}
	}
	answer, err := d.call("Status", p.ID, nil)
	if err != nil {
		d.set(func() { p.state = Stopped })
		return err
	}
	now, err := d.generation().decodeStatus(answer)
	if err != nil {
		return err
	}
	d.set(func() {
		p.started.address, p.started.pid = now.address, now.pid
		switch {
		case now.state == "SANDBOX_READY":
			p.state = Running
		case d.generation() == GenB:
			p.state = Stopped
		}
	})
	d.watch(p)
	return nil
}

// restoreContainer takes a container for stopped with 255 if its state cannot be asked for.
func (d *Daemon) restoreContainer(c *container) {
	err := d.connectTask(c)
	if err == nil {
		if _, err = c.task().State(context.Background(), &taskapi.StateRequest{ID: c.ID}); err == nil {
			d.follow(c)
			return
		}
		_, _ = c.task().Kill(context.Background(), &taskapi.KillRequest{ID: c.ID})
	}
	done := make(chan struct{})
	close(done)
	d.set(func() { c.running, c.code, c.done = false, 255, done })
}
