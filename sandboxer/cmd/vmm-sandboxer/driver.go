package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/config"
	"kuasar.io/kuasar/sandboxer/pod"
	"kuasar.io/kuasar/sandboxer/storage"
	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/disk"
	"kuasar.io/kuasar/sandboxer/vm/qemu"
	"kuasar.io/kuasar/sandboxer/vm/stratovirt"
)

// How files get into a guest, as values of protocol.ParamShareType.
const (
	virtiofs = "virtiofs"
	nineP    = "9p"
)

// shareType returns what the kernel's parameters ask for, or empty. As for the guest, the last one
// counts.
func shareType(params string) (string, error) {
	asked, given := "", false
	for param := range strings.FieldsSeq(params) {
		if value, found := strings.CutPrefix(param, protocol.ParamShareType+"="); found {
			asked, given = value, true
		}
	}
	if !given || asked == virtiofs || asked == nineP {
		return asked, nil
	}
	return "", fmt.Errorf("hypervisor.kernel_params: %s=%s: want %s or %s", protocol.ParamShareType, asked, virtiofs, nineP)
}

// newDriver chooses the driver by what the hypervisor's binary says of itself.
func newDriver(cfg *config.Config, dir string, log *slog.Logger) (vm.Driver, error) {
	h := cfg.Hypervisor
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	said, err := askHypervisor(ctx, h.Path)
	var driver vm.Driver
	switch {
	case stratovirt.IsStratoVirt(said):
		driver, err = newStratoVirt(h, log)
	case strings.Contains(strings.ToLower(said), "qemu"):
		driver, err = newQEMU(h, dir, log)
	case err != nil:
		return nil, fmt.Errorf("hypervisor.path = %q: cannot ask it for its version: %w (it said %.200q)", h.Path, err, said)
	default:
		return nil, fmt.Errorf("hypervisor.path = %q says of itself %.200q; StratoVirt or QEMU is expected", h.Path, said)
	}
	if err != nil {
		return nil, fmt.Errorf("hypervisor.path = %q (%.100s): %w", h.Path, said, err)
	}
	if h.ImagePath != "" {
		// So that a wrong image is told now and not by every pod.
		if _, err := disk.Filesystem(h.ImagePath); err != nil {
			return nil, fmt.Errorf("hypervisor.image_path: %w", err)
		}
	}
	return driver, nil
}

// askHypervisor returns the first line of what a program says of itself. QEMU knows -version as well as
// StratoVirt, which refuses the usual --version.
func askHypervisor(ctx context.Context, path string) (string, error) {
	cmd := exec.CommandContext(ctx, path, "-version")
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	first, _, _ := strings.Cut(string(bytes.TrimSpace(out)), "\n")
	if err == nil && (stratovirt.IsStratoVirt(first) || strings.Contains(strings.ToLower(first), "qemu")) {
		return first, nil
	}
	// What else a StratoVirt can be asked.
	if said, serr := stratovirt.Version(ctx, path); serr == nil && stratovirt.IsStratoVirt(said) {
		return said, nil
	}
	return first, err
}

func newQEMU(h config.Hypervisor, dir string, log *slog.Logger) (vm.Driver, error) {
	machine, options, _ := strings.Cut(h.MachineType, ",")
	if options != "" && options != "mem-share=on" {
		log.Warn("QEMU gets no options of the machine", "key", "hypervisor.machine_type", "ignored", options)
	}
	return orNil[vm.Driver](qemu.New(qemu.Config{
		Path: h.Path, MachineType: machine, Accelerator: h.Accelerator, BlockDeviceDriver: h.BlockDeviceDriver,
		Kernel: h.KernelPath, Firmware: h.Firmware, ProbeCache: filepath.Join(dir, ".kvm"), VhostNet: qemu.VhostNet, Debug: h.Debug, Log: log,
	}))
}

func newStratoVirt(h config.Hypervisor, log *slog.Logger) (vm.Driver, error) {
	firmware := h.StratoVirtFirmware()
	if firmware != "" {
		if _, err := os.Stat(firmware); err != nil {
			return nil, fmt.Errorf("the machine %s needs a firmware: %w; install edk2-ovmf, or name another as hypervisor.firmware", h.MachineType, err)
		}
	}
	d, err := stratovirt.New(stratovirt.Config{
		Path: h.Path, MachineType: h.MachineType, Accelerator: h.Accelerator, BlockDeviceDriver: h.BlockDeviceDriver,
		Firmware: firmware, Debug: h.Debug, Log: log,
	})
	if err != nil {
		return nil, err
	}
	if err := unix.Access(pod.VsockDevice, unix.R_OK|unix.W_OK); err != nil {
		if serr := d.CheckSerial(); serr != nil {
			return nil, fmt.Errorf("%w (%s: %w)", serr, pod.VsockDevice, err)
		}
	}
	// It cannot export a directory by itself.
	share, err := shareType(h.KernelParams)
	if err != nil {
		return nil, err
	}
	if share == nineP {
		return nil, fmt.Errorf("hypervisor.kernel_params: %s=%s: StratoVirt has no 9p; remove it, and a virtiofs daemon is used", protocol.ParamShareType, nineP)
	}
	path, _, err := storage.FindVirtiofsd(h.Virtiofsd.Path)
	if err == nil && path == "" {
		err = fmt.Errorf("no virtiofs daemon is installed, by which alone StratoVirt's guests get their files; "+
			"install the package virtiofsd (hypervisor.virtiofsd_conf.path = %q does not exist)", h.Virtiofsd.Path)
	}
	if err != nil {
		return nil, err
	}
	return d, nil
}
