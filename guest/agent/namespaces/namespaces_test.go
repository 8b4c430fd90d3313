package namespaces

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == PauseArg {
		Pause()
	}
	os.Exit(m.Run())
}

func needRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to make namespaces")
	}
}

func TestSetupKeepsNamespaces(t *testing.T) {
	needRoot(t)
	dir := filepath.Join(t.TempDir(), "ns")
	before, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	pod, err := SetupIn(dir, true, "pod-name")
	if err != nil {
		t.Fatal(err)
	}
	defer pod.Close()

	if now, _ := os.Hostname(); now != before {
		t.Errorf("the hostname of the guest became %q", now)
	}
	for _, kind := range []string{"ipc", "uts", "pid"} {
		var own, kept unix.Stat_t
		if err := unix.Stat("/proc/self/ns/"+kind, &own); err != nil {
			t.Fatal(err)
		}
		if err := unix.Stat(filepath.Join(dir, kind), &kept); err != nil {
			t.Fatal(err)
		}
		if own.Dev != kept.Dev || own.Ino == kept.Ino {
			t.Errorf("%s: dev %d ino %d is not a namespace of its own", kind, kept.Dev, kept.Ino)
		}
	}
	name := make(chan string, 1)
	go inOwnThread(func() {
		f, err := os.Open(filepath.Join(dir, "uts"))
		if err == nil {
			err = unix.Setns(int(f.Fd()), unix.CLONE_NEWUTS)
			f.Close()
		}
		var u unix.Utsname
		err = errors.Join(err, unix.Uname(&u))
		if err != nil {
			name <- err.Error()
			return
		}
		name <- unix.ByteSliceToString(u.Nodename[:])
	})
	if got := <-name; got != "pod-name" {
		t.Errorf("hostname in the kept namespace is %q", got)
	}

	pid := pod.PausePID()
	if err := unix.Kill(pid, 0); err != nil {
		t.Errorf("pause process: %v", err)
	}
	if err := pod.Close(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("pause process after Close: %v", err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), dir) {
		t.Error("mounts are left behind")
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left behind: %v", entries)
	}
}

func TestSetupTwiceLeavesFirst(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	pod, err := SetupIn(dir, false, "")
	if err != nil {
		t.Fatal(err)
	}
	defer pod.Close()
	if _, err := SetupIn(dir, true, ""); !errors.Is(err, os.ErrExist) {
		t.Errorf("second setup: %v", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "uts"), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		t.Errorf("the first one's namespace is gone: %v", err)
	}
}

func TestPauseReaps(t *testing.T) {
	needRoot(t)
	pod, err := SetupIn(t.TempDir(), true, "")
	if err != nil {
		t.Fatal(err)
	}
	defer pod.Close()
	// An orphan of the namespace is left to the pause process; it must not stay a zombie.
	orphan := make(chan int, 1)
	go inOwnThread(func() {
		f, err := os.Open(filepath.Join(pod.dir, "pid"))
		if err == nil {
			err = unix.Setns(int(f.Fd()), unix.CLONE_NEWPID)
			f.Close()
		}
		if err != nil {
			orphan <- -1
			return
		}
		// The shell ends at once, its child a moment later.
		child, err := os.StartProcess("/bin/sh", []string{"sh", "-c", "sleep 0.05 & exit 0"}, &os.ProcAttr{Env: os.Environ()})
		if err != nil {
			orphan <- -1
			return
		}
		child.Wait()
		orphan <- child.Pid
	})
	if <-orphan < 0 {
		t.Fatal("cannot start a process in the namespace")
	}
	children := filepath.Join("/proc", strconv.Itoa(pod.PausePID()), "task", strconv.Itoa(pod.PausePID()), "children")
	if _, err := os.Stat(children); err != nil {
		t.Skip("the kernel does not list children")
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		b, err := os.ReadFile(children)
		if err != nil {
			t.Fatal(err)
		}
		if len(strings.TrimSpace(string(b))) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("children of the pause process: %s", b)
		}
	}
}
