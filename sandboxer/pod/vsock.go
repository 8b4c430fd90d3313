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
	cid, err := claim(func(cid uint32) error {
		arg := uint64(cid)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), setGuestCID, uintptr(unsafe.Pointer(&arg))); errno != 0 {
			return errno
		}
		return nil
	})
	if err != nil {
		f.Close()
		return nil, err
	}
	return &vm.Vsock{CID: cid, FD: f}, nil
}

// claim draws context ids until set accepts one.
func claim(set func(cid uint32) error) (uint32, error) {
	for range claims {
		cid := 3 + rand.Uint32N(1<<31-4) // 0 to 2 mean the hypervisor, the loopback and the host
		err := set(cid)
		if err == nil {
			return cid, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return 0, fmt.Errorf("cannot claim the vsock context id %d: %w", cid, err)
		}
	}
	return 0, errors.New("cannot find a free vsock context id")
}
