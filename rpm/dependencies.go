package rpm

import "fmt"

// What the package asks for. Three nodes decide about the form of each line:
//
//   - a bare openEuler, where "yum install kuasar" has to bring all that the guide names;
//   - a node with containerd and QEMU, where nothing else may be needed nor come along that would
//     get in the way;
//   - an offline one with only this package and a hypervisor, where it must install as well.
//
// Required is therefore only what the package cannot do without; what a node may have in another
// form, or by other means than RPM, is recommended: dnf installs it where its repositories have it, is
// content where they do not, and takes it along with install_weak_deps=False never.

// minimum versions of the engines: the first that speak the Sandbox API.
const (
	isulad     = "iSulad >= 2.1.3"
	containerd = "containerd >= 2.0.0"
	// containerdIO is the same program as Docker's repositories pack it.
	containerdIO = "containerd.io >= 2.0.0"
)

// qemu is a path, because no two distributions agree on the name of the package. Every repository's
// primary metadata lists what is in /usr/bin, so that dnf need not fetch the lists of all files.
func qemu(arch string) string { return "/usr/bin/qemu-system-" + arch }

func requires(arch string) []string {
	return []string{
		// The daemon runs as a service and keeps connections over a restart in systemd's descriptor store.
		// Besides, this orders the two when both are installed at once: the preset is applied only if
		// systemctl is there when %post runs.
		"systemd",
		// The scriptlets' interpreter.
		"/bin/sh",
		// Without a hypervisor no pod starts. Any of them will do, so that a node with QEMU needs no
		// StratoVirt; which of them a bare node gets is said by recommends. qemu-kvm is what
		// distributions call a QEMU that is not in /usr/bin.
		fmt.Sprintf("(stratovirt or %s or qemu-kvm)", qemu(arch)),
	}
}

func recommends(arch string) []string {
	list := []string{
		// The hypervisor of config_stratovirt.toml, which is the configuration that the daemon reads unless
		// told otherwise. Not required: a node with QEMU sets config_qemu.toml.
		"stratovirt",
		// An engine. Rich, for a node with containerd shall not get iSulad, whose service would come up
		// beside it. Not required, because on nodes of Kubernetes containerd often is not an RPM.
		fmt.Sprintf("(%s or %s or %s)", isulad, containerd, containerdIO),
		// Shares containers' files with the guests. Rich, because StratoVirt up to 2.3 brings its own. Not
		// required, because QEMU can share by 9p.
		"(virtiofsd or /usr/bin/vhost_user_fs)",
		// Without plugins pods have no network. Not required: network add-ons of Kubernetes bring them
		// along, outside of RPM.
		"containernetworking-plugins",
	}
	if arch == "x86_64" {
		// StratoVirt's q35 starts a kernel by way of UEFI firmware; its virt on aarch64 does without, and
		// so does QEMU, which has what it needs in its own package. Rich, so that a node without StratoVirt
		// gets no firmware.
		list = append(list, "(edk2-ovmf if stratovirt)")
	}
	return list
}

// suggests are not installed, but decide where one of several would satisfy what is recommended or
// required.
func suggests() []string {
	return []string{
		// openEuler's guide is with these two.
		"stratovirt",
		isulad,
		// crictl, to try it out as the guide does.
		"cri-tools",
	}
}

// provides are what rpmbuild would add by itself, and the role, for others to depend on.
func provides(evr, version string, arch architecture) []string {
	return []string{
		// There are configuration files of this version in the package.
		fmt.Sprintf("config(%s) = %s", Name, evr),
		// For dependencies that must be met by a package of the same architecture.
		fmt.Sprintf("%s(%s) = %s", Name, arch.isa, evr),
		// A sandboxer of the runtime handler vmm.
		fmt.Sprintf("%s(sandboxer) = %s", Name, version),
	}
}
