// Package build makes what the appliance consists of: the host's programs, the guest's agent, kernel
// and initrd, all below out/; for this machine's architecture, or for the other of the two.
//
// Every step is quick when nothing changed: Go's own build cache serves the programs, and the rest
// is kept by the content of what it is made from (package cache).
package build

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"kuasar.io/kuasar/ci/host"
	"kuasar.io/kuasar/guest/image"
	"kuasar.io/kuasar/guest/initrd"
	"kuasar.io/kuasar/guest/kernel"
)

// Out is the folder of everything that is built, relative to the module's root.
const Out = "out"

// What is built, as Tree.Path takes it.
const (
	Sandboxer  = "bin/vmm-sandboxer"
	Ctl        = "bin/kuasar-ctl"
	Agent      = "bin/vmm-task"
	Kernel     = "vmlinux.bin"
	Initrd     = "kuasar.initrd"
	ImageEROFS = "kuasar-erofs.img"
	ImageExt4  = "kuasar-ext4.img"
)

// An architecture is one that the appliance is built for.
type architecture struct {
	name   string // as RPM and the kernel's uname have it
	goarch string // as Go has it
	gnu    string // the GNU name, with which Debian's cross tools and library folders begin
}

var architectures = []architecture{
	{"x86_64", "amd64", "x86_64-linux-gnu"},
	{"aarch64", "arm64", "aarch64-linux-gnu"},
}

// release is the version that is being worked on. A tag on the commit takes its place.
const release = "0.1.0"

// versionPackage holds the variables that the linker sets.
const versionPackage = "kuasar.io/kuasar/guest/protocol/version"

// A program is a Go command of this module.
type program struct {
	path   string // of its package
	output string // as Tree.Path takes it
	env    []string
	flags  []string
	link   string // -ldflags beside the stamp
}

var (
	sandboxer = program{
		path:   "./sandboxer/cmd/vmm-sandboxer",
		output: Sandboxer,
		env:    []string{"CGO_ENABLED=0"},
		link:   "-s -w",
	}
	ctl = program{
		path:   "./sandboxer/cmd/kuasar-ctl",
		output: Ctl,
		env:    []string{"CGO_ENABLED=0"},
		link:   "-s -w",
	}
	// libcontainer enters namespaces in C, before Go's runtime starts its threads, and compiles
	// seccomp profiles with libseccomp; both are linked in, for the guest has no libraries. Without
	// no_grpc, containerd's Task API brings gRPC and net/http along, 6 MB in the memory of every pod.
	agent = program{
		path:   "./guest/cmd/vmm-task",
		output: Agent,
		env:    []string{"CGO_ENABLED=1"},
		flags:  []string{"-tags=seccomp,netgo,osusergo,no_grpc"},
		link:   "-s -w -linkmode external -extldflags -static",
	}
)

// A Tree is a checkout of this module.
type Tree struct {
	// Root is its top folder; empty means the current one.
	Root string
	// Arch is the architecture to build for, x86_64 or aarch64; empty means this machine's.
	Arch string
	// Version takes the place of the one that git and this package tell; empty leaves it to them.
	Version string
	// Progress receives what long steps have to say; nil means nobody.
	Progress io.Writer
}

func (t Tree) progress() io.Writer {
	if t.Progress == nil {
		return io.Discard
	}
	return t.Progress
}

// Architecture is what the tree is built for: x86_64 or aarch64.
func (t Tree) Architecture() string {
	if t.Arch != "" {
		return t.Arch
	}
	i := slices.IndexFunc(architectures, func(a architecture) bool { return a.goarch == runtime.GOARCH })
	if i < 0 {
		return runtime.GOARCH
	}
	return architectures[i].name
}

// target returns what the tree is built for, and whether that is another architecture than this
// machine's.
func (t Tree) target() (a architecture, cross bool, err error) {
	i := slices.IndexFunc(architectures, func(a architecture) bool { return a.name == t.Architecture() })
	if i < 0 {
		return architecture{}, false, fmt.Errorf("cannot build for the architecture %q: it is neither x86_64 nor aarch64", t.Architecture())
	}
	return architectures[i], architectures[i].goarch != runtime.GOARCH, nil
}

// Path is where one of the things that are built is once that is done: below out/, or below
// out/<arch>/ if it is for another architecture than this machine's.
func (t Tree) Path(name string) string {
	if a, cross, err := t.target(); err != nil || cross {
		return filepath.Join(t.Root, Out, cmp.Or(a.name, t.Arch), name)
	}
	return filepath.Join(t.Root, Out, name)
}

// Everything builds the programs, the initrd and the kernel. What the machine lacks for it is
// installed first.
func (t Tree) Everything(ctx context.Context) error {
	if err := t.ensure(ctx, forAgent, forKernel); err != nil {
		return err
	}
	// The programs first: they are where mistakes are, and the kernel takes minutes.
	if err := t.Programs(ctx); err != nil {
		return err
	}
	// With everything built already, what is left is to notice that, which takes its time too.
	return together(
		func() error { return t.assemble(ctx) },
		func() error { return t.kernel(ctx) },
	)
}

// Programs builds the daemon, kuasar-ctl and the agent.
func (t Tree) Programs(ctx context.Context) error {
	if err := t.ensure(ctx, forAgent); err != nil {
		return err
	}
	stamp, err := t.stamp(ctx)
	if err != nil {
		return err
	}
	return together(
		func() error { return t.compile(ctx, sandboxer, stamp) },
		func() error { return t.compile(ctx, ctl, stamp) },
		func() error { return t.compile(ctx, agent, stamp) },
	)
}

// Kernel builds the guest kernel, from the source that KERNEL_SOURCE names or the distribution's.
func (t Tree) Kernel(ctx context.Context) error {
	if err := t.ensure(ctx, forKernel); err != nil {
		return err
	}
	return t.kernel(ctx)
}

// Initrd builds the agent and the initrd around it.
func (t Tree) Initrd(ctx context.Context) error {
	if err := t.ensure(ctx, forAgent); err != nil {
		return err
	}
	stamp, err := t.stamp(ctx)
	if err != nil {
		return err
	}
	if err := t.compile(ctx, agent, stamp); err != nil {
		return err
	}
	return t.assemble(ctx)
}

// images are where images go, and what making them takes, by file system.
var images = map[string]struct {
	output  string
	purpose host.Purpose
}{
	image.EROFS: {ImageEROFS, host.EROFS},
	image.Ext4:  {ImageExt4, host.Ext4},
}

// Image builds the agent and, with the same content as the initrd, a disk image of the file system erofs or
// ext4, for hypervisor.image_path. It is not part of Everything.
func (t Tree) Image(ctx context.Context, fileSystem string) error {
	made, known := images[fileSystem]
	if !known {
		return fmt.Errorf("cannot make an image of the file system %q: it is neither %s nor %s", fileSystem, image.EROFS, image.Ext4)
	}
	if err := t.ensure(ctx, forAgent, [2]host.Purpose{made.purpose, made.purpose}); err != nil {
		return err
	}
	stamp, err := t.stamp(ctx)
	if err != nil {
		return err
	}
	if err := t.compile(ctx, agent, stamp); err != nil {
		return err
	}
	console, err := t.console(ctx)
	if err != nil {
		return err
	}
	_, err = image.Build(ctx, image.Config{Agent: t.Path(Agent), Console: console, FileSystem: fileSystem, Output: t.Path(made.output)})
	return err
}

// Clean removes out/. The cache stays: it is keyed by content, and the kernel took minutes.
func (t Tree) Clean() error {
	return os.RemoveAll(filepath.Join(t.Root, Out))
}

// What is needed to build for this machine, and what for the other architecture.
var (
	forAgent  = [2]host.Purpose{host.Agent, host.CrossAgent}
	forKernel = [2]host.Purpose{host.Kernel, host.CrossKernel}
)

// ensure installs what the machine lacks for the purposes.
func (t Tree) ensure(ctx context.Context, purposes ...[2]host.Purpose) error {
	_, cross, err := t.target()
	if err != nil {
		return err
	}
	var needed []host.Purpose
	for _, p := range purposes {
		needed = append(needed, p[0])
		if cross {
			needed = append(needed, p[1])
		}
	}
	return host.Ensure(ctx, needed...)
}

func (t Tree) kernel(ctx context.Context) error {
	a, _, err := t.target()
	if err != nil {
		return err
	}
	_, err = kernel.Build(ctx, kernel.Config{
		Source:   os.Getenv("KERNEL_SOURCE"),
		Arch:     a.goarch,
		Output:   t.Path(Kernel),
		Progress: t.progress(),
	})
	return err
}

// console returns the archive of the debug console's tools.
func (t Tree) console(ctx context.Context) (string, error) {
	a, _, err := t.target()
	if err != nil {
		return "", err
	}
	return initrd.Console(ctx, filepath.Join(t.Root, "guest/initrd/console"), a.goarch, t.progress())
}

func (t Tree) assemble(ctx context.Context) error {
	console, err := t.console(ctx)
	if err != nil {
		return err
	}
	_, err = initrd.Build(ctx, initrd.Config{
		Agent:   t.Path(Agent),
		Console: console,
		Output:  t.Path(Initrd),
	})
	return err
}

func (t Tree) compile(ctx context.Context, p program, stamp []string) error {
	a, cross, err := t.target()
	if err != nil {
		return err
	}
	output, err := filepath.Abs(t.Path(p.output))
	if err != nil {
		return fmt.Errorf("cannot build %s: %w", filepath.Base(p.output), err)
	}
	env, link := p.env, append([]string{p.link}, stamp...)
	if cross {
		env = append(slices.Clone(env), "GOARCH="+a.goarch)
		if slices.Contains(p.env, "CGO_ENABLED=1") {
			variables, err := t.crossC(ctx, a)
			if err != nil {
				return fmt.Errorf("cannot build %s for %s: %w", filepath.Base(p.output), a.name, err)
			}
			env = append(env, variables...)
			// Go's build id depends on the path of the C library, which is this machine's own affair.
			link = append(link, "-buildid=")
		}
	}
	args := []string{"build", "-trimpath", "-buildvcs=false", "-o", output}
	args = append(args, p.flags...)
	args = append(args, "-ldflags", strings.Join(link, " "), p.path)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = t.Root
	cmd.Env = environment(env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot build %s for %s: %w\n%s", filepath.Base(p.output), a.name, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// environment is the caller's, without what would make another binary of the same source.
func environment(extra ...string) []string {
	env := slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return slices.Contains([]string{"GOFLAGS", "GOOS", "GOARCH", "GOWORK", "CGO_ENABLED", "CGO_CFLAGS", "CGO_LDFLAGS", "GOEXPERIMENT", "GOAMD64", "GOARM64"}, name)
	})
	return append(env, append([]string{"GOWORK=off"}, extra...)...)
}

// stamp returns the -X flags that put version and commit into a program.
func (t Tree) stamp(ctx context.Context) ([]string, error) {
	version, commit, _ := t.Stamp(ctx)
	if !versionRE.MatchString(version) {
		return nil, fmt.Errorf("cannot build the version %q: a version begins with a digit and has letters, digits, dots, +, ~ and - only", version)
	}
	return []string{"-X", versionPackage + ".Version=" + version, "-X", versionPackage + ".Commit=" + commit}, nil
}

// versionRE is what gets through the linker's command line, and makes sense to a package manager.
var versionRE = regexp.MustCompile(`^[0-9][0-9A-Za-z.+~-]*$`)

// Stamp says what is built: Tree.Version, or the tag of the commit, or the release that is being
// worked on; the commit, which ends in -dirty if the tree differs from it; and when that was
// committed, or the time that SOURCE_DATE_EPOCH in the environment has. Outside of a repository, as
// in an unpacked source archive, there is no commit, and the time is zero without that variable.
func (t Tree) Stamp(ctx context.Context) (version, commit string, committed time.Time) {
	git := func(args ...string) string {
		cmd := exec.CommandContext(ctx, "git", args...)
		cmd.Dir = t.Root
		out, err := cmd.Output()
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(out))
	}
	commit = git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
	for _, seconds := range []string{os.Getenv("SOURCE_DATE_EPOCH"), git("log", "-1", "--format=%ct")} {
		if n, err := strconv.ParseInt(seconds, 10, 64); err == nil {
			committed = time.Unix(n, 0).UTC()
			break
		}
	}
	version = t.Version
	if version == "" {
		version = git("describe", "--exact-match", "--match=v[0-9]*")
	}
	return cmp.Or(strings.TrimPrefix(version, "v"), release+"-dev"), commit, committed
}

// together runs steps at the same time and returns all of their errors.
func together(steps ...func() error) error {
	errs := make([]error, len(steps))
	var group sync.WaitGroup
	for i, step := range steps {
		group.Go(func() { errs[i] = step() })
	}
	group.Wait()
	return errors.Join(errs...)
}
