package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ownerMark is the extended attribute of a leaf that says whose it is. Without it a leaf is only a
// name, and another daemon of the node, or anybody, may use the same.
const ownerMark = "trusted.kuasar.owner"

// maxOwner bounds the attribute, in bytes; it is a path.
const maxOwner = 4096

// Mark says that the leaf belongs to owner, such as the directory in which a daemon keeps its state.
// It is in order where the kernel keeps no such attributes, or not for this process; Owned then
// finds nothing.
func (g *Group) Mark(owner string) error {
	for _, root := range g.host.roots() {
		err := unix.Setxattr(g.dir(root), ownerMark, []byte(owner), 0)
		if err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("cannot mark the cgroup %s: %w", g.path, err)
		}
	}
	return nil
}

// Name is the leaf's own name.
func (g *Group) Name() string { return path.Base(g.path) }

// Owned lists the leaves that belong to owner, wherever they are.
func Owned(owner string) ([]*Group, error) {
	h, err := detected()
	if err != nil {
		return nil, err
	}
	return h.owned(owner), nil
}

func (h *host) owned(owner string) []*Group {
	var groups []*Group
	seen := map[string]bool{}
	// A leaf that was made or removed in part is in some hierarchies only.
	for _, root := range h.roots() {
		_ = filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
			if err != nil {
				return fs.SkipDir // a cgroup that went away meanwhile
			}
			if !d.IsDir() || p == root || markOf(p) != owner {
				return nil
			}
			rel, err := filepath.Rel(root, p)
			if err == nil && !seen[rel] && leafName.MatchString(d.Name()) {
				seen[rel] = true
				groups = append(groups, &Group{host: h, path: rel})
			}
			return fs.SkipDir
		})
	}
	return groups
}

// markOf is the mark of a leaf's directory, or empty.
func markOf(dir string) string {
	b := make([]byte, maxOwner)
	n, err := unix.Getxattr(dir, ownerMark, b)
	if err != nil || n > len(b) {
		return ""
	}
	return string(b[:n])
}

// marks says whether this process can mark dir. It changes nothing: there is no attribute of that
// name to be replaced.
func marks(dir string) bool {
	err := unix.Setxattr(dir, "trusted.kuasar.none", nil, unix.XATTR_REPLACE)
	return errors.Is(err, unix.ENODATA)
}

// FindOwned is Find for a leaf that belongs to owner. Where nothing can be marked it is Find.
func FindOwned(name, owner string) (*Group, error) {
	h, err := detected()
	if err != nil {
		return nil, err
	}
	for _, g := range h.owned(owner) {
		if g.Name() == name {
			return g, nil
		}
	}
	g, err := h.find(name)
	if err != nil {
		return nil, err
	}
	for _, root := range h.roots() {
		if marks(g.dir(root)) {
			return nil, fmt.Errorf("the cgroup %s is not of %s: %w", g.Path(), owner, fs.ErrNotExist)
		}
	}
	return g, nil
}
