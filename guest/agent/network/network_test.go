package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
)

func TestParseRefusesNonsense(t *testing.T) {
	eth := func(change func(*protocol.Interface)) *protocol.Network {
		i := &protocol.Interface{Name: "eth0", Mac: "02:00:00:00:00:01", Mtu: 1500, Addresses: []string{"10.1.0.2/24"}}
		change(i)
		return &protocol.Network{Interfaces: []*protocol.Interface{i}}
	}
	same := func(*protocol.Interface) {}
	with := func(r *protocol.Route) *protocol.Network {
		n := eth(same)
		n.Routes = []*protocol.Route{r}
		return n
	}
	if _, err := parse(eth(same)); err != nil {
		t.Fatal(err)
	}
	twice := eth(same)
	twice.Interfaces = append(twice.Interfaces, twice.Interfaces[0])
	stranger := eth(same)
	stranger.Neighbours = []*protocol.Neighbour{{Address: "10.1.0.9", Mac: "02:00:00:00:00:09", Device: "eth7"}}
	for name, n := range map[string]*protocol.Network{
		"no name":           eth(func(i *protocol.Interface) { i.Name = "" }),
		"path":              eth(func(i *protocol.Interface) { i.Name = "../x" }),
		"dots":              eth(func(i *protocol.Interface) { i.Name = ".." }),
		"long name":         eth(func(i *protocol.Interface) { i.Name = "sixteen-letters0" }),
		"loopback":          eth(func(i *protocol.Interface) { i.Name = "lo" }),
		"mac":               eth(func(i *protocol.Interface) { i.Mac = "02:00" }),
		"infiniband mac":    eth(func(i *protocol.Interface) { i.Mac = "02:00:5e:10:00:00:00:01" }),
		"mtu":               eth(func(i *protocol.Interface) { i.Mtu = 10 }),
		"address":           eth(func(i *protocol.Interface) { i.Addresses = []string{"10.1.0.2"} }),
		"twice":             twice,
		"stranger":          stranger,
		"route device":      with(&protocol.Route{Destination: "10.2.0.0/16", Device: "eth1"}),
		"route destination": with(&protocol.Route{Destination: "10.2.0.0", Device: "eth0"}),
		"route gateway":     with(&protocol.Route{Gateway: "gw", Device: "eth0"}),
		"route families":    with(&protocol.Route{Destination: "10.2.0.0/16", Gateway: "fd00::1", Device: "eth0"}),
		"route scope":       with(&protocol.Route{Scope: 256, Device: "eth0"}),
	} {
		if _, err := parse(n); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// inNetworkNamespace runs the test in a network namespace of its own.
func inNetworkNamespace(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root, to make a network namespace")
	}
	// Never unlocked: the thread ends with the test and takes the namespace along.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("cannot make a network namespace: %v", err)
	}
	old := isDevice
	isDevice = func(l netlink.Link) bool { return l.Type() == "veth" }
	t.Cleanup(func() { isDevice = old })
	if err := Loopback(); err != nil {
		t.Fatal(err)
	}
}

func addLink(t *testing.T, name, mac string) {
	t.Helper()
	a := netlink.NewLinkAttrs()
	a.Name = name
	a.HardwareAddr, _ = net.ParseMAC(mac)
	peer := &netlink.Veth{LinkAttrs: a, PeerName: "peer-" + name}
	if err := netlink.LinkAdd(peer); err != nil {
		t.Skipf("cannot make a pair of interfaces: %v", err)
	}
	l, err := netlink.LinkByName("peer-" + name)
	if err == nil {
		err = netlink.LinkSetUp(l)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// look describes an interface the way the tests compare it.
func look(t *testing.T, name string) string {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	lines := []string{fmt.Sprintf("%s mtu %d up %v noarp %v", l.Attrs().HardwareAddr, l.Attrs().MTU,
		l.Attrs().RawFlags&unix.IFF_UP != 0, l.Attrs().RawFlags&unix.IFF_NOARP != 0)}
	addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if !a.IP.IsLinkLocalUnicast() {
			lines = append(lines, "address "+a.IPNet.String())
		}
	}
	routes, err := netlink.RouteList(l, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range routes {
		if r.Protocol != unix.RTPROT_KERNEL && r.Type == unix.RTN_UNICAST {
			lines = append(lines, fmt.Sprintf("route %v via %v metric %d", r.Dst, r.Gw, r.Priority))
		}
	}
	neighbours, err := netlink.NeighList(l.Attrs().Index, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range neighbours {
		if n.State&netlink.NUD_PERMANENT != 0 && !n.IP.IsMulticast() {
			lines = append(lines, fmt.Sprintf("neighbour %s at %s", n.IP, n.HardwareAddr))
		}
	}
	slices.Sort(lines[1:])
	return strings.Join(lines, "\n")
}

func TestApply(t *testing.T) {
	inNetworkNamespace(t)
	// The names are the wrong way round.
	addLink(t, "eth1", "02:00:00:00:00:01")
	addLink(t, "eth0", "02:00:00:00:00:02")
	first := &protocol.Network{
		Interfaces: []*protocol.Interface{
			{Name: "eth0", Mac: "02:00:00:00:00:01", Mtu: 1450, Addresses: []string{"10.1.0.2/24", "fd00:1::2/64"}},
			{Name: "eth1", Mac: "02:00:00:00:00:02", Addresses: []string{"192.168.5.7/32"}, NoArp: true},
		},
		Routes: []*protocol.Route{
			// In an order that only works when it is changed.
			{Gateway: "10.1.0.1", Device: "eth0"},
			{Gateway: "fd00:1::1", Device: "eth0", Ipv6: true},
			{Destination: "172.16.0.0/12", Gateway: "169.254.1.1", Device: "eth1", OnLink: true, Metric: 7},
			{Destination: "192.168.9.0/24", Gateway: "192.168.8.1", Device: "eth1"},
			{Destination: "192.168.8.1/32", Device: "eth1", Scope: 253},
			{Destination: "10.1.0.0/24", Device: "eth0", Source: "10.1.0.2", Scope: 253}, // the kernel's own
		},
		Neighbours: []*protocol.Neighbour{{Address: "10.1.0.1", Mac: "02:00:00:00:00:fe", Device: "eth0"}},
	}
	want0 := `02:00:00:00:00:01 mtu 1450 up true noarp false
address 10.1.0.2/24
address fd00:1::2/64
neighbour 10.1.0.1 at 02:00:00:00:00:fe
route 0.0.0.0/0 via 10.1.0.1 metric 0
route ::/0 via fd00:1::1 metric 1024`
	want1 := `02:00:00:00:00:02 mtu 1500 up true noarp true
address 192.168.5.7/32
route 172.16.0.0/12 via 169.254.1.1 metric 7
route 192.168.8.1/32 via <nil> metric 0
route 192.168.9.0/24 via 192.168.8.1 metric 0`
	for range 2 { // idempotent
		if err := Apply(context.Background(), first); err != nil {
			t.Fatal(err)
		}
		if got := look(t, "eth0"); got != want0 {
			t.Errorf("eth0:\n%s\nwant:\n%s", got, want0)
		}
		if got := look(t, "eth1"); got != want1 {
			t.Errorf("eth1:\n%s\nwant:\n%s", got, want1)
		}
	}

	// Everything is replaced, and what is not named stays.
	second := &protocol.Network{
		Interfaces: []*protocol.Interface{{Name: "net0", Mac: "02:00:00:00:00:01", Mtu: 1500, Addresses: []string{"10.1.0.3/24"}}},
		Routes:     []*protocol.Route{{Gateway: "10.1.0.254", Device: "net0", Metric: 5}},
	}
	if err := Apply(context.Background(), second); err != nil {
		t.Fatal(err)
	}
	want := `02:00:00:00:00:01 mtu 1500 up true noarp false
address 10.1.0.3/24
route 0.0.0.0/0 via 10.1.0.254 metric 5`
	if got := look(t, "net0"); got != want {
		t.Errorf("net0:\n%s\nwant:\n%s", got, want)
	}
	if got := look(t, "eth1"); got != want1 {
		t.Errorf("eth1 was touched:\n%s\nwant:\n%s", got, want1)
	}
}

func TestApplyNamesMissingDevice(t *testing.T) {
	inNetworkNamespace(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err := Apply(ctx, &protocol.Network{Interfaces: []*protocol.Interface{{Name: "eth0", Mac: "02:00:00:00:00:77"}}})
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "02:00:00:00:00:77") {
		t.Errorf("got %v", err)
	}
}
