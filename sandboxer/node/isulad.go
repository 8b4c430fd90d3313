package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
)

// isuladSettings are what iSulad needs in its daemon.json.
func isuladSettings(handler, listen string) []jsonSetting {
	return []jsonSetting{
		{path: []string{"cri-sandboxers", handler}, value: map[string]any{"name": sandboxer, "address": listen}},
		{path: []string{"cri-runtimes", handler}, value: runtimeType},
		// Sandboxers are used by CRI v1 only, which 2.1.4 and newer do not serve unless told to.
		// Older ones do not know the key and pass it over.
		{path: []string{"enable-cri-v1"}, value: true, replaces: []any{false}},
		// Without it pods have no network. Empty is what iSulad's package ships.
		{path: []string{"network-plugin"}, value: "cni", replaces: []any{""}},
	}
}

func (s *Setup) planISulad() error {
	c, err := readChange(s.config)
	if err != nil {
		return err
	}
	if c.Exists {
		if err := s.checkSandboxerNames([]byte(c.Old)); err != nil {
			return err
		}
	}
	text := []byte(c.Old)
	for _, setting := range isuladSettings(s.Handler, s.listen) {
		text, err = setJSON(text, setting)
		var conflict *Conflict
		if errors.As(err, &conflict) {
			conflict.File = c.Path
			return err
		}
		if err != nil {
			return fmt.Errorf("cannot understand %s: %w", c.Path, err)
		}
	}
	c.New = string(text)
	s.Changes = append(s.Changes, c)
	return nil
}

// checkSandboxerNames refuses what iSulad does not start with: two handlers with one name.
func (s *Setup) checkSandboxerNames(text []byte) error {
	var d isuladConfig
	if json.Unmarshal(text, &d) != nil {
		return nil // what is wrong with it, the editing tells better
	}
	for handler, entry := range d.Sandboxers {
		if handler != s.Handler && entry.Name == sandboxer {
			return &Conflict{
				File: s.config, Key: "cri-sandboxers." + handler + ".name",
				Found: fmt.Sprintf("%q", entry.Name), Want: fmt.Sprintf("that name for the handler %s, and iSulad takes each name once", s.Handler),
			}
		}
	}
	return nil
}

// isuladConfig is what of daemon.json has to do with the daemon.
type isuladConfig struct {
	Sandboxers map[string]struct {
		Name    string `json:"name"`
		Address string `json:"address"`
	} `json:"cri-sandboxers"`
	Runtimes map[string]string `json:"cri-runtimes"`
	V1       bool              `json:"enable-cri-v1"`
	Network  string            `json:"network-plugin"`
}

// isuladHandlers reads which handlers iSulad has for the daemon's socket, and what else it lacks.
func isuladHandlers(path, listen string, version release) (handlers, lacks []string, err error) {
	text, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	var d isuladConfig
	if err == nil {
		if err := json.Unmarshal(text, &d); err != nil {
			return nil, nil, fmt.Errorf("cannot understand %s: %w", path, err)
		}
	}
	for handler, entry := range d.Sandboxers {
		if entry.Address == listen && d.Runtimes[handler] == runtimeType {
			handlers = append(handlers, handler)
		}
	}
	slices.Sort(handlers)
	if !d.V1 && (version == release{} || !version.before(2, 1, 4)) {
		lacks = append(lacks, "enable-cri-v1 is not true")
	}
	if d.Network != "cni" {
		lacks = append(lacks, "network-plugin is not cni")
	}
	return handlers, lacks, nil
}
