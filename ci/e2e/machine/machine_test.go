package machine

import (
	"context"
	"os"
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
	before, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	if err != nil {
		t.Fatal(err)
	}
	// What pods' networks need works, and does not reach this machine.
	for _, script := range []string{
		"echo 1 >/proc/sys/net/ipv4/ip_forward && [ $(cat /proc/sys/net/ipv4/ip_forward) = 1 ]",
		"! { echo 1 >/proc/sys/kernel/panic; } 2>/dev/null",
		"ip netns add trial && ip netns exec trial sh -c '[ $(cat /proc/sys/net/ipv4/ip_forward) = 0 ]'",
		"mkdir -p /run/o/u /run/o/w /run/o/m && mount -t overlay -o lowerdir=/etc,upperdir=/run/o/u,workdir=/run/o/w overlay /run/o/m",
	} {
		if _, err := m.Run(ctx, "/bin/sh", "-ec", script); err != nil {
			t.Error(err)
		}
	}
	after, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	if err != nil {
		t.Fatal(err)
	}
	// The first may be 1 already on a node; on the test machine it is 0.
	if string(after) != string(before) {
		t.Errorf("the machine changed this one's forwarding from %s to %s", before, after)
	}
}
