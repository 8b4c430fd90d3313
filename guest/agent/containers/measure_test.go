package containers

import (
	"context"
	"encoding/json"
	"os"
	"testing"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

func writeFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func update(t *testing.T, g *guest, id string, r *specs.LinuxResources) {
	t.Helper()
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	_, err = g.s.Update(context.Background(), &taskapi.UpdateTaskRequest{ID: id, Resources: &anypb.Any{
		TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources", Value: b,
	}})
	if err != nil {
		t.Fatal(err)
	}
}

// metrics returns the container's stats of whichever version this machine has.
func metrics(t *testing.T, g *guest, id string) (*cgroup1.Metrics, *cgroup2.Metrics) {
	t.Helper()
	r, err := g.s.Stats(context.Background(), &taskapi.StatsRequest{ID: id})
	if err != nil {
		t.Fatal(err)
	}
	var one cgroup1.Metrics
	var two cgroup2.Metrics
	switch r.Stats.TypeUrl {
	case "io.containerd.cgroups.v1.Metrics":
		if err := proto.Unmarshal(r.Stats.Value, &one); err != nil {
			t.Fatal(err)
		}
		return &one, nil
	case "io.containerd.cgroups.v2.Metrics":
		if err := proto.Unmarshal(r.Stats.Value, &two); err != nil {
			t.Fatal(err)
		}
		return nil, &two
	}
	t.Fatalf("type %q", r.Stats.TypeUrl)
	return nil, nil
}

func memoryLimit(t *testing.T, g *guest, id string) uint64 {
	t.Helper()
	one, two := metrics(t, g, id)
	if one != nil {
		return one.Memory.Usage.Limit
	}
	return two.Memory.UsageLimit
}

func oomKills(t *testing.T, g *guest, id string) uint64 {
	t.Helper()
	one, two := metrics(t, g, id)
	if one != nil {
		return one.MemoryOomControl.OomKill
	}
	return two.MemoryEvents.OomKill
}
