package stdio

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// guest is a Hub behind a Unix socket.
type guest struct {
	hub  *Hub
	path string
}

func newGuest(t *testing.T) *guest {
	t.Helper()
	before := runtime.NumGoroutine()
	g := &guest{hub: NewHub(), path: filepath.Join(t.TempDir(), "s")}
	l, err := net.Listen("unix", g.path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() { defer close(served); g.hub.Serve(l) }()
	t.Cleanup(func() {
		l.Close()
		<-served
		var now int
		for range 200 {
			if now = runtime.NumGoroutine(); now <= before {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		buf := make([]byte, 1<<16)
		t.Errorf("%d goroutines before, %d after:\n%s", before, now, buf[:runtime.Stack(buf, true)])
	})
	return g
}

func (g *guest) dial(ctx context.Context) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "unix", g.path)
}

// fragile dials connections that break after a random number of bytes in either direction. The first one
// lasts for the opening of its stream, which nobody retries.
func (g *guest) fragile(maximum int, dials *atomic.Int32) Dialer {
	const opening = 1000
	return func(ctx context.Context) (net.Conn, error) {
		least := 0
		if dials.Add(1) == 1 {
			least = opening
		}
		c, err := g.dial(ctx)
		if err != nil {
			return nil, err
		}
		f := &fragileConn{Conn: c}
		f.budget.Store(int64(least + rand.IntN(maximum)))
		return f, nil
	}
}

type fragileConn struct {
	net.Conn
	budget atomic.Int64
}

func (f *fragileConn) spend(n int) {
	if f.budget.Add(int64(-n)) < 0 {
		f.Conn.Close()
	}
}

func (f *fragileConn) Read(p []byte) (int, error) {
	n, err := f.Conn.Read(p)
	f.spend(n)
	return n, err
}

func (f *fragileConn) Write(p []byte) (int, error) {
	if left := f.budget.Load(); left < int64(len(p)) {
		// Half of a message gets through, then the line is cut.
		n, _ := f.Conn.Write(p[:max(0, left)])
		f.Conn.Close()
		return n, net.ErrClosed
	}
	n, err := f.Conn.Write(p)
	f.spend(n)
	return n, err
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	var seed [32]byte
	binary.BigEndian.PutUint64(seed[:], rand.Uint64())
	rand.NewChaCha8(seed).Read(b)
	return b
}

// writeChunks writes data in pieces of random sizes.
func writeChunks(w io.Writer, data []byte) error {
	for len(data) > 0 {
		n := min(len(data), 1+rand.IntN(100_000))
		if _, err := w.Write(data[:n]); err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

func equal(t *testing.T, got, want []byte) {
	t.Helper()
	if sha256.Sum256(got) != sha256.Sum256(want) {
		t.Errorf("%d bytes arrived of %d, or other ones", len(got), len(want))
	}
}

func openOutput(t *testing.T, d Dialer, token string) *Reader {
	t.Helper()
	r, err := OpenOutput(testContext(t), d, token, Stdout, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func openInput(t *testing.T, d Dialer, token string) *Writer {
	t.Helper()
	w, err := OpenInput(testContext(t), d, token)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

func TestOutputArrivesWhole(t *testing.T) {
	for _, hostFirst := range []bool{true, false} {
		t.Run(fmt.Sprintf("hostFirst=%v", hostFirst), func(t *testing.T) {
			g := newGuest(t)
			want := randomBytes(8 << 20)
			closed := make(chan error, 1)
			produce := func() {
				o := g.hub.Output("c1-out")
				err := writeChunks(o, want)
				closed <- errors.Join(err, o.Close(testContext(t)))
			}
			if !hostFirst {
				go produce()
			}
			r := openOutput(t, g.dial, "c1-out")
			if hostFirst {
				go produce()
			}
			var got bytes.Buffer
			if n, err := r.WriteTo(&got); err != nil || n != int64(len(want)) {
				t.Fatalf("WriteTo: %d, %v", n, err)
			}
			if err := <-closed; err != nil {
				t.Fatal(err)
			}
			equal(t, got.Bytes(), want)
			if r.Offset() != uint64(len(want)) {
				t.Errorf("Offset %d", r.Offset())
			}
		})
	}
}

func TestOutputSurvivesLostConnections(t *testing.T) {
	g := newGuest(t)
	want := randomBytes(8 << 20)
	var dials atomic.Int32
	d := g.fragile(1<<20, &dials)
	var r *Reader
	for r == nil { // the first handshake may be cut as well
		r, _ = OpenOutput(testContext(t), d, "t", Stderr, 0)
	}
	defer r.Close()
	closed := make(chan error, 1)
	go func() {
		o := g.hub.Output("t")
		err := writeChunks(o, want)
		closed <- errors.Join(err, o.Close(testContext(t)))
	}()
	var got bytes.Buffer
	if _, err := r.WriteTo(&got); err != nil {
		t.Fatal(err)
	}
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	equal(t, got.Bytes(), want)
	if dials.Load() < 5 {
		t.Errorf("only %d connections: nothing was lost, nothing was proven", dials.Load())
	}
}

func TestInputSurvivesLostConnections(t *testing.T) {
	g := newGuest(t)
	want := randomBytes(8 << 20)
	var dials atomic.Int32
	d := g.fragile(1<<20, &dials)
	var w *Writer
	for w == nil {
		w, _ = OpenInput(testContext(t), d, "t")
	}
	defer w.Close()
	in := g.hub.Input("t")
	defer in.Close()
	go func() {
		writeChunks(w, want)
		w.CloseWrite()
	}()
	got, err := io.ReadAll(in)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, got, want)
	select {
	case <-w.Done():
	case <-testContext(t).Done():
		t.Error("the writer was not told that everything was consumed")
	}
	if dials.Load() < 5 {
		t.Errorf("only %d connections: nothing was lost, nothing was proven", dials.Load())
	}
}

// A daemon that restarts opens the stream at the offset that it journalled.
func TestOutputResumesInNewReader(t *testing.T) {
	g := newGuest(t)
	want := randomBytes(1 << 20)
	o := g.hub.Output("t")
	closed := make(chan error, 1)
	go func() {
		err := writeChunks(o, want)
		closed <- errors.Join(err, o.Close(testContext(t)))
	}()
	var got bytes.Buffer
	r := openOutput(t, g.dial, "t")
	full := &limitedWriter{w: &got, left: 300_001}
	if _, err := r.WriteTo(full); !errors.Is(err, errFull) {
		t.Fatalf("WriteTo: %v", err)
	}
	if r.Offset() != 300_001 {
		t.Fatalf("Offset %d after a short write", r.Offset())
	}
	r.Close()
	r2, err := OpenOutput(testContext(t), g.dial, "t", Stdout, r.Offset())
	if err != nil {
		t.Fatal(err)
	}
	defer r2.Close()
	if _, err := r2.WriteTo(&got); err != nil {
		t.Fatal(err)
	}
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	equal(t, got.Bytes(), want)

	// It is over now, and stays so: a daemon that missed the end learns it.
	r3, err := OpenOutput(testContext(t), g.dial, "t", Stdout, uint64(len(want)))
	if err != nil {
		t.Fatal(err)
	}
	if n, err := r3.WriteTo(io.Discard); n != 0 || err != nil {
		t.Errorf("after the end: %d, %v", n, err)
	}
	r3.Close()
	if _, err := OpenOutput(testContext(t), g.dial, "t", Stdout, 5); !errors.Is(err, ErrLost) {
		t.Errorf("data that is gone: %v", err)
	}
}

// TestOutputResumesWhereAcknowledged resumes with an offset that is older than what the guest
// has seen acknowledged, as a daemon does whose predecessor was killed.
func TestOutputResumesWhereAcknowledged(t *testing.T) {
	g := newGuest(t)
	want := randomBytes(1 << 20)
	o := g.hub.Output("t")
	closed := make(chan error, 1)
	go func() {
		err := writeChunks(o, want)
		closed <- errors.Join(err, o.Close(testContext(t)))
	}()
	var got bytes.Buffer
	r := openOutput(t, g.dial, "t")
	if _, err := r.WriteTo(&limitedWriter{w: &got, left: 500_000}); !errors.Is(err, errFull) {
		t.Fatalf("WriteTo: %v", err)
	}
	consumed := r.Offset()
	r.Close()
	r2, err := OpenOutput(testContext(t), g.dial, "t", Stdout, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r2.Close()
	// Acknowledgements may have been under way when the connection was lost.
	if at := r2.Offset(); at == 0 || at > consumed || consumed-at > Window {
		t.Fatalf("resumed at %d after %d", at, consumed)
	}
	got.Truncate(int(r2.Offset()))
	if _, err := r2.WriteTo(&got); err != nil {
		t.Fatal(err)
	}
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	equal(t, got.Bytes(), want)
}

var errFull = errors.New("full")

type limitedWriter struct {
	w    io.Writer
	left int
}

func (l *limitedWriter) Write(p []byte) (int, error) {
	n, _ := l.w.Write(p[:min(len(p), l.left)])
	l.left -= n
	if l.left == 0 {
		return n, errFull
	}
	return n, nil
}

func TestOutputHoldsProcessBack(t *testing.T) {
	g := newGuest(t)
	r := openOutput(t, g.dial, "t")
	o := g.hub.Output("t")
	var written atomic.Int64
	data := randomBytes(2 << 20)
	closed := make(chan error, 1)
	go func() {
		for rest := data; len(rest) > 0; {
			n, err := o.Write(rest[:min(len(rest), 10_000)])
			if err != nil {
				closed <- err
				return
			}
			written.Add(int64(n))
			rest = rest[n:]
		}
		closed <- o.Close(testContext(t))
	}()
	gate := make(chan struct{})
	var got bytes.Buffer
	slow := writerFunc(func(p []byte) (int, error) {
		<-gate
		// The producer is at most a window and its current write ahead of what w has taken.
		if ahead := written.Load() - int64(got.Len()); ahead > Window {
			t.Errorf("%d bytes are ahead of the reader, more than %d", ahead, Window)
		}
		return got.Write(p)
	})
	go func() {
		for range 4096 {
			gate <- struct{}{}
		}
	}()
	if _, err := r.WriteTo(slow); err != nil {
		t.Fatal(err)
	}
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	equal(t, got.Bytes(), data)
	drain(gate)
}

// drain lets the gate keeper of a test finish.
func drain(gate chan struct{}) {
	for {
		select {
		case <-gate:
		case <-time.After(50 * time.Millisecond):
			return
		}
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestInputEndAndRefusal(t *testing.T) {
	g := newGuest(t)
	w := openInput(t, g.dial, "end")
	in := g.hub.Input("end")
	io.WriteString(w, "last words")
	w.CloseWrite()
	if b, err := io.ReadAll(in); string(b) != "last words" || err != nil {
		t.Fatalf("%q, %v", b, err)
	}
	<-w.Done()
	if _, err := w.Write([]byte("x")); err == nil {
		t.Error("a write after the end succeeded")
	}
	in.Close()

	// A process that closes its stdin.
	w = openInput(t, g.dial, "refuse")
	in = g.hub.Input("refuse")
	w.Write([]byte("abc"))
	var b [2]byte
	if n, err := io.ReadFull(in, b[:]); n != 2 || err != nil {
		t.Fatal(n, err)
	}
	in.Close()
	<-w.Done()
	if _, err := w.Write(make([]byte, 1<<20)); !errors.Is(err, ErrRefused) {
		t.Errorf("a write to a closed stdin: %v", err)
	}
	if _, err := in.Read(b[:]); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a read after Close: %v", err)
	}
	if _, err := OpenInput(testContext(t), g.dial, "refuse"); !errors.Is(err, ErrRefused) {
		t.Errorf("a stream that is over: %v", err)
	}
}

// Close of an Input ends a Read that waits, connected or not.
func TestInputCloseWakesRead(t *testing.T) {
	for _, connected := range []bool{true, false} {
		g := newGuest(t)
		if connected {
			openInput(t, g.dial, "t")
		}
		in := g.hub.Input("t")
		read := make(chan error, 1)
		go func() { _, err := in.Read(make([]byte, 1)); read <- err }()
		select {
		case err := <-read:
			t.Fatalf("Read returned early: %v", err)
		case <-time.After(20 * time.Millisecond):
		}
		in.Close()
		if err := <-read; !errors.Is(err, net.ErrClosed) {
			t.Errorf("connected %v: %v", connected, err)
		}
	}
}

func TestLostConnectionIsNoEnd(t *testing.T) {
	g := newGuest(t)
	var last net.Conn
	var mu sync.Mutex
	d := func(ctx context.Context) (net.Conn, error) {
		c, err := g.dial(ctx)
		mu.Lock()
		last = c
		mu.Unlock()
		return c, err
	}
	cut := func() { mu.Lock(); last.Close(); mu.Unlock() }

	w := openInput(t, d, "in")
	in := g.hub.Input("in")
	defer in.Close()
	cut()
	w.Write([]byte("hello"))
	var b [5]byte
	if _, err := io.ReadFull(in, b[:]); err != nil || string(b[:]) != "hello" {
		t.Errorf("%q, %v", b, err)
	}

	r := openOutput(t, d, "out")
	o := g.hub.Output("out")
	got := make(chan string, 1)
	go func() {
		var s strings.Builder
		r.WriteTo(&s)
		got <- s.String()
	}()
	o.Write([]byte("before "))
	cut()
	o.Write([]byte("after"))
	if err := o.Close(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if s := <-got; s != "before after" {
		t.Errorf("%q", s)
	}
}

func TestOutputCloseIsBounded(t *testing.T) {
	g := newGuest(t)
	o := g.hub.Output("nobody")
	o.Write([]byte("unread"))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := o.Close(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Close: %v", err)
	}
	if _, err := OpenOutput(testContext(t), g.dial, "nobody", Stdout, 0); !errors.Is(err, ErrLost) {
		t.Errorf("a stream that was given up: %v", err)
	}

	// A host that is connected and does not read.
	c := rawOpen(t, g, header{kind: Stdout, token: "mute"})
	defer c.Close()
	o = g.hub.Output("mute")
	full := make(chan error, 1)
	go func() { _, err := o.Write(make([]byte, 1<<20)); full <- err }()
	ctx, cancel = context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := o.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Close: %v", err)
	}
	if err := <-full; err == nil {
		t.Error("a write into a stream that was given up succeeded")
	}
}

func rawOpen(t *testing.T, g *guest, h header) net.Conn {
	t.Helper()
	c, err := g.dial(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := writeHeader(c, h); err != nil {
		t.Fatal(err)
	}
	if s, _, err := readReply(c); err != nil || s != statusOK {
		t.Fatalf("reply %d, %v", s, err)
	}
	return c
}

func TestParkedStreamsAreBounded(t *testing.T) {
	g := newGuest(t)
	g.hub.timeout = 50 * time.Millisecond
	c := rawOpen(t, g, header{kind: Stdout, token: "late"})
	defer c.Close()
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("a stream without a process: %v", err)
	}
	if _, err := OpenOutput(testContext(t), g.dial, "late", Stdout, 7); !errors.Is(err, ErrUnknown) {
		t.Errorf("resume of an unknown stream: %v", err)
	}

	g.hub.timeout = time.Hour
	for i := range maxParked {
		defer rawOpen(t, g, header{kind: Stdin, token: fmt.Sprint("p", i)}).Close()
	}
	// The last one may be parked just after its reply.
	deadline := time.Now().Add(5 * time.Second)
	for {
		g.hub.mu.Lock()
		n := len(g.hub.parked)
		g.hub.mu.Unlock()
		if n == maxParked {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d streams are parked", n)
		}
		runtime.Gosched()
	}
	if _, err := OpenInput(testContext(t), g.dial, "one more"); !errors.Is(err, ErrRefused) {
		t.Errorf("one stream too many: %v", err)
	}
	// Taking one makes room.
	g.hub.Input("p3").Close()
	w := openInput(t, g.dial, "one more")
	w.Close()
	g.hub.mu.Lock()
	for token := range g.hub.parked {
		p := g.hub.parked[token]
		p.timer.Stop()
		p.conn.Close()
	}
	g.hub.mu.Unlock()
}

func TestExpectedStreamsWait(t *testing.T) {
	g := newGuest(t)
	const brief = time.Millisecond
	parked := func(token string) bool {
		g.hub.mu.Lock()
		defer g.hub.mu.Unlock()
		return g.hub.parked[token] != nil
	}
	waitFor := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); !ok(); runtime.Gosched() {
			if time.Now().After(deadline) {
				t.Fatal(what)
			}
		}
	}
	// Opened before it was expected, and after.
	early := rawOpen(t, g, header{kind: Stdout, token: "early"})
	defer early.Close()
	waitFor("it is not parked", func() bool { return parked("early") })
	dones := []func(){g.hub.Expect("early"), g.hub.Expect("late"), g.hub.Expect("late")}
	g.hub.timeout = brief
	late := rawOpen(t, g, header{kind: Stdout, token: "late"})
	defer late.Close()
	waitFor("it is not parked", func() bool { return parked("late") })
	// Even if a timer fires that could not be stopped any more.
	for _, token := range []string{"early", "late"} {
		g.hub.mu.Lock()
		p := g.hub.parked[token]
		g.hub.mu.Unlock()
		g.hub.expire(token, p)
		if !parked(token) || p.timer.Stop() {
			t.Errorf("stream %s does not wait", token)
		}
	}
	g.hub.mu.Lock()
	if n := g.hub.unexpected(); n != 0 {
		t.Errorf("%d streams are counted", n)
	}
	g.hub.mu.Unlock()
	// What two expect waits for both.
	dones[1]()
	dones[1]()
	if g.hub.expire("late", g.hub.parked["late"]); !parked("late") {
		t.Error("one of two does not expect it any more, and it is gone")
	}
	for _, done := range dones {
		done()
	}
	for _, c := range []net.Conn{early, late} {
		if _, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("a stream that nobody expects any more: %v", err)
		}
	}
	if len(g.hub.expected) != 0 {
		t.Errorf("left: %v", g.hub.expected)
	}
}

func TestWrongDirectionIsRefused(t *testing.T) {
	g := newGuest(t)
	o := g.hub.Output("t")
	if _, err := OpenInput(testContext(t), g.dial, "t"); !errors.Is(err, ErrRefused) {
		t.Errorf("stdin on an output: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	o.Close(ctx)
	// Parked as output, claimed as input: the connection is not used.
	c := rawOpen(t, g, header{kind: Stdout, token: "u"})
	defer c.Close()
	in := g.hub.Input("u")
	defer in.Close()
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the parked output: %v", err)
	}
}

func TestTokens(t *testing.T) {
	g := newGuest(t)
	for _, token := range []string{"", strings.Repeat("x", MaxToken+1)} {
		if _, err := OpenOutput(testContext(t), g.dial, token, Stdout, 0); !errors.Is(err, ErrProtocol) {
			t.Errorf("token of %d bytes: %v", len(token), err)
		}
		o := g.hub.Output(token)
		if _, err := o.Write([]byte("x")); !errors.Is(err, ErrProtocol) {
			t.Errorf("write to token of %d bytes: %v", len(token), err)
		}
		o.Close(context.Background())
		in := g.hub.Input(token)
		if _, err := in.Read(make([]byte, 1)); err == nil {
			t.Error("read from a bad token succeeded")
		}
		in.Close()
	}
	longest := strings.Repeat("y", MaxToken)
	r := openOutput(t, g.dial, longest)
	o := g.hub.Output(longest)
	go o.Close(testContext(t))
	if _, err := r.WriteTo(io.Discard); err != nil {
		t.Error(err)
	}
}

func TestGuestRefusesNonsense(t *testing.T) {
	g := newGuest(t)
	good := []byte("KSIO\x01\x01\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00t")
	for name, change := range map[string]func([]byte){
		"magic":   func(b []byte) { b[0] = 'X' },
		"version": func(b []byte) { b[4] = 9 },
		"kind":    func(b []byte) { b[5] = 3 },
		"no name": func(b []byte) { b[7] = 0 },
		"length":  func(b []byte) { b[7] = 200 },
	} {
		c, err := g.dial(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		b := bytes.Clone(good)
		change(b)
		c.Write(b)
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Errorf("wrong %s: the guest answered", name)
		}
		c.Close()
	}

	// An acknowledgement of what was never sent costs the host the connection, not the stream.
	c := rawOpen(t, g, header{kind: Stdout, token: "ack"})
	o := g.hub.Output("ack")
	o.Write([]byte("four"))
	io.ReadFull(c, make([]byte, 8))
	writeAck(c, 5)
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the guest went on after a wrong acknowledgement")
	}
	c.Close()
	var s strings.Builder
	r := openOutput(t, g.dial, "ack")
	done := make(chan error, 1)
	go func() { done <- o.Close(testContext(t)) }()
	if _, err := r.WriteTo(&s); err != nil || s.String() != "four" {
		t.Errorf("%q, %v", s.String(), err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// hostile serves one scripted connection as the guest would, and no second one.
func hostile(t *testing.T, script func(c net.Conn, h header)) Dialer {
	t.Helper()
	used := false
	return func(context.Context) (net.Conn, error) {
		if used {
			return nil, net.ErrClosed
		}
		used = true
		host, guest := net.Pipe()
		go func() {
			defer guest.Close()
			h, err := readHeader(guest)
			if err == nil {
				script(guest, h)
			}
		}()
		return host, nil
	}
}

func TestHostRefusesNonsense(t *testing.T) {
	accept := func(c net.Conn) { writeReply(c, statusOK, 0) }
	t.Run("reply", func(t *testing.T) {
		d := hostile(t, func(c net.Conn, _ header) { c.Write(bytes.Repeat([]byte("A"), replySize)) })
		if _, err := OpenOutput(testContext(t), d, "t", Stdout, 0); !errors.Is(err, ErrProtocol) {
			t.Error(err)
		}
	})
	t.Run("offset", func(t *testing.T) {
		d := hostile(t, func(c net.Conn, _ header) { writeReply(c, statusOK, 1) })
		if _, err := OpenOutput(testContext(t), d, "t", Stdout, 0); !errors.Is(err, ErrProtocol) {
			t.Error(err)
		}
		d = hostile(t, func(c net.Conn, _ header) { writeReply(c, statusOK, final|1) })
		if _, err := OpenInput(testContext(t), d, "t"); !errors.Is(err, ErrProtocol) {
			t.Error(err)
		}
	})
	t.Run("frame", func(t *testing.T) {
		d := hostile(t, func(c net.Conn, _ header) {
			accept(c)
			c.Write(binary.BigEndian.AppendUint32(nil, MaxFrame+1))
		})
		r := openOutput(t, d, "t")
		if _, err := r.WriteTo(io.Discard); !errors.Is(err, ErrProtocol) {
			t.Error(err)
		}
	})
	t.Run("ack", func(t *testing.T) {
		d := hostile(t, func(c net.Conn, _ header) {
			accept(c)
			io.ReadFull(c, make([]byte, 4+3))
			writeAck(c, 4)
			io.Copy(io.Discard, c)
		})
		w := openInput(t, d, "t")
		w.Write([]byte("abc"))
		<-w.Done()
		if _, err := w.Write([]byte("d")); !errors.Is(err, ErrProtocol) {
			t.Error(err)
		}
	})
	t.Run("backward ack", func(t *testing.T) {
		d := hostile(t, func(c net.Conn, _ header) {
			accept(c)
			io.ReadFull(c, make([]byte, 4+3))
			writeAck(c, 3)
			writeAck(c, 1)
			io.Copy(io.Discard, c)
		})
		w := openInput(t, d, "t")
		w.Write([]byte("abc"))
		<-w.Done()
		if _, err := w.Write([]byte("d")); !errors.Is(err, ErrProtocol) {
			t.Error(err)
		}
	})
	t.Run("silence", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
		defer cancel()
		d := hostile(t, func(c net.Conn, _ header) { io.Copy(io.Discard, c) })
		if _, err := OpenOutput(ctx, d, "t", Stdout, 0); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
	t.Run("gone", func(t *testing.T) {
		d := hostile(t, func(c net.Conn, _ header) { accept(c) })
		r := openOutput(t, d, "t")
		if _, err := r.WriteTo(io.Discard); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	})
}

// A daemon that restarts goes on with a stdin where the guest is.
func TestInputContinuesInNewWriter(t *testing.T) {
	g := newGuest(t)
	in := g.hub.Input("t")
	defer in.Close()
	w := openInput(t, g.dial, "t")
	w.Write([]byte("one "))
	var b [4]byte
	io.ReadFull(in, b[:])
	w.Close()
	w = openInput(t, g.dial, "t")
	w.Write([]byte("two"))
	w.CloseWrite()
	if rest, err := io.ReadAll(in); string(rest) != "two" || err != nil {
		t.Errorf("%q, %v", rest, err)
	}
}

// Close ends a WriteTo that waits for the guest, connected or dialling.
// TestInputProgress learns how far the guest is, over lost connections and from writer to writer.
func TestInputProgress(t *testing.T) {
	g := newGuest(t)
	in := g.hub.Input("in")
	defer in.Close()
	var dials atomic.Int32
	w := openInput(t, g.fragile(15_000, &dials), "in")
	told := make(chan uint64, 1000)
	w.Notify(func(consumed uint64) { told <- consumed })
	if w.Offset() != 0 {
		t.Errorf("a new stream is at %d", w.Offset())
	}
	const total = 20_000
	go writeChunks(w, make([]byte, total))
	if _, err := io.ReadFull(in, make([]byte, total)); err != nil {
		t.Fatal(err)
	}
	ctx := testContext(t)
	for last := uint64(0); last < total; {
		select {
		case consumed := <-told:
			if consumed < last {
				t.Fatalf("%d after %d", consumed, last)
			}
			last = consumed
		case <-ctx.Done():
			t.Fatalf("told %d of %d", last, total)
		}
	}
	w.Close()
	if again := openInput(t, g.dial, "in"); again.Offset() != total {
		t.Errorf("the next writer finds the stream at %d", again.Offset())
	}
}

func TestReaderClose(t *testing.T) {
	for _, cut := range []bool{false, true} {
		g := newGuest(t)
		var dead atomic.Bool
		d := func(ctx context.Context) (net.Conn, error) {
			if dead.Load() {
				return nil, errors.New("no route")
			}
			return g.dial(ctx)
		}
		r := openOutput(t, d, "t")
		ended := make(chan error, 1)
		go func() { _, err := r.WriteTo(io.Discard); ended <- err }()
		if cut {
			dead.Store(true)
			r.mu.Lock()
			r.conn.Close()
			r.mu.Unlock()
		}
		r.Close()
		if err := <-ended; !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		if c := g.hub.Output("t"); c != nil {
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			c.Close(ctx)
		}
	}
}

func TestRing(t *testing.T) {
	var r ring
	var model []byte
	for range 4000 {
		if n := rand.IntN(9000); len(model)+n <= Window && rand.IntN(2) == 0 {
			p := randomBytes(n)
			if n > 0 {
				r.push(p)
			}
			model = append(model, p...)
		} else {
			n = min(n, len(model))
			if n > 0 {
				r.discard(n)
			}
			model = model[n:]
		}
		if len(model) > 0 {
			off := rand.IntN(len(model))
			got := make([]byte, min(100, len(model)-off))
			r.copy(got, off)
			if !bytes.Equal(got, model[off:off+len(got)]) {
				t.Fatal("the ring differs from its model")
			}
		} else if r.buf != nil {
			t.Fatal("an empty ring holds memory")
		}
	}
}

func BenchmarkOutput(b *testing.B) {
	hub := NewHub()
	path := filepath.Join(b.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	go hub.Serve(l)
	d := func(context.Context) (net.Conn, error) { return net.Dial("unix", path) }
	r, err := OpenOutput(context.Background(), d, "t", Stdout, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	o := hub.Output("t")
	chunk := make([]byte, 32<<10)
	b.SetBytes(int64(len(chunk)))
	go func() {
		for range b.N {
			o.Write(chunk)
		}
		o.Close(context.Background())
	}()
	if _, err := r.WriteTo(io.Discard); err != nil {
		b.Fatal(err)
	}
}
