package pod

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/guest/protocol"
)

const ownNetNS = "/proc/self/ns/net"

func testOptions(t *testing.T, w *world) Options {
	dir, err := os.MkdirTemp("/tmp", "pod")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return Options{
		Dir: dir, BootID: "this boot", Runtime: w.runtime(),
		Kernel: "/k", Initrd: "/i", KernelParams: "task.log_level=debug task.sharefs_type=9p",
		Size: Size{VCPUs: 1, MemoryMiB: 256}, Boots: 2, Debug: true,
		BootLimit: 3 * time.Second, AdoptLimit: 300 * time.Millisecond, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
}

func testConfig() *cri.PodSandboxConfig {
	return &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: "busybox-sandbox", Namespace: "default"},
		Hostname: "box",
		DnsConfig: &cri.DNSConfig{
			Servers: []string{"10.0.0.10", "10.0.0.11"}, Searches: []string{"a.local", "b.local"}, Options: []string{"ndots:5"},
		},
		Linux: &cri.LinuxPodSandboxConfig{Sysctls: map[string]string{"net.core.somaxconn": "64"}},
	}
}

func mustCreate(t *testing.T, m *Manager, id string) {
	t.Helper()
	if err := m.Create(t.Context(), CreateRequest{ID: id, NetNS: ownNetNS, Config: testConfig()}); err != nil {
		t.Fatal(err)
	}
}

func mustStart(t *testing.T, m *Manager, id string) Status {
	t.Helper()
	mustCreate(t, m, id)
	s, err := m.Start(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func checkNothingLeft(t *testing.T, w *world, dir string) {
	t.Helper()
	if left := w.left(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		t.Errorf("left behind in %s: %s", dir, e.Name())
	}
}

// eventually polls, because the thing waited for is somebody else's goroutine.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

func TestLife(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	m := NewManager(o)
	s := mustStart(t, m, "a")
	if s.State != Ready || s.PID != os.Getpid() || s.Version != 3 || s.CreatedAt.IsZero() ||
		s.Address != "ttrpc+unix://"+o.Dir+"/a/task.sock" {
		t.Errorf("status after Start: %+v", s)
	}
	if _, err := m.Start(t.Context(), "a"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("second Start: %v", err)
	}
	// What the machine and the guest were given.
	if want := []string{"task.log_level=debug", "task.sharefs_type=virtiofs", "task.debug"}; !slices.Equal(w.spec.KernelParams, want) {
		t.Errorf("kernel parameters %q, want %q", w.spec.KernelParams, want)
	}
	if w.spec.Share.Socket != o.Dir+"/a/virtiofsd.sock" || w.spec.CgroupProcs[0] != "/cgroup/a" || len(w.spec.NICs) != 1 {
		t.Errorf("spec %+v", w.spec)
	}
	if got, want := string(w.setup.ResolvConf), "search a.local b.local\nnameserver 10.0.0.10\nnameserver 10.0.0.11\noptions ndots:5\n"; got != want {
		t.Errorf("resolv.conf %q, want %q", got, want)
	}
	if h := string(w.setup.Hosts); !strings.Contains(h, "\n10.1.2.3\tbox\nfd00::3\tbox\n") || !strings.HasPrefix(h, "127.0.0.1\tlocalhost\n") {
		t.Errorf("hosts %q", h)
	}
	if w.setup.Hostname != "box" || w.setup.Sysctls["net.core.somaxconn"] != "64" || len(w.setup.Entropy) != 64 ||
		!w.setup.SharedPidNamespace || time.Since(time.Unix(0, w.setup.UnixNanos)) > time.Minute {
		t.Errorf("setup %+v", w.setup)
	}
	// The task socket and the debug console are there and private.
	if got := dialLine(t, o.Dir+"/a/task.sock", ""); got != "hello from a\n" {
		t.Errorf("the task socket says %q", got)
	}
	if got := dialLine(t, o.Dir+"/a/debug.sock", "echo\n"); got != "echo\n" {
		t.Errorf("the debug socket says %q", got)
	}
	for path, want := range map[string]os.FileMode{"a": os.ModeDir | 0o700, "a/task.sock": os.ModeSocket | 0o600, "a/debug.sock": os.ModeSocket | 0o600} {
		if info, err := os.Stat(filepath.Join(o.Dir, path)); err != nil || info.Mode() != want {
			t.Errorf("%s has mode %v, want %v (%v)", path, info.Mode(), want, err)
		}
	}
	// Metrics, clock and events.
	if msg, err := m.Metrics("a"); err != nil || msg == nil {
		t.Errorf("metrics: %v, %v", msg, err)
	}
	m.setClocks(t.Context())
	if w.clocks != 1 {
		t.Errorf("the clock was set %d times", w.clocks)
	}
	w.events <- &protocol.Event{Event: &protocol.Event_OomContainerId{OomContainerId: "c1"}}
	c := w.get("containers", "a").(*fakeContainers)
	eventually(t, "the OOM kill is reported", func() bool { _, ooms := c.seen(); return slices.Equal(ooms, []string{"c1"}) })

	waited := make(chan Status, 1)
	go func() {
		s, err := m.Wait(context.Background(), "a")
		if err != nil {
			t.Error(err)
		}
		waited <- s
	}()
	for range 2 {
		if err := m.Stop(t.Context(), "a", 0); err != nil {
			t.Fatal(err)
		}
	}
	if s := <-waited; s.ExitStatus != 0 || s.ExitedAt.IsZero() || s.State != Stopped {
		t.Errorf("wait: %+v", s)
	}
	want := []string{"link", "hypervisor", "guest gone", "virtiofsd", "share", "network", "cgroup"}
	if got := w.undone(); !slices.Equal(got, want) {
		t.Errorf("undone in the order %q, want %q", got, want)
	}
	// A stopped pod is still known, with its task socket.
	if s, err := m.Status("a"); err != nil || s.State != Stopped || s.Address == "" || s.PID != 0 {
		t.Errorf("status after Stop: %+v, %v", s, err)
	}
	if _, err := m.Metrics("a"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("metrics of a stopped pod: %v", err)
	}
	if got := dialLine(t, o.Dir+"/a/task.sock", ""); got != "hello from a\n" {
		t.Errorf("the task socket says %q", got)
	}
	for range 2 {
		if err := m.Shutdown(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := m.Status("a"); !errdefs.IsNotFound(err) {
		t.Errorf("status after Shutdown: %v", err)
	}
	if _, err := m.Wait(t.Context(), "a"); !errdefs.IsNotFound(err) {
		t.Errorf("wait after Shutdown: %v", err)
	}
	checkNothingLeft(t, w, o.Dir)
}

func dialLine(t *testing.T, path, send string) string {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if send != "" {
		if _, err := io.WriteString(c, send); err != nil {
			t.Fatal(err)
		}
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return line
}

func TestShutdownWithoutStop(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	m := NewManager(o)
	mustStart(t, m, "a")
	if err := m.Shutdown(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	checkNothingLeft(t, w, o.Dir)
	// The id is free again.
	mustStart(t, m, "a")
	if err := m.Shutdown(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
}

func TestStopAsksTheGuest(t *testing.T) {
	w := newWorld(t)
	w.powerOff = make(chan struct{})
	m := NewManager(testOptions(t, w))
	mustStart(t, m, "a")
	c := w.get("containers", "a").(*fakeContainers)
	c.mu.Lock()
	c.n = 1
	c.mu.Unlock()
	if err := m.Stop(t.Context(), "a", time.Second); err != nil {
		t.Fatal(err)
	}
	select {
	case <-w.powerOff:
	default:
		t.Error("the guest was not asked to power off")
	}
	if s, _ := m.Status("a"); s.ExitStatus != 0 || s.Reason != "" {
		t.Errorf("a stop that was asked for looks like a crash: %+v", s)
	}
}

func TestEachStageFailing(t *testing.T) {
	broken := errors.New("it broke")
	for _, c := range []struct {
		fail, stage string
		console     bool
	}{
		{"make cgroup", StageCgroup, false},
		{"make network", StageNetwork, false},
		{"make share", StageShare, false},
		{"make virtiofsd", StageShare, false},
		{"create machine", StageHypervisor, false},
		{"make hypervisor", StageHypervisor, true},
		{"live", StageHypervisor, true},
		{"open link", StageHello, true},
		{"setup", StageSetup, true},
		{"make containers", StageTask, true},
	} {
		t.Run(c.fail, func(t *testing.T) {
			w := newWorld(t)
			w.fail[c.fail] = broken
			o := testOptions(t, w)
			m := NewManager(o)
			mustCreate(t, m, "a")
			_, err := m.Start(t.Context(), "a")
			var boot *BootError
			if !errors.As(err, &boot) || boot.Stage != c.stage {
				t.Fatalf("error %v, want one of stage %q", err, c.stage)
			}
			if !strings.Contains(err.Error(), broken.Error()) {
				t.Errorf("the error does not say why: %v", err)
			}
			if got := strings.Contains(err.Error(), "one | two | last words"); got != c.console {
				t.Errorf("console lines in the error: %v, want %v: %v", got, c.console, err)
			}
			checkNothingLeft(t, w, o.Dir)
			order := []string{"containers", "link", "hypervisor", "virtiofsd", "share", "network", "cgroup"}
			undone := w.undone()
			if !slices.IsSortedFunc(undone, func(a, b string) int { return slices.Index(order, a) - slices.Index(order, b) }) {
				t.Errorf("undone in the order %q", undone)
			}
			if _, err := m.Status("a"); !errdefs.IsNotFound(err) {
				t.Errorf("the pod is still known: %v", err)
			}
			// And it can be tried again.
			w.setFailure(c.fail, nil)
			mustStart(t, m, "a")
		})
	}
}

func TestAgentSilent(t *testing.T) {
	w := newWorld(t)
	w.noHello = true
	o := testOptions(t, w)
	o.BootLimit = 300 * time.Millisecond
	m := NewManager(o)
	mustCreate(t, m, "a")
	_, err := m.Start(t.Context(), "a")
	var boot *BootError
	if !errors.As(err, &boot) || boot.Stage != StageHello || !strings.Contains(err.Error(), "no answer within") {
		t.Errorf("error %v", err)
	}
	checkNothingLeft(t, w, o.Dir)
}

func TestKernelPanic(t *testing.T) {
	w := newWorld(t)
	w.noHello, w.panicMsg = true, "Kernel panic - not syncing: No working init found."
	o := testOptions(t, w)
	m := NewManager(o)
	mustCreate(t, m, "a")
	_, err := m.Start(t.Context(), "a")
	var boot *BootError
	if !errors.As(err, &boot) || boot.Stage != StageHello || !strings.Contains(err.Error(), "No working init found") {
		t.Errorf("error %v", err)
	}
	checkNothingLeft(t, w, o.Dir)
}

func TestShareLostDuringBoot(t *testing.T) {
	for name, c := range map[string]struct {
		machine bool
		want    string
	}{
		"alone":            {false, errShareLost.Error()},
		"with the machine": {true, "killed by SIGKILL"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.noHello = true
			o := testOptions(t, w)
			o.BootLimit = time.Minute
			m := NewManager(o)
			mustCreate(t, m, "a")
			m.afterStage = func(_, stage string) {
				if stage == StageHypervisor {
					close(w.virtiofsd().exited)
					if c.machine {
						w.machine("a").end(137, "killed by SIGKILL")
					}
				}
			}
			if _, err := m.Start(t.Context(), "a"); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
			checkNothingLeft(t, w, o.Dir)
		})
	}
}

func TestCallerLeavesDuringBoot(t *testing.T) {
	w := newWorld(t)
	w.noHello = true
	o := testOptions(t, w)
	o.BootLimit = time.Minute
	m := NewManager(o)
	mustCreate(t, m, "a")
	ctx, cancel := context.WithCancel(t.Context())
	m.afterStage = func(_, stage string) {
		if stage == StageHypervisor {
			cancel()
		}
	}
	if _, err := m.Start(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	checkNothingLeft(t, w, o.Dir)
}

func TestStopDuringBoot(t *testing.T) {
	for name, end := range map[string]func(*Manager) error{
		"Stop":     func(m *Manager) error { return m.Stop(context.Background(), "a", 0) },
		"Shutdown": func(m *Manager) error { return m.Shutdown(context.Background(), "a") },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.noHello = true
			o := testOptions(t, w)
			o.BootLimit = time.Minute
			m := NewManager(o)
			mustCreate(t, m, "a")
			ended := make(chan error, 1)
			m.afterStage = func(_, stage string) {
				if stage == StageHypervisor {
					go func() { ended <- end(m) }()
				}
			}
			if _, err := m.Start(t.Context(), "a"); err == nil || !strings.Contains(err.Error(), "the pod was") {
				t.Errorf("error %v", err)
			}
			if err := <-ended; err != nil {
				t.Error(err)
			}
			checkNothingLeft(t, w, o.Dir)
		})
	}
}

func TestBootsTakeTurns(t *testing.T) {
	w := newWorld(t)
	w.noHello = true
	o := testOptions(t, w)
	o.Boots, o.BootLimit = 1, time.Minute
	m := NewManager(o)
	mustCreate(t, m, "a")
	mustCreate2 := func(id, netns string) {
		if err := m.Create(t.Context(), CreateRequest{ID: id, NetNS: netns}); err != nil {
			t.Fatal(err)
		}
	}
	mustCreate2("b", fmt.Sprintf("/proc/%d/ns/net", os.Getpid()))
	booting := make(chan struct{})
	second, leave := context.WithCancel(t.Context())
	m.afterStage = func(id, stage string) {
		if id == "a" && stage == StageHypervisor {
			close(booting)
		}
		if id == "b" && stage == StageShare {
			leave()
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() {
		_, err := m.Start(ctx, "a")
		first <- err
	}()
	<-booting
	// The second one waits for its turn as long as its caller does.
	_, err := m.Start(second, "b")
	var boot *BootError
	if !errors.As(err, &boot) || boot.Stage != StageSlot || !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	cancel()
	<-first
	checkNothingLeft(t, w, o.Dir)
}

func TestMachineEnds(t *testing.T) {
	for name, c := range map[string]struct {
		end    func(w *world)
		reason string
	}{
		"crash":       {func(w *world) { w.machine("a").end(1, "qemu: internal error") }, "qemu: internal error"},
		"link breaks": {func(w *world) { close(w.get("link", "a").(*fakeLink).broken) }, "connection"},
		// The link itself notices nothing, as over vsock.
		"agent ends": {func(w *world) {
			l := w.get("link", "a").(*fakeLink)
			w.mu.Lock()
			defer w.mu.Unlock()
			l.calls.Close()
		}, "the connection for calls to the agent was lost"},
		"virtiofsd": {func(w *world) { close(w.virtiofsd().exited) }, "file system daemon"},
		"bad event": {func(w *world) {
			w.events <- &protocol.Event{Event: &protocol.Event_OomContainerId{OomContainerId: "../x"}}
		}, "impossible id"},
		"guest misbehaves": {func(w *world) {
			w.get("containers", "a").(*fakeContainers).c.Fail(errors.New("an over-long frame"))
		}, "an over-long frame"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			o := testOptions(t, w)
			m := NewManager(o)
			mustStart(t, m, "a")
			containers := w.get("containers", "a").(*fakeContainers)
			c.end(w)
			s, err := m.Wait(t.Context(), "a")
			if err != nil {
				t.Fatal(err)
			}
			if s.State != Stopped || s.ExitStatus != 137 || !strings.Contains(s.Reason, c.reason) || s.ExitedAt.IsZero() {
				t.Errorf("status %+v", s)
			}
			if gone, _ := containers.seen(); gone.IsZero() {
				t.Error("the containers were not told")
			}
			// Only the record is left.
			if left := w.left(); !slices.Equal(left, []string{"containers a"}) {
				t.Errorf("left: %v", left)
			}
			if err := m.Shutdown(t.Context(), "a"); err != nil {
				t.Fatal(err)
			}
			checkNothingLeft(t, w, o.Dir)
		})
	}
}

func (w *world) virtiofsd() *fakeVirtiofsd {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, v := range w.exists {
		if d, ok := v.(*fakeVirtiofsd); ok {
			return d
		}
	}
	return nil
}

func TestTeardownIsTriedAgain(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	m := NewManager(o)
	mustStart(t, m, "a")
	busy := errors.New("device or resource busy")
	w.setFailure("remove cgroup", busy)
	if err := m.Stop(t.Context(), "a", 0); !errors.Is(err, busy) {
		t.Errorf("stop: %v", err)
	}
	if err := m.Shutdown(t.Context(), "a"); !errors.Is(err, busy) {
		t.Errorf("shutdown: %v", err)
	}
	// The last trace of what could not be killed stays, and so does the pod.
	if _, err := os.Stat(o.Dir + "/a/sandbox.json"); err != nil {
		t.Error(err)
	}
	if s, err := m.Status("a"); err != nil || s.State != Stopping {
		t.Errorf("status %+v, %v", s, err)
	}
	w.setFailure("remove cgroup", nil)
	if err := m.Shutdown(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	checkNothingLeft(t, w, o.Dir)
}

func TestFailedBootThatCannotBeUndone(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	m := NewManager(o)
	w.fail["setup"] = errors.New("no")
	w.fail["remove cgroup"] = errors.New("busy")
	mustCreate(t, m, "a")
	if _, err := m.Start(t.Context(), "a"); err == nil {
		t.Fatal("no error")
	}
	if _, err := os.Stat(o.Dir + "/a/sandbox.json"); err != nil {
		t.Error(err)
	}
	m.sweep(t.Context(), time.Now())
	if _, err := m.Status("a"); err != nil {
		t.Error("forgotten although it is there")
	}
	w.setFailure("remove cgroup", nil)
	m.sweep(t.Context(), time.Now())
	checkNothingLeft(t, w, o.Dir)
}

func TestCreatedAndNeverStarted(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	m := NewManager(o)
	mustCreate(t, m, "a")
	m.sweep(t.Context(), time.Now().Add(4*time.Minute))
	if s, err := m.Status("a"); err != nil || s.State != Created || s.Address != "" {
		t.Fatalf("removed too early: %+v, %v", s, err)
	}
	m.sweep(t.Context(), time.Now().Add(6*time.Minute))
	checkNothingLeft(t, w, o.Dir)
	if _, err := m.Start(t.Context(), "a"); !errdefs.IsNotFound(err) {
		t.Errorf("start: %v", err)
	}
	// A pod that runs is not swept away.
	mustStart(t, m, "b")
	m.sweep(t.Context(), time.Now().Add(time.Hour))
	if s, err := m.Status("b"); err != nil || s.State != Ready {
		t.Errorf("status %+v, %v", s, err)
	}
}

func TestStopOfCreated(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	m := NewManager(o)
	mustCreate(t, m, "a")
	if err := m.Stop(t.Context(), "a", 0); err != nil {
		t.Fatal(err)
	}
	if s, err := m.Wait(t.Context(), "a"); err != nil || s.ExitedAt.IsZero() {
		t.Errorf("wait: %+v, %v", s, err)
	}
	if _, err := m.Start(t.Context(), "a"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("start: %v", err)
	}
	if err := m.Shutdown(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	checkNothingLeft(t, w, o.Dir)
}

func TestCreateRefuses(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	m := NewManager(o)
	mustCreate(t, m, "there")
	node := func(f func(*cri.NamespaceOption)) *cri.PodSandboxConfig {
		n := &cri.NamespaceOption{}
		f(n)
		return &cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: n}}}
	}
	for name, c := range map[string]struct {
		req   CreateRequest
		class func(error) bool
		text  string
	}{
		"empty id":      {CreateRequest{NetNS: ownNetNS}, errdefs.IsInvalidArgument, "empty"},
		"slash":         {CreateRequest{ID: "a/b", NetNS: ownNetNS}, errdefs.IsInvalidArgument, `'/' at position 1`},
		"parent":        {CreateRequest{ID: "..", NetNS: ownNetNS}, errdefs.IsInvalidArgument, `'.' at position 0`},
		"300":           {CreateRequest{ID: strings.Repeat("a", 300), NetNS: ownNetNS}, errdefs.IsInvalidArgument, "300"},
		"newline":       {CreateRequest{ID: "a\n", NetNS: ownNetNS}, errdefs.IsInvalidArgument, "position 1"},
		"socket path":   {CreateRequest{ID: strings.Repeat("a", 120), NetNS: ownNetNS}, errdefs.IsInvalidArgument, "sockets"},
		"duplicate":     {CreateRequest{ID: "there", NetNS: ownNetNS}, errdefs.IsAlreadyExists, "there"},
		"no netns":      {CreateRequest{ID: "a"}, errdefs.IsInvalidArgument, "netns_path"},
		"netns gone":    {CreateRequest{ID: "a", NetNS: "/run/netns/never-was"}, errdefs.IsFailedPrecondition, "/run/netns/never-was"},
		"netns is file": {CreateRequest{ID: "a", NetNS: o.Dir}, errdefs.IsFailedPrecondition, "not a namespace"},
		"host network": {CreateRequest{ID: "a", Config: node(func(n *cri.NamespaceOption) { n.Network = cri.NamespaceMode_NODE })},
			errdefs.IsFailedPrecondition, "hostNetwork"},
		"host pid": {CreateRequest{ID: "a", NetNS: ownNetNS, Config: node(func(n *cri.NamespaceOption) { n.Pid = cri.NamespaceMode_NODE })},
			errdefs.IsFailedPrecondition, "hostPID"},
		"host ipc": {CreateRequest{ID: "a", NetNS: ownNetNS, Config: node(func(n *cri.NamespaceOption) { n.Ipc = cri.NamespaceMode_NODE })},
			errdefs.IsFailedPrecondition, "hostIPC"},
		"hostname": {CreateRequest{ID: "a", NetNS: ownNetNS, Config: &cri.PodSandboxConfig{Hostname: "a\nb"}}, errdefs.IsInvalidArgument, "hostname"},
		"dns": {CreateRequest{ID: "a", NetNS: ownNetNS, Config: &cri.PodSandboxConfig{DnsConfig: &cri.DNSConfig{Servers: []string{"1.1.1.1\noptions x"}}}},
			errdefs.IsInvalidArgument, "dns_config.servers"},
		"huge": {CreateRequest{ID: "a", NetNS: ownNetNS, Config: &cri.PodSandboxConfig{Annotations: map[string]string{"a": strings.Repeat("x", 1<<20)}}},
			errdefs.IsInvalidArgument, "1 MiB"},
	} {
		t.Run(name, func(t *testing.T) {
			err := m.Create(t.Context(), c.req)
			if !c.class(err) || !strings.Contains(err.Error(), c.text) || len(err.Error()) > 1000 {
				t.Errorf("error %v, want %q in it", err, c.text)
			}
		})
	}
	if err := m.Shutdown(t.Context(), "there"); err != nil {
		t.Fatal(err)
	}
	checkNothingLeft(t, w, o.Dir)
}

func TestUnknownPods(t *testing.T) {
	m := NewManager(testOptions(t, newWorld(t)))
	if err := m.Stop(t.Context(), "x", 0); err != nil {
		t.Error(err)
	}
	if err := m.Shutdown(t.Context(), "x"); err != nil {
		t.Error(err)
	}
	_, start := m.Start(t.Context(), "x")
	_, status := m.Status("x")
	_, wait := m.Wait(t.Context(), "x")
	_, metrics := m.Metrics("x")
	for _, err := range []error{start, status, wait, metrics} {
		if !errdefs.IsNotFound(err) {
			t.Error(err)
		}
	}
}

func TestDiskFull(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	m := NewManager(o)
	whole := writeFile
	t.Cleanup(func() { writeFile = whole })
	full := func(string, []byte) error {
		return &os.PathError{Op: "write", Path: "sandbox.json", Err: syscall.ENOSPC}
	}

	writeFile = full
	err := m.Create(t.Context(), CreateRequest{ID: "a", NetNS: ownNetNS})
	if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), StageDirectory) {
		t.Errorf("create: %v", err)
	}
	checkNothingLeft(t, w, o.Dir)

	// Full at every later write: the pod does not start, and nothing stays.
	for n := 1; ; n++ {
		writeFile = whole
		mustCreate(t, m, "a")
		left := n
		writeFile = func(dir string, b []byte) error {
			if left--; left < 0 {
				return full(dir, b)
			}
			return whole(dir, b)
		}
		_, err = m.Start(t.Context(), "a")
		if err == nil {
			if n < 8 {
				t.Errorf("started with %d writes", n)
			}
			break
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("after %d writes: %v", n, err)
		}
		checkNothingLeft(t, w, o.Dir)
	}
	// A pod that runs goes on, and can be removed.
	writeFile = full
	p := m.find("a")
	p.journalContainers(json.RawMessage(`[]`))
	if s, _ := m.Status("a"); s.State != Ready {
		t.Errorf("status %+v", s)
	}
	if err := m.Shutdown(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	checkNothingLeft(t, w, o.Dir)
}

func TestPlain(t *testing.T) {
	for in, want := range map[string]string{
		"a\x1b[1;31mb\x1b[0mc\r":  "abc",
		"\x1b]0;title\x07x\ty":    "0;titlex y",
		"\xff\xfeok":              "ok",
		"\x1b":                    "",
		"\x1b[":                   "",
		strings.Repeat("a", 1000): strings.Repeat("a", tailWidth),
	} {
		if got := plain(in); got != want {
			t.Errorf("plain(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestUndoList(t *testing.T) {
	var u undoList
	var order []string
	step := func(name string, tr tier, err *error) undoStep {
		return undoStep{name: name, tier: tr, fn: func(context.Context) error {
			order = append(order, name)
			if err != nil {
				return *err
			}
			return nil
		}}
	}
	busy := errors.New("busy")
	last := step("dir", recordTier, nil)
	last.last = true
	for _, s := range []undoStep{last, step("cgroup", machineTier, &busy), step("vm", machineTier, nil), step("task", recordTier, nil)} {
		if err := u.add(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	if err := u.run(t.Context(), machineTier); !errors.Is(err, busy) || !strings.Contains(err.Error(), "cgroup") {
		t.Errorf("error %v", err)
	}
	// Too late: undone at once, in spite of a cancelled context.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := u.add(ctx, step("late", machineTier, nil)); err != nil {
		t.Error(err)
	}
	if err := u.run(ctx, recordTier); !errors.Is(err, busy) {
		t.Errorf("error %v", err)
	}
	busy2 := busy
	busy = nil
	if err := u.run(ctx, recordTier); err != nil {
		t.Errorf("error %v after %v", err, busy2)
	}
	want := []string{"vm", "cgroup", "late", "task", "cgroup", "cgroup", "dir"}
	if !slices.Equal(order, want) {
		t.Errorf("order %q, want %q", order, want)
	}
}
