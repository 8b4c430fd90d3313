package container

import (
	"context"
	"fmt"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// TestReplay repeats calls to a daemon that follows on the one that had them before.
func TestReplay(t *testing.T) {
	w := newWorld(t)
	ctx := testContext(t)
	again := Replay(ctx)
	e := w.begin(nil)
	create := func(e *era, ctx context.Context, id string) (uint32, error) {
		return e.Create(ctx, CreateRequest{ID: id, Spec: encode(t, spec("sleep")), Rootfs: rootfs()})
	}
	addExec := func(e *era, ctx context.Context, id, execID string) error {
		return e.Exec(ctx, ExecRequest{ID: id, ExecID: execID, Spec: encode(t, specs.Process{Args: []string{"false"}})})
	}
	pid, err := create(e, ctx, "made")
	if err != nil {
		t.Fatal(err)
	}
	e.run("runs", IO{}, "sleep")
	if err := addExec(e, ctx, "runs", "made"); err != nil {
		t.Fatal(err)
	}
	if err := addExec(e, ctx, "runs", "ended"); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Start(ctx, "runs", "ended"); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Wait(ctx, "runs", "ended"); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Delete(ctx, "runs", "ended"); err != nil {
		t.Fatal(err)
	}
	e.run("gone", IO{}, "true")
	was := e.exit("gone")
	if _, err := e.Delete(ctx, "gone", ""); err != nil {
		t.Fatal(err)
	}
	e.run("paused", IO{}, "sleep")
	if err := e.Pause(ctx, "paused"); err != nil {
		t.Fatal(err)
	}
	// The daemon dies when the guest has done its part, and before that is recorded.
	records := w.recorded()
	if _, err := create(e, ctx, "half"); err != nil {
		t.Fatal(err)
	}
	if err := addExec(e, ctx, "runs", "half"); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Start(ctx, "made", ""); err != nil {
		t.Fatal(err)
	}
	e.kill()
	w.records = records

	e = w.begin(nil)
	if got, err := create(e, again, "made"); err != nil || got != pid {
		t.Errorf("create again: %d, %v; it had pid %d", got, err, pid)
	}
	if _, err := create(e, again, "half"); err != nil {
		t.Errorf("create what is half done: %v", err)
	}
	for _, execID := range []string{"made", "half"} {
		if err := addExec(e, again, "runs", execID); err != nil {
			t.Errorf("exec %s again: %v", execID, err)
		}
		if _, err := e.Start(again, "runs", execID); err != nil {
			t.Errorf("start %s again: %v", execID, err)
		}
		if exit, err := e.Wait(again, "runs", execID); err != nil || exit.Status != 1 {
			t.Errorf("wait for %s: %+v, %v", execID, exit, err)
		}
		if _, err := e.Start(again, "runs", execID); err != nil {
			t.Errorf("start %s, which has ended: %v", execID, err)
		}
	}
	if _, err := e.Start(again, "made", ""); err != nil {
		t.Errorf("start what runs: %v", err)
	}
	// The guest was at the earlier daemon's call still when this one asked it for the state.
	if err := addExec(e, ctx, "runs", "late"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.guest.Task().Start(ctx, &task.StartRequest{ID: "runs", ExecID: "late"}); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Start(ctx, "runs", "late"); err == nil {
		t.Error("what runs is started")
	}
	if _, err := e.Start(again, "runs", "late"); err != nil {
		t.Errorf("start what the guest has started meanwhile: %v", err)
	}
	if exit, err := e.Wait(again, "runs", "late"); err != nil || exit.Status != 1 {
		t.Errorf("wait for what the guest has started meanwhile: %+v, %v", exit, err)
	}
	if exit, err := e.Wait(again, "gone", ""); err != nil || !exit.At.Equal(was.At) {
		t.Errorf("wait for what is deleted: %+v, %v; it was %+v", exit, err, was)
	}
	if st, err := e.Delete(again, "gone", ""); err != nil || !st.Exit.At.Equal(was.At) || st.Status != Stopped {
		t.Errorf("delete again: %+v, %v; it was %+v", st, err, was)
	}
	if st, err := e.Delete(again, "runs", "ended"); err != nil || st.Exit.Status != 1 {
		t.Errorf("delete again: %+v, %v", st, err)
	}
	calls := map[string]func(context.Context) error{
		"kill":    func(ctx context.Context) error { return e.Kill(ctx, "gone", "", 15, false) },
		"resize":  func(ctx context.Context) error { return e.ResizePty(ctx, "gone", "", 1, 1) },
		"closeIO": func(ctx context.Context) error { return e.CloseIO(ctx, "gone", "", true) },
		"update":  func(ctx context.Context) error { return e.Update(ctx, "gone", []byte("{}")) },
		"pause":   func(ctx context.Context) error { return e.Pause(ctx, "paused") },
		"resume":  func(ctx context.Context) error { return e.Resume(ctx, "runs") },
		"start":   func(ctx context.Context) error { _, err := e.Start(ctx, "made", ""); return err },
		"create":  func(ctx context.Context) error { _, err := create(e, ctx, "made"); return err },
		"wait":    func(ctx context.Context) error { _, err := e.Wait(ctx, "gone", ""); return err },
		"delete":  func(ctx context.Context) error { _, err := e.Delete(ctx, "gone", ""); return err },
	}
	for name, call := range calls {
		if err := call(again); err != nil {
			t.Errorf("%s again: %v", name, err)
		}
		if err := call(ctx); err == nil {
			t.Errorf("%s for the first time is no error", name)
		}
	}
	// What nobody ever had is an error in any case.
	if _, err := e.Delete(again, "never", ""); !errdefs.IsNotFound(err) {
		t.Errorf("delete of what never was: %v", err)
	}
	if _, err := e.Wait(again, "never", ""); !errdefs.IsNotFound(err) {
		t.Errorf("wait for what never was: %v", err)
	}
}

// TestDeletions bounds what is remembered of what is no more.
func TestDeletions(t *testing.T) {
	p := newPod(t)
	p.run("c", IO{}, "sleep")
	for i := range maxDeletions + 10 {
		execID := fmt.Sprint("e", i)
		p.exec("c", execID, IO{}, "true")
		p.start("c", execID)
		p.wait("c", execID)
		if _, err := p.Delete(testContext(t), "c", execID); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(p.Records()[0].Processes); n != maxDeletions+1 {
		t.Errorf("%d processes are recorded", n)
	}
	p.Set.mu.Lock()
	for i := range p.deletions {
		p.deletions[i].at = time.Now().Add(-2 * deletionAge)
	}
	p.Set.mu.Unlock()
	if n := len(p.Records()[0].Processes); n != 1 {
		t.Errorf("%d processes are recorded in the end", n)
	}
}
