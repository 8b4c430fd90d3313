// Package repositories makes the package repositories that the tests install the appliance from: its
// package in two versions, signed and not, and stand-ins for the packages beside it, which have their
// names, versions and dependencies and next to nothing in them.
package repositories

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"

	"kuasar.io/kuasar/ci/build"
	"kuasar.io/kuasar/ci/cache"
	"kuasar.io/kuasar/ci/host"
	"kuasar.io/kuasar/rpm"
	"kuasar.io/kuasar/rpm/release"
)

// Names of the repositories, which are directories. ci/e2e knows them too.
const (
	// Current has the appliance as Version, and Next as NextVersion: the same programs, and
	// configuration files that have one line more, Remark.
	Current, Next = "current", "next"
	// Signed has what Current, Bare and Guide have, and the public key as Key.
	Signed = "signed"
	// Bare has what every system consists of: a shell, and a systemctl that only writes down how it was
	// called.
	Bare = "bare"
	// Guide has what openEuler's guide installs, and what could be installed in its place.
	Guide = "guide"
	// Plain has containerd and QEMU, and no StratoVirt and no iSulad.
	Plain = "plain"
	// Debian has one package, which says that a Debian with systemd, QEMU and containerd has them.
	Debian = "debian"
	// Key is the name of the public key in Signed.
	Key = "RPM-GPG-KEY-kuasar-tests"
)

// The versions of the appliance's packages. Roots and machines that the tests make have no others, so
// they need not be the tree's.
const Version, NextVersion = "1.0.0", "1.1.0"

// Remark is what the configuration files of Next have at their end.
const Remark = "# What another release has to say.\n"

// format is raised when this package makes something else of the same files.
const format = 1

// Make makes the repositories from the tree's outputs, if they are not those that are there, and
// returns where they are: a link below the tree's out/ into the cache.
func Make(ctx context.Context, tree build.Tree) (string, error) {
	dir, err := current(ctx, tree)
	if err != nil {
		return "", fmt.Errorf("cannot make the tests' repositories: %w", err)
	}
	link := filepath.Join(tree.Root, "out", "repositories")
	if err := os.Remove(link); err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("cannot make the tests' repositories: %w", err)
	}
	if err := os.Symlink(dir, link); err != nil {
		return "", fmt.Errorf("cannot make the tests' repositories: %w", err)
	}
	return link, nil
}

func current(ctx context.Context, tree build.Tree) (string, error) {
	if err := host.Ensure(ctx, host.Install); err != nil {
		return "", err
	}
	options, err := release.Options(ctx, tree)
	if err != nil {
		return "", err
	}
	options.Root, options.Release = cmp.Or(options.Root, "."), ""
	if options.Time.IsZero() { // outside of a repository
		options.Time = time.Unix(0, 0).UTC()
	}
	key := cache.NewKey(format).Add("options", fmt.Sprint(options.Arch, options.Commit, options.Time, options.Libraries))
	for _, file := range []string{options.Sandboxer, options.Ctl, options.Kernel, options.Initrd} {
		key.AddFile(filepath.Base(file), file)
	}
	for _, part := range append([]string{"rpm", "ci/repositories"}, parts...) {
		key.AddTree(part, filepath.Join(options.Root, part))
	}
	sum, err := key.Sum()
	if err != nil {
		return "", err
	}
	return cache.Entry(ctx, "repositories", sum, func(dir, scratch string) error {
		return fill(ctx, dir, scratch, options)
	})
}

func fill(ctx context.Context, dir, scratch string, options rpm.Options) error {
	if err := remarked(options.Root, scratch); err != nil {
		return err
	}
	private, public, err := newKey(options.Time)
	if err != nil {
		return err
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	packages := []struct{ repository, root, version, key string }{
		{Current, options.Root, Version, ""}, {Next, scratch, NextVersion, ""}, {Signed, options.Root, Version, private},
	}
	errs := make([]error, len(packages))
	var group sync.WaitGroup
	for i, p := range packages {
		o := options
		o.Root, o.Output, o.Version = p.root, at(p.repository), p.version
		o.SigningKey, o.SigningPassphrase = p.key, ""
		group.Go(func() { _, errs[i] = rpm.Build(ctx, o) })
	}
	group.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for repository, list := range map[string][]standIn{Bare: bare(), Guide: guide(options.Arch), Plain: plain(options.Arch), Debian: debian(options.Arch)} {
		for _, s := range list {
			if err := s.build(at(repository), options.Arch, options.Time, ""); err != nil {
				return err
			}
			if repository == Bare || repository == Guide {
				if err := s.build(at(Signed), options.Arch, options.Time, private); err != nil {
					return err
				}
			}
		}
	}
	if err := os.WriteFile(filepath.Join(at(Signed), Key), []byte(public), 0o644); err != nil {
		return err
	}
	for _, repository := range []string{Current, Next, Signed, Bare, Guide, Plain, Debian} {
		if output, err := exec.CommandContext(ctx, "createrepo_c", "--quiet", at(repository)).CombinedOutput(); err != nil {
			return fmt.Errorf("createrepo_c %s: %w: %s", repository, err, bytes.TrimSpace(output))
		}
	}
	return nil
}

// parts are what a package reads from the source tree.
var parts = []string{"defaults", "systemd", "README.md", "LICENSE", "go.mod", "go.sum", "guest/initrd/console"}

// remarked copies what a package reads to another directory and adds the remark.
func remarked(root, to string) error {
	copying := exec.Command("cp", append([]string{"-a", "--parents", "--target-directory", to}, parts...)...)
	copying.Dir = root
	if output, err := copying.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot copy the source: %w: %s", err, bytes.TrimSpace(output))
	}
	configurations, err := filepath.Glob(filepath.Join(to, "defaults", "config_*.toml"))
	if err != nil {
		return err
	}
	for _, path := range append(configurations, filepath.Join(to, "systemd", "kuasar-vmm.sysconfig")) {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteString(Remark)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// newKey makes a pair of armored keys to sign with. It is as old as what is signed.
func newKey(at time.Time) (private, public string, err error) {
	config := &packet.Config{RSABits: 3072, Time: func() time.Time { return at }}
	entity, err := openpgp.NewEntity("Kuasar's tests", "", "tests@kuasar.io", config)
	if err != nil {
		return "", "", fmt.Errorf("cannot make a key: %w", err)
	}
	var secret, open bytes.Buffer
	w, err := armor.Encode(&secret, openpgp.PrivateKeyType, nil)
	if err != nil {
		return "", "", fmt.Errorf("cannot make a key: %w", err)
	}
	err = errors.Join(entity.SerializePrivate(w, config), w.Close())
	w, werr := armor.Encode(&open, openpgp.PublicKeyType, nil)
	if err = errors.Join(err, werr); err != nil {
		return "", "", fmt.Errorf("cannot make a key: %w", err)
	}
	if err := errors.Join(entity.Serialize(w), w.Close()); err != nil {
		return "", "", fmt.Errorf("cannot make a key: %w", err)
	}
	return secret.String() + "\n", open.String() + "\n", nil
}
