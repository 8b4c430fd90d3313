// Package peers builds the programs that the tests talk to, containerd and the CNI plugins, from
// their Go modules as ci/peers/go.mod pins them.
package peers

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
)

// flags are the same for every program. Nothing here needs cgo, and without it the programs do
// not depend on the machine's C library.
var flags = []string{"-trimpath", "-ldflags=-s -w"}

// Build returns the directory of the programs. root is the source tree of the project. The
// directory lies in the user's cache and is named by what the programs are made of, so that a
// second call is quick; a first one takes minutes and says so on progress.
func Build(ctx context.Context, root string, progress io.Writer) (string, error) {
	module := filepath.Join(root, "ci", "peers")
	sum := sha256.New()
	for _, name := range []string{"go.mod", "go.sum"} {
		data, err := os.ReadFile(filepath.Join(module, name))
		if err != nil {
			return "", fmt.Errorf("cannot build containerd and the CNI plugins: %w", err)
		}
		sum.Write(data)
	}
	fmt.Fprintln(sum, runtime.Version(), runtime.GOARCH, flags)

	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("cannot build containerd and the CNI plugins: %w", err)
	}
	dir := filepath.Join(cache, "kuasar", fmt.Sprintf("peers-%x", sum.Sum(nil)[:8]))
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	} else if !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("cannot build containerd and the CNI plugins: %w", err)
	}
	fmt.Fprintln(progress, "building containerd and the CNI plugins from their Go modules (once, two to three minutes)")
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", fmt.Errorf("cannot build containerd and the CNI plugins: %w", err)
	}
	// Built aside and renamed: an interrupted build leaves nothing that looks complete.
	partial, err := os.MkdirTemp(filepath.Dir(dir), "peers-partial-")
	if err != nil {
		return "", fmt.Errorf("cannot build containerd and the CNI plugins: %w", err)
	}
	defer os.RemoveAll(partial)
	args := append([]string{"build", "-o", partial + "/"}, flags...)
	cmd := exec.CommandContext(ctx, "go", append(args, "tool")...)
	cmd.Dir = module
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
	if output, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("cannot build containerd and the CNI plugins: %w\n%s", err, output)
	}
	if err := os.Chmod(partial, 0o755); err != nil {
		return "", fmt.Errorf("cannot build containerd and the CNI plugins: %w", err)
	}
	if err := os.Rename(partial, dir); err != nil && !errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("cannot build containerd and the CNI plugins: %w", err)
	}
	return dir, nil
}
