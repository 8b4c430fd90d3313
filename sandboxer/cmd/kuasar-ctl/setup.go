package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"kuasar.io/kuasar/sandboxer/node"
)

// setupResult is what setup says. Its names in JSON are promised in kuasar-ctl(1).
type setupResult struct {
	Engine  string      `json:"engine"`
	Handler string      `json:"handler"`
	Changed bool        `json:"changed"` // or, with dry_run, would be
	DryRun  bool        `json:"dry_run"`
	Files   []setupFile `json:"files"`
	Next    []string    `json:"next"` // commands to run now
	Notes   []string    `json:"notes"`
}

type setupFile struct {
	Path    string `json:"path"`
	Created bool   `json:"created"`
	Backup  string `json:"backup,omitempty"`
	Diff    string `json:"diff"`
}

func setup(c *call, f *flag.FlagSet) func(context.Context, []string) error {
	dryRun := f.Bool("dry-run", false, "show what would change and change nothing")
	handler := f.String("handler", node.DefaultHandler, "the runtime `handler` of the pods that shall run in virtual machines")
	config := f.String("config", "", "the engine's configuration `file`, if it is not at its usual place")
	listen := f.String("listen", "", "the daemon's `socket` (default: the one that its options name)")
	return func(ctx context.Context, args []string) error {
		engine := node.Engine(args[0])
		if engine != node.ISulad && engine != node.Containerd {
			return usagef("setup: there is no engine %q; it is isulad or containerd", args[0])
		}
		socket := strings.TrimPrefix(*listen, "unix://")
		if socket == "" {
			socket = node.Settings(node.SysconfigPath).Listen
		}
		s, err := node.Host{}.PlanSetup(ctx, node.SetupOptions{Engine: engine, Handler: *handler, Config: *config, Listen: socket})
		if err != nil {
			return asRoot(err)
		}
		result := setupResult{
			Engine: string(engine), Handler: s.Handler, Changed: s.Changed(), DryRun: *dryRun,
			Files: []setupFile{}, Next: []string{}, Notes: append([]string{}, s.Notes...),
		}
		if result.Changed && !*dryRun {
			if err := s.Apply(ctx, time.Now()); err != nil {
				return asRoot(err)
			}
		}
		for _, change := range s.Changes {
			if change.Changed() {
				result.Files = append(result.Files, setupFile{Path: change.Path, Created: !change.Exists, Backup: change.Backup, Diff: change.Diff()})
			}
		}
		if result.Changed {
			result.Next = append(result.Next, "systemctl restart "+engine.Unit())
		}
		if c.json() {
			return c.print(result)
		}
		return c.showSetup(result)
	}
}

// asRoot says what mends a lack of permission.
func asRoot(err error) error {
	if errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0 {
		return fmt.Errorf("%w; run this as root (sudo kuasar-ctl ...)", err)
	}
	return err
}

func (c *call) showSetup(r setupResult) error {
	for _, file := range r.Files {
		fmt.Fprint(c.out, file.Diff)
	}
	for _, note := range r.Notes {
		fmt.Fprintln(c.err, "note:", note)
	}
	switch {
	case !r.Changed:
		fmt.Fprintf(c.out, "%s has the handler %s already; nothing is to be changed.\n", r.Engine, r.Handler)
	case r.DryRun:
		fmt.Fprintln(c.out, "Nothing was changed (--dry-run).")
	default:
		for _, file := range r.Files {
			what := "Changed " + file.Path
			if file.Created {
				what = "Made " + file.Path
			}
			if file.Backup != "" {
				what += "; the old one is " + file.Backup
			}
			fmt.Fprintln(c.out, what+".")
		}
		fmt.Fprintf(c.out, "Now run: %s\n", strings.Join(r.Next, "; "))
	}
	return nil
}
