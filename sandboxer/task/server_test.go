package task

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	task2 "github.com/containerd/containerd/api/runtime/task/v2"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	streaming "github.com/containerd/containerd/api/services/streaming/v1"
	apitypes "github.com/containerd/containerd/api/types"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"kuasar.io/kuasar/sandboxer/container"
	"kuasar.io/kuasar/sandboxer/container/guesttest"
)

const patience = 20 * time.Second

type noStorage struct{}

func (noStorage) Rootfs(context.Context, string, []container.Mount) (string, error) {
	return "/run/kuasar/state/rootfs", nil
}
func (noStorage) Volume(context.Context, string, string, bool) (string, error) {
	return "/run/kuasar/state/vol", nil
}
func (noStorage) Release(string) error { return nil }

// pod is a server with its fakes.
type pod struct {
	t       testing.TB
	guest   *guesttest.Guest
	set     *container.Set
	server  *Server
	socket  string
	address string
}

func newPod(t testing.TB) *pod { return newPodOf(t, false) }

// newPodOf is newPod for a client that announces containers or does not.
func newPodOf(t testing.TB, announced bool) *pod {
	p := &pod{t: t, guest: guesttest.New(t), socket: filepath.Join(t.TempDir(), "t")}
	p.address = "ttrpc+unix://" + p.socket
	p.set = container.NewSet(container.Options{PodID: "pod", Guest: p.guest, Storage: noStorage{}, Announced: announced})
	p.server = NewServer(Options{Set: p.set, Address: p.address, PodID: "pod"})
	l, err := net.Listen("unix", p.socket)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- p.server.Serve(l) }()
	t.Cleanup(func() {
		p.set.GuestGone(time.Now())
		p.server.Close()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return p
}

func (p *pod) dial() *ttrpc.Client {
	p.t.Helper()
	return dial(p.t, p.socket)
}

func dial(t testing.TB, socket string) *ttrpc.Client {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	t.Cleanup(func() { client.Close() })
	return client
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func bundle(t testing.TB, args ...string) string {
	dir := t.TempDir()
	text, err := json.Marshal(specs.Spec{Process: &specs.Process{Args: args}, Root: &specs.Root{}, Linux: &specs.Linux{}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func createRequest(t testing.TB, id string, args ...string) *task.CreateTaskRequest {
	return &task.CreateTaskRequest{
		ID: id, Bundle: bundle(t, args...),
		Rootfs: []*apitypes.Mount{{Type: "overlay", Source: "overlay"}},
		// What containerd sends along, of a type that is not known here.
		Options: &anypb.Any{TypeUrl: "runtimeoptions.v1.Options", Value: []byte{1}},
	}
}

func process(t testing.TB, args ...string) *anypb.Any {
	text, err := json.Marshal(specs.Process{Args: args})
	if err != nil {
		t.Fatal(err)
	}
	return &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: text}
}

// must returns a function that unwraps a call's answer.
func must[A any](t testing.TB) func(A, error) A {
	return func(a A, err error) A {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
}

// TestContainerdOrder makes the calls of a container's life in containerd's order, over ttrpc.
func TestContainerdOrder(t *testing.T) {
	p := newPod(t)
	p.guest.AnswerStats(func(string) (*task.StatsResponse, error) {
		value, _ := proto.Marshal(&cgroup2.Metrics{})
		return &task.StatsResponse{Stats: &anypb.Any{TypeUrl: "io.containerd.cgroups.v2.Metrics", Value: value}}, nil
	})
	c := task.NewTTRPCTaskClient(p.dial())
	ctx := testContext(t)
	req := createRequest(t, "c1", "sleep")
	created := must[*task.CreateTaskResponse](t)(c.Create(ctx, req))
	must[*task.ConnectResponse](t)(c.Connect(ctx, &task.ConnectRequest{ID: "c1"}))
	waited := make(chan *task.WaitResponse, 1)
	go func() {
		w, _ := c.Wait(ctx, &task.WaitRequest{ID: "c1"})
		waited <- w
	}()
	if s := must[*task.StartResponse](t)(c.Start(ctx, &task.StartRequest{ID: "c1"})); s.Pid != created.Pid {
		t.Errorf("pid %d, was %d", s.Pid, created.Pid)
	}
	st := must[*task.StateResponse](t)(c.State(ctx, &task.StateRequest{ID: "c1"}))
	if st.Status != tasktypes.Status_RUNNING || st.ID != "c1" || st.Bundle != req.Bundle || st.ExitedAt != nil {
		t.Errorf("state %v", st)
	}
	if pids := must[*task.PidsResponse](t)(c.Pids(ctx, &task.PidsRequest{ID: "c1"})); len(pids.Processes) != 1 {
		t.Errorf("pids %v", pids)
	}

	must[*emptypb.Empty](t)(c.Exec(ctx, &task.ExecProcessRequest{ID: "c1", ExecID: "e1", Spec: process(t, "false")}))
	if st := must[*task.StateResponse](t)(c.State(ctx, &task.StateRequest{ID: "c1", ExecID: "e1"})); st.Status != tasktypes.Status_CREATED || st.ExecID != "e1" {
		t.Errorf("state of the exec: %v", st)
	}
	must[*task.StartResponse](t)(c.Start(ctx, &task.StartRequest{ID: "c1", ExecID: "e1"}))
	if w := must[*task.WaitResponse](t)(c.Wait(ctx, &task.WaitRequest{ID: "c1", ExecID: "e1"})); w.ExitStatus != 1 {
		t.Errorf("exit of the exec: %v", w)
	}
	must[*task.DeleteResponse](t)(c.Delete(ctx, &task.DeleteRequest{ID: "c1", ExecID: "e1"}))

	must[*emptypb.Empty](t)(c.Pause(ctx, &task.PauseRequest{ID: "c1"}))
	must[*emptypb.Empty](t)(c.Resume(ctx, &task.ResumeRequest{ID: "c1"}))
	must[*emptypb.Empty](t)(c.Update(ctx, &task.UpdateTaskRequest{ID: "c1", Resources: &anypb.Any{
		TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources", Value: []byte(`{"memory":{"limit":1}}`),
	}}))
	must[*emptypb.Empty](t)(c.Kill(ctx, &task.KillRequest{ID: "c1", Signal: 9}))
	w := <-waited
	if w.GetExitStatus() != 137 || w.GetExitedAt() == nil {
		t.Errorf("wait: %v", w)
	}
	stats := must[*task.StatsResponse](t)(c.Stats(ctx, &task.StatsRequest{ID: "c1"}))
	if stats.GetStats().GetTypeUrl() != "io.containerd.cgroups.v2.Metrics" {
		t.Errorf("stats of type %q", stats.GetStats().GetTypeUrl())
	}
	if _, err := c.Kill(ctx, &task.KillRequest{ID: "c1", Signal: 9, All: true}); status.Code(err) != codes.NotFound {
		t.Errorf("kill after the exit: %v", err)
	}
	if st := must[*task.StateResponse](t)(c.State(ctx, &task.StateRequest{ID: "c1"})); st.Status != tasktypes.Status_STOPPED || st.ExitStatus != 137 || st.ExitedAt == nil {
		t.Errorf("state after the exit: %v", st)
	}
	if d := must[*task.DeleteResponse](t)(c.Delete(ctx, &task.DeleteRequest{ID: "c1"})); d.ExitStatus != 137 {
		t.Errorf("delete: %v", d)
	}
	must[*emptypb.Empty](t)(c.Shutdown(ctx, &task.ShutdownRequest{ID: "c1", Now: true}))

	// The pod goes on.
	must[*task.CreateTaskResponse](t)(c.Create(ctx, createRequest(t, "c1", "true")))
}

// TestVersion2 speaks the older version of the API.
func TestVersion2(t *testing.T) {
	p := newPod(t)
	c := task2.NewTTRPCTaskClient(p.dial())
	ctx := testContext(t)
	req := createRequest(t, "c1", "true")
	must[*task2.CreateTaskResponse](t)(c.Create(ctx, &task2.CreateTaskRequest{ID: "c1", Bundle: req.Bundle, Rootfs: req.Rootfs}))
	if s := must[*task2.StartResponse](t)(c.Start(ctx, &task2.StartRequest{ID: "c1"})); s.Pid == 0 {
		t.Error("pid 0")
	}
	if w := must[*task2.WaitResponse](t)(c.Wait(ctx, &task2.WaitRequest{ID: "c1"})); w.ExitStatus != 0 {
		t.Errorf("%v", w)
	}
	must[*task2.DeleteResponse](t)(c.Delete(ctx, &task2.DeleteRequest{ID: "c1"}))
}

// TestMalformed sends what no client should: the error names the field.
func TestMalformed(t *testing.T) {
	p := newPod(t)
	service := NewService(p.set, p.address, slog.New(slog.DiscardHandler))
	long := strings.Repeat("x", 300)
	change := func(f func(*task.CreateTaskRequest)) proto.Message {
		r := createRequest(t, "c1", "true")
		f(r)
		return r
	}
	tests := []struct {
		name, method, text string
		request            proto.Message
		code               codes.Code
	}{
		{"empty id", "State", "id ", &task.StateRequest{}, codes.InvalidArgument},
		{"path as id", "Kill", "id ", &task.KillRequest{ID: "a/../b"}, codes.InvalidArgument},
		{"dots as id", "Start", "id ", &task.StartRequest{ID: ".."}, codes.InvalidArgument},
		{"long id", "Create", "id ", change(func(r *task.CreateTaskRequest) { r.ID = long }), codes.InvalidArgument},
		{"bad exec id", "Wait", "exec_id ", &task.WaitRequest{ID: "c1", ExecID: "a b"}, codes.InvalidArgument},
		{"no exec id", "Exec", "exec_id ", &task.ExecProcessRequest{ID: "c1", Spec: process(t, "x")}, codes.InvalidArgument},
		{"no process", "Exec", "spec", &task.ExecProcessRequest{ID: "c1", ExecID: "e"}, codes.InvalidArgument},
		{"wrong process", "Exec", "spec", &task.ExecProcessRequest{ID: "c1", ExecID: "e", Spec: &anypb.Any{TypeUrl: "a/Mount", Value: []byte("{}")}}, codes.InvalidArgument},
		{"no resources", "Update", "resources", &task.UpdateTaskRequest{ID: "c1"}, codes.InvalidArgument},
		{"relative bundle", "Create", "bundle", change(func(r *task.CreateTaskRequest) { r.Bundle = "b" }), codes.InvalidArgument},
		{"no rootfs", "Create", "rootfs", change(func(r *task.CreateTaskRequest) { r.Rootfs = nil }), codes.InvalidArgument},
		{"mount without type", "Create", "rootfs[0].type", change(func(r *task.CreateTaskRequest) { r.Rootfs[0].Type = "" }), codes.InvalidArgument},
		{"mount below the root", "Create", "rootfs[0].target", change(func(r *task.CreateTaskRequest) { r.Rootfs[0].Target = "/x" }), codes.Unimplemented},
		{"checkpoint", "Create", "checkpoint", change(func(r *task.CreateTaskRequest) { r.Checkpoint = "/x" }), codes.Unimplemented},
		{"stdout to a file", "Create", "stdout", change(func(r *task.CreateTaskRequest) { r.Stdout = "file:///x" }), codes.Unimplemented},
		{"stream elsewhere", "Create", "stdout", change(func(r *task.CreateTaskRequest) { r.Stdout = "ttrpc+unix:///other?streaming_id=x" }), codes.InvalidArgument},
		{"unknown container", "State", "nope", &task.StateRequest{ID: "nope"}, codes.NotFound},
		{"unknown for delete", "Delete", "nope", &task.DeleteRequest{ID: "nope"}, codes.NotFound},
		{"checkpointing", "Checkpoint", "checkpoint", &task.CheckpointTaskRequest{ID: "c1"}, codes.Unimplemented},
		{"no such method", "Fly", "Fly", &task.StateRequest{}, codes.Unimplemented},
	}
	for _, test := range tests {
		payload, err := proto.Marshal(test.request)
		if err != nil {
			t.Fatal(err)
		}
		_, err = service.Call(testContext(t), test.method, payload)
		if status.Code(err) != test.code || !strings.Contains(err.Error(), test.text) {
			t.Errorf("%s: %v", test.name, err)
		}
	}
	for method := range methods {
		if _, err := service.Call(testContext(t), method, []byte{0xff, 0xff}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s of garbage: %v", method, err)
		}
	}
	if p.set.Len() != 0 {
		t.Error("a container was made")
	}
}

// clientStream is a client's end of a standard stream.
type clientStream struct {
	t      testing.TB
	client *ttrpc.Client
	streaming.TTRPCStreaming_StreamClient
}

func (p *pod) open(id string) *clientStream {
	p.t.Helper()
	return openStream(testContext(p.t), p.t, p.socket, id)
}

func openStream(ctx context.Context, t testing.TB, socket, id string) *clientStream {
	t.Helper()
	s := &clientStream{t: t, client: dial(t, socket)}
	var err error
	s.TTRPCStreaming_StreamClient, err = streaming.NewTTRPCStreamingClient(s.client).Stream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	s.send(&streaming.StreamInit{ID: id})
	ack, err := s.Recv()
	if err != nil || ack.TypeUrl != "google.protobuf.Empty" {
		t.Fatalf("acknowledgement %v, %v", ack, err)
	}
	return s
}

func (s *clientStream) send(m proto.Message) {
	s.t.Helper()
	a, err := pack(m)
	if err == nil {
		err = s.Send(a)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// read collects output until the end or until it has max bytes, and tops the window up. At the end it
// closes the connection, as containerd does.
func (s *clientStream) read(max int) ([]byte, error) {
	var got []byte
	s.send(&transfer.WindowUpdate{Update: 65536})
	for len(got) < max {
		a, err := s.Recv()
		if err == io.EOF {
			s.client.Close()
			return got, nil
		}
		if err != nil {
			return got, err
		}
		d := &transfer.Data{}
		if err := unpack(a, d); err != nil {
			return got, err
		}
		if len(d.Data) > streamPiece {
			s.t.Errorf("a piece of %d bytes", len(d.Data))
		}
		got = append(got, d.Data...)
		s.send(&transfer.WindowUpdate{Update: int32(len(d.Data))})
	}
	return got, nil
}

// write sends input within the window.
func (s *clientStream) write(p []byte) {
	s.t.Helper()
	window := 0
	for len(p) > 0 {
		for window == 0 {
			a, err := s.Recv()
			if err != nil {
				s.t.Fatal(err)
			}
			w := &transfer.WindowUpdate{}
			if err := unpack(a, w); err != nil {
				s.t.Fatal(err)
			}
			window += int(w.Update)
		}
		n := min(len(p), window, 32<<10)
		s.send(&transfer.Data{Data: p[:n]})
		p, window = p[n:], window-n
	}
}

const everything = 1 << 30

func (p *pod) url(id string) string { return p.address + "?streaming_id=" + id }

func TestStreaming(t *testing.T) {
	p := newPod(t)
	c := task.NewTTRPCTaskClient(p.dial())
	ctx := testContext(t)
	want := bytes.Repeat([]byte("0123456789abcde\n"), 3<<20/16)
	p.guest.Programs["burst"] = func(_ context.Context, pr *guesttest.Process) uint32 {
		pr.Stdout.Write(want)
		pr.Stderr.Write([]byte("oops"))
		return 5
	}
	out, errs := p.open("c1-stdout"), p.open("c1-stderr")
	req := createRequest(t, "c1", "burst")
	req.Stdout, req.Stderr = p.url("c1-stdout"), p.url("c1-stderr")
	must[*task.CreateTaskResponse](t)(c.Create(ctx, req))
	must[*task.StartResponse](t)(c.Start(ctx, &task.StartRequest{ID: "c1"}))
	var wg sync.WaitGroup
	wg.Go(func() {
		if got, err := out.read(everything); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d of %d bytes, %v", len(got), len(want), err)
		}
	})
	wg.Go(func() {
		if got, err := errs.read(everything); err != nil || string(got) != "oops" {
			t.Errorf("%q, %v", got, err)
		}
	})
	if w := must[*task.WaitResponse](t)(c.Wait(ctx, &task.WaitRequest{ID: "c1"})); w.ExitStatus != 5 {
		t.Errorf("%v", w)
	}
	wg.Wait()
	if st := must[*task.StateResponse](t)(c.State(ctx, &task.StateRequest{ID: "c1"})); st.Stdout != req.Stdout {
		t.Errorf("stdout %q", st.Stdout)
	}
	// A client that has restarted opens the same ids, and learns that they are over.
	if got, err := p.open("c1-stdout").read(everything); err != nil || len(got) != 0 {
		t.Errorf("%q, %v", got, err)
	}
	must[*task.DeleteResponse](t)(c.Delete(ctx, &task.DeleteRequest{ID: "c1"}))
}

// TestStreamingExecInput sends input, its end, and drops the connection at once.
func TestStreamingExecInput(t *testing.T) {
	p := newPod(t)
	c := task.NewTTRPCTaskClient(p.dial())
	ctx := testContext(t)
	must[*task.CreateTaskResponse](t)(c.Create(ctx, createRequest(t, "c1", "sleep")))
	must[*task.StartResponse](t)(c.Start(ctx, &task.StartRequest{ID: "c1"}))
	want := bytes.Repeat([]byte("0123456789abcde\n"), 300<<10/16)
	for range 10 {
		in, out := p.open("e1-stdin"), p.open("e1-stdout")
		must[*emptypb.Empty](t)(c.Exec(ctx, &task.ExecProcessRequest{
			ID: "c1", ExecID: "e1", Spec: process(t, "cat"), Stdin: p.url("e1-stdin"), Stdout: p.url("e1-stdout"),
		}))
		must[*task.StartResponse](t)(c.Start(ctx, &task.StartRequest{ID: "c1", ExecID: "e1"}))
		read := make(chan []byte, 1)
		go func() {
			got, _ := out.read(everything)
			read <- got
		}()
		in.write(want)
		in.CloseSend()
		in.client.Close()
		must[*emptypb.Empty](t)(c.CloseIO(ctx, &task.CloseIORequest{ID: "c1", ExecID: "e1", Stdin: true}))
		if w := must[*task.WaitResponse](t)(c.Wait(ctx, &task.WaitRequest{ID: "c1", ExecID: "e1"})); w.ExitStatus != 0 {
			t.Errorf("%v", w)
		}
		if got := <-read; !bytes.Equal(got, want) {
			t.Errorf("%d of %d bytes came back", len(got), len(want))
		}
		must[*task.DeleteResponse](t)(c.Delete(ctx, &task.DeleteRequest{ID: "c1", ExecID: "e1"}))
	}
}

// TestStreamingRestart cuts all connections of a client, as its restart does: the container runs
// on, its input does not end, and output goes on where it was.
func TestStreamingRestart(t *testing.T) {
	p := newPod(t)
	ctx := testContext(t)
	c := task.NewTTRPCTaskClient(p.dial())
	in, out := p.open("in"), p.open("out")
	req := createRequest(t, "c1", "cat")
	req.Stdin, req.Stdout = p.url("in"), p.url("out")
	must[*task.CreateTaskResponse](t)(c.Create(ctx, req))
	must[*task.StartResponse](t)(c.Start(ctx, &task.StartRequest{ID: "c1"}))
	in.write([]byte("one"))
	if got, err := out.read(3); string(got) != "one" || err != nil {
		t.Fatalf("%q, %v", got, err)
	}
	in.client.Close()
	out.client.Close()

	in, out = p.open("in"), p.open("out")
	if st := must[*task.StateResponse](t)(c.State(ctx, &task.StateRequest{ID: "c1"})); st.Status != tasktypes.Status_RUNNING {
		t.Errorf("state %v", st)
	}
	in.write([]byte("two"))
	if got, err := out.read(3); string(got) != "two" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	in.CloseSend()
	if got, err := out.read(everything); len(got) != 0 || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if w := must[*task.WaitResponse](t)(c.Wait(ctx, &task.WaitRequest{ID: "c1"})); w.ExitStatus != 0 {
		t.Errorf("%v", w)
	}
}

// TestStreamTakeover opens an id twice: the newer connection wins.
func TestStreamTakeover(t *testing.T) {
	p := newPod(t)
	old := p.open("x")
	p.open("x")
	if _, err := old.Recv(); status.Code(err) != codes.Aborted {
		t.Errorf("the older connection: %v", err)
	}
}

func TestMalformedStream(t *testing.T) {
	p := newPod(t)
	open := func(first proto.Message) error {
		s, err := streaming.NewTTRPCStreamingClient(p.dial()).Stream(testContext(t))
		if err != nil {
			return err
		}
		a, err := pack(first)
		if err == nil {
			err = s.Send(a)
		}
		if err == nil {
			_, err = s.Recv()
		}
		return err
	}
	for name, first := range map[string]proto.Message{
		"type":    &transfer.Data{},
		"no id":   &streaming.StreamInit{},
		"long id": &streaming.StreamInit{ID: strings.Repeat("x", 600)},
	} {
		if err := open(first); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestClose ends connections with calls under way.
func TestClose(t *testing.T) {
	p := newPod(t)
	c := task.NewTTRPCTaskClient(p.dial())
	must[*task.CreateTaskResponse](t)(c.Create(testContext(t), createRequest(t, "c1", "sleep")))
	waited := make(chan error, 1)
	go func() {
		_, err := c.Wait(testContext(t), &task.WaitRequest{ID: "c1"})
		waited <- err
	}()
	c.State(testContext(t), &task.StateRequest{ID: "c1"})
	p.server.Close()
	if err := <-waited; err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("wait: %v", err)
	}
	if _, err := net.Dial("unix", p.socket); err == nil {
		t.Error("the server still accepts")
	}
}

// TestStreamingSlowReader closes the input long before the process has read it.
func TestStreamingSlowReader(t *testing.T) {
	p := newPod(t)
	c := task.NewTTRPCTaskClient(p.dial())
	ctx := testContext(t)
	closed := make(chan struct{})
	var got []byte
	p.guest.Programs["slow"] = func(_ context.Context, pr *guesttest.Process) uint32 {
		<-closed
		got, _ = io.ReadAll(pr.Stdin)
		return 0
	}
	in := p.open("in")
	req := createRequest(t, "c1", "slow")
	req.Stdin = p.url("in")
	must[*task.CreateTaskResponse](t)(c.Create(ctx, req))
	must[*task.StartResponse](t)(c.Start(ctx, &task.StartRequest{ID: "c1"}))
	want := bytes.Repeat([]byte("0123456789abcde\n"), 160<<10/16)
	in.write(want)
	in.CloseSend()
	in.client.Close()
	must[*emptypb.Empty](t)(c.CloseIO(ctx, &task.CloseIORequest{ID: "c1", Stdin: true}))
	close(closed)
	must[*task.WaitResponse](t)(c.Wait(ctx, &task.WaitRequest{ID: "c1"}))
	if !bytes.Equal(got, want) {
		t.Errorf("%d of %d bytes", len(got), len(want))
	}
}
