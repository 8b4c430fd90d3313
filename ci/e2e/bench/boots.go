package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// ready is the line on the guest's console by which the agent says that it is up. Debian's kernel
// has its virtio drivers in modules, which the initrd has not, so its agent cannot reach the host:
// the line is as far as both kernels come.
const ready = "agent ready"

// boots compares the guest kernel with Debian's kernel for clouds: the same initrd, machine and
// arguments.
func (m *measurer) boots(ctx context.Context, r *report) error {
	cloud, err := cloudKernel(ctx)
	if err != nil {
		r.add(row{Measure: "boot against Debian's cloud kernel", Unit: "×", Detail: "not compared: " + err.Error()})
		return nil
	}
	var ours, theirs, ratio []float64
	for range runs {
		own, err := m.bootOnce(ctx, m.config.Kernel)
		if err != nil {
			return fmt.Errorf("with %s: %w", m.config.Kernel, err)
		}
		other, err := m.bootOnce(ctx, cloud)
		if err != nil {
			return fmt.Errorf("with %s: %w", cloud, err)
		}
		ours, theirs, ratio = append(ours, own), append(theirs, other), append(ratio, own/other)
	}
	r.add(row{Measure: "boot to the agent's line, against Debian's cloud kernel", Unit: "×", Result: median(ratio), Limit: 0.55,
		Samples: map[string][]float64{"ours ms": ours, "debian ms": theirs, "ratio": ratio},
		Detail:  fmt.Sprintf("%.0f ms, Debian's %s %.0f ms", median(ours), filepath.Base(cloud), median(theirs))})
	return nil
}

// bootOnce starts a machine as the sandboxer does and returns the milliseconds from the exec of the
// hypervisor to the agent's line.
func (m *measurer) bootOnce(ctx context.Context, kernel string) (float64, error) {
	dir, err := os.MkdirTemp(m.node.Dir, "boot")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	args := []string{
		"-accel", m.option("-accel"), "-cpu", m.option("-cpu"), "-smp", m.option("-smp"), "-m", m.option("-m"), "-M", "q35",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-kernel", kernel, "-initrd", m.config.Initrd, "-append", m.option("-append"),
		"-device", "virtio-serial-pci", "-chardev", "socket,id=agent,server=on,wait=off,path=" + filepath.Join(dir, "agent"),
		"-device", "virtserialport,chardev=agent,name=kuasar.agent.0",
		"-fsdev", "local,id=share,security_model=none,path=" + dir, "-device", "virtio-9p-pci,fsdev=share,mount_tag=kuasar",
	}
	cmd := exec.CommandContext(ctx, m.commandLine[0], args...)
	var errors strings.Builder
	cmd.Stderr = &errors
	output, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	defer func() {
		cancel()
		cmd.Wait()
	}()
	var console []string
	lines := bufio.NewScanner(output)
	for lines.Scan() {
		if strings.Contains(lines.Text(), ready) {
			return milliseconds(time.Since(began)), nil
		}
		console = append(console, lines.Text())
	}
	return 0, fmt.Errorf("the console ends without %q: %s\n%s", ready, strings.Join(console[max(0, len(console)-15):], "\n"), errors.String())
}

// cloudKernel returns the bzImage of Debian's current kernel for clouds, from the cache or from
// Debian's archive by way of apt-get.
func cloudKernel(ctx context.Context) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	depends, err := exec.CommandContext(ctx, "apt-cache", "depends", "linux-image-cloud-amd64").Output()
	if err != nil {
		return "", fmt.Errorf("apt-cache does not know linux-image-cloud-amd64: %w", err)
	}
	name := ""
	for line := range strings.Lines(string(depends)) {
		if found, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: linux-image-"); ok {
			name = "linux-image-" + found
		}
	}
	if name == "" {
		return "", errors.New("linux-image-cloud-amd64 depends on no kernel")
	}
	target := filepath.Join(cache, "kuasar", "debian", strings.Replace(name, "linux-image-", "vmlinuz-", 1))
	if _, err := os.Stat(target); err == nil {
		return target, nil
	}
	fmt.Printf("   downloading %s from Debian's archive, to compare with\n", name)
	dir, err := os.MkdirTemp("", "kuasar-kernel")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	download := exec.CommandContext(ctx, "apt-get", "download", name)
	download.Dir = dir
	if output, err := download.CombinedOutput(); err != nil {
		return "", fmt.Errorf("apt-get download %s: %w: %s", name, err, output)
	}
	packages, _ := filepath.Glob(filepath.Join(dir, "*.deb"))
	if len(packages) != 1 {
		return "", fmt.Errorf("apt-get download %s left %q", name, packages)
	}
	if output, err := exec.CommandContext(ctx, "dpkg", "-x", packages[0], dir).CombinedOutput(); err != nil {
		return "", fmt.Errorf("dpkg -x %s: %w: %s", packages[0], err, output)
	}
	return target, copyFile(filepath.Join(dir, "boot", filepath.Base(target)), target)
}

// copyFile makes target appear whole or not at all.
func copyFile(source, target string) error {
	in, err := os.Open(source)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	out, err := os.CreateTemp(filepath.Dir(target), ".copy")
	if err != nil {
		return err
	}
	defer os.Remove(out.Name())
	if _, err := io.Copy(out, in); err != nil {
		return errors.Join(err, out.Close())
	}
	if err := out.Close(); err != nil {
		return err
	}
	return os.Rename(out.Name(), target)
}
