package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/ci/e2e/node"
)

func TestVolumes(t *testing.T) {
	ctx := begin(t)
	useVolumes(ctx, t, runPod(ctx, t, podConfig(t), node.Handler))
}

// Where there is no virtiofs daemon, or 9p is asked for, the hypervisor itself serves the files.
func TestShareBy9p(t *testing.T) {
	ctx := begin(t)
	by9p := startFaulty(ctx, t, node.Settings{
		"kernel_params": strconv.Quote("task.log_level=debug task.sharefs_type=virtiofs task.debug task.sharefs_type=9p"),
	})
	p := runPod(ctx, t, podConfig(t), node.HandlerFaulty)
	_, commandLine, err := by9p.VMM(p.id)
	if err != nil {
		t.Fatal(err)
	}
	if args := strings.Join(commandLine, " "); !strings.Contains(args, "virtio-9p-pci") || strings.Contains(args, "vhost-user-fs") {
		t.Errorf("the virtual machine's share is not 9p: %s", args)
	}
	id := useVolumes(ctx, t, p)
	mounts := exec(ctx, t, id, "cat", "/proc/mounts")
	for _, path := range []string{"/", "/mnt/dir", "/etc/a.conf", "/mnt/secret"} {
		if !strings.Contains(mounts, " "+path+" 9p ") {
			t.Errorf("%s is no 9p mount:\n%s", path, mounts)
		}
	}
	t.Run("root file system", func(t *testing.T) {
		// More than a message of 9p holds, appended to, renamed and removed.
		got := exec(ctx, t, id, "sh", "-c", `head -c 1000000 /dev/urandom > /big && cat /big > /copy && cmp /big /copy &&
			echo end >> /copy && mv /copy /moved && wc -c < /moved && chmod 640 /moved && stat -c %a /moved && rm /big /moved && ls /moved 2>&1`+" || true")
		if !strings.HasPrefix(got, "1000004\n640\n") || !strings.Contains(got, "No such file") {
			t.Errorf("it says %q", got)
		}
	})
}

// useVolumes runs a container with a directory, a single file and a read-only directory, uses them,
// and returns its id.
func useVolumes(ctx context.Context, t *testing.T, p *pod) string {
	t.Helper()
	host := t.TempDir()
	for name, text := range map[string]string{"dir/inside": "in the directory\n", "file": "a file\n", "secret/key": "a key\n"} {
		path := filepath.Join(host, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	config := container("sleep 1000")
	config.Mounts = []*runtimeapi.Mount{
		{HostPath: filepath.Join(host, "dir"), ContainerPath: "/mnt/dir"},
		{HostPath: filepath.Join(host, "file"), ContainerPath: "/etc/a.conf"},
		{HostPath: filepath.Join(host, "secret"), ContainerPath: "/mnt/secret", Readonly: true},
	}
	id := p.start(ctx, t, config)

	t.Run("directory", func(t *testing.T) {
		if got := exec(ctx, t, id, "cat", "/mnt/dir/inside"); got != "in the directory\n" {
			t.Errorf("the file holds %q", got)
		}
		exec(ctx, t, id, "sh", "-c", "echo from the pod > /mnt/dir/new && mkdir /mnt/dir/made && ln -s inside /mnt/dir/link")
		if data, err := os.ReadFile(filepath.Join(host, "dir", "new")); err != nil || string(data) != "from the pod\n" {
			t.Errorf("the host reads %q, %v", data, err)
		}
		if err := os.WriteFile(filepath.Join(host, "dir", "later"), []byte("from the host\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		eventually(ctx, t, "the container sees what the host adds", func() bool {
			result, err := bed.CRI.Exec(ctx, id, "cat", "/mnt/dir/later")
			return err == nil && result.Stdout == "from the host\n"
		})
	})
	t.Run("single file", func(t *testing.T) {
		if got := exec(ctx, t, id, "cat", "/etc/a.conf"); got != "a file\n" {
			t.Errorf("the file holds %q", got)
		}
		exec(ctx, t, id, "sh", "-c", "echo changed > /etc/a.conf")
		if data, err := os.ReadFile(filepath.Join(host, "file")); err != nil || string(data) != "changed\n" {
			t.Errorf("the host reads %q, %v", data, err)
		}
	})
	t.Run("read-only", func(t *testing.T) {
		if got := exec(ctx, t, id, "cat", "/mnt/secret/key"); got != "a key\n" {
			t.Errorf("the file holds %q", got)
		}
		for _, script := range []string{"echo x > /mnt/secret/key", "touch /mnt/secret/new", "rm /mnt/secret/key"} {
			result, err := bed.CRI.Exec(ctx, id, "sh", "-c", script)
			if err != nil || result.ExitCode == 0 || !strings.Contains(result.Stderr, "Read-only file system") {
				t.Errorf("%q: %+v, %v", script, result, err)
			}
		}
	})
	return id
}

// The guest's root is hostile: what it plants in the parts of the share that it can write to, and
// tries to plant in those that it cannot, must not lead the host anywhere.
func TestLinksPlantedInTheShare(t *testing.T) {
	ctx := begin(t)
	host := t.TempDir()
	victim := filepath.Join(host, "victim")
	if err := os.WriteFile(victim, []byte("untouched\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	volume := filepath.Join(host, "volume")
	if err := os.Mkdir(volume, 0o755); err != nil {
		t.Fatal(err)
	}
	p := runPod(ctx, t, podConfig(t), node.Handler)
	first := container("sleep 1000")
	first.Mounts = []*runtimeapi.Mount{{HostPath: volume, ContainerPath: "/mnt/volume"}}
	firstID := p.start(ctx, t, first)

	// At the top of the share, where the host makes the directories of the next container.
	const share = "/run/kuasar/state"
	output, err := sandboxer.Console(ctx, p.id, "ls "+share)
	if err != nil || !strings.Contains(output, firstID) {
		t.Fatalf("the guest does not see the first container in %s: %q, %v", share, output, err)
	}
	for _, attack := range []string{"ln -s " + host + " " + share + "/planted", "mkdir " + share + "/planted", "ln -s " + host + " " + share + "/" + firstID + "/planted"} {
		if output, err := sandboxer.Console(ctx, p.id, attack); err != nil {
			t.Fatalf("%v: %q", err, output)
		}
	}
	output, err = sandboxer.Console(ctx, p.id, "ls "+share+" "+share+"/"+firstID)
	if err != nil || strings.Contains(output, "planted") {
		t.Errorf("the guest can write where the host does: %q, %v", output, err)
	}

	// In what the container can write to: links where mounts of the host's will be.
	exec(ctx, t, firstID, "sh", "-c", "rm -rf /mnt/volume/sub /etc; ln -s "+host+" /mnt/volume/sub; ln -s "+host+" /etc; ln -s ../../../../../../../../"+victim+" /tmp/victim")
	second := container("echo overwritten > /mnt/sub/victim; sleep 1000")
	second.Mounts = []*runtimeapi.Mount{{HostPath: volume, ContainerPath: "/mnt/volume"}}
	p.start(ctx, t, second)
	if _, err := bed.CRI.Runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: firstID}); err != nil {
		t.Error(err)
	}
	if _, err := bed.CRI.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: firstID}); err != nil {
		t.Error(err)
	}
	if data, err := os.ReadFile(victim); err != nil || string(data) != "untouched\n" {
		t.Errorf("the host's file holds %q, %v", data, err)
	}
	if entries, err := os.ReadDir(host); err != nil || len(entries) != 2 {
		t.Errorf("the host's directory holds %v, %v", entries, err)
	}
}
