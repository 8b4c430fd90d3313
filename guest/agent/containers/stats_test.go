package containers

import (
	"fmt"
	"math"
	"strings"
	"testing"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/opencontainers/cgroups"
	"google.golang.org/protobuf/proto"
)

func sample() *cgroups.Stats {
	s := cgroups.NewStats()
	s.CpuStats.CpuUsage = cgroups.CpuUsage{TotalUsage: 3_000_000, UsageInUsermode: 2_000_000, UsageInKernelmode: 1_000_000}
	s.CpuStats.PSI = &cgroups.PSIStats{Some: cgroups.PSIData{Avg10: 1.5, Total: 9}}
	s.MemoryStats.Usage = cgroups.MemoryData{Usage: 10, Limit: 100, MaxUsage: 50, Failcnt: 2}
	s.MemoryStats.Stats["anon"] = 7
	s.MemoryStats.Stats["total_rss"] = 8
	s.MemoryStats.Stats["total_inactive_file"] = 9
	s.PidsStats = cgroups.PidsStats{Current: 4, Limit: 5}
	s.BlkioStats.IoServiceBytesRecursive = []cgroups.BlkioStatEntry{
		{Major: 253, Minor: 16, Op: "Read", Value: 1}, {Major: 253, Minor: 0, Op: "Write", Value: 2},
		{Major: 253, Minor: 0, Op: "Total", Value: 2}, {Major: 253, Minor: 0, Op: "Sync", Value: 2},
	}
	s.BlkioStats.IoServicedRecursive = []cgroups.BlkioStatEntry{{Major: 253, Minor: 16, Op: "Read", Value: 3}}
	s.HugetlbStats["2MB"] = cgroups.HugetlbStats{Usage: 1, Failcnt: 6}
	return s
}

func TestUnifiedMetrics(t *testing.T) {
	packed, err := anyOf(unifiedMetrics(sample(), []byte("low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 5\n")))
	if err != nil {
		t.Fatal(err)
	}
	var m cgroup2.Metrics
	if packed.TypeUrl != "io.containerd.cgroups.v2.Metrics" {
		t.Errorf("type %q", packed.TypeUrl)
	}
	if err := proto.Unmarshal(packed.Value, &m); err != nil {
		t.Fatal(err)
	}
	if m.CPU.UsageUsec != 3000 || m.CPU.UserUsec != 2000 || m.CPU.SystemUsec != 1000 || m.CPU.PSI.Some.Avg10 != 1.5 ||
		m.Memory.Anon != 7 || m.Memory.Usage != 10 || m.Memory.UsageLimit != 100 || m.Memory.MaxUsage != 50 || m.Pids.Current != 4 ||
		m.MemoryEvents.High != 1 || m.MemoryEvents.Oom != 3 || m.MemoryEvents.OomKill != 4 || m.Hugetlb[0].Pagesize != "2MB" {
		t.Errorf("%v", &m)
	}
	if got := fmt.Sprint(m.Io.Usage[0].Minor, m.Io.Usage[0].Wbytes, m.Io.Usage[1].Minor, m.Io.Usage[1].Rbytes, m.Io.Usage[1].Rios); got != "0 2 16 1 3" {
		t.Errorf("disks: %s", got)
	}
}

func TestLegacyMetrics(t *testing.T) {
	packed, err := anyOf(legacyMetrics(sample(), []byte("oom_kill_disable 0\nunder_oom 1\noom_kill 2\n")))
	if err != nil {
		t.Fatal(err)
	}
	var m cgroup1.Metrics
	if packed.TypeUrl != "io.containerd.cgroups.v1.Metrics" {
		t.Errorf("type %q", packed.TypeUrl)
	}
	if err := proto.Unmarshal(packed.Value, &m); err != nil {
		t.Fatal(err)
	}
	if m.CPU.Usage.Total != 3_000_000 || m.CPU.Usage.Kernel != 1_000_000 || m.Memory.TotalRSS != 8 || m.Memory.TotalInactiveFile != 9 ||
		m.Memory.Usage.Limit != 100 || m.Memory.Usage.Failcnt != 2 || m.Pids.Limit != 5 ||
		m.MemoryOomControl.UnderOom != 1 || m.MemoryOomControl.OomKill != 2 {
		t.Errorf("%v", &m)
	}
	var ops []string
	for _, e := range m.Blkio.IoServiceBytesRecursive {
		ops = append(ops, e.Op)
	}
	if got := strings.Join(ops, " "); got != "read write" {
		t.Errorf("operations %s", got)
	}
}

// What a container of cgroup v2 says to a client that knows v1 only.
func TestLegacyStats(t *testing.T) {
	s := sample()
	clear(s.MemoryStats.Stats)
	for name, value := range map[string]uint64{"anon": 1, "file": 2, "pgfault": 3, "pgmajfault": 4, "inactive_file": 5, "kernel": 6} {
		s.MemoryStats.Stats[name] = value
	}
	s.MemoryStats.SwapUsage = cgroups.MemoryData{Usage: 12, Limit: 110}
	m := legacyMetrics(legacyStats(s), []byte("oom 3\noom_kill 4\n"))
	if m.Memory.RSS != 1 || m.Memory.TotalRSS != 1 || m.Memory.Cache != 2 || m.Memory.PgFault != 3 || m.Memory.PgMajFault != 4 ||
		m.Memory.TotalInactiveFile != 5 || m.Memory.Kernel.Usage != 6 || m.Memory.Kernel.Limit != math.MaxUint64 ||
		m.Memory.Usage.Usage != 10 || m.Memory.Usage.Limit != 100 || m.Memory.Swap.Usage != 12 || m.Memory.Swap.Limit != 110 ||
		m.Memory.HierarchicalMemoryLimit != 100 || m.MemoryOomControl.OomKill != 4 ||
		m.CPU.Usage.Total != 3_000_000 || m.CPU.Usage.Kernel != 1_000_000 || m.Pids.Current != 4 {
		t.Errorf("%v", m)
	}
	// What the library makes of a limit of swap where memory has none.
	s.MemoryStats.Usage.Limit = math.MaxUint64
	s.MemoryStats.SwapUsage.Limit = 41
	if m := legacyMetrics(legacyStats(s), nil); m.Memory.Swap.Limit != math.MaxUint64 {
		t.Errorf("limit of swap %d", m.Memory.Swap.Limit)
	}
}

func TestValueOf(t *testing.T) {
	file := []byte("oom 3\noom_kill 14\n")
	for name, want := range map[string]uint64{"oom": 3, "oom_kill": 14, "kill": 0, "": 0} {
		if got := valueOf(file, name); got != want {
			t.Errorf("%s: %d", name, got)
		}
	}
}
