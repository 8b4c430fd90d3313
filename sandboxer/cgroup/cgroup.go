// Package cgroup keeps a pod's processes, the hypervisor and the virtiofs daemon, in a leaf of
// their own: to count what they use, and to find every one of them when the pod ends.
//
// A host has cgroup v2, or v1 with a hierarchy for each controller; a v2 hierarchy without the
// memory controller beside v1 ("hybrid") is left alone. The leaf is made in the v2 hierarchy, or in
// each v1 hierarchy that counts something.
//
// The directories are read here rather than with containerd/cgroups, whose statistics messages are
// used: that library brings an eBPF loader and a D-Bus client, 1.5 MB of the daemon's memory.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// DefaultParent holds the pods for which the engine names no parent.
const DefaultParent = "/kuasar-vmm"

// controllers are those of v1 that count something; v2 must have the first.
var controllers = []string{"memory", "cpu", "cpuacct", "pids", "blkio"}

// v2Controllers are enabled for the leaf where the host allows it.
var v2Controllers = []string{"memory", "cpu", "pids", "io"}

// madeMark is the extended attribute of directories above a leaf that this package made, so that
// another daemon can tell which of them to remove.
const madeMark = "trusted.kuasar.made"

var leafName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// host is where the hierarchies are mounted.
type host struct {
	v2 string            // the unified hierarchy, or empty
	v1 map[string]string // mount point by controller, if v2 is empty
}

var detected = sync.OnceValues(func() (*host, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("cannot find the cgroup hierarchies: %w", err)
	}
	return detect(mounts, os.ReadFile)
})

func detect(mounts []*mountinfo.Info, readFile func(string) ([]byte, error)) (*host, error) {
	h := &host{v1: map[string]string{}}
	for _, m := range mounts {
		if m.FSType == "cgroup2" {
			has, err := readFile(filepath.Join(m.Mountpoint, "cgroup.controllers"))
			if err == nil && slices.Contains(strings.Fields(string(has)), controllers[0]) {
				return &host{v2: m.Mountpoint}, nil
			}
			continue
		}
		for o := range strings.SplitSeq(m.VFSOptions, ",") {
			if slices.Contains(controllers, o) && h.v1[o] == "" {
				h.v1[o] = m.Mountpoint
			}
		}
	}
	if h.v1[controllers[0]] == "" {
		return nil, errors.New("cannot find the cgroup hierarchies: none with the memory controller is mounted; mount cgroup2 at /sys/fs/cgroup, as systemd does")
	}
	return h, nil
}

// roots lists the distinct mount points, that of the memory controller first.
func (h *host) roots() []string {
	if h.v2 != "" {
		return []string{h.v2}
	}
	var roots []string
	for _, c := range controllers {
		// Controllers such as cpu and cpuacct may be mounted together.
		if r := h.v1[c]; r != "" && !slices.Contains(roots, r) {
			roots = append(roots, r)
		}
	}
	return roots
}

// Group is the leaf of one pod. Its methods may be called from several goroutines.
type Group struct {
	host *host
	path string // from the root of each hierarchy, without a leading slash
}

// New makes the leaf name below parent. An empty parent means DefaultParent; a systemd slice such
// as kubepods-burstable.slice means that slice's place. On failure nothing is left. A leaf that
// exists is used if it has no processes.
func New(parent, name string) (*Group, error) {
	h, err := detected()
	if err != nil {
		return nil, err
	}
	return h.create(parent, name)
}

// Load finds the leaf that an earlier daemon made, even if only some hierarchies have it. Its error
// wraps fs.ErrNotExist if there is none.
func Load(parent, name string) (*Group, error) {
	h, err := detected()
	if err != nil {
		return nil, err
	}
	g, err := h.group(parent, name)
	if err != nil {
		return nil, err
	}
	for _, root := range h.roots() {
		if _, err = os.Stat(g.dir(root)); err == nil {
			return g, nil
		}
	}
	return nil, fmt.Errorf("cannot find the cgroup of %s: %w", name, err)
}

// Find looks for a leaf of that name anywhere in the hierarchies, for the day when nobody knows its
// parent any more. Its error wraps fs.ErrNotExist if there is none.
func Find(name string) (*Group, error) {
	h, err := detected()
	if err != nil {
		return nil, err
	}
	return h.find(name)
}

func (h *host) find(name string) (*Group, error) {
	var found *Group
	for _, root := range h.roots() {
		err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return fs.SkipDir // a cgroup that went away meanwhile
			case !d.IsDir() || d.Name() != name || p == root:
				return nil
			}
			parent, err := filepath.Rel(root, filepath.Dir(p))
			if err != nil {
				return err
			}
			if found, err = h.group("/"+parent, name); err != nil {
				return err
			}
			return fs.SkipAll
		})
		if err != nil || found != nil {
			return found, err
		}
	}
	return nil, fmt.Errorf("cannot find the cgroup of %s: %w", name, fs.ErrNotExist)
}

func (h *host) group(parent, name string) (*Group, error) {
	if !leafName.MatchString(name) {
		return nil, fmt.Errorf("cannot make a cgroup: %q is no name for one", name)
	}
	p, err := expand(parent)
	if err != nil {
		return nil, fmt.Errorf("cannot make the cgroup of %s: %w", name, err)
	}
	return &Group{host: h, path: path.Join(p, name)}, nil
}

// expand is parent as a path from the root of a hierarchy.
func expand(parent string) (string, error) {
	if parent == "" {
		parent = DefaultParent
	}
	for part := range strings.SplitSeq(parent, "/") {
		if part == ".." || len(part) > 255 || strings.ContainsAny(part, "\x00\n") {
			return "", fmt.Errorf("%q is no path of a cgroup", parent)
		}
	}
	if p := strings.Trim(parent, "/"); strings.HasSuffix(p, ".slice") && !strings.Contains(p, "/") {
		return expandSlice(p)
	}
	return strings.TrimPrefix(path.Clean("/"+parent), "/"), nil
}

// expandSlice is where systemd keeps a slice: a-b.slice is in a.slice.
func expandSlice(slice string) (string, error) {
	name := strings.TrimSuffix(slice, ".slice")
	if name == "-" {
		return "", nil // systemd's name of the root
	}
	full, prefix := "", ""
	for part := range strings.SplitSeq(name, "-") {
		if part == "" {
			return "", fmt.Errorf("%q is no systemd slice", slice)
		}
		prefix += part
		full = path.Join(full, prefix+".slice")
		prefix += "-"
	}
	return full, nil
}

func (h *host) create(parent, name string) (*Group, error) {
	g, err := h.group(parent, name)
	if err != nil {
		return nil, err
	}
	for _, root := range h.roots() {
		if err := makeLeaf(root, g.path, h.v2 != ""); err != nil {
			return nil, errors.Join(fmt.Errorf("cannot make the cgroup %s in %s: %w", g.path, root, err), g.remove())
		}
	}
	pids, err := g.PIDs()
	if err == nil && len(pids) > 0 {
		// Not removed: it belongs to somebody.
		return nil, fmt.Errorf("cannot make the cgroup %s: %w, with the processes %v", g.path, fs.ErrExist, pids)
	}
	return g, nil
}

// makeLeaf makes leaf and what is missing above it, and enables the controllers on the way in v2.
func makeLeaf(root, leaf string, v2 bool) error {
	// Another pod's Delete may take an empty directory above away in between.
	for try := 0; ; try++ {
		err := makePath(root, leaf, v2)
		if !errors.Is(err, fs.ErrNotExist) || try == 8 {
			return err
		}
	}
}

func makePath(root, leaf string, v2 bool) error {
	if _, err := os.Stat(root); err != nil {
		return fmt.Errorf("the hierarchy is not mounted: %s", root)
	}
	dir := root
	for part := range strings.SplitSeq(leaf, "/") {
		if v2 {
			enable(dir)
		}
		dir = filepath.Join(dir, part)
		err := os.Mkdir(dir, 0o755)
		switch {
		case err == nil:
			if dir != filepath.Join(root, leaf) {
				// Where the kernel has no such attributes, the directory stays when it is empty.
				unix.Setxattr(dir, madeMark, []byte{'1'}, 0)
			}
		case !errors.Is(err, fs.ErrExist):
			return err
		}
	}
	return nil
}

// enable turns the controllers on for the children of dir. One at a time, for one that the host
// does not have spoils the rest; without it the pod only is not counted there.
func enable(dir string) {
	for _, c := range v2Controllers {
		os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0)
	}
}

func (g *Group) dir(root string) string { return filepath.Join(root, g.path) }

// Path is the leaf's path from the root of each hierarchy, with a leading slash.
func (g *Group) Path() string { return "/" + g.path }

// Procs lists the files that a process id is written to, one per hierarchy, to move the process
// into the leaf.
func (g *Group) Procs() []string {
	var files []string
	for _, root := range g.host.roots() {
		files = append(files, filepath.Join(g.dir(root), "cgroup.procs"))
	}
	return files
}

// PIDs lists the processes that are in the leaf, or below it, in any hierarchy. This process is not
// among them: a thread of it that Start put there is about to end.
func (g *Group) PIDs() ([]int, error) {
	seen := map[int]bool{}
	for _, root := range g.host.roots() {
		err := filepath.WalkDir(g.dir(root), func(p string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil || !d.IsDir() {
				return err
			}
			text, err := os.ReadFile(filepath.Join(p, "cgroup.procs"))
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
				return nil
			}
			for f := range strings.FieldsSeq(string(text)) {
				if pid, err := strconv.Atoi(f); err == nil && pid > 0 && pid != os.Getpid() {
					seen[pid] = true
				}
			}
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("cannot list the processes of the cgroup %s: %w", g.path, err)
		}
	}
	pids := make([]int, 0, len(seen))
	for pid := range seen {
		pids = append(pids, pid)
	}
	slices.Sort(pids)
	return pids, nil
}

// Delete kills what is left in the leaf and removes it, and the directories above it that New made,
// when they are empty. It tries until ctx ends, or for 5 s: a killed process leaves its cgroup only
// when it has been torn down. It is idempotent.
func (g *Group) Delete(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := errors.Join(g.kill(), g.remove())
		if err == nil {
			g.removeParents()
			return nil
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			pids, _ := g.PIDs()
			return fmt.Errorf("cannot remove the cgroup %s, which holds the processes %v: %w", g.path, pids, err)
		}
	}
}

// kill sends SIGKILL to everything in the leaf.
func (g *Group) kill() error {
	if g.host.v2 != "" {
		// Atomic, with what is forked meanwhile; since Linux 5.14.
		f, err := os.OpenFile(filepath.Join(g.dir(g.host.v2), "cgroup.kill"), os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteString("1")
			f.Close()
			if err == nil {
				return nil
			}
		}
	}
	pids, err := g.PIDs()
	if err != nil || len(pids) == 0 {
		return err
	}
	// Descriptors first, then a second look: what is in the leaf then is what they name.
	fds := map[int]int{}
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	for _, pid := range pids {
		if pid == os.Getpid() {
			return errors.New("this process itself is in it")
		}
		if fd, err := unix.PidfdOpen(pid, 0); err == nil {
			fds[pid] = fd
		}
	}
	if pids, err = g.PIDs(); err != nil {
		return err
	}
	for _, pid := range pids {
		if fd, ok := fds[pid]; ok {
			unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		}
	}
	return nil
}

// remove removes the leaf and what was made below it, the deepest first.
func (g *Group) remove() error {
	var errs []error
	for _, root := range g.host.roots() {
		var dirs []string
		filepath.WalkDir(g.dir(root), func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		for _, d := range slices.Backward(dirs) {
			if err := unix.Rmdir(d); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, &fs.PathError{Op: "rmdir", Path: d, Err: err})
				break
			}
		}
	}
	return errors.Join(errs...)
}

// removeParents removes the directories above the leaf that New made, as far as they are empty.
func (g *Group) removeParents() {
	for _, root := range g.host.roots() {
		for p := path.Dir(g.path); p != "."; p = path.Dir(p) {
			dir := filepath.Join(root, p)
			if n, err := unix.Getxattr(dir, madeMark, make([]byte, 8)); err != nil || n == 0 {
				break
			}
			if unix.Rmdir(dir) != nil {
				break // another pod's is in it
			}
		}
	}
}
