package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"kuasar.io/kuasar/sandboxer/storage"
)

// testbed is a node on which everything is well, with QEMU and containerd.
func testbed(t *testing.T) *Checker {
	t.Helper()
	h := Host{Root: t.TempDir()}
	write(t, h.path("/proc/sys/kernel/osrelease"), "6.6.0-test\n", 0o644)
	write(t, h.path("/proc/cpuinfo"), "processor : 0\nflags\t\t: fpu vmx\n", 0o644)
	write(t, h.path("/proc/modules"), "tun 1 0 - Live 0\nvhost_vsock 1 0 - Live 0\n", 0o644)
	write(t, h.path("/usr/lib/modules-load.d/kuasar.conf"), "tun\nvhost-vsock\n", 0o644)
	write(t, h.path("/dev/kvm"), "", 0o600)
	write(t, h.path(qemuConfig), `[hypervisor]
path = "/usr/bin/qemu-system-x86_64"
machine_type = "q35"
[hypervisor.virtiofsd_conf]
path = ""
`, 0o644)
	write(t, h.path("/var/lib/kuasar/vmlinux.bin"), "kernel", 0o644)
	write(t, h.path("/var/lib/kuasar/kuasar.initrd"), "initrd", 0o644)
	program(t, h, "qemu-system-x86_64", "echo QEMU emulator version 8.2.0")
	program(t, h, "dnf", "exit 1")
	program(t, h, "containerd", "echo containerd github.com/containerd/containerd/v2 v2.4.2 x")
	program(t, h, shimName, "exit 0")
	write(t, h.path("/etc/containerd/config.toml"), containerdSnippet("vmm", "/run/vmm-sandboxer.sock"), 0o600)
	settings := Settings(h.path(SysconfigPath))
	settings.Config = qemuConfig
	return &Checker{Host: h, Settings: settings, probes: probes{
		root:       func() bool { return true },
		mountAttrs: func() error { return nil },
		kvm:        func(context.Context, kvmProbe) (bool, string) { return true, "boots" },
		vsock:      func() error { return nil },
		vhostNet:   func() error { return nil },
		tun:        func() error { return nil },
		redirect:   func(context.Context) error { return nil },
		cgroup:     func() (string, error) { return "v2", nil },
		virtiofsd: func(string) (string, storage.Kind, error) {
			return "/usr/libexec/virtiofsd", storage.KindRust, nil
		},
		daemon:     func(context.Context, string) error { return nil },
		unit:       func(context.Context, string) (string, bool) { return "active", true },
		lockHolder: func(string) (int, error) { return 42, nil },
	}}
}

// useStratoVirt configures one that refuses what the real one refuses.
func useStratoVirt(t *testing.T, c *Checker, version, machine, more string) {
	t.Helper()
	const path = "/var/lib/kuasar/config_stratovirt.toml"
	write(t, c.Host.path(path), "[hypervisor]\npath = \"/usr/bin/stratovirt\"\nmachine_type = \""+machine+"\"\n"+more+"[hypervisor.virtiofsd_conf]\npath = \"\"\n", 0o644)
	c.Settings.Config = path
	program(t, c.Host, "stratovirt", "[ \"$1\" = -version ] && echo StratoVirt "+version)
}

func finding(findings []Finding, name string) Finding {
	for _, f := range findings {
		if f.Name == name {
			return f
		}
	}
	return Finding{}
}

func TestCheckGoodNode(t *testing.T) {
	for _, f := range testbed(t).Run(t.Context()) {
		if f.Status != OK || f.Mend != "" || f.Detail == "" {
			t.Errorf("%+v", f)
		}
	}
}

func TestCheck(t *testing.T) {
	denied := fmt.Errorf("open x: %w", fs.ErrPermission)
	gone := errors.New("not there")
	stratovirt := func(c *Checker) {
		write(t, c.Host.path("/var/lib/kuasar/config_stratovirt.toml"), "[hypervisor]\n", 0o644)
		c.Settings.Config = "/var/lib/kuasar/config_stratovirt.toml"
	}
	for _, test := range []struct {
		name   string
		broken func(c *Checker)
		what   string
		status Status
		detail string // a part of it
		mend   string // likewise
	}{
		{"old kernel", func(c *Checker) { c.probes.mountAttrs = func() error { return gone } }, "kernel", Missing, "5.12", "dnf install kernel"},
		{"no configuration", func(c *Checker) { c.Settings.Config = "/var/lib/kuasar/config_stratovirt.toml" }, "configuration", Missing, "does not exist", "dnf install kuasar"},
		{"misspelt key", func(c *Checker) { write(t, c.Host.path(qemuConfig), "[hypervisor]\nvcpu = 1\n", 0o644) }, "configuration", Missing, "vcpus", "vi " + qemuConfig},
		{"no StratoVirt, QEMU is there", stratovirt, "hypervisor", Missing, "/usr/bin/stratovirt", `echo 'OPTIONS="--config /var/lib/kuasar/config_qemu.toml"' >> /etc/sysconfig/kuasar-vmm`},
		{"StratoVirt", func(c *Checker) { useStratoVirt(t, c, "2.4.0", "microvm", "") }, "hypervisor", OK, "StratoVirt 2.4.0, machine microvm", ""},
		{"new StratoVirt", func(c *Checker) { useStratoVirt(t, c, "2.5.0", "microvm", "") }, "hypervisor", OK, "vhost_vsock", ""},
		{"old StratoVirt", func(c *Checker) { useStratoVirt(t, c, "2.1.0", "microvm", "") }, "hypervisor", Missing, "2.2 or newer", "config_qemu.toml"},
		{"StratoVirt without firmware", func(c *Checker) {
			useStratoVirt(t, c, "2.4.0", "microvm", "firmware = \"/usr/share/edk2/ovmf/OVMF_CODE.fd\"\n")
		}, "hypervisor", Missing, "OVMF_CODE.fd", "dnf install edk2-ovmf"},
		{"StratoVirt with the guide's file", func(c *Checker) { useStratoVirt(t, c, "2.4.0", "q35,mem-share=on", "") },
			"hypervisor", Missing, "/usr/share/edk2/ovmf/OVMF_CODE.fd", "hypervisor.firmware"},
		{"StratoVirt with the usual firmware", func(c *Checker) {
			useStratoVirt(t, c, "2.4.0", "q35,mem-share=on", "")
			write(t, c.Host.path("/usr/share/edk2/ovmf/OVMF_CODE.fd"), "x", 0o644)
		}, "hypervisor", OK, "machine q35", ""},
		{"StratoVirt without KVM", func(c *Checker) {
			useStratoVirt(t, c, "2.4.0", "microvm", "")
			c.probes.kvm = func(context.Context, kvmProbe) (bool, string) { return false, "stopped at once" }
		}, "kvm", Missing, "no pod starts", "config_qemu.toml"},
		{"StratoVirt with KVM", func(c *Checker) { useStratoVirt(t, c, "2.4.0", "microvm", "") }, "kvm", OK, "boots", ""},
		{"StratoVirt that is to emulate", func(c *Checker) { useStratoVirt(t, c, "2.4.0", "microvm", "accelerator = \"tcg\"\n") }, "kvm", Missing, "nothing but KVM", "vi "},
		{"StratoVirt without vsock", func(c *Checker) {
			useStratoVirt(t, c, "2.4.0", "microvm", "")
			c.probes.vsock = func() error { return gone }
		}, "vhost-vsock", Missing, "by nothing else", "modprobe vhost_vsock"},
		{"StratoVirt that is to share by 9p", func(c *Checker) {
			useStratoVirt(t, c, "2.4.0", "microvm", "kernel_params = \"task.sharefs_type=9p\"\n")
		}, "virtiofsd", Missing, "has no 9p", "vi "},
		{"StratoVirt without virtiofsd", func(c *Checker) {
			useStratoVirt(t, c, "2.4.0", "microvm", "")
			c.probes.virtiofsd = func(string) (string, storage.Kind, error) { return "", "", nil }
		}, "virtiofsd", Missing, "by nothing else", "dnf install virtiofsd"},
		{"old QEMU", func(c *Checker) { program(t, c.Host, "qemu-system-x86_64", "echo QEMU emulator version 5.2.0") }, "hypervisor", Missing, "6.0", "dnf install qemu-system-x86_64"},
		{"something else", func(c *Checker) { program(t, c.Host, "qemu-system-x86_64", "echo hello") }, "hypervisor", Missing, "hello", "qemu"},
		{"KVM that runs nothing", func(c *Checker) {
			c.probes.kvm = func(context.Context, kvmProbe) (bool, string) { return false, "stopped at once" }
		}, "kvm", Warning, "stopped at once", "nested"},
		{"KVM that is asked for and runs nothing", func(c *Checker) {
			write(t, c.Host.path(qemuConfig), "[hypervisor]\npath = \"/usr/bin/qemu-system-x86_64\"\naccelerator = \"kvm\"\n", 0o644)
			c.probes.kvm = func(context.Context, kvmProbe) (bool, string) { return false, "stopped at once" }
		}, "kvm", Missing, "stopped at once", "tcg"},
		{"KVM that is not wanted", func(c *Checker) {
			write(t, c.Host.path(qemuConfig), "[hypervisor]\npath = \"/usr/bin/qemu-system-x86_64\"\naccelerator = \"tcg\"\n", 0o644)
			c.probes.kvm = nil
		}, "kvm", OK, "tcg", ""},
		{"no vhost-net", func(c *Checker) { c.probes.vhostNet = func() error { return gone } }, "vhost-net", Warning, "throughput", "modprobe vhost_net"},
		{"no vsock", func(c *Checker) { c.probes.vsock = func() error { return gone } }, "vhost-vsock", Warning, "serial", "modprobe vhost_vsock"},
		{"no tun", func(c *Checker) { c.probes.tun = func() error { return gone } }, "tun", Missing, "not there", "modprobe tun"},
		{"no tc", func(c *Checker) { c.probes.redirect = func(context.Context) error { return gone } }, "network", Missing, "not there", "modprobe -a"},
		{"forgotten module", func(c *Checker) {
			write(t, c.Host.path("/usr/lib/modules-load.d/kuasar.conf"), "# tun\nvhost_vsock\n", 0o644)
		}, "modules", Warning, "tun", "modules-load.d"},
		{"empty kernel", func(c *Checker) { write(t, c.Host.path("/var/lib/kuasar/vmlinux.bin"), "", 0o644) }, "guest kernel", Missing, "empty", "dnf reinstall kuasar"},
		{"no virtiofsd", func(c *Checker) {
			c.probes.virtiofsd = func(string) (string, storage.Kind, error) { return "", "", nil }
		}, "virtiofsd", Warning, "9p", "dnf install virtiofsd"},
		{"9p", func(c *Checker) {
			write(t, c.Host.path(qemuConfig), "[hypervisor]\npath = \"/usr/bin/qemu-system-x86_64\"\nkernel_params = \"task.sharefs_type=9p\"\n", 0o644)
			c.probes.virtiofsd = nil
		}, "virtiofsd", OK, "9p", ""},
		{"no cgroups", func(c *Checker) { c.probes.cgroup = func() (string, error) { return "", gone } }, "cgroup", Missing, "not there", "mount -t cgroup2"},
		{"long directory", func(c *Checker) { c.Settings.Dir = "/" + strings.Repeat("x", 60) }, "state directory", Missing, "too long", SysconfigPath},
		{"stopped daemon", func(c *Checker) {
			c.probes.daemon = func(context.Context, string) error { return gone }
			c.probes.unit = func(context.Context, string) (string, bool) { return "inactive", true }
		}, "daemon", Missing, "inactive", "systemctl enable --now kuasar-vmm"},
		{"hanging daemon", func(c *Checker) { c.probes.daemon = func(context.Context, string) error { return gone } }, "daemon", Missing, "process 42", "systemctl restart kuasar-vmm"},
		{"daemon by hand", func(c *Checker) {
			c.probes.unit = func(context.Context, string) (string, bool) { return "inactive", true }
		}, "daemon", Warning, "by hand", "systemctl enable"},
		{"no handler", func(c *Checker) { write(t, c.Host.path("/etc/containerd/config.toml"), "version = 3\n", 0o600) }, "containerd", Missing, "no handler", "kuasar-ctl setup containerd"},
		{"no CRI", func(c *Checker) {
			write(t, c.Host.path("/etc/containerd/config.toml"), "disabled_plugins = [\"cri\"]\n", 0o600)
		}, "containerd", Missing, "disabled_plugins", "vi "},
		{"old containerd", func(c *Checker) { program(t, c.Host, "containerd", "echo containerd containerd.io 1.7.1 x") }, "containerd", Missing, "2.0", "2.0"},
		{"iSulad without handler beside containerd with", func(c *Checker) { program(t, c.Host, "isulad", "echo Version 2.1.5, commit x") }, "isulad", Warning, "no handler", "kuasar-ctl setup isulad"},
		{"not root: tun", func(c *Checker) {
			c.probes.root = func() bool { return false }
			c.probes.tun = func() error { return denied }
		}, "tun", Warning, "only root", "sudo kuasar-ctl check"},
		{"not root: network", func(c *Checker) { c.probes.root = func() bool { return false } }, "network", Warning, "only root", "sudo"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := testbed(t)
			test.broken(c)
			f := finding(c.Run(t.Context()), test.what)
			if f.Status != test.status || !strings.Contains(f.Detail, test.detail) || !strings.Contains(f.Mend, test.mend) || (f.Mend == "") != (f.Status == OK) {
				t.Errorf("%+v", f)
			}
		})
	}
}

func TestCheckEngines(t *testing.T) {
	c := testbed(t)
	c.Host.Root = t.TempDir()
	if f := finding(c.Run(t.Context()), "engine"); f.Status != Missing {
		t.Errorf("no engine: %+v", f)
	}
	program(t, c.Host, "isulad", "echo Version 2.1.5, commit x")
	s, err := c.Host.PlanSetup(t.Context(), SetupOptions{Engine: ISulad, Listen: c.Settings.Listen})
	if err != nil {
		t.Fatal(err)
	}
	if f := finding(c.Run(t.Context()), "isulad"); f.Status != Missing || !strings.Contains(f.Mend, "kuasar-ctl setup isulad") {
		t.Errorf("before the set-up: %+v", f)
	}
	if err := s.Changes[0].Apply(testTime); err != nil {
		t.Fatal(err)
	}
	if f := finding(c.Run(t.Context()), "isulad"); f.Status != OK || !strings.Contains(f.Detail, "vmm") {
		t.Errorf("after the set-up: %+v", f)
	}
	if f := finding(c.Run(t.Context()), "engine"); f.Name != "" {
		t.Errorf("with iSulad: %+v", f)
	}
}

func TestCheckKVMDevice(t *testing.T) {
	for flags, mend := range map[string]string{
		"fpu vmx": "modprobe kvm_intel", "fpu svm": "modprobe kvm_amd", "fpu hypervisor": "nested", "fpu": "firmware",
	} {
		c := testbed(t)
		c.Host.Root = t.TempDir()
		write(t, c.Host.path("/proc/cpuinfo"), "flags : "+flags+"\n", 0o644)
		if f := finding(c.Run(t.Context()), "kvm"); f.Status != Warning || !strings.Contains(f.Mend, mend) {
			t.Errorf("%s: %+v", flags, f)
		}
	}
}
