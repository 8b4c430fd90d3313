// Package storage makes the files of a pod's containers reachable from its machine.
//
// A pod has one mount tree. <dir>/mounts is a mount with shared propagation of its own, writable
// for the host. Each container has a directory in it, with rootfs-<random>, where the engine's mounts
// for its root are made and nowhere else, and vol0-<random>, vol1-<random>, ... for its volumes.
// <dir>/shared is a read-only view of mounts that receives its mounts, and it is what the machine
// gets. So the guest writes
// within a container's rootfs and volumes only, never in the tree that holds them, and cannot plant
// a link where the host makes or removes something. The host does not rely on that: it resolves
// every name below mounts by descriptor, without following links or crossing mounts.
//
// The guest remembers for a second what a name stands for, so none stands for something else before
// that is over, also if a container is released and made again, by this daemon or by the next: names
// in a container's directory never come twice, and the directory itself stays for a while when it is
// empty. Pods of earlier daemons have rootfs, vol0, vol1, ... instead; whatever is in a container's
// directory goes with it, so any daemon releases what any other one made.
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
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
)

// ErrTampered is wrapped by errors about something in the share that neither this package nor the
// kernel made, such as a symbolic link where a mount point belongs. The pod should be stopped.
var ErrTampered = errors.New("the share was tampered with")

const (
	// maxVolumes bounds the volumes of one container.
	maxVolumes = 1024
	// forgotten is after how long the guest surely knows nothing of a name any more. virtiofs daemons
	// allow it one second.
	forgotten = 30 * time.Second
)

// rootName and volumeName begin the names in a container's directory.
const (
	rootName   = "rootfs"
	volumeName = "vol"
)

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
	c, err := s.container(id)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(c)
	names, err := survey(c)
	if err != nil {
		return fail(err)
	}
	if i := slices.IndexFunc(names, func(n string) bool { return isOf(n, rootName) }); i >= 0 {
		return fail(fmt.Errorf("it has one, %s: %w", names[i], unix.EEXIST))
	}
	name := fresh(rootName)
	if err := unix.Mkdirat(c, name, 0o755); err != nil {
		return fail(fmt.Errorf("making %s: %w", name, err))
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
	return guestPathOf(id, name), nil
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
	c, err := s.container(id)
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
	return guestPathOf(id, name), nil
}

func guestPathOf(id, name string) string {
	return protocol.SharePath + "/" + id + "/" + name
}

// fresh returns a name that never was there before.
func fresh(kind string) string { return fmt.Sprintf("%s-%016x", kind, rand.Uint64()) }

// isOf tells names of a kind, also those that earlier daemons gave.
func isOf(name, kind string) bool { return name == kind || strings.HasPrefix(name, kind+"-") }

// newVolume makes the mount point of the next volume.
func newVolume(c int, directory bool) (string, error) {
	names, err := survey(c)
	if err != nil {
		return "", err
	}
	n := 0
	for _, name := range names {
		if strings.HasPrefix(name, volumeName) {
			n++
		}
	}
	if n >= maxVolumes {
		return "", fmt.Errorf("it has %d volumes already", n)
	}
	name := fresh(fmt.Sprintf("%s%d", volumeName, n))
	if directory {
		err = unix.Mkdirat(c, name, 0o755)
	} else {
		var fd int
		fd, err = unix.Openat(c, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644)
		if err == nil {
			unix.Close(fd)
		}
	}
	if err != nil {
		return "", fmt.Errorf("making %s: %w", name, err)
	}
	return name, nil
}

// survey lists the names in a container's directory, and refuses what nobody here makes there. What is
// mounted on them is not looked at: it may be a file system that hangs.
func survey(c int) ([]string, error) {
	entries, err := entries(c)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if kind := e.Type(); kind != fs.ModeDir && kind != 0 {
			return nil, fmt.Errorf("refused %s: %w: a file of mode %s is in its place", e.Name(), ErrTampered, kind)
		}
		names = append(names, e.Name())
	}
	return names, nil
}

// container opens the directory of a container in the tree, making it if need be.
func (s *Share) container(id string) (int, error) {
	if !containerID.MatchString(id) {
		return -1, fmt.Errorf("%q is no container id", id)
	}
	root, err := s.root()
	if err != nil {
		return -1, err
	}
	defer unix.Close(root)
	tidy(root, id)
	if err := unix.Mkdirat(root, id, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return -1, fmt.Errorf("making its directory in %s: %w", s.mounts(), err)
	}
	return below(root, id, false)
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

// tidy removes the containers' directories that are empty for long enough, but for the one of id.
func tidy(root int, id string) {
	names, err := list(root)
	if err != nil {
		slog.Debug("cannot look for empty directories in a share", "error", err)
		return
	}
	for _, name := range names {
		var st unix.Stat_t
		err := unix.Fstatat(root, name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if name == id || err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
			continue
		}
		// It changes last when what was in it is removed.
		if time.Since(time.Unix(st.Mtim.Unix())) > forgotten {
			unix.Unlinkat(root, name, unix.AT_REMOVEDIR) // which fails, as it should, for those in use
		}
	}
}

// Release unmounts and removes everything of a container; only its directory stays, for a while, and
// goes with a later call for whatever container. It is idempotent and does not need the guest's
// cooperation; what the guest still uses stays alive until the machine lets go of it, but is not
// reachable any more.
func (s *Share) Release(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.release(id, true); err != nil {
		return fmt.Errorf("cannot release the storage of container %s: %w", id, err)
	}
	return nil
}

// release takes everything of a container away, also its directory unless it is to linger.
func (s *Share) release(id string, linger bool) error {
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
	if linger {
		tidy(root, id)
	}
	c, err := below(root, id, false)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if errors.Is(err, ErrTampered) {
		return clear(root, id) // removes the thing itself, whatever it points to
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
	if linger {
		return nil
	}
	if err := unix.Unlinkat(root, id, unix.AT_REMOVEDIR); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("removing its directory in %s: %w", s.mounts(), err)
	}
	return nil
}

// entries returns what is in a directory.
func entries(dirfd int) ([]fs.DirEntry, error) {
	fd, err := unix.Openat(dirfd, ".", unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	// By this name files are found whose type the file system does not tell.
	f := os.NewFile(uintptr(fd), fmt.Sprintf("/proc/self/fd/%d", fd))
	defer f.Close()
	return f.ReadDir(-1)
}

// list returns the names in a directory.
func list(dirfd int) ([]string, error) {
	entries, err := entries(dirfd)
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
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
	names, err := list(root)
	unix.Close(root)
	errs := []error{err}
	for _, name := range names {
		errs = append(errs, s.release(name, false))
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
