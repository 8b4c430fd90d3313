package machine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"sync"
	"time"

	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/disk"
	"kuasar.io/kuasar/sandboxer/vm/qmp"
)

// unplugTimeout bounds the wait for the guest to let a disk go, where the caller set no earlier one. A
// guest that ignores the request sends nothing, ever.
const unplugTimeout = 20 * time.Second

// DefaultUnplugAgain is when a guest is asked again that has not let a disk go. A guest that is still
// switching the disk's slot on overhears the first request, where the slot is a PCIe one and nothing
// remembers it: on aarch64. Otherwise it takes 6 s there, and a request within the first 5 of them
// would take the one before it back.
const DefaultUnplugAgain = 8 * time.Second

// DiskKind is how a hypervisor plugs disks in and out.
type DiskKind struct {
	// Slots is how many disks there can be at a time.
	Slots int
	// ID is the name of both the device and the block node of the disk in a slot.
	ID func(slot int, serial string) string
	// PlugIn makes the node id of an open file and its device in the slot, or neither.
	PlugIn func(ctx context.Context, c *qmp.Client, slot int, id string, d vm.Disk, file *os.File, block bool) error
	// Busy says that device_del was refused because an earlier request is still being considered.
	Busy func(*qmp.Error) bool
	// NoDevice says that device_del was refused because there is none.
	NoDevice func(*qmp.Error) bool
	// NoNode says that blockdev-del was refused because there is none.
	NoNode func(*qmp.Error) bool
	// Keep makes the machine hold the file for as long as the disk is plugged in: the hypervisor opens
	// it by itself, and nothing else keeps the host from mounting what the guest uses.
	Keep bool
	// Changed is called with the serials by slot before a disk is plugged in and after one is gone, so
	// that a record of them never says too little. It may be nil.
	Changed func(slots []string) error
	// UnplugAgain is DefaultUnplugAgain if it is 0.
	UnplugAgain time.Duration
}

// Disks are the disks that are plugged in.
type Disks struct {
	kind DiskKind
	// turn is held by the one operation that is under way.
	turn    chan struct{}
	changed chan struct{} // has room for one

	mu      sync.Mutex
	serials []string   // by slot; "" is a free one
	files   []*os.File // nil where none is held
	deleted []bool     // the hypervisor said that the device is gone
	unknown error      // why nothing is known
}

// NewDisks makes the disks of one machine: none.
func NewDisks(kind DiskKind) *Disks {
	if kind.UnplugAgain == 0 {
		kind.UnplugAgain = DefaultUnplugAgain
	}
	return &Disks{
		kind: kind, turn: make(chan struct{}, 1), changed: make(chan struct{}, 1),
		serials: make([]string, kind.Slots), files: make([]*os.File, kind.Slots), deleted: make([]bool, kind.Slots),
	}
}

var serialRE = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,20}$`)

// onDeleted notes a device that is gone, whoever waits for it.
func (d *Disks) onDeleted(data json.RawMessage) {
	var event struct {
		Device string `json:"device"` // absent for the parts of a device
	}
	if json.Unmarshal(data, &event) != nil || event.Device == "" {
		return
	}
	d.mu.Lock()
	for slot, serial := range d.serials {
		if serial != "" && d.kind.ID(slot, serial) == event.Device {
			d.deleted[slot] = true
		}
	}
	d.mu.Unlock()
	select {
	case d.changed <- struct{}{}:
	default:
	}
}

// Set replaces what is known: the serials by slot, and which of the devices are gone though their nodes
// are not. unknown is why nothing is, in which case no disk can come or go.
func (d *Disks) Set(serials []string, deleted []bool, unknown error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.serials)
	clear(d.deleted)
	copy(d.serials, serials)
	copy(d.deleted, deleted)
	d.unknown = unknown
	for slot := d.kind.Slots; slot < len(serials); slot++ {
		if serials[slot] != "" && d.unknown == nil {
			d.unknown = fmt.Errorf("there is a disk in slot %d of %d", slot, d.kind.Slots)
		}
	}
}

func (d *Disks) find(serial string) (slot int, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	slot = slices.Index(d.serials, serial)
	return slot, slot >= 0 && serial != ""
}

func (d *Disks) take(serial string, file *os.File) (slot int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if slices.Contains(d.serials, serial) {
		return 0, errors.New("a disk with this serial is plugged in already")
	}
	slot = slices.Index(d.serials, "")
	if slot < 0 {
		return 0, fmt.Errorf("all %d slots for disks are taken", d.kind.Slots)
	}
	d.serials[slot], d.deleted[slot] = serial, false
	if d.kind.Keep {
		d.files[slot] = file
	}
	return slot, nil
}

// free makes a slot free again and closes its file.
func (d *Disks) free(slot int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.files[slot] != nil {
		d.files[slot].Close()
	}
	d.serials[slot], d.files[slot], d.deleted[slot] = "", nil, false
}

func (d *Disks) isDeleted(slot int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.deleted[slot]
}

// release closes what was held for a guest that has ended.
func (d *Disks) release() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, f := range d.files {
		if f != nil {
			f.Close()
			d.files[i] = nil
		}
	}
}

func (d *Disks) save() error {
	if d.kind.Changed == nil {
		return nil
	}
	d.mu.Lock()
	serials := slices.Clone(d.serials)
	d.mu.Unlock()
	if err := d.kind.Changed(serials); err != nil {
		return fmt.Errorf("cannot record the disk: %w", err)
	}
	return nil
}

// plug waits for its turn to change disks and returns the function that ends it.
func (m *Machine) plug(ctx context.Context) (done func(), err error) {
	select {
	case m.Disks.turn <- struct{}{}:
	case <-m.exited:
		return nil, vm.ErrGone
	case <-ctx.Done():
		return nil, fmt.Errorf("another disk is being changed: %w", ctx.Err())
	}
	m.Disks.mu.Lock()
	unknown := m.Disks.unknown
	m.Disks.mu.Unlock()
	if unknown != nil {
		<-m.Disks.turn
		return nil, fmt.Errorf("it is not known what is plugged in: %w", unknown)
	}
	return func() { <-m.Disks.turn }, nil
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
	if m.Gone() {
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
	slot, err := m.Disks.take(d.Serial, file)
	if err != nil || !m.Disks.kind.Keep {
		defer file.Close()
	}
	if err != nil {
		return err
	}
	if err = m.Disks.save(); err == nil {
		err = m.Disks.kind.PlugIn(ctx, c, slot, m.Disks.kind.ID(slot, d.Serial), d, file, block)
	}
	if err != nil {
		m.Disks.free(slot)
		if serr := m.Disks.save(); serr != nil {
			err = fmt.Errorf("%w (and then: %w)", err, serr)
		}
	}
	return err
}

// AddDevice makes the device of a block node that is there already, or else deletes that node.
func AddDevice(ctx context.Context, c *qmp.Client, node string, arguments any) error {
	err := c.Execute(ctx, "device_add", arguments, nil)
	if err != nil {
		err = DeleteNode(ctx, c, node, err)
	}
	return err
}

// DeleteNode deletes a block node because of err, which it returns.
func DeleteNode(ctx context.Context, c *qmp.Client, node string, err error) error {
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), monitorTimeout)
	defer cancel()
	if derr := c.Execute(undo, "blockdev-del", map[string]string{"node-name": node}, nil); derr != nil {
		err = fmt.Errorf("%w (and then: %w)", err, derr)
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
	if m.Gone() {
		return vm.ErrGone
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
	slot, ok := m.Disks.find(serial)
	if !ok {
		return nil
	}
	id := m.Disks.kind.ID(slot, serial)
	if err := m.unplug(ctx, c, slot, id); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, unplugTimeout)
	defer cancel()
	again := time.NewTicker(m.Disks.kind.UnplugAgain)
	defer again.Stop()
	for !m.Disks.isDeleted(slot) {
		select {
		case <-m.Disks.changed:
		case <-again.C:
			if err := m.unplug(ctx, c, slot, id); err != nil {
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
	err = c.Execute(ctx, "blockdev-del", map[string]string{"node-name": id}, nil)
	var refused *qmp.Error
	if errors.As(err, &refused) && m.Disks.kind.NoNode(refused) {
		m.Log.Warn("the block node of an unplugged disk cannot be deleted", "disk", serial, "error", err)
		err = nil
	}
	if err != nil {
		return err
	}
	m.Disks.free(slot)
	return m.Disks.save()
}

// unplug asks the guest, through the hypervisor, to let the device id in a slot go.
func (m *Machine) unplug(ctx context.Context, c *qmp.Client, slot int, id string) error {
	if m.Disks.isDeleted(slot) {
		return nil
	}
	err := c.Execute(ctx, "device_del", map[string]string{"id": id}, nil)
	var refused *qmp.Error
	switch {
	case !errors.As(err, &refused):
		return err
	case m.Disks.kind.Busy(refused):
		return nil
	case m.Disks.kind.NoDevice(refused):
		m.Disks.mu.Lock()
		m.Disks.deleted[slot] = true
		m.Disks.mu.Unlock()
		return nil
	}
	return err
}
