package e2e

import (
	"os"
	osexec "os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/ci/e2e/node"
)

// The kernel, the initrd and the agent that are built for aarch64 run a pod, emulated. The daemon
// and all around it are this machine's own. On an aarch64 machine every other test does the same.
func TestAarch64(t *testing.T) {
	if runtime.GOARCH == "arm64" {
		t.Skip("this machine is aarch64 itself, as all tests have it")
	}
	ctx := begin(t)
	qemu, err := osexec.LookPath("qemu-system-aarch64")
	if err != nil {
		t.Skipf("%v; install it (apt-get install qemu-system-arm)", err)
	}
	out := filepath.Join(config.Root, "out", "aarch64")
	for _, name := range []string{"vmlinux.bin", "kuasar.initrd", "bin/vmm-sandboxer"} {
		if _, err := os.Stat(filepath.Join(out, name)); err != nil {
			t.Skipf("%v; build it with \"ARCH=aarch64 go tool mage build\", as \"go tool mage test\" does", err)
		}
	}
	emulated := startFaulty(ctx, t, node.Settings{
		"path":         strconv.Quote(qemu),
		"machine_type": strconv.Quote("virt"),
		"accelerator":  strconv.Quote("tcg"),
		"kernel_path":  strconv.Quote(filepath.Join(out, "vmlinux.bin")),
		"initrd_path":  strconv.Quote(filepath.Join(out, "kuasar.initrd")),
	})
	p := runPod(ctx, t, podConfig(t), node.HandlerFaulty)

	got, err := emulated.Console(ctx, p.id, "uname -a")
	if err != nil || !strings.Contains(got, "aarch64") || !strings.Contains(got, "-kuasar") {
		t.Errorf("the guest says of itself %q, %v", got, err)
	}

	// A program of the guest's architecture. The image is made of this machine's busybox, so the
	// program comes in a volume, where the daemon's own is as good as any.
	host := t.TempDir()
	if data, err := os.ReadFile(filepath.Join(out, "bin", "vmm-sandboxer")); err != nil {
		t.Fatal(err)
	} else if err := os.WriteFile(filepath.Join(host, "program"), data, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		args         []string
		code         int32
		stream, text string
	}{
		"works": {[]string{"--version"}, 0, "stdout", "vmm-sandboxer"},
		"fails": {[]string{"--config", "/no/such/file"}, 1, "stderr", "/no/such/file"},
	} {
		t.Run(name, func(t *testing.T) {
			config := container("")
			config.Command = append([]string{"/mnt/program"}, test.args...)
			config.Mounts = []*runtimeapi.Mount{{HostPath: host, ContainerPath: "/mnt", Readonly: true}}
			status, err := bed.CRI.WaitExited(ctx, p.start(ctx, t, config))
			if err != nil {
				t.Fatal(err)
			}
			if status.ExitCode != test.code {
				t.Errorf("the exit code is %d, not %d", status.ExitCode, test.code)
			}
			if got := p.log(t, config, test.stream); !strings.Contains(got, test.text) {
				t.Errorf("it wrote %q to its %s", got, test.stream)
			}
		})
	}
}
