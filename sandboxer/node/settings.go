// Package node looks after the node that the daemon runs on: what it has and lacks, the engines'
// configuration, and what no pod owns any more.
package node

import (
	"os"
	"path/filepath"
	"strings"

	"kuasar.io/kuasar/sandboxer/config"
)

// SysconfigPath is the file with the daemon's options.
const SysconfigPath = "/etc/sysconfig/kuasar-vmm"

// DaemonSettings are the daemon's options, as far as others need to know them.
type DaemonSettings struct {
	Config string // the configuration file
	Dir    string // the directory with the pods' state
	Listen string // the socket of the sandbox API
}

// Settings reads the options that the service gets from the file at path, and fills in the daemon's
// defaults. A file that is missing or not readable means the defaults.
func Settings(path string) DaemonSettings {
	s := DaemonSettings{Config: config.DefaultPath, Dir: "/run/kuasar-vmm", Listen: "/run/vmm-sandboxer.sock"}
	text, err := os.ReadFile(path)
	if err != nil {
		return s
	}
	options := strings.Fields(variable(string(text), "OPTIONS"))
	for i, o := range options {
		name, value, found := strings.Cut(strings.TrimLeft(o, "-"), "=")
		if name == o {
			continue // no option
		}
		if !found && i+1 < len(options) {
			value = options[i+1]
		}
		switch name {
		case "config":
			s.Config = value
		case "dir":
			s.Dir = value
		case "listen":
			s.Listen = strings.TrimPrefix(value, "unix://")
		}
	}
	return s
}

// variable returns the value of a variable in an environment file of systemd: the last assignment
// counts, quotes around the value are dropped, a backslash at the end continues the line.
func variable(text, name string) string {
	value := ""
	text = strings.ReplaceAll(text, "\\\n", "")
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		key, v, found := strings.Cut(line, "=")
		if !found || strings.TrimSpace(key) != name {
			continue
		}
		v = strings.TrimSpace(v)
		if n := len(v); n >= 2 && (v[0] == '"' || v[0] == '\'') && v[n-1] == v[0] {
			v = v[1 : n-1]
		}
		value = v
	}
	return value
}

// Host is where things are looked for. The zero value is the machine itself.
type Host struct {
	// Root is put before every absolute path; empty for the machine's own files.
	Root string
}

func (h Host) path(p string) string {
	if h.Root == "" {
		return p
	}
	return filepath.Join(h.Root, p)
}
