package mux

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// magic begins a handshake; its last byte is the version of this package's protocol. Its first
// byte must never be 0, with which every yamux frame begins.
var magic = []byte("\xf5kuasar\x01")

const (
	nonceSize = 16
	// firstPatience is how long DialFirst waits for a guest that has never answered before it
	// doubts its own handshake and starts afresh.
	firstPatience = 15 * time.Second
	// connectPause lies between two attempts to reach a socket that nobody listens on yet.
	connectPause = 10 * time.Millisecond
	// maxStale bounds what the host discards before the answer to one handshake, in bytes: what
	// QEMU and the guest's queue can hold of an earlier session, with room to spare.
	maxStale = 4 << 20
	// scanBuffer is the size of the buffer that lives during a handshake, in bytes.
	scanBuffer = 4 << 10
)

// Dial connects the host to a guest that may have had a host before, through the Unix socket of
// its virtio-serial port. It retries until ctx ends; the caller closes the session.
func Dial(ctx context.Context, socket string) (*Session, error) {
	return dial(ctx, socket, handshakeTimeout)
}

// DialFirst connects the host to a guest that was just started, as Dial otherwise. It asks once and
// waits for the guest to open its port.
func DialFirst(ctx context.Context, socket string) (*Session, error) {
	return dial(ctx, socket, firstPatience)
}

func dial(ctx context.Context, socket string, patience time.Duration) (*Session, error) {
	for {
		s, reached, err := attempt(ctx, socket, patience)
		if err == nil {
			return s, nil
		}
		pause := connectPause
		if reached {
			pause, patience = holdDown, handshakeTimeout
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("cannot reach the agent through %s: %w: %w", socket, err, ctx.Err())
		case <-time.After(pause):
		}
	}
}

// attempt connects once. reached says that somebody listens, so that the guest has to be given
// the time to notice the disconnection.
func attempt(ctx context.Context, socket string, patience time.Duration) (s *Session, reached bool, err error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, false, err
	}
	// The end of ctx must end a read that is under way.
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	conn.SetDeadline(time.Now().Add(patience))
	if ctx.Err() != nil {
		conn.Close()
		return nil, true, ctx.Err()
	}
	rest, err := greet(conn)
	if err != nil {
		conn.Close()
		if errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() == nil {
			err = fmt.Errorf("the guest did not answer the handshake within %v", patience)
		}
		return nil, true, err
	}
	if !stop() {
		conn.Close()
		return nil, true, ctx.Err()
	}
	conn.SetDeadline(time.Time{})
	s, err = newSession(conn, &guard{r: behind(rest, conn), host: true}, true)
	if err != nil {
		conn.Close()
		return nil, true, err
	}
	return s, true, nil
}

// greet is the host's handshake: it sends a fresh nonce, discards all that comes before its answer,
// and returns what was read beyond it.
func greet(conn io.ReadWriter) (rest []byte, err error) {
	hello := make([]byte, len(magic)+nonceSize)
	copy(hello, magic)
	rand.Read(hello[len(magic):])
	if _, err := conn.Write(hello); err != nil {
		return nil, err
	}
	r := bufio.NewReaderSize(conn, scanBuffer)
	if err := seek(r, hello, maxStale); err != nil {
		return nil, err
	}
	return r.Peek(r.Buffered())
}

// seek discards from r everything up to and including the first occurrence of pattern. More than
// limit discarded bytes are an error; a limit of 0 means none.
func seek(r *bufio.Reader, pattern []byte, limit int) error {
	for discarded := 0; limit == 0 || discarded <= limit; {
		if _, err := r.Peek(len(pattern)); err != nil {
			return err
		}
		have, _ := r.Peek(r.Buffered())
		if i := bytes.Index(have, pattern); i >= 0 {
			r.Discard(i + len(pattern))
			return nil
		}
		// What is left may be the beginning of the pattern.
		n, _ := r.Discard(len(have) - len(pattern) + 1)
		discarded += n
	}
	return fmt.Errorf("more than %d bytes without an answer to the handshake", limit)
}

// Serve is the guest's end. It gives every session, one after the other, to handle, which runs in a
// goroutine of its own; the session is closed when handle returns. Serve returns when ctx ends, or
// when the port fails for good. It never closes port, which must have been opened with O_NONBLOCK.
func Serve(ctx context.Context, port *os.File, handle func(*Session)) error {
	raw, err := port.SyscallConn()
	if err != nil {
		return fmt.Errorf("cannot serve %s: %w", port.Name(), err)
	}
	if err := serve(ctx, &device{File: port, raw: raw}, handle); err != nil {
		return fmt.Errorf("cannot serve %s: %w", port.Name(), err)
	}
	return nil
}

// line is the guest's virtio-serial port.
type line interface {
	io.ReadWriter
	// SetDeadline interrupts and bounds Read, Write and waitHost.
	SetDeadline(time.Time) error
	// waitHost returns when a host is connected.
	waitHost() error
}

// device is the real port.
type device struct {
	*os.File
	raw interface {
		Write(func(fd uintptr) bool) error
	}
}

// waitHost sleeps while the port hangs up. A read would return an end of file at once, over and
// over. The runtime polls edge-triggered and counts both "hung up" and "writable" as a reason to
// look again, so the connection of a host ends the wait and nothing spins.
func (d *device) waitHost() error {
	return d.raw.Write(func(fd uintptr) bool {
		set := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLOUT}}
		_, err := unix.Poll(set, 0)
		return err == nil && set[0].Revents&unix.POLLHUP == 0
	})
}

func serve(ctx context.Context, port line, handle func(*Session)) error {
	// The end of ctx must end whatever is under way, also a deadline that is just being lifted.
	lift := func() error {
		if err := port.SetDeadline(time.Time{}); err != nil {
			return err
		}
		if ctx.Err() != nil {
			port.SetDeadline(time.Unix(1, 0))
		}
		return ctx.Err()
	}
	stop := context.AfterFunc(ctx, func() { port.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	// in holds what was read beyond the end of the last session.
	var in []byte
	for {
		if err := lift(); err != nil {
			return err
		}
		hello, rest, err := awaitHello(port, in)
		in = nil
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				continue // the host has left; wait for the next one
			}
			return err
		}
		if _, err := port.Write(hello); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return err
		}
		g := &guard{r: behind(rest, port)}
		b := &borrowed{line: port}
		s, err := newSession(b, g, false)
		if err != nil {
			return err
		}
		go func() {
			defer s.Close()
			handle(s)
		}()
		select {
		case <-s.Done():
		case <-ctx.Done():
		}
		// Returns when the session's goroutines have left the port, so that no byte of it
		// follows the next answer.
		s.Close()
		in = g.fromMagic
		if err := s.Err(); ctx.Err() == nil && !errors.Is(g.failure(), io.EOF) && !errors.Is(err, errNewHost) {
			b.sayGoodbye()
		}
	}
}

// awaitHello waits for a host and returns its magic and nonce, and what was read beyond them.
// before is what was already read.
func awaitHello(port line, before []byte) (hello, rest []byte, err error) {
	if len(before) == 0 {
		if err := port.waitHost(); err != nil {
			return nil, nil, err
		}
	}
	r := bufio.NewReaderSize(io.MultiReader(bytes.NewReader(before), port), scanBuffer)
	if err := seek(r, magic, 0); err != nil {
		return nil, nil, err
	}
	hello = make([]byte, len(magic)+nonceSize)
	copy(hello, magic)
	if _, err := io.ReadFull(r, hello[len(magic):]); err != nil {
		return nil, nil, err
	}
	rest, _ = r.Peek(r.Buffered())
	return hello, rest, nil
}

// behind reads rest, then r. Mostly there is no rest, and then nothing stands between.
func behind(rest []byte, r io.Reader) io.Reader {
	if len(rest) == 0 {
		return r
	}
	return io.MultiReader(bytes.NewReader(append([]byte(nil), rest...)), r)
}

// borrowed is the port as a session sees it: closing it only makes the session leave it.
type borrowed struct {
	line
	// broken says that a frame was cut off. It is written by the session's sender and read when
	// that has ended.
	broken bool
}

func (b *borrowed) Write(p []byte) (int, error) {
	n, err := b.line.Write(p)
	if err != nil {
		b.broken = true
	}
	return n, err
}

func (b *borrowed) Close() error { return b.SetDeadline(time.Unix(1, 0)) }

// sayGoodbye tells a host that is still connected that its session is over here: nothing else
// would. After half a frame it cannot be told, and finds out when its writes stall.
func (b *borrowed) sayGoodbye() {
	if b.broken {
		return
	}
	b.SetDeadline(time.Now().Add(holdDown))
	b.Write(goodbye)
}

// goodbye is yamux's frame "go away" with the code for an internal error.
var goodbye = []byte{0, typeGoAway, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2}
