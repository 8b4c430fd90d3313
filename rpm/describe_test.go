package rpm

import (
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/goreleaser/nfpm/v2/files"
)

func TestChangelog(t *testing.T) {
	may := time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)
	history := []release{{version: "2.0.0", notes: []string{"new", "better"}}, {version: "1.0.0", date: may, notes: []string{"first"}}}
	show := func(entries []entry) string {
		var lines []string
		for _, e := range entries {
			notes := fmt.Sprint(e.Changes)
			lines = append(lines, e.Version+" "+e.Date.Format(time.DateOnly)+" "+notes)
		}
		return strings.Join(lines, "\n")
	}
	for evr, want := range map[string]string{
		"2.0.0~dev-1": "2.0.0~dev-1 2026-03-01 [{new} {better}]\n1.0.0-1 2026-05-01 [{first}]",
		"2.0.0-7":     "2.0.0-7 2026-03-01 [{new} {better}]\n1.0.0-1 2026-05-01 [{first}]",
		"2.1.0-1":     "2.1.0-1 2026-03-01 [{Built from commit c0ffee}]\n2.0.0-1 2026-03-01 [{new} {better}]\n1.0.0-1 2026-05-01 [{first}]",
	} {
		if got := show(changes(history, evr, "c0ffee", epoch)); got != want {
			t.Errorf("%s:\n%s\nwant\n%s", evr, got, want)
		}
	}
	if got := show(changes(nil, "1-1", "", epoch)); got != "1-1 2026-03-01 [{Built from a source whose commit is not known}]" {
		t.Error(got)
	}
}

// Every entry but the first needs its own date, and dnf sorts by it.
func TestHistory(t *testing.T) {
	for i, r := range history {
		if r.version == "" || len(r.notes) == 0 {
			t.Errorf("%+v is no release", r)
		}
		if i > 0 && r.date.IsZero() || i > 1 && !r.date.Before(history[i-1].date) {
			t.Errorf("%s has the date %v", r.version, r.date)
		}
	}
}

// nodes are what could be installed on a node, and which of the package's relations must then hold by
// what is already there.
func TestDependenciesAreWellFormed(t *testing.T) {
	relation := regexp.MustCompile(`^[A-Za-z0-9/][A-Za-z0-9_./+-]*( (>=|=) [0-9][0-9.]*)?$`)
	for _, arch := range []string{"x86_64", "aarch64"} {
		for _, r := range slices.Concat(requires(arch), recommends(arch), suggests()) {
			inner, rich := strings.CutPrefix(r, "(")
			terms := []string{r}
			if rich {
				inner = strings.TrimSuffix(inner, ")")
				operator := " or "
				if strings.Contains(inner, " if ") {
					operator = " if "
				}
				terms = strings.Split(inner, operator)
				if len(terms) < 2 || !strings.HasSuffix(r, ")") {
					t.Errorf("%s: %q is not a choice", arch, r)
				}
			}
			for _, term := range terms {
				if !relation.MatchString(term) {
					t.Errorf("%s: %q in %q", arch, term, r)
				}
			}
		}
	}
	if got := recommends("aarch64"); slices.ContainsFunc(got, func(r string) bool { return strings.Contains(r, "ovmf") }) {
		t.Errorf("firmware of x86_64 is recommended on aarch64: %q", got)
	}
}

var machineTypes = map[string]string{"x86_64": `machine_type = "q35`, "aarch64": `machine_type = "virt`}

func TestTable(t *testing.T) {
	p := pack{Options: Options{Arch: "aarch64", Sandboxer: "s", Ctl: "c", Kernel: "k", Initrd: "i"}, arch: architectures["aarch64"]}
	table := p.table()
	at := map[string]member{}
	for _, m := range table {
		if _, twice := at[m.path]; twice || !path.IsAbs(m.path) || path.Clean(m.path) != m.path {
			t.Errorf("%s is there twice or no clean path", m.path)
		}
		at[m.path] = m
	}
	for _, m := range table {
		switch {
		case m.kind == files.TypeSymlink:
			if to := path.Join(path.Dir(m.path), m.target); at[to].kind != files.TypeFile {
				t.Errorf("%s leads to %s, which is no file of the package", m.path, to)
			}
		case strings.HasPrefix(m.path, "/etc/") || path.Ext(m.path) == ".toml" && strings.HasPrefix(m.path, "/var/"):
			if m.kind != files.TypeConfigNoReplace {
				t.Errorf("%s is written over by an upgrade", m.path)
			}
		}
		// Folders of the package alone belong to it, so that erasing leaves none.
		for d := path.Dir(m.path); path.Base(d) == Name; d = path.Dir(d) {
			if at[d].kind != files.TypeDir {
				t.Errorf("%s belongs to nobody", d)
			}
		}
	}
	if got := at["/var/lib/kuasar/config_stratovirt.toml"].source; got != "defaults/config_stratovirt.toml" {
		t.Errorf("aarch64 gets %s", got)
	}
	// The hypervisors are those of the architecture.
	for name, arch := range architectures {
		for file, want := range map[string][]string{
			arch.stratovirt: {"/usr/bin/stratovirt", machineTypes[name]},
			arch.qemu:       {qemu(name), machineTypes[name]},
		} {
			text, err := os.ReadFile(filepath.Join("..", file))
			if err != nil {
				t.Fatal(err)
			}
			for _, w := range want {
				if !strings.Contains(string(text), w) {
					t.Errorf("%s for %s lacks %s", file, name, w)
				}
			}
		}
	}
}

// Each scriptlet is for /bin/sh, whatever that is, and ends well: another end of %pre or %preun would
// leave the package half installed or erased.
func TestScriptletsEndWell(t *testing.T) {
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Skip("needs sh")
	}
	names, err := scriptletFiles.ReadDir("scriptlets")
	if err != nil || len(names) != 4 {
		t.Fatalf("%d scriptlets, %v", len(names), err)
	}
	for _, name := range names {
		text, err := scriptletFiles.ReadFile("scriptlets/" + name.Name())
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(string(text), "\nexit 0\n") {
			t.Errorf("%s does not end in exit 0", name.Name())
		}
		cmd := exec.Command(sh, "-n")
		cmd.Stdin = strings.NewReader(string(text))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", name.Name(), err, out)
		}
	}
}

// The words about pods that go on running, with the state directory that the options name.
func TestErasingTellsOfPods(t *testing.T) {
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Skip("needs sh")
	}
	text, err := scriptletFiles.ReadFile("scriptlets/preun.sh")
	if err != nil {
		t.Fatal(err)
	}
	const absent = "kuasar-no-such-command"
	for name, c := range map[string]struct {
		options string // contents of the options file; DIR is the state directory
		pods    int
		left    string // $1
		tells   bool
	}{
		"no pods":                  {"OPTIONS=\"\"\n", 0, "0", false},
		"two pods":                 {"OPTIONS=\"--dir DIR\"\n", 2, "0", true},
		"an equals sign":           {"OPTIONS='--config /x --dir=DIR --debug'", 1, "0", true},
		"one dash, no quotes":      {"# --dir /nowhere\nOTHER=1\nOPTIONS=-dir DIR\n", 1, "0", true},
		"an upgrade":               {"OPTIONS=\"--dir DIR\"\n", 2, "1", false},
		"the last of two is taken": {"OPTIONS=\"--dir /nowhere --dir DIR\"\n", 1, "0", true},
	} {
		dir := t.TempDir()
		state := filepath.Join(dir, "state")
		for i := range c.pods {
			pod := filepath.Join(state, fmt.Sprint("pod", i))
			if err := os.MkdirAll(pod, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(pod, "sandbox.json"), []byte("{}"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		options := filepath.Join(dir, "options")
		if err := os.WriteFile(options, []byte(strings.ReplaceAll(c.options, "DIR", state)), 0o600); err != nil {
			t.Fatal(err)
		}
		// No service manager is asked: this machine may run one.
		script := strings.NewReplacer("/etc/sysconfig/kuasar-vmm", options, "systemctl", absent, "dir=/run/kuasar-vmm", "dir="+filepath.Join(dir, "none")).Replace(string(text))
		out, err := exec.Command(sh, "-c", script, "preun", c.left).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
		tells := strings.Contains(string(out), fmt.Sprintf("%d pod(s) run on", c.pods)) && strings.Contains(string(out), state)
		if tells != c.tells || !c.tells && len(out) > 0 {
			t.Errorf("%s: %q", name, out)
		}
	}
}

func TestFindings(t *testing.T) {
	got := found("==== starts\nkuasar.x86_64: E: no-signature\nkuasar.x86_64: W: only-non-binary-in-usr-lib\n 1 packages and 0 specfiles checked; 1 errors\n")
	if got != "kuasar.x86_64: E: no-signature\nkuasar.x86_64: W: only-non-binary-in-usr-lib" {
		t.Errorf("%q", got)
	}
	if got := found(" 1 packages and 0 specfiles checked; 0 errors, 0 warnings\n"); got != "" {
		t.Errorf("%q", got)
	}
}
