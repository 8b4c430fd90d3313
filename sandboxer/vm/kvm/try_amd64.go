package kvm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	setUserMemoryRegion = 0x4020ae46
	setRegs             = 0x4090ae82
	getSregs            = 0x8138ae83
	setSregs            = 0x4138ae84

	exitIO      = 2
	exitHlt     = 5
	exitReasons = 8 // where the reason is in the page that is shared with KVM

	guestPages = 2
	codeAt     = 0x1000 // in the guest's memory
	// tryTimeout bounds the run of a handful of instructions.
	tryTimeout = time.Second
)

// Executes says that Check lets the processor execute something on this architecture.
const Executes = true

// code stores a number in memory, reads it back, adds to it, and says the sum at a port:
// mov ax, 40; mov [0x500], ax; add word [0x500], 2; mov ax, [0x500]; out 0xe9, al; hlt.
var code = []byte{0xb8, 0x28, 0x00, 0xa3, 0x00, 0x05, 0x83, 0x06, 0x00, 0x05, 0x02, 0xa1, 0x00, 0x05, 0xe6, 0xe9, 0xf4}

// try runs code in real mode.
func try(device, vm, vcpu *os.File) error {
	page := os.Getpagesize()
	memory, err := unix.Mmap(-1, 0, guestPages*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer unix.Munmap(memory)
	copy(memory[codeAt:], code)
	region := struct {
		slot, flags       uint32
		guest, size, ours uint64
	}{size: uint64(len(memory)), ours: uint64(uintptr(unsafe.Pointer(&memory[0])))}
	if _, err := ioctl(vm, setUserMemoryRegion, unsafe.Pointer(&region)); err != nil {
		return fmt.Errorf("it takes no memory: %w", err)
	}
	var special [312]byte
	if _, err := ioctl(vcpu, getSregs, unsafe.Pointer(&special)); err != nil {
		return err
	}
	// The code segment comes first: its base, its limit, its selector.
	binary.LittleEndian.PutUint64(special[0:], 0)
	binary.LittleEndian.PutUint16(special[12:], 0)
	if _, err := ioctl(vcpu, setSregs, unsafe.Pointer(&special)); err != nil {
		return err
	}
	var regs [18]uint64
	regs[16], regs[17] = codeAt, 2 // rip and rflags, which has one bit that is always set
	if _, err := ioctl(vcpu, setRegs, unsafe.Pointer(&regs)); err != nil {
		return err
	}
	size, err := ioctl(device, getVCPUMmapSize, nil)
	if err != nil {
		return err
	}
	shared, err := unix.Mmap(int(vcpu.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer unix.Munmap(shared)

	// A processor that hangs is called off by a signal, which the runtime has no other use for than to
	// interrupt.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	thread, deadline := unix.Gettid(), time.Now().Add(tryTimeout)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		tick := time.NewTicker(tryTimeout / 4)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				unix.Tgkill(unix.Getpid(), thread, unix.SIGURG)
			case <-stop:
				return
			}
		}
	}()
	said := -1
	for time.Now().Before(deadline) {
		if _, err := ioctl(vcpu, runVCPU, nil); errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue
		} else if err != nil {
			return fmt.Errorf("it does not run its processor: %w", err)
		}
		switch reason := binary.LittleEndian.Uint32(shared[exitReasons:]); reason {
		case exitIO:
			// direction, size, port, count, and where the data is in the shared page
			at := binary.LittleEndian.Uint64(shared[40:])
			if at < uint64(len(shared)) {
				said = int(shared[at])
			}
		case exitHlt:
			if said != 42 {
				return fmt.Errorf("its processor computes wrongly (40 + 2 = %d)", said)
			}
			return nil
		default:
			return fmt.Errorf("its processor stops at its first instructions (reason %d)", reason)
		}
	}
	return fmt.Errorf("its processor did not execute a handful of instructions within %v", tryTimeout)
}
