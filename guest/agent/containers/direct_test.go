package containers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/guest/protocol/stdio"
)

const testCID = 42

// listenUnix stands in for vsock: port n is the socket n in dir.
func listenUnix(dir string) func(uint32) (net.Listener, error) {
	return func(port uint32) (net.Listener, error) {
		return net.Listen("unix", filepath.Join(dir, fmt.Sprint(port)))
	}
}

func port(n int) string { return fmt.Sprintf("vsock://%d:%d", testCID, n) }

// connect is what the client does to a stream.
func connect(t *testing.T, dir string, port int) *net.UnixConn {
	t.Helper()
	conn, err := net.Dial("unix", filepath.Join(dir, fmt.Sprint(port)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn.(*net.UnixConn)
}

// readAll reads a stream to its end.
func readAll(t *testing.T, conn net.Conn) string {
	t.Helper()
	b, err := io.ReadAll(conn)
	if err != nil {
		t.Errorf("after %d bytes: %v", len(b), err)
	}
	return string(b)
}

// quickly shortens what a test waits for on purpose.
func quickly(s *Service) {
	s.limits = limits{report: 50 * time.Millisecond, deliver: 20 * time.Second, connect: 20 * time.Second, drain: 20 * time.Second, lateWait: 20 * time.Second}
}

// client makes containers by itself, as iSulad does; the announcements come from the daemon.
type client struct {
	*guest
	dir string
}

func newClient(t *testing.T) *client {
	g := newGuest(t)
	quickly(g.s)
	return &client{g, filepath.Dir(g.socket)}
}

func (c *client) announce(id string, spec *specs.Spec, d *protocol.Direct, storages ...*protocol.Storage) {
	c.t.Helper()
	b, err := json.Marshal(spec)
	if err != nil {
		c.t.Fatal(err)
	}
	if err := c.s.Prepare(context.Background(), &protocol.PrepareContainerRequest{ContainerId: id, Spec: b, Direct: d, Storages: storages}); err != nil {
		c.t.Fatal(err)
	}
}

func createRequest(id string) *taskapi.CreateTaskRequest {
	return &taskapi.CreateTaskRequest{ID: id, Bundle: "/var/lib/isulad/engines/x/" + id, Stdout: "/fifo/of/the/host"}
}

// run announces, creates and starts a container.
func (c *client) run(id string, spec *specs.Spec, d *protocol.Direct) {
	c.t.Helper()
	c.announce(id, spec, d)
	if _, err := c.s.Create(context.Background(), createRequest(id)); err != nil {
		c.t.Fatal(err)
	}
	c.start(id, "")
}

func (c *client) announceExec(id, execID string, d *protocol.Direct) {
	c.t.Helper()
	if err := c.s.PrepareProcess(context.Background(), &protocol.PrepareProcessRequest{ContainerId: id, ExecId: execID, Direct: d}); err != nil {
		c.t.Fatal(err)
	}
}

// exec makes an announced exec.
func (c *client) exec(id, execID string, args ...string) error {
	c.t.Helper()
	b, err := json.Marshal(c.execProcess(args...))
	if err != nil {
		c.t.Fatal(err)
	}
	_, err = c.s.Exec(context.Background(), &taskapi.ExecProcessRequest{
		ID: id, ExecID: execID, Stdin: "/fifo/in", Stdout: "/fifo/out", Spec: &anypb.Any{Value: b},
	})
	return err
}

func (c *client) runExec(id, execID string, d *protocol.Direct, args ...string) {
	c.t.Helper()
	c.announceExec(id, execID, d)
	if err := c.exec(id, execID, args...); err != nil {
		c.t.Fatal(err)
	}
	c.start(id, execID)
}

func (c *client) purgeExec(id, execID string) {
	c.t.Helper()
	if err := c.s.PurgeProcess(context.Background(), &protocol.PurgeProcessRequest{ContainerId: id, ExecId: execID}); err != nil {
		c.t.Error(err)
	}
}

func TestDirectLife(t *testing.T) {
	c := newClient(t)
	ctx := context.Background()
	h := c.open(false, false)
	c.announce("c1", c.spec("sh", "-c", "echo ready; sleep 1000"), &protocol.Direct{Stdout: h.names.stdout, Stderr: h.names.stderr, Announcement: "first"},
		&protocol.Storage{Kind: protocol.Storage_TMPFS, MountPoint: filepath.Join(c.s.storageDir, "c1")})
	mounted := func() bool {
		table, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(string(table), filepath.Join(c.s.storageDir, "c1"))
	}
	if _, err := c.s.Create(ctx, createRequest("c2")); !errdefs.IsFailedPrecondition(class(err)) {
		t.Errorf("create without announcement: %v", err)
	}
	if _, err := c.s.Create(ctx, createRequest("c1")); err != nil {
		t.Fatal(err)
	}
	pid := c.start("c1", "")
	h.ready()
	if err := c.kill("c1", "", 0); err != nil {
		t.Errorf("signal 0: %v", err)
	}
	stats := func() {
		t.Helper()
		r, err := c.s.Stats(ctx, &taskapi.StatsRequest{ID: "c1"})
		if err != nil || r.Stats.TypeUrl != "io.containerd.cgroups.v1.Metrics" || len(r.Stats.Value) == 0 {
			t.Errorf("stats: %v, %v", r, err)
		}
	}
	pids := func() {
		t.Helper()
		r, err := c.s.Pids(ctx, &taskapi.PidsRequest{ID: "c1"})
		if err != nil || len(r.Processes) == 0 || r.Processes[0].Pid != pid {
			t.Errorf("pids: %v, %v, want %d first", r, err, pid)
		}
	}
	stats()
	pids()
	if err := c.kill("c1", "", unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code := c.wait("c1", ""); code != 137 {
		t.Errorf("exit status %d", code)
	}
	if err := c.kill("c1", "", 0); !errdefs.IsNotFound(class(err)) {
		t.Errorf("signal 0 after the end: %v", err)
	}
	stats()
	pids()
	if len(c.s.Deleted()) != 0 || !mounted() {
		t.Errorf("before delete: deleted %v, storage mounted %v", c.s.Deleted(), mounted())
	}
	c.delete("c1", "")
	if mounted() {
		t.Error("the storage of the deleted container is mounted")
	}
	if _, err := c.s.Shutdown(ctx, &taskapi.ShutdownRequest{ID: "c1"}); err != nil {
		t.Errorf("shutdown: %v", err)
	}
	if len(c.deleted) != 1 || c.deleted[0] != "c1 by first" || len(c.s.Deleted()) != 1 {
		t.Errorf("told of deleted %v, lists %v", c.deleted, c.s.Deleted())
	}
	if _, err := c.s.Create(ctx, createRequest("c1")); !errdefs.IsFailedPrecondition(class(err)) || !strings.Contains(err.Error(), "announce it again") {
		t.Errorf("second create: %v", err)
	}
	c.run("c1", c.spec("true"), &protocol.Direct{})
	c.wait("c1", "")
	if len(c.s.Deleted()) != 0 {
		t.Errorf("made again and deleted: %v", c.s.Deleted())
	}
	if err := c.s.Purge(ctx, "c1"); err != nil {
		t.Error(err)
	}
	if len(c.s.Deleted()) != 0 || len(c.deleted) != 1 {
		t.Errorf("after purge: %v, told of %v", c.s.Deleted(), c.deleted)
	}
}

// A client does not delete what could not be created, and some never purge it either.
func TestDirectThatCannotBeCreated(t *testing.T) {
	c := newClient(t)
	spec := c.spec("true")
	spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/data", Source: "/nonexistent/volume", Type: "bind", Options: []string{"rbind"}})
	storage := filepath.Join(c.s.storageDir, "c1")
	c.announce("c1", spec, &protocol.Direct{Announcement: "first"}, &protocol.Storage{Kind: protocol.Storage_TMPFS, MountPoint: storage})
	_, err := c.s.Create(context.Background(), createRequest("c1"))
	if err == nil || !strings.Contains(err.Error(), "/nonexistent/volume") {
		t.Errorf("create: %v", err)
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(table), storage) {
		t.Error("its storage is mounted")
	}
	if len(c.deleted) != 1 || c.deleted[0] != "c1 by first" || len(c.s.Deleted()) != 1 {
		t.Errorf("told of deleted %v, lists %v", c.deleted, c.s.Deleted())
	}
	c.run("c1", c.spec("true"), &protocol.Direct{})
	c.wait("c1", "")
	c.delete("c1", "")
	if err := c.s.Purge(context.Background(), "c1"); err != nil {
		t.Error(err)
	}
}

// The exit is reported and the container deleted although the daemon is away, and its successor gets
// all of the output.
func TestDirectWhileTheDaemonIsAway(t *testing.T) {
	c := newClient(t)
	ctx := context.Background()
	dial := func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", c.socket)
	}
	for _, id := range []string{"c1", "c2"} {
		token := "later-" + id
		c.run(id, c.spec("sh", "-c", "yes 0123456 | head -c 200000; exit 3"), &protocol.Direct{Stdout: "stdio://" + token})
		if code := c.wait(id, ""); code != 3 {
			t.Errorf("exit status %d", code)
		}
		c.delete(id, "")
		if id == "c2" {
			// A daemon that purges has no more use for the output.
			if err := c.s.Purge(ctx, id); err != nil {
				t.Error(err)
			}
		}
		r, err := stdio.OpenOutput(ctx, dial, token, stdio.Stdout, 0)
		var out strings.Builder
		if err == nil {
			_, err = r.WriteTo(&out)
			r.Close()
		}
		if id == "c1" && (err != nil || out.Len() != 200000) {
			t.Errorf("%d bytes, %v", out.Len(), err)
		}
		if id == "c2" && !errors.Is(err, stdio.ErrLost) {
			t.Errorf("after purge %d bytes, %v", out.Len(), err)
		}
	}
}

func TestDirectExec(t *testing.T) {
	c := newClient(t)
	c.run("c1", c.spec("sleep", "1000"), &protocol.Direct{})
	all := &protocol.Direct{Stdin: port(2000), Stdout: port(2001), Stderr: port(2002)}
	outs := &protocol.Direct{Stdout: port(2000), Stderr: port(2001)}

	t.Run("a command that has ended before anyone connects", func(t *testing.T) {
		c.runExec("c1", "quick", outs, "sh", "-c", "echo out; echo err >&2; exit 4")
		if code := c.wait("c1", "quick"); code != 4 {
			t.Errorf("exit status %d", code)
		}
		c.purgeExec("c1", "quick")
		stdout := connect(t, c.dir, 2000)
		b := make([]byte, 4)
		if _, err := io.ReadFull(stdout, b); err != nil || string(b) != "out\n" {
			t.Errorf("%q, %v", b, err)
		}
		// The first stream goes on until the second one is read as well.
		stdout.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if n, err := stdout.Read(b); !isTimeout(err) {
			t.Errorf("stdout ended before stderr was connected: %d, %v", n, err)
		}
		stdout.SetReadDeadline(time.Now().Add(20 * time.Second))
		stderr := connect(t, c.dir, 2001)
		if got := readAll(t, stderr); got != "err\n" {
			t.Errorf("stderr %q", got)
		}
		if got := readAll(t, stdout); got != "" {
			t.Errorf("stdout, more: %q", got)
		}
		// A late question still has its answer, and the ports are free.
		if code := c.wait("c1", "quick"); code != 4 {
			t.Errorf("exit status %d", code)
		}
		until(t, "nothing listens", func() bool {
			c.s.mu.Lock()
			defer c.s.mu.Unlock()
			return len(c.s.listening) == 0
		})
	})

	t.Run("much output for a late reader", func(t *testing.T) {
		c.runExec("c1", "much", outs, "sh", "-c", "yes 0123456 | head -c 3000000; echo done >&2")
		stdout, stderr := connect(t, c.dir, 2000), connect(t, c.dir, 2001)
		if got := readAll(t, stdout); len(got) != 3000000 {
			t.Errorf("%d bytes", len(got))
		}
		if got := readAll(t, stderr); got != "done\n" {
			t.Errorf("%q", got)
		}
		if code := c.wait("c1", "much"); code != 0 {
			t.Errorf("exit status %d", code)
		}
	})

	t.Run("input", func(t *testing.T) {
		c.runExec("c1", "input", all, "sh", "-c", "cat; echo end")
		stdin, stdout, stderr := connect(t, c.dir, 2000), connect(t, c.dir, 2001), connect(t, c.dir, 2002)
		io.WriteString(stdin, "through")
		b := make([]byte, 7)
		if _, err := io.ReadFull(stdout, b); err != nil || string(b) != "through" {
			t.Errorf("%q, %v", b, err)
		}
		stdin.Close()
		if got := readAll(t, stdout) + readAll(t, stderr); got != "end\n" {
			t.Errorf("%q", got)
		}
		c.wait("c1", "input")
	})

	t.Run("input that is not read", func(t *testing.T) {
		c.runExec("c1", "unread", all, "sh", "-c", "exec <&-; echo out; sleep 0.1; echo more")
		stdin, stdout, stderr := connect(t, c.dir, 2000), connect(t, c.dir, 2001), connect(t, c.dir, 2002)
		if n, err := stdin.Write(make([]byte, 4<<20)); err != nil {
			t.Errorf("after %d bytes: %v", n, err)
		}
		if got := readAll(t, stdout) + readAll(t, stderr); got != "out\nmore\n" {
			t.Errorf("%q", got)
		}
		// The input stays writable until the client hangs up.
		if _, err := stdin.Write([]byte("x")); err != nil {
			t.Errorf("input was closed before the client has closed: %v", err)
		}
		stdout.Close()
		stderr.Close()
		if got := readAll(t, stdin); got != "" {
			t.Errorf("%q", got)
		}
	})

	t.Run("a reader that leaves", func(t *testing.T) {
		c.runExec("c1", "leaves", outs, "sh", "-c", "yes | head -c 1000000; echo err >&2; exit 6")
		connect(t, c.dir, 2000).Close()
		stderr := connect(t, c.dir, 2001)
		if code := c.wait("c1", "leaves"); code != 6 {
			t.Errorf("exit status %d", code)
		}
		if got := readAll(t, stderr); got != "err\n" {
			t.Errorf("%q", got)
		}
	})

	t.Run("a program that does not exist", func(t *testing.T) {
		c.announceExec("c1", "missing", outs)
		if err := c.exec("c1", "missing", "no-such-program"); err != nil {
			t.Fatal(err)
		}
		if _, err := c.s.Start(context.Background(), &taskapi.StartRequest{ID: "c1", ExecID: "missing"}); err == nil {
			t.Error("it was started")
		}
		stdout, stderr := connect(t, c.dir, 2000), connect(t, c.dir, 2001)
		if got := readAll(t, stdout) + readAll(t, stderr); got != "" {
			t.Errorf("%q", got)
		}
	})

	t.Run("a port that is handed out again", func(t *testing.T) {
		c.runExec("c1", "old", outs, "echo", "old")
		c.wait("c1", "old")
		c.purgeExec("c1", "old")
		// Nobody has connected, and the next command gets the number.
		c.runExec("c1", "new", &protocol.Direct{Stdout: port(2000)}, "echo", "new")
		if got := readAll(t, connect(t, c.dir, 2000)); got != "new\n" {
			t.Errorf("%q", got)
		}
		readAll(t, connect(t, c.dir, 2001)) // of the old one
	})

	t.Run("a terminal", func(t *testing.T) {
		c.announceExec("c1", "tty", &protocol.Direct{Stdin: port(2000), Stdout: port(2001)})
		b, _ := json.Marshal(c.execProcess("sh", "-c", "tty; stty size; exit 2"))
		ctx := context.Background()
		if _, err := c.s.Exec(ctx, &taskapi.ExecProcessRequest{ID: "c1", ExecID: "tty", Terminal: true, Spec: &anypb.Any{Value: b}}); err != nil {
			t.Fatal(err)
		}
		if _, err := c.s.ResizePty(ctx, &taskapi.ResizePtyRequest{ID: "c1", ExecID: "tty", Width: 100, Height: 30}); err != nil {
			t.Error(err)
		}
		c.start("c1", "tty")
		connect(t, c.dir, 2000)
		if got := readAll(t, connect(t, c.dir, 2001)); !strings.Contains(got, "/dev/pts/") || !strings.Contains(got, "30 100\r\n") {
			t.Errorf("%q", got)
		}
		if code := c.wait("c1", "tty"); code != 2 {
			t.Errorf("exit status %d", code)
		}
	})

	t.Run("streams of the daemon", func(t *testing.T) {
		h := c.open(true, false)
		c.runExec("c1", "bridged", &protocol.Direct{Stdin: h.names.stdin, Stdout: h.names.stdout, Stderr: h.names.stderr}, "sh", "-c", "cat; exit 8")
		h.in.Write([]byte("bridged"))
		h.in.CloseWrite()
		if code := c.wait("c1", "bridged"); code != 8 {
			t.Errorf("exit status %d", code)
		}
		h.group.Wait()
		if h.stdout.String() != "bridged" {
			t.Errorf("%q", h.stdout.String())
		}
	})

	// An exec that is read when its container is purged is read to its end.
	t.Run("purge of the container", func(t *testing.T) {
		c.runExec("c1", "last", outs, "sh", "-c", "yes | head -c 50000; echo ready >&2; sleep 1000")
		stdout, stderr := connect(t, c.dir, 2000), connect(t, c.dir, 2001)
		b := make([]byte, 6)
		if _, err := io.ReadFull(stderr, b); err != nil {
			t.Fatal(err)
		}
		if err := c.s.Purge(context.Background(), "c1"); err != nil {
			t.Fatal(err)
		}
		if got := readAll(t, stdout); len(got) != 50000 {
			t.Errorf("%d bytes", len(got))
		}
		if got := readAll(t, stderr); got != "" {
			t.Errorf("%q", got)
		}
	})
}

// A process whose client does not connect runs without streams.
func TestDirectExecWithoutItsPeers(t *testing.T) {
	c := newClient(t)
	c.s.limits.connect = 50 * time.Millisecond
	c.run("c1", c.spec("sleep", "1000"), &protocol.Direct{})
	c.runExec("c1", "alone", &protocol.Direct{Stdin: port(2000), Stdout: port(2001), Stderr: port(2002)}, "sh", "-c", "read x; yes | head -c 1000000; exit 5")
	if code := c.wait("c1", "alone"); code != 5 {
		t.Errorf("exit status %d", code)
	}
	if _, err := net.Dial("unix", filepath.Join(c.dir, "2001")); err == nil {
		t.Error("the guest still listens")
	}
}

// Its announcement taken back, a process runs on, and is forgotten some time after its end.
func TestDirectExecPurgedWhileItRuns(t *testing.T) {
	c := newClient(t)
	c.s.limits.lateWait = 300 * time.Millisecond
	c.run("c1", c.spec("sleep", "1000"), &protocol.Direct{})
	c.runExec("c1", "runs", &protocol.Direct{Stdin: port(2000), Stdout: port(2001)}, "sh", "-c", "read x; echo got $x; exit 9")
	c.purgeExec("c1", "runs")
	stdin, stdout := connect(t, c.dir, 2000), connect(t, c.dir, 2001)
	ended := make(chan uint32)
	go func() {
		r, err := c.s.Wait(context.Background(), &taskapi.WaitRequest{ID: "c1", ExecID: "runs"})
		if err != nil {
			t.Error(err)
		}
		ended <- r.GetExitStatus()
	}()
	if r, err := c.s.State(context.Background(), &taskapi.StateRequest{ID: "c1", ExecID: "runs"}); err != nil || r.Status != task.Status_RUNNING {
		t.Errorf("after purge: %v, %v", r, err)
	}
	io.WriteString(stdin, "it\n")
	if got := readAll(t, stdout); got != "got it\n" {
		t.Errorf("%q", got)
	}
	if code := <-ended; code != 9 {
		t.Errorf("exit status %d", code)
	}
	until(t, "forgotten", func() bool {
		_, err := c.s.Wait(context.Background(), &taskapi.WaitRequest{ID: "c1", ExecID: "runs"})
		return errdefs.IsNotFound(class(err))
	})
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// announced is a service with a direct container c1 that runs, without one behind it.
func announced(t *testing.T) (*Service, *container, string) {
	dir := t.TempDir()
	s := New(Options{Listen: listenUnix(dir), ContextID: func() (uint32, error) { return testCID, nil }, StateDir: dir, StorageDir: dir})
	quickly(s)
	spec, err := json.Marshal(plainSpec())
	if err != nil {
		t.Fatal(err)
	}
	for id, d := range map[string]*protocol.Direct{"c1": {}, "relayed": nil} {
		if err := s.Prepare(t.Context(), &protocol.PrepareContainerRequest{ContainerId: id, Spec: spec, Direct: d}); err != nil {
			t.Fatal(err)
		}
	}
	c := running(s)
	c.serveDirectly(s.prepared["c1"].main)
	return s, c, dir
}

func prepareExec(s *Service, id, execID string, d *protocol.Direct) error {
	return s.PrepareProcess(context.Background(), &protocol.PrepareProcessRequest{ContainerId: id, ExecId: execID, Direct: d})
}

func TestPrepareProcessRefuses(t *testing.T) {
	s, _, _ := announced(t)
	for name, tt := range map[string]struct {
		id, execID string
		d          *protocol.Direct
		is         func(error) bool
	}{
		"unknown container": {"nobody", "e", nil, errdefs.IsNotFound},
		"not direct":        {"relayed", "e", nil, errdefs.IsFailedPrecondition},
		"exec id":           {"c1", "../e", nil, errdefs.IsInvalidArgument},
		"no exec id":        {"c1", "", nil, errdefs.IsInvalidArgument},
		"path":              {"c1", "e", &protocol.Direct{Stdout: "/run/fifo"}, errdefs.IsInvalidArgument},
		"other machine":     {"c1", "e", &protocol.Direct{Stdout: "vsock://43:2000"}, errdefs.IsInvalidArgument},
		"agent's port":      {"c1", "e", &protocol.Direct{Stdout: "vsock://42:1024"}, errdefs.IsInvalidArgument},
		"port too high":     {"c1", "e", &protocol.Direct{Stdout: "vsock://42:65535"}, errdefs.IsInvalidArgument},
		"no port":           {"c1", "e", &protocol.Direct{Stdout: "vsock://42"}, errdefs.IsInvalidArgument},
		"no number":         {"c1", "e", &protocol.Direct{Stdout: "vsock://x:2000"}, errdefs.IsInvalidArgument},
		"two ports":         {"c1", "e", &protocol.Direct{Stdout: "vsock://42:2000:1"}, errdefs.IsInvalidArgument},
		"wrapped number":    {"c1", "e", &protocol.Direct{Stdout: "vsock://4294967338:2000"}, errdefs.IsInvalidArgument},
		"one port twice":    {"c1", "e", &protocol.Direct{Stdout: port(2000), Stderr: port(2000)}, errdefs.IsInvalidArgument},
		"half":              {"c1", "e", &protocol.Direct{Stdout: port(2000), Stderr: "nonsense"}, errdefs.IsInvalidArgument},
	} {
		if err := prepareExec(s, tt.id, tt.execID, tt.d); err == nil || !tt.is(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	until(t, "nothing listens", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.listening) == 0
	})
	s.contextID = func() (uint32, error) { return 0, errors.New("no device") }
	if err := prepareExec(s, "c1", "e", &protocol.Direct{Stdout: port(2000)}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("without vsock: %v", err)
	}
}

func TestAnnouncedExecs(t *testing.T) {
	s, c, dir := announced(t)
	ctx := t.Context()
	exec := func(id string) error {
		_, err := s.Exec(ctx, &taskapi.ExecProcessRequest{ID: "c1", ExecID: id, Stdout: "stdio://of-the-client", Spec: &anypb.Any{Value: []byte(`{"args":["x"],"cwd":"/"}`)}})
		return class(err)
	}
	if err := exec("e"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "PrepareProcess") {
		t.Errorf("exec that was not announced: %v", err)
	}
	// Announced once more, by a daemon that was restarted: who has connected stays connected.
	d := &protocol.Direct{Stdout: port(2000)}
	if err := prepareExec(s, "c1", "e", d); err != nil {
		t.Fatal(err)
	}
	conn := connect(t, dir, 2000)
	if err := prepareExec(s, "c1", "e", d); err != nil {
		t.Fatal(err)
	}
	if err := exec("e"); err != nil {
		t.Fatal(err)
	}
	if r, err := s.State(ctx, &taskapi.StateRequest{ID: "c1", ExecID: "e"}); err != nil || r.Stdout != port(2000) {
		t.Errorf("%v, %v", r, err)
	}
	if err := exec("e"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second exec: %v", err)
	}
	if err := prepareExec(s, "c1", "e", d); !errdefs.IsAlreadyExists(err) {
		t.Errorf("prepare of one that was made: %v", err)
	}
	// One that was never started is dropped, and a wait for it ends.
	for range 2 {
		if err := s.PurgeProcess(ctx, &protocol.PurgeProcessRequest{ContainerId: "c1", ExecId: "e"}); err != nil {
			t.Error(err)
		}
	}
	if got := readAll(t, conn); got != "" {
		t.Errorf("%q", got)
	}
	if r, err := s.Wait(ctx, &taskapi.WaitRequest{ID: "c1", ExecID: "e"}); err != nil || r.ExitStatus != startFailed {
		t.Errorf("%v, %v", r, err)
	}
	// Its id may then be used again, with other streams each time.
	if err := prepareExec(s, "c1", "e", &protocol.Direct{Stdout: port(2001)}); err != nil {
		t.Fatal(err)
	}
	if err := prepareExec(s, "c1", "e", d); err != nil {
		t.Fatal(err)
	}
	if got := readAll(t, connect(t, dir, 2001)); got != "" { // the replaced one
		t.Errorf("%q", got)
	}
	// Taken back before it was made: whoever connects finds its end.
	if err := s.PurgeProcess(ctx, &protocol.PurgeProcessRequest{ContainerId: "c1", ExecId: "e"}); err != nil {
		t.Error(err)
	}
	if err := exec("e"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("exec after purge: %v", err)
	}
	if got := readAll(t, connect(t, dir, 2000)); got != "" {
		t.Errorf("%q", got)
	}
	// One that cannot be made ends its streams, too.
	if err := prepareExec(s, "c1", "bad", d); err != nil {
		t.Fatal(err)
	}
	c.paused.Store(true)
	if err := exec("bad"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("exec while paused: %v", err)
	}
	if got := readAll(t, connect(t, dir, 2000)); got != "" {
		t.Errorf("%q", got)
	}
	for _, id := range []string{"nobody", "relayed", "c1"} {
		if err := s.PurgeProcess(ctx, &protocol.PurgeProcessRequest{ContainerId: id, ExecId: "nothing"}); err != nil {
			t.Error(err)
		}
	}
}

// A peer that connects and does not read costs no more than its limit.
func TestPeerThatDoesNotRead(t *testing.T) {
	s, _, dir := announced(t)
	s.limits.drain = 50 * time.Millisecond
	a, err := s.announce(&protocol.Direct{Stdout: port(2000)})
	if err != nil {
		t.Fatal(err)
	}
	conn := connect(t, dir, 2000)
	out := a.streams.output(port(2000))
	a.peers.finish(func() {
		for {
			if _, err := out.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	})
	if _, err := io.Copy(io.Discard, conn); err != nil && !errors.Is(err, unix.ECONNRESET) {
		t.Error(err)
	}
	if n, err := out.Write([]byte("x")); err == nil {
		t.Errorf("%d bytes were taken by a connection that was closed", n)
	}
}

func TestStreamsTakeOneConnection(t *testing.T) {
	s, _, dir := announced(t)
	if _, err := s.announce(&protocol.Direct{Stdout: port(2000)}); err != nil {
		t.Fatal(err)
	}
	connect(t, dir, 2000)
	until(t, "nothing listens", func() bool {
		conn, err := net.Dial("unix", filepath.Join(dir, "2000"))
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
}

// expecting are streams that nobody opens; it counts those that are expected.
type expecting map[string]int

func (expecting) check(string) error          { return nil }
func (expecting) output(string) output        { return nobodyOutput{} }
func (expecting) input(string) io.ReadCloser  { return nobody{} }
func (e expecting) expect(name string) func() { e[name]++; return sync.OnceFunc(func() { e[name]-- }) }

type nobody struct{}

func (nobody) Close() error                { return nil }
func (nobody) Read([]byte) (int, error)    { return 0, io.EOF }
func (nobody) Write(b []byte) (int, error) { return len(b), nil }

type nobodyOutput struct{ nobody }

func (nobodyOutput) Close(context.Context) error { return nil }

// The host's end of a stream waits from the announcement until the process is made, or will not be.
func TestStreamsAreExpectedWhileAnnounced(t *testing.T) {
	s, c, _ := announced(t)
	e := expecting{}
	s.streams = e
	want := func(when string, tokens ...string) {
		t.Helper()
		for name, n := range e {
			if got := n == 1; got != slices.Contains(tokens, name) || n > 1 {
				t.Errorf("%s: stream %s is expected %d times", when, name, n)
			}
		}
		for _, name := range tokens {
			if e[name] != 1 {
				t.Errorf("%s: stream %s is expected %d times", when, name, e[name])
			}
		}
	}
	spec, err := json.Marshal(plainSpec())
	if err != nil {
		t.Fatal(err)
	}
	prepare := func(id string, d *protocol.Direct) {
		t.Helper()
		if err := s.Prepare(t.Context(), &protocol.PrepareContainerRequest{ContainerId: id, Spec: spec, Direct: d}); err != nil {
			t.Fatal(err)
		}
	}
	prepare("c2", &protocol.Direct{Stdout: "a", Stderr: "b"})
	want("announced", "a", "b")
	prepare("c2", &protocol.Direct{Stdout: "a", Stderr: "c"})
	want("announced again", "a", "c")
	if err := s.Purge(t.Context(), "c2"); err != nil {
		t.Fatal(err)
	}
	want("purged")
	prepare("c3", &protocol.Direct{Stdin: "i"})
	want("announced", "i")
	newContainer(s, createRequest("c3")).serveDirectly(s.prepared["c3"].main)
	want("made")

	for _, execID := range []string{"e1", "e2"} {
		if err := prepareExec(s, "c1", execID, &protocol.Direct{Stdout: execID}); err != nil {
			t.Fatal(err)
		}
	}
	want("processes announced", "e1", "e2")
	if err := prepareExec(s, "c1", "e1", &protocol.Direct{Stdout: "f1"}); err != nil {
		t.Fatal(err)
	}
	want("one of them again", "f1", "e2")
	if _, err := s.takeExec(c, "e2"); err != nil {
		t.Fatal(err)
	}
	want("one of them made", "f1")
	if err := s.PurgeProcess(t.Context(), &protocol.PurgeProcessRequest{ContainerId: "c1", ExecId: "e1"}); err != nil {
		t.Fatal(err)
	}
	want("the other withdrawn")
}
