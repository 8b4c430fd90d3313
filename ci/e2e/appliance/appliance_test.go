package appliance

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/ci/e2e/census"
	"kuasar.io/kuasar/ci/e2e/machine"
)

// exposure is the most that "systemd-analyze security" may say of the service, in tenths.
const exposure = 68

// The appliance's life on a node: it is installed, configured and started, and runs pods; the daemon
// is restarted, killed, hangs, is upgraded and downgraded, and each time nobody notices but the
// journal; it is erased and comes back. Each part goes on from where the one before has ended.
func TestAppliance(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 12*time.Minute)
	t.Cleanup(cancel)
	n := startNode(ctx, t)
	step := func(name string, test func(t *testing.T)) {
		if !t.Run(name, test) {
			t.FailNow()
		}
	}
	step("install", func(t *testing.T) { n.testInstall(ctx, t) })
	step("unit", func(t *testing.T) { n.testUnit(ctx, t) })
	step("start", func(t *testing.T) { n.testStart(ctx, t) })

	var empty census.Census
	step("containerd", func(t *testing.T) {
		n.testSetup(ctx, t)
		// containerd, the network plugins and the daemon make some things with the first pod that stay.
		p := n.runPod(ctx, t, "first", "vmm")
		p.start(ctx, t, "true")
		if err := n.cri.RemovePod(ctx, p.id); err != nil {
			t.Fatal(err)
		}
		empty = n.census(ctx, t)
	})
	var w *workload
	step("pods", func(t *testing.T) { w = n.startWorkload(ctx, t) })
	step("journal", func(t *testing.T) { n.testJournal(ctx, t, w) })
	step("tool", func(t *testing.T) { n.testTool(ctx, t, w) })
	step("reload", func(t *testing.T) { n.testReload(ctx, t, w) })

	disturbances := []disturbance{
		{"restart", func(ctx context.Context) error {
			_, err := n.Run(ctx, "systemctl", "restart", service)
			return err
		}},
		{"kill", func(ctx context.Context) error {
			return syscall.Kill(w.daemon, syscall.SIGKILL)
		}},
		{"hang", func(ctx context.Context) error {
			// The watchdog finds it.
			return syscall.Kill(w.daemon, syscall.SIGSTOP)
		}},
		{"upgrade", func(ctx context.Context) error {
			output, err := n.Run(ctx, "yum", "--assumeyes", "--enablerepo=next", "upgrade", "kuasar")
			return n.became(ctx, nextVersion, output, err)
		}},
		{"downgrade", func(ctx context.Context) error {
			output, err := n.Run(ctx, "yum", "--assumeyes", "downgrade", "kuasar")
			return n.became(ctx, currentVersion, output, err)
		}},
	}
	for _, d := range disturbances {
		step(d.name, func(t *testing.T) { w.survives(ctx, t, d) })
	}
	step("erase and install", func(t *testing.T) { n.testErase(ctx, t, w) })
	step("end", func(t *testing.T) {
		for _, p := range w.pods {
			if err := n.cri.RemovePod(ctx, p.id); err != nil {
				t.Error(err)
			}
		}
		n.settles(ctx, t, empty)
	})
}

// testInstall: one command, and the node only lacks a decision about the hypervisor.
func (n *node) testInstall(ctx context.Context, t *testing.T) {
	n.yum(ctx, t, "install", "kuasar")
	if output, err := n.Run(ctx, "rpm", "-V", "kuasar"); err != nil {
		t.Errorf("rpm -V: %v\n%s", err, output)
	}
	if got := n.property(ctx, t, "UnitFileState"); got != "enabled" {
		t.Errorf("the service is %s", got)
	}
	// Packages do not start services.
	if got := n.property(ctx, t, "ActiveState"); got != "inactive" {
		t.Errorf("the service is %s", got)
	}
	if err := n.Write(sysconfig, "OPTIONS=\"--config "+qemuConfig+"\"\n"); err != nil {
		t.Fatal(err)
	}
	n.configure(t, map[string]string{
		"accelerator":   `"tcg"`,
		"kernel_params": `"task.log_level=debug task.sharefs_type=virtiofs"`,
	})
	// The tests decide how long there is no daemon, and need not wait for the watchdog as long as a
	// node does.
	if err := n.Write("/etc/systemd/system/"+service+".d/tests.conf", dropIn); err != nil {
		t.Fatal(err)
	}
	n.run(ctx, t, "systemctl", "daemon-reload")
}

// hold is a file in the machine that holds up the start of the daemon.
const hold = "/run/hold"

const dropIn = `[Service]
ExecStartPre=/bin/sh -c 'while [ -e ` + hold + ` ]; do sleep 0.02; done'
WatchdogSec=4
TimeoutAbortSec=1
`

// configure changes keys of the configuration for QEMU.
func (n *node) configure(t *testing.T, values map[string]string) {
	t.Helper()
	text, err := os.ReadFile(n.Path(qemuConfig))
	if err != nil {
		t.Fatal(err)
	}
	for key, value := range values {
		line := regexp.MustCompile(`(?m)^` + key + ` = .*$`)
		if !line.Match(text) {
			t.Fatalf("%s has no key %s", qemuConfig, key)
		}
		text = line.ReplaceAll(text, []byte(key+" = "+value))
	}
	if err := n.Write(qemuConfig, string(text)); err != nil {
		t.Fatal(err)
	}
}

func (n *node) testUnit(ctx context.Context, t *testing.T) {
	// The tests' root has no program man to look for the manual pages with.
	if output := n.run(ctx, t, "systemd-analyze", "verify", "--man=no", service); output != "" {
		t.Errorf("systemd-analyze verify:\n%s", output)
	}
	output, err := n.Run(ctx, "systemd-analyze", "security", "--no-pager", fmt.Sprint("--threshold=", exposure), service)
	if err != nil {
		t.Errorf("the exposure is above %d: %v", exposure, err)
	}
	_, overall, _ := strings.Cut(output, "Overall exposure level for ")
	t.Logf("systemd-analyze security: %s", strings.TrimSpace(overall))
}

// testStart: the start has succeeded when the daemon says that it is ready, and no sooner.
func (n *node) testStart(ctx context.Context, t *testing.T) {
	n.run(ctx, t, "systemctl", "restart", service)
	if !n.accepts() {
		t.Error("systemctl restart has returned, and the daemon's socket does not accept")
	}
	for name, want := range map[string]string{
		"ActiveState": "active", "SubState": "running", "Type": "notify", "StatusText": "0 pods",
		"WatchdogUSec": "4s", "KillMode": "process", "Delegate": "yes", "NRestarts": "0",
	} {
		if got := n.property(ctx, t, name); got != want {
			t.Errorf("%s of the service is %q, not %q", name, got, want)
		}
	}
	if got := n.property(ctx, t, "WatchdogTimestamp"); got == "" {
		t.Error("the watchdog has had no sign of life")
	}
	// The engines come later.
	for _, engine := range []string{"containerd.service", "isulad.service"} {
		if before := n.property(ctx, t, "Before"); !strings.Contains(before, engine) {
			t.Errorf("the service is before %s, and not before %s", before, engine)
		}
	}
	status := n.run(ctx, t, "systemctl", "status", "--no-pager", service)
	if !strings.Contains(status, `Status: "0 pods"`) {
		t.Errorf("systemctl status:\n%s", status)
	}
}

// testSetup: kuasar-ctl makes the handler known to containerd, which then starts.
func (n *node) testSetup(ctx context.Context, t *testing.T) {
	if err := n.ConfigureContainerd("/usr/share/kuasar/cni.conflist"); err != nil {
		t.Fatal(err)
	}
	before := n.run(ctx, t, "cat", machine.ContainerdConfig)
	shown := n.run(ctx, t, "kuasar-ctl", "setup", "--dry-run", "containerd")
	if n.run(ctx, t, "cat", machine.ContainerdConfig) != before || !strings.Contains(shown, "\n+") {
		t.Errorf("a dry run has changed something, or does not show what it would:\n%s", shown)
	}
	n.run(ctx, t, "kuasar-ctl", "setup", "containerd")
	after := n.run(ctx, t, "find", "/etc/containerd", "-type", "f", "-exec", "sha256sum", "{}", "+")
	again := n.run(ctx, t, "kuasar-ctl", "setup", "containerd")
	if n.run(ctx, t, "find", "/etc/containerd", "-type", "f", "-exec", "sha256sum", "{}", "+") != after {
		t.Errorf("done twice, the set-up changes something again:\n%s", again)
	}
	var err error
	if n.cri, err = n.StartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
}

// testTool: kuasar-ctl finds what runs, and nothing that nobody owns.
func (n *node) testTool(ctx context.Context, t *testing.T, w *workload) {
	list := n.run(ctx, t, "kuasar-ctl", "list")
	for _, p := range w.pods {
		if !strings.Contains(list, p.id[:12]) {
			t.Errorf("kuasar-ctl list has not pod %s:\n%s", p.id, list)
		}
		if inspected := n.run(ctx, t, "kuasar-ctl", "inspect", p.id[:12]); !strings.Contains(inspected, p.id) {
			t.Errorf("kuasar-ctl inspect %s:\n%s", p.id[:12], inspected)
		}
	}
	if output := n.run(ctx, t, "kuasar-ctl", "gc", "--dry-run"); strings.Contains(output, "remove") {
		t.Errorf("there is something to collect:\n%s", output)
	}
	// Nothing is missing. There may be warnings: this machine need not have vsock for guests.
	n.run(ctx, t, "kuasar-ctl", "check")
}

// A workload is three pods whose containers write, wait and idle.
type workload struct {
	n        *node
	pods     []*pod
	counters []*counter
	idle     []*container // one in each pod
	daemon   int          // process
}

func (n *node) startWorkload(ctx context.Context, t *testing.T) *workload {
	w := &workload{n: n, daemon: n.pid(t)}
	for _, p := range []*pod{
		n.runPod(ctx, t, "fifo", "vmm"),
		n.runPod(ctx, t, "streaming", machine.HandlerStreaming),
		n.runPod(ctx, t, "quiet", "vmm"),
	} {
		w.pods = append(w.pods, p)
		w.idle = append(w.idle, p.start(ctx, t, "sleep 100000"))
	}
	for _, p := range w.pods[:2] {
		w.counters = append(w.counters, &counter{container: p.start(ctx, t, counting)})
	}
	w.works(ctx, t)
	eventually(ctx, t, "the status text counts the pods", func() bool { return n.property(ctx, t, "StatusText") == "3 pods" })
	return w
}

// works checks what must be so at any time: pods are ready, in the same virtual machines; containers
// run, their logs are without gaps and grow; commands are executed.
func (w *workload) works(ctx context.Context, t *testing.T) {
	t.Helper()
	for _, p := range w.pods {
		p.ready(ctx, t)
	}
	for _, c := range w.counters {
		if got := c.state(ctx, t); got != runtimeapi.ContainerState_CONTAINER_RUNNING {
			t.Fatalf("container %s is %s", c.name, got)
		}
		c.goesOn(ctx, t)
	}
	for _, c := range w.idle {
		if got := c.state(ctx, t); got != runtimeapi.ContainerState_CONTAINER_RUNNING {
			t.Fatalf("container %s is %s", c.name, got)
		}
		if got := c.exec(ctx, t, "echo", "hello"); got != "hello\n" {
			t.Fatalf("in container %s echo has written %q", c.name, got)
		}
	}
}

// A disturbance ends the daemon. It may last until there is another one.
type disturbance struct {
	name string
	act  func(ctx context.Context) error
}

// survives checks that all works on after a disturbance. While there is no daemon, a container ends
// in each pod, and a command that is executed in each goes on.
func (w *workload) survives(ctx context.Context, t *testing.T, d disturbance) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	n := w.n
	w.works(ctx, t)
	before := n.census(ctx, t)
	var waiters []*waiter
	var sessions []*session
	for i, p := range w.pods {
		waiters = append(waiters, p.startWaiter(ctx, t, int32(41+i)))
		sessions = append(sessions, w.idle[i].startSession(ctx, t))
	}

	old := n.pid(t)
	w.daemon = old
	if err := n.Write(hold, ""); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	acted := make(chan error, 1)
	go func() { acted <- d.act(ctx) }()
	eventually(ctx, t, "the daemon ends", func() bool { return n.pid(t) == 0 })
	ended := time.Now()
	for _, waiter := range waiters {
		waiter.end(ctx, t)
	}
	if n.pid(t) != 0 {
		t.Fatal("there is a daemon too soon")
	}
	if err := os.Remove(n.Path(hold)); err != nil {
		t.Fatal(err)
	}
	if err := <-acted; err != nil {
		t.Fatal(err)
	}
	eventually(ctx, t, "the service is active", func() bool {
		return n.property(ctx, t, "ActiveState") == "active" && n.accepts()
	})
	t.Logf("%s: the old daemon was gone after %s, for %s", d.name, ended.Sub(began).Round(time.Millisecond), time.Since(ended).Round(time.Millisecond))
	if w.daemon = n.pid(t); w.daemon == old || w.daemon == 0 {
		t.Errorf("the daemon was process %d and is %d", old, w.daemon)
	}

	w.works(ctx, t)
	for _, s := range sessions {
		s.finish(ctx, t)
	}
	for _, waiter := range waiters {
		waiter.check(ctx, t)
		waiter.remove(ctx, t)
	}
	if t.Failed() {
		return
	}
	eventually(ctx, t, "the status text counts the pods", func() bool { return n.property(ctx, t, "StatusText") == "3 pods" })
	n.settles(ctx, t, before)
}

// became checks what a transaction has led to.
func (n *node) became(ctx context.Context, version, output string, err error) error {
	if err != nil {
		return err
	}
	installed, err := n.Run(ctx, "rpm", "-q", "--qf", "%{VERSION}", "kuasar")
	if err != nil {
		return err
	}
	if installed != version || strings.Contains(output, "scriptlet failed") {
		return fmt.Errorf("installed is version %s, not %s:\n%s", installed, version, output)
	}
	return nil
}

// testJournal: what the daemon says of a pod is found by a field.
func (n *node) testJournal(ctx context.Context, t *testing.T, w *workload) {
	for _, p := range w.pods {
		entries := n.journal(ctx, t, "KUASAR_POD="+p.id)
		if len(entries) == 0 {
			t.Errorf("the journal has nothing about pod %s", p.name)
		}
		for _, e := range entries {
			if e["_SYSTEMD_UNIT"] != service || e["MESSAGE"] == "" || e["KUASAR_POD"] != p.id {
				t.Errorf("the journal has %v", e)
			}
		}
	}
}

// testReload: another level takes effect, and a broken file does not.
func (n *node) testReload(ctx context.Context, t *testing.T, w *workload) {
	debug := func(cursor string) int { return len(n.journal(ctx, t, cursor, "--unit="+service, "PRIORITY=7")) }
	pid := n.pid(t)
	cursor := n.cursor(ctx, t)
	w.idle[0].exec(ctx, t, "true")
	if debug(cursor) > 0 {
		t.Error("the daemon logs at the level debug already")
	}
	n.configure(t, map[string]string{"log_level": `"debug"`})
	n.run(ctx, t, "systemctl", "reload", service)
	// At this level every call is logged, with the container that it is about.
	for _, c := range w.idle {
		c.exec(ctx, t, "true")
		if len(n.journal(ctx, t, cursor, "PRIORITY=7", "KUASAR_CONTAINER="+c.id, "KUASAR_POD="+c.pod.id)) == 0 {
			t.Errorf("at the level debug the journal has nothing about a command in container %s", c.name)
		}
	}

	good, err := os.ReadFile(n.Path(qemuConfig))
	if err != nil {
		t.Fatal(err)
	}
	cursor = n.cursor(ctx, t)
	if err := n.Write(qemuConfig, strings.Replace(string(good), `log_level = "debug"`, `log_levle = "error"`, 1)); err != nil {
		t.Fatal(err)
	}
	output, err := n.Run(ctx, "systemctl", "reload", service)
	if err == nil {
		t.Errorf("a broken file is accepted:\n%s", output)
	}
	if said := n.journal(ctx, t, cursor, "--unit="+service); !strings.Contains(fmt.Sprint(said), "log_levle") {
		t.Error("the journal does not say what is wrong with the file")
	}
	if got := n.property(ctx, t, "ActiveState"); got != "active" || n.pid(t) != pid {
		t.Errorf("after a reload that was refused the service is %s, and its process %d was %d", got, n.pid(t), pid)
	}
	cursor = n.cursor(ctx, t)
	w.idle[0].exec(ctx, t, "true")
	if debug(cursor) == 0 {
		t.Error("after a reload that was refused the daemon does not log at the level debug any more")
	}

	if err := n.Write(qemuConfig, string(good)); err != nil {
		t.Fatal(err)
	}
	// The rest of the log is worth more at this level, should a test fail.
	n.run(ctx, t, "systemctl", "reload", service)
	if n.pid(t) != pid {
		t.Error("a reload has restarted the daemon")
	}
}

// testErase: erasing the package ends the daemon and with it what it keeps for containerd, which then
// takes the containers for dead. The pods' virtual machines run on, and what is in them. Installed
// again, the daemon has the pods back.
func (n *node) testErase(ctx context.Context, t *testing.T, w *workload) {
	output := n.yum(ctx, t, "remove", "kuasar")
	if !strings.Contains(output, "3 pod(s) run on") {
		t.Errorf("the removal does not say that pods run on:\n%s", output)
	}
	if n.pid(t) != 0 {
		t.Error("the daemon has not been stopped")
	}
	if state, _ := n.Run(ctx, "systemctl", "is-active", service); strings.TrimSpace(state) != "inactive" {
		t.Errorf("the service is %s", state)
	}
	for _, p := range w.pods {
		if vmm, err := n.vmm(p.id); err != nil || vmm != p.vmm {
			t.Errorf("the virtual machine of pod %s was process %d and is %d, %v", p.name, p.vmm, vmm, err)
		}
	}
	for _, c := range append([]*container{w.counters[0].container, w.counters[1].container}, w.idle...) {
		status, err := n.cri.WaitExited(ctx, c.id)
		if err != nil {
			t.Fatal(err)
		}
		if status.ExitCode != 255 {
			t.Errorf("container %s has exited with code %d", c.name, status.ExitCode)
		}
	}
	// Up to the end there is no gap.
	for _, c := range w.counters {
		c.check(t)
	}

	n.yum(ctx, t, "install", "kuasar")
	for _, file := range []string{sysconfig, qemuConfig} {
		n.run(ctx, t, "mv", file+".rpmsave", file)
	}
	n.run(ctx, t, "systemctl", "start", service)
	w.daemon = n.pid(t)
	if got := n.property(ctx, t, "StatusText"); got != "3 pods" {
		t.Errorf("the daemon that was installed again has %q", got)
	}
	for i, p := range w.pods {
		p.ready(ctx, t)
		// What is new in the pod works.
		c := p.start(ctx, t, "sleep 100000")
		if got := c.exec(ctx, t, "echo", "hello"); got != "hello\n" {
			t.Errorf("in container %s echo has written %q", c.name, got)
		}
		w.idle[i].remove(ctx, t)
	}
}
