package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"kuasar.io/kuasar/sandboxer/vm/kvm"
	"kuasar.io/kuasar/sandboxer/vm/process"
)

const (
	// probeTimeout bounds the boot that shows whether KVM runs a guest. The outcome is kept until the
	// host boots again, so one that is only busy, or emulated itself, must not be taken for one without.
	probeTimeout = 10 * time.Second
)

// openKVM checks that the device is KVM's and may be used.
func openKVM() error {
	f, err := kvm.Open()
	if err != nil {
		return err
	}
	return f.Close()
}

// probe is the kept outcome of a probe, and what it was about.
type probe struct {
	BootID       string
	QEMU, Kernel fileIdentity
	KVM          bool
	Reason       string
}

type fileIdentity struct {
	Path    string
	Size    int64
	ModTime time.Time
}

func identify(path string) fileIdentity {
	id := fileIdentity{Path: path}
	if fi, err := os.Stat(path); err == nil {
		id.Size, id.ModTime = fi.Size(), fi.ModTime().UTC()
	}
	return id
}

// probeKVM finds out whether KVM runs kernel. That /dev/kvm opens proves nothing: nested hosts offer
// it and then stop at the guest's first instruction.
func (d *Driver) probeKVM(kernel, cache string) bool {
	log := d.log.With("device", kvm.Device, "kernel", kernel)
	if err := openKVM(); err != nil {
		log.Info("KVM is not available; guests run on QEMU's emulation (TCG), which is slower", "reason", err)
		return false
	}
	if kernel == "" {
		log.Info("KVM cannot be tried without a kernel; guests run on QEMU's emulation (TCG)")
		return false
	}
	bootID, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	now := probe{BootID: strings.TrimSpace(string(bootID)), QEMU: identify(d.path), Kernel: identify(kernel)}
	if cache != "" {
		var kept probe
		b, err := os.ReadFile(cache)
		if err == nil && json.Unmarshal(b, &kept) == nil {
			now.KVM, now.Reason = kept.KVM, kept.Reason
			if now == kept {
				log.Info("KVM was tried since the host booted", "works", kept.KVM, "reason", kept.Reason)
				return kept.KVM
			}
		}
	}
	if err := d.tryKVM(kernel); err != nil {
		now.KVM, now.Reason = false, err.Error()
		log.Warn("KVM opens but runs no guest; guests run on QEMU's emulation (TCG), which is slower", "reason", err)
	} else {
		now.KVM, now.Reason = true, "it booted the kernel"
		log.Info("KVM boots the kernel")
	}
	if cache != "" {
		if err := writeProbe(cache, now); err != nil {
			log.Warn("the outcome of trying KVM is not kept", "error", err)
		}
	}
	return now.KVM
}

func writeProbe(path string, p probe) error {
	b, err := json.Marshal(p)
	if err != nil {
		return err
	}
	return process.WriteFile(path, append(b, '\n'))
}

// tryKVM boots kernel on KVM, without anything else, until it says its first words.
func (d *Driver) tryKVM(kernel string) error {
	ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
	defer cancel()
	console, serial := "ttyS0", "serial,ttyS0"
	if d.machineType == "virt" {
		console, serial = "ttyAMA0", "pl011,0x9000000"
	}
	cmd := exec.CommandContext(ctx, d.path, "-name", "kvm-probe", "-machine", d.machineType,
		"-accel", "kvm", "-cpu", "host", "-m", "128M", "-nodefaults", "-no-user-config", "-display", "none",
		"-no-reboot", "-kernel", kernel, "-serial", "stdio",
		"-append", fmt.Sprintf("console=%s earlyprintk=%s earlycon=%s panic=-1", console, serial, strings.TrimPrefix(serial, "serial,")))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.WaitDelay = time.Second
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	lived := firstWords(stdout)
	timedOut := ctx.Err() != nil
	cancel()
	io.Copy(io.Discard, stdout)
	err = cmd.Wait()
	switch {
	case lived:
		return nil
	case timedOut:
		return fmt.Errorf("the kernel said nothing within %v", probeTimeout)
	case stderr.Len() > 0:
		return errors.New(firstLine(stderr.Bytes()))
	default:
		return fmt.Errorf("QEMU ended before the kernel said anything: %v", err)
	}
}

// firstWords reads until the kernel's banner has come, or the end.
func firstWords(r io.Reader) bool {
	var seen []byte
	buf := make([]byte, 4096)
	for len(seen) < 64<<10 {
		n, err := r.Read(buf)
		seen = append(seen, buf[:n]...)
		if bytes.Contains(seen, []byte("Linux version")) {
			return true
		}
		if err != nil {
			break
		}
	}
	return false
}
