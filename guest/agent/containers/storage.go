package containers

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
)

// diskTimeout is how long a disk that the host has plugged in may take to show up. Measured are
// 12 to 78 ms; the rest is for a loaded host.
const diskTimeout = 5 * time.Second

// storageMounts are the mounted Storages of one container, in the order of their mounting.
type storageMounts struct {
	mu     sync.Mutex // held by unmount
	points []string
}

// mountStorages mounts storages below dir in their order. After an error none is mounted.
func mountStorages(dir string, storages []*protocol.Storage) (_ *storageMounts, err error) {
	m := new(storageMounts)
	defer func() {
		if err != nil {
			m.unmount()
		}
	}()
	for _, s := range storages {
		point := s.GetMountPoint()
		if err := checkMountPoint(dir, point); err != nil {
			return nil, err
		}
		source, fstype := "tmpfs", "tmpfs"
		switch s.GetKind() {
		case protocol.Storage_TMPFS:
		case protocol.Storage_BLOCK:
			fstype = s.GetFstype()
			if fstype == "" {
				return nil, fmt.Errorf("cannot mount disk %q on %s: no file system type is given: %w", s.GetSerial(), point, errdefs.ErrInvalidArgument)
			}
			if source, err = findDisk("/sys/block", s.GetSerial(), diskTimeout); err != nil {
				return nil, fmt.Errorf("cannot mount disk on %s: %w", point, err)
			}
		default:
			return nil, fmt.Errorf("cannot mount on %s: storage of kind %s is not known: %w", point, s.GetKind(), errdefs.ErrInvalidArgument)
		}
		flags, data := mountOptions(s.GetOptions())
		if err := os.MkdirAll(point, 0o711); err != nil {
			return nil, fmt.Errorf("cannot mount %s on %s: %w", source, point, err)
		}
		if err := unix.Mount(source, point, fstype, flags, data); err != nil {
			os.Remove(point)
			return nil, fmt.Errorf("cannot mount %s on %s as %s with options %q: %w", source, point, fstype, s.GetOptions(), err)
		}
		m.points = append(m.points, point)
	}
	return m, nil
}

// checkMountPoint refuses what is not strictly below dir.
func checkMountPoint(dir, point string) error {
	rel, err := filepath.Rel(dir, point)
	if err != nil || filepath.Clean(point) != point || rel == "." || !filepath.IsLocal(rel) {
		return fmt.Errorf("mount point %q is not below %s: %w", point, dir, errdefs.ErrInvalidArgument)
	}
	return nil
}

// unmount undoes mountStorages, in reverse. A nil or an unmounted m is fine.
func (m *storageMounts) unmount() error {
	if m == nil {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var failed []string
	var errs []error
	for _, point := range slices.Backward(m.points) {
		err := unix.Unmount(point, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			// A container's mount namespace that is still on its way out holds it.
			err = unix.Unmount(point, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			failed = append(failed, point)
			errs = append(errs, fmt.Errorf("cannot unmount %s: %w", point, err))
			continue
		}
		os.Remove(point)
	}
	slices.Reverse(failed)
	m.points = failed
	return errors.Join(errs...)
}

// findDisk waits until a disk with this serial number is there and returns its device node. sys
// is /sys/block.
func findDisk(sys, serial string, timeout time.Duration) (string, error) {
	if !isName(serial, 20, func(byte) bool { return true }) {
		return "", fmt.Errorf("serial number %q must be 1 to 20 of A-Z a-z 0-9 _ . -: %w", serial, errdefs.ErrInvalidArgument)
	}
	for deadline := time.Now().Add(timeout); ; time.Sleep(5 * time.Millisecond) {
		files, err := filepath.Glob(filepath.Join(sys, "vd*", "serial"))
		if err != nil {
			return "", err
		}
		for _, file := range files {
			b, err := os.ReadFile(file)
			if err == nil && strings.TrimSpace(string(b)) == serial {
				return filepath.Join("/dev", filepath.Base(filepath.Dir(file))), nil
			}
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("no disk with serial number %s has shown up within %s: %w", serial, timeout, errdefs.ErrNotFound)
		}
	}
}

// mountFlags are the options that are flags of mount(2); clear takes the flag away.
var mountFlags = map[string]struct {
	flag  uintptr
	clear bool
}{
	"ro":            {flag: unix.MS_RDONLY},
	"rw":            {flag: unix.MS_RDONLY, clear: true},
	"nosuid":        {flag: unix.MS_NOSUID},
	"suid":          {flag: unix.MS_NOSUID, clear: true},
	"nodev":         {flag: unix.MS_NODEV},
	"dev":           {flag: unix.MS_NODEV, clear: true},
	"noexec":        {flag: unix.MS_NOEXEC},
	"exec":          {flag: unix.MS_NOEXEC, clear: true},
	"sync":          {flag: unix.MS_SYNCHRONOUS},
	"async":         {flag: unix.MS_SYNCHRONOUS, clear: true},
	"dirsync":       {flag: unix.MS_DIRSYNC},
	"noatime":       {flag: unix.MS_NOATIME},
	"atime":         {flag: unix.MS_NOATIME, clear: true},
	"nodiratime":    {flag: unix.MS_NODIRATIME},
	"diratime":      {flag: unix.MS_NODIRATIME, clear: true},
	"relatime":      {flag: unix.MS_RELATIME},
	"norelatime":    {flag: unix.MS_RELATIME, clear: true},
	"strictatime":   {flag: unix.MS_STRICTATIME},
	"nostrictatime": {flag: unix.MS_STRICTATIME, clear: true},
	"defaults":      {},
}

// mountOptions splits options of mount(8) into flags and the data for the file system.
func mountOptions(options []string) (flags uintptr, data string) {
	var rest []string
	for _, option := range options {
		f, known := mountFlags[option]
		switch {
		case !known && option != "":
			rest = append(rest, option)
		case f.clear:
			flags &^= f.flag
		default:
			flags |= f.flag
		}
	}
	return flags, strings.Join(rest, ",")
}
