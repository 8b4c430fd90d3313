package machine

import (
	"cmp"
	"context"
	"crypto/sha256"
	_ "embed"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"

	"kuasar.io/kuasar/ci/e2e/cache"
)

// suite of Debian: of the distributions that this can make from a plain directory, the one whose
// dnf, rpm, systemd and QEMU are nearest in age to openEuler's.
const suite = "bookworm"

// recipe is what happens to the root file system after debootstrap; it runs in it.
//
//go:embed recipe.sh
var recipe string

// packages of the root file system, with what they depend on and nothing that they recommend.
// qemu-system-x86 and -arm bring the virtiofs daemon along.
func packages() []string {
	list := []string{
		"systemd", "systemd-sysv", "dbus", "rpm", "dnf", "ca-certificates",
		"procps", "iproute2", "iptables", "kmod",
	}
	if runtime.GOARCH == "arm64" {
		return append(list, "qemu-system-arm")
	}
	return append(list, "qemu-system-x86")
}

// Rootfs returns the directory of the machines' root file system. It lies in the user's cache and
// is named by what it is made of, so that a second call is quick; a first one needs root,
// debootstrap, a Debian mirror and some minutes, and says so on progress. Nobody may write to it.
func Rootfs(ctx context.Context, progress io.Writer) (string, error) {
	list := strings.Join(packages(), ",")
	sum := sha256.New()
	fmt.Fprintln(sum, suite, runtime.GOARCH, list, recipe)
	dir, err := cache.Directory("rootfs", sum.Sum(nil)[:8], func(partial string) error {
		fmt.Fprintln(progress, "making the root file system of the machine with systemd (once, two to three minutes)")
		for _, command := range [][]string{
			append([]string{"debootstrap", "--variant=minbase", "--include=" + list, suite, partial}, mirror()...),
			{"chroot", partial, "/bin/sh", "-ec", recipe},
		} {
			cmd := exec.CommandContext(ctx, command[0], command[1:]...)
			cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
			if output, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("%s: %w\n%s", command[0], err, last(string(output), 2000))
			}
		}
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("cannot make the root file system: %w", err)
	}
	return dir, nil
}

// mirror is the one that this machine itself installs from, if it is a Debian. Without one,
// debootstrap takes its own.
func mirror() []string {
	files, _ := filepath.Glob("/etc/apt/sources.list.d/*")
	for _, file := range append(files, "/etc/apt/sources.list") {
		text, _ := os.ReadFile(file)
		if found := regexp.MustCompile(`(?m)^[^#\n]*?(https?://\S+/debian/?)(\s|$)`).FindSubmatch(text); found != nil {
			return []string{string(found[1])}
		}
	}
	return nil
}

// last returns the end of a text.
func last(text string, most int) string {
	text = strings.TrimSpace(text)
	return cmp.Or(text[max(0, len(text)-most):], "it said nothing")
}
