package mux

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
)

// The parts of yamux's wire format that the guard looks at (version 0: a header of 12 bytes, then
// the body of data frames).
const (
	headerSize = 12

	typeData   = 0
	typeWindow = 1
	typeGoAway = 3

	flagSYN  = 1
	flagsAll = 1 | 2 | 4 | 8
)

// guard reads the transport for yamux and follows the frames. yamux checks little and trusts its
// peer with the receiver's memory (each ping, for instance, costs a goroutine); the guard lets
// pass only what our own side sends. It also finds the handshake of a new host at the boundary of a
// frame.
type guard struct {
	r io.Reader
	// host says that this is the host's end: the peer is a guest, which opens few streams, all
	// with even numbers.
	host bool

	header [headerSize]byte
	have   int    // bytes of header
	body   uint32 // bytes of the current body still to come
	opened int    // streams that the peer has opened

	// fromMagic holds what was read from a magic on; only the guest's end accepts one.
	fromMagic []byte

	mu  sync.Mutex
	err error
}

// errNewHost ends a guest's session in which the handshake of another host arrived.
var errNewHost = fmt.Errorf("a new host has connected")

func (g *guard) Read(p []byte) (int, error) {
	if err := g.failure(); err != nil {
		return 0, err
	}
	n, err := g.r.Read(p)
	if pass := g.follow(p[:n]); pass < n {
		// The frames before the bad one are delivered; the next Read fails.
		if pass > 0 {
			return pass, nil
		}
		return 0, g.failure()
	}
	if ferr := g.failure(); ferr != nil {
		return 0, ferr
	}
	if err != nil {
		g.fail(err)
	}
	return n, err
}

// follow returns how many bytes of b may pass. Fewer than len(b) means that g.err is set.
func (g *guard) follow(b []byte) int {
	for i := 0; i < len(b); {
		if g.body > 0 {
			skip := min(int(g.body), len(b)-i)
			g.body -= uint32(skip)
			i += skip
			continue
		}
		if g.have == 0 && b[i] != 0 {
			if !g.host && b[i] == magic[0] {
				g.fromMagic = append([]byte(nil), b[i:]...)
				g.fail(errNewHost)
			} else {
				g.reject("a frame of version %d", b[i])
			}
			return i
		}
		n := copy(g.header[g.have:], b[i:])
		g.have += n
		if g.have == headerSize {
			if err := g.check(); err != nil {
				g.fail(err)
				return i
			}
			g.have = 0
		}
		i += n
	}
	return len(b)
}

// check judges the complete header.
func (g *guard) check() error {
	kind := g.header[1]
	flags := binary.BigEndian.Uint16(g.header[2:])
	id := binary.BigEndian.Uint32(g.header[4:])
	length := binary.BigEndian.Uint32(g.header[8:])
	if flags&^flagsAll != 0 {
		return violation("a frame with the flags %#x", flags)
	}
	switch kind {
	case typeData:
		if length > maxFrame {
			return violation("a frame of %d bytes is longer than %d", length, maxFrame)
		}
		g.body = length
	case typeWindow:
		if length > window {
			return violation("a window update of %d bytes is more than %d", length, window)
		}
	case typeGoAway:
		return nil
	default:
		return violation("a frame of type %d", kind)
	}
	if id == 0 {
		return violation("a frame of type %d for stream 0", kind)
	}
	if flags&flagSYN != 0 {
		// yamux's client, the host, numbers its streams odd, the server even.
		if peerIsClient := !g.host; (id%2 == 1) != peerIsClient {
			return violation("stream %d opened by the wrong side", id)
		}
		if g.opened++; g.host && g.opened > maxGuestStreams {
			return violation("more than %d streams opened by the guest", maxGuestStreams)
		}
	}
	return nil
}

func violation(format string, args ...any) error {
	return &ProtocolError{fmt.Sprintf(format, args...)}
}

// reject ends the session by a violation of the protocol.
func (g *guard) reject(format string, args ...any) { g.fail(violation(format, args...)) }

func (g *guard) fail(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err == nil {
		g.err = err
	}
}

// failure is why nothing more is read, or nil.
func (g *guard) failure() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.err
}
