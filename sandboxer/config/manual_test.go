package config

import (
	"os"
	"strings"
	"testing"
)

func TestManualNamesEveryKey(t *testing.T) {
	b, err := os.ReadFile("../../defaults/man/config_stratovirt.toml.5")
	if err != nil {
		t.Fatal(err)
	}
	sections := map[string]string{}
	for part := range strings.SplitSeq(string(b), "\n.SH ") {
		title, text, _ := strings.Cut(part, "\n")
		sections[title] = text
	}
	for key := range Default().fields() {
		dot := strings.LastIndexByte(key, '.')
		if !strings.Contains(sections["["+key[:dot]+"]"], "\n.BR "+key[dot+1:]+` " = `) {
			t.Errorf("the manual does not name %s in the section of its table", key)
		}
	}
}

func TestChanged(t *testing.T) {
	a, b := Default(), Default()
	if got := Changed(a, b); got != nil {
		t.Errorf("of two equal ones %q differ", got)
	}
	b.Sandbox.LogLevel, b.Hypervisor.VCPUs, b.Hypervisor.Debug, b.Hypervisor.Virtiofsd.Path = "warn", 3, true, ""
	b.Notes = []string{"a note"}
	want := "hypervisor.debug hypervisor.vcpus hypervisor.virtiofsd_conf.path sandbox.log_level"
	if got := strings.Join(Changed(a, b), " "); got != want {
		t.Errorf("changed %s, want %s", got, want)
	}
}
