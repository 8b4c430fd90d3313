package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/ci/e2e/node"
)

// limit returns a file of the container's cgroup as the container sees it.
const limit = `cat /sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)/`

func TestLimitsInTheGuest(t *testing.T) {
	ctx := begin(t)
	p := runPod(ctx, t, podConfig(t), node.Handler)
	config := container("sleep 1000")
	config.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 50000, MemoryLimitInBytes: 48 << 20}
	id := p.start(ctx, t, config)
	check := func(file, want string) {
		t.Helper()
		if got := strings.TrimSpace(exec(ctx, t, id, "sh", "-c", limit+file)); got != want {
			t.Errorf("%s is %q, not %q", file, got, want)
		}
	}
	check("memory.max", "50331648")
	check("cpu.max", "50000 100000")

	if _, err := bed.CRI.Runtime.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: id,
		Linux:       &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 80000, MemoryLimitInBytes: 64 << 20},
	}); err != nil {
		t.Fatalf("cannot change the limits: %v", err)
	}
	check("memory.max", "67108864")
	check("cpu.max", "80000 100000")
}

func TestOutOfMemory(t *testing.T) {
	ctx := begin(t)
	p := runPod(ctx, t, podConfig(t), node.Handler)
	config := container("exec dd if=/dev/zero of=/dev/null bs=100M count=1")
	config.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 32 << 20}
	id := p.start(ctx, t, config)
	status, err := bed.CRI.WaitExited(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	if status.ExitCode != 137 || status.Reason != "OOMKilled" {
		t.Errorf("the exit is %d %s, not 137 OOMKilled", status.ExitCode, status.Reason)
	}
	exec(ctx, t, p.start(ctx, t, container("sleep 1000")), "true")
}

// TestProcessesAreInThePodsCgroup: the hypervisor and the file system daemon count as the pod.
func TestProcessesAreInThePodsCgroup(t *testing.T) {
	ctx := begin(t)
	p := runPod(ctx, t, podConfig(t), node.Handler)
	vmm, _, err := sandboxer.VMM(p.id)
	if err != nil {
		t.Fatal(err)
	}
	membership, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", vmm))
	if err != nil {
		t.Fatal(err)
	}
	leaf := cgroupParent + "/" + p.id
	if !strings.Contains(string(membership), ":"+leaf+"\n") {
		t.Fatalf("the hypervisor is not in %s:\n%s", leaf, membership)
	}
	// In every hierarchy the leaf holds the same processes, and no thread of the sandboxer.
	leaves, err := filepath.Glob(filepath.Join("/sys/fs/cgroup", "*", leaf, "cgroup.procs"))
	if err != nil {
		t.Fatal(err)
	}
	leaves = append(leaves, filepath.Join("/sys/fs/cgroup", leaf, "cgroup.procs"))
	found := 0
	for _, procs := range leaves {
		text, err := os.ReadFile(procs)
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		found++
		pids := strings.Fields(string(text))
		if !slices.Contains(pids, fmt.Sprint(vmm)) || slices.Contains(pids, fmt.Sprint(sandboxer.PID())) {
			t.Errorf("%s holds %q; want %d, and not the sandboxer, which is %d", procs, pids, vmm, sandboxer.PID())
		}
	}
	if found == 0 {
		t.Error("no hierarchy has the pod's leaf")
	}
}
