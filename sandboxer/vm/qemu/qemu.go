// Package qemu runs virtual machines on QEMU: with KVM where it truly runs a guest, else on QEMU's
// own emulation (TCG). It implements the contract of package vm.
package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"

	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/disk"
	"kuasar.io/kuasar/sandboxer/vm/machine"
	"kuasar.io/kuasar/sandboxer/vm/process"
)

// VhostNet is the device of the host's kernel that moves frames between taps and guests.
const VhostNet = "/dev/vhost-net"

// Config is what a Driver needs to know of the host.
type Config struct {
	// Path of the QEMU program, such as /usr/bin/qemu-system-x86_64. Empty means the usual one of
	// this host's architecture, searched in PATH.
	Path string
	// MachineType is q35 or virt; empty means the usual one of the architecture.
	MachineType string
	// Accelerator is kvm, tcg, or auto (also when empty): KVM if it runs the kernel, else TCG.
	Accelerator string
	// Kernel is booted once to find out whether KVM works. Without it, auto means TCG.
	Kernel string
	// Firmware is what QEMU takes with -bios; empty leaves it to QEMU, or to the quick one where that is there.
	Firmware string
	// ProbeCache is the file in which the outcome of that is kept until the host boots again or
	// QEMU or the kernel changes. Empty means it is not kept.
	ProbeCache string
	// VhostNet is where the host's VhostNet is. Empty, or where it cannot be opened when the driver is
	// made, QEMU moves the frames itself.
	VhostNet string
	// Debug lets the guest kernel talk: without it, the kernel is started with "quiet".
	Debug bool
	// BlockDeviceDriver is what hot-plugged disks are: virtio-blk (also when empty), each in a slot of its
	// own, or virtio-scsi, all on one controller.
	BlockDeviceDriver string
	Log               *slog.Logger
}

// Driver makes QEMU machines.
type Driver struct {
	path        string
	version     string
	machineType string
	kvm         bool
	tscKHz      int // of the host; 0 means unknown
	firmware    string
	qboot       bool // the quick firmware is there
	debug       bool
	scsi        bool // for hot-plugged disks
	vhostNet    string
	log         *slog.Logger
}

// Defaults of the architecture.
var (
	program        = map[string]string{"amd64": "qemu-system-x86_64", "arm64": "qemu-system-aarch64"}[runtime.GOARCH]
	defaultMachine = map[string]string{"amd64": "q35", "arm64": "virt"}[runtime.GOARCH]
	versionRE      = regexp.MustCompile(`^QEMU emulator version (\d+)\.(\d+)(\S*)`)
	minVersion     = 6 // the first with everything that the command line needs is 6.0
)

const versionTimeout = 10 * time.Second

// New finds out what the program at cfg.Path is and whether KVM works, which may take ten seconds
// the first time. Its errors say what to install or to change.
func New(cfg Config) (*Driver, error) {
	d := &Driver{path: cfg.Path, machineType: cfg.MachineType, firmware: cfg.Firmware, debug: cfg.Debug, log: cfg.Log}
	if d.log == nil {
		d.log = slog.Default()
	}
	if d.path == "" {
		if program == "" {
			return nil, fmt.Errorf("no QEMU is known for the architecture %s", runtime.GOARCH)
		}
		path, err := exec.LookPath(program)
		if err != nil {
			return nil, fmt.Errorf("cannot find QEMU: %w; install the package that has %s, or set hypervisor.path", err, program)
		}
		d.path = path
	}
	if d.machineType == "" {
		d.machineType = defaultMachine
		if strings.Contains(filepath.Base(d.path), "aarch64") {
			d.machineType = "virt"
		}
	}
	if d.machineType != "q35" && d.machineType != "virt" {
		return nil, fmt.Errorf("cannot use the machine type %q: only q35 (x86_64) and virt (aarch64) are known", d.machineType)
	}
	switch cfg.BlockDeviceDriver {
	case "", "virtio-blk":
	case "virtio-scsi":
		d.scsi = true
	default:
		return nil, fmt.Errorf("hypervisor.block_device_driver = %q: it is virtio-blk or virtio-scsi", cfg.BlockDeviceDriver)
	}
	if cfg.VhostNet != "" {
		if err := openable(cfg.VhostNet); err == nil {
			d.vhostNet = cfg.VhostNet
		} else {
			d.log.Info("QEMU moves the frames of pods itself, which costs some throughput; modprobe vhost_net", "error", err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), versionTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, d.path, "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("cannot run %s --version: %w%s", d.path, err, stderrOf(err))
	}
	m := versionRE.FindSubmatch(out)
	if m == nil {
		return nil, fmt.Errorf("%s is no QEMU: it says %q of itself", d.path, firstLine(out))
	}
	if major, _ := strconv.Atoi(string(m[1])); major < minVersion {
		return nil, fmt.Errorf("%s is QEMU %s.%s; at least %d.0 is needed", d.path, m[1], m[2], minVersion)
	}
	d.version = fmt.Sprintf("%s.%s%s", m[1], m[2], m[3])

	switch cfg.Accelerator {
	case "tcg":
	case "kvm":
		if err := openKVM(); err != nil {
			return nil, fmt.Errorf("cannot use KVM: %w; enable virtualization on this host, or set the accelerator to auto or tcg", err)
		}
		d.kvm = true
	case "", "auto":
		d.kvm = d.probeKVM(cfg.Kernel, cfg.ProbeCache)
	default:
		return nil, fmt.Errorf("unknown accelerator %q: it is auto, kvm or tcg", cfg.Accelerator)
	}
	if !d.kvm {
		d.tscKHz = measureTSC()
		d.qboot = d.hasFirmware(ctx, qbootROM)
	}
	return d, nil
}

// openVhostNets opens the device once for each of n NICs, or not at all. The caller closes the result
// when the process has its copies.
func (d *Driver) openVhostNets(n int) (vhostNets, error) {
	if d.vhostNet == "" {
		return nil, nil
	}
	var opened vhostNets
	for range n {
		f, err := os.OpenFile(d.vhostNet, os.O_RDWR, 0)
		if err != nil {
			opened.close()
			return nil, fmt.Errorf("cannot open what moves frames in the kernel (modprobe vhost_net): %w", err)
		}
		opened = append(opened, f)
	}
	return opened, nil
}

func openable(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// hasFirmware says whether QEMU finds a file among its firmware.
func (d *Driver) hasFirmware(ctx context.Context, name string) bool {
	dirs, err := exec.CommandContext(ctx, d.path, "-L", "help").Output()
	if err != nil {
		return false
	}
	for dir := range strings.Lines(string(dirs)) {
		if fi, err := os.Stat(filepath.Join(strings.TrimSpace(dir), name)); err == nil && fi.Mode().IsRegular() {
			return true
		}
	}
	return false
}

// Name is the hypervisor, its version and its accelerator, such as "QEMU 7.2.22 (tcg)".
func (d *Driver) Name() string { return fmt.Sprintf("QEMU %s (%s)", d.version, d.Accelerator()) }

// Accelerator is kvm or tcg.
func (d *Driver) Accelerator() string {
	if d.kvm {
		return "kvm"
	}
	return "tcg"
}

// Create checks a spec; see vm.Driver.
func (d *Driver) Create(spec vm.Spec) (vm.Machine, error) {
	m := newMachine(d, spec)
	err := checkSpec(spec)
	if err == nil && spec.Initrd == "" {
		m.rootFSType, err = disk.Filesystem(spec.Image)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot make a virtual machine for pod %s: %w", spec.PodID, err)
	}
	return m, nil
}

func checkSpec(s vm.Spec) error {
	switch {
	case s.VCPUs < 1 || s.VCPUs > 255:
		return fmt.Errorf("%d virtual CPUs; it must be 1 to 255", s.VCPUs)
	case s.MemoryMiB < 64:
		return fmt.Errorf("%d MiB of memory; it must be at least 64", s.MemoryMiB)
	}
	return machine.CheckSpec(s)
}

func firstLine(b []byte) string {
	line, _, _ := bytes.Cut(bytes.TrimSpace(b), []byte("\n"))
	return process.Printable(line, 200)
}

// stderrOf returns what a failed program said, as the end of a sentence.
func stderrOf(err error) string {
	var ee *exec.ExitError
	if errors.As(err, &ee) && len(ee.Stderr) > 0 {
		return ": " + firstLine(ee.Stderr)
	}
	return ""
}
