package controller

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	cgroups "github.com/containerd/cgroups/v3/cgroup1/stats"
	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	containerdtypes "github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/sandboxer/pod"
)

// fakePods answers with what the test wants and remembers what it was asked.
type fakePods struct {
	created pod.CreateRequest
	grace   time.Duration
	status  pod.Status
	err     error
	panics  bool
	waiting chan struct{} // if set, Wait announces itself and waits for its context
	metrics proto.Message
}

func (f *fakePods) Create(_ context.Context, r pod.CreateRequest) error {
	if f.panics {
		panic("a defect")
	}
	f.created = r
	return f.err
}
func (f *fakePods) Start(context.Context, string) (pod.Status, error) { return f.status, f.err }
func (f *fakePods) Stop(_ context.Context, _ string, grace time.Duration) error {
	f.grace = grace
	return f.err
}
func (f *fakePods) Shutdown(context.Context, string) error { return f.err }
func (f *fakePods) Status(string) (pod.Status, error)      { return f.status, f.err }
func (f *fakePods) Metrics(string) (proto.Message, error)  { return f.metrics, f.err }
func (f *fakePods) Wait(ctx context.Context, _ string) (pod.Status, error) {
	if f.waiting != nil {
		close(f.waiting)
		<-ctx.Done()
		return pod.Status{}, ctx.Err()
	}
	return f.status, f.err
}

func serve(t *testing.T, pods Pods) (*grpc.ClientConn, *Server, *bytes.Buffer) {
	dir, err := os.MkdirTemp("/tmp", "ctl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	s := NewServer(New(pods, slog.New(slog.NewTextHandler(&log, nil))))
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn, s, &log
}

func podOptions(t *testing.T, c *cri.PodSandboxConfig) *anypb.Any {
	b, err := proto.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return &anypb.Any{TypeUrl: "runtime.v1.PodSandboxConfig", Value: b}
}

func TestContainerdCalls(t *testing.T) {
	born := time.Unix(1700000000, 5)
	pods := &fakePods{status: pod.Status{
		ID: "a", State: pod.Ready, PID: 42, CreatedAt: born, Address: "ttrpc+unix:///x/task.sock", Version: 3,
		Hypervisor: "QEMU 7.2", NetNS: "/run/netns/a", Config: json.RawMessage(`{"hostname":"box"}`),
		Stages: []pod.StageTime{{Stage: "network", Duration: 2 * time.Millisecond}},
	}}
	conn, _, _ := serve(t, pods)
	c := sandboxapi.NewControllerClient(conn)
	ctx := t.Context()

	metadata := &anypb.Any{TypeUrl: "github.com/containerd/cri/pkg/store/sandbox/Metadata",
		Value: []byte(`{"Version":"v1","Metadata":{"ID":"a","CNIResult":{"Interfaces":{}}}}`)}
	created, err := c.Create(ctx, &sandboxapi.ControllerCreateRequest{
		SandboxID: "a", NetnsPath: "/run/netns/a", Sandboxer: "vmm",
		Options: podOptions(t, &cri.PodSandboxConfig{Hostname: "box"}),
		Sandbox: &containerdtypes.Sandbox{Extensions: map[string]*anypb.Any{"metadata": metadata}},
	})
	if err != nil || created.SandboxID != "a" {
		t.Fatalf("create: %v, %v", created, err)
	}
	if r := pods.created; r.ID != "a" || r.NetNS != "/run/netns/a" || r.Config.GetHostname() != "box" || string(r.CNI) != `{"Interfaces":{}}` {
		t.Errorf("created %+v", r)
	}
	started, err := c.Start(ctx, &sandboxapi.ControllerStartRequest{SandboxID: "a"})
	if err != nil || started.SandboxID != "a" || started.Pid != 42 || started.Version != 3 ||
		started.Address != "ttrpc+unix:///x/task.sock" || !started.CreatedAt.AsTime().Equal(born) {
		t.Errorf("start: %v, %v", started, err)
	}
	st, err := c.Status(ctx, &sandboxapi.ControllerStatusRequest{SandboxID: "a"})
	if err != nil || st.State != "SANDBOX_READY" || st.Address != started.Address || st.Version != 3 || len(st.Info) != 0 || st.ExitedAt != nil {
		t.Errorf("status: %v, %v", st, err)
	}
	st, err = c.Status(ctx, &sandboxapi.ControllerStatusRequest{SandboxID: "a", Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var known struct {
		PID    int
		Config struct{ Hostname string }
	}
	if err := json.Unmarshal([]byte(st.Info["info"]), &known); err != nil || known.PID != 42 || known.Config.Hostname != "box" {
		t.Errorf("info %q: %v", st.Info["info"], err)
	}
	if own := st.Info["kuasar"]; !strings.Contains(own, `"network":"2ms"`) || !json.Valid([]byte(own)) {
		t.Errorf("info %q", own)
	}
	for _, s := range []pod.State{pod.Created, pod.Starting, pod.Stopping, pod.Stopped} {
		pods.status.State = s
		if st, err := c.Status(ctx, &sandboxapi.ControllerStatusRequest{SandboxID: "a"}); err != nil || st.State != "SANDBOX_NOTREADY" {
			t.Errorf("%s: %v, %v", s, st, err)
		}
	}
	if _, err := c.Stop(ctx, &sandboxapi.ControllerStopRequest{SandboxID: "a", TimeoutSecs: 10}); err != nil || pods.grace != 10*time.Second {
		t.Errorf("stop: %v, grace %v", err, pods.grace)
	}
	if _, err := c.Shutdown(ctx, &sandboxapi.ControllerShutdownRequest{SandboxID: "a"}); err != nil {
		t.Error(err)
	}
	p, err := c.Platform(ctx, &sandboxapi.ControllerPlatformRequest{})
	if err != nil || p.Platform.GetOS() != "linux" || p.Platform.GetArchitecture() == "" {
		t.Errorf("platform: %v, %v", p, err)
	}
	if _, err := c.Update(ctx, &sandboxapi.ControllerUpdateRequest{SandboxID: "a", Fields: []string{"extensions"}}); err != nil {
		t.Error(err)
	}
	pods.status.ExitStatus, pods.status.ExitedAt = 137, born
	w, err := c.Wait(ctx, &sandboxapi.ControllerWaitRequest{SandboxID: "a"})
	if err != nil || w.ExitStatus != 137 || !w.ExitedAt.AsTime().Equal(born) {
		t.Errorf("wait: %v, %v", w, err)
	}
	pods.metrics = &cgroups.Metrics{Pids: &cgroups.PidsStat{Current: 7}}
	m, err := c.Metrics(ctx, &sandboxapi.ControllerMetricsRequest{SandboxID: "a"})
	if err != nil {
		t.Fatal(err)
	}
	var got cgroups.Metrics
	if err := proto.Unmarshal(m.Metrics.GetData().GetValue(), &got); err != nil || got.Pids.GetCurrent() != 7 ||
		m.Metrics.GetData().GetTypeUrl() != "io.containerd.cgroups.v1.Metrics" || m.Metrics.GetID() != "a" {
		t.Errorf("metrics: %v, %v", m, err)
	}
}

func TestErrorsKeepTheirClassAndText(t *testing.T) {
	pods := &fakePods{}
	conn, _, _ := serve(t, pods)
	c := sandboxapi.NewControllerClient(conn)
	for _, tc := range []struct {
		err  error
		want codes.Code
	}{
		{fmt.Errorf("pod a exists: %w", errdefs.ErrAlreadyExists), codes.AlreadyExists},
		{fmt.Errorf("no pod: %w", errdefs.ErrNotFound), codes.NotFound},
		{fmt.Errorf("hostNetwork: %w", errdefs.ErrFailedPrecondition), codes.FailedPrecondition},
		{fmt.Errorf("id: %w", errdefs.ErrInvalidArgument), codes.InvalidArgument},
		{fmt.Errorf("late: %w", context.DeadlineExceeded), codes.DeadlineExceeded},
		{&pod.BootError{Stage: "state directory", Err: &os.PathError{Op: "mkdir", Path: "/x", Err: syscall.ENOSPC}}, codes.ResourceExhausted},
		{&pod.BootError{Stage: "agent hello", Err: errors.New("no answer within 7s"), Console: []string{"Kernel panic"}}, codes.Internal},
	} {
		pods.err = tc.err
		_, err := c.Start(t.Context(), &sandboxapi.ControllerStartRequest{SandboxID: "a"})
		if status.Code(err) != tc.want || status.Convert(err).Message() != tc.err.Error() {
			t.Errorf("%v crossed as %v", tc.err, err)
		}
	}
	pods.err = errors.New(strings.Repeat("é", 1<<20))
	_, err := c.Start(t.Context(), &sandboxapi.ControllerStartRequest{SandboxID: "a"})
	if n := len(status.Convert(err).Message()); status.Code(err) != codes.Internal || n > maxMessage+4 {
		t.Errorf("a long error crossed as %v with %d bytes", status.Code(err), n)
	}
}

// raw sends bytes as they are.
func raw(t *testing.T, conn *grpc.ClientConn, method string, b []byte, o ...grpc.CallOption) error {
	var reply []byte
	return conn.Invoke(t.Context(), "/"+serviceName+"/"+method, b, &reply, append(o, grpc.ForceCodecV2(rawCodec{}))...)
}

func TestBadRequests(t *testing.T) {
	pods := &fakePods{}
	conn, _, _ := serve(t, pods)
	c := sandboxapi.NewControllerClient(conn)
	ctx := t.Context()
	check := func(name string, err error, code codes.Code, text string) {
		t.Helper()
		if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), text) {
			t.Errorf("%s: %v, want %v with %q", name, err, code, text)
		}
	}
	for _, m := range methods {
		check("malformed "+string(m), raw(t, conn, string(m), []byte{0x0a, 0xff}), codes.InvalidArgument, "Controller"+string(m)+"Request")
		if m != platform {
			want := "sandbox_id is empty"
			if m == prepare || m == purge || m == updateResources {
				want = "container_id"
			}
			check("no id in "+string(m), raw(t, conn, string(m), nil), codes.InvalidArgument, want)
		}
	}
	check("unknown method", raw(t, conn, "Resize", nil), codes.Unimplemented, "Resize")
	_, err := c.Create(ctx, &sandboxapi.ControllerCreateRequest{SandboxID: "a", Options: &anypb.Any{TypeUrl: "runtime.v1.PodSandboxConfig", Value: []byte{0x0a, 0xff}}})
	check("malformed options", err, codes.InvalidArgument, "options")
	_, err = c.Create(ctx, &sandboxapi.ControllerCreateRequest{SandboxID: "a", Options: &anypb.Any{TypeUrl: "some.Thing"}})
	check("other options", err, codes.InvalidArgument, "some.Thing")
	// Both spellings of the type's url, none, and metadata that cannot be understood, are fine.
	for _, url := range []string{"", "runtime.v1.PodSandboxConfig", "type.googleapis.com/runtime.v1.PodSandboxConfig"} {
		_, err := c.Create(ctx, &sandboxapi.ControllerCreateRequest{SandboxID: "a", Options: &anypb.Any{TypeUrl: url},
			Sandbox: &containerdtypes.Sandbox{Extensions: map[string]*anypb.Any{"metadata": {Value: []byte("{")}}}})
		if err != nil || pods.created.Config == nil || pods.created.CNI != nil {
			t.Errorf("url %q: %v", url, err)
		}
	}
	// 16 MiB arrive; more is refused with both sizes.
	big := &sandboxapi.ControllerCreateRequest{SandboxID: "a", Options: podOptions(t, &cri.PodSandboxConfig{
		Annotations: map[string]string{"k": strings.Repeat("x", 16<<20)}})}
	if _, err := c.Create(ctx, big); err != nil || len(pods.created.Config.Annotations["k"]) != 16<<20 {
		t.Errorf("16 MiB: %v", err)
	}
	big.NetnsPath = strings.Repeat("x", 1<<20)
	_, err = c.Create(ctx, big)
	check("17 MiB", err, codes.ResourceExhausted, "larger than max")
	// The server goes on.
	if _, err := c.Platform(ctx, &sandboxapi.ControllerPlatformRequest{SandboxID: "a"}); err != nil {
		t.Error(err)
	}
}

func TestPanicEndsOneCall(t *testing.T) {
	pods := &fakePods{panics: true}
	conn, _, log := serve(t, pods)
	c := sandboxapi.NewControllerClient(conn)
	_, err := c.Create(t.Context(), &sandboxapi.ControllerCreateRequest{SandboxID: "a"})
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "goroutine") {
		t.Errorf("error %v", err)
	}
	if !strings.Contains(log.String(), "fakePods") {
		t.Errorf("the log has no stack: %s", log)
	}
	if _, err := c.Platform(t.Context(), &sandboxapi.ControllerPlatformRequest{}); err != nil {
		t.Error(err)
	}
}

// A Wait that is pending when the daemon ends must see a broken connection: any answer would say
// that the pod is gone.
func TestCloseDropsWait(t *testing.T) {
	pods := &fakePods{waiting: make(chan struct{})}
	conn, s, _ := serve(t, pods)
	c := sandboxapi.NewControllerClient(conn)
	waited := make(chan error, 1)
	go func() {
		_, err := c.Wait(context.Background(), &sandboxapi.ControllerWaitRequest{SandboxID: "a"})
		waited <- err
	}()
	<-pods.waiting
	s.Close()
	if err := <-waited; status.Code(err) != codes.Unavailable {
		t.Errorf("wait: %v", err)
	}
}
