// Package host brings a machine to where it can build and run the appliance: it looks for what is
// missing, says what it installs and why, and installs it with the machine's own package manager.
package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// A Purpose is something that one wants to do on this machine.
type Purpose string

const (
	// Kernel is building the guest kernel from the distribution's source, or KERNEL_SOURCE.
	Kernel Purpose = "build the guest kernel"
	// Agent is building the guest's agent, which is linked statically with C libraries.
	Agent Purpose = "build the guest's agent"
	// Run is running pods in QEMU with a CNI network.
	Run Purpose = "run virtual machines"
	// Image is making the container image that pods run, without a registry.
	Image Purpose = "make a container image"
	// EROFS and Ext4 are making the guest's root file system as a disk image of that type.
	EROFS Purpose = "make an EROFS image"
	Ext4  Purpose = "make an ext4 image"
	// Race is running the unit tests with the race detector.
	Race Purpose = "run the tests"
	// Machine is booting a machine with systemd in namespaces.
	Machine Purpose = "boot a machine with systemd"
	// Node is booting a node that is a virtual machine.
	Node Purpose = "boot a node in a virtual machine"
	// Install is installing packages into an empty root directory.
	Install Purpose = "install packages with dnf"
	// Repository is making the metadata of a repository of packages.
	Repository Purpose = "make a repository of packages"
	// Inspect is looking for common mistakes in packages.
	Inspect Purpose = "check packages with rpmlint"

	// CrossKernel is what Kernel needs more to build for the other architecture: on x86_64 for
	// aarch64, on aarch64 for x86_64.
	CrossKernel Purpose = "build the guest kernel for the other architecture"
	// CrossAgent is what Agent needs more to build for the other architecture. Package build fetches
	// the one C library that is missing then.
	CrossAgent Purpose = "build the guest's agent for the other architecture"
	// Emulate is running virtual machines of the other architecture.
	Emulate Purpose = "run virtual machines of the other architecture"
)

// An architecture is one of the two that the appliance is built for.
type architecture struct {
	gnu     string // the name with which its cross tools begin
	qemu    string
	qemuDeb string // Debian's package of it
	gccDeb  string // Debian's package of its cross compiler
	libcDeb string // Debian's package of its C library, for the cross compiler
}

var (
	x86_64  = architecture{"x86_64-linux-gnu", "qemu-system-x86_64", "qemu-system-x86", "gcc-x86-64-linux-gnu", "libc6-dev-amd64-cross"}
	aarch64 = architecture{"aarch64-linux-gnu", "qemu-system-aarch64", "qemu-system-arm", "gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"}
)

// own is this machine's architecture, other the one that it can build for besides.
var own, other = architectures()

func architectures() (own, other architecture) {
	if runtime.GOARCH == "arm64" {
		return aarch64, x86_64
	}
	return x86_64, aarch64
}

// A requirement is there if one of its files is.
type requirement struct {
	// files are names looked up in PATH and the directories of system programs, or, if they have a
	// slash, globs.
	files []string
	why   string
	// deb and rpm are the packages that bring it: of several, the first that the machine's
	// repositories have. dnf also takes the path of a file.
	deb, rpm []string
	// elsewhere is said where no package brings it, for want of a name in deb or rpm.
	elsewhere string
	// optional things are asked for, and done without where the repositories lack them.
	optional string // what happens without
}

// requirements by purpose. Debian's names hold for Debian 12 and later and for Ubuntu.
var requirements = map[Purpose][]requirement{
	Kernel: {
		{files: []string{"gcc"}, why: "compiles the kernel", deb: []string{"gcc"}, rpm: []string{"gcc"}},
		{files: []string{"/usr/include/stdio.h"}, why: "the kernel's build tools are C programs", deb: []string{"libc6-dev"}, rpm: []string{"glibc-devel"}},
		{files: []string{"make"}, why: "drives the kernel's build", deb: []string{"make"}, rpm: []string{"make"}},
		{files: []string{"flex"}, why: "makes Kconfig's scanner", deb: []string{"flex"}, rpm: []string{"flex"}},
		{files: []string{"bison"}, why: "makes Kconfig's parser", deb: []string{"bison"}, rpm: []string{"bison"}},
		{files: []string{"bc"}, why: "computes the kernel's time constants", deb: []string{"bc"}, rpm: []string{"bc"}},
		{files: []string{"perl"}, why: "runs scripts of the kernel's build", deb: []string{"perl-base"}, rpm: []string{"perl-interpreter", "perl"}},
		{files: []string{"tar"}, why: "unpacks the kernel source", deb: []string{"tar"}, rpm: []string{"tar"}},
		{files: []string{"xz"}, why: "unpacks the kernel source", deb: []string{"xz-utils"}, rpm: []string{"xz"}},
		{files: []string{"lz4"}, why: "compresses the kernel image", deb: []string{"lz4"}, rpm: []string{"lz4"}},
		{files: []string{"/usr/include/gelf.h"}, why: "objtool reads the kernel's objects with libelf", deb: []string{"libelf-dev"}, rpm: []string{"elfutils-libelf-devel"}},
		{files: []string{"/usr/src/linux-source-*.tar.*", "/usr/src/linux-*/init/main.c"}, why: "the kernel source", deb: []string{"linux-source-6.1", "linux-source"}, rpm: []string{"kernel-source"}},
	},
	Agent: {
		{files: []string{"gcc"}, why: "libcontainer's first steps in a container are C", deb: []string{"gcc"}, rpm: []string{"gcc"}},
		{files: []string{"/usr/lib/*/libc.a", "/usr/lib64/libc.a", "/usr/lib/libc.a"}, why: "the agent is linked statically", deb: []string{"libc6-dev"}, rpm: []string{"glibc-static"}},
		{files: []string{"/usr/lib/*/libseccomp.a", "/usr/lib64/libseccomp.a", "/usr/lib/libseccomp.a"}, why: "compiles the seccomp profiles of containers", deb: []string{"libseccomp-dev"}, rpm: []string{"libseccomp-static", "libseccomp-devel"}},
		{files: []string{"/usr/include/seccomp.h"}, why: "compiles the seccomp profiles of containers", deb: []string{"libseccomp-dev"}, rpm: []string{"libseccomp-devel"}},
		{files: []string{"pkg-config"}, why: "tells the compiler where libseccomp is", deb: []string{"pkg-config", "pkgconf"}, rpm: []string{"pkgconf-pkg-config", "pkgconfig"}},
	},
	Run: {
		{files: []string{own.qemu}, why: "runs the virtual machines", deb: []string{own.qemuDeb}, rpm: []string{"/usr/bin/" + own.qemu, "qemu"}},
		{files: []string{"virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"}, why: "shares a container's files with its guest", deb: []string{"virtiofsd"}, rpm: []string{"virtiofsd", "/usr/libexec/virtiofsd"}, optional: "files are shared by 9p instead"},
		{files: []string{"ip"}, why: "shows and cleans the pods' networks", deb: []string{"iproute2"}, rpm: []string{"iproute"}},
		{files: []string{"iptables"}, why: "the CNI bridge plugin masquerades with it", deb: []string{"iptables"}, rpm: []string{"iptables"}},
		{files: []string{"modprobe"}, why: "loads the modules of bridge, veth, tun and vsock", deb: []string{"kmod"}, rpm: []string{"kmod"}},
	},
	Image: {
		{files: []string{"/var/lib/dpkg/info/busybox-static.list", "/usr/sbin/busybox"}, why: "is the container image of the demo and the tests, linked statically", deb: []string{"busybox-static"}, rpm: []string{"busybox"}},
	},
	Machine: {
		{files: []string{"debootstrap"}, why: "makes the machine's root file system", deb: []string{"debootstrap"}, rpm: []string{"debootstrap"}},
		{files: []string{"unshare"}, why: "makes the machine's namespaces", deb: []string{"util-linux"}, rpm: []string{"util-linux"}},
		{files: []string{"nsenter"}, why: "runs commands in the machine", deb: []string{"util-linux"}, rpm: []string{"util-linux"}},
	},
	Node: {
		{files: []string{own.qemu}, why: "emulates the node", deb: []string{own.qemuDeb}, rpm: []string{"/usr/bin/" + own.qemu, "qemu"}},
		{files: []string{"mke2fs"}, why: "makes the node's disks", deb: []string{"e2fsprogs"}, rpm: []string{"e2fsprogs"}},
		{files: []string{"/var/lib/dpkg/info/busybox-static.list", "/usr/sbin/busybox"}, why: "is the first program of the node, linked statically", deb: []string{"busybox-static"}, rpm: []string{"busybox"}},
	},
	Install: {
		{files: []string{"dnf"}, why: "installs the packages", deb: []string{"dnf"}, rpm: []string{"dnf"}},
		{files: []string{"rpm"}, why: "verifies what is installed", deb: []string{"rpm"}, rpm: []string{"rpm"}},
		{files: []string{"createrepo_c"}, why: "makes a repository of packages", deb: []string{"createrepo-c"}, rpm: []string{"createrepo_c"}},
		{files: []string{"/var/lib/dpkg/info/busybox-static.list", "/usr/sbin/busybox"}, why: "is the shell of the root's scriptlets", deb: []string{"busybox-static"}, rpm: []string{"busybox"}},
	},
	Repository: {
		{files: []string{"createrepo_c"}, why: "makes a repository of packages", deb: []string{"createrepo-c"}, rpm: []string{"createrepo_c"}},
	},
	Inspect: {
		{files: []string{"rpmlint"}, why: "checks the packages", deb: []string{"rpmlint"}, rpm: []string{"rpmlint"}},
		{files: []string{"cpio"}, why: "unpacks packages to be checked", deb: []string{"cpio"}, rpm: []string{"cpio"}},
		{files: []string{"rpm"}, why: "verifies the packages' signatures", deb: []string{"rpm"}, rpm: []string{"rpm"}},
	},
	EROFS: {
		{files: []string{"mkfs.erofs"}, why: "makes the guest's root file system", deb: []string{"erofs-utils"}, rpm: []string{"erofs-utils"}},
	},
	Ext4: {
		{files: []string{"mke2fs"}, why: "makes the guest's root file system", deb: []string{"e2fsprogs"}, rpm: []string{"e2fsprogs"}},
		{files: []string{"debugfs"}, why: "puts the files into the guest's root file system", deb: []string{"e2fsprogs"}, rpm: []string{"e2fsprogs"}},
	},
	Race: {
		{files: []string{"gcc"}, why: "the race detector is linked by the C compiler", deb: []string{"gcc"}, rpm: []string{"gcc"}},
		{files: []string{"/usr/include/stdio.h"}, why: "the race detector is linked by the C compiler", deb: []string{"libc6-dev"}, rpm: []string{"glibc-devel"}},
	},
	CrossKernel: {
		{files: []string{other.gnu + "-gcc"}, why: "compiles the kernel", deb: []string{other.gccDeb}, rpm: []string{"gcc-" + other.gnu}},
	},
	CrossAgent: {
		{files: []string{other.gnu + "-gcc"}, why: "libcontainer's first steps in a container are C", deb: []string{other.gccDeb}, elsewhere: thereItself},
		{files: []string{"/usr/" + other.gnu + "/lib/libc.a"}, why: "the agent is linked statically", deb: []string{other.libcDeb}, elsewhere: thereItself},
	},
	Emulate: {
		{files: []string{other.qemu}, why: "emulates the other architecture", deb: []string{other.qemuDeb}, rpm: []string{"/usr/bin/" + other.qemu}},
	},
}

// thereItself is what is left on distributions with dnf: their cross compilers come without a C
// library.
const thereItself = "build it on a machine of that architecture"

// ErrElsewhere is wrapped by the errors of Ensure for what no package of this distribution brings.
var ErrElsewhere = errors.New("no package brings what is missing")

// Ensure installs what this machine lacks for the given purposes. With nothing missing it neither
// prints nor runs anything. Without root it fails with the command that root must run.
func Ensure(ctx context.Context, purposes ...Purpose) error {
	return system().ensure(ctx, purposes)
}

// Missing returns, without changing anything, a line for each thing that this machine lacks.
func Missing(purposes ...Purpose) []string {
	return describe(system().missing(purposes))
}

// A machine is what Ensure looks at and changes.
type machine struct {
	exists func(file string) bool // as in requirement.files
	run    func(ctx context.Context, quiet bool, name string, args ...string) error
	root   bool
	source bool // KERNEL_SOURCE is set
	out    io.Writer
}

func system() machine {
	return machine{
		exists: exists,
		run:    run,
		root:   os.Geteuid() == 0,
		source: os.Getenv("KERNEL_SOURCE") != "",
		out:    os.Stdout,
	}
}

// systemDirs hold programs that are not in every user's PATH.
var systemDirs = []string{"/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin", "/bin"}

func exists(file string) bool {
	if strings.Contains(file, "/") {
		found, _ := filepath.Glob(file)
		return len(found) > 0
	}
	if _, err := exec.LookPath(file); err == nil {
		return true
	}
	return slices.ContainsFunc(systemDirs, func(dir string) bool {
		info, err := os.Stat(filepath.Join(dir, file))
		return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
	})
}

func run(ctx context.Context, quiet bool, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C")
	if quiet {
		return cmd.Run()
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out[max(0, len(out)-4000):])))
	}
	return nil
}

// A need is a requirement that is not met.
type need struct {
	requirement
	purpose Purpose
}

func (m machine) missing(purposes []Purpose) []need {
	var needs []need
	for _, p := range purposes {
		for _, r := range requirements[p] {
			if slices.ContainsFunc(r.files, m.exists) || (m.source && r.why == "the kernel source") {
				continue
			}
			known := slices.ContainsFunc(needs, func(n need) bool { return slices.Equal(n.files, r.files) })
			if !known {
				needs = append(needs, need{r, p})
			}
		}
	}
	return needs
}

// manager is a package manager.
type manager struct {
	name    string
	install []string                     // command, to be followed by packages
	refresh []string                     // command that reads the repositories anew
	known   func(pkg string) []string    // command that succeeds if the repositories have pkg
	names   func(r requirement) []string // the packages of a requirement
}

var managers = []manager{
	{
		name:    "apt-get",
		install: []string{"apt-get", "install", "-y", "--no-install-recommends"},
		refresh: []string{"apt-get", "update"},
		known:   func(pkg string) []string { return []string{"apt-cache", "show", pkg} },
		names:   func(r requirement) []string { return r.deb },
	},
	{
		name:    "dnf",
		install: []string{"dnf", "install", "-y", "--setopt=install_weak_deps=False"},
		refresh: []string{"dnf", "makecache"},
		// "provides" knows names, as globs of them, and paths of files.
		known: func(pkg string) []string { return []string{"dnf", "-q", "provides", pkg} },
		names: func(r requirement) []string { return r.rpm },
	},
}

func (m machine) ensure(ctx context.Context, purposes []Purpose) error {
	if err := m.ensureRequired(ctx, purposes); err != nil {
		return err
	}
	// Only now, because what was required may have brought along what is optional.
	return m.offerOptional(ctx, purposes)
}

// packageManager returns the machine's package manager.
func (m machine) packageManager() (manager, bool) {
	i := slices.IndexFunc(managers, func(p manager) bool { return m.exists(p.name) })
	if i < 0 {
		return manager{}, false
	}
	return managers[i], true
}

// required returns the needs that nothing works without.
func required(needs []need) []need {
	return slices.DeleteFunc(needs, func(n need) bool { return n.optional != "" })
}

func (m machine) ensureRequired(ctx context.Context, purposes []Purpose) error {
	needs := required(m.missing(purposes))
	if len(needs) == 0 {
		return nil
	}
	p, ok := m.packageManager()
	if !ok {
		return fmt.Errorf("cannot install what is missing: this machine has neither apt-get nor dnf; missing:\n  %s", strings.Join(describe(needs), "\n  "))
	}
	for _, n := range needs {
		if len(p.names(n.requirement)) == 0 {
			return fmt.Errorf("cannot %s: %w on a machine with %s: %s, which %s; %s", n.purpose, ErrElsewhere, p.name, n.files[0], n.why, n.elsewhere)
		}
	}
	if !m.root {
		var packages []string
		for _, n := range needs {
			packages = append(packages, p.names(n.requirement)[0])
		}
		return fmt.Errorf("cannot install what is missing without being root; run:\n  sudo %s %s", strings.Join(p.install, " "), strings.Join(unique(packages), " "))
	}
	packages, refreshed, err := m.choose(ctx, p, needs)
	if err != nil {
		return err
	}
	err = m.install(ctx, p, packages)
	if err != nil && !refreshed && ctx.Err() == nil {
		// The list of packages may be older than the repository.
		if rerr := m.refresh(ctx, p); rerr != nil {
			return errors.Join(err, rerr)
		}
		err = m.install(ctx, p, packages)
	}
	if err != nil {
		return err
	}
	if still := required(m.missing(purposes)); len(still) > 0 {
		return fmt.Errorf("cannot go on: installed %s, but there is still missing:\n  %s", strings.Join(packages, " "), strings.Join(describe(still), "\n  "))
	}
	return nil
}

// offerOptional installs what is optional where that is possible, and says what happens without.
func (m machine) offerOptional(ctx context.Context, purposes []Purpose) error {
	p, ok := m.packageManager()
	for _, n := range m.missing(purposes) {
		pkg := ""
		if ok && m.root {
			pkg = m.available(ctx, p, n)
		}
		var err error
		if pkg != "" {
			fmt.Fprintf(m.out, "useful to %s: %s (%s)\n", n.purpose, pkg, n.why)
			err = m.install(ctx, p, []string{pkg})
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case pkg == "":
			fmt.Fprintf(m.out, "not found here: %s, which %s; %s\n", n.files[0], n.why, n.optional)
		case err != nil:
			fmt.Fprintf(m.out, "%v; %s\n", err, n.optional)
		}
	}
	return nil
}

func (m machine) install(ctx context.Context, p manager, packages []string) error {
	fmt.Fprintf(m.out, "installing %s with %s\n", strings.Join(packages, " "), p.name)
	command := slices.Concat(p.install, packages)
	if err := m.run(ctx, false, command[0], command[1:]...); err != nil {
		return fmt.Errorf("cannot install %s: %w", strings.Join(packages, " "), err)
	}
	return nil
}

func (m machine) refresh(ctx context.Context, p manager) error {
	fmt.Fprintf(m.out, "reading the list of packages (%s)\n", strings.Join(p.refresh, " "))
	if err := m.run(ctx, false, p.refresh[0], p.refresh[1:]...); err != nil {
		return fmt.Errorf("cannot read the list of packages: %w", err)
	}
	return nil
}

// available returns the first of a need's packages that the repositories have, "" for none.
func (m machine) available(ctx context.Context, p manager, n need) string {
	for _, pkg := range p.names(n.requirement) {
		command := p.known(pkg)
		if m.run(ctx, true, command[0], command[1:]...) == nil {
			return pkg
		}
	}
	return ""
}

// choose picks a package for each need, reading the repositories anew if they do not know one, and
// says why each is installed.
func (m machine) choose(ctx context.Context, p manager, needs []need) (packages []string, refreshed bool, err error) {
	for _, n := range needs {
		pkg := m.available(ctx, p, n)
		if pkg == "" && !refreshed {
			if err := m.refresh(ctx, p); err != nil {
				return nil, false, err
			}
			refreshed = true
			pkg = m.available(ctx, p, n)
		}
		if pkg == "" {
			return nil, refreshed, fmt.Errorf("cannot %s: the repositories of this machine have no %s, which %s", n.purpose, strings.Join(p.names(n.requirement), " or "), n.why)
		}
		fmt.Fprintf(m.out, "needed to %s: %s (%s)\n", n.purpose, pkg, n.why)
		packages = append(packages, pkg)
	}
	return unique(packages), refreshed, nil
}

func describe(needs []need) []string {
	var lines []string
	for _, n := range needs {
		lines = append(lines, fmt.Sprintf("%s, to %s: %s", n.files[0], n.purpose, n.why))
	}
	return lines
}

func unique(names []string) []string {
	var list []string
	for _, name := range names {
		if !slices.Contains(list, name) {
			list = append(list, name)
		}
	}
	return list
}
