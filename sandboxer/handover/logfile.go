package handover

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const (
	pageSize = 4096
	// headerSize is where the bytes begin, in an Inbox's and in an Outbox's file.
	headerSize = 2 * pageSize
	// chunk is how much is moved by one call.
	chunk = 64 << 10
	// punchAt is how much is given back at once: every call has its price.
	punchAt = 4 * pageSize
)

var order = binary.LittleEndian

// newFile makes a memory file that begins with a magic number and is positioned behind its header.
func newFile(name string, magic uint64) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("cannot make the memory file of an %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	var b [8]byte
	order.PutUint64(b[:], magic)
	if _, err := f.WriteAt(b[:], 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("cannot write the header of an %s: %w", name, err)
	}
	if err = f.Truncate(headerSize); err == nil {
		_, err = unix.Seek(fd, headerSize, unix.SEEK_SET)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("cannot prepare the memory file of an %s: %w", name, err)
	}
	return f, nil
}

// readHeader checks a kept file and returns its header.
func readHeader(f *os.File, name string, magic uint64) ([]byte, error) {
	header := make([]byte, headerSize)
	if _, err := f.ReadAt(header, 0); err != nil {
		return nil, fmt.Errorf("cannot read the header of a kept %s: %w", name, err)
	}
	if got := order.Uint64(header); got != magic {
		return nil, fmt.Errorf("a kept file is no %s that this daemon knows: it begins with %#x, not %#x", name, got, magic)
	}
	return header, nil
}

// position is the kernel's own, shared by everybody who has the file open.
func position(f *os.File) (int64, error) {
	return unix.Seek(descriptor(f), 0, unix.SEEK_CUR)
}

// descriptor is f's, without making f blocking as os.File.Fd may. f must not be closed meanwhile.
func descriptor(f *os.File) int {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1
	}
	fd := -1
	_ = raw.Control(func(n uintptr) { fd = int(n) })
	return fd
}

// punch gives the pages of [from, to), multiples of the page's size, back to the kernel. Bytes that
// were spliced from there and wait in a socket or FIFO are not touched: whole pages only lose their
// place in the file. A failure costs memory only.
func punch(f *os.File, from, to int64) {
	if to > from {
		_ = unix.Fallocate(descriptor(f), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, from, to-from)
	}
}

func pageFloor(off int64) int64 { return off &^ (pageSize - 1) }
func pageCeil(off int64) int64  { return pageFloor(off + pageSize - 1) }

// again repeats a call that a signal interrupted.
func again(call func() (int64, error)) (int64, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
