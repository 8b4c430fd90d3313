package containers

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"kuasar.io/kuasar/guest/agent/namespaces"
	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/guest/protocol/stdio"
)

// guest is this machine in the role of a guest: a Service that runs real containers with busybox
// as their root, and the host's end of their streams.
type guest struct {
	t      *testing.T
	s      *Service
	rootfs string
	socket string
	cgroup string
	tokens atomic.Int32

	mu      sync.Mutex
	oom     []string
	deleted []string
}

func newGuest(t *testing.T) *guest {
	if os.Geteuid() != 0 {
		t.Skip("needs root to run containers")
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("needs a static busybox for the containers' root")
	}
	if out, err := exec.Command(busybox, "--list").Output(); err != nil || !bytes.Contains(out, []byte("sh\n")) {
		t.Skip("busybox has no shell")
	}
	dir, err := os.MkdirTemp("", "kc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	g := &guest{
		t:      t,
		rootfs: filepath.Join(dir, "rootfs"),
		socket: filepath.Join(dir, "stdio.sock"),
		cgroup: fmt.Sprintf("/kuasar-test-%d-%d", os.Getpid(), testNumber.Add(1)),
	}
	makeRootfs(t, busybox, g.rootfs)
	hub := stdio.NewHub()
	l, err := net.Listen("unix", g.socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go hub.Serve(l)
	level := slog.LevelWarn
	if testing.Verbose() {
		level = slog.LevelInfo
	}
	g.s = New(Options{
		Hub:        hub,
		Log:        slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: level})),
		StateDir:   filepath.Join(dir, "state"),
		StorageDir: filepath.Join(dir, "storage"),
		Cgroup:     g.cgroup,
		OnOOM: func(id string) {
			g.mu.Lock()
			g.oom = append(g.oom, id)
			g.mu.Unlock()
		},
		OnDelete: func(d *protocol.Deleted) {
			g.mu.Lock()
			g.deleted = append(g.deleted, d.GetContainerId()+" by "+d.GetAnnouncement())
			g.mu.Unlock()
		},
		Listen:    listenUnix(filepath.Dir(g.socket)),
		ContextID: func() (uint32, error) { return testCID, nil },
	})
	t.Cleanup(g.checkClean)
	return g
}

var testNumber atomic.Int32

func makeRootfs(t *testing.T, busybox, dir string) {
	defer unix.Umask(unix.Umask(0o022)) // for a container's users
	for _, d := range []string{"bin", "proc", "sys", "dev", "etc", "tmp", "run", "root"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	os.Chmod(filepath.Join(dir, "tmp"), 0o1777)
	b, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/busybox"), b, 0o755); err != nil {
		t.Fatal(err)
	}
	applets := "sh cat echo ls id ps sleep head tail dd true false mount hostname stat kill top tr wc tty stty touch grep printf yes trap env ulimit nproc sysctl mkdir setsid nice umask readlink"
	for _, a := range strings.Fields(applets) {
		os.Symlink("busybox", filepath.Join(dir, "bin", a))
	}
}

// checkClean purges all containers and fails if anything of them is left.
func (g *guest) checkClean() {
	for _, id := range g.s.IDs() {
		if err := g.s.Purge(context.Background(), id); err != nil {
			g.t.Errorf("purge: %v", err)
		}
	}
	if entries, _ := os.ReadDir(g.s.stateDir); len(entries) != 0 {
		g.t.Errorf("left in the state directory: %v", entries)
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, filepath.Dir(g.rootfs)) {
			g.t.Errorf("a mount is left behind: %s", line)
		}
	}
	roots := []string{"/sys/fs/cgroup"}
	if !cgroups.IsCgroup2UnifiedMode() {
		roots, _ = filepath.Glob("/sys/fs/cgroup/*")
	}
	for _, root := range roots {
		left, _ := filepath.Glob(filepath.Join(root, g.cgroup, "*", "cgroup.procs"))
		if len(left) != 0 {
			g.t.Errorf("cgroups are left behind: %v", left)
		}
		os.Remove(filepath.Join(root, g.cgroup))
	}
}

// pod makes the namespaces of a pod and returns their directory.
func (g *guest) pod(hostname string) (*namespaces.Pod, string) {
	g.t.Helper()
	dir := filepath.Join(filepath.Dir(g.rootfs), "ns")
	pod, err := namespaces.SetupIn(dir, true, hostname)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { pod.Close() })
	return pod, dir
}

// spec is what a CRI gives for a container, rewritten for the guest.
func (g *guest) spec(args ...string) *specs.Spec {
	caps := []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
		"CAP_NET_BIND_SERVICE", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT", "CAP_AUDIT_WRITE", "CAP_NET_RAW"}
	return &specs.Spec{
		Version: "1.3.0",
		Process: &specs.Process{
			Args:         args,
			Env:          []string{"PATH=/bin", "HOME=/root"},
			Cwd:          "/",
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Root: &specs.Root{Path: g.rootfs},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: "/of/the/host",
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
				{Type: specs.MountNamespace}, {Type: specs.CgroupNamespace},
				{Type: specs.NetworkNamespace, Path: "/var/run/netns/of-the-host"},
			},
			MaskedPaths:   []string{"/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
			Resources: &specs.LinuxResources{
				Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}},
			},
		},
	}
}

// hostEnd is the host's end of the streams of a process.
type hostEnd struct {
	g              *guest
	names          stdioNames
	in             *stdio.Writer
	stdout, stderr buffer
	group          sync.WaitGroup
}

// buffer can be looked at while it is written to.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func (b *buffer) Len() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Len()
}

// ready waits until the process says so. Signals before that meet libcontainer's init.
func (h *hostEnd) ready() {
	h.g.t.Helper()
	until(h.g.t, "ready", func() bool { return strings.Contains(h.stdout.String(), "ready\n") })
}

// open opens streams as the host does, before the guest hears of the process.
func (g *guest) open(stdin, terminal bool) *hostEnd {
	g.t.Helper()
	h := &hostEnd{g: g}
	h.names.terminal = terminal
	name := func() (string, string) {
		token := fmt.Sprintf("token-%d", g.tokens.Add(1))
		return token, protocol.StdioScheme + token
	}
	ctx := context.Background()
	dial := func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", g.socket)
	}
	var t string
	if stdin {
		t, h.names.stdin = name()
		w, err := stdio.OpenInput(ctx, dial, t)
		if err != nil {
			g.t.Fatal(err)
		}
		h.in = w
	}
	read := func(kind stdio.Kind, name *string, buf *buffer, t string) {
		r, err := stdio.OpenOutput(ctx, dial, t, kind, 0)
		if err != nil {
			g.t.Fatal(err)
		}
		h.group.Go(func() {
			if _, err := r.WriteTo(buf); err != nil {
				g.t.Errorf("%s: %v", kind, err)
			}
		})
	}
	t, h.names.stdout = name()
	read(stdio.Stdout, &h.names.stdout, &h.stdout, t)
	if !terminal {
		t, h.names.stderr = name()
		read(stdio.Stderr, &h.names.stderr, &h.stderr, t)
	}
	return h
}

// prepare announces a container.
func (g *guest) prepare(id string, spec *specs.Spec, storages ...*protocol.Storage) error {
	b, err := json.Marshal(spec)
	if err != nil {
		g.t.Fatal(err)
	}
	return g.s.Prepare(context.Background(), &protocol.PrepareContainerRequest{ContainerId: id, Spec: b, Storages: storages})
}

// create announces and creates a container.
func (g *guest) create(id string, spec *specs.Spec, h *hostEnd) error {
	g.t.Helper()
	if err := g.prepare(id, spec); err != nil {
		g.t.Fatal(err)
	}
	_, err := g.s.Create(context.Background(), &taskapi.CreateTaskRequest{
		ID: id, Bundle: "/bundle/of/the/host", Terminal: h.names.terminal,
		Stdin: h.names.stdin, Stdout: h.names.stdout, Stderr: h.names.stderr,
	})
	return err
}

// run creates and starts a container.
func (g *guest) run(id string, spec *specs.Spec, h *hostEnd) {
	g.t.Helper()
	if err := g.create(id, spec, h); err != nil {
		g.t.Fatal(err)
	}
	g.start(id, "")
}

func (g *guest) start(id, execID string) uint32 {
	g.t.Helper()
	r, err := g.s.Start(context.Background(), &taskapi.StartRequest{ID: id, ExecID: execID})
	if err != nil {
		g.t.Fatal(err)
	}
	return r.Pid
}

// exec announces an exec.
func (g *guest) exec(id, execID string, h *hostEnd, p *specs.Process) error {
	g.t.Helper()
	b, err := json.Marshal(p)
	if err != nil {
		g.t.Fatal(err)
	}
	_, err = g.s.Exec(context.Background(), &taskapi.ExecProcessRequest{
		ID: id, ExecID: execID, Terminal: h.names.terminal, Stdin: h.names.stdin, Stdout: h.names.stdout, Stderr: h.names.stderr,
		Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: b},
	})
	return err
}

func (g *guest) execProcess(args ...string) *specs.Process {
	p := g.spec(args...).Process
	return p
}

// wait returns the exit status once it is reported.
func (g *guest) wait(id, execID string) uint32 {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	r, err := g.s.Wait(ctx, &taskapi.WaitRequest{ID: id, ExecID: execID})
	if err != nil {
		g.t.Fatalf("wait for %s %s: %v", id, execID, err)
	}
	return r.ExitStatus
}

func (g *guest) delete(id, execID string) *taskapi.DeleteResponse {
	g.t.Helper()
	r, err := g.s.Delete(context.Background(), &taskapi.DeleteRequest{ID: id, ExecID: execID})
	if err != nil {
		g.t.Fatal(err)
	}
	return r
}

func (g *guest) kill(id, execID string, sig unix.Signal) error {
	_, err := g.s.Kill(context.Background(), &taskapi.KillRequest{ID: id, ExecID: execID, Signal: uint32(sig)})
	return err
}

// output runs a container to its end and returns what it wrote.
func (g *guest) output(id string, spec *specs.Spec) (string, uint32) {
	g.t.Helper()
	h := g.open(false, false)
	g.run(id, spec, h)
	status := g.wait(id, "")
	h.group.Wait()
	g.delete(id, "")
	if err := g.s.Purge(context.Background(), id); err != nil {
		g.t.Fatal(err)
	}
	return h.stdout.String() + h.stderr.String(), status
}

// until polls a condition that must become true.
func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 20 s", what)
		}
	}
}
