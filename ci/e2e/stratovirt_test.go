package e2e

import (
	osexec "os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"kuasar.io/kuasar/ci/e2e/node"
)

// A pod whose machine is StratoVirt's: the command line, the monitor, the console, the slots and the
// share are, as far as a stand-in can refuse what the real one refuses. Its guests boot on QEMU.
func TestStratoVirt(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("the machine is q35")
	}
	ctx := begin(t)
	dir := t.TempDir()
	program := filepath.Join(dir, "stratovirt-2.4.0")
	build := osexec.Command("go", "build", "-o", program, "./sandboxer/vm/vmtest/stratovirt")
	build.Dir = config.Root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	s := startFaulty(ctx, t, node.Settings{
		"path":         strconv.Quote(program),
		"machine_type": strconv.Quote("q35"),
		// The shipped file has no firmware, which is checked to be there and then left to QEMU.
		"accelerator": strconv.Quote("tcg") + "\nfirmware = " + strconv.Quote(config.Kernel),
	})
	p := runPod(ctx, t, podConfig(t), node.HandlerFaulty)
	_, commandLine, err := s.VMM(p.id)
	if err != nil {
		t.Fatal(err)
	}
	if commandLine[0] != program || !slices.Contains(commandLine, "sandbox-"+p.id) || !strings.Contains(strings.Join(commandLine, " "), "vhost-user-fs-pci") {
		t.Errorf("the virtual machine is %s", strings.Join(commandLine, " "))
	}
	id := useVolumes(ctx, t, p)
	if got := exec(ctx, t, id, "sh", "-c", "cat /proc/cmdline; ls /sys/bus/pci/devices | wc -l"); !strings.Contains(got, "pcie_ports=native") || !strings.Contains(got, "task.transport=serial") {
		t.Errorf("the guest was started with %q", got)
	}
}
