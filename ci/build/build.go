// Package build makes what the appliance consists of: the two programs, the guest kernel and the
// initrd, all below out/.
//
// Every step is quick when nothing changed: Go's own build cache serves the programs, and the rest
// is kept by the content of what it is made from (package cache).
package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"kuasar.io/kuasar/ci/host"
	"kuasar.io/kuasar/guest/initrd"
	"kuasar.io/kuasar/guest/kernel"
)

// What is built, relative to the module's root.
const (
	Out       = "out"
	Sandboxer = "out/bin/vmm-sandboxer"
	Agent     = "out/bin/vmm-task"
	Kernel    = "out/vmlinux.bin"
	Initrd    = "out/kuasar.initrd"
)

// release is the version that is being worked on. A tag on the commit takes its place.
const release = "0.1.0"

// versionPackage holds the variables that the linker sets.
const versionPackage = "kuasar.io/kuasar/guest/protocol/version"

// A program is a Go command of this module.
type program struct {
	path   string // of its package
	output string
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
	// Progress receives what long steps have to say; nil means nobody.
	Progress io.Writer
}

func (t Tree) progress() io.Writer {
	if t.Progress == nil {
		return io.Discard
	}
	return t.Progress
}

// Everything builds the programs, the initrd and the kernel. What the machine lacks for it is
// installed first.
func (t Tree) Everything(ctx context.Context) error {
	if err := host.Ensure(ctx, host.Agent, host.Kernel); err != nil {
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

// Programs builds the daemon and the agent.
func (t Tree) Programs(ctx context.Context) error {
	if err := host.Ensure(ctx, host.Agent); err != nil {
		return err
	}
	stamp := t.stamp(ctx)
	return together(
		func() error { return t.compile(ctx, sandboxer, stamp) },
		func() error { return t.compile(ctx, agent, stamp) },
	)
}

// Kernel builds the guest kernel, from the source that KERNEL_SOURCE names or the distribution's.
func (t Tree) Kernel(ctx context.Context) error {
	if err := host.Ensure(ctx, host.Kernel); err != nil {
		return err
	}
	return t.kernel(ctx)
}

// Initrd builds the agent and the initrd around it.
func (t Tree) Initrd(ctx context.Context) error {
	if err := host.Ensure(ctx, host.Agent); err != nil {
		return err
	}
	if err := t.compile(ctx, agent, t.stamp(ctx)); err != nil {
		return err
	}
	return t.assemble(ctx)
}

// Clean removes out/. The cache stays: it is keyed by content, and the kernel took minutes.
func (t Tree) Clean() error {
	return os.RemoveAll(filepath.Join(t.Root, Out))
}

func (t Tree) kernel(ctx context.Context) error {
	_, err := kernel.Build(ctx, kernel.Config{
		Source:   os.Getenv("KERNEL_SOURCE"),
		Output:   filepath.Join(t.Root, Kernel),
		Progress: t.progress(),
	})
	return err
}

func (t Tree) assemble(ctx context.Context) error {
	console, err := initrd.Console(ctx, filepath.Join(t.Root, "guest/initrd/console"), "", t.progress())
	if err != nil {
		return err
	}
	_, err = initrd.Build(ctx, initrd.Config{
		Agent:   filepath.Join(t.Root, Agent),
		Console: console,
		Output:  filepath.Join(t.Root, Initrd),
	})
	return err
}

func (t Tree) compile(ctx context.Context, p program, stamp []string) error {
	args := []string{"build", "-trimpath", "-buildvcs=false", "-o", p.output}
	args = append(args, p.flags...)
	args = append(args, "-ldflags", strings.Join(append([]string{p.link}, stamp...), " "), p.path)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = t.Root
	cmd.Env = environment(p.env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot build %s: %w\n%s", filepath.Base(p.output), err, strings.TrimSpace(string(out)))
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
func (t Tree) stamp(ctx context.Context) []string {
	version, commit := t.version(ctx)
	return []string{"-X", versionPackage + ".Version=" + version, "-X", versionPackage + ".Commit=" + commit}
}

// version says what is built: the tag of the commit, or the release that is being worked on, and
// the commit, which ends in -dirty if the tree differs from it. Outside of a repository, as in an
// unpacked source archive, there is no commit.
func (t Tree) version(ctx context.Context) (version, commit string) {
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
	if tag := git("describe", "--exact-match", "--match=v[0-9]*"); tag != "" {
		return strings.TrimPrefix(tag, "v"), commit
	}
	return release + "-dev", commit
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
