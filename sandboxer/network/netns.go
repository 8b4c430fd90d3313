package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
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

// changes are the groups of the kernel's messages that can mean something new for a guest.
var changes = []uint{
	unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_NEIGH,
}

// Watch reports changes of the namespace's interfaces, addresses, routes and neighbours: after one, or
// after several, the channel yields an element. What there was before is not reported. It ends with
// ctx, and closes the channel then, or when the kernel reports nothing any more. As long as it lasts,
// it keeps the namespace.
func (a *Attachment) Watch(ctx context.Context) (<-chan struct{}, error) {
	f, err := a.subscribe()
	if err != nil {
		return nil, fmt.Errorf("cannot watch the network of %s: %w", a.netns, err)
	}
	stop := context.AfterFunc(ctx, func() { f.Close() })
	changed := make(chan struct{}, 1)
	go func() {
		defer close(changed)
		defer f.Close()
		defer stop()
		// What a message says does not matter, so its rest may be lost.
		message := make([]byte, 512)
		for {
			// Messages that the kernel could not keep were changes, too.
			if _, err := f.Read(message); err != nil && !errors.Is(err, unix.ENOBUFS) {
				return
			}
			select {
			case changed <- struct{}{}:
			default:
			}
		}
	}()
	return changed, nil
}

// subscribe opens a socket in the namespace that receives what the kernel says of changes.
func (a *Attachment) subscribe() (f *os.File, err error) {
	address := &unix.SockaddrNetlink{Family: unix.AF_NETLINK}
	for _, group := range changes {
		address.Groups |= 1 << (group - 1)
	}
	_, err = within(a.netns, a.inode, func(*netlink.Handle) error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		if err := unix.Bind(fd, address); err != nil {
			unix.Close(fd)
			return os.NewSyscallError("bind", err)
		}
		f = os.NewFile(uintptr(fd), "netlink")
		return nil
	})
	return f, err
}
