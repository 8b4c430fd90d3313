package appliance

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/ci/e2e/image"
)

// cgroupParent holds the cgroups of the pods.
const cgroupParent = "/pods"

// volume is a directory of the machine, and where the containers have it. Files in it reach a
// container without the daemon, while that is away.
const volume, volumeInside = "/srv/volume", "/volume"

// A pod of the workload. All its methods fail the test of n.
type pod struct {
	n      *node
	name   string
	id     string
	config *runtimeapi.PodSandboxConfig
	vmm    int // process of its virtual machine, by this machine's number
}

// number makes names unique.
var number int

func (n *node) runPod(ctx context.Context, t *testing.T, name, handler string) *pod {
	t.Helper()
	number++
	p := &pod{n: n, name: name, config: &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: fmt.Sprint(name, "-", number)},
		LogDirectory: "/var/log/pods/" + name,
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent: cgroupParent,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{
				Network: runtimeapi.NamespaceMode_POD, Pid: runtimeapi.NamespaceMode_CONTAINER, Ipc: runtimeapi.NamespaceMode_POD,
			}},
		},
	}}
	var err error
	if p.id, err = n.cri.RunPod(ctx, p.config, handler); err != nil {
		t.Fatalf("cannot run pod %s: %v", name, err)
	}
	if p.vmm, err = n.vmm(p.id); err != nil {
		t.Fatal(err)
	}
	return p
}

// A container of a pod.
type container struct {
	pod  *pod
	name string
	id   string
	log  string // path in the machine
}

// start creates and starts a container that runs a shell script and has the volume.
func (p *pod) start(ctx context.Context, t *testing.T, script string) *container {
	t.Helper()
	number++
	c := &container{pod: p, name: fmt.Sprint(p.name, "-", number)}
	config := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: c.name},
		Image:    &runtimeapi.ImageSpec{Image: image.Name},
		Command:  []string{"/bin/sh", "-c", script},
		LogPath:  c.name + ".log",
		Mounts:   []*runtimeapi.Mount{{HostPath: volume, ContainerPath: volumeInside}},
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{
				Network: runtimeapi.NamespaceMode_POD, Pid: runtimeapi.NamespaceMode_CONTAINER, Ipc: runtimeapi.NamespaceMode_POD,
			},
		}},
	}
	c.log = filepath.Join(p.config.LogDirectory, config.LogPath)
	var err error
	if c.id, err = p.n.cri.Create(ctx, p.id, p.config, config); err != nil {
		t.Fatalf("cannot create container %s: %v", c.name, err)
	}
	if err := p.n.cri.Start(ctx, c.id); err != nil {
		t.Fatalf("cannot start container %s: %v", c.name, err)
	}
	return c
}

// remove removes a container that has exited.
func (c *container) remove(ctx context.Context, t *testing.T) {
	t.Helper()
	if _, err := c.pod.n.cri.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c.id}); err != nil {
		t.Errorf("cannot remove container %s: %v", c.name, err)
	}
}

func (c *container) state(ctx context.Context, t *testing.T) runtimeapi.ContainerState {
	t.Helper()
	s, err := c.pod.n.cri.Status(ctx, c.id)
	if err != nil {
		t.Fatalf("container %s: %v", c.name, err)
	}
	return s.State
}

// text returns what the container has written, from the log that CRI keeps.
func (c *container) text(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile(c.pod.n.Path(c.log))
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for line := range strings.Lines(string(data)) {
		// <time> <stream> <F for a full line, P for a part> <text>
		fields := strings.SplitN(line, " ", 4)
		if !strings.HasSuffix(line, "\n") || len(fields) != 4 {
			continue // it is being written
		}
		if fields[2] == "P" {
			fields[3] = strings.TrimSuffix(fields[3], "\n")
		}
		text.WriteString(fields[3])
	}
	return text.String()
}

// counting writes numbered lines as fast as fifty in a second, of which every tenth is longer
// than a page.
const counting = `i=0; long=x; while [ ${#long} -lt 5000 ]; do long=$long$long; done
while :; do
	case $i in *0) echo $i $long;; *) echo $i;; esac
	i=$((i+1)); usleep 20000
done`

// A counter checks the log of a container that runs counting.
type counter struct {
	*container
	seen int // lines so far
}

// check reads the whole log: each number is there once, in its order, with its text. It returns how
// many there are.
func (c *counter) check(t *testing.T) int {
	t.Helper()
	next := 0
	for line := range strings.Lines(c.text(t)) {
		if !strings.HasSuffix(line, "\n") {
			break
		}
		first, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		if first != strconv.Itoa(next) {
			t.Fatalf("the log of %s has %.40q where line %d should be", c.name, line, next)
		}
		if long := next%10 == 0; long != (len(rest) >= 5000) || strings.Trim(rest, "x") != "" {
			t.Fatalf("the log of %s has %d bytes after the number %d: %.40q", c.name, len(rest), next, rest)
		}
		next++
	}
	if next < c.seen {
		t.Fatalf("the log of %s had %d lines and has %d", c.name, c.seen, next)
	}
	c.seen = next
	return next
}

// goesOn waits until some lines more are there.
func (c *counter) goesOn(ctx context.Context, t *testing.T) {
	t.Helper()
	from := c.check(t)
	eventually(ctx, t, fmt.Sprintf("container %s writes on after line %d", c.name, from), func() bool { return c.check(t) > from+20 })
}

// A waiter is a container that ends with a code when a file appears, and says with another file that
// its script is over.
type waiter struct {
	*container
	code int32
}

func (p *pod) startWaiter(ctx context.Context, t *testing.T, code int32) *waiter {
	t.Helper()
	key := fmt.Sprint(p.name, code)
	script := fmt.Sprintf("until [ -e %[1]s/end-%[2]s ]; do usleep 20000; done; echo the end; touch %[1]s/ended-%[2]s; exit %[3]d", volumeInside, key, code)
	return &waiter{p.start(ctx, t, script), code}
}

// end makes the container end, and returns when it is about to.
func (w *waiter) end(ctx context.Context, t *testing.T) {
	t.Helper()
	key := fmt.Sprint(w.pod.name, w.code)
	if err := w.pod.n.Write(filepath.Join(volume, "end-"+key), ""); err != nil {
		t.Fatal(err)
	}
	ended := w.pod.n.Path(filepath.Join(volume, "ended-"+key))
	eventually(ctx, t, "container "+w.name+" ends", func() bool { _, err := os.Stat(ended); return err == nil })
	for _, name := range []string{"end-", "ended-"} {
		if err := os.Remove(w.pod.n.Path(filepath.Join(volume, name+key))); err != nil {
			t.Error(err)
		}
	}
}

// check waits until containerd knows of the end, and compares code and output.
func (w *waiter) check(ctx context.Context, t *testing.T) {
	t.Helper()
	s, err := w.pod.n.cri.WaitExited(ctx, w.id)
	if err != nil {
		t.Fatal(err)
	}
	if s.ExitCode != w.code {
		t.Errorf("container %s ended with code %d (%s %s), not with %d", w.name, s.ExitCode, s.Reason, s.Message, w.code)
	}
	if got := w.text(t); got != "the end\n" {
		t.Errorf("container %s wrote %q", w.name, got)
	}
}

// exec runs a command in a container, which must work.
func (c *container) exec(ctx context.Context, t *testing.T, command ...string) string {
	t.Helper()
	result, err := c.pod.n.cri.Exec(ctx, c.id, command...)
	if err != nil {
		t.Fatalf("cannot execute %q in container %s: %v", command, c.name, err)
	}
	if result.ExitCode != 0 {
		t.Fatalf("%q in container %s ended with code %d: %s%s", command, c.name, result.ExitCode, result.Stdout, result.Stderr)
	}
	return result.Stdout
}

// A session is a command that is executed in a container meanwhile.
type session struct {
	container *container
	key       string
	result    chan error
	answer    *runtimeapi.ExecSyncResponse
}

// startSession executes a command that ends with code 5 after finish, having written before and
// after. It returns when the command runs.
func (c *container) startSession(ctx context.Context, t *testing.T) *session {
	t.Helper()
	number++
	s := &session{container: c, key: fmt.Sprint("session-", number), result: make(chan error, 1)}
	script := fmt.Sprintf("echo before; touch %[1]s/%[2]s-runs; until [ -e %[1]s/%[2]s-ends ]; do usleep 20000; done; echo after; exit 5", volumeInside, s.key)
	go func() {
		var err error
		s.answer, err = c.pod.n.cri.Runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: c.id, Cmd: []string{"/bin/sh", "-c", script}, Timeout: 90})
		s.result <- err
	}()
	runs := c.pod.n.Path(filepath.Join(volume, s.key+"-runs"))
	eventually(ctx, t, "the command runs", func() bool { _, err := os.Stat(runs); return err == nil })
	return s
}

func (s *session) finish(ctx context.Context, t *testing.T) {
	t.Helper()
	ends := filepath.Join(volume, s.key+"-ends")
	if err := s.container.pod.n.Write(ends, ""); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-s.result:
		if err != nil || s.answer.ExitCode != 5 || string(s.answer.Stdout) != "before\nafter\n" {
			t.Errorf("a command that was executed meanwhile in %s ended with %v, %v", s.container.name, s.answer, err)
		}
	case <-ctx.Done():
		t.Fatalf("a command that was executed meanwhile in %s does not end", s.container.name)
	}
	for _, path := range []string{ends, filepath.Join(volume, s.key+"-runs")} {
		if err := os.Remove(s.container.pod.n.Path(path)); err != nil {
			t.Error(err)
		}
	}
}

// ready asks the daemon for the state of a pod: a verbose status is not answered by containerd alone.
// containerd's connection to a daemon that was away backs off for some seconds.
func (p *pod) ready(ctx context.Context, t *testing.T) {
	t.Helper()
	var last string
	defer func() {
		if t.Failed() {
			t.Logf("pod %s: %s", p.name, last)
		}
	}()
	eventually(ctx, t, "containerd reaches the daemon for pod "+p.name, func() bool {
		answer, err := p.n.cri.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
		last = fmt.Sprint(answer.GetStatus().GetState(), " ", err)
		if err != nil && status.Code(err) != codes.Unavailable {
			t.Fatalf("pod %s: %v", p.name, err)
		}
		if err == nil && answer.Status.State != runtimeapi.PodSandboxState_SANDBOX_READY {
			t.Fatalf("pod %s is %s", p.name, answer.Status.State)
		}
		return err == nil
	})
	if vmm, err := p.n.vmm(p.id); err != nil || vmm != p.vmm {
		t.Fatalf("the virtual machine of pod %s was process %d and is %d, %v", p.name, p.vmm, vmm, err)
	}
}

// eventually polls until done says true.
func eventually(ctx context.Context, t *testing.T, what string, done func() bool) {
	t.Helper()
	for !done() {
		select {
		case <-ctx.Done():
			t.Fatalf("it does not happen that %s: %v", what, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}
