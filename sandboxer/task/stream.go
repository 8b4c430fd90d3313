package task

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	streaming "github.com/containerd/containerd/api/services/streaming/v1"
	"github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
)

const (
	// streamPiece is the most that one message of output carries, in bytes.
	streamPiece = 32 << 10
	// inputWindow is how much input a client may send ahead.
	inputWindow = 64 << 10
	// maxWindow bounds the credit that a client can pile up.
	maxWindow = 64 << 20
)

// MessageStream is one bidirectional call of the Streaming API, whatever carries it.
type MessageStream interface {
	Send(*anypb.Any) error
	Recv() (*anypb.Any, error)
}

// Stream answers one call of containerd.services.streaming.v1.Streaming/Stream: the client names
// an id, and the connection then carries the standard stream with that id. ctx is the connection's
// life. Returning nil tells the client the end of the stream.
func (s *Service) Stream(ctx context.Context, messages MessageStream) error {
	first, err := messages.Recv()
	if err != nil {
		return errgrpc.ToGRPC(fmt.Errorf("cannot read the first message of a stream: %w", err))
	}
	init := &streaming.StreamInit{}
	if err := unpack(first, init); err != nil {
		return errgrpc.ToGRPC(err)
	}
	if n := len(init.GetID()); n == 0 || n > 512 {
		return errgrpc.ToGRPC(fmt.Errorf("id: a stream's id has %d bytes, allowed are 1 to 512: %w", n, errdefs.ErrInvalidArgument))
	}
	return errgrpc.ToGRPC(s.set.ServeStream(ctx, init.GetID(), newConnection(ctx, messages)))
}

// connection is a container.ClientStream. Its direction shows with its first use; from then on
// one goroutine receives until the connection ends, so that the transport never has to wait.
type connection struct {
	life     context.Context
	messages MessageStream
	accepted chan struct{} // closed when the client was told
	start    sync.Once

	mu      sync.Mutex
	changed chan struct{} // closed and replaced on every change
	window  int64         // output: what may be sent
	pieces  [][]byte      // input: what was received
	pending int           // input: its bytes
	owed    int           // input: bytes taken since the last window update
	err     error         // why nothing more is received; io.EOF is the client's end
}

func newConnection(life context.Context, messages MessageStream) *connection {
	return &connection{life: life, messages: messages, accepted: make(chan struct{}), changed: make(chan struct{})}
}

// Accept implements container.ClientStream.
func (c *connection) Accept() error {
	defer close(c.accepted)
	ack, err := pack(&emptypb.Empty{})
	if err != nil {
		return err
	}
	return c.messages.Send(ack)
}

// waitAccepted does not look at the connection's life: input may have arrived before its end, and
// Accept fails by itself then.
func (c *connection) waitAccepted(ctx context.Context) error {
	select {
	case <-c.accepted:
		return nil // whether or not ctx has ended: what was received is still there
	default:
	}
	select {
	case <-c.accepted:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// update changes the state under the lock and wakes who waits for it.
func (c *connection) update(change func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change()
	close(c.changed)
	c.changed = make(chan struct{})
}

// receive hands every message to take until the connection ends.
func (c *connection) receive(take func(*anypb.Any) error) {
	cancelled := 0
	for {
		m, err := c.messages.Recv()
		if err != nil && c.life.Err() != nil && !errors.Is(err, io.EOF) && cancelled < 128 {
			// The connection is gone, but messages may have arrived before: the transport
			// chooses between them and the end by chance, so it is asked more than once.
			cancelled++
			continue
		}
		if err == nil {
			err = take(m)
		}
		if err != nil {
			c.update(func() { c.err = err })
			return
		}
	}
}

// Delivered implements container.ClientStream.
func (c *connection) Delivered() (uint64, bool) { return 0, false }

// Begin implements container.ClientStream.
func (c *connection) Begin(offset uint64) uint64 { return offset }

// Consumed implements container.ClientStream.
func (c *connection) Consumed(uint64) {}

// Send implements container.ClientStream.
func (c *connection) Send(ctx context.Context, p []byte, _ uint64) (int, error) {
	if err := c.waitAccepted(ctx); err != nil {
		return 0, err
	}
	c.start.Do(func() {
		go c.receive(func(m *anypb.Any) error {
			w := &transfer.WindowUpdate{}
			if err := unpack(m, w); err != nil {
				return err
			}
			if w.GetUpdate() < 0 {
				return fmt.Errorf("update: a window cannot shrink by %d: %w", -int64(w.GetUpdate()), errdefs.ErrInvalidArgument)
			}
			c.update(func() { c.window = min(c.window+int64(w.GetUpdate()), maxWindow) })
			return nil
		})
	})
	sent := 0
	for sent < len(p) {
		c.mu.Lock()
		n := int(min(int64(len(p)-sent), c.window, streamPiece))
		c.window -= int64(n)
		err, changed := c.err, c.changed
		c.mu.Unlock()
		if errors.Is(err, io.EOF) {
			err = nil // a client that has nothing more to say may still listen
		}
		switch {
		case err != nil:
			return sent, err
		case n > 0:
			m, err := pack(&transfer.Data{Data: p[sent : sent+n]})
			if err == nil {
				err = c.messages.Send(m)
			}
			if err != nil {
				return sent, err
			}
			sent += n
			continue
		}
		select {
		case <-changed:
		case <-c.life.Done():
			return sent, context.Cause(c.life)
		case <-ctx.Done():
			return sent, context.Cause(ctx)
		}
	}
	return sent, nil
}

// Receive implements container.ClientStream.
func (c *connection) Receive(ctx context.Context) ([]byte, error) {
	if err := c.waitAccepted(ctx); err != nil {
		return nil, err
	}
	c.start.Do(func() {
		c.mu.Lock()
		c.owed = inputWindow
		c.mu.Unlock()
		go c.receive(func(m *anypb.Any) error {
			d := &transfer.Data{}
			if err := unpack(m, d); err != nil {
				return err
			}
			c.mu.Lock()
			pending := c.pending + len(d.GetData())
			c.mu.Unlock()
			if pending > 4*inputWindow {
				return fmt.Errorf("data: %d bytes are ahead of the window: %w", pending, errdefs.ErrResourceExhausted)
			}
			if len(d.GetData()) > 0 {
				c.update(func() {
					c.pieces = append(c.pieces, d.GetData())
					c.pending = pending
				})
			}
			return nil
		})
	})
	for {
		c.mu.Lock()
		if len(c.pieces) > 0 {
			p := c.pieces[0]
			c.pieces = c.pieces[1:]
			c.pending -= len(p)
			c.owed += len(p)
			c.mu.Unlock()
			return p, nil
		}
		err, changed, owed := c.err, c.changed, c.owed
		if err == nil {
			c.owed = 0
		}
		c.mu.Unlock()
		if err != nil {
			return nil, err
		}
		// The client may go on when everything before was consumed. A lost connection shows
		// in what is received.
		if owed > 0 {
			if m, err := pack(&transfer.WindowUpdate{Update: int32(owed)}); err == nil {
				c.messages.Send(m)
			}
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// unpack decodes an Any that must hold a message of m's type.
func unpack(a *anypb.Any, m proto.Message) error {
	want := string(m.ProtoReflect().Descriptor().FullName())
	if name := a.GetTypeUrl(); name[strings.LastIndexByte(name, '/')+1:] != want {
		return fmt.Errorf("a message of type %q came where %s belongs: %w", bounded(name), want, errdefs.ErrInvalidArgument)
	}
	if err := proto.Unmarshal(a.GetValue(), m); err != nil {
		return fmt.Errorf("cannot decode %s: %s: %w", want, err, errdefs.ErrInvalidArgument)
	}
	return nil
}
