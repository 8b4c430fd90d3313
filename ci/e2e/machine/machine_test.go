package machine

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// A machine boots, runs units, is seen from outside, and leaves nothing.
func TestMachine(t *testing.T) {
	if os.Getenv("KUASAR_E2E") == "" {
		t.Skip("boots a machine in namespaces, which needs root and debootstrap; \"go tool mage test\" sets KUASAR_E2E=1")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	// What a machine leaves whose maker was killed, and the directory of one whose maker lives.
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	left := []string{
		fmt.Sprintf("/tmp/%s%d-1", name, gone.Process.Pid),
		fmt.Sprintf("%s/%s%d-1", hierarchy(), name, gone.Process.Pid),
		fmt.Sprintf("/tmp/%s%d-1", name, os.Getpid()),
	}
	for _, dir := range left {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(dir)
	}
	m, err := Start(ctx, Options{Progress: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		for _, dir := range append(m.cgroups, m.dir) {
			if _, err := os.Stat(dir); err == nil {
				t.Errorf("%s is left", dir)
			}
		}
	}()
	for i, dir := range left {
		if _, err := os.Stat(dir); os.IsNotExist(err) != (i < 2) {
			t.Errorf("after the start %s: %v", dir, err)
		}
	}
	const unit = "[Service]\nExecStart=/bin/sleep 1000\nRuntimeDirectory=trial\n"
	if err := m.Write("/etc/systemd/system/trial.service", unit); err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"daemon-reload", "start trial"} {
		if _, err := m.Run(ctx, append([]string{"systemctl"}, strings.Fields(command)...)...); err != nil {
			t.Fatal(err)
		}
	}
	if pids, err := m.PIDs("/usr/bin/sleep"); err != nil || len(pids) != 1 {
		t.Errorf("the processes of the unit are %v, %v", pids, err)
	}
	if _, err := os.Stat(m.Path("/run/trial")); err != nil {
		t.Error(err)
	}
	// Nobody else changes this one meanwhile.
	const ttl = "/proc/sys/net/ipv4/ip_default_ttl"
	before, err := os.ReadFile(ttl)
	if err != nil {
		t.Fatal(err)
	}
	// What pods' networks need works, and does not reach this machine.
	for _, script := range []string{
		"echo 63 >" + ttl + " && [ $(cat " + ttl + ") = 63 ]",
		"! { echo 1 >/proc/sys/kernel/panic; } 2>/dev/null",
		"ip netns add trial && ip netns exec trial sh -c 'echo 62 >" + ttl + "' && [ $(cat " + ttl + ") = 63 ]",
		"mkdir -p /run/o/u /run/o/w /run/o/m && mount -t overlay -o lowerdir=/etc,upperdir=/run/o/u,workdir=/run/o/w overlay /run/o/m",
	} {
		if _, err := m.Run(ctx, "/bin/sh", "-ec", script); err != nil {
			t.Error(err)
		}
	}
	after, err := os.ReadFile(ttl)
	if err != nil {
		t.Fatal(err)
	}
	if string(after) != string(before) {
		t.Errorf("the machine changed this one's %s from %s to %s", ttl, before, after)
	}
}

// hierarchy is where cgroup version 2 is mounted.
func hierarchy() string {
	const unified = "/sys/fs/cgroup/unified"
	if _, err := os.Stat(unified); err == nil {
		return unified
	}
	return "/sys/fs/cgroup"
}
