package node

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// tapPrefix begins the names of the taps that package network makes. They vanish with their
// hypervisor; one that does not was made persistent by somebody.
const tapPrefix = "tap_kuasar"

// boundNamespaces lists the network namespaces that are bound to a path, as engines and CNI do.
func boundNamespaces() ([]string, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("nsfs"))
	if err != nil {
		return nil, fmt.Errorf("cannot list the network namespaces: %w", err)
	}
	var paths []string
	for _, m := range mounts {
		if strings.HasPrefix(m.Root, "net:") && !slices.Contains(paths, m.Mountpoint) {
			paths = append(paths, filepath.Clean(m.Mountpoint))
		}
	}
	return paths, nil
}

// leftTaps lists the pods' taps in a namespace that are persistent. Others need no collecting: they
// have a process that holds them.
func leftTaps(path string) ([]tap, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		return nil, err
	}
	var taps []tap
	for _, l := range links {
		device, ok := l.(*netlink.Tuntap)
		if !ok || !strings.HasPrefix(device.Name, tapPrefix) || device.NonPersist {
			continue
		}
		t := tap{name: device.Name}
		switch flags := device.RawFlags; {
		case flags&unix.IFF_UP == 0:
			t.reason = "it is down, so that it cannot be told whether a process uses it"
		case flags&unix.IFF_LOWER_UP != 0:
			t.reason = "a process uses it"
		default:
			t.remove = func() error { return removeTap(path, device.Name) }
		}
		taps = append(taps, t)
	}
	return taps, nil
}

func removeTap(path, name string) error {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	l, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("cannot find %s in %s: %w", name, path, err)
	}
	if err := h.LinkDel(l); err != nil {
		return fmt.Errorf("cannot remove %s from %s: %w", name, path, err)
	}
	return nil
}
