package qemu

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/process"
)

// DropMonitor closes the machine's connections to QEMU, as the end of its daemon does.
func DropMonitor(m vm.Machine) { m.(*Machine).DropMonitor() }

// AskAgainAfter sets when a guest is asked again to let a disk go, until the test ends.
func AskAgainAfter(t testing.TB, d time.Duration) {
	before := unplugAgain
	unplugAgain = d
	t.Cleanup(func() { unplugAgain = before })
}

// TryKVM boots the kernel as New does to find out whether KVM works.
func TryKVM(d *Driver, kernel string) error { return d.tryKVM(kernel) }

// CommandLine is what Start would execute; descriptors are numbered from 3.
func CommandLine(d *Driver, s vm.Spec) []string {
	rootFSType := ""
	if s.Initrd == "" {
		rootFSType = "ext4"
	}
	var vhost vhostNets
	if d.vhostNet != "" {
		vhost = make(vhostNets, len(s.NICs))
	}
	args, _ := d.commandLine(s, rootFSType, sockets{}, vhost)
	return args
}

const (
	LogLimit  = process.LogLimit
	RootPorts = rootPorts
)

// Drain runs a console on a socket until its other end closes.
func Drain(ctx context.Context, socket, path string, log *slog.Logger) (tail func() []string, panicked <-chan string, err error) {
	ch := make(chan string, 1)
	c, err := process.OpenConsole(ctx, socket, path, ch, log)
	if err != nil {
		return nil, nil, err
	}
	return func() []string { <-c.Done(); return c.Lines(10) }, ch, nil
}
