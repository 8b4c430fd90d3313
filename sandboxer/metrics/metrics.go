// Package metrics counts what the daemon does and prints it in the text format of Prometheus. It
// keeps a few hundred bytes per boot stage and nothing per pod.
package metrics

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
)

// bounds of the histograms' buckets.
var bounds = [...]time.Duration{
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond,
	50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2500 * time.Millisecond, 5 * time.Second, 10 * time.Second,
}

type histogram struct {
	buckets [len(bounds)]uint64 // not cumulative; what is beyond the last is in count only
	count   uint64
	sum     time.Duration
}

func (h *histogram) add(d time.Duration) {
	h.count++
	h.sum += d
	if i, _ := slices.BinarySearch(bounds[:], d); i < len(bounds) {
		h.buckets[i]++
	}
}

// Registry holds the daemon's counters. The zero value is ready; its methods may be called from
// several goroutines.
type Registry struct {
	mu        sync.Mutex
	stages    map[string]*histogram
	failures  map[string]uint64
	recovered map[string]uint64
}

// Stage counts a boot stage that took the given time and succeeded or failed.
func (r *Registry) Stage(name string, took time.Duration, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		increment(&r.failures, name)
		return
	}
	if r.stages == nil {
		r.stages = make(map[string]*histogram)
	}
	h := r.stages[name]
	if h == nil {
		h = new(histogram)
		r.stages[name] = h
	}
	h.add(took)
}

// Recovered counts what became of a pod at the daemon's start.
func (r *Registry) Recovered(outcome string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	increment(&r.recovered, outcome)
}

func increment(m *map[string]uint64, key string) {
	if *m == nil {
		*m = make(map[string]uint64)
	}
	(*m)[key]++
}

// WriteTo prints everything in the text exposition format.
func (r *Registry) WriteTo(w io.Writer) (int64, error) {
	var b strings.Builder
	r.mu.Lock()
	const stage = "kuasar_boot_stage_seconds"
	fmt.Fprintf(&b, "# HELP %s How long the stages of pods' boots took.\n# TYPE %[1]s histogram\n", stage)
	for _, name := range sorted(r.stages) {
		h := r.stages[name]
		var sum uint64
		for i, bound := range bounds {
			sum += h.buckets[i]
			fmt.Fprintf(&b, "%s_bucket{stage=%q,le=\"%g\"} %d\n", stage, name, bound.Seconds(), sum)
		}
		fmt.Fprintf(&b, "%s_bucket{stage=%q,le=\"+Inf\"} %d\n", stage, name, h.count)
		fmt.Fprintf(&b, "%s_sum{stage=%q} %g\n%[1]s_count{stage=%[2]q} %[4]d\n", stage, name, h.sum.Seconds(), h.count)
	}
	counter(&b, "kuasar_boot_failures_total", "Boots that failed, by the stage that failed.", "stage", r.failures)
	counter(&b, "kuasar_recovered_pods_total", "Pods found at the daemon's start, by what became of them.", "outcome", r.recovered)
	r.mu.Unlock()
	// What a leak of the daemon's own would show in; the tests compare it before and after each pod.
	fmt.Fprintf(&b, "# HELP go_goroutines Number of goroutines that currently exist.\n# TYPE go_goroutines gauge\ngo_goroutines %d\n", runtime.NumGoroutine())
	n, err := io.WriteString(w, b.String())
	return int64(n), err
}

func counter(b *strings.Builder, name, help, label string, values map[string]uint64) {
	fmt.Fprintf(b, "# HELP %s %s\n# TYPE %[1]s counter\n", name, help)
	for _, v := range sorted(values) {
		fmt.Fprintf(b, "%s{%s=%q} %d\n", name, label, v, values[v])
	}
}

func sorted[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
