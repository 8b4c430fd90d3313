package pod

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/sandboxer/vm"
)

// VsockDevice is where the host's vsock is opened for a guest.
const VsockDevice = "/dev/vhost-vsock"

// setGuestCID is VHOST_VSOCK_SET_GUEST_CID of linux/vhost.h.
const setGuestCID = 0x4008AF60

// claims is how many context ids are tried; they are drawn from two thousand million.
const claims = 16

// ClaimVsock opens the vsock device and claims a free context id on it. The kernel gives it back
// when the descriptor's last copy is closed, which is with the end of the hypervisor.
func ClaimVsock() (*vm.Vsock, error) {
	f, err := os.OpenFile(VsockDevice, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the vsock device (modprobe vhost_vsock): %w", err)
	}
	for range claims {
		cid := 3 + rand.Uint32N(1<<31-4) // 0 to 2 mean the hypervisor, the loopback and the host
		arg := uint64(cid)
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), setGuestCID, uintptr(unsafe.Pointer(&arg)))
		switch errno {
		case 0:
			return &vm.Vsock{CID: cid, FD: f}, nil
		case unix.EADDRINUSE:
			continue
		}
		f.Close()
		return nil, fmt.Errorf("cannot claim the vsock context id %d: %w", cid, errno)
	}
	f.Close()
	return nil, errors.New("cannot find a free vsock context id")
}
