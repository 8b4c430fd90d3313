package stratovirt

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/machine"
)

// Files in the pod's directory, beside sandbox-<id>.log and sandbox-<id>.pid.
const (
	messagesFile = "stratovirt.log" // its log and what it says on its standard error
	disksFile    = "stratovirt-disks.json"
)

// rootPorts is how many disks can be plugged in at a time.
const rootPorts = 10

// Slots of pcie.0 that are always the same: people look for the vsock's. StratoVirt's host bridge has slot
// 0, q35's LPC bridge the last.
const (
	rngSlot    = 1
	serialSlot = 2
	vsockSlot  = 3
	firstSlot  = 4 // of the others
)

// commandLine returns StratoVirt's arguments for a root of the given type on the image, or none, and the
// files for them to refer to, in their order from descriptor 3.
func (d *Driver) commandLine(s vm.Spec, rootFSType string) (args []string, files []*os.File) {
	add := func(a ...string) { args = append(args, a...) }
	inherit := func(f *os.File) int {
		files = append(files, f)
		return 2 + len(files)
	}
	// device adds a virtio device, which microvm has on its own bus and the others in a slot; the arguments
	// after the first two are what follows the slot.
	device := func(slot int, kind, properties string, more ...string) {
		if d.microvm() {
			kind += "-device"
		} else {
			kind += "-pci"
			properties += fmt.Sprintf(",bus=pcie.0,addr=%#x", slot)
		}
		add("-device", strings.Join(append([]string{kind, properties}, more...), ","))
	}
	next := firstSlot - 1
	free := func() int { next++; return next }

	add("-name", machine.ProcessName(s.PodID))
	machineType := append([]string{d.machineType}, d.options...)
	if s.Share.Socket != "" {
		// The daemon works on the guest's memory.
		machineType = slices.DeleteFunc(machineType, func(o string) bool { return strings.HasPrefix(o, "mem-share=") })
		machineType = append(machineType, "mem-share=on")
	}
	add("-machine", strings.Join(machineType, ","))
	add("-qmp", "unix:"+filepath.Join(s.Dir, machine.QMPSocket)+",server,nowait")
	add("-kernel", s.Kernel)
	if s.Initrd != "" {
		add("-initrd", s.Initrd)
	}
	add("-append", strings.Join(d.kernelParams(s, rootFSType), " "))
	add("-smp", fmt.Sprintf("cpus=%d", s.VCPUs), "-m", fmt.Sprintf("%dM", s.MemoryMiB))
	// Its log, with the error that ends it, goes to the standard error, in 2.2 to the standard output.
	add("-D")
	if s.MemoryPrealloc {
		add("-mem-prealloc")
	}
	if d.firmware != "" {
		add("-drive", "file="+d.firmware+",if=pflash,format=raw,unit=0,readonly=on")
	}
	add("-serial", "socket,path="+filepath.Join(s.Dir, machine.ConsoleSocket)+",server,nowait")

	add("-object", "rng-random,id=rng0,filename=/dev/urandom")
	device(rngSlot, "virtio-rng", "rng=rng0,id=virtio-rng0")
	if s.Vsock == nil {
		device(serialSlot, "virtio-serial", "id=virtio-serial0")
		add("-chardev", "socket,id=agent,path="+filepath.Join(s.Dir, machine.AgentSocket)+",server,nowait")
		// Port 0 is for consoles. StratoVirt's ports have no names.
		add("-device", "virtserialport,id=agent0,chardev=agent,nr=1")
	}
	if rootFSType != "" {
		// All pods share it: through the page cache, and locked for reading only.
		add("-drive", "id=rootfs,file="+s.Image+",readonly=on,direct=off")
		device(free(), "virtio-blk", "drive=rootfs,id=blk-0")
	}
	if s.Vsock != nil {
		device(vsockSlot, "vhost-vsock", fmt.Sprintf("id=vsock-%d,guest-cid=%d", s.Vsock.CID, s.Vsock.CID), fmt.Sprintf("vhostfd=%d", inherit(s.Vsock.FD)))
	}
	if s.Share.Socket != "" {
		add("-chardev", "socket,id=virtio-fs,path="+s.Share.Socket)
		device(free(), "vhost-user-fs", "id=vhost-user-fs,chardev=virtio-fs,tag="+protocol.ShareTag)
	}
	if !d.microvm() {
		add("-global", "pcie-root-port.fast-unplug=1")
		for i := range rootPorts {
			slot := free()
			add("-device", fmt.Sprintf("pcie-root-port,id=%s,port=%#x,bus=pcie.0,addr=%#x", rootPort(i), slot, slot))
		}
	}
	for i, n := range s.NICs {
		add("-netdev", fmt.Sprintf("tap,id=net%d,fd=%d", i, inherit(n.Tap)))
		device(free(), "virtio-net", fmt.Sprintf("netdev=net%d,id=nic%d,mac=%s", i, i, n.MAC))
	}
	return args, files
}

// kernelParams returns the driver's parameters and then the caller's, which therefore win.
func (d *Driver) kernelParams(s vm.Spec, rootFSType string) []string {
	console := "ttyS0"
	if d.machineType == "virt" || d.microvm() && runtime.GOARCH == "arm64" {
		console = "ttyAMA0"
	}
	// A panic resets the machine at once, and that is its end.
	params := []string{"console=" + console, "panic=-1", "iommu=off", "rcupdate.rcu_expedited=1"}
	if d.microvm() {
		params = append(params, "pci=off", "acpi=off")
		if console == "ttyS0" {
			params = append(params, "reboot=k") // the only reset that it knows
		}
	} else {
		params = append(params, "pcie_ports=native")
	}
	if !d.debug {
		params = append(params, "quiet")
	}
	if rootFSType != "" {
		params = append(params, "root=/dev/vda", "ro", "rootfstype="+rootFSType)
	}
	if s.Vsock == nil {
		// Its port has no name by which the agent would know it.
		params = append(params, protocol.ParamTransport+"=serial")
	}
	return append(params, s.KernelParams...)
}

func rootPort(i int) string { return fmt.Sprintf("pcie.%d", i+1) }
