package qemu

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"

	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/machine"
	"kuasar.io/kuasar/sandboxer/vm/qmp"
)

// unplugAgain is machine.DefaultUnplugAgain; tests are less patient.
var unplugAgain = machine.DefaultUnplugAgain

// diskIDRE is the form of diskID, by which QEMU itself remembers everything about a disk.
var diskIDRE = regexp.MustCompile(`^disk-rp(\d)-([A-Za-z0-9_.-]{1,20})$`)

func diskID(slot int, serial string) string { return fmt.Sprintf("disk-%s-%s", rootPort(slot), serial) }

// parseDiskID is the reverse of diskID.
func parseDiskID(id string) (slot int, serial string, ok bool) {
	m := diskIDRE.FindStringSubmatch(id)
	if m == nil {
		return 0, "", false
	}
	slot, _ = strconv.Atoi(m[1])
	return slot, m[2], slot < rootPorts
}

func (d *Driver) diskKind() machine.DiskKind {
	return machine.DiskKind{
		Slots:       rootPorts,
		ID:          diskID,
		PlugIn:      d.plugIn,
		Busy:        func(e *qmp.Error) bool { return strings.Contains(e.Desc, "unplug") },
		NoDevice:    func(e *qmp.Error) bool { return e.Class == "DeviceNotFound" },
		NoNode:      func(e *qmp.Error) bool { return strings.Contains(e.Desc, "Failed to find node") },
		UnplugAgain: unplugAgain,
	}
}

// plugIn gives QEMU the very file that was checked, not a path that may lead elsewhere by now.
func (d *Driver) plugIn(ctx context.Context, c *qmp.Client, slot int, id string, disk vm.Disk, file *os.File, block bool) error {
	var set struct {
		ID int `json:"fdset-id"`
	}
	if err := c.ExecuteWithFile(ctx, "add-fd", map[string]string{"opaque": id}, &set, file); err != nil {
		return err
	}
	driver := "file"
	if block {
		driver = "host_device"
	}
	err := c.Execute(ctx, "blockdev-add", map[string]any{
		"driver":    "raw",
		"node-name": id,
		"read-only": disk.ReadOnly,
		"discard":   "unmap",
		"file":      map[string]any{"driver": driver, "filename": fmt.Sprintf("/dev/fdset/%d", set.ID)},
	}, nil)
	// The node has a duplicate, or there is no node.
	rerr := c.Execute(ctx, "remove-fd", map[string]any{"fdset-id": set.ID}, nil)
	if err != nil {
		return err
	}
	if rerr != nil {
		return machine.DeleteNode(ctx, c, id, rerr)
	}
	device := map[string]any{"id": id, "drive": id, "serial": disk.Serial}
	if d.scsi {
		device["driver"], device["bus"], device["scsi-id"] = "scsi-hd", scsiBus, slot
	} else {
		device["driver"], device["bus"] = "virtio-blk-pci", rootPort(slot)
	}
	return machine.AddDevice(ctx, c, id, device)
}

// findDisks asks QEMU which disks are plugged in: what happened while nobody listened, it remembers.
func (m *Machine) findDisks(ctx context.Context, c *qmp.Client) error {
	var children []struct{ Name string }
	if err := c.Execute(ctx, "qom-list", map[string]string{"path": "/machine/peripheral"}, &children); err != nil {
		return err
	}
	var nodes []struct {
		Name string `json:"node-name"`
	}
	if err := c.Execute(ctx, "query-named-block-nodes", map[string]bool{"flat": true}, &nodes); err != nil {
		return err
	}
	serials, deleted := make([]string, rootPorts), make([]bool, rootPorts)
	// A node without its device was being plugged in or out when the last connection ended.
	for _, n := range nodes {
		if slot, serial, ok := parseDiskID(n.Name); ok {
			serials[slot], deleted[slot] = serial, true
		}
	}
	for _, n := range children {
		if slot, serial, ok := parseDiskID(n.Name); ok {
			serials[slot], deleted[slot] = serial, false
		}
	}
	m.Disks.Set(serials, deleted, nil)
	return nil
}
