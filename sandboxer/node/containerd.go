package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"
)

// criPlugins are the names of the section with the runtimes, of version 3 and newer and of version 2
// of containerd's configuration.
var criPlugins = []string{"io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"}

// containerdFile is one file of containerd's configuration.
type containerdFile struct {
	path string
	tree map[string]any
}

// readContainerd reads the configuration at path and what it imports, in containerd's order: a later
// file wins. None of the files need exist.
func readContainerd(path string) ([]containerdFile, error) {
	var files []containerdFile
	seen := map[string]bool{}
	for pending := []string{path}; len(pending) > 0; {
		next := pending[0]
		pending = pending[1:]
		if seen[next] {
			continue
		}
		seen[next] = true
		f, err := readTOML(next)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		files = append(files, f)
		for _, pattern := range f.imports() {
			if !strings.Contains(pattern, "*") {
				pending = append(pending, pattern)
				continue
			}
			matches, err := filepath.Glob(pattern)
			if err != nil {
				return nil, fmt.Errorf("%s imports %q: %w", f.path, pattern, err)
			}
			pending = append(pending, matches...)
		}
	}
	return files, nil
}

func readTOML(path string) (containerdFile, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return containerdFile{}, fmt.Errorf("cannot read containerd's configuration: %w", err)
	}
	return parseTOML(path, string(text))
}

func parseTOML(path, text string) (containerdFile, error) {
	f := containerdFile{path: path}
	if _, err := toml.Decode(text, &f.tree); err != nil {
		return f, fmt.Errorf("cannot understand %s: %w", path, err)
	}
	return f, nil
}

// imports are the files' paths and patterns, absolute.
func (f containerdFile) imports() []string {
	list, _ := f.tree["imports"].([]any)
	var paths []string
	for _, v := range list {
		if p, ok := v.(string); ok {
			if !filepath.IsAbs(p) {
				p = filepath.Join(filepath.Dir(f.path), p)
			}
			paths = append(paths, filepath.Clean(p))
		}
	}
	return paths
}

// at returns the value at a path of keys, nil if there is none.
func (f containerdFile) at(keys ...string) any {
	var v any = f.tree
	for _, k := range keys {
		table, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = table[k]
	}
	return v
}

// A containerdValue is a value that containerd needs.
type containerdValue struct {
	keys []string
	want string
}

func (v containerdValue) name() string { return strings.Join(v.keys, ".") }

// containerdValues are what containerd needs for a handler: for each all the places where the value
// may stand.
func containerdValues(handler, listen string) [][]containerdValue {
	values := [][]containerdValue{
		{{[]string{"proxy_plugins", sandboxer, "type"}, "sandbox"}},
		{{[]string{"proxy_plugins", sandboxer, "address"}, listen}},
		{}, {},
	}
	for _, plugin := range criPlugins {
		runtime := []string{"plugins", plugin, "containerd", "runtimes", handler}
		values[2] = append(values[2], containerdValue{append(slices.Clone(runtime), "runtime_type"), runtimeType})
		values[3] = append(values[3], containerdValue{append(slices.Clone(runtime), "sandboxer"), sandboxer})
	}
	return values
}

// containerdHas says whether the files together have everything for the handler. A value that means
// something else is a *Conflict.
func containerdHas(files []containerdFile, handler, listen string) (bool, error) {
	complete := true
	for _, places := range containerdValues(handler, listen) {
		found := false
		for _, v := range places {
			for _, f := range files {
				got := f.at(v.keys...)
				if got == nil {
					continue
				}
				if !sameValue(v, got) {
					return false, &Conflict{File: f.path, Key: v.name(), Found: fmt.Sprintf("%#v", got), Want: fmt.Sprintf("%q", v.want)}
				}
				found = true
			}
		}
		complete = complete && found
	}
	for _, f := range files {
		disabled, _ := f.tree["disabled_plugins"].([]any)
		for _, d := range disabled {
			if name, ok := d.(string); ok && (name == "cri" || slices.Contains(criPlugins, name)) {
				return false, &Conflict{File: f.path, Key: "disabled_plugins", Found: fmt.Sprintf("%q", name), Want: "containerd with its CRI plugin"}
			}
		}
	}
	return complete, nil
}

// sameValue also takes the program's path for the runtime's type, as containerd does.
func sameValue(v containerdValue, got any) bool {
	s, ok := got.(string)
	if !ok {
		return false
	}
	return strings.TrimPrefix(s, "unix://") == v.want || v.want == runtimeType && filepath.IsAbs(s) && filepath.Base(s) == shimName
}

// containerdHandlers are the handlers whose pods the daemon at listen runs.
func containerdHandlers(files []containerdFile, listen string) []string {
	var handlers []string
	for _, f := range files {
		for _, plugin := range criPlugins {
			runtimes, _ := f.at("plugins", plugin, "containerd", "runtimes").(map[string]any)
			for handler := range runtimes {
				if complete, err := containerdHas(files, handler, listen); err == nil && complete && !slices.Contains(handlers, handler) {
					handlers = append(handlers, handler)
				}
			}
		}
	}
	slices.Sort(handlers)
	return handlers
}

func (s *Setup) planContainerd(ctx context.Context) error {
	var version release
	if path, err := s.host.find("containerd"); err != nil {
		s.Notes = append(s.Notes, "containerd is not installed; version 2.0 or newer is needed")
	} else if version, err = versionOf(ctx, path); err != nil {
		s.Notes = append(s.Notes, err.Error())
	} else if version.before(2, 0, 0) {
		return fmt.Errorf("%s is containerd %v, which has no sandbox API: version 2.0 or newer is needed", path, version)
	}
	files, err := readContainerd(s.config)
	if err != nil {
		return err
	}
	complete, err := containerdHas(files, s.Handler, s.listen)
	if err != nil || complete {
		return err
	}
	config, err := readChange(s.config)
	if err != nil {
		return err
	}
	// Every containerd from 2.0 on merges what it imports key by key, whatever versions the files
	// have; so the administrator's own file only gets the line that imports ours.
	name := "kuasar.toml"
	if s.Handler != DefaultHandler {
		name = "kuasar-" + s.Handler + ".toml"
	}
	dropIn, err := readChange(filepath.Join(filepath.Dir(config.Path), "conf.d", name))
	if err != nil {
		return err
	}
	if dropIn.Exists {
		f, err := parseTOML(dropIn.Path, dropIn.Old)
		if err != nil {
			return err
		}
		if complete, err = containerdHas([]containerdFile{f}, s.Handler, s.listen); err != nil {
			return err
		}
	}
	if !complete {
		dropIn.New = containerdSnippet(s.Handler, s.listen)
	}
	pattern := filepath.Join(filepath.Dir(config.Path), "conf.d", "*.toml")
	if config.New, err = addImport(config.Path, config.Old, pattern, dropIn.Path); err != nil {
		return err
	}
	s.Changes = append(s.Changes, dropIn, config)
	if !version.before(2, 4, 0) {
		if _, err := s.host.findShim(); err != nil {
			s.Notes = append(s.Notes, err.Error())
		}
	}
	return nil
}

// findShim finds the program that containerd from 2.4 on wants for the runtime.
func (h Host) findShim() (string, error) {
	if path, err := h.find("containerd"); err == nil {
		if real, err := filepath.EvalSymlinks(path); err == nil {
			path = real
		}
		beside := filepath.Join(filepath.Dir(path), shimName)
		if info, err := os.Stat(beside); err == nil && info.Mode()&0o111 != 0 {
			return beside, nil
		}
	}
	path, err := h.find(shimName)
	if err != nil {
		return "", fmt.Errorf("containerd from 2.4 on looks for %s and finds none: ln -s vmm-sandboxer /usr/bin/%[1]s", shimName)
	}
	return path, nil
}

// containerdSnippet is the drop-in, which says the same as the file containerd.toml that is shipped.
func containerdSnippet(handler, listen string) string {
	return fmt.Sprintf(`# Made by kuasar-ctl: pods with the runtime handler %[1]s run in virtual machines.
version = 3

[proxy_plugins.%[2]s]
  type = "sandbox"
  address = %[3]q

# Give the handler no table [...runtimes.%[1]s.options]: containerd before 2.3.1 fails with it.
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.%[4]s]
  # containerd from 2.4 on looks for the program %[6]s, which is vmm-sandboxer under
  # another name.
  runtime_type = %[5]q
  sandboxer = %[2]q
  # There is no pause container. containerd before 2.4 does not know this key and warns.
  disable_pause_image_pull = true
  # A privileged container is privileged in its virtual machine; the host's devices are not in there.
  privileged_without_host_devices = true
`, handler, sandboxer, listen, tomlKey(handler), runtimeType, shimName)
}

// tomlKey quotes a name that is no bare key.
func tomlKey(name string) string {
	if strings.ContainsAny(name, ".") {
		return fmt.Sprintf("%q", name)
	}
	return name
}

// addImport returns text, containerd's configuration at path, with an import of pattern unless it
// imports the file wanted already. The rest stays as it is; that is proven by parsing both.
func addImport(path, text, pattern, wanted string) (string, error) {
	if strings.TrimSpace(text) == "" {
		return text + fmt.Sprintf("version = 3\nimports = [%q]\n", pattern), nil
	}
	before, err := parseTOML(path, text)
	if err != nil {
		return "", err
	}
	for _, p := range before.imports() {
		if matched, err := filepath.Match(p, wanted); err == nil && (matched || p == wanted) {
			return text, nil
		}
	}
	edited := insertImport(text, pattern)
	after, err := parseTOML(path, edited)
	old, _ := before.tree["imports"].([]any)
	if err == nil {
		want := append(slices.Clone(old), any(pattern))
		got := after.tree["imports"]
		delete(after.tree, "imports")
		delete(before.tree, "imports")
		if !reflect.DeepEqual(got, any(want)) || !reflect.DeepEqual(after.tree, before.tree) {
			err = errors.New("the result would mean something else")
		}
	}
	if err != nil {
		return "", fmt.Errorf("cannot add an import to %s (%w); add %q to its key imports by hand and try again", path, err, pattern)
	}
	return edited, nil
}

// insertImport adds pattern to the top-level array imports, or such an array behind the version.
func insertImport(text, pattern string) string {
	entry := fmt.Sprintf("%q", pattern)
	newline := "\n"
	if strings.Contains(text, "\r\n") {
		newline = "\r\n"
	}
	version, at := -1, 0
	for line := range strings.Lines(text) {
		trimmed := strings.TrimSpace(line)
		if strings.HasPrefix(trimmed, "[") {
			break // the first table ends the top level
		}
		key, _, _ := strings.Cut(trimmed, "=")
		switch strings.TrimSpace(key) {
		case "imports":
			open := strings.IndexByte(text[at:], '[')
			if open >= 0 {
				return insertElement(text, at+open, entry)
			}
		case "version":
			version = at + len(line)
		}
		at += len(line)
	}
	line := "imports = [" + entry + "]" + newline
	if version < 0 {
		return line + text
	}
	if !strings.HasSuffix(text[:version], "\n") {
		line = newline + line
	}
	return text[:version] + line + text[version:]
}

// insertElement adds an element at the end of the array that opens at i.
func insertElement(text string, i int, entry string) string {
	last := -1 // the last character of the last element or comma
	for j := i + 1; j < len(text); j++ {
		switch c := text[j]; c {
		case '"', '\'':
			for j++; j < len(text) && text[j] != c; j++ {
				if c == '"' && text[j] == '\\' {
					j++
				}
			}
			last = j
		case '#':
			for j < len(text) && text[j] != '\n' {
				j++
			}
		case ',':
			last = j
		case ']':
			switch {
			case last < 0:
				return text[:i+1] + entry + text[i+1:]
			case text[last] == ',':
				return text[:last+1] + " " + entry + "," + text[last+1:]
			default:
				return text[:last+1] + ", " + entry + text[last+1:]
			}
		}
	}
	return text // not closed: the caller sees that nothing has changed
}
