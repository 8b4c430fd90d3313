package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	"kuasar.io/kuasar/sandboxer/controller"
	"kuasar.io/kuasar/sandboxer/metrics"
	"kuasar.io/kuasar/sandboxer/pod"
)

// recorder is a service manager that keeps what it is told.
type recorder struct {
	mu       sync.Mutex
	messages []string
}

func (r *recorder) send(message string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.messages = append(r.messages, message)
	return nil
}

// take returns what was told since the last call.
func (r *recorder) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.messages
	r.messages = nil
	return m
}

func (r *recorder) want(t *testing.T, want ...string) {
	t.Helper()
	if got := r.take(); !slices.Equal(got, want) {
		t.Errorf("the service manager was told %q, want %q", got, want)
	}
}

func newRecorded(log io.Writer) (*service, *recorder) {
	r := new(recorder)
	return &service{log: slog.New(slog.NewTextHandler(log, nil)), send: r.send}, r
}

func TestNotifySocket(t *testing.T) {
	path := filepath.Join(shortDir(t), "n")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "3000000")
	t.Setenv("WATCHDOG_PID", fmt.Sprint(os.Getpid()))
	s := newService(slog.New(slog.DiscardHandler))
	if s.watchdog != 3*time.Second {
		t.Errorf("the watchdog waits %v", s.watchdog)
	}
	s.setPods("3 pods")
	s.ready()
	s.stopping()
	for _, want := range []string{"STATUS=3 pods", "READY=1", "STOPPING=1"} {
		buf := make([]byte, 4096)
		n, err := l.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(buf[:n]); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestNoServiceManager(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	t.Setenv("WATCHDOG_USEC", "")
	var log bytes.Buffer
	s := newService(slog.New(slog.NewTextHandler(&log, nil)))
	s.ready()
	s.setPods("0 pods")
	s.watch(t.Context(), func(context.Context) error { t.Error("watched"); return nil })
	if log.Len() > 0 {
		t.Errorf("log: %s", &log)
	}
}

func TestStatusText(t *testing.T) {
	s, told := newRecorded(io.Discard)
	s.setPods("1 pod")
	s.setPods("1 pod")
	s.setNote("beware")
	s.setPods("2 pods")
	s.setNote("")
	told.want(t, "STATUS=1 pod", "STATUS=1 pod; beware", "STATUS=2 pods; beware", "STATUS=2 pods")
}

func TestFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, told := newRecorded(io.Discard)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var count atomic.Int32
		go s.follow(ctx, func() int { return int(count.Load()) })
		for _, n := range []int32{0, 1, 2, 2, 0} {
			count.Store(n)
			time.Sleep(2 * tellInterval)
			synctest.Wait()
		}
		told.want(t, "STATUS=0 pods", "STATUS=1 pod", "STATUS=2 pods", "STATUS=0 pods")
	})
}

func TestRecoveryProgress(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a", "b", "c", ".tmp"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		s, told := newRecorded(io.Discard)
		registry := new(metrics.Registry)
		r := s.recovery(dir, registry)
		const extend = "EXTEND_TIMEOUT_USEC=90000000"
		told.want(t, extend, "STATUS=taking over pods: 0 of 3")
		r.Recovered("adopted")
		told.want(t) // too soon
		time.Sleep(tellInterval)
		r.Recovered("adopted")
		told.want(t, extend, "STATUS=taking over pods: 2 of 3")
		r.Recovered("cleaned")
		told.want(t, extend, "STATUS=taking over pods: 3 of 3")
		var counted strings.Builder
		if _, err := registry.WriteTo(&counted); err != nil || !strings.Contains(counted.String(), `"adopted"} 2`) {
			t.Errorf("the registry has %s (%v)", counted.String(), err)
		}
	})
	s, told := newRecorded(io.Discard)
	s.recovery(t.TempDir(), new(metrics.Registry))
	told.want(t)
}

func TestWatchdog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log syncBuffer
		s, told := newRecorded(&log)
		s.watchdog = 40 * time.Second
		ctx, cancel := context.WithCancel(t.Context())
		// A lock, held while the daemon hangs. The bubble's clock stands still for a mutex.
		state := make(chan struct{}, 1)
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.watch(ctx, func(context.Context) error {
				state <- struct{}{}
				<-state
				return nil
			})
		}()
		synctest.Wait()
		told.want(t, "WATCHDOG=1")
		time.Sleep(10 * time.Second)
		synctest.Wait()
		told.want(t, "WATCHDOG=1")

		state <- struct{}{}
		time.Sleep(25 * time.Second)
		told.want(t)
		if text := log.String(); !strings.Contains(text, "does not answer itself") || strings.Contains(text, "about to end") {
			t.Errorf("log after the first attempt: %s", text)
		}
		// Before the end, 40 s after the last sign of life.
		time.Sleep(14 * time.Second)
		told.want(t)
		if text := log.String(); !strings.Contains(text, "about to end") || !strings.Contains(text, "TestWatchdog") {
			t.Errorf("log before the end: %s", text)
		}
		<-state
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if got := told.take(); len(got) == 0 || got[0] != "WATCHDOG=1" {
			t.Errorf("after it answers again: %q", got)
		}
		if !strings.Contains(log.String(), "answers itself again") {
			t.Errorf("log: %s", log.String())
		}
		cancel()
		<-done
	})
}

// syncBuffer is a bytes.Buffer for several goroutines.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// lockedPods has no pods, behind a lock as the manager has one.
type lockedPods struct {
	controller.Pods
	mu sync.Mutex
}

func (p *lockedPods) Status(id string) (pod.Status, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return pod.Status{}, fmt.Errorf("no pod %s: %w", id, errdefs.ErrNotFound)
}

func (p *lockedPods) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return 0
}

func TestLiveness(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	pods := new(lockedPods)
	alive := liveness(path, pods.count)
	if err := alive(t.Context()); err == nil || !strings.Contains(err.Error(), "the server on "+path) {
		t.Errorf("nobody serves: %v", err)
	}
	l, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	server := controller.NewServer(controller.New(pods, slog.New(slog.DiscardHandler)))
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	defer func() {
		server.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	if err := alive(t.Context()); err != nil {
		t.Error(err)
	}
	pods.mu.Lock()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := alive(ctx); err == nil || !strings.Contains(err.Error(), "lock") {
		t.Errorf("the lock is held: %v", err)
	}
	pods.mu.Unlock()
	if err := alive(t.Context()); err != nil {
		t.Errorf("the lock is free again: %v", err)
	}
}

func TestReload(t *testing.T) {
	dir := shortDir(t)
	path := filepath.Join(dir, "config.toml")
	for name, content := range map[string]string{
		"kernel": "k", "initrd": "i", "hypervisor": "#!/bin/sh\necho QEMU emulator version 7.2.0\n", "other": "#!/bin/sh\necho StratoVirt 2.4.0\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write := func(level string, more ...string) {
		t.Helper()
		text := fmt.Sprintf("[sandbox]\nlog_level = %q\n[hypervisor]\npath = \"%[2]s/hypervisor\"\nkernel_path = \"%[2]s/kernel\"\ninitrd_path = \"%[2]s/initrd\"\n%s\n",
			level, dir, strings.Join(more, "\n"))
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("info")
	s := settings{config: path}
	cfg, configured, err := load(s)
	if err != nil {
		t.Fatal(err)
	}
	var log syncBuffer
	level := new(slog.LevelVar)
	level.Set(configured)
	service, told := newRecorded(io.Discard)
	service.setPods("1 pod")
	told.take()
	r := &reloader{settings: s, running: cfg, level: level, service: service,
		log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: level}))}

	reload := func(wantLevel slog.Level, wantTold []string, wantLog ...string) {
		t.Helper()
		before := len(log.String())
		r.reload()
		if level.Level() != wantLevel {
			t.Errorf("the level is %v, want %v", level.Level(), wantLevel)
		}
		got := told.take()
		if len(got) < 2 || !strings.HasPrefix(got[0], "RELOADING=1\nMONOTONIC_USEC=") || got[len(got)-1] != "READY=1" || !slices.Equal(got[1:len(got)-1], wantTold) {
			t.Errorf("the service manager was told %q, want %q between RELOADING and READY", got, wantTold)
		}
		for _, w := range wantLog {
			if !strings.Contains(log.String()[before:], w) {
				t.Errorf("the log has no %q: %s", w, log.String()[before:])
			}
		}
	}
	write("debug")
	reload(slog.LevelDebug, nil, "log_level=debug was=info")
	write("error")
	reload(slog.LevelError, nil, "log_level=error was=debug")
	write("debug", "vcpus = 2", "memory_in_mb = 512")
	reload(slog.LevelDebug, []string{"STATUS=1 pod; changed configuration waits for a restart"}, `keys="hypervisor.memory_in_mb, hypervisor.vcpus"`)
	write("info", "vcpus = 2000")
	refused := []string{"STATUS=1 pod; the changed configuration is refused, see the log"}
	reload(slog.LevelDebug, refused, "level=ERROR", "vcpus")
	write("info", "no such thing")
	reload(slog.LevelDebug, nil, "level=ERROR")
	write("info")
	reload(slog.LevelInfo, []string{"STATUS=1 pod"}, "log_level=info")
	r.settings.logLevel = "warn"
	level.Set(slog.LevelWarn)
	write("debug")
	reload(slog.LevelWarn, nil)

	var out, errs bytes.Buffer
	args := []string{"--config", path, "--check"}
	if err := run(t.Context(), args, &out, &errs); err != nil || !strings.Contains(out.String(), path) {
		t.Errorf("--check: %v, %q, %q", err, out.String(), errs.String())
	}
	for _, bad := range []string{`kernel_params = "task.sharefs_type=nfs"`, `virtiofsd_conf.path = "/nonexistent/virtiofsd"`, "vcpu = 1"} {
		write("info", bad)
		if err := run(t.Context(), args, io.Discard, io.Discard); err == nil {
			t.Errorf("--check accepts %s", bad)
		}
	}
	if err := os.Rename(filepath.Join(dir, "other"), filepath.Join(dir, "hypervisor")); err != nil {
		t.Fatal(err)
	}
	write("info")
	if err := run(t.Context(), args, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), "StratoVirt 2.4.0") {
		t.Errorf("--check of another hypervisor: %v", err)
	}
	if err := run(t.Context(), append(args, "--log-level", "loud"), io.Discard, io.Discard); err == nil {
		t.Error("--check accepts the log level loud")
	}
}

func TestReloadSignal(t *testing.T) {
	service, told := newRecorded(io.Discard)
	answered := make(chan struct{}, 2)
	record := service.send
	service.send = func(message string) error {
		defer func() { answered <- struct{}{} }()
		return record(message)
	}
	r := &reloader{settings: settings{config: "/nonexistent"}, level: new(slog.LevelVar), service: service, log: slog.New(slog.DiscardHandler)}
	signals := make(chan os.Signal, 1)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); r.run(ctx, signals) }()
	signals <- syscall.SIGHUP
	for range 3 {
		<-answered
	}
	cancel()
	<-done
	if got := told.take(); len(got) != 3 || got[2] != "READY=1" {
		t.Errorf("told %q", got)
	}
}

var errSend = errors.New("no such socket")

func TestNotifyFails(t *testing.T) {
	var log bytes.Buffer
	s := &service{log: slog.New(slog.NewTextHandler(&log, nil)), send: func(string) error { return errSend }}
	s.ready()
	if !strings.Contains(log.String(), errSend.Error()) {
		t.Errorf("log: %s", &log)
	}
}
