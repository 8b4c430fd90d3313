package qemu

import (
	"slices"
	"time"
)

func rdtsc() uint64

// measureTSC returns the rate of the host's time stamp counter in kHz. The kernel's idea of it is
// not exported everywhere, and the "cpu MHz" of /proc/cpuinfo is the clock of a core.
func measureTSC() int {
	// The longest of short intervals are spoilt by interruptions; the median is not.
	var rates []int
	for range 5 {
		start, first := time.Now(), rdtsc()
		time.Sleep(4 * time.Millisecond)
		ticks, elapsed := rdtsc()-first, time.Since(start)
		rates = append(rates, int(float64(ticks)*1e6/float64(elapsed.Nanoseconds())))
	}
	slices.Sort(rates)
	return rates[len(rates)/2]
}
