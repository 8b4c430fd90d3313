package pod

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Options are what a Manager needs. Zero durations mean their defaults.
type Options struct {
	// Dir holds one state directory per pod; it exists and belongs to this daemon alone.
	Dir string
	// BootID tells this boot of the node from others.
	BootID  string
	Runtime Runtime

	Kernel, Initrd, Image string
	KernelParams          string
	// Size is that of pods that say nothing of their own, MaxSize the most that a pod gets; a zero
	// there means what the node has.
	Size, MaxSize  Size
	MemoryPrealloc bool
	// Debug gives every pod a debug console.
	Debug bool
	// ISuladAddress is the form of the task address that iSulad's pods get. AddressAuto, which is also
	// the zero value, is what the client's version understands: AddressVsock to 2.1.5,
	// AddressTTRPCVsock from 2.1.6 on. A pod whose guest has no vsock gets AddressUnix, which all
	// versions understand, whatever is set here; so does every pod if AddressUnix is set.
	ISuladAddress string

	// BootLimit bounds a boot, less the time in which other pods and processes have the CPUs (6.5 s:
	// clients of the usual 10 s are to hear the reason in time, and undoing takes a moment).
	// CreatedLimit bounds the time from Create to Start (5 min; a client may pull an image in
	// between).
	BootLimit    time.Duration
	CreatedLimit time.Duration
	// RecoverLimit bounds how long Recover keeps the daemon from serving (15 s), AdoptLimit how long
	// the agent of a running machine may take to answer a new daemon (2 min).
	RecoverLimit time.Duration
	AdoptLimit   time.Duration
	// Boots is how many machines may boot at once (as many as the node has CPUs).
	Boots int

	Metrics Metrics
	Log     *slog.Logger
}

// Metrics counts what pods do.
type Metrics interface {
	// Stage reports a stage of a boot that took the given time and succeeded or failed.
	Stage(name string, took time.Duration, err error)
	// Recovered reports what became of a pod that another daemon left: adopted, cleaned, kept, held or
	// left.
	Recovered(outcome string)
}

// Manager manages all pods of the node.
type Manager struct {
	opts  Options
	slots chan struct{}

	mu   sync.Mutex
	pods map[string]*Pod
	// changed says that pods came or went since memory was last given back.
	changed atomic.Bool

	// afterStage is called between two stages of a boot; for tests.
	afterStage func(id, stage string)

	// closing says that the daemon ends: what happens to pods now is the next one's business.
	closing atomic.Bool
	// slotLimit is how long a recovery counts among those that run at once, heldInterval how often a
	// machine is looked for that this daemon has no handle of, and closeLimit bounds Close.
	slotLimit, heldInterval, closeLimit time.Duration
	// withdrawLimit bounds how long the withdrawal of an announcement may keep a client: some make one
	// call at a time, for all pods of the node.
	withdrawLimit time.Duration
}

// NewManager returns a manager of no pods. Recover finds those that another daemon left.
func NewManager(o Options) *Manager {
	if o.BootLimit == 0 {
		o.BootLimit = 6500 * time.Millisecond
	}
	if o.CreatedLimit == 0 {
		o.CreatedLimit = 5 * time.Minute
	}
	if o.RecoverLimit == 0 {
		o.RecoverLimit = 15 * time.Second
	}
	if o.AdoptLimit == 0 {
		o.AdoptLimit = 2 * time.Minute
	}
	if o.Boots == 0 {
		o.Boots = runtime.NumCPU()
	}
	if o.Metrics == nil {
		o.Metrics = noMetrics{}
	}
	return &Manager{
		opts: o, slots: make(chan struct{}, o.Boots), pods: make(map[string]*Pod),
		slotLimit: 5 * time.Second, heldInterval: 2 * time.Second, closeLimit: 10 * time.Second,
		withdrawLimit: 10 * time.Second,
	}
}

type noMetrics struct{}

func (noMetrics) Stage(string, time.Duration, error) {}
func (noMetrics) Recovered(string)                   {}

// CreateRequest announces a pod.
type CreateRequest struct {
	ID string
	// Client is who creates the pod; only such clients as announce containers may do that in it.
	Client Client
	NetNS  string
	Config *cri.PodSandboxConfig
	// CNI is the result of the network set-up as the client tells it, for people; may be nil.
	CNI json.RawMessage
}

// maxConfig bounds the configuration of a pod in its journal, in bytes.
const maxConfig = 1 << 20

// Create checks the request and makes the pod's state directory; nothing runs yet. Errors wrap
// errdefs' InvalidArgument, AlreadyExists, FailedPrecondition (what a virtual machine cannot do, a
// network namespace that is gone), or say why the directory cannot be made. An empty NetNS is refused,
// whoever sends it: it means the node's network, and a pod that got the loopback interface alone instead
// would fail later and say less. A namespace that is empty is no error; see lateNetwork.
func (m *Manager) Create(_ context.Context, req CreateRequest) error {
	if err := CheckID(req.ID); err != nil {
		return err
	}
	if err := checkSocketPath(m.opts.Dir, req.ID); err != nil {
		return err
	}
	if req.Config == nil {
		req.Config = &cri.PodSandboxConfig{}
	}
	if err := checkConfig(req.Config, req.NetNS); err != nil {
		return err
	}
	if _, err := machineSize(m.opts.Size, m.opts.MaxSize, req.Config); err != nil {
		return err
	}
	if err := checkNetNS(req.NetNS); err != nil {
		return err
	}
	config, err := json.Marshal(req.Config)
	if err != nil {
		return fmt.Errorf("options: cannot encode the pod's configuration: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if n := len(config) + len(req.CNI); n > maxConfig {
		return fmt.Errorf("options: the pod's configuration has %d bytes, more than 1 MiB: %w", n, errdefs.ErrInvalidArgument)
	}

	p := m.newPod(req.ID)
	p.rec = record{
		Schema: journalSchema, BootID: m.opts.BootID, ID: req.ID, Client: req.Client, State: Created, CreatedAt: time.Now(),
		NetNS: req.NetNS, CgroupParent: req.Config.GetLinux().GetCgroupParent(), Config: config, CNI: req.CNI,
	}
	// The pod is locked until it is whole: it can be found from here on.
	p.mu.Lock()
	defer p.mu.Unlock()
	m.mu.Lock()
	if m.pods[req.ID] != nil {
		m.mu.Unlock()
		return fmt.Errorf("pod %s exists: %w", req.ID, errdefs.ErrAlreadyExists)
	}
	m.pods[req.ID] = p
	m.mu.Unlock()

	err = os.Mkdir(p.dir, 0o700)
	if errors.Is(err, os.ErrExist) {
		m.forget(p)
		return fmt.Errorf("pod %s exists, or was not cleaned up: %s is there: %w", req.ID, p.dir, errdefs.ErrAlreadyExists)
	}
	if err == nil {
		err = p.journalLocked()
		if err != nil {
			_ = os.RemoveAll(p.dir)
		}
	}
	if err != nil {
		m.forget(p)
		return &BootError{Stage: StageDirectory, Err: err}
	}
	_ = p.undo.add(context.Background(), p.directoryUndo())
	p.log.Info("pod created", "client", req.Client, "netns", req.NetNS, "name", req.Config.GetMetadata().GetName(), "namespace", req.Config.GetMetadata().GetNamespace())
	return nil
}

func (m *Manager) newPod(id string) *Pod {
	return &Pod{
		id: id, dir: filepath.Join(m.opts.Dir, id), m: m,
		log: m.opts.Log.With("pod", id), exited: make(chan struct{}),
	}
}

func (p *Pod) directoryUndo() undoStep {
	return undoStep{name: StageDirectory, tier: recordTier, last: true, fn: func(context.Context) error { return removeDir(p.dir) }}
}

func (m *Manager) find(id string) *Pod {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.pods[id]
}

func (m *Manager) forget(p *Pod) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pods[p.id] == p {
		delete(m.pods, p.id)
	}
	m.changed.Store(true)
}

func (m *Manager) all() []*Pod {
	m.mu.Lock()
	defer m.mu.Unlock()
	pods := make([]*Pod, 0, len(m.pods))
	for _, p := range m.pods {
		pods = append(pods, p)
	}
	return pods
}

// Start boots a created pod and returns when containers can be made in it. If it fails, or ctx ends
// before, everything is undone and the pod forgotten. Boot failures are *BootError.
func (m *Manager) Start(ctx context.Context, id string) (Status, error) {
	p := m.find(id)
	if p == nil {
		return Status{}, notFound(id)
	}
	if err := p.boot(ctx); err != nil {
		return Status{}, err
	}
	return p.status(), nil
}

// Stop ends the pod's machine and releases everything but its record; the containers have grace to
// end by themselves, 2 s at most. It succeeds for pods that are stopped or unknown.
func (m *Manager) Stop(ctx context.Context, id string, grace time.Duration) error {
	p := m.find(id)
	if p == nil {
		return nil
	}
	if err := p.settle(ctx, asked("the pod was stopped")); err != nil {
		return err
	}
	return p.end(nil, grace).wait(ctx)
}

// Shutdown stops the pod if needed and forgets it. It succeeds for unknown pods.
func (m *Manager) Shutdown(ctx context.Context, id string) error {
	p := m.find(id)
	if p == nil {
		return nil
	}
	if err := p.settle(ctx, asked("the pod was removed")); err != nil {
		return err
	}
	return p.discard(ctx)
}

// Status tells what is known of a pod. It fails with NotFound only.
func (m *Manager) Status(id string) (Status, error) {
	p := m.find(id)
	if p == nil {
		return Status{}, notFound(id)
	}
	return p.status(), nil
}

// Wait returns when the pod has ended, at once if it has already; ExitedAt and ExitStatus are set
// then. It fails with NotFound, or with ctx's error.
func (m *Manager) Wait(ctx context.Context, id string) (Status, error) {
	p := m.find(id)
	if p == nil {
		return Status{}, notFound(id)
	}
	return p.wait(ctx)
}

// Metrics returns the resource use of all processes of the pod on the host, as a metrics message of
// containerd/cgroups of the host's cgroup version.
func (m *Manager) Metrics(id string) (proto.Message, error) {
	p := m.find(id)
	if p == nil {
		return nil, notFound(id)
	}
	p.mu.Lock()
	g := p.cgroup
	p.mu.Unlock()
	if g == nil {
		return nil, fmt.Errorf("pod %s does not run: %w", id, errdefs.ErrFailedPrecondition)
	}
	return g.Metrics()
}

// clockInterval is how often the guests' clocks are set.
const clockInterval = time.Minute

// sweepInterval is how often pods are looked for that nobody will ask for again.
const sweepInterval = 15 * time.Second

// Run does the regular work until ctx ends: it sets the guests' clocks and removes pods that were
// created and not started. The pods live on.
func (m *Manager) Run(ctx context.Context) {
	clock, sweep := time.NewTicker(clockInterval), time.NewTicker(sweepInterval)
	defer clock.Stop()
	defer sweep.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-clock.C:
			m.setClocks(ctx)
		case now := <-sweep.C:
			m.sweep(ctx, now)
			// A boot and an end need memory that an idle pod does not: buffers, deep stacks. The
			// runtime by itself would keep it for as long as nothing happens.
			if m.changed.Swap(false) {
				debug.FreeOSMemory()
			}
		}
	}
}

// setClocks asks a few guests at a time, so that some that hang do not keep the others waiting.
func (m *Manager) setClocks(ctx context.Context) {
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8)
	for _, p := range m.all() {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			p.setClock(ctx)
		})
	}
	wg.Wait()
}

func (m *Manager) sweep(ctx context.Context, now time.Time) {
	for _, p := range m.all() {
		p.mu.Lock()
		stale := p.rec.State == Created && now.Sub(p.rec.CreatedAt) > m.opts.CreatedLimit
		if stale {
			p.rec.State = Stopping // from here on it cannot be started
		}
		due := stale || p.abandoned && p.rec.State != Starting && !p.recovering
		p.mu.Unlock()
		if !due {
			continue
		}
		if stale {
			p.log.Warn("the pod was created and never started; it is removed", "after", m.opts.CreatedLimit)
		}
		if err := p.discard(ctx); err != nil {
			p.log.Error("the pod cannot be removed; it is tried again", "error", err)
			p.mu.Lock()
			p.abandoned = true
			p.mu.Unlock()
		}
	}
}

// errStopping is why what is under way is given up when the daemon ends. Clients take Unavailable as
// a reason to ask again.
var errStopping = fmt.Errorf("the daemon is stopping: %w", errdefs.ErrUnavailable)

// Close lets go of all pods, which live on, because the daemon ends: their containers are handed over
// to the next one. Boots that are under way are given up and undone, recoveries left to the next
// daemon, and what was asked to end before may still do so. It returns within 10 s, whatever guests
// and processes do: what is not done then the next daemon does. The connections of clients are to be
// dropped before, so that none of them gets an answer. No method may be called afterwards.
func (m *Manager) Close() {
	m.closing.Store(true)
	ctx, cancel := context.WithTimeout(context.Background(), m.closeLimit)
	defer cancel()
	// The second half of the time is for those that the first did not suffice for.
	patience, done := context.WithTimeout(ctx, m.closeLimit/2)
	defer done()
	var wg sync.WaitGroup
	for _, p := range m.all() {
		wg.Go(func() {
			_ = p.settle(patience, errStopping)
			p.mu.Lock()
			ending := p.ending
			p.mu.Unlock()
			if ending != nil {
				_ = ending.wait(patience)
			}
			if err := p.handOver(); err != nil {
				p.log.Warn("the pod's containers are not handed over whole", "error", err)
			}
		})
	}
	all := make(chan struct{})
	go func() {
		wg.Wait()
		close(all)
	}()
	select {
	case <-all:
	case <-ctx.Done():
		m.opts.Log.Warn("not all pods were let go of in time; the next daemon finds them as they are", "limit", m.closeLimit)
	}
}
