package appliance

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// A root is an empty directory that dnf installs into. Scriptlets run in it with the shell of the
// package basesystem, whose systemctl writes down how it was called.
type root struct {
	t      *testing.T
	dir    string // the root itself
	home   string // of rpm and dnf: Debian's rpm keeps its database there unless told otherwise
	config string // of dnf
}

// newRoot makes a root that knows some of the repositories.
func newRoot(t *testing.T, repositories ...string) *root {
	t.Helper()
	if os.Getenv("KUASAR_E2E") == "" {
		t.Skip("needs root, dnf and the tests' repositories; \"go tool mage test\" provides them and sets KUASAR_E2E=1")
	}
	if os.Getuid() != 0 {
		t.Fatal("dnf --installroot needs root")
	}
	top := t.TempDir()
	r := &root{t: t, dir: filepath.Join(top, "root"), home: filepath.Join(top, "home"), config: filepath.Join(top, "dnf.conf")}
	files := map[string]string{
		r.config:                            fmt.Sprintf("[main]\nplugins=0\ninstall_weak_deps=True\ncachedir=%[1]s/cache\nreposdir=%[1]s/repos\nlogdir=%[1]s/log\npersistdir=%[1]s/persist\n", top),
		filepath.Join(r.home, ".rpmmacros"): "%_dbpath /var/lib/rpm\n",
	}
	for _, name := range repositories {
		check := "gpgcheck=0\n"
		if name == "signed" {
			check = "gpgcheck=1\ngpgkey=file://" + filepath.Join(repository(t, name), publicKey) + "\n"
		}
		files[filepath.Join(top, "repos", name+".repo")] = fmt.Sprintf("[%s]\nname=%[1]s\nbaseurl=file://%s\n%s", name, repository(t, name), check)
	}
	for path, text := range files {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(r.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return r
}

// try runs dnf or rpm on the root.
func (r *root) try(program string, args ...string) (string, error) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 2*time.Minute)
	defer cancel()
	var all []string
	switch program {
	case "dnf":
		all = append([]string{"--assumeyes", "--config", r.config, "--installroot", r.dir, "--releasever", "22.03LTS"}, args...)
	case "rpm":
		all = append([]string{"--root", r.dir}, args...)
	}
	cmd := exec.CommandContext(ctx, program, all...)
	cmd.Env = []string{"HOME=" + r.home, "PATH=" + os.Getenv("PATH"), "LC_ALL=C.UTF-8"}
	output, err := cmd.CombinedOutput()
	return string(output), err
}

func (r *root) run(program string, args ...string) string {
	r.t.Helper()
	output, err := r.try(program, args...)
	if err != nil {
		r.t.Fatalf("%s %s: %v\n%s", program, strings.Join(args, " "), err, output)
	}
	for _, bad := range []string{"scriptlet failed", "warning: %", "Error in"} {
		if strings.Contains(output, bad) {
			r.t.Errorf("%s %s says %q:\n%s", program, strings.Join(args, " "), bad, output)
		}
	}
	return output
}

// installed lists the names of the packages in the root.
func (r *root) installed() []string {
	r.t.Helper()
	names := strings.Fields(r.run("rpm", "-qa", "--qf", `%{NAME}\n`))
	names = slices.DeleteFunc(names, func(name string) bool { return name == "gpg-pubkey" })
	slices.Sort(names)
	return names
}

func (r *root) version() string {
	r.t.Helper()
	return r.run("rpm", "-q", "--qf", "%{VERSION}", "kuasar")
}

func (r *root) read(path string) string {
	r.t.Helper()
	data, err := os.ReadFile(filepath.Join(r.dir, path))
	if err != nil {
		r.t.Fatal(err)
	}
	return string(data)
}

func (r *root) write(path, text string) {
	r.t.Helper()
	if err := os.WriteFile(filepath.Join(r.dir, path), []byte(text), 0o644); err != nil {
		r.t.Fatal(err)
	}
}

// calls returns how systemctl was called since it was last asked.
func (r *root) calls() []string {
	r.t.Helper()
	path := filepath.Join(r.dir, "var/log/systemctl")
	data, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		r.t.Fatal(err)
	}
	os.Remove(path)
	return strings.FieldsFunc(string(data), func(c rune) bool { return c == '\n' })
}

func (r *root) wantCalls(when string, want ...string) {
	r.t.Helper()
	if got := r.calls(); !slices.Equal(got, want) {
		r.t.Errorf("%s systemctl was called with %q, not with %q", when, got, want)
	}
}

func TestOneCommandBringsTheGuidesStack(t *testing.T) {
	r := newRoot(t, "bare", "guide", "current")
	r.run("dnf", "install", "kuasar")
	want := []string{"basesystem", "containernetworking-plugins", "iSulad", "kuasar", "stratovirt", "virtiofsd"}
	if runtime.GOARCH == "amd64" { // StratoVirt's q35 needs firmware
		want = slices.Insert(want, 2, "edk2-ovmf")
	}
	if got := r.installed(); !slices.Equal(got, want) {
		t.Errorf("installed are %q, not %q", got, want)
	}
	r.run("rpm", "-V", "kuasar")
	r.wantCalls("in a root without a running systemd", "--no-reload preset kuasar-vmm.service")

	links := map[string]string{
		"/usr/local/bin/vmm-sandboxer":    "../../bin/vmm-sandboxer",
		"/usr/bin/containerd-shim-vmm-v1": "vmm-sandboxer",
	}
	for path, want := range links {
		if got, err := os.Readlink(filepath.Join(r.dir, path)); got != want {
			t.Errorf("%s leads to %q, not to %q: %v", path, got, want, err)
		}
	}
	for _, path := range []string{"/var/lib/kuasar/vmlinux.bin", "/var/lib/kuasar/kuasar.initrd", "/var/lib/kuasar/config_stratovirt.toml", "/usr/bin/kuasar-ctl"} {
		if info, err := os.Stat(filepath.Join(r.dir, path)); err != nil || info.Size() == 0 {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
	// The programs run, in the root, without what the base lacks.
	for _, command := range [][]string{{"vmm-sandboxer", "--version"}, {"kuasar-ctl", "version"}} {
		if output, err := exec.Command("chroot", append([]string{r.dir}, command...)...).CombinedOutput(); err != nil {
			t.Errorf("%q: %v: %s", command, err, output)
		}
	}
	if configuration := r.read("/var/lib/kuasar/config_stratovirt.toml"); !strings.Contains(configuration, "[hypervisor]") {
		t.Errorf("the configuration is %q", configuration)
	}
}

// Where containerd and a QEMU are, nothing else is needed, and nothing comes along that would be in
// the way.
func TestInstallBesideContainerdAndQEMU(t *testing.T) {
	r := newRoot(t, "bare", "plain", "current")
	r.run("dnf", "install", "containerd", "qemu-kvm")
	r.run("dnf", "install", "kuasar")
	if got, want := r.installed(), []string{"basesystem", "containerd", "kuasar", "qemu-kvm-core"}; !slices.Equal(got, want) {
		t.Errorf("installed are %q, not %q", got, want)
	}
	r.run("rpm", "-V", "kuasar")
}

// Of what is only recommended, nothing is needed.
func TestInstallWithoutWeakDependencies(t *testing.T) {
	r := newRoot(t, "bare", "guide", "current")
	r.run("dnf", "install", "--setopt=install_weak_deps=False", "kuasar")
	if got, want := r.installed(), []string{"basesystem", "kuasar", "stratovirt"}; !slices.Equal(got, want) {
		t.Errorf("installed are %q, not %q", got, want)
	}
}

const (
	stratovirtConfig = "/var/lib/kuasar/config_stratovirt.toml"
	qemuConfig       = "/var/lib/kuasar/config_qemu.toml"
	sysconfig        = "/etc/sysconfig/kuasar-vmm"
)

// A package's life in a root that looks as if its systemd ran.
func TestLifeOfThePackage(t *testing.T) {
	r := newRoot(t, "bare", "guide", "current", "next")
	r.run("dnf", "install", "basesystem")
	if err := os.MkdirAll(filepath.Join(r.dir, "run/systemd/system"), 0o755); err != nil {
		t.Fatal(err)
	}
	r.run("dnf", "install", "kuasar-"+currentVersion)
	r.wantCalls("at the installation", "--no-reload preset kuasar-vmm.service", "daemon-reload")

	original := r.read(stratovirtConfig)
	edited := original + "# What the administrator has to say.\n"
	r.write(stratovirtConfig, edited)
	r.write(sysconfig, "OPTIONS=\"--log-level debug\"\n")
	changes, err := r.try("rpm", "-V", "kuasar")
	if err == nil || !strings.Contains(changes, " c "+stratovirtConfig) || !strings.Contains(changes, " c "+sysconfig) || strings.Count(changes, "\n") != 2 {
		t.Errorf("rpm -V says of two edited files: %v\n%s", err, changes)
	}

	r.run("dnf", "upgrade", "kuasar")
	if got := r.version(); got != nextVersion {
		t.Fatalf("the upgrade installed %s", got)
	}
	r.wantCalls("at the upgrade", "daemon-reload", "daemon-reload", "try-restart kuasar-vmm.service")
	if r.read(stratovirtConfig) != edited || r.read(sysconfig) != "OPTIONS=\"--log-level debug\"\n" {
		t.Error("the upgrade changed edited files")
	}
	if r.read(stratovirtConfig+".rpmnew") != original+remark || !strings.HasSuffix(r.read(sysconfig+".rpmnew"), remark) {
		t.Error("beside the edited files are not those of the new version")
	}
	if !strings.HasSuffix(r.read(qemuConfig), remark) {
		t.Error("the file that was not edited is still the old one")
	}
	for _, path := range []string{stratovirtConfig, sysconfig} {
		if err := os.Remove(filepath.Join(r.dir, path+".rpmnew")); err != nil {
			t.Error(err)
		}
	}

	r.run("dnf", "downgrade", "kuasar")
	if got := r.version(); got != currentVersion {
		t.Fatalf("the downgrade installed %s", got)
	}
	r.wantCalls("at the downgrade", "daemon-reload", "daemon-reload", "try-restart kuasar-vmm.service")
	if r.read(stratovirtConfig) != edited || r.read(stratovirtConfig+".rpmnew") != original {
		t.Error("the downgrade did not leave the edited file alone and put its own beside it")
	}
	if strings.HasSuffix(r.read(qemuConfig), remark) {
		t.Error("the file that was not edited is still that of the newer version")
	}

	r.run("dnf", "reinstall", "kuasar")
	r.wantCalls("at the reinstallation", "daemon-reload", "daemon-reload", "try-restart kuasar-vmm.service")
	if r.read(stratovirtConfig) != edited {
		t.Error("the reinstallation changed an edited file")
	}

	// An administrator's decision not to enable the service is none that an upgrade takes back, so
	// preset was called once. Erasing takes the service away.
	r.run("dnf", "remove", "kuasar")
	r.wantCalls("at the removal", "--no-reload disable --now kuasar-vmm.service", "daemon-reload")
	if r.read(stratovirtConfig+".rpmsave") != edited {
		t.Error("the removal did not save the edited file")
	}
	if got, want := r.installed(), []string{"basesystem"}; !slices.Equal(got, want) {
		t.Errorf("installed are %q: what came along with kuasar has not gone with it", got)
	}
	var left []string
	filepath.WalkDir(r.dir, func(path string, entry fs.DirEntry, err error) error {
		name := strings.TrimPrefix(path, r.dir)
		if err == nil && strings.Contains(name, "kuasar") && !strings.HasPrefix(name, "/var/lib/dnf") && !strings.HasPrefix(name, "/var/log") {
			left = append(left, name)
		}
		return err
	})
	want := []string{
		sysconfig + ".rpmnew", sysconfig + ".rpmsave", "/var/lib/kuasar", stratovirtConfig + ".rpmnew", stratovirtConfig + ".rpmsave",
	}
	if !slices.Equal(left, want) {
		t.Errorf("the removal left %q, not %q", left, want)
	}
}

func TestSignature(t *testing.T) {
	r := newRoot(t, "signed")
	r.run("dnf", "install", "kuasar")
	r.run("rpm", "-V", "kuasar")
	packages, err := filepath.Glob(filepath.Join(repository(t, "signed"), "kuasar-*.rpm"))
	if err != nil || len(packages) != 1 {
		t.Fatalf("the signed packages are %q, %v", packages, err)
	}
	// dnf has imported the key.
	if output := r.run("rpm", "-K", packages[0]); !strings.Contains(output, "digests signatures OK") {
		t.Errorf("rpm -K says %q", output)
	}
	// One byte of the payload is another one.
	data, err := os.ReadFile(packages[0])
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)-100] ^= 1
	broken := filepath.Join(t.TempDir(), "broken.rpm")
	if err := os.WriteFile(broken, data, 0o644); err != nil {
		t.Fatal(err)
	}
	if output, err := r.try("rpm", "-K", broken); err == nil || !strings.Contains(output, "NOT OK") {
		t.Errorf("rpm -K says of a package that was changed: %q, %v", output, err)
	}
	if output, err := newRoot(t, "signed").try("dnf", "install", broken); err == nil {
		t.Errorf("dnf installs a package that was changed:\n%s", output)
	}

	// Where signatures are checked, a package without one is refused.
	other := newRoot(t, "bare", "guide", "current")
	output, err := other.try("dnf", "install", "--setopt=current.gpgcheck=1", "kuasar")
	if err == nil || !strings.Contains(output, "is not signed") {
		t.Errorf("dnf says of a package that is not signed: %v\n%s", err, output)
	}
}
