package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Mount is a mount that the engine asks for, in the terms of containerd: Type overlay, bind or a
// file system of a block device, and options as fstab(5) has them.
type Mount struct {
	Type    string
	Source  string
	Options []string
}

// hostFlags are set on everything that the guest can write to: neither a device node nor a
// set-user-ID program that it makes there means anything on the host.
const (
	hostFlags = unix.MS_NOSUID | unix.MS_NODEV
	hostAttrs = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV
)

// mountFlags are the options that are no data of a file system. Those that would lift hostFlags,
// and those about propagation, which the share decides, mean nothing here.
var mountFlags = map[string]uintptr{
	"ro": unix.MS_RDONLY, "rw": 0,
	"noexec": unix.MS_NOEXEC, "exec": 0,
	"nosuid": 0, "suid": 0, "nodev": 0, "dev": 0,
	"noatime": unix.MS_NOATIME, "atime": 0, "nodiratime": unix.MS_NODIRATIME, "diratime": 0,
	"relatime": unix.MS_RELATIME, "norelatime": 0, "strictatime": unix.MS_STRICTATIME,
	"sync": unix.MS_SYNCHRONOUS, "async": 0, "dirsync": unix.MS_DIRSYNC,
	"defaults": 0, "bind": 0, "rbind": 0,
	"private": 0, "rprivate": 0, "slave": 0, "rslave": 0, "shared": 0, "rshared": 0, "unbindable": 0, "runbindable": 0,
}

// maxData is what mount(2) takes: a page with the final zero byte.
var maxData = os.Getpagesize() - 1

// on makes the mount at the directory that the descriptor target names.
func (m Mount) on(target int) error {
	flags, data, err := m.parse()
	if err != nil {
		return err
	}
	if m.Type == "bind" || m.Type == "rbind" || m.Type == "" {
		if len(data) > 0 {
			return fmt.Errorf("unknown option %q of a bind mount of %s", data[0], m.Source)
		}
		tree, err := cloneTree(m.Source, flags&unix.MS_RDONLY != 0)
		if err != nil {
			return fmt.Errorf("binding %s: %w", m.Source, err)
		}
		defer unix.Close(tree.fd)
		if !tree.dir {
			return fmt.Errorf("binding %s: it is no directory", m.Source)
		}
		return tree.attach(target)
	}
	text := strings.Join(data, ",")
	if m.Type == "overlay" && len(text) > maxData {
		var done func()
		if text, done, err = shorten(data); err != nil {
			return fmt.Errorf("mounting an overlay: %w", err)
		}
		defer done()
	}
	if len(text) > maxData {
		return fmt.Errorf("mounting %s of type %s: its options are %d bytes, more than %d", m.Source, m.Type, len(text), maxData)
	}
	if err := unix.Mount(m.Source, fdPath(target), m.Type, flags|hostFlags, text); err != nil {
		return fmt.Errorf("mounting %s of type %s: %w", m.Source, m.Type, explain(m, err))
	}
	return nil
}

// explain adds what mount(2)'s bare numbers mostly mean.
func explain(m Mount, err error) error {
	switch {
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%w: the host's kernel does not know this file system; load its module (modprobe %s)", err, m.Type)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESTALE):
		return fmt.Errorf("%w: a directory of it is gone (options %s)", err, strings.Join(m.Options, ","))
	}
	return err
}

// parse separates flags from data.
func (m Mount) parse() (flags uintptr, data []string, err error) {
	for _, o := range m.Options {
		key, _, _ := strings.Cut(o, "=")
		switch {
		case key == "loop" || key == "uidmap" || key == "gidmap" || strings.HasPrefix(key, "X-"):
			return 0, nil, fmt.Errorf("the option %q of the mount of %s is not supported", o, m.Source)
		case o == "":
		default:
			flag, ok := mountFlags[o]
			if !ok {
				data = append(data, o)
			}
			flags |= flag
			if o == "rw" {
				flags &^= unix.MS_RDONLY
			}
		}
	}
	return flags, data, nil
}

// shorten rewrites the directories of an overlay to begin with a descriptor of the directory that
// holds them all: a container image may have more layers than mount(2) takes paths. The descriptor
// is needed until done is called, which is after the mount.
func shorten(options []string) (text string, done func(), err error) {
	var paths []string
	for _, o := range options {
		key, value, _ := strings.Cut(o, "=")
		switch key {
		case "lowerdir":
			if strings.Contains(value, "::") || strings.Contains(value, `\`) {
				return "", nil, errors.New("data-only and escaped layers cannot be shortened")
			}
			paths = append(paths, strings.Split(value, ":")...)
		case "upperdir", "workdir":
			paths = append(paths, value)
		}
	}
	common := commonDir(paths)
	if common == "" {
		return "", nil, errors.New("its layers have no absolute paths")
	}
	fd, err := unix.Open(common, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, &fs.PathError{Op: "open", Path: common, Err: err}
	}
	short := func(p string) string {
		rel, _ := filepath.Rel(common, p) // both are absolute
		return filepath.Join(fdPath(fd), rel)
	}
	out := make([]string, len(options))
	for i, o := range options {
		key, value, _ := strings.Cut(o, "=")
		switch key {
		case "lowerdir":
			layers := strings.Split(value, ":")
			for j, l := range layers {
				layers[j] = short(l)
			}
			o = key + "=" + strings.Join(layers, ":")
		case "upperdir", "workdir":
			o = key + "=" + short(value)
		}
		out[i] = o
	}
	return strings.Join(out, ","), func() { unix.Close(fd) }, nil
}

// commonDir is the deepest directory that holds all paths, or "" if one is not absolute.
func commonDir(paths []string) string {
	common := ""
	for i, p := range paths {
		if !filepath.IsAbs(p) {
			return ""
		}
		dir := filepath.Dir(filepath.Clean(p))
		if i == 0 {
			common = dir
			continue
		}
		for dir != common && !strings.HasPrefix(dir, strings.TrimSuffix(common, "/")+"/") {
			common = filepath.Dir(common)
		}
	}
	return common
}

func fdPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// tree is a copy of a mount tree that is not attached anywhere yet.
type tree struct {
	fd  int
	dir bool // else a regular file
}

// cloneTree copies the mounts at and below source, out of their peer groups: what is mounted in the
// copy does not show at source, nor the other way round. Closing fd drops a copy that was not
// attached.
func cloneTree(source string, readOnly bool) (tree, error) {
	if !filepath.IsAbs(source) {
		return tree{}, fmt.Errorf("%q is not an absolute path", source)
	}
	// Links in the path are the engine's business. From here on the descriptor is the source.
	src, err := unix.Open(source, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return tree{}, err
	}
	defer unix.Close(src)
	var st unix.Stat_t
	if err := unix.Fstat(src, &st); err != nil {
		return tree{}, err
	}
	t := tree{dir: st.Mode&unix.S_IFMT == unix.S_IFDIR}
	if !t.dir && st.Mode&unix.S_IFMT != unix.S_IFREG {
		return tree{}, fmt.Errorf("it is %s; only directories and regular files can be shared with a virtual machine", kindOf(st.Mode))
	}
	t.fd, err = unix.OpenTree(src, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH|unix.AT_RECURSIVE)
	if err != nil {
		return tree{}, fmt.Errorf("copying its mounts: %w", err)
	}
	attr := &unix.MountAttr{Attr_set: hostAttrs, Propagation: unix.MS_PRIVATE}
	if readOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(t.fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, attr); err != nil {
		unix.Close(t.fd)
		if errors.Is(err, unix.ENOSYS) {
			err = fmt.Errorf("%w: mount_setattr(2) needs Linux 5.12 or newer", err)
		}
		return tree{}, fmt.Errorf("restricting its mounts: %w", err)
	}
	return t, nil
}

// attach mounts the copy at the file or directory that the descriptor target names.
func (t tree) attach(target int) error {
	if err := unix.MoveMount(t.fd, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("attaching its mounts: %w", err)
	}
	return nil
}

func kindOf(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFSOCK:
		return "a socket"
	case unix.S_IFIFO:
		return "a FIFO"
	case unix.S_IFBLK:
		return "a block device"
	case unix.S_IFCHR:
		return "a character device"
	default:
		return "a special file"
	}
}
