package mux

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const echoPort, sinkPort, sourcePort = 7, 8, 9

// serveEcho is a guest: port 7 echoes until the end of file and then half-closes, port 8 discards,
// port 9 sends without end.
func serveEcho(s *Session) {
	for {
		conn, port, err := s.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			switch port {
			case echoPort:
				io.Copy(conn, conn)
				conn.(*Conn).CloseWrite()
			case sinkPort:
				io.Copy(io.Discard, conn)
			case sourcePort:
				chunk := make([]byte, 200<<10)
				for {
					if _, err := conn.Write(chunk); err != nil {
						return
					}
				}
			}
		}()
	}
}

func startGuest(t *testing.T, port line, handle func(*Session)) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, port, handle) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("serve ended with %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("serve did not end with its context")
		}
	})
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// echo sends data through a new stream and checks that it comes back whole, ended by the guest.
func echo(ctx context.Context, t *testing.T, s *Session, data []byte) {
	t.Helper()
	conn, err := s.Open(ctx, echoPort)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	werr := make(chan error, 1)
	go func() {
		_, err := conn.Write(data)
		werr <- errors.Join(err, conn.(*Conn).CloseWrite())
	}()
	got, err := io.ReadAll(conn)
	if err != nil {
		t.Fatalf("read %d of %d bytes: %v", len(got), len(data), err)
	}
	if err := <-werr; err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, data) {
		t.Fatalf("echoed %d bytes are not the %d sent", len(got), len(data))
	}
}

func TestDialFirstWaitsForTheGuestToOpenItsPort(t *testing.T) {
	ctx := testContext(t)
	port := newEmulatedPort(t)
	type result struct {
		s   *Session
		err error
	}
	dialled := make(chan result, 1)
	go func() {
		s, err := DialFirst(ctx, port.socket)
		dialled <- result{s, err}
	}()
	// The host is there long before the guest, for longer than any handshake's deadline.
	select {
	case r := <-dialled:
		t.Fatalf("a session with nobody: %v", r.err)
	case <-time.After(handshakeTimeout + 2*holdDown):
	}
	port.open()
	startGuest(t, port, serveEcho)
	r := <-dialled
	if r.err != nil {
		t.Fatal(r.err)
	}
	defer r.s.Close()
	echo(ctx, t, r.s, bytes.Repeat([]byte("kuasar"), 200_000))
}

func TestDialWaitsForTheSocket(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	_, err := Dial(ctx, t.TempDir()+"/none.sock")
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, syscall.ENOENT) {
		t.Fatalf("got %v", err)
	}
}

func TestGuestOpensStreams(t *testing.T) {
	ctx := testContext(t)
	port := newEmulatedPort(t)
	port.open()
	startGuest(t, port, func(s *Session) {
		conn, err := s.Open(ctx, 1027)
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		io.WriteString(conn, "hello")
		io.ReadAll(conn)
	})
	s, err := DialFirst(ctx, port.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	conn, number, err := s.Accept()
	if err != nil || number != 1027 {
		t.Fatalf("port %d, %v", number, err)
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello" {
		t.Fatalf("%q, %v", got, err)
	}
	conn.Close()
	<-s.Done() // the guest's handler returned
}

func TestStaleBytesBothWays(t *testing.T) {
	ctx := testContext(t)
	port := newEmulatedPort(t)
	// The tail of a frame and a whole handshake of an earlier host, towards the guest.
	old := append(bytes.Repeat([]byte{0}, 5000), magic...)
	port.queue = append(old, bytes.Repeat([]byte{7}, nonceSize)...)
	// The guest's answer to that host, cut off, and some of its data.
	port.stale = append(bytes.Repeat([]byte{1}, 70<<10), magic...)
	port.stale = append(port.stale, 7, 7, 7)
	port.open()
	startGuest(t, port, serveEcho)
	s, err := Dial(ctx, port.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	echo(ctx, t, s, []byte("fresh"))
}

func TestReconnectAtOnce(t *testing.T) {
	for _, busy := range []bool{false, true} {
		name := map[bool]string{false: "idle", true: "busy"}[busy]
		t.Run(name, func(t *testing.T) {
			ctx := testContext(t)
			port := newEmulatedPort(t)
			port.open()
			startGuest(t, port, serveEcho)
			for range 5 {
				s, err := Dial(ctx, port.socket)
				if err != nil {
					t.Fatal(err)
				}
				echo(ctx, t, s, bytes.Repeat([]byte("x"), 100_000))
				if busy {
					sink, err := s.Open(ctx, sinkPort)
					if err != nil {
						t.Fatal(err)
					}
					source, err := s.Open(ctx, sourcePort)
					if err != nil {
						t.Fatal(err)
					}
					go func() {
						for {
							if _, err := sink.Write(make([]byte, 200<<10)); err != nil {
								return
							}
						}
					}()
					if _, err := io.CopyN(io.Discard, source, 1<<20); err != nil {
						t.Fatal(err)
					}
				}
				s.Close()
			}
		})
	}
}

func TestLostSessionIsNoEndOfFile(t *testing.T) {
	ctx := testContext(t)
	port := newEmulatedPort(t)
	port.open()
	startGuest(t, port, serveEcho)
	s, err := Dial(ctx, port.socket)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := s.Open(ctx, echoPort)
	if err != nil {
		t.Fatal(err)
	}
	port.mu.Lock()
	port.host.Close()
	port.mu.Unlock()
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Fatalf("got %v", err)
	}
	if _, err := conn.Write([]byte("x")); err == nil {
		t.Fatal("a write into a lost session succeeded")
	}
	if s.Err() == nil || errors.Is(s.Err(), ErrClosed) {
		t.Fatalf("the session ended with %v", s.Err())
	}
	if _, err := s.Open(ctx, echoPort); err == nil {
		t.Fatal("a stream of a lost session")
	}
}

func TestCloseReleasesReaderAndPeer(t *testing.T) {
	ctx := testContext(t)
	port := newEmulatedPort(t)
	port.open()
	ended := make(chan error, 1)
	startGuest(t, port, func(s *Session) {
		conn, _, err := s.Accept()
		if err != nil {
			return
		}
		_, err = conn.Read(make([]byte, 1))
		ended <- err
		// Far more than a window: the host has closed and must not stall the guest.
		if _, err := conn.Write(make([]byte, 4*window)); err != nil {
			ended <- err
		}
		conn.Close()
		ended <- nil
		<-s.Done()
	})
	s, err := Dial(ctx, port.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	conn, err := s.Open(ctx, echoPort)
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() {
		_, err := conn.Read(make([]byte, 1))
		read <- err
	}()
	conn.Close()
	if err := <-read; !errors.Is(err, net.ErrClosed) {
		t.Fatalf("the blocked read ended with %v", err)
	}
	if err := <-ended; err != io.EOF {
		t.Fatalf("the guest read %v", err)
	}
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Fatalf("a write after Close: %v", err)
	}
}

func TestReadDeadline(t *testing.T) {
	ctx := testContext(t)
	port := newEmulatedPort(t)
	port.open()
	startGuest(t, port, serveEcho)
	s, err := Dial(ctx, port.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	conn, err := s.Open(ctx, echoPort)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetReadDeadline(time.Now().Add(time.Millisecond))
	var ne net.Error
	if _, err := conn.Read(make([]byte, 1)); !errors.As(err, &ne) || !ne.Timeout() {
		t.Fatalf("got %v", err)
	}
}

func frame(kind byte, flags uint16, id, length uint32) []byte {
	b := []byte{0, kind}
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint32(b, id)
	return binary.BigEndian.AppendUint32(b, length)
}

// TestHostileGuest answers the handshake and then sends what no guest sends.
func TestHostileGuest(t *testing.T) {
	repeat := func(b []byte, n int) []byte { return bytes.Repeat(b, n) }
	for name, c := range map[string]struct {
		sends []byte
		want  string
	}{
		"over-long frame":     {frame(typeData, 0, 1, maxFrame+1), "longer than"},
		"version":             {[]byte("HTTP/1.1 400 Bad Request"), "version 72"},
		"handshake":           {append(magic, make([]byte, nonceSize)...), "version 245"},
		"type":                {frame(9, 0, 1, 0), "type 9"},
		"ping":                {frame(2, flagSYN, 0, 1), "type 2"},
		"flags":               {frame(typeData, 0x100, 1, 0), "flags"},
		"stream 0":            {frame(typeData, 0, 0, 4), "stream 0"},
		"the host's stream":   {frame(typeWindow, flagSYN, 3, 0), "wrong side"},
		"huge window":         {frame(typeWindow, 0, 1, 1<<31), "window update"},
		"same stream twice":   {repeat(frame(typeWindow, flagSYN, 2, 0), 2), "duplicate stream"},
		"endless streams":     {endlessStreams(), "more than 16 streams"},
		"window exceeded":     {overWindow(), "window exceeded"},
		"no stream":           {repeat(append(frame(typeData, 0, 99, 1), 0), maxComplaints+1), "do not exist"},
		"protocol error away": {frame(typeGoAway, 0, 0, 1), "protocol error"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := testContext(t)
			l, err := net.Listen("unix", t.TempDir()+"/p")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				defer conn.Close()
				hello := make([]byte, len(magic)+nonceSize)
				io.ReadFull(conn, hello)
				conn.Write(hello)
				conn.Write(c.sends)
				io.Copy(io.Discard, conn)
			}()
			s, err := Dial(ctx, l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			select {
			case <-s.Done():
			case <-ctx.Done():
				t.Fatal("the session lives on")
			}
			s.Close()
			var pe *ProtocolError
			if err := s.Err(); !strings.Contains(err.Error(), c.want) {
				t.Fatalf("ended with %v", err)
			} else if name != "protocol error away" && !errors.As(err, &pe) {
				t.Fatalf("ended with %T", err)
			}
		})
	}
}

func endlessStreams() (b []byte) {
	for id := uint32(2); id < 2*(maxGuestStreams+3); id += 2 {
		b = append(b, frame(typeWindow, flagSYN, id, 0)...)
	}
	return b
}

func overWindow() []byte {
	b := frame(typeWindow, flagSYN, 2, 0)
	for range window/maxFrame + 1 {
		b = append(b, frame(typeData, 0, 2, maxFrame)...)
		b = append(b, make([]byte, maxFrame)...)
	}
	return b
}

// TestServeFile drives Serve through a real descriptor.
func TestServeFile(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	port := os.NewFile(uintptr(fds[0]), "port")
	defer port.Close()
	file := os.NewFile(uintptr(fds[1]), "host")
	host, err := net.FileConn(file)
	file.Close()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(testContext(t))
	var sessions sync.WaitGroup
	served := make(chan error, 1)
	go func() {
		served <- Serve(ctx, port, func(s *Session) {
			sessions.Add(1)
			defer sessions.Done()
			serveEcho(s)
		})
	}()
	for range 3 { // one after the other, on a line that never hangs up
		rest, err := greet(host)
		if err != nil {
			t.Fatal(err)
		}
		s, err := newSession(stay{host}, &guard{r: behind(rest, host), host: true}, true)
		if err != nil {
			t.Fatal(err)
		}
		echo(ctx, t, s, bytes.Repeat([]byte("file"), 50_000))
		s.Close()
		host.SetDeadline(time.Time{})
	}
	cancel()
	if err := <-served; !errors.Is(err, context.Canceled) {
		t.Fatalf("Serve returned %v", err)
	}
	sessions.Wait()
	host.Close()
	if err := port.SetDeadline(time.Time{}); err != nil {
		t.Fatalf("Serve closed the port: %v", err)
	}
}

// stay keeps the connection open when a session ends.
type stay struct{ net.Conn }

func (s stay) Close() error { return s.SetDeadline(time.Unix(1, 0)) }

func FuzzGuard(f *testing.F) {
	f.Add(frame(typeData, flagSYN, 2, 4), true, uint8(3))
	f.Add(append(frame(typeWindow, 0, 1, 0), magic...), false, uint8(5))
	f.Add(overWindow()[:100], true, uint8(1))
	f.Fuzz(func(t *testing.T, wire []byte, host bool, step uint8) {
		g := &guard{r: &dribble{wire, int(step) + 1}, host: host}
		passed, err := io.ReadAll(g)
		if !bytes.HasPrefix(wire, passed) {
			t.Fatal("the guard changed the bytes")
		}
		if err == nil && len(passed) != len(wire) {
			t.Fatal("the guard withheld bytes without an error")
		}
		// Whatever passed parses as frames within the limits.
		for rest := passed; len(rest) >= headerSize; {
			n := binary.BigEndian.Uint32(rest[8:])
			if rest[0] != 0 || rest[1] == typeData && n > maxFrame {
				t.Fatalf("passed %x", rest[:headerSize])
			}
			skip := headerSize
			if rest[1] == typeData {
				skip += int(n)
			}
			rest = rest[min(skip, len(rest)):]
		}
		if g.fromMagic != nil && (host || g.fromMagic[0] != magic[0]) {
			t.Fatalf("a magic of %x", g.fromMagic)
		}
	})
}

type dribble struct {
	b    []byte
	step int
}

func (d *dribble) Read(p []byte) (int, error) {
	if len(d.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), d.step)], d.b)
	d.b = d.b[n:]
	return n, nil
}
