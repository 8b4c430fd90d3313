package stdio

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Streams that the host opened wait for their process at most parkedTime, and at most maxParked
// of them. A host that opens them and then never creates the process costs no more than that. Those
// that somebody expects wait for as long as they are expected, and are not counted.
const (
	maxParked  = 1024
	parkedTime = 60 * time.Second
	// maxFinished is how many ended streams are remembered, so that a host that missed the end
	// gets told instead of waiting.
	maxFinished = 1024
)

// Hub is the guest's end: it pairs the connections that the host opens with the processes that
// the agent runs, by token. It outlives listeners and connections.
type Hub struct {
	mu       sync.Mutex
	outputs  map[string]*Output
	inputs   map[string]*input
	parked   map[string]*parked
	expected map[string]int    // by how many, see Expect
	finished map[string]uint64 // token to total
	order    []string          // of finished, oldest first
	timeout  time.Duration
}

// parked is an accepted connection whose process does not exist yet.
type parked struct {
	conn  net.Conn
	kind  Kind
	timer *time.Timer
}

// NewHub returns a Hub without streams.
func NewHub() *Hub {
	return &Hub{
		outputs:  map[string]*Output{},
		inputs:   map[string]*input{},
		parked:   map[string]*parked{},
		expected: map[string]int{},
		finished: map[string]uint64{},
		timeout:  parkedTime,
	}
}

// Serve accepts connections until the listener fails, and returns why. Streams survive it: it may
// be called again with another listener.
func (h *Hub) Serve(l net.Listener) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go h.accept(conn)
	}
}

// accept performs the handshake and then, for output, reads the acknowledgements.
func (h *Hub) accept(conn net.Conn) {
	conn.SetDeadline(time.Now().Add(handshakeTimeout))
	head, err := readHeader(conn)
	if err != nil {
		conn.Close()
		return
	}
	refuse := func(s status, offset uint64) {
		writeReply(conn, s, offset)
		conn.Close()
	}

	h.mu.Lock()
	out, in := h.outputs[head.token], h.inputs[head.token]
	total, finished := h.finished[head.token]
	_, waiting := h.parked[head.token]
	room := waiting || h.expected[head.token] > 0 || h.unexpected() < maxParked
	h.mu.Unlock()

	switch {
	case out != nil && head.kind != Stdin:
		out.accept(conn, head.offset, false)
	case in != nil && head.kind == Stdin:
		in.accept(conn, false)
	case out != nil || in != nil:
		refuse(statusRefused, 0)
	case finished || head.offset&final != 0:
		refuse(statusFinished, total)
	case head.flags&flagResume != 0 && !waiting:
		refuse(statusUnknown, 0)
	case head.offset != 0:
		refuse(statusRefused, 0)
	case !room:
		refuse(statusBusy, 0)
	default:
		if writeReply(conn, statusOK, 0) != nil {
			conn.Close()
			return
		}
		h.park(conn, head)
	}
}

// park keeps a connection, whose reply was sent, for its process.
func (h *Hub) park(conn net.Conn, head header) {
	conn.SetDeadline(time.Time{})
	h.mu.Lock()
	// The process may have come in the meantime, as the host may go on once it has the reply.
	if out := h.outputs[head.token]; out != nil && head.kind != Stdin {
		h.mu.Unlock()
		out.accept(conn, 0, true)
		return
	}
	if in := h.inputs[head.token]; in != nil && head.kind == Stdin {
		h.mu.Unlock()
		in.accept(conn, true)
		return
	}
	defer h.mu.Unlock()
	if _, done := h.finished[head.token]; done {
		conn.Close()
		return
	}
	if old := h.parked[head.token]; old != nil {
		old.timer.Stop()
		old.conn.Close()
	}
	p := &parked{conn: conn, kind: head.kind}
	p.timer = time.AfterFunc(h.timeout, func() { h.expire(head.token, p) })
	if h.expected[head.token] > 0 {
		p.timer.Stop()
	}
	h.parked[head.token] = p
}

// expire ends the waiting of a parked connection, unless it is expected by now.
func (h *Hub) expire(token string, p *parked) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.parked[token] == p && h.expected[token] == 0 {
		delete(h.parked, token)
		p.conn.Close()
	}
}

// unexpected counts the parked connections that are bounded. h.mu is held.
func (h *Hub) unexpected() int {
	n := 0
	for token := range h.parked {
		if h.expected[token] == 0 {
			n++
		}
	}
	return n
}

// Expect has the stream of a token wait for its process for as long as it takes, whether or not the host
// has opened it, until done is called. From then on it has the time that any other stream has. The
// caller bounds what it expects. done may be called more than once.
func (h *Hub) Expect(token string) (done func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.expected[token]++
	if p := h.parked[token]; p != nil {
		p.timer.Stop()
	}
	return sync.OnceFunc(func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.expected[token]--; h.expected[token] > 0 {
			return
		}
		delete(h.expected, token)
		if p := h.parked[token]; p != nil {
			p.timer.Reset(h.timeout)
		}
	})
}

// claim takes the parked connection of a token, if there is one of the right direction. h.mu is
// held.
func (h *Hub) claim(token string, input bool) net.Conn {
	p := h.parked[token]
	if p == nil {
		return nil
	}
	p.timer.Stop()
	delete(h.parked, token)
	if (p.kind == Stdin) != input {
		p.conn.Close()
		return nil
	}
	return p.conn
}

// forget ends a stream in the books.
func (h *Hub) forget(token string, total uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.outputs, token)
	delete(h.inputs, token)
	if _, known := h.finished[token]; known {
		return
	}
	if len(h.order) == maxFinished {
		delete(h.finished, h.order[0])
		h.order = h.order[1:]
	}
	h.finished[token] = total
	h.order = append(h.order, token)
}

// Output is the sending end of a stream to the host. Its data is kept until the host has consumed
// it, across lost connections.
type Output struct {
	hub *Hub
	s   *sender

	attaching sync.Mutex // one handshake at a time
}

// Output returns the stream of a token, for one process; the host's connection may exist already
// or come later. The caller closes it. A second call for a token returns the same stream until it
// is closed.
func (h *Hub) Output(token string) *Output {
	h.mu.Lock()
	defer h.mu.Unlock()
	if o := h.outputs[token]; o != nil {
		return o
	}
	o := &Output{hub: h, s: newSender(token)}
	o.s.confirms = true
	if err := checkToken(token); err != nil {
		o.s.abort(err)
		return o
	}
	h.outputs[token] = o
	if conn := h.claim(token, false); conn != nil {
		go o.accept(conn, 0, true)
	}
	return o
}

// Write blocks while 256 KiB are not consumed by the host, whether or not it is connected.
func (o *Output) Write(p []byte) (int, error) { return o.s.Write(p) }

// Close sends the end of the stream and returns when the host has acknowledged everything. When
// ctx ends first, what is undelivered is discarded and the error wraps ctx's.
func (o *Output) Close(ctx context.Context) error {
	// A host that does not read may block even the sending of the end.
	stop := context.AfterFunc(ctx, func() { o.s.abort(closedPipe(o.s.token)) })
	defer stop()
	o.s.end()
	<-o.s.ended
	o.s.mu.Lock()
	total, over, err := o.s.total, o.s.over, o.s.err
	o.s.mu.Unlock()
	if checkToken(o.s.token) != nil {
		return err
	}
	o.hub.forget(o.s.token, total)
	switch {
	case over:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("cannot deliver the rest of stream %s: %w", o.s.token, context.Cause(ctx))
	}
	return err
}

// accept takes a connection of the host over and serves it until it is lost.
func (o *Output) accept(conn net.Conn, offset uint64, replied bool) {
	if !o.attach(conn, offset, replied) {
		conn.Close()
		return
	}
	// The host's misbehaviour costs it the connection; it may come back and do better.
	o.s.serve(conn)
}

func (o *Output) attach(conn net.Conn, offset uint64, replied bool) bool {
	o.attaching.Lock()
	defer o.attaching.Unlock()
	s := o.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if replied && s.conn != nil {
		return false // a newer connection overtook the parked one
	}
	s.quiesce()

	reply, at := statusOK, offset
	consumed := offset &^ final
	switch {
	case s.over || s.err != nil:
		reply, at = statusFinished, s.total
	case consumed < s.acked || consumed > s.total:
		reply, at = statusRefused, s.acked
	case offset&final != 0:
		// The host repeats a final acknowledgement that was lost.
		s.advance(consumed)
		s.finish(nil)
		reply, at = statusFinished, s.total
	}
	if !replied {
		s.mu.Unlock()
		err := writeReply(conn, reply, at)
		s.mu.Lock()
		if err != nil {
			return false
		}
	}
	if reply != statusOK {
		return false
	}
	conn.SetDeadline(time.Time{})
	return s.attach(conn, offset)
}

// input is the receiving end of a stream from the host. It reads straight from the connection;
// what nobody reads stays with the host.
type input struct {
	hub   *Hub
	token string

	attaching sync.Mutex // one handshake at a time

	mu      sync.Mutex
	changed sync.Cond
	conn    net.Conn
	reading bool // somebody uses conn
	left    int  // of the current frame on conn
	offset  uint64
	eof     bool
	closed  bool
}

// Input returns the stream of a token, for one process. Read returns io.EOF at the host's end of
// the stream and blocks while the host is away. Close refuses further input and tells the host.
// The caller closes it, also after io.EOF.
func (h *Hub) Input(token string) io.ReadCloser {
	h.mu.Lock()
	defer h.mu.Unlock()
	if in := h.inputs[token]; in != nil {
		return in
	}
	in := &input{hub: h, token: token}
	in.changed.L = &in.mu
	if checkToken(token) != nil {
		in.closed = true
		return in
	}
	h.inputs[token] = in
	// Nothing is read before the first Read, so the parked connection needs no goroutine.
	in.conn = h.claim(token, true)
	return in
}

// accept takes a connection of the host over.
func (in *input) accept(conn net.Conn, replied bool) {
	in.attaching.Lock()
	defer in.attaching.Unlock()
	in.mu.Lock()
	defer in.mu.Unlock()
	if replied && in.conn != nil {
		conn.Close()
		return
	}
	in.drop(in.conn)
	// Only when the last reader has let go is the offset final.
	for in.reading {
		in.changed.Wait()
	}
	reply := statusOK
	if in.closed || in.eof {
		reply = statusFinished
	}
	if offset := in.offset; !replied {
		in.mu.Unlock()
		err := writeReply(conn, reply, offset)
		in.mu.Lock()
		if err != nil {
			reply = statusFinished
		}
	}
	if reply != statusOK || in.closed || in.eof {
		conn.Close()
		return
	}
	conn.SetDeadline(time.Time{})
	in.conn, in.left = conn, 0
	in.changed.Broadcast()
}

// drop forgets a connection if it is the current one. in.mu is held.
func (in *input) drop(conn net.Conn) {
	if conn != nil && in.conn == conn {
		in.conn = nil
		hangUp(conn)
		in.changed.Broadcast()
	}
}

func (in *input) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	for {
		switch {
		case in.closed:
			return 0, closedPipe(in.token)
		case in.eof:
			return 0, io.EOF
		case in.conn == nil || in.reading:
			in.changed.Wait()
			continue
		}
		if n, err := in.readSome(p); n > 0 || err != nil {
			return n, err
		}
	}
}

// readSome reads once from the connection and acknowledges; 0 and nil mean that the connection
// was lost. in.mu is held, and released while reading.
func (in *input) readSome(p []byte) (int, error) {
	conn, left := in.conn, in.left
	in.reading = true
	in.mu.Unlock()
	n, end := 0, false
	var err error
	if left == 0 {
		left, err = readFrameLength(conn)
		end = err == nil && left == 0
	}
	if err == nil && !end {
		n, err = conn.Read(p[:min(len(p), left)])
	}
	in.mu.Lock()
	// Whatever was read counts, even if a new connection waits already.
	in.offset += uint64(n)
	if in.conn == conn {
		in.left = left - n
	}
	ack := in.offset
	if end {
		in.eof = true
		ack |= final
	}
	if err == nil && in.conn == conn {
		in.mu.Unlock()
		err = writeAck(conn, ack)
		in.mu.Lock()
	}
	in.reading = false
	in.changed.Broadcast()
	if err != nil || end {
		in.drop(conn)
	}
	if end {
		total := in.offset
		in.mu.Unlock()
		in.hub.forget(in.token, total)
		in.mu.Lock()
		return 0, io.EOF
	}
	return n, nil
}

func (in *input) Close() error {
	in.mu.Lock()
	if in.closed {
		in.mu.Unlock()
		return nil
	}
	in.closed = true
	conn, total, tell := in.conn, in.offset, !in.eof && in.conn != nil
	in.changed.Broadcast()
	in.mu.Unlock()
	if tell {
		// A Read may hold the connection; a short write beside it does not disturb it, and if it
		// is lost the host hears the same when it dials again.
		conn.SetWriteDeadline(time.Now().Add(handshakeTimeout))
		writeAck(conn, total|final)
	}
	in.mu.Lock()
	in.drop(conn)
	in.mu.Unlock()
	if checkToken(in.token) == nil {
		in.hub.forget(in.token, total)
	}
	return nil
}
