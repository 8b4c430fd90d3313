package containers

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/anypb"

	"kuasar.io/kuasar/guest/protocol"
)

func TestCheckID(t *testing.T) {
	for id, ok := range map[string]bool{
		"a": true, "0": true, "a.b-c_d": true, strings.Repeat("x", 128): true,
		"": false, ".": false, "..": false, "-a": false, "_a": false, "a/b": false, "../a": false, "a b": false, "a\x00": false,
		"ä": false, strings.Repeat("x", 129): false, strings.Repeat("x", 1000): false,
	} {
		err := checkID("container", id)
		if (err == nil) != ok || !ok && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", id, err)
		}
		if err != nil && len(err.Error()) > 400 {
			t.Errorf("the error about a long id has %d bytes", len(err.Error()))
		}
	}
}

func TestUnknownContainer(t *testing.T) {
	s := New(Options{StateDir: t.TempDir()})
	ctx := context.Background()
	for name, call := range map[string]func(id string) error{
		"state":  func(id string) error { _, err := s.State(ctx, &taskapi.StateRequest{ID: id}); return err },
		"start":  func(id string) error { _, err := s.Start(ctx, &taskapi.StartRequest{ID: id}); return err },
		"delete": func(id string) error { _, err := s.Delete(ctx, &taskapi.DeleteRequest{ID: id}); return err },
		"pids":   func(id string) error { _, err := s.Pids(ctx, &taskapi.PidsRequest{ID: id}); return err },
		"pause":  func(id string) error { _, err := s.Pause(ctx, &taskapi.PauseRequest{ID: id}); return err },
		"resume": func(id string) error { _, err := s.Resume(ctx, &taskapi.ResumeRequest{ID: id}); return err },
		"kill":   func(id string) error { _, err := s.Kill(ctx, &taskapi.KillRequest{ID: id}); return err },
		"exec": func(id string) error {
			_, err := s.Exec(ctx, &taskapi.ExecProcessRequest{ID: id, ExecID: "e"})
			return err
		},
		"resize": func(id string) error { _, err := s.ResizePty(ctx, &taskapi.ResizePtyRequest{ID: id}); return err },
		"close":  func(id string) error { _, err := s.CloseIO(ctx, &taskapi.CloseIORequest{ID: id}); return err },
		"update": func(id string) error { _, err := s.Update(ctx, &taskapi.UpdateTaskRequest{ID: id}); return err },
		"wait":   func(id string) error { _, err := s.Wait(ctx, &taskapi.WaitRequest{ID: id}); return err },
		"stats":  func(id string) error { _, err := s.Stats(ctx, &taskapi.StatsRequest{ID: id}); return err },
	} {
		for _, id := range []string{"nobody", "", "../x", strings.Repeat("y", 1000)} {
			if err := call(id); !errdefs.IsNotFound(class(err)) {
				t.Errorf("%s of %.10q: %v", name, id, err)
			}
		}
	}
	if _, err := s.Checkpoint(ctx, &taskapi.CheckpointTaskRequest{}); !errdefs.IsNotImplemented(class(err)) {
		t.Errorf("checkpoint: %v", err)
	}
	if _, err := s.Shutdown(ctx, &taskapi.ShutdownRequest{ID: "nobody", Now: true}); err != nil {
		t.Errorf("shutdown: %v", err)
	}
	if r, err := s.Connect(ctx, &taskapi.ConnectRequest{ID: "nobody"}); err != nil || r.ShimPid == 0 || r.TaskPid != 0 {
		t.Errorf("connect: %v, %v", r, err)
	}
	if err := s.Purge(ctx, "nobody"); err != nil {
		t.Errorf("purge: %v", err)
	}
	if err := s.Purge(ctx, "a/b"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("purge of a path: %v", err)
	}
}

func TestPrepare(t *testing.T) {
	s := New(Options{StateDir: t.TempDir(), StorageDir: t.TempDir()})
	ctx := context.Background()
	spec, err := json.Marshal(plainSpec())
	if err != nil {
		t.Fatal(err)
	}
	for name, r := range map[string]*protocol.PrepareContainerRequest{
		"id":      {ContainerId: "a/b", Spec: spec},
		"spec":    {ContainerId: "c1", Spec: []byte("nonsense")},
		"no spec": {ContainerId: "c1"},
		"empty":   {ContainerId: "c1", Spec: []byte("{}")},
		"storage": {ContainerId: "c1", Spec: spec, Storages: []*protocol.Storage{{Kind: protocol.Storage_TMPFS, MountPoint: "/etc"}}},
	} {
		if err := s.Prepare(ctx, r); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for range 2 {
		if err := s.Prepare(ctx, &protocol.PrepareContainerRequest{ContainerId: "c1", Spec: spec}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Create(ctx, &taskapi.CreateTaskRequest{ID: "c1", Checkpoint: "x"}); !errdefs.IsNotImplemented(class(err)) {
		t.Errorf("create from a checkpoint: %v", err)
	}
	if _, err := s.Create(ctx, &taskapi.CreateTaskRequest{ID: "c1", Stdout: "/run/fifo"}); err == nil {
		t.Error("a path of the host was taken for a stream")
	}
	if ids := s.IDs(); len(ids) != 0 {
		t.Errorf("a failed create left %v", ids)
	}
	if err := s.Purge(ctx, "c1"); err != nil {
		t.Error(err)
	}
	if _, err := s.Create(ctx, &taskapi.CreateTaskRequest{ID: "c1"}); !errdefs.IsFailedPrecondition(class(err)) {
		t.Errorf("create after purge: %v", err)
	}
	s.StopAll(ctx, 0)
	if err := s.Prepare(ctx, &protocol.PrepareContainerRequest{ContainerId: "c1", Spec: spec}); !errdefs.IsUnavailable(err) {
		t.Errorf("prepare after the end: %v", err)
	}
}

// running is a container as the service sees it, without one behind it.
func running(s *Service) *container {
	c := newContainer(s, &taskapi.CreateTaskRequest{ID: "c1", Bundle: "/b", Stdout: "stdio://t", Terminal: true})
	c.init.status = task.Status_RUNNING
	c.init.pid = 42
	s.containers["c1"] = c
	return c
}

func TestStateIsKeptInMemory(t *testing.T) {
	s := New(Options{})
	c := running(s)
	ctx := context.Background()
	// Another request has the container for itself, and State still answers.
	c.busy <- struct{}{}
	r, err := s.State(ctx, &taskapi.StateRequest{ID: "c1"})
	if err != nil || r.Status != task.Status_RUNNING || r.Pid != 42 || r.Bundle != "/b" || r.Stdout != "stdio://t" || !r.Terminal || r.ExitedAt != nil {
		t.Errorf("%v, %v", r, err)
	}
	c.paused.Store(true)
	if r, _ := s.State(ctx, &taskapi.StateRequest{ID: "c1"}); r.Status != task.Status_PAUSED {
		t.Errorf("%v", r)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := s.Pause(cancelled, &taskapi.PauseRequest{ID: "c1"}); err == nil {
		t.Error("a busy container did not keep another request waiting")
	}
	if _, err := s.Wait(cancelled, &taskapi.WaitRequest{ID: "c1"}); err == nil {
		t.Error("wait did not heed its context")
	}
}

func TestExecRecords(t *testing.T) {
	s := New(Options{})
	c := running(s)
	ctx := context.Background()
	spec := &anypb.Any{Value: []byte(`{"args":["x"],"cwd":"/"}`)}
	request := func(id string) *taskapi.ExecProcessRequest {
		return &taskapi.ExecProcessRequest{ID: "c1", ExecID: id, Spec: spec}
	}
	for _, id := range []string{"", "a/b", "..", strings.Repeat("x", 129)} {
		if _, err := s.Exec(ctx, request(id)); !errdefs.IsInvalidArgument(class(err)) {
			t.Errorf("exec %.10q: %v", id, err)
		}
	}
	if _, err := s.Exec(ctx, &taskapi.ExecProcessRequest{ID: "c1", ExecID: "e", Spec: spec, Stdin: "/run/fifo"}); !errdefs.IsInvalidArgument(class(err)) {
		t.Errorf("a path of the host: %v", err)
	}
	if _, err := s.Exec(ctx, request("e")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Exec(ctx, request("e")); !errdefs.IsAlreadyExists(class(err)) {
		t.Errorf("a second e: %v", err)
	}
	if r, err := s.State(ctx, &taskapi.StateRequest{ID: "c1", ExecID: "e"}); err != nil || r.Status != task.Status_CREATED {
		t.Errorf("%v, %v", r, err)
	}
	if _, err := s.ResizePty(ctx, &taskapi.ResizePtyRequest{ID: "c1", ExecID: "e"}); !errdefs.IsFailedPrecondition(class(err)) {
		t.Errorf("resize without terminal: %v", err)
	}
	if _, err := s.Delete(ctx, &taskapi.DeleteRequest{ID: "c1", ExecID: "e"}); err != nil {
		t.Error(err)
	}
	if _, err := s.Delete(ctx, &taskapi.DeleteRequest{ID: "c1", ExecID: "e"}); !errdefs.IsNotFound(class(err)) {
		t.Errorf("second delete: %v", err)
	}

	// Execs that nobody deletes do not pile up, and the latest can still be waited for.
	const many = maxExited + 10
	for i := range many {
		id := fmt.Sprintf("e%d", i)
		if _, err := s.Exec(ctx, request(id)); err != nil {
			t.Fatal(err)
		}
		p, err := c.process(id)
		if err != nil {
			t.Fatal(err)
		}
		p.fail()
		c.execExited(p)
	}
	if n := len(c.execs); n != maxExited {
		t.Errorf("%d execs are kept", n)
	}
	if r, err := s.Wait(ctx, &taskapi.WaitRequest{ID: "c1", ExecID: fmt.Sprintf("e%d", many-1)}); err != nil || r.ExitStatus != startFailed {
		t.Errorf("%v, %v", r, err)
	}
	c.init.fail()
	if _, err := s.Exec(ctx, request("late")); !errdefs.IsFailedPrecondition(class(err)) {
		t.Errorf("exec after the end: %v", err)
	}
	if err := func() error { _, err := s.Kill(ctx, &taskapi.KillRequest{ID: "c1"}); return err }(); !errdefs.IsNotFound(class(err)) {
		t.Errorf("signal 0 after the end: %v", err)
	}
}
