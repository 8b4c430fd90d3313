package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/disk"
	"kuasar.io/kuasar/sandboxer/vm/qmp"
)

// unplugTimeout bounds the wait for the guest to let a disk go, where the caller set no earlier one.
const unplugTimeout = 20 * time.Second

// unplugAgain is when a guest is asked again that has not let a disk go. A guest that is still
// switching the disk's slot on overhears the first request, where the slot is a PCIe one and nothing
// remembers it: on aarch64. Otherwise it takes 6 s there, and a request within the first 5 of them
// would take the one before it back.
var unplugAgain = 8 * time.Second

// disks are the plugged-in disks. A disk's device and its block node are both called
// disk-<root port>-<serial>, so that QEMU itself remembers everything about them.
type disks struct {
	mu      sync.Mutex
	ports   [rootPorts]string // serial, or "" for a free port
	deleted [rootPorts]bool   // QEMU said that the device is gone
	changed chan struct{}     // has room for one
}

var (
	serialRE = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,20}$`)
	diskIDRE = regexp.MustCompile(`^disk-rp(\d)-([A-Za-z0-9_.-]{1,20})$`)
)

func diskID(port int, serial string) string { return fmt.Sprintf("disk-%s-%s", rootPort(port), serial) }

// parseDiskID is the reverse of diskID.
func parseDiskID(id string) (port int, serial string, ok bool) {
	m := diskIDRE.FindStringSubmatch(id)
	if m == nil {
		return 0, "", false
	}
	port, _ = strconv.Atoi(m[1])
	return port, m[2], port < rootPorts
}

// onEvent notes devices that are gone, whoever waits for it.
func (d *disks) onEvent(e qmp.Event) {
	if e.Name != "DEVICE_DELETED" {
		return
	}
	var data struct {
		Device string `json:"device"` // absent for the parts of a device
	}
	if json.Unmarshal(e.Data, &data) != nil {
		return
	}
	if port, serial, ok := parseDiskID(data.Device); ok {
		d.mu.Lock()
		if d.ports[port] == serial {
			d.deleted[port] = true
		}
		d.mu.Unlock()
		select {
		case d.changed <- struct{}{}:
		default:
		}
	}
}

func (d *disks) find(serial string) (port int, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, s := range d.ports {
		if s == serial {
			return i, true
		}
	}
	return 0, false
}

func (d *disks) take(serial string) (port int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	free := -1
	for i, s := range d.ports {
		if s == serial {
			return 0, errors.New("a disk with this serial is plugged in already")
		}
		if s == "" && free < 0 {
			free = i
		}
	}
	if free < 0 {
		return 0, fmt.Errorf("all %d slots for disks are taken", rootPorts)
	}
	d.ports[free], d.deleted[free] = serial, false
	return free, nil
}

func (d *disks) free(port int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ports[port], d.deleted[port] = "", false
}

func (d *disks) isDeleted(port int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.deleted[port]
}

// plug waits for its turn to change disks and returns the function that ends it.
func (m *Machine) plug(ctx context.Context) (done func(), err error) {
	select {
	case m.plugging <- struct{}{}:
		return func() { <-m.plugging }, nil
	case <-m.exited:
		return nil, vm.ErrGone
	case <-ctx.Done():
		return nil, fmt.Errorf("another disk is being changed: %w", ctx.Err())
	}
}

// AttachDisk plugs in a disk; see vm.Machine. It refuses what is neither a block device nor a
// regular file, and what the host has mounted.
func (m *Machine) AttachDisk(ctx context.Context, d vm.Disk) error {
	if err := m.attachDisk(ctx, d); err != nil {
		return fmt.Errorf("cannot attach disk %s (%s) to pod %s: %w", d.Serial, d.Path, m.podID, err)
	}
	return nil
}

func (m *Machine) attachDisk(ctx context.Context, d vm.Disk) error {
	if !serialRE.MatchString(d.Serial) {
		return errors.New("a serial is 1 to 20 letters, digits, '.', '_' or '-'")
	}
	done, err := m.plug(ctx)
	if err != nil {
		return err
	}
	defer done()
	c, err := m.monitor(ctx)
	if err != nil {
		return err
	}
	file, block, err := disk.Open(d.Path, d.ReadOnly)
	if err != nil {
		return err
	}
	defer file.Close()
	port, err := m.disks.take(d.Serial)
	if err != nil {
		return err
	}
	id := diskID(port, d.Serial)
	if err := plugIn(ctx, c, id, rootPort(port), d, file, block); err != nil {
		m.disks.free(port)
		return err
	}
	return nil
}

// plugIn gives QEMU the very file that was checked, not a path that may lead elsewhere by now.
func plugIn(ctx context.Context, c *qmp.Client, id, bus string, d vm.Disk, file *os.File, block bool) error {
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
		"read-only": d.ReadOnly,
		"discard":   "unmap",
		"file":      map[string]any{"driver": driver, "filename": fmt.Sprintf("/dev/fdset/%d", set.ID)},
	}, nil)
	// The node has a duplicate, or there is no node.
	rerr := c.Execute(ctx, "remove-fd", map[string]any{"fdset-id": set.ID}, nil)
	if err != nil {
		return err
	}
	if err = rerr; err == nil {
		err = c.Execute(ctx, "device_add", map[string]any{
			"driver": "virtio-blk-pci",
			"id":     id,
			"bus":    bus,
			"drive":  id,
			"serial": d.Serial,
		}, nil)
	}
	if err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), monitorTimeout)
		defer cancel()
		if derr := c.Execute(undo, "blockdev-del", map[string]string{"node-name": id}, nil); derr != nil {
			err = fmt.Errorf("%w (and then: %w)", err, derr)
		}
	}
	return err
}

// DetachDisk unplugs a disk and waits until the guest has let it go; see vm.Machine. If the guest
// does not, the disk keeps its slot, and a later call goes on waiting.
func (m *Machine) DetachDisk(ctx context.Context, serial string) error {
	if err := m.detachDisk(ctx, serial); err != nil {
		return fmt.Errorf("cannot detach disk %s from pod %s: %w", serial, m.podID, err)
	}
	return nil
}

func (m *Machine) detachDisk(ctx context.Context, serial string) error {
	done, err := m.plug(ctx)
	if err != nil {
		return err
	}
	defer done()
	c, err := m.monitor(ctx)
	if err != nil {
		return err
	}
	port, ok := m.disks.find(serial)
	if !ok || serial == "" {
		return nil
	}
	id := diskID(port, serial)
	if err := m.unplug(ctx, c, port, id); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, unplugTimeout)
	defer cancel()
	again := time.NewTicker(unplugAgain)
	defer again.Stop()
	for !m.disks.isDeleted(port) {
		select {
		case <-m.disks.changed:
		case <-again.C:
			if err := m.unplug(ctx, c, port, id); err != nil {
				return err
			}
		case <-m.exited:
			return vm.ErrGone
		case <-ctx.Done():
			return fmt.Errorf("the guest does not let it go: %w", ctx.Err())
		}
	}
	if err := c.Execute(ctx, "blockdev-del", map[string]string{"node-name": id}, nil); err != nil {
		var refused *qmp.Error
		if !errors.As(err, &refused) || !strings.Contains(refused.Desc, "Failed to find node") {
			return err
		}
	}
	m.disks.free(port)
	return nil
}

// unplug asks the guest, through QEMU, to let the device id in a root port go.
func (m *Machine) unplug(ctx context.Context, c *qmp.Client, port int, id string) error {
	if m.disks.isDeleted(port) {
		return nil
	}
	err := c.Execute(ctx, "device_del", map[string]string{"id": id}, nil)
	var refused *qmp.Error
	switch {
	case !errors.As(err, &refused):
		return err
	case refused.Class == "DeviceNotFound":
		m.disks.mu.Lock()
		m.disks.deleted[port] = true
		m.disks.mu.Unlock()
	case !strings.Contains(refused.Desc, "unplug"):
		return err
	} // else an earlier request is still being considered by the guest
	return nil
}

// findDisks asks QEMU which disks are plugged in.
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
	m.disks.mu.Lock()
	defer m.disks.mu.Unlock()
	m.disks.ports, m.disks.deleted = [rootPorts]string{}, [rootPorts]bool{}
	// A node without its device was being plugged in or out when the last connection ended.
	for _, n := range nodes {
		if port, serial, ok := parseDiskID(n.Name); ok {
			m.disks.ports[port], m.disks.deleted[port] = serial, true
		}
	}
	for _, n := range children {
		if port, serial, ok := parseDiskID(n.Name); ok {
			m.disks.ports[port], m.disks.deleted[port] = serial, false
		}
	}
	return nil
}
