package containers

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer/configs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"
)

// plainSpec is the least that can be run.
func plainSpec() *specs.Spec {
	return &specs.Spec{
		Root:    &specs.Root{Path: "/run/kuasar/state/c1/rootfs"},
		Process: &specs.Process{Args: []string{"true"}, Cwd: "/"},
		Linux:   &specs.Linux{},
	}
}

func TestCheckSpec(t *testing.T) {
	if err := checkSpec(plainSpec()); err != nil {
		t.Fatal(err)
	}
	for want, spoil := range map[string]func(*specs.Spec){
		"root.path":           func(s *specs.Spec) { s.Root = nil },
		"absolute path in":    func(s *specs.Spec) { s.Root.Path = "rootfs" },
		"no section linux":    func(s *specs.Spec) { s.Linux = nil },
		"no process":          func(s *specs.Spec) { s.Process = nil },
		"process.args":        func(s *specs.Spec) { s.Process.Args = nil },
		`process.cwd "tmp"`:   func(s *specs.Spec) { s.Process.Cwd = "tmp" },
		"listenerPath":        func(s *specs.Spec) { s.Linux.Seccomp = &specs.LinuxSeccomp{ListenerPath: "/run/x"} },
		"netDevices":          func(s *specs.Spec) { s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"eth1": {}} },
		"process.args is emp": func(s *specs.Spec) { s.Process.Args = []string{""} },
	} {
		spec := plainSpec()
		spoil(spec)
		err := checkSpec(spec)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func TestGuestSpec(t *testing.T) {
	var log bytes.Buffer
	adj := -2000
	weight := uint16(100)
	spec := plainSpec()
	spec.Hostname = "of-the-container"
	spec.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "/usr/bin/of-the-host"}}}
	spec.Process.ApparmorProfile = "profile"
	spec.Process.SelinuxLabel = "label"
	spec.Process.OOMScoreAdj = &adj
	spec.Linux = &specs.Linux{
		CgroupsPath: "/kubepods/of/the/host",
		MountLabel:  "label",
		IntelRdt:    &specs.LinuxIntelRdt{ClosID: "x"},
		Namespaces: []specs.LinuxNamespace{
			{Type: specs.NetworkNamespace, Path: "/var/run/netns/x"}, {Type: specs.PIDNamespace},
			{Type: specs.UTSNamespace, Path: "/run/sandbox-ns/uts"},
		},
		Sysctl: map[string]string{"net.ipv4.ip_forward": "1", "kernel.shmmax": "1", "net/ipv4/conf/eth0.1/forwarding": "0"},
		Resources: &specs.LinuxResources{
			BlockIO:        &specs.LinuxBlockIO{Weight: &weight},
			Rdma:           map[string]specs.LinuxRdma{"mlx": {}},
			HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "3MB", Limit: 5}, {Pagesize: "5MB"}},
		},
	}
	before, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	guest, sysctls := guestSpec(spec, "/kuasar/c1", slog.New(slog.NewTextHandler(&log, nil)))
	if after, _ := json.Marshal(spec); !bytes.Equal(before, after) {
		t.Errorf("the announced spec was changed:\n%s\n%s", before, after)
	}
	if want := map[string]string{"net.ipv4.ip_forward": "1", "net/ipv4/conf/eth0.1/forwarding": "0"}; !reflect.DeepEqual(sysctls, want) {
		t.Errorf("sysctls of the pod: %v", sysctls)
	}
	if want := map[string]string{"kernel.shmmax": "1"}; !reflect.DeepEqual(guest.Linux.Sysctl, want) {
		t.Errorf("sysctls of the container: %v", guest.Linux.Sysctl)
	}
	if want := spec.Linux.Namespaces[1:]; !reflect.DeepEqual(guest.Linux.Namespaces, want) {
		t.Errorf("namespaces %v", guest.Linux.Namespaces)
	}
	r := guest.Linux.Resources
	if guest.Hooks != nil || guest.Hostname != "" || guest.Process.ApparmorProfile != "" || guest.Process.SelinuxLabel != "" ||
		guest.Linux.MountLabel != "" || guest.Linux.IntelRdt != nil || guest.Linux.CgroupsPath != "/kuasar/c1" ||
		*guest.Process.OOMScoreAdj != -1000 || r.BlockIO != nil || r.Rdma != nil || len(r.HugepageLimits) != 0 {
		b, _ := json.MarshalIndent(guest, "", " ")
		t.Errorf("%s", b)
	}
	for _, want := range []string{"hooks", "profile", "block I/O", "size=3MB"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log does not tell of %s", want)
		}
	}
	if strings.Contains(log.String(), "5MB") {
		t.Error("the log complains of a limit of nothing")
	}

	// The score of the agent is not inherited, and a namespace of its own keeps its name.
	spec = plainSpec()
	spec.Hostname = "own"
	spec.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.UTSNamespace}}
	guest, _ = guestSpec(spec, "/kuasar/c1", slog.New(slog.DiscardHandler))
	if *guest.Process.OOMScoreAdj != 0 || guest.Hostname != "own" {
		t.Errorf("score %d, hostname %q", *guest.Process.OOMScoreAdj, guest.Hostname)
	}
}

func TestLibcontainerConfig(t *testing.T) {
	spec := plainSpec()
	spec.Root.Readonly = true
	umask := uint32(0o27)
	spec.Process.User.Umask = &umask
	spec.Linux.MaskedPaths = []string{"/proc/kcore"}
	spec.Linux.Namespaces = []specs.LinuxNamespace{
		{Type: specs.MountNamespace}, {Type: specs.PIDNamespace, Path: "/run/sandbox-ns/pid"}, {Type: specs.NetworkNamespace},
	}
	limit := int64(1 << 30)
	spec.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}
	guest, _ := guestSpec(spec, "/kuasar/c1", slog.New(slog.DiscardHandler))
	config, err := libcontainerConfig("c1", guest)
	if err != nil {
		t.Fatal(err)
	}
	if config.Rootfs != spec.Root.Path || !config.Readonlyfs || config.NoPivotRoot || *config.Umask != umask || *config.OomScoreAdj != 0 ||
		config.Cgroups.Path != "/kuasar/c1" || config.Cgroups.Systemd || config.Cgroups.Resources.Memory != limit || len(config.MaskPaths) != 1 {
		t.Errorf("%+v, cgroup %+v", config, config.Cgroups)
	}
	if config.Namespaces.Contains(configs.NEWNET) || config.Namespaces.PathOf(configs.NEWPID) != "/run/sandbox-ns/pid" || len(config.Networks) != 0 {
		t.Errorf("namespaces %+v", config.Namespaces)
	}
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: "nonsense"})
	guest, _ = guestSpec(spec, "/kuasar/c1", slog.New(slog.DiscardHandler))
	if _, err := libcontainerConfig("c1", guest); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an unknown namespace: %v", err)
	}
}

func TestLibcontainerProcess(t *testing.T) {
	p := plainSpec().Process
	p.User = specs.User{UID: 1, GID: 2, AdditionalGids: []uint32{3, 4}}
	p.NoNewPrivileges = true
	p.Capabilities = &specs.LinuxCapabilities{Ambient: []string{"CAP_CHOWN"}}
	p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 5, Hard: 6}}
	p.ConsoleSize = &specs.Box{Width: 100000, Height: 25}
	lp, err := libcontainerProcess(p)
	if err != nil {
		t.Fatal(err)
	}
	if lp.UID != 1 || lp.GID != 2 || !reflect.DeepEqual(lp.AdditionalGroups, []int{3, 4}) || !*lp.NoNewPrivileges ||
		lp.Capabilities.Ambient[0] != "CAP_CHOWN" || lp.ConsoleWidth != 0xffff || lp.ConsoleHeight != 25 ||
		lp.Rlimits[0] != (configs.Rlimit{Type: unix.RLIMIT_NOFILE, Soft: 5, Hard: 6}) {
		t.Errorf("%+v", lp)
	}
	p.Rlimits[0].Type = "RLIMIT_NONSENSE"
	if _, err := libcontainerProcess(p); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an unknown limit: %v", err)
	}
}

func TestDecodeProcess(t *testing.T) {
	for _, spec := range []*anypb.Any{nil, {}, {Value: []byte("{")}, {Value: []byte(`{"args":["x"]}`)}, {Value: []byte(`{"cwd":"/"}`)}} {
		if _, err := decodeProcess(spec); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", spec.GetValue(), err)
		}
	}
	p, err := decodeProcess(&anypb.Any{Value: []byte(`{"args":["x"],"cwd":"/","user":{"uid":7}}`)})
	if err != nil || p.User.UID != 7 {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestSysctlPath(t *testing.T) {
	for key, want := range map[string]string{
		"net.ipv4.ip_forward":                "/proc/sys/net/ipv4/ip_forward",
		"net/ipv4/conf/eth0.100/rp_filter":   "/proc/sys/net/ipv4/conf/eth0.100/rp_filter",
		"net.ipv4.conf.eth0/100.rp_filter":   "/proc/sys/net/ipv4/conf/eth0.100/rp_filter",
		"net/../../../etc/passwd":            "",
		"net.//.//.etc":                      "",
		"/net":                               "",
		"net/ipv4/../../kernel/core_pattern": "",
	} {
		got, err := sysctlPath(key)
		if got != want || (want == "") != (err != nil) {
			t.Errorf("%s: %q, %v", key, got, err)
		}
	}
}

func TestMergeResources(t *testing.T) {
	number := func(n int64) *int64 { return &n }
	shares := uint64(512)
	old := &specs.LinuxResources{
		Memory:         &specs.LinuxMemory{Limit: number(100), Swap: number(200)},
		CPU:            &specs.LinuxCPU{Quota: number(5), Cpus: "0"},
		Pids:           &specs.LinuxPids{Limit: number(10)},
		HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 1}, {Pagesize: "1GB", Limit: 2}},
		Devices:        []specs.LinuxDeviceCgroup{{Access: "rwm"}},
		Unified:        map[string]string{"memory.high": "1", "io.max": "x"},
	}
	before, _ := json.Marshal(old)
	got := mergeResources(old, &specs.LinuxResources{
		Memory:         &specs.LinuxMemory{Limit: number(300)},
		CPU:            &specs.LinuxCPU{Shares: &shares},
		HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 7}},
		Unified:        map[string]string{"memory.high": "2"},
	})
	if after, _ := json.Marshal(old); !bytes.Equal(before, after) {
		t.Errorf("the old ones were changed:\n%s\n%s", before, after)
	}
	want := &specs.LinuxResources{
		Memory:         &specs.LinuxMemory{Limit: number(300), Swap: number(200)},
		CPU:            &specs.LinuxCPU{Quota: number(5), Cpus: "0", Shares: &shares},
		Pids:           old.Pids,
		HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "1GB", Limit: 2}, {Pagesize: "2MB", Limit: 7}},
		Devices:        old.Devices,
		Unified:        map[string]string{"memory.high": "2", "io.max": "x"},
	}
	if !reflect.DeepEqual(got, want) {
		a, _ := json.Marshal(got)
		b, _ := json.Marshal(want)
		t.Errorf("\n%s instead of\n%s", a, b)
	}
	got = mergeResources(old, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: number(-1)}})
	if *got.Memory.Swap != -1 {
		t.Errorf("without a limit of memory there is one of swap: %d", *got.Memory.Swap)
	}
	if got = mergeResources(nil, &specs.LinuxResources{}); !reflect.DeepEqual(got, &specs.LinuxResources{}) {
		t.Errorf("nothing became %+v", got)
	}
}

func TestCgroupResourcesKeepDevices(t *testing.T) {
	guest, _ := guestSpec(plainSpec(), "/kuasar/c1", slog.New(slog.DiscardHandler))
	config, err := libcontainerConfig("c1", guest)
	if err != nil {
		t.Fatal(err)
	}
	limit := int64(5)
	r, err := cgroupResources("c1", &specs.LinuxResources{
		Pids: &specs.LinuxPids{Limit: &limit}, Devices: []specs.LinuxDeviceCgroup{{}},
	}, config.Cgroups.Resources)
	if err != nil {
		t.Fatal(err)
	}
	if *r.PidsLimit != 5 || len(r.Devices) == 0 || !reflect.DeepEqual(r.Devices, config.Cgroups.Resources.Devices) || r.SkipDevices {
		t.Errorf("%+v", r)
	}
	var none cgroups.Resources
	if r, err := cgroupResources("c1", &specs.LinuxResources{}, &none); err != nil || r.Devices != nil {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestStartError(t *testing.T) {
	cause := errors.New(`unable to start container process: error during container init: exec: "topp": executable file not found in $PATH`)
	err := startError("topp", "c1", cause)
	if err.Error() != `cannot start "topp" in container c1: executable file not found in $PATH` || !errors.Is(err, cause) {
		t.Error(err)
	}
	err = startError("top", "c1", errors.New("something else"))
	if err.Error() != `cannot start "top" in container c1: something else` {
		t.Error(err)
	}
}
