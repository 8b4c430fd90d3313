package pod

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// netns names the one network namespace of the test in as many ways as there are pods.
func netns(n int) string { return "/proc/self/ns" + strings.Repeat("/", n+1) + "net" }

func startMany(t *testing.T, m *Manager, n int) (ids []string) {
	t.Helper()
	for i := range n {
		id := fmt.Sprintf("p%03d", i)
		if err := m.Create(t.Context(), CreateRequest{ID: id, NetNS: netns(i), Config: testConfig()}); err != nil {
			t.Fatal(err)
		}
		if _, err := m.Start(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	return ids
}

func TestManyPods(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	o.AdoptLimit, o.RecoverLimit = time.Hour, time.Hour
	const pods, atOnce = 100, 32
	ids := startMany(t, NewManager(o), pods)
	w.dropDaemon()

	var now, most atomic.Int64
	answer := make(chan struct{})
	w.calls = func(ctx context.Context, _ string) error {
		n := now.Add(1)
		defer now.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		select {
		case <-answer:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	m := NewManager(o)
	m.slotLimit = time.Hour
	recovered := make(chan error, 1)
	go func() { recovered <- m.Recover(t.Context()) }()
	// Nobody is answered before as many are called as may be, and all others wait for their turn.
	eventually(t, "as many are recovered as may be at once", func() bool { return now.Load() == atOnce })
	eventually(t, "all others wait", func() bool {
		buf := make([]byte, 8<<20)
		buf = buf[:runtime.Stack(buf, true)]
		waiting := 0
		for stack := range strings.SplitSeq(string(buf), "\n\n") {
			head, frames, _ := strings.Cut(stack, "\n")
			if strings.Contains(head, "[select") && strings.Contains(strings.SplitN(frames, "\n", 2)[0], "(*recovery).run(") {
				waiting++
			}
		}
		return waiting == pods-atOnce
	})
	close(answer)
	if err := <-recovered; err != nil {
		t.Fatal(err)
	}
	if most.Load() != atOnce {
		t.Errorf("%d pods were recovered at once, want %d", most.Load(), atOnce)
	}
	for _, id := range ids {
		if s, err := m.Status(id); err != nil || s.State != Ready {
			t.Errorf("%s: %+v, %v", id, s, err)
		}
		if got := dialLine(t, filepath.Join(o.Dir, id, taskSocket), ""); got != "hello from "+id+"\n" {
			t.Errorf("the task socket of %s says %q", id, got)
		}
	}
	if undone := w.undone(); len(undone) > 0 {
		t.Errorf("undone: %q", undone)
	}
}

// Many pods hang, more than may be recovered at once, and none of the others pays for it.
func TestHangingRecoveries(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	o.AdoptLimit, o.RecoverLimit = time.Hour, time.Hour
	ids := startMany(t, NewManager(o), recoveries+20)
	w.dropDaemon()
	answer := make(chan struct{})
	hanging := ids[:recoveries+5]
	w.calls = func(ctx context.Context, id string) error {
		if !slices.Contains(hanging, id) {
			return nil
		}
		select {
		case <-answer:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	m := NewManager(o)
	m.slotLimit = time.Millisecond
	recovered := make(chan error, 1)
	go func() { recovered <- m.Recover(t.Context()) }()
	settled := func(id string) bool {
		p := m.find(id)
		if p == nil {
			return false
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		return !p.recovering && p.rec.State == Ready
	}
	for _, id := range ids[len(hanging):] {
		eventually(t, id+" is adopted", func() bool { return settled(id) })
	}
	select {
	case err := <-recovered:
		t.Fatalf("the recovery is over: %v", err)
	default:
	}
	// What hangs is known as what it was.
	for _, id := range hanging {
		if s, err := m.Status(id); err != nil || s.State != Ready || settled(id) {
			t.Errorf("%s: %+v, %v", id, s, err)
		}
	}
	if err := m.Create(t.Context(), CreateRequest{ID: hanging[0], NetNS: ownNetNS}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("its id is given again: %v", err)
	}
	m.sweep(t.Context(), time.Now().Add(time.Hour))
	// Its clients wait.
	client, err := net.Dial("unix", filepath.Join(o.Dir, hanging[2], taskSocket))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	// A request for its end decides it.
	for i, end := range []func() error{
		func() error { return m.Stop(t.Context(), hanging[0], 0) },
		func() error { return m.Shutdown(t.Context(), hanging[1]) },
	} {
		if err := end(); err != nil {
			t.Errorf("%d: %v", i, err)
		}
	}
	if s, err := m.Wait(t.Context(), hanging[0]); err != nil || s.State != Stopped || s.ExitStatus != 0 || s.Reason != "" {
		t.Errorf("wait: %+v, %v", s, err)
	}
	if _, err := m.Status(hanging[1]); !errdefs.IsNotFound(err) {
		t.Errorf("status after Shutdown: %v", err)
	}
	if w.machine(hanging[0]) != nil || w.machine(hanging[1]) != nil {
		t.Error("a machine lives on")
	}
	// The others answer at last.
	close(answer)
	if err := <-recovered; err != nil {
		t.Fatal(err)
	}
	for _, id := range hanging[2:] {
		if !settled(id) {
			t.Errorf("%s is not adopted", id)
		}
	}
	line := make([]byte, 64)
	if n, err := client.Read(line); err != nil || string(line[:n]) != "hello from "+hanging[2]+"\n" {
		t.Errorf("a client that waited got %q, %v", line[:n], err)
	}
}

func TestDaemonServesAlthoughOneHangs(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	o.AdoptLimit, o.RecoverLimit = time.Hour, 10*time.Millisecond
	mustStart(t, NewManager(o), "a")
	w.dropDaemon()
	answer := make(chan struct{})
	w.calls = func(ctx context.Context, _ string) error {
		select {
		case <-answer:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	m := another(t, o)
	ctx, cancel := context.WithCancel(t.Context())
	waited := make(chan error, 1)
	go func() {
		_, err := m.Wait(ctx, "a")
		waited <- err
	}()
	close(answer)
	eventually(t, "the pod is adopted", func() bool { return w.get("containers", "a") != nil })
	eventually(t, "its recovery is over", func() bool {
		p := m.find("a")
		p.mu.Lock()
		defer p.mu.Unlock()
		return !p.recovering
	})
	if s, err := m.Status("a"); err != nil || s.State != Ready {
		t.Errorf("status %+v, %v", s, err)
	}
	cancel()
	if err := <-waited; !errors.Is(err, context.Canceled) {
		t.Errorf("wait ended although the pod lives: %v", err)
	}
}

func TestSlowAgentIsCalledAgain(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	o.AdoptLimit = time.Minute
	mustStart(t, NewManager(o), "a")
	w.dropDaemon()
	calls := 0
	w.calls = func(context.Context, string) error {
		if calls++; calls < 3 {
			return errors.New("not now")
		}
		return nil
	}
	m := another(t, o)
	if s, err := m.Status("a"); err != nil || s.State != Ready || calls != 3 {
		t.Errorf("status %+v, %v after %d calls", s, err, calls)
	}
}

// The end of the machine or of its share ends the waiting for the agent.
func TestEndWhileTheAgentIsCalled(t *testing.T) {
	for name, c := range map[string]struct {
		end  func(w *world)
		want string
	}{
		"machine":   {func(w *world) { w.machine("a").end(0, "the guest's kernel panicked") }, "panicked"},
		"virtiofsd": {func(w *world) { close(w.virtiofsd().exited) }, "file system daemon"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			o := testOptions(t, w)
			o.AdoptLimit = time.Hour
			mustStart(t, NewManager(o), "a")
			w.dropDaemon()
			w.calls = func(ctx context.Context, _ string) error {
				c.end(w)
				<-ctx.Done()
				return ctx.Err()
			}
			m := another(t, o)
			if s, err := m.Wait(t.Context(), "a"); err != nil || s.ExitStatus != crashed || !strings.Contains(s.Reason, c.want) {
				t.Errorf("wait: %+v, %v", s, err)
			}
			if err := m.Shutdown(t.Context(), "a"); err != nil {
				t.Fatal(err)
			}
			checkNothingLeft(t, w, o.Dir)
		})
	}
}

// The guest may be lost between any two steps of an adoption.
func TestGuestLostWhileContainersAreRestored(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	mustStart(t, NewManager(o), "a")
	w.dropDaemon()
	restore := o.Runtime.NewContainers
	o.Runtime.NewContainers = func(c ContainersConfig) (Containers, error) {
		if c.Fail != nil && w.machine("a") != nil {
			c.Fail(errors.New("an over-long frame"))
		}
		return restore(c)
	}
	m := another(t, o)
	s, err := m.Wait(t.Context(), "a")
	if err != nil || s.State != Stopped || !strings.Contains(s.Reason, "over-long") {
		t.Errorf("wait: %+v, %v", s, err)
	}
	if gone, _ := w.get("containers", "a").(*fakeContainers).seen(); gone.IsZero() {
		t.Error("the containers were not told")
	}
	if err := m.Shutdown(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	checkNothingLeft(t, w, o.Dir)
}

func TestSignalDuringRecovery(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	o.AdoptLimit, o.RecoverLimit = time.Hour, time.Hour
	startMany(t, NewManager(o), 3)
	w.dropDaemon()
	ctx, signal := context.WithCancel(t.Context())
	w.calls = func(ctx context.Context, id string) error {
		signal()
		<-ctx.Done()
		return ctx.Err()
	}
	m := NewManager(o)
	if err := m.Recover(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("recover: %v", err)
	}
	m.Close()
	for _, kind := range []string{"hypervisor", "virtiofsd", "share", "network", "cgroup"} {
		n := 0
		for _, left := range w.left() {
			if strings.HasPrefix(left, kind+" ") {
				n++
			}
		}
		if n != 3 {
			t.Errorf("%d of 3 are left of kind %s", n, kind)
		}
	}
	// The next one finds them.
	w.dropDaemon()
	w.calls = nil
	m = another(t, o)
	for i := range 3 {
		if s, err := m.Status(fmt.Sprintf("p%03d", i)); err != nil || s.State != Ready {
			t.Errorf("status %+v, %v", s, err)
		}
	}
}

func TestJournalNotYetInItsPlace(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"missing": os.Remove,
		"torn":    func(path string) error { return os.Truncate(path, 99) },
		"empty":   func(path string) error { return os.Truncate(path, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			o := testOptions(t, w)
			mustStart(t, NewManager(o), "a")
			w.dropDaemon()
			path := filepath.Join(o.Dir, "a", journalName)
			if err := errors.Join(os.WriteFile(filepath.Join(o.Dir, "a", "."+journalName), []byte(journalOf(t, o.Dir)), 0o600), spoil(path)); err != nil {
				t.Fatal(err)
			}
			m := another(t, o)
			if s, err := m.Status("a"); err != nil || s.State != Ready {
				t.Errorf("status %+v, %v", s, err)
			}
			if undone := w.undone(); len(undone) > 0 {
				t.Errorf("undone: %q", undone)
			}
		})
	}
	// Whatever lies there otherwise does not matter.
	for name, next := range map[string]string{"empty": "", "garbage": "\x00{", "another pod's": `{"schema": 1, "id": "b"}`} {
		t.Run("beside a whole one: "+name, func(t *testing.T) {
			w := newWorld(t)
			o := testOptions(t, w)
			mustStart(t, NewManager(o), "a")
			w.dropDaemon()
			if err := os.WriteFile(filepath.Join(o.Dir, "a", "."+journalName), []byte(next), 0o600); err != nil {
				t.Fatal(err)
			}
			m := another(t, o)
			if s, err := m.Status("a"); err != nil || s.State != Ready {
				t.Errorf("status %+v, %v", s, err)
			}
			m.find("a").journalContainers([]byte(`["later"]`))
			if got := journalOf(t, o.Dir); !strings.Contains(got, "later") {
				t.Errorf("the journal is %s", got)
			}
		})
	}
}

func TestCgroupWithoutDirectory(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	mustStart(t, NewManager(o), "a")
	w.dropDaemon()
	if err := os.RemoveAll(filepath.Join(o.Dir, "a")); err != nil {
		t.Fatal(err)
	}
	w.forgetNetwork()
	m := another(t, o)
	if _, err := m.Status("a"); !errdefs.IsNotFound(err) {
		t.Errorf("status: %v", err)
	}
	checkNothingLeft(t, w, o.Dir)
}

func TestDirectoryThatIsASymlink(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	mustStart(t, NewManager(o), "a")
	w.dropDaemon()
	elsewhere := filepath.Join(t.TempDir(), "a")
	if err := errors.Join(os.Rename(filepath.Join(o.Dir, "a"), elsewhere), os.Symlink(elsewhere, filepath.Join(o.Dir, "a"))); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(filepath.Join(elsewhere, journalName))
	if err != nil {
		t.Fatal(err)
	}
	m := another(t, o)
	if _, err := m.Status("a"); !errdefs.IsNotFound(err) {
		t.Errorf("status: %v", err)
	}
	if err := m.Create(t.Context(), CreateRequest{ID: "a", NetNS: ownNetNS}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("create: %v", err)
	}
	if err := m.Shutdown(t.Context(), "a"); err != nil {
		t.Error(err)
	}
	after, err := os.ReadFile(filepath.Join(elsewhere, journalName))
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("what the link leads to was touched: %v", err)
	}
	if undone := w.undone(); len(undone) > 0 {
		t.Errorf("undone: %q", undone)
	}
}

// Two directories name the processes, the cgroup's processes and the network of one pod: they stay
// that pod's.
func TestCopiedDirectory(t *testing.T) {
	for name, edit := range map[string]func(path string) error{
		"as it is": func(string) error { return nil },
		"renamed":  func(path string) error { return replace(path, `"id": "a"`, `"id": "b"`) },
		"and ended": func(path string) error {
			return errors.Join(replace(path, `"id": "a"`, `"id": "b"`), replace(path, `"state": "ready"`, `"state": "stopped"`))
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			o := testOptions(t, w)
			mustStart(t, NewManager(o), "a")
			w.dropDaemon()
			path := filepath.Join(o.Dir, "b", journalName)
			if err := errors.Join(os.Mkdir(filepath.Join(o.Dir, "b"), 0o700), os.WriteFile(path, []byte(journalOf(t, o.Dir)), 0o600), edit(path)); err != nil {
				t.Fatal(err)
			}
			m := another(t, o)
			if s, err := m.Status("a"); err != nil || s.State != Ready {
				t.Fatalf("status %+v, %v", s, err)
			}
			if err := m.Shutdown(t.Context(), "b"); err != nil {
				t.Fatal(err)
			}
			for _, kind := range []string{"hypervisor a", "virtiofsd " + o.Dir + "/a/shared", "share " + o.Dir + "/a", "network " + ownNetNS, "cgroup a", "link a"} {
				if !slices.Contains(w.left(), kind) {
					t.Errorf("gone: %s", kind)
				}
			}
			if _, err := os.Stat(filepath.Join(o.Dir, "b")); err == nil {
				t.Error("the copy is left")
			}
			if err := m.Shutdown(t.Context(), "a"); err != nil {
				t.Fatal(err)
			}
			checkNothingLeft(t, w, o.Dir)
		})
	}
}

// process starts one that lives until the test ends and has word in its command line.
func process(t *testing.T, word string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", "read line", "sh", word)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil && cmd.ProcessState.ExitCode() != 1 { // 1: the end of its input
			t.Errorf("somebody ended process %d: %v", cmd.Process.Pid, err)
		}
	})
	return cmd
}

// The cgroup of the pod is gone, so nothing is in it; what the journal names lives.
func TestProcessOutsideTheCgroup(t *testing.T) {
	for name, c := range map[string]struct {
		word  func(dir string) string
		state State
	}{
		"somebody else's": {func(dir string) string { return dir + "/ab/x" }, Stopped},
		"moved":           {func(dir string) string { return "path=" + dir + "/a/console.sock,server=on" }, Ready},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			o := testOptions(t, w)
			w.pid = process(t, c.word(o.Dir)).Process.Pid
			mustStart(t, NewManager(o), "a")
			w.dropDaemon()
			w.mu.Lock()
			delete(w.exists, "cgroup a")
			w.mu.Unlock()
			m := another(t, o)
			s, err := m.Status("a")
			if err != nil || s.State != c.state {
				t.Fatalf("status %+v, %v", s, err)
			}
			// What is not proven to be the pod's is not touched, whatever happens to the pod.
			if err := m.Shutdown(t.Context(), "a"); err != nil {
				t.Fatal(err)
			}
			undone := w.undone()
			if touched := slices.Contains(undone, "hypervisor") || slices.Contains(undone, "virtiofsd"); touched != (c.state == Ready) {
				t.Errorf("undone: %q", undone)
			}
		})
	}
}

func TestNothingIsDeletedWhileAProcessLives(t *testing.T) {
	busy := errors.New("device or resource busy")
	for name, happen := range map[string]func(w *world, dir string) error{
		"machine ended": func(w *world, _ string) error { return w.remove("hypervisor", "a") },
		"no journal":    func(_ *world, dir string) error { return os.Remove(filepath.Join(dir, "a", journalName)) },
		"boot not done": func(_ *world, dir string) error {
			return replace(filepath.Join(dir, "a", journalName), `"state": "ready"`, `"state": "starting"`)
		},
		"no directory": func(_ *world, dir string) error { return os.RemoveAll(filepath.Join(dir, "a")) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			o := testOptions(t, w)
			mustStart(t, NewManager(o), "a")
			w.dropDaemon()
			if err := happen(w, o.Dir); err != nil {
				t.Fatal(err)
			}
			_, err := os.Stat(filepath.Join(o.Dir, "a"))
			there := err == nil
			w.setFailure("remove cgroup", busy)
			// However often it is tried, and by how many daemons.
			var m *Manager
			for range 2 {
				m = another(t, o)
				m.sweep(t.Context(), time.Now())
				if err := m.Shutdown(t.Context(), "a"); !errors.Is(err, busy) {
					t.Errorf("shutdown: %v", err)
				}
				if s, err := m.Status("a"); err != nil || s.State == Ready || s.State == Stopped {
					t.Errorf("status %+v, %v", s, err)
				}
				if _, err := os.Stat(filepath.Join(o.Dir, "a")); there && err != nil {
					t.Errorf("the state directory is gone: %v", err)
				}
				if err := m.Create(t.Context(), CreateRequest{ID: "a", NetNS: ownNetNS}); !errdefs.IsAlreadyExists(err) {
					t.Errorf("its id is given again: %v", err)
				}
				w.dropDaemon()
			}
			w.setFailure("remove cgroup", nil)
			if err := m.Shutdown(t.Context(), "a"); err != nil {
				t.Fatal(err)
			}
			w.forgetNetwork()
			checkNothingLeft(t, w, o.Dir)
		})
	}
}

func TestListenerIsTakenOver(t *testing.T) {
	w := newWorld(t)
	w.kept = map[string]net.Listener{}
	o := testOptions(t, w)
	m := NewManager(o)
	mustStart(t, m, "a")
	path := filepath.Join(o.Dir, "a", taskSocket)
	before, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
	w.dropDaemon()
	// Between two daemons a client connects, and waits.
	client, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	m = another(t, o)
	line := make([]byte, 64)
	if n, err := client.Read(line); err != nil || string(line[:n]) != "hello from a\n" {
		t.Errorf("the client got %q, %v", line[:n], err)
	}
	if after, err := os.Lstat(path); err != nil || !os.SameFile(before, after) {
		t.Errorf("the socket was made anew: %v", err)
	}
	if err := m.Shutdown(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if len(w.kept) > 0 {
		t.Errorf("still kept: %v", w.kept)
	}
	checkNothingLeft(t, w, o.Dir)
}
