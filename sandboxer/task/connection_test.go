package task

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"kuasar.io/kuasar/sandboxer/container"
	"kuasar.io/kuasar/sandboxer/handover"
	"kuasar.io/kuasar/sandboxer/handover/handovertest"
)

// connections is how many the server has.
func (s *Server) connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// fake is a backend made of functions.
type fake struct {
	call   func(ctx context.Context, method string, payload []byte) ([]byte, error)
	stream func(ctx context.Context, id string, stream container.ClientStream) error
}

func (f fake) Call(ctx context.Context, method string, payload []byte) ([]byte, error) {
	return f.call(ctx, method, payload)
}

func (f fake) ServeStream(ctx context.Context, id string, stream container.ClientStream) error {
	return f.stream(ctx, id, stream)
}

// serve starts a server, and returns it with its socket.
func serve(t testing.TB, b backend, store *handover.Store) (*Server, string) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "t")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(b, Options{PodID: "pod", Store: store, Log: logger(t)})
	s.replay = markReplay
	if err := s.Adopt(testContext(t)); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return s, socket
}

func ask(ctx context.Context, c *ttrpc.Client, method, text string) (string, error) {
	answer := &wrapperspb.StringValue{}
	err := c.Call(ctx, ServiceNames[0], method, wrapperspb.String(text), answer)
	return answer.GetValue(), err
}

type replayKey struct{}

func markReplay(ctx context.Context) context.Context {
	return context.WithValue(ctx, replayKey{}, true)
}
func isReplay(ctx context.Context) bool { return ctx.Value(replayKey{}) != nil }

// logger writes to the test's log.
func logger(t testing.TB) *slog.Logger { return slog.New(slog.NewTextHandler(t.Output(), nil)) }

// echo answers with what was asked.
func echo(_ context.Context, _ string, payload []byte) ([]byte, error) { return payload, nil }

func TestCallContext(t *testing.T) {
	seen := make(chan context.Context, 1)
	_, socket := serve(t, fake{call: func(ctx context.Context, _ string, payload []byte) ([]byte, error) {
		seen <- ctx
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}}, nil)
	client := dial(t, socket)
	ctx := ttrpc.WithMetadata(testContext(t), ttrpc.MD{"containerd-namespace-ttrpc": {"k8s.io"}})
	go ask(ctx, client, "State", "")
	got := <-seen
	if namespace, _ := ttrpc.GetMetadataValue(got, "containerd-namespace-ttrpc"); namespace != "k8s.io" {
		t.Errorf("namespace %q", namespace)
	}
	want, _ := ctx.Deadline()
	if deadline, ok := got.Deadline(); !ok || deadline.Before(want) || deadline.After(want.Add(patience)) {
		t.Errorf("deadline %v, %v, the client's is %v", deadline, ok, want)
	}
	client.Close()
	<-got.Done() // the client's end is the call's

	ctx, cancel := context.WithTimeout(testContext(t), time.Millisecond)
	defer cancel()
	_, err := ask(ctx, dial(t, socket), "State", "")
	if code := status.Code(err); code != codes.DeadlineExceeded && ctx.Err() == nil {
		t.Errorf("a call without time: %v", err)
	}
	<-seen
}

// TestMalformedFrames sends what the protocol forbids, and what it does not know.
func TestMalformedFrames(t *testing.T) {
	_, socket := serve(t, fake{
		call: echo,
		stream: func(ctx context.Context, _ string, s container.ClientStream) error {
			s.Accept()
			<-ctx.Done()
			return context.Cause(ctx)
		},
	}, nil)
	request := func(stream uint32, service, method string) []byte {
		payload, err := proto.Marshal(&ttrpc.Request{Service: service, Method: method})
		if err != nil {
			t.Fatal(err)
		}
		return frame{stream: stream, kind: kindRequest, payload: payload}.encode()
	}
	oversize := frame{stream: 5, kind: kindRequest}.encode()
	binary.BigEndian.PutUint32(oversize, maxPayload+1)
	const state = "State"
	for _, test := range []struct {
		name string
		sent [][]byte
		code codes.Code
		ends bool
	}{
		{name: "good", sent: [][]byte{request(1, ServiceNames[0], state)}, code: codes.OK},
		{name: "version 2", sent: [][]byte{request(1, ServiceNames[1], state)}, code: codes.OK},
		{name: "even stream", sent: [][]byte{request(2, ServiceNames[0], state)}, code: codes.InvalidArgument},
		{name: "garbage", sent: [][]byte{frame{stream: 1, kind: kindRequest, payload: []byte{0xff}}.encode()}, code: codes.InvalidArgument},
		{name: "unknown service", sent: [][]byte{request(1, "containerd.task.v9.Task", state)}, code: codes.Unimplemented},
		{name: "unknown stream method", sent: [][]byte{request(1, streamingService, "Flow")}, code: codes.Unimplemented},
		{name: "data without a stream", sent: [][]byte{frame{stream: 1, kind: kindData}.encode()}, code: codes.InvalidArgument},
		{name: "unknown kind", sent: [][]byte{frame{stream: 1, kind: 9}.encode(), request(3, ServiceNames[0], state)}, code: codes.OK},
		{name: "closed before the id", sent: [][]byte{request(1, streamingService, streamMethod), frame{stream: 1, kind: kindData, flags: flagClosed | flagEmpty}.encode()}, code: codes.InvalidArgument},
		{name: "garbage instead of the id", sent: [][]byte{request(1, streamingService, streamMethod), frame{stream: 1, kind: kindData, payload: []byte{0xff}}.encode()}, code: codes.InvalidArgument},
		{name: "oversize", sent: [][]byte{oversize}, code: codes.ResourceExhausted, ends: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			conn, err := net.Dial("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(patience))
			for _, p := range test.sent {
				if _, err := conn.Write(p); err != nil {
					t.Fatal(err)
				}
			}
			last := binary.BigEndian.Uint32(test.sent[len(test.sent)-1][4:])
			if got := readAnswer(t, conn, last); codes.Code(got.GetStatus().GetCode()) != test.code {
				t.Errorf("answered %v, want %v", got.GetStatus(), test.code)
			}
			if test.ends {
				if n, err := conn.Read(make([]byte, 1)); err != io.EOF {
					t.Errorf("the connection goes on: %d, %v", n, err)
				}
				return
			}
			// Everything else leaves the connection as it was.
			conn.Write(request(101, ServiceNames[0], state))
			if got := readAnswer(t, conn, 101); got.GetStatus() != nil {
				t.Errorf("afterwards: %v", got.GetStatus())
			}
			conn.Write(request(101, ServiceNames[0], state))
			if got := readAnswer(t, conn, 101); codes.Code(got.GetStatus().GetCode()) != codes.InvalidArgument {
				t.Errorf("a stream's number was used twice: %v", got.GetStatus())
			}
		})
	}
}

func readAnswer(t *testing.T, r io.Reader, stream uint32) *ttrpc.Response {
	t.Helper()
	var header [headerSize]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		t.Fatal(err)
	}
	payload := make([]byte, binary.BigEndian.Uint32(header[:]))
	if _, err := io.ReadFull(r, payload); err != nil {
		t.Fatal(err)
	}
	answer := &ttrpc.Response{}
	if got := binary.BigEndian.Uint32(header[4:]); header[8] != kindResponse || got != stream || proto.Unmarshal(payload, answer) != nil {
		t.Fatalf("header %v, payload %q, want an answer on stream %d", header, payload, stream)
	}
	return answer
}

// TestManyCalls has more calls outstanding than a connection carries: the rest is refused, and no
// call of another connection waits.
func TestManyCalls(t *testing.T) {
	release := make(chan struct{})
	_, socket := serve(t, fake{call: func(ctx context.Context, _ string, payload []byte) ([]byte, error) {
		select {
		case <-release:
		case <-ctx.Done():
		}
		return payload, nil
	}}, nil)
	client := dial(t, socket)
	var wg sync.WaitGroup
	var mu sync.Mutex
	refused := 0
	for i := range handover.MaxPins + 10 {
		wg.Go(func() {
			text := fmt.Sprint(i)
			got, err := ask(testContext(t), client, "Wait", text)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case status.Code(err) == codes.ResourceExhausted:
				if refused++; refused == 10 {
					close(release)
				}
			case err != nil || got != text:
				t.Errorf("%q: %q, %v", text, got, err)
			}
		})
	}
	wg.Wait()
	if refused != 10 {
		t.Errorf("%d calls were refused", refused)
	}
}

// TestUnreadAnswers does not read: the server neither blocks others nor collects without bounds, and
// answers everything in the end.
func TestUnreadAnswers(t *testing.T) {
	const calls, size = 200, 32 << 10
	s, socket := serve(t, fake{call: echo}, nil)
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() {
		payload, _ := proto.Marshal(&ttrpc.Request{Service: ServiceNames[0], Method: "State", Payload: bytes.Repeat([]byte{7}, size)})
		for i := range calls {
			conn.Write(frame{stream: uint32(2*i + 1), kind: kindRequest, payload: payload}.encode())
		}
	}()
	var c *connection
	eventually(t, "the server waits for its client", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		for c = range s.conns {
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.outbox.Pending() >= maxPending && c.running == 0
		}
		return false
	})
	if got, err := ask(testContext(t), dial(t, socket), "State", "x"); got != "x" || err != nil {
		t.Errorf("another client: %q, %v", got, err)
	}
	c.mu.Lock()
	pending := c.outbox.Pending()
	c.mu.Unlock()
	if pending > maxPending+handover.MaxPins*(size+100) {
		t.Errorf("%d bytes are pending", pending)
	}
	seen := map[uint32]bool{}
	for range calls {
		var header [headerSize]byte
		if _, err := io.ReadFull(conn, header[:]); err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(io.Discard, conn, int64(binary.BigEndian.Uint32(header[:]))); err != nil {
			t.Fatal(err)
		}
		seen[binary.BigEndian.Uint32(header[4:])] = true
	}
	if len(seen) != calls {
		t.Errorf("%d of %d calls were answered", len(seen), calls)
	}
}

// TestInputAhead sends input without being asked: some is borne, but not without bounds.
func TestInputAhead(t *testing.T) {
	_, socket := serve(t, fake{stream: func(ctx context.Context, _ string, s container.ClientStream) error {
		s.Accept()
		<-ctx.Done()
		return context.Cause(ctx)
	}}, nil)
	s := openStream(testContext(t), t, socket, "in")
	for range 20 {
		a, err := pack(&transfer.Data{Data: make([]byte, 32<<10)})
		if err != nil {
			t.Fatal(err)
		}
		s.Send(a)
	}
	if _, err := s.Recv(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("%v", err)
	}
}

// TestIdle counts what a connection without traffic holds: one goroutine.
func TestIdle(t *testing.T) {
	s, socket := serve(t, fake{call: echo}, nil)
	const conns = 20
	before := runtime.NumGoroutine()
	for range conns {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		conn.Write(bytes.Replace(recorded, []byte("Wait"), []byte("Kill"), 1))
		readAnswer(t, conn, 1)
	}
	eventually(t, "one goroutine is left of each connection", func() bool { return runtime.NumGoroutine() <= before+conns })
	if n := s.connections(); n != conns {
		t.Errorf("%d connections", n)
	}
}

// TestHandOver passes a server's connections to the next one in this process: a call that waits, one
// that ends in time, and streams.
func TestHandOver(t *testing.T) {
	manager, err := handovertest.NewManager()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := manager.Close(); err != nil {
			t.Error(err)
		}
	})
	store := func() *handover.Store {
		s, err := manager.Store(logger(t))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	type arrived struct {
		method string
		replay bool
	}
	calls := make(chan arrived, 10)
	handingOver, over := make(chan struct{}), make(chan struct{})
	first := fake{
		call: func(ctx context.Context, method string, payload []byte) ([]byte, error) {
			calls <- arrived{method, isReplay(ctx)}
			if method == "Wait" {
				<-ctx.Done() // the daemon ends
				return nil, context.Cause(ctx)
			}
			<-handingOver
			return payload, nil
		},
		stream: func(ctx context.Context, id string, s container.ClientStream) error {
			defer close(over)
			s.Accept()
			n, err := s.Send(ctx, []byte("one"), 100)
			if n != 3 || err != nil {
				t.Errorf("%d, %v", n, err)
			}
			<-ctx.Done()
			if n, err := s.Send(context.Background(), []byte("lost"), 103); n != 0 || err == nil {
				t.Errorf("after the end: %d, %v", n, err)
			}
			return context.Cause(ctx)
		},
	}
	s1, socket := serve(t, first, store())
	client := dial(t, socket)
	answers := map[string]chan string{}
	for _, method := range []string{"Wait", "Start"} {
		answer := make(chan string, 1)
		answers[method] = answer
		go func() {
			got, err := ask(testContext(t), client, method, method)
			if err != nil {
				t.Errorf("%s: %v", method, err)
			}
			answer <- got
		}()
		<-calls
	}
	out := openStream(testContext(t), t, socket, "out")
	if got, err := out.read(3); string(got) != "one" || err != nil {
		t.Fatalf("%q, %v", got, err)
	}
	done := make(chan struct{})
	go func() {
		s1.HandOver()
		close(done)
	}()
	eventually(t, "the first server has stopped", s1.isStopped)
	close(handingOver)
	<-done
	if got := <-answers["Start"]; got != "Start" {
		t.Errorf("the call in time: %q", got)
	}
	<-over

	second := fake{
		call: func(ctx context.Context, method string, payload []byte) ([]byte, error) {
			calls <- arrived{method, isReplay(ctx)}
			return payload, nil
		},
		stream: func(ctx context.Context, id string, s container.ClientStream) error {
			if offset, ok := s.Delivered(); id != "out" || offset != 103 || !ok {
				t.Errorf("stream %s: delivered %d, %v", id, offset, ok)
			}
			s.Accept()
			if n, err := s.Send(ctx, []byte("two"), 103); n != 3 || err != nil {
				t.Errorf("%d, %v", n, err)
			}
			return nil
		},
	}
	s2, _ := serve(t, second, store())
	if got := <-answers["Wait"]; got != "Wait" {
		t.Errorf("the call that waits: %q", got)
	}
	if got := <-calls; got != (arrived{"Wait", true}) {
		t.Errorf("the second server was asked %v", got)
	}
	if got, err := out.read(everything); string(got) != "two" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := ask(testContext(t), client, "State", "x"); got != "x" || err != nil || <-calls != (arrived{"State", false}) {
		t.Errorf("afterwards: %q, %v", got, err)
	}
	client.Close()
	out.client.Close()
	eventually(t, "nothing is kept", func() bool {
		return s2.connections() == 0 && manager.Sync() == nil && len(manager.Names()) == 0
	})
}

// A connection ends after its client's last call, but not while somebody waits for an answer, nor if
// there is another call after all.
func TestConnectionEndsAfterTheLastCall(t *testing.T) {
	waiting := make(chan struct{})
	b := fake{call: func(ctx context.Context, method string, payload []byte) ([]byte, error) {
		switch method {
		case "Wait":
			<-waiting
		case "Fail":
			return nil, errors.New("no")
		}
		return payload, nil
	}}
	s := newServer(b, Options{PodID: "pod", Log: logger(t)})
	s.linger = time.Millisecond
	asked := make(chan string, 16)
	s.last = func(method string, _ []byte) bool {
		asked <- method
		return method == "Shutdown"
	}
	socket := filepath.Join(t.TempDir(), "t")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	ctx := testContext(t)

	client := dial(t, socket)
	answer := make(chan error, 1)
	go func() {
		_, err := ask(ctx, client, "Wait", "")
		answer <- err
	}()
	state := func(get func(*connection) bool) bool {
		s.mu.Lock()
		var c *connection
		for c = range s.conns {
		}
		s.mu.Unlock()
		if c == nil {
			return false
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		return get(c)
	}
	eventually(t, "the call is under way", func() bool { return state(func(c *connection) bool { return c.running == 1 }) })
	if _, err := ask(ctx, client, "Fail", ""); err == nil {
		t.Fatal("no error")
	}
	if _, err := ask(ctx, client, "Shutdown", ""); err != nil {
		t.Fatal(err)
	}
	var first *time.Timer
	eventually(t, "the timer runs", func() bool {
		return state(func(c *connection) bool { first = c.leaving; return first != nil })
	})
	eventually(t, "it has begun anew", func() bool {
		return state(func(c *connection) bool { return c.leaving != nil && c.leaving != first })
	})
	if _, err := ask(ctx, client, "State", ""); err != nil {
		t.Fatalf("a call after the last one: %v", err)
	}
	if !state(func(c *connection) bool { return c.leaving == nil && !c.lost }) {
		t.Error("the connection is to end in spite of another call")
	}
	close(waiting)
	if err := <-answer; err != nil {
		t.Errorf("the call that waited: %v", err)
	}
	if s.connections() != 1 {
		t.Error("the connection has ended without a last call")
	}
	if _, err := ask(ctx, client, "Shutdown", ""); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the connection has ended", func() bool { return s.connections() == 0 })
	if _, err := ask(ctx, client, "State", ""); err == nil {
		t.Error("a call on a connection that has ended")
	}
	for len(asked) > 0 {
		if method := <-asked; method == "Fail" {
			t.Error("a call that failed was taken for the last")
		}
	}
}
