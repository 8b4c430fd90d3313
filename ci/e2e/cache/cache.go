// Package cache keeps directories that take minutes to make, in the user's cache, by what they are
// made of.
package cache

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Directory returns <user's cache>/kuasar/<name>-<key>. If it is not there yet, it calls make with an
// empty directory, which takes its place. Nobody may write to it afterwards.
func Directory(name string, key []byte, make func(partial string) error) (string, error) {
	top, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(top, "kuasar", fmt.Sprintf("%s-%x", name, key))
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	} else if !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	// Made aside and renamed: what was interrupted never looks complete.
	partial, err := os.MkdirTemp(filepath.Dir(dir), name+"-partial-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(partial)
	if err := make(partial); err != nil {
		return "", err
	}
	if err := os.Chmod(partial, 0o755); err != nil {
		return "", err
	}
	if err := os.Rename(partial, dir); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	return dir, nil
}
