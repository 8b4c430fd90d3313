package pod

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// budget bounds the part of a boot in which a machine runs and has not said hello. It counts the
// time in which the machine could have got on: while its threads wait for a CPU that others use,
// nothing can be held against it. A guest that hangs waits for no CPU and one that spins gets one,
// so both end on time on any node; one that boots slowly on a crowded node goes on.
type budget struct {
	limit time.Duration
	pid   atomic.Int64
}

// start returns a context that ends, with a cause that tells how long it took, when the budget is
// used up.
func (b *budget) start(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(parent)
	began := time.Now()
	go func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			elapsed := time.Since(began)
			if elapsed < b.limit {
				continue
			}
			starved := runQueueWait(int(b.pid.Load()))
			if elapsed-starved < b.limit {
				continue
			}
			err := fmt.Errorf("no answer within %v", elapsed.Round(100*time.Millisecond))
			if starved > time.Second {
				err = fmt.Errorf("%w, %v of which the hypervisor waited for a CPU", err, starved.Round(100*time.Millisecond))
			}
			cancel(err)
			return
		}
	}()
	return ctx, func() { cancel(nil) }
}

// runQueueWait is how long the process's most unlucky thread was ready to run and had no CPU; 0 if
// the kernel does not count that.
func runQueueWait(pid int) time.Duration {
	if pid <= 0 {
		return 0
	}
	tasks, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/schedstat")
	if err != nil {
		return 0
	}
	var worst time.Duration
	for _, t := range tasks {
		b, err := os.ReadFile(t)
		if err != nil {
			continue
		}
		// time on a CPU, time waiting for one, number of time slices; nanoseconds
		f := strings.Fields(string(b))
		if len(f) < 2 {
			continue
		}
		ns, err := strconv.ParseInt(f[1], 10, 64)
		if err == nil {
			worst = max(worst, time.Duration(ns))
		}
	}
	return worst
}
