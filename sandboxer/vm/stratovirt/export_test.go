package stratovirt

import (
	"encoding/json"
	"os"
	"testing"
	"time"

	"kuasar.io/kuasar/sandboxer/vm"
)

// DropMonitor closes the machine's connections to StratoVirt, as the end of its daemon does.
func DropMonitor(m vm.Machine) { m.(*Machine).DropMonitor() }

// AskAgainAfter sets when a guest is asked again to let a disk go, until the test ends.
func AskAgainAfter(t testing.TB, d time.Duration) {
	before := unplugAgain
	unplugAgain = d
	t.Cleanup(func() { unplugAgain = before })
}

// BoundMessagesEvery sets how often StratoVirt's messages are bounded, until the test ends.
func BoundMessagesEvery(t testing.TB, d time.Duration) {
	before := messagesPeriod
	messagesPeriod = d
	t.Cleanup(func() { messagesPeriod = before })
}

// CommandLine is what Start would execute; descriptors are numbered from 3.
func CommandLine(d *Driver, s vm.Spec) []string {
	rootFSType := ""
	if s.Image != "" {
		rootFSType = "erofs"
	}
	args, _ := d.commandLine(s, rootFSType)
	return args
}

// Blockdev is the request for a disk to the driver's version.
func Blockdev(d *Driver, block bool) []byte {
	b, err := json.Marshal(blockdev(d.version, "disk-0-x", vm.Disk{ReadOnly: true}, os.Stdin, block))
	if err != nil {
		panic(err)
	}
	return b
}

const (
	RootPorts     = rootPorts
	MessagesLimit = messagesLimit
)
