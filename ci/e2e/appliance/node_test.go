package appliance

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"kuasar.io/kuasar/ci/e2e/census"
	"kuasar.io/kuasar/ci/e2e/cri"
	"kuasar.io/kuasar/ci/e2e/machine"
	"kuasar.io/kuasar/ci/e2e/peers"
)

const (
	service = "kuasar-vmm.service"
	daemon  = "/usr/bin/vmm-sandboxer"
	socket  = "/run/vmm-sandboxer.sock"
	state   = "/run/kuasar-vmm"
)

// A node is a machine with systemd, a package manager that knows the tests' repositories, and
// containerd.
type node struct {
	*machine.Machine
	cri *cri.Client
}

// startNode boots the machine. The appliance is not installed yet. The end of the test closes it.
func startNode(ctx context.Context, t *testing.T) *node {
	t.Helper()
	if os.Getenv("KUASAR_E2E") == "" {
		t.Skip("needs root, debootstrap, QEMU and the tests' repositories; \"go tool mage test\" provides them and sets KUASAR_E2E=1")
	}
	if os.Getuid() != 0 {
		t.Fatal("a machine in namespaces needs root")
	}
	if err := census.Adopt(); err != nil {
		t.Fatal(err)
	}
	programs, err := peers.Build(ctx, top(t), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	m, err := machine.Start(ctx, machine.Options{
		Binds: []machine.Bind{
			{From: programs, To: "/opt/cni/bin"},
			{From: filepath.Join(programs, "containerd"), To: machine.Containerd},
			{From: filepath.Dir(repository(t, "current")), To: "/repositories"},
		},
		Tmpfs:    []string{"/var/lib/containerd", "/srv"},
		Progress: os.Stderr,
	})
	if err != nil {
		t.Fatal(err)
	}
	n := &node{Machine: m}
	t.Cleanup(func() {
		if t.Failed() {
			n.keepLogs(t)
		}
		if n.cri != nil {
			n.cri.Close()
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	// Repositories of which a command may name more: --enablerepo=next.
	for name, enabled := range map[string]int{"debian": 1, "current": 1, "next": 0} {
		text := fmt.Sprintf("[%s]\nname=%[1]s\nbaseurl=file:///repositories/%[1]s\ngpgcheck=0\nenabled=%d\n", name, enabled)
		if err := m.Write("/etc/yum.repos.d/"+name+".repo", text); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(m.Path(volume), 0o755); err != nil {
		t.Fatal(err)
	}
	return n
}

// run runs a command in the machine, which must succeed.
func (n *node) run(ctx context.Context, t *testing.T, command string, args ...string) string {
	t.Helper()
	output, err := n.Run(ctx, append([]string{command}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return output
}

// yum runs a transaction and returns what it printed. A scriptlet that fails is an error.
func (n *node) yum(ctx context.Context, t *testing.T, args ...string) string {
	t.Helper()
	output := n.run(ctx, t, "yum", append([]string{"--assumeyes"}, args...)...)
	if strings.Contains(output, "scriptlet failed") {
		t.Errorf("yum %s:\n%s", strings.Join(args, " "), output)
	}
	return output
}

// property returns what systemd says of the service.
func (n *node) property(ctx context.Context, t *testing.T, name string) string {
	t.Helper()
	return strings.TrimSpace(n.run(ctx, t, "systemctl", "show", "--property="+name, "--value", service))
}

// pid returns the daemon's process, by this machine's number, and 0 if there is none.
func (n *node) pid(t *testing.T) int {
	t.Helper()
	pids, err := n.PIDs(daemon)
	if err != nil {
		t.Fatal(err)
	}
	var main []int
	for _, pid := range pids {
		// The daemon's children are it until they have executed something else.
		if parent(pid) == n.Init {
			main = append(main, pid)
		}
	}
	if len(main) > 1 {
		t.Fatalf("there are several daemons: %v", main)
	}
	if len(main) == 0 {
		return 0
	}
	return main[0]
}

// parent returns a process's parent, 0 if it has ended.
func parent(pid int) int {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "PPid:"); ok {
			number, _ := strconv.Atoi(strings.TrimSpace(value))
			return number
		}
	}
	return 0
}

// vmm returns the process of a pod's virtual machine.
func (n *node) vmm(pod string) (int, error) {
	pids, err := n.PIDs(hypervisor())
	if err != nil {
		return 0, err
	}
	for _, pid := range pids {
		command, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && strings.Contains(string(command), "\x00sandbox-"+pod) {
			return pid, nil
		}
	}
	return 0, fmt.Errorf("pod %s has no virtual machine", pod)
}

func hypervisor() string {
	if runtime.GOARCH == "arm64" {
		return "/usr/bin/qemu-system-aarch64"
	}
	return "/usr/bin/qemu-system-x86_64"
}

// accepts says whether the daemon's socket does.
func (n *node) accepts() bool {
	conn, err := net.Dial("unix", n.Path(socket))
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// An entry is one of the journal.
type entry map[string]any

// journal returns the entries that match.
func (n *node) journal(ctx context.Context, t *testing.T, match ...string) []entry {
	t.Helper()
	// All that was sent until now is to be there.
	n.run(ctx, t, "journalctl", "--sync")
	output := n.run(ctx, t, "journalctl", append([]string{"--no-pager", "--quiet", "--boot", "--output=json"}, match...)...)
	var entries []entry
	for line := range strings.Lines(output) {
		var e entry
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("journalctl has written %.200q: %v", line, err)
		}
		entries = append(entries, e)
	}
	return entries
}

// cursor returns where the journal is now, for --after-cursor.
func (n *node) cursor(ctx context.Context, t *testing.T) string {
	t.Helper()
	n.run(ctx, t, "journalctl", "--sync")
	output := n.run(ctx, t, "journalctl", "--no-pager", "--quiet", "--lines=0", "--show-cursor")
	_, cursor, found := strings.Cut(strings.TrimSpace(output), "cursor: ")
	if !found {
		t.Fatalf("the journal has no cursor: %q", output)
	}
	return "--after-cursor=" + cursor
}

// keepLogs writes the journal and the guests' consoles to out/e2e/<test>.
func (n *node) keepLogs(t *testing.T) {
	dir := filepath.Join(top(t), "out", "e2e", strings.ReplaceAll(t.Name(), "/", "-"))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Errorf("cannot keep the logs: %v", err)
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for file, unit := range map[string]string{"vmm-sandboxer.log": service, "containerd.log": "containerd.service"} {
		out, err := os.Create(filepath.Join(dir, file))
		if err != nil {
			t.Errorf("cannot keep the logs: %v", err)
			return
		}
		cmd := n.Command(ctx, "journalctl", "--no-pager", "--output=short-iso-precise", "--unit="+unit)
		cmd.Stdout = out
		if err := cmd.Run(); err != nil {
			t.Errorf("cannot keep %s: %v", file, err)
		}
		out.Close()
	}
	consoles, _ := filepath.Glob(n.Path(state + "/*/sandbox-*.log"))
	logs, _ := filepath.Glob(n.Path("/var/log/pods/*/*.log"))
	for _, path := range append(consoles, logs...) {
		exec.Command("cp", path, dir).Run()
	}
	t.Logf("the logs are in %s", dir)
}

// scope is what the census counts on the node, whose daemon has to run.
func (n *node) scope(t *testing.T) census.Scope {
	t.Helper()
	engine, err := n.PIDs(machine.Containerd)
	if err != nil || len(engine) != 1 {
		t.Fatalf("the processes of containerd are %v, %v", engine, err)
	}
	pid := n.pid(t)
	if pid == 0 {
		t.Fatal("the daemon does not run")
	}
	return census.Scope{
		Dirs:          []string{n.Path(state), n.Path("/run/containerd"), n.Path("/run/netns"), n.Path("/var/lib/cni"), n.Path("/sys/class/net"), n.Path(volume)},
		Mounts:        "/run",
		CgroupParents: []string{n.Cgroup + cgroupParent, n.Cgroup + "/kuasar-vmm"},
		Daemons:       map[string]int{"vmm-sandboxer": pid, "containerd": engine[0]},
		Metrics:       n.Path(state + "/.metrics.sock"),
	}
}

// census counts, and with it the descriptors that systemd keeps for the daemon.
func (n *node) census(ctx context.Context, t *testing.T) census.Census {
	t.Helper()
	c, err := census.Take(n.scope(t))
	if err != nil {
		t.Fatal(err)
	}
	stored, err := strconv.Atoi(n.property(ctx, t, "NFileDescriptorStore"))
	if err != nil {
		t.Fatal(err)
	}
	c["descriptor kept by systemd"] = stored
	return c
}

// startersOnly are what a daemon has of the virtual machines that it has started itself, and not of
// those that it has adopted: the channels to its children.
var startersOnly = []string{
	"descriptor of vmm-sandboxer on anon_inode:[pidfd]",
	"descriptor of vmm-sandboxer on pipe",
}

// settles waits until the census is that from before. Some things end later than the call that ends
// them, and a daemon that has just started has not yet heard from everybody.
func (n *node) settles(ctx context.Context, t *testing.T, before census.Census) {
	t.Helper()
	limit := time.After(15 * time.Second)
	for {
		after := n.census(ctx, t)
		for _, thing := range startersOnly {
			after[thing] = max(after[thing], before[thing])
		}
		difference := census.Difference(before, after)
		if len(difference) == 0 {
			return
		}
		select {
		case <-limit:
			t.Errorf("the census differs from the one before:\n%s", strings.Join(difference, "\n"))
			return
		case <-time.After(100 * time.Millisecond):
		}
	}
}
