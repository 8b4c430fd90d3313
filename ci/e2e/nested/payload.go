package nested

import (
	"context"
	_ "embed"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"kuasar.io/kuasar/ci/e2e/peers"
)

// script runs the scenarios on the node.
//
//go:embed run.sh
var script string

// Given are programs that the node gets besides, each the path of one or empty.
type Given struct {
	// StratoVirt is the program; firmware that lies beside it, as *.fd, comes along.
	StratoVirt string
	// Virtiofsd serves it.
	Virtiofsd string
	// ISulad is an installed tree: its usr and etc are laid over the node's.
	ISulad string
}

// makePayload writes the node's second disk, which the node mounts as /node: the repositories that the
// appliance is installed from, containerd with the CNI plugins, this program, and what was given. The
// scenarios end by themselves after limit.
func makePayload(ctx context.Context, top, scratch, to string, given Given, limit time.Duration, progress io.Writer) error {
	programs, err := peers.Build(ctx, top, progress)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return fmt.Errorf("%w; install busybox (on Debian the package busybox-static)", err)
	}
	files := map[string]string{
		programs: "programs",
		self:     "bin/scenarios",
		busybox:  "bin/busybox",
		filepath.Join(top, "out/repositories", "debian"):  "repositories/debian",
		filepath.Join(top, "out/repositories", "current"): "repositories/current",
		filepath.Join(top, "defaults"):                    "defaults",
	}
	if given.StratoVirt != "" {
		files[given.StratoVirt] = "given/stratovirt"
		firmware, err := filepath.Glob(filepath.Join(filepath.Dir(given.StratoVirt), "*.fd"))
		if err != nil {
			return err
		}
		for _, path := range firmware {
			files[path] = "given/firmware/" + filepath.Base(path)
		}
	}
	if given.Virtiofsd != "" {
		files[given.Virtiofsd] = "given/virtiofsd"
	}
	if given.ISulad != "" {
		files[given.ISulad] = "given/isulad"
	}
	for from, name := range files {
		target := filepath.Join(scratch, name)
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		if err := run(ctx, "cp", "--recursive", "--dereference", "--reflink=auto", "--preserve=mode,timestamps", from, target); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{"run.sh": script, "limit": limit.String()} {
		if err := os.WriteFile(filepath.Join(scratch, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	size, err := diskSpace(scratch)
	if err != nil {
		return err
	}
	return makeDisk(ctx, scratch, "node", to, size)
}

// diskSpace is enough for what a directory holds.
func diskSpace(dir string) (int64, error) {
	size := int64(64 << 20)
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		size += info.Size() + 8192
		return nil
	})
	return size + size/10, err
}
