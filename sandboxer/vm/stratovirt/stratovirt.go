// Package stratovirt runs virtual machines on StratoVirt 2.2 to 2.5, which needs KVM. It implements the
// contract of package vm.
//
// What differs from QEMU's driver, because the hypervisors do: without a vsock the guest is reached only from
// 2.3 on, and not on microvm; the share is a virtiofs daemon only (Share.Socket, which must listen before Start);
// StratoVirt binds its sockets itself; a guest that reboots would be booted anew, so a RESET is taken
// for the end; and what is plugged in is remembered by the driver, in a file beside the sockets, as
// StratoVirt cannot be asked.
//
// It is tested against the stand-in of package vmtest, which is written from StratoVirt's sources; no
// real StratoVirt was run.
package stratovirt

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/disk"
	"kuasar.io/kuasar/sandboxer/vm/kvm"
	"kuasar.io/kuasar/sandboxer/vm/machine"
	"kuasar.io/kuasar/sandboxer/vm/process"
	"kuasar.io/kuasar/sandboxer/vm/qmp"
)

// Config is what a Driver needs to know of the host.
type Config struct {
	// Path of the program; empty means stratovirt, searched in PATH.
	Path string
	// MachineType is virt, q35 or microvm, with StratoVirt's options after commas as in
	// "virt,mem-share=on". Empty means the usual one of this host's architecture.
	MachineType string
	// Firmware is an OVMF_CODE.fd, which q35 cannot boot without; virt may have one, microvm may not.
	Firmware string
	// Accelerator is kvm or auto (also when empty): StratoVirt has nothing but KVM. A program that says
	// "(tcg)" of itself after its version may be given tcg.
	Accelerator string
	// BlockDeviceDriver is virtio-blk (also when empty): no version plugs another kind into a running
	// machine that a container could use.
	BlockDeviceDriver string
	// Debug lets the guest kernel talk: without it, the kernel is started with "quiet".
	Debug bool
	Log   *slog.Logger
	// CheckKVM says whether KVM runs guests; nil means kvm.Check.
	CheckKVM func() error
}

// version is a release of StratoVirt. They differ in what they accept.
type version struct{ major, minor int }

func (v version) String() string { return fmt.Sprintf("%d.%d", v.major, v.minor) }

// atLeast says whether it is the release major.minor or a later one.
func (v version) atLeast(major, minor int) bool {
	return v.major > major || v.major == major && v.minor >= minor
}

// Driver makes StratoVirt machines.
type Driver struct {
	path        string
	release     string // as it says, such as 2.3.0
	version     version
	machineType string
	options     []string // of -machine
	firmware    string
	debug       bool
	log         *slog.Logger
}

// versionRE is what -version says; the greeting of the monitor says StratoVirt-2.3.0.
var versionRE = regexp.MustCompile(`(?i)^stratovirt[ -]v?((\d+)\.(\d+)\S*)(.*)`)

const versionTimeout = 10 * time.Second

// New finds out what the program at cfg.Path is and whether KVM works. Its errors say what to install or
// to change.
func New(cfg Config) (*Driver, error) {
	d := &Driver{path: cfg.Path, firmware: cfg.Firmware, debug: cfg.Debug, log: cfg.Log}
	if d.log == nil {
		d.log = slog.Default()
	}
	if d.path == "" {
		path, err := exec.LookPath("stratovirt")
		if err != nil {
			return nil, fmt.Errorf("cannot find StratoVirt: %w; install the package stratovirt, or set hypervisor.path", err)
		}
		d.path = path
	}
	if err := d.setMachine(cfg.MachineType); err != nil {
		return nil, err
	}
	switch cfg.BlockDeviceDriver {
	case "", "virtio-blk":
	case "virtio-scsi":
		return nil, errors.New("hypervisor.block_device_driver = \"virtio-scsi\": no StratoVirt plugs a SCSI disk into a running machine; set virtio-blk, or use QEMU")
	default:
		return nil, fmt.Errorf("hypervisor.block_device_driver = %q: StratoVirt has virtio-blk", cfg.BlockDeviceDriver)
	}
	ctx, cancel := context.WithTimeout(context.Background(), versionTimeout)
	defer cancel()
	said, err := Version(ctx, d.path)
	if err != nil {
		return nil, err
	}
	if err := d.setVersion(said); err != nil {
		return nil, err
	}
	switch cfg.Accelerator {
	case "", "auto", "kvm":
		check := cfg.CheckKVM
		if check == nil {
			check = kvm.Check
		}
		if err := check(); err != nil {
			return nil, fmt.Errorf("cannot use StratoVirt, which needs KVM: %w; or use QEMU, which can do without: "+
				"install it and start the daemon with --config /var/lib/kuasar/config_qemu.toml", err)
		}
	case "tcg":
		if !Emulates(said) {
			return nil, fmt.Errorf("hypervisor.accelerator = \"tcg\": %s is StratoVirt %s, which needs KVM; set auto, or use QEMU: "+
				"install it and start the daemon with --config /var/lib/kuasar/config_qemu.toml", d.path, d.release)
		}
	default:
		return nil, fmt.Errorf("unknown accelerator %q: for StratoVirt it is auto or kvm", cfg.Accelerator)
	}
	return d, nil
}

// Emulates says whether a StratoVirt that says this of itself has an emulation where others need KVM.
func Emulates(said string) bool {
	m := versionRE.FindStringSubmatch(said)
	return m != nil && strings.Contains(m[4], "(tcg)")
}

// IsStratoVirt says whether a program that says this of itself is one.
func IsStratoVirt(said string) bool { return versionRE.MatchString(said) }

// Version asks the program at path what it is, by its option -version (it refuses the usual --version),
// and if that tells nothing usable by the greeting of its monitor. The answer is as StratoVirt has it,
// such as "StratoVirt 2.3.0"; the program may be another one.
func Version(ctx context.Context, path string) (string, error) {
	cmd := exec.CommandContext(ctx, path, "-version")
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	first := firstLine(out)
	if err == nil && versionRE.MatchString(first) {
		return first, nil
	}
	if said := askMonitor(ctx, path); said != "" {
		return said, nil
	}
	if err != nil {
		var ee *exec.ExitError
		if errors.As(err, &ee) && len(ee.Stderr) > 0 {
			err = fmt.Errorf("%w: %s", err, firstLine(ee.Stderr))
		}
		return "", fmt.Errorf("cannot run %s -version: %w", path, err)
	}
	return first, nil
}

// greetTimeout bounds the start of a StratoVirt without a machine.
const greetTimeout = 3 * time.Second

// askMonitor starts a StratoVirt that makes no machine and returns what its monitor's greeting says of it,
// or "".
func askMonitor(ctx context.Context, path string) string {
	dir, err := os.MkdirTemp("", "kuasar-version-")
	if err != nil {
		return ""
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(ctx, greetTimeout)
	defer cancel()
	socket := filepath.Join(dir, "qmp")
	cmd := exec.CommandContext(ctx, path, "-name", "version", "-machine", "none",
		"-qmp", "unix:"+socket+",server,nowait", "-chardev", "socket,id=x,path="+filepath.Join(dir, "x")+",server,nowait")
	cmd.WaitDelay = time.Second
	if cmd.Start() != nil {
		return ""
	}
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		cmd.Wait()
	}()
	defer func() { cancel(); <-exited }()
	conn, err := dialWhenBound(ctx, socket, exited)
	if err != nil {
		return ""
	}
	client, err := qmp.New(ctx, conn, nil)
	if err != nil {
		return ""
	}
	defer client.Close()
	return client.Package()
}

// setVersion understands what StratoVirt says of itself.
func (d *Driver) setVersion(said string) error {
	m := versionRE.FindStringSubmatch(said)
	if m == nil {
		return fmt.Errorf("%s is no StratoVirt: it says %q of itself", d.path, firstLine([]byte(said)))
	}
	major, _ := strconv.Atoi(m[2])
	minor, _ := strconv.Atoi(m[3])
	d.release, d.version = m[1], version{major, minor}
	if !d.version.atLeast(2, 2) {
		return fmt.Errorf("%s is StratoVirt %s; at least 2.2 is needed", d.path, d.release)
	}
	if d.version.atLeast(2, 6) {
		d.log.Warn("this StratoVirt is newer than the driver; it is treated as 2.5", "version", d.release)
	}
	return nil
}

// machineOptions are those of -machine that may be configured, and their values.
var machineOptions = map[string][]string{
	"accel":           {"kvm"},
	"usb":             {"off"},
	"dump-guest-core": {"on", "off"},
	"mem-share":       {"on", "off"},
	"gic-version":     {"3"},
}

func (d *Driver) setMachine(configured string) error {
	if configured == "" {
		configured = map[string]string{"amd64": "q35", "arm64": "virt"}[runtime.GOARCH]
	}
	parts := strings.Split(configured, ",")
	d.machineType, d.options = strings.TrimPrefix(parts[0], "type="), parts[1:]
	switch d.machineType {
	case "q35":
		if d.firmware == "" {
			return errors.New("the machine type q35 does not boot without a firmware; install edk2-ovmf and set hypervisor.firmware to its OVMF_CODE.fd")
		}
	case "virt":
	case "microvm":
		if d.firmware != "" {
			return errors.New("the machine type microvm takes no firmware; remove hypervisor.firmware")
		}
	default:
		return fmt.Errorf("cannot use the machine type %q: only virt (aarch64), q35 (x86_64) and microvm are known", d.machineType)
	}
	for _, o := range d.options {
		key, value, _ := strings.Cut(o, "=")
		if !slices.Contains(machineOptions[key], value) {
			return fmt.Errorf("cannot use the machine type %q: StratoVirt has no option %q", configured, o)
		}
	}
	if d.firmware != "" {
		return checkPath("the firmware (hypervisor.firmware)", d.firmware)
	}
	return nil
}

// Name is the hypervisor and its version, such as "StratoVirt 2.3.0 (virt)".
func (d *Driver) Name() string { return fmt.Sprintf("StratoVirt %s (%s)", d.release, d.machineType) }

// Create checks a spec; see vm.Driver.
func (d *Driver) Create(spec vm.Spec) (vm.Machine, error) {
	m := newMachine(d, spec)
	err := d.checkSpec(spec)
	if err == nil && spec.Image != "" {
		m.rootFSType, err = disk.Filesystem(spec.Image)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot make a virtual machine for pod %s: %w", spec.PodID, err)
	}
	return m, nil
}

// What StratoVirt takes.
const (
	maxVCPUs      = 254
	minMemory     = 128       // MiB
	maxMemory     = 512 << 10 // MiB
	maxParamValue = 255       // bytes of one kernel parameter's value
	maxNICs       = 8
	maxMMIONICs   = 2 // microvm's replaceable ones, and there are no others
)

func (d *Driver) checkSpec(s vm.Spec) error {
	switch {
	case s.VCPUs < 1 || s.VCPUs > maxVCPUs:
		return fmt.Errorf("%d virtual CPUs; it must be 1 to %d", s.VCPUs, maxVCPUs)
	case s.MemoryMiB < minMemory || s.MemoryMiB > maxMemory:
		return fmt.Errorf("%d MiB of memory; it must be %d to %d", s.MemoryMiB, minMemory, maxMemory)
	case s.Initrd != "" && s.Image != "":
		return errors.New("either an initrd or an image must be configured (hypervisor.initrd_path, hypervisor.image_path)")
	case s.Share.Socket == "" && s.Share.Dir != "":
		return errors.New("StratoVirt shares directories by a virtiofs daemon only; install virtiofsd and set hypervisor.virtiofsd_conf.path, or use QEMU")
	}
	if s.Vsock == nil {
		if err := d.CheckSerial(); err != nil {
			return err
		}
	}
	for what, path := range map[string]string{
		"the state directory (--dir)":         s.Dir,
		"the kernel (hypervisor.kernel_path)": s.Kernel,
		"the initrd (hypervisor.initrd_path)": s.Initrd,
		"the image (hypervisor.image_path)":   s.Image,
		"the virtiofs daemon's socket":        s.Share.Socket,
	} {
		if path != "" {
			if err := checkPath(what, path); err != nil {
				return err
			}
		}
	}
	limit := maxNICs
	if d.microvm() {
		limit = maxMMIONICs
	}
	if len(s.NICs) > limit {
		return fmt.Errorf("%d network interfaces; %s has room for %d", len(s.NICs), d.machineType, limit)
	}
	for _, p := range s.KernelParams {
		for _, word := range strings.Fields(p) {
			if _, value, _ := strings.Cut(word, "="); len(value) > maxParamValue {
				return fmt.Errorf("the value of the kernel parameter %.40q is longer than %d bytes", word, maxParamValue)
			}
		}
	}
	return machine.CheckSpec(s)
}

// CheckSerial says whether guests can be reached where the host has no vsock, by a virtio-serial port.
func (d *Driver) CheckSerial() error {
	if d.microvm() || !d.version.atLeast(2, 3) {
		return fmt.Errorf("the guests of StratoVirt %s (%s) are reached by vsock only; load the module vhost_vsock on this host, or use QEMU", d.release, d.machineType)
	}
	return nil
}

// checkPath refuses what StratoVirt's options cannot express: it has no escapes.
func checkPath(what, path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("the path %q of %s is not absolute", path, what)
	}
	if strings.ContainsAny(path, ",=\n\x00") {
		return fmt.Errorf("the path %q of %s has a comma, an equals sign or a line break, which StratoVirt cannot be told; use another path", path, what)
	}
	if len(path) > 255 {
		return fmt.Errorf("the path %.40q… of %s is longer than 255 bytes", path, what)
	}
	return nil
}

func (d *Driver) microvm() bool { return d.machineType == "microvm" }

func firstLine(b []byte) string {
	line, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
	return process.Printable([]byte(line), 200)
}
