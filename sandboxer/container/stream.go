package container

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
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

	// Begin says that a new connection's input begins at an offset of the stream, durably, and
	// returns where Receive goes on: there, or on a connection that was taken over, at the offset
	// up to which an earlier daemon's input was Consumed. It is called once, before Receive.
	Begin(offset uint64) uint64
	// Receive returns the next input, valid until the next call. io.EOF is the client's end of
	// the input; any other error means that the connection is no use any more, which is not the
	// end. What arrived before the connection was lost is still returned, also after ServeStream.
	Receive(ctx context.Context) ([]byte, error)
	// Consumed says that the input up to an offset is out of the daemons' hands: no other needs to
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
	mu    sync.Mutex
	slots map[string]*slot
}

// slot is one id. Guarded by streamTable.mu.
type slot struct {
	table    *streamTable
	id       string
	claimed  bool
	conn     ClientStream
	changed  chan struct{} // closed and replaced when conn changes
	over     chan struct{} // closed when the process's stream has ended
	detached bool
	life     context.Context
	cancel   context.CancelFunc
	ending   context.Context // ends endGrace after CloseIO
	endNow   context.CancelFunc
}

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

// set changes the current connection. t.mu is held.
func (sl *slot) set(conn ClientStream) {
	sl.conn = conn
	close(sl.changed)
	sl.changed = make(chan struct{})
}

// ServeStream lends a client's connection to the process that names its id, now or later. It
// returns nil when that process's stream has ended, so that the client must be told the end, and
// an error when ctx, which is the connection's life, ends or a newer connection took its place.
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
	}
	sl.set(conn)
	changed := sl.changed
	t.mu.Unlock()
	// A failure means that the connection is lost, which ctx tells as well.
	conn.Accept()

	for {
		select {
		case <-sl.over:
			return nil
		case <-changed:
			t.mu.Lock()
			mine := sl.conn == conn
			lost := sl.conn == nil
			changed = sl.changed
			t.mu.Unlock()
			if lost {
				return fmt.Errorf("stream %s: %w", id, io.ErrUnexpectedEOF)
			}
			if !mine {
				return fmt.Errorf("stream %s: a newer connection took over: %w", id, errdefs.ErrAborted)
			}
		case <-ctx.Done():
			// What had arrived may still be read: a process that claimed the id drops the
			// connection itself.
			t.mu.Lock()
			if sl.conn == conn && !sl.claimed {
				delete(t.slots, id)
				sl.cancel()
			}
			t.mu.Unlock()
			return fmt.Errorf("stream %s: the client's connection is lost: %w", id, errdefs.ErrUnavailable)
		}
	}
}

// claim gives an id to a process.
func (t *streamTable) claim(id string) (*slot, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	sl := t.get(id)
	if sl.claimed {
		return nil, fmt.Errorf("stream %s belongs to another process: %w", id, errdefs.ErrAlreadyExists)
	}
	sl.claimed = true
	return sl, nil
}

func (t *streamTable) claimOutput(id string) (sink, error) {
	sl, err := t.claim(id)
	if err != nil {
		return nil, err
	}
	return &streamSink{slot: sl}, nil
}

func (t *streamTable) claimInput(id string) (source, error) {
	sl, err := t.claim(id)
	if err != nil {
		return nil, err
	}
	return streamSource{sl}, nil
}

// current waits for a connection.
func (sl *slot) current(ctx context.Context) (ClientStream, error) {
	for {
		sl.table.mu.Lock()
		conn, changed := sl.conn, sl.changed
		sl.table.mu.Unlock()
		if conn != nil {
			return conn, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// drop forgets a connection that is no use any more.
func (sl *slot) drop(conn ClientStream) {
	sl.table.mu.Lock()
	defer sl.table.mu.Unlock()
	if sl.conn == conn {
		sl.set(nil)
	}
}

// finish ends the stream for the client: the connection that is there, and every one that comes
// until release.
func (sl *slot) finish() {
	sl.table.mu.Lock()
	defer sl.table.mu.Unlock()
	select {
	case <-sl.over:
	default:
		close(sl.over)
	}
	sl.cancel()
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

type streamSink struct {
	*slot
	offset uint64 // of what Write takes next
}

func (k *streamSink) Write(p []byte) (int, error) {
	sl := k.slot
	for rest := p; len(rest) > 0; {
		conn, err := sl.current(sl.life)
		if err != nil {
			if k.isDetached() {
				return len(p) - len(rest), os.ErrClosed
			}
			break // abandoned
		}
		n, err := conn.Send(sl.life, rest, k.offset)
		rest = rest[n:]
		k.offset += uint64(n)
		if err != nil && sl.life.Err() == nil {
			sl.drop(conn)
		}
	}
	return len(p), nil
}

func (k *streamSink) abandon() { k.cancel() }

func (k *streamSink) detach() {
	k.table.mu.Lock()
	k.detached = true
	k.table.mu.Unlock()
	k.cancel()
}

func (k *streamSink) isDetached() bool {
	k.table.mu.Lock()
	defer k.table.mu.Unlock()
	return k.detached
}

func (k *streamSink) finish() { k.slot.finish() }
func (k *streamSink) close()  { k.slot.release() }

type streamSource struct{ *slot }

func (k streamSource) next(take func([]byte) error) error {
	sl := k.slot
	for {
		conn, err := sl.current(sl.ending)
		var p []byte
		if err == nil {
			p, err = conn.Receive(sl.ending)
		}
		switch {
		case err == nil:
			return take(p)
		case errors.Is(err, io.EOF):
			return io.EOF
		case sl.life.Err() != nil:
			return os.ErrClosed
		case sl.ending.Err() != nil:
			return io.EOF
		}
		sl.drop(conn)
	}
}

func (k streamSource) end()    { time.AfterFunc(endGrace, k.slot.endNow) }
func (k streamSource) finish() { k.slot.finish() }
func (k streamSource) close()  { k.slot.release() }
