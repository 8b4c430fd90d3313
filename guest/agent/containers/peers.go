package containers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"kuasar.io/kuasar/guest/protocol"
)

// Ports of the guest that a client may name for streams: those that iSulad hands out. The agent's
// own are below.
const (
	minPeerPort = 2000
	maxPeerPort = 65534
)

// peer is one standard stream for which the guest listens: the client connects once, and then raw
// bytes travel. There is no buffer here. Until the peer comes, what the process writes stays in its
// pipe, which outlives the process.
type peer struct {
	port     uint32
	listener net.Listener
	timer    *time.Timer // stops waiting for the peer
	settled  func()      // called once, when nothing listens any more

	once  sync.Once
	ready chan struct{} // closed when it is known whether the peer comes
	conn  net.Conn      // set before ready is closed; nil if nobody came

	drain sync.Once // of an input whose process does not read it
}

// accept waits for the peer. The first connection is the only one.
func (p *peer) accept() {
	conn, err := p.listener.Accept()
	if err != nil {
		conn = nil
	}
	p.settle(conn)
}

// settle ends the waiting, without a peer if conn is nil. Only the first call counts. When any returns,
// the port is free.
func (p *peer) settle(conn net.Conn) {
	p.once.Do(func() {
		p.conn, conn = conn, nil
		close(p.ready)
		p.timer.Stop()
		p.listener.Close()
		p.settled()
	})
	if conn != nil {
		conn.Close()
	}
}

var errNoPeer = errors.New("nobody has connected to the stream")

// peerOutput is a standard output or error. Its end is told by peers.finish, not by Close: iSulad
// stops to read all streams soon after the first of them ends.
type peerOutput struct{ *peer }

// Write waits for the peer, and while it does not read. It fails once the peer is gone or given up.
func (o peerOutput) Write(b []byte) (int, error) {
	<-o.ready
	if o.conn == nil {
		return 0, errNoPeer
	}
	return o.conn.Write(b)
}

func (peerOutput) Close(context.Context) error { return nil }

// peerInput is a standard input. It ends when the peer closes its connection.
type peerInput struct{ *peer }

func (i peerInput) Read(b []byte) (int, error) {
	<-i.ready
	if i.conn == nil {
		return 0, io.EOF
	}
	return i.conn.Read(b)
}

// Close discards further input. The connection stays open until the outputs end: a peer that cannot
// write any more may give up reading.
func (i peerInput) Close() error {
	i.drain.Do(func() {
		go func() {
			if <-i.ready; i.conn != nil {
				io.Copy(io.Discard, i.conn)
			}
		}()
	})
	return nil
}

// peers are the streams of one process for which the guest listens, by their names. The standard
// input, if it is among them, is in as well.
type peers struct {
	all   map[string]*peer
	in    *peer
	limit time.Duration // of finish
}

// openPeers listens for those of a process's streams that are named so. It returns nil if none is.
func (s *Service) openPeers(names stdioNames) (_ *peers, err error) {
	ps := &peers{all: map[string]*peer{}, limit: s.limits.drain}
	defer func() {
		if err != nil {
			ps.abort()
		}
	}()
	for i, name := range names.all() {
		if !strings.HasPrefix(name, protocol.VsockScheme) {
			continue
		}
		if ps.all[name] != nil {
			return nil, fmt.Errorf("standard stream %q is named twice: %w", name, errdefs.ErrInvalidArgument)
		}
		p, err := s.openPeer(name)
		if err != nil {
			return nil, err
		}
		ps.all[name] = p
		if i == 0 {
			ps.in = p
		}
	}
	if len(ps.all) == 0 {
		return nil, nil
	}
	return ps, nil
}

// openPeer listens for one stream. s.announcing is held.
func (s *Service) openPeer(name string) (*peer, error) {
	port, err := s.peerPort(name)
	if err != nil {
		return nil, fmt.Errorf("standard stream %q: %w", name, err)
	}
	// The client hands the numbers out anew once a process has ended for it: whoever still waits
	// here waits for nobody.
	s.mu.Lock()
	old := s.listening[port]
	s.mu.Unlock()
	if old != nil {
		old.settle(nil)
	}
	l, err := s.listen(port)
	if err != nil {
		return nil, fmt.Errorf("standard stream %q: %w", name, err)
	}
	p := &peer{port: port, listener: l, ready: make(chan struct{})}
	p.settled = func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.listening[port] == p {
			delete(s.listening, port)
		}
	}
	s.mu.Lock()
	s.listening[port] = p
	s.mu.Unlock()
	// settle uses the timer, which must not end before it is here.
	p.timer = time.AfterFunc(time.Hour, func() { p.settle(nil) })
	p.timer.Reset(s.limits.connect)
	go p.accept()
	return p, nil
}

// peerPort returns the port in the name of a stream for which this guest is to listen.
func (s *Service) peerPort(name string) (uint32, error) {
	cid, port, ok := strings.Cut(strings.TrimPrefix(name, protocol.VsockScheme), ":")
	id, idErr := strconv.ParseUint(cid, 10, 32)
	number, portErr := strconv.ParseUint(port, 10, 32)
	if !ok || idErr != nil || portErr != nil {
		return 0, fmt.Errorf("want %s<context id>:<port>: %w", protocol.VsockScheme, errdefs.ErrInvalidArgument)
	}
	if number < minPeerPort || number > maxPeerPort {
		return 0, fmt.Errorf("the port must be from %d to %d: %w", minPeerPort, maxPeerPort, errdefs.ErrInvalidArgument)
	}
	if s.listen == nil || s.contextID == nil {
		return 0, fmt.Errorf("this guest has no vsock: %w", errdefs.ErrFailedPrecondition)
	}
	own, err := s.contextID()
	if err != nil {
		return 0, fmt.Errorf("this guest has no vsock: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	if uint32(id) != own {
		return 0, fmt.Errorf("this guest has the context id %d: %w", own, errdefs.ErrInvalidArgument)
	}
	return uint32(number), nil
}

// finish ends the streams of a process that has ended or will not be. written returns when the last
// byte was written to them. Once then for each its peer has come, or is not awaited any more, the
// outputs end together; the connections are closed when the peers have closed those. It returns after
// all that, or after the limit, which is for peers that do not read.
func (ps *peers) finish(written func()) {
	if ps == nil {
		written()
		return
	}
	defer time.AfterFunc(ps.limit, ps.abort).Stop()
	written()
	for _, p := range ps.all {
		<-p.ready
	}
	var reading sync.WaitGroup
	for _, p := range ps.all {
		if p == ps.in || p.conn == nil {
			continue
		}
		if half, ok := p.conn.(interface{ CloseWrite() error }); !ok || half.CloseWrite() != nil {
			p.conn.Close()
		}
		reading.Go(func() { io.Copy(io.Discard, p.conn) })
	}
	reading.Wait()
	ps.abort()
}

// abort closes everything.
func (ps *peers) abort() {
	if ps == nil {
		return
	}
	for _, p := range ps.all {
		p.settle(nil)
		if <-p.ready; p.conn != nil {
			p.conn.Close()
		}
	}
}

// announcedStreams are the streams of an announced process: those for which the guest listens, and
// for the other names those of the Service.
type announcedStreams struct {
	streams
	peers *peers
}

func (a announcedStreams) check(name string) error {
	if a.peers != nil && a.peers.all[name] != nil {
		return nil
	}
	return a.streams.check(name)
}

func (a announcedStreams) output(name string) output {
	if a.peers != nil && a.peers.all[name] != nil {
		return peerOutput{a.peers.all[name]}
	}
	return a.streams.output(name)
}

func (a announcedStreams) input(name string) io.ReadCloser {
	if a.peers != nil && a.peers.all[name] != nil {
		return peerInput{a.peers.all[name]}
	}
	return a.streams.input(name)
}

// expect does nothing for those for which the guest listens: they have a time of their own.
func (a announcedStreams) expect(name string) func() {
	if a.peers != nil && a.peers.all[name] != nil {
		return func() {}
	}
	return a.streams.expect(name)
}
