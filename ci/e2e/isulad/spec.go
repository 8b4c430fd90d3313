package isulad

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// SpecConfig says what Spec writes.
type SpecConfig struct {
	Container, Pod string // ids
	// Name is the container's, Metadata the pod's; both may be empty.
	Name     string
	Metadata *runtimeapi.PodSandboxMetadata
	PodPID   uint32 // what Start answered
	RootFS   string
	Args     []string
	Env      []string // added to iSulad's own
	Terminal bool
	// Folder is iSulad's of the pod, with hostname, hosts, resolv.conf and mounts/shm;
	// /var/lib/isulad/sandbox/<pod> if empty.
	Folder    string
	SharedPID bool
	// Mounts are binds besides those that every container gets: the place in the container, and the
	// source on the host.
	Mounts map[string]string
	// LogFile is the container's log on the host; empty for none. It is rotated when it has LogSize, in
	// iSulad's spelling such as 30KB, and LogFiles are kept. These two are left out if they are zero.
	LogFile  string
	LogSize  string
	LogFiles int
	// MemoryLimit is in bytes; 0 is none, which iSulad writes as -1.
	MemoryLimit int64
	// Edit, if set, is called with the whole spec before it is written.
	Edit func(map[string]any)
}

// templateCapabilities are those of iSulad's template.
var templateCapabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// Spec returns an OCI spec as iSulad writes them for a container of a pod: namespaces, files, cgroup,
// hooks and profiles are those of the host, and what is zero or false is left out.
func Spec(c SpecConfig) ([]byte, error) {
	type object = map[string]any
	namespace := func(kind, name string) object {
		return object{"type": kind, "path": fmt.Sprintf("/proc/%d/ns/%s", c.PodPID, name)}
	}
	folder := c.Folder
	if folder == "" {
		folder = filepath.Join("/var/lib/isulad/sandbox", c.Pod)
	}
	mount := func(to, kind, from string, options ...string) object {
		return object{"destination": to, "type": kind, "source": from, "options": options}
	}
	bind := func(to, from string, more ...string) object {
		return mount(to, "bind", from, append([]string{"rbind", "rprivate"}, more...)...)
	}
	mounts := []object{
		mount("/proc", "proc", "proc", "nosuid", "noexec", "nodev"),
		mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
		mount("/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
		mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
		mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro"),
		mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro"),
		bind("/dev/shm", filepath.Join(folder, "mounts/shm"), "size=65536k"),
		bind("/etc/hostname", filepath.Join(folder, "hostname")),
		bind("/etc/hosts", filepath.Join(folder, "hosts")),
		bind("/etc/resolv.conf", filepath.Join(folder, "resolv.conf")),
	}
	for _, to := range slices.Sorted(maps.Keys(c.Mounts)) {
		m := bind(to, c.Mounts[to])
		m["named"] = false // a key of iSulad's own
		mounts = append(mounts, m)
	}
	slices.SortStableFunc(mounts, func(a, b object) int {
		return strings.Compare(a["destination"].(string), b["destination"].(string))
	})
	rules := []object{{"access": "rwm"}} // none but these
	for _, number := range [][2]int{{1, 3}, {1, 5}, {1, 7}, {1, 8}, {1, 9}, {5, 0}, {5, 2}} {
		rules = append(rules, object{"allow": true, "type": "c", "major": number[0], "minor": number[1], "access": "rwm"})
	}
	rules = append(rules, object{"allow": true, "type": "c", "major": 136, "access": "rwm"})
	device := func(path string, major, minor int) object {
		return object{"path": path, "type": "c", "major": major, "minor": minor, "fileMode": 0o666}
	}
	process := object{
		"user": object{}, "args": c.Args, "cwd": "/",
		"env":             append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, c.Env...),
		"capabilities":    object{"bounding": templateCapabilities, "effective": templateCapabilities, "permitted": templateCapabilities},
		"rlimits":         []object{{"type": "RLIMIT_NOFILE", "hard": 1048576, "soft": 1048576}},
		"apparmorProfile": "isulad-default",
		"oomScoreAdj":     1000,
	}
	if c.Terminal {
		process["terminal"] = true
		process["consoleSize"] = object{}
	}
	annotations := map[string]string{
		"io.kubernetes.cri.container-type":    "container",
		"io.kubernetes.cri.sandbox-id":        c.Pod,
		"io.kubernetes.cri.sandbox-name":      c.Metadata.GetName(),
		"io.kubernetes.cri.sandbox-namespace": c.Metadata.GetNamespace(),
		"io.kubernetes.cri.container-name":    c.Name,
		"io.kubernetes.cri.container-attempt": "0",
		"io.kubernetes.cri.image-name":        "docker.io/library/busybox:latest",
		"native.umask":                        "secure",
		"cgroup.dir":                          "/isulad",
		"host.network.mode":                   "cni",
	}
	if c.LogFile != "" {
		annotations["log.console.driver"] = "json-file"
		annotations["log.console.file"] = c.LogFile
		if c.LogSize != "" {
			annotations["log.console.filesize"] = c.LogSize
		}
		if c.LogFiles != 0 {
			annotations["log.console.filerotate"] = strconv.Itoa(c.LogFiles)
		}
	}
	memory := c.MemoryLimit
	if memory == 0 {
		memory = -1
	}
	namespaces := []object{
		{"type": "mount"}, namespace("network", "net"), namespace("ipc", "ipc"), namespace("uts", "uts"),
	}
	if c.SharedPID {
		namespaces = append(namespaces, namespace("pid", "pid"))
	} else {
		namespaces = append(namespaces, object{"type": "pid"})
	}
	spec := object{
		"ociVersion":  "1.0.1",
		"process":     process,
		"root":        object{"path": c.RootFS},
		"mounts":      mounts,
		"annotations": annotations,
		"hooks": object{"prestart": []object{{
			"path": "/var/lib/isulad/hooks/oci-hook", "args": []string{"oci-hook", "prestart"}, "env": []string{},
		}}},
		"linux": object{
			"cgroupsPath": "/isulad/" + c.Container,
			"resources": object{
				"devices": rules,
				"memory":  object{"limit": memory, "swap": memory},
				"cpu":     object{"shares": 2},
			},
			"devices": []object{
				device("/dev/null", 1, 3), device("/dev/zero", 1, 5), device("/dev/full", 1, 7),
				device("/dev/random", 1, 8), device("/dev/urandom", 1, 9), device("/dev/tty", 5, 0),
			},
			"seccomp": object{
				"defaultAction": "SCMP_ACT_ALLOW",
				"architectures": []string{"SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"},
				"syscalls":      []object{{"names": []string{"kexec_load", "open_by_handle_at"}, "action": "SCMP_ACT_ERRNO"}},
			},
			"namespaces":    namespaces,
			"maskedPaths":   []string{"/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"},
			"readonlyPaths": []string{"/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	}
	if c.Edit != nil {
		c.Edit(spec)
	}
	return json.MarshalIndent(spec, "", "    ")
}

// execSpec is the OCI process of an exec: the container's own with other arguments.
func execSpec(spec []byte, e ExecConfig) ([]byte, error) {
	var of struct {
		Process map[string]any `json:"process"`
	}
	if err := json.Unmarshal(spec, &of); err != nil {
		return nil, fmt.Errorf("cannot decode the container's OCI spec for an exec: %w", err)
	}
	if of.Process == nil {
		return nil, errors.New("the container's OCI spec has no process that an exec could be made from")
	}
	of.Process["args"] = e.Args
	delete(of.Process, "terminal")
	if e.Terminal {
		of.Process["terminal"] = true
	}
	return json.MarshalIndent(of.Process, "", "    ")
}
