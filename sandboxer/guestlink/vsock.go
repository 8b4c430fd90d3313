package guestlink

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
)

const (
	// maxGreeting bounds the calls of guests that are being answered at a time, for each guest.
	maxGreeting = 4
	// redialPause lies between attempts to reach an agent that does not listen (yet, or again).
	redialPause = 50 * time.Millisecond
)

// vsockLink is the link over vsock. The host listens once for all guests: see switchboard.
type vsockLink struct {
	cid   uint32
	board *switchboard
	dial  func(ctx context.Context, cid, port uint32) (net.Conn, error)
	greeting
	end
	calls chan struct{} // holds a token for every call that is being answered
}

// hosts is the node's switchboard.
var hosts = &switchboard{listen: func() (net.Listener, error) {
	return vsock.ListenContextID(vsock.Host, protocol.PortHello, nil)
}}

func dialVsock(ctx context.Context, cid, port uint32) (net.Conn, error) {
	return vsock.DialContext(ctx, cid, port, nil)
}

func openVsock(cid uint32, restored bool, log *slog.Logger) (*vsockLink, error) {
	l := newVsockLink(cid, hosts)
	if err := l.board.add(l, log); err != nil {
		return nil, err
	}
	if restored {
		go l.ask()
	}
	return l, nil
}

func newVsockLink(cid uint32, board *switchboard) *vsockLink {
	return &vsockLink{
		cid:      cid,
		board:    board,
		dial:     dialVsock,
		greeting: greeting{said: make(chan struct{})},
		end:      end{broken: make(chan struct{})},
		calls:    make(chan struct{}, maxGreeting),
	}
}

// ask fetches the hello of an agent that has said it to an earlier daemon: the agent says it again
// to whoever of the host connects to its own hello port.
func (l *vsockLink) ask() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-l.broken:
			cancel()
		case <-ctx.Done():
		}
	}()
	for {
		conn, err := l.dial(ctx, l.cid, protocol.PortHello)
		if err == nil {
			l.answer(conn)
		}
		select {
		case <-l.said:
			return
		case <-ctx.Done():
			return
		case <-time.After(redialPause):
		}
	}
}

func (l *vsockLink) answer(conn net.Conn) {
	if err := l.greet(conn); errors.Is(err, errMisbehaved) {
		l.fail(err)
	}
}

// called handles a call of the guest; it does not block.
func (l *vsockLink) called(conn net.Conn) {
	select {
	case l.calls <- struct{}{}:
		go func() {
			defer func() { <-l.calls }()
			l.answer(conn)
		}()
	default:
		conn.Close()
	}
}

func (l *vsockLink) Hello(ctx context.Context) (*protocol.Hello, error) {
	return l.wait(ctx, &l.end)
}

func (l *vsockLink) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	select {
	case <-l.broken:
		return nil, fmt.Errorf("cannot dial port %d of the guest: %w", port, l.Err())
	default:
	}
	conn, err := l.dial(ctx, l.cid, port)
	if err != nil {
		return nil, fmt.Errorf("cannot dial port %d of the guest: %w", port, err)
	}
	return conn, nil
}

func (l *vsockLink) Close() error {
	l.fail(errClosed)
	return l.board.remove(l)
}

// switchboard listens on the hello port of the host while there is a link that it is for, and gives
// each guest's calls to its link.
type switchboard struct {
	listen func() (net.Listener, error)

	mu       sync.Mutex
	listener net.Listener
	links    map[uint32]*vsockLink
}

func (b *switchboard) add(l *vsockLink, log *slog.Logger) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.links[l.cid] != nil {
		return fmt.Errorf("cannot wait for the guest with the context id %d: another pod has it", l.cid)
	}
	if b.listener == nil {
		listener, err := b.listen()
		if err != nil {
			return listenError(err)
		}
		b.listener = listener
		go b.serve(listener, log)
	}
	if b.links == nil {
		b.links = make(map[uint32]*vsockLink)
	}
	b.links[l.cid] = l
	return nil
}

// listenError says what mends err.
func listenError(err error) error {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		err = fmt.Errorf("another program of this node does, such as a second vmm-sandboxer, and guests call this port only: "+
			"stop it (ss --vsock --listening --processes names it): %w", err)
	case errors.Is(err, unix.EADDRNOTAVAIL), errors.Is(err, unix.ENODEV), errors.Is(err, unix.EAFNOSUPPORT):
		err = fmt.Errorf("the host's kernel does not speak vsock with guests (modprobe vhost_vsock): %w", err)
	}
	return fmt.Errorf("cannot listen for guests on vsock port %d: %w", protocol.PortHello, err)
}

func (b *switchboard) remove(l *vsockLink) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.links[l.cid] != l {
		return nil
	}
	delete(b.links, l.cid)
	if len(b.links) > 0 {
		return nil
	}
	listener := b.listener
	b.listener = nil
	return listener.Close()
}

func (b *switchboard) serve(listener net.Listener, log *slog.Logger) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			b.mu.Lock()
			current := b.listener == listener
			b.mu.Unlock()
			if !current {
				return
			}
			log.Error("cannot accept the calls of guests", "error", err)
			time.Sleep(redialPause)
			continue
		}
		b.mu.Lock()
		l := b.links[peer(conn)]
		b.mu.Unlock()
		if l == nil {
			conn.Close()
			continue
		}
		l.called(conn)
	}
}

// peer is the context id of whoever called, 0 if that has none.
func peer(conn net.Conn) uint32 {
	if a, ok := conn.RemoteAddr().(*vsock.Addr); ok {
		return a.ContextID
	}
	return 0
}
