package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/ci/e2e/node"
)

// edit replaces pieces of a pod's journal, atomically as the daemon does.
func edit(t *testing.T, journal string, pieces ...string) {
	t.Helper()
	text, err := os.ReadFile(journal)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(pieces); i += 2 {
		if !strings.Contains(string(text), pieces[i]) {
			t.Fatalf("the journal has no %q:\n%s", pieces[i], text)
		}
	}
	next := journal + ".next"
	if err := os.WriteFile(next, []byte(strings.NewReplacer(pieces...).Replace(string(text))), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, journal); err != nil {
		t.Fatal(err)
	}
}

// A daemon that is older than the pods leaves those alone that it does not understand: they run on,
// containerd's connections stay open, and the newer daemon goes on where it was.
func TestDowngradeWithPods(t *testing.T) {
	ctx := begin(t)
	p := runPod(ctx, t, podConfig(t), node.Handler)
	id := p.start(ctx, t, container("until [ -e /end ]; do sleep 0.05; done; exit 17"))
	vmm, _, err := sandboxer.VMM(p.id)
	if err != nil {
		t.Fatal(err)
	}
	restart := func() {
		t.Helper()
		pid := sandboxer.PID()
		sandboxer.Kill()
		if err := sandboxer.AwaitSuccessor(ctx, pid); err != nil {
			t.Fatal(err)
		}
		if now, _, err := sandboxer.VMM(p.id); err != nil || now != vmm {
			t.Fatalf("the virtual machine was process %d and is %d, %v", vmm, now, err)
		}
	}
	info := func() string {
		answer, err := bed.CRI.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
		if err != nil || answer.Status.State != runtimeapi.PodSandboxState_SANDBOX_READY {
			return ""
		}
		return fmt.Sprint(answer.Info)
	}
	journal := filepath.Join(sandboxer.Dir, p.id, "sandbox.json")
	edit(t, journal, `"schema": 1,`, `"schema": 9999,`, `"readable_by": 1,`, `"readable_by": 9999,`)
	restart()
	eventually(ctx, t, "the pod is ready and held", func() bool { return strings.Contains(info(), "9999") })
	if status, err := bed.CRI.Status(ctx, id); err != nil || status.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Fatalf("the container is %v, %v", status, err)
	}

	edit(t, journal, `"schema": 9999,`, `"schema": 1,`, `"readable_by": 9999,`, `"readable_by": 1,`)
	restart()
	eventually(ctx, t, "the pod is ready and not held", func() bool { return info() != "" && !strings.Contains(info(), "9999") })
	exec(ctx, t, id, "touch", "/end")
	status, err := bed.CRI.WaitExited(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	if status.ExitCode != 17 {
		t.Errorf("the exit code is %d, not 17", status.ExitCode)
	}
}

// A pod that is held can be removed, with all that is on the host for it.
func TestRemovalOfAHeldPod(t *testing.T) {
	ctx := begin(t)
	daemon := startFaulty(ctx, t, nil)
	p := runPod(ctx, t, podConfig(t), node.HandlerFaulty)
	id := p.start(ctx, t, container("sleep 1000"))
	daemon.Kill()
	edit(t, filepath.Join(daemon.Dir, p.id, "sandbox.json"), `"schema": 1,`, `"schema": 9999,`, `"readable_by": 1,`, `"readable_by": 9999,`)
	if err := daemon.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if _, _, err := daemon.VMM(p.id); err != nil {
		t.Fatalf("the virtual machine did not outlive the daemon: %v", err)
	}
	eventually(ctx, t, "containerd reaches the daemon", func() bool {
		_, err := bed.CRI.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
		return err == nil
	})
	// Nothing kept containerd's connection, so for containerd the container has ended.
	if _, err := bed.CRI.WaitExited(ctx, id); err != nil {
		t.Fatal(err)
	}
	if err := bed.CRI.RemovePod(ctx, p.id); err != nil {
		t.Fatal(err)
	}
	if _, _, err := daemon.VMM(p.id); err == nil {
		t.Error("the virtual machine outlives its pod")
	}
}

// What nobody can manage any more does not outlive the next start of the daemon: nor do its processes,
// its mounts and its cgroup. Pods beside it are not touched.
func TestPodsWithoutTheirJournals(t *testing.T) {
	ctx := begin(t)
	daemon := startFaulty(ctx, t, nil)
	var pods []*runningPod
	for _, spoil := range []func(journal string) error{
		nil,
		os.Remove,
		func(journal string) error { return os.Truncate(journal, 100) },
		func(journal string) error { edit(t, journal, `"boot_id": "`, `"boot_id": "x`); return nil },
	} {
		p := runPod(ctx, t, podConfig(t), node.HandlerFaulty)
		pods = append(pods, &runningPod{p.id, p.start(ctx, t, container("sleep 1000")), spoil})
	}
	daemon.Kill()
	for _, p := range pods {
		if p.spoil != nil {
			if err := p.spoil(filepath.Join(daemon.Dir, p.id, "sandbox.json")); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := daemon.Start(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(ctx, t, "containerd reaches the daemon", func() bool {
		_, err := bed.CRI.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pods[0].id, Verbose: true})
		return err == nil
	})
	for i, p := range pods {
		_, _, err := daemon.VMM(p.id)
		_, serr := os.Lstat(filepath.Join(daemon.Dir, p.id))
		if p.spoil == nil && (err != nil || serr != nil) {
			t.Errorf("pod %d is gone: %v, %v", i, err, serr)
		}
		if p.spoil != nil && (err == nil || !errors.Is(serr, fs.ErrNotExist)) {
			t.Errorf("pod %d is not gone: %v, %v", i, err, serr)
		}
		if _, err := bed.CRI.WaitExited(ctx, p.container); err != nil {
			t.Error(err)
		}
		if err := bed.CRI.RemovePod(ctx, p.id); err != nil {
			t.Errorf("pod %d cannot be removed: %v", i, err)
		}
	}
}

type runningPod struct {
	id, container string
	spoil         func(journal string) error
}

// A guest that does not answer keeps neither the daemon nor other pods waiting, and is a pod as before
// when it answers again.
func TestGuestThatHangsDuringARestart(t *testing.T) {
	ctx := begin(t)
	daemon := startFaulty(ctx, t, nil)
	hanging := runPod(ctx, t, podConfig(t), node.HandlerFaulty)
	other := runPod(ctx, t, podConfig(t), node.HandlerFaulty)
	vmm, _, err := daemon.VMM(hanging.id)
	if err != nil {
		t.Fatal(err)
	}
	daemon.Kill()
	if err := syscall.Kill(vmm, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Kill(vmm, syscall.SIGCONT) })
	starting, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := daemon.Start(starting); err != nil {
		t.Fatal(err)
	}
	ready := func(id string) func() bool {
		return func() bool {
			answer, err := bed.CRI.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
			return err == nil && answer.Status.State == runtimeapi.PodSandboxState_SANDBOX_READY
		}
	}
	eventually(ctx, t, "the other pod is ready", ready(other.id))
	if got := exec(ctx, t, other.start(ctx, t, container("sleep 1000")), "echo", "hello"); got != "hello\n" {
		t.Errorf("a container in the other pod says %q", got)
	}
	if !ready(hanging.id)() {
		t.Error("the pod that hangs is given up")
	}
	if err := syscall.Kill(vmm, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if got := exec(ctx, t, hanging.start(ctx, t, container("sleep 1000")), "echo", "hello"); got != "hello\n" {
		t.Errorf("a container in the pod that hung says %q", got)
	}
}
