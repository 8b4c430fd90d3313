package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/config"
	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/qemu"
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

// newDriver chooses the driver by what the hypervisor's binary says of itself. Another hypervisor
// is another case here.
func newDriver(cfg *config.Config, dir string, log *slog.Logger) (vm.Driver, error) {
	h := cfg.Hypervisor
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, h.Path, "--version").CombinedOutput()
	first, _, _ := strings.Cut(string(bytes.TrimSpace(out)), "\n")
	switch lower := strings.ToLower(first); {
	case strings.Contains(lower, "stratovirt"):
		return nil, fmt.Errorf("hypervisor.path = %q is StratoVirt (%s), and this build of vmm-sandboxer drives QEMU only: "+
			"name a QEMU there, such as /usr/bin/qemu-system-x86_64", h.Path, first)
	case strings.Contains(lower, "qemu"):
		machine, options, _ := strings.Cut(h.MachineType, ",")
		if options != "" && options != "mem-share=on" {
			log.Warn("QEMU gets no options of the machine", "key", "hypervisor.machine_type", "ignored", options)
		}
		return qemu.New(qemu.Config{
			Path: h.Path, MachineType: machine, Accelerator: h.Accelerator,
			Kernel: h.KernelPath, ProbeCache: filepath.Join(dir, ".kvm"), Debug: h.Debug, Log: log,
		})
	case err != nil:
		return nil, fmt.Errorf("hypervisor.path = %q: cannot ask it for its version: %w (it said %.200q)", h.Path, err, first)
	default:
		return nil, fmt.Errorf("hypervisor.path = %q says of itself %.200q; QEMU is expected", h.Path, first)
	}
}
