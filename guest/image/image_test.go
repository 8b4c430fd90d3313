package image

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/cpio"
)

func inputs(t *testing.T, fs string, when time.Time) Config {
	t.Helper()
	dir := t.TempDir()
	cfg := Config{Agent: filepath.Join(dir, "vmm-task"), Console: filepath.Join(dir, "console"), FileSystem: fs, Output: filepath.Join(dir, "out", "image")}
	for path, text := range map[string]string{cfg.Agent: "\x7fELF agent", cfg.Console: strings.Repeat("archive", 10000)} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, when, when); err != nil {
			t.Fatal(err)
		}
	}
	return cfg
}

// need skips the test where a program of the system's is missing, and returns its path.
func need(t *testing.T, names ...string) (path string) {
	t.Helper()
	for _, name := range names {
		var err error
		if path, err = exec.LookPath(name); err != nil {
			if path, err = exec.LookPath("/usr/sbin/" + name); err != nil {
				t.Skipf("needs %s, which \"go tool mage image\" installs", name)
			}
		}
	}
	return path
}

var programs = map[string][]string{EROFS: {"mkfs.erofs"}, Ext4: {"mke2fs", "debugfs"}}

func TestSameInputsSameBytes(t *testing.T) {
	for fs, names := range programs {
		t.Run(fs, func(t *testing.T) {
			need(t, names...)
			var images [][]byte
			for _, when := range []time.Time{time.Unix(1e9, 0), time.Now()} {
				path, err := Build(t.Context(), inputs(t, fs, when))
				if err != nil {
					t.Fatal(err)
				}
				made, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				images = append(images, made)
			}
			if !bytes.Equal(images[0], images[1]) {
				t.Error("two builds of the same inputs, in different folders at different times, differ")
			}
			if len(images[0])%512 != 0 {
				t.Errorf("%d bytes are no whole number of a disk's sectors", len(images[0]))
			}
		})
	}
}

func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func TestExt4IsWhole(t *testing.T) {
	debugfs := need(t, "mke2fs", "debugfs")
	path, err := Build(t.Context(), inputs(t, Ext4, time.Now()))
	if err != nil {
		t.Fatal(err)
	}
	output(t, need(t, "e2fsck"), "-fn", path)
	for file, want := range map[string][]string{
		"/init":                             {"Type: regular", "Mode:  0755", "User:     0", "mtime: 0x00000001", "ctime: 0x00000001", "crtime: 0x00000001"},
		"/sbin/init":                        {"Type: symlink", `"/init"`},
		"/etc/resolv.conf":                  {"Type: symlink"},
		"/etc/passwd":                       {"Type: regular", "Mode:  0644"},
		"/tmp":                              {"Type: directory", "Mode:  01777"},
		"/root":                             {"Mode:  0700"},
		"/dev":                              {"Type: directory"},
		"/proc":                             {"Type: directory"},
		"/usr/lib/kuasar/console.cpio.gz":   {"Size: 70000"},
		"/usr/lib/kuasar/console.cpio.gz/x": {"not"},
	} {
		got := output(t, debugfs, "-R", "stat "+file, path)
		for _, w := range want {
			if !strings.Contains(got, w) {
				t.Errorf("%s lacks %q:\n%s", file, w, got)
			}
		}
	}
}

func TestEROFSIsWhole(t *testing.T) {
	need(t, "mkfs.erofs")
	fsck := need(t, "fsck.erofs")
	path, err := Build(t.Context(), inputs(t, EROFS, time.Now()))
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(t.TempDir(), "root")
	output(t, fsck, "--extract="+root, "--no-preserve-owner", "--preserve-perms", path)
	mode := func(file string) os.FileMode {
		info, err := os.Lstat(filepath.Join(root, file))
		if err != nil {
			t.Fatal(err)
		}
		return info.Mode()
	}
	for file, want := range map[string]os.FileMode{
		"init": 0o755, "etc/passwd": 0o644, "proc": os.ModeDir | 0o755, "dev": os.ModeDir | 0o755, "run": os.ModeDir | 0o755,
		"root": os.ModeDir | 0o700, "tmp": os.ModeDir | os.ModeSticky | 0o777, "etc/resolv.conf": os.ModeSymlink | 0o777,
	} {
		if got := mode(file); got != want {
			t.Errorf("%s is %v, not %v", file, got, want)
		}
	}
	if target, err := os.Readlink(filepath.Join(root, "sbin/init")); err != nil || target != "/init" {
		t.Errorf("sbin/init leads to %q, %v", target, err)
	}
	if agent, err := os.ReadFile(filepath.Join(root, "init")); err != nil || string(agent) != "\x7fELF agent" {
		t.Errorf("init is %q, %v", agent, err)
	}
}

func TestRefusals(t *testing.T) {
	cfg := inputs(t, "xfs", time.Now())
	try := func(what, want string) {
		t.Helper()
		if _, err := Build(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", what, err, want)
		}
		if _, err := os.Stat(cfg.Output); err == nil {
			t.Errorf("%s: an image was written", what)
		}
	}
	try("another file system", `"xfs" is neither`)
	cfg.FileSystem = EROFS
	if err := os.WriteFile(cfg.Agent, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	try("a script as the agent", "no ELF binary")
}

// TestFailuresAreSeen: debugfs ends with 0 whatever happens.
func TestFailuresAreSeen(t *testing.T) {
	need(t, programs[Ext4]...)
	dir := t.TempDir()
	err := makeExt4(t.Context(), dir, filepath.Join(dir, "image"), []cpio.Record{cpio.StaticFile("etc/passwd", "x", 0o644)})
	if err == nil || !strings.Contains(err.Error(), "debugfs") {
		t.Errorf("a file without its folder: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := run(ctx, "debugfs", nil, "-V"); err == nil {
		t.Error("a cancelled build went on")
	}
	if err := run(t.Context(), "no-such-program", nil); err == nil || !strings.Contains(err.Error(), "not installed") {
		t.Errorf("a program that is missing: %v", err)
	}
}
