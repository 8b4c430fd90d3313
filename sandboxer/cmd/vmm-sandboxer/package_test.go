package main

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"regexp"
	"strings"
	"testing"
)

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// A virtiofs daemon that outlives the service's process must see what the next process mounts.
func TestUnitMakesNoMountNamespace(t *testing.T) {
	unit := read(t, "../../../systemd/kuasar-vmm.service")
	makes := regexp.MustCompile(`(?m)^(Protect(System|Home|KernelTunables|KernelModules|KernelLogs|ControlGroups|Clock|Proc)|ProcSubset|` +
		`Private(Tmp|Devices|Mounts|Network|Users|IPC)|(ReadWrite|ReadOnly|Inaccessible|Exec|NoExec|Bind|BindReadOnly)Paths|TemporaryFileSystem|` +
		`Root(Directory|Image)|MountAPIVFS|MountImages|ExtensionImages|MountFlags|DynamicUser|LogNamespace|NetworkNamespacePath|` +
		`RestrictNamespaces|RestrictSUIDSGID|MemoryDenyWriteExecute)=.*$`)
	if found := makes.FindAllString(unit, -1); found != nil {
		t.Errorf("the unit has %q", found)
	}
	for _, line := range []string{"Type=notify", "KillMode=process", "Before=isulad.service containerd.service", "Delegate=yes"} {
		if !strings.Contains(unit, "\n"+line+"\n") {
			t.Errorf("the unit lacks %s", line)
		}
	}
}

func TestManualNamesEveryOption(t *testing.T) {
	manual := read(t, "../../../defaults/man/vmm-sandboxer.8")
	var help bytes.Buffer
	if _, err := parse([]string{"--help"}, &help); !errors.Is(err, flag.ErrHelp) {
		t.Fatal(err)
	}
	options := regexp.MustCompile(`(?m)^  -([a-z-]+)`).FindAllStringSubmatch(help.String(), -1)
	if len(options) < 6 {
		t.Fatalf("found %d options in %s", len(options), &help)
	}
	for _, o := range options {
		if !strings.Contains(manual, `\-\-`+strings.ReplaceAll(o[1], "-", `\-`)) {
			t.Errorf("the manual does not name --%s", o[1])
		}
	}
}
