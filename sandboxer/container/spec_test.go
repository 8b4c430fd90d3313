package container

import (
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"kuasar.io/kuasar/guest/protocol"
)

func volumeMounts() []specs.Mount {
	return []specs.Mount{
		{Destination: "/data", Type: "bind", Source: "/host/data", Options: []string{"rbind", "rprivate", "ro"}},
		{Destination: "/etc/config", Source: "/host/config", Options: []string{"rbind", "rprivate", "rw"}},
	}
}

func rewritten(t *testing.T, spec *specs.Spec, sharedPID bool) (*specs.Spec, []string) {
	t.Helper()
	var volumes []string
	w := &rewriter{
		id: "c1", sharedPID: sharedPID, log: slog.New(slog.DiscardHandler),
		volume: func(source string, readOnly bool) (string, error) {
			access := " rw"
			if readOnly {
				access = " ro"
			}
			volumes = append(volumes, source+access)
			return "/run/kuasar/state/c1/vol", nil
		},
	}
	if err := w.check(spec); err != nil {
		t.Fatal(err)
	}
	if err := w.rewrite(spec, "/run/kuasar/state/c1/rootfs"); err != nil {
		t.Fatal(err)
	}
	return spec, volumes
}

func load(t *testing.T, name string) *specs.Spec {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	spec := &specs.Spec{}
	if err := json.Unmarshal(text, spec); err != nil {
		t.Fatal(err)
	}
	return spec
}

func mountAt(spec *specs.Spec, destination string) *specs.Mount {
	for i := range spec.Mounts {
		if spec.Mounts[i].Destination == destination {
			return &spec.Mounts[i]
		}
	}
	return nil
}

func namespace(spec *specs.Spec, kind specs.LinuxNamespaceType) *specs.LinuxNamespace {
	for i := range spec.Linux.Namespaces {
		if spec.Linux.Namespaces[i].Type == kind {
			return &spec.Linux.Namespaces[i]
		}
	}
	return nil
}

// TestContainerdSpec rewrites a spec as containerd's CRI plugin writes it.
func TestContainerdSpec(t *testing.T) {
	spec, volumes := rewritten(t, load(t, "testdata/containerd.json"), false)
	text := string(encode(t, spec))
	for _, foreign := range []string{"/host/", "/proc/0", "/proc/4242", "kubepods", "/var/lib", "cri-containerd.apparmor", "system_u"} {
		if strings.Contains(text, foreign) {
			t.Errorf("the spec for the guest mentions %q", foreign)
		}
	}
	if want := []string{"/host/var/lib/kubelet/pods/u/volumes/data ro", "/host/var/lib/kubelet/pods/u/etc-hosts rw", "/host/var/lib/kubelet/pods/u/containers/c/log rw"}; !slices.Equal(volumes, want) {
		t.Errorf("volumes %q, want %q", volumes, want)
	}
	if spec.Root.Path != "/run/kuasar/state/c1/rootfs" || !spec.Root.Readonly {
		t.Errorf("root %+v", spec.Root)
	}
	if spec.Linux.CgroupsPath != "/kuasar/c1" {
		t.Errorf("cgroups path %q", spec.Linux.CgroupsPath)
	}
	for kind, path := range map[specs.LinuxNamespaceType]string{
		specs.MountNamespace: "", specs.PIDNamespace: "", specs.CgroupNamespace: "",
		specs.IPCNamespace: protocol.NamespaceDir + "/ipc", specs.UTSNamespace: protocol.NamespaceDir + "/uts",
	} {
		if ns := namespace(spec, kind); ns == nil || ns.Path != path {
			t.Errorf("namespace %s: %+v, want path %q", kind, ns, path)
		}
	}
	if ns := namespace(spec, specs.NetworkNamespace); ns != nil {
		t.Errorf("network namespace %+v", ns)
	}
	if m := mountAt(spec, "/dev/shm"); m == nil || m.Type != "bind" || m.Source != protocol.ShmPath || !slices.Contains(m.Options, "rbind") {
		t.Errorf("/dev/shm is %+v", m)
	}
	if m := mountAt(spec, "/etc/hosts"); m == nil || m.Source == protocol.HostsPath {
		t.Errorf("/etc/hosts is %+v, want the pod's author's", m)
	}
	for destination, source := range map[string]string{"/etc/hostname": protocol.HostnamePath, "/etc/resolv.conf": protocol.ResolvConfPath} {
		if m := mountAt(spec, destination); m == nil || m.Source != source || !slices.Contains(m.Options, "ro") {
			t.Errorf("%s is %+v", destination, m)
		}
	}
	for _, destination := range []string{"/proc", "/dev", "/dev/pts", "/dev/mqueue", "/sys", "/sys/fs/cgroup"} {
		if mountAt(spec, destination) == nil {
			t.Errorf("%s is lost", destination)
		}
	}
	p := spec.Process
	if p.ApparmorProfile != "" || p.SelinuxLabel != "" || p.OOMScoreAdj == nil || *p.OOMScoreAdj != 985 || !p.NoNewPrivileges || len(p.Capabilities.Bounding) == 0 {
		t.Errorf("process %+v", p)
	}
	if spec.Linux.Seccomp == nil || len(spec.Linux.MaskedPaths) == 0 || len(spec.Linux.ReadonlyPaths) == 0 {
		t.Error("a restriction is lost")
	}
	r := spec.Linux.Resources
	if r.CPU.Cpus != "" || r.CPU.Mems != "" || *r.CPU.Shares != 512 || *r.Memory.Limit != 67108864 || len(r.HugepageLimits) > 0 || len(r.Devices) != 2 {
		t.Errorf("resources %s", encode(t, r))
	}
	if spec.Hooks != nil {
		t.Error("hooks are left")
	}
	if spec.Annotations["io.kubernetes.cri.container-name"] != "busybox" || len(spec.Annotations) != 7 {
		t.Errorf("annotations %v", spec.Annotations)
	}
}

func TestNamespacesOfPod(t *testing.T) {
	tests := map[string]struct {
		asked  []specs.LinuxNamespace
		shared bool
		path   string
	}{
		"own in a pod that shares":      {[]specs.LinuxNamespace{{Type: specs.PIDNamespace}}, true, ""},
		"pod's":                         {[]specs.LinuxNamespace{{Type: specs.PIDNamespace, Path: "/proc/0/ns/pid"}}, true, protocol.NamespaceDir + "/pid"},
		"pod's in one that shares none": {[]specs.LinuxNamespace{{Type: specs.PIDNamespace, Path: "/proc/77/ns/pid"}}, false, ""},
		"the host's":                    {nil, true, protocol.NamespaceDir + "/pid"},
	}
	for name, test := range tests {
		s := spec("true")
		s.Linux.Namespaces = test.asked
		got, _ := rewritten(t, s, test.shared)
		if ns := namespace(got, specs.PIDNamespace); ns == nil || ns.Path != test.path {
			t.Errorf("%s: %+v, want path %q", name, ns, test.path)
		}
	}
}

func TestMounts(t *testing.T) {
	s := spec("true")
	s.Mounts = []specs.Mount{
		{Destination: "/dev/shm/", Type: "bind", Source: "/host/sandbox/shm", Options: []string{"rbind", "ro", "size=65536k"}},
		{Destination: "/cache", Type: "tmpfs", Source: "/host/odd", Options: []string{"size=1m", `context="system_u:x"`}},
		{Destination: "/v", Type: "none", Source: "/host/v", Options: []string{"bind", "z"}},
	}
	got, volumes := rewritten(t, s, false)
	if m := got.Mounts[0]; m.Source != protocol.ShmPath || !slices.Equal(m.Options, []string{"ro", "rbind", "rprivate"}) {
		t.Errorf("shm: %+v", m)
	}
	if m := got.Mounts[1]; m.Source != "tmpfs" || !slices.Equal(m.Options, []string{"size=1m"}) {
		t.Errorf("tmpfs: %+v", m)
	}
	if m := got.Mounts[2]; m.Type != "bind" || !slices.Equal(m.Options, []string{"bind"}) || !slices.Equal(volumes, []string{"/host/v rw"}) {
		t.Errorf("bind: %+v, %q", m, volumes)
	}
	// A volume that the author put at /dev/shm is not the engine's shm.
	s = spec("true")
	s.Mounts = []specs.Mount{{Destination: "/dev/shm", Type: "bind", Source: "/host/volumes/kubernetes.io~empty-dir/big", Options: []string{"rbind"}}}
	if _, volumes := rewritten(t, s, false); len(volumes) != 1 {
		t.Errorf("volumes %q", volumes)
	}
}

// TestRefused lists what a virtual machine cannot give.
func TestRefused(t *testing.T) {
	tests := map[string]struct {
		change func(*specs.Spec)
		class  error
		text   string
	}{
		"user namespace": {func(s *specs.Spec) {
			s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.UserNamespace}}
		}, errdefs.ErrNotImplemented, "user namespaces"},
		"mappings": {func(s *specs.Spec) {
			s.Linux.UIDMappings = []specs.LinuxIDMapping{{Size: 1}}
		}, errdefs.ErrNotImplemented, "user namespace mappings"},
		"strange namespace": {func(s *specs.Spec) {
			s.Linux.Namespaces = []specs.LinuxNamespace{{Type: "moon"}}
		}, errdefs.ErrNotImplemented, `"moon"`},
		"other container's processes": {func(s *specs.Spec) {
			s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.PIDNamespace, Path: "/proc/4194305/ns/pid"}}
		}, errdefs.ErrNotImplemented, "another container"},
		"device": {func(s *specs.Spec) {
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/sda", Type: "b", Major: 8}}
		}, errdefs.ErrNotImplemented, "device /dev/sda (b 8:0)"},
		"false null": {func(s *specs.Spec) {
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/null", Type: "b", Major: 8}}
		}, errdefs.ErrNotImplemented, "device /dev/null"},
		"file system": {func(s *specs.Spec) {
			s.Mounts = []specs.Mount{{Destination: "/m", Type: "nfs", Source: "host:/x"}}
		}, errdefs.ErrNotImplemented, `"nfs"`},
		"propagation": {func(s *specs.Spec) {
			s.Mounts = []specs.Mount{{Destination: "/m", Type: "bind", Source: "/x", Options: []string{"rbind", "rshared"}}}
		}, errdefs.ErrNotImplemented, "propagation"},
		"mapped mount": {func(s *specs.Spec) {
			s.Mounts = []specs.Mount{{Destination: "/m", Type: "bind", Source: "/x", UIDMappings: []specs.LinuxIDMapping{{Size: 1}}}}
		}, errdefs.ErrNotImplemented, "id-mapped"},
		"relative source": {func(s *specs.Spec) {
			s.Mounts = []specs.Mount{{Destination: "/m", Type: "bind", Source: "x"}}
		}, errdefs.ErrInvalidArgument, "absolute"},
		"relative destination": {func(s *specs.Spec) {
			s.Mounts = []specs.Mount{{Destination: "m", Type: "proc"}}
		}, errdefs.ErrInvalidArgument, "absolute"},
		"net device": {func(s *specs.Spec) {
			s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"eth1": {}}
		}, errdefs.ErrNotImplemented, "network devices"},
		"listener": {func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{ListenerPath: "/host/sock"}
		}, errdefs.ErrNotImplemented, "listener"},
		"no args":  {func(s *specs.Spec) { s.Process.Args = nil }, errdefs.ErrInvalidArgument, "args"},
		"no root":  {func(s *specs.Spec) { s.Root = nil }, errdefs.ErrInvalidArgument, "root"},
		"no linux": {func(s *specs.Spec) { s.Linux = nil }, errdefs.ErrInvalidArgument, "linux"},
	}
	for name, test := range tests {
		s := spec("true")
		test.change(s)
		err := (&rewriter{id: "c1"}).check(s)
		if !errors.Is(err, test.class) || !strings.Contains(err.Error(), test.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestReadBundle(t *testing.T) {
	dir := t.TempDir()
	for name, make := range map[string]func(path string) error{
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
		"link out":  func(path string) error { return os.Symlink("/etc/passwd", path) },
	} {
		path := dir + "/config.json"
		if err := make(path); err != nil {
			t.Fatal(err)
		}
		if text, err := readBundle(dir); err == nil {
			t.Errorf("%s: read %d bytes", name, len(text))
		}
		os.Remove(path)
	}
	if _, err := readBundle("relative"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("relative: %v", err)
	}
}

// FuzzSpec makes sure that no text makes the rewriting panic or leaves a bind mount of the host.
func FuzzSpec(f *testing.F) {
	seed, err := os.ReadFile("testdata/containerd.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte(`{"process":{"args":["x"]},"root":{},"linux":{},"mounts":[{"destination":"/a","source":"/host/x","options":["bind"]}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		s := &specs.Spec{}
		if json.Unmarshal(text, s) != nil {
			return
		}
		w := &rewriter{id: "c1", log: slog.New(slog.DiscardHandler), volume: func(string, bool) (string, error) { return "/run/kuasar/v", nil }}
		if w.check(s) != nil {
			return
		}
		if err := w.rewrite(s, "/run/kuasar/r"); err != nil {
			t.Fatal(err)
		}
		for _, m := range s.Mounts {
			if strings.HasPrefix(m.Source, "/") && !strings.HasPrefix(m.Source, "/run/kuasar/") {
				t.Errorf("mount %+v", m)
			}
		}
	})
}
