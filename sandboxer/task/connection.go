package task

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"kuasar.io/kuasar/sandboxer/handover"
)

const (
	// maxPending is how many bytes may wait for a client to read them before nothing more of it is
	// handled, and no more output is taken.
	maxPending = 256 << 10
	// maxKept is how many bytes of input, frames and all, are kept until they are consumed.
	maxKept = 8 << 20
)

// streamingService and streamMethod name the one call that is no unary one.
const (
	streamingService = "containerd.services.streaming.v1.Streaming"
	streamMethod     = "Stream"
)

var (
	errNotKept = errors.New("it was not kept")
	errGone    = fmt.Errorf("the client has closed its connection: %w", context.Canceled)
	errLast    = fmt.Errorf("the client has made its last call: %w", context.Canceled)
	errBroken  = fmt.Errorf("the client broke the protocol: %w", context.Canceled)
)

// inbox and outbox are *handover.Inbox and *handover.Outbox.
type inbox interface {
	io.ReaderAt
	FillFrom(fd int, fifo bool) (int, error)
	End() int64
	Mark() handover.Mark
	SetMark(handover.Mark) error
	Pin(off int64, length int) (int, error)
	Unpin(slot int) error
	Pinned() []handover.Pin
	Files() map[string]*os.File
	Close() error
}

type outbox interface {
	Append(p []byte, count uint64) error
	Count() uint64
	SetBase(uint64) error
	Base() uint64
	Pending() int64
	FlushTo(fd int, fifo bool) (int, error)
	Discard() error
	Files() map[string]*os.File
	Close() error
}

// socket is the client's connection.
type socket interface {
	net.Conn
	syscall.Conn
	File() (*os.File, error)
}

// connection is one client. One goroutine reads, as long as it lasts; another one writes, while the
// client does not take everything at once; and one more is there for every call.
type connection struct {
	server *Server
	number uint64
	log    *slog.Logger
	conn   socket
	raw    syscall.RawConn
	life   context.Context // ends when the client is gone
	end    context.CancelCauseFunc

	mu      sync.Mutex
	changed chan struct{} // closed and replaced when something may have ended that somebody waits for
	inbox   inbox
	outbox  outbox
	seen    int64       // what another daemon may have handled ends here
	parsed  int64       // what was handled ends here
	last    uint32      // highest stream id
	credit  uint32      // what the client has granted for output, modulo 2^32
	waiting []*call     // calls that another daemon has left, until resume
	running int         // calls without an answer
	brief   int         // those of them that do not wait for a process
	stream  *stream     // the only one that a connection carries, from its request on
	leaving *time.Timer // ends the connection; nil while more calls may come

	flushing bool // a goroutine waits for the client to take more
	stopped  bool // nothing more is read
	broken   bool // what the client sent makes no sense: its last answer, then the end
	eof      bool // the client has closed: what has arrived is still handled
	deaf     bool // the client takes no more: answers are dropped
	lost     bool // everything that arrived was handled
	frozen   bool // the files are not touched any more
}

// call is one unary call.
type call struct {
	stream  uint32
	slot    int
	request *ttrpc.Request
	replay  bool
}

// brief tells calls that end by themselves from those that last as long as a process.
func (k *call) brief() bool { return k.request.GetMethod() != "Wait" }

func newConnection(s *Server, number uint64, conn socket, in inbox, out outbox) (*connection, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	if s.wrap != nil {
		in, out = s.wrap(in, out)
	}
	mark := in.Mark()
	c := &connection{
		server: s, number: number, log: s.log.With("connection", number), conn: conn, raw: raw,
		changed: make(chan struct{}), inbox: in, outbox: out,
		seen: in.End(), parsed: mark.At, last: uint32(mark.Credit >> 32), credit: uint32(mark.Credit),
	}
	c.life, c.end = context.WithCancelCause(context.Background())
	return c, nil
}

// open makes a connection of one that was accepted. If it fails, conn is closed.
func open(s *Server, number uint64, conn socket) (*connection, error) {
	// At once: until it is kept, a daemon that dies takes it along.
	err := keep(s, number, conn)
	c, openErr := openKept(s, number, conn, err == nil)
	if err != nil {
		s.log.Warn("a client's connection will not survive the daemon", "connection", number, "error", err)
	}
	return c, openErr
}

func keep(s *Server, number uint64, conn socket) error {
	if !s.store.Lasting() {
		return nil
	}
	f, err := conn.File()
	if err != nil {
		return err
	}
	defer f.Close()
	return s.store.Put(s.name(number, "conn"), f)
}

// openKept goes on with a connection of which nothing was read yet, and keeps the files that it
// needs before anything is. If it fails, conn is closed and nothing is kept.
func openKept(s *Server, number uint64, conn socket, kept bool) (_ *connection, err error) {
	var in *handover.Inbox
	var out *handover.Outbox
	defer func() {
		if err == nil {
			return
		}
		unkeep(s, number)
		conn.Close()
		if in != nil {
			in.Close()
		}
		if out != nil {
			out.Close()
		}
	}()
	if in, err = handover.NewInbox(); err != nil {
		return nil, err
	}
	if out, err = handover.NewOutbox(); err != nil {
		return nil, err
	}
	if kept {
		prefix := s.name(number, "")
		err := s.store.PutAll(prefix, in.Files())
		if err == nil {
			err = s.store.PutAll(prefix, out.Files())
		}
		if err != nil {
			unkeep(s, number)
			s.log.Warn("a client's connection will not survive the daemon", "connection", number, "error", err)
		}
	}
	return newConnection(s, number, conn, in, out)
}

// untouched tells whether nothing was read of a connection: its first request is still to be read.
func untouched(conn socket) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	var header [headerSize]byte
	n := 0
	if err := raw.Control(func(fd uintptr) { n, _, err = unix.Recvfrom(int(fd), header[:], unix.MSG_PEEK|unix.MSG_DONTWAIT) }); err != nil {
		return false
	}
	return err == nil && n == headerSize && header[8] == kindRequest && binary.BigEndian.Uint32(header[4:]) == 1
}

// unkeep makes the store forget a connection: itself first, because where it is alone, nothing was read
// of it.
func unkeep(s *Server, number uint64) {
	s.store.Remove(s.name(number, "conn"))
	s.store.RemoveAll(s.name(number, ""))
}

// adopt makes a connection of what another daemon has left. files are closed, or belong to it.
func adopt(s *Server, number uint64, files map[string]*os.File) (_ *connection, err error) {
	var in *handover.Inbox
	var out *handover.Outbox
	var conn net.Conn
	defer func() {
		for _, f := range files {
			f.Close()
		}
		if err == nil {
			return
		}
		if in != nil {
			in.Close()
		}
		if out != nil {
			out.Close()
		}
		if conn != nil {
			conn.Close()
		}
	}()
	take := func(suffix string) *os.File {
		f := files[suffix]
		delete(files, suffix)
		return f
	}
	if files["conn"] == nil {
		return nil, errNotKept
	}
	if conn, err = net.FileConn(files["conn"]); err != nil {
		return nil, fmt.Errorf("what was kept of it is no connection: %w", err)
	}
	sock, ok := conn.(socket)
	if !ok {
		return nil, fmt.Errorf("what was kept of it is a %T", conn)
	}
	if files["in"] == nil || files["pipe"] == nil || files["out"] == nil {
		// Nothing is read before all are kept. But a store that is full keeps less than it should.
		if !untouched(sock) {
			return nil, errors.New("the files that belong to it were not kept")
		}
		s.store.Remove(s.name(number, "in"), s.name(number, "pipe"), s.name(number, "out"))
		return openKept(s, number, sock, true)
	}
	if in, err = handover.OpenInbox(take("in"), take("pipe")); err != nil {
		return nil, err
	}
	if out, err = handover.OpenOutbox(take("out")); err != nil {
		return nil, err
	}
	c, err := newConnection(s, number, sock, in, out)
	if err != nil {
		return nil, err
	}
	return c, c.recall()
}

// recall finds the calls that another daemon has left.
func (c *connection) recall() error {
	for _, pin := range c.inbox.Pinned() {
		f, ok, err := readFrame(c.inbox, pin.Off, pin.Off+int64(pin.Len))
		if err == nil && !ok {
			err = fmt.Errorf("what is kept at %d is no frame", pin.Off)
		}
		if err != nil {
			return fmt.Errorf("cannot read an outstanding call: %w", err)
		}
		switch {
		case f.kind == kindRequest:
			request := &ttrpc.Request{}
			if err := proto.Unmarshal(f.payload, request); err != nil {
				return fmt.Errorf("cannot decode an outstanding call: %w", err)
			}
			c.last = max(c.last, f.stream)
			if request.GetService() == streamingService {
				c.stream = newStream(c, f.stream, pin.Slot, request)
			} else {
				c.waiting = append(c.waiting, &call{stream: f.stream, slot: pin.Slot, request: request, replay: true})
			}
		case c.stream != nil && c.stream.id == f.stream:
			if err := c.stream.begin(f); err != nil {
				return fmt.Errorf("cannot decode an outstanding stream: %w", err)
			}
			c.stream.initSlot = pin.Slot
		default:
			// The request of a stream loses its pin before the message does.
			if err := c.inbox.Unpin(pin.Slot); err != nil {
				return err
			}
		}
	}
	return nil
}

// park lends an adopted connection's stream to its process, and returns when it has its place.
func (c *connection) park(ctx context.Context) {
	st := c.stream
	if st == nil || st.name == "" {
		return
	}
	go c.serveStream(st)
	select {
	case <-st.accepted:
	case <-st.served:
	case <-ctx.Done():
	}
}

// resume begins to read, after the calls that another daemon has left were begun again.
func (c *connection) resume() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped || c.frozen {
		return
	}
	for _, k := range c.waiting {
		c.begin(k)
		go c.run(k)
	}
	c.waiting = nil
	c.parse()
	c.flush()
	go c.read()
}

// notify wakes who waits for a change. c.mu is held.
func (c *connection) notify() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// await returns when done holds, or timeout is over; it is over at once for the next one then.
func (c *connection) await(timeout <-chan time.Time, done func(*connection) bool) <-chan time.Time {
	for {
		c.mu.Lock()
		ok, changed := c.frozen || done(c), c.changed
		c.mu.Unlock()
		if ok {
			return timeout
		}
		select {
		case <-changed:
		case <-timeout:
			over := make(chan time.Time)
			close(over)
			return over
		}
	}
}

// quiet tells that the client waits for nothing.
func (c *connection) quiet() bool {
	return c.running == 0 && (c.stream == nil || c.stream.over) && c.outbox.Pending() == 0
}

// read moves what arrives into the inbox until the client closes.
func (c *connection) read() {
	for c.awaitRoom() {
		err := c.fill()
		if err == nil {
			continue
		}
		c.mu.Lock()
		if !c.frozen && !c.stopped && !c.lost {
			if err != io.EOF && !errors.Is(err, unix.ECONNRESET) {
				c.log.Error("a client's connection is lost", "error", err)
			}
			c.eof = true
			c.giveUp()
			c.parse()
		}
		c.mu.Unlock()
		return
	}
}

// awaitRoom waits until more may be read; false is the end of reading.
func (c *connection) awaitRoom() bool {
	for {
		c.mu.Lock()
		ended := c.frozen || c.stopped || c.broken || c.lost
		room := !ended && c.inbox.End()-c.parsed < headerSize+maxPayload
		changed := c.changed
		c.mu.Unlock()
		if ended || room {
			return room
		}
		<-changed
	}
}

// fill waits for something to arrive, and handles it.
func (c *connection) fill() error {
	var result error
	err := c.raw.Read(func(fd uintptr) bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.frozen || c.stopped || c.lost {
			result = net.ErrClosed
			return true
		}
		_, err := c.inbox.FillFrom(int(fd), false)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return false
		case err != nil:
			result = err
		default:
			c.parse()
		}
		return true
	})
	if err != nil {
		return err
	}
	return result
}

// parse handles the frames that have arrived, as far as there is room for what follows from them.
// c.mu is held.
func (c *connection) parse() {
	if c.frozen || c.stopped || c.broken || c.lost {
		c.conclude()
		return
	}
	whole, full := true, true
	for whole && full && !c.broken && !c.lost {
		whole, full = c.parseSome()
		c.flush()
		full = full && c.outbox.Pending() < maxPending // it was, and the client took it
	}
	if c.eof && !whole {
		c.lose(errGone)
	}
	c.conclude()
	c.notify()
}

// parseSome handles frames until none is there as a whole, or full says that the client must read
// its answers first. c.mu is held.
func (c *connection) parseSome() (whole, full bool) {
	var begun []func()
	whole = true
	for !c.broken && !c.lost && c.parsed-c.inbox.Mark().At < maxKept {
		if full = c.outbox.Pending() >= maxPending; full {
			break
		}
		f, ok, err := readFrame(c.inbox, c.parsed, c.inbox.End())
		if oversize := (*oversizeError)(nil); errors.As(err, &oversize) {
			// What follows is not read: this is no client that could go on.
			c.refuse(oversize.stream, codes.ResourceExhausted, "%v", err)
			c.broken = true
			break
		}
		if err != nil {
			c.fail(err)
			break
		}
		if whole = ok; !ok {
			break
		}
		if run := c.take(f); run != nil {
			begun = append(begun, run)
		}
		c.parsed = f.end()
	}
	if !c.lost {
		c.advance()
	}
	// What was begun is pinned. Only now may it run: when its pin ends, the mark must be behind it.
	for _, run := range begun {
		go run()
	}
	return whole, full
}

// conclude ends a broken connection after its last answer. c.mu is held.
func (c *connection) conclude() {
	if c.broken && !c.frozen && c.outbox.Pending() == 0 {
		c.lose(errBroken)
	}
}

// advance moves the mark to what is still needed. c.mu is held.
func (c *connection) advance() {
	mark := handover.Mark{At: c.parsed, Credit: uint64(c.last)<<32 | uint64(c.credit)}
	if st := c.stream; st != nil && !st.over {
		mark.Count = st.received
		if len(st.kept) > 0 {
			mark.At, mark.Count = st.kept[0].at, st.kept[0].offset
		}
	}
	if mark == c.inbox.Mark() {
		return
	}
	if err := c.inbox.SetMark(mark); err != nil {
		c.fail(err)
	}
}

// take handles a frame; what it returns is to be run when the mark has passed it. c.mu is held.
func (c *connection) take(f frame) (run func()) {
	switch {
	case f.stream%2 != 1:
		c.refuse(f.stream, codes.InvalidArgument, "stream %d: a client's streams have odd numbers", f.stream)
	case f.kind == kindRequest:
		return c.takeRequest(f)
	case f.kind == kindData:
		return c.takeData(f)
	}
	return nil // what later versions of the protocol may send
}

func (c *connection) takeRequest(f frame) (run func()) {
	if f.stream <= c.last {
		if f.at >= c.seen {
			c.refuse(f.stream, codes.InvalidArgument, "stream %d: numbers must increase, the last one was %d", f.stream, c.last)
		}
		return nil
	}
	c.last = f.stream
	c.stay()
	request := &ttrpc.Request{}
	if err := proto.Unmarshal(f.payload, request); err != nil {
		c.refuse(f.stream, codes.InvalidArgument, "cannot decode a request: %v", err)
		return nil
	}
	isStream := request.GetService() == streamingService
	switch {
	case !isStream && !slices.Contains(ServiceNames, request.GetService()):
		c.refuse(f.stream, codes.Unimplemented, "service %s", bounded(request.GetService()))
		return nil
	case isStream && request.GetMethod() != streamMethod:
		c.refuse(f.stream, codes.Unimplemented, "method %s", bounded(request.GetMethod()))
		return nil
	case isStream && (c.stream != nil || c.outbox.Count() > 0):
		c.refuse(f.stream, codes.ResourceExhausted, "a connection carries only one stream: open another one")
		return nil
	}
	slot, err := c.inbox.Pin(f.at, f.size())
	switch {
	case errors.Is(err, handover.ErrFull):
		c.refuse(f.stream, codes.ResourceExhausted, "%d calls are outstanding on this connection: wait for them, or open another one", handover.MaxPins)
		return nil
	case err != nil:
		c.fail(err)
		return nil
	}
	if isStream {
		c.stream = newStream(c, f.stream, slot, request)
		return nil
	}
	k := &call{stream: f.stream, slot: slot, request: request}
	c.begin(k)
	return func() { c.run(k) }
}

// begin counts a call that will run. c.mu is held.
func (c *connection) begin(k *call) {
	c.running++
	if k.brief() {
		c.brief++
	}
}

func (c *connection) run(k *call) {
	ctx, cancel := callContext(c.life, k.request)
	defer cancel()
	if k.replay {
		ctx = c.server.replay(ctx)
	}
	payload, err := c.server.backend.Call(ctx, k.request.GetMethod(), k.request.GetPayload())
	c.mu.Lock()
	defer c.mu.Unlock()
	c.running--
	if k.brief() {
		c.brief--
	}
	defer c.notify()
	if c.frozen {
		return // the next daemon answers
	}
	answer := &ttrpc.Response{Payload: payload}
	if err != nil {
		answer = &ttrpc.Response{Status: statusOf(err).Proto()}
	}
	if c.respond(k.stream, answer) {
		c.unpin(k.slot)
	}
	c.flush()
	if err == nil && k.stream == c.last && c.server.last(k.request.GetMethod(), k.request.GetPayload()) {
		c.leave()
	}
	c.settle()
}

// leave ends the connection after a while, unless there is another call. c.mu is held.
func (c *connection) leave() {
	if c.lost || c.frozen {
		return
	}
	c.stay()
	var timer *time.Timer
	timer = time.AfterFunc(c.server.linger, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		switch {
		case c.leaving != timer || c.frozen || c.stopped || c.lost || c.inbox.End() != c.parsed:
		case !c.quiet():
			c.leave() // somebody waits for a process, or reads late
		default:
			c.log.Debug("closing a connection on which the client has made its last call")
			c.lose(errLast)
		}
	})
	c.leaving = timer
}

// stay takes leave back. c.mu is held.
func (c *connection) stay() {
	if c.leaving != nil {
		c.leaving.Stop()
		c.leaving = nil
	}
}

// callContext is what a request says about its context.
func callContext(life context.Context, request *ttrpc.Request) (context.Context, context.CancelFunc) {
	if len(request.GetMetadata()) > 0 {
		metadata := ttrpc.MD{}
		for _, kv := range request.GetMetadata() {
			metadata[kv.GetKey()] = append(metadata[kv.GetKey()], kv.GetValue())
		}
		life = ttrpc.WithMetadata(life, metadata)
	}
	if n := request.GetTimeoutNano(); n != 0 {
		return context.WithTimeout(life, time.Duration(n))
	}
	return context.WithCancel(life)
}

func statusOf(err error) *status.Status {
	st, ok := status.FromError(errgrpc.ToGRPC(err))
	if !ok {
		return status.New(codes.Unknown, err.Error())
	}
	return st
}

// refuse answers a frame with an error. c.mu is held.
func (c *connection) refuse(stream uint32, code codes.Code, format string, args ...any) {
	c.respond(stream, &ttrpc.Response{Status: status.Newf(code, format, args...).Proto()})
}

// respond ends a call. c.mu is held.
func (c *connection) respond(stream uint32, answer *ttrpc.Response) bool {
	payload, err := proto.Marshal(answer)
	if err == nil && len(payload) > maxPayload {
		err = fmt.Errorf("an answer of %d bytes is too large, the most is %d", len(payload), maxPayload)
	}
	if err != nil {
		payload, _ = proto.Marshal(&ttrpc.Response{Status: status.New(codes.ResourceExhausted, err.Error()).Proto()})
	}
	return c.send(frame{stream: stream, kind: kindResponse, payload: payload}, c.outbox.Count())
}

// send puts a frame into the outbox. It may fail only by losing the connection. c.mu is held.
func (c *connection) send(f frame, count uint64) bool {
	if c.deaf {
		return true
	}
	if err := c.outbox.Append(f.encode(), count); err != nil {
		c.fail(err)
		return false
	}
	return true
}

func (c *connection) unpin(slot int) {
	if err := c.inbox.Unpin(slot); err != nil {
		c.fail(err)
	}
}

// flush sends what the client takes, and leaves the rest to a goroutine. c.mu is held.
func (c *connection) flush() {
	if c.flushing || c.deaf || c.frozen || c.outbox.Pending() == 0 {
		return
	}
	done := true
	if err := c.raw.Control(func(fd uintptr) { done = c.flushTo(fd) }); err != nil {
		return // closed meanwhile
	}
	if !done {
		c.flushing = true
		go c.flushRest()
	}
}

// flushTo tells whether nothing is left, which it is, too, when the client has closed: that is no
// reason to stop reading, as what it had sent before may still count. c.mu is held.
func (c *connection) flushTo(fd uintptr) (done bool) {
	_, err := c.outbox.FlushTo(int(fd), false)
	if err != nil && !errors.Is(err, unix.EAGAIN) {
		if !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
			c.log.Error("cannot answer a client", "error", err)
		}
		c.giveUp()
	}
	return c.outbox.Pending() == 0
}

func (c *connection) flushRest() {
	err := c.raw.Write(func(fd uintptr) bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.frozen {
			return true
		}
		done := c.deaf || c.flushTo(fd)
		if done {
			c.flushing = false
		}
		c.parse() // which may have waited for this
		c.notify()
		return done
	})
	if err != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.flushing = false
		c.notify()
	}
}

// giveUp sends nothing more. c.mu is held.
func (c *connection) giveUp() {
	if c.deaf {
		return
	}
	c.deaf = true
	if err := c.outbox.Discard(); err != nil {
		c.log.Error("cannot forget what a client does not take", "error", err)
	}
}

// fail ends a connection that cannot be kept as it must be. c.mu is held.
func (c *connection) fail(err error) {
	if c.lost {
		return
	}
	c.log.Error("a client's connection is dropped", "error", err)
	c.giveUp()
	c.lose(err)
}

// lose ends a connection of which nothing more will come. Its calls learn of it; the connection
// ends with the last of them. c.mu is held.
func (c *connection) lose(err error) {
	if c.lost {
		return
	}
	c.lost = true
	c.stay()
	c.giveUp()
	c.end(err)
	if c.stream != nil {
		c.stream.lose(err)
	}
	c.notify()
	c.settle()
}

// settle ends a lost connection when nothing needs it any more. c.mu is held.
func (c *connection) settle() {
	if !c.lost || c.frozen || c.running > 0 {
		return
	}
	if st := c.stream; st != nil && st.begun && !st.over {
		return
	}
	// Closing waits for who is reading, who may wait for c.mu.
	go c.drop(errGone)
}

// stop ends reading.
func (c *connection) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
	c.notify()
	c.conn.SetReadDeadline(time.Unix(1, 0))
}

// freeze lets go of the connection; what the store has stays as it is from now on.
func (c *connection) freeze(cause error) {
	c.mu.Lock()
	if c.frozen {
		c.mu.Unlock()
		return
	}
	c.flush()
	c.stay()
	c.frozen = true
	c.notify()
	in, out := c.inbox, c.outbox
	c.mu.Unlock()
	c.end(cause)
	c.conn.Close()
	in.Close()
	out.Close()
	c.server.forget(c)
}

// drop ends the connection and makes the store forget it.
func (c *connection) drop(cause error) {
	c.freeze(cause)
	unkeep(c.server, c.number)
}
