package disk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Where the superblocks of the file systems that a guest can boot from have their magic numbers.
const (
	ext4MagicAt = 1024 + 0x38
	ext4Magic   = 0xef53
	erofsMagic  = 0xe0f5e1e2
	erofsAt     = 1024
)

// Filesystem returns what the image of a guest's root at path is formatted with: ext4 or erofs, as the
// kernel's rootfstype names them. Its error says what else the file is.
func Filesystem(path string) (string, error) {
	// A FIFO would block the open.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", fmt.Errorf("cannot read the guest's image: %w", err)
	}
	defer f.Close()
	head := make([]byte, ext4MagicAt+2)
	if n, err := f.ReadAt(head, 0); err != nil {
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("it has only %d bytes; is it the whole file?", n)
		}
		return "", fmt.Errorf("cannot boot from the image %s: %w", path, err)
	}
	switch {
	case binary.LittleEndian.Uint32(head[erofsAt:]) == erofsMagic:
		return "erofs", nil
	case binary.LittleEndian.Uint16(head[ext4MagicAt:]) == ext4Magic:
		return "ext4", nil
	case head[510] == 0x55 && head[511] == 0xaa:
		return "", fmt.Errorf("cannot boot from the image %s: it is a whole disk with partitions; hypervisor.image_path must name a bare ext4 or EROFS file system", path)
	case string(head[:4]) == "QFI\xfb":
		return "", fmt.Errorf("cannot boot from the image %s: it is a qcow2 file; convert it with qemu-img convert -O raw", path)
	}
	return "", fmt.Errorf("cannot boot from the image %s: it is neither an ext4 nor an EROFS file system", path)
}
