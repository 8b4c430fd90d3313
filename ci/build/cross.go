package build

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"kuasar.io/kuasar/ci/cache"
)

// crossC returns the environment in which cgo compiles and links for a with Debian's cross tools.
func (t Tree) crossC(ctx context.Context, a architecture) ([]string, error) {
	env := []string{"CC=" + a.gnu + "-gcc"}
	installed := filepath.Join("/usr/lib", a.gnu)
	if _, err := os.Stat(filepath.Join(installed, "libseccomp.a")); err == nil {
		return append(env, "PKG_CONFIG_LIBDIR="+filepath.Join(installed, "pkgconfig")), nil
	}
	root, err := t.sysroot(ctx, a)
	if err != nil {
		return nil, err
	}
	return append(env,
		"PKG_CONFIG_SYSROOT_DIR="+root,
		"PKG_CONFIG_LIBDIR="+filepath.Join(root, installed, "pkgconfig"),
		// The folders are the compiler's own, which pkg-config leaves out of what it answers.
		"PKG_CONFIG_ALLOW_SYSTEM_CFLAGS=1", "PKG_CONFIG_ALLOW_SYSTEM_LIBS=1",
	), nil
}

const sysrootFormat = 1

// sysroot returns a folder in the cache with the contents of Debian's libseccomp-dev for a.
//
// It is fetched by apt, which checks it as any other package, with lists of its own: to let dpkg
// install another architecture's packages would change what every later apt-get does on this
// machine, and drag in a second C library for one archive of 500 kB.
func (t Tree) sysroot(ctx context.Context, a architecture) (string, error) {
	deb := a.goarch // Debian's names are Go's.
	key, err := cache.NewKey(sysrootFormat).Add("arch", deb).AddFile("distribution", "/etc/os-release").Sum()
	if err != nil {
		return "", fmt.Errorf("cannot find libseccomp for %s: %w", a.name, err)
	}
	dir, err := cache.Entry(ctx, "sysroot", key, func(dir, scratch string) error {
		fmt.Fprintf(t.progress(), "fetching libseccomp for %s with apt-get\n", a.name)
		for _, sub := range []string{"lists/partial", "cache/archives/partial"} {
			if err := os.MkdirAll(filepath.Join(scratch, sub), 0o755); err != nil {
				return err
			}
		}
		apt := func(args ...string) error {
			return output(ctx, scratch, "apt-get", append([]string{
				"-o", "Dir::State::lists=" + filepath.Join(scratch, "lists"),
				"-o", "Dir::Cache=" + filepath.Join(scratch, "cache"),
				"-o", "APT::Architecture=" + deb, "-o", "APT::Architectures=" + deb,
				"-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none", "-qq",
			}, args...)...)
		}
		// Somebody else's repository may have nothing for this architecture, which is no reason to fail.
		lists := apt("update")
		if err := apt("download", "libseccomp-dev:"+deb); err != nil {
			return errors.Join(lists, err)
		}
		found, err := filepath.Glob(filepath.Join(scratch, "libseccomp-dev_*.deb"))
		if err != nil || len(found) != 1 {
			return fmt.Errorf("apt-get downloaded %d packages instead of one: %v", len(found), err)
		}
		return output(ctx, scratch, "dpkg-deb", "-x", found[0], dir)
	})
	if err != nil {
		return "", fmt.Errorf("cannot get libseccomp for %s, which needs Debian or a relative that has libseccomp-dev for %s in its repositories; without, build on a machine that is %s itself: %w", a.name, deb, a.name, err)
	}
	return dir, nil
}

// output runs a command and puts the end of what it printed into its error.
func output(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "LC_ALL=C")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(string(out[max(0, len(out)-2000):])))
	}
	return nil
}
