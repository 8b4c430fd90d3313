package isulad

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// fake is a sandboxer with a guest, over real gRPC and ttrpc. It writes down what it is asked.
type fake struct {
	t      *testing.T
	dir    string
	server *grpc.Server
	guest  *ttrpc.Server

	mu       sync.Mutex
	conns    []net.Conn // of the guest
	log      []string   // methods in order, those of the task service with their ids
	requests map[string][][]byte
	metadata map[string]metadata.MD
	deadline bool          // whether any call had one
	hold     func()        // is called within Platform
	hang     chan struct{} // if set, the end of an exec is told only once it is closed
	dials    int           // connections to the task service
	fail     map[string]error
	state    string
	execs    map[string]*taskapi.ExecProcessRequest
	ended    map[string]chan uint32
	dead     map[string]bool
	address  string

	waits chan chan error // each Wait as it comes: what it is to answer
}

func newFake(t *testing.T, address string) *fake {
	f := &fake{
		t: t, dir: t.TempDir(), address: address, state: "SANDBOX_READY",
		requests: make(map[string][][]byte), metadata: make(map[string]metadata.MD), fail: make(map[string]error),
		execs: make(map[string]*taskapi.ExecProcessRequest), ended: make(map[string]chan uint32),
		dead: make(map[string]bool), waits: make(chan chan error, 16),
	}
	f.serve()
	t.Cleanup(func() { f.server.Stop() })
	guest, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	f.guest = guest
	taskapi.RegisterTTRPCTaskService(guest, &fakeGuest{f: f})
	l, err := net.Listen("unix", filepath.Join(f.dir, "task"))
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		if err := guest.Serve(context.Background(), trackingListener{l, f}); !errors.Is(err, ttrpc.ErrServerClosed) {
			t.Error("the task service ends:", err)
		}
	}()
	t.Cleanup(func() { guest.Close() })
	return f
}

// die ends the guest with all connections, as the end of a virtual machine does. The server's Close
// alone leaves those with calls under way open.
func (f *fake) die() {
	f.guest.Close()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, conn := range f.conns {
		conn.Close()
	}
}

// trackingListener remembers the connections of a fake's guest.
type trackingListener struct {
	net.Listener
	f *fake
}

func (l trackingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil {
		l.f.mu.Lock()
		l.f.conns = append(l.f.conns, conn)
		l.f.mu.Unlock()
	}
	return conn, err
}

func (f *fake) socket() string { return filepath.Join(f.dir, "sandboxer") }

func (f *fake) serve() {
	l, err := net.Listen("unix", f.socket())
	if err != nil {
		f.t.Fatal(err)
	}
	f.server = grpc.NewServer(grpc.ForceServerCodec(rawCodec{}), grpc.UnknownServiceHandler(f.handle))
	go f.server.Serve(l)
}

func (f *fake) handle(_ any, stream grpc.ServerStream) error {
	full, _ := grpc.MethodFromServerStream(stream)
	method, ok := strings.CutPrefix(full, service)
	if !ok {
		return status.Errorf(codes.Unimplemented, "no %s", full)
	}
	var in, out []byte
	if err := stream.RecvMsg(&in); err != nil {
		return err
	}
	md, _ := metadata.FromIncomingContext(stream.Context())
	_, deadline := stream.Context().Deadline()
	f.mu.Lock()
	f.log = append(f.log, method)
	f.requests[method] = append(f.requests[method], in)
	f.metadata[method] = md
	f.deadline = f.deadline || deadline
	err := f.fail[method]
	state, hold := f.state, f.hold
	f.mu.Unlock()
	if method == "Platform" && hold != nil {
		hold()
	}
	if err != nil {
		return err
	}
	genA := in[1] == 3 && string(in[2:5]) == "vmm"
	switch method {
	case "Start":
		out = message(nil).text(1, "p").number(2, 42).time(3, time.Unix(100, 5)).text(5, f.address)
	case "Status":
		out = message(nil).text(1, "p").number(2, 42).text(3, state)
		if genA {
			out = message(out).text(4, f.address)
		} else {
			out = message(out).text(8, f.address)
		}
	case "Wait":
		answer := make(chan error, 1)
		f.waits <- answer
		select {
		case err := <-answer:
			if err != nil {
				return err
			}
		case <-stream.Context().Done():
			return status.Error(codes.Unavailable, "going")
		}
		out = message(nil).number(1, 9).time(2, time.Unix(200, 0))
	}
	return stream.SendMsg(&out)
}

func (f *fake) note(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = append(f.log, fmt.Sprintf(format, args...))
}

func (f *fake) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	log := f.log
	f.log = nil
	return slices.DeleteFunc(log, func(s string) bool { return s == "Wait" })
}

// peek is take without the taking.
func (f *fake) peek() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.log)
}

func (f *fake) last(method string) []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := f.requests[method]
	if len(all) == 0 {
		return nil
	}
	return all[len(all)-1]
}

// end returns the channel that ends a process when it is given an exit status.
func (f *fake) end(id string) chan uint32 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended[id] == nil {
		f.ended[id] = make(chan uint32, 1)
	}
	return f.ended[id]
}

// dial stands in for AF_VSOCK: port 1024 is the task service, others are the listeners of execs.
func (f *fake) dial(cid, port uint32) (net.Conn, error) {
	if cid != 7 {
		return nil, fmt.Errorf("there is no guest %d", cid)
	}
	name := fmt.Sprint(port)
	if port == 1024 {
		name = "task"
		f.mu.Lock()
		f.dials++
		f.mu.Unlock()
	}
	return net.Dial("unix", filepath.Join(f.dir, name))
}

type fakeGuest struct {
	taskapi.TTRPCTaskService // the methods that iSulad never calls panic
	f                        *fake
}

func (g *fakeGuest) check(ctx context.Context) {
	if _, ok := ctx.Deadline(); ok {
		g.f.mu.Lock()
		g.f.deadline = true
		g.f.mu.Unlock()
	}
}

func (g *fakeGuest) Create(ctx context.Context, r *taskapi.CreateTaskRequest) (*taskapi.CreateTaskResponse, error) {
	g.check(ctx)
	g.f.note("create %s %s %q", r.ID, r.Bundle, r.Stdin+r.Stdout+r.Stderr)
	g.f.mu.Lock()
	defer g.f.mu.Unlock()
	return &taskapi.CreateTaskResponse{Pid: 1}, g.f.fail["create"]
}

func (g *fakeGuest) Start(ctx context.Context, r *taskapi.StartRequest) (*taskapi.StartResponse, error) {
	g.check(ctx)
	if r.ExecID == "" {
		g.f.note("start %s", r.ID)
		return &taskapi.StartResponse{Pid: 10}, nil
	}
	g.f.note("start exec")
	g.f.mu.Lock()
	e := g.f.execs[r.ExecID]
	g.f.mu.Unlock()
	// iSulad connects to one port after the other, in this order.
	stdin := g.open(e.Stdin, os.O_RDONLY)
	out := g.open(e.Stdout, os.O_WRONLY)
	errs := g.open(e.Stderr, os.O_WRONLY)
	if stdin != nil {
		b := make([]byte, 5)
		n, _ := stdin.Read(b)
		out.Write(b[:n])
		stdin.Close()
	}
	for s, text := range map[stream]string{out: "out", errs: "err"} {
		if s != nil {
			s.Write([]byte(text))
		}
	}
	// All is written before either is closed.
	for _, s := range []stream{out, errs} {
		if s != nil {
			s.Close()
		}
	}
	g.f.end(r.ExecID) <- 7
	return &taskapi.StartResponse{Pid: 11}, nil
}

type stream interface {
	Read([]byte) (int, error)
	Write([]byte) (int, error)
	Close() error
}

func (g *fakeGuest) open(name string, flags int) stream {
	if name == "" {
		return nil
	}
	if port, ok := strings.CutPrefix(name, "vsock://7:"); ok {
		l, err := net.Listen("unix", filepath.Join(g.f.dir, port))
		if err != nil {
			g.f.t.Error(err)
			return nil
		}
		defer l.Close()
		conn, err := l.Accept()
		if err != nil {
			g.f.t.Error(err)
			return nil
		}
		return conn
	}
	// iSulad's side is open: this neither blocks nor fails.
	file, err := os.OpenFile(name, flags|unix.O_NONBLOCK, 0)
	if err != nil {
		g.f.t.Error(err)
		return nil
	}
	return file
}

func (g *fakeGuest) Exec(ctx context.Context, r *taskapi.ExecProcessRequest) (*emptypb.Empty, error) {
	g.check(ctx)
	g.f.note("exec %s %s", r.ID, r.Spec.GetTypeUrl())
	g.f.mu.Lock()
	defer g.f.mu.Unlock()
	g.f.execs[r.ExecID] = r
	return &emptypb.Empty{}, g.f.fail["exec"]
}

func (g *fakeGuest) Wait(ctx context.Context, r *taskapi.WaitRequest) (*taskapi.WaitResponse, error) {
	g.check(ctx)
	g.f.mu.Lock()
	hang := g.f.hang
	g.f.mu.Unlock()
	if hang != nil && r.ExecID != "" {
		<-hang
	}
	select {
	case code := <-g.f.end(cmp.Or(r.ExecID, r.ID)):
		g.f.mu.Lock()
		g.f.dead[r.ID] = g.f.dead[r.ID] || r.ExecID == ""
		g.f.mu.Unlock()
		return &taskapi.WaitResponse{ExitStatus: code}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (g *fakeGuest) Kill(ctx context.Context, r *taskapi.KillRequest) (*emptypb.Empty, error) {
	g.check(ctx)
	g.f.note("kill %s %d", r.ID, r.Signal)
	if r.ExecID != "" || r.All {
		g.f.t.Error("Kill names an exec or all")
	}
	g.f.mu.Lock()
	dead := g.f.dead[r.ID]
	g.f.mu.Unlock()
	if dead {
		return nil, status.Error(codes.NotFound, "it has exited")
	}
	if r.Signal == 15 {
		g.f.end(r.ID) <- 143
	}
	return &emptypb.Empty{}, nil
}

func (g *fakeGuest) Delete(ctx context.Context, r *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	g.f.note("delete %s%s", r.ID, r.ExecID)
	return &taskapi.DeleteResponse{}, nil
}

func (g *fakeGuest) Shutdown(ctx context.Context, r *taskapi.ShutdownRequest) (*emptypb.Empty, error) {
	g.f.note("shutdown %s", r.ID)
	return &emptypb.Empty{}, nil
}

func (g *fakeGuest) State(ctx context.Context, r *taskapi.StateRequest) (*taskapi.StateResponse, error) {
	g.f.note("state %s", r.ID)
	g.f.mu.Lock()
	defer g.f.mu.Unlock()
	return &taskapi.StateResponse{Pid: 10}, g.f.fail["state"]
}

func (g *fakeGuest) ResizePty(ctx context.Context, r *taskapi.ResizePtyRequest) (*emptypb.Empty, error) {
	g.check(ctx)
	g.f.note("resize %dx%d", r.Width, r.Height)
	return &emptypb.Empty{}, nil
}

var errTest = status.Error(codes.Internal, "no")
