package link

import (
	"errors"
	"net"
	"testing"

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
