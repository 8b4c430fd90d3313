package scenario

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	tasktypes "github.com/containerd/containerd/api/types/task"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/ci/e2e/isulad"
)

// Lifecycle is a pod's whole life: its network, its containers and their logs, processes in them with
// all kinds of streams, statistics, a restart of iSulad, and the end.
func Lifecycle(ctx context.Context, t *testing.T, n *Node, v isulad.Version) {
	h := begin(ctx, t, n, v)
	p := h.run(nil)
	p.state(isulad.Running)
	p.addressForm()

	first := p.start(`ip addr show eth0; ip route
		cat /etc/hosts /etc/hostname /etc/resolv.conf
		grep ' /dev/shm ' /proc/mounts
		echo trouble >&2
		trap 'echo bye; exit 7' TERM
		echo ready; while :; do sleep 0.1; done`)
	h.eventually("the container's output is in its log", func() bool { return strings.Contains(first.logged("stdout"), "ready\n") })
	out := first.logged("stdout")
	for _, want := range []string{
		"inet " + p.address.String(), "default via " + n.Gateway.Addr().String(), "from-isulad", p.id, "nameserver 10.1.2.3", "tmpfs",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("the container's first instructions do not see %q:\n%s", want, out)
		}
	}
	h.eventually("what the container writes to stderr is in its log", func() bool { return first.logged("stderr") == "trouble\n" })
	first.sh("ping -c 1 " + n.Gateway.Addr().String())

	execs(h, first)
	terminal(h, first)
	numbers(h, first)
	second := p.start("echo shared > /dev/shm/note; echo in the second; exit 5")
	second.exited(5)
	if h.Alive(second.id) {
		t.Error("a container that has exited takes signals")
	}
	h.eventually("the log of a container that has exited is complete", func() bool {
		return second.logged("stdout") == "in the second\n"
	})
	if note := first.sh("cat /dev/shm/note"); note != "shared\n" {
		t.Errorf("the containers do not share /dev/shm: %q", note)
	}
	if err := h.RemoveContainer(second.id); err != nil {
		t.Error(err)
	}

	// iSulad goes away and comes back; nobody else does.
	if err := h.Daemon.Restart(); err != nil {
		t.Fatal(err)
	}
	p.state(isulad.Running)
	p.addressForm()
	if got := first.sh("echo after the restart"); got != "after the restart\n" {
		t.Errorf("after iSulad's restart a process says %q", got)
	}

	if err := h.StopContainer(ctx, first.id, 30*time.Second); err != nil {
		t.Fatal(err)
	}
	first.exited(7)
	h.eventually("the last words are in the log", func() bool { return strings.HasSuffix(first.logged("stdout"), "bye\n") })
	// A container that was stopped can be followed by another.
	third := p.start("exec sleep 1000")
	third.sh("true")

	if err := h.StopPod(p.id); err != nil {
		t.Fatal(err)
	}
	third.exited(137)
	p.state(isulad.Stopped)
	if err := h.StopPod(p.id); err != nil {
		t.Errorf("a pod that has stopped cannot be stopped again: %v", err)
	}
	if err := h.RemovePod(p.id); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(n.State, p.id)); err == nil {
		t.Error("the state directory of the pod is left")
	}
}

// execs runs processes with streams of all kinds but a terminal.
func execs(h *host, c *container) {
	t := h.t
	t.Helper()
	// One that exits at once loses nothing.
	for range 5 {
		result, err := h.ExecSync(c.id, "/bin/sh", "-c", "echo out; echo err >&2; exit 7")
		if want := (isulad.Result{Stdout: "out\n", Stderr: "err\n", ExitCode: 7}); err != nil || result != want {
			t.Errorf("a process that exits at once: %+v, %v, want %+v", result, err, want)
		}
	}
	const size = 300000
	result, err := h.ExecSync(c.id, "/bin/sh", "-c", "head -c 300000 /dev/zero | tr '\\0' x")
	if got := result.Stdout; err != nil || len(got) != size || strings.Trim(got, "x") != "" || result.Stderr != "" {
		t.Errorf("%d bytes of output arrive, not %d, %v; stderr is %q", len(got), size, err, result.Stderr)
	}

	// The end of the client's stdin ends the relaying; before that all goes both ways.
	in, feed := io.Pipe()
	var seen output
	ended := make(chan error, 1)
	var code uint32
	go func() {
		var err error
		code, err = h.Exec(c.id, isulad.ExecConfig{Args: []string{"/bin/sh", "-c", "cat; exit 4"}, Stdin: in, Stdout: &seen})
		ended <- err
	}()
	for _, line := range []string{"one\n", "two\n"} {
		if _, err := io.WriteString(feed, line); err != nil {
			t.Fatal(err)
		}
		h.eventually("a process answers on "+line, func() bool { return strings.HasSuffix(seen.String(), line) })
	}
	feed.Close()
	select {
	case err := <-ended:
		if err != nil || code != 4 || seen.String() != "one\ntwo\n" {
			t.Errorf("cat ends with %d, %v, and says %q", code, err, seen.String())
		}
	case <-h.ctx.Done():
		t.Fatal("cat does not end with its stdin")
	}

	// Without any streams, and what cannot be started.
	if _, err := h.Exec(c.id, isulad.ExecConfig{Args: []string{"/bin/sh", "-c", "echo here > /detached"}}); err != nil {
		t.Error(err)
	}
	h.eventually("a process without streams runs", func() bool {
		result, err := h.ExecSync(c.id, "cat", "/detached")
		return err == nil && result.Stdout == "here\n"
	})
	if result, err := h.ExecSync(c.id, "/no/such/program"); err == nil && result.ExitCode == 0 {
		t.Error("a program that does not exist runs")
	}
	// Several at once.
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			if result, err := h.ExecSync(c.id, "echo", "at once"); err != nil || result.Stdout != "at once\n" {
				t.Errorf("one of several processes: %+v, %v", result, err)
			}
		})
	}
	all.Wait()
}

// terminal runs a process with a terminal and changes the size of that.
func terminal(h *host, c *container) {
	h.t.Helper()
	in, feed := io.Pipe()
	defer feed.Close()
	sizes := make(chan isulad.Size)
	defer close(sizes)
	var seen output
	ended := make(chan error, 1)
	var code uint32
	go func() {
		var err error
		code, err = h.Exec(c.id, isulad.ExecConfig{
			Args:     []string{"/bin/sh", "-c", `tty; while read l && [ "$l" != end ]; do stty size; done; exit 3`},
			Terminal: true, Stdin: in, Stdout: &seen, Resize: sizes,
		})
		ended <- err
	}()
	select {
	case sizes <- isulad.Size{Width: 101, Height: 33}: // taken once the process has started
	case err := <-ended:
		h.t.Fatalf("a process with a terminal ends with %d, %v, and says %q", code, err, seen.String())
	case <-h.ctx.Done():
		h.t.Fatal("a process with a terminal does not start")
	}
	h.eventually("the terminal has its size", func() bool {
		io.WriteString(feed, "\n")
		time.Sleep(50 * time.Millisecond) // it is a person who types
		return strings.Contains(seen.String(), "33 101")
	})
	io.WriteString(feed, "end\n")
	select {
	case err := <-ended:
		if err != nil || code != 3 || !strings.Contains(seen.String(), "/dev/pts/") {
			h.t.Errorf("a process with a terminal ends with %d, %v, and says %q", code, err, seen.String())
		}
	case <-h.ctx.Done():
		h.t.Fatal("a process with a terminal does not end")
	}
}

// numbers asks for what iSulad shows of a container.
func numbers(h *host, c *container) {
	t := h.t
	t.Helper()
	c.sh("i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done")
	s, err := h.Stats(c.id)
	if err != nil {
		t.Error(err)
	}
	if s.CPUTotal == 0 || s.MemoryUsage == 0 || s.Pids == 0 {
		t.Errorf("the statistics are %+v", s)
	}
	if pid, err := h.Pid(c.id); err != nil || pid == 0 {
		t.Errorf("the first process is %d, %v", pid, err)
	}
	if !h.Alive(c.id) {
		t.Error("a running container takes no signals")
	}
	if err := h.Pause(c.id); err != nil {
		t.Error(err)
	}
	if status, err := h.TaskStatus(c.id); err != nil || status != tasktypes.Status_PAUSED {
		t.Errorf("a paused container is %s, %v", status, err)
	}
	if err := h.Daemon.Resume(c.id); err != nil {
		t.Error(err)
	}
	if status, err := h.TaskStatus(c.id); err != nil || status != tasktypes.Status_RUNNING {
		t.Errorf("a resumed container is %s, %v", status, err)
	}
}

// output is what a process has written so far.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// NetworkFirst runs a pod of 2.1.6 whose annotation has the network set up before it starts.
func NetworkFirst(ctx context.Context, t *testing.T, n *Node) {
	h := begin(ctx, t, n, isulad.V216)
	p := h.run(func(p *isulad.Pod) {
		p.Config.Annotations = map[string]string{"cri.sandbox.network.setup.v2": "true"}
	})
	c := p.start("ip addr show eth0; exec sleep 1000")
	h.eventually("the container sees its address", func() bool {
		return strings.Contains(c.logged("stdout"), "inet "+p.address.String())
	})
	c.sh("ping -c 1 " + n.Gateway.Addr().String())
}

// SharedProcesses runs a pod whose containers see each other's processes.
func SharedProcesses(ctx context.Context, t *testing.T, n *Node, v isulad.Version) {
	h := begin(ctx, t, n, v)
	p := h.run(func(p *isulad.Pod) {
		p.Config.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	})
	start := func(script string) *container {
		c := p.create(script, func(spec *isulad.SpecConfig, _ *isulad.Container) { spec.SharedPID = true })
		if err := h.StartContainer(c.id); err != nil {
			t.Fatal(err)
		}
		return c
	}
	start("exec sleep 1234")
	if processes := start("exec sleep 1000").sh("ps -o args"); !strings.Contains(processes, "sleep 1234") {
		t.Errorf("the second container does not see the first one's process:\n%s", processes)
	}
}

// NoNetwork runs a pod in whose network namespace nothing ever appears.
func NoNetwork(ctx context.Context, t *testing.T, n *Node, v isulad.Version) {
	h := begin(ctx, t, n, v)
	p := h.run(func(p *isulad.Pod) { p.Network, p.Teardown = nil, nil })
	c := p.start("exec sleep 1000")
	if links := c.sh("ip -o -4 addr"); !strings.Contains(links, "inet 127.0.0.1/8") || strings.Count(links, "\n") != 1 {
		t.Errorf("the container's addresses are\n%s", links)
	}
}

// LogRotation writes more than a log may have.
func LogRotation(ctx context.Context, t *testing.T, n *Node, v isulad.Version) {
	h := begin(ctx, t, n, v)
	p := h.run(nil)
	const lines = 800
	c := p.create("i=0; while [ $i -lt 800 ]; do echo $i; i=$((i+1)); done", func(spec *isulad.SpecConfig, _ *isulad.Container) {
		spec.LogSize, spec.LogFiles = "30KB", 7
	})
	if err := h.StartContainer(c.id); err != nil {
		t.Fatal(err)
	}
	c.exited(0)
	h.eventually("the log is complete", func() bool { return c.counted() == lines })
	if _, err := os.Stat(c.log + ".1"); err != nil {
		t.Errorf("the log was not rotated: %v", err)
	}
	files, err := filepath.Glob(c.log + "*")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if info, err := os.Stat(file); err != nil || info.Size() > 31<<10 {
			t.Errorf("%s: %v, %v", file, info.Size(), err)
		}
	}
}
