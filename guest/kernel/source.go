package kernel

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"kuasar.io/kuasar/ci/cache"
)

// A source is where the kernel comes from: a tarball or a tree.
type source struct {
	path string
	tree bool
}

// findSource returns the source named by want, or, with an empty want, what the distribution's
// source package installed below dir (/usr/src): Debian's linux-source-6.1.tar.xz or openEuler's
// linux-<version> tree. Of several the one of series 6.1 is preferred, because it is the tested
// one, then the newest.
func findSource(want, dir string) (source, error) {
	if want != "" {
		info, err := os.Stat(want)
		if err != nil {
			return source{}, fmt.Errorf("cannot use KERNEL_SOURCE: %w", err)
		}
		if info.IsDir() && !isTree(want) {
			return source{}, fmt.Errorf("cannot use KERNEL_SOURCE: %s holds no kernel source (no Kconfig and init/main.c)", want)
		}
		return source{want, info.IsDir()}, nil
	}
	found, err := filepath.Glob(filepath.Join(dir, "linux-*"))
	if err != nil {
		return source{}, err
	}
	var usable []source
	for _, path := range found {
		info, err := os.Stat(path)
		switch {
		case err != nil:
		case info.IsDir() && isTree(path):
			usable = append(usable, source{path, true})
		case info.Mode().IsRegular() && tarball.MatchString(filepath.Base(path)):
			usable = append(usable, source{path, false})
		}
	}
	if len(usable) == 0 {
		return source{}, fmt.Errorf("no kernel source below %s: install linux-source-6.1 (Debian) or kernel-source (openEuler), or name a tree or tarball in KERNEL_SOURCE", dir)
	}
	slices.SortStableFunc(usable, func(a, b source) int {
		va, vb := pathVersion(a.path), pathVersion(b.path)
		if ta, tb := slices.Equal(va, tested), slices.Equal(vb, tested); ta != tb {
			if ta {
				return -1
			}
			return 1
		}
		return slices.Compare(vb, va)
	})
	return usable[0], nil
}

// tested is the series that the tests boot.
var tested = []int{6, 1}

var (
	tarball    = regexp.MustCompile(`^linux-.*\.tar(\.(xz|gz|bz2|zst))?$`)
	inName     = regexp.MustCompile(`[0-9]+\.[0-9]+`)
	inMakefile = regexp.MustCompile(`(?m)^(VERSION|PATCHLEVEL)\s*=\s*([0-9]+)\s*$`)
)

func pathVersion(path string) []int { return numbers(inName.FindString(filepath.Base(path))) }

func isTree(dir string) bool {
	for _, name := range []string{"Kconfig", "init/main.c"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return false
		}
	}
	return true
}

// identify adds to k what tells this source from another.
func (s source) identify(k *cache.Key) {
	if s.tree {
		k.AddTree("source tree", s.path)
	} else {
		k.AddFile("source tarball", s.path)
	}
}

// unpack puts the source into dir, which exists and is empty, and returns its top. The source
// itself is never built in: it may be read-only, and a build leaves traces.
func (s source) unpack(ctx context.Context, dir string) (string, error) {
	if s.tree {
		top := filepath.Join(dir, "linux")
		if err := run(ctx, dir, "cp", "-a", "--reflink=auto", s.path+"/.", top); err != nil {
			return "", fmt.Errorf("cannot copy the kernel source: %w", err)
		}
		// A tree that somebody configured or built in would mix its products with ours.
		if err := run(ctx, top, "make", "-s", "mrproper"); err != nil {
			return "", fmt.Errorf("cannot clean the copy of the kernel source: %w", err)
		}
		return top, nil
	}
	if err := run(ctx, dir, "tar", "--no-same-owner", "-xf", s.path); err != nil {
		return "", fmt.Errorf("cannot unpack the kernel source: %w", err)
	}
	// The directory's name differs from tarball to tarball.
	for _, pattern := range []string{".", "*", "*/*"} {
		tops, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return "", err
		}
		for _, top := range tops {
			if isTree(top) {
				return top, nil
			}
		}
	}
	return "", fmt.Errorf("cannot find the kernel source in %s: it has no Kconfig and init/main.c", s.path)
}

// sourceVersion reads the version, as "6.1", from a tree's Makefile.
func sourceVersion(top string) (string, error) {
	data, err := os.ReadFile(filepath.Join(top, "Makefile"))
	if err != nil {
		return "", err
	}
	number := map[string]string{}
	for _, m := range inMakefile.FindAllStringSubmatch(string(data), -1) {
		number[m[1]] = m[2]
	}
	if number["VERSION"] == "" || number["PATCHLEVEL"] == "" {
		return "", fmt.Errorf("%s/Makefile does not say its version", top)
	}
	return number["VERSION"] + "." + number["PATCHLEVEL"], nil
}

var definition = regexp.MustCompile(`(?m)^[ \t]*(?:menu)?config[ \t]+([A-Za-z0-9_]+)[ \t]*$`)

// defined returns the symbols that the Kconfig files of a tree define.
func defined(top string) (map[string]bool, error) {
	known := map[string]bool{}
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !d.Type().IsRegular() || !strings.HasPrefix(d.Name(), "Kconfig") {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, m := range definition.FindAllStringSubmatch(string(data), -1) {
			known[m[1]] = true
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("cannot read the kernel's Kconfig: %w", err)
	}
	return known, nil
}

// run runs a short command and puts the end of what it printed into its error.
func run(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Env = dir, environment()
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(string(out[max(0, len(out)-2000):])))
	}
	return nil
}
