// Package devices finds virtio devices of the guest by the names that the host gave them, and
// waits for those that are plugged in later.
package devices

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// sysfs is where the kernel describes devices; tests put their own there.
var sysfs = "/sys"

// Disk waits for the virtio-blk or SCSI disk with a serial number and returns its node, such as /dev/vda.
// It returns when ctx ends with an error that wraps ctx's.
func Disk(ctx context.Context, serial string) (string, error) {
	if serial == "" || len(serial) > maxSerial {
		return "", fmt.Errorf("cannot find disk %q: a serial number has 1 to %d characters", serial, maxSerial)
	}
	path, err := Wait(ctx, "block", func() (string, bool) { return findDisk(serial) })
	if err != nil {
		return "", fmt.Errorf("cannot find the disk with serial number %q: %w", serial, err)
	}
	return path, nil
}

// maxSerial is virtio's VIRTIO_BLK_ID_BYTES.
const maxSerial = 20

func findDisk(serial string) (string, bool) {
	names, _ := filepath.Glob(sysfs + "/block/*/serial")
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err == nil && strings.TrimRight(string(b), "\n\x00") == serial {
			return "/dev/" + filepath.Base(filepath.Dir(name)), true
		}
	}
	// A SCSI disk tells it in a page of its vital product data, after a header of four bytes.
	const header = 4
	pages, _ := filepath.Glob(sysfs + "/block/*/device/vpd_pg80")
	for _, name := range pages {
		b, err := os.ReadFile(name)
		if err == nil && len(b) > header && strings.Trim(string(b[header:]), " \n\x00") == serial {
			return "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(name))), true
		}
	}
	return "", false
}

// SerialPort returns the node of the virtio-serial port with a name, such as /dev/vport0p1, if it
// exists.
func SerialPort(name string) (string, bool) {
	names, _ := filepath.Glob(sysfs + "/class/virtio-ports/*/name")
	for _, n := range names {
		b, err := os.ReadFile(n)
		if err == nil && strings.TrimSpace(string(b)) == name {
			return "/dev/" + filepath.Base(filepath.Dir(n)), true
		}
	}
	return "", false
}

// NamelessSerialPort returns the node of a first port, such as /dev/vport0p1, that has no name: StratoVirt's
// have none. A port that has one is without it for a moment after it appeared.
func NamelessSerialPort() (string, bool) {
	ports, _ := filepath.Glob(sysfs + "/class/virtio-ports/vport*p1")
	for _, p := range ports {
		if _, err := os.Stat(filepath.Join(p, "name")); errors.Is(err, os.ErrNotExist) {
			return "/dev/" + filepath.Base(p), true
		}
	}
	return "", false
}

// Wait returns what find finds, at once or after a device of a subsystem of the kernel (empty:
// any) came or changed, and the node exists.
func Wait(ctx context.Context, subsystem string, find func() (string, bool)) (string, error) {
	exists := func() (string, bool) {
		path, ok := find()
		if ok {
			// The kernel makes the node before it announces the device, but not before it shows
			// in sysfs.
			_, err := os.Stat(path)
			ok = err == nil
		}
		return path, ok
	}
	if path, ok := exists(); ok {
		return path, nil
	}
	events, err := subscribe()
	if err != nil {
		return "", err
	}
	defer events.Close()
	stop := context.AfterFunc(ctx, func() { events.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, 8<<10)
	for {
		// After subscribing, so that no device comes unseen in between.
		if path, ok := exists(); ok {
			return path, nil
		}
		for {
			n, err := events.Read(buf)
			if ctx.Err() != nil {
				return "", fmt.Errorf("it did not appear: %w", context.Cause(ctx))
			}
			if errors.Is(err, unix.ENOBUFS) {
				break // events were lost: look
			}
			if err != nil {
				return "", fmt.Errorf("cannot read the kernel's device events: %w", err)
			}
			if e, ok := parseEvent(buf[:n]); ok && (subsystem == "" || e.subsystem == subsystem) && e.action != "remove" {
				break
			}
		}
	}
}

// event is one message of the kernel about a device.
type event struct {
	action, path, subsystem string
}

// parseEvent reads "add@/devices/..." followed by KEY=value strings, all ended by NUL.
func parseEvent(b []byte) (event, bool) {
	head, rest, _ := bytes.Cut(b, []byte{0})
	action, path, ok := strings.Cut(string(head), "@")
	if !ok {
		return event{}, false
	}
	e := event{action: action, path: path}
	for field := range bytes.SplitSeq(rest, []byte{0}) {
		if value, ok := bytes.CutPrefix(field, []byte("SUBSYSTEM=")); ok {
			e.subsystem = string(value)
		}
	}
	return e, true
}

// subscribe opens a socket that receives the kernel's device events. The caller closes it.
func subscribe() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("cannot listen for the kernel's device events: %w", err)
	}
	// Group 1 is the kernel's; what user space sends goes to group 2.
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("cannot listen for the kernel's device events: %w", err)
	}
	return os.NewFile(uintptr(fd), "uevents"), nil
}
