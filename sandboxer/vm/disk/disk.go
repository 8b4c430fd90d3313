// Package disk opens the host's files and block devices that become disks of a guest.
package disk

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Open opens a disk for the guest. It refuses what is neither a block device nor a regular file, and
// what the host has mounted; the caller closes the file. A block device is claimed as a mount claims it, so the two
// exclude each other for as long as anybody holds the returned file.
func Open(path string, readOnly bool) (f *os.File, block bool, err error) {
	flags := os.O_RDWR
	if readOnly {
		flags = os.O_RDONLY
	}
	// Without waiting: a FIFO would block the open. What it is, is asked of the descriptor.
	f, err = os.OpenFile(path, flags|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, false, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, false, err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		loop, err := mountedLoop(st)
		if err == nil && loop != "" {
			err = fmt.Errorf("the host has it mounted through %s", loop)
		}
		if err != nil {
			f.Close()
			return nil, false, err
		}
		return f, false, nil
	case unix.S_IFBLK:
		claimed, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), flags|unix.O_EXCL, 0)
		f.Close()
		if errors.Is(err, unix.EBUSY) {
			return nil, false, errors.New("the host uses this block device: it is mounted or part of another device")
		}
		if err != nil {
			return nil, false, err
		}
		return claimed, true, nil
	default:
		f.Close()
		return nil, false, errors.New("it is neither a block device nor a regular file")
	}
}

// mountedLoop returns the loop device that is backed by the file and mounted, if there is one.
func mountedLoop(file unix.Stat_t) (string, error) {
	backing, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil || len(backing) == 0 {
		return "", err
	}
	mounted, err := mountedDevices()
	if err != nil {
		return "", err
	}
	for _, attr := range backing {
		path, err := os.ReadFile(attr)
		if err != nil {
			continue // detached meanwhile
		}
		var st unix.Stat_t
		if unix.Stat(strings.TrimSuffix(string(path), "\n"), &st) != nil || st.Dev != file.Dev || st.Ino != file.Ino {
			continue
		}
		dir := filepath.Dir(filepath.Dir(attr))
		number, err := os.ReadFile(filepath.Join(dir, "dev"))
		if err == nil && mounted[strings.TrimSpace(string(number))] {
			return "/dev/" + filepath.Base(dir), nil
		}
	}
	return "", nil
}

// mountedDevices returns the numbers, as major:minor, of everything that is mounted.
func mountedDevices() (map[string]bool, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	mounted := make(map[string]bool)
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) > 2 {
			mounted[fields[2]] = true
		}
	}
	return mounted, lines.Err()
}
