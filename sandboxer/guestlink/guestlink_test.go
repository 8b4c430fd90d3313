package guestlink

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/guest/protocol/mux"
	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/vmtest"
)

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// guest listens as QEMU does for the host and gives each connection to behave.
type guest struct {
	endpoint vm.Endpoint
	mu       sync.Mutex
	conns    []*net.UnixConn
}

func newGuest(t *testing.T, behave func(ctx context.Context, conn *net.UnixConn)) *guest {
	t.Helper()
	dir, err := os.MkdirTemp("", "link")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dir + "/agent.sock", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	g := &guest{endpoint: vm.Endpoint{SerialSocket: l.Addr().String()}}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			g.mu.Lock()
			g.conns = append(g.conns, conn)
			g.mu.Unlock()
			wg.Go(func() { behave(ctx, conn) })
		}
	})
	t.Cleanup(func() {
		cancel()
		l.Close()
		g.hangUp()
		wg.Wait()
		os.RemoveAll(dir)
	})
	return g
}

// hangUp breaks the transport under whoever is connected.
func (g *guest) hangUp() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, c := range g.conns {
		// Shut down, because the agent works on a duplicate.
		c.CloseWrite()
		c.CloseRead()
		c.Close()
	}
	g.conns = nil
}

func agent(ctx context.Context, conn *net.UnixConn) { vmtest.ServeAgent(ctx, conn, nil) }

func agentSaying(hello []byte) func(context.Context, *net.UnixConn) {
	return func(ctx context.Context, conn *net.UnixConn) { vmtest.ServeAgent(ctx, conn, hello) }
}

func open(t *testing.T, e vm.Endpoint) Link {
	t.Helper()
	l, err := Open(testContext(t), e, quiet())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func echo(t *testing.T, l Link) {
	t.Helper()
	conn, err := l.Dial(testContext(t), protocol.PortTask)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	io.WriteString(conn, "ping")
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); string(got) != "ping" || err != nil {
		t.Fatalf("%q, %v", got, err)
	}
}

func TestHelloAndDial(t *testing.T) {
	for _, restored := range []bool{false, true} {
		g := newGuest(t, agent)
		g.endpoint.Restored = restored
		l := open(t, g.endpoint)
		hello, err := l.Hello(testContext(t))
		if err != nil || hello.GetProtocolVersion() != protocol.Version {
			t.Fatalf("%v, %v", hello, err)
		}
		echo(t, l)
	}
}

func TestTransportComesBack(t *testing.T) {
	g := newGuest(t, agent)
	l := open(t, g.endpoint)
	if _, err := l.Hello(testContext(t)); err != nil {
		t.Fatal(err)
	}
	conn, err := l.Dial(testContext(t), protocol.PortTask)
	if err != nil {
		t.Fatal(err)
	}
	g.hangUp()
	if _, err := conn.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Fatalf("the stream of a lost session: %v", err)
	}
	// Until the loss is noticed, streams of the old session are handed out.
	<-conn.(*mux.Conn).Session().Done()
	for {
		l.(*serialLink).mu.Lock()
		session := l.(*serialLink).session
		l.(*serialLink).mu.Unlock()
		if session == nil || session.Err() == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	echo(t, l)
	select {
	case <-l.Broken():
		t.Fatal("broken")
	default:
	}
}

func TestGuestThatKeepsHangingUp(t *testing.T) {
	g := newGuest(t, func(ctx context.Context, conn *net.UnixConn) {
		hello := make([]byte, 24)
		io.ReadFull(conn, hello)
		conn.Write(hello)
		conn.Close()
	})
	l := open(t, g.endpoint)
	select {
	case <-l.Broken():
	case <-testContext(t).Done():
		t.Fatal("the link is not given up")
	}
	if _, err := l.Dial(testContext(t), protocol.PortTask); err == nil || !strings.Contains(err.Error(), "times in a row") {
		t.Fatalf("got %v", err)
	}
}

func TestHostileGuestBreaksTheLink(t *testing.T) {
	manyFeatures, err := proto.Marshal(&protocol.Hello{ProtocolVersion: 1, Features: make([]string, maxFeatures+1)})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		behave func(context.Context, *net.UnixConn)
		want   string
	}{
		"over-long hello":   {agentSaying([]byte{0xff, 0xff, 0xff, 0xff}), "claims 4294967295 bytes"},
		"garbage as hello":  {agentSaying([]byte{0, 0, 0, 4, 0xff, 0xff, 0xff, 0xff}), "cannot decode"},
		"too many features": {agentSaying(append([]byte{0, 0, 0, byte(len(manyFeatures))}, manyFeatures...)), "features"},
		"another port": {func(ctx context.Context, conn *net.UnixConn) {
			callPort(conn, protocol.PortTask)
		}, "called port 1024"},
		"over-long frame": {func(ctx context.Context, conn *net.UnixConn) {
			hello := make([]byte, 24)
			io.ReadFull(conn, hello)
			conn.Write(append(hello, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 0xff, 0xff, 0xff))
			io.Copy(io.Discard, conn)
		}, "longer than"},
	} {
		t.Run(name, func(t *testing.T) {
			l := open(t, newGuest(t, c.behave).endpoint)
			if _, err := l.Hello(testContext(t)); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v", err)
			}
			<-l.Broken()
			if _, err := l.Dial(testContext(t), protocol.PortTask); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("Dial: %v", err)
			}
		})
	}
}

// callPort answers the handshake and opens a yamux stream to a port of the host.
func callPort(conn *net.UnixConn, port uint32) {
	hello := make([]byte, 24)
	io.ReadFull(conn, hello)
	conn.Write(hello)
	conn.Write([]byte{0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, byte(port >> 8), byte(port)})
	io.Copy(io.Discard, conn)
}

func TestSilentGuest(t *testing.T) {
	l := open(t, newGuest(t, func(context.Context, *net.UnixConn) {}).endpoint)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if _, err := l.Hello(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Hello: %v", err)
	}
	if _, err := l.Dial(ctx, protocol.PortTask); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Dial: %v", err)
	}
}

func TestCloseEndsEverything(t *testing.T) {
	l := open(t, newGuest(t, func(context.Context, *net.UnixConn) {}).endpoint)
	waiting := make(chan error, 2)
	go func() {
		_, err := l.Hello(context.Background())
		waiting <- err
	}()
	go func() {
		_, err := l.Dial(context.Background(), protocol.PortTask)
		waiting <- err
	}()
	for range 2 {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := <-waiting; !errors.Is(err, net.ErrClosed) {
			t.Fatalf("got %v", err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, e := range []vm.Endpoint{{}, {SerialSocket: "/x", VsockCID: 3}} {
		if _, err := Open(testContext(t), e, quiet()); err == nil {
			t.Errorf("%+v was opened", e)
		}
	}
}

// fromCID is a connection of a guest.
type fromCID struct {
	net.Conn
	cid uint32
}

func (c fromCID) RemoteAddr() net.Addr { return &vsock.Addr{ContextID: c.cid, Port: 99} }

// exchange stands for the vsock device.
type exchange struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (x *exchange) Accept() (net.Conn, error) {
	select {
	case c := <-x.conns:
		return c, nil
	case <-x.closed:
		return nil, net.ErrClosed
	}
}
func (x *exchange) Close() error   { close(x.closed); return nil }
func (x *exchange) Addr() net.Addr { return &vsock.Addr{} }

// call connects to the host's hello port as the guest with the given context id.
func (x *exchange) call(cid uint32) net.Conn {
	near, far := net.Pipe()
	x.conns <- fromCID{far, cid}
	return near
}

func vsockPair(t *testing.T, cids ...uint32) (*exchange, []*vsockLink) {
	t.Helper()
	x := &exchange{conns: make(chan net.Conn), closed: make(chan struct{})}
	board := &switchboard{listen: func() (net.Listener, error) { return x, nil }}
	var links []*vsockLink
	for _, cid := range cids {
		l := newVsockLink(cid, board)
		l.dial = func(context.Context, uint32, uint32) (net.Conn, error) { return nil, errors.New("not in this test") }
		if err := board.add(l, quiet()); err != nil {
			t.Fatal(err)
		}
		links = append(links, l)
	}
	return x, links
}

func TestVsockCallsReachTheirLink(t *testing.T) {
	x, links := vsockPair(t, 5, 6)
	for i, l := range links {
		conn := x.call(l.cid)
		err := protocol.WriteMessage(conn, &protocol.Hello{ProtocolVersion: protocol.Version, AgentVersion: string(rune('a' + i))})
		if err != nil {
			t.Fatal(err)
		}
		reply := new(protocol.HelloReply)
		if err := protocol.ReadMessage(conn, reply); err != nil || reply.GetProtocolVersion() != protocol.Version {
			t.Fatalf("%v, %v", reply, err)
		}
		hello, err := l.Hello(testContext(t))
		if err != nil || hello.GetAgentVersion() != string(rune('a'+i)) {
			t.Fatalf("%v, %v", hello, err)
		}
	}
	// Somebody whom no pod waits for.
	if _, err := x.call(7).Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("a stranger was served: %v", err)
	}
	if err := links[0].board.add(newVsockLink(5, links[0].board), quiet()); err == nil {
		t.Error("two pods wait for the same guest")
	}
	for _, l := range links {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Dial(testContext(t), protocol.PortTask); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Dial after Close: %v", err)
		}
	}
	<-x.closed // with the last link
}

// The last pod's link closes the listener; the next one's opens it again, unless somebody else took
// the port meanwhile.
func TestVsockListensAgain(t *testing.T) {
	var listening []*exchange
	var err error
	board := &switchboard{listen: func() (net.Listener, error) {
		if err != nil {
			return nil, os.NewSyscallError("bind", err)
		}
		listening = append(listening, &exchange{conns: make(chan net.Conn), closed: make(chan struct{})})
		return listening[len(listening)-1], nil
	}}
	for i := range 2 {
		l := newVsockLink(5, board)
		if err := board.add(l, quiet()); err != nil {
			t.Fatal(err)
		}
		conn := listening[i].call(5)
		protocol.WriteMessage(conn, &protocol.Hello{ProtocolVersion: 1})
		if _, err := l.Hello(testContext(t)); err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for errno, want := range map[unix.Errno]string{
		unix.EADDRINUSE: "a second vmm-sandboxer", unix.EADDRNOTAVAIL: "modprobe vhost_vsock", unix.EPERM: "vsock port 1027: bind",
	} {
		err = errno
		if aerr := board.add(newVsockLink(5, board), quiet()); !errors.Is(aerr, errno) || !strings.Contains(aerr.Error(), want) {
			t.Errorf("got %v, want %q", aerr, want)
		}
	}
	if len(board.links) > 0 {
		t.Errorf("links without a listener: %v", board.links)
	}
}

func TestVsockHostileHello(t *testing.T) {
	x, links := vsockPair(t, 5, 6)
	defer links[1].Close()
	defer links[0].Close()
	x.call(5).Write([]byte{0xff, 0, 0, 0})
	<-links[0].Broken()
	if _, err := links[0].Hello(testContext(t)); !errors.Is(err, errMisbehaved) {
		t.Fatalf("got %v", err)
	}
	// A call that breaks off is only a call that broke off.
	x.call(6).Close()
	conn := x.call(6)
	defer conn.Close()
	protocol.WriteMessage(conn, &protocol.Hello{ProtocolVersion: 1})
	if _, err := links[1].Hello(testContext(t)); err != nil {
		t.Fatal(err)
	}
}

func TestVsockRestoredAsksForTheHello(t *testing.T) {
	_, links := vsockPair(t, 5)
	l := links[0]
	defer l.Close()
	attempts := 0 // only ask dials
	l.dial = func(_ context.Context, cid, port uint32) (net.Conn, error) {
		// What the kernel says of a guest that is gone, that does not listen, and that does not answer.
		if attempts++; attempts <= 3 {
			return nil, os.NewSyscallError("connect", []unix.Errno{unix.ENODEV, unix.ECONNRESET, unix.ETIMEDOUT}[attempts-1])
		}
		if cid != 5 || port != protocol.PortHello {
			return nil, errors.New("wrong address")
		}
		near, far := net.Pipe()
		go func() {
			protocol.WriteMessage(far, &protocol.Hello{ProtocolVersion: 1})
			far.Close()
		}()
		return near, nil
	}
	go l.ask()
	if _, err := l.Hello(testContext(t)); err != nil {
		t.Fatal(err)
	}
}
