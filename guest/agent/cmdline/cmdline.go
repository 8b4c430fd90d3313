// Package cmdline reads the agent's own parameters from the kernel's command line.
package cmdline

import (
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"

	"kuasar.io/kuasar/guest/protocol"
)

// Values of Parameters.
const (
	Virtiofs = "virtiofs"
	NineP    = "9p"

	CgroupV1 = "v1"
	CgroupV2 = "v2"

	Vsock  = "vsock"
	Serial = "serial"

	// LevelTrace is below slog's debug level.
	LevelTrace = slog.LevelDebug - 4
)

// Parameters of the agent. The zero value of a field stands for its default.
type Parameters struct {
	LogLevel   slog.Level
	ShareType  string // Virtiofs or NineP
	Debug      bool
	DebugShell string // empty: the shell of the console's archive
	Cgroup     string // CgroupV1 or CgroupV2
	Transport  string // Vsock, Serial, or empty: whichever exists
	// Warnings are about parameters that could not be understood; their defaults apply.
	Warnings []string
}

// Read parses /proc/cmdline, which must be mounted.
func Read() (Parameters, error) {
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return Parameters{}, fmt.Errorf("cannot read the kernel's command line: %w", err)
	}
	return Parse(string(b)), nil
}

// Parse reads parameters separated by white space. Of a parameter that is given twice the last
// one counts, as for the kernel's own: the host appends its parameters to the administrator's.
// Parameters without the prefix "task." are not the agent's.
func Parse(line string) Parameters {
	p := Parameters{ShareType: NineP, Cgroup: CgroupV2}
	for word := range strings.FieldsSeq(line) {
		name, value, valued := strings.Cut(word, "=")
		known := func(values ...string) (string, bool) {
			for _, v := range values {
				if v == value {
					return v, true
				}
			}
			p.Warnings = append(p.Warnings, fmt.Sprintf("kernel parameter %s: want %s", word, strings.Join(values, " or ")))
			return "", false
		}
		switch name {
		case protocol.ParamLogLevel:
			if l, ok := known("trace", "debug", "info", "warn", "error"); ok {
				p.LogLevel = levels[l]
			}
		case protocol.ParamShareType:
			if v, ok := known(Virtiofs, NineP); ok {
				p.ShareType = v
			}
		case protocol.ParamDebug:
			// Kuasar knows the bare word only; the form with a value is what people write.
			if !valued {
				p.Debug = true
				break
			}
			on, err := strconv.ParseBool(value)
			if err != nil {
				p.Warnings = append(p.Warnings, fmt.Sprintf("kernel parameter %s: want the bare word, true or false", word))
				break
			}
			p.Debug = on
		case protocol.ParamDebugShell:
			if !strings.HasPrefix(value, "/") {
				p.Warnings = append(p.Warnings, fmt.Sprintf("kernel parameter %s: want an absolute path", word))
				break
			}
			p.DebugShell = value
		case protocol.ParamCgroup:
			if v, ok := known(CgroupV1, CgroupV2); ok {
				p.Cgroup = v
			}
		case protocol.ParamTransport:
			if v, ok := known(Vsock, Serial); ok {
				p.Transport = v
			}
		default:
			if strings.HasPrefix(name, "task.") && name != paramTracing {
				p.Warnings = append(p.Warnings, fmt.Sprintf("kernel parameter %s is not known", word))
			}
		}
	}
	return p
}

// paramTracing is a parameter of Kuasar's configuration files that has no effect here.
const paramTracing = "task.enable_tracing"

var levels = map[string]slog.Level{
	"trace": LevelTrace,
	"debug": slog.LevelDebug,
	"info":  slog.LevelInfo,
	"warn":  slog.LevelWarn,
	"error": slog.LevelError,
}
