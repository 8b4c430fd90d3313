// Package link is the guest's end of the connection to the host. Whatever carries it, vsock or a
// multiplex on a virtio-serial port, the agent listens on ports and calls home.
package link

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/agent/cmdline"
	"kuasar.io/kuasar/guest/agent/devices"
	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/guest/protocol/mux"
)

// Link is one transport.
type Link interface {
	// Listen returns the listener of a port. All of them must exist before Serve. The caller
	// closes it.
	Listen(port uint32) (net.Listener, error)
	// Serve carries connections until ctx ends or the transport fails for good. hello is called
	// with a connection to protocol.PortHello whenever there is a new host to greet; it closes
	// the connection.
	Serve(ctx context.Context, hello func(ctx context.Context, conn net.Conn) error) error
	// String names the transport for people.
	String() string
}

// Open finds the transport that the host offers: of the wanted kind, or for an empty kind whichever
// is there. Without one it waits for the device to be plugged in, and says so once in the log.
func Open(ctx context.Context, kind string, log *slog.Logger) (Link, error) {
	if l := find(kind); l != nil {
		return open(l, log)
	}
	missing := fmt.Sprintf("no vsock device and no virtio-serial port named %s", protocol.SerialPort)
	switch kind {
	case cmdline.Vsock:
		missing = "no vsock device"
	case cmdline.Serial:
		missing = fmt.Sprintf("no virtio-serial port named %s", protocol.SerialPort)
	}
	log.Warn("cannot reach the host yet, waiting for its device", "missing", missing)
	var found *candidate
	_, err := devices.Wait(ctx, "", func() (string, bool) {
		if found = find(kind); found == nil {
			return "", false
		}
		return found.path, true
	})
	if err != nil {
		return nil, fmt.Errorf("cannot reach the host: %s: %w", missing, err)
	}
	return open(found, log)
}

// candidate is a device that can carry the link.
type candidate struct {
	kind, path string
}

func find(kind string) *candidate {
	if kind != cmdline.Serial {
		// The device exists in every kernel with vsock; only with a virtio device behind it does
		// this machine have an address.
		if cid, err := vsock.ContextID(); err == nil && cid > vsock.Host && cid < ^uint32(0) {
			return &candidate{cmdline.Vsock, "/dev/vsock"}
		}
	}
	if kind != cmdline.Vsock {
		if path, ok := devices.SerialPort(protocol.SerialPort); ok {
			return &candidate{cmdline.Serial, path}
		}
	}
	if kind == cmdline.Serial {
		// Only where the host has said that there is one: with names, this port may be another's.
		if path, ok := devices.NamelessSerialPort(); ok {
			return &candidate{cmdline.Serial, path}
		}
	}
	return nil
}

func open(c *candidate, log *slog.Logger) (Link, error) {
	if c.kind == cmdline.Vsock {
		return newVsockLink(log), nil
	}
	// The device node may lag behind its description, but not for long.
	fd, err := unix.Open(c.path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", c.path, err)
	}
	return &serialLink{port: os.NewFile(uintptr(fd), c.path), log: log, listeners: map[uint32]*listener{}}, nil
}

// retry spaces attempts to do what should succeed at once.
const (
	retryMin = 10 * time.Millisecond
	retryMax = time.Second
)

// maxHellos bounds the hosts that are greeted at the same time; there is one, and its predecessor.
const maxHellos = 4

// vsockLink is the production transport.
type vsockLink struct {
	log    *slog.Logger
	listen func(port uint32) (net.Listener, error)
	dial   func() (net.Conn, error) // to the host's protocol.PortHello
}

func newVsockLink(log *slog.Logger) *vsockLink {
	return &vsockLink{log: log, listen: ListenVsock, dial: func() (net.Conn, error) {
		return vsock.Dial(vsock.Host, protocol.PortHello, nil)
	}}
}

func (*vsockLink) String() string { return "vsock" }

func (v *vsockLink) Listen(port uint32) (net.Listener, error) { return v.listen(port) }

// ContextID is this machine's address on vsock. It fails where there is no vsock.
func ContextID() (uint32, error) { return vsock.ContextID() }

// ListenVsock listens on a vsock port of this machine for connections of the host; those of others
// are dropped. The caller closes the listener.
func ListenVsock(port uint32) (net.Listener, error) {
	l, err := vsock.Listen(port, nil)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on vsock port %d: %w", port, err)
	}
	return hostOnly{l}, nil
}

// hostOnly drops connections that do not come from the host: containers share the guest's kernel,
// and through vsock's loopback any of them could reach the agent.
type hostOnly struct{ net.Listener }

func (l hostOnly) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if a, ok := conn.RemoteAddr().(*vsock.Addr); ok && a.ContextID == vsock.Host {
			return conn, nil
		}
		conn.Close()
	}
}

func (v *vsockLink) Serve(ctx context.Context, hello func(context.Context, net.Conn) error) error {
	// Before the first call home: a host that has answered it may be replaced at any time.
	l, err := v.Listen(protocol.PortHello)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { l.Close() })()
	failed := make(chan error, 1)
	go func() { failed <- v.greet(ctx, l, hello) }()
	if err := v.callHome(ctx, hello); err != nil {
		return err
	}
	// From here on the host connects to the listeners, now and after it was restarted.
	select {
	case <-ctx.Done():
		return ctx.Err()
	case err := <-failed:
		return err
	}
}

// greet says hello to each host that connects, and returns when the listener fails.
func (v *vsockLink) greet(ctx context.Context, l net.Listener, hello func(context.Context, net.Conn) error) error {
	defer l.Close()
	calls := make(chan struct{}, maxHellos)
	for {
		conn, err := l.Accept()
		if err != nil {
			return fmt.Errorf("cannot be asked for the hello: %w", err)
		}
		select {
		case calls <- struct{}{}:
		default:
			conn.Close()
			continue
		}
		go func() {
			defer func() { <-calls }()
			if err := hello(ctx, conn); err != nil {
				v.log.Debug("a host that asked for the hello did not take it", "error", err)
			}
		}()
	}
}

// callHome says hello to the host that has booted this machine, or to the one that comes after it.
func (v *vsockLink) callHome(ctx context.Context, hello func(context.Context, net.Conn) error) error {
	for pause := retryMin; ; pause = min(2*pause, retryMax) {
		conn, err := v.dial()
		if err == nil {
			err = hello(ctx, conn)
		}
		if err == nil {
			return nil
		}
		v.log.Debug("cannot call home, trying again", "error", err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
}

// serialLink is the transport for hosts without vsock.
type serialLink struct {
	port *os.File
	log  *slog.Logger

	mu        sync.Mutex
	listeners map[uint32]*listener
}

func (*serialLink) String() string { return "virtio-serial" }

func (s *serialLink) Listen(port uint32) (net.Listener, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.listeners[port] != nil {
		return nil, fmt.Errorf("cannot listen on port %d: %w", port, unix.EADDRINUSE)
	}
	l := &listener{port: port, conns: make(chan net.Conn), closed: make(chan struct{})}
	s.listeners[port] = l
	return l, nil
}

func (s *serialLink) Serve(ctx context.Context, hello func(context.Context, net.Conn) error) error {
	defer s.port.Close()
	return mux.Serve(ctx, s.port, func(session *mux.Session) { s.serve(ctx, session, hello) })
}

// serve handles one host until it is gone.
func (s *serialLink) serve(ctx context.Context, session *mux.Session, hello func(context.Context, net.Conn) error) {
	go func() {
		conn, err := session.Open(ctx, protocol.PortHello)
		if err == nil {
			err = hello(ctx, conn)
		}
		if err != nil {
			// The host that does not answer is on its way out; the next one starts afresh.
			s.log.Debug("cannot call home", "error", err)
		}
	}()
	for {
		conn, port, err := session.Accept()
		if err != nil {
			s.log.Debug("the host has left", "error", err)
			return
		}
		s.mu.Lock()
		l := s.listeners[port]
		s.mu.Unlock()
		if l == nil {
			conn.Close()
			continue
		}
		l.deliver(conn)
	}
}

// listener is one port of a serialLink.
type listener struct {
	port   uint32
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

// deliver waits until the connection is accepted; those who listen accept without delay.
func (l *listener) deliver(conn net.Conn) {
	select {
	case l.conns <- conn:
	case <-l.closed:
		conn.Close()
	}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *listener) Addr() net.Addr { return addr(l.port) }

type addr uint32

func (addr) Network() string  { return "virtio-serial" }
func (a addr) String() string { return fmt.Sprint(uint32(a)) }

// Greet says hello on a connection to protocol.PortHello, waits for the answer and closes the
// connection.
func Greet(conn net.Conn, hello *protocol.Hello) error {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(helloTimeout))
	if err := protocol.WriteMessage(conn, hello); err != nil {
		return fmt.Errorf("cannot say hello: %w", err)
	}
	reply := new(protocol.HelloReply)
	if err := protocol.ReadMessage(conn, reply); err != nil {
		return fmt.Errorf("cannot say hello: no answer: %w", err)
	}
	if reply.GetProtocolVersion() == 0 {
		return errors.New("cannot say hello: the host refused it")
	}
	return nil
}

const helloTimeout = 10 * time.Second
