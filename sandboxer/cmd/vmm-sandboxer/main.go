// Command vmm-sandboxer is the daemon that runs pods in virtual machines. It serves the sandbox API
// of containerd and iSulad for all pods of the node, and the task API of each pod.
//
// Under a name that begins with containerd-shim- it is the program that containerd looks for beside
// itself before it uses a runtime; see shim.go.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"kuasar.io/kuasar/guest/protocol/version"
	"kuasar.io/kuasar/sandboxer/config"
)

func main() {
	if isShim(os.Args[0]) {
		os.Exit(shim(os.Args[1:], os.Stdout, os.Stderr))
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		report(err)
		os.Exit(1)
	}
}

// report says why the program ends. In the journal it stands out as an error, and is one record
// however many lines it has.
func report(err error) {
	if isJournal(os.Stderr, os.Getenv("JOURNAL_STREAM")) {
		newLogger(os.Stderr, slog.LevelError).Error(err.Error())
		return
	}
	fmt.Fprintln(os.Stderr, "vmm-sandboxer:", err)
}

// settings are the command line.
type settings struct {
	config, dir, listen, logLevel string
	check, version                bool
}

func parse(args []string, output io.Writer) (settings, error) {
	var s settings
	f := flag.NewFlagSet("vmm-sandboxer", flag.ContinueOnError)
	f.SetOutput(output)
	f.StringVar(&s.config, "config", config.DefaultPath, "read the configuration from this `file`")
	f.StringVar(&s.dir, "dir", "/run/kuasar-vmm", "keep the state of pods below this `directory`")
	f.StringVar(&s.listen, "listen", "/run/vmm-sandboxer.sock", "serve the sandbox API on this Unix `socket`")
	f.StringVar(&s.logLevel, "log-level", "", "log at this `level` (trace, debug, info, warn, error) instead of the configured one")
	f.BoolVar(&s.check, "check", false, "tell whether the configuration can be used, and exit")
	f.BoolVar(&s.version, "version", false, "print the version and exit")
	if err := f.Parse(args); err != nil {
		return s, err
	}
	if f.NArg() > 0 {
		return s, fmt.Errorf("unexpected argument %q; options only, see --help", f.Arg(0))
	}
	s.listen = strings.TrimPrefix(s.listen, "unix://")
	if !filepath.IsAbs(s.listen) {
		return s, fmt.Errorf("--listen %s: the socket's path must be absolute", s.listen)
	}
	return s, nil
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	s, err := parse(args, stderr)
	if err != nil {
		return err
	}
	if s.version {
		fmt.Fprintln(stdout, "vmm-sandboxer", version.String())
		return nil
	}
	if s.check {
		return check(s, stdout, stderr)
	}
	// From here on a signal to reload must not end the daemon, though it is heeded later.
	reloads := make(chan os.Signal, 1)
	signal.Notify(reloads, syscall.SIGHUP)
	defer signal.Stop(reloads)
	cfg, configured, err := load(s)
	if err != nil {
		return err
	}
	level := new(slog.LevelVar)
	level.Set(configured)
	log := newLogger(stderr, level)
	slog.SetDefault(log)
	for _, note := range cfg.Notes {
		log.Warn(note)
	}
	service := newService(log)
	r := &reloader{settings: s, running: cfg, level: level, service: service, log: log}
	return serve(ctx, s, cfg, service, func(ctx context.Context) { r.run(ctx, reloads) }, log)
}

const levelTrace = slog.LevelDebug - 4

func logLevel(option, configured string) (slog.Level, error) {
	name := option
	if name == "" {
		name = configured
	}
	switch name {
	case "trace":
		return levelTrace, nil
	case "debug":
		return slog.LevelDebug, nil
	case "info":
		return slog.LevelInfo, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fmt.Errorf("--log-level %s: it is none of trace, debug, info, warn, error", name)
}

// levelName is the inverse of logLevel.
func levelName(level slog.Level) string {
	if level == levelTrace {
		return "trace"
	}
	return strings.ToLower(level.String())
}

// traceName prints the level below debug as what it is.
func traceName(_ []string, a slog.Attr) slog.Attr {
	if a.Key == slog.LevelKey && a.Value.Any() == slog.Level(levelTrace) {
		a.Value = slog.StringValue("TRACE")
	}
	return a
}
