package nested

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/ci/e2e/cri"
	"kuasar.io/kuasar/ci/e2e/isulad"
	"kuasar.io/kuasar/ci/e2e/isulad/scenario"
	"kuasar.io/kuasar/ci/e2e/machine"
)

const (
	qemuConfig = "/var/lib/kuasar/config_qemu.toml"
	sysconfig  = "/etc/sysconfig/kuasar-vmm"
	state      = "/run/kuasar-vmm"

	stratovirtConfig = "/var/lib/kuasar/config_stratovirt.toml"

	handler = "vmm"
	gateway = "10.88.0.1" // of defaults/cni.conflist
)

// The appliance's life on a node with KVM and vsock, as the guide tells it. Each step goes on from where
// the one before has ended.
func TestOnNode(t *testing.T) {
	if os.Getenv("KUASAR_NODE") == "" {
		t.Skip("runs on a node that TestNode boots")
	}
	n := &guide{onNode: &onNode{t: t}, ctx: context.Background(), hypervisor: hypervisor{"qemu-system-x86_64", qemuConfig}}
	n.step("The node", n.node)
	n.step("yum install kuasar", n.install)
	n.step("The configuration: QEMU on KVM, with the debug console", n.configure)
	n.step("systemctl restart kuasar-vmm", n.start)
	n.step("kuasar-ctl check", n.check)
	n.step("containerd, configured by kuasar-ctl", n.containerd)
	n.life()
	if n.given("stratovirt", "STRATOVIRT", "StratoVirt") {
		n.hypervisor = hypervisor{"stratovirt", stratovirtConfig}
		n.step("The configuration: StratoVirt", n.stratovirt)
		n.step("systemctl restart kuasar-vmm, with StratoVirt", n.start)
		n.life()
	}
	if n.given("isulad", "ISULAD_ROOT", "iSulad") {
		n.step("iSulad itself", n.realISulad)
	}
	n.step("yum remove kuasar", n.erase)
}

// life is what pods on one hypervisor go through.
func (n *guide) life() {
	with := " (" + n.hypervisor.program + ")"
	fmt.Println("\n(The node has no crictl. What it would be asked for, a client of the CRI does, in the lines that begin" +
		" with [CRI client]; and for the guide's top, which writes no log, the container counts lines.)")
	n.step("The guide's pod: crictl run -r vmm pod-container.yaml podsandbox.yaml"+with, n.guidePod)
	n.step("The virtual machine, its CID, and what it is made of"+with, n.machine)
	n.step("ncat --vsock <cid> 1025: inside the pod's machine"+with, n.console)
	n.step("Another pod beside it"+with, n.second)
	n.step("systemctl restart kuasar-vmm, with pods alive"+with, func() { n.survive("systemctl restart kuasar-vmm") })
	n.step("SIGKILL of the daemon, with pods alive"+with, func() { n.survive("systemctl kill --signal=SIGKILL kuasar-vmm") })
	n.step("crictl stopp, crictl rmp of one"+with, n.removeSecond)
	n.step("iSulad 2.1.3 beside containerd: vsock://<cid>:1024, streams over FIFOs"+with, n.iSulad(isulad.V213, scenario.Lifecycle))
	n.step("iSulad 2.1.5: vsock://<cid>:1024, streams over the guest's ports"+with, n.iSulad(isulad.V215, scenario.Lifecycle))
	n.step("iSulad 2.1.6: ttrpc+vsock://<cid>:1024, the network later"+with, n.iSulad(isulad.V216, scenario.Lifecycle))
	n.step("iSulad 2.1.5: restart and SIGKILL of the daemon"+with, n.iSulad(isulad.V215, scenario.Restarts))
	n.step("iSulad 2.1.6: restart and SIGKILL of the daemon"+with, n.iSulad(isulad.V216, scenario.Restarts))
	n.step("crictl stopp, crictl rmp"+with, n.remove)
}

// guide is the scenario through containerd.
type guide struct {
	*onNode
	ctx        context.Context
	hypervisor hypervisor
	cri        *cri.Client
	pods       []*guidePod
}

// A hypervisor of the pods.
type hypervisor struct {
	program string
	config  string // the daemon's file for it
}

// A guidePod is a pod of the guide, with its container.
type guidePod struct {
	name, id, container, log string
	cid                      string // of its virtual machine
	config                   *runtimeapi.PodSandboxConfig
}

// processes is a command that shows the virtual machine of a pod. The pattern does not find itself.
func (n *guide) processes(pod string) string {
	p := n.hypervisor.program
	return fmt.Sprintf("ps -ww -ef | grep '[%s]%s.*sandbox-%s'", p[:1], p[1:], pod)
}

func (n *guide) node() {
	n.show("uname -sr; grep -m 1 'model name' /proc/cpuinfo; grep -c -w svm /proc/cpuinfo; head -n 1 /etc/os-release")
	n.show("ls -l /dev/kvm; lsmod | grep -E '^(kvm|vhost|tun)' || true")
	n.show("systemctl is-system-running; systemd-analyze time")
}

func (n *guide) install() {
	for _, name := range []string{"debian", "current"} {
		text := fmt.Sprintf("[%s]\nname=%[1]s\nbaseurl=file:///node/repositories/%[1]s\ngpgcheck=0\n", name)
		if err := os.WriteFile("/etc/yum.repos.d/"+name+".repo", []byte(text), 0o644); err != nil {
			n.t.Fatal(err)
		}
	}
	output := n.show("yum --assumeyes install kuasar")
	if strings.Contains(output, "scriptlet failed") {
		n.t.Error("a scriptlet has failed")
	}
	n.show("rpm -q kuasar && rpm -V kuasar && cat /usr/lib/modules-load.d/kuasar.conf")
	// What modules-load.d names is loaded by the installation, and by nothing before it.
	n.show("lsmod | grep -E '^(vhost_vsock|vhost_net|tun|kvm) '")
	n.show("ls -l /dev/vhost-vsock /dev/net/tun /dev/kvm")
}

func (n *guide) configure() {
	n.show("sed -i 's/^accelerator = .*/accelerator = \"kvm\"/' " + qemuConfig)
	n.show("sed -i 's/^debug = .*/debug = true/; s/^log_level = .*/log_level = \"debug\"/' " + qemuConfig)
	n.use(qemuConfig)
}

// use makes a configuration the daemon's.
func (n *guide) use(config string) {
	n.t.Helper()
	// Emulated processors boot guests slowly, and a busy machine more so. Each character of the guest's
	// console costs them much.
	n.show("sed -i '/^log_level = /a boot_timeout_in_s = 180' " + config)
	n.show("sed -i 's/^kernel_params = \"/&quiet /' " + config)
	n.show("echo 'OPTIONS=\"--config " + config + "\"' >" + sysconfig)
	n.show("grep -v '^#' " + config + "; cat " + sysconfig)
}

func (n *guide) start() {
	n.show("systemctl restart kuasar-vmm")
	status := n.show("systemctl status --no-pager --lines=5 kuasar-vmm")
	n.says(status, "active (running)", `Status: "0 pods"`)
	n.show("ls -l /run/vmm-sandboxer.sock")
}

// check: of what pods need, nothing is missing but the engine, whose turn is next.
func (n *guide) check() {
	output, _ := n.try("kuasar-ctl check")
	n.says(output, "boots the guest kernel", "gives context ids", "kuasar-ctl setup containerd", "1 missing, 0 warnings")
}

func (n *guide) containerd() {
	m := &machine.Machine{Init: 1}
	if err := m.ConfigureContainerd("/usr/share/kuasar/cni.conflist"); err != nil {
		n.t.Fatal(err)
	}
	n.show("containerd --version")
	n.show("kuasar-ctl setup containerd")
	fmt.Println("[root@node ~]# systemctl restart containerd")
	var err error
	if n.cri, err = m.StartContainerd(n.ctx); err != nil {
		n.t.Fatal(err)
	}
	n.show("systemctl is-active containerd")
	n.show("kuasar-ctl check | tail -n 3")
}

// run runs a pod of the guide's files under a name.
func (n *guide) run(name string) *guidePod {
	n.t.Helper()
	p := &guidePod{name: name, config: &runtimeapi.PodSandboxConfig{}}
	var container runtimeapi.ContainerConfig
	for file, message := range map[string]any{"podsandbox.yaml": p.config, "pod-container.yaml": &container} {
		if err := cri.LoadYAML(filepath.Join("/node/defaults", file), message); err != nil {
			n.t.Fatal(err)
		}
	}
	p.config.Metadata.Name, p.config.Metadata.Uid = name, name
	p.config.LogDirectory = "/var/log/pods/" + name
	// top writes for ever, which a busy emulator need not; its words are the same in each round.
	container.Command = []string{"/bin/sh", "-c", "i=0; while :; do echo line $i; i=$((i+1)); sleep 1; done"}
	p.log = filepath.Join(p.config.LogDirectory, container.LogPath)
	began := time.Now()
	var err error
	if p.id, err = n.cri.RunPod(n.ctx, p.config, handler); err != nil {
		n.t.Fatalf("cannot run pod %s: %v", name, err)
	}
	ready := time.Now()
	if p.container, err = n.cri.Create(n.ctx, p.id, p.config, &container); err != nil {
		n.t.Fatalf("cannot create the container: %v", err)
	}
	if err := n.cri.Start(n.ctx, p.container); err != nil {
		n.t.Fatalf("cannot start the container: %v", err)
	}
	fmt.Printf("(pod %.13s was ready after %.1f s, its container runs %.1f s later)\n", p.id, ready.Sub(began).Seconds(), time.Since(ready).Seconds())
	n.pods = append(n.pods, p)
	return p
}

func (n *guide) guidePod() {
	p := n.run("busybox-sandbox")
	n.list(1)
	n.logs(p)
	n.exec(p)
}

// list prints what crictl pods and crictl ps would, and checks how many are ready and running.
func (n *guide) list(want int) {
	n.t.Helper()
	pods, err := n.cri.Pods(n.ctx)
	if err != nil {
		n.t.Fatal(err)
	}
	ready := 0
	fmt.Printf("[CRI client] crictl pods\n%-16s%-12s%-20s%s\n", "POD ID", "STATE", "NAME", "NAMESPACE")
	for _, p := range pods {
		shown := "NotReady"
		if p.State == runtimeapi.PodSandboxState_SANDBOX_READY {
			shown = "Ready"
			ready++
		}
		fmt.Printf("%-16.13s%-12s%-20s%s\n", p.Id, shown, p.Metadata.Name, p.Metadata.Namespace)
	}
	answer, err := n.cri.Runtime.ListContainers(n.ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		n.t.Fatal(err)
	}
	running := 0
	fmt.Printf("[CRI client] crictl ps\n%-16s%-12s%-20s%s\n", "CONTAINER", "STATE", "NAME", "POD ID")
	for _, c := range answer.Containers {
		shown := "Exited"
		if c.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
			shown = "Running"
			running++
		}
		fmt.Printf("%-16.13s%-12s%-20s%.13s\n", c.Id, shown, c.Metadata.Name, c.PodSandboxId)
	}
	if ready != want || running != want {
		n.t.Errorf("%d pods are ready and %d containers run, not %d", ready, running, want)
	}
}

// logs waits until the container's log grows, and shows its end.
func (n *guide) logs(p *guidePod) {
	n.t.Helper()
	count := func() int { return len(strings.Split(n.ask("cat "+p.log), "\n")) }
	from := count()
	n.eventually("the log of pod "+p.name+" grows", func() bool { return count() > from+1 })
	fmt.Printf("[CRI client] crictl logs %.13s | tail -n 2\n", p.container)
	text := n.ask("cat " + p.log)
	next := 0
	for line := range strings.Lines(text) {
		// <time> <stream> <F for a full line> line <number>
		fields := strings.Fields(line)
		if len(fields) != 5 || fields[4] != fmt.Sprint(next) {
			n.t.Fatalf("the log of pod %s has %q where line %d should be", p.name, line, next)
		}
		next++
	}
	lines := strings.Split(strings.TrimSpace(text), "\n")
	fmt.Println(strings.Join(lines[max(0, len(lines)-2):], "\n"))
}

// exec runs a command in the container.
func (n *guide) exec(p *guidePod) {
	n.t.Helper()
	fmt.Printf("[CRI client] crictl exec %.13s sh -c 'echo hello from $(uname -r); exit 7'\n", p.container)
	result, err := n.cri.Exec(n.ctx, p.container, "sh", "-c", "echo hello from $(uname -r); exit 7")
	if err != nil {
		n.t.Fatal(err)
	}
	fmt.Printf("%s%s(exit status %d)\n", result.Stdout, result.Stderr, result.ExitCode)
	if result.ExitCode != 7 || !strings.HasPrefix(result.Stdout, "hello from ") {
		n.t.Errorf("the command has ended with %+v", result)
	}
}

// cidOf is the context id in a hypervisor's command line.
var cidOf = regexp.MustCompile(`vhost-vsock-pci\S*,guest-cid=(\d+)`)

func (n *guide) machine() {
	p := n.pods[0]
	line := n.show(n.processes(p.id))
	n.says(line, "vhost-vsock-pci", "guest-cid=", "vhost-user-fs-pci", "/var/lib/kuasar/vmlinux.bin", "/var/lib/kuasar/kuasar.initrd")
	if n.hypervisor.program == "qemu-system-x86_64" { // StratoVirt has nothing but KVM
		n.says(line, "-accel kvm", "vhost=on,vhostfd=")
	}
	p.cid = n.cid(p)
	n.show("ps -ww -ef | grep '[v]irtiofsd -f'")
	// Both ends of the connections between the daemon, CID 2, and the guest; the agent has made the first.
	connections := n.show("ss --vsock --all --numeric")
	n.says(connections, p.cid)
	n.show("lsmod | grep -E '^(kvm|vhost|tun|vsock)'")
	files := n.show("ls -al " + state + "/" + p.id + "/")
	n.says(files, "console.sock", "sandbox-"+p.id+".log", "sandbox-"+p.id+".pid")
	n.show("kuasar-ctl list")
	n.show("kuasar-ctl inspect " + p.id[:13])
	n.show("journalctl --no-pager --output=cat --unit=kuasar-vmm | grep 'the agent called'")
}

// cid finds a pod's context id.
func (n *guide) cid(p *guidePod) string {
	n.t.Helper()
	found := cidOf.FindStringSubmatch(n.ask(n.processes(p.id)))
	if found == nil {
		n.t.Fatalf("the virtual machine of pod %s has no context id", p.name)
	}
	return found[1]
}

func (n *guide) console() {
	p := n.pods[0]
	output := n.typed("ncat --vsock "+p.cid+" 1025", "ip addr show", "ping -c 3 "+gateway, "cat /proc/mounts", "uname -a", "exit")
	status, err := n.cri.Runtime.PodSandboxStatus(n.ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id})
	if err != nil {
		n.t.Fatal(err)
	}
	n.says(output, "inet "+status.Status.GetNetwork().GetIp()+"/16", "eth0", "64 bytes from "+gateway+": icmp_seq=3", " virtiofs ")
}

func (n *guide) second() {
	p := n.run("another-sandbox")
	n.list(2)
	if p.cid = n.cid(p); p.cid == n.pods[0].cid {
		n.t.Errorf("both pods have the context id %s", p.cid)
	}
	n.exec(p)
	for _, p := range n.pods {
		n.logs(p)
	}
	output := n.typed("ncat --vsock "+p.cid+" 1025", "ip addr show", "exit")
	n.says(output, "inet 10.88.")
}

// survive checks that all works on after the daemon has ended.
func (n *guide) survive(disturbance string) {
	machines := func() string { return n.ask("pgrep -f '[-]name sandbox-' | sort | tr '\\n' ' '") }
	before, pid := machines(), n.pid()
	n.show(disturbance)
	n.eventually("there is another daemon", func() bool {
		now := n.pid()
		return now != "0" && now != pid && n.ask("systemctl show --property=ActiveState --value kuasar-vmm") == "active"
	})
	status := n.show("systemctl status --no-pager --lines=0 kuasar-vmm")
	n.says(status, "active (running)", `Status: "2 pods"`)
	if after := machines(); after != before {
		n.t.Errorf("the virtual machines were the processes %s and are %s", before, after)
	}
	n.reached()
	n.list(len(n.pods))
	for _, p := range n.pods {
		n.logs(p)
		n.exec(p)
	}
}

func (n *guide) pid() string {
	return n.ask("systemctl show --property=MainPID --value kuasar-vmm")
}

// reached waits until containerd has found the new daemon: a verbose status is not answered by containerd
// alone, whose connection to a daemon that was away backs off for some seconds.
func (n *guide) reached() {
	for _, p := range n.pods {
		n.eventually("containerd reaches the daemon", func() bool {
			_, err := n.cri.Runtime.PodSandboxStatus(n.ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
			return err == nil
		})
	}
}

func (n *guide) removePod(p *guidePod) {
	n.t.Helper()
	fmt.Printf("[CRI client] crictl stopp %.13[1]s; crictl rmp %.13[1]s\n", p.id)
	if err := n.cri.RemovePod(n.ctx, p.id); err != nil {
		n.t.Fatal(err)
	}
}

// removeSecond leaves one pod, beside which iSulad's are.
func (n *guide) removeSecond() {
	n.removePod(n.pods[1])
	n.pods = n.pods[:1]
	n.list(1)
	n.logs(n.pods[0])
}

func (n *guide) remove() {
	for _, p := range n.pods {
		n.removePod(p)
	}
	n.pods = nil
	n.list(0)
	n.nothingRuns()
}

// nothingRuns checks that the pods have left nothing.
func (n *guide) nothingRuns() {
	n.t.Helper()
	const things = "pgrep -a -f '[q]emu-system|[s]tratovirt|[v]irtiofsd|[v]host_user_fs'; ls " + state + "; ip -o link | grep -E 'tap|veth'; ip netns; " +
		"grep -E ' (" + state + "|/run/netns/)' /proc/self/mountinfo; find /sys/fs/cgroup -type d -path '*kuasar*sandbox*'; ss -H --vsock --all"
	n.eventually("nothing is left of the pods", func() bool {
		output, _ := n.quietly(things, discard{})
		return strings.TrimSpace(output) == ""
	})
	n.try(things)
}

type discard struct{}

func (discard) Write(b []byte) (int, error) { return len(b), nil }

func (n *guide) erase() {
	output := n.show("yum --assumeyes remove kuasar")
	if strings.Contains(output, "scriptlet failed") {
		n.t.Error("a scriptlet has failed")
	}
	n.try("rpm -q kuasar; systemctl status --no-pager kuasar-vmm")
	left, _ := n.try("ps -e -o pid=,comm= | grep -E 'vmm-sandboxer|qemu-system|stratovirt|virtiofsd'; ls -A -d " + state + " /run/vmm-sandboxer.sock /usr/bin/vmm-sandboxer /usr/lib/systemd/system/kuasar-vmm.service 2>/dev/null; find /var/lib/kuasar -type f 2>/dev/null")
	for line := range strings.Lines(left) {
		// RPM saves the files that were edited.
		if line = strings.TrimSpace(line); line != "" && !strings.HasSuffix(line, ".rpmsave") {
			n.t.Errorf("the removal has left %s", line)
		}
	}
}
