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
)

// Files in the pod's directory, beside sandbox-<id>.log and sandbox-<id>.pid.
const (
	consoleSocket = "console.sock"
	qmpSocket     = "qmp.sock"
	messagesFile  = "stratovirt.log" // what it says on its standard error
	disksFile     = "stratovirt-disks.json"
)

// rootPorts is how many disks can be plugged in at a time.
const rootPorts = 10

// slots hands out the slots of pcie.0. StratoVirt's host bridge has slot 0, q35's LPC bridge the last.
type slots struct{ next int }

func (s *slots) take() string {
	s.next++
	return fmt.Sprintf("%#x", s.next)
}

// commandLine returns StratoVirt's arguments and the files for them to refer to, in their order from
// descriptor 3.
func (d *Driver) commandLine(s vm.Spec) (args []string, files []*os.File) {
	var free slots
	add := func(a ...string) { args = append(args, a...) }
	inherit := func(f *os.File) int {
		files = append(files, f)
		return 2 + len(files)
	}
	// device adds a virtio device, which microvm has on its own bus and the others in a slot.
	device := func(kind, properties string) {
		if d.microvm() {
			add("-device", kind+"-device,"+properties)
			return
		}
		add("-device", fmt.Sprintf("%s-pci,%s,bus=pcie.0,addr=%s", kind, properties, free.take()))
	}

	add("-name", processName(s.PodID))
	machine := append([]string{d.machineType}, d.options...)
	if s.Share.Socket != "" {
		// The daemon works on the guest's memory.
		machine = slices.DeleteFunc(machine, func(o string) bool { return strings.HasPrefix(o, "mem-share=") })
		machine = append(machine, "mem-share=on")
	}
	add("-machine", strings.Join(machine, ","))
	add("-qmp", "unix:"+filepath.Join(s.Dir, qmpSocket)+",server,nowait")
	add("-kernel", s.Kernel)
	if s.Initrd != "" {
		add("-initrd", s.Initrd)
	}
	add("-append", strings.Join(d.kernelParams(s), " "))
	add("-smp", fmt.Sprintf("cpus=%d", s.VCPUs), "-m", fmt.Sprintf("%dM", s.MemoryMiB))
	// Its log goes to the standard error, whose last lines are the reason of a failed start.
	add("-D")
	if s.MemoryPrealloc {
		add("-mem-prealloc")
	}
	if d.firmware != "" {
		add("-drive", "file="+d.firmware+",if=pflash,format=raw,unit=0,readonly=on")
	}
	add("-serial", "socket,path="+filepath.Join(s.Dir, consoleSocket)+",server,nowait")

	add("-object", "rng-random,id=rng0,filename=/dev/urandom")
	device("virtio-rng", "rng=rng0,id=virtio-rng0")
	if s.Image != "" {
		// All pods share it: through the page cache, and locked for reading only.
		add("-drive", "id=rootfs,file="+s.Image+",readonly=on,direct=off")
		device("virtio-blk", "drive=rootfs,id=blk-0")
	}
	device("vhost-vsock", fmt.Sprintf("id=vsock-%d,guest-cid=%d,vhostfd=%d", s.Vsock.CID, s.Vsock.CID, inherit(s.Vsock.FD)))
	if s.Share.Socket != "" {
		add("-chardev", "socket,id=virtio-fs,path="+s.Share.Socket)
		device("vhost-user-fs", "id=vhost-user-fs,chardev=virtio-fs,tag="+protocol.ShareTag)
	}
	if !d.microvm() {
		add("-global", "pcie-root-port.fast-unplug=1")
		for i := range rootPorts {
			slot := free.take()
			add("-device", fmt.Sprintf("pcie-root-port,id=%s,port=%s,bus=pcie.0,addr=%s", rootPort(i), slot, slot))
		}
	}
	for i, n := range s.NICs {
		add("-netdev", fmt.Sprintf("tap,id=net%d,fd=%d", i, inherit(n.Tap)))
		device("virtio-net", fmt.Sprintf("netdev=net%d,id=nic%d,mac=%s", i, i, n.MAC))
	}
	return args, files
}

// kernelParams returns the driver's parameters and then the caller's, which therefore win.
func (d *Driver) kernelParams(s vm.Spec) []string {
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
	if s.Image != "" {
		params = append(params, "root=/dev/vda", "ro", "rootfstype=ext4")
	}
	return append(params, s.KernelParams...)
}

func processName(podID string) string { return "sandbox-" + podID }

func rootPort(i int) string { return fmt.Sprintf("pcie.%d", i+1) }
