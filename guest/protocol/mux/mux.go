// Package mux carries many streams between the daemon and a guest over one virtio-serial port,
// for hosts that have no vsock. Its streams are yamux's; what it adds is the beginning, the end and
// the distrust.
//
// # The beginning
//
// A virtio-serial port is one pipe for the life of the machine, whoever connects to its host side:
// what an earlier daemon sent may still wait in the guest's queue when the next one connects, and
// the guest then sees one stream without a seam (and the new daemon may see bytes meant for the
// old one). So a session begins with a handshake:
//
//	host  → guest  magic (8 bytes), nonce (16 random bytes)
//	guest → host   the same 24 bytes
//
// The guest discards everything before a magic, the host everything before its own nonce. Then both
// speak yamux; the host is yamux's client. The first byte of the magic can never begin a yamux
// frame, so a guest that is still in an old session and finds one at a frame's boundary knows that
// it has a new host and answers at once. If it was in the middle of a frame, it swallows the
// handshake: the host then gives up after handshakeTimeout and stays disconnected for holdDown, in
// which the guest drains its queue, reads an end of file and starts to scan.
//
// A guest that boots has not opened its port yet. What the host sends meanwhile is not lost: QEMU
// leaves it in the socket until the port is open. DialFirst therefore sends its handshake once and
// waits for the answer, which costs no polling and adds no delay to a boot.
//
// # The end
//
// A session ends with its transport, with Close, and with the first frame that our own side would
// not have sent (a *ProtocolError): see guard. Streams then fail with an error; an end of file on a
// stream is only ever the peer's CloseWrite or Close.
package mux

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

const (
	// handshakeTimeout bounds the wait for the guest's answer where the guest is known to run.
	handshakeTimeout = 500 * time.Millisecond
	// holdDown is how long the host stays disconnected after an attempt without an answer, so
	// that the guest reads an end of file.
	holdDown = 100 * time.Millisecond
	// writeTimeout ends a session whose peer takes nothing any more.
	writeTimeout = 30 * time.Second
	// portTimeout bounds the wait for the port number at the head of an accepted stream.
	portTimeout = 10 * time.Second

	// maxFrame is the longest data frame that either end sends or accepts, in bytes. It bounds
	// how long one stream delays another, and yamux's copy buffer, which never shrinks.
	maxFrame = 32 << 10
	// window is yamux's initial window of a stream, in bytes; its minimum, and ours.
	window = 256 << 10
	// backlog bounds the streams that the peer opened and nobody has accepted yet.
	backlog = 32
	// maxGuestStreams bounds how many streams a guest may open towards the host in the life of
	// one session. It needs one, for its hello.
	maxGuestStreams = 16
	// maxComplaints bounds the frames that yamux only warns about (data for streams that do not
	// exist, for instance) in the life of one session.
	maxComplaints = 1024
)

// A ProtocolError says that the peer sent what no peer of this build sends. Reconnecting to it is
// pointless.
type ProtocolError struct{ msg string }

func (e *ProtocolError) Error() string { return "the peer broke the multiplex protocol: " + e.msg }

// ErrClosed is the error of a session that this end has closed.
var ErrClosed = errors.New("the multiplex session is closed")

// Session is one connection between a host and a guest. Its methods may be called from several
// goroutines.
type Session struct {
	yamux      *yamux.Session
	guard      *guard
	closed     atomic.Bool // by our own Close
	complaints atomic.Int32
	stalled    atomic.Bool // a write timed out
}

// newSession starts yamux on conn, which the handshake has left at the first frame.
func newSession(conn io.ReadWriteCloser, g *guard, host bool) (*Session, error) {
	s := &Session{guard: g}
	cfg := &yamux.Config{
		AcceptBacklog:          backlog,
		ConnectionWriteTimeout: writeTimeout,
		// Only consulted by the keep-alive, which is off: the death of a guest is seen by its
		// process, and every ping would wake an idle guest.
		KeepAliveInterval:   time.Hour,
		MaxStreamWindowSize: window,
		// The streams' own timeouts are off: the first one would end the whole session, the
		// second one half-closed streams that are still read.
		StreamOpenTimeout:  0,
		StreamCloseTimeout: 0,
		Logger:             complaints{s},
	}
	rwc := struct {
		io.Reader
		io.Writer
		io.Closer
	}{g, conn, conn}
	start := yamux.Server
	if host {
		start = yamux.Client
	}
	y, err := start(rwc, cfg)
	if err != nil {
		return nil, fmt.Errorf("cannot start the multiplex: %w", err)
	}
	s.yamux = y
	return s, nil
}

// complaints counts what yamux logs. Each line is a frame that a well-behaved peer would not have
// sent, so a peer that causes too many of them is only burning the host's time.
type complaints struct{ s *Session }

func (c complaints) Printf(string, ...any) { c.count() }
func (c complaints) Print(...any)          { c.count() }
func (c complaints) Println(...any)        { c.count() }
func (c complaints) count() {
	if c.s.complaints.Add(1) == maxComplaints {
		c.s.guard.reject("%d frames for streams that do not exist", maxComplaints)
	}
}

// Open opens a stream to a port of the peer. It does not wait for the peer to accept: a port that
// nobody serves shows as the end of the stream. The caller closes the connection, which has a
// CloseWrite method.
func (s *Session) Open(ctx context.Context, port uint32) (net.Conn, error) {
	type opened struct {
		conn *Conn
		err  error
	}
	// yamux blocks while its queue is full or too many streams wait to be accepted.
	result := make(chan opened, 1)
	go func() {
		conn, err := s.open(port)
		result <- opened{conn, err}
	}()
	select {
	case r := <-result:
		if r.err != nil {
			return nil, fmt.Errorf("cannot open a stream to port %d: %w", port, r.err)
		}
		return r.conn, nil
	case <-ctx.Done():
		go func() {
			if r := <-result; r.err == nil {
				r.conn.Close()
			}
		}()
		return nil, fmt.Errorf("cannot open a stream to port %d: %w", port, ctx.Err())
	}
}

func (s *Session) open(port uint32) (*Conn, error) {
	stream, err := s.yamux.OpenStream()
	if err != nil {
		return nil, s.reason(err)
	}
	conn := &Conn{session: s, stream: stream}
	if _, err := conn.Write(binary.BigEndian.AppendUint32(nil, port)); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// Accept waits for the next stream that the peer opens and returns it with the port that the peer
// asked for. The caller closes the connection, which has a CloseWrite method. An error means that
// the session has ended.
func (s *Session) Accept() (conn net.Conn, port uint32, err error) {
	for {
		stream, err := s.yamux.AcceptStream()
		if err != nil {
			if !s.yamux.IsClosed() {
				s.stalled.Store(true)
				s.yamux.Close()
			}
			return nil, 0, s.reason(err)
		}
		c := &Conn{session: s, stream: stream}
		var head [4]byte
		c.SetReadDeadline(time.Now().Add(portTimeout))
		if _, err := io.ReadFull(c, head[:]); err != nil {
			c.Close()
			continue
		}
		c.SetReadDeadline(time.Time{})
		return c, binary.BigEndian.Uint32(head[:]), nil
	}
}

// Done is closed when the session has ended; Err is valid from then on.
func (s *Session) Done() <-chan struct{} { return s.yamux.CloseChan() }

// Err says why the session ended: ErrClosed after Close, a *ProtocolError for a peer that
// misbehaved, otherwise what happened to the transport. It is nil while the session lives.
func (s *Session) Err() error {
	if !s.yamux.IsClosed() {
		return nil
	}
	return s.reason(nil)
}

// Close ends the session and every stream of it, and returns when nothing of it uses the transport
// any more. It is idempotent.
func (s *Session) Close() error {
	if !s.yamux.IsClosed() {
		s.closed.Store(true)
	}
	return s.yamux.Close()
}

// reason explains an error of yamux by what is known to have ended the session.
func (s *Session) reason(err error) error {
	if !s.yamux.IsClosed() {
		return err
	}
	if s.closed.Load() {
		return ErrClosed
	}
	if gerr := s.guard.failure(); errors.Is(gerr, io.EOF) {
		return errors.New("the other end of the port has hung up")
	} else if gerr != nil {
		return gerr
	}
	if s.stalled.Load() {
		return fmt.Errorf("the peer took nothing for %v", writeTimeout)
	}
	// Accepting is the only way to yamux's own reason; streams that wait come before it.
	err = errors.New("the multiplex session ended")
	for range backlog + 1 {
		if _, e := s.yamux.AcceptStream(); e != nil && !errors.Is(e, yamux.ErrSessionShutdown) {
			err = e
			break
		}
	}
	for _, violation := range []error{yamux.ErrInvalidVersion, yamux.ErrInvalidMsgType,
		yamux.ErrDuplicateStream, yamux.ErrRecvWindowExceeded, yamux.ErrUnexpectedFlag} {
		if errors.Is(err, violation) {
			return &ProtocolError{violation.Error()}
		}
	}
	return err
}

// Conn is a stream. Its methods may be called from several goroutines, as those of any net.Conn.
type Conn struct {
	session *Session
	stream  *yamux.Stream
	reading sync.Mutex // held by Read, so that Close knows when the last one has left
	mu      sync.Mutex // orders closed with the read deadline
	closed  bool
	large   bool // the receive buffer has grown beyond what an idle stream should hold
}

// Read reads what the peer wrote. It returns io.EOF only if the peer has closed its side; the loss
// of the session is another error.
func (c *Conn) Read(p []byte) (int, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	if c.isClosed() {
		return 0, net.ErrClosed
	}
	n, err := c.stream.Read(p)
	if n > 4<<10 {
		c.large = true
	}
	if c.large && n < len(p) {
		c.stream.Shrink() // only when it is empty
		c.large = false
	}
	if n > 0 {
		return n, nil
	}
	return n, c.explain(err)
}

// Write writes all of p or fails. It blocks while the peer's window is full.
func (c *Conn) Write(p []byte) (int, error) {
	written := 0
	for {
		chunk := p[written:min(len(p), written+maxFrame)]
		n, err := c.stream.Write(chunk)
		written += n
		if err != nil {
			return written, c.explain(err)
		}
		if written >= len(p) {
			return written, nil
		}
	}
}

// CloseWrite tells the peer that nothing more comes; reading goes on.
func (c *Conn) CloseWrite() error { return c.explain(c.stream.Close()) }

// Close ends the stream. It does not wait for the peer: what the peer still sends is discarded
// until it closes its side or the session ends.
func (c *Conn) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	c.stream.SetReadDeadline(time.Unix(1, 0)) // wakes the reader
	c.mu.Unlock()
	go func() {
		c.reading.Lock()
		defer c.reading.Unlock()
		c.stream.SetReadDeadline(time.Time{})
		c.stream.Close()
		// yamux cannot refuse what the peer sends, and would keep it for ever.
		io.Copy(io.Discard, c.stream)
		c.stream.Shrink()
	}()
	return nil
}

func (c *Conn) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

// explain turns yamux's errors of a stream into those that net.Conn promises.
func (c *Conn) explain(err error) error {
	switch {
	case err == nil:
		return nil
	case c.isClosed():
		return net.ErrClosed
	case errors.Is(err, yamux.ErrTimeout):
		return err // a net.Error with Timeout()
	case errors.Is(err, yamux.ErrConnectionWriteTimeout):
		// Whether the frame was sent is unknown: the stream is out of step for good.
		if !c.session.yamux.IsClosed() {
			c.session.stalled.Store(true)
			c.session.yamux.Close()
		}
		return c.session.reason(err)
	case c.session.yamux.IsClosed():
		// Even for io.EOF: yamux reports a lost session as the end of its streams.
		return c.session.reason(err)
	default:
		return err
	}
}

// Session is the session that the stream belongs to.
func (c *Conn) Session() *Session { return c.session }

// LocalAddr and RemoteAddr name the transport, not the port.
func (c *Conn) LocalAddr() net.Addr  { return c.stream.LocalAddr() }
func (c *Conn) RemoteAddr() net.Addr { return c.stream.RemoteAddr() }

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

// SetReadDeadline bounds blocked and future Reads.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	return c.stream.SetReadDeadline(t)
}

// SetWriteDeadline bounds blocked and future Writes that wait for the peer's window.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.stream.SetWriteDeadline(t) }
