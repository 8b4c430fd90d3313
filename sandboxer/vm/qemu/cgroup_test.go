package qemu_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/sandboxer/vm/vmtest"
)

// TestCgroups: the process is in its cgroups from its first instruction, in every hierarchy of this
// host; the daemon's threads are not.
func TestCgroups(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to make cgroups")
	}
	name := fmt.Sprintf("kuasar-vm-test-%d", os.Getpid())
	spec := plainSpec(t)
	var v1, v2 int
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, line := range strings.Split(string(mounts), "\n") {
		before, after, _ := strings.Cut(line, " - ")
		kind, _, _ := strings.Cut(after, " ")
		fields := strings.Fields(before)
		if len(fields) < 5 || kind != "cgroup" && kind != "cgroup2" || seen[fields[2]] {
			continue
		}
		// A new cpuset is empty and takes no process until it is configured.
		if strings.Contains(after, "cpuset") || fields[3] != "/" {
			continue
		}
		seen[fields[2]] = true
		dir := filepath.Join(fields[4], name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			continue // a hierarchy that this host does not let us use
		}
		t.Cleanup(func() {
			for range 100 { // a thread that has just ended is still counted for a moment
				if os.Remove(dir) == nil {
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
			t.Errorf("%s cannot be removed", dir)
		})
		spec.CgroupProcs = append(spec.CgroupProcs, filepath.Join(dir, "cgroup.procs"))
		if kind == "cgroup" {
			v1++
		} else {
			v2++
		}
	}
	if len(spec.CgroupProcs) == 0 {
		t.Skip("no cgroup hierarchy of this host can be used")
	}
	t.Logf("%d hierarchies of v1, %d of v2", v1, v2)
	_, m := start(t, vmtest.Behaviour{}, spec)
	state, err := m.State()
	if err != nil {
		t.Fatal(err)
	}
	for _, procs := range spec.CgroupProcs {
		b, err := os.ReadFile(procs)
		if err != nil || string(b) != fmt.Sprintln(state.PID) {
			t.Errorf("%s lists %q, want %d (%v)", procs, b, state.PID, err)
		}
	}
	tasks, err := filepath.Glob("/proc/self/task/*/cgroup")
	if err != nil || len(tasks) == 0 {
		t.Fatal(err)
	}
	// The thread that made the process ends; give it the time to.
	for range 200 {
		inside := 0
		for _, file := range tasks {
			if b, err := os.ReadFile(file); err == nil && strings.Contains(string(b), name) {
				inside++
			}
		}
		if inside == 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	for _, file := range tasks {
		if b, err := os.ReadFile(file); err == nil && strings.Contains(string(b), name) {
			t.Errorf("a thread of the daemon stays in the pod's cgroup: %s", file)
		}
	}
	if err := m.Stop(deadline(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
}

// TestFullStateDirectory: without room for the pid file the machine does not start, and nothing
// stays behind.
func TestFullStateDirectory(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a small file system")
	}
	spec := plainSpec(t)
	if err := unix.Mount("tmpfs", spec.Dir, "tmpfs", 0, "size=4k,nr_inodes=20"); err != nil {
		t.Skip("cannot mount a tmpfs: ", err)
	}
	t.Cleanup(func() { unix.Unmount(spec.Dir, unix.MNT_DETACH) })
	if err := os.WriteFile(filepath.Join(spec.Dir, "filler"), make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := newDriver(t, vmtest.Behaviour{Console: "hello\n"}).Create(spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Start(deadline(t, 20*time.Second)); err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Fatalf("got %v", err)
	}
	os.Remove(filepath.Join(spec.Dir, "filler"))
	onlyLog(t, spec)
}
