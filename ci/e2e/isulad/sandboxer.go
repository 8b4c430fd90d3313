package isulad

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

const service = "/containerd.services.sandbox.v1.Controller/"

// rawCodec passes messages as bytes. Its name is empty so that the content type is the plain
// application/grpc of the real clients.
type rawCodec struct{}

func (rawCodec) Name() string { return "" }

func (rawCodec) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }

func (rawCodec) Unmarshal(b []byte, v any) error {
	*v.(*[]byte) = append([]byte(nil), b...)
	return nil
}

// cleartextHTTPS says https in the headers and sends cleartext, as a tonic endpoint does that was
// made from an https URI and a connector of its own.
type cleartextHTTPS struct {
	credentials.TransportCredentials
}

func (c cleartextHTTPS) Info() credentials.ProtocolInfo {
	info := c.TransportCredentials.Info()
	info.SecurityProtocol = "tls"
	return info
}

func (c cleartextHTTPS) Clone() credentials.TransportCredentials {
	return cleartextHTTPS{c.TransportCredentials.Clone()}
}

// A sandboxer is one generation's client of the controller's socket.
type sandboxer struct {
	config Config
	conn   *grpc.ClientConn
	// unary is held by Gen-B for the whole of every call but Wait.
	unary sync.Mutex
	// polling is held while one waiter asks whether the sandboxer is back.
	polling sync.Mutex
}

func dialSandboxer(c Config) (*sandboxer, error) {
	path := strings.TrimPrefix(c.Socket, "unix://")
	options := []grpc.DialOption{
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{})),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableRetry(),
		grpc.WithIdleTimeout(0),
	}
	if c.Version.Generation() == GenB {
		options = append(options,
			grpc.WithTransportCredentials(cleartextHTTPS{insecure.NewCredentials()}),
			grpc.WithAuthority("[::]"),
			// tonic tries to connect at each call, without a pause that grows.
			grpc.WithConnectParams(grpc.ConnectParams{
				Backoff:           backoff.Config{BaseDelay: time.Millisecond, Multiplier: 1, MaxDelay: time.Millisecond},
				MinConnectTimeout: time.Second,
			}))
	} else {
		options = append(options,
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithAuthority("localhost"))
	}
	conn, err := grpc.NewClient("passthrough:///"+path, options...)
	if err != nil {
		return nil, fmt.Errorf("cannot make a client of the sandboxer at %s: %w", path, err)
	}
	return &sandboxer{config: c, conn: conn}, nil
}

// call makes one unary call, as iSulad does without deadline or metadata.
func (s *sandboxer) call(method string, request message) ([]byte, error) {
	if s.config.Version.Generation() == GenB {
		s.unary.Lock()
		defer s.unary.Unlock()
	}
	s.record(method, request)
	in, out := []byte(request), []byte(nil)
	if err := s.conn.Invoke(context.Background(), service+method, &in, &out); err != nil {
		return nil, fmt.Errorf("the sandboxer at %s refuses %s: %w", s.config.Socket, method, err)
	}
	return out, nil
}

func (s *sandboxer) record(method string, request message) {
	if s.config.Record != nil {
		s.config.Record(method, request)
	}
}

// wait makes one call of Wait. reached is called when the request is on its way over a connection
// that stands.
func (s *sandboxer) wait(ctx context.Context, id string, reached func()) (exit, error) {
	stream, err := s.register(ctx, id)
	if err != nil {
		return exit{}, err
	}
	reached()
	var out []byte
	if err := stream.RecvMsg(&out); err != nil {
		return exit{}, err
	}
	f, err := fields(out)
	if err != nil {
		return exit{}, err
	}
	at, err := timeOf(last(f[2]).bytes)
	return exit{status: int64(last(f[1]).varint), at: at}, err
}

// register sends the request of Wait. Gen-B holds the lock of the unary calls for it, but not for
// the waiting.
func (s *sandboxer) register(ctx context.Context, id string) (grpc.ClientStream, error) {
	if s.config.Version.Generation() == GenB {
		s.unary.Lock()
		defer s.unary.Unlock()
	}
	stream, err := s.conn.NewStream(ctx, &grpc.StreamDesc{}, service+"Wait")
	if err != nil {
		return nil, err
	}
	request := []byte(s.config.Version.Generation().request(s.config.Sandboxer, id, nil))
	s.record("Wait", request)
	if err := stream.SendMsg(&request); err != nil {
		// The reason is what the stream ended with, not that it cannot be written to.
		var none []byte
		if ended := stream.RecvMsg(&none); ended != nil {
			return nil, ended
		}
		return nil, err
	}
	return stream, stream.CloseSend()
}

// exit is how a sandbox ended. The status is -1 where Gen-A could not learn it.
type exit struct {
	status int64
	at     time.Time
}

// monitor follows a sandbox until it has exited or ctx ends, and tells what becomes of it: pending
// while the sandboxer cannot be reached, ready when it is back, and at last exited, once.
func (s *sandboxer) monitor(ctx context.Context, id string, pending, ready func(), exited func(exit)) {
	retries := 0
	for first := true; ; first = false {
		again := !first
		end, err := s.wait(ctx, id, func() {
			if again && s.config.Version.Generation() == GenA {
				retries = 0
				ready()
			}
		})
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			exited(end)
			return
		}
		code := status.Code(err)
		lost := code == codes.Unavailable
		if s.config.Version.Generation() == GenB {
			lost = lost || strings.Contains(err.Error(), "BrokenPipe") || strings.Contains(err.Error(), "broken pipe")
		}
		switch {
		case lost && s.config.Version.Generation() == GenB:
			pending()
			if !s.poll(ctx, id) {
				return
			}
			ready()
		case lost:
			pending()
			if !sleep(ctx, s.config.backoff(retries)) {
				return
			}
			retries++
		case s.config.Version.Generation() == GenA:
			exited(exit{status: -1, at: time.Now()})
			return
		default:
			// The numbers of the codes are those of the exit statuses; that of NotFound is 5.
			exited(exit{status: int64(code), at: time.Now()})
			return
		}
	}
}

// poll asks for the platform until the sandboxer answers; one waiter at a time does. It returns
// false if ctx ended before.
func (s *sandboxer) poll(ctx context.Context, id string) bool {
	s.polling.Lock()
	defer s.polling.Unlock()
	for {
		if !sleep(ctx, s.config.PlatformInterval) {
			return false
		}
		request := s.config.Version.Generation().request(s.config.Sandboxer, id, nil)
		if _, err := s.call("Platform", request); err == nil {
			return true
		}
	}
}

// backoff is how long Gen-A lets pass before it waits again.
func (c Config) backoff(retries int) time.Duration {
	ticks := 1500
	if retries <= 10 {
		ticks = 1 << retries
	}
	return time.Duration(ticks)*c.WaitTick + time.Duration(rand.Int64N(int64(c.WaitTick*3/4)+1)) + c.WaitTick/4
}

// sleep returns false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
