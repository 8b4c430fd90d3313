package e2e

import (
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/ci/e2e/node"
)

func TestRestartOfContainerd(t *testing.T) {
	ctx := begin(t)
	p := runPod(ctx, t, podConfig(t), node.Handler)
	config := container("n=0; until [ -e /end ]; do echo $n; n=$((n+1)); sleep 0.1; done; exit 11")
	id := p.start(ctx, t, config)
	vmm, _, err := sandboxer.VMM(p.id)
	if err != nil {
		t.Fatal(err)
	}
	lines := func() int { return strings.Count(p.log(t, config, "stdout"), "\n") }
	eventually(ctx, t, "the container writes", func() bool { return lines() > 2 })

	if err := bed.StopContainerd(); err != nil {
		t.Fatal(err)
	}
	before := lines()
	if err := bed.StartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	if now, _, err := sandboxer.VMM(p.id); err != nil || now != vmm {
		t.Fatalf("the virtual machine was process %d and is %d, %v", vmm, now, err)
	}
	status, err := bed.CRI.Status(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	if status.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Fatalf("the container is %s", status.State)
	}
	eventually(ctx, t, "the container goes on writing", func() bool { return lines() > before+2 })
	exec(ctx, t, id, "touch", "/end")
	if status, err = bed.CRI.WaitExited(ctx, id); err != nil {
		t.Fatal(err)
	}
	if status.ExitCode != 11 {
		t.Errorf("the exit code is %d", status.ExitCode)
	}
	// Nothing of what was written meanwhile is missing.
	eventually(ctx, t, "the log is complete", func() bool {
		last := -1
		for line := range strings.Lines(p.log(t, config, "stdout")) {
			if strings.TrimSpace(line) != strconv.Itoa(last+1) {
				t.Fatalf("the log has %q after %d", line, last)
			}
			last++
		}
		return last >= before
	})
}

// The connections of containerd outlive a daemon whose descriptors the service manager keeps: the
// containers go on for containerd too, nothing of their output is lost or doubled, and what ends while
// no daemon is there is learned of afterwards.
func TestRestartOfTheSupervisedDaemon(t *testing.T) {
	for _, handler := range []string{node.Handler, node.HandlerStreaming} {
		for _, way := range []struct {
			name string
			end  func()
		}{{"SIGTERM", sandboxer.Restart}, {"SIGKILL", sandboxer.Kill}} {
			t.Run(handler+"/"+way.name, func(t *testing.T) {
				ctx := begin(t)
				p := runPod(ctx, t, podConfig(t), handler)
				counter := container("n=0; until [ -e /end ]; do echo $n; n=$((n+1)); [ $((n % 50)) -ne 0 ] || sleep 0.05; done; echo $n; sleep 1; exit 11")
				counting := p.start(ctx, t, counter)
				ending := p.start(ctx, t, container("until [ -e /end ]; do sleep 0.05; done; sleep 1; exit 23"))
				vmm, _, err := sandboxer.VMM(p.id)
				if err != nil {
					t.Fatal(err)
				}
				lines := func() int { return strings.Count(p.log(t, counter, "stdout"), "\n") }
				const restarts = 3
				for i := range restarts {
					before := lines()
					eventually(ctx, t, "the container writes", func() bool { return lines() > before+100 })
					if i == restarts-1 {
						exec(ctx, t, ending, "touch", "/end") // it exits in a moment
					}
					pid := sandboxer.PID()
					way.end()
					if err := sandboxer.AwaitSuccessor(ctx, pid); err != nil {
						t.Fatal(err)
					}
					if got := exec(ctx, t, counting, "echo", "hello"); got != "hello\n" {
						t.Errorf("after the restart a process in the container says %q", got)
					}
					if now, _, err := sandboxer.VMM(p.id); err != nil || now != vmm {
						t.Fatalf("the virtual machine was process %d and is %d, %v", vmm, now, err)
					}
					status, err := bed.CRI.Status(ctx, counting)
					if err != nil {
						t.Fatal(err)
					}
					if status.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
						t.Fatalf("after the restart the container is %s", status.State)
					}
				}
				status, err := bed.CRI.WaitExited(ctx, ending)
				if err != nil {
					t.Fatal(err)
				}
				if status.ExitCode != 23 {
					t.Errorf("the exit code of what ended meanwhile is %d, not 23", status.ExitCode)
				}
				exec(ctx, t, counting, "touch", "/end")
				if status, err = bed.CRI.WaitExited(ctx, counting); err != nil {
					t.Fatal(err)
				}
				if status.ExitCode != 11 {
					t.Errorf("the exit code is %d, not 11", status.ExitCode)
				}
				last := -1
				for line := range strings.Lines(p.log(t, counter, "stdout")) {
					if strings.TrimSpace(line) != strconv.Itoa(last+1) {
						t.Fatalf("the log has %q after %d", line, last)
					}
					last++
				}
				t.Logf("%d lines, each once", last+1)
			})
		}
	}
}

// A daemon that is killed leaves its pods running, and the one that follows takes them over. Here
// nothing keeps its descriptors: containerd takes the loss of its connection for the end of the containers that run, so nothing is
// asked of those but that they leave nothing behind.
func TestRestartOfTheDaemon(t *testing.T) {
	ctx := begin(t)
	daemon := startFaulty(ctx, t, nil)
	p := runPod(ctx, t, podConfig(t), node.HandlerFaulty)
	p.start(ctx, t, container("sleep 1000"))
	vmm, _, err := daemon.VMM(p.id)
	if err != nil {
		t.Fatal(err)
	}

	daemon.Kill()
	if _, err := os.Lstat(daemon.Metrics()); err != nil {
		t.Errorf("the killed daemon left no stale socket for the next to replace: %v", err)
	}
	if err := daemon.Start(ctx); err != nil {
		t.Fatal(err)
	}

	// A verbose status is asked of the daemon; containerd's connection to it has backed off.
	ready := func() bool {
		answer, err := bed.CRI.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
		return err == nil && answer.Status.State == runtimeapi.PodSandboxState_SANDBOX_READY
	}
	eventually(ctx, t, "containerd reaches the daemon and the pod is ready", ready)
	if now, _, err := daemon.VMM(p.id); err != nil || now != vmm {
		t.Fatalf("the virtual machine was process %d and is %d, %v", vmm, now, err)
	}
	id := p.start(ctx, t, container("sleep 1000"))
	if got := exec(ctx, t, id, "echo", "hello"); got != "hello\n" {
		t.Errorf("a container in the pod says %q", got)
	}
	if !ready() {
		t.Error("the pod is not ready any more")
	}
	if err := bed.CRI.RemovePod(ctx, p.id); err != nil {
		t.Fatal(err)
	}
	if _, _, err := daemon.VMM(p.id); err == nil {
		t.Error("the virtual machine outlives its pod")
	}
}

func TestMachineThatDies(t *testing.T) {
	ctx := begin(t)
	p := runPod(ctx, t, podConfig(t), node.Handler)
	other := runPod(ctx, t, podConfig(t), node.Handler)
	id := p.start(ctx, t, container("sleep 1000"))
	otherID := other.start(ctx, t, container("sleep 1000"))
	vmm, _, err := sandboxer.VMM(p.id)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(vmm, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	status, err := bed.CRI.WaitExited(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	if status.ExitCode != 137 {
		t.Errorf("the container's exit code is %d, not 137", status.ExitCode)
	}
	eventually(ctx, t, "the pod is not ready any more", func() bool {
		answer, err := bed.CRI.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id})
		return err == nil && answer.Status.State == runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	})
	exec(ctx, t, otherID, "true")
}

func TestGuestThatPanics(t *testing.T) {
	ctx := begin(t)
	p := runPod(ctx, t, podConfig(t), node.Handler)
	id := p.start(ctx, t, container("sleep 1000"))
	// The console ends with the guest, so its error is no news.
	sandboxer.Console(ctx, p.id, "echo c > /proc/sysrq-trigger")
	status, err := bed.CRI.WaitExited(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	if status.ExitCode != 137 {
		t.Errorf("the container's exit code is %d, not 137", status.ExitCode)
	}
	log, err := os.ReadFile(sandboxer.Log)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(log), "sysrq triggered crash") {
		t.Errorf("the sandboxer's log does not say why the guest died:\n%s", node.Tail(sandboxer.Log, 10))
	}
}
