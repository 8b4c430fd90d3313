package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"kuasar.io/kuasar/ci/e2e/node"
)

// podCounts are the numbers of idle pods between which the slope is taken.
var podCounts = []int{1, 5, 10}

// memory measures what idle pods cost. Every round goes from no pod to ten and back.
func (m *measurer) memory(ctx context.Context, r *report) error {
	const rounds = 5
	samples := map[string][]float64{}
	var slopes, hypervisors, sharers, whole []float64
	for range rounds {
		var pods []string
		var counts, sizes []float64
		for _, count := range podCounts {
			for len(pods) < count {
				pod, err := m.node.CRI.RunPod(ctx, m.podConfig(), node.Handler)
				if err != nil {
					return err
				}
				pods = append(pods, pod)
			}
			size, err := m.settledPSS(ctx)
			if err != nil {
				return err
			}
			counts, sizes = append(counts, float64(count)), append(sizes, size)
			key := fmt.Sprintf("daemon KiB with %d pods", count)
			samples[key] = append(samples[key], size)
		}
		perPod := slope(counts, sizes)
		var vmm, share float64
		for _, pod := range pods {
			pid, _, err := m.sandboxer.VMM(pod)
			if err != nil {
				return err
			}
			size, err := pss(pid)
			if err != nil {
				return err
			}
			vmm += size / float64(len(pods))
			for _, pid := range mentioning(filepath.Join(m.sandboxer.Dir, pod)) {
				size, err := pss(pid)
				if err != nil {
					return err
				}
				share += size / float64(len(pods))
			}
		}
		slopes, hypervisors, sharers = append(slopes, perPod), append(hypervisors, vmm/1024), append(sharers, share/1024)
		whole = append(whole, (perPod+vmm+share)/1024)
		for _, pod := range pods {
			if err := m.node.CRI.RemovePod(ctx, pod); err != nil {
				return err
			}
		}
	}
	samples["slope"] = slopes
	r.add(
		row{Measure: "daemon's PSS per additional idle pod", Unit: "KiB", Result: median(slopes), Limit: 300, Samples: samples,
			Detail: fmt.Sprintf("slope over %v pods", podCounts)},
		row{Measure: "host memory per idle pod, 256 MiB guest", Unit: "MiB", Result: median(whole),
			Samples: map[string][]float64{"whole": whole, "hypervisor": hypervisors, "virtiofsd": sharers},
			Detail:  fmt.Sprintf("hypervisor %.1f, virtiofsd %.1f, daemon %.2f MiB (PSS)", median(hypervisors), median(sharers), median(slopes)/1024)},
	)
	return nil
}

// settledPSS is the daemon's once it has been idle for a while: what a boot needed is given back to
// the system only later.
func (m *measurer) settledPSS(ctx context.Context) (float64, error) {
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-time.After(5 * time.Second):
	}
	return pss(m.sandboxer.PID())
}

// pss returns the proportional set size of a process in KiB.
func pss(pid int) (float64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == "Pss:" {
			return strconv.ParseFloat(fields[1], 64)
		}
	}
	return 0, fmt.Errorf("/proc/%d/smaps_rollup has no Pss", pid)
}

// mentioning returns the virtiofs daemons (there are two processes for each) that name the
// directory on their command lines.
func mentioning(dir string) []int {
	var pids []int
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		line, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "cmdline"))
		if err != nil {
			continue
		}
		program, _, _ := strings.Cut(string(line), "\x00")
		name := filepath.Base(program)
		if (name == "virtiofsd" || name == "vhost_user_fs") && strings.Contains(string(line), dir) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// slope is that of the line of least squares through the points.
func slope(x, y []float64) float64 {
	var sumX, sumY float64
	for i := range x {
		sumX, sumY = sumX+x[i], sumY+y[i]
	}
	meanX, meanY := sumX/float64(len(x)), sumY/float64(len(y))
	var over, under float64
	for i := range x {
		over += (x[i] - meanX) * (y[i] - meanY)
		under += (x[i] - meanX) * (x[i] - meanX)
	}
	return over / under
}
