package nested

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"

	"kuasar.io/kuasar/ci/e2e/cache"
	"kuasar.io/kuasar/ci/e2e/machine"
)

// sources are what is put into the root file system, and the recipe that runs in it.
//
//go:embed root
var sources embed.FS

// What a node boots, in the directory that bootable returns.
const (
	kernelFile = "vmlinuz"
	initrdFile = "initrd.cpio"
	rootFile   = "root.ext4"
)

// bootable returns the directory of a node's kernel, initramfs and root disk. It lies in the user's
// cache and is named by what it is made of, so that a second call is quick; a first one needs root and
// a Debian mirror, and says so on progress. Nobody may write to it.
func bootable(ctx context.Context, progress io.Writer) (string, error) {
	base, err := machine.Rootfs(ctx, progress)
	if err != nil {
		return "", err
	}
	sum := sha256.New()
	fmt.Fprintln(sum, filepath.Base(base))
	err = fs.WalkDir(sources, ".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		text, err := sources.ReadFile(path)
		fmt.Fprintf(sum, "%s %d\n%s", path, len(text), text)
		return err
	})
	if err != nil {
		return "", err
	}
	dir, err := cache.Directory("node", sum.Sum(nil)[:8], func(partial string) error {
		fmt.Fprintln(progress, "making the disk of the node (once, a minute or two)")
		return makeBootable(ctx, base, partial)
	})
	if err != nil {
		return "", fmt.Errorf("cannot make the node's disk: %w", err)
	}
	return dir, nil
}

func makeBootable(ctx context.Context, base, dir string) error {
	root := filepath.Join(dir, "root")
	defer os.RemoveAll(root)
	if err := run(ctx, "cp", "--archive", "--reflink=auto", base, root); err != nil {
		return err
	}
	for _, unit := range []string{"node-alive.service", "node-scenarios.service"} {
		text, err := sources.ReadFile("root/" + unit)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(root, "etc/systemd/system", unit), text, 0o644); err != nil {
			return err
		}
	}
	// Names are looked up as this machine does it now, not when the base was made.
	if resolv, err := os.ReadFile("/etc/resolv.conf"); err == nil {
		if err := os.WriteFile(filepath.Join(root, "etc/resolv.conf"), resolv, 0o644); err != nil {
			return err
		}
	}
	recipe, err := sources.ReadFile("root/recipe.sh")
	if err != nil {
		return err
	}
	if err := run(ctx, "chroot", root, "/bin/sh", "-ec", string(recipe)); err != nil {
		return err
	}
	if err := run(ctx, "cp", filepath.Join(root, "boot", "vmlinuz"), filepath.Join(dir, kernelFile)); err != nil {
		return err
	}
	if err := makeInitrd(filepath.Join(root, "boot", "modules"), filepath.Join(dir, initrdFile)); err != nil {
		return err
	}
	// What nobody has written to takes no space in the file.
	return makeDisk(ctx, root, "root", filepath.Join(dir, rootFile), 3<<30)
}

// makeInitrd writes the initramfs: this machine's static busybox, the modules and the script.
func makeInitrd(modules, to string) error {
	init, err := sources.ReadFile("root/init.sh")
	if err != nil {
		return err
	}
	path, err := exec.LookPath("busybox")
	if err != nil {
		return fmt.Errorf("cannot make an initramfs: %w; install busybox (on Debian the package busybox-static)", err)
	}
	busybox, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	records := []cpio.Record{
		cpio.Directory("bin", 0o755), cpio.Directory("dev", 0o755), cpio.Directory("proc", 0o755),
		cpio.Directory("sys", 0o755), cpio.Directory("root", 0o755), cpio.Directory("modules", 0o755),
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.StaticFile("init", string(init), 0o755),
		cpio.StaticFile("bin/busybox", string(busybox), 0o755),
	}
	found, err := filepath.Glob(filepath.Join(modules, "*.ko"))
	if err != nil || len(found) == 0 {
		return fmt.Errorf("cannot make an initramfs: no modules in %s: %w", modules, err)
	}
	for _, module := range found {
		data, err := os.ReadFile(module)
		if err != nil {
			return err
		}
		records = append(records, cpio.StaticFile("modules/"+filepath.Base(module), string(data), 0o644))
	}
	var archive bytes.Buffer
	writer := cpio.Newc.Writer(&archive)
	if err := cpio.WriteRecords(writer, records); err != nil {
		return err
	}
	if err := cpio.WriteTrailer(writer); err != nil {
		return err
	}
	return os.WriteFile(to, archive.Bytes(), 0o644)
}

// makeDisk writes an ext4 file system with what is in a directory. Size is in bytes, and at least what
// the files need.
func makeDisk(ctx context.Context, from, label, to string, size int64) error {
	return run(ctx, "mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-L", label,
		"-d", from, to, strconv.FormatInt(size>>10, 10)+"k")
}

// run runs a program of this machine, and says what it said if it fails.
func run(ctx context.Context, command string, args ...string) error {
	cmd := exec.CommandContext(ctx, command, args...)
	cmd.Env = append(slices.Clip(os.Environ()), "LC_ALL=C", "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	output, err := cmd.CombinedOutput()
	if err != nil {
		said := strings.TrimSpace(string(output))
		return fmt.Errorf("%s: %w\n%s", command, err, said[max(0, len(said)-2000):])
	}
	return nil
}
