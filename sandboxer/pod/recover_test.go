package pod

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// another returns a manager as a new daemon would have it on the same node.
func another(t *testing.T, o Options) *Manager {
	t.Helper()
	m := NewManager(o)
	if err := m.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestKilledBetweenStages(t *testing.T) {
	stages := []string{StageDirectory, StageCgroup, StageNetwork, StageShare, StageSlot, StageHypervisor, StageHello, StageSetup, StageTask}
	for _, stage := range stages {
		t.Run(stage, func(t *testing.T) {
			w := newWorld(t)
			o := testOptions(t, w)
			m := NewManager(o)
			died := make(chan struct{})
			m.afterStage = func(_, s string) {
				if s == stage {
					close(died)
					// A goroutine of a dead daemon does nothing any more, not even undoing.
					select {}
				}
			}
			mustCreate(t, m, "a")
			go m.Start(context.Background(), "a")
			<-died
			w.dropDaemon()
			m2 := another(t, o)
			checkNothingLeft(t, w, o.Dir)
			if _, err := m2.Status("a"); err == nil {
				t.Error("a pod that was not started is known")
			}
		})
	}
}

// dropDaemon removes what dies with a daemon: its connections and its memory.
func (w *world) dropDaemon() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.orphaned = true
	for k := range w.exists {
		if strings.HasPrefix(k, "link ") || strings.HasPrefix(k, "containers ") {
			delete(w.exists, k)
		}
	}
}

func TestAdopt(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	m := NewManager(o)
	before := mustStart(t, m, "a")
	m.find("a").journalContainers([]byte(`[{"id":"c1"}]`))
	w.dropDaemon()

	m2 := another(t, o)
	after, err := m2.Status("a")
	if err != nil || after.State != Ready || after.Address != before.Address || after.PID != before.PID || !after.CreatedAt.Equal(before.CreatedAt) {
		t.Fatalf("status %+v (%v), before %+v", after, err, before)
	}
	c := w.get("containers", "a").(*fakeContainers)
	if got := strings.Join(strings.Fields(string(c.c.Records)), ""); got != `[{"id":"c1"}]` || !c.c.SharedPID {
		t.Errorf("the containers were restored from %s, shared pid %v", got, c.c.SharedPID)
	}
	if got := dialLine(t, o.Dir+"/a/task.sock", ""); got != "hello from a\n" {
		t.Errorf("the task socket says %q", got)
	}
	if len(w.undone()) > 0 {
		t.Errorf("undone: %q", w.undone())
	}
	// The new daemon notices the end of the machine, which is not its child.
	w.machine("a").end(-1, "killed")
	if s, err := m2.Wait(t.Context(), "a"); err != nil || s.ExitStatus != 137 {
		t.Errorf("wait: %+v, %v", s, err)
	}
	if err := m2.Shutdown(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	checkNothingLeft(t, w, o.Dir)
}

func TestMachineEndedWithoutDaemon(t *testing.T) {
	for name, happen := range map[string]func(w *world){
		"machine":   func(w *world) { w.remove("hypervisor", "a") },
		"virtiofsd": func(w *world) { w.virtiofsd().Stop() },
		"share":     func(w *world) { w.fail["open share"] = errors.New("not mounted") },
		"agent":     func(w *world) { w.fail["open link"] = errors.New("nobody answers") },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			o := testOptions(t, w)
			mustStart(t, NewManager(o), "a")
			w.dropDaemon()
			happen(w)
			m := another(t, o)
			// The client still learns what happened.
			s, err := m.Wait(t.Context(), "a")
			if err != nil || s.State != Stopped || s.ExitStatus != 137 || s.Reason == "" || s.Address == "" {
				t.Errorf("wait: %+v, %v", s, err)
			}
			c := w.get("containers", "a").(*fakeContainers)
			if gone, _ := c.seen(); gone.IsZero() {
				t.Error("the containers were not told")
			}
			if _, err := c.c.Guest.Task().State(t.Context(), nil); err == nil {
				t.Error("a guest that is gone answers")
			}
			if left := w.left(); !slices.Equal(left, []string{"containers a"}) {
				t.Errorf("left: %v", left)
			}
			// And the next daemon knows it still.
			w.dropDaemon()
			m = another(t, o)
			if s, err := m.Wait(t.Context(), "a"); err != nil || s.ExitStatus != 137 || s.Reason == "" {
				t.Errorf("wait after another restart: %+v, %v", s, err)
			}
			if err := m.Shutdown(t.Context(), "a"); err != nil {
				t.Fatal(err)
			}
			checkNothingLeft(t, w, o.Dir)
		})
	}
}

func TestUnreadableJournal(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"torn":       func(path string) error { return os.Truncate(path, 20) },
		"missing":    os.Remove,
		"empty":      func(path string) error { return os.Truncate(path, 0) },
		"garbage":    func(path string) error { return os.WriteFile(path, []byte("\x00\x01\xff{"), 0o600) },
		"null":       func(path string) error { return os.WriteFile(path, []byte("null"), 0o600) },
		"no schema":  func(path string) error { return replace(path, `"schema": 1`, `"schema": "one"`) },
		"wrong type": func(path string) error { return replace(path, `"state": "ready"`, `"state": 7`) },
		"directory":  func(path string) error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) },
		"fifo":       func(path string) error { return errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600)) },
		"symlink":    func(path string) error { return errors.Join(os.Rename(path, path+"x"), os.Symlink(path+"x", path)) },
		"endless":    func(path string) error { return os.Truncate(path, maxJournal+1) },
		"torn beside torn": func(path string) error {
			return errors.Join(os.Truncate(path, 20), os.WriteFile(filepath.Join(filepath.Dir(path), "."+journalName), []byte("{"), 0o600))
		},
		"other pod":  func(path string) error { return replace(path, `"id": "a"`, `"id": "b"`) },
		"other boot": func(path string) error { return replace(path, `"this boot"`, `"that boot"`) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			o := testOptions(t, w)
			mustStart(t, NewManager(o), "a")
			w.dropDaemon()
			if err := spoil(filepath.Join(o.Dir, "a", journalName)); err != nil {
				t.Fatal(err)
			}
			m := another(t, o)
			if _, err := m.Status("a"); err == nil {
				t.Error("the pod is known")
			}
			// The taps go with their namespace: without the journal nobody knows them.
			w.mu.Lock()
			delete(w.exists, "network "+ownNetNS)
			w.mu.Unlock()
			checkNothingLeft(t, w, o.Dir)
		})
	}
}

func replace(path, old, now string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	s := strings.Replace(string(b), old, now, 1)
	if s == string(b) {
		return errors.New("nothing to replace")
	}
	return os.WriteFile(path, []byte(s), 0o600)
}

func TestLastTraceStays(t *testing.T) {
	for _, fail := range []string{"remove cgroup", "load cgroup"} {
		t.Run(fail, func(t *testing.T) {
			w := newWorld(t)
			o := testOptions(t, w)
			mustStart(t, NewManager(o), "a")
			w.dropDaemon()
			if err := os.WriteFile(filepath.Join(o.Dir, "a", journalName), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			w.fail[fail] = errors.New("busy")
			m := another(t, o)
			if _, err := os.Stat(filepath.Join(o.Dir, "a")); err != nil {
				t.Fatal("the directory of a pod with a live process is gone")
			}
			if err := m.Create(t.Context(), CreateRequest{ID: "a", NetNS: ownNetNS}); err == nil {
				t.Error("its id was given again")
			}
			w.setFailure(fail, nil)
			if err := m.Shutdown(t.Context(), "a"); err != nil {
				t.Fatal(err)
			}
			w.mu.Lock()
			delete(w.exists, "network "+ownNetNS)
			w.mu.Unlock()
			checkNothingLeft(t, w, o.Dir)
		})
	}
}

func TestRecoverIgnoresStrangers(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	for _, name := range []string{".lock", "..x", "a b"} {
		if err := os.Mkdir(filepath.Join(o.Dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(o.Dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	another(t, o)
	entries, err := os.ReadDir(o.Dir)
	if err != nil || len(entries) != 4 {
		t.Errorf("entries %v, %v", entries, err)
	}
}

func TestNoGoroutinesPerStoppedPod(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	m := NewManager(o)
	// Goroutines inherit labels. Other tests leave some of daemons that they killed.
	label := pprof.Labels("test", t.Name())
	count := func() int {
		var profile strings.Builder
		if err := pprof.Lookup("goroutine").WriteTo(&profile, 1); err != nil {
			t.Fatal(err)
		}
		return strings.Count(profile.String(), strconv.Quote(t.Name()))
	}
	pprof.Do(t.Context(), label, func(context.Context) { mustStart(t, m, "a") })
	if count() == 0 {
		t.Error("the count does not see the goroutines of a pod")
	}
	if err := m.Shutdown(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "no goroutine of the pod is left", func() bool { return count() == 0 })
}
