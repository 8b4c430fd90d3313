package containers

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/runc/libcontainer/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func class(err error) error { return errgrpc.ToNative(err) }

func TestLife(t *testing.T) {
	g := newGuest(t)
	ctx := context.Background()
	h := g.open(false, false)
	if err := g.create("c1", g.spec("sh", "-c", "echo out; echo err >&2; exit 7"), h); err != nil {
		t.Fatal(err)
	}
	state := func() *taskapi.StateResponse {
		r, err := g.s.State(ctx, &taskapi.StateRequest{ID: "c1"})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if s := state(); s.Status != task.Status_CREATED || s.Pid == 0 || s.Stdout != h.names.stdout || s.Bundle != "/bundle/of/the/host" {
		t.Errorf("after create: %v", s)
	}
	if err := g.kill("c1", "", 0); err != nil {
		t.Errorf("signal 0 before start: %v", err)
	}
	if _, err := g.s.Create(ctx, &taskapi.CreateTaskRequest{ID: "c1"}); !errdefs.IsAlreadyExists(class(err)) {
		t.Errorf("second create: %v", err)
	}
	pid := g.start("c1", "")
	if pid != state().Pid {
		t.Errorf("pid %d became %d", state().Pid, pid)
	}
	if code := g.wait("c1", ""); code != 7 {
		t.Errorf("exit status %d", code)
	}
	h.group.Wait()
	if h.stdout.String() != "out\n" || h.stderr.String() != "err\n" {
		t.Errorf("stdout %q, stderr %q", h.stdout.String(), h.stderr.String())
	}
	if s := state(); s.Status != task.Status_STOPPED || s.ExitStatus != 7 || s.ExitedAt == nil {
		t.Errorf("after exit: %v", s)
	}
	if err := g.kill("c1", "", 0); !errdefs.IsNotFound(class(err)) {
		t.Errorf("signal 0 after exit: %v", err)
	}
	if _, err := g.s.Start(ctx, &taskapi.StartRequest{ID: "c1"}); !errdefs.IsFailedPrecondition(class(err)) {
		t.Errorf("start after exit: %v", err)
	}
	if _, err := g.s.Stats(ctx, &taskapi.StatsRequest{ID: "c1"}); err != nil {
		t.Errorf("stats after exit: %v", err)
	}
	if r := g.delete("c1", ""); r.ExitStatus != 7 || r.Pid != pid {
		t.Errorf("delete: %v", r)
	}
	for name, err := range map[string]error{
		"delete": func() error { _, err := g.s.Delete(ctx, &taskapi.DeleteRequest{ID: "c1"}); return err }(),
		"state":  func() error { _, err := g.s.State(ctx, &taskapi.StateRequest{ID: "c1"}); return err }(),
		"wait":   func() error { _, err := g.s.Wait(ctx, &taskapi.WaitRequest{ID: "c1"}); return err }(),
	} {
		if !errdefs.IsNotFound(class(err)) {
			t.Errorf("%s after delete: %v", name, err)
		}
	}
	for range 2 {
		if err := g.s.Purge(ctx, "c1"); err != nil {
			t.Error(err)
		}
	}
}

// What a process writes right before its exit must arrive whole.
func TestBurstBeforeExit(t *testing.T) {
	g := newGuest(t)
	const size = 8 << 20
	for _, terminal := range []bool{false, true} {
		id := fmt.Sprintf("burst-%v", terminal)
		h := g.open(false, terminal)
		g.run(id, g.spec("sh", "-c", "yes 0123456 | head -c "+strconv.Itoa(size)), h)
		if code := g.wait(id, ""); code != 0 {
			t.Errorf("exit status %d", code)
		}
		h.group.Wait()
		want := size
		if terminal {
			want += size / 8 // \n becomes \r\n
		}
		if h.stdout.Len() != want {
			t.Errorf("terminal %v: %d of %d bytes", terminal, h.stdout.Len(), want)
		}
		g.delete(id, "")
	}
}

func TestStdin(t *testing.T) {
	g := newGuest(t)
	h := g.open(true, false)
	g.run("c1", g.spec("wc", "-c"), h)
	data := strings.Repeat("x", 3<<20)
	if _, err := h.in.Write([]byte(data)); err != nil {
		t.Fatal(err)
	}
	if err := h.in.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if code := g.wait("c1", ""); code != 0 {
		t.Errorf("exit status %d", code)
	}
	h.group.Wait()
	if got := strings.TrimSpace(h.stdout.String()); got != strconv.Itoa(len(data)) {
		t.Errorf("the process read %s bytes", got)
	}
}

// CloseIO may overtake the input that was sent before it.
func TestCloseIO(t *testing.T) {
	g := newGuest(t)
	h := g.open(true, false)
	g.run("c1", g.spec("cat"), h)
	h.in.Write([]byte("last words"))
	if _, err := g.s.CloseIO(context.Background(), &taskapi.CloseIORequest{ID: "c1", Stdin: true}); err != nil {
		t.Fatal(err)
	}
	if code := g.wait("c1", ""); code != 0 {
		t.Errorf("exit status %d", code)
	}
	h.group.Wait()
	if h.stdout.String() != "last words" {
		t.Errorf("stdout %q", h.stdout.String())
	}
}

func TestSignals(t *testing.T) {
	g := newGuest(t)
	h := g.open(false, false)
	g.run("c1", g.spec("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done"), h)
	h.ready()
	h = g.open(false, false)
	g.run("c2", g.spec("sh", "-c", "trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done"), h)
	h.ready()
	if err := g.kill("c1", "", unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if _, err := g.s.Delete(context.Background(), &taskapi.DeleteRequest{ID: "c1"}); !errdefs.IsFailedPrecondition(class(err)) {
		t.Errorf("delete of a running container: %v", err)
	}
	if err := g.kill("c1", "", 77); !errdefs.IsInvalidArgument(class(err)) {
		t.Errorf("signal 77: %v", err)
	}
	if err := g.kill("c1", "", unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code := g.wait("c1", ""); code != 137 {
		t.Errorf("exit status %d", code)
	}
	if err := g.kill("c2", "", unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := g.wait("c2", ""); code != 3 {
		t.Errorf("exit status %d", code)
	}
}

func TestSpecIsHonoured(t *testing.T) {
	g := newGuest(t)
	spec := g.spec("sh", "-c", strings.Join([]string{
		"id", "umask", "ulimit -n", "grep -E 'Cap(Eff|Bnd)|NoNewPrivs|Seccomp:' /proc/self/status",
		"touch /x 2>&1", "hostname", "pwd", "cat /proc/self/oom_score_adj",
		"head -c 1 /proc/kcore | wc -c", "echo 1 > /proc/sys/kernel/domainname", "echo reopened > /dev/stdout",
		"cat /data/file", "touch /data/new 2>&1", "mkdir /tmp/denied 2>&1", "cat /proc/sys/kernel/shmmax",
	}, "; "))
	nnp, umask, adj := true, uint32(0o27), 321
	spec.Process.NoNewPrivileges = nnp
	spec.Process.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{7, 8}, Umask: &umask}
	spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 123, Soft: 123}}
	spec.Process.OOMScoreAdj = &adj
	spec.Process.Cwd = "/root/made"
	spec.Hostname = "in-the-spec"
	spec.Root.Readonly = true
	spec.Linux.Sysctl = map[string]string{"kernel.shmmax": "123456789"}
	data := t.TempDir()
	writeFile(t, data+"/file", "from the share\n")
	spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/data", Type: "bind", Source: data, Options: []string{"rbind", "rprivate", "ro"}})
	want := []string{
		"uid=1000 gid=1001 groups=7,8", "0027", "\n123\n", "CapEff:\t0000000000000000", "NoNewPrivs:\t1",
		"/x: Read-only file system", "in-the-spec\n", "/root/made\n", "\n321\n", "\n0\n", "domainname", "reopened\n",
		"from the share\n", "/data/new: Read-only file system", "123456789\n",
	}
	if seccomp.Enabled { // by the build tag of that name, which the agent is built with
		denied := uint(unix.EACCES)
		spec.Linux.Seccomp = &specs.LinuxSeccomp{
			DefaultAction: specs.ActAllow,
			Syscalls:      []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno, ErrnoRet: &denied}},
		}
		want = append(want, "Seccomp:\t2", "/tmp/denied': Permission denied")
	}
	got, code := g.output("c1", spec)
	for _, want := range want {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing", want)
		}
	}
	if t.Failed() {
		t.Logf("exit status %d:\n%s", code, got)
	}
}

func TestExec(t *testing.T) {
	g := newGuest(t)
	ctx := context.Background()
	g.run("c1", g.spec("sleep", "1000"), g.open(false, false))

	h := g.open(true, false)
	if err := g.exec("c1", "e1", h, g.execProcess("sh", "-c", "cat; echo err >&2; exit 5")); err != nil {
		t.Fatal(err)
	}
	if r, err := g.s.State(ctx, &taskapi.StateRequest{ID: "c1", ExecID: "e1"}); err != nil || r.Status != task.Status_CREATED || r.ExecID != "e1" {
		t.Errorf("before start: %v, %v", r, err)
	}
	if err := g.exec("c1", "e1", h, g.execProcess("true")); !errdefs.IsAlreadyExists(class(err)) {
		t.Errorf("same exec id: %v", err)
	}
	if err := g.kill("c1", "e1", unix.SIGTERM); !errdefs.IsFailedPrecondition(class(err)) {
		t.Errorf("kill before start: %v", err)
	}
	if pid := g.start("c1", "e1"); pid == 0 {
		t.Error("no pid")
	}
	if _, err := g.s.Start(ctx, &taskapi.StartRequest{ID: "c1", ExecID: "e1"}); !errdefs.IsFailedPrecondition(class(err)) {
		t.Errorf("second start: %v", err)
	}
	h.in.Write([]byte("through"))
	h.in.CloseWrite()
	if code := g.wait("c1", "e1"); code != 5 {
		t.Errorf("exit status %d", code)
	}
	h.group.Wait()
	if h.stdout.String() != "through" || h.stderr.String() != "err\n" {
		t.Errorf("stdout %q, stderr %q", h.stdout.String(), h.stderr.String())
	}
	if r := g.delete("c1", "e1"); r.ExitStatus != 5 {
		t.Errorf("delete: %v", r)
	}
	if _, err := g.s.Delete(ctx, &taskapi.DeleteRequest{ID: "c1", ExecID: "e1"}); !errdefs.IsNotFound(class(err)) {
		t.Errorf("second delete: %v", err)
	}

	h = g.open(false, false)
	if err := g.exec("c1", "e2", h, g.execProcess("no-such-program")); err != nil {
		t.Fatal(err)
	}
	_, err := g.s.Start(ctx, &taskapi.StartRequest{ID: "c1", ExecID: "e2"})
	if err == nil || !strings.Contains(err.Error(), `cannot start "no-such-program" in container c1: executable file not found in $PATH`) {
		t.Errorf("exec of nothing: %v", err)
	}
	h.group.Wait() // the host got EOF
	g.delete("c1", "e2")

	// A never started one can be dropped.
	h = g.open(true, false)
	if err := g.exec("c1", "e3", h, g.execProcess("true")); err != nil {
		t.Fatal(err)
	}
	g.delete("c1", "e3")
	h.group.Wait()

	h = g.open(true, false)
	if err := g.exec("c1", "idle", h, g.execProcess("true")); err != nil {
		t.Fatal(err)
	}
	_, idle, err := g.s.process("c1", "idle")
	if err != nil {
		t.Fatal(err)
	}
	if err := g.kill("c1", "", unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	g.wait("c1", "")
	defer func() {
		g.delete("c1", "")
		// A wait for the one that was never started ends with the container.
		<-idle.done
		h.group.Wait()
	}()
	if err := g.exec("c1", "e4", g.open(false, false), g.execProcess("true")); !errdefs.IsFailedPrecondition(class(err)) {
		t.Errorf("exec in an ended container: %v", err)
	}
}

func TestTerminal(t *testing.T) {
	g := newGuest(t)
	ctx := context.Background()
	g.run("c1", g.spec("sleep", "1000"), g.open(false, false))
	h := g.open(true, true)
	if err := g.exec("c1", "e1", h, g.execProcess("sh", "-c", "tty; stty size; read line; echo got $line; stty size; read line; exit 4")); err != nil {
		t.Fatal(err)
	}
	resize := func(w, h uint32) {
		if _, err := g.s.ResizePty(ctx, &taskapi.ResizePtyRequest{ID: "c1", ExecID: "e1", Width: w, Height: h}); err != nil {
			t.Fatal(err)
		}
	}
	resize(100, 30)
	g.start("c1", "e1")
	resize(120, 40)
	h.in.Write([]byte("hello\n"))
	h.in.Write([]byte("\n"))
	if code := g.wait("c1", "e1"); code != 4 {
		t.Errorf("exit status %d", code)
	}
	h.group.Wait()
	got := h.stdout.String()
	for _, want := range []string{"/dev/pts/", "got hello\r\n", "40 120\r\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing in %q", want, got)
		}
	}
	if _, err := g.s.ResizePty(ctx, &taskapi.ResizePtyRequest{ID: "c1", Width: 1, Height: 1}); !errdefs.IsFailedPrecondition(class(err)) {
		t.Errorf("resize without terminal: %v", err)
	}
}

// An exit is reported although a descendant keeps the pipe, and nothing of the process is lost.
func TestDescendantKeepsPipe(t *testing.T) {
	g := newGuest(t)
	g.run("c1", g.spec("sleep", "1000"), g.open(false, false))
	h := g.open(false, false)
	if err := g.exec("c1", "e1", h, g.execProcess("sh", "-c", "sleep 1000 & yes | head -c 1000000")); err != nil {
		t.Fatal(err)
	}
	g.start("c1", "e1")
	if code := g.wait("c1", "e1"); code != 0 {
		t.Errorf("exit status %d", code)
	}
	h.group.Wait()
	if h.stdout.Len() != 1000000 {
		t.Errorf("%d bytes", h.stdout.Len())
	}
}

func TestFailedCreateLeavesNothing(t *testing.T) {
	g := newGuest(t)
	h := g.open(false, false)
	err := g.create("c1", g.spec("topp"), h)
	if err == nil || !strings.Contains(err.Error(), `cannot start "topp" in container c1: executable file not found in $PATH`) {
		t.Errorf("create: %v", err)
	}
	h.group.Wait()
	if ids := g.s.IDs(); len(ids) != 0 {
		t.Errorf("containers %v", ids)
	}
	// The same id can be used again at once.
	h = g.open(false, false)
	if err := g.create("c1", g.spec("true"), h); err != nil {
		t.Fatal(err)
	}
	g.delete("c1", "") // never started
	h.group.Wait()

	bad := g.spec("true")
	bad.Root.Path = "/no/such/root"
	h = g.open(false, false)
	if err := g.create("c2", bad, h); err == nil || !strings.Contains(err.Error(), "/no/such/root") {
		t.Errorf("create without root: %v", err)
	}
	h.group.Wait()
	for _, id := range []string{"c1", "c2"} {
		if err := g.s.Purge(context.Background(), id); err != nil {
			t.Error(err)
		}
	}
	if _, err := g.s.Create(context.Background(), &taskapi.CreateTaskRequest{ID: "c2"}); !errdefs.IsFailedPrecondition(class(err)) {
		t.Errorf("create without prepare: %v", err)
	}
}

func TestKilledBetweenCreateAndStart(t *testing.T) {
	g := newGuest(t)
	h := g.open(false, false)
	if err := g.create("c1", g.spec("true"), h); err != nil {
		t.Fatal(err)
	}
	if err := g.kill("c1", "", unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code := g.wait("c1", ""); code != 137 {
		t.Errorf("exit status %d", code)
	}
	if _, err := g.s.Start(context.Background(), &taskapi.StartRequest{ID: "c1"}); !errdefs.IsFailedPrecondition(class(err)) {
		t.Errorf("start: %v", err)
	}
	g.delete("c1", "")
	h.group.Wait()
}

func TestPauseAndUpdate(t *testing.T) {
	g := newGuest(t)
	ctx := context.Background()
	g.run("c1", g.spec("sleep", "1000"), g.open(false, false))
	for range 2 {
		if _, err := g.s.Pause(ctx, &taskapi.PauseRequest{ID: "c1"}); err != nil {
			t.Fatal(err)
		}
	}
	if r, _ := g.s.State(ctx, &taskapi.StateRequest{ID: "c1"}); r.GetStatus() != task.Status_PAUSED {
		t.Errorf("state %v", r)
	}
	if err := g.exec("c1", "e1", g.open(false, false), g.execProcess("true")); !errdefs.IsFailedPrecondition(class(err)) {
		t.Errorf("exec while paused: %v", err)
	}
	for range 2 {
		if _, err := g.s.Resume(ctx, &taskapi.ResumeRequest{ID: "c1"}); err != nil {
			t.Fatal(err)
		}
	}
	if r, _ := g.s.State(ctx, &taskapi.StateRequest{ID: "c1"}); r.GetStatus() != task.Status_RUNNING {
		t.Errorf("state %v", r)
	}

	for _, limit := range []int64{64 << 20, 32 << 20, 128 << 20} {
		update(t, g, "c1", &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}})
		if got := memoryLimit(t, g, "c1"); got != uint64(limit) {
			t.Errorf("limit %d instead of %d", got, limit)
		}
	}
	limit := int64(77)
	update(t, g, "c1", &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: &limit}})
	if got := memoryLimit(t, g, "c1"); got != 128<<20 {
		t.Errorf("an update of pids changed the limit of memory to %d", got)
	}
	// Devices stay allowed after an update, and execs go on.
	h := g.open(false, false)
	if err := g.exec("c1", "e2", h, g.execProcess("sh", "-c", "echo x > /dev/null && head -c 3 /dev/zero | wc -c")); err != nil {
		t.Fatal(err)
	}
	g.start("c1", "e2")
	if code := g.wait("c1", "e2"); code != 0 {
		t.Errorf("exit status %d: %s", code, h.stderr.String())
	}

	if _, err := g.s.Pause(ctx, &taskapi.PauseRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	if err := g.kill("c1", "", unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code := g.wait("c1", ""); code != 137 {
		t.Errorf("a paused container ended with %d", code)
	}
}

func TestOOM(t *testing.T) {
	g := newGuest(t)
	spec := g.spec("dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1")
	limit := int64(64 << 20)
	spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit, Swap: &limit}
	g.run("c1", spec, g.open(false, false))
	if code := g.wait("c1", ""); code != 137 {
		t.Errorf("exit status %d", code)
	}
	g.mu.Lock()
	oom := strings.Join(g.oom, " ")
	g.mu.Unlock()
	if !strings.Contains(oom, "c1") {
		t.Error("not reported before the exit")
	}
	if n := oomKills(t, g, "c1"); n == 0 {
		t.Error("stats do not tell of it")
	}
}

func TestPids(t *testing.T) {
	g := newGuest(t)
	g.run("c1", g.spec("sh", "-c", "sleep 1000 & sleep 1000 & wait"), g.open(false, false))
	until(t, "three processes", func() bool {
		r, err := g.s.Pids(context.Background(), &taskapi.PidsRequest{ID: "c1"})
		return err == nil && len(r.Processes) == 3
	})
}

func TestPurgeAndStopAll(t *testing.T) {
	g := newGuest(t)
	ctx := context.Background()
	// The host never reads this one's output.
	g.run("stuck", g.spec("yes"), &hostEnd{names: stdioNames{stdout: "stdio://never-opened"}})
	stuck, err := g.s.container("stuck")
	if err != nil {
		t.Fatal(err)
	}
	if err := g.s.Purge(ctx, "stuck"); err != nil {
		t.Fatal(err)
	}
	bounded, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if await(bounded, stuck.init.done) != nil {
		t.Error("a wait for the purged container does not end")
	}
	polite, deaf := g.open(false, false), g.open(false, false)
	g.run("polite", g.spec("sh", "-c", "trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.02; done"), polite)
	g.run("deaf", g.spec("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.02; done"), deaf)
	polite.ready()
	deaf.ready()
	if err := g.create("created", g.spec("true"), g.open(false, false)); err != nil {
		t.Fatal(err)
	}
	g.s.StopAll(ctx, time.Second)
	if code := g.wait("deaf", ""); code != 137 {
		t.Errorf("deaf ended with %d", code)
	}
	if code := g.wait("polite", ""); code != 0 {
		t.Errorf("polite ended with %d", code)
	}
	polite.group.Wait()
	if got := polite.stdout.String(); got != "ready\nbye\n" {
		t.Errorf("polite wrote %q", got)
	}
	g.wait("created", "")
	if err := g.prepare("late", g.spec("true")); !errdefs.IsUnavailable(err) {
		t.Errorf("prepare afterwards: %v", err)
	}
	for _, id := range g.s.IDs() {
		g.delete(id, "")
	}
}

// Containers in the pid namespace of the pod do not leave processes behind.
func TestSharedNamespaces(t *testing.T) {
	g := newGuest(t)
	pod, dir := g.pod("the-pod")
	spec := func(args ...string) *specs.Spec {
		s := g.spec(args...)
		for i, ns := range s.Linux.Namespaces {
			switch ns.Type {
			case specs.PIDNamespace, specs.IPCNamespace, specs.UTSNamespace:
				s.Linux.Namespaces[i].Path = dir + "/" + string(ns.Type)
			}
		}
		return s
	}
	other := g.open(false, false)
	g.run("other", spec("sleep", "1000"), other)

	h := g.open(false, false)
	g.run("c1", spec("sh", "-c", "hostname; ps -o args; setsid sleep 1001 & sleep 0.2; exit 9"), h)
	if code := g.wait("c1", ""); code != 9 {
		t.Errorf("exit status %d", code)
	}
	h.group.Wait()
	got := h.stdout.String()
	for _, want := range []string{"the-pod\n", "sleep 1000\n", "pause"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing in %q", want, got)
		}
	}
	// The daemon that it left is gone when the exit is reported.
	h = g.open(false, false)
	if err := g.exec("other", "ps", h, g.execProcess("ps", "-o", "args")); err != nil {
		t.Fatal(err)
	}
	g.start("other", "ps")
	g.wait("other", "ps")
	h.group.Wait()
	if got := h.stdout.String(); strings.Contains(got, "1001") || !strings.Contains(got, "sleep 1000") {
		t.Errorf("processes afterwards: %q", got)
	}
	g.delete("c1", "")

	// The end of one container is not the end of another, that of the pause process is.
	if err := unix.Kill(pod.PausePID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code := g.wait("other", ""); code != 137 {
		t.Errorf("exit status %d", code)
	}
}

func TestContainersAtOnce(t *testing.T) {
	g := newGuest(t)
	const n = 6
	ends := make([]*hostEnd, n)
	errs := make(chan error, n)
	for i := range n {
		ends[i] = g.open(false, false)
	}
	ctx := context.Background()
	for i := range n {
		go func() {
			errs <- func() error {
				id := fmt.Sprintf("c%d", i)
				if err := g.create(id, g.spec("sh", "-c", fmt.Sprintf("echo %d; exit %d", i, i)), ends[i]); err != nil {
					return err
				}
				if _, err := g.s.Start(ctx, &taskapi.StartRequest{ID: id}); err != nil {
					return err
				}
				r, err := g.s.Wait(ctx, &taskapi.WaitRequest{ID: id})
				if err == nil && r.ExitStatus != uint32(i) {
					err = fmt.Errorf("container %d ended with %d", i, r.ExitStatus)
				}
				return err
			}()
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	for i, h := range ends {
		h.group.Wait()
		if h.stdout.String() != fmt.Sprintf("%d\n", i) {
			t.Errorf("container %d wrote %q", i, h.stdout.String())
		}
	}
}

func TestExecsAtOnce(t *testing.T) {
	g := newGuest(t)
	g.run("c1", g.spec("sleep", "1000"), g.open(false, false))
	const n = 6
	codes := make(chan uint32, n)
	for i := range n {
		id := fmt.Sprintf("e%d", i)
		h := g.open(false, false)
		if err := g.exec("c1", id, h, g.execProcess("sh", "-c", fmt.Sprintf("exit %d", i))); err != nil {
			t.Fatal(err)
		}
		go func() {
			if _, err := g.s.Start(context.Background(), &taskapi.StartRequest{ID: "c1", ExecID: id}); err != nil {
				t.Error(err)
			}
			codes <- g.wait("c1", id)
		}()
	}
	sum := uint32(0)
	for range n {
		sum += <-codes
	}
	if sum != n*(n-1)/2 {
		t.Errorf("the exit statuses sum up to %d", sum)
	}
}
