// Package peers builds the programs that the tests talk to, containerd and the CNI plugins, from
// their Go modules as ci/peers/go.mod pins them.
package peers

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	"kuasar.io/kuasar/ci/e2e/cache"
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

	dir, err := cache.Directory("peers", sum.Sum(nil)[:8], func(partial string) error {
		fmt.Fprintln(progress, "building containerd and the CNI plugins from their Go modules (once, two to three minutes)")
		args := append([]string{"build", "-o", partial + "/"}, flags...)
		cmd := exec.CommandContext(ctx, "go", append(args, "tool")...)
		cmd.Dir = module
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
		if output, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%w\n%s", err, output)
		}
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("cannot build containerd and the CNI plugins: %w", err)
	}
	return dir, nil
}
