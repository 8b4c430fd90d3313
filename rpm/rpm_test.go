package rpm

import (
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kuasar.io/kuasar/guest/initrd"
)

// epoch is the time of the packages of these tests.
var epoch = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// standIn compiles a small Go program with modules linked into it, once.
var standIn = sync.OnceValues(func() ([]byte, error) { return compile("CGO_ENABLED=0") })

// standInText calls something of each of the modules in linked, so that the linker keeps it.
const standInText = `package main

import (
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

func main() {
	_, err := netns.Get()
	print(unix.Getpid(), err != nil)
}
`

// linked are modules of this repository that the stand-in has.
var linked = []string{"github.com/vishvananda/netns", "golang.org/x/sys"}

func compile(cgo string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "rpm-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	sums, err := os.ReadFile("../go.sum")
	if err != nil {
		return nil, err
	}
	gomod, err := os.ReadFile("../go.mod")
	if err != nil {
		return nil, err
	}
	// The modules in the versions of this one are in the cache already.
	_, requires, _ := strings.Cut(string(gomod), "\nrequire (")
	gomod = []byte("module example.org/standin\n\ngo 1.26.0\n\nrequire (" + requires)
	for name, text := range map[string]string{"go.mod": string(gomod), "go.sum": string(sums), "main.go": standInText} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", "program")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), cgo, "GOFLAGS=-mod=mod", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, out)
	}
	return os.ReadFile(filepath.Join(dir, "program"))
}

// hostArch is the architecture of stand-in programs.
func hostArch() string {
	if runtime.GOARCH == "arm64" {
		return "aarch64"
	}
	return "x86_64"
}

// kernelImage is a kernel as far as this package looks at it.
func kernelImage(arch, version string) []byte {
	image := make([]byte, 0x1000)
	if arch == "aarch64" {
		copy(image[arm64MagicAt:], arm64Magic)
		copy(image[0x800:], "Linux version "+version+" (kuasar@kuasar.io) #1\x00")
		return image
	}
	copy(image[x86MagicAt:], x86Magic)
	binary.LittleEndian.PutUint16(image[x86Version:], 0x400)
	copy(image[0x600:], version+" (kuasar@kuasar.io) #1\x00")
	return image
}

// tree makes a source tree with what the package needs and returns options for it.
func tree(t *testing.T, dir string) Options {
	t.Helper()
	program, err := standIn()
	if err != nil {
		t.Fatalf("cannot compile a program to package: %v", err)
	}
	o := Options{
		Root: dir, Arch: hostArch(), Version: "0.1.0-dev", Commit: "0123456789ab", Time: epoch,
		Sandboxer: filepath.Join(dir, "out/vmm-sandboxer"), Ctl: filepath.Join(dir, "out/kuasar-ctl"),
		Kernel: filepath.Join(dir, "out/vmlinux.bin"), Initrd: filepath.Join(dir, "out/kuasar.initrd"),
		Output: filepath.Join(dir, "out/rpm"),
	}
	write := func(path string, data []byte) {
		if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	p := pack{Options: o, arch: architectures[o.Arch]}
	for _, m := range p.table() {
		if m.maker == source {
			write(filepath.Join(dir, m.source), []byte("stands in for "+m.source+"\n"))
		}
	}
	write(o.Sandboxer, program)
	write(o.Ctl, program)
	write(o.Kernel, kernelImage(o.Arch, "6.1.9-kuasar"))
	if _, err := initrd.Build(t.Context(), initrd.Config{Agent: o.Ctl, Output: o.Initrd}); err != nil {
		t.Fatal(err)
	}
	return o
}

func mustBuild(t *testing.T, o Options) (path, sum string) {
	t.Helper()
	path, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(data)
	return path, hex.EncodeToString(digest[:])
}

// elsewhere changes all that may not matter: the folder, the times and modes of the files, the umask, the
// time zone, the number of processors.
func elsewhere(t *testing.T) Options {
	t.Helper()
	old := syscall.Umask(0o077)
	t.Cleanup(func() { syscall.Umask(old) })
	procs := runtime.GOMAXPROCS(1)
	t.Cleanup(func() { runtime.GOMAXPROCS(procs) })
	zone := time.Local
	time.Local = time.FixedZone("far away", 11*3600)
	t.Cleanup(func() { time.Local = zone })
	t.Setenv("TZ", "Pacific/Noumea")
	t.Setenv("SOURCE_DATE_EPOCH", "1")
	t.Setenv("LANG", "tr_TR.UTF-8")

	dir := filepath.Join(t.TempDir(), "another", "place")
	o := tree(t, dir)
	touched := time.Date(1999, 12, 31, 23, 59, 59, 5, time.UTC)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		return os.Chtimes(path, touched, touched)
	})
	if err != nil {
		t.Fatal(err)
	}
	o.Time = o.Time.In(time.Local)
	return o
}

func TestReproducible(t *testing.T) {
	path, sum := mustBuild(t, tree(t, t.TempDir()))
	if want := "kuasar-0.1.0~dev-1." + hostArch() + ".rpm"; filepath.Base(path) != want {
		t.Errorf("the file is %s, not %s", filepath.Base(path), want)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o644 || !info.ModTime().Equal(epoch) {
		t.Errorf("%v, %v", info, err)
	}
	if signed, err := Signed(path); err != nil || signed {
		t.Errorf("signed: %v, %v", signed, err)
	}
	if _, again := mustBuild(t, elsewhere(t)); again != sum {
		t.Error("another package in another place at another time")
	}
}

func TestWhatIsMissing(t *testing.T) {
	o := tree(t, t.TempDir())
	for name, path := range map[string]string{
		"ARCH=" + o.Arch + " go tool mage build": o.Sandboxer,
		"mage build":                             o.Initrd,
		"/usr/bin/kuasar-ctl":                    o.Ctl,
		"/var/lib/kuasar/vmlinux":                o.Kernel,
		"vmm-sandboxer.8.gz":                     filepath.Join(o.Root, "defaults/man/vmm-sandboxer.8"),
		"bash-completion":                        filepath.Join(o.Root, "defaults/kuasar-ctl.bash"),
		"system/kuasar-vmm":                      filepath.Join(o.Root, "systemd/kuasar-vmm.service"),
		"sysconfig/kuasar-vmm":                   filepath.Join(o.Root, "systemd/kuasar-vmm.sysconfig"),
		"90-kuasar.preset":                       filepath.Join(o.Root, "systemd/90-kuasar.preset"),
		"modules-load.d":                         filepath.Join(o.Root, "systemd/kuasar.conf"),
	} {
		if err := os.Rename(path, path+".away"); err != nil {
			t.Fatal(err)
		}
		_, err := Build(t.Context(), o)
		if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), name) {
			t.Errorf("without %s: %v", path, err)
		}
		if err := os.Rename(path+".away", path); err != nil {
			t.Fatal(err)
		}
	}
	if entries, _ := os.ReadDir(o.Output); len(entries) != 0 {
		t.Errorf("what failed left %v", entries)
	}
	if _, err := Build(t.Context(), o); err != nil {
		t.Errorf("with everything there again: %v", err)
	}
}

// elfHead is the head of a program for a machine.
func elfHead(machine elf.Machine) []byte {
	var b bytes.Buffer
	h := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(machine), Version: uint32(elf.EV_CURRENT), Ehsize: 64, Phentsize: 56, Shentsize: 64}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)
	_ = binary.Write(&b, binary.LittleEndian, h)
	return b.Bytes()
}

func TestWhatDoesNotFit(t *testing.T) {
	foreign, other := elf.EM_AARCH64, "aarch64"
	if hostArch() == other {
		foreign, other = elf.EM_X86_64, "x86_64"
	}
	agent := filepath.Join(t.TempDir(), "agent")
	if err := os.WriteFile(agent, elfHead(foreign), 0o600); err != nil {
		t.Fatal(err)
	}
	foreignInitrd := filepath.Join(t.TempDir(), "initrd")
	if _, err := initrd.Build(t.Context(), initrd.Config{Agent: agent, Output: foreignInitrd}); err != nil {
		t.Fatal(err)
	}
	image, err := os.ReadFile(foreignInitrd)
	if err != nil {
		t.Fatal(err)
	}
	o := tree(t, t.TempDir())
	for _, c := range []struct {
		path string
		data []byte
		want string
	}{
		{o.Sandboxer, elfHead(foreign), "is for " + foreign.String()},
		{o.Ctl, []byte("#!/bin/sh\n"), "is no ELF binary"},
		{o.Ctl, nil, "is empty"},
		{o.Kernel, kernelImage(other, "6.1.9"), "is a kernel for " + other},
		{o.Kernel, kernelImage(o.Arch, ""), "does not say its version"},
		{o.Kernel, []byte("HdrS"), "is neither a bzImage"},
		{o.Initrd, image, "its agent: is for " + foreign.String()},
		{o.Initrd, []byte("gzip"), "is no initrd"},
	} {
		good, err := os.ReadFile(c.path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(c.path, c.data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Build(t.Context(), o); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), c.path) {
			t.Errorf("%s, %.20q: %v; want %q", filepath.Base(c.path), c.data, err, c.want)
		}
		if err := os.WriteFile(c.path, good, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, change := range map[string]func(*Options){
		"neither x86_64 nor aarch64": func(o *Options) { o.Arch = "amd64" },
		"SOURCE_DATE_EPOCH":          func(o *Options) { o.Time = time.Time{} },
		`the release "1-2"`:          func(o *Options) { o.Release = "1-2" },
		`the version "1 0"`:          func(o *Options) { o.Version = "1 0" },
		`the version ""`:             func(o *Options) { o.Version = "" },
		"RPM_SIGNING_KEY":            func(o *Options) { o.SigningKey = filepath.Join(o.Root, "no-key") },
	} {
		bad := o
		change(&bad)
		if _, err := Build(t.Context(), bad); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%v; want %q", err, name)
		}
	}
}

func TestTooLarge(t *testing.T) {
	members := []member{{path: "/small", size: 1}, {path: "/large", size: Limit}, {path: "/dir"}}
	dir := t.TempDir()
	_, err := publish(filepath.Join(dir, "x.rpm"), members, epoch, func(w io.Writer) error {
		_, err := w.Write(make([]byte, Limit+1))
		return err
	})
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("/large %d, /small 1", Limit)) {
		t.Errorf("%v", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left %v", entries)
	}
}

func TestVersion(t *testing.T) {
	for version, want := range map[string]string{
		"0.1.0": "0.1.0", "0.1.0-dev": "0.1.0~dev", "1.2.3-rc-1": "1.2.3~rc_1", "1.0+git5": "1.0+git5",
	} {
		if got, err := Version(version); got != want || err != nil {
			t.Errorf("%s: %q, %v", version, got, err)
		}
	}
	for _, version := range []string{"", "-dev", "1:2", "1 2", "1/2", "1\n2"} {
		if got, err := Version(version); err == nil {
			t.Errorf("%q became %q", version, got)
		}
	}
}
