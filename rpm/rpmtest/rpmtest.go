// Package rpmtest makes small packages that stand in for true ones in tests of dependencies.
package rpmtest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/goreleaser/nfpm/v2"
	"github.com/goreleaser/nfpm/v2/files"
	_ "github.com/goreleaser/nfpm/v2/rpm" // the packager
)

// A Package is one that stands in for another.
type Package struct {
	Name    string
	Version string // empty means "1"
	Release string // empty means "1"
	// Provides, Requires, Recommends and Conflicts are written as in a spec file: "a", "a = 1", "(a or b)".
	Provides, Requires, Recommends, Conflicts []string
	// Files are the contents of regular files by their absolute paths; those below a folder "bin" or
	// "sbin" are executable.
	Files map[string]string
	// Links are the targets of symbolic links by their absolute paths.
	Links map[string]string
	// Post is the text of a scriptlet, run by /bin/sh after the installation; empty means none.
	Post string
}

// Stub is a package without files that provides what is given besides its name.
func Stub(name, version string, provides ...string) Package {
	return Package{Name: name, Version: version, Provides: provides}
}

// Program is a package with an executable shell script at path.
func Program(name, version, path, script string) Package {
	return Package{Name: name, Version: version, Files: map[string]string{path: script}}
}

// Write writes packages for this machine's architecture into dir, which is made if it is not there, and
// returns their paths.
func Write(dir string, packages ...Package) ([]string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	var paths []string
	for _, p := range packages {
		path, err := p.write(dir)
		if err != nil {
			return nil, fmt.Errorf("cannot write the package %s: %w", p.Name, err)
		}
		paths = append(paths, path)
	}
	return paths, nil
}

func (p Package) write(dir string) (path string, err error) {
	scratch, err := os.MkdirTemp("", "rpmtest-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(scratch)
	at := time.Unix(1, 0)
	contents := files.Contents{}
	for name, text := range p.Files {
		source := filepath.Join(scratch, strconv.Itoa(len(contents)))
		if err := os.WriteFile(source, []byte(text), 0o600); err != nil {
			return "", err
		}
		mode := os.FileMode(0o644)
		if strings.HasSuffix(filepath.Dir(name), "bin") {
			mode = 0o755
		}
		contents = append(contents, &files.Content{Source: source, Destination: name, FileInfo: &files.ContentFileInfo{Mode: mode, Owner: "root", Group: "root", MTime: at}})
	}
	for name, target := range p.Links {
		contents = append(contents, &files.Content{Source: target, Destination: name, Type: files.TypeSymlink, FileInfo: &files.ContentFileInfo{Owner: "root", Group: "root", MTime: at}})
	}
	post := ""
	if p.Post != "" {
		post = filepath.Join(scratch, "post")
		if err := os.WriteFile(post, []byte(p.Post), 0o600); err != nil {
			return "", err
		}
	}
	info := nfpm.WithDefaults(&nfpm.Info{
		Name: p.Name, Arch: runtime.GOARCH, Platform: "linux", Version: orOne(p.Version), VersionSchema: "none", Release: orOne(p.Release),
		Maintainer: "Kuasar <kuasar@kuasar.io>", Description: "Stands in for " + p.Name + " in tests.", License: "Apache-2.0",
		MTime: at, DisableGlobbing: true,
		Overridables: nfpm.Overridables{
			Provides: p.Provides, Depends: p.Requires, Recommends: p.Recommends, Conflicts: p.Conflicts, Contents: contents,
			Scripts: nfpm.Scripts{PostInstall: post},
			RPM:     nfpm.RPM{BuildHost: "localhost", Compression: "gzip"},
		},
	})
	if err := nfpm.Validate(info); err != nil {
		return "", err
	}
	format, err := nfpm.Get("rpm")
	if err != nil {
		return "", err
	}
	path = filepath.Join(dir, format.ConventionalFileName(info))
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Chtimes(path, at, at)) }()
	return path, format.Package(info, f)
}

func orOne(s string) string {
	if s == "" {
		return "1"
	}
	return s
}
