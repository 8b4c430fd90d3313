package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// guide is the file as the openEuler guide prints it.
const guide = `[sandbox]
log_level = "info" #指定kuasar日志级别,默认为info
[hypervisor]
path = "/usr/bin/stratovirt" #指定stratovirt二进制路径
machine_type = "virt,mem-share=on" #指定模拟芯片类型,ARM架构为virt,x86架构为q35
kernel_path = "/var/lib/kuasar/vmlinux.bin" #指定guest kernel执行路径
image_path = "" #指定guest image执行路径
initrd_path = "/var/lib/kuasar/kuasar.initrd" #指定guest initrd执行路径,与image二选一
kernel_params = "task.log_level=debug task.sharefs_type=virtiofs" #指定guest内核运行参数
vcpus = 1 #指定每个沙箱的默认vCPU数量,默认为1
memory_in_mb = 1024 #指定每个沙箱的默认内存大小,默认为1024 MiB
block_device_driver = "virtio-blk" #指定块设备驱动
debug = true #指定是否开启debug模式
enable_mem_prealloc = false #指定是否开启内存预占
[hypervisor.virtiofsd_conf]
path = "/usr/bin/vhost_user_fs" #指定vhost_user_fs路径
`

func TestGuideFile(t *testing.T) {
	want := Config{
		Sandbox: Sandbox{LogLevel: "info", ISuladTaskAddress: "auto"},
		Hypervisor: Hypervisor{
			Path:              "/usr/bin/stratovirt",
			MachineType:       "virt,mem-share=on",
			KernelPath:        "/var/lib/kuasar/vmlinux.bin",
			InitrdPath:        "/var/lib/kuasar/kuasar.initrd",
			KernelParams:      "task.log_level=debug task.sharefs_type=virtiofs",
			VCPUs:             1,
			MemoryInMB:        1024,
			BlockDeviceDriver: "virtio-blk",
			Debug:             true,
			Accelerator:       "auto",
			Virtiofsd:         Virtiofsd{Path: "/usr/bin/vhost_user_fs"},
		},
	}
	for _, tc := range []struct {
		arch, text, machine string
		notes               int
	}{
		{"arm64", guide, "virt,mem-share=on", 0},
		{"amd64", guide, "q35,mem-share=on", 1},
		{"amd64", strings.Replace(guide, `"virt,`, `"q35,`, 1), "q35,mem-share=on", 0},
		{"arm64", strings.Replace(guide, `"virt,`, `"q35,`, 1), "virt,mem-share=on", 1},
		{"riscv64", guide, "virt,mem-share=on", 0},
	} {
		got, err := parse(tc.text, tc.arch)
		if err != nil {
			t.Fatalf("%s: %v", tc.arch, err)
		}
		if len(got.Notes) != tc.notes {
			t.Errorf("%s: notes %q, want %d of them", tc.arch, got.Notes, tc.notes)
		}
		want.Hypervisor.MachineType = tc.machine
		if got.Sandbox != want.Sandbox || got.Hypervisor != want.Hypervisor {
			t.Errorf("%s: got\n%+v\nwant\n%+v", tc.arch, got, want)
		}
	}
}

func TestMachineFitsTheEmulatedArchitecture(t *testing.T) {
	for _, tc := range []struct{ arch, path, machine, want string }{
		{"amd64", "/usr/bin/qemu-system-aarch64", "virt", "virt"},
		{"amd64", "/usr/bin/qemu-system-aarch64", "q35", "virt"},
		{"arm64", "/usr/bin/qemu-system-aarch64", "q35", "virt"},
		{"arm64", "/opt/bin/qemu-system-x86_64", "q35", "q35"},
		{"amd64", "/usr/libexec/qemu-kvm", "virt", "q35"},
	} {
		got, err := parse(fmt.Sprintf("[hypervisor]\npath = %q\nmachine_type = %q\n", tc.path, tc.machine), tc.arch)
		if err != nil || got.Hypervisor.MachineType != tc.want {
			t.Errorf("%+v: got %+v, %v", tc, got, err)
		}
	}
}

func TestDefaultsEqualTheGuide(t *testing.T) {
	fromGuide, err := parse(guide, "arm64")
	if err != nil {
		t.Fatal(err)
	}
	empty, err := parse("", "arm64")
	if err != nil {
		t.Fatal(err)
	}
	fromGuide.Hypervisor.Debug = false
	if empty.Hypervisor != fromGuide.Hypervisor || empty.Sandbox != fromGuide.Sandbox {
		t.Errorf("an empty file gives\n%+v\nthe guide's gives\n%+v", empty, fromGuide)
	}
}

func TestImageReplacesDefaultInitrd(t *testing.T) {
	cfg, err := parse("[hypervisor]\nimage_path = \"/img\"\n", "amd64")
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Hypervisor.InitrdPath != "" || cfg.Hypervisor.ImagePath != "/img" {
		t.Errorf("got %+v", cfg.Hypervisor)
	}
}

func TestRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		text string
		want []string // parts of the error
	}{
		"no TOML":          {"[sandbox\n", []string{"line 2"}},
		"twice":            {"[hypervisor]\nvcpus = 1\nvcpus = 2\n", []string{"line 3", "vcpus"}},
		"misspelt":         {"[hypervisor]\nvcpu = 2\n", []string{"line 2: hypervisor.vcpu: unknown key", "did you mean hypervisor.vcpus?"}},
		"misspelt table":   {"[hypervisr]\nvcpus = 2\n", []string{"hypervisr.vcpus: unknown key", "hypervisor.vcpus"}},
		"wrong table":      {"[sandbox]\nkernel_path = \"/k\"\n", []string{"line 2: sandbox.kernel_path", "hypervisor.kernel_path"}},
		"quoted key":       {"[hypervisor]\n\"vcpuz\" = 2\n", []string{"line 2", "hypervisor.vcpus"}},
		"nothing near":     {"[hypervisor]\ncolour = \"red\"\n", []string{"line 2: hypervisor.colour: unknown key"}},
		"empty table":      {"[qemu]\n", []string{"line 1: qemu: unknown key"}},
		"two at once":      {"[hypervisor]\nvcpu = 2\nmemory = 3\n", []string{"line 2", "line 3", "hypervisor.memory_in_mb"}},
		"table as value":   {"hypervisor = 3\n", []string{"line 1: hypervisor: expected a table, got the integer 3"}},
		"value as table":   {"[hypervisor.vcpus]\na=1\n", []string{"hypervisor.vcpus.a: unknown key"}},
		"string for int":   {"[hypervisor]\nvcpus = \"2\"\n", []string{"line 2: hypervisor.vcpus: expected an integer, got the string \"2\""}},
		"int for bool":     {"[hypervisor]\ndebug = 1\n", []string{"expected true or false, got the integer 1"}},
		"bool for string":  {"[hypervisor]\npath = true\n", []string{"expected a string in quotes, got the boolean true"}},
		"float for int":    {"[hypervisor]\nvcpus = 1.5\n", []string{"got the floating-point number 1.5"}},
		"array for string": {"[hypervisor]\nkernel_params = [\"a\"]\n", []string{"got an array"}},
		"no vcpu":          {"[hypervisor]\nvcpus = 0\n", []string{"line 2: hypervisor.vcpus: 0 is not within 1 and 64"}},
		"65 vcpus":         {"[hypervisor]\nvcpus = 65\n", []string{"65"}},
		"little memory":    {"[hypervisor]\nmemory_in_mb = 63\n", []string{"63 MiB is not within 64"}},
		"level":            {"[sandbox]\nlog_level = \"inf\"\n", []string{"\"inf\" is none of", "did you mean \"info\"?"}},
		"accelerator":      {"[hypervisor]\naccelerator = \"xen\"\n", []string{"hypervisor.accelerator", "auto, kvm, tcg"}},
		"block driver":     {"[hypervisor]\nblock_device_driver = \"virtio-sci\"\n", []string{"line 2: hypervisor.block_device_driver", "did you mean \"virtio-scsi\"?"}},
		"task address":     {"[sandbox]\nisulad_task_address = \"tcp\"\n", []string{"line 2: sandbox.isulad_task_address", "auto, vsock, ttrpc+vsock, unix"}},
		"few vcpus":        {"[hypervisor]\nvcpus = 3\nmax_vcpus = 2\n", []string{"line 3: hypervisor.max_vcpus", "hypervisor.vcpus = 3"}},
		"no vcpus at all":  {"[hypervisor]\nmax_vcpus = -1\n", []string{"line 2: hypervisor.max_vcpus"}},
		"boot timeout":     {"[sandbox]\nboot_timeout_in_s = 601\n", []string{"line 2: sandbox.boot_timeout_in_s", "0 and 600"}},
		"memory limit":     {"[hypervisor]\nmax_memory_in_mb = 512\n", []string{"line 2: hypervisor.max_memory_in_mb", "1024"}},
		"firmware":         {"[hypervisor]\nfirmware = \"OVMF.fd\"\n", []string{"line 2: hypervisor.firmware", "absolute"}},
		"both":             {"[hypervisor]\nimage_path = \"/i\"\ninitrd_path = \"/r\"\n", []string{"line 2: hypervisor.image_path", "initrd_path", "/r"}},
		"none":             {"[hypervisor]\ninitrd_path = \"\"\n", []string{"line 2: hypervisor.initrd_path", "image_path"}},
		"no kernel":        {"[hypervisor]\nkernel_path = \"\"\n", []string{"hypervisor.kernel_path", "empty"}},
		"relative":         {"[hypervisor]\nkernel_path = \"vmlinux\"\n", []string{"absolute"}},
		"comma":            {"[hypervisor]\nkernel_path = \"/a,b\"\n", []string{"comma"}},
		"no machine":       {"[hypervisor]\nmachine_type = \"\"\n", []string{"machine_type", "q35"}},
		"bad machine":      {"[hypervisor]\nmachine_type = \"q35,mem-share\"\n", []string{"mem-share", "key=value"}},
		"blank in machine": {"[hypervisor]\nmachine_type = \"q35 -x\"\n", []string{"blank"}},
		"two lines":        {"[hypervisor]\nkernel_params = \"a\\nb\"\n", []string{"one line"}},
		"long parameters":  {"[hypervisor]\nkernel_params = \"" + strings.Repeat("a", 1537) + "\"\n", []string{"1537 bytes"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parse(tc.text, "amd64")
			if err == nil {
				t.Fatal("accepted")
			}
			for _, w := range tc.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("the error lacks %q:\n%v", w, err)
				}
			}
		})
	}
}

func TestLoadMissingFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "no.toml")
	_, err := Load(path)
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "kuasar") {
		t.Errorf("got %v", err)
	}
}

func TestLoadNamesTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.toml")
	if err := os.WriteFile(path, []byte("[hypervisor]\nvcpu = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Load(path)
	var ke *KeyError
	if !errors.As(err, &ke) || ke.Line != 2 || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v", err)
	}
}

func TestCheck(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, mode os.FileMode, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return p
	}
	good := func() *Config {
		c := Default()
		c.Hypervisor.Path = file("qemu", 0o755, "x")
		c.Hypervisor.KernelPath = file("kernel", 0o644, "x")
		c.Hypervisor.InitrdPath = file("initrd", 0o644, "x")
		return c
	}
	if err := good().Check(); err != nil {
		t.Fatalf("a good configuration: %v", err)
	}
	for name, tc := range map[string]struct {
		spoil func(c *Config)
		want  []string
	}{
		"no hypervisor": {func(c *Config) { c.Hypervisor.Path = dir + "/stratovirt" },
			[]string{"hypervisor.path", dir + "/stratovirt", "no such file", "dnf install stratovirt"}},
		"no qemu": {func(c *Config) { c.Hypervisor.Path = dir + "/qemu-system-x86_64" },
			[]string{"apt-get install qemu-system-x86"}},
		"not executable": {func(c *Config) { c.Hypervisor.Path = file("plain", 0o644, "x") },
			[]string{"hypervisor.path", "permission denied"}},
		"no kernel": {func(c *Config) { c.Hypervisor.KernelPath = dir + "/nope" },
			[]string{"hypervisor.kernel_path", dir + "/nope", "kuasar"}},
		"empty initrd": {func(c *Config) { c.Hypervisor.InitrdPath = file("empty", 0o644, "") },
			[]string{"hypervisor.initrd_path", "empty file"}},
		"image is a directory": {func(c *Config) { c.Hypervisor.InitrdPath, c.Hypervisor.ImagePath = "", dir },
			[]string{"hypervisor.image_path", "directory", "mage image"}},
		"no firmware": {func(c *Config) { c.Hypervisor.Firmware = dir + "/OVMF_CODE.fd" },
			[]string{"hypervisor.firmware", "edk2-ovmf"}},
		"no virtiofsd": {func(c *Config) { c.Hypervisor.Virtiofsd.Path = dir + "/virtiofsd" },
			[]string{"hypervisor.virtiofsd_conf.path", "qemu-system-common"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := good()
			tc.spoil(c)
			err := c.Check()
			if err == nil {
				t.Fatal("accepted")
			}
			for _, w := range tc.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("the error lacks %q:\n%v", w, err)
				}
			}
		})
	}
}

func TestStratoVirtFirmware(t *testing.T) {
	for _, tc := range []struct{ machine, firmware, want string }{
		{"q35,mem-share=on", "", "/usr/share/edk2/ovmf/OVMF_CODE.fd"},
		{"type=q35", "", "/usr/share/edk2/ovmf/OVMF_CODE.fd"},
		{"q35", "/fw", "/fw"},
		{"microvm", "", ""},
		{"virt,mem-share=on", "", ""},
		{"virt", "/fw", "/fw"},
	} {
		if got := (Hypervisor{MachineType: tc.machine, Firmware: tc.firmware}).StratoVirtFirmware(); got != tc.want {
			t.Errorf("%+v: %q", tc, got)
		}
	}
}

// TestShippedFiles: what the package installs says what the guide prints, and needs no notes.
func TestShippedFiles(t *testing.T) {
	for name, arch := range map[string]string{
		"config_stratovirt.toml": "arm64", "config_stratovirt_x86_64.toml": "amd64",
		"config_qemu.toml": "amd64", "config_qemu_aarch64.toml": "arm64",
	} {
		text, err := os.ReadFile(filepath.Join("../../defaults", name))
		if err != nil {
			t.Fatal(err)
		}
		cfg, err := parse(string(text), arch)
		if err != nil || len(cfg.Notes) > 0 {
			t.Errorf("%s: %v, notes %q", name, err, cfg.Notes)
		}
		printed := guide
		switch name {
		case "config_stratovirt_x86_64.toml":
			printed = strings.Replace(guide, `"virt,`, `"q35,`, 1)
		case "config_qemu.toml", "config_qemu_aarch64.toml":
			continue
		}
		if string(text) != printed {
			t.Errorf("%s is not what the guide prints", name)
		}
	}
}
