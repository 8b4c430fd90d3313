package controller

import (
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"kuasar.io/kuasar/sandboxer/pod"
)

// hangingPods are asked for what takes until the caller is gone, or until released.
type hangingPods struct {
	fakePods
	called   chan string
	released chan struct{}
}

func (p *hangingPods) hang(ctx context.Context, what string) error {
	p.called <- what
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-p.released:
		return nil
	}
}

func (p *hangingPods) Create(ctx context.Context, _ pod.CreateRequest) error {
	return p.hang(ctx, "Create")
}
func (p *hangingPods) Start(ctx context.Context, _ string) (pod.Status, error) {
	return pod.Status{ID: "a"}, p.hang(ctx, "Start")
}
func (p *hangingPods) Stop(ctx context.Context, _ string, _ time.Duration) error {
	return p.hang(ctx, "Stop")
}
func (p *hangingPods) Shutdown(ctx context.Context, _ string) error { return p.hang(ctx, "Shutdown") }
func (p *hangingPods) Wait(ctx context.Context, _ string) (pod.Status, error) {
	return pod.Status{ID: "a", ExitedAt: time.Unix(1, 0), ExitStatus: 7}, p.hang(ctx, "Wait")
}

// wire records what a client reads.
type wire struct {
	net.Conn
	mu   *sync.Mutex
	read *[]byte
}

func (w wire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	w.mu.Lock()
	*w.read = append(*w.read, p[:n]...)
	w.mu.Unlock()
	return n, err
}

// Types of HTTP/2 frames.
const (
	frameHeaders   = 1
	frameRSTStream = 3
	frameGoAway    = 7
)

// frameTypes counts the frames of a server by their types.
func frameTypes(t *testing.T, b []byte) map[byte]int {
	t.Helper()
	types := map[byte]int{}
	for len(b) >= 9 {
		n := int(binary.BigEndian.Uint32(append([]byte{0}, b[:3]...)))
		types[b[3]]++
		if len(b) < 9+n {
			t.Fatalf("a frame of type %d is torn", b[3])
		}
		b = b[9+n:]
	}
	if len(b) > 0 {
		t.Fatal("a frame's header is torn")
	}
	return types
}

// Whatever is under way when the daemon ends gets no answer: no status, no reset, no farewell, which
// clients take for more than a broken connection. This holds for Wait above all.
func TestCloseSaysNothing(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "ctl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	start := func(pods Pods) (stop func()) {
		_ = os.Remove(path)
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		s := NewServer(New(pods, slog.New(slog.NewTextHandler(io.Discard, nil))))
		served := make(chan error, 1)
		go func() { served <- s.Serve(l) }()
		return func() {
			s.Close()
			if err := <-served; err != nil {
				t.Error(err)
			}
		}
	}
	pods := &hangingPods{called: make(chan string), released: make(chan struct{})}
	stop := start(pods)

	var mu sync.Mutex
	var read []byte
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			c, err := net.Dial("unix", path)
			if err != nil {
				return nil, err
			}
			return wire{c, &mu, &read}, nil
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := sandboxapi.NewControllerClient(conn)
	ctx := t.Context()
	calls := map[string]func() error{
		"Create": func() error {
			_, err := c.Create(ctx, &sandboxapi.ControllerCreateRequest{SandboxID: "a", NetnsPath: "/n"})
			return err
		},
		"Start": func() error { _, err := c.Start(ctx, &sandboxapi.ControllerStartRequest{SandboxID: "a"}); return err },
		"Stop":  func() error { _, err := c.Stop(ctx, &sandboxapi.ControllerStopRequest{SandboxID: "a"}); return err },
		"Shutdown": func() error {
			_, err := c.Shutdown(ctx, &sandboxapi.ControllerShutdownRequest{SandboxID: "a"})
			return err
		},
		"Wait": func() error { _, err := c.Wait(ctx, &sandboxapi.ControllerWaitRequest{SandboxID: "a"}); return err },
	}
	type end struct {
		call string
		err  error
	}
	ends := make(chan end)
	for name, call := range calls {
		go func() { ends <- end{name, call()} }()
	}
	for range calls {
		<-pods.called
	}
	stop()
	for range calls {
		if e := <-ends; status.Code(e.err) != codes.Unavailable {
			t.Errorf("%s: %v", e.call, e.err)
		}
	}
	mu.Lock()
	types := frameTypes(t, read)
	mu.Unlock()
	if n := types[frameHeaders] + types[frameRSTStream] + types[frameGoAway]; n > 0 {
		t.Errorf("the server said something when it ended: frames by type %v", types)
	}

	// The client asks again, of the next daemon, and waits as before until the pod has ended.
	next := &hangingPods{called: make(chan string), released: make(chan struct{})}
	stop = start(next)
	defer stop()
	waited := make(chan end, 1)
	go func() {
		r, err := c.Wait(ctx, &sandboxapi.ControllerWaitRequest{SandboxID: "a"}, grpc.WaitForReady(true))
		if err == nil && r.GetExitStatus() != 7 {
			t.Errorf("wait: %v", r)
		}
		waited <- end{"Wait", err}
	}()
	if call := <-next.called; call != "Wait" {
		t.Fatalf("asked for %s", call)
	}
	select {
	case e := <-waited:
		t.Fatalf("Wait ended although the pod lives: %v", e.err)
	default:
	}
	close(next.released)
	if e := <-waited; e.err != nil {
		t.Error(e.err)
	}
}
