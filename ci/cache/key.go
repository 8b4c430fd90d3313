package cache

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// A Key collects what a build depends on. Order matters; names keep values apart.
type Key struct {
	hash hash.Hash
	err  error
}

// NewKey begins a key. format is raised by the builder whenever it does something else with the
// same inputs.
func NewKey(format int) *Key {
	k := &Key{hash: sha256.New()}
	return k.Add("format", fmt.Sprint(format))
}

// Add adds a value.
func (k *Key) Add(name, value string) *Key {
	fmt.Fprintf(k.hash, "%d:%s=%d:%s\n", len(name), name, len(value), value)
	return k
}

// AddFile adds the content of a file, and not its path.
func (k *Key) AddFile(name, path string) *Key {
	if k.err != nil {
		return k
	}
	sum, err := fileSum(path)
	if err != nil {
		k.err = err
		return k
	}
	return k.Add(name, sum)
}

// AddTree adds name, size and modification time of every regular file and the target of every link
// below root: what tells that a tree too large to be read was touched.
func (k *Key) AddTree(name, root string) *Key {
	if k.err != nil {
		return k
	}
	k.err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && d.Name() == ".git":
			return filepath.SkipDir
		case d.Type() == fs.ModeSymlink:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			k.Add(path, target)
		case d.Type().IsRegular():
			info, err := d.Info()
			if err != nil {
				return err
			}
			k.Add(path, fmt.Sprint(info.Size(), " ", info.ModTime().UnixNano()))
		}
		return nil
	})
	return k.Add(name, root)
}

// Sum returns the key, 32 hexadecimal digits.
func (k *Key) Sum() (string, error) {
	if k.err != nil {
		return "", fmt.Errorf("cannot read what a build depends on: %w", k.err)
	}
	return hex.EncodeToString(k.hash.Sum(nil))[:32], nil
}

func fileSum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Publish makes target a copy of source with the given mode: whole or not at all, and untouched if
// it already has that content, so that what depends on target's time is not built again.
func Publish(source, target string, mode fs.FileMode) error {
	if same(source, target) {
		return os.Chmod(target, mode)
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	in, err := os.Open(source)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.CreateTemp(filepath.Dir(target), ".tmp-")
	if err != nil {
		return err
	}
	defer os.Remove(out.Name())
	_, err = io.Copy(out, in)
	if err == nil {
		err = out.Chmod(mode)
	}
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(out.Name(), target)
	}
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", target, err)
	}
	return nil
}

func same(a, b string) bool {
	ia, err := os.Stat(a)
	if err != nil {
		return false
	}
	ib, err := os.Stat(b)
	if err != nil || ia.Size() != ib.Size() {
		return false
	}
	sa, err := fileSum(a)
	if err != nil {
		return false
	}
	sb, err := fileSum(b)
	return err == nil && sa == sb
}
