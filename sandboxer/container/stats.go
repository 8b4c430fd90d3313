package container

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

const (
	// statsAge is how old an answer may be. Clients ask once a second.
	statsAge = 900 * time.Millisecond
	// statsPatience is how long a client waits for the guest before it gets the last values.
	statsPatience = time.Second
	maxStats      = 256 << 10
)

// statistics of a container. Guarded by Set.mu.
type statistics struct {
	last     proto.Message // *cgroup1.Metrics or *cgroup2.Metrics; never changed once stored
	at       time.Time
	asking   chan struct{} // closed when the call under way has ended
	err      error         // of the last call
	oomKills uint64
}

// Stats returns a *cgroup1 or *cgroup2 stats.Metrics of a container, the former always if clients
// announce containers: those read nothing else. It costs the guest at most
// about one call a second, does not wait long for it, and outlives it: after the exit the last
// values stay, with the OOM kills that were seen.
func (s *Set) Stats(ctx context.Context, id string) (proto.Message, error) {
	s.mu.Lock()
	p, err := s.find(id, "")
	if err != nil {
		s.mu.Unlock()
		return nil, err
	}
	c := p.container
	var asking <-chan struct{}
	if p.status != Stopped && s.life.Err() == nil && (c.stats.last == nil || time.Since(c.stats.at) > statsAge) {
		asking = s.askStats(c)
	}
	s.mu.Unlock()

	if asking != nil {
		timer := time.NewTimer(statsPatience)
		defer timer.Stop()
		select {
		case <-asking:
		case <-timer.C:
		case <-p.exited:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	m, err := c.stats.current(c.id, p.status)
	if err == nil && s.opts.Announced {
		m = legacyStats(m)
	}
	return m, err
}

// lastStats fetches a container's statistics for the last time, after its process was killed:
// while its cgroup still exists it tells whether that was for want of memory.
func (s *Set) lastStats(c *container) {
	s.mu.Lock()
	asking := s.askStats(c)
	s.mu.Unlock()
	select {
	case <-asking:
	case <-time.After(statsPatience):
	case <-s.life.Done():
	}
}

// askStats starts a call unless one is under way. s.mu is held.
func (s *Set) askStats(c *container) <-chan struct{} {
	if c.stats.asking != nil {
		return c.stats.asking
	}
	done := make(chan struct{})
	c.stats.asking = done
	go func() {
		metrics, err := s.fetchStats(c.id)
		s.mu.Lock()
		if err == nil {
			c.stats.last = metrics
			c.stats.at = time.Now()
		}
		c.stats.err = err
		c.stats.asking = nil
		s.mu.Unlock()
		close(done)
	}()
	return done
}

func (s *Set) fetchStats(id string) (proto.Message, error) {
	ctx, cancel := s.operation(context.Background(), controlLimit)
	defer cancel()
	answer, err := s.opts.Guest.Task().Stats(ctx, &task.StatsRequest{ID: id})
	if err != nil {
		return nil, s.guestError(ctx, "get the statistics of container "+id, err)
	}
	metrics, err := decodeStats(answer.GetStats())
	if err != nil {
		return nil, s.misbehaved(fmt.Errorf("statistics of container %s: %w", id, err))
	}
	return metrics, nil
}

func decodeStats(a *anypb.Any) (proto.Message, error) {
	if a == nil {
		return nil, errors.New("there are none in the answer")
	}
	if len(a.Value) > maxStats {
		return nil, fmt.Errorf("%d bytes are more than %d", len(a.Value), maxStats)
	}
	name := a.TypeUrl[strings.LastIndexByte(a.TypeUrl, '/')+1:]
	for _, m := range []proto.Message{new(cgroup1.Metrics), new(cgroup2.Metrics)} {
		if name != string(m.ProtoReflect().Descriptor().FullName()) {
			continue
		}
		if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(a.Value, m); err != nil {
			return nil, err
		}
		return m, nil
	}
	return nil, fmt.Errorf("their type is %q", printable(a.TypeUrl))
}

// current returns the last values with the OOM kills added.
func (t *statistics) current(id string, status Status) (proto.Message, error) {
	if t.last == nil && status != Stopped {
		if t.err != nil {
			return nil, t.err
		}
		return nil, fmt.Errorf("the guest has not told the statistics of container %s yet: %w", id, errdefs.ErrUnavailable)
	}
	switch last := t.last.(type) {
	case *cgroup1.Metrics:
		m := proto.Clone(last).(*cgroup1.Metrics)
		if m.MemoryOomControl == nil {
			m.MemoryOomControl = &cgroup1.MemoryOomControl{}
		}
		m.MemoryOomControl.OomKill = max(m.MemoryOomControl.OomKill, t.oomKills)
		return m, nil
	case *cgroup2.Metrics:
		m := proto.Clone(last).(*cgroup2.Metrics)
		if m.MemoryEvents == nil {
			m.MemoryEvents = &cgroup2.MemoryEvents{}
		}
		m.MemoryEvents.OomKill = max(m.MemoryEvents.OomKill, t.oomKills)
		return m, nil
	}
	return &cgroup2.Metrics{MemoryEvents: &cgroup2.MemoryEvents{OomKill: t.oomKills}}, nil
}

// legacyStats turns statistics of cgroup v2 into those of v1 as far as they have a counterpart. There
// are readers for whom every operation on a disk that is not "read" was a write, so there are no sums.
func legacyStats(m proto.Message) proto.Message {
	v2, ok := m.(*cgroup2.Metrics)
	if !ok {
		return m
	}
	cpu, memory := v2.GetCPU(), v2.GetMemory()
	kernel := memory.GetKernelStack() + memory.GetSlab()
	v1 := &cgroup1.Metrics{
		Pids: &cgroup1.PidsStat{Current: v2.GetPids().GetCurrent(), Limit: v2.GetPids().GetLimit()},
		CPU: &cgroup1.CPUStat{
			Usage: &cgroup1.CPUUsage{
				Total: cpu.GetUsageUsec() * 1000, Kernel: cpu.GetSystemUsec() * 1000, User: cpu.GetUserUsec() * 1000,
			},
			Throttling: &cgroup1.Throttle{
				Periods: cpu.GetNrPeriods(), ThrottledPeriods: cpu.GetNrThrottled(), ThrottledTime: cpu.GetThrottledUsec() * 1000,
			},
		},
		Memory: &cgroup1.MemoryStat{
			Cache: memory.GetFile(), TotalCache: memory.GetFile(),
			RSS: memory.GetAnon(), TotalRSS: memory.GetAnon(),
			MappedFile: memory.GetFileMapped(), TotalMappedFile: memory.GetFileMapped(),
			Dirty: memory.GetFileDirty(), TotalDirty: memory.GetFileDirty(),
			Writeback: memory.GetFileWriteback(), TotalWriteback: memory.GetFileWriteback(),
			PgFault: memory.GetPgfault(), TotalPgFault: memory.GetPgfault(),
			PgMajFault: memory.GetPgmajfault(), TotalPgMajFault: memory.GetPgmajfault(),
			InactiveAnon: memory.GetInactiveAnon(), TotalInactiveAnon: memory.GetInactiveAnon(),
			ActiveAnon: memory.GetActiveAnon(), TotalActiveAnon: memory.GetActiveAnon(),
			InactiveFile: memory.GetInactiveFile(), TotalInactiveFile: memory.GetInactiveFile(),
			ActiveFile: memory.GetActiveFile(), TotalActiveFile: memory.GetActiveFile(),
			Unevictable: memory.GetUnevictable(), TotalUnevictable: memory.GetUnevictable(),
			HierarchicalMemoryLimit: memory.GetUsageLimit(),
			Usage:                   &cgroup1.MemoryEntry{Usage: memory.GetUsage(), Limit: memory.GetUsageLimit(), Max: memory.GetMaxUsage()},
			// Version 1 counts memory and swap together.
			Swap: &cgroup1.MemoryEntry{
				Usage: sum(memory.GetUsage(), memory.GetSwapUsage()), Limit: sum(memory.GetUsageLimit(), memory.GetSwapLimit()),
			},
			Kernel:    &cgroup1.MemoryEntry{Usage: kernel},
			KernelTCP: &cgroup1.MemoryEntry{Usage: memory.GetSock()},
		},
		MemoryOomControl: &cgroup1.MemoryOomControl{OomKill: v2.GetMemoryEvents().GetOomKill()},
		Blkio:            &cgroup1.BlkIOStat{},
	}
	for _, e := range v2.GetIo().GetUsage() {
		entries := func(read, write uint64) []*cgroup1.BlkIOEntry {
			return []*cgroup1.BlkIOEntry{
				{Op: "read", Major: e.GetMajor(), Minor: e.GetMinor(), Value: read},
				{Op: "write", Major: e.GetMajor(), Minor: e.GetMinor(), Value: write},
			}
		}
		b := v1.Blkio
		b.IoServiceBytesRecursive = append(b.IoServiceBytesRecursive, entries(e.GetRbytes(), e.GetWbytes())...)
		b.IoServicedRecursive = append(b.IoServicedRecursive, entries(e.GetRios(), e.GetWios())...)
	}
	return v1
}

// sum does not overflow: what has no limit has the largest.
func sum(a, b uint64) uint64 {
	if a+b < a {
		return math.MaxUint64
	}
	return a + b
}

// Update changes the resources of a container, given as OCI LinuxResources in JSON.
func (s *Set) Update(ctx context.Context, id string, resources []byte) error {
	p, err := s.lookup(id, "")
	if err != nil {
		return gone(ctx, err)
	}
	clean, err := rewriteResources(resources)
	if err != nil {
		return err
	}
	ctx, cancel := s.operation(ctx, controlLimit)
	defer cancel()
	_, err = s.opts.Guest.Task().Update(ctx, &task.UpdateTaskRequest{
		ID: id, Resources: &anypb.Any{TypeUrl: resourcesURL, Value: clean},
	})
	if err != nil {
		return gone(ctx, s.guestError(ctx, fmt.Sprintf("update %v", p), err))
	}
	return nil
}

const resourcesURL = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
