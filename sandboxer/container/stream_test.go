package container

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"

	"kuasar.io/kuasar/sandboxer/container/guesttest"
	"kuasar.io/kuasar/sandboxer/handover"
	"kuasar.io/kuasar/sandboxer/handover/handovertest"
)

// wire is what outlives a daemon of one connection of a client.
type wire struct {
	mu        sync.Mutex
	changed   *sync.Cond
	told      bool
	placed    bool   // begin holds
	begin     uint64 // offset of the first byte
	out       []byte // what the client has got
	window    int    // how much it takes
	in        []byte // what it has written
	closed    bool   // it has ended its input
	consumed  int    // of in, what no daemon will ask for again
	delivered chan struct{}
	lingers   chan struct{} // if not nil, the client reads on, after the daemon's end, until it is closed
}

func newWire() *wire {
	w := &wire{window: 1 << 30, delivered: make(chan struct{}, 1)}
	w.changed = sync.NewCond(&w.mu)
	return w
}

func (w *wire) change(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
	w.changed.Broadcast()
}

func (w *wire) got() []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	return bytes.Clone(w.out)
}

// wireStream is one daemon's ClientStream of a wire.
type wireStream struct {
	*wire
	life     context.Context
	lose     context.CancelFunc
	received int
	dead     bool // with its daemon: nothing happens any more
}

func (w *wire) stream() *wireStream {
	s := &wireStream{wire: w, received: w.consumed}
	s.life, s.lose = context.WithCancel(context.Background())
	context.AfterFunc(s.life, func() { w.change(func() {}) })
	return s
}

func (s *wireStream) kill() { s.change(func() { s.dead = true }) }

func (s *wireStream) Accept() error {
	s.change(func() { s.told = true })
	return nil
}

func (s *wireStream) Delivered() (uint64, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.begin + uint64(len(s.out)), s.placed && s.out != nil
}

// wait returns nil when ready says so. s.mu is held.
func (s *wireStream) wait(ctx context.Context, ready func() bool) error {
	defer context.AfterFunc(ctx, func() { s.change(func() {}) })()
	for {
		switch {
		case s.dead && ctx.Err() == nil:
		case !s.dead && ready():
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case s.life.Err() != nil:
			return s.life.Err()
		}
		s.changed.Wait()
	}
}

func (s *wireStream) Send(ctx context.Context, p []byte, offset uint64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.placed {
		s.placed, s.begin = true, offset
	}
	if offset != s.begin+uint64(len(s.out)) {
		panic("output has a gap, or comes twice")
	}
	sent := 0
	for sent < len(p) {
		if err := s.wait(ctx, func() bool { return len(s.out) < s.window }); err != nil {
			return sent, err
		}
		n := min(len(p)-sent, s.window-len(s.out))
		s.out = append(s.out, p[sent:sent+n]...)
		sent += n
		select {
		case s.wire.delivered <- struct{}{}:
		default:
		}
	}
	return sent, nil
}

func (s *wireStream) Gone() <-chan struct{} { return s.life.Done() }

func (s *wireStream) Begin(offset uint64) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.placed {
		s.placed, s.begin = true, offset
	}
	return s.begin + uint64(s.consumed)
}

func (s *wireStream) Receive(ctx context.Context) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.wait(ctx, func() bool { return s.received < len(s.in) || s.closed }); err != nil {
		return nil, err
	}
	if s.received == len(s.in) {
		return nil, io.EOF
	}
	n := min(len(s.in)-s.received, 5000)
	p := s.in[s.received : s.received+n]
	s.received += n
	return p, nil
}

func (s *wireStream) Consumed(offset uint64) {
	s.change(func() {
		if !s.dead {
			s.consumed = int(offset - s.begin)
		}
	})
}

// era is the life of one daemon in the test's process. When it is killed, its world stands still.
type era struct {
	*Set
	t       testing.TB
	world   *world
	dead    chan struct{}
	streams []*wireStream
	served  sync.WaitGroup

	mu    sync.Mutex
	conns []net.Conn
}

// world is what outlives daemons.
type world struct {
	t       testing.TB
	guest   *guesttest.Guest
	manager *handovertest.Manager
	mu      sync.Mutex
	records []Record
}

func newWorld(t testing.TB) *world {
	manager, err := handovertest.NewManager()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := manager.Close(); err != nil {
			t.Error(err)
		}
	})
	return &world{t: t, guest: guesttest.New(t), manager: manager}
}

func (w *world) recorded() []Record {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.records
}

// begin starts a daemon that finds the given connections, by their streams' ids.
func (w *world) begin(wires map[string]*wire) *era {
	w.t.Helper()
	return w.beginWith(func(e *era) {
		for id, wire := range wires {
			e.serve(id, wire)
		}
	})
}

// beginWith starts a daemon that adopts connections before it restores.
func (w *world) beginWith(adopt func(*era)) *era {
	w.t.Helper()
	log := slog.New(slog.DiscardHandler)
	store := handover.New(w.manager.Address(), nil, log)
	if w.recorded() != nil {
		var err error
		if store, err = w.manager.Store(log); err != nil {
			w.t.Fatal(err)
		}
	}
	e := &era{t: w.t, world: w, dead: make(chan struct{})}
	e.Set = NewSet(Options{
		PodID: "pod", Guest: eraGuest{w.guest, e}, Storage: &fakeStorage{}, Store: store, Log: log,
		Journal: func(r []Record) {
			w.mu.Lock()
			defer w.mu.Unlock()
			if !isDone(e.dead) {
				w.records = r
			}
		},
	})
	adopt(e)
	if records := w.recorded(); records != nil {
		if err := e.Restore(testContext(w.t), records); err != nil {
			w.t.Fatal(err)
		}
	}
	w.t.Cleanup(e.kill)
	return e
}

// serve lends a connection, and returns when it has its place.
func (e *era) serve(id string, w *wire) *wireStream {
	s := w.stream()
	e.streams = append(e.streams, s)
	told := make(chan struct{})
	e.served.Go(func() {
		if err := e.ServeStream(s.life, id, tellingStream{s, told}); err == nil {
			if w.lingers != nil {
				<-w.lingers
			}
			s.lose() // the client has taken the end, and closes
		}
	})
	<-told
	return s
}

type tellingStream struct {
	*wireStream
	told chan struct{}
}

func (s tellingStream) Accept() error {
	defer close(s.told)
	return s.wireStream.Accept()
}

// kill stops the daemon's world at once.
func (e *era) kill() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if isDone(e.dead) {
		return
	}
	for _, s := range e.streams {
		s.kill()
	}
	e.world.mu.Lock()
	close(e.dead)
	e.world.mu.Unlock()
	var boxes []*inbox
	e.Set.mu.Lock()
	for _, c := range e.containers {
		if in := c.init.io.input; in != nil && in.box != nil {
			in.box.mu.Lock() // what it was about to put there is not put
			boxes = append(boxes, in.box)
		}
	}
	e.Set.mu.Unlock()
	for _, c := range e.conns {
		c.Close()
	}
	// What is left of it in the test's process ends with the test.
	e.t.Cleanup(func() {
		for _, b := range boxes {
			b.mu.Unlock()
		}
		e.HandOver()
		for _, s := range e.streams {
			s.lose()
		}
		e.served.Wait()
	})
}

type eraGuest struct {
	*guesttest.Guest
	era *era
}

func (g eraGuest) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	g.era.mu.Lock()
	defer g.era.mu.Unlock()
	if isDone(g.era.dead) {
		return nil, net.ErrClosed
	}
	conn, err := g.Guest.Dial(ctx, port)
	if err == nil {
		g.era.conns = append(g.era.conns, conn)
	}
	return conn, err
}

func (g eraGuest) Task() task.TTRPCTaskService { return eraTask{g.Guest.Task(), g.era} }

type eraTask struct {
	task.TTRPCTaskService
	era *era
}

func (t eraTask) Wait(ctx context.Context, r *task.WaitRequest) (*task.WaitResponse, error) {
	a, err := t.TTRPCTaskService.Wait(ctx, r)
	if isDone(t.era.dead) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return a, err
}

func (e *era) run(id string, io IO, args ...string) {
	e.t.Helper()
	ctx := testContext(e.t)
	if _, err := e.Create(ctx, CreateRequest{ID: id, Spec: encode(e.t, spec(args...)), Rootfs: rootfs(), IO: io}); err != nil {
		e.t.Fatal(err)
	}
	if _, err := e.Start(ctx, id, ""); err != nil {
		e.t.Fatal(err)
	}
}

func (e *era) exit(id string) Exit {
	e.t.Helper()
	exit, err := e.Wait(testContext(e.t), id, "")
	if err != nil {
		e.t.Fatal(err)
	}
	return exit
}

func streamName(id string) string { return "ttrpc+unix:///t?streaming_id=" + id }

// arrived waits until a client has got so much.
func (w *wire) arrived(t testing.TB, n int) {
	t.Helper()
	limit := time.After(patience)
	for len(w.got()) < n {
		select {
		case <-w.delivered:
		case <-limit:
			t.Fatalf("%d of %d bytes arrived", len(w.got()), n)
		}
	}
}

// TestStreamOutput passes an output on from daemon to daemon and from connection to connection.
func TestStreamOutput(t *testing.T) {
	want := stream(900_000, 1)
	for _, orderly := range []bool{false, true} {
		w := newWorld(t)
		w.guest.Programs["talk"] = func(_ context.Context, p *guesttest.Process) uint32 {
			if _, err := p.Stdout.Write(want); err != nil {
				return 1
			}
			return 3
		}
		end := func(e *era) {
			if orderly {
				e.HandOver()
			}
			e.kill()
		}
		first := newWire()
		first.window = 100_000 // in the middle of a frame
		e := w.begin(map[string]*wire{"out": first})
		e.run("c", IO{Stdout: streamName("out")}, "talk")
		first.arrived(t, 100_000)
		end(e)

		// The next one finds the connection.
		first.window = 250_000
		e = w.begin(map[string]*wire{"out": first})
		first.arrived(t, 250_000)
		// The client restarts. When the connection has been let go, its offset is in the records.
		e.streams[0].lose()
		e.served.Wait()
		if got := w.recorded()[0].Processes[0].Consumed[0]; got != 250_000 {
			t.Errorf("%d bytes are recorded", got)
		}
		end(e)

		// The client comes again, and again after the next daemon has begun.
		second := newWire()
		second.window = 150_000
		e = w.begin(map[string]*wire{"out": second})
		second.arrived(t, 150_000)
		third := newWire()
		e.serve("out", third)
		if exit := e.exit("c"); exit.Status != 3 {
			t.Errorf("exit status %d", exit.Status)
		}
		sameBytes(t, "output", append(append(first.got(), second.got()...), third.got()...), want)
		end(e)
		e = w.begin(nil)
		if exit := e.exit("c"); exit.Status != 3 {
			t.Errorf("exit status %d after the restart", exit.Status)
		}
	}
}

// TestExitIsToldWhenOutputIsTaken: a client that cancels its reading when it learns of the exit gets all.
func TestExitIsToldWhenOutputIsTaken(t *testing.T) {
	w := newWorld(t)
	out := newWire()
	out.lingers = make(chan struct{})
	e := w.begin(map[string]*wire{"out": out})
	e.run("c", IO{Stdout: streamName("out")}, "echo", "hello")
	e.Set.mu.Lock()
	p := e.containers["c"].init
	e.Set.mu.Unlock()
	eventually(t, "the client is told the end", func() bool {
		return isDone(p.io.outputs[0].sink.(streamSink).over)
	})
	select {
	case <-p.exited:
		t.Error("the exit is told while the client still reads")
	case <-time.After(100 * time.Millisecond):
	}
	close(out.lingers)
	began := time.Now()
	if exit := e.exit("c"); exit.Status != 0 {
		t.Errorf("exit status %d", exit.Status)
	}
	if waited := time.Since(began); waited >= takenLimit {
		t.Errorf("the exit was told after %s, whatever the client did", waited)
	}
	if got := string(out.got()); got != "hello\n" {
		t.Errorf("the client got %q", got)
	}
}

// TestStreamInput does the same to an input, whose process is slow to read it.
func TestStreamInput(t *testing.T) {
	want := stream(330_000, 2)
	for _, orderly := range []bool{false, true} {
		w := newWorld(t)
		reads := make(chan int)
		var got []byte
		w.guest.Programs["read"] = func(_ context.Context, p *guesttest.Process) uint32 {
			for n := range reads {
				b := make([]byte, n)
				if _, err := io.ReadFull(p.Stdin, b); err != nil {
					return 1
				}
				got = append(got, b...)
			}
			rest, err := io.ReadAll(p.Stdin)
			got = append(got, rest...)
			if err != nil {
				return 2
			}
			return 4
		}
		end := func(e *era) {
			if orderly {
				e.HandOver()
			}
			e.kill()
		}
		first := newWire()
		first.in = want[:200_000]
		e := w.begin(map[string]*wire{"in": first})
		e.run("c", IO{Stdin: streamName("in")}, "read")
		reads <- 50_000
		end(e)

		e = w.begin(map[string]*wire{"in": first})
		reads <- 20_000
		// The client restarts. The connection is let go when all that it brought is kept elsewhere.
		e.streams[0].lose()
		e.served.Wait()
		if first.consumed != len(first.in) {
			t.Errorf("%d of %d bytes are kept", first.consumed, len(first.in))
		}
		end(e)

		second := newWire()
		second.in, second.closed = want[200_000:], true
		e = w.begin(map[string]*wire{"in": second})
		reads <- 80_000
		reads <- 150_000
		// Its end was seen once all of it was taken, and is remembered when the connection is gone.
		e.streams[0].lose()
		e.served.Wait()
		if !w.recorded()[0].Processes[0].InputEnded {
			t.Error("the end of the input is not recorded")
		}
		end(e)

		e = w.begin(nil)
		close(reads)
		if exit := e.exit("c"); exit.Status != 4 {
			t.Errorf("exit status %d", exit.Status)
		}
		sameBytes(t, "input", got, want)
		if _, err := e.Delete(testContext(t), "c", ""); err != nil {
			t.Error(err)
		}
		if err := w.manager.Sync(); err != nil {
			t.Fatal(err)
		}
		if names := w.manager.Names(); len(names) > 0 {
			t.Errorf("still kept: %v", names)
		}
	}
}

// TestStreamInputOfTwo finds two connections of one input: the client had restarted while not all
// that the first one brought was taken, and then the daemon died.
func TestStreamInputOfTwo(t *testing.T) {
	want := stream(800_000, 3)
	w := newWorld(t)
	read := make(chan struct{})
	var got []byte
	w.guest.Programs["read"] = func(_ context.Context, p *guesttest.Process) uint32 {
		<-read
		got, _ = io.ReadAll(p.Stdin)
		return 5
	}
	first, second := newWire(), newWire()
	first.in = want[:600_000] // more than is held on the way
	second.in, second.closed = want[600_000:], true
	e := w.begin(map[string]*wire{"in": first})
	e.run("c", IO{Stdin: streamName("in")}, "read")
	first.mu.Lock()
	for first.consumed < 100_000 {
		first.changed.Wait()
	}
	first.mu.Unlock()
	e.kill()
	if first.consumed == len(first.in) {
		t.Error("everything was taken: the test shows nothing")
	}
	e = w.beginWith(func(e *era) {
		e.serve("in", first).lose()
		e.serve("in", second)
	})
	close(read)
	if exit := e.exit("c"); exit.Status != 5 {
		t.Errorf("exit status %d", exit.Status)
	}
	sameBytes(t, "input", got, want)
	e.served.Wait()
}

// TestStreamsEndAfterRestart lets a daemon die when a process has ended and its client was not told.
func TestStreamsEndAfterRestart(t *testing.T) {
	w := newWorld(t)
	wires := map[string]*wire{"out": newWire()}
	e := w.begin(wires)
	e.run("c", IO{Stdout: streamName("out")}, "true")
	e.exit("c")
	e.kill()
	// The connection was still there when the daemon died.
	e = w.begin(nil)
	s := wires["out"].stream()
	defer s.lose()
	if err := e.ServeStream(testContext(t), "out", s); err != nil {
		t.Errorf("the client is told %v", err)
	}
}
