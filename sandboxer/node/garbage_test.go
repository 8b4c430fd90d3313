package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/sandboxer/pod"
)

var testTime = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// standIn, in the environment, makes the test's program wait until it is killed: it then is a
// process whose command line the test has chosen.
const standIn = "KUASAR_NODE_STAND_IN"

func TestMain(m *testing.M) {
	if os.Getenv(standIn) != "" {
		fmt.Println("ready")
		// Until it is killed, or the test has ended.
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// start runs a stand-in with the given arguments and returns its process id.
func start(t *testing.T, args ...string) int {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, args...)
	cmd.Env = append(os.Environ(), standIn+"=1")
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if _, err := out.Read(make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid
}

// lives says whether the process runs; a zombie does not.
func lives(pid int) bool {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return err == nil && n == 0
}

// fakeLeaf is a cgroup that consists of a directory.
type fakeLeaf struct {
	dir     string
	pids    []int
	deleted *[]string
}

func (l fakeLeaf) PIDs() ([]int, error) { return slices.Clone(l.pids), nil }
func (l fakeLeaf) Procs() []string      { return []string{filepath.Join(l.dir, "cgroup.procs")} }
func (l fakeLeaf) Path() string         { return "/kuasar-vmm/" + filepath.Base(l.dir) }
func (l fakeLeaf) Delete(context.Context) error {
	*l.deleted = append(*l.deleted, filepath.Base(l.dir))
	return nil
}

// scene is a base directory and the cgroups of its pods.
type scene struct {
	*Collector
	t       *testing.T
	cgroups string
	inside  map[string][]int // processes in a pod's cgroup
	deleted []string
	daemon  int
	others  []string
}

func newScene(t *testing.T) *scene {
	s := &scene{t: t, cgroups: t.TempDir(), inside: map[string][]int{}}
	s.Collector = NewCollector(t.TempDir(), false)
	w := &s.Collector.world
	w.leaves = func() ([]string, error) {
		entries, err := os.ReadDir(s.cgroups)
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return names, err
	}
	w.leaf = func(_, id string) (leaf, error) {
		dir := filepath.Join(s.cgroups, id)
		if _, err := os.Stat(dir); err != nil {
			return nil, err
		}
		return fakeLeaf{dir, s.inside[id], &s.deleted}, nil
	}
	w.namespaces = func() ([]string, error) { return nil, nil }
	w.others = func(string) []string { return s.others }
	w.lockHolder = func(string) (int, error) { return s.daemon, nil }
	return s
}

func (s *scene) cgroup(id string, pids ...int) {
	s.t.Helper()
	if err := os.Mkdir(filepath.Join(s.cgroups, id), 0o755); err != nil {
		s.t.Fatal(err)
	}
	s.inside[id] = pids
}

// pod makes a state directory; fields replaces those of a pod that ended.
func (s *scene) pod(id string, fields map[string]any) {
	s.t.Helper()
	boot, err := pod.BootID()
	if err != nil {
		s.t.Fatal(err)
	}
	journal := map[string]any{"schema": 1, "boot_id": boot, "id": id, "state": "stopped", "config": map[string]any{}}
	for k, v := range fields {
		journal[k] = v
	}
	text, err := json.Marshal(journal)
	if err != nil {
		s.t.Fatal(err)
	}
	write(s.t, filepath.Join(s.Dir, id, "sandbox.json"), string(text), 0o600)
}

func (s *scene) machine(pid int) map[string]any {
	s.t.Helper()
	started, err := pod.StartTime(pid)
	if err != nil {
		s.t.Fatal(err)
	}
	return map[string]any{"PID": pid, "Saved": map[string]any{"start_time": started}}
}

func piece(list []Garbage, kind, id string) *Garbage {
	for i := range list {
		if list[i].Kind == kind && list[i].Pod == id {
			return &list[i]
		}
	}
	return nil
}

func (s *scene) remove() (*Collection, []Outcome) {
	s.t.Helper()
	found, outcomes, err := s.Remove(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	return found, outcomes
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

func TestGarbageWithoutDaemon(t *testing.T) {
	s := newScene(t)
	hypervisor, member := start(t), start(t)
	gone := map[string]any{"PID": os.Getpid(), "Saved": map[string]any{"start_time": 1}}
	s.pod("living", map[string]any{"state": "ready", "machine": s.machine(hypervisor)})
	s.pod("member", map[string]any{"state": "ready", "machine": gone})
	s.cgroup("member", member)
	s.pod("unsure", map[string]any{"state": "ready", "machine": map[string]any{"PID": os.Getpid(), "Saved": map[string]any{}}})
	s.pod("ended", nil)
	s.pod("died", map[string]any{"state": "ready", "machine": gone})
	s.pod("stale", map[string]any{"state": "ready", "boot_id": "other", "machine": s.machine(hypervisor)})
	s.cgroup("stale")
	s.pod("half", map[string]any{"state": "starting", "machine": gone})
	s.pod("halfalive", map[string]any{"state": "starting", "machine": s.machine(hypervisor)})
	write(t, filepath.Join(s.Dir, "garbled", "sandbox.json"), "{", 0o600)
	write(t, filepath.Join(s.Dir, "garbledalive", "sandbox.json"), "{", 0o600)
	s.cgroup("garbledalive", member)
	write(t, filepath.Join(s.Dir, "a file"), "", 0o600)
	if err := os.Symlink("living", filepath.Join(s.Dir, "link")); err != nil {
		t.Fatal(err)
	}

	found, err := s.Find(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	check := func(found *Collection, garbage, kept []string) {
		t.Helper()
		for _, id := range garbage {
			if piece(found.Garbage, KindPod, id) == nil {
				t.Errorf("%s is no garbage", id)
			}
		}
		for _, id := range kept {
			if g := piece(found.Kept, KindPod, id); g == nil || g.Reason == "" {
				t.Errorf("%s is not kept", id)
			}
		}
		if len(found.Garbage) != len(garbage) || len(found.Kept) != len(kept)+2 {
			t.Errorf("garbage %v, kept %v", found.Garbage, found.Kept)
		}
	}
	garbage := []string{"stale", "half", "garbled"}
	kept := []string{"living", "member", "unsure", "ended", "died", "halfalive", "garbledalive"}
	check(found, garbage, kept)
	for _, id := range append(garbage, kept...) {
		if !exists(filepath.Join(s.Dir, id)) {
			t.Errorf("looking removed %s", id)
		}
	}
	if exists(filepath.Join(s.Dir, pod.LockName)) {
		t.Error("looking made a lock file")
	}

	found, outcomes := s.remove()
	check(found, garbage, kept)
	for _, o := range outcomes {
		if o.Err != nil || exists(o.What) {
			t.Errorf("%s: %v", o.What, o.Err)
		}
	}
	for _, id := range kept {
		if !exists(filepath.Join(s.Dir, id)) {
			t.Errorf("%s was removed", id)
		}
	}
	if exists(filepath.Join(s.cgroups, "stale")) || !exists(filepath.Join(s.cgroups, "member")) || !slices.Equal(s.deleted, []string{"stale"}) {
		t.Errorf("the cgroups are wrong: deleted %v", s.deleted)
	}
	if !lives(hypervisor) || !lives(member) {
		t.Error("a process was killed")
	}

	s.Records = true
	found, _ = s.remove()
	check(found, []string{"ended", "died"}, []string{"living", "member", "unsure", "halfalive", "garbledalive"})
	if exists(filepath.Join(s.Dir, "ended")) || exists(filepath.Join(s.Dir, "died")) {
		t.Error("records were not removed")
	}
}

func TestGarbageBesideADaemon(t *testing.T) {
	s := newScene(t)
	s.daemon = 4711
	s.Records = true
	s.pod("stale", map[string]any{"boot_id": "other"})
	s.pod("ended", nil)
	write(t, filepath.Join(s.Dir, "garbled", "sandbox.json"), "{", 0o600)
	s.cgroup("ended")
	s.cgroup("lost")
	s.cgroup("elsewhere")
	elsewhere := t.TempDir()
	write(t, filepath.Join(elsewhere, "elsewhere", "x"), "", 0o600)
	s.others = []string{elsewhere}
	stranger := start(t)
	s.cgroup("occupied", stranger)
	owned := start(t, "-name", "sandbox-ended", "path="+s.Dir+"/ended/qmp.sock")

	found, outcomes := s.remove()
	for _, id := range []string{"stale", "ended", "garbled"} {
		if !exists(filepath.Join(s.Dir, id)) || piece(found.Kept, KindPod, id) == nil {
			t.Errorf("%s is not left to the daemon", id)
		}
	}
	if len(outcomes) != 1 || outcomes[0].Kind != KindCgroup || outcomes[0].Pod != "lost" || outcomes[0].Err != nil {
		t.Errorf("removed %+v", outcomes)
	}
	for id, want := range map[string]bool{"lost": false, "ended": true, "elsewhere": true, "occupied": true} {
		if exists(filepath.Join(s.cgroups, id)) != want {
			t.Errorf("the cgroup %s is there: %v", id, !want)
		}
	}
	if !lives(owned) || !lives(stranger) {
		t.Error("a process was killed")
	}
}

func TestGarbageProcesses(t *testing.T) {
	s := newScene(t)
	qemu := start(t, "-name", "sandbox-lost", "-chardev", "socket,id=share,path="+s.Dir+"/lost/virtiofsd.sock")
	for _, args := range [][]string{
		{"-f", s.Dir + "/lost/sandbox-lost.log"},                      // somebody reads a log
		{"-name", "sandbox-lost", "path=/elsewhere/lost/x"},           // another directory's
		{"-name", "sandbox-other", "path=" + s.Dir + "/lost/x"},       // named after another pod
		{"-name", "sandbox-lost", "path=/prefix" + s.Dir + "/lost/x"}, // a longer path
		{"-name", "sandbox-lost", "path=" + s.Dir + "/lost"},          // nothing below
		{"-name", "sandbox-..", "path=" + s.Dir + "/../x"},            // no pod
		{"-name", "sandbox-kept", "path=" + s.Dir + "/kept/x"},        // a pod's
	} {
		pid := start(t, args...)
		defer func() {
			if !lives(pid) {
				t.Errorf("the process with %v was killed", args)
			}
		}()
	}
	s.pod("kept", nil)
	s.cgroup("lost", qemu)

	found, err := s.Find(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(found.Garbage) != 2 || found.Garbage[0].Kind != KindProcess || !strings.HasPrefix(found.Garbage[0].What, fmt.Sprint(qemu)) || found.Garbage[1].Kind != KindCgroup {
		t.Fatalf("garbage %+v", found.Garbage)
	}
	if !lives(qemu) {
		t.Fatal("looking killed it")
	}
	// Its pod comes back between the look and the deed.
	s.pod("lost", nil)
	if err := found.Garbage[0].remove(t.Context()); err == nil || !lives(qemu) {
		t.Errorf("a process of a pod with a directory was killed: %v", err)
	}
	if err := found.Garbage[1].remove(t.Context()); err == nil || !exists(filepath.Join(s.cgroups, "lost")) {
		t.Errorf("the cgroup of a pod with a directory was removed: %v", err)
	}
	if err := os.RemoveAll(filepath.Join(s.Dir, "lost")); err != nil {
		t.Fatal(err)
	}
	_, outcomes := s.remove()
	for _, o := range outcomes {
		if o.Err != nil {
			t.Errorf("%s: %v", o.What, o.Err)
		}
	}
	if lives(qemu) || exists(filepath.Join(s.cgroups, "lost")) {
		t.Error("the orphan or its cgroup is there")
	}
}

// A process that is in the pod's cgroup needs no name: that is how virtiofs daemons are found.
func TestGarbageByCgroup(t *testing.T) {
	s := newScene(t)
	pid := start(t, "-o", "source="+s.Dir+"/lost/shared")
	found, err := s.Find(t.Context())
	if err != nil || len(found.Garbage) != 0 {
		t.Fatalf("a process in no cgroup of the pod: %+v, %v", found, err)
	}
	proc := t.TempDir()
	for _, name := range []string{"cmdline"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(proc, fmt.Sprint(pid), name), string(text), 0o600)
	}
	write(t, filepath.Join(proc, fmt.Sprint(pid), "cgroup"), "3:memory:/kubepods/lost\n0::/\n", 0o600)
	s.Collector.world.proc = proc
	found, err = s.Find(t.Context())
	if err != nil || len(found.Garbage) != 1 || found.Garbage[0].Kind != KindProcess {
		t.Fatalf("%+v, %v", found, err)
	}
}

// A daemon that starts in the moment of the removal wins, and one that wants to start waits.
func TestGarbageLock(t *testing.T) {
	s := newScene(t)
	s.pod("stale", map[string]any{"boot_id": "other"})
	f, err := os.Create(filepath.Join(s.Dir, pod.LockName))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Remove(t.Context()); err == nil || !exists(filepath.Join(s.Dir, "stale")) {
		t.Errorf("removed beside a daemon that has just started: %v", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	s.Collector.world.leaves = func() ([]string, error) {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
			t.Errorf("a daemon could start while garbage is looked for: %v", err)
		}
		return nil, nil
	}
	s.remove()
	if exists(filepath.Join(s.Dir, "stale")) {
		t.Error("not removed")
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("the lock was kept: %v", err)
	}
}

func TestGarbageTaps(t *testing.T) {
	s := newScene(t)
	s.pod("ended", map[string]any{"netns": "/run/netns/own"})
	removed := 0
	s.Collector.world.namespaces = func() ([]string, error) { return []string{"/run/netns/own", "/run/netns/left", "/run/netns/gone"}, nil }
	s.Collector.world.taps = func(ns string) ([]tap, error) {
		switch ns {
		case "/run/netns/left":
			return []tap{{name: "tap_kuasar0", remove: func() error { removed++; return nil }}, {name: "tap_kuasar1", reason: "used"}}, nil
		case "/run/netns/own":
			t.Error("a pod's own namespace was looked at")
		}
		return nil, fs.ErrNotExist
	}
	found, outcomes := s.remove()
	if removed != 1 || len(outcomes) != 1 || outcomes[0].What != "tap_kuasar0 in /run/netns/left" {
		t.Errorf("removed %d, %+v", removed, outcomes)
	}
	if g := piece(found.Kept, KindTap, ""); g == nil || g.Reason != "used" {
		t.Errorf("kept %+v", found.Kept)
	}
}

// A number that was given to another process since the look is nobody's to kill.
func TestGarbageKillsNoSuccessor(t *testing.T) {
	s := newScene(t)
	pid := start(t)
	started, err := pod.StartTime(pid)
	if err != nil {
		t.Fatal(err)
	}
	look := &search{Collector: s.Collector, dir: s.Dir}
	if err := look.kill(t.Context(), process{pid: pid, started: started - 1, pod: "lost"}); err != nil || !lives(pid) {
		t.Errorf("error %v; it lives: %v", err, lives(pid))
	}
	if err := look.kill(t.Context(), process{pid: pid, started: started, pod: "lost"}); err != nil || lives(pid) {
		t.Errorf("error %v; it lives: %v", err, lives(pid))
	}
}
