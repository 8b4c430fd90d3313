package nested

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"time"
)

// limit is how long a node may take, and more how much longer one on which given programs are tried, too.
// On two cores it takes seven minutes: a slower machine must not look like a failure of the product, and a
// node that has stopped is noticed by its silence long before.
const limit, more = 25 * time.Minute, 10 * time.Minute

// The scenarios, on a node that is booted for them: see TestOnNode. Their transcript, the console and the
// node's logs are left in out/node.
func TestNode(t *testing.T) {
	if os.Getenv("KUASAR_E2E") == "" {
		t.Skip("boots a node in a virtual machine for minutes; \"go tool mage node\" sets KUASAR_E2E=1")
	}
	if runtime.GOARCH != "amd64" {
		t.Skip("the emulated processor whose virtualization KVM can use is x86_64's")
	}
	if _, err := exec.LookPath(qemu); err != nil {
		t.Skip("there is no " + qemu)
	}
	if os.Getuid() != 0 {
		t.Fatal("making the node's disk needs root")
	}
	top, err := filepath.Abs("../../..")
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(top, "out", "node")
	if err := errors.Join(os.RemoveAll(out), os.MkdirAll(out, 0o755)); err != nil {
		t.Fatal(err)
	}
	// The first time there is much to be made, which the limit is not for.
	dir, err := bootable(t.Context(), os.Stdout)
	if err != nil {
		t.Fatal(err)
	}
	scratch, err := os.MkdirTemp("/tmp", "node-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(scratch)
	payload := filepath.Join(scratch, "payload.ext4")
	given := Given{StratoVirt: os.Getenv("STRATOVIRT"), Virtiofsd: os.Getenv("VIRTIOFSD"), ISulad: os.Getenv("ISULAD_ROOT")}
	limit := limit
	if given != (Given{}) {
		limit += more
	}
	if err := makePayload(t.Context(), top, filepath.Join(scratch, "payload"), payload, given, limit-time.Minute, os.Stdout); err != nil {
		t.Fatal(err)
	}
	for attempt := 1; ; attempt++ {
		v := &vm{bootable: dir, payload: payload, dir: out, progress: os.Stdout, silence: silence}
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		status, err := v.run(ctx)
		cancel()
		fmt.Printf("node: it lived for %s\n", time.Since(began).Round(time.Second))
		if err := unpack(t.Context(), out); err != nil {
			t.Error(err)
		}
		switch {
		case err == nil && status == 0:
		case err == nil:
			t.Errorf("the scenarios failed: see %s", filepath.Join(out, transcriptFile))
		case errors.Is(err, errLost) && attempt == 1:
			fmt.Printf("node: %v\nnode: this is the bed's failure and not the appliance's; once more\n", err)
			if err := keepLost(out); err != nil {
				t.Error(err)
			}
			continue
		default:
			t.Errorf("attempt %d: %v", attempt, err)
		}
		return
	}
}

// unpack takes the logs apart that the node has sent, if it has.
func unpack(ctx context.Context, out string) error {
	archive := filepath.Join(out, collectedFile)
	if info, err := os.Stat(archive); err != nil || info.Size() == 0 {
		return nil
	}
	if err := run(ctx, "tar", "--extract", "--file", archive, "--directory", out); err != nil {
		return err
	}
	return os.Remove(archive)
}

// keepLost makes room for a second node's files.
func keepLost(out string) error {
	lost := filepath.Join(out, "lost")
	if err := os.MkdirAll(lost, 0o755); err != nil {
		return err
	}
	for _, name := range []string{consoleFile, transcriptFile} {
		if err := os.Rename(filepath.Join(out, name), filepath.Join(lost, name)); err != nil {
			return err
		}
	}
	return nil
}
