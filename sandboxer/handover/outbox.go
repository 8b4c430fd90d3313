package handover

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const (
	outboxMagic = 0x31747543 // "Cut1"

	baseAt   = 16
	intentAt = 32
)

// Outbox holds the bytes that are to go into a socket or a FIFO, until the kernel has taken them.
// Its methods must not be called at the same time.
type Outbox struct {
	file    *os.File
	base    uint64
	count   uint64
	end     int64
	sent    int64
	punched int64
}

// intent is an Append that happened if the file reaches its end.
type intent struct {
	begin, end    int64
	before, after uint64
}

// NewOutbox makes an empty Outbox. Close closes it.
func NewOutbox() (*Outbox, error) {
	file, err := newFile("outbox", outboxMagic)
	if err != nil {
		return nil, err
	}
	b := &Outbox{file: file, end: headerSize, sent: headerSize, punched: headerSize}
	if err := b.intend(intent{begin: b.end, end: b.end}); err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

// OpenOutbox goes on with the file of another daemon's Outbox, which it owns from now on; if it
// fails, it has closed it. An Append that was cut in the middle is undone.
func OpenOutbox(file *os.File) (_ *Outbox, err error) {
	b := &Outbox{file: file}
	defer func() {
		if err != nil {
			b.Close()
		}
	}()
	header, err := readHeader(file, "outbox", outboxMagic)
	if err != nil {
		return nil, err
	}
	b.base = order.Uint64(header[baseAt:])
	last := intent{
		begin: int64(order.Uint64(header[intentAt:])), end: int64(order.Uint64(header[intentAt+8:])),
		before: order.Uint64(header[intentAt+16:]), after: order.Uint64(header[intentAt+24:]),
	}
	info, err := file.Stat()
	if err != nil {
		return nil, fmt.Errorf("cannot tell the size of a kept outbox: %w", err)
	}
	if b.sent, err = position(file); err != nil {
		return nil, fmt.Errorf("cannot tell how much of an outbox was delivered: %w", err)
	}
	b.end, b.count = info.Size(), last.after
	if b.end < last.end {
		if b.end < last.begin {
			return nil, fmt.Errorf("a kept outbox is damaged: it has %d bytes, and its last piece begins at %d", b.end, last.begin)
		}
		b.count = last.before
		if err := b.cut(last.begin, last.before); err != nil {
			return nil, err
		}
	}
	if b.sent < headerSize || b.sent > b.end {
		return nil, fmt.Errorf("a kept outbox is damaged: %d bytes were delivered of %d", b.sent, b.end)
	}
	b.punched = headerSize
	b.giveBack(pageSize)
	return b, nil
}

// Files are what Store must keep, by the suffix of their names.
func (b *Outbox) Files() map[string]*os.File { return map[string]*os.File{"out": b.file} }

// Close closes the Outbox's file. What the store keeps of it stays.
func (b *Outbox) Close() error { return closeFile(b.file) }

// Append adds p as a whole and sets Count, or fails and has done neither. Once it returns, every
// daemon will deliver p.
func (b *Outbox) Append(p []byte, count uint64) error {
	if len(p) == 0 {
		return errors.New("cannot append nothing to an outbox")
	}
	end := b.end + int64(len(p))
	if err := b.intend(intent{begin: b.end, end: end, before: b.count, after: count}); err != nil {
		return err
	}
	if _, err := b.file.WriteAt(p, b.end); err != nil {
		return errors.Join(fmt.Errorf("cannot append %d bytes to an outbox: %w", len(p), err), b.cut(b.end, b.count))
	}
	b.end, b.count = end, count
	return nil
}

// cut makes the file end at end again. The order matters: as long as the intent stands, a short file
// says that it did not happen.
func (b *Outbox) cut(end int64, count uint64) error {
	if err := b.file.Truncate(end); err != nil {
		return fmt.Errorf("cannot cut an unfinished piece off an outbox: %w", err)
	}
	b.end = end
	return b.intend(intent{begin: end, end: end, before: count, after: count})
}

func (b *Outbox) intend(i intent) error {
	var p [32]byte
	order.PutUint64(p[0:], uint64(i.begin))
	order.PutUint64(p[8:], uint64(i.end))
	order.PutUint64(p[16:], i.before)
	order.PutUint64(p[24:], i.after)
	if _, err := b.file.WriteAt(p[:], intentAt); err != nil {
		return fmt.Errorf("cannot write the header of an outbox: %w", err)
	}
	return nil
}

// Count is what the last Append set. Its meaning is the owner's.
func (b *Outbox) Count() uint64 { return b.count }

// Base is what SetBase set. Its meaning is the owner's.
func (b *Outbox) Base() uint64 { return b.base }

// SetBase remembers a number of the owner.
func (b *Outbox) SetBase(base uint64) error {
	var p [8]byte
	order.PutUint64(p[:], base)
	if _, err := b.file.WriteAt(p[:], baseAt); err != nil {
		return fmt.Errorf("cannot write the header of an outbox: %w", err)
	}
	b.base = base
	return nil
}

// Pending is how many bytes the kernel has not taken yet.
func (b *Outbox) Pending() int64 { return b.end - b.sent }

// FlushTo gives a socket in non-blocking mode, or a FIFO, as much as it takes, without waiting. It
// returns unix.EAGAIN when that is nothing.
func (b *Outbox) FlushTo(fd int, fifo bool) (flushed int, err error) {
	for b.Pending() > 0 {
		n, err := again(func() (int64, error) {
			if fifo {
				return unix.Splice(descriptor(b.file), nil, fd, nil, int(b.Pending()), unix.SPLICE_F_NONBLOCK)
			}
			n, err := unix.Sendfile(fd, descriptor(b.file), nil, int(b.Pending()))
			return int64(n), err
		})
		if n > 0 {
			b.sent += n
			flushed += int(n)
			b.giveBack(punchAt)
		}
		switch {
		case err != nil && flushed > 0 && errors.Is(err, unix.EAGAIN):
			return flushed, nil
		case err != nil:
			return flushed, err
		case n <= 0:
			return flushed, fmt.Errorf("the kernel took nothing of %d bytes in an outbox", b.Pending())
		}
	}
	return flushed, nil
}

// Discard gives up what the kernel has not taken.
func (b *Outbox) Discard() error {
	if _, err := unix.Seek(descriptor(b.file), b.end, unix.SEEK_SET); err != nil {
		return fmt.Errorf("cannot discard the rest of an outbox: %w", err)
	}
	b.sent = b.end
	b.giveBack(pageSize)
	return nil
}

func (b *Outbox) giveBack(atLeast int64) {
	if to := pageFloor(b.sent); to-b.punched >= atLeast {
		punch(b.file, b.punched, to)
		b.punched = to
	}
}
