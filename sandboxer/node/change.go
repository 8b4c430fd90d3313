package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Conflict is a value of a configuration that means something else than what is to be set up.
type Conflict struct {
	File, Key   string
	Found, Want string
}

func (c *Conflict) Error() string {
	return fmt.Sprintf("%s has %s = %s already, and %s is wanted; nothing was changed: change it by hand, or choose another handler (--handler)",
		c.File, c.Key, c.Found, c.Want)
}

// Change is what is to become of one file.
type Change struct {
	// Path is the file that is replaced, with symbolic links resolved.
	Path string
	// Old is empty and Exists false for a file that is to be made.
	Old, New string
	Exists   bool
	// Backup is where Apply has put the old file, empty if there was none.
	Backup string
}

// Diff is the change as diff -u prints it, empty if there is nothing to change.
func (c *Change) Diff() string {
	name := c.Path
	if !c.Exists {
		name = ""
	}
	return unified(name, c.Path, c.Old, c.New)
}

// Changed says whether anything is to be done.
func (c *Change) Changed() bool { return c.Old != c.New || !c.Exists }

// readChange begins a change with what is there.
func readChange(path string) (*Change, error) {
	c := &Change{Path: path}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		c.Path = real
	}
	content, err := os.ReadFile(c.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the configuration: %w", err)
	}
	c.Old, c.New, c.Exists = string(content), string(content), true
	return c, nil
}

// Apply replaces the file at once or not at all, and keeps the old one beside it under a name with
// the given time. Mode, owner and security label stay as they are. A file that was changed since it
// was read is left alone.
func (c *Change) Apply(now time.Time) (err error) {
	if !c.Changed() {
		return nil
	}
	fail := func(err error) error { return fmt.Errorf("cannot change %s: %w", c.Path, err) }
	dir := filepath.Dir(c.Path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fail(err)
	}
	mode := fs.FileMode(0o644)
	var st unix.Stat_t
	if c.Exists {
		if err := unix.Stat(c.Path, &st); err != nil {
			return fail(err)
		}
		mode = fs.FileMode(st.Mode & 0o777)
		backup := c.Path + ".bak-" + now.UTC().Format("20060102T150405Z")
		c.Backup = backup
		for n := 2; ; n++ {
			err := writeNew(c.Backup, c.Old, mode, &st, c.Path)
			if err == nil {
				break
			}
			if !errors.Is(err, fs.ErrExist) || n > 100 {
				c.Backup = ""
				return fail(fmt.Errorf("cannot keep the old one: %w", err))
			}
			c.Backup = fmt.Sprintf("%s-%d", backup, n) // several changes within a second
		}
	}
	temp := filepath.Join(dir, fmt.Sprintf(".%s.%d", filepath.Base(c.Path), os.Getpid()))
	defer func() {
		if err != nil {
			_ = os.Remove(temp)
			if c.Backup != "" {
				_ = os.Remove(c.Backup)
				c.Backup = ""
			}
		}
	}()
	owner := &st
	if !c.Exists {
		owner = nil
	}
	if err := writeNew(temp, c.New, mode, owner, c.Path); err != nil {
		return fail(err)
	}
	now0, err := os.ReadFile(c.Path)
	switch {
	case c.Exists && err != nil:
		return fail(err)
	case c.Exists && string(now0) != c.Old, !c.Exists && err == nil:
		return fail(errors.New("somebody changed it meanwhile; try again"))
	}
	if err := os.Rename(temp, c.Path); err != nil {
		return fail(err)
	}
	// So that the new name lasts, too.
	if d, err := os.Open(dir); err == nil {
		_ = d.Sync()
		d.Close()
	}
	return nil
}

// revert puts the old file back, after Apply.
func (c *Change) revert() error {
	if !c.Changed() {
		return nil
	}
	var err error
	switch {
	case !c.Exists:
		err = os.Remove(c.Path)
	case c.Backup != "":
		err = os.Rename(c.Backup, c.Path)
		c.Backup = ""
	}
	if err != nil {
		return fmt.Errorf("cannot take the change of %s back: %w", c.Path, err)
	}
	return nil
}

// writeNew makes a file that lasts, with the mode, and with the owner and the security label of the
// file that it goes with.
func writeNew(path, content string, mode fs.FileMode, owner *unix.Stat_t, like string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(content)
	if err == nil && owner != nil && (int(owner.Uid) != os.Geteuid() || int(owner.Gid) != os.Getegid()) {
		err = f.Chown(int(owner.Uid), int(owner.Gid))
	}
	if err == nil {
		err = f.Chmod(mode) // whatever the umask is
	}
	const label = "security.selinux"
	buf := make([]byte, 1024)
	if n, xerr := unix.Getxattr(like, label, buf); xerr == nil && err == nil {
		err = unix.Fsetxattr(int(f.Fd()), label, buf[:n], 0)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(path)
	}
	return err
}
