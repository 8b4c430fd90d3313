package rpm

import (
	"bufio"
	"compress/gzip"
	"context"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strings"

	"kuasar.io/kuasar/ci/cache"
)

// HostLibraries returns the C libraries that this machine links into the agent, with the versions that
// its package manager knows, or those that package build fetched. Where neither knows them, they are
// without one.
func HostLibraries(ctx context.Context, arch string) []Library {
	list := libraries(ctx, arch, func(ctx context.Context, name string, args ...string) string {
		out, err := exec.CommandContext(ctx, name, args...).Output()
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(out))
	}, glob)
	if dir, err := cache.Dir(); err == nil {
		fetched(list, filepath.Join(dir, "sysroot"), arch)
	}
	return list
}

// fetched fills in libraries of another architecture that were unpacked below dir, from Debian's packages
// and without telling the package manager. Of several that differ, none is known to be the one.
func fetched(list []Library, dir, arch string) {
	for i, l := range list {
		if l.Version != "" {
			continue
		}
		versions := map[string]bool{}
		roots, _ := filepath.Glob(filepath.Join(dir, "*"))
		for _, root := range roots {
			if _, err := os.Stat(filepath.Join(root, "usr/lib", triplets[arch], l.Name+".a")); err == nil {
				versions[debianVersion(filepath.Join(root, "usr/share/doc", l.Name+"-dev", "changelog.Debian.gz"))] = true
			}
		}
		for version := range versions {
			if len(versions) == 1 {
				list[i].from(version, "pkg:deb/"+distribution()+"/"+l.Name+"-dev")
			}
		}
	}
}

var debianEntry = regexp.MustCompile(`^\S+ \(([^)]+)\)`)

// debianVersion returns the version that a Debian changelog begins with, "" if there is none.
func debianVersion(changelog string) string {
	f, err := os.Open(changelog)
	if err != nil {
		return ""
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return ""
	}
	line, _ := bufio.NewReader(z).ReadString('\n')
	m := debianEntry.FindStringSubmatch(line)
	if m == nil {
		return ""
	}
	return m[1]
}

func glob(pattern string) string {
	found, _ := filepath.Glob(pattern)
	for _, f := range found {
		if resolved, err := filepath.EvalSymlinks(f); err == nil {
			return resolved
		}
	}
	return ""
}

// triplets are Debian's folders of libraries, by architecture.
var triplets = map[string]string{"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}

// libraries asks run for packages of the archives that find finds.
func libraries(ctx context.Context, arch string, run func(ctx context.Context, name string, args ...string) string, find func(pattern string) string) []Library {
	list := []Library{
		{Name: "glibc", Licence: "LGPL-2.1-or-later"},
		{Name: "libseccomp", Licence: "LGPL-2.1-only"},
	}
	for i, archive := range []string{"libc.a", "libseccomp.a"} {
		var file string
		for _, dir := range []string{"/usr/lib/" + triplets[arch], "/usr/" + triplets[arch] + "/lib", "/usr/lib64"} {
			if file = find(path.Join(dir, archive)); file != "" {
				break
			}
		}
		if file == "" {
			continue
		}
		// "libc6-dev:amd64: /usr/lib/x86_64-linux-gnu/libc.a"
		if owner, _, ok := strings.Cut(run(ctx, "dpkg-query", "-S", file), ": "); ok {
			version := run(ctx, "dpkg-query", "-W", "-f", "${Version}", owner)
			name, _, _ := strings.Cut(owner, ":")
			list[i].from(version, "pkg:deb/"+distribution()+"/"+name)
		} else if nvr := run(ctx, "rpm", "-qf", "--qf", "%{NAME} %{VERSION}-%{RELEASE}\n", file); nvr != "" {
			name, version, _ := strings.Cut(strings.SplitN(nvr, "\n", 2)[0], " ")
			list[i].from(version, "pkg:rpm/"+distribution()+"/"+name)
		}
	}
	return list
}

func (l *Library) from(version, pkg string) {
	if version == "" {
		return
	}
	l.Version = version
	l.Package = pkg + "@" + strings.ReplaceAll(url.PathEscape(version), "+", "%2B")
}

var osID = regexp.MustCompile(`(?m)^ID="?([A-Za-z0-9._-]+)"?$`)

// distribution is this machine's, as a namespace of package URLs.
func distribution() string {
	text, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "unknown"
	}
	m := osID.FindSubmatch(text)
	if m == nil {
		return "unknown"
	}
	return strings.ToLower(string(m[1]))
}
