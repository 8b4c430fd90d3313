package host

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
)

// fake is a machine whose package manager is a map from package to the files that it brings.
type fake struct {
	files    map[string]bool
	packages map[string][]string // in the repositories
	fresh    bool                // whether the list of packages was read
	broken   int                 // how many installations fail first
	commands []string
	out      bytes.Buffer
}

func (f *fake) machine(root bool) machine {
	return machine{
		exists: func(file string) bool { return f.files[file] },
		root:   root,
		out:    &f.out,
		run: func(_ context.Context, _ bool, name string, args ...string) error {
			f.commands = append(f.commands, name+" "+strings.Join(args, " "))
			last := args[len(args)-1]
			switch {
			case last == "update" || last == "makecache":
				f.fresh = true
			case name == "apt-cache" || slices.Contains(args, "list") || slices.Contains(args, "provides"):
				if _, ok := f.packages[last]; !ok || !f.fresh {
					return errors.New("no such package")
				}
			case slices.Contains(args, "install"):
				if f.broken > 0 {
					f.broken--
					return errors.New("404")
				}
				for _, pkg := range args {
					for _, file := range f.packages[pkg] {
						f.files[file] = true
					}
				}
			}
			return nil
		},
	}
}

func debian() *fake {
	return &fake{
		files: map[string]bool{"apt-get": true, "ip": true, "iptables": true, "modprobe": true},
		packages: map[string][]string{
			"qemu-system-x86": {"qemu-system-x86_64", "/usr/lib/qemu/virtiofsd"},
			"qemu-system-arm": {"qemu-system-aarch64", "/usr/lib/qemu/virtiofsd"},
		},
	}
}

func TestEnsureInstallsOnlyWhatIsMissing(t *testing.T) {
	f := debian()
	if err := f.machine(true).ensure(t.Context(), []Purpose{Run}); err != nil {
		t.Fatal(err)
	}
	if !f.fresh {
		t.Error("the list of packages was not read although it was empty")
	}
	want := "apt-get install -y --no-install-recommends " + own.qemuDeb
	if got := f.commands[len(f.commands)-1]; got != want {
		t.Errorf("ran %q, want %q", got, want)
	}
	if !strings.Contains(f.out.String(), "runs the virtual machines") {
		t.Errorf("does not say why: %q", f.out.String())
	}
	ran := len(f.commands)
	f.out.Reset()
	if err := f.machine(true).ensure(t.Context(), []Purpose{Run}); err != nil {
		t.Fatal(err)
	}
	if len(f.commands) != ran || f.out.Len() != 0 {
		t.Errorf("with nothing missing it still ran %q and printed %q", f.commands[ran:], f.out.String())
	}
}

func TestOptionalThings(t *testing.T) {
	f := debian()
	f.fresh = true
	f.packages[own.qemuDeb] = []string{own.qemu}
	if err := f.machine(true).ensure(t.Context(), []Purpose{Run}); err != nil {
		t.Fatalf("without virtiofsd in the repositories: %v", err)
	}
	if !strings.Contains(f.out.String(), "9p instead") {
		t.Errorf("does not say what happens without virtiofsd: %q", f.out.String())
	}
	if err := f.machine(false).ensure(t.Context(), []Purpose{Run}); err != nil {
		t.Errorf("without root: %v", err)
	}
	f.packages["virtiofsd"] = []string{"virtiofsd"}
	f.broken = 1
	if err := f.machine(true).ensure(t.Context(), []Purpose{Run}); err != nil {
		t.Errorf("its installation fails: %v", err)
	}
	if err := f.machine(true).ensure(t.Context(), []Purpose{Run}); err != nil || !f.files["virtiofsd"] {
		t.Errorf("not installed where it can be (%v)", err)
	}
}

func TestEnsureRetriesWithAFreshList(t *testing.T) {
	f := debian()
	f.fresh, f.broken = true, 1
	f.files["virtiofsd"] = true
	if err := f.machine(true).ensure(t.Context(), []Purpose{Run}); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(f.commands, "apt-get update") {
		t.Errorf("did not read the list of packages after a failure: %q", f.commands)
	}
}

func TestEnsureNeedsRoot(t *testing.T) {
	f := debian()
	err := f.machine(false).ensure(t.Context(), []Purpose{Run})
	if err == nil || !strings.Contains(err.Error(), "sudo apt-get install -y --no-install-recommends "+own.qemuDeb) {
		t.Fatalf("got %v, want an error with the command", err)
	}
	if len(f.commands) != 0 {
		t.Errorf("ran %q", f.commands)
	}
}

func TestEnsureNamesWhatTheRepositoriesLack(t *testing.T) {
	f := debian()
	f.packages = map[string][]string{}
	err := f.machine(true).ensure(t.Context(), []Purpose{Run})
	if err == nil || !strings.Contains(err.Error(), own.qemuDeb) {
		t.Fatalf("got %v, want an error that names the package", err)
	}
}

func TestEnsureNoticesAPackageWithoutTheFile(t *testing.T) {
	f := debian()
	f.packages[own.qemuDeb] = nil
	err := f.machine(true).ensure(t.Context(), []Purpose{Run})
	if err == nil || !strings.Contains(err.Error(), "still missing") {
		t.Fatalf("got %v, want an error", err)
	}
}

func TestEnsureTakesPathsOnDnf(t *testing.T) {
	f := debian()
	f.fresh = true
	f.files = map[string]bool{"dnf": true, "ip": true, "iptables": true, "modprobe": true, "virtiofsd": true}
	f.packages = map[string][]string{"/usr/bin/" + own.qemu: {own.qemu}}
	if err := f.machine(true).ensure(t.Context(), []Purpose{Run}); err != nil {
		t.Fatal(err)
	}
	if got := f.commands[len(f.commands)-1]; !strings.HasPrefix(got, "dnf install -y ") || !strings.HasSuffix(got, " /usr/bin/"+own.qemu) {
		t.Errorf("ran %q", got)
	}
}

func TestKernelSourceOfTheUser(t *testing.T) {
	f := &fake{files: map[string]bool{}}
	m := f.machine(true)
	has := func() bool {
		return slices.ContainsFunc(m.missing([]Purpose{Kernel}), func(n need) bool { return slices.Contains(n.deb, "linux-source-6.1") })
	}
	if !has() {
		t.Fatal("the kernel source is not required")
	}
	m.source = true
	if has() {
		t.Error("KERNEL_SOURCE is set, and a kernel source is still required")
	}
}

func TestEveryRequirementHasPackages(t *testing.T) {
	for purpose, list := range requirements {
		for _, r := range list {
			if len(r.files) == 0 || r.why == "" || (len(r.deb) == 0 || len(r.rpm) == 0) && r.elsewhere == "" {
				t.Errorf("to %s: %+v is not complete", purpose, r)
			}
		}
	}
}

func TestNoPackageBringsIt(t *testing.T) {
	f := &fake{files: map[string]bool{"dnf": true}, fresh: true}
	for _, root := range []bool{true, false} {
		err := f.machine(root).ensure(t.Context(), []Purpose{CrossAgent})
		if !errors.Is(err, ErrElsewhere) || !strings.Contains(err.Error(), "on a machine of that architecture") {
			t.Errorf("got %v, want an error that says what to do", err)
		}
	}
	if len(f.commands) != 0 {
		t.Errorf("ran %q", f.commands)
	}
}
