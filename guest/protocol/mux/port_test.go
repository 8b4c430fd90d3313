package mux

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// emulatedPort behaves as a virtio-serial port of QEMU behind a listening chardev: one host at a
// time; nothing is read from the host before the guest has opened the port; what a host sent
// outlives it, and the guest sees an end of file only if it looks while nobody is connected and the
// queue is empty; what the guest writes while nobody is connected waits.
type emulatedPort struct {
	socket string
	l      net.Listener

	mu       sync.Mutex
	changed  *sync.Cond
	queue    []byte
	host     net.Conn
	opened   bool
	deadline time.Time
	// stale is sent to the next host before anything else.
	stale []byte
}

const queueSize = 64 << 10

func newEmulatedPort(t *testing.T) *emulatedPort {
	t.Helper()
	dir, err := os.MkdirTemp("", "mux")
	if err != nil {
		t.Fatal(err)
	}
	p := &emulatedPort{socket: filepath.Join(dir, "p.sock")}
	p.changed = sync.NewCond(&p.mu)
	p.l, err = net.Listen("unix", p.socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := p.l.Accept()
			if err != nil {
				return
			}
			p.serveHost(conn)
		}
	}()
	t.Cleanup(func() {
		p.l.Close()
		p.mu.Lock()
		if p.host != nil {
			p.host.Close()
		}
		p.opened = true
		p.queue = nil
		p.changed.Broadcast()
		p.mu.Unlock()
		<-done
		os.RemoveAll(dir)
	})
	return p
}

func (p *emulatedPort) serveHost(conn net.Conn) {
	defer conn.Close()
	p.mu.Lock()
	conn.Write(p.stale)
	p.stale = nil
	p.host = conn
	p.changed.Broadcast()
	for !p.opened {
		p.changed.Wait()
	}
	p.mu.Unlock()
	buf := make([]byte, 4096)
	for {
		n, err := conn.Read(buf)
		p.mu.Lock()
		for len(p.queue) > queueSize {
			p.changed.Wait()
		}
		p.queue = append(p.queue, buf[:n]...)
		if err != nil {
			p.host = nil
		}
		p.changed.Broadcast()
		p.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (p *emulatedPort) open() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.opened = true
	p.changed.Broadcast()
}

func (p *emulatedPort) SetDeadline(t time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deadline = t
	p.changed.Broadcast()
	return nil
}

func (p *emulatedPort) late() bool {
	return !p.deadline.IsZero() && time.Now().After(p.deadline)
}

func (p *emulatedPort) waitHost() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.host == nil {
		if p.late() {
			return os.ErrDeadlineExceeded
		}
		p.changed.Wait()
	}
	return nil
}

func (p *emulatedPort) Read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.late():
			return 0, os.ErrDeadlineExceeded
		case len(p.queue) > 0:
			n := copy(b, p.queue)
			p.queue = p.queue[n:]
			p.changed.Broadcast()
			return n, nil
		case p.host == nil:
			return 0, io.EOF
		}
		p.changed.Wait()
	}
}

func (p *emulatedPort) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		if p.late() {
			return 0, os.ErrDeadlineExceeded
		}
		if host := p.host; host != nil {
			p.mu.Unlock()
			host.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
			n, err := host.Write(b)
			p.mu.Lock()
			if err != nil && !p.late() && n == 0 {
				if p.host == host { // full, or about to be seen as gone
					continue
				}
				return len(b), nil // lost with the host
			}
			if n > 0 && n < len(b) {
				rest := b[n:]
				p.mu.Unlock()
				m, err := p.Write(rest)
				p.mu.Lock()
				return n + m, err
			}
			return len(b), nil
		}
		p.changed.Wait()
	}
}
