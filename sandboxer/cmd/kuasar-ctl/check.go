package main

import (
	"context"
	"flag"
	"fmt"
	"strings"

	"kuasar.io/kuasar/sandboxer/node"
)

// checkResult is what check says. Its names in JSON are promised in kuasar-ctl(1).
type checkResult struct {
	Usable   bool           `json:"usable"`
	Findings []checkFinding `json:"findings"`
}

type checkFinding struct {
	Name   string `json:"name"`
	Status string `json:"status"` // ok, warning, missing
	Detail string `json:"detail"`
	Mend   string `json:"mend,omitempty"`
}

func check(c *call, f *flag.FlagSet) func(context.Context, []string) error {
	config := f.String("config", "", "the daemon's configuration `file` (default: the one that its options name)")
	listen := f.String("listen", "", "the daemon's `socket` (default: the one that its options name)")
	return func(ctx context.Context, _ []string) error {
		settings := node.Settings(node.SysconfigPath)
		if *config != "" {
			settings.Config = *config
		}
		if *listen != "" {
			settings.Listen = strings.TrimPrefix(*listen, "unix://")
		}
		base, err := c.base()
		if err != nil {
			return err
		}
		settings.Dir = base
		result := checkResult{Usable: true, Findings: []checkFinding{}}
		for _, f := range node.NewChecker(settings).Run(ctx) {
			result.Findings = append(result.Findings, checkFinding{f.Name, string(f.Status), f.Detail, f.Mend})
			result.Usable = result.Usable && f.Status != node.Missing
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := c.showCheck(result); err != nil {
			return err
		}
		if !result.Usable {
			return errReported
		}
		return nil
	}
}

func (c *call) showCheck(r checkResult) error {
	if c.json() {
		return c.print(r)
	}
	counts := map[string]int{}
	for _, f := range r.Findings {
		fmt.Fprintf(c.out, "%-8s %-16s %s\n", f.Status, f.Name, f.Detail)
		if f.Mend != "" {
			fmt.Fprintf(c.out, "%25s mend: %s\n", "", f.Mend)
		}
		counts[f.Status]++
	}
	if r.Usable {
		_, err := fmt.Fprintf(c.out, "\nThis node can run pods in virtual machines (%d warnings).\n", counts["warning"])
		return err
	}
	_, err := fmt.Fprintf(c.out, "\nThis node cannot run pods in virtual machines yet: %d missing, %d warnings.\n", counts["missing"], counts["warning"])
	return err
}
