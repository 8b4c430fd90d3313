package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// Metrics reads what the leaf's processes use: a *stats.Metrics of containerd/cgroups' cgroup2 or
// cgroup1, as the host has it. What the host does not count is left out. Its error wraps
// fs.ErrNotExist when the leaf is gone.
func (g *Group) Metrics() (proto.Message, error) {
	if _, err := os.Stat(g.dir(g.host.roots()[0])); err != nil {
		return nil, fmt.Errorf("cannot read the metrics of the cgroup %s: %w", g.path, err)
	}
	r := readers.Get().(*reader)
	defer readers.Put(r)
	r.err = nil
	var m proto.Message
	if g.host.v2 != "" {
		m = g.metrics2(r)
	} else {
		m = g.metrics1(r)
	}
	if r.err != nil {
		return nil, fmt.Errorf("cannot read the metrics of the cgroup %s: %w", g.path, r.err)
	}
	return m, nil
}

func (g *Group) metrics1(r *reader) *cgroup1.Metrics {
	m := &cgroup1.Metrics{}
	in := func(controller string) string {
		if root := g.host.v1[controller]; root != "" {
			return g.dir(root)
		}
		return ""
	}
	if dir := in("cpuacct"); dir != "" {
		u := &cgroup1.CPUUsage{Total: r.number(dir, "cpuacct.usage")}
		const nsPerTick = 1e9 / 100 // USER_HZ is 100 on all that Go runs on
		r.each(dir, "cpuacct.stat", func(key string, v uint64) {
			switch key {
			case "user":
				u.User = v * nsPerTick
			case "system":
				u.Kernel = v * nsPerTick
			}
		})
		m.CPU = &cgroup1.CPUStat{Usage: u}
	}
	if dir := in("cpu"); dir != "" {
		t := &cgroup1.Throttle{}
		r.each(dir, "cpu.stat", func(key string, v uint64) {
			switch key {
			case "nr_periods":
				t.Periods = v
			case "nr_throttled":
				t.ThrottledPeriods = v
			case "throttled_time":
				t.ThrottledTime = v
			}
		})
		if m.CPU == nil {
			m.CPU = &cgroup1.CPUStat{Usage: &cgroup1.CPUUsage{}}
		}
		m.CPU.Throttling = t
	}
	if dir := in("memory"); dir != "" {
		m.Memory = memory1(r, dir)
		m.MemoryOomControl = &cgroup1.MemoryOomControl{}
		r.each(dir, "memory.oom_control", func(key string, v uint64) {
			switch key {
			case "oom_kill_disable":
				m.MemoryOomControl.OomKillDisable = v
			case "under_oom":
				m.MemoryOomControl.UnderOom = v
			case "oom_kill":
				m.MemoryOomControl.OomKill = v
			}
		})
	}
	if dir := in("pids"); dir != "" {
		m.Pids = &cgroup1.PidsStat{Current: r.number(dir, "pids.current"), Limit: r.limit(dir, "pids.max", 0)}
	}
	if dir := in("blkio"); dir != "" {
		m.Blkio = &cgroup1.BlkIOStat{
			IoServiceBytesRecursive: r.blkio(dir, "blkio.throttle.io_service_bytes_recursive"),
			IoServicedRecursive:     r.blkio(dir, "blkio.throttle.io_serviced_recursive"),
		}
	}
	return m
}

func memory1(r *reader, dir string) *cgroup1.MemoryStat {
	s := &cgroup1.MemoryStat{
		Usage: &cgroup1.MemoryEntry{
			Usage:   r.number(dir, "memory.usage_in_bytes"),
			Limit:   r.number(dir, "memory.limit_in_bytes"),
			Max:     r.number(dir, "memory.max_usage_in_bytes"),
			Failcnt: r.number(dir, "memory.failcnt"),
		},
		// Memory with swap, where the kernel counts swap.
		Swap: &cgroup1.MemoryEntry{
			Usage: r.number(dir, "memory.memsw.usage_in_bytes"),
			Limit: r.number(dir, "memory.memsw.limit_in_bytes"),
		},
	}
	fields := map[string]*uint64{
		"cache": &s.Cache, "rss": &s.RSS, "rss_huge": &s.RSSHuge, "mapped_file": &s.MappedFile,
		"dirty": &s.Dirty, "writeback": &s.Writeback, "pgpgin": &s.PgPgIn, "pgpgout": &s.PgPgOut,
		"pgfault": &s.PgFault, "pgmajfault": &s.PgMajFault,
		"inactive_anon": &s.InactiveAnon, "active_anon": &s.ActiveAnon,
		"inactive_file": &s.InactiveFile, "active_file": &s.ActiveFile, "unevictable": &s.Unevictable,
		"hierarchical_memory_limit": &s.HierarchicalMemoryLimit, "hierarchical_memsw_limit": &s.HierarchicalSwapLimit,
		"total_cache": &s.TotalCache, "total_rss": &s.TotalRSS, "total_rss_huge": &s.TotalRSSHuge,
		"total_mapped_file": &s.TotalMappedFile, "total_dirty": &s.TotalDirty, "total_writeback": &s.TotalWriteback,
		"total_pgpgin": &s.TotalPgPgIn, "total_pgpgout": &s.TotalPgPgOut,
		"total_pgfault": &s.TotalPgFault, "total_pgmajfault": &s.TotalPgMajFault,
		"total_inactive_anon": &s.TotalInactiveAnon, "total_active_anon": &s.TotalActiveAnon,
		"total_inactive_file": &s.TotalInactiveFile, "total_active_file": &s.TotalActiveFile,
		"total_unevictable": &s.TotalUnevictable,
	}
	r.into(dir, "memory.stat", fields)
	return s
}

func (g *Group) metrics2(r *reader) *cgroup2.Metrics {
	dir := g.dir(g.host.v2)
	cpu, events := &cgroup2.CPUStat{}, &cgroup2.MemoryEvents{}
	mem := &cgroup2.MemoryStat{
		Usage:      r.number(dir, "memory.current"),
		UsageLimit: r.limit(dir, "memory.max", math.MaxUint64),
		MaxUsage:   r.number(dir, "memory.peak"),
		SwapUsage:  r.number(dir, "memory.swap.current"),
		SwapLimit:  r.limit(dir, "memory.swap.max", math.MaxUint64),
	}
	r.into(dir, "cpu.stat", map[string]*uint64{
		"usage_usec": &cpu.UsageUsec, "user_usec": &cpu.UserUsec, "system_usec": &cpu.SystemUsec,
		"nr_periods": &cpu.NrPeriods, "nr_throttled": &cpu.NrThrottled, "throttled_usec": &cpu.ThrottledUsec,
		"nr_bursts": &cpu.NrBursts, "burst_usec": &cpu.BurstUsec,
	})
	r.into(dir, "memory.stat", map[string]*uint64{
		"anon": &mem.Anon, "file": &mem.File, "kernel_stack": &mem.KernelStack, "slab": &mem.Slab, "sock": &mem.Sock,
		"shmem": &mem.Shmem, "file_mapped": &mem.FileMapped, "file_dirty": &mem.FileDirty,
		"file_writeback": &mem.FileWriteback, "anon_thp": &mem.AnonThp,
		"inactive_anon": &mem.InactiveAnon, "active_anon": &mem.ActiveAnon,
		"inactive_file": &mem.InactiveFile, "active_file": &mem.ActiveFile, "unevictable": &mem.Unevictable,
		"slab_reclaimable": &mem.SlabReclaimable, "slab_unreclaimable": &mem.SlabUnreclaimable,
		"pgfault": &mem.Pgfault, "pgmajfault": &mem.Pgmajfault,
		"pgrefill": &mem.Pgrefill, "pgscan": &mem.Pgscan, "pgsteal": &mem.Pgsteal,
		"pgactivate": &mem.Pgactivate, "pgdeactivate": &mem.Pgdeactivate,
		"thp_fault_alloc": &mem.ThpFaultAlloc, "thp_collapse_alloc": &mem.ThpCollapseAlloc,
	})
	r.into(dir, "memory.events", map[string]*uint64{
		"low": &events.Low, "high": &events.High, "max": &events.Max, "oom": &events.Oom,
		"oom_kill": &events.OomKill, "oom_group_kill": &events.OomGroupKill,
	})
	return &cgroup2.Metrics{
		Pids:         &cgroup2.PidsStat{Current: r.number(dir, "pids.current"), Limit: r.limit(dir, "pids.max", 0)},
		CPU:          cpu,
		Memory:       mem,
		MemoryEvents: events,
		Io:           &cgroup2.IOStat{Usage: r.io(dir)},
	}
}

// reader reads the files of one leaf into one buffer. A file that the kernel does not have reads
// as empty; the first other error is kept.
type reader struct {
	buf [8192]byte
	err error
}

// readers are shared by all pods, each of which is read once a second.
var readers = sync.Pool{New: func() any { return &reader{} }}

// text is valid until the next call. It is read with bare system calls: the runtime's poller has
// no use for these files.
func (r *reader) text(dir, name string) []byte {
	fd, err := unix.Open(filepath.Join(dir, name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		defer unix.Close(fd)
		n := 0
		for n < len(r.buf) {
			var k int
			k, err = unix.Read(fd, r.buf[n:])
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if k <= 0 {
				break
			}
			n += k
		}
		if err == nil {
			return bytes.TrimSpace(r.buf[:n])
		}
	}
	// A controller may not count swap, for example, and a leaf that goes away takes its files.
	if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENODEV) && r.err == nil {
		r.err = &fs.PathError{Op: "read", Path: filepath.Join(dir, name), Err: err}
	}
	return nil
}

func (r *reader) number(dir, name string) uint64 { return r.limit(dir, name, 0) }

// limit reads a number, or the word max.
func (r *reader) limit(dir, name string, whenMax uint64) uint64 {
	text := r.text(dir, name)
	if string(text) == "max" {
		return whenMax
	}
	n, _ := strconv.ParseUint(string(text), 10, 64)
	return n
}

// each calls do for every line of the form "key number".
func (r *reader) each(dir, name string, do func(key string, v uint64)) {
	for line := range bytes.Lines(r.text(dir, name)) {
		key, value, ok := bytes.Cut(bytes.TrimSpace(line), []byte(" "))
		if !ok {
			continue
		}
		if v, err := strconv.ParseUint(string(value), 10, 64); err == nil {
			do(string(key), v)
		}
	}
}

func (r *reader) into(dir, name string, fields map[string]*uint64) {
	r.each(dir, name, func(key string, v uint64) {
		if p := fields[key]; p != nil {
			*p = v
		}
	})
}

// io reads io.stat, whose lines are "major:minor rbytes=1 wbytes=2 rios=3 wios=4 ...".
func (r *reader) io(dir string) []*cgroup2.IOEntry {
	var entries []*cgroup2.IOEntry
	for line := range strings.Lines(string(r.text(dir, "io.stat"))) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		e := &cgroup2.IOEntry{}
		if !device(fields[0], &e.Major, &e.Minor) {
			continue
		}
		for _, f := range fields[1:] {
			key, value, _ := strings.Cut(f, "=")
			v, err := strconv.ParseUint(value, 10, 64)
			if err != nil {
				continue
			}
			switch key {
			case "rbytes":
				e.Rbytes = v
			case "wbytes":
				e.Wbytes = v
			case "rios":
				e.Rios = v
			case "wios":
				e.Wios = v
			}
		}
		entries = append(entries, e)
	}
	return entries
}

// blkio reads a file whose lines are "major:minor operation number".
func (r *reader) blkio(dir, name string) []*cgroup1.BlkIOEntry {
	var entries []*cgroup1.BlkIOEntry
	for line := range strings.Lines(string(r.text(dir, name))) {
		fields := strings.Fields(line)
		if len(fields) != 3 {
			continue // the last line is the total
		}
		e := &cgroup1.BlkIOEntry{Op: fields[1]}
		v, err := strconv.ParseUint(fields[2], 10, 64)
		if err != nil || !device(fields[0], &e.Major, &e.Minor) {
			continue
		}
		e.Value = v
		entries = append(entries, e)
	}
	return entries
}

func device(s string, major, minor *uint64) bool {
	a, b, ok := strings.Cut(s, ":")
	x, err1 := strconv.ParseUint(a, 10, 32)
	y, err2 := strconv.ParseUint(b, 10, 32)
	*major, *minor = x, y
	return ok && err1 == nil && err2 == nil
}
