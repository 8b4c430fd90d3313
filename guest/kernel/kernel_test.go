package kernel

import (
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
)

func mustParse(t *testing.T, text string) []symbol {
	t.Helper()
	symbols, err := parse("t.config", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return symbols
}

func TestParse(t *testing.T) {
	got := mustParse(t, `# why
CONFIG_SMP=y
CONFIG_NR_CPUS=64

CONFIG_LOCALVERSION="-pod #1"
CONFIG_VMGENID=y # since 5.18
CONFIG_RETPOLINE=y # if known
# CONFIG_VT is not set
`)
	want := []symbol{
		{"SMP", "y", "", false, "t.config:2"},
		{"NR_CPUS", "64", "", false, "t.config:3"},
		{"LOCALVERSION", `"-pod #1"`, "", false, "t.config:5"},
		{"VMGENID", "y", "5.18", false, "t.config:6"},
		{"RETPOLINE", "y", "", true, "t.config:7"},
		{"VT", "", "", false, "t.config:8"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestParseRefusesWhatKconfigWouldIgnore(t *testing.T) {
	for _, line := range []string{
		"CONFIG_VT=n",
		"SMP=y",
		"CONFIG_SMP y",
		"# CONFIG_VT is not  set",
		"# CONFIG_SMP=y",
		"CONFIG_SMP=y # because",
		`CONFIG_LOCALVERSION="-pod`,
	} {
		if symbols, err := parse("t.config", []byte("# ok\n"+line+"\n")); err == nil {
			t.Errorf("%q was read as %v", line, symbols)
		} else if !strings.Contains(err.Error(), "t.config:2") {
			t.Errorf("%q: the error does not say where: %v", line, err)
		}
	}
}

func TestMerge(t *testing.T) {
	a, b := mustParse(t, "CONFIG_SMP=y\nCONFIG_VMGENID=y # since 5.18\n"), mustParse(t, "# CONFIG_VT is not set\n")
	for version, want := range map[string]string{
		"6.1":           "CONFIG_SMP=y\nCONFIG_VMGENID=y\n# CONFIG_VT is not set\n",
		"5.18":          "CONFIG_SMP=y\nCONFIG_VMGENID=y\n# CONFIG_VT is not set\n",
		"5.10.0-182":    "CONFIG_SMP=y\n# CONFIG_VT is not set\n",
		"4.19.90-2312.": "CONFIG_SMP=y\n# CONFIG_VT is not set\n",
	} {
		merged, err := merge(version, nil, a, b)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(format(merged)); got != want {
			t.Errorf("%s: got\n%swant\n%s", version, got, want)
		}
	}
	if _, err := merge("6.1", nil, a, mustParse(t, "# CONFIG_SMP is not set\n")); err == nil || !strings.Contains(err.Error(), "CONFIG_SMP") {
		t.Errorf("a symbol in two fragments: %v", err)
	}
}

func TestMergeLeavesOutWhatTheSourceDoesNotDefine(t *testing.T) {
	top := t.TempDir()
	for name, text := range map[string]string{
		"Kconfig":          "mainmenu \"Linux\"\n",
		"arch/x86/Kconfig": "config RETPOLINE\n\tbool \"r\"\n\tdefault y\n\tselect SLS\n",
		"mm/Kconfig.debug": "  menuconfig CPU_MITIGATIONS  \n",
		"mm/README":        "config GONE\n",
	} {
		path := filepath.Join(top, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	known, err := defined(top)
	if err != nil {
		t.Fatal(err)
	}
	merged, err := merge("6.1", known, mustParse(t, "CONFIG_RETPOLINE=y # if known\nCONFIG_CPU_MITIGATIONS=y # if known\nCONFIG_SLS=y # if known\nCONFIG_GONE=y # if known\nCONFIG_SMP=y\n"))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := string(format(merged)), "CONFIG_RETPOLINE=y\nCONFIG_CPU_MITIGATIONS=y\nCONFIG_SMP=y\n"; got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func TestLostNamesEverySymbol(t *testing.T) {
	requested := mustParse(t, `CONFIG_SMP=y
CONFIG_NR_CPUS=64
CONFIG_LOCALVERSION="-pod"
CONFIG_BPF_JIT=y
CONFIG_GONE=y
# CONFIG_VT is not set
# CONFIG_INPUT is not set
# CONFIG_NEVER is not set
`)
	missing, err := lost(requested, []byte(`# Automatically generated
CONFIG_SMP=y
CONFIG_NR_CPUS=8
CONFIG_LOCALVERSION="-pod"
# CONFIG_BPF_JIT is not set
# CONFIG_VT is not set
CONFIG_INPUT=y
`))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		`"CONFIG_NR_CPUS=64" (t.config:2) is 8`,
		`"CONFIG_BPF_JIT=y" (t.config:4) is not set`,
		`"CONFIG_GONE=y" (t.config:5) is not set`,
		`"# CONFIG_INPUT is not set" (t.config:7) is y`,
	}
	if !slices.Equal(missing, want) {
		t.Errorf("got  %q\nwant %q", missing, want)
	}
}

// The agent and the sandboxer rely on these; a fragment that loses one must not get as far as a
// boot.
func TestFragmentsHoldWhatTheGuestNeeds(t *testing.T) {
	for arch, tgt := range targets {
		b := &build{target: tgt}
		var parts [][]symbol
		for _, name := range b.files() {
			data, err := fragments.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			part, err := parse(name, data)
			if err != nil {
				t.Fatal(err)
			}
			parts = append(parts, part)
		}
		merged, err := merge("6.1", nil, parts...)
		if err != nil {
			t.Fatalf("%s: %v", arch, err)
		}
		on := map[string]bool{}
		for _, s := range merged {
			on[s.name] = s.value == "y"
		}
		for _, name := range strings.Fields("VIRTIO_CONSOLE VIRTIO_FS 9P_FS VSOCKETS VIRTIO_VSOCKETS OVERLAY_FS SQUASHFS BPF_SYSCALL CGROUP_BPF CGROUP_DEVICE MEMCG TMPFS DEVTMPFS SECCOMP_FILTER HOTPLUG_PCI_PCIE") {
			if !on[name] {
				t.Errorf("%s: CONFIG_%s is not requested", arch, name)
			}
		}
		if on["MODULES"] {
			t.Errorf("%s: modules are requested, but the initrd carries none", arch)
		}
	}
}

func tree(t *testing.T, dir, version string) string {
	t.Helper()
	major, minor, _ := strings.Cut(version, ".")
	for name, text := range map[string]string{
		"Kconfig":     "",
		"init/main.c": "",
		"Makefile":    "# SPDX\nVERSION = " + major + "\nPATCHLEVEL = " + minor + "\nSUBLEVEL = 0\n",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestFindSource(t *testing.T) {
	dir := t.TempDir()
	if _, err := findSource("", dir); err == nil || !strings.Contains(err.Error(), "KERNEL_SOURCE") {
		t.Errorf("nothing there: %v", err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "linux-headers-6.9.0"), 0o755); err != nil {
		t.Fatal(err)
	}
	old := tree(t, filepath.Join(dir, "linux-5.10.0-182.oe"), "5.10")
	newer := tree(t, filepath.Join(dir, "linux-6.6.0-28.oe"), "6.6")
	if got, err := findSource("", dir); err != nil || got != (source{newer, true}) {
		t.Errorf("got %v, %v, want the newest tree", got, err)
	}
	ball := filepath.Join(dir, "linux-source-6.1.tar.xz")
	if err := os.WriteFile(ball, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := findSource("", dir); err != nil || got != (source{ball, false}) {
		t.Errorf("got %v, %v, want the tested series", got, err)
	}
	if got, err := findSource(old, dir); err != nil || got != (source{old, true}) {
		t.Errorf("got %v, %v, want what was named", got, err)
	}
	for _, bad := range []string{filepath.Join(dir, "missing"), filepath.Join(dir, "linux-headers-6.9.0")} {
		if _, err := findSource(bad, dir); err == nil || !strings.Contains(err.Error(), bad) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if version, err := sourceVersion(old); err != nil || version != "5.10" {
		t.Errorf("got %q, %v", version, err)
	}
}

func TestUnknownArchitecture(t *testing.T) {
	if _, err := Build(t.Context(), Config{Arch: "riscv64"}); err == nil || !strings.Contains(err.Error(), "riscv64") {
		t.Errorf("got %v", err)
	}
}

func TestFollowCountsAndKeepsTheEnd(t *testing.T) {
	b := &build{progress: io.Discard}
	var out strings.Builder
	for range 100 {
		out.WriteString("  CC      kernel/fork.o\n")
	}
	out.WriteString("kernel/fork.c:1: error: broken\n")
	tail := b.follow(strings.NewReader(out.String()))
	if len(tail) != 25 || tail[24] != "kernel/fork.c:1: error: broken" {
		t.Errorf("got %q", tail)
	}
}

func TestKeyTellsSourcesAndTargetsApart(t *testing.T) {
	if _, ok := targets[runtime.GOARCH]; !ok {
		t.Skip("no guest kernel for " + runtime.GOARCH)
	}
	dir := t.TempDir()
	// Stand-ins for the compiler and the linker, whose versions are part of the key.
	tool := func(name, version string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\necho "+name+" "+version+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	tool("gcc", "12")
	tool("ld", "2.40")
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	ball := filepath.Join(dir, "linux.tar")
	write := func(text string) {
		if err := os.WriteFile(ball, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("one")
	key := func() string {
		b, err := newBuild(Config{Source: ball})
		if err != nil {
			t.Fatal(err)
		}
		k, err := b.key(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	first := key()
	if key() != first {
		t.Error("the key of the same inputs differs")
	}
	write("two")
	second := key()
	if second == first {
		t.Error("another source has the same key")
	}
	tool("gcc", "13")
	if key() == second {
		t.Error("another compiler has the same key")
	}
}
