// Package network gives the guest's interfaces what the pod's have on the host: names, addresses,
// routes and neighbours. All of the pod's containers share the guest's network namespace.
package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
)

// linkTimeout bounds the wait for an interface that was just plugged in.
const linkTimeout = 5 * time.Second

// Limits that no pod reaches; beyond them the request is a mistake.
const (
	maxInterfaces = 64
	maxEntries    = 4096
)

// Loopback sets lo up.
func Loopback() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("cannot set lo up: %w", err)
	}
	return nil
}

// Apply makes the interfaces named in n look as n says; whatever addresses, routes and permanent
// neighbours they had otherwise are removed. Interfaces that n does not name are left alone: they
// belong to the pod. Apply is idempotent, and when it fails it can be repeated.
func Apply(ctx context.Context, n *protocol.Network) error {
	p, err := parse(n)
	if err != nil {
		return fmt.Errorf("cannot set the network up: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, linkTimeout)
	defer cancel()
	links := make(map[string]netlink.Link, len(p.interfaces))
	if err := findLinks(ctx, p.interfaces, links); err != nil {
		return err
	}
	if err := rename(p.interfaces, links); err != nil {
		return err
	}
	// An interface that is down has no routes and no neighbours, so at a boot there are none to be
	// found and removed: listing them takes longer than all the rest.
	fresh := true
	for _, i := range p.interfaces {
		fresh = fresh && links[i.name].Attrs().Flags&net.FlagUp == 0
		if err := configure(i, links[i.name]); err != nil {
			return fmt.Errorf("cannot set interface %s up: %w", i.name, err)
		}
	}
	have := map[string]bool{}
	if fresh {
		for _, i := range p.interfaces {
			for _, a := range i.addresses {
				if ones, bits := a.Mask.Size(); ones == bits {
					continue // a host's address reaches nobody else
				}
				have[reachOfAddress(a, links[i.name].Attrs().Index)] = true
			}
		}
	} else {
		if have, err = removeRoutes(p.routes, links); err != nil {
			return err
		}
		if err := removeNeighbours(p.neighbours, links); err != nil {
			return err
		}
	}
	if err := addRoutes(p.routes, have, links); err != nil {
		return err
	}
	return addNeighbours(p.neighbours, links)
}

// iface, route and neighbour are the checked forms of the messages.
type iface struct {
	name      string
	mac       net.HardwareAddr
	mtu       int
	addresses []*net.IPNet
	noARP     bool
}

type route struct {
	netlink.Route
	device string
}

type neighbour struct {
	ip     net.IP
	mac    net.HardwareAddr
	device string
}

type plan struct {
	interfaces []iface
	routes     []route
	neighbours []neighbour
}

// validName tells the names that an interface can have. The kernel takes any of up to 15 bytes
// without '/', ':' and white space; other bytes than these break the paths under /proc/sys.
func validName(name string) bool {
	if name == "" || len(name) > 15 || name == "lo" || name[0] == '.' || name[0] == '-' {
		return false
	}
	return strings.IndexFunc(name, func(c rune) bool {
		return !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.ContainsRune("_.@-", c))
	}) < 0
}

// parse checks the whole request before anything of it is applied.
func parse(n *protocol.Network) (*plan, error) {
	if len(n.GetInterfaces()) > maxInterfaces || len(n.GetRoutes()) > maxEntries || len(n.GetNeighbours()) > maxEntries {
		return nil, errors.New("too many interfaces, routes or neighbours")
	}
	p := &plan{}
	names, macs := map[string]bool{}, map[string]bool{}
	for _, m := range n.GetInterfaces() {
		i := iface{name: m.GetName(), mtu: int(m.GetMtu()), noARP: m.GetNoArp()}
		if !validName(i.name) {
			return nil, fmt.Errorf("%q is no name for an interface", i.name)
		}
		mac, err := net.ParseMAC(m.GetMac())
		if err != nil || len(mac) != 6 {
			return nil, fmt.Errorf("interface %s: %q is no MAC address", i.name, m.GetMac())
		}
		i.mac = mac
		if names[i.name] || macs[mac.String()] {
			return nil, fmt.Errorf("interface %s (%s) is there twice", i.name, mac)
		}
		names[i.name], macs[mac.String()] = true, true
		if i.mtu != 0 && (i.mtu < 68 || i.mtu > 65535) {
			return nil, fmt.Errorf("interface %s: an MTU of %d", i.name, i.mtu)
		}
		if len(m.GetAddresses()) > maxEntries {
			return nil, fmt.Errorf("interface %s: too many addresses", i.name)
		}
		for _, a := range m.GetAddresses() {
			ip, subnet, err := net.ParseCIDR(a)
			if err != nil {
				return nil, fmt.Errorf("interface %s: %w", i.name, err)
			}
			i.addresses = append(i.addresses, &net.IPNet{IP: short(ip), Mask: subnet.Mask})
		}
		p.interfaces = append(p.interfaces, i)
	}
	for _, m := range n.GetRoutes() {
		r, err := parseRoute(m)
		if err != nil {
			return nil, fmt.Errorf("route to %q through %q: %w", m.GetDestination(), m.GetGateway(), err)
		}
		if !names[r.device] {
			return nil, fmt.Errorf("route to %q: interface %q is not part of the request", m.GetDestination(), r.device)
		}
		p.routes = append(p.routes, r)
	}
	for _, m := range n.GetNeighbours() {
		e := neighbour{ip: net.ParseIP(m.GetAddress()), device: m.GetDevice()}
		mac, err := net.ParseMAC(m.GetMac())
		if e.ip == nil || err != nil {
			return nil, fmt.Errorf("neighbour %q at %q is no pair of addresses", m.GetAddress(), m.GetMac())
		}
		if !names[e.device] {
			return nil, fmt.Errorf("neighbour %s: interface %q is not part of the request", e.ip, e.device)
		}
		e.ip, e.mac = short(e.ip), mac
		p.neighbours = append(p.neighbours, e)
	}
	slices.SortStableFunc(p.routes, func(a, b route) int { return a.rank() - b.rank() })
	return p, nil
}

// short is the 4-byte form of IPv4 addresses, so that equal addresses have equal bytes.
func short(ip net.IP) net.IP {
	if v4 := ip.To4(); v4 != nil {
		return v4
	}
	return ip
}

func parseRoute(m *protocol.Route) (route, error) {
	r := route{device: m.GetDevice()}
	r.Table = unix.RT_TABLE_MAIN
	r.Protocol = unix.RTPROT_STATIC
	r.Priority = int(m.GetMetric())
	r.MTU = int(m.GetMtu())
	if m.GetScope() > 255 {
		return r, fmt.Errorf("scope %d", m.GetScope())
	}
	r.Scope = netlink.Scope(m.GetScope())
	if m.GetOnLink() {
		r.Flags = int(netlink.FLAG_ONLINK)
	}
	ip := func(s string) (net.IP, error) {
		if s == "" {
			return nil, nil
		}
		a := net.ParseIP(s)
		if a == nil {
			return nil, fmt.Errorf("%q is no address", s)
		}
		return short(a), nil
	}
	var err error
	if r.Gw, err = ip(m.GetGateway()); err != nil {
		return r, err
	}
	if r.Src, err = ip(m.GetSource()); err != nil {
		return r, err
	}
	r.Family = unix.AF_INET
	bits := 32
	if m.GetIpv6() || (r.Gw != nil && len(r.Gw) == net.IPv6len) {
		r.Family, bits = unix.AF_INET6, 128
	}
	if d := m.GetDestination(); d != "" {
		_, dst, err := net.ParseCIDR(d)
		if err != nil {
			return r, err
		}
		r.Dst = dst
		if len(dst.IP) == net.IPv6len {
			r.Family, bits = unix.AF_INET6, 128
		}
	} else {
		r.Dst = &net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)}
	}
	for _, a := range []net.IP{r.Dst.IP, r.Gw, r.Src} {
		if a != nil && len(a)*8 != bits {
			return r, errors.New("its addresses are of different families")
		}
	}
	return r, nil
}

// rank orders routes so that gateways are reachable when they are used.
func (r route) rank() int {
	switch {
	case r.Gw == nil:
		return 0
	case r.Flags&int(netlink.FLAG_ONLINK) != 0:
		return 1
	}
	return 2
}

// isDevice tells the machine's own interfaces from virtual ones that the pod made: an ipvlan or a
// bridge may carry the same address. Tests, which have no machine, replace it.
var isDevice = func(l netlink.Link) bool { return l.Type() == "device" }

// findLinks waits for the interfaces by their MAC addresses.
func findLinks(ctx context.Context, want []iface, found map[string]netlink.Link) error {
	for {
		all, err := netlink.LinkList()
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return fmt.Errorf("cannot list the interfaces: %w", err)
		}
		var missing *iface
		for n := range want {
			i := slices.IndexFunc(all, func(l netlink.Link) bool {
				return isDevice(l) && bytes.Equal(l.Attrs().HardwareAddr, want[n].mac)
			})
			if i < 0 {
				missing = &want[n]
				break
			}
			found[want[n].name] = all[i]
		}
		if missing == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("cannot set interface %s up: the guest has no network device with MAC address %s: %w",
				missing.name, missing.mac, context.Cause(ctx))
		case <-time.After(10 * time.Millisecond):
			// The device is being plugged in, or does not exist. Both are rare.
		}
	}
}

// rename gives the interfaces their names. Whoever has a name that another one needs is first
// moved out of the way.
func rename(want []iface, links map[string]netlink.Link) error {
	set := func(l netlink.Link, name string) error {
		// A link must be down for it.
		if err := netlink.LinkSetDown(l); err != nil {
			return fmt.Errorf("cannot rename interface %s to %s: %w", l.Attrs().Name, name, err)
		}
		if err := netlink.LinkSetName(l, name); err != nil {
			return fmt.Errorf("cannot rename interface %s to %s: %w", l.Attrs().Name, name, err)
		}
		l.Attrs().Name = name
		return nil
	}
	for _, i := range want {
		l := links[i.name]
		if l.Attrs().Name == i.name {
			continue
		}
		other, err := netlink.LinkByName(i.name)
		if err == nil {
			holder := other
			for _, mine := range links {
				if mine.Attrs().Index == other.Attrs().Index {
					holder = mine // so that its new name is known when its turn comes
				}
			}
			if err := set(holder, fmt.Sprintf("tmp%d", other.Attrs().Index)); err != nil {
				return err
			}
		} else if !errors.As(err, new(netlink.LinkNotFoundError)) {
			return fmt.Errorf("cannot look for interface %s: %w", i.name, err)
		}
		if err := set(l, i.name); err != nil {
			return err
		}
	}
	return nil
}

func configure(i iface, l netlink.Link) error {
	// The host has done what duplicate address detection and router advertisements are for: the
	// guest has the host's address, and only what the host says.
	for _, key := range []string{"accept_dad", "accept_ra"} {
		path := "/proc/sys/net/ipv6/conf/" + i.name + "/" + key
		if err := os.WriteFile(path, []byte("0"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if i.mtu != 0 && l.Attrs().MTU != i.mtu {
		if err := netlink.LinkSetMTU(l, i.mtu); err != nil {
			return fmt.Errorf("MTU %d: %w", i.mtu, err)
		}
	}
	arp := netlink.LinkSetARPOn
	if i.noARP {
		arp = netlink.LinkSetARPOff
	}
	if noARP := l.Attrs().RawFlags&unix.IFF_NOARP != 0; noARP != i.noARP {
		if err := arp(l); err != nil {
			return fmt.Errorf("NOARP %v: %w", i.noARP, err)
		}
	}
	old, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("its addresses: %w", err)
	}
	same := func(a, b *net.IPNet) bool {
		return a.IP.Equal(b.IP) && bytes.Equal(a.Mask, b.Mask)
	}
	for _, a := range old {
		wanted := slices.ContainsFunc(i.addresses, func(w *net.IPNet) bool { return same(w, a.IPNet) })
		if wanted || (a.IP.To4() == nil && a.IP.IsLinkLocalUnicast()) {
			continue
		}
		if err := netlink.AddrDel(l, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("cannot remove address %s: %w", a.IPNet, err)
		}
	}
	for _, w := range i.addresses {
		a := &netlink.Addr{IPNet: w}
		if w.IP.To4() == nil {
			a.Flags = unix.IFA_F_NODAD
		}
		// An address that is left over was removed together with its primary one if that went.
		if err := netlink.AddrAdd(l, a); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("address %s: %w", w, err)
		}
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return err
	}
	return nil
}

// removeRoutes removes the routes that are not wanted, and returns by identity and by reach those
// that are there.
func removeRoutes(want []route, links map[string]netlink.Link) (map[string]bool, error) {
	owned := map[int]bool{}
	for _, l := range links {
		owned[l.Attrs().Index] = true
	}
	have := map[string]bool{}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		old, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return nil, fmt.Errorf("cannot list the routes: %w", err)
		}
		for _, r := range old {
			if !owned[r.LinkIndex] {
				continue
			}
			// What the kernel made goes with its addresses; what it made once is not made again.
			if r.Protocol == unix.RTPROT_KERNEL || r.Type != unix.RTN_UNICAST {
				have[reach(&r)] = true
				continue
			}
			wanted := slices.ContainsFunc(want, func(w route) bool {
				w.LinkIndex = links[w.device].Attrs().Index
				return identity(&w.Route) == identity(&r)
			})
			if wanted {
				have[identity(&r)] = true
				continue
			}
			if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
				return nil, fmt.Errorf("cannot remove the route to %v: %w", r.Dst, err)
			}
		}
	}
	return have, nil
}

func addRoutes(want []route, have map[string]bool, links map[string]netlink.Link) error {
	for _, w := range want {
		w.LinkIndex = links[w.device].Attrs().Index
		if have[identity(&w.Route)] || (w.Gw == nil && have[reach(&w.Route)]) {
			continue
		}
		if err := netlink.RouteAdd(&w.Route); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("cannot add the route to %v through %v on %s: %w", w.Dst, w.Gw, w.device, err)
		}
	}
	return nil
}

// reach is where a route leads, for comparison with those that the kernel made for an address.
func reach(r *netlink.Route) string {
	dst := "default"
	if r.Dst != nil {
		if ones, _ := r.Dst.Mask.Size(); ones > 0 {
			dst = r.Dst.String()
		}
	}
	return fmt.Sprint(r.Family, " ", dst, " ", r.LinkIndex)
}

// reachOfAddress is the reach of the route that the kernel makes for an address.
func reachOfAddress(a *net.IPNet, link int) string {
	family := unix.AF_INET
	if len(a.IP) == net.IPv6len {
		family = unix.AF_INET6
	}
	return reach(&netlink.Route{Family: family, LinkIndex: link, Dst: &net.IPNet{IP: a.IP.Mask(a.Mask), Mask: a.Mask}})
}

// identity is what makes two routes the same.
func identity(r *netlink.Route) string {
	metric, scope := r.Priority, r.Scope
	if r.Family == unix.AF_INET6 {
		scope = 0 // IPv6 routes have none
		if metric == 0 {
			metric = 1024 // IP6_RT_PRIO_USER, the kernel's default
		}
	}
	return fmt.Sprint(reach(r), " ", r.Gw, " ", r.Src, " ", scope, " ", metric, " ", r.MTU, " ", r.Flags&int(netlink.FLAG_ONLINK))
}

func removeNeighbours(want []neighbour, links map[string]netlink.Link) error {
	for _, l := range links {
		old, err := netlink.NeighList(l.Attrs().Index, netlink.FAMILY_ALL)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return fmt.Errorf("cannot list the neighbours on %s: %w", l.Attrs().Name, err)
		}
		for _, n := range old {
			wanted := slices.ContainsFunc(want, func(w neighbour) bool {
				return links[w.device].Attrs().Index == l.Attrs().Index && w.ip.Equal(n.IP)
			})
			if n.State&netlink.NUD_PERMANENT == 0 || n.IP.IsMulticast() || wanted {
				continue
			}
			if err := netlink.NeighDel(&n); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("cannot remove neighbour %s on %s: %w", n.IP, l.Attrs().Name, err)
			}
		}
	}
	return nil
}

func addNeighbours(want []neighbour, links map[string]netlink.Link) error {
	for _, w := range want {
		family := unix.AF_INET
		if len(w.ip) == net.IPv6len {
			family = unix.AF_INET6
		}
		n := &netlink.Neigh{
			LinkIndex:    links[w.device].Attrs().Index,
			Family:       family,
			State:        netlink.NUD_PERMANENT,
			IP:           w.ip,
			HardwareAddr: w.mac,
		}
		if err := netlink.NeighSet(n); err != nil {
			return fmt.Errorf("cannot set neighbour %s on %s: %w", w.ip, w.device, err)
		}
	}
	return nil
}
