package stratovirt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"

	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/machine"
	"kuasar.io/kuasar/sandboxer/vm/process"
	"kuasar.io/kuasar/sandboxer/vm/qmp"
)

// unplugAgain is machine.DefaultUnplugAgain; tests are less patient.
var unplugAgain = machine.DefaultUnplugAgain

func diskID(slot int, serial string) string { return fmt.Sprintf("disk-%d-%s", slot, serial) }

func (m *Machine) diskKind() machine.DiskKind {
	return machine.DiskKind{
		Slots:  rootPorts,
		ID:     diskID,
		PlugIn: m.plugIn,
		Busy:   func(e *qmp.Error) bool { return strings.Contains(e.Desc, "plugging") },
		NoDevice: func(e *qmp.Error) bool {
			return e.Class == "DeviceNotFound" || strings.Contains(strings.ToLower(e.Desc), "not found")
		},
		// It refuses without a word. A node that is not there was deleted before an earlier daemon could
		// write that down.
		NoNode:      func(*qmp.Error) bool { return true },
		Keep:        true,
		Changed:     m.saveDisks,
		UnplugAgain: unplugAgain,
	}
}

// AttachDisk plugs in a disk; see vm.Machine.
func (m *Machine) AttachDisk(ctx context.Context, d vm.Disk) error {
	// Its replaceable devices could take one, but no version can remove the block node of one again.
	if m.driver.microvm() && !m.Gone() {
		return fmt.Errorf("cannot attach disk %s (%s) to pod %s: the machine type microvm takes no disks while it runs; use virt or q35", d.Serial, d.Path, m.PodID())
	}
	return m.Machine.AttachDisk(ctx, d)
}

// DetachDisk unplugs a disk; see vm.Machine.
func (m *Machine) DetachDisk(ctx context.Context, serial string) error {
	if m.driver.microvm() && !m.Gone() {
		return nil // it never had one
	}
	return m.Machine.DetachDisk(ctx, serial)
}

// saveDisks writes down which ports are taken, as StratoVirt cannot be asked.
func (m *Machine) saveDisks(serials []string) error {
	b, err := json.Marshal(serials)
	if err != nil {
		return err
	}
	return process.WriteFile(m.Path(disksFile), b)
}

// loadDisks reads what saveDisks wrote.
func (m *Machine) loadDisks() {
	var serials []string
	b, err := os.ReadFile(m.Path(disksFile))
	if err == nil {
		err = json.Unmarshal(b, &serials)
	} else if errors.Is(err, os.ErrNotExist) {
		err = nil // there never was a disk
	}
	if err != nil {
		m.Log.Warn("the disks that are plugged in are not known; none can be plugged in or out", "error", err)
	}
	m.Disks.Set(serials, nil, err)
}

// blockdev is the request that makes StratoVirt of version v open file. It is given the very file that
// was checked, by the path of this process's descriptor, as the path in d may lead elsewhere by now.
func blockdev(v version, id string, d vm.Disk, file *os.File, block bool) map[string]any {
	source := map[string]any{"driver": "file", "filename": fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), file.Fd())}
	// A block device goes around the host's page cache; a file may be on a file system that cannot. From
	// 2.3 on, direct is refused without saying how; 2.2 knows no such key.
	if block && v.atLeast(2, 3) {
		source["aio"] = "native"
	}
	return map[string]any{
		"node-name": id,
		"driver":    "raw",
		"read-only": d.ReadOnly,
		"cache":     map[string]any{"direct": block, "no-flush": false},
		"file":      source,
	}
}

func (m *Machine) plugIn(ctx context.Context, c *qmp.Client, slot int, id string, d vm.Disk, file *os.File, block bool) error {
	if err := c.Execute(ctx, "blockdev-add", blockdev(m.driver.version, id, d, file, block), nil); err != nil {
		return err
	}
	return machine.AddDevice(ctx, c, id, map[string]string{
		"id": id, "driver": "virtio-blk-pci", "bus": rootPort(slot), "addr": "0x0", "drive": id, "serial": d.Serial,
	})
}
