package pod

import (
	"fmt"
	"math"
	"math/big"
	"runtime"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/guest/protocol"
)

// Size is how big the pods' machines are.
type Size struct {
	VCPUs     int
	MemoryMiB int
}

// Annotations of a pod that choose its size. Whoever may make pods may write them, so that they are
// numbers within bounds, and all others of this prefix are refused: what a pod could say about paths,
// the kernel's parameters or the hypervisor's options would be said to the host.
const (
	annotations      = "io.kuasar."
	annotationVCPUs  = annotations + "hypervisor.vcpus"
	annotationMemory = annotations + "hypervisor.memory_in_mb"
)

// machineSize returns the size of a pod's machine. What the annotations say counts. Without them, a pod
// with a CPU limit has as many CPUs as that and the pod's overhead, which the engine tells apart, need
// together; a memory limit comes on top of the configured memory, which is left to the guest's system. A
// pod without limits has the configured size.
//
// What limits come to is cut at the limit, which the containers' own limits hold within; what annotations
// ask for beyond it is an error that wraps errdefs' InvalidArgument.
func machineSize(base, limit Size, c *cri.PodSandboxConfig) (Size, error) {
	limit = limits(base, limit)
	size := base
	linux := c.GetLinux()
	if r := linux.GetResources(); r.GetCpuQuota() > 0 {
		size.VCPUs = min(ceil(cpus(r), cpus(linux.GetOverhead())), limit.VCPUs)
	}
	if bytes := linux.GetResources().GetMemoryLimitInBytes(); bytes > 0 {
		mib := (bytes-1)>>20 + 1
		size.MemoryMiB = int(min(int64(base.MemoryMiB)+mib, int64(limit.MemoryMiB)))
	}
	for key, value := range c.GetAnnotations() {
		if !strings.HasPrefix(key, annotations) {
			continue
		}
		var err error
		switch key {
		case annotationVCPUs:
			size.VCPUs, err = annotated(key, value, 1, limit.VCPUs, "CPUs")
		case annotationMemory:
			size.MemoryMiB, err = annotated(key, value, protocol.MinMemoryMiB, limit.MemoryMiB, "MiB")
		default:
			err = fmt.Errorf("annotation %q is not known; of %s* there are %s and %s: %w",
				clip(key, 120), annotations, annotationMemory, annotationVCPUs, errdefs.ErrInvalidArgument)
		}
		if err != nil {
			return Size{}, err
		}
	}
	return size, nil
}

// limits fills in what the node has, which is at least what the configuration gives to every pod.
func limits(base, limit Size) Size {
	if limit.VCPUs == 0 {
		limit.VCPUs = runtime.NumCPU()
	}
	if limit.MemoryMiB == 0 {
		limit.MemoryMiB = math.MaxInt32
		var info unix.Sysinfo_t
		if unix.Sysinfo(&info) == nil {
			limit.MemoryMiB = int(min(uint64(info.Totalram)*uint64(info.Unit)>>20, math.MaxInt32))
		}
	}
	return Size{VCPUs: max(base.VCPUs, min(limit.VCPUs, protocol.MaxVCPUs)), MemoryMiB: max(base.MemoryMiB, limit.MemoryMiB)}
}

// annotated reads the value of an annotation.
func annotated(key, value string, least, most int, unit string) (int, error) {
	n, err := strconv.Atoi(value)
	if err != nil || n < least || n > most {
		return 0, fmt.Errorf("annotation %s: %q is not a number of %s from %d to %d, the limit of this node: %w",
			key, clip(value, 40), unit, least, most, errdefs.ErrInvalidArgument)
	}
	return n, nil
}

// usualPeriod is the period of a CPU quota that names none, in microseconds.
const usualPeriod = 100000

// cpus is the CPU limit that r has, as a number of CPUs; 0 if it has none.
func cpus(r *cri.LinuxContainerResources) *big.Rat {
	quota, period := r.GetCpuQuota(), r.GetCpuPeriod()
	if quota <= 0 {
		return new(big.Rat)
	}
	if period <= 0 {
		period = usualPeriod
	}
	return big.NewRat(quota, period)
}

// ceil rounds the sum of two up, to at most what any machine can have.
func ceil(a, b *big.Rat) int {
	sum := new(big.Rat).Add(a, b)
	n, rest := new(big.Int).QuoRem(sum.Num(), sum.Denom(), new(big.Int))
	if !n.IsInt64() || n.Int64() >= protocol.MaxVCPUs {
		return protocol.MaxVCPUs
	}
	if rest.Sign() > 0 {
		return int(n.Int64()) + 1
	}
	return int(n.Int64())
}
