// Package task serves a pod's containers to its clients: the Task API, versions 2 and 3, and the
// Streaming API, over ttrpc. What the calls mean is in package container; here they are decoded,
// checked and answered. Service knows no transport, Server is the one that exists.
package task

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"

	streaming "github.com/containerd/containerd/api/services/streaming/v1"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"

	"kuasar.io/kuasar/sandboxer/container"
)

// flushLimit is how long Close waits for answers that are on their way.
const flushLimit = 500 * time.Millisecond

// Server is the ttrpc server of one pod.
type Server struct {
	ttrpc *ttrpc.Server

	mu    sync.Mutex
	conns map[*trackedConn]struct{}
	empty chan struct{} // closed by the last connection to go while Close waits
}

// NewServer returns a Server for a pod's containers. address is what clients were told, such as
// ttrpc+unix:///run/kuasar-vmm/ID/task.sock.
func NewServer(set *container.Set, address string, log *slog.Logger) *Server {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	// Without options NewServer cannot fail.
	server, _ := ttrpc.NewServer()
	s := &Server{ttrpc: server, conns: map[*trackedConn]struct{}{}}
	service := NewService(set, address, log)
	for _, name := range ServiceNames {
		calls := map[string]ttrpc.Method{}
		for method := range methods {
			calls[method] = func(ctx context.Context, unmarshal func(any) error) (any, error) {
				return service.call(ctx, method, func(request proto.Message) error { return unmarshal(request) })
			}
		}
		server.RegisterService(name, &ttrpc.ServiceDesc{Methods: calls})
	}
	streaming.RegisterTTRPCStreamingService(server, streamingService{service})
	return s
}

type streamingService struct{ service *Service }

func (s streamingService) Stream(ctx context.Context, stream streaming.TTRPCStreaming_StreamServer) error {
	return s.service.Stream(ctx, stream)
}

// Serve accepts connections on l, which it closes, until Close; then it returns nil.
func (s *Server) Serve(l net.Listener) error {
	err := s.ttrpc.Serve(context.Background(), trackedListener{l, s})
	if errors.Is(err, ttrpc.ErrServerClosed) {
		return nil
	}
	return err
}

// Close stops accepting, lets answers that are on their way out, and ends all connections. Calls
// that still wait are cut off: finish the containers first.
func (s *Server) Close() error {
	err := s.ttrpc.Close() // idle connections end by themselves now
	s.mu.Lock()
	empty := make(chan struct{})
	s.empty = empty
	if len(s.conns) == 0 {
		close(empty)
		s.empty = nil
	}
	s.mu.Unlock()
	select {
	case <-empty:
		return err
	case <-time.After(flushLimit):
	}
	s.mu.Lock()
	var rest []*trackedConn
	for c := range s.conns {
		rest = append(rest, c)
	}
	s.mu.Unlock()
	for _, c := range rest {
		c.Close()
	}
	return err
}

// trackedListener keeps the books of connections: the ttrpc server does not end those with calls
// under way.
type trackedListener struct {
	net.Listener
	server *Server
}

func (l trackedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &trackedConn{Conn: conn, server: l.server}
	l.server.mu.Lock()
	l.server.conns[c] = struct{}{}
	l.server.mu.Unlock()
	return c, nil
}

type trackedConn struct {
	net.Conn
	server *Server
}

// Write reports no error when the client has closed the connection. The ttrpc server would give
// the connection up at once, and with it what the client had sent before: the last input of an
// exec whose client is quick. The reading side finds the end after that.
func (c *trackedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		return len(p), nil
	}
	return n, err
}

func (c *trackedConn) Close() error {
	s := c.server
	s.mu.Lock()
	delete(s.conns, c)
	if len(s.conns) == 0 && s.empty != nil {
		close(s.empty)
		s.empty = nil
	}
	s.mu.Unlock()
	return c.Conn.Close()
}
