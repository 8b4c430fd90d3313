package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/BurntSushi/toml"
)

func write(t *testing.T, path, content string, mode fs.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// program puts a shell script where the host's programs are.
func program(t *testing.T, h Host, name, script string) {
	t.Helper()
	write(t, h.path("/usr/bin/"+name), "#!/bin/sh\n"+script+"\n", 0o755)
}

func TestSettings(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kuasar-vmm")
	defaults := DaemonSettings{"/var/lib/kuasar/config_stratovirt.toml", "/run/kuasar-vmm", "/run/vmm-sandboxer.sock"}
	for _, test := range []struct {
		text string
		want DaemonSettings
	}{
		{"", defaults},
		{"OPTIONS=\"\"\n", defaults},
		{"# OPTIONS=\"--dir /x\"\n", defaults},
		{"OPTIONS=\"--config /a.toml --dir=/b --listen unix:///c.sock --log-level debug\"\n", DaemonSettings{"/a.toml", "/b", "/c.sock"}},
		{"OPTIONS='-config=/a.toml'\n", DaemonSettings{"/a.toml", defaults.Dir, defaults.Listen}},
		{"OPTIONS=--dir /one\nOPTIONS=--dir \\\n /two\n", DaemonSettings{defaults.Config, "/two", defaults.Listen}},
		{"OTHER=\"--dir /x\"\n", defaults},
	} {
		write(t, path, test.text, 0o644)
		if got := Settings(path); got != test.want {
			t.Errorf("%q: %+v", test.text, got)
		}
	}
	if got := Settings(filepath.Join(t.TempDir(), "absent")); got != defaults {
		t.Errorf("without the file: %+v", got)
	}
}

func TestSetJSON(t *testing.T) {
	object := jsonSetting{path: []string{"cri-runtimes", "vmm"}, value: "x"}
	flag := jsonSetting{path: []string{"v1"}, value: true, replaces: []any{false}}
	for _, test := range []struct {
		name, text string
		setting    jsonSetting
		want       string
	}{
		{"nothing", "", flag, "{\n    \"v1\": true\n}\n"},
		{"empty object", "{}", flag, "{\n    \"v1\": true\n}"},
		{"blank object", "{ \n }\n", flag, "{\n    \"v1\": true\n}\n"},
		{"tabs", "{\n\t\"a\": 1\n}\n", object, "{\n\t\"a\": 1,\n\t\"cri-runtimes\": {\n\t\t\"vmm\": \"x\"\n\t}\n}\n"},
		{"one line", `{"a": [1, {"b": "}"}], "c": "\"{"}`, flag, `{"a": [1, {"b": "}"}], "c": "\"{", "v1": true}`},
		{"windows", "{\r\n  \"a\": 1\r\n}\r\n", object, "{\r\n  \"a\": 1,\r\n  \"cri-runtimes\": {\r\n    \"vmm\": \"x\"\r\n  }\r\n}\r\n"},
		{"in an object", "{\n  \"cri-runtimes\": {\n      \"kata\": \"k\"\n  },\n  \"z\": 1.5e3\n}", object, "{\n  \"cri-runtimes\": {\n      \"kata\": \"k\",\n      \"vmm\": \"x\"\n  },\n  \"z\": 1.5e3\n}"},
		{"in an empty object", "{\n  \"cri-runtimes\": {},\n  \"z\": null\n}", object, "{\n  \"cri-runtimes\": {\n    \"vmm\": \"x\"\n  },\n  \"z\": null\n}"},
		{"replaced", "{\n  \"v1\" : false , \"z\": 1\n}", flag, "{\n  \"v1\" : true , \"z\": 1\n}"},
		{"there", "{\"v1\":true}", flag, "{\"v1\":true}"},
		{"escaped key", `{"cri\u002druntimes":{"vmm":"x"}}`, object, `{"cri\u002druntimes":{"vmm":"x"}}`},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := setJSON([]byte(test.text), test.setting)
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != test.want {
				t.Errorf("got\n%s\nwant\n%s", got, test.want)
			}
			if again, err := setJSON(got, test.setting); err != nil || string(again) != string(got) {
				t.Errorf("the second time: %s, %v", again, err)
			}
		})
	}
	for name, text := range map[string]string{
		"other value": `{"cri-runtimes":{"vmm":"y"}}`, "no object": `{"cri-runtimes":"y"}`,
	} {
		var c *Conflict
		if _, err := setJSON([]byte(text), object); !errors.As(err, &c) || !strings.Contains(c.Found, `"y"`) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, text := range map[string]string{
		"no JSON": "{\n\"a\": 1,\n}", "an array": "[]", "twice": `{"cri-runtimes":{},"cri-runtimes":{}}`,
	} {
		if _, err := setJSON([]byte(text), object); err == nil {
			t.Errorf("%s passes", name)
		}
	}
	if _, err := setJSON([]byte("{\n\"a\": 1,\n}"), object); err == nil || !strings.Contains(err.Error(), "line 3") {
		t.Errorf("no line: %v", err)
	}
}

// patch applies a unified diff.
func patch(t *testing.T, old, diff string) string {
	t.Helper()
	lines := splitLines(old)
	var out strings.Builder
	at := 0
	header := regexp.MustCompile(`^@@ -(\d+)(?:,(\d+))? \+\d+(?:,\d+)? @@\n$`)
	body := splitLines(diff)
	for i, line := range body {
		noEnd := i+1 < len(body) && strings.HasPrefix(body[i+1], `\`)
		text := line[1:]
		if noEnd {
			text = strings.TrimSuffix(text, "\n")
		}
		switch {
		case i < 2, line[0] == '\\':
		case line[0] == '@':
			m := header.FindStringSubmatch(line)
			if m == nil {
				t.Fatalf("no header: %q", line)
			}
			start, _ := strconv.Atoi(m[1])
			if m[2] != "0" {
				start--
			}
			for ; at < start; at++ {
				out.WriteString(lines[at])
			}
		case line[0] == '+':
			out.WriteString(text)
		default:
			if lines[at] != text {
				t.Fatalf("line %d is %q, the diff has %q", at, lines[at], text)
			}
			if line[0] == ' ' {
				out.WriteString(text)
			}
			at++
		}
	}
	for ; at < len(lines); at++ {
		out.WriteString(lines[at])
	}
	return out.String()
}

func TestUnified(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	text := func() string {
		var b strings.Builder
		for range r.IntN(40) {
			fmt.Fprintf(&b, "%d\n", r.IntN(6))
		}
		if r.IntN(3) == 0 {
			b.WriteString("end")
		}
		return b.String()
	}
	for range 2000 {
		a, b := text(), text()
		d := unified("a", "b", a, b)
		if a == b {
			if d != "" {
				t.Fatalf("a diff of equal texts: %s", d)
			}
			continue
		}
		if got := patch(t, a, d); got != b {
			t.Fatalf("from\n%s\nto\n%s\nby\n%s\ncame\n%s", a, b, d, got)
		}
	}
	want := "--- old\n+++ new\n@@ -1,7 +1,7 @@\n 1\n 2\n 3\n-4\n+four\n 5\n 6\n 7\n"
	if got := unified("old", "new", "1\n2\n3\n4\n5\n6\n7\n8\n", "1\n2\n3\nfour\n5\n6\n7\n8\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestApply(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "real.json")
	link := filepath.Join(dir, "link.json")
	write(t, path, "old\n", 0o640)
	if err := os.Symlink("real.json", link); err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	c, err := readChange(link)
	if err != nil {
		t.Fatal(err)
	}
	if c.Changed() || c.Diff() != "" {
		t.Error("an unchanged file is changed")
	}
	c.New = "new\n"
	if err := c.Apply(now); err != nil {
		t.Fatal(err)
	}
	if c.Backup != path+".bak-20260102T030405Z" || read(t, c.Backup) != "old\n" || read(t, path) != "new\n" {
		t.Errorf("backup %s: %q; file: %q", c.Backup, read(t, c.Backup), read(t, path))
	}
	for _, p := range []string{path, c.Backup} {
		if info, err := os.Stat(p); err != nil || info.Mode() != 0o640 {
			t.Errorf("%s: mode %v, %v", p, info.Mode(), err)
		}
	}
	if info, err := os.Lstat(link); err != nil || info.Mode().Type() != fs.ModeSymlink {
		t.Errorf("the link became %v, %v", info.Mode(), err)
	}
	// Within the same second, and changed by somebody else meanwhile.
	d, _ := readChange(path)
	d.New = "newer\n"
	write(t, path, "theirs\n", 0o640)
	if err := d.Apply(now); err == nil || read(t, path) != "theirs\n" {
		t.Errorf("somebody's change was written over: %v", err)
	}
	d, _ = readChange(path)
	d.New = "newer\n"
	if err := d.Apply(now); err != nil || d.Backup == c.Backup || read(t, d.Backup) != "theirs\n" {
		t.Errorf("%v, backup %s", err, d.Backup)
	}
	if err := d.revert(); err != nil || read(t, path) != "theirs\n" {
		t.Errorf("reverted to %q, %v", read(t, path), err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 3 {
		t.Errorf("something was left: %v, %v", entries, err)
	}
}

func TestSetupISulad(t *testing.T) {
	h := Host{Root: t.TempDir()}
	path := h.path("/etc/isulad/daemon.json")
	write(t, path, "{\n    \"group\": \"isula\",\n    \"network-plugin\": \"\"\n}\n", 0o640)
	options := SetupOptions{Engine: ISulad, Listen: "/run/vmm-sandboxer.sock"}
	s, err := h.PlanSetup(t.Context(), options)
	if err != nil {
		t.Fatal(err)
	}
	if !s.Changed() || !strings.Contains(read(t, path), `"network-plugin": ""`) {
		t.Error("the plan changed the file, or has no changes")
	}
	if err := s.Apply(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal([]byte(read(t, path)), &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"group":          "isula",
		"network-plugin": "cni", "enable-cri-v1": true,
		"cri-sandboxers": map[string]any{"vmm": map[string]any{"name": "vmm", "address": "/run/vmm-sandboxer.sock"}},
		"cri-runtimes":   map[string]any{"vmm": "io.containerd.vmm.v1"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%v", got)
	}
	// What is shipped as an example says nothing else.
	var shipped map[string]any
	if err := json.Unmarshal([]byte(read(t, "../../defaults/isulad-daemon.json")), &shipped); err != nil {
		t.Fatal(err)
	}
	for k, v := range shipped {
		if !agrees(got[k], v) {
			t.Errorf("defaults/isulad-daemon.json has %s = %v", k, v)
		}
	}
	handlers, lacks, err := isuladHandlers(path, options.Listen, release{2, 1, 5})
	if err != nil || len(lacks) > 0 || !reflect.DeepEqual(handlers, []string{"vmm"}) {
		t.Errorf("handlers %v, lacks %v, %v", handlers, lacks, err)
	}
	if s, err = h.PlanSetup(t.Context(), options); err != nil || s.Changed() {
		t.Errorf("the second time: %v", err)
	}
	var c *Conflict
	options.Listen = "/run/other.sock"
	if _, err := h.PlanSetup(t.Context(), options); !errors.As(err, &c) || c.Key != "cri-sandboxers.vmm" || !strings.Contains(c.Found, "/run/vmm-sandboxer.sock") {
		t.Errorf("another socket: %v", err)
	}
	options.Handler = "kuasar"
	if _, err := h.PlanSetup(t.Context(), options); !errors.As(err, &c) || c.Key != "cri-sandboxers.vmm.name" {
		t.Errorf("a second handler of the name: %v", err)
	}
	options.Handler = "../x"
	if _, err := h.PlanSetup(t.Context(), options); err == nil || errors.As(err, &c) && c == nil {
		t.Errorf("a handler that is no name: %v", err)
	}
}

func TestSetupContainerd(t *testing.T) {
	const listen = "/run/vmm-sandboxer.sock"
	v2 := "version = 2\n\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"p\"\n"
	for _, test := range []struct {
		name, config string
		files        int
	}{
		{"no configuration", "", 2},
		{"version 2", v2, 2},
		{"version 3 with imports", "version = 3\nimports = ['/elsewhere/*.toml'] # why\n", 2},
		{"imports the folder", "version = 3\nimports = [\"conf.d/*.toml\"]\n", 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := Host{Root: t.TempDir()}
			program(t, h, "containerd", "echo containerd github.com/containerd/containerd/v2 v2.4.2 abc")
			program(t, h, shimName, "exit 0")
			path := h.path("/etc/containerd/config.toml")
			if test.config != "" {
				write(t, path, test.config, 0o600)
			}
			options := SetupOptions{Engine: Containerd, Listen: listen}
			s, err := h.PlanSetup(t.Context(), options)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Apply(t.Context(), time.Now()); err != nil {
				t.Fatal(err)
			}
			changed := 0
			for _, c := range s.Changes {
				if c.Changed() {
					changed++
				}
			}
			if changed != test.files || len(s.Notes) > 0 {
				t.Errorf("%d files changed, notes %v", changed, s.Notes)
			}
			files, err := readContainerd(path)
			if err != nil || len(files) != 2 {
				t.Fatalf("%v, %v", files, err)
			}
			if got := containerdHandlers(files, listen); !reflect.DeepEqual(got, []string{"vmm"}) {
				t.Errorf("handlers %v", got)
			}
			for line := range strings.Lines(test.config) {
				if !strings.HasPrefix(line, "imports") && !strings.Contains(read(t, path), line) {
					t.Errorf("%q is missing in\n%s", line, read(t, path))
				}
			}
			if s, err = h.PlanSetup(t.Context(), options); err != nil || s.Changed() {
				t.Errorf("the second time: %v", err)
			}
			options.Handler = "kuasar.vmm"
			if s, err = h.PlanSetup(t.Context(), options); err != nil || s.Apply(t.Context(), time.Now()) != nil {
				t.Fatalf("a second handler: %v", err)
			}
			files, _ = readContainerd(path)
			if got := containerdHandlers(files, listen); !reflect.DeepEqual(got, []string{"kuasar.vmm", "vmm"}) {
				t.Errorf("handlers %v", got)
			}
			var c *Conflict
			options.Listen = "/other.sock"
			if _, err = h.PlanSetup(t.Context(), options); !errors.As(err, &c) || c.Key != "proxy_plugins.vmm.address" || !strings.Contains(c.Found, listen) {
				t.Errorf("another socket: %v", err)
			}
		})
	}
}

func TestSetupContainerdRefuses(t *testing.T) {
	for name, config := range map[string]string{
		"plugins.io.containerd.cri.v1.runtime.containerd.runtimes.vmm.runtime_type": "[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.vmm]\nruntime_type = \"io.containerd.kata.v2\"\n",
		"plugins.io.containerd.grpc.v1.cri.containerd.runtimes.vmm.sandboxer":       "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.vmm]\nsandboxer = \"shim\"\n",
		"proxy_plugins.vmm.type": "[proxy_plugins.vmm]\ntype = \"snapshot\"\n",
		"disabled_plugins":       "disabled_plugins = [\"cri\"]\n",
	} {
		h := Host{Root: t.TempDir()}
		path := h.path("/etc/containerd/config.toml")
		write(t, path, config, 0o600)
		var c *Conflict
		if _, err := h.PlanSetup(t.Context(), SetupOptions{Engine: Containerd, Listen: "/s"}); !errors.As(err, &c) || c.Key != name || c.File != path {
			t.Errorf("%s: %v", name, err)
		}
	}
	h := Host{Root: t.TempDir()}
	program(t, h, "containerd", "echo containerd github.com/containerd/containerd 1.6.20~ds1 abc")
	if _, err := h.PlanSetup(t.Context(), SetupOptions{Engine: Containerd, Listen: "/s"}); err == nil || !strings.Contains(err.Error(), "1.6.20") {
		t.Errorf("containerd 1.6: %v", err)
	}
	write(t, h.path("/etc/containerd/config.toml"), "a = [", 0o600)
	program(t, h, "containerd", "echo containerd github.com/containerd/containerd/v2 v2.0.0 abc")
	if _, err := h.PlanSetup(t.Context(), SetupOptions{Engine: Containerd, Listen: "/s"}); err == nil || !strings.Contains(err.Error(), "config.toml") {
		t.Errorf("a broken configuration: %v", err)
	}
}

// containerd that takes the old configuration and not the new one gets the old one back.
func TestSetupIsTakenBack(t *testing.T) {
	h := Host{Root: t.TempDir()}
	path := h.path("/etc/containerd/config.toml")
	write(t, path, "version = 3\n", 0o600)
	program(t, h, "containerd", `if [ "$1" = --version ]; then echo containerd x/v2 v2.1.0 c; exit; fi
grep -q imports "$2" && { echo "cannot take that" >&2; exit 1; }
exit 0`)
	s, err := h.PlanSetup(t.Context(), SetupOptions{Engine: Containerd, Listen: "/s"})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Apply(t.Context(), time.Now()); err == nil || !strings.Contains(err.Error(), "cannot take that") {
		t.Errorf("error %v", err)
	}
	if got := read(t, path); got != "version = 3\n" {
		t.Errorf("the configuration is %q", got)
	}
	for _, dir := range []string{"/etc/containerd", "/etc/containerd/conf.d"} {
		entries, err := os.ReadDir(h.path(dir))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.Name() != "config.toml" && e.Name() != "conf.d" {
				t.Errorf("%s was left", e.Name())
			}
		}
	}
}

// The drop-in and the example that is shipped say the same.
func TestSnippet(t *testing.T) {
	var made, shipped map[string]any
	if _, err := toml.Decode(containerdSnippet("vmm", "/run/vmm-sandboxer.sock"), &made); err != nil {
		t.Fatal(err)
	}
	if _, err := toml.DecodeFile("../../defaults/containerd.toml", &shipped); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(made, shipped) {
		t.Errorf("made\n%v\nshipped\n%v", made, shipped)
	}
}

func TestAddImport(t *testing.T) {
	const p, wanted = "/c/conf.d/*.toml", "/c/conf.d/kuasar.toml"
	for _, test := range []struct{ text, want string }{
		{"", "version = 3\nimports = [\"/c/conf.d/*.toml\"]\n"},
		{"version = 3\n[a]\nimports = 1\n", "version = 3\nimports = [\"/c/conf.d/*.toml\"]\n[a]\nimports = 1\n"},
		{"[a]\nb = 1\n", "imports = [\"/c/conf.d/*.toml\"]\n[a]\nb = 1\n"},
		{"version = 2", "version = 2\nimports = [\"/c/conf.d/*.toml\"]\n"},
		{"imports = []\n", "imports = [\"/c/conf.d/*.toml\"]\n"},
		{"imports = [ 'a#]', ] # x ]\n", "imports = [ 'a#]', \"/c/conf.d/*.toml\", ] # x ]\n"},
		{"imports = [\n  \"a\", # ]\n  \"b\\\"]\"\n]\nroot = 'x'\n", "imports = [\n  \"a\", # ]\n  \"b\\\"]\", \"/c/conf.d/*.toml\"\n]\nroot = 'x'\n"},
		{"imports = ['conf.d/*.toml']\n", "imports = ['conf.d/*.toml']\n"},
		{"imports = ['/c/conf.d/kuasar.toml']\n", "imports = ['/c/conf.d/kuasar.toml']\n"},
	} {
		got, err := addImport("/c/config.toml", test.text, p, wanted)
		if err != nil || got != test.want {
			t.Errorf("%q became %q, %v; want %q", test.text, got, err, test.want)
		}
	}
	// What the line-wise search does not understand is refused, not broken.
	odd := "root = \"\"\"\nversion = 1\n\"\"\"\n"
	if got, err := addImport("/c/config.toml", odd, p, wanted); err == nil {
		t.Errorf("%q became %q", odd, got)
	}
}

func TestVersions(t *testing.T) {
	for text, want := range map[string]string{
		"containerd github.com/containerd/containerd/v2 v2.4.2 1234": "2.4.2",
		"containerd containerd.io 1.7.24 88bf19b":                    "1.7.24",
		"Version 2.1.5, commit abcdef":                               "2.1.5",
	} {
		h := Host{Root: t.TempDir()}
		program(t, h, "p", "echo '"+text+"'")
		got, err := versionOf(t.Context(), h.path("/usr/bin/p"))
		if err != nil || got.String() != want {
			t.Errorf("%s: %v, %v", text, got, err)
		}
	}
}
