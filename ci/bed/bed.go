// Package bed prepares this machine and runs what module ci/e2e holds on it: the demonstration, the
// end-to-end tests and the benchmarks.
package bed

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"kuasar.io/kuasar/ci/build"
	"kuasar.io/kuasar/ci/host"
	"kuasar.io/kuasar/ci/lint"
	"kuasar.io/kuasar/ci/repositories"
	"kuasar.io/kuasar/rpm/release"
)

// Demo runs the guide's pod and shows it. KEEP and END in the environment are explained by what it
// prints.
func Demo(ctx context.Context, tree build.Tree) error {
	if os.Getenv("END") == "" {
		if err := prepare(ctx, tree); err != nil {
			return err
		}
	}
	return run(ctx, tree, e2e, nil, "run", "./demo")
}

// Test runs the unit tests, the checks of the source, then the tests that need root and virtual
// machines: what fails sooner comes first. It prints a line for each phase with its time.
func Test(ctx context.Context, tree build.Tree) error {
	// Unit tests use what there is; what the later phases need is worth having sooner.
	if err := host.Ensure(ctx, host.Race, host.Image, host.Run, host.EROFS, host.Ext4); err != nil {
		return err
	}
	race := []string{"CGO_ENABLED=1"}
	phases := []phase{
		{"unit tests", func() error { return run(ctx, tree, ".", race, "test", "-race", "./...") }},
		{"unit tests of " + console, func() error { return run(ctx, tree, console, race, "test", "-race", "./...") }},
		{"checks of the source", func() error { return lint.Run(ctx, cmp.Or(tree.Root, "."), os.Stdout) }},
		{"builds", func() error { return prepare(ctx, tree) }},
		{"root images", func() error { return errors.Join(tree.Image(ctx, "erofs"), tree.Image(ctx, "ext4")) }},
		{"drivers of hypervisors", func() error {
			return run(ctx, tree, ".", []string{"KUASAR_E2E=1"}, "test", "-count=1", "-p=1", "-run=^TestBoot", "-v", "./sandboxer/vm/qemu", "./sandboxer/vm/stratovirt")
		}},
		{"checks of the package", func() error { return release.Check(ctx, tree, os.Stdout) }},
		{"builds for aarch64, to be emulated", func() error { return prepareEmulated(ctx, tree, os.Stdout) }},
		{"repositories of packages", func() error {
			_, err := repositories.Make(ctx, tree)
			return err
		}},
		{"end-to-end tests", func() error {
			others, err := packagesBut(ctx, tree, slices.Concat(onSystemd, onNodeOnly))
			if err != nil {
				return err
			}
			return endToEnd(ctx, tree, others...)
		}},
		{"installation and service, with dnf and on a machine with systemd", func() error {
			if err := host.Ensure(ctx, host.Machine, host.Install); err != nil {
				return err
			}
			return endToEnd(ctx, tree, onSystemd...)
		}},
		{"a node of its own, with KVM and vsock", func() error { return onNode(ctx, tree, os.Stdout) }},
	}
	return inOrder(phases, os.Stdout)
}

// onSystemd are the packages of module ci/e2e that install the appliance.
var onSystemd = []string{"./machine", "./appliance"}

// onNodeOnly are those that boot a node in a virtual machine.
var onNodeOnly = []string{"./nested"}

// Node boots a node in a virtual machine of its own and tries the appliance on it. What it prints is kept
// in out/node/.
func Node(ctx context.Context, tree build.Tree) error {
	if err := prepare(ctx, tree); err != nil {
		return err
	}
	return onNode(ctx, tree, os.Stdout)
}

// onNode does so with what is built. Where no such node can be, it says so on out.
func onNode(ctx context.Context, tree build.Tree, out io.Writer) error {
	if tree.Architecture() != "x86_64" {
		fmt.Fprintln(out, "not tried on a node of its own: only the emulated processors of x86_64 virtualize")
		return nil
	}
	if err := host.Ensure(ctx, host.Machine, host.Node); err != nil {
		return err
	}
	if _, err := repositories.Make(ctx, tree); err != nil {
		return err
	}
	// The program that boots the node is copied onto it, whose pods' processor has no AVX.
	env := []string{"KUASAR_E2E=1", "CGO_ENABLED=0", "GOAMD64=v1"}
	return run(ctx, tree, e2e, env, "test", "-count=1", "-timeout=80m", "-v", "-run=^TestNode$", "./nested")
}

// endToEnd runs tests of module ci/e2e, one package at a time: each uses all of this machine.
func endToEnd(ctx context.Context, tree build.Tree, packages ...string) error {
	args := append([]string{"test", "-count=1", "-timeout=80m", "-v", "-p=1"}, packages...)
	return run(ctx, tree, e2e, []string{"KUASAR_E2E=1"}, args...)
}

// packagesBut lists the packages of module ci/e2e without some.
func packagesBut(ctx context.Context, tree build.Tree, without []string) ([]string, error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-f", "{{.Dir}}", "./...")
	cmd.Dir = filepath.Join(tree.Root, e2e)
	cmd.Env = append(os.Environ(), "GOWORK=off")
	dirs, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list in %s: %w", e2e, err)
	}
	top, err := filepath.Abs(cmd.Dir)
	if err != nil {
		return nil, err
	}
	var packages []string
	for _, dir := range strings.Fields(string(dirs)) {
		relative, err := filepath.Rel(top, dir)
		if err != nil {
			return nil, err
		}
		if name := "./" + relative; !slices.Contains(without, name) {
			packages = append(packages, name)
		}
	}
	return packages, nil
}

// A phase is a part of the tests.
type phase struct {
	name string
	run  func() error
}

// inOrder runs the phases up to the first that fails and tells how each ended.
func inOrder(phases []phase, out io.Writer) error {
	for _, p := range phases {
		fmt.Fprintf(out, "==== %s\n", p.name)
		began := time.Now()
		err := p.run()
		took := time.Since(began).Round(100 * time.Millisecond)
		if err != nil {
			fmt.Fprintf(out, "==== %s: FAILED after %s\n", p.name, took)
			return fmt.Errorf("%s: %w", p.name, err)
		}
		fmt.Fprintf(out, "==== %s: ok, %s\n", p.name, took)
	}
	return nil
}

// Bench measures and prints the table; the samples are kept in out/bench/.
func Bench(ctx context.Context, tree build.Tree) error {
	if err := prepare(ctx, tree); err != nil {
		return err
	}
	return run(ctx, tree, e2e, nil, "run", "./bench")
}

// Modules of their own.
const (
	e2e     = "ci/e2e"
	console = "guest/initrd/console"
)

func prepare(ctx context.Context, tree build.Tree) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("pods in virtual machines need root: for network namespaces, mounts and cgroups")
	}
	if own := (build.Tree{}).Architecture(); tree.Architecture() != own {
		return fmt.Errorf("pods run on this machine's architecture, which is %s: unset ARCH", own)
	}
	if err := host.Ensure(ctx, host.Agent, host.Kernel, host.Run, host.Image); err != nil {
		return err
	}
	return tree.Everything(ctx)
}

// prepareEmulated builds, on x86_64, what the end-to-end test of aarch64 boots. Where this machine's
// distribution cannot, it says so on out, and the test is skipped.
func prepareEmulated(ctx context.Context, tree build.Tree, out io.Writer) error {
	if tree.Architecture() != "x86_64" {
		return nil
	}
	tree.Arch = "aarch64"
	err := host.Ensure(ctx, host.Emulate)
	if err == nil {
		err = tree.Everything(ctx)
	}
	if errors.Is(err, host.ErrElsewhere) {
		fmt.Fprintf(out, "aarch64 is not tested: %v\n", err)
		return nil
	}
	return err
}

// longestTempDir is how long the name of the temporary directory may be: those of sockets below it have at
// most 107 bytes.
const longestTempDir = 30

// run runs the go command in a folder of the tree, on this terminal.
func run(ctx context.Context, tree build.Tree, dir string, env []string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = filepath.Join(tree.Root, dir)
	cmd.Env = append(append(os.Environ(), "GOWORK=off"), env...)
	if len(os.TempDir()) > longestTempDir {
		cmd.Env = append(cmd.Env, "TMPDIR=/tmp")
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// An interrupted demo or test still stops its machines and daemons.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = time.Minute
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("go %s in %s: %w", args[0], dir, err)
	}
	return nil
}
