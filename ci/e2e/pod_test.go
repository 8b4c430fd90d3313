package e2e

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/ci/e2e/cri"
	"kuasar.io/kuasar/ci/e2e/node"
)

// The guide's two files, and everything that the guide then looks at.
func TestGuidePod(t *testing.T) {
	ctx := begin(t)
	var config runtimeapi.PodSandboxConfig
	var containerConfig runtimeapi.ContainerConfig
	for file, message := range map[string]any{"podsandbox.yaml": &config, "pod-container.yaml": &containerConfig} {
		if err := cri.LoadYAML(filepath.Join(bed.Root(), "defaults", file), message); err != nil {
			t.Fatal(err)
		}
	}
	config.LogDirectory = t.TempDir()
	config.Linux.CgroupParent = cgroupParent
	p := runPod(ctx, t, &config, node.Handler)
	id := p.start(ctx, t, &containerConfig)

	t.Run("pod is ready and container is running", func(t *testing.T) {
		pods, err := bed.CRI.Pods(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(pods) != 1 || pods[0].State != runtimeapi.PodSandboxState_SANDBOX_READY || pods[0].Metadata.Name != "busybox-sandbox" {
			t.Errorf("the pods are %v", pods)
		}
		status, err := bed.CRI.Status(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		if status.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			t.Errorf("the container is %s", status.State)
		}
	})

	t.Run("command line of the virtual machine", func(t *testing.T) {
		_, args, err := sandboxer.VMM(p.id)
		if err != nil {
			t.Fatal(err)
		}
		for option, want := range map[string]string{"-kernel": bed.Kernel(), "-initrd": bed.Initrd()} {
			if at := slices.Index(args, option); at < 0 || at+1 == len(args) || args[at+1] != want {
				t.Errorf("%s is not %s in %q", option, want, args)
			}
		}
	})

	t.Run("files of the pod", func(t *testing.T) {
		dir := filepath.Join(sandboxer.Dir, p.id)
		for name, kind := range map[string]os.FileMode{
			"console.sock":             os.ModeSocket,
			"sandbox-" + p.id + ".log": 0,
			"sandbox-" + p.id + ".pid": 0,
			"sandbox.json":             0,
		} {
			if info, err := os.Stat(filepath.Join(dir, name)); err != nil {
				t.Error(err)
			} else if info.Mode().Type() != kind {
				t.Errorf("%s is of type %v, not %v", name, info.Mode().Type(), kind)
			}
		}
		data, err := os.ReadFile(filepath.Join(dir, "sandbox.json"))
		if err != nil {
			t.Fatal(err)
		}
		if !json.Valid(data) {
			t.Errorf("sandbox.json is not JSON: %s", data)
		}
	})

	t.Run("network of the guest", func(t *testing.T) {
		status, err := bed.CRI.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
		if err != nil {
			t.Fatal(err)
		}
		address := status.Status.Network.Ip
		// The shape of what containerd tells of a sandbox; of its network, only the address and the MAC.
		var info struct {
			CNIResult struct {
				Interfaces map[string]struct{ Mac string }
			} `json:"cniResult"`
		}
		if err := json.Unmarshal([]byte(status.Info["info"]), &info); err != nil {
			t.Fatalf("%v: %q", err, status.Info["info"])
		}
		output, err := sandboxer.Console(ctx, p.id, "ip addr show")
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"eth0", "inet " + address + "/24", info.CNIResult.Interfaces["eth0"].Mac} {
			if want == "" || !strings.Contains(output, want) {
				t.Errorf("\"ip addr show\" in the guest does not show %q:\n%s", want, output)
			}
		}
		output, err = sandboxer.Console(ctx, p.id, "ping -c 3 "+bed.Gateway)
		if err != nil {
			t.Fatal(err)
		}
		if replies := strings.Count(output, "bytes from "+bed.Gateway); replies != 3 {
			t.Errorf("%d of 3 replies from the gateway:\n%s", replies, output)
		}
	})

	t.Run("exec", func(t *testing.T) {
		result, err := bed.CRI.Exec(ctx, id, "sh", "-c", "echo hello; echo trouble >&2; exit 7")
		if err != nil {
			t.Fatal(err)
		}
		if want := (cri.Result{Stdout: "hello\n", Stderr: "trouble\n", ExitCode: 7}); result != want {
			t.Errorf("got %+v, want %+v", result, want)
		}
	})

	t.Run("log", func(t *testing.T) {
		eventually(ctx, t, "top writes its table into the log", func() bool {
			return strings.Contains(p.log(t, &containerConfig, "stdout"), "Mem:")
		})
	})
}

func TestTwoContainersShareTheirPod(t *testing.T) {
	ctx := begin(t)
	p := runPod(ctx, t, podConfig(t), node.Handler)
	first := p.start(ctx, t, container("echo shared > /dev/shm/note; while :; do echo pong | nc -l -p 4321; done"))
	second := p.start(ctx, t, container("sleep 1000"))

	if got := exec(ctx, t, second, "cat", "/dev/shm/note"); got != "shared\n" {
		t.Errorf("the second container reads %q from the first one's /dev/shm", got)
	}
	eventually(ctx, t, "the second container reaches the first one on localhost", func() bool {
		result, err := bed.CRI.Exec(ctx, second, "sh", "-c", "nc 127.0.0.1 4321 </dev/null")
		return err == nil && result.Stdout == "pong\n"
	})
	exec(ctx, t, first, "touch", "/only-in-the-first")
	if result, err := bed.CRI.Exec(ctx, second, "ls", "/only-in-the-first"); err != nil || result.ExitCode == 0 {
		t.Errorf("the second container sees the first one's file system: %+v, %v", result, err)
	}
	if processes := exec(ctx, t, second, "ps", "-o", "args"); strings.Contains(processes, "nc -l") {
		t.Errorf("the second container sees the first one's processes:\n%s", processes)
	}

	t.Run("and one can be replaced", func(t *testing.T) {
		if _, err := bed.CRI.Runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: first}); err != nil {
			t.Fatal(err)
		}
		if _, err := bed.CRI.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: first}); err != nil {
			t.Fatal(err)
		}
		third := p.start(ctx, t, container("sleep 1000"))
		if got := exec(ctx, t, third, "cat", "/dev/shm/note"); got != "shared\n" {
			t.Errorf("the third container reads %q from the pod's /dev/shm", got)
		}
		exec(ctx, t, second, "true")
	})
}

func TestSharedProcessNamespace(t *testing.T) {
	ctx := begin(t)
	config := podConfig(t)
	config.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	p := runPod(ctx, t, config, node.Handler)
	share := func(script string) string {
		config := container(script)
		config.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
		return p.start(ctx, t, config)
	}
	share("exec sleep 1234")
	second := share("exec sleep 1000")
	if processes := exec(ctx, t, second, "ps", "-o", "args"); !strings.Contains(processes, "sleep 1234") {
		t.Errorf("the second container does not see the first one's process:\n%s", processes)
	}
}

func TestNamesInThePod(t *testing.T) {
	ctx := begin(t)
	config := podConfig(t)
	config.Hostname = "the-pod"
	config.DnsConfig = &runtimeapi.DNSConfig{Servers: []string{"10.1.2.3"}, Searches: []string{"example.org"}, Options: []string{"ndots:5"}}
	config.Linux.Sysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}
	p := runPod(ctx, t, config, node.Handler)
	id := p.start(ctx, t, container("sleep 1000"))

	if got := exec(ctx, t, id, "hostname"); got != "the-pod\n" {
		t.Errorf("the hostname is %q", got)
	}
	if got := exec(ctx, t, id, "cat", "/etc/hostname"); got != "the-pod\n" {
		t.Errorf("/etc/hostname is %q", got)
	}
	hosts := exec(ctx, t, id, "cat", "/etc/hosts")
	for _, want := range []string{"127.0.0.1", "localhost", "the-pod"} {
		if !strings.Contains(hosts, want) {
			t.Errorf("/etc/hosts has no %s:\n%s", want, hosts)
		}
	}
	resolv := exec(ctx, t, id, "cat", "/etc/resolv.conf")
	for _, want := range []string{"nameserver 10.1.2.3", "search example.org", "options ndots:5"} {
		if !strings.Contains(resolv, want) {
			t.Errorf("/etc/resolv.conf has no %q:\n%s", want, resolv)
		}
	}
	if got := exec(ctx, t, id, "cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"); got != "0\n" {
		t.Errorf("the sysctl is %q", got)
	}
}

func TestIPv4AndIPv6(t *testing.T) {
	ctx := begin(t)
	p := runPod(ctx, t, podConfig(t), node.HandlerDualStack)
	id := p.start(ctx, t, container("sleep 1000"))
	status, err := bed.CRI.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id})
	if err != nil {
		t.Fatal(err)
	}
	addresses := []string{status.Status.Network.Ip}
	for _, more := range status.Status.Network.AdditionalIps {
		addresses = append(addresses, more.Ip)
	}
	if len(addresses) != 2 {
		t.Fatalf("the pod's addresses are %q", addresses)
	}
	shown := exec(ctx, t, id, "ip", "addr", "show", "eth0")
	for _, address := range addresses {
		if !strings.Contains(shown, " "+address+"/") {
			t.Errorf("eth0 in the guest has no %s:\n%s", address, shown)
		}
	}
	gateway6 := addresses[slices.IndexFunc(addresses, func(a string) bool { return net.ParseIP(a).To4() == nil })]
	gateway6 = gateway6[:strings.LastIndex(gateway6, ":")] + ":1"
	for _, gateway := range []string{bed.Gateway, gateway6} {
		eventually(ctx, t, "the gateway "+gateway+" answers", func() bool {
			result, err := bed.CRI.Exec(ctx, id, "ping", "-c", "1", "-W", "1", gateway)
			return err == nil && result.ExitCode == 0
		})
	}
}

func TestHostNetworkIsRefused(t *testing.T) {
	ctx := begin(t)
	config := podConfig(t)
	config.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
	id, err := bed.CRI.RunPod(ctx, config, node.Handler)
	if err == nil {
		bed.CRI.RemovePod(ctx, id)
		t.Fatal("a pod with hostNetwork runs")
	}
	if !strings.Contains(err.Error(), "hostNetwork") {
		t.Errorf("the error does not say what is refused: %v", err)
	}
}

func TestTenPodsAtOnce(t *testing.T) {
	ctx := begin(t)
	var configs []*runtimeapi.PodSandboxConfig
	var containers []*runtimeapi.ContainerConfig
	for range 10 {
		configs = append(configs, podConfig(t))
		containers = append(containers, container("hostname -i; sleep 1000"))
	}
	ids, errs := make([]string, len(configs)), make([]error, len(configs))
	outputs := make([]string, len(configs))
	var all sync.WaitGroup
	for i := range configs {
		all.Go(func() {
			if ids[i], errs[i] = bed.CRI.RunPod(ctx, configs[i], node.Handler); errs[i] != nil {
				return
			}
			var id string
			if id, errs[i] = bed.CRI.Create(ctx, ids[i], configs[i], containers[i]); errs[i] != nil {
				return
			}
			if errs[i] = bed.CRI.Start(ctx, id); errs[i] != nil {
				return
			}
			var result cri.Result
			result, errs[i] = bed.CRI.Exec(ctx, id, "ip", "-4", "-o", "addr", "show", "eth0")
			outputs[i] = result.Stdout
		})
	}
	all.Wait()
	for i, err := range errs {
		if err != nil {
			t.Errorf("pod %d: %v", i, err)
		}
	}
	slices.Sort(outputs)
	if distinct := slices.Compact(slices.Clone(outputs)); len(distinct) != len(outputs) {
		t.Errorf("the pods' addresses are not distinct:\n%s", strings.Join(outputs, ""))
	}
	// Whatever became of ctx.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, id := range ids {
		if id != "" {
			all.Go(func() {
				if err := bed.CRI.RemovePod(ctx, id); err != nil {
					t.Error(err)
				}
			})
		}
	}
	all.Wait()
}

func TestStatistics(t *testing.T) {
	ctx := begin(t)
	p := runPod(ctx, t, podConfig(t), node.Handler)
	id := p.start(ctx, t, container("while :; do :; done"))
	eventually(ctx, t, "the container's statistics show processor time and memory", func() bool {
		answer, err := bed.CRI.Runtime.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id})
		return err == nil && answer.Stats.GetCpu().GetUsageCoreNanoSeconds().GetValue() > 0 &&
			answer.Stats.GetMemory().GetWorkingSetBytes().GetValue() > 0
	})
	eventually(ctx, t, "the pod's statistics show the memory of its machine", func() bool {
		answer, err := bed.CRI.Runtime.PodSandboxStats(ctx, &runtimeapi.PodSandboxStatsRequest{PodSandboxId: p.id})
		return err == nil && answer.Stats.GetLinux().GetCpu().GetUsageCoreNanoSeconds().GetValue() > 0 &&
			answer.Stats.GetLinux().GetMemory().GetWorkingSetBytes().GetValue() > 32<<20
	})
}
