package qemu

import (
	"fmt"
	"os"
	"strings"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/machine"
)

const (
	// rootPorts is how many disks can be plugged in at a time. Each port lengthens a boot on TCG by
	// some 15 ms, used or not.
	rootPorts = 4
	// rootPortSlot is the PCI slot on pcie.0 whose functions are the root ports.
	rootPortSlot = 0x10
	// scsiBus is that of the controller with the id scsi0, which hot-plugged SCSI disks are targets on.
	scsiBus = "scsi0.0"
	// tbSize is TCG's cache of translated code, in MiB. Booting fills 45; much less makes it
	// translate again and again, more only costs memory.
	tbSize = 64
)

// qbootROM is a firmware that only starts a kernel. On TCG a boot with it takes a tenth less than
// with SeaBIOS; with KVM it was never tried, and little would be won.
const qbootROM = "qboot.rom"

// inherited collects the descriptors that the process inherits; it numbers them as exec does.
type inherited struct{ files []*os.File }

func (in *inherited) add(f *os.File) int {
	in.files = append(in.files, f)
	return 2 + len(in.files)
}

// sockets are the listening sockets that the daemon makes and QEMU accepts on. Because they listen
// before QEMU runs, nobody has to poll for them.
type sockets struct{ qmp, console, agent *os.File }

// vhostNets are open vhost-net devices, one for each NIC or none at all: the host's kernel then moves the
// frames between a tap and its NIC, without QEMU in between.
type vhostNets []*os.File

func (v vhostNets) close() {
	for _, f := range v {
		f.Close()
	}
}

// commandLine returns QEMU's arguments for a root of the given type on the image, or none, and the
// files for them to refer to, in their order from descriptor 3.
func (d *Driver) commandLine(s vm.Spec, rootFSType string, listening sockets, vhost vhostNets) (args []string, files []*os.File) {
	var in inherited
	add := func(a ...string) { args = append(args, a...) }
	arm := d.machineType == "virt"

	add("-name", machine.ProcessName(s.PodID))
	machineType := d.machineType
	if arm {
		machineType += ",gic-version=max"
	}
	// Only a vhost-user daemon needs the guest's memory shared; private memory is cheaper.
	memory := ""
	switch {
	case s.Share.Socket != "":
		memory = "memory-backend-memfd,id=mem,share=on"
	case s.MemoryPrealloc:
		memory = "memory-backend-ram,id=mem"
	}
	if memory != "" {
		machineType += ",memory-backend=mem"
		memory += fmt.Sprintf(",size=%dM", s.MemoryMiB)
		if s.MemoryPrealloc {
			memory += ",prealloc=on"
		}
		add("-object", memory)
	}
	add("-machine", machineType)
	if d.kvm {
		add("-accel", "kvm", "-cpu", "host")
	} else {
		cpu := "max"
		if arm {
			// The kernel signs its return addresses. Computing that by the architecture's own algorithm
			// takes TCG longer than all the rest of a boot.
			cpu += ",pauth-impdef=on"
		}
		add("-accel", fmt.Sprintf("tcg,thread=multi,tb-size=%d", tbSize), "-cpu", cpu)
	}
	add("-smp", fmt.Sprint(s.VCPUs), "-m", fmt.Sprintf("%dM", s.MemoryMiB))
	add("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot")
	add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")

	switch {
	case d.firmware != "":
		add("-bios", d.firmware)
	case d.qboot && d.machineType == "q35":
		add("-bios", qbootROM)
	}
	add("-kernel", s.Kernel)
	if s.Initrd != "" {
		add("-initrd", s.Initrd)
	}
	add("-append", strings.Join(d.kernelParams(s, rootFSType), " "))

	server := func(id string, f *os.File) string {
		return fmt.Sprintf("socket,id=%s,fd=%d,server=on,wait=off", id, in.add(f))
	}
	add("-chardev", server("qmp", listening.qmp), "-mon", "chardev=qmp,mode=control")
	add("-chardev", server("console", listening.console), "-serial", "chardev:console")

	add("-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng")
	if s.Vsock != nil {
		add("-device", fmt.Sprintf("vhost-vsock-pci,id=vsock-%d,guest-cid=%d,vhostfd=%d", s.Vsock.CID, s.Vsock.CID, in.add(s.Vsock.FD)))
	} else {
		add("-device", "virtio-serial-pci,max_ports=2")
		add("-chardev", server("agent", listening.agent))
		// Port 0 is reserved for consoles.
		add("-device", "virtserialport,chardev=agent,nr=1,name="+protocol.SerialPort)
	}
	if rootFSType != "" {
		add("-blockdev", "driver=raw,node-name=image,read-only=on,file.driver=file,file.filename="+escape(s.Image))
		add("-device", "virtio-blk-pci,drive=image")
	}
	switch {
	case s.Share.Socket != "":
		add("-chardev", "socket,id=share,path="+escape(s.Share.Socket))
		add("-device", "vhost-user-fs-pci,chardev=share,queue-size=1024,tag="+protocol.ShareTag)
	case s.Share.Dir != "":
		add("-fsdev", "local,id=share,security_model=none,multidevs=remap,path="+escape(s.Share.Dir))
		add("-device", "virtio-9p-pci,fsdev=share,mount_tag="+protocol.ShareTag)
	}
	for i, n := range s.NICs {
		netdev := fmt.Sprintf("tap,id=net%d,fd=%d,vhost=", i, in.add(n.Tap))
		if len(vhost) > 0 {
			netdev += fmt.Sprintf("on,vhostfd=%d", in.add(vhost[i]))
		} else {
			netdev += "off"
		}
		add("-netdev", netdev)
		device := fmt.Sprintf("virtio-net-pci,id=nic%d,netdev=net%d,mac=%s,romfile=", i, i, n.MAC)
		if n.MTU != 0 && n.MTU != 1500 {
			device += fmt.Sprintf(",host_mtu=%d", n.MTU)
		}
		add("-device", device)
	}
	if d.scsi {
		add("-device", "virtio-scsi-pci,id=scsi0")
		return args, in.files
	}
	for i := range rootPorts {
		port := fmt.Sprintf("pcie-root-port,id=%s,bus=pcie.0,chassis=%d,slot=%d,addr=%#x.%#x", rootPort(i), i+1, i+1, rootPortSlot, i)
		if i == 0 {
			port += ",multifunction=on"
		}
		add("-device", port)
	}
	return args, in.files
}

// kernelParams returns the driver's parameters and then the caller's, which therefore win.
func (d *Driver) kernelParams(s vm.Spec, rootFSType string) []string {
	console := "ttyS0"
	if d.machineType == "virt" {
		console = "ttyAMA0"
	}
	// With -no-reboot, a panic and a reboot both end QEMU.
	// Containers come and go by mounts and control groups, which wait for RCU grace periods: expedited
	// ones take microseconds of CPUs that have little else to do.
	params := []string{"console=" + console, "panic=-1", "rcupdate.rcu_expedited=1"}
	if d.machineType == "q35" {
		params = append(params, "reboot=t")
	}
	if !d.debug {
		params = append(params, "quiet")
	}
	if !d.kvm && d.machineType == "q35" {
		// The emulated timers need no checks, and TCG's TSC is the host's.
		params = append(params, "no_timer_check")
		if s.VCPUs == 1 {
			// Without the local APIC's timer there is none to calibrate, which is a fifth of a
			// boot on TCG. An idle guest costs the same 0.3 % of a core either way; with more
			// CPUs, which would share the HPET, it would not.
			params = append(params, "noapictimer")
		}
		if d.tscKHz > 0 {
			params = append(params, fmt.Sprintf("tsc_early_khz=%d", d.tscKHz), "tsc=reliable")
		}
	}
	if rootFSType != "" {
		params = append(params, "root=/dev/vda", "ro", "rootfstype="+rootFSType)
	}
	return append(params, s.KernelParams...)
}

func rootPort(i int) string { return fmt.Sprintf("rp%d", i) }

// escape doubles the commas of a path, as QEMU's options want it.
func escape(path string) string { return strings.ReplaceAll(path, ",", ",,") }
