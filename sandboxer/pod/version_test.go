package pod

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"kuasar.io/kuasar/guest/protocol"
)

// foreign makes the journal of pod a that of a daemon that this one does not understand.
func foreign(dir string) error {
	path := filepath.Join(dir, "a", journalName)
	return errors.Join(
		replace(path, `"schema": 1`, `"schema": 99`),
		replace(path, `"readable_by": 1`, `"readable_by": 99`),
		// A form that this daemon does not know.
		replace(path, `"machine": {`, `"machine": [`), replaceAfter(path, `"machine"`, "}", "]"),
	)
}

// replaceAfter replaces what follows mark first; it keeps JSON whole where that is an object of simple
// fields.
func replaceAfter(path, mark, old, now string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	head, tail, found := strings.Cut(string(b), mark)
	object, rest, ok := strings.Cut(tail, old)
	if !found || !ok {
		return errors.New("nothing to replace")
	}
	object = strings.NewReplacer(`"PID":`, "", `"Saved":`, "").Replace(object)
	return os.WriteFile(path, []byte(head+mark+object+now+rest), 0o600)
}

func journalOf(t *testing.T, dir string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "a", journalName))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// checkHeld looks at a pod that this daemon knows and does not touch.
func checkHeld(t *testing.T, w *world, m *Manager) {
	t.Helper()
	s, err := m.Status("a")
	if err != nil || s.State != Ready || s.Held == "" || s.PID < 0 || s.Address == "" {
		t.Fatalf("status %+v, %v", s, err)
	}
	// All that is given up is the conversation, which another daemon may want to begin.
	if undone := w.undone(); len(undone) > 0 && !slices.Equal(undone, []string{"link"}) {
		t.Errorf("undone: %q", undone)
	}
	if err := m.Create(t.Context(), CreateRequest{ID: "a", NetNS: ownNetNS}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("its id is given again: %v", err)
	}
	if msg, err := m.Metrics("a"); err != nil || msg == nil {
		t.Errorf("metrics: %v, %v", msg, err)
	}
	m.sweep(t.Context(), time.Now().Add(time.Hour))
	m.setClocks(t.Context())
	if _, err := m.Status("a"); err != nil {
		t.Error(err)
	}
	if w.get("containers", "a") != nil || w.get("link", "a") != nil {
		t.Errorf("somebody talks with the guest: %v", w.left())
	}
}

// unmanageable are the ways in which a running pod may be beyond a daemon of another version.
var unmanageable = map[string]struct {
	before, after func(w *world, dir string) error
}{
	"journal": {
		func(_ *world, dir string) error { return foreign(dir) },
		func(_ *world, dir string) error { return nil },
	},
	"agent": {
		func(w *world, _ string) error {
			w.hello = &protocol.Hello{ProtocolVersion: protocol.Version + 1}
			return nil
		},
		func(w *world, _ string) error { w.hello = nil; return nil },
	},
	"hypervisor": {
		func(w *world, _ string) error {
			w.fail["restore machine"] = errors.New("the record is not understood")
			return nil
		},
		func(w *world, _ string) error { delete(w.fail, "restore machine"); return nil },
	},
	"containers": {
		func(w *world, _ string) error {
			w.fail["make containers"] = fmt.Errorf("%w: cannot decode the records", ErrUnmanageable)
			return nil
		},
		func(w *world, _ string) error { delete(w.fail, "make containers"); return nil },
	},
}

func TestDowngradeKeepsPods(t *testing.T) {
	for name, c := range unmanageable {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.kept = map[string]net.Listener{}
			o := testOptions(t, w)
			mustStart(t, NewManager(o), "a")
			w.dropDaemon()
			understood := journalOf(t, o.Dir)
			if err := c.before(w, o.Dir); err != nil {
				t.Fatal(err)
			}
			written := journalOf(t, o.Dir)
			socket, err := os.Lstat(filepath.Join(o.Dir, "a", taskSocket))
			if err != nil {
				t.Fatal(err)
			}
			m := another(t, o)
			checkHeld(t, w, m)
			m.Close()
			if got := journalOf(t, o.Dir); got != written {
				t.Errorf("the journal was written: %s", got)
			}
			if now, err := os.Lstat(filepath.Join(o.Dir, "a", taskSocket)); err != nil || !os.SameFile(socket, now) {
				t.Errorf("the task socket was touched: %v", err)
			}

			// The other version comes back and goes on.
			if err := os.WriteFile(filepath.Join(o.Dir, "a", journalName), []byte(understood), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := c.after(w, o.Dir); err != nil {
				t.Fatal(err)
			}
			w.dropDaemon()
			m = another(t, o)
			if s, err := m.Status("a"); err != nil || s.State != Ready || s.Held != "" {
				t.Fatalf("status %+v, %v", s, err)
			}
			if got := dialLine(t, o.Dir+"/a/task.sock", ""); got != "hello from a\n" {
				t.Errorf("the task socket says %q", got)
			}
			if err := m.Shutdown(t.Context(), "a"); err != nil {
				t.Fatal(err)
			}
			checkNothingLeft(t, w, o.Dir)
			if len(w.kept) > 0 {
				t.Errorf("still kept: %v", w.kept)
			}
		})
	}
}

func TestHeldPodIsStopped(t *testing.T) {
	for name, c := range unmanageable {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			o := testOptions(t, w)
			mustStart(t, NewManager(o), "a")
			w.dropDaemon()
			if err := c.before(w, o.Dir); err != nil {
				t.Fatal(err)
			}
			m := another(t, o)
			checkHeld(t, w, m)
			waited := make(chan Status, 1)
			go func() {
				s, err := m.Wait(t.Context(), "a")
				if err != nil {
					t.Error(err)
				}
				waited <- s
			}()
			if err := m.Stop(t.Context(), "a", 0); err != nil {
				t.Fatal(err)
			}
			if s := <-waited; s.State != Stopped || s.ExitStatus != 0 || s.Reason != "" || s.Held != "" {
				t.Errorf("wait: %+v", s)
			}
			if left := w.left(); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			// What was kept of its clients' connections is over with it.
			if undone := strings.Join(w.undone(), " "); !strings.Contains(undone, "unlisten") {
				t.Errorf("undone: %s", undone)
			}
			if err := m.Shutdown(t.Context(), "a"); err != nil {
				t.Fatal(err)
			}
			checkNothingLeft(t, w, o.Dir)
		})
	}
}

func TestHeldPodEnds(t *testing.T) {
	for name, c := range unmanageable {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			o := testOptions(t, w)
			mustStart(t, NewManager(o), "a")
			w.dropDaemon()
			if err := c.before(w, o.Dir); err != nil {
				t.Fatal(err)
			}
			m := NewManager(o)
			m.heldInterval = time.Millisecond
			if err := m.Recover(t.Context()); err != nil {
				t.Fatal(err)
			}
			checkHeld(t, w, m)
			d, machine := w.virtiofsd(), w.machine("a")
			if err := errors.Join(w.remove("hypervisor", "a"), d.Stop()); err != nil {
				t.Fatal(err)
			}
			if !w.orphaned { // a dead daemon's handle notices nothing
				machine.end(0, "")
			}
			if s, err := m.Wait(t.Context(), "a"); err != nil || s.State != Stopped || s.ExitStatus != crashed || s.Reason == "" {
				t.Errorf("wait: %+v, %v", s, err)
			}
			if err := m.Shutdown(t.Context(), "a"); err != nil {
				t.Fatal(err)
			}
			checkNothingLeft(t, w, o.Dir)
		})
	}
}

func TestForeignJournalOfWhatDoesNotRun(t *testing.T) {
	for name, c := range map[string]struct {
		happen func(w *world, path string) error
		known  State // empty: the pod is removed
	}{
		"ended": {func(w *world, _ string) error {
			return errors.Join(w.remove("hypervisor", "a"), w.virtiofsd().Stop())
		}, ""},
		// No client asks for a pod whose Start did not succeed.
		"starting": {func(_ *world, path string) error { return replace(path, `"state": "ready"`, `"state": "starting"`) }, ""},
		"another boot": {func(w *world, path string) error {
			return errors.Join(replace(path, `"this boot"`, `"that boot"`), w.remove("hypervisor", "a"), w.virtiofsd().Stop())
		}, ""},
		"stopping": {func(_ *world, path string) error { return replace(path, `"state": "ready"`, `"state": "stopping"`) }, Stopped},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			o := testOptions(t, w)
			mustStart(t, NewManager(o), "a")
			w.dropDaemon()
			if err := errors.Join(foreign(o.Dir), c.happen(w, filepath.Join(o.Dir, "a", journalName))); err != nil {
				t.Fatal(err)
			}
			written := journalOf(t, o.Dir)
			m := another(t, o)
			s, err := m.Status("a")
			if c.known == "" && err == nil || c.known != "" && (err != nil || s.State != c.known || s.Held != "") {
				t.Fatalf("status %+v, %v", s, err)
			}
			if c.known != "" {
				if got := journalOf(t, o.Dir); got != written {
					t.Errorf("the journal was written: %s", got)
				}
				if err := m.Shutdown(t.Context(), "a"); err != nil {
					t.Fatal(err)
				}
			}
			w.forgetNetwork()
			checkNothingLeft(t, w, o.Dir)
		})
	}
}

// forgetNetwork is the end of the pod's network namespace, and of the taps in it that nobody knows.
func (w *world) forgetNetwork() {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.exists, "network "+ownNetNS)
}

func TestUnknownFieldsAreKept(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	mustStart(t, NewManager(o), "a")
	w.dropDaemon()
	path := filepath.Join(o.Dir, "a", journalName)
	// A newer daemon that this one can follow.
	if err := replace(path, `"schema": 1`, `"schema": 7, "quota": {"disks": [1, 2]}, "later": "é"`); err != nil {
		t.Fatal(err)
	}
	m := another(t, o)
	if s, err := m.Status("a"); err != nil || s.State != Ready || s.Held != "" {
		t.Fatalf("status %+v, %v", s, err)
	}
	m.find("a").journalContainers(json.RawMessage(`["x"]`))
	var got struct {
		Schema, Readable_By int
		Quota               struct{ Disks []int }
		Later               string
		Containers          []string
	}
	if err := json.Unmarshal([]byte(journalOf(t, o.Dir)), &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Quota.Disks) != 2 || got.Later != "é" || got.Schema != journalSchema || got.Readable_By != readableBy || len(got.Containers) != 1 {
		t.Errorf("the journal says %+v", got)
	}
	// And it is none the worse for it at the next restart.
	w.dropDaemon()
	if s, err := another(t, o).Status("a"); err != nil || s.State != Ready {
		t.Fatalf("status %+v, %v", s, err)
	}
}

func TestSchemas(t *testing.T) {
	for name, c := range map[string]struct {
		text           string
		whole, foreign bool
	}{
		"this one":        {`{"schema": 1, "id": "a"}`, true, false},
		"readable":        {`{"schema": 9, "readable_by": 1, "id": "a"}`, true, false},
		"not readable":    {`{"schema": 9, "readable_by": 9, "id": "a"}`, true, true},
		"says nothing":    {`{"schema": 9, "id": "a"}`, true, true},
		"nonsense":        {`{"schema": 9, "readable_by": -1, "id": "a"}`, true, true},
		"readable as str": {`{"schema": 9, "readable_by": "1", "id": "a"}`, true, true},
		"other forms":     {`{"schema": 9, "id": "a", "state": {"x": 1}, "stages": 4}`, true, true},
		"none":            {`{"id": "a"}`, false, false},
		"zero":            {`{"schema": 0, "id": "a"}`, false, false},
		"array":           {`[]`, false, false},
		"damaged":         {`{"schema": 1, "id": 5}`, false, false},
	} {
		r, err := decodeRecord([]byte(c.text))
		if (r != nil) != c.whole || errors.Is(err, errForeign) != c.foreign || c.whole && r.ID != "a" || (err == nil) != (c.whole && !c.foreign) {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
}
