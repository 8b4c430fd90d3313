// Package reaper collects the dead that nobody waits for: processes whose parents ended before
// them become children of PID 1.
//
// The agent's own children are waited for where they were started, and taking one of those away
// would lose its exit status. So a dead child is collected only when it has been dead in two
// looks at least Delay apart. Looking happens only after a child has died.
package reaper

import (
	"bytes"
	"context"
	"os"
	"os/signal"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Delay is the time between two looks.
const Delay = time.Second

// Run reaps until ctx ends.
func Run(ctx context.Context) {
	died := make(chan os.Signal, 1)
	signal.Notify(died, unix.SIGCHLD)
	defer signal.Stop(died)
	r := reaper{proc: "/proc", self: os.Getpid(), wait: wait}
	for {
		select {
		case <-ctx.Done():
			return
		case <-died:
		}
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(Delay):
			}
			if r.sweep() == 0 {
				break
			}
		}
	}
}

func wait(pid int) {
	for {
		if _, err := unix.Wait4(pid, nil, unix.WNOHANG, nil); err != unix.EINTR {
			return
		}
	}
}

// process is one process even if its id is used again later.
type process struct {
	pid   int
	start string
}

type reaper struct {
	proc string
	self int
	wait func(pid int)
	seen map[process]bool // dead at the last look
}

// sweep collects who was dead at the last look too, and returns how many are left to look at.
func (r *reaper) sweep() int {
	entries, err := os.ReadDir(r.proc)
	if err != nil {
		return 0
	}
	dead := map[process]bool{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(r.proc + "/" + e.Name() + "/stat")
		if err != nil {
			continue
		}
		parent, state, start, ok := parseStat(stat)
		if !ok || parent != r.self || state != 'Z' {
			continue
		}
		p := process{pid, start}
		if r.seen[p] {
			r.wait(pid)
			continue
		}
		dead[p] = true
	}
	r.seen = dead
	return len(dead)
}

// parseStat reads /proc/pid/stat: "pid (name) state ppid ...". The name may contain anything.
func parseStat(b []byte) (parent int, state byte, start string, ok bool) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, 0, "", false
	}
	f := bytes.Fields(b[i+1:])
	const startTime = 22 - 3 // proc(5) counts from 1 and the name is field 2
	if len(f) <= startTime || len(f[0]) != 1 {
		return 0, 0, "", false
	}
	parent, err := strconv.Atoi(string(f[1]))
	return parent, f[0][0], string(f[startTime]), err == nil
}
