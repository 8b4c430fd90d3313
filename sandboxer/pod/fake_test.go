package pod

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/container"
	"kuasar.io/kuasar/sandboxer/guestlink"
	"kuasar.io/kuasar/sandboxer/vm"
)

// world is the kernel of the fakes: what exists on the host, whichever daemon made it. It outlives
// managers, as the node outlives daemons.
type world struct {
	t *testing.T

	mu       sync.Mutex
	exists   map[string]any // resources by "kind id"
	log      []string       // what was undone, in order
	fail     map[string]error
	noHello  bool
	panicMsg string
	setup    *protocol.SetupRequest
	events   chan *protocol.Event
	clocks   int
	orphaned bool          // the handles of machines belong to a dead daemon
	powerOff chan struct{} // closed by PowerOff, which then ends the machine
	spec     vm.Spec
	pid      int // of every process; it lives, and its command line names no pod
	// Of agents: what they say, and what a hello waits for before it is said.
	hello *protocol.Hello
	calls func(ctx context.Context, id string) error
	// cid is the context id of machines, 0: they have a serial port.
	cid uint32
	// cni is what CNI has made in the namespaces of pods that it had made nothing in at their start;
	// nil: it is always first. cniChanged tells of changes.
	cni        *protocol.Network
	cniChanged chan struct{}
	adoptions  int                   // calls of Adopt
	networks   []*protocol.Network   // what the guest was told after its setup
	updating   func(context.Context) // called before
	// kept are listeners in the service manager's store; nil where nothing is kept.
	kept map[string]net.Listener
}

func newWorld(t *testing.T) *world {
	return &world{t: t, exists: map[string]any{}, fail: map[string]error{}, events: make(chan *protocol.Event, 4), pid: os.Getpid()}
}

func (w *world) failure(what string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.fail[what]
}

func (w *world) setFailure(what string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fail[what] = err
}

func (w *world) make(kind, id string, v any) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.fail["make "+kind]; err != nil {
		return err
	}
	if _, ok := w.exists[kind+" "+id]; ok {
		w.t.Errorf("%s %s is made twice", kind, id)
	}
	w.exists[kind+" "+id] = v
	return nil
}

func (w *world) get(kind, id string) any {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.exists[kind+" "+id]
}

func (w *world) remove(kind, id string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.fail["remove "+kind]; err != nil {
		return err
	}
	if _, ok := w.exists[kind+" "+id]; ok {
		delete(w.exists, kind+" "+id)
		w.log = append(w.log, kind)
	}
	return nil
}

func (w *world) left() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Sorted(maps.Keys(w.exists))
}

func (w *world) undone() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.log)
}

func (w *world) machine(id string) *fakeMachine {
	m, _ := w.get("hypervisor", id).(*fakeMachine)
	return m
}

func (w *world) runtime() Runtime {
	return Runtime{
		Driver: fakeDriver{w},
		OpenLink: func(_ context.Context, e vm.Endpoint, _ *slog.Logger) (guestlink.Link, error) {
			if err := w.failure("open link"); err != nil {
				return nil, err
			}
			l := &fakeLink{w: w, id: e.SerialSocket, broken: make(chan struct{}), closed: make(chan struct{})}
			return l, w.make("link", l.id, l)
		},
		Attach: func(_ context.Context, netns string) (Network, error) {
			n := &fakeNetwork{w: w, netns: netns}
			return n, w.make("network", netns, n)
		},
		RestoreNetwork: func(saved json.RawMessage) (Network, error) {
			n := &fakeNetwork{w: w}
			return n, json.Unmarshal(saved, &n.netns)
		},
		NewShare: func(dir string) (Share, error) {
			return &fakeShare{w, dir}, w.make("share", dir, nil)
		},
		OpenShare:   func(dir string) (Share, error) { return &fakeShare{w, dir}, w.failure("open share") },
		RemoveShare: func(dir string) error { return w.remove("share", dir) },
		StartVirtiofsd: func(_ context.Context, c VirtiofsdConfig) (Virtiofsd, error) {
			d := &fakeVirtiofsd{w, c.Dir, make(chan struct{})}
			return d, w.make("virtiofsd", c.Dir, d)
		},
		RestoreVirtiofsd: func(saved json.RawMessage) (Virtiofsd, error) {
			var dir string
			if err := json.Unmarshal(saved, &dir); err != nil {
				return nil, err
			}
			if d, ok := w.get("virtiofsd", dir).(*fakeVirtiofsd); ok {
				return d, nil
			}
			return nil, errors.New("no such process")
		},
		NewCgroup: func(_, name string) (Cgroup, error) {
			return &fakeCgroup{w, name}, w.make("cgroup", name, true)
		},
		Cgroups: func() (names []string, err error) {
			for _, k := range w.left() {
				if name, ok := strings.CutPrefix(k, "cgroup "); ok {
					names = append(names, name)
				}
			}
			return names, nil
		},
		LoadCgroup: func(_, name string) (Cgroup, error) { return &fakeCgroup{w, name}, w.failure("load cgroup") },
		NewContainers: func(c ContainersConfig) (Containers, error) {
			f := &fakeContainers{w: w, c: c, closed: make(chan struct{})}
			return f, w.make("containers", c.PodID, f)
		},
		Listen: func(id, path string) (net.Listener, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			if w.kept == nil {
				return ListenUnix(path)
			}
			if w.kept[id] == nil {
				l, err := ListenUnix(path)
				if err != nil {
					return nil, err
				}
				w.kept[id] = l
			}
			f, err := w.kept[id].(*net.UnixListener).File()
			if err != nil {
				return nil, err
			}
			defer f.Close()
			return net.FileListener(f)
		},
		Unlisten: func(id string) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.log = append(w.log, "unlisten")
			if l := w.kept[id]; l != nil {
				delete(w.kept, id)
				return l.Close()
			}
			return nil
		},
	}
}

type fakeDriver struct{ w *world }

func (fakeDriver) Name() string { return "fake 1.0" }

func (d fakeDriver) Create(s vm.Spec) (vm.Machine, error) {
	d.w.mu.Lock()
	d.w.spec = s
	d.w.mu.Unlock()
	return &fakeMachine{w: d.w, id: s.PodID, exited: make(chan struct{})}, d.w.failure("create machine")
}

func (d fakeDriver) Restore(_ context.Context, state json.RawMessage) (vm.Machine, error) {
	var id string
	if err := json.Unmarshal(state, &id); err != nil {
		return nil, err
	}
	if m := d.w.machine(id); m != nil {
		if err := d.w.failure("restore machine"); err != nil {
			return nil, err
		}
		m = &fakeMachine{w: d.w, id: id, exited: make(chan struct{})}
		d.w.mu.Lock()
		d.w.exists["hypervisor "+id] = m
		d.w.orphaned = false
		d.w.mu.Unlock()
		return m, nil
	}
	return nil, vm.ErrGone
}

// fakeMachine is one daemon's handle of a machine: the handle of a dead daemon notices nothing.
type fakeMachine struct {
	w      *world
	id     string
	once   sync.Once
	exited chan struct{}
	exit   vm.Exit
}

func (m *fakeMachine) Start(context.Context) error {
	if err := m.w.make("hypervisor", m.id, m); err != nil {
		return err
	}
	if m.w.failure("live") != nil {
		m.end(1, "qemu: "+m.w.failure("live").Error())
	}
	return nil
}

func (m *fakeMachine) end(code int, reason string) {
	m.once.Do(func() {
		m.exit = vm.Exit{Time: time.Now(), Code: code, Reason: reason}
		close(m.exited)
	})
}

func (m *fakeMachine) Endpoint() vm.Endpoint {
	return vm.Endpoint{SerialSocket: m.id, VsockCID: m.w.cid}
}
func (m *fakeMachine) AttachDisk(context.Context, vm.Disk) error { return nil }
func (m *fakeMachine) DetachDisk(context.Context, string) error  { return nil }
func (m *fakeMachine) Exited() <-chan struct{}                   { return m.exited }
func (m *fakeMachine) Exit() vm.Exit                             { return m.exit }
func (m *fakeMachine) ConsoleTail() []string {
	return []string{"one", "\x1b[31mtwo\x1b[0m\r", "last words"}
}
func (m *fakeMachine) State() (vm.State, error) {
	saved, err := json.Marshal(m.id)
	return vm.State{PID: m.w.pid, Saved: saved}, err
}

func (m *fakeMachine) Stop(context.Context) error {
	if err := m.w.remove("hypervisor", m.id); err != nil {
		return err
	}
	m.end(-1, "stopped")
	return nil
}

type fakeLink struct {
	w      *world
	id     string
	once   sync.Once
	broken chan struct{}
	closed chan struct{}
	calls  net.Conn // the agent's end of the last connection to its task port
}

func (l *fakeLink) Hello(ctx context.Context) (*protocol.Hello, error) {
	l.w.mu.Lock()
	silent, hello, calls := l.w.noHello, l.w.hello, l.w.calls
	l.w.mu.Unlock()
	if calls != nil {
		if err := calls(ctx, l.id); err != nil {
			return nil, err
		}
	}
	if silent {
		if l.w.panicMsg != "" {
			l.w.machine(l.id).end(0, "the guest's kernel panicked: "+l.w.panicMsg)
		}
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if hello != nil {
		return hello, nil
	}
	return &protocol.Hello{ProtocolVersion: protocol.Version, AgentVersion: "test"}, nil
}

func (l *fakeLink) Dial(_ context.Context, port uint32) (net.Conn, error) {
	near, far := net.Pipe()
	switch port {
	case protocol.PortTask:
		s, err := ttrpc.NewServer()
		if err != nil {
			return nil, err
		}
		l.w.mu.Lock()
		l.calls = far
		l.w.mu.Unlock()
		protocol.RegisterSandboxService(s, &fakeAgent{w: l.w, link: l})
		go s.Serve(context.Background(), &oneConn{conn: far, closed: l.closed})
		go func() {
			select {
			case <-l.closed:
			case <-l.broken:
			}
			s.Close()
			far.Close()
		}()
	case protocol.PortConsole:
		go func() {
			io.Copy(far, far)
			far.Close()
		}()
	}
	return near, nil
}

func (l *fakeLink) Broken() <-chan struct{} { return l.broken }
func (l *fakeLink) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.w.remove("link", l.id)
}

// oneConn is a listener that yields one connection.
type oneConn struct {
	conn   net.Conn
	closed chan struct{}
}

func (l *oneConn) Accept() (net.Conn, error) {
	if c := l.conn; c != nil {
		l.conn = nil
		return c, nil
	}
	<-l.closed
	return nil, net.ErrClosed
}
func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return &net.UnixAddr{} }

type fakeAgent struct {
	w    *world
	link *fakeLink
	protocol.SandboxService
}

func (a *fakeAgent) Setup(_ context.Context, r *protocol.SetupRequest) (*protocol.SetupResponse, error) {
	a.w.mu.Lock()
	a.w.setup = r
	a.w.mu.Unlock()
	return &protocol.SetupResponse{}, a.w.failure("setup")
}

func (a *fakeAgent) UpdateNetwork(ctx context.Context, r *protocol.UpdateNetworkRequest) (*protocol.UpdateNetworkResponse, error) {
	if err := a.w.failure("update network"); err != nil {
		return nil, err
	}
	if a.w.updating != nil {
		a.w.updating(ctx)
	}
	a.w.mu.Lock()
	defer a.w.mu.Unlock()
	a.w.networks = append(a.w.networks, r.GetNetwork())
	return &protocol.UpdateNetworkResponse{}, nil
}

func (a *fakeAgent) SetClock(context.Context, *protocol.SetClockRequest) (*protocol.SetClockResponse, error) {
	a.w.mu.Lock()
	a.w.clocks++
	a.w.mu.Unlock()
	return &protocol.SetClockResponse{}, nil
}

func (a *fakeAgent) Events(ctx context.Context, _ *protocol.EventsRequest, s protocol.Sandbox_EventsServer) error {
	for {
		select {
		case e := <-a.w.events:
			if err := s.Send(e); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		case <-a.link.closed:
			return nil
		}
	}
}

func (a *fakeAgent) PowerOff(context.Context, *protocol.PowerOffRequest) (*protocol.PowerOffResponse, error) {
	if a.w.powerOff == nil {
		return nil, errors.New("not now")
	}
	close(a.w.powerOff)
	a.w.machine(a.link.id).end(0, "")
	return &protocol.PowerOffResponse{}, nil
}

// fakeNetwork complains about what is not safe for concurrent use.
type fakeNetwork struct {
	w     *world
	netns string
	busy  sync.Mutex
}

func (n *fakeNetwork) NICs() []vm.NIC { return []vm.NIC{{MTU: 1500}} }

func (n *fakeNetwork) use() func() {
	if !n.busy.TryLock() {
		n.w.t.Error("the network is used by two at once")
		return func() {}
	}
	return n.busy.Unlock
}

func (n *fakeNetwork) Adopted() bool {
	defer n.use()()
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	return n.w.cniChanged == nil
}

func (n *fakeNetwork) Adopt(ctx context.Context, complete bool) (*protocol.Network, error) {
	defer n.use()()
	if n.w.get("network", n.netns) == nil {
		n.w.t.Error("a network is adopted that was closed")
	}
	if err := n.w.failure("adopt"); err != nil {
		return nil, err
	}
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	n.w.adoptions++
	if !complete && len(addresses(n.w.cni)) == 0 {
		return nil, ctx.Err()
	}
	return n.w.cni, ctx.Err()
}

func (n *fakeNetwork) Watch(ctx context.Context) (<-chan struct{}, error) {
	defer n.use()()
	if err := n.w.failure("watch"); err != nil {
		return nil, err
	}
	if err := n.w.make("watch", n.netns, true); err != nil {
		return nil, err
	}
	changed := make(chan struct{}, 1)
	go func() {
		defer close(changed)
		defer n.w.remove("watch", n.netns)
		for {
			select {
			case <-n.w.cniChanged:
				select {
				case changed <- struct{}{}:
				default:
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return changed, nil
}

func (n *fakeNetwork) Guest() *protocol.Network {
	if !n.Adopted() {
		return &protocol.Network{}
	}
	return &protocol.Network{Interfaces: []*protocol.Interface{{Name: "eth0", Addresses: []string{"10.1.2.3/24", "fd00::3/64"}}}}
}
func (n *fakeNetwork) Saved() (json.RawMessage, error) {
	defer n.use()()
	return json.Marshal(n.netns)
}

func (n *fakeNetwork) Close() error {
	defer n.use()()
	return n.w.remove("network", n.netns)
}

type fakeShare struct {
	w   *world
	dir string
}

func (s *fakeShare) Exported() string { return s.dir + "/shared" }
func (s *fakeShare) Close() error     { return s.w.remove("share", s.dir) }

type fakeVirtiofsd struct {
	w      *world
	dir    string
	exited chan struct{}
}

func (d *fakeVirtiofsd) PIDs() []int                     { return []int{d.w.pid} }
func (d *fakeVirtiofsd) Exited() <-chan struct{}         { return d.exited }
func (d *fakeVirtiofsd) Saved() (json.RawMessage, error) { return json.Marshal(d.dir) }
func (d *fakeVirtiofsd) Stop() error                     { return d.w.remove("virtiofsd", d.dir) }

type fakeCgroup struct {
	w    *world
	name string
}

func (c *fakeCgroup) Procs() []string                 { return []string{"/cgroup/" + c.name} }
func (c *fakeCgroup) Metrics() (proto.Message, error) { return wrapperspb.String(c.name), nil }

func (c *fakeCgroup) PIDs() ([]int, error) {
	if err := c.w.failure("list cgroup"); err != nil {
		return nil, err
	}
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	for k := range c.w.exists {
		if k == "hypervisor "+c.name || strings.HasPrefix(k, "virtiofsd ") && strings.Contains(k, "/"+c.name+"/") {
			if c.w.exists["cgroup "+c.name] != nil {
				return []int{c.w.pid}, nil
			}
		}
	}
	return nil, nil
}

// Delete kills what is in the leaf, as the real one does.
func (c *fakeCgroup) Delete(context.Context) error {
	if c.w.get("cgroup", c.name) == nil {
		return nil
	}
	if err := c.w.failure("remove cgroup"); err != nil {
		return err
	}
	if m := c.w.machine(c.name); m != nil {
		_ = c.w.remove("hypervisor", c.name)
		if !c.w.orphaned {
			m.end(137, "killed")
		}
	}
	c.w.mu.Lock()
	for k := range c.w.exists {
		if strings.HasPrefix(k, "virtiofsd ") && strings.Contains(k, "/"+c.name+"/") {
			delete(c.w.exists, k)
		}
	}
	c.w.mu.Unlock()
	return c.w.remove("cgroup", c.name)
}

type fakeContainers struct {
	w      *world
	c      ContainersConfig
	closed chan struct{}
	once   sync.Once

	mu   sync.Mutex
	n    int
	gone time.Time
	ooms []string
	// deleted are containers that the guest told of, announced what clients did, and withdrawal what
	// comes of withdrawals.
	deleted    []string
	announced  map[string][]string
	withdrawal func(context.Context) error

	handedOver bool
	hang       chan struct{} // HandOver waits for it
}

func (c *fakeContainers) Serve(l net.Listener) error {
	go func() {
		<-c.closed
		l.Close()
	}()
	for {
		conn, err := l.Accept()
		if err != nil {
			return nil
		}
		fmt.Fprintln(conn, "hello from", c.c.PodID)
		conn.Close()
	}
}

func (c *fakeContainers) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.w.remove("containers", c.c.PodID)
}

func (c *fakeContainers) HandOver() error {
	c.once.Do(func() { close(c.closed) })
	c.mu.Lock()
	c.handedOver = true
	hang := c.hang
	c.mu.Unlock()
	if hang != nil {
		<-hang
	}
	return c.w.failure("hand over")
}

func (c *fakeContainers) GuestGone(at time.Time) {
	c.mu.Lock()
	c.gone = at
	c.mu.Unlock()
	c.w.mu.Lock()
	c.w.log = append(c.w.log, "guest gone")
	c.w.mu.Unlock()
	c.c.Journal(json.RawMessage(`["gone"]`))
}

func (c *fakeContainers) OOM(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ooms = append(c.ooms, id)
}

func (c *fakeContainers) Deleted(id, announcement string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deleted = append(c.deleted, id+" by "+announcement)
}

func (c *fakeContainers) Announced() map[string][]string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.announced)
}

func (c *fakeContainers) AnnounceContainer(_ context.Context, r container.CreateRequest) error {
	if err := c.w.failure("announce"); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.announced == nil {
		c.announced = map[string][]string{}
	}
	c.announced[r.ID] = nil
	return nil
}

func (c *fakeContainers) AnnounceProcess(_ context.Context, r container.ExecRequest) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.announced[r.ID]; !ok {
		return errdefs.ErrNotFound
	}
	c.announced[r.ID] = append(c.announced[r.ID], r.ExecID)
	return nil
}

func (c *fakeContainers) Withdraw(ctx context.Context, id, exec string) error {
	c.mu.Lock()
	withdrawal := c.withdrawal
	c.mu.Unlock()
	if withdrawal != nil {
		return withdrawal(ctx)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	execs, ok := c.announced[id]
	switch {
	case !ok:
		return errdefs.ErrNotFound
	case exec == "":
		delete(c.announced, id)
	default:
		c.announced[id] = slices.DeleteFunc(execs, func(e string) bool { return e == exec })
	}
	return nil
}

func (c *fakeContainers) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

func (c *fakeContainers) seen() (time.Time, []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gone, slices.Clone(c.ooms)
}
