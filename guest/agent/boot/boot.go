// Package boot makes a usable system out of the bare kernel that starts PID 1: file systems, the
// root, control groups, settings, the share with the host.
package boot

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/agent/cmdline"
	"kuasar.io/kuasar/guest/protocol"
)

// Environment is what every process of the guest inherits.
var Environment = []string{"PATH=/bin:/sbin:/usr/bin:/usr/sbin", "XDG_RUNTIME_DIR=/run", "HOME=/root"}

// mount is one file system.
type mount struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

var mounts = []mount{
	{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
	{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,ptmxmode=0666,gid=5"},
	{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
	{"tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
}

// Mount moves the root and mounts what every Linux system has. Nothing was mounted before; what
// the kernel or an image mounted already stays. Afterwards /dev/console is the standard output.
func Mount() error {
	os.Clearenv()
	for _, entry := range Environment {
		name, value, _ := strings.Cut(entry, "=")
		os.Setenv(name, value)
	}
	unix.Umask(0o022)
	if err := moveRoot(); err != nil {
		return err
	}
	for _, m := range mounts {
		if err := m.do(); err != nil {
			return err
		}
	}
	return openConsole()
}

func (m mount) do() error {
	if err := os.MkdirAll(m.target, 0o755); err != nil && !errors.Is(err, unix.EROFS) {
		return fmt.Errorf("cannot mount %s: %w", m.target, err)
	}
	err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data)
	if err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("cannot mount %s on %s: %w", m.fstype, m.target, err)
	}
	return nil
}

// moveRoot makes the root a mount of its own. The initramfs that the kernel unpacks is the root
// of the mount tree itself, which pivot_root(2), and with it every OCI runtime, refuses to leave.
// A bind mount of it moved over it is not, and costs no copy.
func moveRoot() error {
	var fs unix.Statfs_t
	if err := unix.Statfs("/", &fs); err != nil {
		return fmt.Errorf("cannot look at the root file system: %w", err)
	}
	if fs.Type != unix.TMPFS_MAGIC && fs.Type != unix.RAMFS_MAGIC {
		return nil // an image
	}
	const stage = "/newroot"
	steps := []func() error{
		func() error { return os.MkdirAll(stage, 0o755) },
		func() error { return unix.Mount("/", stage, "", unix.MS_BIND, "") },
		func() error { return unix.Chdir(stage) },
		func() error { return unix.Mount(".", "/", "", unix.MS_MOVE, "") },
		func() error { return unix.Chroot(".") },
		func() error { return unix.Chdir("/") },
		func() error { return os.Remove(stage) },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("cannot move the root file system, so that containers can leave it: %w", err)
		}
	}
	return nil
}

// openConsole makes /dev/console the standard streams: the one that the kernel opened may have
// been the initramfs' own, or none.
func openConsole() error {
	fd, err := unix.Open("/dev/console", unix.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return fmt.Errorf("cannot open /dev/console: %w", err)
	}
	for std := range 3 {
		if err := unix.Dup3(fd, std, 0); err != nil && fd != std {
			return fmt.Errorf("cannot open /dev/console: %w", err)
		}
	}
	if fd > 2 {
		unix.Close(fd)
	}
	return nil
}

// setting is a file under /proc/sys.
type setting struct{ path, value string }

var settings = []setting{
	// A guest has no swap and must not refuse what a container's limit allows.
	{"vm/overcommit_memory", "1"},
	// Connections to a service's end point that is gone end at once, as Kubernetes expects.
	{"net/ipv4/vs/expire_nodest_conn", "1"},
	// A crash of PID 1 must end the machine, not stop it: the host waits for its end.
	{"kernel/panic", "-1"},
}

// Configure sets the kernel up for containers: settings, limits, control groups. Warnings are about
// what containers can do without.
func Configure(p cmdline.Parameters) (warnings []string, err error) {
	for _, s := range settings {
		if err := os.WriteFile("/proc/sys/"+s.path, []byte(s.value), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("cannot set %s to %s: %w", s.path, s.value, err)
		}
	}
	// Containers inherit the limits that their specs do not name. They get what a service manager
	// gives to a container engine; their bounds are their control groups.
	limits := map[int]unix.Rlimit{
		unix.RLIMIT_NOFILE: {Cur: 1 << 20, Max: 1 << 20},
		unix.RLIMIT_NPROC:  {Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY},
	}
	for resource, limit := range limits {
		if err := unix.Setrlimit(resource, &limit); err != nil {
			return nil, fmt.Errorf("cannot raise resource limit %d: %w", resource, err)
		}
	}
	if p.Cgroup == cmdline.CgroupV1 {
		return nil, mountCgroupV1()
	}
	return mountCgroupV2()
}

const cgroupRoot = "/sys/fs/cgroup"

func mountCgroupV2() (warnings []string, err error) {
	m := mount{"cgroup2", cgroupRoot, "cgroup2", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "nsdelegate,favordynmods"}
	// favordynmods saves a grace period whenever a process enters a control group, a sixth of a
	// container's creation; it came with Linux 6.0.
	err = m.do()
	if errors.Is(err, unix.EINVAL) {
		m.data = "nsdelegate"
		err = m.do()
	}
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(cgroupRoot + "/cgroup.controllers")
	if err != nil {
		return nil, fmt.Errorf("cannot read the control group controllers: %w", err)
	}
	for _, controller := range strings.Fields(string(b)) {
		// One by one, so that one that cannot be delegated does not take the others along.
		if err := os.WriteFile(cgroupRoot+"/cgroup.subtree_control", []byte("+"+controller), 0); err != nil {
			warnings = append(warnings, fmt.Sprintf("cannot enable control group controller %s: %v", controller, err))
		}
	}
	return warnings, nil
}

func mountCgroupV1() error {
	root := mount{"tmpfs", cgroupRoot, "tmpfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "mode=0755"}
	if err := root.do(); err != nil {
		return err
	}
	b, err := os.ReadFile("/proc/cgroups")
	if err != nil {
		return fmt.Errorf("cannot read the control group controllers: %w", err)
	}
	for _, hierarchy := range hierarchies(string(b)) {
		dir := cgroupRoot + "/" + hierarchy
		m := mount{"cgroup", dir, "cgroup", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, hierarchy}
		if err := m.do(); err != nil {
			return err
		}
		if strings.Contains(hierarchy, ",") {
			for name := range strings.SplitSeq(hierarchy, ",") {
				if err := os.Symlink(hierarchy, cgroupRoot+"/"+name); err != nil && !errors.Is(err, os.ErrExist) {
					return fmt.Errorf("cannot link control group controller %s: %w", name, err)
				}
			}
		}
	}
	// Only possible before there are groups, and absent where it is the only way.
	err = os.WriteFile(cgroupRoot+"/memory/memory.use_hierarchy", []byte("1"), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot make the memory controller hierarchical: %w", err)
	}
	return nil
}

// hierarchies arranges the enabled controllers of /proc/cgroups as distributions do.
func hierarchies(procCgroups string) []string {
	joined := map[string]string{"cpu": "cpu,cpuacct", "cpuacct": "cpu,cpuacct", "net_cls": "net_cls,net_prio", "net_prio": "net_cls,net_prio"}
	enabled := map[string]bool{}
	var order []string
	for line := range strings.SplitSeq(procCgroups, "\n") {
		f := strings.Fields(line)
		if len(f) == 4 && !strings.HasPrefix(f[0], "#") && f[3] == "1" {
			enabled[f[0]] = true
			order = append(order, f[0])
		}
	}
	var all []string
	done := map[string]bool{}
	for _, name := range order {
		hierarchy := name
		if pair := joined[name]; pair != "" {
			a, b, _ := strings.Cut(pair, ",")
			if enabled[a] && enabled[b] {
				hierarchy = pair
			}
		}
		if !done[hierarchy] {
			done[hierarchy] = true
			all = append(all, hierarchy)
		}
	}
	return all
}

// Share mounts the file system that the host shares with the guest. It prefers the given type and
// takes the other one if the host offers only that, as a host without a virtiofs daemon does.
func Share(fstype string) error {
	if err := os.MkdirAll(protocol.SharePath, 0o755); err != nil {
		return fmt.Errorf("cannot mount the share: %w", err)
	}
	kinds := []mount{
		{
			protocol.ShareTag, protocol.SharePath, "9p", unix.MS_NODEV,
			// cache=mmap keeps nothing that the host may change, yet lets containers map files
			// shared and writable, which cache=none refuses. A msize of 128 KiB was as quick as
			// larger ones, and takes less of the guest's contiguous memory per request.
			"trans=virtio,version=9p2000.L,msize=131072,cache=mmap",
		},
		// What is cached is up to the daemon on the host.
		{protocol.ShareTag, protocol.SharePath, "virtiofs", unix.MS_NODEV | unix.MS_RELATIME, ""},
	}
	if fstype == cmdline.Virtiofs {
		kinds[0], kinds[1] = kinds[1], kinds[0]
	}
	var failed []error
	for _, m := range kinds {
		err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data)
		if err == nil {
			return nil
		}
		failed = append(failed, err)
	}
	return fmt.Errorf("cannot mount the share %q: as %s: %w; as %s: %w",
		protocol.ShareTag, kinds[0].fstype, failed[0], kinds[1].fstype, failed[1])
}
