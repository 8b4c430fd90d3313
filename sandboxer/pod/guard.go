package pod

import (
	"encoding/binary"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
)

// maxAnswer bounds a message from the agent, in bytes; what honest agents answer has some hundred.
const maxAnswer = 1 << 20

// guard stands between the ttrpc client and the agent and ends the connection at the first frame
// that no honest agent sends. The client by itself would skip a frame that is too long, for as long
// as the guest likes to send it, and answers to calls that were never made.
type guard struct {
	net.Conn
	// calls is the highest stream that the client opened; it numbers them upwards with odd numbers.
	calls atomic.Uint32

	sent     frames // used by Write only
	received frames // used by Read only

	mu        sync.Mutex
	violation error
}

func (g *guard) Write(p []byte) (int, error) {
	// The client never sends two frames at once, and its number must be known before the answer can
	// be there.
	_ = g.sent.scan(p, func(f frame) error {
		if f.stream > g.calls.Load() {
			g.calls.Store(f.stream)
		}
		return nil
	})
	return g.Conn.Write(p)
}

func (g *guard) Read(p []byte) (int, error) {
	n, err := g.Conn.Read(p)
	verr := g.received.scan(p[:n], func(f frame) error {
		switch {
		case f.length > maxAnswer:
			return fmt.Errorf("a frame claims %d bytes, more than %d", f.length, maxAnswer)
		case f.stream%2 == 0 || f.stream > g.calls.Load():
			return fmt.Errorf("a frame answers call %d, which was never made", f.stream)
		case f.kind != frameResponse && f.kind != frameData:
			return fmt.Errorf("a frame is of type %d, which agents do not send", f.kind)
		}
		return nil
	})
	if verr != nil {
		verr = fmt.Errorf("the agent broke the protocol: %w", verr)
		g.mu.Lock()
		g.violation = verr
		g.mu.Unlock()
		_ = g.Conn.Close()
		return 0, verr
	}
	return n, err
}

// broken is how the agent broke the protocol, if it did.
func (g *guard) broken() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.violation
}

// frame is the header of a message of ttrpc.
type frame struct {
	length, stream uint32
	kind           uint8
}

// frameHeader is its size on the wire, in bytes.
const frameHeader = 10

const (
	frameResponse = 2
	frameData     = 3
)

// frames follows a stream of messages without keeping them.
type frames struct {
	head [frameHeader]byte
	have int    // bytes of head
	skip uint32 // bytes of the body that are still to come
}

// scan calls seen for every header that p completes; an error of seen ends it.
func (s *frames) scan(p []byte, seen func(frame) error) error {
	for len(p) > 0 {
		if s.skip > 0 {
			n := min(len(p), int(s.skip))
			s.skip -= uint32(n)
			p = p[n:]
			continue
		}
		n := copy(s.head[s.have:], p)
		s.have += n
		p = p[n:]
		if s.have < frameHeader {
			return nil
		}
		s.have = 0
		f := frame{
			length: binary.BigEndian.Uint32(s.head[:4]),
			stream: binary.BigEndian.Uint32(s.head[4:8]),
			kind:   s.head[8],
		}
		s.skip = f.length
		if err := seen(f); err != nil {
			return err
		}
	}
	return nil
}
