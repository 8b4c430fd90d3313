package pod

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/container"
)

// syncBuffer is a log that several goroutines write.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// lateWorld is a node whose CNI runs after the pods' starts.
func lateWorld(t *testing.T) *world {
	w := newWorld(t)
	w.cniChanged = make(chan struct{}, 64)
	return w
}

func network(addresses ...string) *protocol.Network {
	return &protocol.Network{Interfaces: []*protocol.Interface{{Name: "eth0", Addresses: addresses}}}
}

// makeNetwork is what CNI does; told is whether the kernel says so.
func (w *world) makeNetwork(n *protocol.Network, told bool) {
	w.mu.Lock()
	w.cni = n
	w.mu.Unlock()
	if told {
		w.cniChanged <- struct{}{}
	}
}

// guestNetworks are the addresses that the guest was told of, one after the other.
func (w *world) guestNetworks() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []string
	for _, n := range w.networks {
		all = append(all, strings.Join(addresses(n), ","))
	}
	return strings.Join(all, " ")
}

func announceIn(t *testing.T, m *Manager, pod, id string) {
	t.Helper()
	if err := m.AnnounceContainer(t.Context(), pod, container.CreateRequest{ID: id}); err != nil {
		t.Fatal(err)
	}
}

func journalSays(t *testing.T, o Options, id, text string) bool {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(o.Dir, id, journalName))
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Contains(content, []byte(text))
}

func TestNetworkAfterStart(t *testing.T) {
	w := lateWorld(t)
	o := testOptions(t, w)
	m := NewManager(o)
	mustStartFor(t, m, "a", ISulad216)
	if len(w.setup.GetNetwork().GetInterfaces()) > 0 || !journalSays(t, o, "a", `"late_network": true`) {
		t.Errorf("set up with %v", w.setup.GetNetwork())
	}
	// The guest has it before there is a container.
	w.makeNetwork(network("10.0.0.1/24"), true)
	eventually(t, "the guest has the network", func() bool { return w.guestNetworks() == "10.0.0.1/24" })
	w.makeNetwork(network("10.0.0.1/24", "fd00::1/64"), true)
	eventually(t, "the guest has the second address", func() bool {
		return w.guestNetworks() == "10.0.0.1/24 10.0.0.1/24,fd00::1/64"
	})
	// What the kernel did not tell of yet is there before the first container.
	w.makeNetwork(network("10.0.0.2/24"), false)
	announceIn(t, m, "a", "c1")
	const all = "10.0.0.1/24 10.0.0.1/24,fd00::1/64 10.0.0.2/24"
	if got := w.guestNetworks(); got != all {
		t.Errorf("before the first container the guest had %q", got)
	}
	if journalSays(t, o, "a", "late_network") {
		t.Error("the journal says that the network is still to come")
	}
	eventually(t, "the watch ends", func() bool { return w.get("watch", ownNetNS) == nil })
	w.makeNetwork(network("10.0.0.3/24"), false)
	announceIn(t, m, "a", "c2")
	if got := w.guestNetworks(); got != all {
		t.Errorf("after the first container the guest was told of %q", got)
	}
	if err := m.Shutdown(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	checkNothingLeft(t, w, o.Dir)
}

// Nobody follows namespaces in which CNI was first, as it always is with containerd.
func TestNetworkBeforeStart(t *testing.T) {
	for name, start := range map[string]func(*Manager, *world){
		"iSulad, network first": func(m *Manager, w *world) { mustStartFor(t, m, "a", ISulad213) },
		"containerd": func(m *Manager, w *world) {
			w.cniChanged = make(chan struct{}, 1)
			mustStartFor(t, m, "a", Containerd)
		},
	} {
		w := newWorld(t)
		o := testOptions(t, w)
		w.setFailure("watch", errors.New("not expected"))
		w.setFailure("adopt", errors.New("not expected"))
		m := NewManager(o)
		start(m, w)
		if m.find("a").late != nil || journalSays(t, o, "a", "late_network") {
			t.Errorf("%s: the namespace is followed", name)
		}
		if s, _ := m.Status("a"); s.Client.Announces() {
			announceIn(t, m, "a", "c")
		}
	}
}

func TestEmptyNamespace(t *testing.T) {
	w := lateWorld(t)
	o := testOptions(t, w)
	var log syncBuffer
	o.Log = slog.New(slog.NewTextHandler(&log, nil))
	m := NewManager(o)
	mustStartFor(t, m, "a", ISulad216)
	announceIn(t, m, "a", "c1")
	announceIn(t, m, "a", "c2")
	if n := strings.Count(log.String(), "network namespace is empty"); n != 1 {
		t.Errorf("%d warnings: %s", n, &log)
	}
	// Better late than never.
	w.makeNetwork(network("10.0.0.1/24"), true)
	eventually(t, "the guest has the network", func() bool { return w.guestNetworks() == "10.0.0.1/24" })
	announceIn(t, m, "a", "c3")
	if journalSays(t, o, "a", "late_network") {
		t.Error("the journal says that the network is still to come")
	}
}

func (w *world) adopted() (calls, told int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.adoptions, len(w.networks)
}

// Neither quiet nor the end of a burst makes an interface without addresses the pod's, as long as CNI may
// be working on it.
func TestInterfaceWithoutAddress(t *testing.T) {
	w := lateWorld(t)
	o := testOptions(t, w)
	m := NewManager(o)
	mustStartFor(t, m, "a", ISulad216)
	w.makeNetwork(network(), true)
	before, _ := w.adopted()
	eventually(t, "it is looked at in the midst of changes", func() bool {
		w.makeNetwork(network(), true)
		now, _ := w.adopted()
		return now >= before+2
	})
	before, _ = w.adopted()
	w.makeNetwork(network(), true)
	eventually(t, "it is looked at when they are over", func() bool {
		now, _ := w.adopted()
		return now > before
	})
	if _, told := w.adopted(); told > 0 {
		t.Errorf("the guest was told of an interface without addresses")
	}
	w.makeNetwork(network("10.0.0.1/24"), true)
	eventually(t, "the guest has the address", func() bool { return w.guestNetworks() == "10.0.0.1/24" })
}

// With the first container CNI is complete: an interface has no addresses then because it has none.
func TestInterfaceWithoutAddressWhenCNIIsComplete(t *testing.T) {
	for name, first := range map[string]bool{"made before the first container": true, "made after it": false} {
		w := lateWorld(t)
		o := testOptions(t, w)
		m := NewManager(o)
		mustStartFor(t, m, "a", ISulad216)
		if first {
			w.makeNetwork(network(), false)
		}
		announceIn(t, m, "a", "c1")
		if !first {
			w.makeNetwork(network(), true)
		} else if _, told := w.adopted(); told != 1 {
			t.Errorf("%s: the first container has no network", name)
		}
		eventually(t, name+": the guest is told", func() bool {
			_, told := w.adopted()
			return told == 1
		})
		announceIn(t, m, "a", "c2")
		if journalSays(t, o, "a", "late_network") {
			t.Errorf("%s: the journal says that the network is still to come", name)
		}
		if err := m.Shutdown(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		checkNothingLeft(t, w, o.Dir)
	}
}

// A container does not start without the network that it would have.
func TestNetworkThatCannotBeTakenOver(t *testing.T) {
	w := lateWorld(t)
	o := testOptions(t, w)
	var log syncBuffer
	o.Log = slog.New(slog.NewTextHandler(&log, nil))
	w.setFailure("watch", errors.New("too many watches"))
	m := NewManager(o)
	mustStartFor(t, m, "a", ISulad216)
	eventually(t, "the watch fails", func() bool { return strings.Contains(log.String(), "too many watches") })
	w.makeNetwork(network("10.0.0.1/24"), false)
	for what, text := range map[string]string{"adopt": "two interfaces", "update network": "no such device"} {
		w.setFailure(what, errors.New(text))
		err := m.AnnounceContainer(t.Context(), "a", container.CreateRequest{ID: "c"})
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v", what, err)
		}
		w.setFailure(what, nil)
	}
	if got, err := m.Announced("a"); err != nil || len(got) > 0 {
		t.Errorf("announced: %v, %v", got, err)
	}
	announceIn(t, m, "a", "c")
	if got := w.guestNetworks(); got != "10.0.0.1/24" {
		t.Errorf("the guest has %q", got)
	}
}

func TestNetworkAfterRestart(t *testing.T) {
	w := lateWorld(t)
	o := testOptions(t, w)
	m := NewManager(o)
	mustStartFor(t, m, "a", ISulad216)
	w.makeNetwork(network("10.0.0.1/24"), true)
	eventually(t, "the guest has the network", func() bool { return w.guestNetworks() == "10.0.0.1/24" })
	m.Close()
	eventually(t, "the watch ends", func() bool { return w.get("watch", ownNetNS) == nil })
	w.dropDaemon()

	w.makeNetwork(network("10.0.0.2/24"), false)
	m = another(t, o)
	eventually(t, "the next daemon goes on", func() bool { return w.guestNetworks() == "10.0.0.1/24 10.0.0.2/24" })
	announceIn(t, m, "a", "c")
	m.Close()
	eventually(t, "the watch ends", func() bool { return w.get("watch", ownNetNS) == nil })
	w.dropDaemon()
	w.setFailure("watch", errors.New("not expected"))
	m = another(t, o)
	if m.find("a").late != nil {
		t.Error("the namespace is followed after the first container")
	}
	if err := m.Shutdown(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	checkNothingLeft(t, w, o.Dir)
}

// The end of a pod, changes of its network and announcements at the same time; the fakes complain.
func TestNetworkAndTeardown(t *testing.T) {
	w := lateWorld(t)
	o := testOptions(t, w)
	m := NewManager(o)
	for i := range 20 {
		mustStartFor(t, m, "a", ISulad216)
		var wg sync.WaitGroup
		wg.Go(func() { w.makeNetwork(network(fmt.Sprintf("10.0.0.%d/24", i)), true) })
		wg.Go(func() { _ = m.AnnounceContainer(t.Context(), "a", container.CreateRequest{ID: "c"}) })
		wg.Go(func() {
			if err := m.Stop(t.Context(), "a", 0); err != nil {
				t.Error(err)
			}
		})
		wg.Wait()
		if err := m.Shutdown(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the watch ends", func() bool { return w.get("watch", ownNetNS) == nil })
	}
	checkNothingLeft(t, w, o.Dir)
}

// A guest that does not answer keeps neither the pod's end nor the daemon's.
func TestEndWhileTheGuestIsToldOfItsNetwork(t *testing.T) {
	w := lateWorld(t)
	o := testOptions(t, w)
	m := NewManager(o)
	asked, release := make(chan struct{}), make(chan struct{})
	w.mu.Lock()
	w.updating = func(ctx context.Context) {
		close(asked)
		<-release
	}
	w.mu.Unlock()
	defer close(release)
	w.setFailure("watch", errors.New("not now"))
	mustStartFor(t, m, "a", ISulad216)
	w.makeNetwork(network("10.0.0.1/24"), false)
	announced := make(chan error, 1)
	go func() { announced <- m.AnnounceContainer(t.Context(), "a", container.CreateRequest{ID: "c"}) }()
	<-asked
	ctx, cancel := context.WithTimeout(t.Context(), networkLimit/2)
	defer cancel()
	if err := m.Shutdown(ctx, "a"); err != nil {
		t.Error(err)
	}
	if err := <-announced; err == nil {
		t.Error("a container was announced in a pod that had ended")
	}
}
