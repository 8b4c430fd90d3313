package task

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	streaming "github.com/containerd/containerd/api/services/streaming/v1"
	"github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"kuasar.io/kuasar/sandboxer/container"
)

const (
	// streamPiece is the most that one message of output carries, in bytes.
	streamPiece = 32 << 10
	// inputWindow is how much input a client may send ahead.
	inputWindow = 64 << 10
	// maxAhead is how much more it may send before it is cut off.
	maxAhead = 3 * inputWindow
	// maxWindow bounds the credit that a client can pile up.
	maxWindow = 64 << 20
)

// stream is one call of containerd.services.streaming.v1.Streaming/Stream: the client names an id,
// and its connection then carries the standard stream with that id, in one direction, which shows
// with the first use. Except where said, its fields are guarded by connection.mu.
type stream struct {
	conn   *connection
	id     uint32 // the protocol's number, not changed
	ctx    context.Context
	cancel context.CancelCauseFunc
	stop   context.CancelFunc

	requestSlot, initSlot int // their pins

	name     string        // what the client called it; "" until its first message
	begun    bool          // serveStream runs
	accepted chan struct{} // closed by Accept
	served   chan struct{} // closed with over
	over     bool          // serveStream has ended

	output bool  // the client has granted a window
	err    error // why nothing more is received; io.EOF is the client's end
	broken error // the answer to a client that broke the protocol

	received uint64  // input: offset behind what arrived
	pieces   []piece // input: what Receive has not returned
	kept     []piece // input: what was not consumed, without its bytes
}

// piece is one message of input.
type piece struct {
	at     int64  // its frame in the inbox
	offset uint64 // of its first byte in the stream
	length int
	last   bool // the client's end, which stays until the stream is over
	data   []byte
}

// newStream makes a stream of a request. c.mu is held, or nobody else knows c.
func newStream(c *connection, id uint32, slot int, request *ttrpc.Request) *stream {
	st := &stream{
		conn: c, id: id, requestSlot: slot, initSlot: -1,
		accepted: make(chan struct{}), served: make(chan struct{}),
	}
	if c.outbox.Base() > 0 {
		st.received = c.inbox.Mark().Count // without a base nobody has begun, and the count means nothing
	}
	st.ctx, st.stop = callContext(c.life, request)
	st.ctx, st.cancel = context.WithCancelCause(st.ctx)
	return st
}

// begin reads the first message.
func (st *stream) begin(f frame) error {
	message := &anypb.Any{}
	if err := proto.Unmarshal(f.payload, message); err != nil {
		return fmt.Errorf("cannot decode the first message of a stream: %s: %w", err, errdefs.ErrInvalidArgument)
	}
	init := &streaming.StreamInit{}
	if err := unpack(message, init); err != nil {
		return err
	}
	if n := len(init.GetID()); n == 0 || n > 512 {
		return fmt.Errorf("id: a stream's id has %d bytes, allowed are 1 to 512: %w", n, errdefs.ErrInvalidArgument)
	}
	st.name = init.GetID()
	st.begun = true
	return nil
}

// takeData handles a stream's frame; what it returns is to be run when the mark has passed it. c.mu
// is held.
func (c *connection) takeData(f frame) (run func()) {
	st := c.stream
	if st == nil || st.id != f.stream || st.over {
		// A client that tops up its window while its stream ends is not told off for it.
		if f.stream > c.last {
			c.refuse(f.stream, codes.InvalidArgument, "stream %d is not open", f.stream)
		}
		return nil
	}
	closing := f.flags&flagClosed != 0
	if f.flags&flagEmpty == 0 {
		switch {
		case st.isInit(f):
			return nil // another daemon died before the mark passed it
		case !st.begun:
			run = st.open(f)
		default:
			st.take(f)
		}
	}
	switch {
	case !closing || st.over:
	case !st.begun:
		c.endStream(st, fmt.Errorf("a stream was closed before its first message: %w", errdefs.ErrInvalidArgument))
	case st.err == nil:
		st.err = io.EOF
		st.kept = append(st.kept, piece{at: f.at, offset: st.received, last: true})
	}
	return run
}

// isInit tells whether a frame is the first message, which is pinned.
func (st *stream) isInit(f frame) bool {
	if f.at >= st.conn.seen {
		return false
	}
	for _, pin := range st.conn.inbox.Pinned() {
		if pin.Slot == st.initSlot {
			return pin.Off == f.at
		}
	}
	return false
}

// open handles the first message.
func (st *stream) open(f frame) (run func()) {
	c := st.conn
	if err := st.begin(f); err != nil {
		c.endStream(st, err)
		return nil
	}
	slot, err := c.inbox.Pin(f.at, f.size())
	if err != nil {
		c.endStream(st, fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted))
		return nil
	}
	st.initSlot = slot
	return func() { c.serveStream(st) }
}

// take handles a message after the first.
func (st *stream) take(f frame) {
	c := st.conn
	message := &anypb.Any{}
	err := proto.Unmarshal(f.payload, message)
	update, data := &transfer.WindowUpdate{}, &transfer.Data{}
	switch {
	case st.err != nil:
		return // it was closed, or is broken
	case err != nil:
		err = fmt.Errorf("cannot decode a message of a stream: %s: %w", err, errdefs.ErrInvalidArgument)
	case st.received > 0 || len(st.kept) > 0 || !st.output && named(message, data):
		if err = unpack(message, data); err == nil {
			err = st.takeInput(f, data.GetData())
		}
	default:
		if err = unpack(message, update); err == nil {
			err = st.takeUpdate(int64(update.GetUpdate()))
		}
	}
	if err != nil {
		st.err, st.broken = err, err
		st.cancel(err)
	}
	c.notify()
}

func (st *stream) takeUpdate(n int64) error {
	if n < 0 {
		return fmt.Errorf("update: a window cannot shrink by %d: %w", -n, errdefs.ErrInvalidArgument)
	}
	st.output = true
	st.conn.credit += uint32(min(n, maxWindow-st.window()))
	return nil
}

func (st *stream) takeInput(f frame, data []byte) error {
	out := st.conn.outbox
	begin, granted := out.Base(), out.Count()
	ahead := int64(st.received) + int64(len(data))
	if begin > 0 {
		ahead -= int64(begin-1) + int64(granted-1)
	}
	if ahead > maxAhead {
		return fmt.Errorf("data: %d bytes are ahead of the window: %w", ahead, errdefs.ErrResourceExhausted)
	}
	if len(data) == 0 {
		return nil
	}
	p := piece{at: f.at, offset: st.received, length: len(data)}
	st.kept = append(st.kept, p)
	p.data = data
	st.pieces = append(st.pieces, p)
	st.received += uint64(len(data))
	return nil
}

// serveStream lends the stream to its process until it is over.
func (c *connection) serveStream(st *stream) {
	err := c.server.backend.ServeStream(st.ctx, st.name, st)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.endStream(st, err)
	c.flush()
	c.settle()
}

// endStream tells the client the end, which is an error or the end of the stream. c.mu is held.
func (c *connection) endStream(st *stream, err error) {
	st.over = true
	close(st.served)
	st.cancel(err)
	st.stop()
	defer c.notify()
	if c.frozen {
		return // the next daemon goes on
	}
	if st.broken != nil {
		err = st.broken
	}
	if err != nil {
		if !c.respond(st.id, &ttrpc.Response{Status: statusOf(err).Proto()}) {
			return
		}
	} else if !c.send(frame{stream: st.id, kind: kindData, flags: flagClosed | flagEmpty}, c.outbox.Count()) {
		return
	}
	// A request without its first message harms nobody; a message without its request is ignored.
	c.unpin(st.requestSlot)
	if st.initSlot >= 0 {
		c.unpin(st.initSlot)
	}
	if !c.lost {
		c.advance()
	}
}

// lose says that nothing more will be received. c.mu is held.
func (st *stream) lose(err error) {
	if st.err == nil {
		st.err = err
	}
}

// Accept implements container.ClientStream.
func (st *stream) Accept() error {
	c := st.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-st.accepted:
		return nil
	default:
	}
	defer close(st.accepted)
	switch {
	case c.frozen:
		return errHandedOver
	case c.deaf:
		return errGone
	case c.outbox.Count() > 0:
		return nil // another daemon has told the client
	}
	if err := st.send(&emptypb.Empty{}, 1); err != nil {
		return err
	}
	c.flush()
	return nil
}

// waitAccepted does not look at the connection's life: input may have arrived before its end, and
// Accept fails by itself then.
func (st *stream) waitAccepted(ctx context.Context) error {
	select {
	case <-st.accepted:
		return nil // whether or not ctx has ended: what was received is still there
	default:
	}
	select {
	case <-st.accepted:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// send sends a message and remembers the count with it. c.mu is held.
func (st *stream) send(m proto.Message, count uint64) error {
	a, err := pack(m)
	if err != nil {
		return err
	}
	payload, err := proto.Marshal(a)
	if err != nil {
		return err
	}
	if !st.conn.send(frame{stream: st.id, kind: kindData, payload: payload}, count) {
		return errGone
	}
	return nil
}

// delivered is the offset of output up to which the client has, or will get, everything; 0 on a
// connection that none was sent on. c.mu is held.
func (st *stream) delivered() uint64 {
	out := st.conn.outbox
	return max(out.Base(), out.Count(), 1) - 1
}

// window is how much output the client has room for. c.mu is held.
func (st *stream) window() int64 {
	sent := uint64(0)
	if base := st.conn.outbox.Base(); base > 0 {
		sent = st.delivered() - (base - 1)
	}
	return int64(int32(st.conn.credit - uint32(sent)))
}

// Delivered implements container.ClientStream.
func (st *stream) Delivered() (offset uint64, ok bool) {
	c := st.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.frozen || c.outbox.Base() == 0 {
		return 0, false
	}
	return st.delivered(), true
}

// Send implements container.ClientStream.
func (st *stream) Send(ctx context.Context, p []byte, offset uint64) (int, error) {
	if err := st.waitAccepted(ctx); err != nil {
		return 0, err
	}
	c := st.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	sent := 0
	for sent < len(p) {
		switch {
		case c.frozen:
			return sent, errHandedOver
		case st.over, c.deaf:
			return sent, errGone
		case st.err != nil && !errors.Is(st.err, io.EOF):
			return sent, st.err // a client that has nothing more to say may still listen
		case len(st.kept) > 0 && !st.kept[0].last:
			return sent, fmt.Errorf("stream %s: the client sends input where output belongs: %w", st.name, errdefs.ErrInvalidArgument)
		}
		if err := st.place(offset + uint64(sent)); err != nil {
			return sent, err
		}
		n := int(min(int64(len(p)-sent), st.window(), streamPiece))
		if n > 0 && c.outbox.Pending() < maxPending {
			if err := st.send(&transfer.Data{Data: p[sent : sent+n]}, 1+offset+uint64(sent+n)); err != nil {
				return sent, err
			}
			sent += n
			c.flush()
			continue
		}
		changed := c.changed
		c.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
		}
		c.mu.Lock()
		if ctx.Err() != nil {
			return sent, context.Cause(ctx)
		}
	}
	return sent, nil
}

// place remembers where the output on this connection begins; from there on it has no gaps. c.mu is
// held.
func (st *stream) place(offset uint64) error {
	out := st.conn.outbox
	if out.Base() > 0 {
		if delivered := st.delivered(); offset != delivered {
			return fmt.Errorf("stream %s: output at %d does not follow what was delivered, up to %d: %w", st.name, offset, delivered, errdefs.ErrInternal)
		}
		return nil
	}
	if err := out.SetBase(1 + offset); err != nil {
		st.conn.fail(err)
		return err
	}
	return nil
}

// Gone implements container.ClientStream.
func (st *stream) Gone() <-chan struct{} { return st.conn.life.Done() }

// Begin implements container.ClientStream.
func (st *stream) Begin(offset uint64) uint64 {
	c := st.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.frozen {
		return offset
	}
	if c.outbox.Base() > 0 {
		if len(st.kept) > 0 {
			return st.kept[0].offset
		}
		return st.received
	}
	st.beginInput(offset)
	return offset
}

// beginInput is Begin on a new connection. c.mu is held.
func (st *stream) beginInput(offset uint64) {
	c := st.conn
	// What a client sent before it was asked to begins there, too.
	st.received += offset
	for i := range st.kept {
		st.kept[i].offset += offset
	}
	for i := range st.pieces {
		st.pieces[i].offset += offset
	}
	c.advance()
	if err := c.outbox.SetBase(1 + offset); err != nil {
		c.fail(err)
	}
}

// Receive implements container.ClientStream.
func (st *stream) Receive(ctx context.Context) ([]byte, error) {
	if err := st.waitAccepted(ctx); err != nil {
		return nil, err
	}
	c := st.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case len(st.pieces) > 0:
			p := st.pieces[0].data
			st.pieces = st.pieces[1:]
			return p, nil
		case st.err != nil:
			return nil, st.err
		case c.frozen:
			return nil, errHandedOver
		case st.over:
			return nil, errGone
		case st.output:
			return nil, fmt.Errorf("stream %s: the client expects output where input belongs: %w", st.name, errdefs.ErrInvalidArgument)
		}
		if err := st.grant(); err != nil {
			return nil, err
		}
		changed := c.changed
		c.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
		}
		c.mu.Lock()
		if ctx.Err() != nil && len(st.pieces) == 0 && st.err == nil {
			return nil, context.Cause(ctx)
		}
	}
}

// grant lets the client send more when everything before was taken. c.mu is held.
func (st *stream) grant() error {
	c := st.conn
	out := c.outbox
	if out.Base() == 0 {
		st.beginInput(0) // nobody said otherwise
	}
	if c.deaf || c.parsed-c.inbox.Mark().At > maxKept/2 {
		return nil
	}
	granted := out.Count() - 1
	owed := inputWindow - (int64(granted) - int64(st.received-(out.Base()-1)))
	if owed <= 0 {
		return nil
	}
	if err := st.send(&transfer.WindowUpdate{Update: int32(owed)}, 1+granted+uint64(owed)); err != nil {
		return err
	}
	c.flush()
	return nil
}

// Consumed implements container.ClientStream.
func (st *stream) Consumed(offset uint64) {
	c := st.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.frozen || st.over {
		return
	}
	n := 0
	for n < len(st.kept) && !st.kept[n].last && st.kept[n].offset+uint64(st.kept[n].length) <= offset {
		n++
	}
	if n == 0 {
		return
	}
	st.kept = st.kept[n:]
	c.advance()
	c.parse() // which may have waited for this
	c.notify()
}

var _ container.ClientStream = (*stream)(nil)

// unpack decodes an Any that must hold a message of m's type.
func unpack(a *anypb.Any, m proto.Message) error {
	if !named(a, m) {
		return fmt.Errorf("a message of type %q came where %s belongs: %w", bounded(a.GetTypeUrl()), m.ProtoReflect().Descriptor().FullName(), errdefs.ErrInvalidArgument)
	}
	if err := proto.Unmarshal(a.GetValue(), m); err != nil {
		return fmt.Errorf("cannot decode %s: %s: %w", m.ProtoReflect().Descriptor().FullName(), err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// named tells whether an Any says that it holds a message of m's type.
func named(a *anypb.Any, m proto.Message) bool {
	name := a.GetTypeUrl()
	return name[strings.LastIndexByte(name, '/')+1:] == string(m.ProtoReflect().Descriptor().FullName())
}
