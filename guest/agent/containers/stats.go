package containers

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/opencontainers/cgroups"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// stats measures the container by its cgroup.
func (c *container) stats() (*anypb.Any, error) {
	lc, err := c.library()
	if err != nil {
		return nil, fmt.Errorf("cannot measure: %w", err)
	}
	measured, err := lc.Stats()
	if err != nil {
		return nil, fmt.Errorf("cannot measure container %s: %w", c.id, err)
	}
	c.mu.Lock()
	cgroup := c.cgroup
	c.mu.Unlock()
	if cgroup.unified {
		events, _ := os.ReadFile(filepath.Join(cgroup.dir, "memory.events"))
		if c.direct {
			return anyOf(legacyMetrics(legacyStats(measured.CgroupStats), events))
		}
		return anyOf(unifiedMetrics(measured.CgroupStats, events))
	}
	control, _ := os.ReadFile(filepath.Join(cgroup.dir, "memory.oom_control"))
	return anyOf(legacyMetrics(measured.CgroupStats, control))
}

// anyOf packs m as containerd does: with its bare name as type URL.
func anyOf(m proto.Message) (*anypb.Any, error) {
	value, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("cannot encode %T: %w", m, err)
	}
	return &anypb.Any{TypeUrl: string(m.ProtoReflect().Descriptor().FullName()), Value: value}, nil
}

// unifiedMetrics converts what was measured with cgroup v2. events is the file memory.events.
func unifiedMetrics(s *cgroups.Stats, events []byte) *cgroup2.Metrics {
	cpu, memory := s.CpuStats, s.MemoryStats
	metrics := &cgroup2.Metrics{
		Pids: &cgroup2.PidsStat{Current: s.PidsStats.Current, Limit: s.PidsStats.Limit},
		CPU: &cgroup2.CPUStat{
			UsageUsec:     cpu.CpuUsage.TotalUsage / 1000,
			UserUsec:      cpu.CpuUsage.UsageInUsermode / 1000,
			SystemUsec:    cpu.CpuUsage.UsageInKernelmode / 1000,
			NrPeriods:     cpu.ThrottlingData.Periods,
			NrThrottled:   cpu.ThrottlingData.ThrottledPeriods,
			ThrottledUsec: cpu.ThrottlingData.ThrottledTime / 1000,
			NrBursts:      cpu.BurstData.BurstsPeriods,
			BurstUsec:     cpu.BurstData.BurstTime / 1000,
			PSI:           pressure(cpu.PSI),
		},
		Memory: &cgroup2.MemoryStat{
			Anon:                  memory.Stats["anon"],
			File:                  memory.Stats["file"],
			KernelStack:           memory.Stats["kernel_stack"],
			Slab:                  memory.Stats["slab"],
			Sock:                  memory.Stats["sock"],
			Shmem:                 memory.Stats["shmem"],
			FileMapped:            memory.Stats["file_mapped"],
			FileDirty:             memory.Stats["file_dirty"],
			FileWriteback:         memory.Stats["file_writeback"],
			AnonThp:               memory.Stats["anon_thp"],
			InactiveAnon:          memory.Stats["inactive_anon"],
			ActiveAnon:            memory.Stats["active_anon"],
			InactiveFile:          memory.Stats["inactive_file"],
			ActiveFile:            memory.Stats["active_file"],
			Unevictable:           memory.Stats["unevictable"],
			SlabReclaimable:       memory.Stats["slab_reclaimable"],
			SlabUnreclaimable:     memory.Stats["slab_unreclaimable"],
			Pgfault:               memory.Stats["pgfault"],
			Pgmajfault:            memory.Stats["pgmajfault"],
			WorkingsetRefault:     memory.Stats["workingset_refault_anon"] + memory.Stats["workingset_refault_file"],
			WorkingsetActivate:    memory.Stats["workingset_activate_anon"] + memory.Stats["workingset_activate_file"],
			WorkingsetNodereclaim: memory.Stats["workingset_nodereclaim"],
			Pgrefill:              memory.Stats["pgrefill"],
			Pgscan:                memory.Stats["pgscan"],
			Pgsteal:               memory.Stats["pgsteal"],
			Pgactivate:            memory.Stats["pgactivate"],
			Pgdeactivate:          memory.Stats["pgdeactivate"],
			Pglazyfree:            memory.Stats["pglazyfree"],
			Pglazyfreed:           memory.Stats["pglazyfreed"],
			ThpFaultAlloc:         memory.Stats["thp_fault_alloc"],
			ThpCollapseAlloc:      memory.Stats["thp_collapse_alloc"],
			Usage:                 memory.Usage.Usage,
			UsageLimit:            memory.Usage.Limit,
			MaxUsage:              memory.Usage.MaxUsage,
			SwapUsage:             memory.SwapOnlyUsage.Usage,
			SwapLimit:             memory.SwapOnlyUsage.Limit,
			SwapMaxUsage:          memory.SwapOnlyUsage.MaxUsage,
			PSI:                   pressure(memory.PSI),
		},
		MemoryEvents: &cgroup2.MemoryEvents{
			Low:          valueOf(events, "low"),
			High:         valueOf(events, "high"),
			Max:          valueOf(events, "max"),
			Oom:          valueOf(events, "oom"),
			OomKill:      valueOf(events, "oom_kill"),
			OomGroupKill: valueOf(events, "oom_group_kill"),
		},
		Io: &cgroup2.IOStat{Usage: ioEntries(s.BlkioStats), PSI: pressure(s.BlkioStats.PSI)},
	}
	for _, size := range slices.Sorted(maps.Keys(s.HugetlbStats)) {
		h := s.HugetlbStats[size]
		metrics.Hugetlb = append(metrics.Hugetlb, &cgroup2.HugeTlbStat{
			Current: h.Usage, Max: h.MaxUsage, Failcnt: h.Failcnt, Pagesize: size,
		})
	}
	return metrics
}

func pressure(p *cgroups.PSIStats) *cgroup2.PSIStats {
	if p == nil {
		return nil
	}
	data := func(d cgroups.PSIData) *cgroup2.PSIData {
		return &cgroup2.PSIData{Avg10: d.Avg10, Avg60: d.Avg60, Avg300: d.Avg300, Total: d.Total}
	}
	return &cgroup2.PSIStats{Some: data(p.Some), Full: data(p.Full)}
}

// ioEntries gathers the figures of each disk.
func ioEntries(s cgroups.BlkioStats) []*cgroup2.IOEntry {
	disks := map[[2]uint64]*cgroup2.IOEntry{}
	disk := func(e cgroups.BlkioStatEntry) *cgroup2.IOEntry {
		key := [2]uint64{e.Major, e.Minor}
		if disks[key] == nil {
			disks[key] = &cgroup2.IOEntry{Major: e.Major, Minor: e.Minor}
		}
		return disks[key]
	}
	for _, e := range s.IoServiceBytesRecursive {
		switch strings.ToLower(e.Op) {
		case "read":
			disk(e).Rbytes = e.Value
		case "write":
			disk(e).Wbytes = e.Value
		}
	}
	for _, e := range s.IoServicedRecursive {
		switch strings.ToLower(e.Op) {
		case "read":
			disk(e).Rios = e.Value
		case "write":
			disk(e).Wios = e.Value
		}
	}
	return slices.SortedFunc(maps.Values(disks), func(a, b *cgroup2.IOEntry) int {
		return cmp.Or(cmp.Compare(a.Major, b.Major), cmp.Compare(a.Minor, b.Minor))
	})
}

// legacyMetrics converts what was measured with cgroup v1. control is memory.oom_control.
func legacyMetrics(s *cgroups.Stats, control []byte) *cgroup1.Metrics {
	cpu, memory := s.CpuStats, s.MemoryStats
	entry := func(d cgroups.MemoryData) *cgroup1.MemoryEntry {
		return &cgroup1.MemoryEntry{Limit: d.Limit, Usage: d.Usage, Max: d.MaxUsage, Failcnt: d.Failcnt}
	}
	metrics := &cgroup1.Metrics{
		Pids: &cgroup1.PidsStat{Current: s.PidsStats.Current, Limit: s.PidsStats.Limit},
		CPU: &cgroup1.CPUStat{
			Usage: &cgroup1.CPUUsage{
				Total:  cpu.CpuUsage.TotalUsage,
				Kernel: cpu.CpuUsage.UsageInKernelmode,
				User:   cpu.CpuUsage.UsageInUsermode,
				PerCPU: cpu.CpuUsage.PercpuUsage,
			},
			Throttling: &cgroup1.Throttle{
				Periods:          cpu.ThrottlingData.Periods,
				ThrottledPeriods: cpu.ThrottlingData.ThrottledPeriods,
				ThrottledTime:    cpu.ThrottlingData.ThrottledTime,
			},
		},
		Memory: &cgroup1.MemoryStat{
			Cache:                   memory.Stats["cache"],
			RSS:                     memory.Stats["rss"],
			RSSHuge:                 memory.Stats["rss_huge"],
			MappedFile:              memory.Stats["mapped_file"],
			Dirty:                   memory.Stats["dirty"],
			Writeback:               memory.Stats["writeback"],
			PgPgIn:                  memory.Stats["pgpgin"],
			PgPgOut:                 memory.Stats["pgpgout"],
			PgFault:                 memory.Stats["pgfault"],
			PgMajFault:              memory.Stats["pgmajfault"],
			InactiveAnon:            memory.Stats["inactive_anon"],
			ActiveAnon:              memory.Stats["active_anon"],
			InactiveFile:            memory.Stats["inactive_file"],
			ActiveFile:              memory.Stats["active_file"],
			Unevictable:             memory.Stats["unevictable"],
			HierarchicalMemoryLimit: memory.Stats["hierarchical_memory_limit"],
			HierarchicalSwapLimit:   memory.Stats["hierarchical_memsw_limit"],
			TotalCache:              memory.Stats["total_cache"],
			TotalRSS:                memory.Stats["total_rss"],
			TotalRSSHuge:            memory.Stats["total_rss_huge"],
			TotalMappedFile:         memory.Stats["total_mapped_file"],
			TotalDirty:              memory.Stats["total_dirty"],
			TotalWriteback:          memory.Stats["total_writeback"],
			TotalPgPgIn:             memory.Stats["total_pgpgin"],
			TotalPgPgOut:            memory.Stats["total_pgpgout"],
			TotalPgFault:            memory.Stats["total_pgfault"],
			TotalPgMajFault:         memory.Stats["total_pgmajfault"],
			TotalInactiveAnon:       memory.Stats["total_inactive_anon"],
			TotalActiveAnon:         memory.Stats["total_active_anon"],
			TotalInactiveFile:       memory.Stats["total_inactive_file"],
			TotalActiveFile:         memory.Stats["total_active_file"],
			TotalUnevictable:        memory.Stats["total_unevictable"],
			Usage:                   entry(memory.Usage),
			Swap:                    entry(memory.SwapUsage),
			Kernel:                  entry(memory.KernelUsage),
			KernelTCP:               entry(memory.KernelTCPUsage),
		},
		MemoryOomControl: &cgroup1.MemoryOomControl{
			OomKillDisable: valueOf(control, "oom_kill_disable"),
			UnderOom:       valueOf(control, "under_oom"),
			OomKill:        valueOf(control, "oom_kill"),
		},
		Blkio: &cgroup1.BlkIOStat{
			IoServiceBytesRecursive: blkioEntries(s.BlkioStats.IoServiceBytesRecursive),
			IoServicedRecursive:     blkioEntries(s.BlkioStats.IoServicedRecursive),
			IoQueuedRecursive:       blkioEntries(s.BlkioStats.IoQueuedRecursive),
			IoServiceTimeRecursive:  blkioEntries(s.BlkioStats.IoServiceTimeRecursive),
			IoWaitTimeRecursive:     blkioEntries(s.BlkioStats.IoWaitTimeRecursive),
			IoMergedRecursive:       blkioEntries(s.BlkioStats.IoMergedRecursive),
			IoTimeRecursive:         blkioEntries(s.BlkioStats.IoTimeRecursive),
			SectorsRecursive:        blkioEntries(s.BlkioStats.SectorsRecursive),
		},
	}
	for _, size := range slices.Sorted(maps.Keys(s.HugetlbStats)) {
		h := s.HugetlbStats[size]
		metrics.Hugetlb = append(metrics.Hugetlb, &cgroup1.HugetlbStat{
			Usage: h.Usage, Max: h.MaxUsage, Failcnt: h.Failcnt, Pagesize: size,
		})
	}
	return metrics
}

// legacyStats renames what was measured with cgroup v2 as v1 has it, for clients that know nothing else.
// v2 only knows sums over the children, which containers do not have unless they make them.
func legacyStats(s *cgroups.Stats) *cgroups.Stats {
	legacy := *s
	unified := s.MemoryStats.Stats
	renamed := map[string]uint64{
		"hierarchical_memory_limit": s.MemoryStats.Usage.Limit,
	}
	for name, from := range map[string]string{
		"cache": "file", "rss": "anon", "rss_huge": "anon_thp", "mapped_file": "file_mapped",
		"dirty": "file_dirty", "writeback": "file_writeback", "pgfault": "pgfault", "pgmajfault": "pgmajfault",
		"inactive_anon": "inactive_anon", "active_anon": "active_anon",
		"inactive_file": "inactive_file", "active_file": "active_file", "unevictable": "unevictable",
	} {
		renamed[name] = unified[from]
		renamed["total_"+name] = unified[from]
	}
	legacy.MemoryStats.Stats = renamed
	// The library adds two limits, of which one may be none.
	legacy.MemoryStats.SwapUsage.Limit = max(s.MemoryStats.SwapUsage.Limit, s.MemoryStats.Usage.Limit)
	// Kernels before 5.18 tell only parts of it. There is no limit of its own.
	kernel, ok := unified["kernel"]
	if !ok {
		kernel = unified["kernel_stack"] + unified["slab"] + unified["percpu"] + unified["pagetables"]
	}
	legacy.MemoryStats.KernelUsage = cgroups.MemoryData{Usage: kernel, Limit: math.MaxUint64}
	return &legacy
}

// blkioEntries converts the figures of disks. Sums are left out and the operations are in lower
// case, because there are readers that take everything that is not "read" for writes.
func blkioEntries(entries []cgroups.BlkioStatEntry) []*cgroup1.BlkIOEntry {
	var out []*cgroup1.BlkIOEntry
	for _, e := range entries {
		op := strings.ToLower(e.Op)
		switch op {
		case "total", "sync", "async":
			continue
		}
		out = append(out, &cgroup1.BlkIOEntry{Op: op, Major: e.Major, Minor: e.Minor, Value: e.Value})
	}
	return out
}
