package container

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/sandboxer/handover"
)

const (
	// maxPending is how much output waits for a client that does not read, in bytes, before the
	// process is held back.
	maxPending = 256 << 10
	// largeFIFO is the capacity that a FIFO gets once its client is slow. Output that is given to it
	// takes a page of the capacity, however short it is.
	largeFIFO = 256 << 10
)

// openFIFO opens a FIFO without waiting for its other end. With O_RDWR the file is both ends.
func openFIFO(path string, flag int) (*os.File, error) {
	fd, err := unix.Open(path, flag|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		err = &os.PathError{Op: "open", Path: path, Err: err}
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%w: the client has removed it: %w", err, errdefs.ErrNotFound)
		}
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFIFO {
		unix.Close(fd)
		return nil, fmt.Errorf("%s is not a FIFO: %w", path, errdefs.ErrInvalidArgument)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// control returns a file's descriptor, without making the file blocking as Fd does, and what waits
// for it. The descriptor is valid until the file is closed.
func control(f *os.File) (int, syscall.RawConn, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, nil, err
	}
	fd := -1
	err = raw.Control(func(n uintptr) { fd = int(n) })
	return fd, raw, err
}

// fifoSink writes to a FIFO, by way of an Outbox, so that what was taken from the guest reaches the
// client whatever becomes of this daemon. The FIFO's file is both of its ends: without a reading end,
// a write while the client restarts would fail and what it had not read would vanish. A reading end
// stays until close if the client has not read all, so that one that comes back after the exit finds
// the rest.
type fifoSink struct {
	niche niche
	path  string
	log   *slog.Logger
	// lasting says that another daemon would find what is here.
	lasting bool

	mu       sync.Mutex
	changed  sync.Cond
	fifo     *os.File // nil after finish
	fd       int
	raw      syscall.RawConn
	read     *os.File // after finish, if the client has not read all
	box      *handover.Outbox
	dropped  uint64 // of the position, what is not in box
	flushing bool   // a goroutine waits for the client to read
	enlarged bool
	discard  bool
	detached bool
}

// openFIFOSink goes on with what an earlier daemon has left in the niche, or opens the FIFO at path
// with the stream at an offset.
func openFIFOSink(path string, n niche, offset uint64, log *slog.Logger) (_ sink, err error) {
	f := &fifoSink{niche: n, path: path, log: log, lasting: n.store.Lasting()}
	f.changed.L = &f.mu
	defer func() {
		if err != nil {
			f.close()
		}
	}()
	if read := n.take("read"); read != nil {
		// Everything was in the FIFO already, and its end was to be told.
		f.read, f.discard = read, true
		n.remove("fifo", "out")
		return f, nil
	}
	taken := true
	if f.fifo = n.take("fifo"); f.fifo == nil {
		taken = false
		if f.fifo, err = openFIFO(path, unix.O_RDWR); err != nil {
			return nil, err
		}
	}
	if f.fd, f.raw, err = control(f.fifo); err != nil {
		return nil, err
	}
	if out := n.take("out"); out != nil {
		if f.box, err = handover.OpenOutbox(out); err != nil {
			log.Warn("output that an earlier daemon has taken is lost", "fifo", path, "error", err)
			n.remove("out")
		}
	}
	files := map[string]*os.File{}
	if !taken {
		n.remove("fifo")
		files["fifo"] = f.fifo
	}
	if f.box == nil {
		if f.box, err = handover.NewOutbox(); err != nil {
			return nil, err
		}
		if err = f.box.SetBase(offset); err != nil {
			return nil, err
		}
		n.remove("out")
		files["out"] = f.box.Files()["out"]
	}
	if err := n.put(files); err != nil {
		f.lasting = false
		log.Warn("output will not survive this daemon", "fifo", path, "error", err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.flushSome()
	return f, nil
}

// Write takes p when there is room. Where nothing lasts, it waits for the client to take it.
func (f *fifoSink) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.open() && f.box.Pending() > 0 && f.box.Pending()+int64(len(p)) > maxPending {
		f.changed.Wait()
	}
	if f.open() {
		if err := f.box.Append(p, f.box.Count()+uint64(len(p))); err != nil {
			f.log.Error("output is discarded", "fifo", f.path, "error", err)
			f.discard = true
		} else {
			f.flushSome()
			for !f.lasting && f.open() && f.box.Pending() > 0 {
				f.changed.Wait()
			}
			if !f.lasting && f.detached {
				return len(p) - int(f.box.Pending()), os.ErrClosed
			}
			return len(p), nil
		}
	}
	if f.detached {
		return 0, os.ErrClosed
	}
	f.dropped += uint64(len(p))
	return len(p), nil
}

// open tells whether the client may still get something. f.mu is held.
func (f *fifoSink) open() bool { return f.fifo != nil && !f.discard && !f.detached }

// flushSome gives the client what it takes now, and sees to it that it gets the rest. f.mu is held.
func (f *fifoSink) flushSome() {
	if f.flushing || f.flushed() {
		return
	}
	f.flushing = true
	go func() {
		err := f.raw.Write(func(uintptr) bool {
			f.mu.Lock()
			defer f.mu.Unlock()
			if f.flushed() {
				f.flushing = false
			}
			return !f.flushing
		})
		if err != nil {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.flushing = false
			f.changed.Broadcast()
		}
	}()
}

// flushed gives the client what it takes and tells whether there is nothing more to give. f.mu is
// held.
func (f *fifoSink) flushed() bool {
	for f.open() && f.box.Pending() > 0 {
		n, err := f.box.FlushTo(f.fd, true)
		if n > 0 {
			f.changed.Broadcast()
		}
		switch {
		case err == nil:
		case errors.Is(err, unix.EAGAIN) && !f.enlarged:
			f.enlarged = true
			// Without the privilege the capacity stays.
			_, _ = unix.FcntlInt(uintptr(f.fd), unix.F_SETPIPE_SZ, largeFIFO)
		case errors.Is(err, unix.EAGAIN):
			return false
		default:
			f.log.Warn("output is discarded", "fifo", f.path, "bytes", f.box.Pending(), "error", err)
			f.drop()
		}
	}
	f.changed.Broadcast()
	return true
}

// drop discards what waits and all that comes. f.mu is held.
func (f *fifoSink) drop() {
	f.discard = true
	if f.box != nil && !f.detached && !f.niche.left.Load() {
		if err := f.box.Discard(); err != nil {
			f.log.Warn("output that nobody reads is kept", "fifo", f.path, "error", err)
		}
	}
	f.changed.Broadcast()
}

func (f *fifoSink) position() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.at()
}

// at is position. f.mu is held.
func (f *fifoSink) at() uint64 {
	if f.box == nil {
		return f.dropped
	}
	at := f.box.Base() + f.box.Count() + f.dropped
	if !f.lasting {
		at -= uint64(f.box.Pending())
	}
	return at
}

func (f *fifoSink) resume(offset uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	at := f.at()
	if f.box == nil || offset <= at {
		return
	}
	if err := f.box.SetBase(f.box.Base() + offset - at); err != nil {
		f.log.Warn("output cannot be resumed exactly", "fifo", f.path, "error", err)
	}
}

func (f *fifoSink) flush(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.changed.Broadcast()
	})()
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.open() && f.box.Pending() > 0 && ctx.Err() == nil {
		f.changed.Wait()
	}
	switch {
	case f.detached:
		return os.ErrClosed
	case f.open() && f.box.Pending() > 0:
		return ctx.Err()
	}
	return nil
}

func (f *fifoSink) abandon() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.open() && f.box.Pending() > 0 {
		f.log.Warn("output is discarded: the client did not read it", "fifo", f.path, "bytes", f.box.Pending())
	}
	f.drop()
	f.wake()
}

func (f *fifoSink) detach() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.detached = true
	f.changed.Broadcast()
	f.wake()
}

// wake ends the goroutine that waits for the client. f.mu is held.
func (f *fifoSink) wake() {
	if f.fifo != nil {
		f.fifo.SetWriteDeadline(time.Unix(1, 0))
	}
}

func (f *fifoSink) finish() {
	f.mu.Lock()
	if f.fifo == nil {
		f.mu.Unlock()
		return
	}
	if unread, err := unix.IoctlGetInt(f.fd, unix.TIOCINQ); err != nil || unread > 0 {
		// Through the file, as the client may have removed the path.
		read, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.fd), os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err == nil {
			f.read = read
			err = f.niche.put(map[string]*os.File{"read": read})
		}
		if err != nil {
			f.log.Warn("output that the client has not read may get lost", "fifo", f.path, "error", err)
		}
	}
	f.closeFIFO()
	f.niche.remove("fifo", "out")
}

// closeFIFO closes the FIFO and its Outbox. f.mu is held, and released.
func (f *fifoSink) closeFIFO() {
	fifo := f.fifo
	f.fifo = nil
	if f.box != nil {
		f.dropped = f.at() // the position stays
		f.box.Close()
		f.box = nil
	}
	f.changed.Broadcast()
	f.mu.Unlock()
	if fifo != nil {
		// It waits for the goroutine that waits for the client, which needs the lock to end.
		fifo.Close()
	}
}

func (f *fifoSink) close() {
	f.mu.Lock()
	if f.read != nil {
		f.read.Close()
		f.read = nil
	}
	f.closeFIFO()
	f.niche.clear()
}

// fifoSource reads from a FIFO.
type fifoSource struct {
	niche  niche
	fifo   *os.File // with a writing end if only end ends the input
	raw    syscall.RawConn
	ending atomic.Bool
	closed atomic.Bool
}

// openFIFOSource goes on with what an earlier daemon has left in the niche, or in one of its
// siblings if that daemon got no further than opening; otherwise it opens the FIFO at path. hold
// keeps the input open when the client's last writer goes.
func openFIFOSource(path string, n niche, siblings []niche, hold bool, log *slog.Logger) (_ source, err error) {
	f := &fifoSource{niche: n}
	f.fifo = n.take("fifo")
	taken := f.fifo != nil
	for _, other := range siblings {
		// Only this file still knows whether a writer has come and gone.
		if file := other.take("fifo"); f.fifo == nil && sameFIFO(file, path) {
			f.fifo = file
		} else if file != nil {
			file.Close()
		}
	}
	if f.fifo == nil {
		flag := unix.O_RDONLY
		if hold {
			flag = unix.O_RDWR
		}
		if f.fifo, err = openFIFO(path, flag); err != nil {
			return nil, err
		}
	}
	if _, f.raw, err = control(f.fifo); err != nil {
		f.close()
		return nil, err
	}
	if !taken {
		n.remove("fifo")
		if err := n.put(map[string]*os.File{"fifo": f.fifo}); err != nil {
			log.Warn("input will not survive this daemon", "fifo", path, "error", err)
		}
	}
	for _, other := range siblings {
		other.clear()
	}
	return f, nil
}

// sameFIFO tells whether a file, which may be nil, is that at path.
func sameFIFO(f *os.File, path string) bool {
	if f == nil {
		return false
	}
	have, err := f.Stat()
	if err != nil {
		return false
	}
	want, err := os.Lstat(path)
	// A client that removes its FIFO has done so for good.
	return os.IsNotExist(err) || err == nil && os.SameFile(have, want)
}

func (f *fifoSource) fill(b *inbox) error {
	var result error
	err := f.raw.Read(func(fd uintptr) bool {
		_, err := b.fill(int(fd))
		switch {
		case errors.Is(err, unix.EAGAIN), err == io.EOF && !hungUp(int(fd)):
			// Nothing there, or no client has opened its end yet.
			if f.ending.Load() {
				result = io.EOF
				return true
			}
			return false
		default:
			result = err
			return true
		}
	})
	if err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		// end was called while nothing was there, or before this call: look once more.
		f.fifo.SetReadDeadline(time.Time{})
		return nil
	}
	if err != nil {
		return err
	}
	return result
}

// hungUp tells whether a writer was there and has gone, as read(2) cannot.
func hungUp(fd int) bool {
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	_, err := unix.Poll(poll, 0)
	return err == nil && poll[0].Revents&unix.POLLHUP != 0
}

func (f *fifoSource) ended() {}

func (f *fifoSource) end() {
	f.ending.Store(true)
	f.fifo.SetReadDeadline(time.Unix(1, 0))
}

func (f *fifoSource) finish() {
	if !f.closed.Swap(true) {
		f.fifo.Close()
		f.niche.remove("fifo")
	}
}

func (f *fifoSource) close() { f.finish() }
