package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Dialer opens a connection to the guest's protocol.PortStdio. An error that wraps net.ErrClosed
// says that the guest is gone for good; every other one is tried again.
type Dialer func(ctx context.Context) (net.Conn, error)

const (
	retryMin = 20 * time.Millisecond
	retryMax = time.Second
)

// handshake dials and presents a token. It returns no connection when the stream is finished.
func handshake(ctx context.Context, dial Dialer, h header) (net.Conn, status, uint64, error) {
	fail := func(err error) (net.Conn, status, uint64, error) {
		return nil, 0, 0, fmt.Errorf("cannot open %v stream %s: %w", h.kind, h.token, err)
	}
	if err := checkToken(h.token); err != nil {
		return fail(err)
	}
	conn, err := dial(ctx)
	if err != nil {
		return fail(err)
	}
	conn.SetDeadline(time.Now().Add(handshakeTimeout))
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	err = writeHeader(conn, h)
	var s status
	var offset uint64
	if err == nil {
		s, offset, err = readReply(conn)
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if errors.Is(err, net.ErrClosed) {
		// Only the Dialer says that the guest is gone; this is but a lost connection.
		err = errors.New(err.Error())
	}
	if err == nil {
		switch s {
		case statusOK:
			conn.SetDeadline(time.Time{})
			return conn, s, offset, nil
		case statusFinished:
			conn.Close()
			return nil, s, offset, nil
		case statusUnknown:
			err = ErrUnknown
		case statusRefused:
			err = &refusedError{asked: h.offset, guest: offset}
		case statusBusy:
			err = fmt.Errorf("%w: too many streams wait for their process in the guest", ErrRefused)
		}
	}
	conn.Close()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return fail(err)
}

// refusedError is a refusal of an offset by a guest that is at another one.
type refusedError struct{ asked, guest uint64 }

func (e *refusedError) Error() string {
	return fmt.Sprintf("%v at offset %d (the guest is at %d)", ErrRefused, e.asked, e.guest)
}

func (e *refusedError) Unwrap() error { return ErrRefused }

// permanent tells the errors after which dialling again is no use.
func permanent(err error) bool {
	return errors.Is(err, net.ErrClosed) || errors.Is(err, ErrProtocol) || errors.Is(err, ErrUnknown) || errors.Is(err, ErrRefused)
}

// backoff spaces attempts.
type backoff time.Duration

// wait returns false when ctx ended.
func (b *backoff) wait(ctx context.Context) bool {
	if *b == 0 {
		*b = backoff(retryMin)
	} else {
		*b = min(*b*2, backoff(retryMax))
	}
	t := time.NewTimer(time.Duration(*b))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// Reader is the host's end of an output stream. It has no goroutine and, while idle, no buffer.
type Reader struct {
	dial   Dialer
	token  string
	kind   Kind
	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	running sync.Mutex // one WriteTo at a time

	mu       sync.Mutex
	conn     net.Conn
	offset   uint64
	finished bool
}

// OpenOutput opens the stream of a token from offset on, and returns after the guest has accepted
// it; ctx bounds only that. An offset other than 0 resumes a stream that an earlier Reader, maybe
// of an earlier process, has consumed up to there. When more than that was acknowledged, by a
// Reader whose process was killed before it could note it, the stream goes on from there: the
// guest keeps nothing before it. The caller closes the Reader.
func OpenOutput(ctx context.Context, dial Dialer, token string, kind Kind, offset uint64) (*Reader, error) {
	if kind != Stdout && kind != Stderr {
		return nil, fmt.Errorf("cannot open %v as output", kind)
	}
	r := &Reader{dial: dial, token: token, kind: kind, offset: offset}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	err := r.connect(ctx, offset != 0)
	var refused *refusedError
	if errors.As(err, &refused) && refused.guest > offset && refused.guest < final {
		r.offset = refused.guest
		err = r.connect(ctx, true)
	}
	if err != nil {
		r.cancel()
		return nil, err
	}
	return r, nil
}

// connect dials and resumes at the current offset.
func (r *Reader) connect(ctx context.Context, resume bool) error {
	h := header{kind: r.kind, token: r.token, offset: r.Offset()}
	if resume {
		h.flags = flagResume
	}
	conn, s, at, err := handshake(ctx, r.dial, h)
	if err != nil {
		return err
	}
	if s == statusFinished {
		switch {
		case at < h.offset:
			return fmt.Errorf("%v stream %s: %w: it ends at %d, before %d", r.kind, r.token, ErrProtocol, at, h.offset)
		case at > h.offset:
			return fmt.Errorf("%v stream %s: %w: %d of %d bytes arrived", r.kind, r.token, ErrLost, h.offset, at)
		}
		r.mu.Lock()
		r.finished = true
		r.mu.Unlock()
		return nil
	}
	if at != h.offset {
		conn.Close()
		return fmt.Errorf("%v stream %s: %w: asked for offset %d, the guest is at %d", r.kind, r.token, ErrProtocol, h.offset, at)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ctx.Err() != nil {
		conn.Close()
		return closedPipe(r.token)
	}
	r.conn = conn
	return nil
}

// Offset is how many bytes were consumed: written to a WriteTo's writer without error.
func (r *Reader) Offset() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.offset
}

// WriteTo writes the stream to w until the guest's end of it, and then returns nil. It
// acknowledges what w has taken, so a slow w holds the process in the guest back. Lost
// connections are opened again for as long as it takes. It fails with w's error, after which it
// may be called again with another writer and continues at Offset; with an error that wraps
// net.ErrClosed after Close or when the guest is gone; with ErrProtocol when the guest misbehaves;
// with ErrLost when the guest gave the stream up.
func (r *Reader) WriteTo(w io.Writer) (int64, error) {
	r.running.Lock()
	defer r.running.Unlock()
	var written int64
	var pause backoff
	for {
		r.mu.Lock()
		conn, finished := r.conn, r.finished
		r.mu.Unlock()
		switch {
		case r.ctx.Err() != nil:
			return written, closedPipe(r.token)
		case finished:
			return written, nil
		case conn == nil:
			err := r.connect(r.ctx, true)
			if err != nil && (permanent(err) || errors.Is(err, ErrLost)) {
				return written, err
			}
			if err != nil && !pause.wait(r.ctx) {
				return written, closedPipe(r.token)
			}
			continue
		}
		n, err := r.copyFrame(conn, w)
		if n > 0 {
			pause = 0
		}
		written += int64(n)
		var we *writeError
		switch {
		case err == errEnd:
			r.finish(conn)
			return written, nil
		case errors.As(err, &we):
			// The rest of the frame is sent again on the next connection.
			r.drop(conn)
			return written, we.err
		case errors.Is(err, ErrProtocol):
			r.drop(conn)
			return written, fmt.Errorf("%v stream %s: %w", r.kind, r.token, err)
		case err != nil:
			r.drop(conn)
			if !pause.wait(r.ctx) {
				return written, closedPipe(r.token)
			}
		}
	}
}

// errEnd is the guest's end of the stream, never mistaken for a connection's.
var errEnd = errors.New("end of stream")

type writeError struct{ err error }

func (e *writeError) Error() string { return e.err.Error() }

// copyFrame moves one frame to w and acknowledges it.
func (r *Reader) copyFrame(conn net.Conn, w io.Writer) (int, error) {
	n, err := readFrameLength(conn)
	if err != nil {
		return 0, err
	}
	if n == 0 {
		return 0, errEnd
	}
	frame := frames.Get().(*[]byte)
	defer frames.Put(frame)
	b := (*frame)[:n]
	if _, err := io.ReadFull(conn, b); err != nil {
		return 0, err
	}
	k, err := w.Write(b)
	if err == nil && k < n {
		err = io.ErrShortWrite
	}
	k = max(0, min(k, n))
	r.mu.Lock()
	r.offset += uint64(k)
	total := r.offset
	r.mu.Unlock()
	if err != nil {
		return k, &writeError{err}
	}
	return k, writeAck(conn, total)
}

// finish acknowledges the end and makes sure that the guest knows: the exit of the process is
// reported only then.
func (r *Reader) finish(conn net.Conn) {
	r.mu.Lock()
	r.finished = true
	total := r.offset
	r.mu.Unlock()
	defer r.drop(conn)
	err := writeAck(conn, total|final)
	if err == nil {
		conn.SetReadDeadline(time.Now().Add(handshakeTimeout))
		_, err = readFrameLength(conn)
	}
	var pause backoff
	h := header{kind: r.kind, flags: flagResume, token: r.token, offset: total | final}
	for err != nil && r.ctx.Err() == nil {
		if c, _, _, again := handshake(r.ctx, r.dial, h); again == nil || permanent(again) {
			if c != nil {
				c.Close()
			}
			return
		}
		pause.wait(r.ctx)
	}
}

func (r *Reader) drop(conn net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conn == conn {
		r.conn = nil
	}
	hangUp(conn)
}

// Close ends the Reader without telling the guest, which keeps what was not consumed for the next
// one. A WriteTo that is under way returns once its writer does.
func (r *Reader) Close() error {
	r.cancel()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conn != nil {
		hangUp(r.conn)
	}
	return nil
}

// Writer is the host's end of an input stream. It has one goroutine and, while nothing is
// unacknowledged, no buffer.
type Writer struct {
	dial   Dialer
	s      *sender
	ctx    context.Context
	cancel context.CancelFunc
}

// OpenInput opens the stream of a token and returns after the guest has accepted it; ctx bounds
// only that. For a stream that an earlier daemon has written to, the new data follows what the
// guest has consumed, which Offset tells; what was under way is the caller's to write again. The
// caller closes the Writer.
func OpenInput(ctx context.Context, dial Dialer, token string) (*Writer, error) {
	w := &Writer{dial: dial, s: newSender(token)}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	conn, err := w.connect(ctx, false)
	if err != nil {
		w.cancel()
		return nil, err
	}
	if conn == nil {
		w.cancel()
		return nil, fmt.Errorf("cannot open %v stream %s: %w, it is finished", Stdin, token, ErrRefused)
	}
	go w.run(conn)
	return w, nil
}

// connect returns no connection and no error when the guest takes no more input.
func (w *Writer) connect(ctx context.Context, resume bool) (net.Conn, error) {
	h := header{kind: Stdin, token: w.s.token}
	if resume {
		h.flags = flagResume
	}
	conn, s, at, err := handshake(ctx, w.dial, h)
	if err != nil {
		return nil, err
	}
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	w.s.quiesce()
	if s == statusFinished {
		w.s.finish(nil)
		return nil, nil
	}
	if !resume && at < final {
		// An earlier daemon has sent that much.
		w.s.acked, w.s.sent, w.s.total = at, at, at
	}
	if at < w.s.acked || at > w.s.total {
		conn.Close()
		return nil, fmt.Errorf("stream %s: %w: the guest is at offset %d, it was sent %d and had %d before",
			w.s.token, ErrProtocol, at, w.s.total, w.s.acked)
	}
	if !w.s.attach(conn, at) {
		conn.Close()
		return nil, closedPipe(w.s.token)
	}
	return conn, nil
}

// run reads acknowledgements and dials again, until the stream is over.
func (w *Writer) run(conn net.Conn) {
	defer w.cancel()
	var pause backoff
	for {
		before := w.s.progress()
		w.s.tell(before)
		done, err := w.s.serve(conn)
		if done {
			return
		}
		if err != nil {
			w.s.abort(err)
			return
		}
		if w.s.progress() != before {
			pause = 0
		}
		for {
			if !pause.wait(w.ctx) {
				return
			}
			conn, err = w.connect(w.ctx, true)
			if err == nil && conn == nil {
				return
			}
			if err == nil {
				break
			}
			if permanent(err) {
				w.s.abort(err)
				return
			}
		}
	}
}

// Offset is how many bytes of the stream the guest has consumed.
func (w *Writer) Offset() uint64 { return w.s.progress() }

// Notify has f told whenever more was consumed, with the number of bytes since the stream began,
// one call at a time. f must not call the Writer. Notify is called once, before Write.
func (w *Writer) Notify(f func(consumed uint64)) {
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	w.s.notify = f
}

// Write blocks while 256 KiB are not consumed by the process. It fails with an error that wraps
// ErrRefused once the process takes no more input, net.ErrClosed after Close or CloseWrite, and
// ErrProtocol when the guest misbehaves.
func (w *Writer) Write(p []byte) (int, error) { return w.s.Write(p) }

// CloseWrite marks the end of the input. It does not wait for the process; what was written is
// still delivered, as long as Close is not called.
func (w *Writer) CloseWrite() error {
	w.s.end()
	return nil
}

// Done is closed when the stream is over: the process consumed everything including the end, it
// refused further input, or the stream failed.
func (w *Writer) Done() <-chan struct{} { return w.s.ended }

// Close discards what is undelivered and frees everything.
func (w *Writer) Close() error {
	w.s.abort(closedPipe(w.s.token))
	w.cancel()
	return nil
}
