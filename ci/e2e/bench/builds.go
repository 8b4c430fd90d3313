package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// builds measures "mage build" in a copy of the tree, which it may change.
func (m *measurer) builds(ctx context.Context, r *report) error {
	tree, err := os.MkdirTemp("", "kuasar-tree")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tree)
	if err := copyTree(m.config.Root, tree); err != nil {
		return err
	}
	build := func() (float64, error) {
		cmd := exec.CommandContext(ctx, "go", "tool", "mage", "build")
		cmd.Dir = tree
		cmd.Env = append(os.Environ(), "GIT_OPTIONAL_LOCKS=0") // the history is the original's
		began := time.Now()
		if output, err := cmd.CombinedOutput(); err != nil {
			return 0, fmt.Errorf("mage build: %w\n%s", err, output)
		}
		return time.Since(began).Seconds(), nil
	}
	if _, err := build(); err != nil { // fills out/
		return err
	}
	var same, changed []float64
	for i := range runs {
		took, err := build()
		if err != nil {
			return err
		}
		same = append(same, took)
		// A file that both programs are linked from: the longest way.
		file := filepath.Join(tree, "guest", "protocol", "protocol.go")
		source, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		source = fmt.Appendf(source, "\nvar changed%d = %d\n", i, time.Now().UnixNano())
		if err := os.WriteFile(file, source, 0o644); err != nil {
			return err
		}
		if took, err = build(); err != nil {
			return err
		}
		changed = append(changed, took)
	}
	r.add(
		row{Measure: "mage build, nothing changed", Unit: "s", Result: median(same), Limit: 2, Samples: map[string][]float64{"same": same}},
		row{Measure: "mage build, one Go file changed", Unit: "s", Result: median(changed), Limit: 15, Samples: map[string][]float64{"changed": changed},
			Detail: "guest/protocol/protocol.go, which daemon and agent share"},
	)
	return nil
}

// copyTree copies a source tree without its outputs. Its history comes along as a link, for the
// commit that is put into the programs.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, relative)
		switch {
		case relative == "out":
			return fs.SkipDir
		case relative == ".git":
			if err := os.Symlink(path, target); err != nil {
				return err
			}
			if entry.IsDir() {
				return fs.SkipDir
			}
			return nil
		case entry.IsDir():
			return os.MkdirAll(target, 0o755)
		case entry.Type()&fs.ModeSymlink != 0:
			link, err := os.Readlink(path)
			return errors.Join(err, os.Symlink(link, target))
		default:
			return copyFile(path, target)
		}
	})
}
