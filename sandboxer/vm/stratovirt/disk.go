package stratovirt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"time"

	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/disk"
	"kuasar.io/kuasar/sandboxer/vm/process"
	"kuasar.io/kuasar/sandboxer/vm/qmp"
)

// unplugTimeout bounds the wait for the guest to let a disk go, where the caller set no earlier one.
// A guest that ignores the request sends nothing, ever.
const unplugTimeout = 20 * time.Second

// unplugAgain is how often a guest is asked again that has not let a disk go.
var unplugAgain = 8 * time.Second

// disks are the plugged-in disks. A disk's device and its block node are both called
// disk-<root port>-<serial>.
type disks struct {
	mu      sync.Mutex
	ports   [rootPorts]string   // serial, or "" for a free port
	files   [rootPorts]*os.File // keep the host from mounting what the guest uses; nil after Restore
	deleted [rootPorts]bool     // StratoVirt said that the device is gone
	unknown error               // why nothing is known
	changed chan struct{}       // has room for one
}

var serialRE = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,20}$`)

func diskID(port int, serial string) string { return fmt.Sprintf("disk-%d-%s", port, serial) }

func (d *disks) init() { d.changed = make(chan struct{}, 1) }

// onDeleted notes a device that is gone, whoever waits for it.
func (d *disks) onDeleted(data json.RawMessage) {
	var event struct {
		Device string `json:"device"`
	}
	if json.Unmarshal(data, &event) != nil {
		return
	}
	d.mu.Lock()
	for port, serial := range d.ports {
		if serial != "" && diskID(port, serial) == event.Device {
			d.deleted[port] = true
		}
	}
	d.mu.Unlock()
	select {
	case d.changed <- struct{}{}:
	default:
	}
}

func (d *disks) find(serial string) (port int, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, s := range d.ports {
		if s != "" && s == serial {
			return i, true
		}
	}
	return 0, false
}

func (d *disks) take(serial string, file *os.File) (port int, err error) {
	if _, taken := d.find(serial); taken {
		return 0, errors.New("a disk with this serial is plugged in already")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, s := range d.ports {
		if s == "" {
			d.ports[i], d.files[i], d.deleted[i] = serial, file, false
			return i, nil
		}
	}
	return 0, fmt.Errorf("all %d slots for disks are taken", rootPorts)
}

// free makes a port free again and closes its file.
func (d *disks) free(port int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.files[port] != nil {
		d.files[port].Close()
	}
	d.ports[port], d.files[port], d.deleted[port] = "", nil, false
}

func (d *disks) isDeleted(port int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.deleted[port]
}

// release closes what was held for a guest that has ended.
func (d *disks) release() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, f := range d.files {
		if f != nil {
			f.Close()
			d.files[i] = nil
		}
	}
}

// saveDisks writes down which ports are taken. It is called before StratoVirt is asked to plug
// something in and after it has let it go, so that the record never says too little.
func (m *Machine) saveDisks() error {
	m.disks.mu.Lock()
	b, err := json.Marshal(m.disks.ports)
	m.disks.mu.Unlock()
	if err == nil {
		err = process.WriteFile(m.path(disksFile), b)
	}
	if err != nil {
		return fmt.Errorf("cannot record the disk: %w", err)
	}
	return nil
}

// loadDisks reads what saveDisks wrote.
func (m *Machine) loadDisks() error {
	b, err := os.ReadFile(m.path(disksFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil // there never was a disk
	}
	m.disks.mu.Lock()
	defer m.disks.mu.Unlock()
	if err == nil {
		err = json.Unmarshal(b, &m.disks.ports)
	}
	m.disks.unknown = err
	return err
}

// plug waits for its turn to change disks and returns the function that ends it.
func (m *Machine) plug(ctx context.Context) (done func(), err error) {
	if m.driver.microvm() {
		return nil, errors.New("the machine type microvm takes no disks while it runs; use virt or q35")
	}
	select {
	case m.plugging <- struct{}{}:
	case <-m.exited:
		return nil, vm.ErrGone
	case <-ctx.Done():
		return nil, fmt.Errorf("another disk is being changed: %w", ctx.Err())
	}
	if m.disks.unknown != nil {
		<-m.plugging
		return nil, fmt.Errorf("it is not known what is plugged in: %w", m.disks.unknown)
	}
	return func() { <-m.plugging }, nil
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
	if m.gone() {
		return vm.ErrGone
	}
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
	port, err := m.disks.take(d.Serial, file)
	if err != nil {
		file.Close()
		return err
	}
	if err = m.saveDisks(); err == nil {
		err = m.plugIn(ctx, c, diskID(port, d.Serial), rootPort(port), d, file, block)
	}
	if err != nil {
		m.disks.free(port)
		if serr := m.saveDisks(); serr != nil {
			err = fmt.Errorf("%w (and then: %w)", err, serr)
		}
	}
	return err
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

func (m *Machine) plugIn(ctx context.Context, c *qmp.Client, id, bus string, d vm.Disk, file *os.File, block bool) error {
	if err := c.Execute(ctx, "blockdev-add", blockdev(m.driver.version, id, d, file, block), nil); err != nil {
		return err
	}
	err := c.Execute(ctx, "device_add", map[string]string{
		"id": id, "driver": "virtio-blk-pci", "bus": bus, "addr": "0x0", "drive": id, "serial": d.Serial,
	}, nil)
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
	if m.gone() {
		return vm.ErrGone
	}
	if m.driver.microvm() {
		return nil // it never had one
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
	port, ok := m.disks.find(serial)
	if !ok {
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
		case <-c.Done():
			return c.Err() // the event may be lost; a later call asks anew
		case <-ctx.Done():
			return fmt.Errorf("the guest does not let it go: %w", ctx.Err())
		}
	}
	// A node that is not there was deleted before an earlier daemon could write that down.
	var refused *qmp.Error
	err = c.Execute(ctx, "blockdev-del", map[string]string{"node-name": id}, nil)
	if err != nil && !errors.As(err, &refused) {
		return err
	}
	if refused != nil {
		m.log.Warn("the block node of an unplugged disk cannot be deleted", "disk", serial, "error", err)
	}
	m.disks.free(port)
	return m.saveDisks()
}

// unplug asks the guest, through StratoVirt, to let the device id in a root port go.
func (m *Machine) unplug(ctx context.Context, c *qmp.Client, port int, id string) error {
	if m.disks.isDeleted(port) {
		return nil
	}
	err := c.Execute(ctx, "device_del", map[string]string{"id": id}, nil)
	var refused *qmp.Error
	switch {
	case !errors.As(err, &refused):
		return err
	case strings.Contains(refused.Desc, "plugging"):
		return nil // an earlier request is still being considered by the guest
	case refused.Class == "DeviceNotFound" || strings.Contains(strings.ToLower(refused.Desc), "not found"):
		m.disks.mu.Lock()
		m.disks.deleted[port] = true
		m.disks.mu.Unlock()
		return nil
	}
	return err
}
