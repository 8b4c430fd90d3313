package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"

	"kuasar.io/kuasar/sandboxer/node"
)

// gcResult is what gc says. Its names in JSON are promised in kuasar-ctl(1).
type gcResult struct {
	Daemon  int      `json:"daemon"` // the process id of the one that runs, 0 if none does
	DryRun  bool     `json:"dry_run"`
	Garbage []gcItem `json:"garbage"`
	Kept    []gcItem `json:"kept"`
}

type gcItem struct {
	Kind    string `json:"kind"` // pod, process, cgroup, tap, mount
	Pod     string `json:"pod"`
	What    string `json:"what"`
	Reason  string `json:"reason"`
	Removed bool   `json:"removed"`
	Error   string `json:"error,omitempty"`
}

func gc(c *call, f *flag.FlagSet) func(context.Context, []string) error {
	dryRun := f.Bool("dry-run", false, "show what no live pod owns and remove nothing")
	yes := f.Bool("yes", false, "remove what no live pod owns")
	records := f.Bool("records", false, "also the records of pods that ended; their engine then learns of no exit codes")
	return func(ctx context.Context, _ []string) error {
		if *dryRun == *yes {
			return usagef("gc: say either --dry-run or --yes")
		}
		if os.Geteuid() != 0 {
			return errors.New("gc needs root: only root sees who owns what (sudo kuasar-ctl gc ...)")
		}
		base, err := c.base()
		if err != nil {
			return err
		}
		collector := node.NewCollector(base, *records)
		result := gcResult{DryRun: *dryRun, Garbage: []gcItem{}, Kept: []gcItem{}}
		var found *node.Collection
		failed := false
		if *dryRun {
			if found, err = collector.Find(ctx); err != nil {
				return err
			}
			for _, g := range found.Garbage {
				result.Garbage = append(result.Garbage, item(g))
			}
		} else {
			var outcomes []node.Outcome
			if found, outcomes, err = collector.Remove(ctx); err != nil {
				return err
			}
			for _, o := range outcomes {
				i := item(o.Garbage)
				if i.Removed = o.Err == nil; !i.Removed {
					i.Error, failed = o.Err.Error(), true
				}
				result.Garbage = append(result.Garbage, i)
			}
		}
		result.Daemon = found.Daemon
		for _, g := range found.Kept {
			result.Kept = append(result.Kept, item(g))
		}
		if c.json() {
			err = c.print(result)
		} else {
			err = c.showGC(result)
		}
		if err == nil && failed {
			err = errReported
		}
		return err
	}
}

func item(g node.Garbage) gcItem {
	return gcItem{Kind: g.Kind, Pod: g.Pod, What: g.What, Reason: g.Reason}
}

func (c *call) showGC(r gcResult) error {
	for _, g := range r.Garbage {
		verb := "would remove"
		if !r.DryRun {
			verb = "removed"
		}
		if g.Error != "" {
			fmt.Fprintf(c.out, "cannot remove %s %s: %s\n", g.Kind, g.What, g.Error)
			continue
		}
		fmt.Fprintf(c.out, "%s %s %s: %s\n", verb, g.Kind, g.What, g.Reason)
	}
	for _, k := range r.Kept {
		fmt.Fprintf(c.out, "kept %s %s: %s\n", k.Kind, k.What, k.Reason)
	}
	if len(r.Garbage) == 0 {
		fmt.Fprintln(c.out, "There is nothing that no live pod owns.")
	}
	return nil
}
