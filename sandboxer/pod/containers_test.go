package pod

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/container"
	"kuasar.io/kuasar/sandboxer/guestlink"
)

func TestAnnouncements(t *testing.T) {
	w := newWorld(t)
	m := NewManager(testOptions(t, w))
	m.withdrawLimit = 20 * time.Millisecond
	ctx := t.Context()
	announce := func(id string) error { return m.AnnounceContainer(ctx, id, container.CreateRequest{ID: "c"}) }
	exec := func(id string) error {
		return m.AnnounceProcess(ctx, id, container.ExecRequest{ID: "c", ExecID: "e"})
	}
	for name, err := range map[string]error{
		"announced": func() error { _, err := m.Announced("a"); return err }(),
		"container": announce("a"), "process": exec("a"), "withdraw": m.Withdraw(ctx, "a", "c", ""),
	} {
		if !errdefs.IsNotFound(err) {
			t.Errorf("an unknown pod: %s: %v", name, err)
		}
	}

	if err := m.Create(ctx, CreateRequest{ID: "a", Client: ISulad216, NetNS: ownNetNS, Config: testConfig()}); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"announced": func() error { _, err := m.Announced("a"); return err }(),
		"container": announce("a"), "process": exec("a"), "withdraw": m.Withdraw(ctx, "a", "c", ""),
	} {
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "the pod is created, not ready") {
			t.Errorf("a pod that was not started: %s: %v", name, err)
		}
	}

	if _, err := m.Start(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if got, err := m.Announced("a"); err != nil || got == nil || len(got) > 0 {
		t.Errorf("of a new pod: %v, %v", got, err)
	}
	if err := errors.Join(announce("a"), exec("a")); err != nil {
		t.Fatal(err)
	}
	if got, err := m.Announced("a"); err != nil || len(got) != 1 || !slices.Equal(got["c"], []string{"e"}) {
		t.Errorf("announced: %v, %v", got, err)
	}
	if err := m.Withdraw(ctx, "a", "c", "e"); err != nil {
		t.Error(err)
	}
	if err := m.Withdraw(ctx, "a", "x", ""); !errdefs.IsNotFound(err) {
		t.Errorf("an unknown container: %v", err)
	}
	// The class that the containers give an error reaches the client.
	w.setFailure("announce", errdefs.ErrAlreadyExists)
	if err := announce("a"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("got %v", err)
	}

	c := w.get("containers", "a").(*fakeContainers)
	c.mu.Lock()
	c.withdrawal = func(ctx context.Context) error { <-ctx.Done(); return context.Cause(ctx) }
	c.mu.Unlock()
	if err := m.Withdraw(ctx, "a", "c", ""); err == nil || !strings.Contains(err.Error(), "not done within 20ms") {
		t.Errorf("a guest that does not answer: %v", err)
	}
	if err := m.Stop(ctx, "a", 0); err != nil {
		t.Fatal(err)
	}
	if err := m.Withdraw(ctx, "a", "c", ""); err != nil {
		t.Errorf("of a stopped pod: %v", err)
	}
	if got, err := m.Announced("a"); err != nil || len(got) != 1 {
		t.Errorf("of a stopped pod: %v, %v", got, err)
	}
	for name, err := range map[string]error{"container": announce("a"), "process": exec("a")} {
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "the pod is stopped") {
			t.Errorf("a stopped pod: %s: %v", name, err)
		}
	}
	if err := m.Shutdown(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if err := m.Withdraw(ctx, "a", "c", ""); !errdefs.IsNotFound(err) {
		t.Errorf("after the shutdown: %v", err)
	}
}

func TestContainerdAnnouncesNothing(t *testing.T) {
	m := NewManager(testOptions(t, newWorld(t)))
	mustStart(t, m, "a")
	err := m.AnnounceContainer(t.Context(), "a", container.CreateRequest{ID: "c"})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "containerd") {
		t.Errorf("got %v", err)
	}
	if got, err := m.Announced("a"); err != nil || len(got) > 0 {
		t.Errorf("announced: %v, %v", got, err)
	}
}

// A pod that stopped before it had containers, as one whose start was undone, has none to withdraw.
func TestWithdrawWithoutContainers(t *testing.T) {
	m := NewManager(testOptions(t, newWorld(t)))
	if err := m.Create(t.Context(), CreateRequest{ID: "a", Client: ISulad213, NetNS: ownNetNS, Config: testConfig()}); err != nil {
		t.Fatal(err)
	}
	if err := m.Stop(t.Context(), "a", 0); err != nil {
		t.Fatal(err)
	}
	if err := m.Withdraw(t.Context(), "a", "c", ""); err != nil {
		t.Errorf("withdraw: %v", err)
	}
	if got, err := m.Announced("a"); err != nil || got == nil || len(got) > 0 {
		t.Errorf("announced: %v, %v", got, err)
	}
}

// deafLink is the vsock of a guest whose agent is gone: the transport does not notice.
type deafLink struct {
	guestlink.Link
	near net.Conn
}

func (l *deafLink) Dial(context.Context, uint32) (net.Conn, error) {
	if near := l.near; near != nil {
		l.near = nil
		return near, nil
	}
	return nil, unix.ENODEV
}

func (*deafLink) Broken() <-chan struct{} { return nil }

func TestDialOfAGuestThatIsGone(t *testing.T) {
	near, far := net.Pipe()
	lost := make(chan error, 1)
	g, err := connectGuest(t.Context(), &deafLink{near: near}, &protocol.Hello{}, func(err error) { lost <- err })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.Dial(t.Context(), protocol.PortStdio); !errors.Is(err, unix.ENODEV) || errors.Is(err, net.ErrClosed) {
		t.Errorf("while it lives: %v", err)
	}
	far.Close()
	<-lost
	if _, err := g.Dial(t.Context(), protocol.PortStdio); !errors.Is(err, unix.ENODEV) || !errors.Is(err, net.ErrClosed) {
		t.Errorf("when it is gone: %v", err)
	}
}

func TestDeletedContainers(t *testing.T) {
	w := newWorld(t)
	m := NewManager(testOptions(t, w))
	mustStartFor(t, m, "a", ISulad213)
	w.events <- &protocol.Event{Event: &protocol.Event_Deleted{Deleted: &protocol.Deleted{ContainerId: "c1", Announcement: "x"}}}
	c := w.get("containers", "a").(*fakeContainers)
	eventually(t, "the deletion reaches the containers", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return slices.Equal(c.deleted, []string{"c1 by x"})
	})
	w.events <- &protocol.Event{Event: &protocol.Event_Deleted{Deleted: &protocol.Deleted{ContainerId: "../../etc"}}}
	s, err := m.Wait(t.Context(), "a")
	if err != nil || !strings.Contains(s.Reason, "impossible id") {
		t.Errorf("a hostile guest: %+v, %v", s, err)
	}
}
