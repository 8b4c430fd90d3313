package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"sync"
	"time"

	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	sd "github.com/coreos/go-systemd/v22/daemon"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"kuasar.io/kuasar/sandboxer/pod"
)

// service is what the service manager gets to know: sd_notify(3). Without a manager nothing is told
// and nothing is watched. Its methods may be called from several goroutines.
type service struct {
	log *slog.Logger
	// watchdog is how long the manager waits for a sign of life, or zero if it does not.
	watchdog time.Duration
	// send passes a message on; for tests.
	send func(message string) error

	mu   sync.Mutex
	pods string // the first part of the status text
	note string // the rest of it, or empty
	told string // the last status text
}

func newService(log *slog.Logger) *service {
	watchdog, err := sd.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("the service manager's watchdog gets no sign of life, because its interval is not understood", "error", err)
	}
	return &service{log: log, watchdog: watchdog, send: func(message string) error {
		_, err := sd.SdNotify(false, message)
		return err
	}}
}

// tell sends a message. There is nothing else that the daemon could do about a failure.
func (s *service) tell(message string) {
	if err := s.send(message); err != nil {
		s.log.Warn("cannot notify the service manager", "message", message, "error", err)
	}
}

// setPods changes the first part of the status text.
func (s *service) setPods(text string) { s.update(func() { s.pods = text }) }

// setNote changes the second part of the status text; empty removes it.
func (s *service) setNote(text string) { s.update(func() { s.note = text }) }

func (s *service) update(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
	text := s.pods
	if s.note != "" {
		text += "; " + s.note
	}
	if text != s.told {
		s.told = text
		s.tell("STATUS=" + text)
	}
}

func (s *service) ready() { s.tell(sd.SdNotifyReady) }

func (s *service) stopping() { s.tell(sd.SdNotifyStopping) }

// recovery passes on what pods count, and tells the service manager how the recovery gets on. Each
// pod that is done with extends the time that a start may take.
type recovery struct {
	pod.Metrics
	service *service
	total   int

	mu   sync.Mutex
	done int
	told time.Time
}

const (
	// extension is longer than the recovery of any one pod.
	extension = 90 * time.Second
	// tellInterval bounds how often the service manager hears of changes.
	tellInterval = time.Second
)

// recovery returns what a manager of the pods in dir is to count with while it recovers them.
func (s *service) recovery(dir string, counted pod.Metrics) *recovery {
	r := &recovery{Metrics: counted, service: s}
	entries, _ := os.ReadDir(dir) // an error is the recovery's to report
	for _, e := range entries {
		if e.IsDir() && pod.CheckID(e.Name()) == nil {
			r.total++
		}
	}
	if r.total > 0 {
		r.tell(time.Now())
	}
	return r
}

// Recovered counts a pod that is done with.
func (r *recovery) Recovered(outcome string) {
	r.Metrics.Recovered(outcome)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.done++
	if r.done > r.total {
		return
	}
	if now := time.Now(); now.Sub(r.told) >= tellInterval || r.done == r.total {
		r.tell(now)
	}
}

func (r *recovery) tell(now time.Time) {
	r.told = now
	r.service.tell(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", extension.Microseconds()))
	r.service.setPods(fmt.Sprintf("taking over pods: %d of %d", r.done, r.total))
}

// follow keeps the number of pods in the status text until ctx ends.
func (s *service) follow(ctx context.Context, count func() int) {
	ticker := time.NewTicker(2 * tellInterval)
	defer ticker.Stop()
	for {
		switch n := count(); n {
		case 1:
			s.setPods("1 pod")
		default:
			s.setPods(fmt.Sprintf("%d pods", n))
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// watch tells the service manager that the daemon lives, each time that alive has found it so, until
// ctx ends. A daemon that does not answer itself is ended by the manager, and before that its
// goroutines are logged.
func (s *service) watch(ctx context.Context, alive func(context.Context) error) {
	if s.watchdog == 0 {
		return
	}
	// Three attempts fit between the last sign of life and the end.
	period := s.watchdog / 4
	ticker := time.NewTicker(period)
	defer ticker.Stop()
	for failures := 0; ; {
		err := s.attempt(ctx, period, alive)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			if failures > 0 {
				s.log.Info("the daemon answers itself again", "attempts", failures)
			}
			failures = 0
			s.tell(sd.SdNotifyWatchdog)
		default:
			failures++
			s.log.Error("the daemon does not answer itself; the service manager is not told that it lives",
				"attempt", failures, "watchdog", s.watchdog, "error", err)
			if failures == 2 {
				s.log.Error("the service manager is about to end the daemon", "goroutines", goroutines())
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// attempt bounds alive also where it does not heed its context.
func (s *service) attempt(ctx context.Context, limit time.Duration, alive func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return within(ctx, func() error { return alive(ctx) })
}

func within(ctx context.Context, f func() error) error {
	result := make(chan error, 1)
	go func() { result <- f() }()
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// liveness returns the check that a sign of life stands for: a call over the socket that the daemon
// serves on gets the answer of the manager of pods. count takes the manager's lock.
func liveness(socket string, count func() int) func(context.Context) error {
	return func(ctx context.Context) error {
		err := call(ctx, socket)
		if err == nil {
			return nil
		}
		// Whatever time is left: a lock that is free is taken at once.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if within(ctx, func() error { count(); return nil }) != nil {
			return fmt.Errorf("the manager of pods holds its lock: %w", err)
		}
		return fmt.Errorf("the manager of pods answers, the server on %s does not: %w", socket, err)
	}
}

// nobody cannot be a pod's id.
const nobody = ".watchdog"

// call asks for a pod that does not exist, over a connection of its own.
func call(ctx context.Context, socket string) error {
	conn, err := grpc.NewClient("passthrough:///"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}))
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = sandboxapi.NewControllerClient(conn).Status(ctx, &sandboxapi.ControllerStatusRequest{SandboxID: nobody})
	switch {
	case status.Code(err) == codes.NotFound:
		return nil
	case err == nil:
		return errors.New("a pod that does not exist has a status")
	}
	return err
}

// goroutines returns the stacks of all goroutines, as far as a megabyte goes.
func goroutines() string {
	stacks := make([]byte, 1<<20)
	return string(stacks[:runtime.Stack(stacks, true)])
}
