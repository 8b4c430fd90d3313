package e2e

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/ci/e2e/isulad"
	"kuasar.io/kuasar/ci/e2e/isulad/scenario"
	"kuasar.io/kuasar/ci/e2e/node"
)

// The versions of iSulad that differ from one another towards a sandboxer.
var isulads = []struct {
	name    string
	version isulad.Version
}{{"2.1.3", isulad.V213}, {"2.1.5", isulad.V215}, {"2.1.6", isulad.V216}}

var isuladNode *scenario.Node

// beginISulad is begin for the scenarios of iSulad, whose pods are on the same sandboxer as
// containerd's.
func beginISulad(t *testing.T) (context.Context, *scenario.Node) {
	t.Helper()
	ctx := begin(t)
	if isuladNode == nil {
		gateway, err := netip.ParsePrefix(bed.Gateway + "/24")
		if err != nil {
			t.Fatal(err)
		}
		_, err = os.Stat("/dev/vhost-vsock")
		isuladNode = &scenario.Node{
			Socket: sandboxer.Socket, State: sandboxer.Dir, Dir: filepath.Join(bed.Dir, "isulad"),
			Bridge: bed.Bridge, Gateway: gateway, CgroupParent: cgroupParent, Vsock: err == nil,
			Restart: successor(sandboxer.Restart), Kill: successor(sandboxer.Kill),
			VMM: func(pod string) (int, error) {
				pid, _, err := sandboxer.VMM(pod)
				return pid, err
			},
		}
	}
	return ctx, isuladNode
}

// successor ends the sandboxer and waits for the next one.
func successor(end func()) func(context.Context) error {
	return func(ctx context.Context) error {
		pid := sandboxer.PID()
		end()
		return sandboxer.AwaitSuccessor(ctx, pid)
	}
}

// All versions of iSulad have pods on one running daemon, beside one of containerd's.
func TestISuladPods(t *testing.T) {
	ctx := begin(t)
	p := runPod(ctx, t, podConfig(t), node.Handler)
	id := p.start(ctx, t, container("sleep 1000"))
	for _, i := range isulads {
		t.Run(i.name, func(t *testing.T) {
			ctx, n := beginISulad(t)
			scenario.Lifecycle(ctx, t, n, i.version)
		})
		exec(ctx, t, id, "true")
	}
}

func TestISuladNetworkFirst(t *testing.T) {
	ctx, n := beginISulad(t)
	scenario.NetworkFirst(ctx, t, n)
}

func TestISuladSharedProcessNamespace(t *testing.T) {
	ctx, n := beginISulad(t)
	scenario.SharedProcesses(ctx, t, n, isulad.V213)
}

func TestISuladWithoutNetwork(t *testing.T) {
	ctx, n := beginISulad(t)
	scenario.NoNetwork(ctx, t, n, isulad.V216)
}

func TestISuladLogRotation(t *testing.T) {
	ctx, n := beginISulad(t)
	scenario.LogRotation(ctx, t, n, isulad.V216)
}

// eachGeneration runs a scenario that 2.1.5 passes as 2.1.3 does where streams do not go over vsock.
func eachGeneration(t *testing.T, run func(context.Context, *testing.T, *scenario.Node, isulad.Version)) {
	for _, i := range isulads {
		if i.version == isulad.V215 {
			continue
		}
		t.Run(i.name, func(t *testing.T) {
			ctx, n := beginISulad(t)
			run(ctx, t, n, i.version)
		})
	}
}

func TestISuladRestartsOfTheDaemon(t *testing.T) {
	eachGeneration(t, func(ctx context.Context, t *testing.T, n *scenario.Node, v isulad.Version) {
		// containerd's go on, too.
		p := runPod(ctx, t, podConfig(t), node.Handler)
		id := p.start(ctx, t, container("sleep 1000"))
		scenario.Restarts(ctx, t, n, v)
		exec(ctx, t, id, "true")
		reachDaemon(ctx, t, p)
	})
}

func TestISuladStorm(t *testing.T) {
	eachGeneration(t, func(ctx context.Context, t *testing.T, n *scenario.Node, v isulad.Version) {
		p := runPod(ctx, t, podConfig(t), node.Handler)
		scenario.Storm(ctx, t, n, v)
		reachDaemon(ctx, t, p)
	})
}

// reachDaemon waits until containerd, whose connection to the daemon has backed off, reaches it.
func reachDaemon(ctx context.Context, t *testing.T, p *pod) {
	t.Helper()
	eventually(ctx, t, "containerd reaches the daemon", func() bool {
		answer, err := bed.CRI.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
		return err == nil && answer.Status.State == runtimeapi.PodSandboxState_SANDBOX_READY
	})
}

func TestISuladMachineThatDies(t *testing.T) {
	eachGeneration(t, scenario.MachineDies)
}

func TestISuladBadInput(t *testing.T) {
	eachGeneration(t, scenario.BadInput)
}

// What a node without vsock cannot show: the address that leads past the daemon, and the streams of
// 2.1.5 over the guest's ports. The node in a machine of its own runs the same scenarios.
func TestISuladDirectTaskAddress(t *testing.T) {
	ctx, n := beginISulad(t)
	if !n.Vsock {
		t.Skip("this machine has no /dev/vhost-vsock, so task addresses are Unix sockets; \"go tool mage node\" has it")
	}
	scenario.Lifecycle(ctx, t, n, isulad.V215)
}
