// Package rpm describes the appliance as an RPM package and writes it, with nfpm as a library: there
// is no need for root, for RPM's tools or for a network.
//
// The package is a pure function of the files that go in and of Options: built twice, anywhere and at
// any time, it is the same bytes, with a signature too. What would bring the machine or the moment in
// (times and modes of files, umask, time zone, host name, the time of a signature) comes from Options
// or is fixed here.
//
// Names of members in the payload are absolute, which is how nfpm writes them. RPM does not mind, but
// cpio, run by root without --no-absolute-filenames, unpacks such a package over the running system.
package rpm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/goreleaser/nfpm/v2"
	_ "github.com/goreleaser/nfpm/v2/rpm" // the packager
)

// Limit is the largest package, in bytes.
const Limit = 30 << 20

// Name is the package's.
const Name = "kuasar"

const (
	vendor   = "Kuasar"
	homepage = "https://kuasar.io"
	packager = "Kuasar <kuasar@kuasar.io>"
	// licences are those of all that is in the package: the appliance's own first, then those of what
	// is linked into its programs, of the guest kernel, and of the C libraries in the agent.
	licences = "Apache-2.0 AND BSD-2-Clause AND BSD-3-Clause AND MIT AND MPL-2.0 AND GPL-2.0-only AND LGPL-2.1-only AND LGPL-2.1-or-later"
	summary  = "Runs every pod in a virtual machine of its own"
	// compression: RPM reads zstd since 4.14. 19 is a third smaller than gzip and quicker to unpack.
	compression = "zstd:19"
)

const description = `Kuasar runs every pod of the runtime handler "vmm" in a virtual machine of
its own, on StratoVirt or QEMU. One daemon per node, vmm-sandboxer, serves all
pods of iSulad or containerd through the Sandbox API: there is neither a shim
process per pod nor a pause container.

This package holds the daemon and its service kuasar-vmm, the administrator's
tool kuasar-ctl, the guest's kernel and initrd, the configuration, and examples
for the engines. "kuasar-ctl check" says what a node lacks.`

// Options say what to put into the package. All files are read, none is changed.
type Options struct {
	// Root is the top folder of the source, for documents, configuration and units; empty means the
	// current one.
	Root string
	// Arch is "x86_64" or "aarch64".
	Arch string
	// Version is the appliance's. What follows its first "-" marks it as older than what precedes:
	// 0.1.0-dev is packaged as 0.1.0~dev.
	Version string
	// Release counts packages of one version; empty means "1".
	Release string
	// Commit is what the programs were built from, for the changelog and the bill of materials; empty if
	// it is not known.
	Commit string
	// Time is the time of everything in the package, and of the package and its signature. It is never
	// taken from the clock.
	Time time.Time
	// The files that were built: the daemon, kuasar-ctl, the guest's kernel and initrd.
	Sandboxer, Ctl, Kernel, Initrd string
	// Libraries are the C libraries that are linked into the agent; see HostLibraries.
	Libraries []Library
	// Texts are the licences of what is linked in, for the package; without Texts.Modules they are left out.
	Texts Texts
	// SigningKey is an armored private key or the path of one. Empty leaves the package unsigned.
	SigningKey string
	// SigningPassphrase unlocks SigningKey, if that is locked.
	SigningPassphrase string
	// Output is the folder that the package is put into; it is made if it is not there.
	Output string
}

// architectures of the package, with Go's and ELF's names for them.
var architectures = map[string]architecture{
	"x86_64":  {"amd64", "x86-64", "defaults/config_stratovirt_x86_64.toml", "defaults/config_qemu.toml"},
	"aarch64": {"arm64", "aarch-64", "defaults/config_stratovirt.toml", "defaults/config_qemu_aarch64.toml"},
}

type architecture struct {
	goarch           string
	isa              string // as in what rpmbuild lets packages provide
	stratovirt, qemu string // their configuration files, relative to the root
}

// Build writes Output/kuasar-<version>-<release>.<arch>.rpm and returns its path. A file that is not
// there or not of the architecture is an error that says what makes it. Nothing is left in Output if
// Build fails.
func Build(ctx context.Context, o Options) (string, error) {
	path, err := build(ctx, o)
	if err != nil {
		return "", fmt.Errorf("cannot build the package: %w", err)
	}
	return path, nil
}

func build(ctx context.Context, o Options) (string, error) {
	o.Root = cmp.Or(o.Root, ".")
	o.Release = cmp.Or(o.Release, "1")
	arch, ok := architectures[o.Arch]
	if !ok {
		return "", fmt.Errorf("the architecture %q is neither x86_64 nor aarch64", o.Arch)
	}
	if o.Time.IsZero() {
		return "", errors.New("the time of what is packaged is not known: set SOURCE_DATE_EPOCH or build in a repository")
	}
	version, err := Version(o.Version)
	if err != nil {
		return "", err
	}
	if !plain.MatchString(o.Release) {
		return "", fmt.Errorf("the release %q has other characters than letters, digits, \".\", \"_\", \"+\" and \"~\"", o.Release)
	}
	sign, err := signer(o.SigningKey, o.SigningPassphrase, o.Time)
	if err != nil {
		return "", err
	}
	scratch, err := os.MkdirTemp("", "kuasar-rpm-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(scratch)

	p := pack{Options: o, arch: arch, evr: version + "-" + o.Release, scratch: scratch}
	members, err := p.members()
	if err != nil {
		return "", err
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	scripts, err := p.scriptlets()
	if err != nil {
		return "", err
	}
	changelog, err := p.changelog()
	if err != nil {
		return "", err
	}
	info := nfpm.WithDefaults(&nfpm.Info{
		Name: Name, Arch: arch.goarch, Platform: "linux",
		Version: version, VersionSchema: "none", Release: o.Release,
		Maintainer: packager, Vendor: vendor, Homepage: homepage,
		License: licences, Description: description, Changelog: changelog,
		MTime: o.Time, DisableGlobbing: true,
		Overridables: nfpm.Overridables{
			Depends:    requires(o.Arch),
			Recommends: recommends(o.Arch),
			Suggests:   suggests(),
			Provides:   provides(p.evr, version, arch),
			Contents:   contents(members, o.Time),
			Scripts:    scripts,
			RPM: nfpm.RPM{
				Summary: summary, Group: "System Environment/Daemons", Packager: packager,
				// The true name of the machine would be another one elsewhere.
				BuildHost:   "localhost",
				Compression: compression,
				Signature:   nfpm.RPMSignature{PackageSignature: nfpm.PackageSignature{SignFn: sign}},
			},
		},
	})
	if err := nfpm.Validate(info); err != nil {
		return "", err
	}
	format, err := nfpm.Get("rpm")
	if err != nil {
		return "", err
	}
	return publish(filepath.Join(o.Output, format.ConventionalFileName(info)), members, o.Time, func(w io.Writer) error {
		return format.Package(info, w)
	})
}

// publish writes a file that is either whole or not there, and not larger than Limit. Its time is at, for
// the metadata of repositories have it.
func publish(path string, members []member, at time.Time, write func(io.Writer) error) (string, error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	f, err := os.CreateTemp(dir, ".kuasar-*")
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := write(f); err != nil {
		return "", err
	}
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if info.Size() > Limit {
		return "", fmt.Errorf("it has %d bytes, more than %d; the largest files in it, in bytes: %s", info.Size(), Limit, largest(members))
	}
	if err := f.Chmod(0o644); err != nil {
		return "", err
	}
	if err := errors.Join(f.Sync(), f.Close(), os.Chtimes(f.Name(), at, at)); err != nil {
		return "", err
	}
	return path, os.Rename(f.Name(), path)
}

func largest(members []member) string {
	sorted := slices.SortedFunc(slices.Values(members), func(a, b member) int { return cmp.Compare(b.size, a.size) })
	var list []string
	for _, m := range sorted[:min(5, len(sorted))] {
		list = append(list, fmt.Sprintf("%s %d", m.path, m.size))
	}
	return strings.Join(list, ", ")
}

// plain is what RPM takes as a version or release.
var plain = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+~]*$`)

// Version returns the version as RPM has it. RPM allows no "-", and sorts what follows "~" before the
// version without it.
func Version(version string) (string, error) {
	release, pre, isPre := strings.Cut(version, "-")
	v := release
	if isPre {
		v += "~" + strings.ReplaceAll(pre, "-", "_")
	}
	if !plain.MatchString(v) {
		return "", fmt.Errorf("the version %q has other characters than letters, digits, \".\", \"_\", \"+\", \"~\" and \"-\"", version)
	}
	return v, nil
}

// pack is one run of Build.
type pack struct {
	Options
	arch    architecture
	evr     string // version-release
	scratch string // for files that nfpm wants to read
}

// file writes a file for nfpm to read and returns its path.
func (p pack) file(name string, data []byte) (string, error) {
	path := filepath.Join(p.scratch, name)
	return path, os.WriteFile(path, data, 0o600)
}
