package handover

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

const (
	inboxMagic = 0x316e694b // "Kin1"

	markAt  = 16
	pinsAt  = 64
	pinSize = 16

	// MaxPins is how many ranges of an Inbox can be pinned at once.
	MaxPins = 400
)

// ErrFull is wrapped when an Inbox has no room for another pin.
var ErrFull = errors.New("too many pinned ranges")

// Inbox holds the bytes that arrived from a socket or a FIFO, from the moment in which the kernel
// gave them out until its owner is done with them. Offsets count all bytes since the first and begin
// at First. Its methods must not be called at the same time.
type Inbox struct {
	file, pipe *os.File
	mark       Mark
	end        int64
	pins       []Pin // by slot; Len 0 is a free one
	punched    int64 // everything below was given back, but for pins
}

// First is the offset of the first byte of every Inbox.
const First = headerSize

// Mark is how far an Inbox's owner has got. It is changed as a whole or not at all.
type Mark struct {
	// At is the offset of the first byte that is still needed, pins aside.
	At int64
	// Count and Credit mean what the owner wants them to.
	Count, Credit uint64
}

// Pin is a range that is still needed, although the Mark has passed it.
type Pin struct {
	Slot int
	Off  int64
	Len  int
}

// NewInbox makes an empty Inbox. Close closes it.
func NewInbox() (*Inbox, error) {
	file, err := newFile("inbox", inboxMagic)
	if err != nil {
		return nil, err
	}
	pipe, err := newPipe()
	if err != nil {
		file.Close()
		return nil, err
	}
	b := &Inbox{file: file, pipe: pipe, mark: Mark{At: First}, end: First, punched: First}
	if err := b.SetMark(b.mark); err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

// newPipe makes a pipe with both ends in one file.
func newPipe() (*os.File, error) {
	var ends [2]int
	if err := unix.Pipe2(ends[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, fmt.Errorf("cannot make a pipe: %w", err)
	}
	defer unix.Close(ends[0])
	defer unix.Close(ends[1])
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", ends[0]), unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open both ends of a pipe in one: %w", err)
	}
	return os.NewFile(uintptr(fd), "pipe"), nil
}

// OpenInbox goes on with the files of another daemon's Inbox, which it owns from now on; if it
// fails, it has closed them.
func OpenInbox(file, pipe *os.File) (_ *Inbox, err error) {
	b := &Inbox{file: file, pipe: pipe}
	defer func() {
		if err != nil {
			b.Close()
		}
	}()
	header, err := readHeader(file, "inbox", inboxMagic)
	if err != nil {
		return nil, err
	}
	// What the other daemon had taken, but not yet put into the file.
	if _, err := b.empty(); err != nil {
		return nil, err
	}
	if b.end, err = position(file); err != nil {
		return nil, fmt.Errorf("cannot tell how much arrived: %w", err)
	}
	b.mark = Mark{
		At:     int64(order.Uint64(header[markAt:])),
		Count:  order.Uint64(header[markAt+8:]),
		Credit: order.Uint64(header[markAt+16:]),
	}
	if b.mark.At < First || b.mark.At > b.end {
		return nil, fmt.Errorf("a kept inbox is damaged: its mark is at %d, its bytes are %d to %d", b.mark.At, First, b.end)
	}
	for slot := range MaxPins {
		at := header[pinsAt+slot*pinSize:]
		p := Pin{Slot: slot, Off: int64(order.Uint64(at)), Len: int(order.Uint64(at[8:]))}
		if p.Len != 0 && (p.Off < First || p.Len < 0 || int64(p.Len) > b.end-p.Off) {
			return nil, fmt.Errorf("a kept inbox is damaged: it pins %d bytes at %d, its bytes are %d to %d", p.Len, p.Off, First, b.end)
		}
		if p.Len != 0 {
			for len(b.pins) <= slot {
				b.pins = append(b.pins, Pin{Slot: len(b.pins)})
			}
			b.pins[slot] = p
		}
	}
	b.punched = First
	b.giveBack()
	return b, nil
}

// Files are what Store must keep, by the suffix of their names.
func (b *Inbox) Files() map[string]*os.File { return map[string]*os.File{"in": b.file, "pipe": b.pipe} }

// Close closes the Inbox's files. What the store keeps of them stays.
func (b *Inbox) Close() error {
	return errors.Join(closeFile(b.file), closeFile(b.pipe))
}

func closeFile(f *os.File) error {
	if f == nil {
		return nil
	}
	return f.Close()
}

// FillFrom takes what a socket, or FIFO, has, up to 64 KiB, without waiting. It returns unix.EAGAIN
// when there is nothing, and io.EOF when the other end has closed; of a FIFO that is also what is
// seen before the first writer comes.
func (b *Inbox) FillFrom(fd int, fifo bool) (int, error) {
	if fifo {
		n, err := again(func() (int64, error) {
			return unix.Splice(fd, nil, descriptor(b.file), nil, chunk, unix.SPLICE_F_NONBLOCK)
		})
		switch {
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.EOF
		}
		b.end += n
		return int(n), nil
	}
	n, err := again(func() (int64, error) {
		return unix.Splice(fd, nil, descriptor(b.pipe), nil, chunk, unix.SPLICE_F_NONBLOCK)
	})
	switch {
	case err != nil:
		return 0, err
	case n == 0:
		return 0, io.EOF
	}
	moved, err := b.empty()
	b.end += moved
	return int(moved), err
}

// empty moves what is in the pipe into the file.
func (b *Inbox) empty() (moved int64, err error) {
	for {
		n, err := again(func() (int64, error) {
			return unix.Splice(descriptor(b.pipe), nil, descriptor(b.file), nil, chunk, unix.SPLICE_F_NONBLOCK)
		})
		switch {
		case errors.Is(err, unix.EAGAIN), err == nil && n == 0:
			return moved, nil
		case err != nil:
			return moved, fmt.Errorf("cannot put what arrived into the inbox: %w", err)
		}
		moved += n
	}
}

// End is the offset behind the last byte that arrived.
func (b *Inbox) End() int64 { return b.end }

// ReadAt reads what arrived and was not given back. Reading past End is an error.
func (b *Inbox) ReadAt(p []byte, off int64) (int, error) {
	if off < First || off+int64(len(p)) > b.end {
		return 0, fmt.Errorf("cannot read %d bytes at %d of an inbox that holds %d to %d: %w", len(p), off, First, b.end, io.ErrUnexpectedEOF)
	}
	return b.file.ReadAt(p, off)
}

// Mark is the last that was set.
func (b *Inbox) Mark() Mark { return b.mark }

// SetMark remembers m. Once it returns, no daemon will see an earlier one.
func (b *Inbox) SetMark(m Mark) error {
	if m.At < b.mark.At || m.At > b.end {
		return fmt.Errorf("an inbox's mark cannot move from %d to %d: it holds bytes up to %d", b.mark.At, m.At, b.end)
	}
	var p [24]byte
	order.PutUint64(p[0:], uint64(m.At))
	order.PutUint64(p[8:], m.Count)
	order.PutUint64(p[16:], m.Credit)
	if _, err := b.file.WriteAt(p[:], markAt); err != nil {
		return fmt.Errorf("cannot set the mark of an inbox: %w", err)
	}
	b.mark = m
	if pageFloor(m.At)-b.punched >= punchAt {
		b.giveBack()
	}
	return nil
}

// giveBack punches out the whole pages before the mark that hold no pin.
func (b *Inbox) giveBack() {
	from, limit := b.punched, pageFloor(b.mark.At)
	if limit <= from {
		return
	}
	pins := slices.DeleteFunc(slices.Clone(b.pins), func(p Pin) bool { return p.Len == 0 })
	slices.SortFunc(pins, func(p, q Pin) int { return int(p.Off - q.Off) })
	for _, p := range pins {
		punch(b.file, from, min(pageFloor(p.Off), limit))
		from = max(from, pageCeil(p.Off+int64(p.Len)))
	}
	punch(b.file, from, limit)
	b.punched = limit
}

// Pin keeps the range of length bytes at off until Unpin, whatever the mark. Once it returns, every
// daemon will find it in Pinned. Over MaxPins at once the error wraps ErrFull.
func (b *Inbox) Pin(off int64, length int) (slot int, err error) {
	if length <= 0 || off < b.mark.At || off+int64(length) > b.end {
		return 0, fmt.Errorf("cannot pin %d bytes at %d of an inbox whose mark is at %d and whose bytes end at %d", length, off, b.mark.At, b.end)
	}
	slot = slices.IndexFunc(b.pins, func(p Pin) bool { return p.Len == 0 })
	if slot < 0 {
		if len(b.pins) == MaxPins {
			return 0, fmt.Errorf("cannot pin more than %d ranges of an inbox: %w", MaxPins, ErrFull)
		}
		slot = len(b.pins)
		b.pins = append(b.pins, Pin{Slot: slot})
	}
	p := Pin{Slot: slot, Off: off, Len: length}
	if err := b.writePin(p); err != nil {
		return 0, err
	}
	b.pins[slot] = p
	return slot, nil
}

// Unpin ends a pin.
func (b *Inbox) Unpin(slot int) error {
	if slot < 0 || slot >= len(b.pins) || b.pins[slot].Len == 0 {
		return fmt.Errorf("slot %d of an inbox is not pinned", slot)
	}
	p := b.pins[slot]
	if err := b.writePin(Pin{Slot: slot}); err != nil {
		return err
	}
	b.pins[slot] = Pin{Slot: slot}
	// Its pages had been left out, if the mark has passed them and no other pin is there.
	from, to := pageFloor(p.Off), min(pageCeil(p.Off+int64(p.Len)), b.punched)
	for _, q := range b.pins {
		if q.Len == 0 {
			continue
		}
		first, last := pageFloor(q.Off), pageCeil(q.Off+int64(q.Len))
		if first <= from {
			from = max(from, min(last, to))
		}
		if last >= to {
			to = min(to, max(first, from))
		}
	}
	punch(b.file, max(from, First), to)
	return nil
}

func (b *Inbox) writePin(p Pin) error {
	var at [pinSize]byte
	order.PutUint64(at[0:], uint64(p.Off))
	order.PutUint64(at[8:], uint64(p.Len))
	if _, err := b.file.WriteAt(at[:], pinsAt+int64(p.Slot)*pinSize); err != nil {
		return fmt.Errorf("cannot remember a pin of an inbox: %w", err)
	}
	return nil
}

// Pinned are the pins, in the order of their offsets.
func (b *Inbox) Pinned() []Pin {
	pins := slices.DeleteFunc(slices.Clone(b.pins), func(p Pin) bool { return p.Len == 0 })
	slices.SortFunc(pins, func(p, q Pin) int { return int(p.Off - q.Off) })
	return pins
}
