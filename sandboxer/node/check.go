package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/config"
	"kuasar.io/kuasar/sandboxer/pod"
	"kuasar.io/kuasar/sandboxer/storage"
	"kuasar.io/kuasar/sandboxer/vm/disk"
	"kuasar.io/kuasar/sandboxer/vm/kvm"
	"kuasar.io/kuasar/sandboxer/vm/qemu"
	"kuasar.io/kuasar/sandboxer/vm/stratovirt"
)

// Status is how something that the node should have is.
type Status string

const (
	OK Status = "ok"
	// Warning is what pods run without, slower or with less.
	Warning Status = "warning"
	// Missing is what no pod runs without.
	Missing Status = "missing"
)

// Finding is the result of one check.
type Finding struct {
	// Name is the thing that was looked at: kvm, tun, hypervisor, ...
	Name   string
	Status Status
	// Detail says what was found.
	Detail string
	// Mend is the shell command that mends it, or what to do where no command can; empty if all is well.
	Mend string
}

// Checker looks at what the daemon needs of the node.
type Checker struct {
	Host     Host
	Settings DaemonSettings

	probes probes
}

// probes try the machine. Tests replace them.
type probes struct {
	root       func() bool
	mountAttrs func() error
	kvm        func(ctx context.Context, p kvmProbe) (works bool, reason string)
	vsock      func() error
	vhostNet   func() error
	tun        func() error
	redirect   func(ctx context.Context) error
	cgroup     func() (version string, err error)
	virtiofsd  func(configured string) (path string, kind storage.Kind, err error)
	daemon     func(ctx context.Context, socket string) error
	unit       func(ctx context.Context, unit string) (state string, known bool)
	lockHolder func(dir string) (int, error)
}

// NewChecker returns a checker of this machine.
func NewChecker(s DaemonSettings) *Checker {
	return &Checker{Settings: s, probes: probes{
		root:       func() bool { return os.Geteuid() == 0 },
		mountAttrs: probeMountAttrs,
		kvm:        probeKVM,
		vsock:      probeVsock,
		vhostNet:   probeVhostNet,
		tun:        probeTun,
		redirect:   probeRedirect,
		cgroup:     probeCgroup,
		virtiofsd:  storage.FindVirtiofsd,
		daemon:     probeDaemon,
		unit:       unitState,
		lockHolder: pod.LockHolder,
	}}
}

// check is one run.
type check struct {
	*Checker
	cfg      *config.Config // nil if it is not valid
	kind     string         // of the hypervisor: qemu, stratovirt, or empty
	serial   bool           // this StratoVirt reaches its guests without a vsock, too
	emulates bool           // this StratoVirt can do without KVM
	findings []Finding
}

func (c *check) add(name string, s Status, mend, format string, args ...any) {
	if s == OK {
		mend = ""
	}
	c.findings = append(c.findings, Finding{Name: name, Status: s, Detail: fmt.Sprintf(format, args...), Mend: mend})
}

// asRoot reports that a check was not allowed, if that is what err says.
func (c *check) asRoot(name string, err error) bool {
	if !errors.Is(err, fs.ErrPermission) || c.probes.root() {
		return false
	}
	c.add(name, Warning, "sudo kuasar-ctl check", "only root can tell: %v", err)
	return true
}

// Run makes every check, in the order in which what they find should be mended.
func (c *Checker) Run(ctx context.Context) []Finding {
	run := &check{Checker: c}
	for _, f := range []func(context.Context){
		run.kernel, run.configuration, run.hypervisor, run.kvm, run.vsock, run.vhostNet, run.tun, run.redirect, run.modules,
		run.guestFiles, run.virtiofsd, run.cgroup, run.stateDirectory, run.daemon, run.engines,
	} {
		f(ctx)
	}
	return run.findings
}

// install is the command that installs a package, by the node's package manager.
func (c *check) install(dnf, apt string) string {
	if _, err := c.Host.find("dnf"); err == nil {
		return "dnf install " + dnf
	}
	if _, err := c.Host.find("yum"); err == nil {
		return "yum install " + dnf
	}
	if _, err := c.Host.find("apt-get"); err == nil {
		return "apt-get install " + apt
	}
	return "dnf install " + dnf
}

func (c *check) kernel(context.Context) {
	release, err := os.ReadFile(c.Host.path("/proc/sys/kernel/osrelease"))
	name := "Linux " + strings.TrimSpace(string(release))
	if err != nil {
		name = "Linux"
	}
	if err := c.probes.mountAttrs(); err != nil {
		c.add("kernel", Missing, c.install("kernel", "linux-image-"+debianArch()), "%s lacks mount_setattr(2), which volumes need; Linux 5.12 or newer has it: %v", name, err)
		return
	}
	c.add("kernel", OK, "", "%s", name)
}

func (c *check) configuration(context.Context) {
	path := c.Settings.Config
	cfg, err := config.Load(c.Host.path(path))
	switch {
	case err == nil:
	case c.asRoot("configuration", err):
		return
	case errors.Is(err, fs.ErrNotExist):
		mend := "dnf reinstall kuasar"
		if path == config.DefaultPath {
			mend = "dnf install kuasar"
		}
		c.add("configuration", Missing, mend, "%s does not exist", path)
		return
	default:
		c.add("configuration", Missing, "vi "+path, "%s", oneLine(err))
		return
	}
	c.cfg = cfg
	if len(cfg.Notes) > 0 {
		c.add("configuration", Warning, "vi "+path, "%s: %s", path, strings.Join(cfg.Notes, "; "))
		return
	}
	c.add("configuration", OK, "", "%s", path)
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// qemuConfig is the configuration for QEMU that is shipped beside the default one.
const qemuConfig = "/var/lib/kuasar/config_qemu.toml"

// The kinds of hypervisors.
const (
	kindQEMU       = "qemu"
	kindStratoVirt = "stratovirt"
)

// useQEMU is the command that makes the service take QEMU.
func useQEMU() string {
	return fmt.Sprintf(`echo 'OPTIONS="--config %s"' >> %s && systemctl restart kuasar-vmm`, qemuConfig, SysconfigPath)
}

func (c *check) hypervisor(ctx context.Context) {
	if c.cfg == nil {
		return
	}
	path := c.cfg.Hypervisor.Path
	real := c.Host.path(path)
	var mend string
	qemu := strings.HasPrefix(filepath.Base(path), "qemu")
	switch {
	case qemu && strings.Contains(path, "aarch64"):
		mend = c.install("qemu-system-aarch64", "qemu-system-arm")
	case qemu:
		mend = c.install("qemu-system-x86_64", "qemu-system-x86")
	case c.Settings.Config == config.DefaultPath && c.hasQEMU():
		mend = useQEMU()
	default:
		mend = c.install("stratovirt", "qemu-system-x86") + "; or, with QEMU: " + useQEMU()
	}
	if info, err := os.Stat(real); err != nil || info.IsDir() || info.Mode()&0o111 == 0 {
		why := "it is no program"
		if err != nil {
			why = "it does not exist"
		}
		if errors.Is(err, fs.ErrPermission) {
			why = err.Error()
		}
		c.add("hypervisor", Missing, mend, "hypervisor.path = %q: %s", path, why)
		return
	}
	out, err := output(ctx, real, "-version") // StratoVirt refuses --version
	first := firstLine(out)
	isQEMU := strings.Contains(strings.ToLower(first), "qemu")
	if !isQEMU && !stratovirt.IsStratoVirt(first) {
		// A StratoVirt that says nothing of itself tells by its monitor, which takes a start.
		if said, serr := stratovirt.Version(ctx, real); serr == nil {
			first, err = said, nil
		}
	}
	switch {
	case stratovirt.IsStratoVirt(first):
		c.stratovirt(path, first, mend)
	case isQEMU:
		version, ok := parseRelease(first)
		if ok && version.before(6, 0, 0) {
			c.add("hypervisor", Missing, mend, "%s is %s; 6.0 or newer is needed", path, first)
			return
		}
		c.kind = kindQEMU
		c.add("hypervisor", OK, "", "%s: %s", path, first)
	case err != nil:
		c.add("hypervisor", Missing, mend, "%s does not tell its version: %v: %s", path, err, first)
	default:
		c.add("hypervisor", Missing, mend, "%s is no hypervisor that is known; it says %q", path, first)
	}
}

// stratovirt checks what StratoVirt's versions and machine types need.
func (c *check) stratovirt(path, said, mend string) {
	h := c.cfg.Hypervisor
	version, ok := parseRelease(said)
	if ok && version.before(2, 2, 0) {
		c.add("hypervisor", Missing, mend, "%s is %s; 2.2 or newer is needed", path, said)
		return
	}
	c.kind = kindStratoVirt
	machine := h.Machine()
	c.serial = ok && !version.before(2, 3, 0) && machine != "microvm"
	c.emulates = stratovirt.Emulates(said)
	if firmware := h.StratoVirtFirmware(); firmware != "" {
		if _, err := readableFile(c.Host.path(firmware)); err != nil {
			mend := c.install("edk2-ovmf", "ovmf")
			if h.Firmware == "" {
				mend += ", and where that has it elsewhere, name it as hypervisor.firmware in " + c.Settings.Config
			}
			if !c.asRoot("hypervisor", err) {
				c.add("hypervisor", Missing, mend, "%s: %s, whose machine %s needs the firmware %s: %v", path, said, machine, firmware, err)
			}
			return
		}
	}
	if ok && !version.before(2, 5, 0) {
		// Nothing but the start of a pod shows how it was built.
		said += ", which must be built with its features vhost_vsock and virtio_rng"
	}
	c.add("hypervisor", OK, "", "%s: %s, machine %s", path, said, machine)
}

// hasQEMU says whether the shipped configuration for QEMU names one that is there.
func (c *check) hasQEMU() bool {
	cfg, err := config.Load(c.Host.path(qemuConfig))
	if err != nil {
		return false
	}
	_, err = os.Stat(c.Host.path(cfg.Hypervisor.Path))
	return err == nil
}

func (c *check) kvm(ctx context.Context) {
	accelerator, probe := config.AcceleratorAuto, kvmProbe{}
	if c.cfg != nil {
		accelerator = c.cfg.Hypervisor.Accelerator
		if c.kind == kindQEMU {
			probe = kvmProbe{QEMU: c.Host.path(c.cfg.Hypervisor.Path), Machine: c.cfg.Hypervisor.Machine(), Kernel: c.Host.path(c.cfg.Hypervisor.KernelPath),
				Cache: filepath.Join(c.Host.path(c.Settings.Dir), ".kvm")}
		}
	}
	if accelerator == config.AcceleratorTCG && c.kind == kindStratoVirt && !c.emulates {
		c.add("kvm", Missing, "vi "+c.Settings.Config, "hypervisor.accelerator is tcg, and StratoVirt has nothing but KVM")
		return
	}
	if accelerator == config.AcceleratorTCG {
		c.add("kvm", OK, "", "not used: hypervisor.accelerator is tcg")
		return
	}
	status := Warning
	if accelerator == config.AcceleratorKVM || c.kind == kindStratoVirt {
		status = Missing
	}
	device := c.Host.path("/dev/kvm")
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err == nil {
		f.Close()
	}
	switch {
	case err == nil:
	case c.asRoot("kvm", err):
		return
	case errors.Is(err, fs.ErrNotExist):
		mend, why := c.enableKVM()
		c.add("kvm", status, mend, "there is no /dev/kvm%s; %s", why, c.withoutKVM(status))
		return
	default:
		c.add("kvm", status, "modprobe -r kvm_intel kvm_amd kvm; "+modprobeKVM(c.cpuFlags()), "/dev/kvm cannot be opened: %v; %s", err, c.withoutKVM(status))
		return
	}
	works, reason := c.probes.kvm(ctx, probe)
	if !works {
		otherwise := "set accelerator = \"tcg\" in " + c.Settings.Config
		if c.kind == kindStratoVirt && !c.emulates {
			otherwise = useQEMU()
		}
		c.add("kvm", status, "enable nested virtualization for this machine on its host; or "+otherwise,
			"/dev/kvm opens and runs no guest: %s; %s", reason, c.withoutKVM(status))
		return
	}
	if probe.QEMU == "" && c.kind != kindStratoVirt && !kvm.Executes {
		c.add("kvm", Warning, c.install("qemu-system-x86_64", "qemu-system-x86"), "%s; whether a guest runs was not tried, for which a QEMU is needed", reason)
		return
	}
	c.add("kvm", OK, "", "%s", reason)
}

func (c *check) withoutKVM(s Status) string {
	if s == Missing {
		return "no pod starts"
	}
	return "pods run on QEMU's emulation, many times slower"
}

// cpuFlags are what the processor says of itself.
func (c *check) cpuFlags() []string {
	text, _ := os.ReadFile(c.Host.path("/proc/cpuinfo"))
	for line := range strings.Lines(string(text)) {
		if key, value, found := strings.Cut(line, ":"); found && strings.TrimSpace(key) == "flags" {
			return strings.Fields(value)
		}
	}
	return nil
}

func modprobeKVM(flags []string) string {
	switch {
	case slices.Contains(flags, "vmx"):
		return "modprobe kvm_intel"
	case slices.Contains(flags, "svm"):
		return "modprobe kvm_amd"
	}
	return "modprobe kvm"
}

// enableKVM says what brings /dev/kvm.
func (c *check) enableKVM() (mend, why string) {
	flags := c.cpuFlags()
	switch {
	case slices.Contains(flags, "vmx"), slices.Contains(flags, "svm"):
		return modprobeKVM(flags), ""
	case flags == nil: // an architecture that does not list it there
		return "modprobe kvm", ""
	case slices.Contains(flags, "hypervisor"):
		return "enable nested virtualization for this machine on its host", ", and the processor offers no virtualization: this is a virtual machine itself"
	}
	return "enable virtualization (VT-x, AMD-V) in the firmware's setup", ", and the processor offers no virtualization"
}

func (c *check) vsock(context.Context) {
	status, without := Warning, "guests are reached through a serial port"
	if c.kind == kindStratoVirt && !c.serial {
		status, without = Missing, "this StratoVirt reaches its guests by nothing else"
	}
	err := c.probes.vsock()
	switch {
	case err == nil:
		c.add("vhost-vsock", OK, "", "/dev/vhost-vsock gives context ids")
	case c.asRoot("vhost-vsock", err):
	default:
		c.add("vhost-vsock", status, "modprobe vhost_vsock", "%s; %s", oneLine(err), without)
	}
}

// vhostNet is about QEMU alone: StratoVirt moves frames itself.
func (c *check) vhostNet(context.Context) {
	if c.kind == kindStratoVirt {
		return
	}
	err := c.probes.vhostNet()
	switch {
	case err == nil:
		c.add("vhost-net", OK, "", "%s moves the frames of pods in the kernel", qemu.VhostNet)
	case c.asRoot("vhost-net", err):
	default:
		c.add("vhost-net", Warning, "modprobe vhost_net", "%s; QEMU moves the frames of pods itself, which costs throughput", oneLine(err))
	}
}

func (c *check) tun(context.Context) {
	err := c.probes.tun()
	switch {
	case err == nil:
		c.add("tun", OK, "", "/dev/net/tun makes network devices")
	case c.asRoot("tun", err):
	default:
		c.add("tun", Missing, "modprobe tun", "%s", oneLine(err))
	}
}

// redirect tries what joins a pod's network to its machine.
func (c *check) redirect(ctx context.Context) {
	if !c.probes.root() {
		c.add("network", Warning, "sudo kuasar-ctl check", "only root can try the redirection of a pod's network")
		return
	}
	if err := c.probes.redirect(ctx); err != nil {
		c.add("network", Missing, "modprobe -a veth sch_ingress cls_u32 act_mirred", "%s", oneLine(err))
		return
	}
	c.add("network", OK, "", "a pod's network was joined to a tap in a scratch namespace")
}

// modules finds kernel modules that are there now and will not be after the next boot.
func (c *check) modules(context.Context) {
	loaded, _ := os.ReadFile(c.Host.path("/proc/modules"))
	var forgotten []string
	for _, m := range []string{"vhost_vsock", "vhost_net", "tun"} {
		if hasModule(string(loaded), m) && !c.loadedAtBoot(m) {
			forgotten = append(forgotten, m)
		}
	}
	if len(forgotten) > 0 {
		c.add("modules", Warning, fmt.Sprintf("printf '%%s\\n' %s > /etc/modules-load.d/kuasar.conf", strings.Join(forgotten, " ")),
			"%s: loaded now, and by nothing at the next boot", strings.Join(forgotten, ", "))
		return
	}
	c.add("modules", OK, "", "what is needed is built in or loaded at boot")
}

func hasModule(modules, name string) bool {
	for line := range strings.Lines(modules) {
		if strings.HasPrefix(line, name+" ") {
			return true
		}
	}
	return false
}

func (c *check) loadedAtBoot(module string) bool {
	files := []string{c.Host.path("/etc/modules")}
	for _, dir := range []string{"/etc", "/run", "/usr/lib", "/lib", "/usr/local/lib"} {
		found, _ := filepath.Glob(filepath.Join(c.Host.path(dir), "modules-load.d/*.conf"))
		files = append(files, found...)
	}
	for _, f := range files {
		text, _ := os.ReadFile(f)
		for line := range strings.Lines(string(text)) {
			if strings.ReplaceAll(strings.TrimSpace(line), "-", "_") == module {
				return true
			}
		}
	}
	return false
}

func (c *check) guestFiles(context.Context) {
	if c.cfg == nil {
		return
	}
	h := c.cfg.Hypervisor
	for _, g := range []struct{ name, key, path string }{
		{"guest kernel", "hypervisor.kernel_path", h.KernelPath},
		{"guest initrd", "hypervisor.initrd_path", h.InitrdPath},
		{"guest image", "hypervisor.image_path", h.ImagePath},
	} {
		if g.path == "" {
			continue
		}
		size, err := readableFile(c.Host.path(g.path))
		if err == nil && g.path == h.ImagePath {
			_, err = disk.Filesystem(c.Host.path(g.path))
		}
		switch {
		case err == nil:
			c.add(g.name, OK, "", "%s, %.1f MB", g.path, float64(size)/1e6)
		case c.asRoot(g.name, err):
		default:
			mend := "dnf reinstall kuasar"
			if filepath.Dir(g.path) != "/var/lib/kuasar" {
				mend = "vi " + c.Settings.Config
			}
			c.add(g.name, Missing, mend, "%s = %q: %v", g.key, g.path, err)
		}
	}
}

// readableFile returns the size of a file that can be read and is not empty.
func readableFile(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		var pe *fs.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return 0, err
	case !info.Mode().IsRegular():
		return 0, errors.New("it is no regular file")
	case info.Size() == 0:
		return 0, errors.New("it is an empty file")
	}
	if _, err := f.Read(make([]byte, 1)); err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (c *check) virtiofsd(context.Context) {
	if c.cfg == nil {
		return
	}
	asked := ""
	for p := range strings.FieldsSeq(c.cfg.Hypervisor.KernelParams) {
		if v, found := strings.CutPrefix(p, protocol.ParamShareType+"="); found {
			asked = v
		}
	}
	if asked == "9p" && c.kind == kindStratoVirt {
		c.add("virtiofsd", Missing, "vi "+c.Settings.Config, "hypervisor.kernel_params has %s=9p, and StratoVirt has no 9p", protocol.ParamShareType)
		return
	}
	if asked == "9p" {
		c.add("virtiofsd", OK, "", "not used: hypervisor.kernel_params has %s=9p", protocol.ParamShareType)
		return
	}
	configured := c.cfg.Hypervisor.Virtiofsd.Path
	path, kind, err := c.probes.virtiofsd(configured)
	mend := c.install("virtiofsd", "virtiofsd")
	switch {
	case err != nil:
		c.add("virtiofsd", Missing, mend, "%s", oneLine(err))
	case configured != "" && configured != config.DefaultVirtiofsd && path != configured:
		c.add("virtiofsd", Missing, "vi "+c.Settings.Config, "hypervisor.virtiofsd_conf.path = %q does not exist", configured)
	case path == "" && c.kind == kindStratoVirt:
		c.add("virtiofsd", Missing, mend, "none is installed, and StratoVirt shares files by nothing else")
	case path == "":
		c.add("virtiofsd", Warning, mend, "none is installed; pods get their files by 9p, which is slower")
	default:
		c.add("virtiofsd", OK, "", "%s (%s)", path, map[storage.Kind]string{storage.KindC: "of QEMU", storage.KindRust: "in Rust", storage.KindStratoVirt: "of StratoVirt"}[kind])
	}
}

func (c *check) cgroup(context.Context) {
	version, err := c.probes.cgroup()
	if err != nil {
		c.add("cgroup", Missing, "mount -t cgroup2 none /sys/fs/cgroup", "%s", oneLine(err))
		return
	}
	c.add("cgroup", OK, "", "%s", version)
}

func (c *check) stateDirectory(context.Context) {
	dir := c.Settings.Dir
	if err := pod.CheckDir(dir); err != nil {
		c.add("state directory", Missing, "vi "+SysconfigPath, "%v", err)
		return
	}
	c.add("state directory", OK, "", "%s", dir)
}

// unitName is the daemon's service.
const unitName = "kuasar-vmm"

func (c *check) daemon(ctx context.Context) {
	state, known := c.probes.unit(ctx, unitName)
	err := c.probes.daemon(ctx, c.Settings.Listen)
	mend := "systemctl enable --now " + unitName
	if !known {
		mend = fmt.Sprintf("vmm-sandboxer --config %s --dir %s --listen %s &", c.Settings.Config, c.Settings.Dir, c.Settings.Listen)
	}
	what := ""
	if known {
		what = fmt.Sprintf("%s.service is %s; ", unitName, state)
	}
	switch {
	case err == nil && known && state != "active":
		c.add("daemon", Warning, mend, "%sa daemon that was started by hand answers at %s", what, c.Settings.Listen)
	case err == nil:
		c.add("daemon", OK, "", "%sthe sandbox API answers at %s", what, c.Settings.Listen)
	case c.asRoot("daemon", err):
	default:
		if known && (state == "active" || state == "activating") {
			mend = "systemctl restart " + unitName
		}
		if known && state == "failed" {
			mend = fmt.Sprintf("journalctl -u %s -n 20, then systemctl restart %[1]s", unitName)
		}
		c.add("daemon", Missing, mend, "%s%s", what, oneLine(err))
	}
	if holder, err := c.probes.lockHolder(c.Host.path(c.Settings.Dir)); err == nil && holder != 0 {
		last := &c.findings[len(c.findings)-1]
		last.Detail += fmt.Sprintf(" (process %d)", holder)
	}
}

func (c *check) engines(ctx context.Context) {
	at := len(c.findings)
	ready := false
	for _, e := range Engines {
		path, err := c.Host.find(string(e))
		if err != nil {
			continue
		}
		version, verr := versionOf(ctx, path)
		if e == ISulad {
			c.checkISulad(version, verr)
		} else {
			c.checkContainerd(version, verr)
		}
		ready = ready || c.findings[len(c.findings)-1].Status == OK
	}
	switch {
	case len(c.findings) == at:
		c.add("engine", Missing, c.install("iSulad && kuasar-ctl setup isulad", "containerd && kuasar-ctl setup containerd"),
			"neither iSulad nor containerd is installed")
	case ready:
		// One engine is enough; the other may not be meant to run pods in machines.
		for i := range c.findings[at:] {
			if f := &c.findings[at+i]; f.Status == Missing {
				f.Status = Warning
			}
		}
	}
}

func (c *check) checkISulad(version release, verr error) {
	const name = "isulad"
	label := "iSulad " + version.String()
	if verr != nil {
		label = "iSulad"
	}
	handlers, lacks, err := isuladHandlers(c.Host.path(ISulad.configPath()), c.Settings.Listen, version)
	mend := "kuasar-ctl setup isulad && systemctl restart isulad"
	switch {
	case err != nil && c.asRoot(name, err):
	case err != nil:
		c.add(name, Missing, "vi "+ISulad.configPath(), "%s: %s", label, oneLine(err))
	case len(handlers) == 0:
		c.add(name, Missing, mend, "%s has no handler for %s in %s", label, c.Settings.Listen, ISulad.configPath())
	case len(lacks) > 0:
		c.add(name, Missing, mend, "%s: %s in %s", label, strings.Join(lacks, ", "), ISulad.configPath())
	default:
		c.add(name, OK, "", "%s, handler %s", label, strings.Join(handlers, ", "))
	}
}

func (c *check) checkContainerd(version release, verr error) {
	const name = "containerd"
	label := "containerd " + version.String()
	if verr != nil {
		label = "containerd"
	} else if version.before(2, 0, 0) {
		c.add(name, Missing, "install containerd 2.0 or newer, then: kuasar-ctl setup containerd", "%s has no sandbox API; version 2.0 or newer is needed", label)
		return
	}
	path := c.Host.path(Containerd.configPath())
	files, err := readContainerd(path)
	mend := "kuasar-ctl setup containerd && systemctl restart containerd"
	if err != nil {
		if !c.asRoot(name, err) {
			c.add(name, Missing, "vi "+Containerd.configPath(), "%s: %s", label, oneLine(err))
		}
		return
	}
	handlers := containerdHandlers(files, c.Settings.Listen)
	if len(handlers) == 0 {
		var conflict *Conflict
		if _, err := containerdHas(files, DefaultHandler, c.Settings.Listen); errors.As(err, &conflict) {
			c.add(name, Missing, "vi "+conflict.File, "%s: %s has %s = %s, and %s is wanted", label, conflict.File, conflict.Key, conflict.Found, conflict.Want)
			return
		}
		c.add(name, Missing, mend, "%s has no handler for %s in %s and what it imports", label, c.Settings.Listen, Containerd.configPath())
		return
	}
	if verr != nil || !version.before(2, 4, 0) {
		if _, err := c.Host.findShim(); err != nil {
			c.add(name, Missing, "ln -s vmm-sandboxer /usr/bin/"+shimName, "%s, handler %s: %s is not there, without which no container starts", label, strings.Join(handlers, ", "), shimName)
			return
		}
	}
	c.add(name, OK, "", "%s, handler %s", label, strings.Join(handlers, ", "))
}
