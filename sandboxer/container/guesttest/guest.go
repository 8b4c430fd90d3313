// Package guesttest is a guest without a virtual machine, for tests of what talks to one: it
// serves the Task and Sandbox services and the standard streams in this process, and its
// "processes" are Go functions.
package guesttest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/guest/protocol/stdio"
)

// Program is what a process of the fake guest does, chosen by the first of its args. It returns
// the exit status. A signal that ends a process cancels ctx.
type Program func(ctx context.Context, p *Process) uint32

// Guest is the fake. Its fields may be set before it is used.
type Guest struct {
	Programs map[string]Program
	// Exited, if set, may falsify what Wait answers.
	Exited func(*task.WaitResponse)

	hub      *stdio.Hub
	listener net.Listener

	mu      sync.Mutex
	calls   []string
	specs   map[string]*specs.Spec
	raw     map[string][]byte
	direct  map[string]*protocol.Direct // by key
	procs   map[string]*Process
	signals []uint32
	updates [][]byte
	conns   []net.Conn
	down    bool

	intercept func(ctx context.Context, method, id, execID string) error
	stats     func(id string) (*task.StatsResponse, error)
}

// Process is one process of the fake.
type Process struct {
	ID, ExecID     string
	Spec           *specs.Process
	Stdin          io.ReadCloser // nil for none
	Stdout, Stderr *stdio.Output // nil for none

	started bool
	kill    context.CancelFunc
	ctx     context.Context
	signal  uint32
	paused  bool
	status  uint32
	done    chan struct{}
}

// New returns a Guest that ends with the test.
func New(t testing.TB) *Guest {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	g := &Guest{
		Programs: map[string]Program{
			"true":  func(context.Context, *Process) uint32 { return 0 },
			"false": func(context.Context, *Process) uint32 { return 1 },
			"sleep": func(ctx context.Context, _ *Process) uint32 { <-ctx.Done(); return 0 },
			"cat": func(ctx context.Context, p *Process) uint32 {
				if _, err := io.Copy(p.Stdout, p.Stdin); err != nil {
					return 1
				}
				return 0
			},
			"echo": func(_ context.Context, p *Process) uint32 {
				fmt.Fprintln(p.Stdout, strings.Join(p.Spec.Args[1:], " "))
				return 0
			},
		},
		hub: stdio.NewHub(), listener: l,
		specs: map[string]*specs.Spec{}, raw: map[string][]byte{}, direct: map[string]*protocol.Direct{}, procs: map[string]*Process{},
	}
	go g.hub.Serve(l)
	t.Cleanup(func() {
		l.Close()
		g.mu.Lock()
		defer g.mu.Unlock()
		for _, p := range g.procs {
			p.kill()
		}
	})
	return g
}

// Streams is the Unix socket at which Dial finds the standard streams, for a host in another process.
func (g *Guest) Streams() string { return g.listener.Addr().String() }

// Task implements container.Guest.
func (g *Guest) Task() task.TTRPCTaskService { return (*taskService)(g) }

// Sandbox implements container.Guest.
func (g *Guest) Sandbox() protocol.SandboxService { return (*sandboxService)(g) }

// Dial implements container.Guest.
func (g *Guest) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	if port != protocol.PortStdio {
		return nil, fmt.Errorf("nothing listens on port %d", port)
	}
	g.mu.Lock()
	down := g.down
	g.mu.Unlock()
	if down {
		return nil, net.ErrClosed
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", g.listener.Addr().String())
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	g.conns = append(g.conns, conn)
	g.mu.Unlock()
	return conn, nil
}

// CutStreams breaks all connections of standard streams.
func (g *Guest) CutStreams() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, c := range g.conns {
		c.Close()
	}
	g.conns = nil
}

// Die breaks everything, as a virtual machine that ends does.
func (g *Guest) Die() {
	g.mu.Lock()
	g.down = true
	g.mu.Unlock()
	g.CutStreams()
}

// Calls lists the calls so far, as "Method id" or "Method id/exec".
func (g *Guest) Calls() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]string(nil), g.calls...)
}

// Spec returns the spec that PrepareContainer brought, and its JSON.
func (g *Guest) Spec(id string) (*specs.Spec, []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.specs[id], g.raw[id]
}

// Direct returns the names of streams that an announcement brought; nil if there is none.
func (g *Guest) Direct(id, execID string) *protocol.Direct {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.direct[key(id, execID)]
}

// Signals and Updates are what Kill and Update brought.
func (g *Guest) Signals() []uint32 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]uint32(nil), g.signals...)
}

// Updates are the resources that Update brought, as JSON.
func (g *Guest) Updates() [][]byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([][]byte(nil), g.updates...)
}

// Known tells whether the guest still knows a container.
func (g *Guest) Known(id string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.specs[id] != nil
}

func (g *Guest) enter(ctx context.Context, method, id, execID string) error {
	name := method + " " + id
	if execID != "" {
		name += "/" + execID
	}
	g.mu.Lock()
	g.calls = append(g.calls, name)
	intercept := g.intercept
	g.mu.Unlock()
	if intercept != nil {
		return intercept(ctx, method, id, execID)
	}
	return nil
}

// Intercept has f asked before every call from now on; an error is the call's answer.
func (g *Guest) Intercept(f func(ctx context.Context, method, id, execID string) error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.intercept = f
}

// AnswerStats has f answer Stats from now on; nil answers with an error.
func (g *Guest) AnswerStats(f func(id string) (*task.StatsResponse, error)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stats = f
}

func key(id, execID string) string { return id + "/" + execID }

func (g *Guest) find(id, execID string) (*Process, error) {
	p := g.procs[key(id, execID)]
	if p == nil {
		return nil, status.Errorf(codes.NotFound, "process %q of %q does not exist", execID, id)
	}
	return p, nil
}

func (g *Guest) lookup(id, execID string) (*Process, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.find(id, execID)
}

// add creates a process with its streams.
func (g *Guest) add(id, execID string, spec *specs.Process, stdin, stdout, stderr string) error {
	if _, err := g.lookup(id, execID); err == nil {
		return status.Errorf(codes.AlreadyExists, "process %q of %q exists", execID, id)
	}
	g.mu.Lock()
	if d := g.direct[key(id, execID)]; d != nil {
		stdin, stdout, stderr = d.GetStdin(), d.GetStdout(), d.GetStderr()
	}
	g.mu.Unlock()
	p := &Process{ID: id, ExecID: execID, Spec: spec, done: make(chan struct{})}
	p.ctx, p.kill = context.WithCancel(context.Background())
	for _, s := range []struct {
		name string
		open func(string)
	}{
		{stdin, func(token string) { p.Stdin = g.hub.Input(token) }},
		{stdout, func(token string) { p.Stdout = g.hub.Output(token) }},
		{stderr, func(token string) { p.Stderr = g.hub.Output(token) }},
	} {
		if s.name == "" {
			continue
		}
		token, ok := strings.CutPrefix(s.name, protocol.StdioScheme)
		if strings.HasPrefix(s.name, protocol.VsockScheme) {
			continue // nobody connects
		}
		if !ok {
			return status.Errorf(codes.InvalidArgument, "%q is not for this guest", s.name)
		}
		s.open(token)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.procs[key(id, execID)] = p
	return nil
}

// end finishes a process: its output first.
func (g *Guest) end(p *Process, code uint32) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, o := range []*stdio.Output{p.Stdout, p.Stderr} {
		if o != nil {
			o.Close(ctx)
		}
	}
	if p.Stdin != nil {
		p.Stdin.Close()
	}
	g.mu.Lock()
	p.status = code
	g.mu.Unlock()
	close(p.done)
}

func isDone(p *Process) bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

type sandboxService Guest

func (s *sandboxService) PrepareContainer(ctx context.Context, r *protocol.PrepareContainerRequest) (*protocol.PrepareContainerResponse, error) {
	g := (*Guest)(s)
	if err := g.enter(ctx, "PrepareContainer", r.GetContainerId(), ""); err != nil {
		return nil, err
	}
	spec := &specs.Spec{}
	if err := json.Unmarshal(r.GetSpec(), spec); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.specs[r.GetContainerId()] != nil {
		return nil, status.Errorf(codes.AlreadyExists, "container %q exists", r.GetContainerId())
	}
	g.specs[r.GetContainerId()] = spec
	g.raw[r.GetContainerId()] = r.GetSpec()
	if r.GetDirect() != nil {
		g.direct[key(r.GetContainerId(), "")] = r.GetDirect()
	}
	return &protocol.PrepareContainerResponse{}, nil
}

func (s *sandboxService) PurgeContainer(ctx context.Context, r *protocol.PurgeContainerRequest) (*protocol.PurgeContainerResponse, error) {
	g := (*Guest)(s)
	if err := g.enter(ctx, "PurgeContainer", r.GetContainerId(), ""); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.specs, r.GetContainerId())
	for k := range g.direct {
		if strings.HasPrefix(k, key(r.GetContainerId(), "")) {
			delete(g.direct, k)
		}
	}
	for k, p := range g.procs {
		if p.ID == r.GetContainerId() {
			p.signal = 9
			p.kill()
			delete(g.procs, k)
		}
	}
	return &protocol.PurgeContainerResponse{}, nil
}

func (s *sandboxService) PrepareProcess(ctx context.Context, r *protocol.PrepareProcessRequest) (*protocol.PrepareProcessResponse, error) {
	g := (*Guest)(s)
	if err := g.enter(ctx, "PrepareProcess", r.GetContainerId(), r.GetExecId()); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.direct[key(r.GetContainerId(), "")] == nil {
		return nil, status.Errorf(codes.NotFound, "container %q is not direct", r.GetContainerId())
	}
	if g.procs[key(r.GetContainerId(), r.GetExecId())] != nil {
		return nil, status.Errorf(codes.AlreadyExists, "process %q of %q exists", r.GetExecId(), r.GetContainerId())
	}
	g.direct[key(r.GetContainerId(), r.GetExecId())] = r.GetDirect()
	return &protocol.PrepareProcessResponse{}, nil
}

func (s *sandboxService) PurgeProcess(ctx context.Context, r *protocol.PurgeProcessRequest) (*protocol.PurgeProcessResponse, error) {
	g := (*Guest)(s)
	if err := g.enter(ctx, "PurgeProcess", r.GetContainerId(), r.GetExecId()); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	k := key(r.GetContainerId(), r.GetExecId())
	if d := g.direct[k]; d != nil && g.procs[k] == nil {
		for _, name := range []string{d.GetStdout(), d.GetStderr()} {
			if token, ok := strings.CutPrefix(name, protocol.StdioScheme); ok {
				go func() {
					ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
					defer cancel()
					g.hub.Output(token).Close(ctx)
				}()
			}
		}
	}
	delete(g.direct, k)
	return &protocol.PurgeProcessResponse{}, nil
}

func (*sandboxService) Setup(context.Context, *protocol.SetupRequest) (*protocol.SetupResponse, error) {
	return &protocol.SetupResponse{}, nil
}

func (*sandboxService) UpdateNetwork(context.Context, *protocol.UpdateNetworkRequest) (*protocol.UpdateNetworkResponse, error) {
	return &protocol.UpdateNetworkResponse{}, nil
}

func (*sandboxService) SetClock(context.Context, *protocol.SetClockRequest) (*protocol.SetClockResponse, error) {
	return &protocol.SetClockResponse{}, nil
}

func (*sandboxService) Events(ctx context.Context, _ *protocol.EventsRequest, _ protocol.Sandbox_EventsServer) error {
	<-ctx.Done()
	return ctx.Err()
}

func (*sandboxService) PowerOff(context.Context, *protocol.PowerOffRequest) (*protocol.PowerOffResponse, error) {
	return &protocol.PowerOffResponse{}, nil
}

type taskService Guest

func (s *taskService) g() *Guest { return (*Guest)(s) }

func (s *taskService) Create(ctx context.Context, r *task.CreateTaskRequest) (*task.CreateTaskResponse, error) {
	g := s.g()
	if err := g.enter(ctx, "Create", r.GetID(), ""); err != nil {
		return nil, err
	}
	spec, _ := g.Spec(r.GetID())
	if spec == nil {
		return nil, status.Errorf(codes.FailedPrecondition, "container %q was not prepared", r.GetID())
	}
	return &task.CreateTaskResponse{Pid: 100}, g.add(r.GetID(), "", spec.Process, r.GetStdin(), r.GetStdout(), r.GetStderr())
}

func (s *taskService) Exec(ctx context.Context, r *task.ExecProcessRequest) (*emptypb.Empty, error) {
	g := s.g()
	if err := g.enter(ctx, "Exec", r.GetID(), r.GetExecID()); err != nil {
		return nil, err
	}
	if _, err := g.lookup(r.GetID(), ""); err != nil {
		return nil, err
	}
	process := &specs.Process{}
	if err := json.Unmarshal(r.GetSpec().GetValue(), process); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, g.add(r.GetID(), r.GetExecID(), process, r.GetStdin(), r.GetStdout(), r.GetStderr())
}

func (s *taskService) Start(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	g := s.g()
	if err := g.enter(ctx, "Start", r.GetID(), r.GetExecID()); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	p, err := g.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	if p.started {
		return nil, status.Errorf(codes.FailedPrecondition, "process %q of %q has been started", p.ExecID, p.ID)
	}
	program := g.Programs[p.Spec.Args[0]]
	if program == nil {
		return nil, status.Errorf(codes.Unknown, "exec: %q: executable file not found in $PATH", p.Spec.Args[0])
	}
	p.started = true
	go func() {
		code := program(p.ctx, p)
		g.mu.Lock()
		if p.signal != 0 {
			code = 128 + p.signal
		}
		g.mu.Unlock()
		g.end(p, code)
	}()
	return &task.StartResponse{Pid: 101}, nil
}

func (s *taskService) Wait(ctx context.Context, r *task.WaitRequest) (*task.WaitResponse, error) {
	g := s.g()
	if err := g.enter(ctx, "Wait", r.GetID(), r.GetExecID()); err != nil {
		return nil, err
	}
	p, err := g.lookup(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	answer := &task.WaitResponse{ExitStatus: p.status, ExitedAt: timestamppb.Now()}
	if g.Exited != nil {
		g.Exited(answer)
	}
	return answer, nil
}

func (s *taskService) Kill(ctx context.Context, r *task.KillRequest) (*emptypb.Empty, error) {
	g := s.g()
	if err := g.enter(ctx, "Kill", r.GetID(), r.GetExecID()); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	p, err := g.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	g.signals = append(g.signals, r.GetSignal())
	if r.GetSignal() != 0 {
		p.signal = r.GetSignal()
		p.kill()
		if !p.started {
			p.started = true
			go g.end(p, 128+r.GetSignal())
		}
	}
	return &emptypb.Empty{}, nil
}

func (s *taskService) Delete(ctx context.Context, r *task.DeleteRequest) (*task.DeleteResponse, error) {
	g := s.g()
	if err := g.enter(ctx, "Delete", r.GetID(), r.GetExecID()); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	p, err := g.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	p.kill()
	if !p.started {
		go g.end(p, 0)
	}
	delete(g.procs, key(r.GetID(), r.GetExecID()))
	return &task.DeleteResponse{ExitStatus: p.status}, nil
}

func (s *taskService) State(ctx context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	g := s.g()
	if err := g.enter(ctx, "State", r.GetID(), r.GetExecID()); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	p, err := g.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	a := &task.StateResponse{ID: p.ID, ExecID: p.ExecID, Status: tasktypes.Status_CREATED}
	switch {
	case isDone(p):
		a.Status = tasktypes.Status_STOPPED
	case p.paused:
		a.Status = tasktypes.Status_PAUSED
	case p.started:
		a.Status = tasktypes.Status_RUNNING
	}
	return a, nil
}

func (s *taskService) pause(ctx context.Context, method, id string, paused bool) (*emptypb.Empty, error) {
	g := s.g()
	if err := g.enter(ctx, method, id, ""); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	p, err := g.find(id, "")
	if err != nil {
		return nil, err
	}
	p.paused = paused
	return &emptypb.Empty{}, nil
}

func (s *taskService) Pause(ctx context.Context, r *task.PauseRequest) (*emptypb.Empty, error) {
	return s.pause(ctx, "Pause", r.GetID(), true)
}

func (s *taskService) Resume(ctx context.Context, r *task.ResumeRequest) (*emptypb.Empty, error) {
	return s.pause(ctx, "Resume", r.GetID(), false)
}

func (s *taskService) ResizePty(ctx context.Context, r *task.ResizePtyRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, s.g().enter(ctx, "ResizePty", r.GetID(), r.GetExecID())
}

func (s *taskService) Update(ctx context.Context, r *task.UpdateTaskRequest) (*emptypb.Empty, error) {
	g := s.g()
	if err := g.enter(ctx, "Update", r.GetID(), ""); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.updates = append(g.updates, r.GetResources().GetValue())
	return &emptypb.Empty{}, nil
}

func (s *taskService) Stats(ctx context.Context, r *task.StatsRequest) (*task.StatsResponse, error) {
	g := s.g()
	if err := g.enter(ctx, "Stats", r.GetID(), ""); err != nil {
		return nil, err
	}
	g.mu.Lock()
	stats := g.stats
	g.mu.Unlock()
	if stats == nil {
		return nil, errors.New("no statistics")
	}
	return stats(r.GetID())
}

func (s *taskService) unexpected(method string) error {
	return status.Errorf(codes.Unimplemented, "the host has no reason to call %s", method)
}

func (s *taskService) Pids(context.Context, *task.PidsRequest) (*task.PidsResponse, error) {
	return nil, s.unexpected("Pids")
}

func (s *taskService) Checkpoint(context.Context, *task.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, s.unexpected("Checkpoint")
}

func (s *taskService) CloseIO(context.Context, *task.CloseIORequest) (*emptypb.Empty, error) {
	return nil, s.unexpected("CloseIO")
}

func (s *taskService) Connect(context.Context, *task.ConnectRequest) (*task.ConnectResponse, error) {
	return nil, s.unexpected("Connect")
}

func (s *taskService) Shutdown(context.Context, *task.ShutdownRequest) (*emptypb.Empty, error) {
	return nil, s.unexpected("Shutdown")
}
