package lint

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func put(t *testing.T, root, name, text string) {
	t.Helper()
	path := filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// sample is a tree with a module inside the module.
func sample(t *testing.T) string {
	root := t.TempDir()
	put(t, root, "go.mod", "module example.com/a\n\ngo 1.26.0\n")
	put(t, root, "a.go", "package a\n")
	put(t, root, "ci/e2e/go.mod", "module example.com/a/ci/e2e\n\ngo 1.26.0\n")
	put(t, root, "ci/e2e/e.go", "package e2e\n")
	put(t, root, "out/go.mod", "module example.com/out\n")
	put(t, root, ".git/go.mod", "module example.com/git\n")
	return root
}

func TestFind(t *testing.T) {
	modules, err := find(sample(t))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range modules {
		names = append(names, m.name)
	}
	if want := []string{".", "ci/e2e"}; !slices.Equal(names, want) {
		t.Fatalf("got %q, want %q", names, want)
	}
	files, err := modules[0].files()
	if err != nil || len(files) != 1 || filepath.Base(files[0]) != "a.go" {
		t.Errorf("the files of the root are %q, %v", files, err)
	}
}

func TestRunNamesEveryFinding(t *testing.T) {
	root := sample(t)
	put(t, root, "a.go", "package  a\n")
	put(t, root, "ci/e2e/e.go", "package e2e\n\nfunc f() {  }\n")
	defer func(before []check) { checks = before }(checks)
	checks = []check{{"gofmt", gofmt}}
	var out bytes.Buffer
	err := Run(t.Context(), root, &out)
	if err == nil || !strings.Contains(err.Error(), "2 checks failed") {
		t.Fatalf("got %v\n%s", err, &out)
	}
	for _, name := range []string{"a.go", "e.go"} {
		if !strings.Contains(out.String(), name) {
			t.Errorf("%s is not named:\n%s", name, &out)
		}
	}
	put(t, root, "a.go", "package a\n")
	put(t, root, "ci/e2e/e.go", "package e2e\n")
	if err := Run(t.Context(), root, &out); err != nil {
		t.Error(err)
	}
}

func TestDatabaseOutOfReachIsNoFinding(t *testing.T) {
	status := func(code string) error { return exec.Command("sh", "-c", "exit "+code).Run() }
	if _, err := vulnerabilities("govulncheck: fetching vulnerabilities: no such host", status("1")); !errors.Is(err, errUnavailable) {
		t.Errorf("no database: %v", err)
	}
	if found, err := vulnerabilities("GO-2026-1", status("3")); err != nil || found != "GO-2026-1" {
		t.Errorf("a vulnerability: %q, %v", found, err)
	}
	if found, err := vulnerabilities("no packages", status("1")); err != nil || found == "" {
		t.Errorf("another failure is silent: %q, %v", found, err)
	}
	if found, err := vulnerabilities("", nil); found != "" || err != nil {
		t.Errorf("nothing found: %q, %v", found, err)
	}
}
