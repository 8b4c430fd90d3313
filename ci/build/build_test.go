package build

import (
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

func git(t *testing.T, dir string, args ...string) {
	t.Helper()
	cmd := exec.Command("git", append([]string{"-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false"}, args...)...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("git %q: %v\n%s", args, err, out)
	}
}

func TestStamp(t *testing.T) {
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("needs git")
	}
	t.Setenv("SOURCE_DATE_EPOCH", "")
	dir := t.TempDir()
	tree := Tree{Root: dir}
	if version, commit, committed := tree.Stamp(t.Context()); version != release+"-dev" || commit != "" || !committed.IsZero() {
		t.Errorf("outside of a repository: %q, %q, %v", version, commit, committed)
	}
	git(t, dir, "init", "-q")
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, []byte("one"), 0o644); err != nil {
		t.Fatal(err)
	}
	git(t, dir, "add", "f")
	t.Setenv("GIT_COMMITTER_DATE", "2001-02-03T04:05:06Z")
	git(t, dir, "commit", "-qm", "one")
	version, commit, committed := tree.Stamp(t.Context())
	if version != release+"-dev" || len(commit) != 12 || !committed.Equal(time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)) {
		t.Errorf("a commit: %q, %q, %v", version, commit, committed)
	}
	if err := os.WriteFile(file, []byte("two"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, dirty, _ := tree.Stamp(t.Context()); dirty != commit+"-dirty" {
		t.Errorf("a changed tree: %q", dirty)
	}
	git(t, dir, "commit", "-qam", "two")
	git(t, dir, "tag", "-m", "release", "v1.2.3")
	if version, commit, _ := tree.Stamp(t.Context()); version != "1.2.3" || strings.HasPrefix(commit, "v") || commit == "" {
		t.Errorf("a tag: %q, %q", version, commit)
	}
	tree.Version = "1.3.0"
	t.Setenv("SOURCE_DATE_EPOCH", "86400")
	if version, _, committed := tree.Stamp(t.Context()); version != "1.3.0" || !committed.Equal(time.Unix(86400, 0)) {
		t.Errorf("what the caller says does not win: %q, %v", version, committed)
	}
}

func TestVersionThatIsNone(t *testing.T) {
	for _, version := range []string{"1.0 -X main.evil=1", "latest", "1.0'", "-1"} {
		if _, err := (Tree{Root: t.TempDir(), Version: version}).stamp(t.Context()); err == nil || !strings.Contains(err.Error(), "cannot build the version") {
			t.Errorf("%q: %v", version, err)
		}
	}
}

func TestPath(t *testing.T) {
	own := Tree{Root: "r"}.Architecture()
	other := map[string]string{"x86_64": "aarch64", "aarch64": "x86_64"}[own]
	if other == "" {
		t.Skip("the appliance is not built on " + own)
	}
	for arch, want := range map[string]string{
		"":    "r/out/bin/vmm-task",
		own:   "r/out/bin/vmm-task",
		other: "r/out/" + other + "/bin/vmm-task",
	} {
		if got := (Tree{Root: "r", Arch: arch}).Path(Agent); got != want {
			t.Errorf("for %q: %s, want %s", arch, got, want)
		}
	}
	for name, step := range map[string]func(Tree) error{
		"everything": func(tree Tree) error { return tree.Everything(t.Context()) },
		"kernel":     func(tree Tree) error { return tree.Kernel(t.Context()) },
		"image":      func(tree Tree) error { return tree.Image(t.Context(), "erofs") },
	} {
		if err := step(Tree{Root: t.TempDir(), Arch: "riscv64"}); err == nil || !strings.Contains(err.Error(), `"riscv64"`) {
			t.Errorf("%s for an architecture that is none: %v", name, err)
		}
	}
}

func TestImageOfAnotherFileSystem(t *testing.T) {
	if err := (Tree{Root: t.TempDir()}).Image(t.Context(), "xfs"); err == nil || !strings.Contains(err.Error(), `"xfs"`) {
		t.Errorf("got %v", err)
	}
}

func TestCompileStampsTheProgram(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":                            "module kuasar.io/kuasar\n\ngo 1.26.0\n",
		"guest/protocol/version/version.go": "package version\n\nvar Version, Commit string\n",
		"cmd/main.go":                       "package main\n\nimport \"kuasar.io/kuasar/guest/protocol/version\"\n\nfunc main() { print(version.Version, \" \", version.Commit) }\n",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// What would make another binary of the same source must not get through.
	t.Setenv("GOFLAGS", "-race")
	t.Setenv("GOOS", "plan9")
	p := program{path: "./cmd", output: "bin/cmd", env: []string{"CGO_ENABLED=0"}, link: "-s -w"}
	tree := Tree{Root: dir}
	stamp := []string{"-X", versionPackage + ".Version=1.2.3", "-X", versionPackage + ".Commit=abc"}
	if err := tree.compile(t.Context(), p, stamp); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(tree.Path(p.output)).CombinedOutput()
	if err != nil || string(out) != "1.2.3 abc" {
		t.Errorf("got %q, %v", out, err)
	}
	elsewhere := Tree{Root: dir, Arch: map[string]string{"amd64": "aarch64", "arm64": "x86_64"}[runtime.GOARCH]}
	if err := elsewhere.compile(t.Context(), p, stamp); err != nil {
		t.Fatal(err)
	}
	binary, err := elf.Open(elsewhere.Path(p.output))
	if err != nil {
		t.Fatal(err)
	}
	defer binary.Close()
	if want := map[string]elf.Machine{"x86_64": elf.EM_X86_64, "aarch64": elf.EM_AARCH64}[elsewhere.Arch]; binary.Machine != want {
		t.Errorf("the program for %s is for %v", elsewhere.Arch, binary.Machine)
	}
	p.path = "./missing"
	if err := tree.compile(t.Context(), p, stamp); err == nil || !strings.Contains(err.Error(), "cannot build cmd") {
		t.Errorf("a program that does not exist: %v", err)
	}
}
