package container

import (
	"context"
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
	"kuasar.io/kuasar/guest/protocol"
	guestio "kuasar.io/kuasar/guest/protocol/stdio"
)

// sink is the client's end of an output stream. Write does not fail because of the client: what it
// does not take any more is discarded, as the process must not suffer from its client.
type sink interface {
	// Write takes output; what it took needs not come again, to this daemon or another.
	io.Writer
	// position is the offset in the stream behind what was taken.
	position() uint64
	// resume moves the position on, over what cannot be had any more.
	resume(offset uint64)
	// flush returns nil when the client has got what was taken, or will not, and an error when ctx
	// ends before or after detach.
	flush(ctx context.Context) error
	// abandon discards from now on, and ends a Write or flush that blocks.
	abandon()
	// detach leaves the client to another daemon. A Write that blocks, and every later one, fails,
	// which is the only failure there is: what it could not write was not taken.
	detach()
	// finish tells the client that there is no more. Nothing is written after it.
	finish()
	// close frees everything. It may be called at any time, more than once.
	close()
}

// source is the client's end of an input stream.
type source interface {
	// fill waits for input and puts it into b. It returns io.EOF at the end of the input, or an
	// error that wraps os.ErrClosed after finish.
	fill(b *inbox) error
	// ended says that the end of the input is remembered elsewhere.
	ended()
	// end makes fill return io.EOF after what the client has written so far.
	end()
	// finish tells the client that nothing is read any more, and ends a fill that waits.
	finish()
	// close frees everything. It may be called at any time, more than once.
	close()
}

// stdio is the standard streams of one process, between its client and the guest.
type stdio struct {
	client     IO
	id, execID string
	token      string
	log        *slog.Logger
	streams    *streamTable
	shelf      *shelf

	outputs []*output
	input   *input
	logTo   *LogFile // where outputs go that the client did not name; nil for nowhere
	logFile *logFile // once it is open
	// inputEnded says that the input ends after what is there.
	inputEnded atomic.Bool

	mu     sync.Mutex
	grace  *time.Timer
	closed bool
}

// output carries one output stream from the guest to the client.
type output struct {
	kind   guestio.Kind
	name   string // as the client named it
	logged bool   // goes to the log instead
	sink   sink
	reader *guestio.Reader
	offset uint64        // what was recorded of another daemon's
	done   chan struct{} // closed when the pump has ended; nil before it runs
}

// position is how much of the stream needs not come again.
func (o *output) position() uint64 {
	if o.sink == nil {
		return o.offset
	}
	return o.sink.position()
}

type input struct {
	name   string
	source source
	box    *inbox
	writer *guestio.Writer
	done   chan struct{}
}

// newStdio checks a client's names. It opens nothing.
func (s *Set) newStdio(client IO, id, execID string, log *slog.Logger) (*stdio, error) {
	t := &stdio{
		client: client, id: id, execID: execID, token: newToken(id, execID), log: log,
		streams: &s.streams, shelf: s.shelf,
	}
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

// keepLog has the output go to a log, unless the client has named places for it.
func (t *stdio) keepLog(to *LogFile) {
	if to == nil || len(t.outputs) > 0 {
		return
	}
	t.logTo = to
	for _, kind := range []guestio.Kind{guestio.Stdout, guestio.Stderr} {
		if kind == guestio.Stdout || !t.client.Terminal {
			t.outputs = append(t.outputs, &output{kind: kind, logged: true})
		}
	}
}

// logLeft tells whether an earlier daemon had not finished the log.
func (t *stdio) logLeft() bool {
	return t.logFile != nil || t.shelf.niche(t.token, guestio.Stdout).holds("log")
}

// openLog opens the log, or goes on with what an earlier daemon has left of it.
func (t *stdio) openLog() (*logFile, error) {
	if t.logFile != nil {
		return t.logFile, nil
	}
	for _, left := range t.shelf.siblings(t.id, t.execID, t.token, guestio.Stdout) {
		left.clear()
	}
	var offsets [2]uint64
	for _, o := range t.outputs {
		offsets[logIndex(o.kind)] = o.offset
	}
	l, err := openLogFile(*t.logTo, t.shelf.niche(t.token, guestio.Stdout), offsets, len(t.outputs), t.log)
	t.logFile = l
	return l, err
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
		if err := t.openOutput(o); err != nil {
			return err
		}
	}
	if t.input != nil {
		return t.openInput(holdInput)
	}
	return nil
}

func (t *stdio) openOutput(o *output) error {
	if o.logged {
		l, err := t.openLog()
		if err != nil {
			return fmt.Errorf("cannot open the log: %w", err)
		}
		o.sink = logSink{file: l, index: logIndex(o.kind)}
		return nil
	}
	path, id, err := parseStream(o.name)
	if err != nil {
		return fmt.Errorf("%v: %w", o.kind, err)
	}
	if id != "" {
		o.sink, err = t.streams.claimOutput(id, o.offset)
	} else {
		for _, left := range t.shelf.siblings(t.id, t.execID, t.token, o.kind) {
			left.clear()
		}
		o.sink, err = openFIFOSink(path, t.shelf.niche(t.token, o.kind), o.offset, t.log)
	}
	if err != nil {
		return fmt.Errorf("cannot open %v: %w", o.kind, err)
	}
	return nil
}

func (t *stdio) openInput(hold bool) error {
	in := t.input
	path, id, err := parseStream(in.name)
	if err != nil {
		return fmt.Errorf("stdin: %w", err)
	}
	n := t.shelf.niche(t.token, guestio.Stdin)
	if id != "" {
		in.source, err = t.streams.claimInput(id, t.log)
	} else {
		in.source, err = openFIFOSource(path, n, t.shelf.siblings(t.id, t.execID, t.token, guestio.Stdin), hold, t.log)
	}
	if err == nil {
		in.box, err = openInbox(n)
	}
	if err != nil {
		return fmt.Errorf("cannot open stdin: %w", err)
	}
	if t.inputEnded.Load() {
		in.source.end()
	}
	return nil
}

// connect opens the streams in the guest, all at once because each costs a round trip.
func (t *stdio) connect(ctx context.Context, dial guestio.Dialer) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, o := range t.outputs {
		g.Go(func() error { return t.connectOutput(ctx, dial, o) })
	}
	if t.input != nil {
		g.Go(func() error { return t.connectInput(ctx, dial) })
	}
	return g.Wait()
}

func (t *stdio) connectOutput(ctx context.Context, dial guestio.Dialer, o *output) (err error) {
	o.reader, err = guestio.OpenOutput(ctx, dial, t.tokenOf(o.kind), o.kind, o.sink.position())
	if err == nil {
		o.sink.resume(o.reader.Offset())
	}
	return err
}

func (t *stdio) connectInput(ctx context.Context, dial guestio.Dialer) error {
	writer, err := guestio.OpenInput(ctx, dial, t.tokenOf(guestio.Stdin))
	if err != nil {
		return err
	}
	lost, err := t.input.box.resume(writer.Offset())
	if err != nil {
		writer.Close()
		return err
	}
	if lost > 0 {
		t.log.Warn("input is lost: the guest has not got what an earlier daemon thought it had", "bytes", lost)
	}
	writer.Notify(t.input.box.consumed)
	t.input.writer = writer
	return nil
}

// pumpOutput starts to carry output. misbehaved is told when the guest breaks the protocol.
func (t *stdio) pumpOutput(misbehaved func(error)) {
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
}

// pumpInput starts to carry input. Before the process is recorded it must not run: what it takes
// from the client is the process's, which only the record ties together.
func (t *stdio) pumpInput(misbehaved func(error), journal func()) {
	in := t.input
	if in == nil || in.writer == nil {
		return
	}
	in.done = make(chan struct{})
	go func() {
		defer close(in.done)
		err := t.carryInput(journal)
		switch {
		case err == nil, errors.Is(err, guestio.ErrRefused), errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrClosed):
		case errors.Is(err, guestio.ErrProtocol):
			misbehaved(err)
		default:
			t.log.Warn("input is lost", "error", err)
		}
		// A process that does not read shows its client a closed pipe, as it would on a host.
		in.source.finish()
		in.box.close()
	}()
}

func (t *stdio) carryInput(journal func()) error {
	in := t.input
	for {
		if err := in.send(); err != nil {
			return err
		}
		err := in.source.fill(in.box)
		if err == nil {
			continue
		}
		if err != io.EOF {
			return err
		}
		break
	}
	// A FIFO would show its end again; a connection is not there any more.
	if _, id, _ := parseStream(in.name); id != "" && !t.inputEnded.Swap(true) {
		journal()
	}
	in.source.ended()
	in.writer.CloseWrite()
	// Until the guest has consumed the end, another daemon may have to tell it.
	<-in.writer.Done()
	return nil
}

// send sends what has arrived.
func (in *input) send() error {
	for {
		chunk := chunks.Get().(*[]byte)
		n, err := in.box.next(*chunk)
		if n > 0 {
			_, err = in.writer.Write((*chunk)[:n])
		}
		chunks.Put(chunk)
		if n == 0 || err != nil {
			return err
		}
	}
}

// closeStdin ends the input after what the client has written. It tells whether that is news.
func (t *stdio) closeStdin() bool {
	if t.input == nil || t.input.source == nil || t.inputEnded.Swap(true) {
		return false
	}
	t.input.source.end()
	return true
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

// drain waits for the guest's end of all outputs, for at most limit, and then for the client to take
// what has arrived, for as long as that takes. It returns false if another daemon is to do that.
func (t *stdio) drain(limit time.Duration) bool {
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
	for _, o := range t.outputs {
		if o.sink != nil && o.sink.flush(context.Background()) != nil {
			return false
		}
	}
	return true
}

// cut ends all streams. Output that has arrived may still be written for at most grace.
func (t *stdio) cut(grace time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	for _, o := range t.outputs {
		if o.reader != nil {
			o.reader.Close()
		}
	}
	for _, o := range t.outputs {
		if o.done != nil {
			select {
			case <-o.done:
			default:
				select {
				case <-o.done:
				case <-ctx.Done():
					o.sink.abandon()
					<-o.done
				}
			}
		}
		if o.sink != nil && o.sink.flush(ctx) != nil {
			o.sink.abandon()
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

// awaitTaken waits, after cut, for clients that may drop what is on its way to them when they learn of the
// exit.
func (t *stdio) awaitTaken(ctx context.Context) {
	for _, o := range t.outputs {
		if k, ok := o.sink.(streamSink); ok {
			k.awaitTaken(ctx)
		}
	}
}

func (t *stdio) cutInput() {
	in := t.input
	if in == nil {
		return
	}
	if in.source != nil {
		in.source.finish()
	}
	if in.writer != nil {
		in.writer.Close()
	}
	if in.done != nil {
		<-in.done
	}
	if in.box != nil {
		in.box.close()
	}
}

// detach stops the pumps and leaves the client to another daemon, without telling the guest
// anything. The shelf must have been left before.
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
	}
	for _, o := range t.outputs {
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

func isProtocolViolation(err error) bool { return errors.Is(err, guestio.ErrProtocol) }
