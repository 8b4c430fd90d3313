package config

import (
	"strings"
	"testing"
)

// ofStratoVirt has every key that Kuasar's own daemon for StratoVirt reads.
const ofStratoVirt = `
[hypervisor]
debug = true
image_path = ""
initrd_path = "/srv/initrd"
kernel_path = "/srv/kernel"
firmware = "/usr/share/edk2/ovmf/OVMF_CODE.fd"
kernel_params = "task.sharefs_type=virtiofs"
enable_mem_prealloc = true
memory_in_mb = 2048
vcpus = 2
block_device_driver = "virtio-mmio"
machine_type = "q35,mem-share=on"
path = ""
[hypervisor.virtiofsd_conf]
path = "/usr/bin/vhost_user_fs"
[sandbox]
enable_tracing = false
log_level = ""
`

// ofQEMU has every key that Kuasar's own daemon for QEMU reads, and some that only its file has.
const ofQEMU = `
[sandbox]
log_level = "warn"
enable_tracing = true
[hypervisor]
block_device_driver = "VirtioScsi"
cpu_features = "pmu=off"
cpu_model = "host"
debug = false
default_bridges = 1
default_max_vcpus = 4
disable_nvdimm = true
enable_iothreads = true
enable_swap = false
enable_vhost_user_store = true
entropy_source = "/dev/urandom"
file_backend_mem_path = ""
firmware_path = "/fw"
hugepages = false
image_path = ""
initrd_path = "/srv/initrd"
kernel_params = "console=hvc0 task.sharefs_type=virtiofs"
kernel_path = "/srv/kernel"
machine_accelerators = ""
machine_type = "pc"
mem_offset = 0
mem_prealloc = true
mem_slots = 1
memory_in_mb = 2048
memory_path = ""
msize_9p = 8192
qemu_path = "/opt/bin/qemu-system-x86_64"
share_fs = "Virtio9P"
use_vsock = true
vcpus = 2
virtio_9p_direct_io = false
virtio_9p_multidevs = ""
virtiofs_cache = "always"
virtiofs_cache_size = 1024
virtiofs_daemon_path = "/usr/bin/virtiofsd"
virtiofs_extra_args = []
[hypervisor.virtiofsd]
cache = "auto"
log_level = "info"
path = "/opt/virtiofsd"
shared_dir = ""
socket_path = ""
syslog = false
thread_pool_size = 4
`

func TestKuasarsOwnFiles(t *testing.T) {
	common := Hypervisor{
		MachineType: "q35,mem-share=on", KernelPath: "/srv/kernel", InitrdPath: "/srv/initrd",
		VCPUs: 2, MemoryInMB: 2048, EnableMemPrealloc: true, Accelerator: "auto",
	}
	stratovirt, qemu := common, common
	stratovirt.Path, stratovirt.Firmware, stratovirt.Debug = "/usr/bin/stratovirt", "/usr/share/edk2/ovmf/OVMF_CODE.fd", true
	stratovirt.KernelParams, stratovirt.BlockDeviceDriver = "task.sharefs_type=virtiofs", "virtio-blk"
	stratovirt.Virtiofsd.Path = "/usr/bin/vhost_user_fs"
	qemu.Path, qemu.MachineType, qemu.Firmware, qemu.MaxVCPUs = "/opt/bin/qemu-system-x86_64", "q35", "/fw", 4
	qemu.KernelParams, qemu.BlockDeviceDriver = "console=hvc0 task.sharefs_type=9p", "virtio-scsi"
	qemu.Virtiofsd.Path = "/opt/virtiofsd"
	for name, tc := range map[string]struct {
		text    string
		want    Hypervisor
		level   string
		idle    int
		another string // note
	}{
		"StratoVirt": {ofStratoVirt, stratovirt, "info", 1, `"virtio-mmio"`},
		"QEMU":       {ofQEMU, qemu, "warn", len(idle), `machine_type = "pc"`},
	} {
		got, err := parse(tc.text, "amd64")
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got.Hypervisor != tc.want || got.Sandbox.LogLevel != tc.level {
			t.Errorf("%s: got\n%+v\nwant\n%+v", name, got, tc.want)
		}
		if len(got.Notes) != 2 {
			t.Fatalf("%s: notes %q", name, got.Notes)
		}
		if n := strings.Count(got.Notes[0], "sandbox.") + strings.Count(got.Notes[0], "hypervisor."); n != tc.idle || !strings.Contains(got.Notes[0], "no effect") {
			t.Errorf("%s: the note names %d keys, want %d: %s", name, n, tc.idle, got.Notes[0])
		}
		if !strings.Contains(got.Notes[1], tc.another) {
			t.Errorf("%s: the other note: %s", name, got.Notes[1])
		}
	}
}

func TestTranslation(t *testing.T) {
	for name, tc := range map[string]struct {
		text string
		got  func(c *Config) any
		want any
	}{
		"virtiofs":         {"share_fs = \"VirtioFS\"", func(c *Config) any { return c.Hypervisor.KernelParams }, "task.log_level=debug task.sharefs_type=virtiofs"},
		"an empty path":    {"qemu_path = \"\"", func(c *Config) any { return c.Hypervisor.Path }, "/usr/bin/qemu-system-x86_64"},
		"the same twice":   {"qemu_path = \"/q\"\npath = \"/q\"", func(c *Config) any { return c.Hypervisor.Path }, "/q"},
		"no limit":         {"default_max_vcpus = 0", func(c *Config) any { return c.Hypervisor.MaxVCPUs }, 0},
		"VirtioBlk":        {"block_device_driver = \"VirtioBlk\"", func(c *Config) any { return c.Hypervisor.BlockDeviceDriver }, "virtio-blk"},
		"VirtioMmio":       {"block_device_driver = \"VirtioMmio\"", func(c *Config) any { return c.Hypervisor.BlockDeviceDriver }, "virtio-blk"},
		"pc of StratoVirt": {"machine_type = \"pc\"", func(c *Config) any { return c.Hypervisor.MachineType }, "pc"},
	} {
		c, err := parse("[hypervisor]\n"+tc.text+"\n", "amd64")
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if got := tc.got(c); got != tc.want {
			t.Errorf("%s: got %v, want %v", name, got, tc.want)
		}
	}
}

func TestTranslationRefused(t *testing.T) {
	for text, want := range map[string]string{
		"hugepages = true":                             "line 2: hypervisor.hugepages: huge pages",
		"memory_path = \"/dev/shm\"":                   "line 2: hypervisor.memory_path",
		"machine_accelerators = \"kernel_irqchip=on\"": "line 2: hypervisor.machine_accelerators",
		"share_fs = \"virtiofs\"":                      "line 2: hypervisor.share_fs: expected \"VirtioFS\"",
		"share_fs = [\"VirtioFS\"]":                    "got an array",
		"qemu_path = \"/a\"\npath = \"/b\"":            "line 2: hypervisor.qemu_path: it means the same as hypervisor.path",
		"qemu_path = [1]\npath = [2]":                  "hypervisor.qemu_path",
		"qemu_path = \"q\"":                            "line 2: hypervisor.qemu_path: \"q\" is not an absolute path",
		"default_max_vcpus = 65":                       "line 2: hypervisor.default_max_vcpus: 65",
		"mem_prealloc = 1":                             "line 2: hypervisor.mem_prealloc: expected true or false",
		"cpu_modell = \"host\"":                        "hypervisor.cpu_modell: unknown key",
		"kernel_params = 1\nshare_fs = \"VirtioFS\"":   "line 2: hypervisor.kernel_params: expected a string",
		"[hypervisor.virtiofsd]\nchache = \"auto\"":    "line 3: hypervisor.virtiofsd.chache: unknown key",
	} {
		if _, err := parse("[hypervisor]\n"+text+"\n", "amd64"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", text, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, text := range []string{"", guide, ofStratoVirt, ofQEMU, "[hypervisor]\nqemu_path = [1]\npath = [2]\n"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if c, err := parse(text, "amd64"); err == nil && c.Hypervisor.VCPUs < 1 {
			t.Errorf("accepted %+v", c.Hypervisor)
		}
	})
}
