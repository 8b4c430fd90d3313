package cgroup

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestStart(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to make cgroups")
	}
	g, err := New("", fmt.Sprintf("start-%d", os.Getpid()))
	if err != nil {
		t.Skipf("this host lets nobody make cgroups: %v", err)
	}
	t.Cleanup(func() {
		if err := g.Delete(t.Context()); err != nil {
			t.Error(err)
		}
	})
	cmd := exec.Command("sleep", "600")
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if err := Start(g.Procs(), cmd.SysProcAttr, cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	// Even while the thread that made the process is still there.
	if pids, err := g.PIDs(); err != nil || !slices.Equal(pids, []int{cmd.Process.Pid}) {
		t.Errorf("the group holds %v (%v), want process %d alone", pids, err, cmd.Process.Pid)
	}
	for _, procs := range g.Procs() {
		want := []string{fmt.Sprint(cmd.Process.Pid)}
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			text, err := os.ReadFile(procs)
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Fields(string(text))
			if slices.Equal(got, want) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s holds %q, want %q", procs, got, want)
			}
		}
	}

	want := errors.New("no such luck")
	if err := Start(g.Procs(), &syscall.SysProcAttr{}, func() error { return want }); !errors.Is(err, want) {
		t.Errorf("start's error became %v", err)
	}
}

func TestStartRefusesWhatIsNoCgroup(t *testing.T) {
	plain := filepath.Join(t.TempDir(), "cgroup.procs")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, procs := range []string{plain, plain + ".gone"} {
		err := Start([]string{procs}, &syscall.SysProcAttr{}, func() error {
			t.Error("the process was started")
			return nil
		})
		if err == nil || !strings.Contains(err.Error(), filepath.Dir(procs)) {
			t.Errorf("%s: %v", procs, err)
		}
	}
}
