package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// errGone is wrapped when a path does not lead to the expected network namespace any more.
var errGone = errors.New("the network namespace is gone")

// openNetns opens a network namespace and returns its inode. inode is the expected one, or 0.
func openNetns(path string, inode uint64) (*os.File, uint64, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, 0, fmt.Errorf("%w: %w", errGone, err)
	}
	if err != nil {
		return nil, 0, err
	}
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		// What remains at the path when the namespace was unmounted is a plain file.
		f.Close()
		return nil, 0, fmt.Errorf("%w: %s is no network namespace", errGone, path)
	}
	var here, own unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &here); err != nil {
		f.Close()
		return nil, 0, err
	}
	if err := unix.Stat("/proc/thread-self/ns/net", &own); err == nil && own.Ino == here.Ino && own.Dev == here.Dev {
		f.Close()
		return nil, 0, fmt.Errorf("%s is the host's network namespace; a virtual machine cannot share it (hostNetwork)", path)
	}
	if inode != 0 && inode != here.Ino {
		f.Close()
		return nil, 0, fmt.Errorf("%w: %s is another one", errGone, path)
	}
	return f, here.Ino, nil
}

// within runs do on a thread that has entered the network namespace at path, with a netlink handle
// of it, and returns the namespace's inode.
func within(path string, inode uint64, do func(h *netlink.Handle) error) (uint64, error) {
	f, inode, err := openNetns(path, inode)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	done := make(chan error, 1)
	go enter(f, do, done)
	return inode, <-done
}

// enter runs do in the network namespace ns and sends its error to done. It is a goroutine of its
// own: if the thread cannot get back to the host's namespace, it stays locked and dies with it.
func enter(ns *os.File, do func(h *netlink.Handle) error, done chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The main thread cannot die, and /proc/self is its: another one has to do it. While
		// this one is locked, a new goroutine gets another thread.
		other := make(chan error)
		go enter(ns, do, other)
		err := <-other
		runtime.UnlockOSThread()
		done <- err
		return
	}
	done <- func() error {
		home, err := netns.Get()
		if err != nil {
			runtime.UnlockOSThread()
			return fmt.Errorf("cannot open the host's network namespace: %w", err)
		}
		defer home.Close()
		if err := netns.Set(netns.NsHandle(ns.Fd())); err != nil {
			runtime.UnlockOSThread()
			return fmt.Errorf("cannot enter the network namespace: %w", err)
		}
		err = withHandle(do)
		if netns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
		return err
	}()
}

func withHandle(do func(h *netlink.Handle) error) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("cannot open netlink: %w", err)
	}
	defer h.Close()
	return do(h)
}

// retry repeats do while the kernel says that what it needs is held by something that goes away.
func retry(ctx context.Context, do func() error) error {
	wait := 5 * time.Millisecond
	for {
		err := do()
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EAGAIN) || wait > 200*time.Millisecond {
			return err
		}
		select {
		case <-time.After(wait):
			wait *= 2
		case <-ctx.Done():
			return err
		}
	}
}

// watch reports changes of links and addresses in the namespace.
type watch struct {
	changed chan struct{}
	stop    func()
}

func (a *Attachment) watch() (*watch, error) {
	f, _, err := openNetns(a.netns, a.inode)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	ns := netns.NsHandle(f.Fd())
	w := &watch{changed: make(chan struct{}, 1)}
	done := make(chan struct{})
	w.stop = sync.OnceFunc(func() { close(done) })
	wake := func() {
		select {
		case w.changed <- struct{}{}:
		default:
		}
	}
	// Without an ErrorCallback the library logs the error of its own closing.
	ignore := func(error) {}
	links := make(chan netlink.LinkUpdate)
	if err := netlink.LinkSubscribeWithOptions(links, done, netlink.LinkSubscribeOptions{Namespace: &ns, ErrorCallback: ignore}); err != nil {
		w.stop()
		return nil, err
	}
	addrs := make(chan netlink.AddrUpdate)
	if err := netlink.AddrSubscribeWithOptions(addrs, done, netlink.AddrSubscribeOptions{Namespace: &ns, ErrorCallback: ignore}); err != nil {
		w.stop()
		go drain(links)
		return nil, err
	}
	// The library closes the channels when done is closed; until then they must be read.
	go func() {
		for range links {
			wake()
		}
	}()
	go func() {
		for range addrs {
			wake()
		}
	}()
	return w, nil
}

func drain[T any](c <-chan T) {
	for range c {
	}
}
