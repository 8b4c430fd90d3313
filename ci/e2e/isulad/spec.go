package isulad

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
)

// SpecConfig says what Spec writes.
type SpecConfig struct {
	Container, Pod string // ids
	PodPID         uint32 // what Start answered
	RootFS         string
	Args           []string
	Terminal       bool
	LogFile        string // the container's log; empty for none
}

// Spec returns an OCI spec as iSulad writes them for a container of a pod: namespaces and files are
// those of the host, and what is zero or false is left out.
func Spec(c SpecConfig) ([]byte, error) {
	namespace := func(kind, name string) map[string]any {
		return map[string]any{"type": kind, "path": fmt.Sprintf("/proc/%d/ns/%s", c.PodPID, name)}
	}
	folder := filepath.Join("/var/lib/isulad/sandbox", c.Pod)
	bind := func(to, from string) map[string]any {
		return map[string]any{"destination": to, "type": "bind", "source": from, "options": []string{"rbind", "rprivate"}}
	}
	shm := bind("/dev/shm", filepath.Join(folder, "mounts/shm"))
	shm["options"] = []string{"rbind", "rprivate", "size=65536k"}
	process := map[string]any{
		"user": map[string]any{}, "args": c.Args, "cwd": "/",
		"env": []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
	}
	if c.Terminal {
		process["terminal"] = true
	}
	annotations := map[string]string{
		"io.kubernetes.cri.container-type": "container",
		"io.kubernetes.cri.sandbox-id":     c.Pod,
		"native.umask":                     "secure",
		"cgroup.dir":                       "/isulad",
	}
	if c.LogFile != "" {
		annotations["log.console.driver"] = "json-file"
		annotations["log.console.file"] = c.LogFile
	}
	return json.MarshalIndent(map[string]any{
		"ociVersion": "1.0.1",
		"process":    process,
		"root":       map[string]any{"path": c.RootFS},
		"mounts": []any{
			map[string]any{"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": []string{"nosuid", "noexec", "nodev"}},
			shm,
			bind("/etc/hostname", filepath.Join(folder, "hostname")),
			bind("/etc/hosts", filepath.Join(folder, "hosts")),
			bind("/etc/resolv.conf", filepath.Join(folder, "resolv.conf")),
			map[string]any{"destination": "/proc", "type": "proc", "source": "proc", "options": []string{"nosuid", "noexec", "nodev"}},
			map[string]any{"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
		},
		"annotations": annotations,
		"linux": map[string]any{
			"cgroupsPath": "/isulad/" + c.Container,
			"resources":   map[string]any{"memory": map[string]any{"limit": -1}},
			"namespaces": []any{
				map[string]any{"type": "mount"}, map[string]any{"type": "pid"},
				namespace("network", "net"), namespace("ipc", "ipc"), namespace("uts", "uts"),
			},
		},
	}, "", "    ")
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
