package container

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// ClientStream is one connection of a client that carries one standard stream. It is used in one
// direction only, by one goroutine.
type ClientStream interface {
	// Accept tells the client that its connection is taken. It is called once, after the
	// connection has its place, so that of two the one that was accepted later counts. Send and
	// Receive may be called meanwhile and wait for it. On a connection that was taken over from an
	// earlier daemon the client has been told already.
	Accept() error

	// Delivered tells up to which offset of the stream an earlier daemon had delivered output on
	// this connection. ok is false on a new one.
	Delivered() (offset uint64, ok bool)
	// Send delivers output and returns how much of it was; it blocks while the client's window is
	// full. offset is that of p's first byte in the stream. What was accepted is durable: the next
	// daemon's Delivered says so. An error means that the connection is no use any more.
	Send(ctx context.Context, p []byte, offset uint64) (int, error)

	// Gone is closed when the client has closed the connection, or it is lost. Who was told the end of
	// output closes it once all of that is taken.
	Gone() <-chan struct{}

	// Begin says that a new connection's input begins at an offset of the stream, durably, and
	// returns where Receive goes on: there, or on a connection that was taken over, at the offset
	// up to which an earlier daemon's input was Consumed. It is called once, before Receive.
	Begin(offset uint64) uint64
	// Receive returns the next input, valid until the next call. io.EOF is the client's end of
	// the input; any other error means that the connection is no use any more, which is not the
	// end. What arrived before ctx ended or the connection was lost is returned before either
	// error.
	Receive(ctx context.Context) ([]byte, error)
	// Consumed says that the input up to an offset is kept elsewhere: no other daemon needs to
	// receive it again. It only grows and does not block.
	Consumed(offset uint64)
}

// maxParked bounds the connections that wait for a process to name them.
const maxParked = 1024

// endGrace is how long after CloseIO the rest of an input, which comes on another connection, is
// waited for.
const endGrace = time.Second

// streamTable pairs clients' connections with processes, by the id that both name. Connections
// come before their process, and again after the client has restarted.
type streamTable struct {
	shelf *shelf
	// restored is closed when there is no process of an earlier daemon that may still name its ids.
	restored    chan struct{}
	restoreOnce sync.Once

	mu    sync.Mutex
	slots map[string]*slot
}

// slot is one id. Guarded by streamTable.mu.
type slot struct {
	table   *streamTable
	id      string
	claimed bool
	output  bool // if claimed
	conn    ClientStream
	// older are connections of an earlier daemon that were replaced. What came on them was not all
	// taken yet, or they would not be there.
	older   []ClientStream
	changed chan struct{} // closed and replaced when something changes that others wait for
	over    chan struct{} // closed when the process's stream has ended

	// user is the connection that the process sends to or receives from just now, or has not
	// received all of. It is told to stop when another one comes.
	user     ClientStream
	stopUser context.CancelFunc
	awaited  bool // somebody waits for user to become nil

	offset    uint64 // output: behind what was delivered, here or by earlier daemons
	inputOver bool   // input: its end was seen and is remembered
	detached  bool
	life      context.Context
	cancel    context.CancelFunc
	ending    context.Context // ends endGrace after CloseIO
	endNow    context.CancelFunc
}

func (t *streamTable) allRestored() { t.restoreOnce.Do(func() { close(t.restored) }) }

// get returns the slot of an id. t.mu is held.
func (t *streamTable) get(id string) *slot {
	sl := t.slots[id]
	if sl == nil {
		sl = &slot{table: t, id: id, changed: make(chan struct{}), over: make(chan struct{})}
		sl.life, sl.cancel = context.WithCancel(context.Background())
		sl.ending, sl.endNow = context.WithCancel(sl.life)
		if t.slots == nil {
			t.slots = map[string]*slot{}
		}
		t.slots[id] = sl
	}
	return sl
}

// tell wakes who waits for a change. t.mu is held.
func (sl *slot) tell() {
	close(sl.changed)
	sl.changed = make(chan struct{})
}

// set changes the current connection. t.mu is held.
func (sl *slot) set(conn ClientStream) {
	sl.conn = conn
	if sl.user != nil && sl.user != conn && conn != nil {
		sl.stopUser()
	}
	sl.tell()
}

// ServeStream lends a client's connection to the process that names its id, now or later. It
// returns nil when that process's stream has ended, so that the client must be told the end, and
// an error when ctx, which is the connection's life, ends or a newer connection took its place. When
// it returns, nothing that the connection knows is needed any more, by another daemon neither.
//
// Of an earlier daemon's connections the older ones must come first.
func (s *Set) ServeStream(ctx context.Context, id string, conn ClientStream) error {
	t := &s.streams
	t.mu.Lock()
	sl := t.get(id)
	if !sl.claimed {
		waiting := 0
		for _, other := range t.slots {
			if !other.claimed && other.conn != nil {
				waiting++
			}
		}
		if waiting >= maxParked {
			t.mu.Unlock()
			return fmt.Errorf("stream %s: %d streams already wait for their process: %w", id, waiting, errdefs.ErrResourceExhausted)
		}
		if offset, ok := conn.Delivered(); ok {
			sl.offset = max(sl.offset, offset)
		}
	}
	if sl.conn != nil && !sl.claimed && !isDone(t.restored) {
		sl.older = append(sl.older, sl.conn)
	}
	sl.set(conn)
	t.mu.Unlock()
	// A failure means that the connection is lost, which ctx tells as well.
	conn.Accept()
	journal, err := sl.serve(ctx, conn)
	if journal {
		s.journal()
	}
	return err
}

// serve waits until a connection is done with. journal says that what it knew must be recorded.
func (sl *slot) serve(ctx context.Context, conn ClientStream) (journal bool, err error) {
	t := sl.table
	// Once it is lost, there is no use in waiting for that.
	lost, restored := ctx.Done(), t.restored
	for {
		t.mu.Lock()
		mine, used, changed := sl.conn == conn, sl.user == conn, sl.changed
		switch {
		case isDone(sl.over):
			t.mu.Unlock()
			return false, nil
		case sl.detached:
			t.mu.Unlock()
			return false, fmt.Errorf("stream %s: the daemon is stopping: %w", sl.id, errdefs.ErrUnavailable)
		case used:
			// What it is in the middle of comes to its end: it was stopped, or the connection is lost.
			sl.awaited = true
			if lost == nil && mine && sl.output {
				sl.set(nil)
				changed = sl.changed
			}
		case slices.Contains(sl.older, conn) && (restored != nil || sl.claimed && !sl.output && !sl.inputOver):
			// The process takes what it brought before it takes what the next one brings.
			lost = nil
		case !mine && sl.conn != nil:
			t.mu.Unlock()
			return sl.claimed && sl.output, fmt.Errorf("stream %s: a newer connection took over: %w", sl.id, errdefs.ErrAborted)
		case !mine:
			t.mu.Unlock()
			return sl.claimed && sl.output, fmt.Errorf("stream %s: %w", sl.id, io.ErrUnexpectedEOF)
		case lost == nil && sl.claimed && !sl.output && !sl.inputOver:
			// What had arrived may still be read: the process drops the connection itself.
		case lost == nil && (sl.claimed || restored == nil):
			sl.set(nil)
			if !sl.claimed {
				delete(t.slots, sl.id)
				sl.cancel()
			}
			t.mu.Unlock()
			return sl.claimed && sl.output, fmt.Errorf("stream %s: the client's connection is lost: %w", sl.id, errdefs.ErrUnavailable)
		}
		t.mu.Unlock()
		waitRestored := restored
		if lost != nil {
			waitRestored = nil
		}
		select {
		case <-sl.over:
		case <-changed:
		case <-lost:
			lost = nil
		case <-waitRestored:
			restored = nil
		}
	}
}

func isDone(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// claim gives an id to a process.
func (t *streamTable) claim(id string, output bool) (*slot, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	sl := t.get(id)
	if sl.claimed {
		return nil, fmt.Errorf("stream %s belongs to another process: %w", id, errdefs.ErrAlreadyExists)
	}
	sl.claimed, sl.output = true, output
	return sl, nil
}

// claimOutput claims an id for output of which everything before an offset is known to be delivered.
func (t *streamTable) claimOutput(id string, offset uint64) (sink, error) {
	sl, err := t.claim(id, true)
	if err != nil {
		return nil, err
	}
	k := streamSink{sl}
	k.resume(offset)
	return k, nil
}

func (t *streamTable) claimInput(id string, log *slog.Logger) (source, error) {
	sl, err := t.claim(id, false)
	if err != nil {
		return nil, err
	}
	return &streamSource{slot: sl, log: log.With("stream", id)}, nil
}

// use waits for a connection and uses it until done. The context ends with life, or when the
// connection is replaced.
func (sl *slot) use(life context.Context) (ClientStream, context.Context, error) {
	t := sl.table
	for {
		t.mu.Lock()
		conn, changed := sl.conn, sl.changed
		replaced := len(sl.older) > 0 && !sl.output
		if replaced {
			conn = sl.older[0]
		}
		if conn != nil && life.Err() == nil {
			ctx, stop := context.WithCancel(life)
			sl.user, sl.stopUser = conn, stop
			if replaced {
				stop()
			}
			t.mu.Unlock()
			return conn, ctx, nil
		}
		t.mu.Unlock()
		select {
		case <-changed:
		case <-life.Done():
			return nil, nil, life.Err()
		}
	}
}

// done ends the use of a connection, of which some more output was delivered. One that is of no use
// any more is forgotten.
func (sl *slot) done(delivered int, useless bool) {
	t := sl.table
	t.mu.Lock()
	defer t.mu.Unlock()
	if sl.user == nil {
		return
	}
	conn := sl.user
	sl.stopUser()
	sl.user, sl.stopUser = nil, nil
	sl.offset += uint64(delivered)
	if useless && sl.conn == conn {
		sl.conn = nil
	}
	if len(sl.older) > 0 && sl.older[0] == conn {
		sl.older = sl.older[1:]
	}
	if useless || sl.awaited {
		sl.awaited = false
		sl.tell()
	}
}

// finish ends the stream for the client: the connection that is there, and every one that comes
// until release. One that is left to another daemon does not end.
func (sl *slot) finish() {
	sl.table.mu.Lock()
	defer sl.table.mu.Unlock()
	if sl.table.shelf.left.Load() {
		sl.leave()
	} else if !isDone(sl.over) {
		close(sl.over)
	}
	sl.cancel()
}

// leave is for a slot whose connections another daemon will have. t.mu is held.
func (sl *slot) leave() {
	sl.detached = true
	sl.cancel()
	sl.tell()
}

// release forgets the id.
func (sl *slot) release() {
	sl.finish()
	sl.table.mu.Lock()
	defer sl.table.mu.Unlock()
	if sl.table.slots[sl.id] == sl {
		delete(sl.table.slots, sl.id)
	}
}

type streamSink struct{ *slot }

func (k streamSink) Write(p []byte) (int, error) {
	sl := k.slot
	rest := p
	for len(rest) > 0 {
		conn, ctx, err := sl.use(sl.life)
		if err != nil {
			if k.isDetached() {
				return len(p) - len(rest), os.ErrClosed
			}
			break // abandoned
		}
		n, err := conn.Send(ctx, rest, k.position())
		rest = rest[n:]
		sl.done(n, err != nil && sl.life.Err() == nil)
	}
	k.resume(k.position() + uint64(len(rest)))
	return len(p), nil
}

func (k streamSink) position() uint64 {
	k.table.mu.Lock()
	defer k.table.mu.Unlock()
	return k.offset
}

func (k streamSink) resume(offset uint64) {
	k.table.mu.Lock()
	defer k.table.mu.Unlock()
	k.offset = max(k.offset, offset)
}

// flush has nothing to do: Write returns when the connection has it all.
func (k streamSink) flush(context.Context) error {
	if k.isDetached() {
		return os.ErrClosed
	}
	return nil
}

func (k streamSink) abandon() { k.cancel() }

// awaitTaken waits, after finish, until the client has closed the connection that it was told the end on.
func (k streamSink) awaitTaken(ctx context.Context) {
	k.table.mu.Lock()
	conn := k.conn
	if k.detached {
		conn = nil
	}
	k.table.mu.Unlock()
	if conn == nil {
		return
	}
	select {
	case <-conn.Gone():
	case <-ctx.Done():
	}
}

func (k streamSink) detach() {
	k.table.mu.Lock()
	defer k.table.mu.Unlock()
	k.leave()
}

func (k streamSink) isDetached() bool {
	k.table.mu.Lock()
	defer k.table.mu.Unlock()
	return k.detached
}

func (k streamSink) finish() { k.slot.finish() }
func (k streamSink) close()  { k.slot.release() }

// streamSource moves input from connections into an inbox. Only fill uses its fields.
type streamSource struct {
	*slot
	log *slog.Logger

	from    ClientStream // being received from
	ctx     context.Context
	at      uint64 // offset of what it gives next
	missing uint64 // of what it gave to other daemons, what the inbox never got
}

func (k *streamSource) fill(b *inbox) error {
	sl := k.slot
	for {
		var p []byte
		var err error
		if k.from == nil {
			if k.from, k.ctx, err = sl.use(sl.ending); err == nil {
				k.begin(b.end())
			}
		}
		if err == nil {
			p, err = k.from.Receive(k.ctx)
		}
		switch {
		case err == nil:
			k.at += uint64(len(p))
			// An earlier daemon had the first of it, if the connection does not know.
			fresh := min(int(k.at-b.end()), len(p))
			if fresh > 0 {
				if err := b.add(p[len(p)-fresh:]); err != nil {
					sl.done(0, false)
					return err
				}
			}
			k.from.Consumed(k.at + k.missing)
			return nil
		case errors.Is(err, io.EOF):
			return io.EOF
		case sl.life.Err() != nil:
			sl.done(0, false)
			return os.ErrClosed
		case sl.ending.Err() != nil:
			return io.EOF
		}
		sl.done(0, true)
		k.from = nil
	}
}

// begin starts to receive from a connection, behind what the inbox has.
func (k *streamSource) begin(have uint64) {
	k.at, k.missing = k.from.Begin(have), 0
	if k.at > have {
		k.missing = k.at - have
		k.at = have
		k.log.Warn("input is lost: an earlier daemon took it, and what it kept is gone", "bytes", k.missing)
	}
}

func (k *streamSource) ended() {
	k.table.mu.Lock()
	k.inputOver = true
	k.tell()
	k.table.mu.Unlock()
	k.done(0, false)
}

func (k *streamSource) end()    { time.AfterFunc(endGrace, k.slot.endNow) }
func (k *streamSource) finish() { k.slot.finish() }
func (k *streamSource) close()  { k.slot.release() }
