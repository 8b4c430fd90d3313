// Package scenario runs pods on a node through the test client of iSulad, and checks what iSulad's
// users would see. A scenario needs a running vmm-sandboxer and root; it knows that by its socket and
// its files. The caller takes the census around it.
package scenario

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/ci/e2e/image"
	"kuasar.io/kuasar/ci/e2e/isulad"
)

// Node is where scenarios run.
type Node struct {
	// Socket is where the sandboxer listens, State its state directory.
	Socket, State string
	// Dir is a directory for what iSulad has on a node: root file systems, logs, its own folders. What
	// scenarios make in it is shared by them and stays, but mounts.
	Dir string
	// Bridge connects the pods, Gateway is its IPv4 address with the length of the prefix. Scenarios use
	// addresses from the upper end of the network.
	Bridge  string
	Gateway netip.Prefix
	// CgroupParent is that of the pods.
	CgroupParent string
	// Vsock says that clients reach the guests over vsock, so that the sandboxer is not between.
	Vsock bool
	// Restart ends the sandboxer with SIGTERM, Kill with SIGKILL. Both return when the next one accepts.
	Restart, Kill func(context.Context) error
	// VMM is the process of a pod's virtual machine; an error if there is none.
	VMM func(pod string) (pid int, err error)

	busybox  sync.Once
	unpacked error
}

// addresses counts those that pods were given.
var addresses atomic.Uint32

// host is one iSulad on a node, in one scenario.
type host struct {
	*isulad.Daemon
	t       *testing.T
	ctx     context.Context
	node    *Node
	version isulad.Version
}

// begin returns an iSulad that the end of the test ends.
func begin(ctx context.Context, t *testing.T, n *Node, v isulad.Version) *host {
	t.Helper()
	shim := isulad.ShimVsock
	if v == isulad.V216 {
		shim = isulad.ShimTTRPC
	}
	if err := n.unpackBusybox(); err != nil {
		t.Fatal(err)
	}
	d, err := isulad.New(isulad.Config{
		Version: v, Shim: shim, Sandboxer: "vmm", Socket: n.Socket, State: filepath.Join(n.Dir, "state"),
		// A tenth of iSulad's own, as nothing but the tests' patience depends on it.
		PlatformInterval: 500 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return &host{Daemon: d, t: t, ctx: ctx, node: n, version: v}
}

func (n *Node) lower() string { return filepath.Join(n.Dir, "storage", "busybox") }

func (n *Node) unpackBusybox() error {
	n.busybox.Do(func() {
		n.unpacked = func() error {
			if _, err := os.Stat(n.lower()); err == nil {
				return nil
			}
			busybox, err := image.Busybox()
			if err != nil {
				return err
			}
			if err := os.MkdirAll(filepath.Dir(n.lower()), 0o755); err != nil {
				return err
			}
			dir, err := os.MkdirTemp(filepath.Dir(n.lower()), "unpack")
			if err != nil {
				return err
			}
			if err := errors.Join(os.Chmod(dir, 0o755), busybox.Unpack(dir)); err != nil {
				return errors.Join(err, os.RemoveAll(dir))
			}
			return os.Rename(dir, n.lower())
		}()
	})
	return n.unpacked
}

// pod is a running pod of a scenario.
type pod struct {
	*host
	id      string
	netns   string
	address netip.Prefix // that its network gives it
	config  *runtimeapi.PodSandboxConfig
	rootfs  *[]string // mounted, to be unmounted
}

// run runs a pod that the end of the test removes. edit, which may be nil, changes what it is.
func (h *host) run(edit func(*isulad.Pod)) *pod {
	h.t.Helper()
	id := isulad.NewID()
	p := &pod{host: h, id: id, netns: "isulacni-" + id[:16], address: h.node.address(), rootfs: new([]string)}
	name := strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(h.t.Name()))
	p.config = &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: id[:8]},
		LogDirectory: filepath.Join(h.node.Dir, "logs", id),
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent: h.node.CgroupParent,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{
				Network: runtimeapi.NamespaceMode_POD, Pid: runtimeapi.NamespaceMode_CONTAINER, Ipc: runtimeapi.NamespaceMode_POD,
			}},
		},
	}
	// Registered before anything is made, as what is made halfway is removed, too.
	h.t.Cleanup(p.remove)
	if err := p.prepare(); err != nil {
		h.t.Fatal(err)
	}
	what := isulad.Pod{ID: id, NetNS: "/var/run/netns/" + p.netns, Config: p.config, Network: p.connect, Teardown: p.disconnect}
	if edit != nil {
		edit(&what)
	}
	if err := h.RunPod(what); err != nil {
		h.t.Fatal(err)
	}
	return p
}

// with is the container in a part of the test.
func (c *container) with(t *testing.T) *container {
	h := *c.pod.host
	h.t = t
	p := *c.pod
	p.host = &h
	return &container{pod: &p, id: c.id, log: c.log}
}

func (n *Node) address() netip.Prefix {
	bytes := n.Gateway.Addr().As4()
	bytes[3] = byte(254 - addresses.Add(1)%100)
	return netip.PrefixFrom(netip.AddrFrom4(bytes), n.Gateway.Bits())
}

// folder is iSulad's of the pod, from which files are mounted into its containers.
func (p *pod) folder() string { return filepath.Join(p.node.Dir, "sandbox", p.id) }

// prepare makes what iSulad makes before it calls the sandboxer.
func (p *pod) prepare() error {
	if err := os.MkdirAll(p.config.LogDirectory, 0o755); err != nil {
		return err
	}
	shm := filepath.Join(p.folder(), "mounts", "shm")
	if err := os.MkdirAll(shm, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("shm", shm, "tmpfs", unix.MS_NOEXEC|unix.MS_NOSUID|unix.MS_NODEV, "mode=1777,size=65536k"); err != nil {
		return fmt.Errorf("cannot mount the pod's shm: %w", err)
	}
	for name, content := range map[string]string{
		"hosts":       "127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.0.2\tfrom-isulad\n",
		"hostname":    p.id + "\n",
		"resolv.conf": "nameserver 10.1.2.3\n",
	} {
		if err := os.WriteFile(filepath.Join(p.folder(), name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return run("ip", "netns", "add", p.netns)
}

// remove takes back what is left of the pod.
func (p *pod) remove() {
	var errs []error
	errs = append(errs, p.StopPod(p.id), p.RemovePod(p.id))
	if pid, err := p.node.VMM(p.id); err == nil {
		errs = append(errs, fmt.Errorf("process %d of pod %s outlives its removal", pid, p.id))
	}
	for _, dir := range *p.rootfs {
		errs = append(errs, unmount(dir), os.RemoveAll(filepath.Dir(dir)))
	}
	if err := unmount(filepath.Join(p.folder(), "mounts", "shm")); err != nil {
		errs = append(errs, err)
	} else {
		errs = append(errs, os.RemoveAll(p.folder()))
	}
	if _, err := os.Stat("/var/run/netns/" + p.netns); err == nil {
		errs = append(errs, run("ip", "netns", "delete", p.netns))
	}
	if err := errors.Join(errs...); err != nil {
		p.t.Errorf("cannot remove pod %s: %v", p.id, err)
	}
}

func unmount(dir string) error {
	if err := unix.Unmount(dir, 0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("cannot unmount %s: %w", dir, err)
	}
	return nil
}

func run(command ...string) error {
	if output, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%q: %w: %s", command, err, output)
	}
	return nil
}

// connect does what CNI's bridge does: link, address and route come one after the other.
func (p *pod) connect() error {
	veth := "isl" + p.id[:8]
	for _, command := range [][]string{
		{"link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", p.netns},
		{"link", "set", veth, "master", p.node.Bridge, "up"},
		{"-n", p.netns, "link", "set", "lo", "up"},
		{"-n", p.netns, "link", "set", "eth0", "up"},
		{"-n", p.netns, "addr", "add", p.address.String(), "dev", "eth0"},
		{"-n", p.netns, "route", "add", "default", "via", p.node.Gateway.Addr().String()},
	} {
		if err := run(append([]string{"ip"}, command...)...); err != nil {
			return err
		}
	}
	return nil
}

func (p *pod) disconnect() error { return run("ip", "-n", p.netns, "link", "delete", "eth0") }

// container is one of a pod.
type container struct {
	*pod
	id  string
	log string
}

// create makes a container known that runs a shell script. edit, which may be nil, changes what it is.
func (p *pod) create(script string, edit func(*isulad.SpecConfig, *isulad.Container)) *container {
	p.t.Helper()
	id := isulad.NewID()
	c := &container{pod: p, id: id, log: filepath.Join(p.config.LogDirectory, id[:8]+".log")}
	rootfs, err := p.mountRootFS(id)
	if err != nil {
		p.t.Fatal(err)
	}
	spec := isulad.SpecConfig{
		Container: id, Pod: p.id, Name: id[:8], Metadata: p.config.Metadata, PodPID: p.Daemon.PodPID(p.id), RootFS: rootfs,
		Args: []string{"/bin/sh", "-c", script}, Folder: p.folder(), LogFile: c.log, LogSize: "64MB", LogFiles: 7,
	}
	what := isulad.Container{ID: id, RootFS: rootfs}
	if edit != nil {
		edit(&spec, &what)
	}
	what.Terminal = spec.Terminal
	if what.Spec, err = isulad.Spec(spec); err != nil {
		p.t.Fatal(err)
	}
	if err := p.CreateContainer(p.id, what); err != nil {
		p.t.Fatal(err)
	}
	return c
}

// mountRootFS makes a root file system of a container, as iSulad's overlay driver has it.
func (p *pod) mountRootFS(id string) (string, error) {
	dir := filepath.Join(p.node.Dir, "storage", "overlay", id)
	for _, name := range []string{"diff", "work", "merged"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			return "", err
		}
	}
	merged := filepath.Join(dir, "merged")
	*p.rootfs = append(*p.rootfs, merged)
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s/diff,workdir=%s/work", p.node.lower(), dir, dir)
	if err := unix.Mount("overlay", merged, "overlay", 0, options); err != nil {
		return "", fmt.Errorf("cannot mount the root file system of container %s: %w", id, err)
	}
	return merged, nil
}

// start creates and starts a container that runs a shell script.
func (p *pod) start(script string) *container {
	p.t.Helper()
	c := p.create(script, nil)
	if err := p.StartContainer(c.id); err != nil {
		p.t.Fatal(err)
	}
	return c
}

// sh runs a command line in the container, which must succeed, and returns what it wrote.
func (c *container) sh(line string) string {
	c.t.Helper()
	result, err := c.ExecSync(c.id, "/bin/sh", "-c", line)
	if err != nil || result.ExitCode != 0 {
		c.t.Fatalf("%q in the container: %+v, %v", line, result, err)
	}
	return result.Stdout
}

// logged is what the container wrote to one of its streams, from its log and the parts of it that were
// rotated away.
func (c *container) logged(stream string) string {
	c.t.Helper()
	var text strings.Builder
	for i := 16; i >= 0; i-- {
		path := c.log
		if i > 0 {
			path += "." + strconv.Itoa(i)
		}
		data, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			c.t.Fatal(err)
		}
		// The last line may be half written.
		data = data[:strings.LastIndexByte(string(data), '\n')+1]
		for line := range strings.Lines(string(data)) {
			var entry struct{ Log, Stream, Time string }
			if err := json.Unmarshal([]byte(line), &entry); err != nil {
				c.t.Fatalf("%s has the line %q: %v", path, line, err)
			}
			if _, err := time.Parse(time.RFC3339Nano, entry.Time); err != nil {
				c.t.Errorf("%s: %v", path, err)
			}
			if entry.Stream == stream {
				text.WriteString(entry.Log)
			}
		}
	}
	return text.String()
}

// counted checks that the log is the numbers from 0 on, each on a line, and returns how many.
func (c *container) counted() int {
	c.t.Helper()
	next := 0
	for line := range strings.Lines(c.logged("stdout")) {
		if line != strconv.Itoa(next)+"\n" {
			c.t.Fatalf("the log has %q where %d is expected", line, next)
		}
		next++
	}
	return next
}

// writes waits until the container has written a good deal more into its log.
func (c *container) writes() {
	c.t.Helper()
	size := func() (sum int64) {
		files, _ := filepath.Glob(c.log + "*")
		for _, file := range files {
			if info, err := os.Stat(file); err == nil {
				sum += info.Size()
			}
		}
		return sum
	}
	before := size()
	c.eventually("the container writes", func() bool { return size() > before+10000 })
}

// exited waits for the end of a container and checks its exit status.
func (c *container) exited(want uint32) {
	c.t.Helper()
	code, err := c.WaitContainer(c.ctx, c.id)
	if err != nil {
		c.t.Fatal(err)
	}
	if code != want {
		c.t.Errorf("the container's exit status is %d, not %d", code, want)
	}
}

// eventually polls until done says true.
func (h *host) eventually(what string, done func() bool) {
	h.t.Helper()
	for !done() {
		select {
		case <-h.ctx.Done():
			h.t.Fatalf("it does not happen that %s: %v", what, h.ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// state checks what iSulad thinks of the pod.
func (p *pod) state(want isulad.State) {
	p.t.Helper()
	if err := p.WaitPod(p.ctx, p.id, want); err != nil {
		p.t.Fatal(err)
	}
}

// addressForm checks the form of the pod's task address against what the version's library knows.
func (p *pod) addressForm() {
	p.t.Helper()
	_, address, _ := p.PodState(p.id)
	form := "unix://"
	if p.node.Vsock {
		form = "vsock://"
		if p.version == isulad.V216 {
			form = "ttrpc+vsock://"
		}
	}
	if !strings.HasPrefix(address, form) {
		p.t.Errorf("the task address is %q, not in the form %s", address, form)
	}
}
