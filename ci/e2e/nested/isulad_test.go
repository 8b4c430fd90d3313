package nested

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"kuasar.io/kuasar/ci/e2e/isulad"
	"kuasar.io/kuasar/ci/e2e/isulad/scenario"
)

// iSuladNode is the node as iSulad's scenarios know it: its task addresses lead to the guests themselves.
func (n *guide) iSuladNode() *scenario.Node {
	daemonEnds := func(command string) func(context.Context) error {
		return func(ctx context.Context) error {
			before := n.pid()
			if output, err := n.quietly(command, discard{}); err != nil {
				return fmt.Errorf("%s: %w: %s", command, err, output)
			}
			for n.pid() == before || n.ask("systemctl show --property=ActiveState --value kuasar-vmm") != "active" {
				select {
				case <-ctx.Done():
					return fmt.Errorf("after %s there is no other daemon: %w", command, ctx.Err())
				case <-time.After(100 * time.Millisecond):
				}
			}
			return nil
		}
	}
	return &scenario.Node{
		Socket: "/run/vmm-sandboxer.sock", State: state, Dir: "/var/lib/isulad-client",
		Bridge: "cni0", Gateway: netip.MustParsePrefix(gateway + "/16"), CgroupParent: "/isulad", Vsock: true,
		Restart: daemonEnds("systemctl restart kuasar-vmm"),
		Kill:    daemonEnds("systemctl kill --signal=SIGKILL kuasar-vmm"),
		VMM: func(pod string) (int, error) {
			output, err := n.quietly("pgrep -f '[-]name sandbox-"+pod+"'", discard{})
			if err != nil {
				return 0, fmt.Errorf("pod %s has no virtual machine: %w", pod, err)
			}
			var pid int
			_, err = fmt.Sscan(output, &pid)
			return pid, err
		},
	}
}

// iSulad runs a scenario of the test client for a version, in the step's time.
func (n *guide) iSulad(v isulad.Version, run func(context.Context, *testing.T, *scenario.Node, isulad.Version)) func() {
	return func() {
		ctx, cancel := context.WithTimeout(n.ctx, 10*time.Minute)
		defer cancel()
		began := time.Now()
		node := n.iSuladNode()
		// What the scenario's cleanups do belongs to it, so it is a test of its own.
		n.t.Run("scenario", func(t *testing.T) { run(ctx, t, node, v) })
		fmt.Printf("(the scenario took %s s)\n", strconv.FormatFloat(time.Since(began).Seconds(), 'f', 1, 64))
	}
}
