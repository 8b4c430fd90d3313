package scenario

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/ci/e2e/isulad"
)

// BadInput tells the sandboxer what it must refuse, or bear. Whatever it is told, containers of this
// pod and of others go on.
func BadInput(ctx context.Context, t *testing.T, n *Node, v isulad.Version) {
	h := begin(ctx, t, n, v)
	p := h.run(nil)
	bystander := p.start("exec sleep 1000")
	unharmed := func(t *testing.T) {
		t.Helper()
		bystander.with(t).sh("true")
	}
	refused := func(t *testing.T, err error, reasons ...string) {
		t.Helper()
		if err == nil {
			t.Error("it is accepted")
			return
		}
		for _, reason := range reasons {
			if strings.Contains(err.Error(), reason) {
				t.Log(err)
				return
			}
		}
		t.Errorf("the error says none of %q: %v", reasons, err)
	}
	scratch := filepath.Join(n.Dir, "bad")
	if err := os.MkdirAll(scratch, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(scratch)
	file := filepath.Join(scratch, "file")
	if err := os.WriteFile(file, []byte("no root file system"), 0o644); err != nil {
		t.Fatal(err)
	}

	if v.Generation() == isulad.GenB {
		const stale = `{"tasks":[{"task_id":%q,"spec":{},"rootfs":[]}]}`
		for name, bad := range map[string]struct {
			list    string
			reasons []string
		}{
			"truncated": {`{"tasks":[{"task_id":"abc","spec":{"process"`, []string{"cannot decode the JSON"}},
			// The limits of the list and of a message are about the same.
			"large":         {`{"tasks":[],"x":"` + strings.Repeat("y", 32<<20) + `"}`, []string{"more than", "larger than max"}},
			"huge":          {`{"tasks":[],"x":"` + strings.Repeat("y", 33<<20) + `"}`, []string{"more than", "larger than max"}},
			"deeply nested": {`{"tasks":` + strings.Repeat("[", 100000) + strings.Repeat("]", 100000) + `}`, []string{"nests deeper"}},
			"a bad id":      {fmt.Sprintf(stale, "../../etc"), []string{"task_id"}},
			"twice":         {`{"tasks":[{"task_id":"a"},{"task_id":"a"}]}`, []string{"listed twice"}},
			"not a list":    {`{"tasks":7}`, []string{"not an array"}},
		} {
			t.Run("list of tasks: "+name, func(t *testing.T) {
				refused(t, h.Announce(p.id, []byte(bad.list)), bad.reasons...)
				unharmed(t)
			})
		}
		t.Run("list of tasks of an unknown pod", func(t *testing.T) {
			refused(t, h.Announce(isulad.NewID(), fmt.Appendf(nil, stale, "abc")), "not found", "NotFound", "no pod", "unknown")
			if err := h.Announce(isulad.NewID(), []byte(`{"tasks":[]}`)); err != nil {
				t.Errorf("an unknown pod has nothing to withdraw, but: %v", err)
			}
		})
	} else {
		t.Run("purge of what is not known", func(t *testing.T) {
			for _, id := range []string{p.id, isulad.NewID()} {
				if err := h.Purge(id, isulad.NewID(), ""); err != nil {
					t.Error(err)
				}
				if err := h.Purge(id, isulad.NewID(), isulad.NewID()); err != nil {
					t.Error(err)
				}
			}
			unharmed(t)
		})
	}

	// Root file systems.
	link := filepath.Join(scratch, "link")
	if err := os.Symlink("/", link); err != nil {
		t.Fatal(err)
	}
	device := filepath.Join(scratch, "device")
	if err := unix.Mknod(device, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))); err != nil {
		t.Fatal(err)
	}
	for name, rootfs := range map[string]string{
		"a file":             file,
		"nothing":            filepath.Join(scratch, "none"),
		"a relative path":    "relative/path",
		"a path with ..":     filepath.Join(scratch) + "/../bad/../..",
		"a symlink to /":     link,
		"a character device": device,
	} {
		t.Run("root file system: "+name, func(t *testing.T) {
			c := bystander.with(t).create("true", func(spec *isulad.SpecConfig, c *isulad.Container) { spec.RootFS, c.RootFS = rootfs, rootfs })
			refused(t, h.StartContainer(c.id), "rootfs", "root file system", "root filesystem")
			unharmed(t)
		})
	}

	t.Run("root file system: a block device that is mounted on the host", func(t *testing.T) {
		device := mountedDevice(t, scratch)
		c := bystander.with(t).create("true", func(spec *isulad.SpecConfig, c *isulad.Container) { spec.RootFS, c.RootFS = device, device })
		refused(t, h.StartContainer(c.id), "mounted on the host")
		unharmed(t)
	})

	// Specs.
	for name, edit := range map[string]func(map[string]any){
		"no process":           func(spec map[string]any) { delete(spec, "process") },
		"a mount of nothing":   func(spec map[string]any) { addMount(spec, "/x", filepath.Join(scratch, "none")) },
		"a device of the host": func(spec map[string]any) { addDevice(spec) },
		"5 MiB": func(spec map[string]any) {
			spec["annotations"].(map[string]string)["large"] = strings.Repeat("x", 5<<20)
		},
	} {
		t.Run("spec with "+name, func(t *testing.T) {
			c := bystander.with(t).create("true", func(spec *isulad.SpecConfig, _ *isulad.Container) { spec.Edit = edit })
			if err := h.StartContainer(c.id); err == nil {
				t.Error("it is accepted")
			} else {
				t.Logf("%.300s", err)
			}
			unharmed(t)
		})
	}

	// Logs.
	fifo := filepath.Join(scratch, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(scratch, "target")
	symlink := filepath.Join(scratch, "symlink.log")
	if err := os.Symlink(target, symlink); err != nil {
		t.Fatal(err)
	}
	for name, log := range map[string]string{
		"in no directory": filepath.Join(scratch, "none", "c.log"), "a FIFO": fifo, "a symlink": symlink, "a relative path": "c.log",
	} {
		t.Run("log that is "+name, func(t *testing.T) {
			c := bystander.with(t).create("echo text; exit 9", func(spec *isulad.SpecConfig, _ *isulad.Container) { spec.LogFile = log })
			// To refuse the container or to run it without a log are both right; to hang is not.
			if err := h.StartContainer(c.id); err != nil {
				t.Log(err)
			} else if code, err := h.WaitContainer(ctx, c.id); err != nil || code != 9 {
				t.Errorf("the container ends with %d, %v", code, err)
			}
			unharmed(t)
		})
	}
	if _, err := os.Stat(target); err == nil {
		t.Error("a log was written through a symlink")
	}

	// Streams of processes: FIFOs that nobody opens, and what is none.
	for name, out := range map[string]string{
		"a FIFO that nobody reads": fifo, "a file": file, "nothing": filepath.Join(scratch, "none"), "with NUL": "/a\x00b",
		"an unknown scheme": "carrier+pigeon://7", "vsock of the host": "vsock://2:22",
	} {
		t.Run("process whose stdout is "+name, func(t *testing.T) {
			ended := make(chan error, 1)
			go func() {
				code, err := h.Exec(bystander.id, isulad.ExecConfig{Args: []string{"/bin/sh", "-c", "echo text; exit 6"}, Names: &[3]string{"", out, ""}})
				if err == nil && code != 6 {
					err = fmt.Errorf("it ended with %d", code)
				}
				ended <- err
			}()
			select {
			case err := <-ended:
				t.Log(err)
			case <-time.After(time.Minute):
				t.Error("the process neither fails nor ends")
			}
			unharmed(t)
		})
	}
	if content, err := os.ReadFile(file); err != nil || !bytes.Equal(content, []byte("no root file system")) {
		t.Errorf("a file of the host was written to: %q, %v", content, err)
	}
	p.state(isulad.Running)
	bystander.sh("true")
}

func addMount(spec map[string]any, to, from string) {
	spec["mounts"] = append(spec["mounts"].([]map[string]any), map[string]any{
		"destination": to, "type": "bind", "source": from, "options": []string{"rbind"},
	})
}

func addDevice(spec map[string]any) {
	linux := spec["linux"].(map[string]any)
	linux["devices"] = append(linux["devices"].([]map[string]any), map[string]any{
		"path": "/dev/sda", "type": "b", "major": 8, "minor": 0,
	})
}

// mountedDevice returns a block device whose file system is mounted in dir until the test ends.
func mountedDevice(t *testing.T, dir string) string {
	t.Helper()
	file, point := filepath.Join(dir, "disk"), filepath.Join(dir, "mounted")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, 16<<20); err != nil {
		t.Fatal(err)
	}
	if err := run("mke2fs", "-q", "-F", "-t", "ext4", file); err != nil {
		t.Skip(err)
	}
	output, err := exec.Command("losetup", "--find", "--show", file).Output()
	if err != nil {
		t.Skip("this machine gives out no loop devices: ", err)
	}
	device := strings.TrimSpace(string(output))
	t.Cleanup(func() {
		if err := run("losetup", "--detach", device); err != nil {
			t.Error(err)
		}
	})
	if err := os.Mkdir(point, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(device, point, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unmount(point); err != nil {
			t.Error(err)
		}
	})
	return device
}
