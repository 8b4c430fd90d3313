package pod

import (
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/guest/protocol"
)

func cpuLimit(quota, period int64) *cri.LinuxContainerResources {
	return &cri.LinuxContainerResources{CpuQuota: quota, CpuPeriod: period}
}

func TestMachineSize(t *testing.T) {
	base, limit := Size{VCPUs: 2, MemoryMiB: 256}, Size{VCPUs: 8, MemoryMiB: 4096}
	memory := func(bytes int64) *cri.LinuxContainerResources {
		return &cri.LinuxContainerResources{MemoryLimitInBytes: bytes}
	}
	for name, tc := range map[string]struct {
		resources, overhead *cri.LinuxContainerResources
		annotations         map[string]string
		want                Size
	}{
		"nothing": {want: base},
		// What iSulad fills in for a pod without resources.
		"iSulad's defaults":        {resources: &cri.LinuxContainerResources{CpuShares: 2, OomScoreAdj: -998}, want: base},
		"shares only":              {resources: &cri.LinuxContainerResources{CpuShares: 4096, CpuPeriod: 100000}, want: base},
		"no quota":                 {resources: cpuLimit(-1, 100000), want: base},
		"no quota, an overhead":    {resources: cpuLimit(0, 100000), overhead: cpuLimit(5000, 100000), want: base},
		"less than the file's":     {resources: cpuLimit(50000, 100000), want: Size{1, 256}},
		"whole CPUs":               {resources: cpuLimit(300000, 100000), want: Size{3, 256}},
		"a bit more than whole":    {resources: cpuLimit(300001, 100000), want: Size{4, 256}},
		"no period":                {resources: cpuLimit(300000, 0), want: Size{3, 256}},
		"an overhead":              {resources: cpuLimit(300000, 100000), overhead: cpuLimit(5000, 100000), want: Size{4, 256}},
		"overhead fits":            {resources: cpuLimit(270000, 100000), overhead: cpuLimit(15000, 50000), want: Size{3, 256}},
		"more CPUs than allowed":   {resources: cpuLimit(math.MaxInt64, 1), overhead: cpuLimit(math.MaxInt64, 1), want: Size{8, 256}},
		"memory":                   {resources: memory(64 << 20), want: Size{2, 320}},
		"64 MiB and a byte":        {resources: memory(64<<20 + 1), want: Size{2, 321}},
		"more memory than allowed": {resources: memory(9223372036854771712), want: Size{2, 4096}},
		"annotations": {
			resources:   &cri.LinuxContainerResources{CpuQuota: 300000, CpuPeriod: 100000, MemoryLimitInBytes: 1 << 30},
			annotations: map[string]string{"io.kuasar.hypervisor.vcpus": "1", "io.kuasar.hypervisor.memory_in_mb": "64", "io.kuasarx": "x", "other": "y"},
			want:        Size{1, 64},
		},
		"the limits": {annotations: map[string]string{"io.kuasar.hypervisor.vcpus": "8", "io.kuasar.hypervisor.memory_in_mb": "4096"}, want: limit},
	} {
		got, err := machineSize(base, limit, &cri.PodSandboxConfig{
			Annotations: tc.annotations,
			Linux:       &cri.LinuxPodSandboxConfig{Resources: tc.resources, Overhead: tc.overhead},
		})
		if err != nil || got != tc.want {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, tc.want)
		}
	}
}

func TestMachineSizeOfTheNode(t *testing.T) {
	// A configured size counts, also on a node that has less.
	base := Size{VCPUs: protocol.MaxVCPUs, MemoryMiB: 1 << 30}
	got, err := machineSize(base, Size{}, &cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{
		Resources: &cri.LinuxContainerResources{CpuQuota: 1 << 40, CpuPeriod: 1, MemoryLimitInBytes: math.MaxInt64},
	}})
	if err != nil || got != base {
		t.Errorf("got %+v, %v", got, err)
	}
	got, err = machineSize(Size{VCPUs: 1, MemoryMiB: 128}, Size{}, &cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{
		Resources: &cri.LinuxContainerResources{CpuQuota: 1 << 40, CpuPeriod: 1, MemoryLimitInBytes: math.MaxInt64},
	}})
	if err != nil || got.VCPUs < 1 || got.VCPUs > protocol.MaxVCPUs || got.MemoryMiB <= 128 || got.MemoryMiB == math.MaxInt32 {
		t.Errorf("of the node: %+v, %v", got, err)
	}
}

func TestAnnotationsRefused(t *testing.T) {
	for _, tc := range []struct{ key, value, want string }{
		{"io.kuasar.hypervisor.vcpus", "9", "from 1 to 8"},
		{"io.kuasar.hypervisor.vcpus", "0", "from 1 to 8"},
		{"io.kuasar.hypervisor.vcpus", "", "from 1 to 8"},
		{"io.kuasar.hypervisor.vcpus", "2.5", `"2.5"`},
		{"io.kuasar.hypervisor.vcpus", "99999999999999999999", "from 1 to 8"},
		{"io.kuasar.hypervisor.memory_in_mb", "63", "from 64 to 4096"},
		{"io.kuasar.hypervisor.memory_in_mb", "4097", "from 64 to 4096"},
		{"io.kuasar.hypervisor.memory_in_mb", "1Gi", `"1Gi"`},
		{"io.kuasar.hypervisor.kernel_params", "init=/bin/sh", "io.kuasar.hypervisor.memory_in_mb and io.kuasar.hypervisor.vcpus"},
		{"io.kuasar.", "", "not known"},
		{"io.kuasar." + strings.Repeat("x", 1000), "", "…"},
	} {
		_, err := machineSize(Size{1, 256}, Size{8, 4096}, &cri.PodSandboxConfig{Annotations: map[string]string{tc.key: tc.value}})
		if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), tc.want) || len(err.Error()) > 400 {
			t.Errorf("%.60s = %q: got %v, want %q", tc.key, tc.value, err, tc.want)
		}
	}
}

// TestAnnotationsAreCheckedAtCreate: an engine hears of them before anything of the pod is there.
func TestAnnotationsAreCheckedAtCreate(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	m := NewManager(o)
	err := m.Create(t.Context(), CreateRequest{ID: "a", NetNS: "/proc/self/ns/net", Config: &cri.PodSandboxConfig{
		Annotations: map[string]string{"io.kuasar.hypervisor.path": "/bin/sh"},
	}})
	if !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("got %v", err)
	}
	checkNothingLeft(t, w, o.Dir)
}
