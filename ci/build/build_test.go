package build

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func git(t *testing.T, dir string, args ...string) {
	t.Helper()
	cmd := exec.Command("git", append([]string{"-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false"}, args...)...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("git %q: %v\n%s", args, err, out)
	}
}

func TestVersion(t *testing.T) {
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("needs git")
	}
	dir := t.TempDir()
	tree := Tree{Root: dir}
	if version, commit := tree.version(t.Context()); version != release+"-dev" || commit != "" {
		t.Errorf("outside of a repository: %q, %q", version, commit)
	}
	git(t, dir, "init", "-q")
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, []byte("one"), 0o644); err != nil {
		t.Fatal(err)
	}
	git(t, dir, "add", "f")
	git(t, dir, "commit", "-qm", "one")
	version, commit := tree.version(t.Context())
	if version != release+"-dev" || len(commit) != 12 {
		t.Errorf("a commit: %q, %q", version, commit)
	}
	if err := os.WriteFile(file, []byte("two"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, dirty := tree.version(t.Context()); dirty != commit+"-dirty" {
		t.Errorf("a changed tree: %q", dirty)
	}
	git(t, dir, "commit", "-qam", "two")
	git(t, dir, "tag", "-m", "release", "v1.2.3")
	if version, commit := tree.version(t.Context()); version != "1.2.3" || strings.HasPrefix(commit, "v") || commit == "" {
		t.Errorf("a tag: %q, %q", version, commit)
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
	p := program{path: "./cmd", output: "out/bin/cmd", env: []string{"CGO_ENABLED=0"}, link: "-s -w"}
	tree := Tree{Root: dir}
	stamp := []string{"-X", versionPackage + ".Version=1.2.3", "-X", versionPackage + ".Commit=abc"}
	if err := tree.compile(t.Context(), p, stamp); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(filepath.Join(dir, p.output)).CombinedOutput()
	if err != nil || string(out) != "1.2.3 abc" {
		t.Errorf("got %q, %v", out, err)
	}
	p.path = "./missing"
	if err := tree.compile(t.Context(), p, stamp); err == nil || !strings.Contains(err.Error(), "cannot build cmd") {
		t.Errorf("a program that does not exist: %v", err)
	}
}
