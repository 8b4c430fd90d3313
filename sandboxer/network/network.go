// Package network joins a pod's network namespace to its virtual machine.
//
// CNI has put an Ethernet interface, usually a veth, with addresses and routes into the namespace.
// Beside each of them a tap is made, and tc redirects what arrives at either to the other's
// sending side. The guest's NIC carries the interface's MAC address and gets its addresses, routes
// and permanent neighbours. They stay on the interface as well, where CNI plugins and engines look
// for them: the redirect takes every frame before the namespace's own stack sees it, so only the
// guest answers. The filters are u32's, which every kernel has, unlike matchall.
//
// The taps are not persistent. They vanish with the last descriptor, that is with the hypervisor,
// so a crash of anything leaves no device behind; the namespace takes the rest with it.
package network

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/vm"
)

// maxInterfaces bounds the interfaces of a pod; each costs the machine a PCI slot.
const maxInterfaces = 8

// tapPrefix and a number name the taps, within the 15 characters of an interface name.
const tapPrefix = "tap_kuasar"

// addrGenModeNone is IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
const addrGenModeNone = 1

// defaultMTU is the tap's before the interface is known.
const defaultMTU = 1500

// Attachment is what joins one namespace to one machine. Its methods are not safe for concurrent
// use.
type Attachment struct {
	netns   string
	inode   uint64
	ports   []port
	guest   *protocol.Network
	taps    []*os.File // nil once they were handed over
	adopted bool
}

// port is one tap and the interface that it is joined to.
type port struct {
	Tap string `json:"tap"`
	// Interface is empty until one was adopted.
	Interface string `json:"interface,omitempty"`
	MAC       string `json:"mac"`
	MTU       int    `json:"mtu"`
	// Index is the interface's: another one that takes its name later has another index.
	Index int `json:"index,omitempty"`
	// Qdisc says that the interface's ingress qdisc was made here, and goes with the port.
	Qdisc bool `json:"qdisc,omitempty"`
}

// Saved is an Attachment for the journal; it survives the daemon, not the boot.
type Saved struct {
	Netns string `json:"netns"`
	// Inode tells the namespace from another one that has taken its path.
	Inode   uint64 `json:"inode"`
	Ports   []port `json:"ports"`
	Guest   []byte `json:"guest"` // protocol.Network as JSON
	Adopted bool   `json:"adopted"`
}

// Attach makes a tap for every interface that CNI made in the namespace at the path netns and
// joins them. If there is none yet, it makes one tap with a MAC address of its own; Adopt joins it
// later. On failure nothing is left in the namespace.
func Attach(ctx context.Context, netns string) (a *Attachment, err error) {
	if netns == "" {
		return nil, errors.New("cannot attach a network: the pod has no network namespace of its own, and a virtual machine cannot share the host's (hostNetwork)")
	}
	a = &Attachment{netns: netns, guest: &protocol.Network{}}
	a.inode, err = within(netns, 0, func(h *netlink.Handle) (err error) {
		found, err := discover(h)
		if err != nil {
			return err
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, a.detach(h))
			}
		}()
		if len(found) == 0 {
			mac, err := randomMAC()
			if err != nil {
				return err
			}
			_, err = a.addTap(ctx, h, mac, defaultMTU)
			return err
		}
		for i := range found {
			index, err := a.addTap(ctx, h, found[i].mac, found[i].mtu)
			if err != nil {
				return err
			}
			if err := a.join(ctx, h, &a.ports[i], index, &found[i]); err != nil {
				return err
			}
		}
		a.adopted = true
		a.guest, err = describe(h, found)
		return err
	})
	if err != nil {
		a.closeTaps()
		return nil, fmt.Errorf("cannot attach the network of %s: %w", netns, err)
	}
	return a, nil
}

// Adopted says whether the taps are joined to interfaces of CNI.
func (a *Attachment) Adopted() bool { return a.adopted }

// Adopt joins the tap of an Attachment that was made before CNI ran to the interface that has come
// since, and returns what the guest must configure from then on: nil as long as there is none, which
// is no error. The interface takes the MAC address of the guest's NIC. Once adopted, it reads the
// namespace again, for addresses and routes that have come later; an interface that is replaced by
// another one is adopted anew. Watch tells when it is worth calling.
//
// Unless complete says that CNI has done its work, an interface counts only once it has an address for
// the guest: before, a plugin may be asking for one over the interface (ipam: dhcp), and would neither
// know it by its new MAC address nor get the answer. Afterwards nothing is waited for: a network may well
// have no addresses.
func (a *Attachment) Adopt(ctx context.Context, complete bool) (*protocol.Network, error) {
	var guest *protocol.Network
	_, err := within(a.netns, a.inode, func(h *netlink.Handle) (err error) {
		guest, err = a.adopt(ctx, h, complete)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("cannot adopt the network of %s: %w", a.netns, err)
	}
	return guest, nil
}

func (a *Attachment) adopt(ctx context.Context, h *netlink.Handle, complete bool) (*protocol.Network, error) {
	if a.adopted {
		if err := a.forgetGone(h); err != nil {
			return nil, err
		}
	}
	found, err := discover(h)
	if err != nil || len(found) == 0 {
		return nil, err
	}
	if len(found) > len(a.ports) {
		return nil, fmt.Errorf("CNI made %d interfaces after the machine had started, which has %d NIC: "+
			"let it run first (iSulad: annotate the pod with cri.sandbox.network.setup.v2=true)", len(found), len(a.ports))
	}
	if !a.adopted {
		if !complete {
			if ready, err := hasAddress(h, found[0].index); err != nil || !ready {
				return nil, err
			}
		}
		if err := a.adoptOne(ctx, h, &found[0]); err != nil {
			return nil, err
		}
	}
	if len(a.ports) == 1 {
		// The guest knows its NIC by the address that it has, whatever the interface was given since.
		if found[0].mac, err = net.ParseMAC(a.ports[0].MAC); err != nil {
			return nil, err
		}
	}
	guest, err := describe(h, found)
	if err != nil {
		return nil, err
	}
	a.guest = guest
	return guest, nil
}

// forgetGone makes an Attachment whose only interface is gone one that has none yet. The filter on the
// tap leads nowhere then, and is replaced by the next one.
func (a *Attachment) forgetGone(h *netlink.Handle) error {
	if len(a.ports) != 1 {
		return nil
	}
	p := &a.ports[0]
	link, err := h.LinkByName(p.Interface)
	switch {
	case err == nil && (p.Index == 0 || link.Attrs().Index == p.Index):
		return nil
	case err != nil && !notFound(err):
		return fmt.Errorf("cannot find %s: %w", p.Interface, err)
	}
	p.Interface, p.Index, p.Qdisc = "", 0, false
	a.adopted, a.guest = false, &protocol.Network{}
	return nil
}

func (a *Attachment) adoptOne(ctx context.Context, h *netlink.Handle, found *iface) error {
	p := &a.ports[0]
	tap, err := h.LinkByName(p.Tap)
	if err != nil {
		return fmt.Errorf("cannot find %s: %w", p.Tap, err)
	}
	mac, err := net.ParseMAC(p.MAC)
	if err != nil {
		return err
	}
	if err := setMAC(h, found, mac); err != nil {
		return err
	}
	if err := h.LinkSetMTU(tap, found.mtu); err != nil {
		return fmt.Errorf("cannot set the MTU of %s to %d: %w", p.Tap, found.mtu, err)
	}
	p.MTU = found.mtu
	if err := a.join(ctx, h, p, tap.Attrs().Index, found); err != nil {
		// The next attempt may find another interface.
		if uerr := unredirect(h, *p); uerr != nil {
			err = errors.Join(err, fmt.Errorf("cannot stop redirecting %s: %w", p.Interface, uerr))
		}
		p.Interface, p.Index, p.Qdisc = "", 0, false
		return err
	}
	a.adopted = true
	return nil
}

// setMAC gives an interface another MAC address. The kernel forgets all its neighbours then, the
// permanent ones with the others, which CNI made for the guest, too.
func setMAC(h *netlink.Handle, i *iface, mac net.HardwareAddr) error {
	if bytes.Equal(i.mac, mac) {
		return nil
	}
	neighs, err := neighbours(h)
	if err != nil {
		return err
	}
	if err := h.LinkSetHardwareAddr(i.link, mac); err != nil {
		return fmt.Errorf("cannot set the MAC address of %s to %s: %w", i.name, mac, err)
	}
	i.mac = mac
	for _, n := range neighs {
		if n.LinkIndex != i.index || !wantNeighbour(n) {
			continue
		}
		if err := h.NeighSet(&n); err != nil {
			return fmt.Errorf("cannot keep the neighbour %s of %s: %w", n.IP, i.name, err)
		}
	}
	return nil
}

// NICs are the machine's interfaces, in the order of the namespace's. The tap files belong to the
// caller from the first call on; later calls return them as nil.
func (a *Attachment) NICs() []vm.NIC {
	nics := make([]vm.NIC, len(a.ports))
	for i, p := range a.ports {
		mac, _ := net.ParseMAC(p.MAC) // it was written by HardwareAddr.String
		nics[i] = vm.NIC{MAC: mac, MTU: p.MTU}
		if a.taps != nil {
			nics[i].Tap = a.taps[i]
		}
	}
	a.taps = nil
	return nics
}

// Guest is what the guest must configure; it has no interfaces until one was adopted.
func (a *Attachment) Guest() *protocol.Network { return a.guest }

// Saved returns what Restore needs.
func (a *Attachment) Saved() Saved {
	guest, err := protojson.Marshal(a.guest)
	if err != nil {
		// Every string in it came from the formatters of package net or is a checked name.
		panic(fmt.Sprintf("network: %v", err))
	}
	return Saved{Netns: a.netns, Inode: a.inode, Ports: slices.Clone(a.ports), Guest: guest, Adopted: a.adopted}
}

// Restore makes an Attachment of another daemon's Saved. Its NICs have no tap files.
func Restore(s Saved) *Attachment {
	a := &Attachment{netns: s.Netns, inode: s.Inode, ports: slices.Clone(s.Ports), guest: &protocol.Network{}, adopted: s.Adopted}
	// What cannot be read is treated as not known; Adopt reads the namespace again.
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(s.Guest, a.guest); err != nil {
		a.guest = &protocol.Network{}
	}
	return a
}

// Close takes the taps, filters and qdiscs out of the namespace and closes the tap files that were
// not handed over. It is idempotent; a namespace that is gone is no error.
func (a *Attachment) Close() error {
	a.closeTaps()
	if len(a.ports) == 0 {
		return nil
	}
	_, err := within(a.netns, a.inode, a.detach)
	if errors.Is(err, errGone) {
		a.ports, err = nil, nil
	}
	if err != nil {
		return fmt.Errorf("cannot detach the network of %s: %w", a.netns, err)
	}
	return nil
}

func (a *Attachment) closeTaps() {
	for _, t := range a.taps {
		t.Close()
	}
	a.taps = nil
}

// addTap makes the next tap and returns its index in the namespace.
func (a *Attachment) addTap(ctx context.Context, h *netlink.Handle, mac net.HardwareAddr, mtu int) (int, error) {
	name := fmt.Sprintf("%s%d", tapPrefix, len(a.ports))
	var tap *os.File
	// A hypervisor of an earlier attempt that is just dying still holds the name for a moment.
	err := retry(ctx, func() (err error) {
		tap, err = openTap(name)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("cannot make the tap %s: %w", name, err)
	}
	a.taps = append(a.taps, tap)
	a.ports = append(a.ports, port{Tap: name, MAC: mac.String(), MTU: mtu})
	link, err := h.LinkByName(name)
	if err != nil {
		return 0, fmt.Errorf("cannot find the tap %s: %w", name, err)
	}
	if err := h.LinkSetMTU(link, mtu); err != nil {
		return 0, fmt.Errorf("cannot set the MTU of %s to %d: %w", name, mtu, err)
	}
	// The tap's own stack must not talk to the guest: no link-local address, no ARP.
	if err := h.LinkSetIP6AddrGenMode(link, addrGenModeNone); err != nil &&
		!errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EINVAL) {
		return 0, fmt.Errorf("cannot turn off IPv6 on %s: %w", name, err)
	}
	if err := h.LinkSetARPOff(link); err != nil {
		return 0, fmt.Errorf("cannot turn off ARP on %s: %w", name, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return 0, fmt.Errorf("cannot bring %s up: %w", name, err)
	}
	return link.Attrs().Index, nil
}

// join redirects both ways between p's tap and an interface.
func (a *Attachment) join(ctx context.Context, h *netlink.Handle, p *port, tapIndex int, found *iface) error {
	p.Interface, p.Index = found.name, found.index
	made, err := redirect(ctx, h, found.index, tapIndex)
	p.Qdisc = made
	if err != nil {
		return fmt.Errorf("cannot redirect %s to %s: %w", found.name, p.Tap, err)
	}
	if _, err := redirect(ctx, h, tapIndex, found.index); err != nil {
		return fmt.Errorf("cannot redirect %s to %s: %w", p.Tap, found.name, err)
	}
	return nil
}

// detach undoes addTap and join for all ports. Ports stay listed when it fails.
func (a *Attachment) detach(h *netlink.Handle) error {
	var errs []error
	for _, p := range a.ports {
		if p.Interface != "" {
			if err := unredirect(h, p); err != nil {
				errs = append(errs, fmt.Errorf("cannot stop redirecting %s: %w", p.Interface, err))
			}
		}
		tap, err := h.LinkByName(p.Tap)
		if err == nil {
			err = h.LinkDel(tap)
		}
		if err != nil && !notFound(err) {
			errs = append(errs, fmt.Errorf("cannot remove %s: %w", p.Tap, err))
		}
	}
	if len(errs) == 0 {
		a.ports = nil
	}
	return errors.Join(errs...)
}

// openTap makes a tap in the network namespace of the calling thread.
func openTap(name string) (*os.File, error) {
	const device = "/dev/net/tun"
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		err = &fs.PathError{Op: "open", Path: device, Err: err}
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			err = fmt.Errorf("%w; load the kernel module tun (modprobe tun)", err)
		}
		return nil, err
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// randomMAC is a locally administered unicast address.
func randomMAC() (net.HardwareAddr, error) {
	mac := make(net.HardwareAddr, 6)
	if _, err := rand.Read(mac); err != nil {
		return nil, err
	}
	mac[0] = mac[0]&^1 | 2
	return mac, nil
}
