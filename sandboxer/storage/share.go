// Package storage makes the files of a pod's containers reachable from its machine.
//
// A pod has one mount tree. <dir>/mounts is a mount with shared propagation of its own, writable
// for the host. Each container has a directory in it, <id>.<random>: rootfs, where the engine's mounts for its
// root are made and nowhere else, and vol0, vol1, ... for its volumes. <dir>/shared is a read-only
// view of mounts that receives its mounts, and it is what the machine gets. So the guest writes
// within a container's rootfs and volumes only, never in the tree that holds them, and cannot plant
// a link where the host makes or removes something. The host does not rely on that: it resolves
// every name below mounts by descriptor, without following links or crossing mounts.
//
// The guest remembers for a second what a name stood for. So a container that is released and made
// again, by this daemon or by the next, gets a directory of another name. Pods of earlier daemons have
// <id>, which is used and released as well.
//
// Nothing here is removed recursively. Directories are removed only when they are empty, so a mount
// that could not be taken away never costs somebody's data.
package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
)

// ErrTampered is wrapped by errors about something in the share that neither this package nor the
// kernel made, such as a symbolic link where a mount point belongs. The pod should be stopped.
var ErrTampered = errors.New("the share was tampered with")

// maxVolumes bounds the volumes of one container.
const maxVolumes = 1024

// randomPart is what follows an id and a dot in the name of a container's directory.
var randomPart = regexp.MustCompile(`^[0-9a-f]{16}$`)

var containerID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// Share is the mount tree of one pod. Its methods may be called from several goroutines.
type Share struct {
	dir string // the pod's state directory, without symbolic links
	mu  sync.Mutex
}

// NewShare makes the tree in a pod's state directory, which exists and belongs to the caller alone.
// On failure nothing is left in it. The caller ends it with Close.
func NewShare(dir string) (*Share, error) {
	s, err := locate(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot make the share of %s: %w", dir, err)
	}
	if err := s.make(); err != nil {
		return nil, fmt.Errorf("cannot make the share of %s: %w", dir, err)
	}
	return s, nil
}

// OpenShare takes over the tree that another daemon made. It fails if the tree is not whole; what
// there is of it then goes with RemoveShare.
func OpenShare(dir string) (*Share, error) {
	s, err := locate(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot open the share of %s: %w", dir, err)
	}
	for _, p := range []string{s.mounts(), s.Exported()} {
		mounted, err := mountinfo.Mounted(p)
		if err != nil {
			return nil, fmt.Errorf("cannot open the share of %s: %w", dir, err)
		}
		if !mounted {
			return nil, fmt.Errorf("cannot open the share of %s: %s is not mounted", dir, p)
		}
	}
	return s, nil
}

// RemoveShare does what Close does, whatever state the tree in dir is in.
func RemoveShare(dir string) error {
	s, err := locate(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot remove the share of %s: %w", dir, err)
	}
	return s.Close()
}

// locate resolves dir: mountinfo knows paths without symbolic links only (/var/run is one).
func locate(dir string) (*Share, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if abs, err = filepath.EvalSymlinks(abs); err != nil {
		return nil, err
	}
	return &Share{dir: abs}, nil
}

func (s *Share) mounts() string { return filepath.Join(s.dir, "mounts") }

// Exported is the directory to hand to the machine or to its virtiofs daemon.
func (s *Share) Exported() string { return filepath.Join(s.dir, "shared") }

func (s *Share) make() (err error) {
	// What exists already is another share's, and not undone.
	if err := os.Mkdir(s.mounts(), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(s.Exported(), 0o755); err != nil {
		return errors.Join(err, os.Remove(s.mounts()))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	step := func(what, source, target string, flags uintptr) {
		if err != nil {
			return
		}
		if e := unix.Mount(source, target, "", flags, ""); e != nil {
			err = fmt.Errorf("%s %s: %w", what, target, e)
		}
	}
	step("binding", s.mounts(), s.mounts(), unix.MS_BIND)
	// Out of the peer group of the mount below, if that is shared, and into one of its own.
	step("unsharing", "", s.mounts(), unix.MS_PRIVATE)
	step("sharing", "", s.mounts(), unix.MS_SHARED)
	// A private mount under the view: with the mount of the state directory as its parent, the view
	// would show up, with all containers' mounts, wherever that is shared with.
	step("binding", s.Exported(), s.Exported(), unix.MS_BIND)
	step("unsharing", "", s.Exported(), unix.MS_PRIVATE)
	step("binding", s.mounts(), s.Exported(), unix.MS_BIND)
	step("enslaving", "", s.Exported(), unix.MS_SLAVE)
	step("making read-only", "", s.Exported(), unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV)
	return err
}

// Rootfs makes the engine's mounts, one over the other, the root of a container and returns its
// path in the guest.
func (s *Share) Rootfs(ctx context.Context, id string, mounts []Mount) (guestPath string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fail := func(err error) (string, error) {
		return "", fmt.Errorf("cannot mount the root of container %s: %w", id, err)
	}
	if len(mounts) == 0 {
		return fail(errors.New("the engine gave no mounts for it"))
	}
	c, dir, err := s.container(id)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(c)
	const name = "rootfs"
	if err := unix.Mkdirat(c, name, 0o755); err != nil {
		return fail(existing(c, name, err))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, clear(c, name))
		}
	}()
	for i, m := range mounts {
		if err := ctx.Err(); err != nil {
			return fail(err)
		}
		// Each mount covers the one before, so the target is opened anew, across mounts.
		target, err := below(c, name, i > 0)
		if err != nil {
			return fail(err)
		}
		err = m.on(target)
		unix.Close(target)
		if err != nil {
			return fail(err)
		}
	}
	return guestPathOf(dir, name), nil
}

// Volume makes a directory or regular file of the host, with everything mounted below it, the next
// volume of a container, and returns its path in the guest. Mounts made below source later are not
// seen. A read-only volume is read-only with everything below it.
func (s *Share) Volume(ctx context.Context, id, source string, readOnly bool) (guestPath string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fail := func(err error) (string, error) {
		return "", fmt.Errorf("cannot share %s with container %s: %w", source, id, err)
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	tree, err := cloneTree(source, readOnly)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(tree.fd)
	c, dir, err := s.container(id)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(c)
	name, err := newVolume(c, tree.dir)
	if err != nil {
		return fail(err)
	}
	target, err := below(c, name, false)
	if err == nil {
		err = tree.attach(target)
		unix.Close(target)
	}
	if err != nil {
		return fail(errors.Join(err, clear(c, name)))
	}
	return guestPathOf(dir, name), nil
}

func guestPathOf(dir, name string) string {
	return protocol.SharePath + "/" + dir + "/" + name
}

// newVolume makes the first free vol<N>.
func newVolume(c int, directory bool) (string, error) {
	for n := range maxVolumes {
		name := fmt.Sprintf("vol%d", n)
		var err error
		if directory {
			err = unix.Mkdirat(c, name, 0o755)
		} else {
			var fd int
			fd, err = unix.Openat(c, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644)
			if err == nil {
				unix.Close(fd)
			}
		}
		switch {
		case err == nil:
			return name, nil
		case !errors.Is(err, unix.EEXIST):
			return "", fmt.Errorf("making %s: %w", name, err)
		}
		if err := existing(c, name, err); errors.Is(err, ErrTampered) {
			return "", err
		}
	}
	return "", fmt.Errorf("it has %d volumes already", maxVolumes)
}

// existing explains why name could not be made: something of ours is there, or of the guest.
func existing(c int, name string, err error) error {
	if !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("making %s: %w", name, err)
	}
	var st unix.Stat_t
	if err := unix.Fstatat(c, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("making %s: %w", name, err)
	}
	if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFDIR && kind != unix.S_IFREG {
		return fmt.Errorf("refused %s: %w: a file of mode %o is in its place", name, ErrTampered, st.Mode)
	}
	return fmt.Errorf("making %s: %w", name, err)
}

// container opens the directory of a container in the tree, making it if need be.
func (s *Share) container(id string) (fd int, dir string, err error) {
	if !containerID.MatchString(id) {
		return -1, "", fmt.Errorf("%q is no container id", id)
	}
	root, err := s.root()
	if err != nil {
		return -1, "", err
	}
	defer unix.Close(root)
	dirs, err := directories(root, id)
	if err != nil {
		return -1, "", err
	}
	if len(dirs) > 0 {
		dir = dirs[0]
	} else {
		dir = fmt.Sprintf("%s.%016x", id, rand.Uint64())
		if err := unix.Mkdirat(root, dir, 0o755); err != nil {
			return -1, "", fmt.Errorf("making its directory in %s: %w", s.mounts(), err)
		}
	}
	fd, err = below(root, dir, false)
	return fd, dir, err
}

// directories are the names of a container's directories; it has one, or none, unless something failed.
func directories(root int, id string) ([]string, error) {
	names, err := list(root)
	return slices.DeleteFunc(names, func(name string) bool {
		random, ok := strings.CutPrefix(name, id+".")
		return name != id && (!ok || !randomPart.MatchString(random))
	}), err
}

// root opens the top of the tree.
func (s *Share) root() (int, error) {
	fd, err := unix.Open(s.mounts(), unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &fs.PathError{Op: "open", Path: s.mounts(), Err: err}
	}
	return fd, nil
}

// below opens name beneath a directory, without following links and, unless it is told to, without
// crossing mounts.
func below(dirfd int, name string, crossing bool) (int, error) {
	how := &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC | unix.O_NOFOLLOW,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	if !crossing {
		how.Resolve |= unix.RESOLVE_NO_XDEV
	}
	fd, err := unix.Openat2(dirfd, name, how)
	if errors.Is(err, unix.ELOOP) {
		return -1, fmt.Errorf("refused %s: %w: a symbolic link is in its place", name, ErrTampered)
	}
	if err != nil {
		return -1, fmt.Errorf("opening %s: %w", name, err)
	}
	// O_PATH with O_NOFOLLOW opens a link itself where only that flag and not the kernel's
	// resolution forbids it.
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("opening %s: %w", name, err)
	}
	if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFDIR && kind != unix.S_IFREG {
		unix.Close(fd)
		return -1, fmt.Errorf("refused %s: %w: a file of mode %o is in its place", name, ErrTampered, st.Mode)
	}
	return fd, nil
}

// Release unmounts and removes everything of a container. It is idempotent and does not need the
// guest's cooperation; what the guest still uses stays alive until the machine lets go of it, but
// is not reachable any more.
func (s *Share) Release(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.release(id); err != nil {
		return fmt.Errorf("cannot release the storage of container %s: %w", id, err)
	}
	return nil
}

func (s *Share) release(id string) error {
	if !containerID.MatchString(id) {
		return fmt.Errorf("%q is no container id", id)
	}
	root, err := s.root()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(root)
	dirs, err := directories(root, id)
	errs := []error{err}
	for _, dir := range dirs {
		errs = append(errs, s.releaseDirectory(root, dir))
	}
	return errors.Join(errs...)
}

// releaseDirectory takes a container's directory away with everything in it.
func (s *Share) releaseDirectory(root int, dir string) error {
	c, err := below(root, dir, false)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if errors.Is(err, ErrTampered) {
		return clear(root, dir) // removes the thing itself, whatever it points to
	}
	if err != nil {
		return err
	}
	defer unix.Close(c)
	names, err := list(c)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		errs = append(errs, clear(c, name))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := unix.Unlinkat(root, dir, unix.AT_REMOVEDIR); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("removing its directory in %s: %w", s.mounts(), err)
	}
	return nil
}

// list returns the names in a directory.
func list(dirfd int) ([]string, error) {
	fd, err := unix.Openat(dirfd, ".", unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "directory")
	defer f.Close()
	return f.Readdirnames(-1)
}

// clear unmounts what is mounted at name and removes name, which is an empty directory or file.
func clear(dirfd int, name string) error {
	if err := unmount(fmt.Sprintf("/proc/self/fd/%d/%s", dirfd, name), name); err != nil {
		return err
	}
	err := unix.Unlinkat(dirfd, name, 0)
	if errors.Is(err, unix.EISDIR) {
		err = unix.Unlinkat(dirfd, name, unix.AT_REMOVEDIR)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("removing %s: %w", name, err)
	}
	return nil
}

// unmount takes away all mounts that are stacked at path. A mount that is in use, by the guest or
// by mounts below it, is detached with all that is below it: paths below it go through directories
// that the guest can rename, and must not be walked.
func unmount(path, name string) error {
	for {
		err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			slog.Debug("detaching a mount that is in use", "mount", name)
			err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		switch {
		case err == nil:
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			return nil // not or no longer a mount point
		default:
			return fmt.Errorf("unmounting %s: %w", name, err)
		}
	}
}

// Close releases everything, also what an earlier daemon left in the tree, and removes the tree. It
// is idempotent.
func (s *Share) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.close(); err != nil {
		return fmt.Errorf("cannot remove the share of %s: %w", s.dir, err)
	}
	return nil
}

func (s *Share) close() error {
	err := s.releaseAll()
	if err != nil {
		// Something is mounted where this package mounts nothing. The machine has ended, nobody
		// renames anything any more, so the kernel's list can be followed.
		if err = s.sweep(); err == nil {
			err = s.releaseAll()
		}
	}
	if err != nil {
		return err
	}
	if err := errors.Join(unmount(s.Exported(), s.Exported()), unmount(s.mounts(), s.mounts()), s.sweep()); err != nil {
		return err
	}
	for _, p := range []string{s.Exported(), s.mounts()} {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// releaseAll releases every container that is in the tree.
func (s *Share) releaseAll() error {
	root, err := s.root()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(root)
	names, err := list(root)
	errs := []error{err}
	for _, name := range names {
		errs = append(errs, s.releaseDirectory(root, name))
	}
	return errors.Join(errs...)
}

// sweep detaches what the kernel still lists below the tree, the deepest first.
func (s *Share) sweep() error {
	inTree := func(p string) bool {
		for _, top := range []string{s.mounts(), s.Exported()} {
			if p == top || strings.HasPrefix(p, top+"/") {
				return true
			}
		}
		return false
	}
	left, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return !inTree(m.Mountpoint), false })
	if err != nil {
		return err
	}
	var errs []error
	slices.SortStableFunc(left, func(a, b *mountinfo.Info) int { return len(b.Mountpoint) - len(a.Mountpoint) })
	for _, m := range left {
		slog.Warn("detaching a mount that was left over", "mount", m.Mountpoint)
		if err := unix.Unmount(m.Mountpoint, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmounting %s: %w", m.Mountpoint, err))
		}
	}
	return errors.Join(errs...)
}
