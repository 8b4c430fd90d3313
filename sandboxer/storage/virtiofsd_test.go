package storage

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestKindOfVersion(t *testing.T) {
	for out, want := range map[string]Kind{
		"virtiofsd version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright (c) 2003-2022 Fabrice Bellard and the QEMU Project developers\nusing FUSE kernel interface version 7.36\n": KindC,
		"virtiofsd version 5.2.0\nusing FUSE kernel interface version 7.31\n":                                                                                                 KindC,
		"virtiofsd 1.13.0\n":                 KindRust,
		"virtiofsd backend 1.4.0\n":          KindRust,
		"vhost_user_fs 2.3.0\n":              "",
		"error: Unknown argument: version\n": "",
		"":                                   "",
	} {
		if got := kindOfVersion([]byte(out)); got != want {
			t.Errorf("%q: got %q, want %q", out, got, want)
		}
	}
}

// A daemon without its sandbox would give a hostile guest the host's files.
func TestDaemonKeepsItsSandbox(t *testing.T) {
	for _, kind := range []Kind{KindC, KindRust} {
		v := Virtiofsd{Path: "/v", Kind: kind, Share: "/run/kuasar-vmm/p/shared"}
		argv, err := v.argv(1024)
		if err != nil {
			t.Fatal(err)
		}
		line := strings.Join(argv, " ")
		if !strings.Contains(line, "sandbox=namespace") || strings.Contains(line, "none") {
			t.Errorf("%s: no sandbox: %s", kind, line)
		}
		if kind == KindRust && !slices.Contains(argv, "--seccomp=kill") {
			t.Errorf("no seccomp filter: %s", line)
		}
		for _, want := range []string{"shared", "--fd=3", "--rlimit-nofile=1024", "submounts", "xattr", "cache=auto"} {
			if !strings.Contains(line, want) {
				t.Errorf("%s: no %s in %s", kind, want, line)
			}
		}
		for _, bad := range []string{"/run/a,sandbox=none", "/run/a\\", "/run/a\nb"} {
			v.Share = bad
			if argv, err := v.argv(1024); err == nil {
				t.Errorf("accepted %q: %q", bad, argv)
			}
		}
	}
	if _, err := (&Virtiofsd{Kind: "x"}).argv(1); err == nil {
		t.Error("an unknown kind has a command line")
	}
}

// fake is a daemon of the Rust kind that records its arguments, says something and runs script.
func fake(t *testing.T, script string) (path, args string) {
	t.Helper()
	dir := t.TempDir()
	path, args = filepath.Join(dir, "virtiofsd"), filepath.Join(dir, "args")
	text := "#!/bin/sh\nif [ \"$1\" = --version ]; then echo virtiofsd 1.10.0; exit; fi\necho \"$@\" >" + args + "\n" + script + "\n"
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return path, args
}

func socketPath(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "v")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "v.sock")
}

func gone(pid int) bool { return errors.Is(unix.Kill(pid, 0), unix.ESRCH) }

func TestDaemonLife(t *testing.T) {
	path, _ := fake(t, "sleep 600 & echo hello >&2; wait")
	sock := socketPath(t)
	d, err := StartVirtiofsd(t.Context(), Virtiofsd{Path: path, Share: "/x", Socket: sock})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Stop() })
	if c, err := net.Dial("unix", sock); err != nil {
		t.Errorf("the socket does not accept: %v", err)
	} else {
		c.Close()
	}
	// Its words and its child are there as soon as it gets to run.
	for deadline := time.Now().Add(10 * time.Second); d.Output() != "hello" || len(d.PIDs()) != 2; {
		if time.Now().After(deadline) {
			t.Fatalf("output %q, processes %v", d.Output(), d.PIDs())
		}
		time.Sleep(time.Millisecond)
	}
	pids := d.PIDs()

	text, err := json.Marshal(d.Saved())
	if err != nil {
		t.Fatal(err)
	}
	var saved SavedDaemon
	if err := json.Unmarshal(text, &saved); err != nil {
		t.Fatal(err)
	}
	again, err := RestoreVirtiofsd(saved)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(again.PIDs(), pids) {
		t.Errorf("restored: %v, want %v", again.PIDs(), pids)
	}
	if err := again.Stop(); err != nil {
		t.Fatal(err)
	}
	<-d.Exited()
	for range 2 {
		if err := d.Stop(); err != nil {
			t.Error(err)
		}
	}
	for _, pid := range pids[:1] {
		if !gone(pid) {
			t.Errorf("process %d lives", pid)
		}
	}
	if _, err := os.Lstat(sock); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket: %v", err)
	}
	if d.PIDs() != nil {
		t.Errorf("processes after the end: %v", d.PIDs())
	}
	if _, err := RestoreVirtiofsd(saved); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("restoring what has ended: %v", err)
	}
	if d.Output() != "hello" {
		t.Errorf("its words after the end: %q", d.Output())
	}
}

func TestDaemonEndsByItself(t *testing.T) {
	path, _ := fake(t, "i=0; while [ $i -lt 5000 ]; do echo line $i >&2; i=$((i+1)); done; exit 0")
	d, err := StartVirtiofsd(t.Context(), Virtiofsd{Path: path, Kind: KindRust, Share: "/x", Socket: socketPath(t)})
	if err != nil {
		t.Fatal(err)
	}
	<-d.Exited() // though nobody read its 50 KiB and more of words
	if out := d.Output(); len(out) == 0 || len(out) > maxOutput {
		t.Errorf("%d bytes of output", len(out))
	}
	if err := d.Stop(); err != nil {
		t.Error(err)
	}
}

func TestRestoreTakesNobodyElse(t *testing.T) {
	sock := socketPath(t)
	if _, err := RestoreVirtiofsd(SavedDaemon{PID: os.Getpid(), Started: 1, Socket: sock}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("took over this test: %v", err)
	}
}

func TestStartFailsCleanly(t *testing.T) {
	good, _ := fake(t, "sleep 600")
	for name, tc := range map[string]struct {
		cfg  Virtiofsd
		want string
	}{
		"no binary":   {Virtiofsd{Path: "/nonexistent", Kind: KindRust, Share: "/x"}, "/nonexistent"},
		"comma":       {Virtiofsd{Path: good, Share: "/x,y"}, "comma"},
		"no cgroup":   {Virtiofsd{Path: good, Share: "/x", CgroupProcs: []string{"/nonexistent/cgroup.procs"}}, "cgroup"},
		"long socket": {Virtiofsd{Path: good, Share: "/x", Socket: "/tmp/" + strings.Repeat("s", 110)}, "107"},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.cfg.Socket == "" {
				tc.cfg.Socket = socketPath(t)
			}
			d, err := StartVirtiofsd(t.Context(), tc.cfg)
			if err == nil {
				d.Stop()
				t.Fatal("it started")
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("the error lacks %q: %v", tc.want, err)
			}
			if _, err := os.Lstat(tc.cfg.Socket); err == nil {
				t.Error("the socket is left")
			}
		})
	}
}

func TestFind(t *testing.T) {
	good, _ := fake(t, "")
	other := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(other, []byte("#!/bin/sh\necho other 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		candidates []string
		path       string
		err        bool
	}{
		"the first":    {[]string{good}, good, false},
		"passed over":  {[]string{"/nonexistent", other, good}, good, false},
		"none":         {[]string{"/nonexistent"}, "", false},
		"only unknown": {[]string{other}, "", true},
	} {
		path, kind, err := find(tc.candidates)
		if path != tc.path || (err != nil) != tc.err || (path != "") != (kind == KindRust) {
			t.Errorf("%s: got %q, %q, %v", name, path, kind, err)
		}
	}
}

// The real daemon, its sandbox, and the mounts that come after it has started.
func TestRealDaemonSeesLaterMounts(t *testing.T) {
	needRoot(t)
	path, kind, err := FindVirtiofsd("")
	if err != nil {
		t.Fatal(err)
	}
	if path == "" {
		t.Skip("no virtiofs daemon is installed (Debian 12: qemu-system-common)")
	}
	dir := podDir(t, "tmpfs")
	s := newShare(t, dir)
	sock := filepath.Join(socketPath(t))
	start := time.Now()
	d, err := StartVirtiofsd(t.Context(), Virtiofsd{Path: path, Kind: kind, Share: s.Exported(), Socket: sock})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s started in %s", path, time.Since(start))
	t.Cleanup(func() { d.Stop() })
	c, err := net.Dial("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	root := ""
	for deadline := time.Now().Add(10 * time.Second); root == ""; {
		if pids := d.PIDs(); len(pids) == 2 {
			p := fmt.Sprintf("/proc/%d/root", pids[1])
			// Once it is in its sandbox its root is the share, which is empty.
			if entries, err := os.ReadDir(p); err == nil && len(entries) == 0 {
				root = p
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("no sandbox: processes %v, %s", d.PIDs(), d.Output())
		}
		time.Sleep(time.Millisecond)
	}
	m, _ := overlay(t, 2)
	if _, err := s.Rootfs(t.Context(), "c1", []Mount{m}); err != nil {
		t.Fatal(err)
	}
	container := filepath.Base(at(t, s, "c1"))
	wantText(t, filepath.Join(root, container, "rootfs", "l1"), "1")
	if err := os.WriteFile(root+"/x", nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("the top of the share is writable: %v", err)
	}
	if err := s.Release("c1"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, container)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the container's directory after its release: %v", err)
	}
	pids := d.PIDs()
	c.Close() // the machine ends, and so does the daemon
	select {
	case <-d.Exited():
	case <-time.After(10 * time.Second):
		t.Errorf("it does not end with the machine; %s", d.Output())
	}
	if err := d.Stop(); err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids {
		if !gone(pid) {
			t.Errorf("process %d lives", pid)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, dir)
}
