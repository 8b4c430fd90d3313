package cgroup

import (
	"context"
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
		// The test's own context has ended by now.
		if err := g.Delete(context.Background()); err != nil {
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

func TestStartTakesTheDaemonsSparingAway(t *testing.T) {
	const own = "/proc/self/oom_score_adj"
	before, err := os.ReadFile(own)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(own, []byte("-900"), 0); err != nil {
		t.Skipf("this user may not spare a process: %v", err)
	}
	defer os.WriteFile(own, before, 0)
	for _, c := range []struct {
		pidfd bool
		want  string
	}{{true, "0"}, {false, "-900"}} {
		cmd := exec.Command("sleep", "600")
		cmd.SysProcAttr = &syscall.SysProcAttr{}
		fd := -1
		if c.pidfd {
			cmd.SysProcAttr.PidFD = &fd
		}
		if err := Start(nil, cmd.SysProcAttr, cmd.Start); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", cmd.Process.Pid))
		cmd.Process.Kill()
		cmd.Wait()
		if fd >= 0 {
			syscall.Close(fd)
		}
		if err != nil || strings.TrimSpace(string(got)) != c.want {
			t.Errorf("pidfd %v: adjustment %q (%v), want %s", c.pidfd, got, err, c.want)
		}
	}
}

func TestUnspareWhatHasEnded(t *testing.T) {
	fd := -1
	cmd := exec.Command("true")
	cmd.SysProcAttr = &syscall.SysProcAttr{PidFD: &fd}
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if fd < 0 {
		t.Skip("the kernel has no pidfds")
	}
	defer syscall.Close(fd)
	if err := unspare(fd); err != nil {
		t.Error(err)
	}
	if err := unspare(1 << 20); err == nil {
		t.Error("a descriptor that is not open is accepted")
	}
}
