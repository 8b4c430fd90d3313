package reaper

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestSweepTakesOnlyTheLongDead(t *testing.T) {
	proc := t.TempDir()
	set := func(pid int, name string, state string, parent, start int) {
		dir := filepath.Join(proc, fmt.Sprint(pid))
		os.MkdirAll(dir, 0o755)
		fields := strings.Repeat(" 0", 17)
		line := fmt.Sprintf("%d (%s) %s %d%s %d 0 0\n", pid, name, state, parent, fields, start)
		if err := os.WriteFile(filepath.Join(dir, "stat"), []byte(line), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var reaped []int
	r := reaper{proc: proc, self: 1, wait: func(pid int) { reaped = append(reaped, pid) }}
	set(1, "vmm-task", "S", 0, 1)
	set(10, "orphan", "Z", 1, 100)
	set(11, "alive", "S", 1, 100)
	set(12, "someone else's", "Z", 11, 100)
	set(13, "evil) Z 1 (", "S", 1, 100)
	os.MkdirAll(filepath.Join(proc, "sys"), 0o755)
	if n := r.sweep(); n != 1 || len(reaped) != 0 {
		t.Fatalf("first look: %d left, reaped %v", n, reaped)
	}
	// The owner of 10 waited for it in time, and its id is used again.
	set(10, "another", "Z", 1, 200)
	set(14, "late", "Z", 1, 201)
	if n := r.sweep(); n != 2 || len(reaped) != 0 {
		t.Fatalf("second look: %d left, reaped %v", n, reaped)
	}
	if n := r.sweep(); n != 0 || !slices.Equal(reaped, []int{10, 14}) {
		t.Fatalf("third look: %d left, reaped %v", n, reaped)
	}
}

func TestSweepOfRealZombie(t *testing.T) {
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Skipf("cannot start a process: %v", err)
	}
	defer cmd.Wait()
	r := reaper{proc: "/proc", self: os.Getpid(), wait: wait}
	deadline := time.Now().Add(10 * time.Second)
	for r.sweep() == 0 {
		if time.Now().After(deadline) {
			t.Fatal("the zombie was not seen")
		}
		time.Sleep(time.Millisecond)
	}
	r.sweep()
	if _, err := os.Stat(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid)); err == nil {
		t.Error("the zombie was not collected")
	}
}
