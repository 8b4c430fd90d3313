package container

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/container/guesttest"
	"kuasar.io/kuasar/sandboxer/handover"
)

// newAnnouncingPod is a pod whose client announces.
func newAnnouncingPod(t testing.TB, direct bool) *pod {
	p := &pod{t: t, guest: guesttest.New(t), storage: &fakeStorage{}}
	o := p.options()
	o.Announced, o.Direct = true, direct
	p.Set = NewSet(o)
	t.Cleanup(p.Set.Close)
	return p
}

// logged is a spec whose output goes to a file.
func logged(file string, args ...string) *specs.Spec {
	s := spec(args...)
	s.Annotations = map[string]string{"log.console.driver": "json-file", "log.console.file": file}
	return s
}

func (p *pod) announcement(id string, s *specs.Spec) CreateRequest {
	return CreateRequest{ID: id, Spec: encode(p.t, s), Rootfs: []Mount{{Type: "bind", Source: p.t.TempDir()}}}
}

func (p *pod) announce(id string, s *specs.Spec) {
	p.t.Helper()
	if err := p.AnnounceContainer(testContext(p.t), p.announcement(id, s)); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pod) announceExec(id, execID string, io IO) {
	p.t.Helper()
	if err := p.AnnounceProcess(testContext(p.t), ExecRequest{ID: id, ExecID: execID, IO: io}); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pod) withdraw(id, execID string) {
	p.t.Helper()
	if err := p.Withdraw(testContext(p.t), id, execID); err != nil {
		p.t.Fatal(err)
	}
}

// direct makes and starts a container, or a process in it, as a client does that reaches the guest.
func (p *pod) direct(id, execID string, args ...string) {
	p.t.Helper()
	ctx, guest := testContext(p.t), p.guest.Task()
	var err error
	if execID == "" {
		_, err = guest.Create(ctx, &task.CreateTaskRequest{ID: id, Bundle: "/host/bundle", Stdout: "/host/ignored"})
	} else {
		_, err = guest.Exec(ctx, &task.ExecProcessRequest{
			ID: id, ExecID: execID, Stdout: "/host/ignored",
			Spec: &anypb.Any{TypeUrl: processURL, Value: encode(p.t, specs.Process{Args: args})},
		})
	}
	if err == nil {
		_, err = guest.Start(ctx, &task.StartRequest{ID: id, ExecID: execID})
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *pod) directWait(id, execID string) uint32 {
	p.t.Helper()
	answer, err := p.guest.Task().Wait(testContext(p.t), &task.WaitRequest{ID: id, ExecID: execID})
	if err != nil {
		p.t.Fatal(err)
	}
	return answer.GetExitStatus()
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s does not come true", what)
		}
	}
}

// logText joins the entries of a log, by stream. It checks what readers rely on.
func logText(t testing.TB, files ...string) map[string]string {
	t.Helper()
	text := map[string]string{}
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		lines := bufio.NewReader(f)
		for {
			line, err := lines.ReadBytes('\n')
			if err == io.EOF && len(line) == 0 {
				break
			}
			var e struct {
				Log, Stream string
				Time        time.Time
			}
			if err := errors.Join(err, json.Unmarshal(line, &e)); err != nil {
				t.Fatalf("%s: %q: %v", name, line, err)
			}
			if e.Time.IsZero() || e.Log == "" || strings.Contains(strings.TrimSuffix(e.Log, "\n"), "\n") || len(e.Log) > maxEntry {
				t.Fatalf("%s: %q is no entry of a log", name, line)
			}
			text[e.Stream] += e.Log
		}
	}
	return text
}

func TestAnnounced(t *testing.T) {
	p := newAnnouncingPod(t, false)
	ctx := testContext(t)
	file := filepath.Join(t.TempDir(), "console.log")
	request := CreateRequest{ID: "c", Bundle: "/var/lib/isulad/engines/x/c"}
	if _, err := p.Create(ctx, request); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("Create before the announcement: %v", err)
	}
	p.announce("c", logged(file, "false"))
	p.announce("c", logged(file, "echo", "hello")) // replaces
	if got := p.Announced(); len(got) != 1 || got["c"] == nil || p.Len() != 1 {
		t.Errorf("announced are %v, Len is %d", got, p.Len())
	}
	if _, err := p.Create(ctx, request); err != nil {
		t.Fatal(err)
	}
	p.start("c", "")
	if exit := p.wait("c", ""); exit.Status != 0 {
		t.Errorf("exit status %d", exit.Status)
	}
	if got := logText(t, file)["stdout"]; got != "hello\n" {
		t.Errorf("the log has %q", got)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm()&^0o640 != 0 {
		t.Errorf("the log is %v, %v", info.Mode(), err)
	}
	if _, err := p.Delete(ctx, "c", ""); err != nil {
		t.Fatal(err)
	}
	if p.Announced()["c"] == nil || p.Len() != 1 || p.storage.holds("c") != nil {
		t.Error("the announcement has gone with the container, or its storage has not")
	}
	// A spec is kept for one container, and not for as long as the pod lives.
	p.Set.mu.Lock()
	kept := len(p.announced["c"].request.Spec) + len(p.announced["c"].request.Rootfs)
	p.Set.mu.Unlock()
	if _, err := p.Create(ctx, request); !errdefs.IsFailedPrecondition(err) || kept != 0 {
		t.Errorf("Create after deletion: %v; %d bytes and mounts are kept", err, kept)
	}
	p.announce("c", logged(file, "echo", "hello"))
	if _, err := p.Create(ctx, request); err != nil {
		t.Fatal(err)
	}
	p.start("c", "")
	p.wait("c", "")
	if got := logText(t, file)["stdout"]; got != "hello\nhello\n" {
		t.Errorf("the log has %q", got)
	}
	p.withdraw("c", "")
	p.withdraw("c", "")
	if len(p.Announced()) != 0 || p.Len() != 0 || p.storage.holds("c") != nil || p.guest.Known("c") {
		t.Error("something is left of a withdrawn container")
	}
}

func TestWithdrawRunning(t *testing.T) {
	p := newAnnouncingPod(t, false)
	file := filepath.Join(t.TempDir(), "log")
	p.guest.Programs["last words"] = func(ctx context.Context, p *guesttest.Process) uint32 {
		<-ctx.Done()
		p.Stdout.Write([]byte("farewell"))
		return 0
	}
	p.announce("c", logged(file, "last words"))
	if _, err := p.Create(testContext(t), CreateRequest{ID: "c"}); err != nil {
		t.Fatal(err)
	}
	p.start("c", "")
	p.Set.mu.Lock()
	first := p.containers["c"].init // as a client has it that waits already
	p.Set.mu.Unlock()
	p.withdraw("c", "")
	<-first.exited
	if first.exit.Status != 137 {
		t.Errorf("exit status %d", first.exit.Status)
	}
	if got := logText(t, file)["stdout"]; got != "farewell" {
		t.Errorf("the log has %q", got)
	}
}

// TestForgottenExecs does what iSulad does: it deletes no exec.
func TestForgottenExecs(t *testing.T) {
	p := newAnnouncingPod(t, false)
	p.announce("c", spec("sleep"))
	if _, err := p.Create(testContext(t), CreateRequest{ID: "c"}); err != nil {
		t.Fatal(err)
	}
	p.start("c", "")
	known := func(execID string) bool { _, err := p.State("c", execID); return err == nil }

	p.announceExec("c", "done", IO{})
	p.exec("c", "done", IO{}, "true")
	p.start("c", "done")
	p.wait("c", "done")
	if got := p.Announced()["c"]; !slices.Equal(got, []string{"done"}) {
		t.Errorf("announced are %v", got)
	}
	p.withdraw("c", "done")
	eventually(t, "the end of a withdrawn exec", func() bool { return !known("done") })

	// One that nobody waits for is withdrawn while it runs.
	release := make(chan struct{})
	p.guest.Programs["long"] = func(context.Context, *guesttest.Process) uint32 { <-release; return 0 }
	p.announceExec("c", "running", IO{})
	p.exec("c", "running", IO{}, "long")
	p.start("c", "running")
	p.withdraw("c", "running")
	if p.status("c", "running") != Running || len(p.Announced()["c"]) != 0 {
		t.Error("the withdrawal has ended a running process, or did not happen")
	}
	close(release)
	eventually(t, "the end of an exec", func() bool { return !known("running") })

	for i := range maxOldExecs + 20 {
		id := fmt.Sprintf("e%d", i)
		p.exec("c", id, IO{}, "true")
		p.start("c", id)
		p.wait("c", id)
	}
	eventually(t, "a bound of old execs", func() bool {
		n := 0
		for _, r := range p.Records()[0].Processes {
			if r.ExecID != "" && !r.Deleted {
				n++
			}
		}
		return n <= maxOldExecs
	})
	if !known(fmt.Sprintf("e%d", maxOldExecs+19)) || known("e0") {
		t.Error("the wrong ones were dropped")
	}
}

func TestRefusedAnnouncements(t *testing.T) {
	dir := t.TempDir()
	write := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	file := write("file")
	link := filepath.Join(dir, "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	logLink := filepath.Join(dir, "loglink")
	if err := os.Symlink(file, logLink); err != nil {
		t.Fatal(err)
	}
	fifo := mkfifo(t, "fifo")
	big := spec("true")
	big.Process.Env = []string{strings.Repeat("x", maxSpec)}
	privileged := spec("true")
	privileged.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/sda", Type: "b", Major: 8}}
	rooted := func(source string) func(*CreateRequest) {
		return func(r *CreateRequest) { r.Rootfs = []Mount{{Type: "bind", Source: source}} }
	}
	annotated := func(key, value string) func(*CreateRequest) {
		return func(r *CreateRequest) {
			s := logged(filepath.Join(dir, "log"), "true")
			s.Annotations[key] = value
			r.Spec = encode(t, s)
		}
	}
	for name, c := range map[string]struct {
		change func(*CreateRequest)
		want   string
	}{
		"no id":          {func(r *CreateRequest) { r.ID = "../c" }, "is not valid"},
		"no spec":        {func(r *CreateRequest) { r.Spec = nil }, "no spec"},
		"bad spec":       {func(r *CreateRequest) { r.Spec = []byte("{") }, "cannot decode"},
		"big spec":       {func(r *CreateRequest) { r.Spec = encode(t, big) }, fmt.Sprint(maxSpec)},
		"no root":        {func(r *CreateRequest) { r.Rootfs = nil }, "has none"},
		"file as root":   {rooted(file), "regular file"},
		"FIFO as root":   {rooted(fifo), "neither"},
		"link as root":   {rooted(link), "symbolic link"},
		"detour":         {rooted(dir + "/../" + filepath.Base(dir)), "without detours"},
		"relative root":  {rooted("rootfs"), "absolute"},
		"host's root":    {rooted("/"), "absolute"},
		"NUL in root":    {rooted(dir + "\x00"), "absolute"},
		"missing root":   {rooted(dir + "/missing"), "no such file"},
		"NUL in stream":  {func(r *CreateRequest) { r.IO.Stdout = "/a\x00b" }, "not valid"},
		"unknown scheme": {func(r *CreateRequest) { r.IO.Stdout = "binary:///x" }, "not supported"},
		"relative log":   {annotated(logPath, "log"), logPath},
		"log's detour":   {annotated(logPath, dir+"/../log"), logPath},
		"host's device":  {func(r *CreateRequest) { r.Spec = encode(t, privileged) }, "run this one unprivileged"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, direct := range []bool{false, true} {
				p := newAnnouncingPod(t, direct)
				r := p.announcement("c", spec("true"))
				c.change(&r)
				err := p.AnnounceContainer(testContext(t), r)
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("direct=%v: %v, want %q", direct, err, c.want)
				}
				if p.Len() != 0 || p.storage.holds("c") != nil || p.guest.Known("c") {
					t.Errorf("direct=%v: something is left", direct)
				}
			}
		})
	}
	for name, path := range map[string]string{"link": logLink, "FIFO": fifo, "directory": dir, "no directory": dir + "/no/log"} {
		t.Run("log at a "+name, func(t *testing.T) {
			p := newAnnouncingPod(t, true)
			err := p.AnnounceContainer(testContext(t), p.announcement("c", logged(path, "true")))
			if !errdefs.IsInvalidArgument(err) || p.Len() != 0 || p.storage.holds("c") != nil {
				t.Errorf("%v; Len is %d", err, p.Len())
			}
		})
	}
	p := newPod(t)
	if err := p.AnnounceContainer(testContext(t), p.announcement("c", spec("true"))); !errdefs.IsNotImplemented(err) {
		t.Errorf("a client that does not announce: %v", err)
	}
	p.run("c", IO{}, "sleep")
	if err := p.Withdraw(testContext(t), "c", ""); !errdefs.IsNotFound(err) || p.status("c", "") != Running {
		t.Errorf("a withdrawal of what was not announced: %v", err)
	}
}

func TestTooManySpecs(t *testing.T) {
	p := newAnnouncingPod(t, false)
	s := spec("true")
	s.Process.Env = []string{strings.Repeat("x", maxSpec-4096)}
	for i := range 100 {
		err := p.AnnounceContainer(testContext(t), p.announcement(fmt.Sprintf("c%d", i), s))
		if errdefs.IsResourceExhausted(err) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Error("there is no bound")
}

func TestMountedBlockDevice(t *testing.T) {
	device := ""
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		source := fields[len(fields)-2]
		var st unix.Stat_t
		if strings.HasPrefix(source, "/dev/") && unix.Lstat(source, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK {
			device = source
		}
	}
	if device == "" {
		t.Skip("no block device is mounted here that has a node in /dev")
	}
	if err := checkRootfs(Mount{Type: "ext4", Source: device}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "is mounted on the host") {
		t.Errorf("%s: %v", device, err)
	}
}

// TestDeletedOften: a guest that tells of a deletion without end costs the host one goroutine.
func TestDeletedOften(t *testing.T) {
	p := newAnnouncingPod(t, true)
	p.announce("c", logged(filepath.Join(t.TempDir(), "log"), "true"))
	_, release, err := p.hold(testContext(t), "c", false)
	if err != nil {
		t.Fatal(err)
	}
	name := p.guest.Direct("c", "").Announcement
	before := runtime.NumGoroutine()
	for range 10000 {
		p.Deleted("c", name)
	}
	if n := runtime.NumGoroutine() - before; n > 100 {
		t.Errorf("%d goroutines more", n)
	}
	release()
	eventually(t, "the release of the storage", func() bool { return p.storage.holds("c") == nil })
}

func TestDirect(t *testing.T) {
	p := newAnnouncingPod(t, true)
	file := filepath.Join(t.TempDir(), "log")
	p.guest.Programs["both"] = func(_ context.Context, p *guesttest.Process) uint32 {
		fmt.Fprint(p.Stdout, "to out\n")
		fmt.Fprint(p.Stderr, "to err\nrest")
		return 3
	}
	p.announce("c", logged(file, "both"))
	if !slices.Contains(p.storage.holds("c"), "rootfs") {
		t.Error("its storage is not there")
	}
	d := p.guest.Direct("c", "")
	if d == nil || d.Stdin != "" || !strings.HasPrefix(d.Stdout, protocol.StdioScheme) || !strings.HasPrefix(d.Stderr, protocol.StdioScheme) {
		t.Fatalf("the guest was told %v", d)
	}
	if _, err := p.Create(testContext(t), CreateRequest{ID: "c"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("Create at the daemon: %v", err)
	}
	p.announce("c", logged(file, "both")) // not made yet: replaces
	second := p.guest.Direct("c", "").Announcement
	if d.Announcement == "" || second == "" || second == d.Announcement {
		t.Errorf("the announcements are named %q and %q", d.Announcement, second)
	}
	if err := p.AnnounceProcess(testContext(t), ExecRequest{ID: "d", ExecID: "e"}); !errdefs.IsNotFound(err) {
		t.Errorf("a process in an unknown container: %v", err)
	}
	p.direct("c", "")
	if status := p.directWait("c", ""); status != 3 {
		t.Errorf("exit status %d", status)
	}
	eventually(t, "the end of the log", func() bool { return strings.HasSuffix(logText(t, file)["stderr"], "rest") })
	if got := logText(t, file); got["stdout"] != "to out\n" || got["stderr"] != "to err\nrest" {
		t.Errorf("the log has %q", got)
	}
	if _, err := p.guest.Task().Delete(testContext(t), &task.DeleteRequest{ID: "c"}); err != nil {
		t.Fatal(err)
	}
	p.Deleted("c", d.Announcement) // of the announcement that was replaced
	p.Deleted("nobody", second)
	if p.storage.holds("c") == nil {
		t.Error("the end of another container has released the storage")
	}
	p.Deleted("c", second)
	p.Deleted("c", second)
	eventually(t, "the release of the storage", func() bool { return p.storage.holds("c") == nil })
	if p.Announced()["c"] == nil || p.Len() != 1 {
		t.Error("the announcement has gone with the container")
	}
	p.announce("c", logged(file, "both")) // again, and made again
	p.direct("c", "")
	p.directWait("c", "")
	p.withdraw("c", "")
	p.withdraw("c", "")
	if got := logText(t, file); got["stdout"] != "to out\nto out\n" || got["stderr"] != "to err\nrestto err\nrest" {
		t.Errorf("the log has %q", got)
	}
	if p.Len() != 0 || p.storage.holds("c") != nil || p.guest.Known("c") {
		t.Error("something is left of a withdrawn container")
	}
}

func TestDirectMadeIsNotReplaced(t *testing.T) {
	p := newAnnouncingPod(t, true)
	p.announce("c", spec("sleep"))
	p.direct("c", "")
	p.announce("c", spec("false"))
	if slices.Contains(p.guest.Calls(), "PurgeContainer c") {
		t.Error("a running container was purged")
	}
	p.withdraw("c", "")
	if p.guest.Known("c") {
		t.Error("it was not purged when it was withdrawn")
	}
}

func TestDirectExec(t *testing.T) {
	p := newAnnouncingPod(t, true)
	p.announce("c", spec("sleep"))
	p.direct("c", "")

	// As iSulad has it: outputs open for reading, the input for both.
	f := newFIFOs(t, true)
	f.in = openEnd(t, f.Stdin, os.O_RDWR)
	p.announceExec("c", "cat", f.IO)
	f.collect()
	p.direct("c", "cat", "cat")
	text := stream(100_000, 5)
	if _, err := f.in.Write(text); err != nil {
		t.Fatal(err)
	}
	f.in.Close()
	if status := p.directWait("c", "cat"); status != 0 {
		t.Errorf("exit status %d", status)
	}
	p.withdraw("c", "cat")
	f.ends(t)
	sameBytes(t, "the echo", f.stdout.Bytes(), text)

	// One that was never made.
	f = newFIFOs(t, false)
	p.announceExec("c", "never", f.IO)
	f.collect()
	p.withdraw("c", "never")
	f.ends(t)

	// One that runs on after it was withdrawn.
	release := make(chan struct{})
	p.guest.Programs["late"] = func(_ context.Context, p *guesttest.Process) uint32 {
		<-release
		fmt.Fprint(p.Stdout, "late")
		return 0
	}
	f = newFIFOs(t, false)
	p.announceExec("c", "late", f.IO)
	f.collect()
	p.direct("c", "late", "late")
	p.withdraw("c", "late")
	if len(p.Announced()["c"]) != 0 {
		t.Errorf("announced are %v", p.Announced())
	}
	close(release)
	f.ends(t)
	if got := f.stdout.String(); got != "late" {
		t.Errorf("it said %q", got)
	}

	// Where the guest listens.
	io := IO{Stdin: "vsock://7:2000", Stdout: "vsock://7:2001", Stderr: "vsock://7:2002"}
	p.announceExec("c", "vsock", io)
	if d := p.guest.Direct("c", "vsock"); d.GetStdin() != io.Stdin || d.GetStdout() != io.Stdout || d.GetStderr() != io.Stderr {
		t.Errorf("the guest was told %v", d)
	}
	p.withdraw("c", "vsock")
	for _, bad := range []string{"vsock://7", "vsock://7:", "vsock://:1", "vsock://7:0", "vsock://-1:1", "vsock://7:1:1", "vsock://7:4294967296", "vsock://07:1", "/not a FIFO\x00"} {
		err := p.AnnounceProcess(testContext(t), ExecRequest{ID: "c", ExecID: "bad", IO: IO{Stdout: bad}})
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	regular := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(regular, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := p.AnnounceProcess(testContext(t), ExecRequest{ID: "c", ExecID: "bad", IO: IO{Stdout: regular}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a regular file: %v", err)
	}
	eventually(t, "the end of all processes", func() bool { return len(p.Records()[0].Announced.Processes) == 0 })
}

// TestDirectUnread withdraws what a client does not read.
func TestDirectUnread(t *testing.T) {
	p := newAnnouncingPod(t, true)
	p.killGrace = 50 * time.Millisecond
	p.guest.Programs["flood"] = func(_ context.Context, p *guesttest.Process) uint32 {
		p.Stdout.Write(make([]byte, 2<<20))
		return 0
	}
	p.announce("c", spec("sleep"))
	p.direct("c", "")
	f := newFIFOs(t, false)
	p.announceExec("c", "flood", f.IO)
	p.direct("c", "flood", "flood")
	p.withdraw("c", "flood")
	p.withdraw("c", "")
	eventually(t, "the end of the FIFO", func() bool {
		var b [64 << 10]byte
		n, err := f.out.Read(b[:])
		return n == 0 && err == io.EOF
	})
}

func TestDirectGuestGone(t *testing.T) {
	p := newAnnouncingPod(t, true)
	file := filepath.Join(t.TempDir(), "log")
	p.guest.Programs["talk"] = func(ctx context.Context, p *guesttest.Process) uint32 {
		fmt.Fprint(p.Stdout, "half a line")
		<-ctx.Done()
		return 0
	}
	p.announce("c", logged(file, "talk"))
	p.direct("c", "")
	f := newFIFOs(t, false)
	p.announceExec("c", "e", f.IO)
	f.collect()
	p.direct("c", "e", "talk")
	eventually(t, "output", func() bool {
		r := p.Records()[0].Announced
		return r.Streams.Consumed[0] > 0 && r.Processes[0].Consumed[0] > 0
	})
	p.guest.Die()
	p.GuestGone(time.Now())
	f.ends(t)
	if got := f.stdout.String(); got != "half a line" {
		t.Errorf("the exec said %q", got)
	}
	if got := logText(t, file)["stdout"]; got != "half a line" {
		t.Errorf("the log has %q", got)
	}
	if p.storage.holds("c") != nil || p.Announced()["c"] == nil {
		t.Error("the storage is left, or the announcement is not")
	}
	if err := p.AnnounceContainer(testContext(t), p.announcement("d", spec("true"))); !errdefs.IsUnavailable(err) {
		t.Errorf("announcing to a guest that is gone: %v", err)
	}
	p.withdraw("c", "e")
	p.withdraw("c", "")
	if p.Len() != 0 {
		t.Errorf("%d containers are left", p.Len())
	}
}

func TestDirectFailure(t *testing.T) {
	p := newAnnouncingPod(t, true)
	file := filepath.Join(t.TempDir(), "log")
	for _, method := range []string{"PrepareContainer", "PrepareProcess"} {
		p.guest.Intercept(func(_ context.Context, m, _, _ string) error {
			if m == method {
				return errors.New("no")
			}
			return nil
		})
		err := p.AnnounceContainer(testContext(t), p.announcement("c", logged(file, "sleep")))
		if method == "PrepareContainer" {
			if err == nil || p.Len() != 0 || p.storage.holds("c") != nil || len(p.journalled()) != 0 {
				t.Errorf("%v; %d containers, records %+v", err, p.Len(), p.journalled())
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		f := newFIFOs(t, false)
		err = p.AnnounceProcess(testContext(t), ExecRequest{ID: "c", ExecID: "e", IO: f.IO})
		if err == nil || len(p.Announced()["c"]) != 0 {
			t.Errorf("%v; announced are %v", err, p.Announced())
		}
	}
	p.storage.failFree = errors.New("busy")
	if err := p.Withdraw(testContext(t), "c", ""); err == nil || p.Announced()["c"] == nil {
		t.Errorf("the storage is held: %v", err)
	}
	p.storage.failFree = nil
	p.withdraw("c", "")
}

// TestRestoreAnnounced has another daemon take over.
func TestRestoreAnnounced(t *testing.T) {
	for _, direct := range []bool{false, true} {
		p := newAnnouncingPod(t, direct)
		file := filepath.Join(t.TempDir(), "log")
		p.announce("c", logged(file, "echo", "hello"))
		p.announce("d", spec("sleep"))
		p.announceExec("d", "e", IO{})
		p.HandOver()
		text := encode(t, p.journalled())
		var records []Record
		if err := json.Unmarshal(text, &records); err != nil {
			t.Fatal(err)
		}
		// One that a daemon was about to announce, and one that it had not decided about.
		records = append(records, Record{ID: "half", Processes: []ProcessRecord{{Status: Stopped, Deleted: true}}, Announced: &AnnouncementRecord{Making: true}})
		o := p.options()
		o.Announced, o.Direct = true, direct
		next := &pod{t: t, guest: p.guest, storage: p.storage, Set: NewSet(o)}
		t.Cleanup(next.Set.Close)
		if err := next.Restore(testContext(t), records); err != nil {
			t.Fatal(err)
		}
		if got := next.Announced(); len(got) != 2 || !slices.Equal(got["d"], []string{"e"}) || next.Len() != 2 {
			t.Errorf("announced are %v", got)
		}
		if !slices.Contains(p.guest.Calls(), "PurgeContainer half") {
			t.Error("a half announcement was not undone")
		}
		if direct {
			next.direct("c", "")
			next.directWait("c", "")
		} else {
			if _, err := next.Create(testContext(t), CreateRequest{ID: "c"}); err != nil {
				t.Fatal(err)
			}
			next.start("c", "")
			next.wait("c", "")
		}
		eventually(t, "the log", func() bool { return logText(t, file)["stdout"] == "hello\n" })

		// A daemon that does not know announcements finds nothing that it would refuse.
		for i := range records {
			records[i].Announced = nil
		}
		old := newPod(t)
		if err := old.Restore(testContext(t), records); err != nil || old.Len() != 0 {
			t.Errorf("an older daemon: %v, %d containers", err, old.Len())
		}
	}
}

func TestLegacyStats(t *testing.T) {
	p := newAnnouncingPod(t, false)
	p.guest.AnswerStats(func(string) (*task.StatsResponse, error) {
		m := &cgroup2.Metrics{
			Pids:   &cgroup2.PidsStat{Current: 4},
			CPU:    &cgroup2.CPUStat{UsageUsec: 7, SystemUsec: 2},
			Memory: &cgroup2.MemoryStat{Usage: 100, UsageLimit: 1000, Anon: 60, InactiveFile: 5, Pgfault: 9, SwapUsage: 1, SwapLimit: 1<<64 - 1},
			Io:     &cgroup2.IOStat{Usage: []*cgroup2.IOEntry{{Major: 8, Rbytes: 11, Wbytes: 12}}},
		}
		a := &anypb.Any{}
		err := a.MarshalFrom(m)
		return &task.StatsResponse{Stats: a}, err
	})
	p.announce("c", spec("sleep"))
	if _, err := p.Create(testContext(t), CreateRequest{ID: "c"}); err != nil {
		t.Fatal(err)
	}
	answer, err := p.Stats(testContext(t), "c")
	if err != nil {
		t.Fatal(err)
	}
	m, ok := answer.(*cgroup1.Metrics)
	if !ok {
		t.Fatalf("the answer is a %T", answer)
	}
	if m.Pids.Current != 4 || m.CPU.Usage.Total != 7000 || m.CPU.Usage.Kernel != 2000 || m.Memory.Usage.Usage != 100 || m.Memory.Usage.Limit != 1000 ||
		m.Memory.RSS != 60 || m.Memory.TotalInactiveFile != 5 || m.Memory.PgFault != 9 || m.Memory.Swap.Usage != 101 || m.Memory.Swap.Limit != 1<<64-1 {
		t.Errorf("the answer is %v", m)
	}
	var ops []string
	for _, e := range m.Blkio.IoServiceBytesRecursive {
		ops = append(ops, fmt.Sprint(e.Op, e.Value))
	}
	if !slices.Equal(ops, []string{"read11", "write12"}) {
		t.Errorf("operations on disks are %v", ops)
	}
}

// TestISuladSpec rewrites a spec as iSulad writes it.
func TestISuladSpec(t *testing.T) {
	s, volumes := rewritten(t, load(t, "testdata/isulad.json"), false)
	text := string(encode(t, s))
	for _, foreign := range []string{"/proc/4242", "/var/lib/isulad", "docker-default", "/usr/libexec/hook", "log.console", "native.umask", "/isulad/", "named"} {
		if strings.Contains(text, foreign) {
			t.Errorf("the spec for the guest mentions %q", foreign)
		}
	}
	const files = "/var/lib/isulad/sandbox/p/"
	if want := []string{files + "hostname rw", files + "hosts rw", files + "resolv.conf rw", "/var/lib/isulad/volumes/v/_data rw"}; !slices.Equal(volumes, want) {
		t.Errorf("volumes %q, want %q", volumes, want)
	}
	for _, ns := range s.Linux.Namespaces {
		if ns.Path != "" && !strings.HasPrefix(ns.Path, protocol.NamespaceDir) {
			t.Errorf("namespace %+v", ns)
		}
	}
	if m := mountAt(s, "/dev/shm"); m == nil || m.Source != protocol.ShmPath || slices.Contains(m.Options, "size=65536k") {
		t.Errorf("/dev/shm is %+v", m)
	}
	for _, destination := range []string{"/dev/mqueue", "/sys/fs/cgroup"} {
		if mountAt(s, destination) == nil {
			t.Errorf("%s is not mounted", destination)
		}
	}
	if u := s.Process.User; u.UID != 0 || u.Umask == nil || *u.Umask != 0o027 {
		t.Errorf("user %+v", u)
	}
	if l := s.Linux.Resources.Memory.Limit; l == nil || *l != -1 {
		t.Errorf("memory limit %v", l)
	}
	if s.Hooks != nil || s.Process.ApparmorProfile != "" || s.Linux.CgroupsPath != "/kuasar/c1" {
		t.Errorf("hooks %v, AppArmor profile %q, cgroup %q", s.Hooks, s.Process.ApparmorProfile, s.Linux.CgroupsPath)
	}
}

// --- logs ---

func openTestLog(t testing.TB, to LogFile) *logFile {
	l, err := openLogFile(to, newShelf(nil, "pod").niche("token", 1), [2]uint64{}, 2, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestLogEntries(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l := openTestLog(t, LogFile{Path: path})
	long := strings.Repeat("ä", maxEntry) // twice as many bytes
	for _, piece := range []string{"one\ntw", "o\n\n", "<&>\x00\n", "a\xffb\n", long[:maxEntry+1], long[maxEntry+1:], "\n", "end"} {
		if n, err := l.write(0, []byte(piece)); n != len(piece) || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
		if _, err := l.write(1, []byte("x\n")); err != nil {
			t.Fatal(err)
		}
	}
	l.finish(0)
	l.finish(0)
	got := logText(t, path)
	if want := "one\ntwo\n\n<&>\x00\na\ufffdb\n" + long + "\nend"; got["stdout"] != want {
		t.Errorf("%d bytes, want %d: %.80q", len(got["stdout"]), len(want), got["stdout"])
	}
	if got["stderr"] != strings.Repeat("x\n", 8) {
		t.Errorf("stderr %q", got["stderr"])
	}
	text, _ := os.ReadFile(path)
	if !bytes.Contains(text, []byte(`{"log":"<&>\u0000\n","stream":"stdout","time":"`)) {
		t.Errorf("no entry in the usual form: %.400s", text)
	}
	logSink{file: l, index: 1}.close()
	if n, err := l.write(1, []byte("late")); n != 0 || !errors.Is(err, os.ErrClosed) {
		t.Errorf("after close: %d, %v", n, err)
	}
}

func TestLogRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l := openTestLog(t, LogFile{Path: path, MaxSize: 4096, MaxFiles: 4})
	var want strings.Builder
	for i := range 100 {
		line := fmt.Sprintf("line %d %s\n", i, strings.Repeat("x", 50))
		want.WriteString(line)
		if _, err := l.write(0, []byte(line)); err != nil {
			t.Fatal(err)
		}
	}
	l.finish(0)
	var files []string
	for _, name := range []string{path + ".3", path + ".2", path + ".1", path} {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() > 4096 {
			t.Errorf("%s has %d bytes", name, info.Size())
		}
		files = append(files, name)
	}
	if _, err := os.Stat(path + ".4"); err == nil {
		t.Error("there are too many files")
	}
	got := logText(t, files...)["stdout"]
	if !strings.HasSuffix(want.String(), got) || len(got) < 4000 {
		t.Errorf("%d bytes are left, and they are not the last ones", len(got))
	}
	// One write of more than a file takes.
	l = openTestLog(t, LogFile{Path: path, MaxSize: 4096, MaxFiles: 1})
	if _, err := l.write(0, []byte(want.String())); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Size() > 4096 || info.Size() == 0 {
		t.Errorf("%v, %v", info, err)
	}
}

// TestLogTrouble takes the file away, and then its directory: the process goes on.
func TestLogTrouble(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "log")
	l := openTestLog(t, LogFile{Path: path})
	write := func(text string) {
		t.Helper()
		if n, err := l.write(0, []byte(text)); n != len(text) || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
	}
	write("gone\n")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	write("here\n")
	if got := logText(t, path)["stdout"]; got != "here\n" {
		t.Errorf("the new file has %q", got)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	write("lost\n")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l.opened = time.Time{} // as if a second had passed
	write("back\n")
	if got := logText(t, path)["stdout"]; got != "back\n" {
		t.Errorf("the new file has %q", got)
	}
	if (logSink{file: l}).position() != 20 {
		t.Errorf("the position is %d", logSink{file: l}.position())
	}
}

// TestFullDisk has the log on a file system without room.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount a small file system")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	path := filepath.Join(dir, "log")
	l := openTestLog(t, LogFile{Path: path})
	line := []byte(strings.Repeat("x", 1000) + "\n")
	for range 200 {
		if n, err := l.write(0, line); n != len(line) || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
	}
	if got := logText(t, path)["stdout"]; len(got)%len(line) != 0 || len(got) < 10*len(line) { // whole lines only
		t.Errorf("the log has %d bytes", len(got))
	}
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := l.write(0, []byte("room\n")); err != nil {
		t.Fatal(err)
	}
	if got := logText(t, path)["stdout"]; got != "room\n" {
		t.Errorf("the log has %q", got)
	}
}

// TestKilledInLog takes over from daemons that were killed at each point of a write.
func TestKilledInLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l := openTestLog(t, LogFile{Path: path})
	fd, err := unix.MemfdCreate("log", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	l.memory = os.NewFile(uintptr(fd), "log")
	defer l.memory.Close()
	if err := l.save(l.state, logWrite{}); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"one\n", "two\nthr"} {
		if _, err := l.write(0, []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	whole, _ := os.ReadFile(path)
	lines := bytes.SplitAfter(whole, []byte("\n"))
	takeOver := func() *logFile {
		n := &logFile{to: l.to, log: l.log, users: 2, niche: l.niche, memory: l.memory}
		if err := n.recover(); err != nil {
			t.Fatal(err)
		}
		return n
	}
	for size := len(lines[0]); size <= len(whole); size++ {
		if err := os.Truncate(path, int64(len(lines[0]))); err != nil {
			t.Fatal(err)
		}
		if f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0); err == nil {
			_, _ = f.Write(whole[len(lines[0]):size])
			f.Close()
		}
		n := takeOver()
		offset, partial := uint64(4), ""
		if size == len(whole) {
			offset, partial = 11, "thr"
		}
		if n.state.offsets[0] != offset || string(n.state.partial[0]) != partial {
			t.Fatalf("%d of %d bytes were written: it goes on at %d with %q", size, len(whole), n.state.offsets[0], n.state.partial[0])
		}
	}
	// A slot that was not filled in whole does not count.
	if _, err := l.memory.WriteAt([]byte("x"), int64(l.slot)*logSlot+20); err != nil {
		t.Fatal(err)
	}
	if n := takeOver(); n.state.offsets[0] != 4 {
		t.Errorf("it goes on at %d", n.state.offsets[0])
	}
	// Between these two daemons the log was rotated.
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	if n := takeOver(); n.state.offsets[0] != 4 {
		t.Errorf("it goes on at %d", n.state.offsets[0])
	}
}

// TestLogOf: what iSulad passes on unchecked keeps no container from running.
func TestLogOf(t *testing.T) {
	const path = "/var/log/pods/c.log"
	for name, c := range map[string]struct {
		driver, path, size, rotate string
		want                       *LogFile
	}{
		"as configured":   {"json-file", path, "30KB", "3", &LogFile{path, 30 << 10, 3}},
		"no driver":       {"", path, "", "", &LogFile{path, 0, 0}},
		"disable-log":     {"json-file", "none", "1MB", "7", nil},
		"no log":          {"none", path, "1MB", "7", nil},
		"no file":         {"json-file", "", "1MB", "7", nil},
		"another driver":  {"syslog", path, "1MB", "7", nil},
		"fraction":        {"json-file", path, "1.5MB", "7", &LogFile{path, 3 << 19, 7}},
		"unreadable size": {"json-file", path, "big", "3", &LogFile{path, 1 << 20, 3}},
		"unlimited size":  {"json-file", path, "-1", "3", &LogFile{path, 1 << 20, 3}},
		"unreadable file": {"json-file", path, "1MB", "many", &LogFile{path, 1 << 20, 7}},
		"too many files":  {"json-file", path, "1MB", "4294967295", &LogFile{path, 1 << 20, 7}},
	} {
		got, err := logOf(&specs.Spec{Annotations: map[string]string{
			logDriver: c.driver, logPath: c.path, logSize: c.size, logRotate: c.rotate,
		}}, slog.New(slog.DiscardHandler))
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, c.want)
		}
	}
}

func TestParseSize(t *testing.T) {
	for text, want := range map[string]int64{"30KB": 30 << 10, "1M": 1 << 20, "2GiB": 2 << 30, "4096": 4096, " 5 kb ": 5 << 10, "7b": 7, "0": 0, "1.5MB": 3 << 19, "0.0001K": 1} {
		if got, err := parseSize(text); err != nil || got != want {
			t.Errorf("%q: %d, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "KB", "-1", "-0.5M", "1KK", "9999999999G", "1X", "NaN", "Inf", "8388608T", "0x1p3Q"} {
		if got, err := parseSize(text); err == nil {
			t.Errorf("%q: %d", text, got)
		}
	}
}

// TestOrphanedStreams: what a daemon has opened for an announcement that it did not live to record ends
// with the next daemon, or the client would wait for that end for ever. The streams of others stay.
func TestOrphanedStreams(t *testing.T) {
	w := newWorld(t)
	store := handover.New(w.manager.Address(), nil, slog.New(slog.DiscardHandler))
	for _, name := range []string{"stdio/pod/lost.c-1/fifo", "stdio/pod/kept.c-1/fifo", "stdio/other/lost.c-1/fifo"} {
		r, f, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		defer f.Close()
		if err := store.PutAll("", map[string]*os.File{name: f}); err != nil {
			t.Fatal(err)
		}
	}
	next, err := w.manager.Store(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	newShelf(next, "pod").dropAllBut(map[string]bool{"kept.c": true})
	if names := next.Names(""); !slices.Equal(names, []string{"stdio/other/lost.c-1/fifo", "stdio/pod/kept.c-1/fifo"}) {
		t.Errorf("kept are %q", names)
	}
}
