package rpm

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestLibraries(t *testing.T) {
	none := []Library{{Name: "glibc", Licence: "LGPL-2.1-or-later"}, {Name: "libseccomp", Licence: "LGPL-2.1-only"}}
	ns := distribution()
	for name, c := range map[string]struct {
		arch    string
		files   []string
		answers map[string]string
		want    []Library
	}{
		"Debian": {
			"x86_64", []string{"/usr/lib/x86_64-linux-gnu/libc.a", "/usr/lib/x86_64-linux-gnu/libseccomp.a"},
			map[string]string{
				"dpkg-query -S /usr/lib/x86_64-linux-gnu/libc.a":            "libc6-dev:amd64: /usr/lib/x86_64-linux-gnu/libc.a",
				"dpkg-query -W -f ${Version} libc6-dev:amd64":               "2.36-9+deb12u14",
				"dpkg-query -S /usr/lib/x86_64-linux-gnu/libseccomp.a":      "libseccomp-dev:amd64: /usr/lib/x86_64-linux-gnu/libseccomp.a",
				"dpkg-query -W -f ${Version} libseccomp-dev:amd64":          "1:2.5.4-1",
				"rpm -qf --qf %{NAME} %{VERSION}-%{RELEASE}\n /usr/lib/...": "",
			},
			[]Library{
				{"glibc", "2.36-9+deb12u14", none[0].Licence, "pkg:deb/" + ns + "/libc6-dev@2.36-9%2Bdeb12u14"},
				{"libseccomp", "1:2.5.4-1", none[1].Licence, "pkg:deb/" + ns + "/libseccomp-dev@1:2.5.4-1"},
			},
		},
		"Debian, for aarch64": {
			"aarch64", []string{"/usr/aarch64-linux-gnu/lib/libc.a", "/usr/lib/x86_64-linux-gnu/libseccomp.a"},
			map[string]string{
				"dpkg-query -S /usr/aarch64-linux-gnu/lib/libc.a":          "libc6-dev-arm64-cross: /usr/aarch64-linux-gnu/lib/libc.a",
				"dpkg-query -W -f ${Version} libc6-dev-arm64-cross":        "2.36-8cross1",
				"dpkg-query -S /usr/lib/x86_64-linux-gnu/libseccomp.a":     "libseccomp-dev:amd64: /usr/lib/x86_64-linux-gnu/libseccomp.a",
				"dpkg-query -W -f ${Version} libseccomp-dev:amd64":         "2.5.4-1",
				"dpkg-query -W -f ${Version} libseccomp-dev:amd64:unknown": "",
			},
			[]Library{{"glibc", "2.36-8cross1", none[0].Licence, "pkg:deb/" + ns + "/libc6-dev-arm64-cross@2.36-8cross1"}, none[1]},
		},
		"openEuler": {
			"x86_64", []string{"/usr/lib64/libc.a"},
			map[string]string{"rpm -qf --qf %{NAME} %{VERSION}-%{RELEASE}\n /usr/lib64/libc.a": "glibc-static 2.38-29.oe2403"},
			[]Library{{"glibc", "2.38-29.oe2403", none[0].Licence, "pkg:rpm/" + ns + "/glibc-static@2.38-29.oe2403"}, none[1]},
		},
		"installed by hand": {"x86_64", []string{"/usr/lib64/libc.a", "/usr/lib64/libseccomp.a"}, nil, none},
		"nothing":           {"x86_64", nil, nil, none},
	} {
		got := libraries(t.Context(), c.arch, func(_ context.Context, name string, args ...string) string {
			return c.answers[name+" "+strings.Join(args, " ")]
		}, func(pattern string) string {
			if slices.Contains(c.files, pattern) {
				return pattern
			}
			return ""
		})
		if !slices.Equal(got, c.want) {
			t.Errorf("%s:\n%+v\n%+v", name, got, c.want)
		}
	}
}

func TestFetchedLibraries(t *testing.T) {
	dir := t.TempDir()
	fetch := func(name, version string) {
		root := filepath.Join(dir, name)
		for file, text := range map[string]string{
			"usr/lib/aarch64-linux-gnu/libseccomp.a":           "!<arch>\n",
			"usr/share/doc/libseccomp-dev/changelog.Debian.gz": "libseccomp (" + version + ") stable; urgency=low\n\n  * libseccomp (1.0)\n",
		} {
			path := filepath.Join(root, file)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			data := []byte(text)
			if filepath.Ext(file) == ".gz" {
				var err error
				if data, err = compress(data); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	found := func(arch string) string {
		list := []Library{{Name: "glibc", Version: "2.36"}, {Name: "libseccomp"}}
		fetched(list, dir, arch)
		if list[0] != (Library{Name: "glibc", Version: "2.36"}) {
			t.Errorf("what was known became %+v", list[0])
		}
		return list[1].Version
	}
	if v := found("aarch64"); v != "" {
		t.Errorf("of nothing: %q", v)
	}
	fetch("one", "2.5.4-1")
	if v := found("aarch64"); v != "2.5.4-1" {
		t.Errorf("of one: %q", v)
	}
	if v := found("x86_64"); v != "" {
		t.Errorf("of another architecture: %q", v)
	}
	fetch("two", "2.5.5-1")
	if v := found("aarch64"); v != "" {
		t.Errorf("of two that differ: %q", v)
	}
}
