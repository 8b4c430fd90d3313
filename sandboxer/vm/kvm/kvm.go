// Package kvm finds out whether this host's KVM runs guests, without a hypervisor: that /dev/kvm opens
// proves nothing, as nested hosts offer it and then stop at the guest's first instruction.
package kvm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Device is where KVM is.
const Device = "/dev/kvm"

// ioctls of linux/kvm.h and what they answer.
const (
	getAPIVersion   = 0xae00
	createVM        = 0xae01
	getVCPUMmapSize = 0xae04
	createVCPU      = 0xae41
	runVCPU         = 0xae80

	apiVersion = 12 // its only answer since 2007
)

// ioctl has an argument that is a pointer, or nil for 0. It takes no uintptr made of one: until the system
// call, the stack that it would point into may move.
func ioctl(f *os.File, request uintptr, argument unsafe.Pointer) (int, error) {
	fd := f.Fd()
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, request, uintptr(argument))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// Open checks that the device is KVM's and may be used, and returns it.
func Open() (*os.File, error) {
	f, err := os.OpenFile(Device, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if v, err := ioctl(f, getAPIVersion, nil); err != nil || v != apiVersion {
		f.Close()
		return nil, fmt.Errorf("%s does not speak KVM's API (version %d, %v)", Device, v, err)
	}
	return f, nil
}

// Check makes a machine with one processor, lets it execute a few instructions where Executes is true,
// and lets go of it. It takes a second at most. The error says what does not work and
// what mends it.
func Check() error {
	f, err := Open()
	switch {
	// systemd makes the node before the module is there; it then leads to nothing.
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("nothing is behind %s; enable virtualization in the firmware, or nested virtualization for this machine on its host, and load the module kvm_intel or kvm_amd: %w", Device, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w; run the daemon as root", err)
	case err != nil:
		return err
	}
	defer f.Close()
	fd, err := ioctl(f, createVM, nil)
	if err != nil {
		return fmt.Errorf("%s makes no virtual machine: %w", Device, err)
	}
	vm := os.NewFile(uintptr(fd), "kvm-vm")
	defer vm.Close()
	if fd, err = ioctl(vm, createVCPU, nil); err != nil {
		return fmt.Errorf("%s makes no virtual processor: %w", Device, err)
	}
	vcpu := os.NewFile(uintptr(fd), "kvm-vcpu")
	defer vcpu.Close()
	if err := try(f, vm, vcpu); err != nil {
		return fmt.Errorf("%s opens and runs no guest: %w; enable nested virtualization for this machine on its host", Device, err)
	}
	return nil
}
