package containers

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"
)

// checkSpec refuses a spec that cannot be run, so that PrepareContainer already says so.
func checkSpec(spec *specs.Spec) error {
	var problem string
	switch {
	case spec.Root == nil || !filepath.IsAbs(spec.Root.Path):
		problem = "root.path must be an absolute path in the guest"
	case spec.Linux == nil:
		problem = "it has no section linux"
	case spec.Linux.Seccomp != nil && spec.Linux.Seccomp.ListenerPath != "":
		problem = "linux.seccomp.listenerPath names a socket of the host, which cannot be reached from a guest"
	case len(spec.Linux.NetDevices) > 0:
		problem = "linux.netDevices cannot be moved: containers share the network of the guest"
	}
	if problem != "" {
		return fmt.Errorf("invalid spec: %s: %w", problem, errdefs.ErrInvalidArgument)
	}
	return checkProcessSpec(spec.Process)
}

func checkProcessSpec(p *specs.Process) error {
	var problem string
	switch {
	case p == nil:
		problem = "there is no process"
	case len(p.Args) == 0 || p.Args[0] == "":
		problem = "process.args is empty"
	case !filepath.IsAbs(p.Cwd):
		problem = fmt.Sprintf("process.cwd %q is not an absolute path", p.Cwd)
	}
	if problem != "" {
		return fmt.Errorf("invalid spec: %s: %w", problem, errdefs.ErrInvalidArgument)
	}
	return nil
}

// guestSpec returns spec as libcontainer is to run it in this guest. What belongs to the host or
// cannot exist here is left out, with a line in the log. The second result are the sysctls of the
// network, which belongs to the pod: they are for the caller to set in the guest. spec itself is
// not changed.
func guestSpec(spec *specs.Spec, cgroupsPath string, log *slog.Logger) (*specs.Spec, map[string]string) {
	guest := *spec
	process := *spec.Process
	linux := *spec.Linux
	guest.Process, guest.Linux = &process, &linux

	if spec.Hooks != nil {
		log.Warn("hooks of the spec are not run: they name programs of the host")
		guest.Hooks = nil
	}
	if process.ApparmorProfile != "" || process.SelinuxLabel != "" || linux.MountLabel != "" {
		log.Info("the guest kernel has no security module: profile and labels are not applied",
			"apparmor", process.ApparmorProfile, "selinux", process.SelinuxLabel)
		process.ApparmorProfile, process.SelinuxLabel, linux.MountLabel = "", "", ""
	}
	linux.IntelRdt = nil
	linux.CgroupsPath = cgroupsPath

	// Containers share the guest's network namespace, which is the pod's.
	linux.Namespaces = slices.DeleteFunc(slices.Clone(linux.Namespaces), func(ns specs.LinuxNamespace) bool {
		return ns.Type == specs.NetworkNamespace
	})
	var pod map[string]string
	linux.Sysctl = maps.Clone(linux.Sysctl)
	for key, value := range linux.Sysctl {
		if strings.HasPrefix(key, "net.") || strings.HasPrefix(key, "net/") {
			if pod == nil {
				pod = map[string]string{}
			}
			pod[key] = value
			delete(linux.Sysctl, key)
		}
	}
	// The name of a joined namespace is the pod's and not this container's to change.
	uts := slices.IndexFunc(linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.UTSNamespace })
	if uts < 0 || linux.Namespaces[uts].Path != "" {
		guest.Hostname, guest.Domainname = "", ""
	}

	// Without a value the container would inherit that of the agent, which the OOM killer spares.
	adj := 0
	if process.OOMScoreAdj != nil {
		adj = max(-1000, min(1000, *process.OOMScoreAdj))
	}
	process.OOMScoreAdj = &adj

	if linux.Resources != nil {
		linux.Resources = guestResources(linux.Resources, log)
	}
	return &guest, pod
}

// guestResources leaves out the limits that name hardware of the host or that this kernel lacks.
// r itself is not changed.
func guestResources(r *specs.LinuxResources, log *slog.Logger) *specs.LinuxResources {
	guest := *r
	if b := r.BlockIO; b != nil {
		log.Info("limits of block I/O are not applied: they name disks of the host")
		guest.BlockIO = nil
	}
	if r.Network != nil {
		log.Info("network class and priorities are not applied in the guest")
		guest.Network = nil
	}
	guest.Rdma = nil
	if len(r.HugepageLimits) > 0 {
		sizes := hugepageSizes()
		guest.HugepageLimits = slices.DeleteFunc(slices.Clone(r.HugepageLimits), func(l specs.LinuxHugepageLimit) bool {
			absent := !slices.Contains(sizes, l.Pagesize)
			if absent && l.Limit != 0 {
				log.Warn("limit of huge pages is not applied: the guest has none of this size", "size", l.Pagesize)
			}
			return absent
		})
	}
	return &guest
}

// hugepageSizes lists the sizes of huge pages that can be limited here, such as "2MB".
func hugepageSizes() []string {
	if cgroups.IsCgroup2UnifiedMode() {
		b, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
		if err != nil || !slices.Contains(strings.Fields(string(b)), "hugetlb") {
			return nil
		}
	} else if _, err := os.Stat("/sys/fs/cgroup/hugetlb"); err != nil {
		return nil
	}
	return cgroups.HugePageSizes()
}

// libcontainerConfig converts a spec that guestSpec made.
func libcontainerConfig(id string, spec *specs.Spec) (*configs.Config, error) {
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{CgroupName: id, Spec: spec})
	if err != nil {
		return nil, fmt.Errorf("invalid spec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return config, nil
}

// setPodSysctls writes sysctls in the guest's own namespaces.
func setPodSysctls(sysctls map[string]string) error {
	for key, value := range sysctls {
		path, err := sysctlPath(key)
		if err == nil {
			err = os.WriteFile(path, []byte(value), 0o644)
		}
		if err != nil {
			return fmt.Errorf("cannot set sysctl %s to %q: %w", key, value, err)
		}
	}
	return nil
}

// sysctlPath finds the file of a sysctl, whose name is separated by dots or by slashes as in
// sysctl(8): the first separator tells which; the other one then stands for itself.
func sysctlPath(key string) (string, error) {
	name := key
	if i := strings.IndexAny(key, "./"); i >= 0 && key[i] == '.' {
		name = strings.Map(func(r rune) rune {
			switch r {
			case '.':
				return '/'
			case '/':
				return '.'
			}
			return r
		}, key)
	}
	if !filepath.IsLocal(name) || filepath.Clean(name) != name {
		return "", fmt.Errorf("%q is not the name of a sysctl: %w", key, errdefs.ErrInvalidArgument)
	}
	return filepath.Join("/proc/sys", name), nil
}

var rlimits = map[string]int{
	"RLIMIT_AS":         unix.RLIMIT_AS,
	"RLIMIT_CORE":       unix.RLIMIT_CORE,
	"RLIMIT_CPU":        unix.RLIMIT_CPU,
	"RLIMIT_DATA":       unix.RLIMIT_DATA,
	"RLIMIT_FSIZE":      unix.RLIMIT_FSIZE,
	"RLIMIT_LOCKS":      unix.RLIMIT_LOCKS,
	"RLIMIT_MEMLOCK":    unix.RLIMIT_MEMLOCK,
	"RLIMIT_MSGQUEUE":   unix.RLIMIT_MSGQUEUE,
	"RLIMIT_NICE":       unix.RLIMIT_NICE,
	"RLIMIT_NOFILE":     unix.RLIMIT_NOFILE,
	"RLIMIT_NPROC":      unix.RLIMIT_NPROC,
	"RLIMIT_RSS":        unix.RLIMIT_RSS,
	"RLIMIT_RTPRIO":     unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME":     unix.RLIMIT_RTTIME,
	"RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
	"RLIMIT_STACK":      unix.RLIMIT_STACK,
}

// libcontainerProcess converts the process of a spec or of an exec. Its stdio is left open.
func libcontainerProcess(p *specs.Process) (*libcontainer.Process, error) {
	noNewPrivileges := p.NoNewPrivileges
	lp := &libcontainer.Process{
		Args:            p.Args,
		Env:             p.Env,
		UID:             int(p.User.UID),
		GID:             int(p.User.GID),
		Cwd:             p.Cwd,
		NoNewPrivileges: &noNewPrivileges,
		Scheduler:       p.Scheduler,
		IOPriority:      p.IOPriority,
	}
	for _, gid := range p.User.AdditionalGids {
		lp.AdditionalGroups = append(lp.AdditionalGroups, int(gid))
	}
	if c := p.Capabilities; c != nil {
		lp.Capabilities = &configs.Capabilities{
			Bounding:    c.Bounding,
			Effective:   c.Effective,
			Inheritable: c.Inheritable,
			Permitted:   c.Permitted,
			Ambient:     c.Ambient,
		}
	}
	for _, r := range p.Rlimits {
		kind, known := rlimits[r.Type]
		if !known {
			return nil, fmt.Errorf("invalid spec: %q is not a resource limit: %w", r.Type, errdefs.ErrInvalidArgument)
		}
		lp.Rlimits = append(lp.Rlimits, configs.Rlimit{Type: kind, Hard: r.Hard, Soft: r.Soft})
	}
	if s := p.ConsoleSize; s != nil {
		lp.ConsoleWidth, lp.ConsoleHeight = uint16(min(s.Width, 0xffff)), uint16(min(s.Height, 0xffff))
	}
	affinity, err := configs.ConvertCPUAffinity(p.ExecCPUAffinity)
	if err != nil {
		return nil, fmt.Errorf("invalid spec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	lp.CPUAffinity = affinity
	return lp, nil
}

// decodeProcess reads the process of an Exec request.
func decodeProcess(spec *anypb.Any) (*specs.Process, error) {
	p := new(specs.Process)
	if err := json.Unmarshal(spec.GetValue(), p); err != nil {
		return nil, fmt.Errorf("its spec is not a process of an OCI runtime spec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if err := checkProcessSpec(p); err != nil {
		return nil, err
	}
	return p, nil
}

// decodeResources reads the resources of an Update request.
func decodeResources(value []byte) (*specs.LinuxResources, error) {
	if len(value) == 0 {
		return nil, fmt.Errorf("the request names no resources: %w", errdefs.ErrInvalidArgument)
	}
	r := new(specs.LinuxResources)
	if err := json.Unmarshal(value, r); err != nil {
		return nil, fmt.Errorf("the resources are not those of an OCI runtime spec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return r, nil
}

// mergeResources returns old with every limit that change names. Neither is changed.
func mergeResources(old, change *specs.LinuxResources) *specs.LinuxResources {
	merged := specs.LinuxResources{}
	if old != nil {
		merged = *old
	}
	if m := change.Memory; m != nil {
		memory := specs.LinuxMemory{}
		if merged.Memory != nil {
			memory = *merged.Memory
		}
		override(&memory.Limit, m.Limit)
		override(&memory.Reservation, m.Reservation)
		override(&memory.Swap, m.Swap)
		override(&memory.Swappiness, m.Swappiness)
		override(&memory.DisableOOMKiller, m.DisableOOMKiller)
		override(&memory.CheckBeforeUpdate, m.CheckBeforeUpdate)
		if m.Limit != nil && *m.Limit == -1 && m.Swap == nil {
			// No limit of memory cannot stand beside one of memory and swap together.
			memory.Swap = m.Limit
		}
		merged.Memory = &memory
	}
	if c := change.CPU; c != nil {
		cpu := specs.LinuxCPU{}
		if merged.CPU != nil {
			cpu = *merged.CPU
		}
		override(&cpu.Shares, c.Shares)
		override(&cpu.Quota, c.Quota)
		override(&cpu.Burst, c.Burst)
		override(&cpu.Period, c.Period)
		override(&cpu.RealtimeRuntime, c.RealtimeRuntime)
		override(&cpu.RealtimePeriod, c.RealtimePeriod)
		override(&cpu.Idle, c.Idle)
		if c.Cpus != "" {
			cpu.Cpus = c.Cpus
		}
		if c.Mems != "" {
			cpu.Mems = c.Mems
		}
		merged.CPU = &cpu
	}
	if change.Pids != nil && change.Pids.Limit != nil {
		merged.Pids = change.Pids
	}
	for _, limit := range change.HugepageLimits {
		limits := slices.DeleteFunc(slices.Clone(merged.HugepageLimits), func(l specs.LinuxHugepageLimit) bool {
			return l.Pagesize == limit.Pagesize
		})
		merged.HugepageLimits = append(limits, limit)
	}
	if len(change.Unified) > 0 {
		unified := maps.Clone(merged.Unified)
		if unified == nil {
			unified = map[string]string{}
		}
		maps.Copy(unified, change.Unified)
		merged.Unified = unified
	}
	return &merged
}

func override[T any](field **T, value *T) {
	if value != nil {
		*field = value
	}
}

// cgroupResources converts resources for a running container, whose rules for devices stay.
func cgroupResources(id string, r *specs.LinuxResources, current *cgroups.Resources) (*cgroups.Resources, error) {
	withoutDevices := *r
	withoutDevices.Devices = nil
	spec := &specs.Spec{Linux: &specs.Linux{Resources: &withoutDevices}}
	cgroup, err := specconv.CreateCgroupConfig(&specconv.CreateOpts{CgroupName: id, Spec: spec}, nil)
	if err != nil {
		return nil, fmt.Errorf("invalid resources: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	cgroup.Resources.Devices = current.Devices
	return cgroup.Resources, nil
}

// startError is the error of a process that could not be started, for the person who reads it in
// the pod's events: what libcontainer wraps around the cause is left out.
func startError(args0, id string, err error) error {
	var path *os.PathError
	if errors.As(err, &path) {
		return fmt.Errorf("cannot start %q in container %s: %w", args0, id, err)
	}
	text := err.Error()
	for _, wrap := range []string{
		"unable to start container process: ",
		"error during container init: ",
		"error executing setns process: ",
		fmt.Sprintf("exec: %q: ", args0),
		"exec: ",
	} {
		text = strings.TrimPrefix(text, wrap)
	}
	return &processStartError{text: fmt.Sprintf("cannot start %q in container %s: %s", args0, id, text), cause: err}
}

type processStartError struct {
	text  string
	cause error
}

func (e *processStartError) Error() string { return e.text }
func (e *processStartError) Unwrap() error { return e.cause }
