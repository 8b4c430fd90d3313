// Package cache keeps what is expensive to build under the user's cache directory, by the content
// of what it is built from.
//
// An entry is a directory <cache>/kuasar/<kind>/<key>. It appears whole or not at all: it is filled
// under another name and renamed. Two builds of the same kind exclude each other by a lock that
// ends with the process that holds it.
package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// kept is how many entries of a kind stay. The least recently used go first.
const kept = 6

// unfinished begins the names of directories that are being filled.
const unfinished = ".unfinished-"

// Dir returns the directory of all kinds, $XDG_CACHE_HOME/kuasar or ~/.cache/kuasar. It may not
// exist yet.
func Dir() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		// A service has neither variable, but its user has an entry in passwd; root's is known.
		if os.Getuid() != 0 {
			return "", fmt.Errorf("cannot tell where the cache is: %w; set XDG_CACHE_HOME", err)
		}
		dir = "/root/.cache"
	}
	return filepath.Join(dir, "kuasar"), nil
}

// Entry returns the directory of kind's entry key. If there is none, fill makes it: it is given an
// empty directory for the entry's files and a scratch directory that is removed afterwards. An
// error of fill leaves no entry. The caller must not change the files of an entry.
func Entry(ctx context.Context, kind, key string, fill func(dir, scratch string) error) (string, error) {
	root, err := Dir()
	if err != nil {
		return "", err
	}
	return entry(ctx, filepath.Join(root, kind), key, fill)
}

func entry(ctx context.Context, dir, key string, fill func(dir, scratch string) error) (string, error) {
	target := filepath.Join(dir, key)
	if used(target) {
		return target, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("cannot make the cache: %w", err)
	}
	unlock, err := lock(ctx, dir)
	if err != nil {
		return "", err
	}
	defer unlock()
	if used(target) { // somebody else made it while we waited
		return target, nil
	}
	// With the lock held, whatever is unfinished belongs to a build that was killed.
	if err := sweep(dir, key); err != nil {
		return "", err
	}
	work, err := os.MkdirTemp(dir, unfinished)
	if err != nil {
		return "", fmt.Errorf("cannot make the cache: %w", err)
	}
	defer os.RemoveAll(work)
	made, scratch := filepath.Join(work, "entry"), filepath.Join(work, "scratch")
	for _, d := range []string{made, scratch} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return "", fmt.Errorf("cannot make the cache: %w", err)
		}
	}
	if err := fill(made, scratch); err != nil {
		return "", err
	}
	if err := os.Rename(made, target); err != nil {
		return "", fmt.Errorf("cannot publish %s: %w", target, err)
	}
	return target, nil
}

// used tells whether an entry exists, and if so marks it as used now.
func used(target string) bool {
	now := time.Now()
	return os.Chtimes(target, now, now) == nil
}

// sweep removes what killed builds left in dir, and the entries that were not used for longest.
func sweep(dir, key string) error {
	list, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("cannot read the cache: %w", err)
	}
	type old struct {
		path string
		used time.Time
	}
	var entries []old
	for _, e := range list {
		path := filepath.Join(dir, e.Name())
		if strings.HasPrefix(e.Name(), unfinished) {
			if err := os.RemoveAll(path); err != nil {
				return fmt.Errorf("cannot remove an unfinished build: %w", err)
			}
			continue
		}
		info, err := e.Info()
		if err != nil || !info.IsDir() || e.Name() == key {
			continue
		}
		entries = append(entries, old{path, info.ModTime()})
	}
	slices.SortFunc(entries, func(a, b old) int { return b.used.Compare(a.used) })
	for i, e := range entries {
		if i < kept-1 {
			continue
		}
		if err := os.RemoveAll(e.path); err != nil {
			return fmt.Errorf("cannot remove an old build: %w", err)
		}
	}
	return nil
}

// lock takes the lock of a kind, waiting for as long as ctx allows.
func lock(ctx context.Context, dir string) (unlock func(), err error) {
	file, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("cannot lock the cache: %w", err)
	}
	for told := false; ; {
		err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { file.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			file.Close()
			return nil, fmt.Errorf("cannot lock %s: %w", file.Name(), err)
		}
		if !told {
			fmt.Printf("waiting for another build that uses %s\n", dir)
			told = true
		}
		select {
		case <-ctx.Done():
			file.Close()
			return nil, fmt.Errorf("cannot lock %s: another build holds it: %w", file.Name(), ctx.Err())
		case <-time.After(200 * time.Millisecond):
		}
	}
}
