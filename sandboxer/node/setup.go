package node

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Engine is a container engine that can run pods with the daemon.
type Engine string

const (
	ISulad     Engine = "isulad"
	Containerd Engine = "containerd"
)

// Engines are all of them.
var Engines = []Engine{ISulad, Containerd}

// DefaultHandler is the runtime handler that the guide and the shipped files name.
const DefaultHandler = "vmm"

const (
	// sandboxer is the name under which the engines know the daemon.
	sandboxer = "vmm"
	// runtimeType is what both engines take for the runtime of the pods' containers.
	runtimeType = "io.containerd.vmm.v1"
	// shimName is the program that containerd from 2.4 on looks for because of that name.
	shimName = "containerd-shim-vmm-v1"
)

// configPath is where an engine reads its configuration.
func (e Engine) configPath() string {
	if e == ISulad {
		return "/etc/isulad/daemon.json"
	}
	return "/etc/containerd/config.toml"
}

// Unit is the engine's service.
func (e Engine) Unit() string { return string(e) }

// SetupOptions say what to set up.
type SetupOptions struct {
	Engine  Engine
	Handler string // of the pods; empty: DefaultHandler
	Config  string // the engine's configuration file; empty: the usual one
	Listen  string // the daemon's socket
}

// Setup is what has to change for an engine to know the handler.
type Setup struct {
	Engine  Engine
	Handler string
	Changes []*Change
	// Notes are what the administrator should know besides, a line each.
	Notes []string

	config string
	listen string
	host   Host
}

var handlerName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$`)

// PlanSetup works out the changes without making them. What contradicts an existing setting is a
// *Conflict, and nothing is planned then.
func (h Host) PlanSetup(ctx context.Context, o SetupOptions) (*Setup, error) {
	if o.Handler == "" {
		o.Handler = DefaultHandler
	}
	if !handlerName.MatchString(o.Handler) {
		return nil, fmt.Errorf("the handler %q is no name for one: small letters, digits, - and . are allowed", o.Handler)
	}
	if o.Config == "" {
		o.Config = h.path(o.Engine.configPath())
	}
	// What containerd imports by a relative path is beside the file that says so.
	config, err := filepath.Abs(o.Config)
	if err != nil {
		return nil, fmt.Errorf("cannot set %s up: %w", o.Engine, err)
	}
	s := &Setup{Engine: o.Engine, Handler: o.Handler, config: config, listen: o.Listen, host: h}
	switch o.Engine {
	case ISulad:
		err = s.planISulad()
	case Containerd:
		err = s.planContainerd(ctx)
	default:
		err = fmt.Errorf("there is no engine %q: it is isulad or containerd", o.Engine)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot set %s up: %w", o.Engine, err)
	}
	return s, nil
}

// Changed says whether there is anything to do.
func (s *Setup) Changed() bool {
	for _, c := range s.Changes {
		if c.Changed() {
			return true
		}
	}
	return false
}

// Apply makes the changes: all of them, or none if one fails or if the engine does not accept what
// came out.
func (s *Setup) Apply(ctx context.Context, now time.Time) error {
	accepted := s.accepts(ctx) == nil
	for i, c := range s.Changes {
		if err := c.Apply(now); err != nil {
			return errors.Join(err, s.revert(i))
		}
	}
	if !accepted {
		// It was not accepted before either, or the engine is not there to be asked.
		return nil
	}
	if err := s.accepts(ctx); err != nil {
		return errors.Join(fmt.Errorf("%s does not accept the new configuration, so the old one is back: %w", s.Engine, err), s.revert(len(s.Changes)))
	}
	return nil
}

// accepts asks the engine whether it can read its configuration. iSulad cannot be asked.
func (s *Setup) accepts(ctx context.Context) error {
	if s.Engine != Containerd {
		return nil
	}
	path, err := s.host.find("containerd")
	if err != nil {
		return err
	}
	out, err := output(ctx, path, "-c", s.config, "config", "dump")
	if err != nil {
		return fmt.Errorf("containerd config dump: %w: %s", err, lastLine(out))
	}
	return nil
}

func (s *Setup) revert(n int) error {
	var errs []error
	for _, c := range s.Changes[:n] {
		errs = append(errs, c.revert())
	}
	return errors.Join(errs...)
}

// programDirs are searched for the engines besides PATH, which is short where sudo set it.
var programDirs = []string{"/usr/bin", "/usr/local/bin", "/usr/sbin", "/usr/local/sbin"}

// find returns the path of a program.
func (h Host) find(name string) (string, error) {
	for _, dir := range programDirs {
		if path, err := exec.LookPath(h.path(filepath.Join(dir, name))); err == nil {
			return path, nil
		}
	}
	if h.Root == "" {
		return exec.LookPath(name)
	}
	return "", fmt.Errorf("%s: %w", name, exec.ErrNotFound)
}

// programTimeout bounds programs that only say something of themselves.
const programTimeout = 10 * time.Second

// output runs a program and returns what it says.
func output(ctx context.Context, path string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, programTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.WaitDelay = time.Second
	return cmd.CombinedOutput()
}

func firstLine(b []byte) string {
	line, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
	return clip(line)
}

func lastLine(b []byte) string {
	s := strings.TrimSpace(string(b))
	return clip(s[strings.LastIndexByte(s, '\n')+1:])
}

// clip bounds what a program said for a line of ours, and keeps control characters out of it.
func clip(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, ""))
	if len(s) > 300 {
		s = s[:300] + "..."
	}
	return s
}

var versionNumber = regexp.MustCompile(`\bv?(\d+)\.(\d+)(?:\.(\d+))?`)

// release is the version number of a program.
type release struct{ major, minor, patch int }

func parseRelease(s string) (release, bool) {
	m := versionNumber.FindStringSubmatch(s)
	if m == nil {
		return release{}, false
	}
	var r release
	r.major, _ = strconv.Atoi(m[1])
	r.minor, _ = strconv.Atoi(m[2])
	r.patch, _ = strconv.Atoi(m[3])
	return r, true
}

func (r release) before(major, minor, patch int) bool {
	switch {
	case r.major != major:
		return r.major < major
	case r.minor != minor:
		return r.minor < minor
	}
	return r.patch < patch
}

func (r release) String() string { return fmt.Sprintf("%d.%d.%d", r.major, r.minor, r.patch) }

// versionOf asks a program for its version. containerd's answer begins with its module's path, which
// has a version of its own in it.
func versionOf(ctx context.Context, path string) (release, error) {
	out, err := output(ctx, path, "--version")
	if err != nil {
		return release{}, fmt.Errorf("cannot run %s --version: %w: %s", path, err, firstLine(out))
	}
	for field := range strings.FieldsSeq(string(out)) {
		if strings.Contains(field, "/") {
			continue
		}
		if r, ok := parseRelease(field); ok {
			return r, nil
		}
	}
	return release{}, fmt.Errorf("cannot tell the version of %s, which says %q", path, firstLine(out))
}
