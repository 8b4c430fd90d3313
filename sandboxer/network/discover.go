package network

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
)

// iface is an interface that CNI made.
type iface struct {
	link  netlink.Link
	name  string
	index int
	mac   net.HardwareAddr
	mtu   int
	noARP bool
}

// dump repeats a netlink dump that was interrupted by a change of what it lists.
func dump[T any](list func() ([]T, error)) ([]T, error) {
	for try := 0; ; try++ {
		all, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) || try == 8 {
			return all, err
		}
	}
}

// discover lists the interfaces of the namespace that CNI made, in the order of their indexes.
func discover(h *netlink.Handle) ([]iface, error) {
	links, err := dump(h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("cannot list the interfaces: %w", err)
	}
	var found []iface
	for _, l := range links {
		a := l.Attrs()
		switch {
		case a.Flags&net.FlagLoopback != 0,
			// Every namespace has tunnel devices (sit0, tunl0) that are down until used.
			a.Flags&net.FlagUp == 0,
			strings.HasPrefix(a.Name, tapPrefix),
			// The port of a bridge or bond is reached through its master.
			a.MasterIndex != 0:
			continue
		}
		if a.EncapType != "ether" || len(a.HardwareAddr) != 6 {
			return nil, fmt.Errorf("cannot connect %s: an interface of kind %q (%s) is no Ethernet; use a CNI plugin that makes a veth, such as bridge or ptp", a.Name, l.Type(), a.EncapType)
		}
		if l.Type() == "ipvlan" {
			return nil, fmt.Errorf("cannot connect %s: ipvlan has no MAC address of its own for the machine; use a CNI plugin that makes a veth or macvlan", a.Name)
		}
		found = append(found, iface{
			link: l, name: a.Name, index: a.Index, mac: a.HardwareAddr, mtu: a.MTU,
			noARP: a.RawFlags&unix.IFF_NOARP != 0,
		})
	}
	if len(found) > maxInterfaces {
		return nil, fmt.Errorf("the network namespace has %d interfaces, more than %d", len(found), maxInterfaces)
	}
	slices.SortFunc(found, func(a, b iface) int { return cmp.Compare(a.index, b.index) })
	return found, nil
}

// hasAddress says whether an interface has an address for the guest.
func hasAddress(h *netlink.Handle, index int) (bool, error) {
	addrs, err := addresses(h)
	return slices.ContainsFunc(addrs, func(a netlink.Addr) bool {
		return a.LinkIndex == index && wantAddress(a)
	}), err
}

func addresses(h *netlink.Handle) ([]netlink.Addr, error) {
	addrs, err := dump(func() ([]netlink.Addr, error) { return h.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("cannot list the addresses: %w", err)
	}
	return addrs, nil
}

func neighbours(h *netlink.Handle) ([]netlink.Neigh, error) {
	neighs, err := dump(func() ([]netlink.Neigh, error) { return h.NeighList(0, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("cannot list the neighbours: %w", err)
	}
	return neighs, nil
}

// describe reads what the guest must configure so that its interfaces equal found.
func describe(h *netlink.Handle, found []iface) (*protocol.Network, error) {
	addrs, err := addresses(h)
	if err != nil {
		return nil, err
	}
	routes, err := dump(func() ([]netlink.Route, error) { return h.RouteList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("cannot list the IPv4 routes: %w", err)
	}
	routes6, err := dump(func() ([]netlink.Route, error) { return h.RouteList(nil, netlink.FAMILY_V6) })
	if err != nil {
		return nil, fmt.Errorf("cannot list the IPv6 routes: %w", err)
	}
	routes = append(routes, routes6...)
	neighs, err := neighbours(h)
	if err != nil {
		return nil, err
	}
	return assemble(found, addrs, routes, neighs), nil
}

// assemble selects from the namespace's tables what the guest's kernel will not make itself.
func assemble(found []iface, addrs []netlink.Addr, routes []netlink.Route, neighs []netlink.Neigh) *protocol.Network {
	n := &protocol.Network{}
	names := map[int]string{}
	for _, f := range found {
		names[f.index] = f.name
		i := &protocol.Interface{Name: f.name, Mac: f.mac.String(), Mtu: uint32(f.mtu), NoArp: f.noARP}
		for _, a := range addrs {
			if a.LinkIndex == f.index && wantAddress(a) {
				i.Addresses = append(i.Addresses, guestAddress(a, routes))
			}
		}
		n.Interfaces = append(n.Interfaces, i)
	}
	for _, r := range routes {
		if route := guestRoute(r, names); route != nil {
			n.Routes = append(n.Routes, route)
		}
	}
	for _, e := range neighs {
		device, ok := names[e.LinkIndex]
		if !ok || !wantNeighbour(e) {
			continue
		}
		n.Neighbours = append(n.Neighbours, &protocol.Neighbour{Address: e.IP.String(), Mac: e.HardwareAddr.String(), Device: device})
	}
	return n
}

// wantNeighbour leaves out what the kernel has learnt or made itself.
func wantNeighbour(n netlink.Neigh) bool {
	return n.State&unix.NUD_PERMANENT != 0 && len(n.HardwareAddr) == 6 && n.IP != nil && !n.IP.IsMulticast()
}

// wantAddress leaves out what the guest's kernel gives itself: link-local addresses and those that
// come from router advertisements. The host's kernel gives them to an interface as soon as it is up, so
// they do not tell that CNI has come to its addresses.
func wantAddress(a netlink.Addr) bool {
	if a.IPNet == nil || a.IP.IsLinkLocalUnicast() || a.IP.IsLoopback() {
		return false
	}
	return a.IP.To4() != nil || a.Flags&unix.IFA_F_PERMANENT != 0
}

// guestAddress is a in CIDR form. The kernel adds a route to the subnet of an address; where the
// namespace has no such route, because the CNI plugin removed it (ptp does, to send everything
// through the gateway), the guest gets the address alone, or its neighbours were unreachable.
func guestAddress(a netlink.Addr, routes []netlink.Route) string {
	ones, bits := a.Mask.Size()
	if ones < bits {
		subnet := net.IPNet{IP: a.IP.Mask(a.Mask), Mask: a.Mask}
		onLink := slices.ContainsFunc(routes, func(r netlink.Route) bool {
			return r.LinkIndex == a.LinkIndex && r.Gw == nil && r.Via == nil && r.Dst != nil && r.Dst.String() == subnet.String()
		})
		if !onLink {
			ones = bits
		}
	}
	return fmt.Sprintf("%s/%d", a.IP, ones)
}

// guestRoute translates a route of the main table, or returns nil for one that the guest does not
// need: made by the kernel for an address, learnt from a router, or not over a known interface.
func guestRoute(r netlink.Route, names map[int]string) *protocol.Route {
	if r.Type != 0 && r.Type != unix.RTN_UNICAST || r.Protocol == unix.RTPROT_KERNEL || r.Protocol == unix.RTPROT_RA {
		return nil
	}
	if r.Table != 0 && r.Table != unix.RT_TABLE_MAIN {
		return nil
	}
	if len(r.MultiPath) > 0 {
		// The guest gets the first of several paths that it has an interface for.
		for _, hop := range r.MultiPath {
			if _, ok := names[hop.LinkIndex]; ok {
				r.LinkIndex, r.Gw, r.Via, r.Flags = hop.LinkIndex, hop.Gw, hop.Via, r.Flags|hop.Flags
				break
			}
		}
	}
	device, ok := names[r.LinkIndex]
	if !ok {
		return nil
	}
	route := &protocol.Route{
		Device: device,
		Scope:  uint32(r.Scope),
		Ipv6:   r.Family == netlink.FAMILY_V6,
		OnLink: r.Flags&int(netlink.FLAG_ONLINK) != 0,
		Metric: uint32(r.Priority),
		Mtu:    uint32(r.MTU),
	}
	if r.Dst != nil {
		if ones, _ := r.Dst.Mask.Size(); ones > 0 || !r.Dst.IP.IsUnspecified() {
			route.Destination = r.Dst.String()
		}
	}
	if r.Gw != nil {
		route.Gateway = r.Gw.String()
	} else if via, ok := r.Via.(*netlink.Via); ok {
		route.Gateway = via.Addr.String()
	}
	if r.Src != nil {
		route.Source = r.Src.String()
	}
	return route
}
