package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/ci/e2e/node"
)

// TestImage runs pods whose root is a disk instead of an initrd.
func TestImage(t *testing.T) {
	for _, fs := range []string{"erofs", "ext4"} {
		t.Run(fs, func(t *testing.T) {
			ctx := begin(t)
			path := filepath.Join(config.Root, "out", "kuasar-"+fs+".img")
			before, err := os.ReadFile(path)
			if err != nil {
				t.Skipf("%v; build it with \"IMAGE=%s go tool mage image\", as \"go tool mage test\" does", err, fs)
			}
			withImage := startFaulty(ctx, t, node.Settings{"image_path": strconv.Quote(path), "initrd_path": `""`})
			p := runPod(ctx, t, podConfig(t), node.HandlerFaulty)
			_, commandLine, err := withImage.VMM(p.id)
			if err != nil {
				t.Fatal(err)
			}
			if args := strings.Join(commandLine, " "); strings.Contains(args, "-initrd") || !strings.Contains(args, path) {
				t.Errorf("the command line: %s", args)
			}

			// The guest's own root is the disk, which nobody can write to, while what the agent makes is in memory.
			got, err := withImage.Console(ctx, p.id, "cat /proc/mounts; cat /sys/block/vda/ro; cat /etc/resolv.conf /etc/hosts; free -m")
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range []string{" / " + fs + " ro,", "tmpfs /run tmpfs rw,", "tmpfs /tmp tmpfs rw,", "\n1\n", "nameserver", "localhost"} {
				if !strings.Contains(got, want) {
					t.Errorf("the guest lacks %q:\n%s", want, got)
				}
			}
			// A shell that knows no redirection of errors tells them on the console's stream.
			if got, err := withImage.Console(ctx, p.id, "touch /etc/x || echo refused; touch /tmp/x && echo written"); err != nil ||
				!strings.Contains(got, "refused") || !strings.Contains(got, "written") {
				t.Errorf("writing in the guest: %q, %v", got, err)
			}

			// Containers leave that root, have theirs, volumes, a tty and limits.
			id := useVolumes(ctx, t, p)
			if got := exec(ctx, t, id, "sh", "-c", "echo x > /written && cat /written && ls /init 2>&1 || true"); !strings.HasPrefix(got, "x\n") || !strings.Contains(got, "No such file") {
				t.Errorf("in the container: %q", got)
			}
			limited := container("exec dd if=/dev/zero of=/dev/null bs=100M count=1")
			limited.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 32 << 20}
			if status, err := bed.CRI.WaitExited(ctx, p.start(ctx, t, limited)); err != nil || status.Reason != "OOMKilled" {
				t.Errorf("beyond the limit: %v, %v", status, err)
			}
			if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
				t.Errorf("the image has changed: %v", err)
			}
		})
	}
}

// TestSizeByAnnotation: a pod chooses its machine's size, and nothing else.
func TestSizeByAnnotation(t *testing.T) {
	ctx := begin(t)
	podConfig := podConfig(t)
	podConfig.Annotations = map[string]string{"io.kuasar.hypervisor.memory_in_mb": "300", "io.kuasar.hypervisor.vcpus": "1"}
	p := runPod(ctx, t, podConfig, node.Handler)
	_, commandLine, err := sandboxer.VMM(p.id)
	if err != nil {
		t.Fatal(err)
	}
	if args := strings.Join(commandLine, " "); !strings.Contains(args, "-smp 1 -m 300M") {
		t.Errorf("the command line: %s", args)
	}
	refused := newPodConfig("refused", t.TempDir())
	refused.Annotations = map[string]string{"io.kuasar.hypervisor.kernel_params": "init=/bin/sh"}
	if id, err := bed.CRI.RunPod(ctx, refused, node.Handler); err == nil {
		t.Error("a pod with another annotation runs")
		if err := bed.CRI.RemovePod(ctx, id); err != nil {
			t.Error(err)
		}
	} else if !strings.Contains(err.Error(), "io.kuasar.hypervisor.kernel_params") {
		t.Errorf("the error does not name the annotation: %v", err)
	}
}
