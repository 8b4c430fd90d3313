package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"

	sd "github.com/coreos/go-systemd/v22/daemon"

	"kuasar.io/kuasar/sandboxer/config"
)

// levelKey is the one key that takes effect without a restart.
const levelKey = "sandbox.log_level"

// load reads and checks the configuration and the log level that it and the command line amount to.
// It changes nothing and may be called beside a daemon that runs.
func load(s settings) (*config.Config, slog.Level, error) {
	cfg, err := config.Load(s.config)
	if err != nil {
		return nil, 0, err
	}
	level, err := logLevel(s.logLevel, cfg.Sandbox.LogLevel)
	if err != nil {
		return nil, 0, err
	}
	if err := cfg.Check(); err != nil {
		return nil, 0, err
	}
	if _, err := shareType(cfg.Hypervisor.KernelParams); err != nil {
		return nil, 0, err
	}
	return cfg, level, nil
}

// check tells whether a daemon would take the configuration.
func check(s settings, stdout, stderr io.Writer) error {
	cfg, _, err := load(s)
	if err != nil {
		return err
	}
	// The hypervisor is asked what it is. Whether KVM works is not tried, for that boots a guest.
	asked := *cfg
	asked.Hypervisor.Accelerator = config.AcceleratorTCG
	if _, err := newDriver(&asked, s.dir, slog.New(slog.DiscardHandler)); err != nil {
		return err
	}
	for _, note := range cfg.Notes {
		fmt.Fprintf(stderr, "%s: %s\n", s.config, note)
	}
	fmt.Fprintf(stdout, "%s: the configuration can be used\n", s.config)
	return nil
}

// reloader reads the configuration again while the daemon runs.
type reloader struct {
	settings settings
	running  *config.Config // what the daemon was started with
	level    *slog.LevelVar
	service  *service
	log      *slog.Logger
}

// run reloads at each signal until ctx ends.
func (r *reloader) run(ctx context.Context, signals <-chan os.Signal) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-signals:
			r.reload()
		}
	}
}

// reload takes the log level from the file, names what else has changed, and leaves everything as it
// is if the file cannot be used.
func (r *reloader) reload() {
	r.service.tell(sd.SdNotifyReloading + "\n" + sd.SdNotifyMonotonicUsec())
	// Ready again also after a refusal: the daemon runs on.
	defer r.service.ready()

	cfg, level, err := load(r.settings)
	if err != nil {
		r.log.Error("the configuration is refused; the settings stay as they are", "file", r.settings.config, "error", err)
		r.service.setNote("the changed configuration is refused, see the log")
		return
	}
	for _, note := range cfg.Notes {
		r.log.Warn(note)
	}
	changed := slices.DeleteFunc(config.Changed(r.running, cfg), func(key string) bool { return key == levelKey })
	before := r.level.Level()
	// In the more talkative of both levels, so that a change is seen in the log that it ends.
	r.level.Set(min(before, level))
	attrs := []any{"file", r.settings.config, "log_level", levelName(level)}
	if before != level {
		attrs = append(attrs, "was", levelName(before))
	}
	if r.settings.logLevel != "" && cfg.Sandbox.LogLevel != r.settings.logLevel {
		attrs = append(attrs, "because", "--log-level "+r.settings.logLevel)
	}
	r.log.Info("configuration reloaded", attrs...)
	note := ""
	if len(changed) > 0 {
		r.log.Warn("a change of these keys takes effect when the daemon is restarted (systemctl restart kuasar-vmm)",
			"keys", strings.Join(changed, ", "))
		note = "changed configuration waits for a restart"
	}
	r.service.setNote(note)
	r.level.Set(level)
}
