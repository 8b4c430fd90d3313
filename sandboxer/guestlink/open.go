package guestlink

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/vm"
)

const (
	// helloTimeout bounds the hello once the guest has called.
	helloTimeout = 5 * time.Second
	// Bounds of the strings in a hello, in bytes, and of their number.
	maxVersion  = 256
	maxFeature  = 64
	maxFeatures = 64
)

// errClosed is why a link ends that this side has closed.
var errClosed = fmt.Errorf("the link to the guest is closed: %w", net.ErrClosed)

// Open begins to wait for the guest of a machine and returns at once; the link lives until Close,
// which is the caller's. ctx only bounds Open itself. Whatever carries the link, a guest that breaks
// the protocol breaks the link for good.
func Open(ctx context.Context, e vm.Endpoint, log *slog.Logger) (Link, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("cannot open the link to the guest: %w", err)
	}
	switch {
	case e.SerialSocket != "" && e.VsockCID == 0:
		return openSerial(e.SerialSocket, e.Restored, log), nil
	case e.VsockCID != 0 && e.SerialSocket == "":
		l, err := openVsock(e.VsockCID, e.Restored, log)
		if err != nil {
			return nil, err
		}
		return l, nil
	default:
		return nil, errors.New("cannot open the link to the guest: its endpoint names not exactly one transport")
	}
}

// end is how a link ends, once.
type end struct {
	once   sync.Once
	broken chan struct{}
	err    error // valid once broken is closed
}

func (e *end) fail(err error) {
	e.once.Do(func() {
		e.err = err
		close(e.broken)
	})
}

// Broken is closed when the transport has failed for good, or the link was closed.
func (e *end) Broken() <-chan struct{} { return e.broken }

// Err says why Broken is closed; nil before.
func (e *end) Err() error {
	select {
	case <-e.broken:
		return e.err
	default:
		return nil
	}
}

// greeting is the hello of the guest's agent: the latest one, if it says it again.
type greeting struct {
	mu    sync.Mutex
	said  chan struct{} // closed when hello is there
	hello *protocol.Hello
}

// errMisbehaved is wrapped by the errors of a guest that sent what no agent sends.
var errMisbehaved = errors.New("the guest broke the protocol")

// greet reads a hello from conn, answers it, and closes conn. A call that breaks off is none: the
// agent calls again.
func (g *greeting) greet(conn net.Conn) error {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(helloTimeout))
	hello := new(protocol.Hello)
	if err := protocol.ReadMessage(conn, hello); err != nil {
		var broke net.Error
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) || errors.As(err, &broke) {
			return fmt.Errorf("the guest called and did not say hello: %w", err)
		}
		return fmt.Errorf("%w in its hello: %w", errMisbehaved, err)
	}
	if err := check(hello); err != nil {
		return fmt.Errorf("%w in its hello: %w", errMisbehaved, err)
	}
	g.mu.Lock()
	if g.hello == nil {
		close(g.said)
	}
	g.hello = hello
	g.mu.Unlock()
	// The agent may be gone again by now; that is noticed elsewhere.
	protocol.WriteMessage(conn, &protocol.HelloReply{ProtocolVersion: protocol.Version})
	return nil
}

func check(h *protocol.Hello) error {
	if len(h.GetAgentVersion()) > maxVersion || len(h.GetKernelRelease()) > maxVersion {
		return fmt.Errorf("a version longer than %d bytes", maxVersion)
	}
	if len(h.GetFeatures()) > maxFeatures {
		return fmt.Errorf("%d features are more than %d", len(h.GetFeatures()), maxFeatures)
	}
	for _, f := range h.GetFeatures() {
		if len(f) > maxFeature {
			return fmt.Errorf("the name of a feature is longer than %d bytes", maxFeature)
		}
	}
	return nil
}

func (g *greeting) wait(ctx context.Context, e *end) (*protocol.Hello, error) {
	select {
	case <-g.said:
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.hello, nil
	case <-e.broken:
		return nil, fmt.Errorf("no hello from the agent: %w", e.Err())
	case <-ctx.Done():
		return nil, fmt.Errorf("no hello from the agent: %w", context.Cause(ctx))
	}
}
