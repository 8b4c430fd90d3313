package pod

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/sandboxer/vm"
)

// inspected writes a journal as a daemon does and returns what Inspect makes of it.
func inspected(t *testing.T, base string, r record) *Inspection {
	t.Helper()
	dir := filepath.Join(base, r.ID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := r.write(dir); err != nil {
		t.Fatal(err)
	}
	i, err := Inspect(base, r.ID)
	if err != nil {
		t.Fatal(err)
	}
	if i.Err != nil {
		t.Fatal(i.Err)
	}
	return i
}

func thisBoot(t *testing.T) string {
	t.Helper()
	id, err := BootID()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func machineRecord(t *testing.T, pid int, start uint64) *vm.State {
	t.Helper()
	saved, err := json.Marshal(map[string]any{"start_time": start, "vsock_cid": 77, "whatever": "else"})
	if err != nil {
		t.Fatal(err)
	}
	return &vm.State{PID: pid, Saved: saved}
}

func TestInspect(t *testing.T) {
	base := t.TempDir()
	start, err := StartTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	i := inspected(t, base, record{
		Schema: journalSchema, BootID: thisBoot(t), ID: "p1", State: Ready, Stage: StageTask, CreatedAt: time.Unix(1e9, 0),
		NetNS: "/run/netns/x", CgroupParent: "/kubepods", Address: "ttrpc+unix:///x",
		Config:  json.RawMessage(`{"metadata":{"name":"web","namespace":"prod","uid":"u","attempt":2}}`),
		Machine: machineRecord(t, os.Getpid(), start), Virtiofsd: json.RawMessage(`{"pid":1,"started":1,"socket":"/x"}`),
	})
	switch {
	case i.Stale || i.State != Ready || i.Stage != StageTask || i.Schema != journalSchema:
		t.Errorf("%+v", i)
	case i.Config.GetMetadata().GetName() != "web" || i.Config.GetMetadata().GetAttempt() != 2:
		t.Errorf("configuration %v", i.Config)
	case i.NetNS != "/run/netns/x" || i.CgroupParent != "/kubepods" || i.Address != "ttrpc+unix:///x" || !i.CreatedAt.Equal(time.Unix(1e9, 0)):
		t.Errorf("%+v", i)
	case i.VsockCID != 77 || i.Hypervisor.PID != os.Getpid() || i.Hypervisor.Life() != Alive:
		t.Errorf("hypervisor %+v: %s", i.Hypervisor, i.Hypervisor.Life())
	case i.Virtiofsd.PID != 1 || i.Virtiofsd.Life() != Dead:
		t.Errorf("process 1 passes for a virtiofs daemon that started at another time: %s", i.Virtiofsd.Life())
	case i.DebugSocket() != filepath.Join(base, "p1", "debug.sock") || i.ConsoleLog() != filepath.Join(base, "p1", "sandbox-p1.log"):
		t.Errorf("%s, %s", i.DebugSocket(), i.ConsoleLog())
	}
}

func TestInspectOtherBoot(t *testing.T) {
	start, err := StartTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	i := inspected(t, t.TempDir(), record{
		Schema: journalSchema, BootID: "another", ID: "p", State: Ready, Machine: machineRecord(t, os.Getpid(), start),
	})
	if !i.Stale || i.Hypervisor.Life() != Dead {
		t.Errorf("stale %v; a process of an earlier boot is %s", i.Stale, i.Hypervisor.Life())
	}
}

func TestInspectBrokenJournals(t *testing.T) {
	base := t.TempDir()
	for name, content := range map[string]string{"empty": "", "garbage": "\x00\x01", "half": `{"schema":1,"boot_id":"`, "other": `{"schema":1,"id":"somebody"}`} {
		dir := filepath.Join(base, name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, journalName), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if i, err := Inspect(base, name); err != nil || i.Err == nil || i.Config == nil {
			t.Errorf("%s: %+v, %v", name, i, err)
		}
	}
	if err := os.Mkdir(filepath.Join(base, "none"), 0o700); err != nil {
		t.Fatal(err)
	}
	if i, err := Inspect(base, "none"); err != nil || !errors.Is(i.Err, fs.ErrNotExist) {
		t.Errorf("without a journal: %+v, %v", i, err)
	}
	if _, err := Inspect(base, "absent"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a directory: %v", err)
	}
	if err := os.Symlink("none", filepath.Join(base, "link")); err != nil {
		t.Fatal(err)
	}
	if _, err := Inspect(base, "link"); err == nil {
		t.Error("a symbolic link passes for a state directory")
	}
	if _, err := Inspect(base, "../etc"); err == nil {
		t.Error("a path passes for an id")
	}
}

func TestDirectories(t *testing.T) {
	base := t.TempDir()
	for _, d := range []string{"b", "a", ".hidden", "with space"} {
		if err := os.Mkdir(filepath.Join(base, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(base, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("a", filepath.Join(base, "link")); err != nil {
		t.Fatal(err)
	}
	ids, others, err := Directories(base)
	if err != nil || !slices.Equal(ids, []string{"a", "b"}) || !slices.Equal(others, []string{"file", "link", "with space"}) {
		t.Errorf("%v, %v, %v", ids, others, err)
	}
	if ids, others, err := Directories(filepath.Join(base, "absent")); err != nil || len(ids)+len(others) != 0 {
		t.Errorf("%v, %v, %v", ids, others, err)
	}
}

func TestLifeOfAnEndedProcess(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	start, err := StartTime(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	p := &Process{PID: cmd.Process.Pid, Started: start}
	if l := p.Life(); l != Alive {
		t.Errorf("a process that runs is %s", l)
	}
	if l := (&Process{PID: p.PID}).Life(); l != Unknown {
		t.Errorf("a process without a start is %s", l)
	}
	if l := (&Process{PID: p.PID, Started: start + 1}).Life(); l != Dead {
		t.Errorf("another process of that number is %s", l)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	// Not reaped yet: wait for the zombie without reaping it.
	if err := unix.Waitid(unix.P_PID, p.PID, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	if l := p.Life(); l != Dead {
		t.Errorf("a zombie is %s", l)
	}
	_ = cmd.Wait()
	if l := p.Life(); l != Dead {
		t.Errorf("a process that was reaped is %s", l)
	}
}

func TestLockHolder(t *testing.T) {
	base := t.TempDir()
	if pid, err := LockHolder(filepath.Join(base, "absent")); pid != 0 || err != nil {
		t.Errorf("without a directory: %d, %v", pid, err)
	}
	if pid, err := LockHolder(base); pid != 0 || err != nil {
		t.Errorf("without a lock file: %d, %v", pid, err)
	}
	f, err := os.Create(filepath.Join(base, LockName))
	if err != nil {
		t.Fatal(err)
	}
	if pid, err := LockHolder(base); pid != 0 || err != nil {
		t.Errorf("unlocked: %d, %v", pid, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(base, link); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{base, link} {
		if pid, err := LockHolder(dir); pid != os.Getpid() || err != nil {
			locks, _ := os.ReadFile("/proc/locks")
			t.Errorf("locked: %d, %v; this process is %d; %s", pid, err, os.Getpid(), strings.TrimSpace(string(locks)))
		}
	}
	f.Close()
	if pid, err := LockHolder(base); pid != 0 || err != nil {
		t.Errorf("unlocked again: %d, %v", pid, err)
	}
}
