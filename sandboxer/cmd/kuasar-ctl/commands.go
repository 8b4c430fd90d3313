package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"kuasar.io/kuasar/guest/protocol/version"
)

// A command is one verb. The help, the completion and the dispatch are all made from the table.
type command struct {
	name string
	// args are the positional arguments as the help shows them; see operand for their completion.
	args  string
	short string
	// min and max are how many positional arguments there may be.
	min, max int
	// operand is what the first positional argument is: "pod", or words separated by |.
	operand string
	// prepare declares the command's flags and returns what runs it.
	prepare func(c *call, f *flag.FlagSet) func(ctx context.Context, args []string) error
}

// call is one execution of a command.
type call struct {
	streams
	dir    string // of the pods' state, as given; empty: the daemon's
	output string // text or json
}

func (c *call) json() bool { return c.output == "json" }

// print writes v as indented JSON.
func (c *call) print(v any) error {
	e := json.NewEncoder(c.out)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// line writes v as JSON on one line, for output that does not end.
func (c *call) line(v any) error {
	e := json.NewEncoder(c.out)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// table writes rows in columns; the first is the heading.
func table(w io.Writer, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 8, 3, ' ', 0)
	for _, row := range rows {
		fmt.Fprintln(t, strings.Join(row, "\t"))
	}
	return t.Flush()
}

// flags returns the flags that every command takes, and the command's own, with what runs it.
func (cmd *command) flags(c *call) (*flag.FlagSet, func(context.Context, []string) error) {
	f := flag.NewFlagSet(cmd.name, flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&c.dir, "dir", c.dir, "the `directory` with the pods' state (default: the daemon's, "+defaultDir+")")
	f.StringVar(&c.output, "o", c.output, "the output's `format`: text or json")
	return f, cmd.prepare(c, f)
}

const defaultDir = "/run/kuasar-vmm"

func find(name string) *command {
	all := commands()
	if i := slices.IndexFunc(all, func(c command) bool { return c.name == name }); i >= 0 {
		return &all[i]
	}
	return nil
}

// dispatch finds the command and parses its flags, which may stand before and after the command and
// its arguments.
func dispatch(ctx context.Context, args []string, s streams) error {
	c := &call{streams: s, output: "text"}
	global := flag.NewFlagSet("kuasar-ctl", flag.ContinueOnError)
	global.SetOutput(io.Discard)
	global.StringVar(&c.dir, "dir", "", "")
	global.StringVar(&c.output, "o", "text", "")
	showVersion := global.Bool("version", false, "")
	if err := global.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return help(s.out)
		}
		return usagef("%v; see kuasar-ctl help", err)
	}
	args = global.Args()
	if *showVersion {
		args = []string{"version"}
	}
	if len(args) == 0 {
		_ = help(s.err)
		return usagef("a command is missing")
	}
	name, args := args[0], args[1:]
	if name == "help" {
		if len(args) == 0 {
			return help(s.out)
		}
		name, args = args[0], []string{"-h"}
	}
	cmd := find(name)
	if cmd == nil {
		return usagef("there is no command %q; see kuasar-ctl help", name)
	}
	f, action := cmd.flags(c)
	args, err := parse(f, args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return cmd.help(s.out)
	case err != nil:
		return usagef("%s: %v; see kuasar-ctl %[1]s -h", name, err)
	case len(args) < cmd.min:
		return usagef("%s: an argument is missing: kuasar-ctl %[1]s %s", name, cmd.args)
	case len(args) > cmd.max:
		return usagef("%s: unexpected argument %q: kuasar-ctl %[1]s %s", name, args[cmd.max], cmd.args)
	case c.output != "text" && c.output != "json":
		return usagef("-o %s: it is neither text nor json", c.output)
	}
	return action(ctx, args)
}

// parse parses flags wherever they stand and returns the other arguments. What follows -- is no flag.
func parse(f *flag.FlagSet, args []string) ([]string, error) {
	var rest []string
	for {
		if err := f.Parse(args); err != nil {
			return nil, err
		}
		left := f.Args()
		if len(left) == 0 {
			return rest, nil
		}
		if n := len(args) - len(left); n > 0 && args[n-1] == "--" {
			return append(rest, left...), nil
		}
		rest, args = append(rest, left[0]), left[1:]
	}
}

func help(w io.Writer) error {
	fmt.Fprintf(w, "Usage: kuasar-ctl [--dir directory] [-o text|json] command [options] [arguments]\n\n")
	var rows [][]string
	for _, cmd := range commands() {
		rows = append(rows, []string{"  " + strings.TrimSpace(cmd.name+" "+cmd.args), cmd.short})
	}
	if err := table(w, rows); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\nkuasar-ctl help command tells more; the manual is kuasar-ctl(1).\n")
	return err
}

func (cmd *command) help(w io.Writer) error {
	f, _ := cmd.flags(&call{output: "text"})
	fmt.Fprintf(w, "Usage: kuasar-ctl %s\n\n%s.\n\nOptions:\n", strings.TrimSpace(cmd.name+" [options] "+cmd.args), upper(cmd.short))
	f.SetOutput(w)
	f.PrintDefaults()
	return nil
}

func upper(s string) string { return strings.ToUpper(s[:1]) + s[1:] }

// commands is the table of all commands.
func commands() []command {
	return []command{
		{name: "check", short: "tell what this node has and lacks to run pods in virtual machines", prepare: check},
		{name: "setup", args: "isulad|containerd", min: 1, max: 1, operand: "isulad|containerd", short: "add the runtime handler to an engine's configuration", prepare: setup},
		{name: "list", short: "list the pods of the node", prepare: list},
		{name: "inspect", args: "pod", min: 1, max: 1, operand: "pod", short: "tell everything that is known of a pod", prepare: inspect},
		{name: "console", args: "pod", min: 1, max: 1, operand: "pod", short: "open a shell in a pod's virtual machine", prepare: console},
		{name: "logs", args: "pod", min: 1, max: 1, operand: "pod", short: "print the console log of a pod's virtual machine", prepare: logs},
		{name: "gc", short: "remove what no live pod owns", prepare: gc},
		{name: "metrics", short: "print the daemon's counters", prepare: metrics},
		{name: "completion", args: "bash", min: 1, max: 1, operand: "bash", short: "print the completion script of a shell", prepare: completion},
		{name: "version", short: "print the version", prepare: printVersion},
	}
}

// versionResult is what version says. Its names in JSON are promised in kuasar-ctl(1).
type versionResult struct {
	Version string `json:"version"`
	Commit  string `json:"commit"`
}

func printVersion(c *call, _ *flag.FlagSet) func(context.Context, []string) error {
	return func(context.Context, []string) error {
		if c.json() {
			return c.print(versionResult{version.Version, version.Commit})
		}
		_, err := fmt.Fprintln(c.out, "kuasar-ctl", version.String())
		return err
	}
}
