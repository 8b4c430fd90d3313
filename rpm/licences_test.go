package rpm

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestLicences(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"mod/github.com/!burnt!sushi/toml@v1.6.0/COPYING": "MIT of toml\n",
		"mod/github.com/a/b@v2.0.0+incompatible/LICENSE":  "Apache\n",
		"mod/github.com/a/b@v2.0.0+incompatible/NOTICE":   "B is by A.\n",
		"mod/github.com/a/b@v2.0.0+incompatible/main.go":  "package b\n",
		"mod/github.com/c/d@v1.0.0/LICENSE.md":            "\nApache\n",
		"mod/github.com/c/d@v1.0.0/GO_LICENSE":            "BSD\n",
		"mod/github.com/e/none@v1.0.0/README":             "free\n",
		"go/LICENSE":                                      "BSD\n",
		"common/GPL-2":                                    "GPL, version 2\n",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	texts := Texts{Modules: filepath.Join(dir, "mod"), Go: filepath.Join(dir, "go"), Common: []string{"/nowhere", filepath.Join(dir, "common")}}
	packages := []spdxPackage{
		golang("github.com/BurntSushi/toml", "v1.6.0", ""),
		golang("github.com/a/b", "v2.0.0+incompatible", ""),
		golang("github.com/c/d", "v1.0.0", ""),
		golang(standardLibrary, "1.26.8", ""),
		{Name: "linux", VersionInfo: "6.1.9", LicenseDeclared: "GPL-2.0-only WITH Linux-syscall-note"},
		Library{Name: "libseccomp", Licence: "LGPL-2.1-only"}.pack(),
		{Name: "vmm-task", Supplier: "Organization: " + vendor},
	}
	got, err := texts.licences(packages)
	if err != nil {
		t.Fatal(err)
	}
	rule := strings.Repeat("-", 80) + "\n\n"
	for _, want := range []string{
		"github.com/BurntSushi/toml v1.6.0, COPYING\n" + rule + "MIT of toml\n",
		"github.com/a/b v2.0.0+incompatible, LICENSE\ngithub.com/c/d v1.0.0, LICENSE.md\n" + rule + "Apache\n",
		"github.com/a/b v2.0.0+incompatible, NOTICE\n" + rule + "B is by A.\n",
		"github.com/c/d v1.0.0, GO_LICENSE\nstdlib 1.26.8, LICENSE\n" + rule + "BSD\n",
		"linux 6.1.9 (GPL-2.0-only WITH Linux-syscall-note)\n" + rule + "GPL, version 2\n",
		"Not here: the text for libseccomp: LGPL-2.1-only",
	} {
		if !strings.Contains(string(got), want) {
			t.Errorf("%s\nlacks\n%s", got, want)
		}
	}
	if strings.Contains(string(got), "vmm-task") || strings.Contains(string(got), "main.go") {
		t.Errorf("%s\nhas what is no licence of others", got)
	}
	for want, p := range map[string]spdxPackage{
		"go mod download":     golang("github.com/not/there", "v1.0.0", ""),
		"has no file with it": golang("github.com/e/none", "v1.0.0", ""),
	} {
		if _, err := texts.licences([]spdxPackage{p}); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), p.Name) {
			t.Errorf("%v; want %q", err, want)
		}
	}
}
