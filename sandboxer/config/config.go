// Package config reads the administrator's file, config_stratovirt.toml in the openEuler guide.
//
// A file is read strictly: a key that is not known, a value of the wrong type and a value out of
// its bounds are errors that name the key and the line, and all of them are reported at once.
// A key that is absent has the value that the guide prints for it, except debug, which is false.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"kuasar.io/kuasar/guest/protocol"
)

// DefaultPath is where the package installs the file.
const DefaultPath = "/var/lib/kuasar/config_stratovirt.toml"

// DefaultVirtiofsd is what the guide names. StratoVirt ships that program only up to version 2.3,
// so its absence is no error by itself: package storage then searches for another one.
const DefaultVirtiofsd = "/usr/bin/vhost_user_fs"

// Accelerators that hypervisor.accelerator accepts. AcceleratorAuto means KVM where it runs a
// guest, else TCG.
const (
	AcceleratorAuto = "auto"
	AcceleratorKVM  = "kvm"
	AcceleratorTCG  = "tcg"
)

// Config is the whole file.
type Config struct {
	Sandbox    Sandbox
	Hypervisor Hypervisor

	// Notes are what an administrator should be told though the daemon can go on, one line each.
	Notes []string
}

// Sandbox is the table [sandbox].
type Sandbox struct {
	// LogLevel is trace, debug, info, warn or error.
	LogLevel string
	// ISuladTaskAddress is the form of the task addresses that iSulad gets: one of the TaskAddress
	// constants.
	ISuladTaskAddress string
	// BootTimeoutInS is how many seconds a pod's machine may take to boot, up to 600; 0 means the
	// daemon's own limit, below the time-out of 10 s that clients have.
	BootTimeoutInS int
}

// The forms of an address of a pod's task API. TaskAddressAuto means by vsock in the form that the
// version of iSulad knows where host and guest have vsock, else the Unix socket.
const (
	TaskAddressAuto       = "auto"
	TaskAddressVsock      = "vsock"
	TaskAddressTTRPCVsock = "ttrpc+vsock"
	TaskAddressUnix       = "unix"
)

// What hypervisor.block_device_driver accepts.
const (
	BlockVirtioBlk  = "virtio-blk"
	BlockVirtioSCSI = "virtio-scsi"
)

// Hypervisor is the table [hypervisor].
type Hypervisor struct {
	// Path of StratoVirt or QEMU; which of them it is, the binary says itself.
	Path string
	// MachineType is the machine and its options as on the hypervisor's command line. It fits the
	// architecture of this host even when the file names the other one's machine.
	MachineType string
	KernelPath  string
	// Exactly one of ImagePath and InitrdPath is set.
	ImagePath  string
	InitrdPath string
	// Firmware is the image of the firmware, or empty for the driver's choice.
	Firmware string
	// KernelParams is appended to what the driver itself passes to the guest's kernel.
	KernelParams string
	// VCPUs of each pod, 1 to 64.
	VCPUs int
	// MemoryInMB of each pod, in MiB, at least 64.
	MemoryInMB int
	// MaxVCPUs and MaxMemoryInMB are the most that a pod gets by its resources or may ask for by its
	// annotations. 0 means what the host has.
	MaxVCPUs      int
	MaxMemoryInMB int
	// BlockDeviceDriver is BlockVirtioBlk or BlockVirtioSCSI.
	BlockDeviceDriver string
	Debug             bool
	EnableMemPrealloc bool
	// Accelerator is one of the Accelerator constants.
	Accelerator string
	Virtiofsd   Virtiofsd
}

// DefaultFirmware is where openEuler's package edk2-ovmf has the firmware of x86_64.
const DefaultFirmware = "/usr/share/edk2/ovmf/OVMF_CODE.fd"

// Machine is the machine type without its options.
func (h Hypervisor) Machine() string {
	name, _, _ := strings.Cut(strings.TrimPrefix(h.MachineType, "type="), ",")
	return name
}

// StratoVirtFirmware is the firmware of StratoVirt's machine: the configured one, or for q35, which does not
// boot without, the usual one, which the guide's file does not name.
func (h Hypervisor) StratoVirtFirmware() string {
	if h.Firmware == "" && h.Machine() == "q35" {
		return DefaultFirmware
	}
	return h.Firmware
}

// Virtiofsd is the table [hypervisor.virtiofsd_conf].
type Virtiofsd struct {
	// Path of the virtiofs daemon, or empty to search for one.
	Path string
}

// The bounds of numbers beside the guest's own.
const (
	maxMemoryMiB = 512 << 10
	// maxBootTimeout is beyond the time-outs of all clients, in seconds.
	maxBootTimeout = 600
	// maxKernelParams leaves room for the driver's own within the 2048 bytes that x86 keeps.
	maxKernelParams = 1536
)

// machineNames is what the guide calls the machine of each architecture.
var machineNames = map[string]string{"amd64": "q35", "arm64": "virt"}

// Default is the configuration of an empty file on this architecture.
func Default() *Config { return defaults(runtime.GOARCH) }

func defaults(arch string) *Config {
	machine := machineNames[arch]
	if machine == "" {
		machine = "virt"
	}
	return &Config{
		Sandbox: Sandbox{LogLevel: "info", ISuladTaskAddress: TaskAddressAuto},
		Hypervisor: Hypervisor{
			Path:              "/usr/bin/stratovirt",
			MachineType:       machine + ",mem-share=on",
			KernelPath:        "/var/lib/kuasar/vmlinux.bin",
			InitrdPath:        "/var/lib/kuasar/kuasar.initrd",
			KernelParams:      "task.log_level=debug task.sharefs_type=virtiofs",
			VCPUs:             1,
			MemoryInMB:        1024,
			BlockDeviceDriver: BlockVirtioBlk,
			Accelerator:       AcceleratorAuto,
			Virtiofsd:         Virtiofsd{Path: DefaultVirtiofsd},
		},
	}
}

// Load reads and validates a file. It looks at nothing but that file: see Check.
func Load(path string) (*Config, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cannot read the configuration %s: it does not exist; install the package kuasar, which puts one at %s, or name another with --config: %w",
			path, DefaultPath, err)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the configuration: %w", err)
	}
	cfg, err := parse(string(text), runtime.GOARCH)
	if err != nil {
		return nil, fmt.Errorf("cannot use the configuration %s: %w", path, err)
	}
	return cfg, nil
}

// validate checks what a type alone does not say, and fits the machine to arch. wrong makes the error of
// a key.
func (c *Config) validate(arch string, wrong func(key, msg string) error) error {
	var errs []error
	bad := func(key, format string, args ...any) {
		errs = append(errs, wrong(key, fmt.Sprintf(format, args...)))
	}
	oneOf := func(key, value string, allowed ...string) {
		for _, a := range allowed {
			if value == a {
				return
			}
		}
		msg := fmt.Sprintf("%q is none of %s", value, strings.Join(allowed, ", "))
		if near := nearest(value, allowed); near != "" {
			msg += fmt.Sprintf("; did you mean %q?", near)
		}
		bad(key, "%s", msg)
	}

	oneOf("sandbox.log_level", c.Sandbox.LogLevel, "trace", "debug", "info", "warn", "error")
	h := &c.Hypervisor
	oneOf("hypervisor.accelerator", h.Accelerator, AcceleratorAuto, AcceleratorKVM, AcceleratorTCG)
	oneOf("sandbox.isulad_task_address", c.Sandbox.ISuladTaskAddress, TaskAddressAuto, TaskAddressVsock, TaskAddressTTRPCVsock, TaskAddressUnix)
	if ours, known := blockDeviceDrivers[h.BlockDeviceDriver]; known {
		h.BlockDeviceDriver = ours
	}
	if h.BlockDeviceDriver == virtioMMIO {
		h.BlockDeviceDriver = BlockVirtioBlk
		c.Notes = append(c.Notes, fmt.Sprintf("hypervisor.block_device_driver = %q names a bus, which the machine type decides; using %q", virtioMMIO, BlockVirtioBlk))
	}
	oneOf("hypervisor.block_device_driver", h.BlockDeviceDriver, BlockVirtioBlk, BlockVirtioSCSI)

	if s := c.Sandbox.BootTimeoutInS; s < 0 || s > maxBootTimeout {
		bad("sandbox.boot_timeout_in_s", "%d s is not within 0 and %d", s, maxBootTimeout)
	}
	if h.VCPUs < 1 || h.VCPUs > protocol.MaxVCPUs {
		bad("hypervisor.vcpus", "%d is not within 1 and %d", h.VCPUs, protocol.MaxVCPUs)
	}
	if h.MemoryInMB < protocol.MinMemoryMiB || h.MemoryInMB > maxMemoryMiB {
		bad("hypervisor.memory_in_mb", "%d MiB is not within %d and %d", h.MemoryInMB, protocol.MinMemoryMiB, maxMemoryMiB)
	}
	if h.MaxVCPUs != 0 && (h.MaxVCPUs < h.VCPUs || h.MaxVCPUs > protocol.MaxVCPUs) {
		bad("hypervisor.max_vcpus", "%d is neither 0 nor within hypervisor.vcpus = %d and %d", h.MaxVCPUs, h.VCPUs, protocol.MaxVCPUs)
	}
	if h.MaxMemoryInMB != 0 && (h.MaxMemoryInMB < h.MemoryInMB || h.MaxMemoryInMB > maxMemoryMiB) {
		bad("hypervisor.max_memory_in_mb", "%d MiB is neither 0 nor within hypervisor.memory_in_mb = %d and %d", h.MaxMemoryInMB, h.MemoryInMB, maxMemoryMiB)
	}
	if len(h.KernelParams) > maxKernelParams {
		bad("hypervisor.kernel_params", "%d bytes are more than %d", len(h.KernelParams), maxKernelParams)
	}
	if strings.ContainsAny(h.KernelParams, "\n\r\x00") {
		bad("hypervisor.kernel_params", "it must be one line")
	}

	for _, p := range []struct {
		key, value string
		required   bool
	}{
		{"hypervisor.path", h.Path, true},
		{"hypervisor.kernel_path", h.KernelPath, true},
		{"hypervisor.image_path", h.ImagePath, false},
		{"hypervisor.initrd_path", h.InitrdPath, false},
		{"hypervisor.firmware", h.Firmware, false},
		{"hypervisor.virtiofsd_conf.path", h.Virtiofsd.Path, false},
	} {
		switch {
		case p.value == "" && p.required:
			bad(p.key, "it is empty, but a path is needed")
		case p.value != "" && !filepath.IsAbs(p.value):
			bad(p.key, "%q is not an absolute path", p.value)
		case strings.ContainsAny(p.value, ",\n\x00"):
			// A comma separates options on the command lines of both hypervisors.
			bad(p.key, "%q has a comma or a control character, which the hypervisor's command line cannot carry", p.value)
		}
	}
	switch {
	case h.ImagePath != "" && h.InitrdPath != "":
		bad("hypervisor.image_path", "hypervisor.initrd_path is set as well (%s); the guest boots from one of them, so empty the other", h.InitrdPath)
	case h.ImagePath == "" && h.InitrdPath == "":
		bad("hypervisor.initrd_path", "neither it nor hypervisor.image_path is set; the guest boots from one of them")
	}

	c.fitMachine(guestArch(h.Path, arch), bad)
	return errors.Join(errs...)
}

// guestArch is the architecture of the guests on a host of architecture arch: its own, unless the
// hypervisor is QEMU for the other, which emulates that.
func guestArch(hypervisor, arch string) string {
	switch filepath.Base(hypervisor) {
	case "qemu-system-x86_64":
		return "amd64"
	case "qemu-system-aarch64":
		return "arm64"
	}
	return arch
}

// fitMachine checks machine_type and replaces the machine of the other architecture by this one's:
// the guide prints one file for both and leaves the difference to a comment.
func (c *Config) fitMachine(arch string, bad func(key, format string, args ...any)) {
	const key = "hypervisor.machine_type"
	name, options, _ := strings.Cut(c.Hypervisor.MachineType, ",")
	if name == "" {
		bad(key, "it is empty, but a machine is needed (%s here)", machineNames[arch])
		return
	}
	if strings.ContainsAny(c.Hypervisor.MachineType, " \t\n\x00") {
		bad(key, "%q has a blank in it", c.Hypervisor.MachineType)
		return
	}
	if options != "" {
		for o := range strings.SplitSeq(options, ",") {
			if k, v, ok := strings.Cut(o, "="); !ok || k == "" || v == "" {
				bad(key, "%q is not an option in the form key=value", o)
				return
			}
		}
	}
	here, known := machineNames[arch]
	if !known || name == here {
		return
	}
	if strings.HasPrefix(filepath.Base(c.Hypervisor.Path), "qemu") && name == "pc" && here == "q35" {
		// What Kuasar's own file for QEMU names. Its PCI has no slots that a disk can be plugged into.
		fitted := here + strings.TrimPrefix(c.Hypervisor.MachineType, name)
		c.Notes = append(c.Notes, fmt.Sprintf("%s = %q is not supported; using %q", key, c.Hypervisor.MachineType, fitted))
		c.Hypervisor.MachineType = fitted
		return
	}
	for other, machine := range machineNames {
		if other != arch && machine == name {
			fitted := here + strings.TrimPrefix(c.Hypervisor.MachineType, name)
			c.Notes = append(c.Notes, fmt.Sprintf("%s = %q is for another architecture; using %q", key, c.Hypervisor.MachineType, fitted))
			c.Hypervisor.MachineType = fitted
			return
		}
	}
}

// Check reports every path of c that is missing or not usable, with the key, the path and the
// package that mends it.
func (c *Config) Check() error {
	h := &c.Hypervisor
	var errs []error
	bad := func(key, path, install string, err error) {
		errs = append(errs, fmt.Errorf("cannot use %s = %q: %w; %s", key, path, cause(err), install))
	}
	if err := executable(h.Path); err != nil {
		bad("hypervisor.path", h.Path, hypervisorPackage(h.Path), err)
	}
	const packaged = "it comes with the package kuasar (dnf install kuasar), or is built by `go tool mage build`"
	for _, p := range []struct{ key, path, from string }{
		{"hypervisor.kernel_path", h.KernelPath, packaged},
		{"hypervisor.initrd_path", h.InitrdPath, packaged},
		{"hypervisor.image_path", h.ImagePath, "it is built by `go tool mage image`"},
	} {
		if p.path == "" {
			continue
		}
		if err := readable(p.path); err != nil {
			bad(p.key, p.path, p.from, err)
		}
	}
	if h.Firmware != "" {
		if err := readable(h.Firmware); err != nil {
			bad("hypervisor.firmware", h.Firmware, "install it (dnf install edk2-ovmf; on aarch64 edk2-aarch64; apt-get install ovmf), or set it to \"\"", err)
		}
	}
	if p := h.Virtiofsd.Path; p != "" && p != DefaultVirtiofsd {
		if err := executable(p); err != nil {
			bad("hypervisor.virtiofsd_conf.path", p,
				"install it (dnf install virtiofsd; apt-get install virtiofsd, in Debian 12 qemu-system-common), or set it to \"\" to search for one", err)
		}
	}
	return errors.Join(errs...)
}

func hypervisorPackage(path string) string {
	switch base := filepath.Base(path); {
	case strings.Contains(base, "aarch64"):
		return "install QEMU (dnf install qemu-system-aarch64; apt-get install qemu-system-arm)"
	case strings.HasPrefix(base, "qemu"):
		return "install QEMU (dnf install qemu-system-x86_64; apt-get install qemu-system-x86)"
	default:
		return "install StratoVirt (dnf install stratovirt), or name QEMU here (dnf install qemu-system-x86_64; apt-get install qemu-system-x86)"
	}
}

// cause strips the path that an *fs.PathError repeats.
func cause(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	var ee *exec.Error
	if errors.As(err, &ee) {
		return cause(ee.Err)
	}
	return err
}

func executable(path string) error {
	_, err := exec.LookPath(path)
	return err
}

func readable(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.IsDir() {
		return errors.New("it is a directory")
	}
	if info.Mode().IsRegular() && info.Size() == 0 {
		return errors.New("it is an empty file")
	}
	return nil
}
