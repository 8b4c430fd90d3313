package container

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
	guestio "kuasar.io/kuasar/guest/protocol/stdio"
)

// sink is the client's end of an output stream. Write does not fail because of the client: what it
// does not take any more is discarded, as the process must not suffer from its client.
type sink interface {
	io.Writer
	// abandon discards from now on, and ends a Write that blocks.
	abandon()
	// detach lets go of the client without an end. A Write that blocks, and every later one,
	// fails, which is the only failure there is: what it could not write was not consumed.
	detach()
	// finish tells the client that there is no more. Nothing is written after it.
	finish()
	// close frees everything. It may be called at any time, more than once.
	close()
}

// source is the client's end of an input stream.
type source interface {
	// next waits for input and passes it to take, which must not keep it. It returns take's
	// error, or io.EOF at the end of the input, or an error that wraps os.ErrClosed after finish.
	next(take func([]byte) error) error
	// end makes next return io.EOF after what the client has written so far.
	end()
	// finish tells the client that nothing is read any more, and ends a next that waits.
	finish()
	// close frees everything. It may be called at any time, more than once.
	close()
}

// stdio is the standard streams of one process, between its client and the guest.
type stdio struct {
	client  IO
	token   string
	log     *slog.Logger
	streams *streamTable

	outputs []*output
	input   *input

	mu     sync.Mutex
	grace  *time.Timer
	closed bool
}

// output carries one output stream from the guest to the client.
type output struct {
	kind   guestio.Kind
	name   string // as the client named it
	sink   sink
	reader *guestio.Reader
	offset uint64        // where to resume
	done   chan struct{} // closed when the pump has ended; nil before it runs
}

type input struct {
	name   string
	source source
	writer *guestio.Writer
	done   chan struct{}
}

// newStdio checks a client's names. It opens nothing.
func newStdio(client IO, streams *streamTable, log *slog.Logger) (*stdio, error) {
	var random [8]byte
	rand.Read(random[:])
	t := &stdio{client: client, token: hex.EncodeToString(random[:]), streams: streams, log: log}
	names := []struct {
		field, name string
		kind        guestio.Kind
	}{{"stdin", client.Stdin, guestio.Stdin}, {"stdout", client.Stdout, guestio.Stdout}, {"stderr", client.Stderr, guestio.Stderr}}
	for _, n := range names {
		// A terminal has one output; clients name a stderr all the same.
		if n.name == "" || n.kind == guestio.Stderr && client.Terminal {
			continue
		}
		if _, _, err := parseStream(n.name); err != nil {
			return nil, fmt.Errorf("%s: %w", n.field, err)
		}
		if n.kind == guestio.Stdin {
			t.input = &input{name: n.name}
		} else {
			t.outputs = append(t.outputs, &output{kind: n.kind, name: n.name})
		}
	}
	return t, nil
}

// parseStream tells a FIFO's path from a stream's id. Exactly one of them is not empty.
func parseStream(name string) (path, streamID string, err error) {
	if len(name) > 4096 || strings.ContainsRune(name, 0) {
		return "", "", fmt.Errorf("a name of %d bytes is not valid: %w", len(name), errdefs.ErrInvalidArgument)
	}
	scheme, _, isURL := strings.Cut(name, "://")
	if !isURL {
		if !strings.HasPrefix(name, "/") {
			return "", "", fmt.Errorf("%q is neither an absolute path nor a URL: %w", name, errdefs.ErrInvalidArgument)
		}
		return name, "", nil
	}
	u, err := url.Parse(name)
	if err != nil {
		return "", "", fmt.Errorf("%q is no URL: %w", name, errdefs.ErrInvalidArgument)
	}
	switch {
	case scheme == "fifo" && u.Host == "" && strings.HasPrefix(u.Path, "/"):
		return u.Path, "", nil
	case strings.HasPrefix(scheme, "ttrpc") && u.Query().Get("streaming_id") != "":
		return "", u.Query().Get("streaming_id"), nil
	}
	return "", "", fmt.Errorf("%q: the scheme %q is not supported for standard streams, only FIFOs (a path) and streaming (ttrpc+unix://...?streaming_id=) are: %w",
		name, scheme, errdefs.ErrNotImplemented)
}

// guestNames are the strings for the guest.
func (t *stdio) guestNames() (stdin, stdout, stderr string) {
	if t.input != nil {
		stdin = protocol.StdioScheme + t.tokenOf(guestio.Stdin)
	}
	for _, o := range t.outputs {
		if o.kind == guestio.Stdout {
			stdout = protocol.StdioScheme + t.tokenOf(o.kind)
		} else {
			stderr = protocol.StdioScheme + t.tokenOf(o.kind)
		}
	}
	return stdin, stdout, stderr
}

func (t *stdio) tokenOf(kind guestio.Kind) string { return fmt.Sprintf("%s-%d", t.token, kind) }

// open opens the client's ends. holdInput keeps the input from ending when the client's last
// writer goes: then only CloseIO ends it. If it fails, close frees what was opened.
func (t *stdio) open(holdInput bool) error {
	for _, o := range t.outputs {
		path, id, err := parseStream(o.name)
		if err != nil {
			return fmt.Errorf("%v: %w", o.kind, err)
		}
		if id != "" {
			o.sink, err = t.streams.claimOutput(id)
		} else {
			o.sink, err = openFIFOSink(path, t.log)
		}
		if err != nil {
			return fmt.Errorf("cannot open %v: %w", o.kind, err)
		}
	}
	if t.input != nil {
		path, id, err := parseStream(t.input.name)
		if err != nil {
			return fmt.Errorf("stdin: %w", err)
		}
		if id != "" {
			t.input.source, err = t.streams.claimInput(id)
		} else {
			t.input.source, err = openFIFOSource(path, holdInput)
		}
		if err != nil {
			return fmt.Errorf("cannot open stdin: %w", err)
		}
	}
	return nil
}

// connect opens the streams in the guest, all at once because each costs a round trip.
func (t *stdio) connect(ctx context.Context, dial guestio.Dialer) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, o := range t.outputs {
		g.Go(func() (err error) {
			o.reader, err = guestio.OpenOutput(ctx, dial, t.tokenOf(o.kind), o.kind, o.offset)
			return err
		})
	}
	if t.input != nil {
		g.Go(func() (err error) {
			t.input.writer, err = guestio.OpenInput(ctx, dial, t.tokenOf(guestio.Stdin))
			return err
		})
	}
	return g.Wait()
}

// pump starts to carry bytes. misbehaved is told when the guest breaks the protocol.
func (t *stdio) pump(misbehaved func(error)) {
	for _, o := range t.outputs {
		if o.reader == nil {
			continue
		}
		o.done = make(chan struct{})
		go func() {
			defer close(o.done)
			_, err := o.reader.WriteTo(o.sink)
			switch {
			case err == nil, errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrClosed):
			case errors.Is(err, guestio.ErrProtocol):
				misbehaved(err)
			default:
				t.log.Warn("output is lost", "stream", o.kind.String(), "error", err)
			}
		}()
	}
	if in := t.input; in != nil && in.writer != nil {
		in.done = make(chan struct{})
		go func() {
			defer close(in.done)
			// A process that does not read shows its client a closed pipe, as it would on a host.
			defer in.source.finish()
			take := func(p []byte) error {
				_, err := in.writer.Write(p)
				return err
			}
			for {
				err := in.source.next(take)
				switch {
				case err == nil:
					continue
				case err == io.EOF:
					in.writer.CloseWrite()
				case errors.Is(err, guestio.ErrProtocol):
					misbehaved(err)
				case errors.Is(err, guestio.ErrRefused), errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrClosed):
				default:
					t.log.Warn("input is lost", "error", err)
				}
				return
			}
		}()
	}
}

// closeStdin ends the input after what the client has written.
func (t *stdio) closeStdin() {
	if t.input != nil && t.input.source != nil {
		t.input.source.end()
	}
}

// abandonAfter discards output that the client has not taken after d. Only the first call counts.
func (t *stdio) abandonAfter(d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.grace == nil && !t.closed {
		t.grace = time.AfterFunc(d, func() {
			for _, o := range t.outputs {
				if o.sink != nil {
					o.sink.abandon()
				}
			}
		})
	}
}

// drain waits for the guest's end of all outputs, for at most limit, and passes it on.
func (t *stdio) drain(limit time.Duration) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for _, o := range t.outputs {
		if o.done == nil {
			continue
		}
		select {
		case <-o.done:
		case <-timer.C:
			t.log.Warn("output is cut off: the process has exited, but its output did not end", "stream", o.kind.String())
			timer.Reset(0)
		}
	}
	t.cut(0)
}

// cut ends all streams. Output that has arrived may still be written for at most grace.
func (t *stdio) cut(grace time.Duration) {
	var timeout <-chan time.Time
	for _, o := range t.outputs {
		if o.reader != nil {
			o.reader.Close()
		}
	}
	for _, o := range t.outputs {
		if o.done == nil {
			continue
		}
		select {
		case <-o.done:
			continue
		default:
		}
		if timeout == nil {
			timeout = time.After(grace)
		}
		select {
		case <-o.done:
		case <-timeout:
			closed := make(chan time.Time)
			close(closed)
			timeout = closed
			o.sink.abandon()
			<-o.done
		}
	}
	for _, o := range t.outputs {
		if o.sink != nil {
			o.sink.finish()
		}
	}
	t.cutInput()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	if t.grace != nil {
		t.grace.Stop()
	}
}

func (t *stdio) cutInput() {
	if t.input == nil {
		return
	}
	if t.input.source != nil {
		t.input.source.finish()
	}
	if t.input.writer != nil {
		t.input.writer.Close()
	}
}

// detach stops the pumps and lets go of the client, without telling the guest anything.
func (t *stdio) detach() {
	for _, o := range t.outputs {
		if o.reader != nil {
			o.reader.Close()
		}
		if o.sink != nil {
			o.sink.detach()
		}
		if o.done != nil {
			<-o.done
		}
		if o.sink != nil {
			o.sink.close()
		}
	}
	t.cutInput()
}

// close frees everything. It is called after cut, or when opening failed.
func (t *stdio) close() {
	t.cut(0)
	for _, o := range t.outputs {
		if o.sink != nil {
			o.sink.close()
		}
	}
	if t.input != nil && t.input.source != nil {
		t.input.source.close()
	}
}

// chunks lends buffers for input. They are held only while there is input.
var chunks = sync.Pool{New: func() any { b := make([]byte, 32<<10); return &b }}

// openFIFO opens one end of a FIFO without waiting for the other.
func openFIFO(path string, flag int) (*os.File, error) {
	fd, err := unix.Open(path, flag|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		err = &os.PathError{Op: "open", Path: path, Err: err}
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%w: the client has removed it: %w", err, errdefs.ErrNotFound)
		}
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFIFO {
		unix.Close(fd)
		return nil, fmt.Errorf("%s is not a FIFO: %w", path, errdefs.ErrInvalidArgument)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// fifoSink writes to a FIFO. It holds a reading end, too: without it, a write while the client
// restarts would fail and what it had not read would vanish. The reading end stays until close, so
// that a client that comes back after the exit finds the rest.
type fifoSink struct {
	write, read *os.File
	log         *slog.Logger
	discard     atomic.Bool
	detached    atomic.Bool
}

func openFIFOSink(path string, log *slog.Logger) (sink, error) {
	read, err := openFIFO(path, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	write, err := openFIFO(path, unix.O_WRONLY)
	if err != nil {
		read.Close()
		return nil, err
	}
	return &fifoSink{write: write, read: read, log: log}, nil
}

func (f *fifoSink) Write(p []byte) (int, error) {
	if f.discard.Load() {
		return len(p), nil
	}
	if n, err := f.write.Write(p); err != nil {
		if f.detached.Load() {
			return n, os.ErrClosed
		}
		if f.discard.Swap(true) {
			f.log.Warn("output is discarded: the client did not read it", "fifo", f.write.Name(), "bytes", len(p)-n)
		} else {
			f.log.Warn("output is discarded", "fifo", f.write.Name(), "error", err)
		}
	}
	return len(p), nil
}

func (f *fifoSink) abandon() {
	f.discard.Store(true)
	f.write.SetWriteDeadline(time.Unix(1, 0))
}

func (f *fifoSink) detach() {
	f.detached.Store(true)
	f.write.SetWriteDeadline(time.Unix(1, 0))
}

func (f *fifoSink) finish() { f.write.Close() }

func (f *fifoSink) close() {
	f.write.Close()
	f.read.Close()
}

// fifoSource reads from a FIFO.
type fifoSource struct {
	read   *os.File
	hold   *os.File // a writing end that keeps the input open; nil if the client's writers decide
	raw    syscallConn
	ending atomic.Bool
}

type syscallConn interface {
	Read(func(fd uintptr) bool) error
}

func openFIFOSource(path string, hold bool) (source, error) {
	read, err := openFIFO(path, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	f := &fifoSource{read: read}
	if hold {
		if f.hold, err = openFIFO(path, unix.O_WRONLY); err != nil {
			read.Close()
			return nil, err
		}
	}
	if f.raw, err = read.SyscallConn(); err != nil {
		f.close()
		return nil, err
	}
	return f, nil
}

func (f *fifoSource) next(take func([]byte) error) error {
	var result error
	err := f.raw.Read(func(fd uintptr) bool {
		chunk := chunks.Get().(*[]byte)
		defer chunks.Put(chunk)
		n, err := unix.Read(int(fd), *chunk)
		switch {
		case err == unix.EINTR:
			return true // nothing taken, the caller comes again
		case err == unix.EAGAIN || n == 0 && err == nil && !f.hungUp(int(fd)):
			// Nothing there, or no client has opened its end yet.
			if f.ending.Load() {
				result = io.EOF
				return true
			}
			return false
		case err != nil:
			result = &os.PathError{Op: "read", Path: f.read.Name(), Err: err}
		case n == 0:
			result = io.EOF
		default:
			result = take((*chunk)[:n])
		}
		return true
	})
	if err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		// end was called while nothing was there, or before this call: look once more.
		f.read.SetReadDeadline(time.Time{})
		return nil
	}
	if err != nil {
		return err
	}
	return result
}

// hungUp tells whether a writer was there and has gone, as read(2) cannot.
func (f *fifoSource) hungUp(fd int) bool {
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	_, err := unix.Poll(poll, 0)
	return err == nil && poll[0].Revents&unix.POLLHUP != 0
}

func (f *fifoSource) end() {
	f.ending.Store(true)
	f.read.SetReadDeadline(time.Unix(1, 0))
}

func (f *fifoSource) finish() { f.close() }

func (f *fifoSource) close() {
	f.read.Close()
	if f.hold != nil {
		f.hold.Close()
	}
}

func isProtocolViolation(err error) bool { return errors.Is(err, guestio.ErrProtocol) }
