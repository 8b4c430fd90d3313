package initrd

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/cpio"
)

func inputs(t *testing.T, dir string, when time.Time) Config {
	t.Helper()
	cfg := Config{Agent: filepath.Join(dir, "vmm-task"), Console: filepath.Join(dir, "console"), Output: filepath.Join(dir, "out", "kuasar.initrd")}
	for path, text := range map[string]string{cfg.Agent: "\x7fELF agent", cfg.Console: "archive"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, when, when); err != nil {
			t.Fatal(err)
		}
	}
	return cfg
}

func TestSameInputsSameBytes(t *testing.T) {
	var images [][]byte
	for _, when := range []time.Time{time.Unix(1e9, 0), time.Now()} {
		path, err := Build(t.Context(), inputs(t, t.TempDir(), when))
		if err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		images = append(images, data)
	}
	if !bytes.Equal(images[0], images[1]) {
		t.Error("two builds of the same inputs, in different folders at different times, differ")
	}
}

func TestRecords(t *testing.T) {
	path, err := Build(t.Context(), inputs(t, t.TempDir(), time.Now()))
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(file))
	if err != nil {
		t.Fatal(err)
	}
	byName := map[string]cpio.Record{}
	var names []string
	for _, r := range records {
		names = append(names, r.Name)
		byName[r.Name] = r
		if r.UID != 0 || r.GID != 0 || r.MTime != 0 {
			t.Errorf("%s belongs to %d:%d and is from %d", r.Name, r.UID, r.GID, r.MTime)
		}
		// The kernel makes no parents.
		if dir := filepath.Dir(r.Name); dir != "." && byName[dir].Mode&cpio.S_IFMT != cpio.S_IFDIR {
			t.Errorf("%s comes before its folder", r.Name)
		}
	}
	if !slices.IsSorted(names) {
		t.Errorf("not in order: %q", names)
	}
	if r := byName["init"]; r.Mode != cpio.S_IFREG|0o755 || r.FileSize != uint64(len("\x7fELF agent")) {
		t.Errorf("init is %v", r.Info)
	}
	if r := byName["dev/console"]; r.Mode != cpio.S_IFCHR|0o600 || r.Rmajor != 5 || r.Rminor != 1 {
		t.Errorf("dev/console is %v", r.Info)
	}
	if r := byName[strings.TrimPrefix(ConsoleArchive, "/")]; r.FileSize != uint64(len("archive")) {
		t.Errorf("the console's archive is %v", r.Info)
	}
	for _, dir := range []string{"proc", "sys", "dev", "run", "tmp", "etc"} {
		if byName[dir].Mode&cpio.S_IFMT != cpio.S_IFDIR {
			t.Errorf("%s is missing", dir)
		}
	}
}

func TestUnchangedIsNotWrittenAgain(t *testing.T) {
	cfg := inputs(t, t.TempDir(), time.Now())
	stat := func() os.FileInfo {
		path, err := Build(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	first := stat()
	if !os.SameFile(first, stat()) {
		t.Error("written again")
	}
	if err := os.WriteFile(cfg.Agent, []byte("\x7fELF another"), 0o755); err != nil {
		t.Fatal(err)
	}
	if os.SameFile(first, stat()) {
		t.Error("another agent, the same initrd")
	}
}

func TestRefusals(t *testing.T) {
	cfg := inputs(t, t.TempDir(), time.Now())
	try := func(what, want string) {
		t.Helper()
		if _, err := Build(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", what, err, want)
		}
		if _, err := os.Stat(cfg.Output); err == nil {
			t.Errorf("%s: an initrd was written", what)
		}
	}
	if err := os.WriteFile(cfg.Agent, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	try("a script as the agent", "no ELF binary")
	if err := os.WriteFile(cfg.Agent, append([]byte("\x7fELF"), make([]byte, Limit)...), 0o755); err != nil {
		t.Fatal(err)
	}
	try("too large an agent", "more than")
	if err := os.Remove(cfg.Agent); err != nil {
		t.Fatal(err)
	}
	try("no agent", "cannot read the agent")
}

func TestDuplicateName(t *testing.T) {
	err := write(&bytes.Buffer{}, []cpio.Record{cpio.Directory("etc", 0o755), cpio.StaticFile("etc", "x", 0o644)})
	if err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("got %v", err)
	}
}
