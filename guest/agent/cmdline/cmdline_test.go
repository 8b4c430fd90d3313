package cmdline

import (
	"log/slog"
	"reflect"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	defaults := Parameters{ShareType: NineP, Cgroup: CgroupV2}
	with := func(change func(*Parameters)) Parameters {
		p := defaults
		change(&p)
		return p
	}
	for line, want := range map[string]Parameters{
		"console=ttyS0 quiet panic=-1\n": defaults,
		"task.log_level=debug task.sharefs_type=virtiofs": with(func(p *Parameters) {
			p.LogLevel, p.ShareType = slog.LevelDebug, Virtiofs
		}),
		"task.sharefs_type=virtiofs task.sharefs_type=9p": defaults,
		"task.log_level=trace":                            with(func(p *Parameters) { p.LogLevel = LevelTrace }),
		"quiet task.debug":                                with(func(p *Parameters) { p.Debug = true }),
		"task.debug=true":                                 with(func(p *Parameters) { p.Debug = true }),
		"task.debug task.debug=0":                         defaults,
		"task.debugger":                                   defaults,
		"xtask.debug":                                     defaults,
		"task.enable_tracing":                             defaults,
		"task.debug_shell=/bin/bash":                      with(func(p *Parameters) { p.DebugShell = "/bin/bash" }),
		"task.debug_shell=/a=b":                           with(func(p *Parameters) { p.DebugShell = "/a=b" }),
		"task.cgroup=v1\ttask.transport=serial": with(func(p *Parameters) {
			p.Cgroup, p.Transport = CgroupV1, Serial
		}),
		"task.transport=vsock": with(func(p *Parameters) { p.Transport = Vsock }),
	} {
		got := Parse(line)
		got.Warnings = nil
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%q:\ngot  %+v\nwant %+v", line, got, want)
		}
	}
}

func TestParseWarnsAndKeepsDefaults(t *testing.T) {
	for _, line := range []string{
		"task.log_level=loud", "task.sharefs_type=nfs", "task.sharefs_type", "task.debug=perhaps",
		"task.debug_shell=sh", "task.cgroup=3", "task.transport=carrier-pigeon", "task.unknown=1",
	} {
		p := Parse(line)
		if len(p.Warnings) != 1 || !strings.Contains(p.Warnings[0], line) {
			t.Errorf("%q: warnings %q", line, p.Warnings)
		}
		p.Warnings = nil
		if !reflect.DeepEqual(p, Parse("")) {
			t.Errorf("%q changed %+v", line, p)
		}
	}
}
