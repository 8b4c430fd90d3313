package container

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"kuasar.io/kuasar/guest/protocol"
)

// rewriter turns the OCI spec that a container engine wrote for the host into one for the guest.
// No path of the host and no device number of the host may be left in it. What the guest cannot
// give is refused with a message for the pod's author; what only concerns the host is dropped.
type rewriter struct {
	id        string
	sharedPID bool
	terminal  bool
	announced bool // by iSulad, whose ways to configure containers are not containerd's
	log       *slog.Logger
	volume    func(source string, readOnly bool) (guestPath string, err error)
}

// guestFileSystems are the mount types that the guest's kernel provides by itself.
var guestFileSystems = []string{"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"}

// podFiles are made by the guest from the pod's configuration; specs that mount something else
// there win.
var podFiles = []struct{ destination, source string }{
	{"/etc/hosts", protocol.HostsPath},
	{"/etc/hostname", protocol.HostnamePath},
	{"/etc/resolv.conf", protocol.ResolvConfPath},
}

// keptAnnotations are those that say who a container is. All others are for programs of the
// host, and some of them carry its paths.
var keptAnnotations = []string{
	"io.kubernetes.cri.container-type", "io.kubernetes.cri.container-name", "io.kubernetes.cri.sandbox-id",
	"io.kubernetes.cri.sandbox-name", "io.kubernetes.cri.sandbox-namespace", "io.kubernetes.cri.sandbox-uid",
	"io.kubernetes.cri.image-name",
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errdefs.ErrNotImplemented)
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

func isBind(m *specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

// check refuses what cannot be run. It changes nothing.
func (w *rewriter) check(spec *specs.Spec) error {
	if spec.Process == nil {
		return invalid("the spec has no process")
	}
	if err := checkProcess(spec.Process); err != nil {
		return err
	}
	if spec.Root == nil {
		return invalid("the spec has no root")
	}
	linux := spec.Linux
	if linux == nil {
		return invalid("the spec has no linux section")
	}
	for _, ns := range linux.Namespaces {
		switch ns.Type {
		case specs.UserNamespace:
			return unsupported("user namespaces (hostUsers: false) are not supported in a virtual machine's pod")
		case specs.PIDNamespace:
			if target := pidOf(ns.Path); target >= firstPID {
				return unsupported("joining the processes of another container (process %d) is not supported", target)
			}
		case specs.NetworkNamespace, specs.CgroupNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.MountNamespace, specs.TimeNamespace:
		default:
			return unsupported("namespaces of type %q are not supported", ns.Type)
		}
	}
	if len(linux.UIDMappings) > 0 || len(linux.GIDMappings) > 0 {
		return unsupported("user namespace mappings are not supported in a virtual machine's pod")
	}
	if len(linux.NetDevices) > 0 {
		return unsupported("moving network devices of the host into a container is not supported")
	}
	for _, d := range linux.Devices {
		if !standardDevice(d) {
			instead := "for privileged containers set privileged_without_host_devices = true for this runtime"
			if w.announced {
				instead = "iSulad gives privileged containers all devices of the host: run this one unprivileged"
			}
			return unsupported("device %s (%s %d:%d) of the host cannot be given to a container in a virtual machine; %s",
				d.Path, d.Type, d.Major, d.Minor, instead)
		}
	}
	if linux.Seccomp != nil && linux.Seccomp.ListenerPath != "" {
		return unsupported("a seccomp notification listener of the host is out of reach of a virtual machine")
	}
	for i := range spec.Mounts {
		if err := checkMount(&spec.Mounts[i]); err != nil {
			return err
		}
	}
	return nil
}

func checkMount(m *specs.Mount) error {
	if !path.IsAbs(m.Destination) {
		return invalid("mount destination %q is not an absolute path", m.Destination)
	}
	if len(m.UIDMappings) > 0 || len(m.GIDMappings) > 0 || slices.Contains(m.Options, "idmap") || slices.Contains(m.Options, "ridmap") {
		return unsupported("mount %s: id-mapped mounts are not supported", m.Destination)
	}
	if slices.Contains(m.Options, "shared") || slices.Contains(m.Options, "rshared") {
		return unsupported("mount %s: bidirectional mount propagation out of a virtual machine is not supported", m.Destination)
	}
	switch {
	case isBind(m):
		if !path.IsAbs(m.Source) {
			return invalid("mount %s: source %q is not an absolute path", m.Destination, m.Source)
		}
	case !slices.Contains(guestFileSystems, m.Type):
		return unsupported("mount %s: file systems of type %q cannot be mounted in a virtual machine", m.Destination, m.Type)
	}
	return nil
}

// procPath matches the namespace paths that engines write.
var procPath = regexp.MustCompile(`^/proc/([0-9]+)/ns/[a-z]+$`)

// pidOf returns the process of a namespace path, -1 for another path, 0 for none.
func pidOf(p string) int {
	if p == "" {
		return 0
	}
	match := procPath.FindStringSubmatch(p)
	if match == nil {
		return -1
	}
	pid, err := strconv.Atoi(match[1])
	if err != nil {
		return -1
	}
	return pid
}

// standardDevice tells the devices that every container has, which have the same numbers
// everywhere.
func standardDevice(d specs.LinuxDevice) bool {
	standard := []struct {
		path         string
		major, minor int64
	}{
		{"/dev/null", 1, 3}, {"/dev/zero", 1, 5}, {"/dev/full", 1, 7}, {"/dev/random", 1, 8}, {"/dev/urandom", 1, 9},
		{"/dev/tty", 5, 0}, {"/dev/ptmx", 5, 2}, {"/dev/pts/ptmx", 5, 2},
	}
	for _, s := range standard {
		if d.Path == s.path && d.Type == "c" && d.Major == s.major && d.Minor == s.minor {
			return true
		}
	}
	return false
}

// rewrite changes a checked spec. It makes the volumes.
func (w *rewriter) rewrite(spec *specs.Spec, rootfs string) error {
	spec.Root.Path = rootfs
	// The pod's names are set once, in its UTS namespace.
	spec.Hostname, spec.Domainname = "", ""
	//lint:ignore SA1019 engines still write Prestart
	if h := spec.Hooks; h != nil && len(h.Prestart)+len(h.CreateRuntime)+len(h.CreateContainer)+len(h.StartContainer)+len(h.Poststart)+len(h.Poststop) > 0 {
		w.log.Warn("hooks are programs of the host and are not run for a container in a virtual machine")
	}
	spec.Hooks = nil
	w.umask(spec)
	spec.Solaris, spec.Windows, spec.VM, spec.ZOS, spec.FreeBSD = nil, nil, nil, nil, nil
	annotations := map[string]string{}
	for _, key := range keptAnnotations {
		if value, ok := spec.Annotations[key]; ok && !strings.HasPrefix(value, "/") {
			annotations[key] = value
		}
	}
	spec.Annotations = annotations
	cleanProcess(spec.Process, w.terminal)

	linux := spec.Linux
	linux.Namespaces = w.namespaces(linux.Namespaces)
	linux.CgroupsPath = "/kuasar/" + w.id
	linux.MountLabel = ""
	linux.IntelRdt = nil
	linux.MemoryPolicy = nil
	if linux.RootfsPropagation != "" {
		// Nothing outside of the container can see its mounts either way.
		linux.RootfsPropagation = "rprivate"
	}
	cleanResources(linux.Resources)
	return w.mounts(spec)
}

// umaskAnnotation is iSulad's way to set the umask of a container's first process.
const umaskAnnotation = "native.umask"

// umask honours it, unless the spec says the same in OCI's own way.
func (w *rewriter) umask(spec *specs.Spec) {
	values := map[string]uint32{"secure": 0o027, "normal": 0o022}
	if value, ok := values[spec.Annotations[umaskAnnotation]]; ok && spec.Process.User.Umask == nil {
		spec.Process.User.Umask = &value
	}
}

// namespaces gives a container those of its pod, and its own of the rest. It shares the network
// of the whole guest. The cgroup namespace is always its own, whatever the host's engine asked for
// its own version of cgroups: only so does /sys/fs/cgroup show the container's limits.
func (w *rewriter) namespaces(asked []specs.LinuxNamespace) []specs.LinuxNamespace {
	result := []specs.LinuxNamespace{
		{Type: specs.MountNamespace},
		{Type: specs.CgroupNamespace},
		{Type: specs.IPCNamespace, Path: protocol.NamespaceDir + "/ipc"},
		{Type: specs.UTSNamespace, Path: protocol.NamespaceDir + "/uts"},
	}
	pid := specs.LinuxNamespace{Type: specs.PIDNamespace}
	joins := true // no entry means the host's, which is the pod's here
	for _, ns := range asked {
		switch ns.Type {
		case specs.PIDNamespace:
			joins = ns.Path != ""
		case specs.TimeNamespace:
			result = append(result, specs.LinuxNamespace{Type: ns.Type})
		}
	}
	if joins && w.sharedPID {
		pid.Path = protocol.NamespaceDir + "/pid"
	} else if joins {
		w.log.Warn("the container gets a process namespace of its own, because its pod does not share one")
	}
	return append(result, pid)
}

func (w *rewriter) mounts(spec *specs.Spec) error {
	var mounts []specs.Mount
	taken := map[string]bool{}
	for _, m := range spec.Mounts {
		destination := path.Clean(m.Destination)
		taken[destination] = true
		switch {
		case destination == "/dev/shm" && isPodShm(&m):
			m.Type = "bind"
			m.Source = protocol.ShmPath
			m.Options = append(onlyOptions(m.Options, "ro", "rw", "nosuid", "nodev", "noexec"), "rbind", "rprivate")
		case isBind(&m):
			readOnly := slices.Contains(m.Options, "ro")
			source, err := w.volume(m.Source, readOnly)
			if err != nil {
				return fmt.Errorf("mount %s: %w", m.Destination, err)
			}
			m.Type = "bind"
			m.Source = source
			m.Options = withoutLabels(m.Options)
		default:
			m.Source = m.Type
			m.Options = withoutLabels(m.Options)
		}
		mounts = append(mounts, m)
	}
	for _, f := range podFiles {
		if taken[f.destination] {
			continue
		}
		access := "rw"
		if spec.Root.Readonly {
			access = "ro"
		}
		mounts = append(mounts, specs.Mount{
			Destination: f.destination, Type: "bind", Source: f.source, Options: []string{"rbind", "rprivate", access},
		})
	}
	if !taken["/dev/shm"] {
		mounts = append(mounts, specs.Mount{
			Destination: "/dev/shm", Type: "bind", Source: protocol.ShmPath, Options: []string{"nosuid", "nodev", "noexec", "rbind", "rprivate"},
		})
	}
	spec.Mounts = mounts
	return nil
}

// isPodShm tells an engine's own /dev/shm, private or the sandbox's, from a volume that the pod's
// author has put there.
func isPodShm(m *specs.Mount) bool {
	return !isBind(m) || path.Base(path.Clean(m.Source)) == "shm"
}

func onlyOptions(options []string, allowed ...string) []string {
	return slices.DeleteFunc(slices.Clone(options), func(o string) bool { return !slices.Contains(allowed, o) })
}

// withoutLabels drops the SELinux labels of the host.
func withoutLabels(options []string) []string {
	return slices.DeleteFunc(slices.Clone(options), func(o string) bool {
		key, _, _ := strings.Cut(o, "=")
		return key == "context" || key == "fscontext" || key == "defcontext" || key == "rootcontext" || o == "z" || o == "Z"
	})
}

func checkProcess(p *specs.Process) error {
	if len(p.Args) == 0 {
		return invalid("the process has no args")
	}
	if p.Cwd != "" && !path.IsAbs(p.Cwd) {
		return invalid("the process's cwd %q is not an absolute path", p.Cwd)
	}
	return nil
}

// cleanProcess drops what refers to the security modules and processors of the host.
func cleanProcess(p *specs.Process, terminal bool) {
	p.Terminal = terminal
	p.ApparmorProfile = ""
	p.SelinuxLabel = ""
	p.ExecCPUAffinity = nil
	if p.Cwd == "" {
		p.Cwd = "/"
	}
}

// rewriteProcess does for the process of an exec what rewrite does for a container's.
func rewriteProcess(text []byte, terminal bool) ([]byte, error) {
	const maxProcess = 1 << 20
	if len(text) > maxProcess {
		return nil, invalid("spec: the process spec has %d bytes, more than %d", len(text), maxProcess)
	}
	p := &specs.Process{}
	if err := json.Unmarshal(text, p); err != nil {
		return nil, invalid("spec: cannot decode the process spec: %v", err)
	}
	if err := checkProcess(p); err != nil {
		return nil, fmt.Errorf("spec: %w", err)
	}
	cleanProcess(p, terminal)
	return json.Marshal(p)
}

// rewriteResources does it for the resources of an update.
func rewriteResources(text []byte) ([]byte, error) {
	const maxResources = 1 << 20
	if len(text) > maxResources {
		return nil, invalid("resources: %d bytes are more than %d", len(text), maxResources)
	}
	r := &specs.LinuxResources{}
	if err := json.Unmarshal(text, r); err != nil {
		return nil, invalid("resources: cannot decode them: %v", err)
	}
	cleanResources(r)
	return json.Marshal(r)
}

// cleanResources drops limits that name parts of the host: its processors, memory nodes, devices,
// network classes and huge pages, none of which the guest has.
func cleanResources(r *specs.LinuxResources) {
	if r == nil {
		return
	}
	if r.CPU != nil {
		r.CPU.Cpus, r.CPU.Mems = "", ""
	}
	if b := r.BlockIO; b != nil {
		b.WeightDevice = nil
		b.ThrottleReadBpsDevice, b.ThrottleWriteBpsDevice = nil, nil
		b.ThrottleReadIOPSDevice, b.ThrottleWriteIOPSDevice = nil, nil
	}
	r.Network = nil
	r.HugepageLimits = nil
	r.Rdma = nil
	for key := range r.Unified {
		for _, prefix := range []string{"cpuset.", "io.", "hugetlb.", "rdma.", "misc."} {
			if strings.HasPrefix(key, prefix) {
				delete(r.Unified, key)
			}
		}
	}
	r.Devices = slices.DeleteFunc(r.Devices, func(d specs.LinuxDeviceCgroup) bool {
		if d.Major == nil || *d.Major < 0 {
			return false // a rule for all devices
		}
		switch {
		case d.Type != "c":
			return true
		case *d.Major == 136: // terminals
			return false
		case d.Minor == nil:
			return true
		}
		mem := *d.Major == 1 && slices.Contains([]int64{3, 5, 7, 8, 9}, *d.Minor)
		tty := *d.Major == 5 && (*d.Minor == 0 || *d.Minor == 1 || *d.Minor == 2)
		return !mem && !tty
	})
}
