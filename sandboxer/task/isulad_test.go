package task

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	task2 "github.com/containerd/containerd/api/runtime/task/v2"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"kuasar.io/kuasar/sandboxer/container"
)

// TestISuladOrder makes the calls that iSulad makes of a container that it has announced, on one
// connection, with version 2 of the API, no deadlines and no metadata.
func TestISuladOrder(t *testing.T) {
	p := newPodOf(t, true)
	p.guest.AnswerStats(func(string) (*task.StatsResponse, error) {
		a := &anypb.Any{}
		err := a.MarshalFrom(&cgroup2.Metrics{Pids: &cgroup2.PidsStat{Current: 3}})
		return &task.StatsResponse{Stats: a}, err
	})
	ctx := context.Background()
	client := task2.NewTTRPCTaskClient(p.dial())
	logFile := filepath.Join(t.TempDir(), "console.log")
	shutdown, err := proto.Marshal(&task2.ShutdownRequest{ID: "c"})
	if err != nil {
		t.Fatal(err)
	}
	create := &task2.CreateTaskRequest{ID: "c", Bundle: "/var/lib/isulad/engines/io.containerd.vmm.v1/c"}
	if _, err := client.Create(ctx, create); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("Create of what was not announced: %v", err)
	}
	announce := func(args ...string) {
		t.Helper()
		spec, err := json.Marshal(specs.Spec{
			Process: &specs.Process{Args: args}, Root: &specs.Root{Path: "/host/merged"}, Linux: &specs.Linux{},
			Annotations: map[string]string{"log.console.driver": "json-file", "log.console.file": logFile},
		})
		if err == nil {
			err = p.set.AnnounceContainer(ctx, container.CreateRequest{ID: "c", Spec: spec, Rootfs: []container.Mount{{Type: "bind", Source: t.TempDir()}}})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	announce("echo", "hello")
	must[*task2.CreateTaskResponse](t)(client.Create(ctx, create))
	if isLast(p.set, "Shutdown", shutdown) {
		t.Error("a connection whose container lives would be closed")
	}
	if a := must[*task2.StartResponse](t)(client.Start(ctx, &task2.StartRequest{ID: "c"})); a.Pid == 0 {
		t.Error("Start told no process id")
	}
	if a := must[*task2.WaitResponse](t)(client.Wait(ctx, &task2.WaitRequest{ID: "c"})); a.ExitStatus != 0 {
		t.Errorf("exit status %d", a.ExitStatus)
	}
	if _, err := client.Kill(ctx, &task2.KillRequest{ID: "c"}); err == nil {
		t.Error("signal 0 finds a process that has ended")
	}
	if a := must[*task2.PidsResponse](t)(client.Pids(ctx, &task2.PidsRequest{ID: "c"})); len(a.Processes) == 0 || a.Processes[0].Pid == 0 {
		t.Error("Pids told none, which kills the client")
	}
	must[*task2.DeleteResponse](t)(client.Delete(ctx, &task2.DeleteRequest{ID: "c"}))
	if _, err := client.Shutdown(ctx, &task2.ShutdownRequest{ID: "c"}); err != nil {
		t.Error(err)
	}
	if !isLast(p.set, "Shutdown", shutdown) || isLast(p.set, "Delete", shutdown) || isLast(newPodOf(t, false).set, "Shutdown", shutdown) {
		t.Error("Shutdown, and only that, and only of a client that announces, is the last call")
	}
	if text, err := os.ReadFile(logFile); err != nil || !strings.Contains(string(text), `"log":"hello\n"`) {
		t.Errorf("the log has %q, %v", text, err)
	}

	announce("sleep") // of the same name
	must[*task2.CreateTaskResponse](t)(client.Create(ctx, create))
	must[*task2.StartResponse](t)(client.Start(ctx, &task2.StartRequest{ID: "c"}))
	if _, err := client.Kill(ctx, &task2.KillRequest{ID: "c"}); err != nil {
		t.Errorf("signal 0 to a live process: %v", err)
	}
	a := must[*task2.StatsResponse](t)(client.Stats(ctx, &task2.StatsRequest{ID: "c"}))
	var m cgroup1.Metrics
	if err := proto.Unmarshal(a.Stats.Value, &m); err != nil || a.Stats.TypeUrl != "io.containerd.cgroups.v1.Metrics" || m.GetPids().GetCurrent() != 3 {
		t.Errorf("statistics are %v of type %q, %v", &m, a.Stats.TypeUrl, err)
	}
	for n := range 3 {
		id := fmt.Sprintf("e%d", n)
		if err := p.set.AnnounceProcess(ctx, container.ExecRequest{ID: "c", ExecID: id}); err != nil {
			t.Fatal(err)
		}
		_, err := client.Exec(ctx, &task2.ExecProcessRequest{ID: "c", ExecID: id, Spec: process(t, "false")})
		if err != nil {
			t.Fatal(err)
		}
		must[*task2.StartResponse](t)(client.Start(ctx, &task2.StartRequest{ID: "c", ExecID: id}))
		if a := must[*task2.WaitResponse](t)(client.Wait(ctx, &task2.WaitRequest{ID: "c", ExecID: id})); a.ExitStatus != 1 {
			t.Errorf("exit status %d", a.ExitStatus)
		}
		if err := p.set.Withdraw(ctx, "c", id); err != nil {
			t.Fatal(err)
		}
		if _, err := client.State(ctx, &task2.StateRequest{ID: "c", ExecID: id}); status.Code(err) != codes.NotFound {
			t.Errorf("an exec that is over: %v", err)
		}
	}
	if a := must[*task2.StateResponse](t)(client.State(ctx, &task2.StateRequest{ID: "c"})); a.Status != tasktypes.Status_RUNNING {
		t.Errorf("the state is %v", a.Status)
	}
	if err := p.set.Withdraw(ctx, "c", ""); err != nil {
		t.Fatal(err)
	}
	if p.set.Len() != 0 || p.guest.Known("c") {
		t.Error("something is left of a withdrawn container")
	}
}
