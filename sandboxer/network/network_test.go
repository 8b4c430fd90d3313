package network

import (
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"kuasar.io/kuasar/guest/protocol"
)

func cidr(t *testing.T, s string) *net.IPNet {
	t.Helper()
	ip, n, err := net.ParseCIDR(s)
	if err != nil {
		t.Fatal(err)
	}
	return &net.IPNet{IP: ip, Mask: n.Mask}
}

func subnet(t *testing.T, s string) *net.IPNet {
	n := cidr(t, s)
	n.IP = n.IP.Mask(n.Mask)
	return n
}

func TestAssemble(t *testing.T) {
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	found := []iface{{name: "eth0", index: 2, mac: mac, mtu: 1450}, {name: "net1", index: 5, mac: net.HardwareAddr{2, 0, 0, 0, 0, 2}, mtu: 9000, noARP: true}}
	permanent := int(unix.IFA_F_PERMANENT)
	addrs := []netlink.Addr{
		{IPNet: cidr(t, "10.1.0.5/24"), LinkIndex: 2, Flags: permanent},
		{IPNet: cidr(t, "fd00::5/64"), LinkIndex: 2, Flags: permanent},
		{IPNet: cidr(t, "fd77::1/64"), LinkIndex: 2},
		{IPNet: cidr(t, "fe80::1/64"), LinkIndex: 2, Flags: permanent},
		{IPNet: cidr(t, "127.0.0.1/8"), LinkIndex: 1, Flags: permanent},
		{IPNet: cidr(t, "10.2.0.5/16"), LinkIndex: 5}, // leased by DHCP
		{IPNet: cidr(t, "10.9.0.5/16"), LinkIndex: 9, Flags: permanent},
	}
	v4, v6 := netlink.FAMILY_V4, netlink.FAMILY_V6
	unicast, main := unix.RTN_UNICAST, unix.RT_TABLE_MAIN
	kernel := netlink.RouteProtocol(unix.RTPROT_KERNEL)
	routes := []netlink.Route{
		{LinkIndex: 2, Family: v4, Type: unicast, Table: main, Dst: subnet(t, "0.0.0.0/0"), Gw: net.ParseIP("10.1.0.1"), Priority: 7, MTU: 1400},
		{LinkIndex: 2, Family: v4, Type: unicast, Table: main, Dst: subnet(t, "10.1.0.0/24"), Protocol: kernel, Scope: 253, Src: net.ParseIP("10.1.0.5")},
		{LinkIndex: 2, Family: v4, Type: unicast, Table: main, Dst: subnet(t, "192.0.2.0/24"), Scope: 253, Src: net.ParseIP("10.1.0.5")},
		{LinkIndex: 2, Family: v4, Type: unicast, Table: main, Dst: subnet(t, "198.51.100.0/24"), Gw: net.ParseIP("203.0.113.1"), Flags: int(netlink.FLAG_ONLINK)},
		{LinkIndex: 2, Family: v4, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Dst: subnet(t, "10.1.0.5/32")},
		{LinkIndex: 2, Family: v4, Type: unix.RTN_BLACKHOLE, Table: main, Dst: subnet(t, "10.66.0.0/16")},
		{LinkIndex: 9, Family: v4, Type: unicast, Table: main, Dst: subnet(t, "10.9.0.0/16")},
		{Family: v4, Type: unicast, Table: main, Dst: subnet(t, "10.77.0.0/16"), MultiPath: []*netlink.NexthopInfo{{LinkIndex: 9, Gw: net.ParseIP("10.9.0.1")}, {LinkIndex: 5, Gw: net.ParseIP("10.2.0.1")}}},
		{LinkIndex: 2, Family: v6, Type: unicast, Table: main, Gw: net.ParseIP("fd00::1"), Priority: 1024},
		{LinkIndex: 2, Family: v6, Type: unicast, Table: main, Dst: subnet(t, "fd00::/64"), Protocol: kernel},
		{LinkIndex: 2, Family: v6, Type: unicast, Table: main, Dst: subnet(t, "fd88::/64"), Protocol: netlink.RouteProtocol(unix.RTPROT_RA)},
		{LinkIndex: 2, Family: v4, Type: unicast, Table: main, Dst: subnet(t, "10.88.0.0/16"), Via: &netlink.Via{AddrFamily: v6, Addr: net.ParseIP("fd00::9")}},
	}
	neighs := []netlink.Neigh{
		{LinkIndex: 2, State: unix.NUD_PERMANENT, IP: net.ParseIP("10.1.0.1"), HardwareAddr: net.HardwareAddr{2, 9, 9, 9, 9, 9}},
		{LinkIndex: 2, State: unix.NUD_REACHABLE, IP: net.ParseIP("10.1.0.2"), HardwareAddr: net.HardwareAddr{2, 9, 9, 9, 9, 8}},
		{LinkIndex: 2, State: unix.NUD_PERMANENT, IP: net.ParseIP("ff02::1"), HardwareAddr: net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}},
		{LinkIndex: 9, State: unix.NUD_PERMANENT, IP: net.ParseIP("10.9.0.1"), HardwareAddr: net.HardwareAddr{2, 9, 9, 9, 9, 7}},
	}
	want := &protocol.Network{
		Interfaces: []*protocol.Interface{
			{Name: "eth0", Mac: "02:00:00:00:00:01", Mtu: 1450, Addresses: []string{"10.1.0.5/24", "fd00::5/64"}},
			// No route to its subnet: the address alone.
			{Name: "net1", Mac: "02:00:00:00:00:02", Mtu: 9000, NoArp: true, Addresses: []string{"10.2.0.5/32"}},
		},
		Routes: []*protocol.Route{
			{Device: "eth0", Gateway: "10.1.0.1", Metric: 7, Mtu: 1400},
			{Device: "eth0", Destination: "192.0.2.0/24", Scope: 253, Source: "10.1.0.5"},
			{Device: "eth0", Destination: "198.51.100.0/24", Gateway: "203.0.113.1", OnLink: true},
			{Device: "net1", Destination: "10.77.0.0/16", Gateway: "10.2.0.1"},
			{Device: "eth0", Gateway: "fd00::1", Ipv6: true, Metric: 1024},
			{Device: "eth0", Destination: "10.88.0.0/16", Gateway: "fd00::9"},
		},
		Neighbours: []*protocol.Neighbour{{Address: "10.1.0.1", Mac: "02:09:09:09:09:09", Device: "eth0"}},
	}
	if got := assemble(found, addrs, routes, neighs); !proto.Equal(got, want) {
		t.Errorf("got\n%v\nwant\n%v", got, want)
	}
}

func TestAttachRefuses(t *testing.T) {
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct{ path, want string }{
		"no path":        {"", "hostNetwork"},
		"the host's":     {"/proc/self/ns/net", "hostNetwork"},
		"gone":           {plain + "-gone", "is gone"},
		"unmounted":      {plain, "is no network namespace"},
		"other kind":     {"/proc/self/ns/mnt", "is no network namespace"},
		"not a file":     {t.TempDir(), "is no network namespace"},
		"the path named": {plain, plain},
	} {
		t.Run(name, func(t *testing.T) {
			a, err := Attach(t.Context(), tc.path)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, %v; want an error with %q", a, err, tc.want)
			}
		})
	}
}

func TestSavedAndRestored(t *testing.T) {
	a := &Attachment{
		netns: filepath.Join(t.TempDir(), "gone"), inode: 42, adopted: true,
		ports: []port{{Tap: "tap_kuasar0", Interface: "eth0", MAC: "02:00:00:00:00:01", MTU: 1450, Qdisc: true}},
		guest: &protocol.Network{Interfaces: []*protocol.Interface{{Name: "eth0", Mac: "02:00:00:00:00:01", Mtu: 1450}}},
	}
	text, err := json.Marshal(a.Saved())
	if err != nil {
		t.Fatal(err)
	}
	var saved Saved
	if err := json.Unmarshal(text, &saved); err != nil {
		t.Fatal(err)
	}
	b := Restore(saved)
	if !proto.Equal(a.Guest(), b.Guest()) || !b.Adopted() || b.inode != 42 {
		t.Errorf("got %+v", b)
	}
	nics := b.NICs()
	if len(nics) != 1 || nics[0].Tap != nil || nics[0].MAC.String() != "02:00:00:00:00:01" || nics[0].MTU != 1450 {
		t.Errorf("got %+v", nics)
	}
	// Its namespace is gone, so there is nothing to undo.
	for range 2 {
		if err := b.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
}

func TestRandomMAC(t *testing.T) {
	mac, err := randomMAC()
	if err != nil {
		t.Fatal(err)
	}
	if len(mac) != 6 || mac[0]&1 != 0 || mac[0]&2 == 0 {
		t.Errorf("%s is not a local unicast address", mac)
	}
}

func TestTapNamesFit(t *testing.T) {
	if n := len(tapPrefix) + len("99"); n > unix.IFNAMSIZ-1 {
		t.Errorf("a tap's name has %d characters", n)
	}
}

func TestRetryGivesUp(t *testing.T) {
	calls := 0
	err := retry(t.Context(), func() error { calls++; return unix.ENODEV })
	if !errors.Is(err, unix.ENODEV) || calls != 1 {
		t.Errorf("%v after %d calls", err, calls)
	}
	calls = 0
	err = retry(t.Context(), func() error {
		if calls++; calls < 3 {
			return unix.EBUSY
		}
		return nil
	})
	if err != nil || calls != 3 {
		t.Errorf("%v after %d calls", err, calls)
	}
}
