package network

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"kuasar.io/kuasar/guest/protocol"
)

// needRoot skips where namespaces and taps cannot be made.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make network namespaces")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skipf("needs the kernel module tun: %v", err)
	}
}

// newNetns makes a network namespace and returns a path to it.
func newNetns(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		// The thread goes back: the main one would otherwise stay in the new namespace for good.
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			done <- err
			return
		}
		defer home.Close()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		err = unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
		if netns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Skipf("cannot make a network namespace: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
	inNetns(t, path, func(h *netlink.Handle) error {
		lo, err := h.LinkByName("lo")
		if err != nil {
			return err
		}
		return h.LinkSetUp(lo)
	})
	return path
}

// inNetns runs do in a namespace and fails the test with its error.
func inNetns(t *testing.T, path string, do func(h *netlink.Handle) error) {
	t.Helper()
	if _, err := within(path, 0, do); err != nil {
		t.Fatal(err)
	}
}

// topology is a node with a bridge and a pod behind it, as the CNI plugin bridge makes it.
type topology struct{ node, pod string }

const (
	gateway4, pod4 = "10.77.0.1", "10.77.0.5"
	gateway6, pod6 = "fd77::1", "fd77::5"
	podMTU         = 1450
)

func newTopology(t *testing.T) topology {
	top := topology{node: newNetns(t, "node"), pod: newNetns(t, "pod")}
	inNetns(t, top.node, func(h *netlink.Handle) error {
		if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0", MTU: podMTU}}); err != nil {
			return err
		}
		return configure(h, "br0", gateway4+"/24", gateway6+"/64")
	})
	return top
}

// addPodInterface does what CNI does.
func (top topology) addPodInterface(t *testing.T, name string, addrs ...string) {
	t.Helper()
	pod, err := os.Open(top.pod)
	if err != nil {
		t.Fatal(err)
	}
	defer pod.Close()
	inNetns(t, top.node, func(h *netlink.Handle) error {
		br, err := h.LinkByName("br0")
		if err != nil {
			return err
		}
		veth := &netlink.Veth{
			LinkAttrs:     netlink.LinkAttrs{Name: "v" + name, MTU: podMTU, MasterIndex: br.Attrs().Index},
			PeerName:      name,
			PeerNamespace: netlink.NsFd(pod.Fd()),
		}
		if err := h.LinkAdd(veth); err != nil {
			return err
		}
		return configure(h, "v"+name)
	})
	inNetns(t, top.pod, func(h *netlink.Handle) error {
		if err := configure(h, name, addrs...); err != nil {
			return err
		}
		if len(addrs) == 0 {
			return nil
		}
		link, err := h.LinkByName(name)
		if err != nil {
			return err
		}
		if err := h.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP(gateway4)}); err != nil {
			return err
		}
		if len(addrs) > 1 {
			if err := h.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP(gateway6)}); err != nil {
				return err
			}
		}
		return h.NeighAdd(&netlink.Neigh{
			LinkIndex: link.Attrs().Index, State: unix.NUD_PERMANENT,
			IP: net.ParseIP("10.77.0.9"), HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 9},
		})
	})
}

// configure gives addresses to a link and brings it up.
func configure(h *netlink.Handle, name string, addrs ...string) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	for _, s := range addrs {
		a, err := netlink.ParseAddr(s)
		if err != nil {
			return err
		}
		if a.IP.To4() == nil {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := h.AddrAdd(link, a); err != nil {
			return fmt.Errorf("%s: %w", s, err)
		}
	}
	return h.LinkSetUp(link)
}

// offload does to a tap what a hypervisor does for a guest with checksum and segmentation offload.
func offload(t *testing.T, tap *os.File) {
	t.Helper()
	raw, err := tap.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	const csum, tso4, tso6 = 1, 2, 4 // TUN_F_* of linux/if_tun.h
	var ioctlErr error
	if err := raw.Control(func(fd uintptr) {
		ioctlErr = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, csum|tso4|tso6)
	}); err != nil || ioctlErr != nil {
		t.Fatal(err, ioctlErr)
	}
}

// startGuest makes a network stack of its own behind the tap, configured from what the host says,
// as a machine with an agent would be. It returns its namespace.
func startGuest(t *testing.T, a *Attachment) string {
	t.Helper()
	ns := newNetns(t, "guest")
	for i, nic := range a.NICs() {
		name := fmt.Sprintf("eth%d", i)
		var far *os.File
		inNetns(t, ns, func(h *netlink.Handle) (err error) {
			if far, err = openTap(name); err != nil {
				return err
			}
			link, err := h.LinkByName(name)
			if err != nil {
				return err
			}
			if err := h.LinkSetHardwareAddr(link, nic.MAC); err != nil {
				return err
			}
			return h.LinkSetMTU(link, nic.MTU)
		})
		offload(t, nic.Tap)
		offload(t, far)
		pump := func(dst, src *os.File) {
			buf := make([]byte, 128<<10)
			for {
				n, err := src.Read(buf)
				if err != nil {
					return
				}
				dst.Write(buf[:n]) // a full queue drops, as a network does
			}
		}
		go pump(far, nic.Tap)
		go pump(nic.Tap, far)
		t.Cleanup(func() { nic.Tap.Close(); far.Close() })
	}
	applyGuest(t, ns, a.Guest())
	return ns
}

// applyGuest is the agent's part.
func applyGuest(t *testing.T, ns string, n *protocol.Network) {
	t.Helper()
	inNetns(t, ns, func(h *netlink.Handle) error {
		links, err := h.LinkList()
		if err != nil {
			return err
		}
		index := map[string]int{}
		for _, i := range n.Interfaces {
			for _, l := range links {
				if l.Attrs().HardwareAddr.String() == i.Mac {
					index[i.Name] = l.Attrs().Index
					if err := configure(h, l.Attrs().Name, i.Addresses...); err != nil {
						return err
					}
				}
			}
		}
		for _, r := range n.Routes {
			route := &netlink.Route{LinkIndex: index[r.Device], Gw: net.ParseIP(r.Gateway), Scope: netlink.Scope(r.Scope), Priority: int(r.Metric)}
			if r.Destination != "" {
				if _, route.Dst, err = net.ParseCIDR(r.Destination); err != nil {
					return err
				}
			}
			if err := h.RouteAdd(route); err != nil {
				return fmt.Errorf("route %v: %w", r, err)
			}
		}
		return nil
	})
}

// listen and dial make sockets in a namespace.
func listen(t *testing.T, ns, address string) net.Listener {
	t.Helper()
	var l net.Listener
	inNetns(t, ns, func(*netlink.Handle) (err error) {
		l, err = net.Listen("tcp", address)
		return err
	})
	t.Cleanup(func() { l.Close() })
	return l
}

func dial(ns, address string) (net.Conn, error) {
	var c net.Conn
	_, err := within(ns, 0, func(*netlink.Handle) error {
		// An address, not a name, and one family: nothing is done on another thread.
		tcp, err := net.ResolveTCPAddr("tcp", address)
		if err != nil {
			return err
		}
		deadline, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		c, err = new(net.Dialer).DialContext(deadline, "tcp", tcp.String())
		return err
	})
	return c, err
}

// transfer sends data both ways over a new connection and compares it.
func transfer(t *testing.T, from, to, host string) {
	t.Helper()
	l := listen(t, to, net.JoinHostPort(host, "0"))
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		io.Copy(c, c)
	}()
	c, err := dial(from, l.Addr().String())
	if err != nil {
		t.Fatalf("dial %s: %v", l.Addr(), err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	data := make([]byte, 4<<20)
	rand.Read(data)
	go func() {
		c.Write(data)
		c.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("sent %d bytes, got %d back, equal: %t, %v", len(data), len(got), bytes.Equal(got, data), err)
	}
}

// arpReplies asks from the bridge who has an address and returns who answers, each answer once.
func arpReplies(t *testing.T, ns, address string) []string {
	t.Helper()
	var fd, index int
	var mac net.HardwareAddr
	inNetns(t, ns, func(h *netlink.Handle) (err error) {
		br, err := h.LinkByName("br0")
		if err != nil {
			return err
		}
		index, mac = br.Attrs().Index, br.Attrs().HardwareAddr
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ARP)))
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ARP), Ifindex: index})
	})
	defer unix.Close(fd)
	request := bytes.Join([][]byte{
		bytes.Repeat([]byte{0xff}, 6), mac, {0x08, 0x06},
		{0, 1, 8, 0, 6, 4, 0, 1}, mac, net.ParseIP(gateway4).To4(), make([]byte, 6), net.ParseIP(address).To4()}, nil)
	if err := unix.Sendto(fd, request, 0, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ARP), Ifindex: index, Halen: 6}); err != nil {
		t.Fatal(err)
	}
	var from []string
	buf := make([]byte, 128)
	// Some time for the first answer, and less for others that there must not be.
	for deadline := time.Now().Add(5 * time.Second); ; {
		left := time.Until(deadline)
		if left <= 0 {
			return from
		}
		tv := unix.NsecToTimeval(left.Nanoseconds())
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			continue
		}
		if n >= 42 && buf[21] == 2 && net.IP(buf[28:32]).String() == address {
			if from == nil {
				deadline = time.Now().Add(500 * time.Millisecond)
			}
			from = append(from, net.HardwareAddr(buf[22:28]).String())
		}
	}
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// leftovers lists what an Attachment could leave in a namespace.
func leftovers(t *testing.T, ns string) []string {
	t.Helper()
	var left []string
	inNetns(t, ns, func(h *netlink.Handle) error {
		links, err := h.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			if l.Type() == "tuntap" || l.Type() == "tun" {
				left = append(left, l.Attrs().Name)
			}
			qdiscs, err := h.QdiscList(l)
			if err != nil {
				return err
			}
			for _, q := range qdiscs {
				if q.Type() == "ingress" {
					left = append(left, l.Attrs().Name+" ingress")
				}
			}
		}
		return nil
	})
	return left
}

func TestAttachedGuestHasThePodsNetwork(t *testing.T) {
	needRoot(t)
	top := newTopology(t)
	top.addPodInterface(t, "eth0", pod4+"/24", pod6+"/64")
	start := time.Now()
	a, err := Attach(t.Context(), top.pod)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("attached in %s", time.Since(start))
	t.Cleanup(func() { a.Close() })

	g := a.Guest()
	want := &protocol.Network{
		Interfaces: []*protocol.Interface{{Name: "eth0", Mac: g.Interfaces[0].Mac, Mtu: podMTU, Addresses: []string{pod4 + "/24", pod6 + "/64"}}},
		Routes: []*protocol.Route{
			{Device: "eth0", Gateway: gateway4},
			{Device: "eth0", Gateway: gateway6, Ipv6: true, Metric: 1024},
		},
		Neighbours: []*protocol.Neighbour{{Address: "10.77.0.9", Mac: "02:00:00:00:00:09", Device: "eth0"}},
	}
	if !proto.Equal(g, want) {
		t.Errorf("guest network\n%v\nwant\n%v", g, want)
	}

	guest := startGuest(t, a)
	if got := arpReplies(t, top.node, pod4); !slices.Equal(got, []string{g.Interfaces[0].Mac}) {
		t.Errorf("ARP for %s is answered by %q, want one answer of %s", pod4, got, g.Interfaces[0].Mac)
	}
	transfer(t, top.node, guest, pod4)
	transfer(t, top.node, guest, pod6)
	transfer(t, guest, top.node, gateway4)
	transfer(t, guest, top.node, gateway6)

	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if left := leftovers(t, top.pod); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	if err := a.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	// Without the machine the namespace answers for itself again.
	if got := arpReplies(t, top.node, pod4); len(got) != 1 {
		t.Errorf("after Close ARP is answered by %q", got)
	}
}

func TestNothingButTheGuestSpeaksOnTheTap(t *testing.T) {
	needRoot(t)
	top := newTopology(t)
	a, err := Attach(t.Context(), top.pod) // no interface: what arrives was sent by the tap's own stack
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	tap := a.NICs()[0].Tap
	defer tap.Close()
	tap.SetReadDeadline(time.Now().Add(1500 * time.Millisecond))
	buf := make([]byte, 2048)
	for {
		n, err := tap.Read(buf)
		if err != nil {
			return
		}
		t.Errorf("the namespace sent % x", buf[10:min(n, 80)])
	}
}

func TestTwoInterfaces(t *testing.T) {
	needRoot(t)
	top := newTopology(t)
	top.addPodInterface(t, "eth0", pod4+"/24", pod6+"/64")
	top.addPodInterface(t, "net1")
	a, err := Attach(t.Context(), top.pod)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	nics := a.NICs()
	if len(nics) != 2 || nics[0].Tap == nil || nics[1].Tap == nil {
		t.Fatalf("got %+v", nics)
	}
	if again := a.NICs(); again[0].Tap != nil {
		t.Error("the taps were handed over twice")
	}
	// The hypervisor dies: the taps go by themselves, Close has only the filters to remove.
	for _, n := range nics {
		n.Tap.Close()
	}
	if left := leftovers(t, top.pod); slices.ContainsFunc(left, func(s string) bool { return strings.HasPrefix(s, tapPrefix) }) {
		t.Errorf("taps outlive the machine: %q", left)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if left := leftovers(t, top.pod); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func TestRestoredAttachmentCloses(t *testing.T) {
	needRoot(t)
	top := newTopology(t)
	top.addPodInterface(t, "eth0", pod4+"/24")
	a, err := Attach(t.Context(), top.pod)
	if err != nil {
		t.Fatal(err)
	}
	tap := a.NICs()[0].Tap
	defer tap.Close()
	b := Restore(a.Saved())
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if left := leftovers(t, top.pod); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func TestFailedAttachLeavesNothing(t *testing.T) {
	needRoot(t)
	top := newTopology(t)
	top.addPodInterface(t, "eth0", pod4+"/24")
	// Somebody else's filter of the first priority cannot be replaced.
	inNetns(t, top.pod, func(h *netlink.Handle) error {
		link, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := h.QdiscAdd(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}}); err != nil {
			return err
		}
		return h.FilterAdd(redirectFilter(link.Attrs().Index, 1)) // to lo
	})
	a, err := Attach(t.Context(), top.pod)
	if err == nil {
		a.Close()
		t.Fatal("attached over a foreign filter")
	}
	if !strings.Contains(err.Error(), "cannot redirect eth0 to tap_kuasar0") || !strings.Contains(err.Error(), top.pod) {
		t.Errorf("got %v", err)
	}
	if left := leftovers(t, top.pod); !slices.Equal(left, []string{"eth0 ingress"}) {
		t.Errorf("left behind: %q, want only the foreign qdisc", left)
	}
}

func TestLeftoverFilterIsReplaced(t *testing.T) {
	needRoot(t)
	top := newTopology(t)
	top.addPodInterface(t, "eth0", pod4+"/24", pod6+"/64")
	first, err := Attach(t.Context(), top.pod)
	if err != nil {
		t.Fatal(err)
	}
	first.NICs()[0].Tap.Close() // daemon and hypervisor died
	second, err := Attach(t.Context(), top.pod)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	transfer(t, top.node, startGuest(t, second), pod4)
}

func TestNamespaceGone(t *testing.T) {
	needRoot(t)
	top := newTopology(t)
	top.addPodInterface(t, "eth0", pod4+"/24")
	a, err := Attach(t.Context(), top.pod)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(top.pod, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Errorf("Close in a namespace that is gone: %v", err)
	}
}

// adoptWhole follows the namespace until the interface has all of addPodInterface's.
func adoptWhole(t *testing.T, a *Attachment, changed <-chan struct{}) *protocol.Network {
	t.Helper()
	limit := time.After(10 * time.Second)
	for {
		n, err := a.Adopt(t.Context(), false)
		if err != nil {
			t.Fatal(err)
		}
		if len(n.GetInterfaces()) == 1 && len(n.Interfaces[0].Addresses) == 2 && len(n.Routes) == 2 {
			return n
		}
		select {
		case <-changed:
		case <-limit:
			t.Fatalf("the namespace never had all; got %v", n)
		}
	}
}

func TestAdoptLateInterface(t *testing.T) {
	needRoot(t)
	top := newTopology(t)
	a, err := Attach(t.Context(), top.pod)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if a.Adopted() || len(a.Guest().Interfaces) != 0 {
		t.Errorf("an interface in an empty namespace: %v", a.Guest())
	}
	guest := startGuest(t, a)

	if n, err := a.Adopt(t.Context(), false); n != nil || err != nil {
		t.Errorf("Adopt without an interface: %v, %v", n, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	changed, err := a.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	top.addPodInterface(t, "eth0", pod4+"/24", pod6+"/64")
	n := adoptWhole(t, a, changed)
	cancel()
	for range changed { // it is closed
	}
	if !a.Adopted() || len(n.Interfaces) != 1 || !slices.Equal(n.Interfaces[0].Addresses, []string{pod4 + "/24", pod6 + "/64"}) {
		t.Fatalf("got %v", n)
	}
	applyGuest(t, guest, n)
	transfer(t, top.node, guest, pod4)
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if left := leftovers(t, top.pod); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// What a daemon joined and did not live to remember, the next one joins again.
func TestAdoptAfterCrash(t *testing.T) {
	needRoot(t)
	top := newTopology(t)
	a, err := Attach(t.Context(), top.pod)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	guest := startGuest(t, a)
	saved := a.Saved()
	top.addPodInterface(t, "eth0", pod4+"/24", pod6+"/64")
	if _, err := a.Adopt(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	inNetns(t, top.pod, func(h *netlink.Handle) error {
		link, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		return h.LinkSetHardwareAddr(link, net.HardwareAddr{2, 1, 1, 1, 1, 1})
	})
	if n, err := a.Adopt(t.Context(), false); err != nil || n.Interfaces[0].Mac != saved.Ports[0].MAC {
		t.Errorf("when a plugin has set a MAC address: %v, %v", n, err)
	}
	next := Restore(saved)
	n, err := next.Adopt(t.Context(), false)
	if err != nil || len(n.GetInterfaces()) != 1 {
		t.Fatalf("got %v, %v", n, err)
	}
	applyGuest(t, guest, n)
	transfer(t, top.node, guest, pod4)
	if err := next.Close(); err != nil {
		t.Error(err)
	}
}

// CNI takes the interface away and makes another of the same name.
func TestAdoptAnotherInterface(t *testing.T) {
	needRoot(t)
	top := newTopology(t)
	a, err := Attach(t.Context(), top.pod)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	guest := startGuest(t, a)
	remove := func() {
		inNetns(t, top.pod, func(h *netlink.Handle) error {
			link, err := h.LinkByName("eth0")
			if err != nil {
				return err
			}
			return h.LinkDel(link)
		})
	}
	top.addPodInterface(t, "eth0", pod4+"/24", pod6+"/64")
	if _, err := a.Adopt(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	remove()
	top.addPodInterface(t, "eth0", pod4+"/24", pod6+"/64")
	n, err := a.Adopt(t.Context(), false)
	if err != nil || len(n.GetInterfaces()) != 1 {
		t.Fatalf("the second interface: got %v, %v", n, err)
	}
	applyGuest(t, guest, n)
	transfer(t, top.node, guest, pod4)
	remove()
	if n, err := a.Adopt(t.Context(), false); n != nil || err != nil || a.Adopted() || len(a.Guest().Interfaces) != 0 {
		t.Errorf("without an interface: got %v, %v, adopted: %v", n, err, a.Adopted())
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if left := leftovers(t, top.pod); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// unaltered fails the test unless an interface is as CNI made it.
func unaltered(t *testing.T, ns, name string, mac net.HardwareAddr) {
	t.Helper()
	if now := hardwareAddr(t, ns, name); !bytes.Equal(now, mac) {
		t.Errorf("%s has the MAC address %s, it was made with %s", name, now, mac)
	}
	if slices.Contains(leftovers(t, ns), name+" ingress") {
		t.Errorf("what arrives at %s is redirected", name)
	}
}

func hardwareAddr(t *testing.T, ns, name string) (mac net.HardwareAddr) {
	t.Helper()
	inNetns(t, ns, func(h *netlink.Handle) error {
		link, err := h.LinkByName(name)
		if err == nil {
			mac = link.Attrs().HardwareAddr
		}
		return err
	})
	return mac
}

// A plugin that asks a DHCP server brings the interface up, and has its answer seconds later.
func TestAdoptWaitsForAnAddress(t *testing.T) {
	needRoot(t)
	top := newTopology(t)
	a, err := Attach(t.Context(), top.pod)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	guest := startGuest(t, a)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	changed, err := a.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	addAddress := func(s string, lifetime int) {
		inNetns(t, top.pod, func(h *netlink.Handle) error {
			link, err := h.LinkByName("eth0")
			if err != nil {
				return err
			}
			address, err := netlink.ParseAddr(s)
			if err != nil {
				return err
			}
			address.ValidLft, address.PreferedLft = lifetime, lifetime
			return h.AddrAdd(link, address)
		})
	}
	top.addPodInterface(t, "eth0")
	mac := hardwareAddr(t, top.pod, "eth0")
	for _, s := range []string{"", "fe80::77/64", "169.254.7.7/16", "fd99::7/64"} { // the last is a router's
		if s != "" {
			addAddress(s, 600)
		}
		if n, err := a.Adopt(t.Context(), false); n != nil || err != nil || a.Adopted() {
			t.Fatalf("with the address %q: %v, %v", s, n, err)
		}
		unaltered(t, top.pod, "eth0", mac)
	}
	// What was told so far is over when nothing comes for a while; IPv6 takes its time.
	for quiet := false; !quiet; {
		select {
		case <-changed:
		case <-time.After(1500 * time.Millisecond):
			quiet = true
		}
	}
	addAddress(pod4+"/24", 600)
	select {
	case <-changed:
	case <-time.After(10 * time.Second):
		t.Fatal("the watch does not tell of an address")
	}
	n, err := a.Adopt(t.Context(), false)
	if err != nil || len(n.GetInterfaces()) != 1 || !slices.Equal(n.Interfaces[0].Addresses, []string{pod4 + "/24"}) {
		t.Fatalf("with its address: %v, %v", n, err)
	}
	applyGuest(t, guest, n)
	transfer(t, top.node, guest, pod4)
	// It stays the pod's without its address.
	inNetns(t, top.pod, func(h *netlink.Handle) error {
		link, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		address, err := netlink.ParseAddr(pod4 + "/24")
		if err != nil {
			return err
		}
		return h.AddrDel(link, address)
	})
	if n, err := a.Adopt(t.Context(), false); err != nil || len(n.GetInterfaces()) != 1 || len(n.Interfaces[0].Addresses) != 0 {
		t.Errorf("when the address is gone: %v, %v", n, err)
	}
}

// A network may have no addresses: then the end of CNI is all there is to wait for.
func TestAdoptWithoutAddress(t *testing.T) {
	needRoot(t)
	top := newTopology(t)
	a, err := Attach(t.Context(), top.pod)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	guest := startGuest(t, a)
	top.addPodInterface(t, "eth0")
	n, err := a.Adopt(t.Context(), true)
	if err != nil || !a.Adopted() || len(n.GetInterfaces()) != 1 || len(n.Interfaces[0].Addresses) != 0 {
		t.Fatalf("%v, %v", n, err)
	}
	n.Interfaces[0].Addresses = []string{pod4 + "/24"} // the pod's own doing
	applyGuest(t, guest, n)
	transfer(t, top.node, guest, pod4)
}

// The neighbours are the namespace's and the guest's, though the interface gets another MAC address.
func TestAdoptKeepsNeighbours(t *testing.T) {
	needRoot(t)
	top := newTopology(t)
	a, err := Attach(t.Context(), top.pod)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	top.addPodInterface(t, "eth0", pod4+"/24", pod6+"/64")
	inNetns(t, top.pod, func(h *netlink.Handle) error {
		link, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		return h.NeighAdd(&netlink.Neigh{
			LinkIndex: link.Attrs().Index, State: unix.NUD_PERMANENT,
			IP: net.ParseIP("fd77::9"), HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 6},
		})
	})
	want := []string{"10.77.0.9 02:00:00:00:00:09 eth0", "fd77::9 02:00:00:00:00:06 eth0"}
	for _, which := range []string{"first", "second"} {
		n, err := a.Adopt(t.Context(), false)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, e := range n.GetNeighbours() {
			got = append(got, fmt.Sprint(e.Address, " ", e.Mac, " ", e.Device))
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("at the %s reading the guest has the neighbours %q, want %q", which, got, want)
		}
	}
}

// Of several interfaces that come one after the other none is altered.
func TestAdoptOfInterfacesInTheMaking(t *testing.T) {
	needRoot(t)
	top := newTopology(t)
	a, err := Attach(t.Context(), top.pod)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	top.addPodInterface(t, "eth0")
	mac := hardwareAddr(t, top.pod, "eth0")
	if n, err := a.Adopt(t.Context(), false); n != nil || err != nil {
		t.Errorf("the first: %v, %v", n, err)
	}
	top.addPodInterface(t, "eth1", pod4+"/24", pod6+"/64")
	second := hardwareAddr(t, top.pod, "eth1")
	for _, complete := range []bool{false, true} {
		if n, err := a.Adopt(t.Context(), complete); err == nil || !strings.Contains(err.Error(), "CNI made 2 interfaces") {
			t.Errorf("both: %v, %v", n, err)
		}
	}
	unaltered(t, top.pod, "eth0", mac)
	unaltered(t, top.pod, "eth1", second)
}

func TestAdoptRefusesMoreThanTheMachineHas(t *testing.T) {
	needRoot(t)
	top := newTopology(t)
	a, err := Attach(t.Context(), top.pod)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	top.addPodInterface(t, "eth0", pod4+"/24", pod6+"/64")
	if _, err := a.Adopt(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	top.addPodInterface(t, "eth1")
	if n, err := a.Adopt(t.Context(), false); err == nil || !strings.Contains(err.Error(), "cri.sandbox.network.setup.v2") {
		t.Errorf("got %v, %v", n, err)
	}
}

func TestWatchOfNamespaceGone(t *testing.T) {
	a := Restore(Saved{Netns: filepath.Join(t.TempDir(), "gone"), Inode: 1})
	if _, err := a.Watch(t.Context()); err == nil || !strings.Contains(err.Error(), "gone") {
		t.Errorf("got %v", err)
	}
}
