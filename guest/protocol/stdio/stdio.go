// Package stdio carries the standard streams of processes between the guest and the host, one
// connection per stream on protocol.PortStdio, with no byte lost or doubled when a connection
// breaks or the daemon restarts.
//
// The host dials and sends a header; the guest answers with a reply:
//
//	header  "KSIO" | version u8 | kind u8 | flags u8 | token length u8 | offset u64 | token
//	reply   "KSIO" | version u8 | status u8 | 0 u16 | offset u64
//
// After that the sender of the stream (the guest for output, the host for input) sends frames,
//
//	frame   length u32 | data
//
// and the receiver sends acknowledgements,
//
//	ack     u64
//
// all integers big endian. A frame has at most 64 KiB; length 0 is the end of the stream. An
// acknowledgement is the number of bytes consumed since the stream began; its top bit, once set,
// says that the receiver takes no more: the end was consumed, or further data is refused. For
// output the guest confirms that with one more frame of length 0, so that the host knows that the
// guest knows.
//
// The sender keeps at most 256 KiB unacknowledged and keeps those bytes. After a lost connection
// the host dials again; the header's offset (output) or the reply's offset (input) says what the
// receiver has consumed, and the sender goes on from there. A lost connection is never the end of
// a stream. The newest connection of a token wins.
//
// Either end treats what the other sends as untrusted: lengths, offsets and tokens are checked,
// and a violation is an error that wraps ErrProtocol.
package stdio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Kind says which standard stream a connection carries, and with it the direction.
type Kind uint8

// The three standard streams. Stdin flows to the guest, the others to the host.
const (
	Stdin Kind = iota
	Stdout
	Stderr
)

func (k Kind) String() string {
	switch k {
	case Stdin:
		return "stdin"
	case Stdout:
		return "stdout"
	case Stderr:
		return "stderr"
	}
	return fmt.Sprintf("stream kind %d", uint8(k))
}

// Limits of the protocol, in bytes.
const (
	// MaxToken bounds the length of a token; a token has at least one byte.
	MaxToken = 128
	// MaxFrame bounds the data of one frame.
	MaxFrame = 64 << 10
	// Window is how much a sender keeps unacknowledged.
	Window = 256 << 10
)

var (
	// ErrProtocol is wrapped when the peer sent what the protocol does not allow. On the host it
	// means that the guest misbehaves.
	ErrProtocol = errors.New("the peer broke the stdio protocol")
	// ErrUnknown is wrapped when a stream cannot be resumed because the guest does not know its
	// token (any more).
	ErrUnknown = errors.New("the guest does not know this stream")
	// ErrRefused is wrapped when the receiver takes no more data, or the guest cannot take the
	// stream at all.
	ErrRefused = errors.New("the stream was refused")
	// ErrLost is wrapped when a stream ended before all of its data was delivered: the guest gave
	// it up because its container was purged.
	ErrLost = errors.New("the stream ended with undelivered data")
)

const (
	magic   = "KSIO"
	version = 1

	headerSize = 16 // without the token
	replySize  = 16

	// flagResume asks for a stream that the guest already knows.
	flagResume = 1 << 0

	// final is the top bit of an acknowledgement, and of the offset of a header that repeats one.
	final = 1 << 63

	handshakeTimeout = 5 * time.Second
)

type status uint8

const (
	statusOK       status = iota
	statusFinished        // the stream is over; the offset is its total
	statusUnknown         // resume of an unknown token
	statusRefused         // impossible kind or offset
	statusBusy            // too many streams wait for their process
)

type header struct {
	kind   Kind
	flags  uint8
	offset uint64
	token  string
}

func checkToken(token string) error {
	if len(token) == 0 || len(token) > MaxToken {
		return fmt.Errorf("%w: a token of %d bytes, allowed are 1 to %d", ErrProtocol, len(token), MaxToken)
	}
	return nil
}

func writeHeader(w io.Writer, h header) error {
	if err := checkToken(h.token); err != nil {
		return err
	}
	b := make([]byte, 0, headerSize+MaxToken)
	b = append(b, magic...)
	b = append(b, version, byte(h.kind), h.flags, byte(len(h.token)))
	b = binary.BigEndian.AppendUint64(b, h.offset)
	b = append(b, h.token...)
	_, err := w.Write(b)
	return err
}

func readHeader(r io.Reader) (header, error) {
	var b [headerSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return header{}, err
	}
	if string(b[:4]) != magic {
		return header{}, fmt.Errorf("%w: a header begins with %q", ErrProtocol, b[:4])
	}
	if b[4] != version {
		return header{}, fmt.Errorf("%w: version %d, this end speaks %d", ErrProtocol, b[4], version)
	}
	h := header{kind: Kind(b[5]), flags: b[6], offset: binary.BigEndian.Uint64(b[8:])}
	if h.kind > Stderr {
		return header{}, fmt.Errorf("%w: %v", ErrProtocol, h.kind)
	}
	token := make([]byte, b[7])
	if err := checkToken(string(token)); err != nil {
		return header{}, err
	}
	if _, err := io.ReadFull(r, token); err != nil {
		return header{}, err
	}
	h.token = string(token)
	return h, nil
}

func writeReply(w io.Writer, s status, offset uint64) error {
	b := make([]byte, 0, replySize)
	b = append(b, magic...)
	b = append(b, version, byte(s), 0, 0)
	b = binary.BigEndian.AppendUint64(b, offset)
	_, err := w.Write(b)
	return err
}

func readReply(r io.Reader) (status, uint64, error) {
	var b [replySize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return 0, 0, err
	}
	if string(b[:4]) != magic || b[4] != version || b[6]|b[7] != 0 || status(b[5]) > statusBusy {
		return 0, 0, fmt.Errorf("%w: the reply is % x", ErrProtocol, b[:])
	}
	return status(b[5]), binary.BigEndian.Uint64(b[8:]), nil
}

func writeAck(w io.Writer, total uint64) error {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], total)
	_, err := w.Write(b[:])
	return err
}

// readFrameLength reads the length of the next frame.
func readFrameLength(r io.Reader) (int, error) {
	var b [4]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return 0, err
	}
	n := binary.BigEndian.Uint32(b[:])
	if n > MaxFrame {
		return 0, fmt.Errorf("%w: a frame claims %d bytes, more than %d", ErrProtocol, n, MaxFrame)
	}
	return int(n), nil
}

// frames lends buffers for one frame and its length. They are held only while a frame is in
// flight, so that an idle stream costs none.
var frames = sync.Pool{New: func() any { b := make([]byte, 4+MaxFrame); return &b }}

// hangUp closes a connection and wakes everyone who waits in it. A yamux stream does not end its
// own readers on Close, hence the deadline.
func hangUp(conn net.Conn) {
	conn.SetDeadline(time.Unix(1, 0))
	conn.Close()
}

// closedPipe says why a stream takes no more calls, in the voice of a closed connection.
func closedPipe(token string) error {
	return fmt.Errorf("stream %s: %w", token, net.ErrClosed)
}
