package stdio

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// sender is the sending half of a stream, whichever end that is. It outlives connections: it
// keeps every byte until the receiver has acknowledged it.
//
// No goroutine belongs to it; whoever adds data or a connection also sends. Acknowledgements are
// read by the goroutine that calls serve, one per connection.
type sender struct {
	token    string
	confirms bool // the final acknowledgement is answered, see confirm

	mu      sync.Mutex
	changed sync.Cond
	conn    net.Conn // nil while disconnected
	sending bool     // somebody is writing frames; only that one may write to conn
	keep    ring     // the bytes from acked to total
	acked   uint64
	sent    uint64 // on conn, at least acked
	total   uint64
	eof     bool
	sentEOF bool // on conn
	over    bool // the receiver's final acknowledgement arrived
	err     error
	ended   chan struct{} // closed when over or err becomes set
	notify  func(acked uint64)
}

func newSender(token string) *sender {
	s := &sender{token: token, ended: make(chan struct{})}
	s.changed.L = &s.mu
	return s
}

// Write blocks while the window is full.
func (s *sender) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for {
		switch {
		case s.err != nil:
			return n, s.err
		case s.over:
			return n, fmt.Errorf("stream %s: %w by its reader", s.token, ErrRefused)
		case s.eof:
			return n, closedPipe(s.token)
		case len(p) == 0:
			return n, nil
		}
		free := Window - int(s.total-s.acked)
		if free == 0 {
			s.changed.Wait()
			continue
		}
		k := min(free, len(p))
		s.keep.push(p[:k])
		s.total += uint64(k)
		n += k
		p = p[k:]
		s.flush()
	}
}

// end marks the end of the data.
func (s *sender) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.eof = true
	s.changed.Broadcast()
	s.flush()
}

// abort gives up what is not delivered yet.
func (s *sender) abort(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.finish(err)
}

// finish ends the stream; with a nil error because the receiver said so. s.mu is held.
func (s *sender) finish(err error) {
	if s.over || s.err != nil {
		return
	}
	if err == nil {
		s.over = true
	} else {
		s.err = err
	}
	s.keep.reset()
	close(s.ended)
	s.drop(s.conn)
	s.changed.Broadcast()
}

// drop forgets a connection if it is the current one. s.mu is held.
func (s *sender) drop(conn net.Conn) {
	if conn == nil || s.conn != conn {
		return
	}
	s.conn = nil
	hangUp(conn)
	s.changed.Broadcast()
}

// gather is the size of a frame, in bytes, up to which data waits while other data is on its way: a
// process that writes in small pieces would else cost a frame, an acknowledgement and several
// wake-ups for each of them.
const gather = 16 << 10

// flush sends what can be sent. s.mu is held, and released while a frame is on its way.
func (s *sender) flush() {
	if s.sending {
		return // the one that sends sees what was added
	}
	s.sending = true
	for s.conn != nil {
		n := min(int(s.total-s.sent), MaxFrame)
		if n == 0 && (!s.eof || s.sentEOF) {
			break
		}
		if n < gather && s.sent > s.acked && !s.eof {
			break // its acknowledgement calls again
		}
		conn := s.conn
		frame := frames.Get().(*[]byte)
		b := (*frame)[:4+n]
		binary.BigEndian.PutUint32(b, uint32(n))
		s.keep.copy(b[4:], int(s.sent-s.acked))
		// Counted before the write, as the acknowledgement may overtake its return.
		s.sent += uint64(n)
		s.sentEOF = n == 0
		s.mu.Unlock()
		_, err := conn.Write(b)
		frames.Put(frame)
		s.mu.Lock()
		if err != nil {
			s.drop(conn)
		}
	}
	s.sending = false
	s.changed.Broadcast()
}

// quiesce drops the current connection and waits until nobody writes to it. s.mu is held.
func (s *sender) quiesce() {
	s.drop(s.conn)
	for s.sending {
		s.changed.Wait()
	}
}

// attach makes conn the connection on which the receiver has consumed offset bytes, and sends
// what it lacks. It reports whether the stream still wants a connection. s.mu is held.
func (s *sender) attach(conn net.Conn, offset uint64) bool {
	if s.over || s.err != nil {
		return false
	}
	s.advance(offset)
	s.sent = offset
	s.sentEOF = false
	s.conn = conn
	return true
}

// advance records that the receiver has consumed total bytes. s.mu is held.
func (s *sender) advance(total uint64) {
	if total > s.acked {
		s.keep.discard(int(total - s.acked))
		s.acked = total
		s.changed.Broadcast()
	}
}

// progress is how many bytes the receiver has consumed.
func (s *sender) progress() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.acked
}

// serve sends and reads acknowledgements until the connection is lost (nil) or the peer breaks
// the protocol. A nil error with done true is the receiver's final acknowledgement.
func (s *sender) serve(conn net.Conn) (done bool, err error) {
	s.mu.Lock()
	s.flush()
	s.mu.Unlock()
	for {
		var b [8]byte
		_, err := io.ReadFull(conn, b[:])
		s.mu.Lock()
		if s.conn != conn {
			s.mu.Unlock()
			conn.Close()
			return false, nil
		}
		if err != nil {
			s.drop(conn)
			s.mu.Unlock()
			return false, nil
		}
		ack := binary.BigEndian.Uint64(b[:])
		total := ack &^ final
		if total > s.sent || total < s.acked {
			err := fmt.Errorf("stream %s: %w: %d bytes are acknowledged, %d were sent and %d acknowledged before",
				s.token, ErrProtocol, total, s.sent, s.acked)
			s.drop(conn)
			s.mu.Unlock()
			return false, err
		}
		s.advance(total)
		if ack&final != 0 {
			s.confirm()
			s.finish(nil)
			s.mu.Unlock()
			return true, nil
		}
		s.flush()
		s.mu.Unlock()
		s.tell(total)
	}
}

// tell says how many bytes the receiver has consumed. Only the goroutine that serves calls it.
func (s *sender) tell(acked uint64) {
	s.mu.Lock()
	notify := s.notify
	s.mu.Unlock()
	if notify != nil {
		notify(acked)
	}
}

// confirm tells the receiver that its final acknowledgement arrived. Losing it does no harm: the
// receiver then asks again. s.mu is held.
func (s *sender) confirm() {
	// Without sentEOF the receiver refused what may still be on its way; it does not listen.
	if !s.confirms || !s.sentEOF {
		return
	}
	for s.sending {
		s.changed.Wait() // the frame that was just acknowledged
	}
	conn := s.conn
	if conn == nil {
		return
	}
	s.sending = true
	s.mu.Unlock()
	conn.SetWriteDeadline(time.Now().Add(handshakeTimeout))
	conn.Write([]byte{0, 0, 0, 0})
	s.mu.Lock()
	s.sending = false
	s.changed.Broadcast()
}

// ring keeps up to Window bytes. It holds no memory while it is empty.
type ring struct {
	buf   *[]byte
	start int
	len   int
}

const smallRing = 4 << 10

var (
	smallRings = sync.Pool{New: func() any { b := make([]byte, smallRing); return &b }}
	largeRings = sync.Pool{New: func() any { b := make([]byte, Window); return &b }}
)

func (r *ring) push(p []byte) {
	if r.buf == nil {
		if len(p) <= smallRing {
			r.buf = smallRings.Get().(*[]byte)
		} else {
			r.buf = largeRings.Get().(*[]byte)
		}
	}
	if r.len+len(p) > len(*r.buf) {
		grown := largeRings.Get().(*[]byte)
		r.copy((*grown)[:r.len], 0)
		smallRings.Put(r.buf)
		r.buf, r.start = grown, 0
	}
	b := *r.buf
	end := (r.start + r.len) % len(b)
	k := copy(b[end:], p)
	copy(b, p[k:])
	r.len += len(p)
}

// copy fills p with the bytes from offset on.
func (r *ring) copy(p []byte, offset int) {
	if len(p) == 0 {
		return
	}
	b := *r.buf
	from := (r.start + offset) % len(b)
	k := copy(p, b[from:])
	copy(p[k:], b)
}

func (r *ring) discard(n int) {
	r.len -= n
	if r.len == 0 {
		r.reset()
		return
	}
	r.start = (r.start + n) % len(*r.buf)
}

func (r *ring) reset() {
	if r.buf != nil {
		if len(*r.buf) == smallRing {
			smallRings.Put(r.buf)
		} else {
			largeRings.Put(r.buf)
		}
	}
	*r = ring{}
}
