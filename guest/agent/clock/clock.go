// Package clock sets the guest's time and seeds its random numbers. Both come from the host: a
// guest that was restored from a snapshot has neither of its own.
package clock

import (
	"encoding/binary"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// earliest refuses times that can only be a mistake: 2020-01-01.
const earliest = 1577836800 * int64(time.Second)

// Set steps the guest's clock to the host's, in nanoseconds since 1970, and returns how far the
// guest was behind (negative: ahead).
func Set(unixNanos int64) (behind time.Duration, err error) {
	if unixNanos < earliest {
		return 0, fmt.Errorf("cannot set the clock to %v: that is before this program was written", time.Unix(0, unixNanos).UTC())
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME, &now); err != nil {
		return 0, fmt.Errorf("cannot read the clock: %w", err)
	}
	to := unix.NsecToTimespec(unixNanos)
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &to); err != nil {
		return 0, fmt.Errorf("cannot set the clock: %w", err)
	}
	return time.Duration(unixNanos - now.Nano()), nil
}

const maxSeed = 4096

// Seed credits seed, 16 to 4096 bytes that only the host knows, to the kernel's random number
// generator, and makes it use them from now on.
func Seed(seed []byte) error {
	b, err := poolInfo(seed)
	if err != nil {
		return err
	}
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("cannot seed the random number generator: %w", err)
	}
	defer f.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&b[0]))); errno != 0 {
		return fmt.Errorf("cannot seed the random number generator: %w", errno)
	}
	if err := unix.IoctlSetInt(int(f.Fd()), unix.RNDRESEEDCRNG, 0); err != nil {
		return fmt.Errorf("cannot reseed the random number generator: %w", err)
	}
	return nil
}

// poolInfo is struct rand_pool_info: the entropy in bits, the size in bytes, the bytes.
func poolInfo(seed []byte) ([]byte, error) {
	if len(seed) < 16 || len(seed) > maxSeed {
		return nil, fmt.Errorf("cannot seed the random number generator with %d bytes, want 16 to %d", len(seed), maxSeed)
	}
	b := binary.NativeEndian.AppendUint32(nil, uint32(len(seed)*8))
	b = binary.NativeEndian.AppendUint32(b, uint32(len(seed)))
	return append(b, seed...), nil
}
