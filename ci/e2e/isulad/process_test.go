package isulad

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"google.golang.org/protobuf/proto"
)

func TestParseStats(t *testing.T) {
	bytes := func(m proto.Message) []byte {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	v1 := &stats.Metrics{
		Pids: &stats.PidsStat{Current: 3}, CPU: &stats.CPUStat{Usage: &stats.CPUUsage{Total: 5, Kernel: 2}},
		Memory: &stats.MemoryStat{Usage: &stats.MemoryEntry{Usage: 7, Limit: 9}, RSS: 4, TotalInactiveFile: 1},
		Blkio: &stats.BlkIOStat{IoServiceBytesRecursive: []*stats.BlkIOEntry{
			{Op: "read", Value: 10}, {Op: "Read", Value: 100}, {Op: "write", Value: 1000},
		}},
	}
	got, err := parseStats(bytes(v1))
	want := Stats{Pids: 3, CPUTotal: 5, CPUKernel: 2, MemoryUsage: 7, MemoryLimit: 9, RSS: 4, TotalInactiveFile: 1, BlockReadBytes: 10, BlockWriteBytes: 1100}
	if err != nil || got != want {
		t.Errorf("the statistics are %+v, %v, want %+v", got, err, want)
	}
	for name, bad := range map[string][]byte{
		"none": nil, "no message": []byte("\xff\xff"),
		"of cgroup v2": bytes(&cgroup2.Metrics{CPU: &cgroup2.CPUStat{UsageUsec: 5}, Memory: &cgroup2.MemoryStat{Anon: 7, Usage: 9}}),
	} {
		if got, err := parseStats(bad); err == nil {
			t.Errorf("statistics that are %s are read as %+v", name, got)
		}
	}
}

// A pod's containers end before its network goes, and that before the pod.
func TestStopPodOrder(t *testing.T) {
	for _, version := range []Version{V213, V216} {
		d, f := start(t, version)
		d.pods["p"].Teardown = func() error { f.note("teardown"); return nil }
		startContainer(t, d, "c")
		f.take()
		if err := d.StopPod("p"); err != nil {
			t.Fatal(err)
		}
		if err := d.StopPod("p"); err != nil {
			t.Fatal(err)
		}
		purge := map[Version]string{V213: "Purge", V216: "Update"}[version]
		log := slices.DeleteFunc(f.take(), func(s string) bool { return strings.HasPrefix(s, "kill") })
		if want := []string{"delete c", "shutdown c", purge, "teardown", "Stop", "Stop"}; !slices.Equal(log, want) {
			t.Errorf("version %d: the order is %q, want %q", version, log, want)
		}
	}
}

// A pod whose start fails has its network taken back, if that was set up.
func TestFailedRunTakesTheNetworkBack(t *testing.T) {
	for version, want := range map[Version]bool{V213: true, V216: false} {
		d, f := start(t, version)
		f.mu.Lock()
		f.fail["Start"] = errTest
		f.mu.Unlock()
		p := thePod(f, nil)
		p.ID, p.Teardown = "q", func() error { f.note("teardown"); return nil }
		if err := d.RunPod(p); err == nil {
			t.Fatal("a pod runs that does not start")
		}
		if got := slices.Contains(f.take(), "teardown"); got != want {
			t.Errorf("version %d: the network is taken back: %v", version, got)
		}
	}
}

func TestTerminalHasNoStderr(t *testing.T) {
	d, _ := start(t, V216)
	startContainer(t, d, "c")
	if _, err := d.Exec("c", ExecConfig{Args: []string{"x"}, Terminal: true, Stderr: new(strings.Builder)}); err == nil {
		t.Error("a process has a terminal and stderr")
	}
}

func TestResize(t *testing.T) {
	d, f := start(t, V216)
	startContainer(t, d, "c")
	sizes := make(chan Size, 1)
	sizes <- Size{Width: 80, Height: 24}
	f.mu.Lock()
	f.hang = make(chan struct{})
	f.mu.Unlock()
	done := make(chan error, 1)
	go func() {
		_, err := d.Exec("c", ExecConfig{Args: []string{"x"}, Terminal: true, Stdout: new(strings.Builder), Resize: sizes})
		done <- err
	}()
	for !slices.Contains(f.peek(), "resize 80x24") {
		select {
		case <-soon(t).Done():
			t.Fatal("the terminal is not resized")
		case <-time.After(time.Millisecond):
		}
	}
	close(f.hang)
	if err := <-done; err != nil {
		t.Error(err)
	}
}
