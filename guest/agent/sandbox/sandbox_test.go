package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kuasar.io/kuasar/guest/protocol"
)

func TestSysctlPath(t *testing.T) {
	for name, want := range map[string]string{
		"net.ipv4.ip_forward":               "/proc/sys/net/ipv4/ip_forward",
		"net/ipv4/ip_forward":               "/proc/sys/net/ipv4/ip_forward",
		"net.ipv4.conf.eth0/1.forwarding":   "/proc/sys/net/ipv4/conf/eth0.1/forwarding",
		"net/ipv4/conf/eth0.100/forwarding": "/proc/sys/net/ipv4/conf/eth0.100/forwarding",
		"kernel.shm_rmid_forced":            "/proc/sys/kernel/shm_rmid_forced",
	} {
		if got, err := sysctlPath(name); got != want || err != nil {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	for _, name := range []string{"", "kernel", "/etc/passwd", "..", "a/../b", "a/..", "net..ipv4", "a b.c", "net.ipv4.", "a//b", "a.b\n", strings.Repeat("a.", 200) + "a"} {
		if got, err := sysctlPath(name); err == nil {
			t.Errorf("%q became %q", name, got)
		}
	}
}

func TestSetSysctls(t *testing.T) {
	written := map[string]string{}
	write := func(path, value string) error {
		switch {
		case strings.Contains(path, "eth0"):
			return fs.ErrNotExist
		case value == "bad":
			return fs.ErrInvalid
		}
		written[path] = value
		return nil
	}
	in := map[string]string{"net.ipv4.ip_forward": "1", "kernel.msgmax": "9", "net.ipv4.conf.eth0.arp_filter": "1"}
	left, err := setSysctls(in, globalSysctl, write)
	if err != nil {
		t.Fatal(err)
	}
	if want := map[string]string{"/proc/sys/net/ipv4/ip_forward": "1"}; !reflect.DeepEqual(written, want) {
		t.Errorf("written %v", written)
	}
	if want := map[string]string{"kernel.msgmax": "9", "net.ipv4.conf.eth0.arp_filter": "1"}; !reflect.DeepEqual(left, want) {
		t.Errorf("left %v", left)
	}
	if _, err := setSysctls(map[string]string{"a.b": "bad"}, globalSysctl, write); !errors.Is(err, fs.ErrInvalid) || !strings.Contains(err.Error(), "a.b") {
		t.Errorf("got %v", err)
	}
}

func TestSetupRefuses(t *testing.T) {
	s := New(Options{Log: slog.New(slog.DiscardHandler)})
	for name, r := range map[string]*protocol.SetupRequest{
		"hostname": {Hostname: strings.Repeat("h", 65)},
		"hosts":    {Hosts: make([]byte, maxFile+1)},
		"shm":      {ShmSize: -1},
		"sysctl":   {Sysctls: map[string]string{"../../etc/passwd": "x"}},
	} {
		if _, err := s.Setup(context.Background(), r); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	s = New(Options{Share: errors.New("cannot mount the share: no device"), Log: slog.New(slog.DiscardHandler)})
	_, err := s.Setup(context.Background(), &protocol.SetupRequest{})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "no device") {
		t.Errorf("without a share: %v", err)
	}
}

type containers struct{ err error }

func (c containers) Prepare(context.Context, *protocol.PrepareContainerRequest) error { return c.err }
func (c containers) Purge(context.Context, string) error                              { return c.err }
func (c containers) PrepareProcess(context.Context, *protocol.PrepareProcessRequest) error {
	return c.err
}
func (c containers) PurgeProcess(context.Context, *protocol.PurgeProcessRequest) error { return c.err }
func (c containers) Deleted() []*protocol.Deleted                                      { return nil }

func TestErrorsCarryTheirClass(t *testing.T) {
	s := New(Options{Containers: containers{}})
	s.namespaces = func() error { return nil }
	if _, err := s.PrepareContainer(context.Background(), nil); err != nil {
		t.Error(err)
	}
	s.Containers = containers{fmt.Errorf("no: %w", context.DeadlineExceeded)}
	if _, err := s.PrepareContainer(context.Background(), nil); status.Code(err) != codes.DeadlineExceeded {
		t.Error(err)
	}
	if _, err := s.PurgeContainer(context.Background(), nil); status.Code(err) != codes.DeadlineExceeded {
		t.Error(err)
	}
	if _, err := s.PrepareProcess(context.Background(), nil); status.Code(err) != codes.DeadlineExceeded {
		t.Error(err)
	}
	if _, err := s.PurgeProcess(context.Background(), nil); status.Code(err) != codes.DeadlineExceeded {
		t.Error(err)
	}
	if _, err := s.SetClock(context.Background(), &protocol.SetClockRequest{}); err == nil {
		t.Error("1970 was accepted")
	}
}

type stream struct {
	protocol.Sandbox_EventsServer
	sent chan *protocol.Event
	fail bool
}

func (s *stream) Send(e *protocol.Event) error {
	if s.fail {
		return errors.New("broken")
	}
	s.sent <- e
	return nil
}

func TestEventsSurviveTheStream(t *testing.T) {
	s := New(Options{Containers: containers{}})
	for i := range maxEvents + 10 {
		s.OOM(fmt.Sprint("c", i))
	}
	if n := len(s.events.events); n != maxEvents {
		t.Errorf("%d events are kept", n)
	}
	if err := s.Events(context.Background(), nil, &stream{fail: true}); err == nil {
		t.Error("a broken stream went on")
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	good := &stream{sent: make(chan *protocol.Event)}
	ended := make(chan error, 1)
	go func() { ended <- s.Events(ctx, nil, good) }()
	for i := range maxEvents {
		if got, want := (<-good.sent).GetOomContainerId(), fmt.Sprint("c", i+10); got != want {
			t.Fatalf("event %d is of %s, want %s", i, got, want)
		}
	}
	s.OOM("later")
	if got := (<-good.sent).GetOomContainerId(); got != "later" {
		t.Errorf("got %s", got)
	}
	cancel()
	if err := <-ended; status.Code(err) != codes.Canceled {
		t.Errorf("ended with %v", err)
	}
}

type deletions struct {
	containers
	all []*protocol.Deleted
}

func (d deletions) Deleted() []*protocol.Deleted { return d.all }

// Each stream tells of all deleted containers that are not purged, and then of those to come.
func TestEventsTellOfDeletedContainersAgain(t *testing.T) {
	gone := &deletions{all: []*protocol.Deleted{{ContainerId: "a", Announcement: "1"}}}
	s := New(Options{Containers: gone})
	s.OOM("a")
	s.Deleted(&protocol.Deleted{ContainerId: "a"}) // while nobody listened; and b, which is purged since
	s.Deleted(&protocol.Deleted{ContainerId: "b"})
	for _, want := range []string{"deleted a1, oom a", "deleted a1"} {
		ctx, cancel := context.WithCancel(context.Background())
		taken := &stream{sent: make(chan *protocol.Event)}
		ended := make(chan error, 1)
		go func() { ended <- s.Events(ctx, nil, taken) }()
		var got []string
		for range strings.Split(want, ", ") {
			e := <-taken.sent
			if d := e.GetDeleted(); d != nil {
				got = append(got, "deleted "+d.GetContainerId()+d.GetAnnouncement())
			} else {
				got = append(got, "oom "+e.GetOomContainerId())
			}
		}
		if got := strings.Join(got, ", "); got != want {
			t.Errorf("told %q, want %q", got, want)
		}
		s.Deleted(&protocol.Deleted{ContainerId: "c"})
		if e := <-taken.sent; e.GetDeleted().GetContainerId() != "c" {
			t.Errorf("then %v", e)
		}
		cancel()
		<-ended
	}
}

func TestPowerOffQuiescesAnswersAndEnds(t *testing.T) {
	var grace time.Duration
	ended := make(chan string, 1)
	s := New(Options{
		Quiesce: func(d time.Duration) { grace = d },
		End:     func(reason string) { ended <- reason },
	})
	if _, err := s.PowerOff(context.Background(), &protocol.PowerOffRequest{GraceMillis: 1500}); err != nil {
		t.Fatal(err)
	}
	if grace != 1500*time.Millisecond {
		t.Errorf("grace %v", grace)
	}
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("the machine does not end")
	}
}

// preparing records what is prepared.
type preparing struct {
	Containers
	prepared []string
}

func (c *preparing) Prepare(_ context.Context, r *protocol.PrepareContainerRequest) error {
	c.prepared = append(c.prepared, r.GetContainerId())
	return nil
}

// TestPrepareNeedsTheNamespaces: whatever became of the namespaces, the container's caller learns it.
func TestPrepareNeedsTheNamespaces(t *testing.T) {
	c := &preparing{}
	s := New(Options{Containers: c, Log: slog.New(slog.DiscardHandler)})
	prepare := func() error {
		_, err := s.PrepareContainer(t.Context(), &protocol.PrepareContainerRequest{ContainerId: "a"})
		return err
	}
	if err := prepare(); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("before Setup: %v", err)
	}
	broken := errors.New("no more namespaces")
	s.namespaces = func() error { return broken }
	if err := prepare(); err == nil || !strings.Contains(err.Error(), broken.Error()) {
		t.Errorf("without namespaces: %v", err)
	}
	if len(c.prepared) > 0 {
		t.Errorf("prepared %q", c.prepared)
	}
	s.namespaces = func() error { return nil }
	if err := prepare(); err != nil || len(c.prepared) != 1 {
		t.Errorf("prepared %q: %v", c.prepared, err)
	}
}
