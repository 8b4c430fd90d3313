// Package task serves a pod's containers to its clients: the Task API, versions 2 and 3, and the
// Streaming API, over ttrpc. What the calls mean is in package container; here they are decoded,
// checked and answered. Service knows no transport, Server is the one that exists.
//
// # Connections outlive the daemon
//
// A client takes the loss of its connection for the death of its container, so connections stay open
// while one daemon ends, in whatever way, and the next one begins. Every byte that arrives goes
// through a handover.Inbox, every byte that leaves through a handover.Outbox, and a handover.Store
// keeps both with the connection itself. What must stay true at every instruction:
//
//   - A frame that the Inbox's mark has passed is done with, or pinned. A unary request is pinned
//     from before the mark passes it until its answer is in the Outbox, so every request is answered;
//     one that died between its answer and the end of its pin is answered twice, which clients ignore.
//   - A stream's request and its first message, the id, are pinned while the stream lasts.
//   - Input stays before the mark until whoever reads it says that it was consumed.
//   - How much output was delivered, and how much input the client may send, is remembered by the
//     same step that puts the frame into the Outbox.
//
// A client that announces its containers never closes the connection that it has for each of them, nor
// uses it any more once the container is deleted and Shutdown was answered. The server closes it some
// time later. One that a daemon takes over in between stays until the pod ends.
//
// The two memory files hold, beside the bytes:
//
//	Mark.Count    offset in the input stream that Mark.At stands for
//	Mark.Credit   upper half: the highest stream id that was seen, so that none is used twice;
//	              lower half: the window that the client has granted for output, since the connection
//	              began, modulo 2^32
//	Outbox.Base   0, or 1 + the offset in the stream at which the connection began
//	Outbox.Count  0 before a stream was accepted; then 1 + the offset up to which output was
//	              delivered, or 1 + the window granted for input since the connection began
package task

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"google.golang.org/protobuf/proto"

	"kuasar.io/kuasar/sandboxer/container"
	"kuasar.io/kuasar/sandboxer/handover"
)

const (
	// flushLimit is how long Close waits for answers that are on their way.
	flushLimit = 500 * time.Millisecond
	// callLimit is how long HandOver waits for calls that are under way.
	callLimit = 3 * time.Second
	// lingering is how long a connection stays whose client is through with its container.
	lingering = 30 * time.Second
)

var (
	errClosed     = fmt.Errorf("the pod's server is closed: %w", context.Canceled)
	errHandedOver = fmt.Errorf("the daemon is stopping: %w", context.Canceled)
)

// Options of a Server. Set is required.
type Options struct {
	Set *container.Set
	// Address is what clients were told, such as ttrpc+unix:///run/kuasar-vmm/ID/task.sock.
	Address string
	// PodID begins the names of what Store keeps: task/<PodID>/.
	PodID string
	// Store keeps connections for the next daemon. Nil keeps nothing.
	Store *handover.Store
	Log   *slog.Logger
}

// backend is what answers: *Service.
type backend interface {
	Call(ctx context.Context, method string, payload []byte) ([]byte, error)
	ServeStream(ctx context.Context, id string, stream container.ClientStream) error
}

// Server is the ttrpc server of one pod. It ends with Close or HandOver.
type Server struct {
	backend backend
	store   *handover.Store
	prefix  string
	log     *slog.Logger
	replay  func(context.Context) context.Context // container.Replay
	wrap    func(inbox, outbox) (inbox, outbox)   // tests

	// last tells whether a call that was answered is the last one that its client makes on a connection.
	last   func(method string, payload []byte) bool
	linger time.Duration

	mu       sync.Mutex
	listener net.Listener
	conns    map[*connection]struct{}
	adopted  []*connection // until Serve
	next     uint64        // number of the next connection
	stopped  bool
}

// NewServer returns a Server for a pod's containers.
func NewServer(o Options) *Server {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := newServer(NewService(o.Set, o.Address, o.Log), o)
	s.last = func(method string, payload []byte) bool { return isLast(o.Set, method, payload) }
	return s
}

// isLast knows iSulad, which has one connection for each container, says Shutdown on it after Delete,
// and leaves it open for good: another container, also of the same id, gets another one.
func isLast(set *container.Set, method string, payload []byte) bool {
	var r task.ShutdownRequest
	return method == "Shutdown" && proto.Unmarshal(payload, &r) == nil && set.Finished(r.GetID())
}

func newServer(b backend, o Options) *Server {
	return &Server{
		backend: b, store: o.Store, prefix: "task/" + o.PodID + "/", log: o.Log,
		replay: container.Replay, conns: map[*connection]struct{}{}, next: 1,
		last: func(string, []byte) bool { return false }, linger: lingering,
	}
}

// Adopt takes over the connections that an earlier daemon has left in the store. Their streams have
// been accepted when it returns, in the order of their connections, so that the containers can be
// restored; their calls wait for Serve. A connection that cannot be taken over is closed, which is
// only logged.
func (s *Server) Adopt(ctx context.Context) error {
	left := map[uint64][]string{} // suffixes by connection
	for _, name := range s.store.Names(s.prefix) {
		number, suffix, ok := strings.Cut(strings.TrimPrefix(name, s.prefix), "/")
		n, err := strconv.ParseUint(number, 16, 64)
		if ok && err == nil && s.name(n, suffix) == name {
			left[n] = append(left[n], suffix)
		}
	}
	numbers := make([]uint64, 0, len(left))
	for n := range left {
		numbers = append(numbers, n)
	}
	slices.Sort(numbers)
	for _, n := range numbers {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("cannot take over the pod's connections: %w", context.Cause(ctx))
		}
		s.mu.Lock()
		s.next = max(s.next, n+1)
		s.mu.Unlock()
		files := map[string]*os.File{}
		for _, suffix := range left[n] {
			if f := s.store.Take(s.name(n, suffix)); f != nil {
				files[suffix] = f
			}
		}
		c, err := adopt(s, n, files)
		if err != nil {
			// What there is without it was about to be forgotten.
			if !errors.Is(err, errNotKept) {
				s.log.Error("a connection of a client is lost", "connection", n, "error", err)
			}
			unkeep(s, n)
			continue
		}
		s.mu.Lock()
		s.conns[c] = struct{}{}
		s.adopted = append(s.adopted, c)
		s.mu.Unlock()
		c.park(ctx)
	}
	return nil
}

// name is that of one of a connection's files in the store.
func (s *Server) name(number uint64, suffix string) string {
	return fmt.Sprintf("%s%08x/%s", s.prefix, number, suffix)
}

// Serve goes on with the connections that Adopt took over, and accepts new ones on l, which it
// closes, until Close or HandOver; then it returns nil.
func (s *Server) Serve(l net.Listener) error {
	defer l.Close()
	s.mu.Lock()
	if s.stopped {
		s.mu.Unlock()
		return nil
	}
	s.listener = l
	adopted := s.adopted
	s.adopted = nil
	s.mu.Unlock()
	for _, c := range adopted {
		c.resume()
	}
	const minPause, maxPause = 5 * time.Millisecond, time.Second
	pause := minPause
	for {
		conn, err := l.Accept()
		switch {
		case err == nil:
			pause = minPause
			s.accept(conn)
			continue
		case s.isStopped():
			return nil
		case !outOfResources(err):
			return err
		}
		s.log.Error("a client's connection cannot be accepted yet", "error", err, "pause", pause)
		time.Sleep(pause)
		pause = min(2*pause, maxPause)
	}
}

// outOfResources tells errors of accepting that another attempt may not have.
func outOfResources(err error) bool {
	for _, e := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (s *Server) isStopped() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopped
}

func (s *Server) accept(conn net.Conn) {
	sock, ok := conn.(socket)
	if !ok {
		s.log.Error("a connection is not accepted: its kind is not known", "kind", fmt.Sprintf("%T", conn))
		conn.Close()
		return
	}
	s.mu.Lock()
	number := s.next
	s.next++
	s.mu.Unlock()
	c, err := open(s, number, sock)
	if err != nil {
		s.log.Error("a connection is not accepted", "connection", number, "error", err)
		return
	}
	s.mu.Lock()
	stopped := s.stopped
	if !stopped {
		s.conns[c] = struct{}{}
	}
	s.mu.Unlock()
	if stopped {
		// The store has it already, and with it what the client sends.
		if s.store.Lasting() {
			c.freeze(errHandedOver)
		} else {
			c.drop(errClosed)
		}
		return
	}
	c.resume()
}

// forget is called when a connection has ended.
func (s *Server) forget(c *connection) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

// stop stops accepting and returns the connections in order, which read no more.
func (s *Server) stop() []*connection {
	s.mu.Lock()
	s.stopped = true
	conns := make([]*connection, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	l := s.listener
	s.mu.Unlock()
	if l != nil {
		l.Close()
	}
	slices.SortFunc(conns, func(a, b *connection) int { return cmp.Compare(a.number, b.number) })
	for _, c := range conns {
		c.stop()
	}
	return conns
}

// Close stops accepting, lets answers that are on their way out, ends all connections and forgets
// what the store keeps of them. Calls that still wait are cut off: finish the containers first.
func (s *Server) Close() error {
	conns := s.stop()
	timeout := time.After(flushLimit)
	for _, c := range conns {
		timeout = c.await(timeout, (*connection).quiet)
	}
	for _, c := range conns {
		c.drop(errClosed)
	}
	s.store.RemoveAll(s.prefix)
	return nil
}

// HandOver leaves the connections, and the calls on them that are not answered within a few seconds,
// to the next daemon. Nothing that they carry moves afterwards. Without a store that lasts, the
// clients find their connections closed.
func (s *Server) HandOver() {
	s.mu.Lock()
	if l, ok := s.listener.(*net.UnixListener); ok && s.store.Lasting() {
		l.SetUnlinkOnClose(false)
	}
	s.mu.Unlock()
	conns := s.stop()
	timeout := time.After(callLimit)
	for _, c := range conns {
		timeout = c.await(timeout, func(c *connection) bool { return c.brief == 0 })
	}
	for _, c := range conns {
		c.freeze(errHandedOver)
	}
}
