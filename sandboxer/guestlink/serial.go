package guestlink

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/guest/protocol/mux"
)

const (
	// reconnectTimeout bounds the way back to a guest that was reached before.
	reconnectTimeout = 15 * time.Second
	// A guest may lose its session a few times in quick succession (short means less than
	// shortSession each); more often it only keeps the host busy.
	shortSession     = 2 * time.Second
	maxShortSessions = 5
)

// serialLink is the link over the multiplex on one virtio-serial port. The transport may break and
// come back, for instance because the agent dropped a session; what was dialled is lost then.
type serialLink struct {
	socket string
	log    *slog.Logger
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	greeting
	end

	mu      sync.Mutex
	session *mux.Session
	changed chan struct{} // closed and replaced when session changes
	stopped chan struct{} // closed when run has returned
}

func openSerial(socket string, restored bool, log *slog.Logger) *serialLink {
	l := &serialLink{
		socket:   socket,
		log:      log,
		greeting: greeting{said: make(chan struct{})},
		end:      end{broken: make(chan struct{})},
		changed:  make(chan struct{}),
		stopped:  make(chan struct{}),
	}
	// The link outlives the call that opens it.
	l.ctx, l.cancel = context.WithCancel(context.Background())
	go l.run(restored)
	return l
}

// run keeps a session open until the link ends.
func (l *serialLink) run(restored bool) {
	defer close(l.stopped)
	var session *mux.Session
	var err error
	if restored {
		session, err = mux.Dial(l.ctx, l.socket)
	} else {
		session, err = mux.DialFirst(l.ctx, l.socket)
	}
	for short := 0; err == nil; {
		l.set(session)
		begin := time.Now()
		l.accept(session)
		l.set(nil)
		session.Close()
		err = session.Err()
		var violation *mux.ProtocolError
		if l.ctx.Err() != nil || l.Err() != nil || errors.As(err, &violation) {
			break
		}
		if time.Since(begin) < shortSession {
			if short++; short > maxShortSessions {
				err = fmt.Errorf("the connection to the agent broke %d times in a row, last: %w", short, err)
				break
			}
		} else {
			short = 0
		}
		l.log.Warn("the connection to the agent broke, reconnecting", "error", err)
		ctx, cancel := context.WithTimeout(l.ctx, reconnectTimeout)
		session, err = mux.Dial(ctx, l.socket)
		cancel()
	}
	if l.ctx.Err() != nil {
		err = errClosed
	}
	l.fail(err)
}

// accept takes the agent's hellos until the session ends. A guest has no business on other ports.
func (l *serialLink) accept(session *mux.Session) {
	for {
		conn, port, err := session.Accept()
		if err != nil {
			return
		}
		if port != protocol.PortHello {
			conn.Close()
			l.fail(fmt.Errorf("%w: it called port %d of the host", errMisbehaved, port))
			session.Close()
			return
		}
		go func() {
			err := l.greet(conn)
			if errors.Is(err, errMisbehaved) {
				l.fail(err)
				session.Close()
			} else if err != nil {
				l.log.Debug("a call of the guest came to nothing", "error", err)
			}
		}()
	}
}

func (l *serialLink) set(session *mux.Session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.session = session
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *serialLink) Hello(ctx context.Context) (*protocol.Hello, error) {
	return l.wait(ctx, &l.end)
}

// Dial waits for a session if there is none at the moment.
func (l *serialLink) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	for {
		l.mu.Lock()
		session, changed := l.session, l.changed
		l.mu.Unlock()
		// A link that is broken may still have its session for a moment.
		if session != nil && l.Err() == nil {
			return session.Open(ctx, port)
		}
		select {
		case <-changed:
		case <-l.broken:
			return nil, fmt.Errorf("cannot dial port %d of the guest: %w", port, l.Err())
		case <-ctx.Done():
			return nil, fmt.Errorf("cannot dial port %d of the guest: there is no connection to it: %w", port, ctx.Err())
		}
	}
}

func (l *serialLink) Close() error {
	l.cancel()
	l.mu.Lock()
	session := l.session
	l.mu.Unlock()
	if session != nil {
		session.Close()
	}
	l.fail(errClosed)
	<-l.stopped
	return nil
}
