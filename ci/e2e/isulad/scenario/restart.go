package scenario

import (
	"context"
	"strings"
	"syscall"
	"testing"
	"time"

	"kuasar.io/kuasar/ci/e2e/isulad"
)

// Restarts ends the sandboxer, by SIGTERM and by SIGKILL, while containers run: iSulad finds the pod
// pending and then running, no container is taken for ended, nothing of their output is lost or
// doubled, and what ends meanwhile is learned of.
func Restarts(ctx context.Context, t *testing.T, n *Node, v isulad.Version) {
	h := begin(ctx, t, n, v)
	p := h.run(nil)
	vmm, err := n.VMM(p.id)
	if err != nil {
		t.Fatal(err)
	}
	_, address, _ := h.PodState(p.id)
	counting := p.start("n=0; until [ -e /end ]; do echo $n; n=$((n+1)); [ $((n % 50)) -ne 0 ] || sleep 0.1; done; sleep 1; exit 11")
	for _, way := range []struct {
		name string
		end  func(context.Context) error
	}{{"SIGTERM", n.Restart}, {"SIGKILL", n.Kill}} {
		ending := p.start("until [ -e /end ]; do sleep 0.05; done; sleep 1; echo the end; exit 23")
		counting.writes()

		// A process whose output goes on while the sandboxer is not there.
		var seen output
		executed := make(chan error, 1)
		go func() {
			_, err := h.Exec(counting.id, isulad.ExecConfig{
				Args:   []string{"/bin/sh", "-c", "n=0; while [ $n -lt 25 ]; do echo $n; n=$((n+1)); sleep 0.1; done"},
				Stdout: &seen,
			})
			executed <- err
		}()
		h.eventually("the process writes", func() bool { return strings.Contains(seen.String(), "3\n") })
		ending.sh("touch /end") // it exits in a moment

		pending := make(chan error, 1)
		go func() { pending <- h.WaitPod(ctx, p.id, isulad.Pending) }()
		if err := way.end(ctx); err != nil {
			t.Fatal(err)
		}
		if err := <-pending; err != nil {
			t.Errorf("%s: %v", way.name, err)
		}
		p.state(isulad.Running)
		if now, err := n.VMM(p.id); err != nil || now != vmm {
			t.Fatalf("%s: the virtual machine was process %d and is %d, %v", way.name, vmm, now, err)
		}
		if _, now, _ := h.PodState(p.id); now != address {
			t.Errorf("%s: the task address was %s and is %s", way.name, address, now)
		}
		if got := counting.sh("echo hello"); got != "hello\n" {
			t.Errorf("%s: afterwards a process says %q", way.name, got)
		}
		if err := <-executed; err != nil || strings.Count(seen.String(), "\n") != 25 {
			t.Errorf("%s: a process that went on ends with %v and has written %q", way.name, err, seen.String())
		}
		ending.exited(23)
		h.eventually("the log of what ended meanwhile is complete", func() bool { return ending.logged("stdout") == "the end\n" })
		counting.writes()
		if !h.Alive(counting.id) {
			t.Fatalf("%s: the container takes no signals", way.name)
		}
		// And iSulad's own restart after it, which asks for everything again.
		if err := h.Daemon.Restart(); err != nil {
			t.Fatal(err)
		}
		p.state(isulad.Running)
		counting.sh("true")
	}
	counting.sh("touch /end")
	counting.exited(11)
	t.Logf("%d lines, each once", counting.counted())
}

// Storm kills the sandboxer again and again while containers come and go. What iSulad was asked for at
// such a moment may fail; what it had stays, and afterwards all goes well again.
func Storm(ctx context.Context, t *testing.T, n *Node, v isulad.Version) {
	h := begin(ctx, t, n, v)
	p := h.run(nil)
	steady := p.start("exec sleep 1000")
	const kills = 5
	for i := range kills {
		killed := make(chan error, 1)
		go func() {
			// Into another part of what follows each time.
			time.Sleep(time.Duration(i) * 150 * time.Millisecond)
			killed <- n.Kill(ctx)
		}()
		c := p.create("echo hello; trap 'exit 3' TERM; while :; do sleep 0.1; done", nil)
		err := h.StartContainer(c.id)
		if err == nil {
			var result isulad.Result
			if result, err = h.ExecSync(c.id, "echo", "hello"); err == nil && result.Stdout != "hello\n" {
				t.Errorf("a process that was told to have succeeded says %+v", result)
			}
		}
		if err != nil {
			t.Logf("while the sandboxer is killed: %v", err)
		}
		if err := <-killed; err != nil {
			t.Fatal(err)
		}
		p.state(isulad.Running)
		// A container that was told to have started has, and one that was not leaves nothing behind.
		if err := h.StopContainer(ctx, c.id, 30*time.Second); err != nil {
			t.Error(err)
		}
		steady.sh("true")
	}
	last := p.start("echo the last; exit 4")
	last.exited(4)
	h.eventually("the log of the last container is complete", func() bool { return last.logged("stdout") == "the last\n" })
	if !h.Alive(steady.id) {
		t.Error("the container takes no signals")
	}
}

// MachineDies kills the virtual machine of a pod: that pod ends, and can be removed; others go on, here
// one of an iSulad of the other generation.
func MachineDies(ctx context.Context, t *testing.T, n *Node, v isulad.Version) {
	h := begin(ctx, t, n, v)
	another := isulad.V216
	if v.Generation() == isulad.GenB {
		another = isulad.V213
	}
	p, other := h.run(nil), begin(ctx, t, n, another).run(nil)
	c, bystander := p.start("exec sleep 1000"), other.start("exec sleep 1000")
	vmm, err := n.VMM(p.id)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(vmm, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	p.state(isulad.Stopped)
	if n.Vsock {
		c.exited(0) // iSulad cannot learn it
	} else {
		c.exited(137)
	}
	if h.Alive(c.id) {
		t.Error("a container whose machine has died takes signals")
	}
	if err := h.StopContainer(ctx, c.id, 0); err != nil {
		t.Error(err)
	}
	bystander.sh("true")
	other.state(isulad.Running)
	// iSulad, started again, learns at once that the pod has ended.
	if err := h.Daemon.Restart(); err != nil {
		t.Error(err)
	}
	p.state(isulad.Stopped)
	bystander.sh("true")
	for _, end := range []func(string) error{h.StopPod, h.RemovePod} {
		if err := end(p.id); err != nil {
			t.Error(err)
		}
	}
}
