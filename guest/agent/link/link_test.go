package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"time"

	"kuasar.io/kuasar/guest/protocol"
)

func TestGreet(t *testing.T) {
	greet := func(host func(net.Conn)) error {
		a, b := net.Pipe()
		go func() { defer b.Close(); host(b) }()
		return Greet(a, &protocol.Hello{ProtocolVersion: protocol.Version, AgentVersion: "x"})
	}
	if err := greet(func(c net.Conn) {
		h := new(protocol.Hello)
		if err := protocol.ReadMessage(c, h); err != nil || h.AgentVersion != "x" {
			t.Errorf("the host read %v, %v", h, err)
		}
		protocol.WriteMessage(c, &protocol.HelloReply{ProtocolVersion: 1})
	}); err != nil {
		t.Error(err)
	}
	if err := greet(func(c net.Conn) {
		protocol.ReadMessage(c, new(protocol.Hello))
		protocol.WriteMessage(c, &protocol.HelloReply{})
	}); err == nil {
		t.Error("an empty answer was taken for a good one")
	}
	if err := greet(func(net.Conn) {}); err == nil {
		t.Error("a host that hangs up was taken for a good one")
	}
}

func TestListener(t *testing.T) {
	s := &serialLink{listeners: map[uint32]*listener{}}
	l, err := s.Listen(1024)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Listen(1024); err == nil {
		t.Error("two listeners on one port")
	}
	a, b := net.Pipe()
	defer b.Close()
	go s.listeners[1024].deliver(a)
	conn, err := l.Accept()
	if err != nil || conn != a {
		t.Errorf("%v, %v", conn, err)
	}
	l.Close()
	l.Close()
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	s.listeners[1024].deliver(a) // does not block, and hangs up
	if _, err := b.Read(make([]byte, 1)); err == nil {
		t.Error("a connection to a closed listener lives")
	}
}

// A host that did not boot the machine learns who is there by connecting to the agent, whether or not
// the agent has found one to call.
func TestHelloToWhoeverConnects(t *testing.T) {
	for _, called := range []bool{true, false} {
		path := filepath.Join(t.TempDir(), "h")
		v := &vsockLink{log: slog.New(slog.DiscardHandler)}
		v.listen = func(port uint32) (net.Listener, error) {
			if port != protocol.PortHello {
				return nil, fmt.Errorf("port %d", port)
			}
			return net.Listen("unix", path)
		}
		home := make(chan net.Conn, 1)
		v.dial = func() (net.Conn, error) {
			if !called {
				return nil, errors.New("nobody is at home")
			}
			a, b := net.Pipe()
			home <- b
			return a, nil
		}
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() {
			ended <- v.Serve(ctx, func(_ context.Context, conn net.Conn) error {
				return Greet(conn, &protocol.Hello{AgentVersion: "x"})
			})
		}()
		ask := func(conn net.Conn) {
			t.Helper()
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(20 * time.Second))
			h := new(protocol.Hello)
			if err := protocol.ReadMessage(conn, h); err != nil || h.AgentVersion != "x" {
				t.Errorf("the host read %v, %v", h, err)
			}
			if err := protocol.WriteMessage(conn, &protocol.HelloReply{ProtocolVersion: 1}); err != nil {
				t.Error(err)
			}
			io.Copy(io.Discard, conn) // until the agent hangs up, which is when it may be asked again
		}
		if called {
			ask(<-home)
		}
		for range 3 * maxHellos {
			var conn net.Conn
			for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
				var err error
				if conn, err = net.Dial("unix", path); err == nil {
					break
				}
				if time.Now().After(deadline) {
					t.Fatal(err)
				}
			}
			ask(conn)
		}
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("ended with %v", err)
		}
	}
}
