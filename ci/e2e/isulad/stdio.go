package isulad

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// stdio is what a request says of a process's streams.
type stdio struct {
	stdin, stdout, stderr string
	terminal              bool
}

// drainGap is the silence that ends the relaying of output after the first end of a stream.
const drainGap = 100 * time.Millisecond

// vsockTries is how often iSulad tries to connect to one stream's port.
const vsockTries = 10

// streams are the ends of one exec's streams on iSulad's side, and its copy thread.
type streams struct {
	stdio
	done   chan struct{} // closed when the copy thread has ended and all ends are closed
	cancel context.CancelFunc
}

// stop is what iSulad's event does when an exec has failed: the copy thread need not wait for the
// end of a stream.
func (s *streams) stop() { s.cancel() }

func (s *streams) join() { <-s.done }

type chunk struct {
	to   io.Writer // nil for what comes from the caller's stdin
	data []byte
	end  bool
}

// relay is iSulad's copy loop: up to the first end of any stream, then what still arrives in gaps of
// less than drainGap, up to the next end. It closes nothing.
func relay(ctx context.Context, stdin io.Writer, chunks <-chan chunk) {
	take := func(c chunk) {
		if to := c.to; to != nil {
			to.Write(c.data)
		} else if stdin != nil {
			stdin.Write(c.data)
		}
	}
	for more := true; more; {
		select {
		case c := <-chunks:
			take(c)
			more = !c.end
		case <-ctx.Done():
			more = false
		}
	}
	timer := time.NewTimer(drainGap)
	defer timer.Stop()
	for {
		select {
		case c := <-chunks:
			take(c)
			if c.end {
				return
			}
			timer.Reset(drainGap)
		case <-timer.C:
			return
		}
	}
}

// pump hands on what a stream brings until it ends or quit is closed.
func pump(from io.Reader, to io.Writer, chunks chan<- chunk, quit <-chan struct{}) {
	for {
		buffer := make([]byte, 32<<10)
		n, err := from.Read(buffer)
		select {
		case chunks <- chunk{to: to, data: buffer[:n], end: err != nil}:
		case <-quit:
			return
		}
		if err != nil {
			return
		}
	}
}

// copyAll runs the copy loop over opened ends, and closes them.
func copyAll(ctx context.Context, e ExecConfig, in io.WriteCloser, out, err io.ReadCloser) {
	chunks, quit := make(chan chunk), make(chan struct{})
	var pumps sync.WaitGroup
	if in != nil {
		// Not waited for: the caller's stdin may never end.
		go pump(e.Stdin, nil, chunks, quit)
	}
	for _, s := range []struct {
		from io.ReadCloser
		to   io.Writer
	}{{out, e.Stdout}, {err, e.Stderr}} {
		if s.from != nil {
			pumps.Go(func() { pump(s.from, s.to, chunks, quit) })
		}
	}
	if in != nil {
		relay(ctx, in, chunks)
		in.Close()
	} else {
		relay(ctx, nil, chunks)
	}
	close(quit)
	for _, from := range []io.Closer{out, err} {
		if from != nil {
			from.Close()
		}
	}
	pumps.Wait()
}

// fifo is the reading end of a FIFO. Unlike a plain file it does not take for an end that nobody has
// opened the other side yet.
type fifo struct {
	fd     int
	wake   [2]*os.File // closing the second wakes a reader
	closed sync.Once
	idle   sync.Mutex // held while fd is in use
}

func openFIFO(path string) (*fifo, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the FIFO %s for reading: %w", path, err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &fifo{fd: fd, wake: [2]*os.File{r, w}}, nil
}

func (f *fifo) Read(b []byte) (int, error) {
	f.idle.Lock()
	defer f.idle.Unlock()
	for {
		polled := []unix.PollFd{{Fd: int32(f.fd), Events: unix.POLLIN}, {Fd: int32(f.wake[0].Fd()), Events: unix.POLLIN}}
		if _, err := unix.Poll(polled, -1); err != nil && err != unix.EINTR {
			return 0, err
		}
		if polled[1].Revents != 0 {
			return 0, os.ErrClosed
		}
		if polled[0].Revents == 0 {
			continue
		}
		n, err := unix.Read(f.fd, b)
		switch {
		case err == unix.EAGAIN || err == unix.EINTR:
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

func (f *fifo) Close() error {
	f.closed.Do(func() {
		f.wake[1].Close()
		f.idle.Lock()
		defer f.idle.Unlock()
		unix.Close(f.fd)
		f.wake[0].Close()
		f.fd = -1
	})
	return nil
}

// openFIFOs makes the FIFOs of an exec in dir, opens iSulad's ends and starts the copy thread, which
// removes dir at its end. When it returns, the other ends can be opened without blocking.
func openFIFOs(dir string, e ExecConfig) (_ *streams, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the folder of an exec's FIFOs: %w", err)
	}
	var in *os.File
	var outs [2]io.ReadCloser
	defer func() {
		if err == nil {
			return
		}
		if in != nil {
			in.Close()
		}
		for _, out := range outs {
			if out != nil {
				out.Close()
			}
		}
		os.RemoveAll(dir)
	}()
	s := &streams{done: make(chan struct{})}
	s.terminal = e.Terminal
	if e.Stdin != nil {
		s.stdin = filepath.Join(dir, "in-fifo")
		if err := unix.Mkfifo(s.stdin, 0o600); err != nil {
			return nil, fmt.Errorf("cannot make the FIFO %s: %w", s.stdin, err)
		}
		if in, err = os.OpenFile(s.stdin, os.O_RDWR|unix.O_NONBLOCK, 0); err != nil {
			return nil, err
		}
		lock := unix.Flock_t{Type: unix.F_WRLCK}
		if err := unix.FcntlFlock(in.Fd(), unix.F_SETLK, &lock); err != nil {
			return nil, fmt.Errorf("cannot lock the FIFO %s: %w", s.stdin, err)
		}
		// Asking for the descriptor has made it blocking.
		if err := unix.SetNonblock(int(in.Fd()), true); err != nil {
			return nil, err
		}
	}
	for i, out := range []struct {
		to   io.Writer
		name string
		path *string
	}{{e.Stdout, "out-fifo", &s.stdout}, {e.Stderr, "err-fifo", &s.stderr}} {
		if out.to == nil {
			continue
		}
		*out.path = filepath.Join(dir, out.name)
		if err := unix.Mkfifo(*out.path, 0o600); err != nil {
			return nil, fmt.Errorf("cannot make the FIFO %s: %w", *out.path, err)
		}
		f, err := openFIFO(*out.path)
		if err != nil {
			return nil, err
		}
		outs[i] = f
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	go func() {
		defer close(s.done)
		defer os.RemoveAll(dir)
		if in == nil {
			copyAll(ctx, e, nil, outs[0], outs[1])
		} else {
			copyAll(ctx, e, in, outs[0], outs[1])
		}
	}()
	return s, nil
}

// dialStreams starts the thread that connects to the streams' ports, one after the other, and then
// copies. It does not wait for it: the guest listens only once it knows of the exec. A stream that
// cannot be connected to leaves the exec without any. To stop it ends the copying alone.
func (c Config) dialStreams(cid uint32, ports [3]uint32, e ExecConfig) *streams {
	s := &streams{done: make(chan struct{})}
	s.terminal = e.Terminal
	for i, url := range []*string{&s.stdin, &s.stdout, &s.stderr} {
		if ports[i] != 0 {
			*url = fmt.Sprintf("vsock://%d:%d", cid, ports[i])
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	go func() {
		defer close(s.done)
		var conns [3]net.Conn
		for i, port := range ports {
			if port == 0 {
				continue
			}
			conn := c.dialStream(cid, port)
			if conn == nil {
				for _, opened := range conns[:i] {
					if opened != nil {
						opened.Close()
					}
				}
				return
			}
			conns[i] = conn
		}
		var in io.WriteCloser
		if conns[0] != nil {
			in = conns[0]
		}
		var outs [2]io.ReadCloser
		for i, conn := range conns[1:] {
			if conn != nil {
				outs[i] = conn
			}
		}
		copyAll(ctx, e, in, outs[0], outs[1])
	}()
	return s
}

// dialStream goes on trying whatever became of the exec: iSulad's thread sleeps between its tries and looks
// at nothing, and the port is not given back before the thread has ended.
func (c Config) dialStream(cid, port uint32) net.Conn {
	for try := range vsockTries {
		if try > 0 {
			time.Sleep(c.VsockRetry)
		}
		if conn, err := c.DialVsock(cid, port); err == nil {
			return conn
		}
	}
	return nil
}
