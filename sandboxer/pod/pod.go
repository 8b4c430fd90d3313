package pod

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/guestlink"
	"kuasar.io/kuasar/sandboxer/vm"
)

// State is where a pod is in its life; see the package comment.
type State string

const (
	Created  State = "created"
	Starting State = "starting"
	Ready    State = "ready"
	Stopping State = "stopping"
	Stopped  State = "stopped"
)

// crashed is the exit status of a pod that ended without having been asked to.
const crashed = 137

// teardownLimit bounds how long a pod's teardown may take, in each of its steps that can wait.
const teardownLimit = 30 * time.Second

// Pod is one pod of the node. Its methods may be called from several goroutines.
type Pod struct {
	id  string
	dir string
	m   *Manager
	log *slog.Logger

	undo undoList
	// exited is closed when the pod has ended, for whatever reason.
	exited chan struct{}

	mu         sync.Mutex
	rec        record
	pid        int
	machine    vm.Machine
	link       guestlink.Link
	guest      *Guest
	cgroup     Cgroup
	share      Share
	virtiofsd  Virtiofsd
	containers Containers
	// network is the machine's attachment until late, if that is set, has it.
	network Network
	late    *lateNetwork
	// listening is the task socket's listener as long as nobody serves on it.
	listening net.Listener
	// cancelBoot ends a boot that is under way; booted is closed when it has ended.
	cancelBoot context.CancelCauseFunc
	booted     chan struct{}
	// ending is the teardown under way.
	ending *ending
	// abandoned pods are nobody's any more; they are removed as soon as that is possible.
	abandoned bool
	// broken is why a pod that is starting, or being recovered, cannot become ready.
	broken error
	// recovering says that it is not decided yet what becomes of a pod that another daemon left;
	// cancelBoot and booted are those of the recovery then.
	recovering bool
	// sharedNetNS says that the journal of another pod names the same network namespace.
	sharedNetNS bool
	// held is why this daemon cannot manage a pod that runs; see hold.
	held error

	// tasks keeps the containers from being handed over and ended both.
	tasks struct {
		sync.Mutex
		closed, handedOver bool
	}
}

// ending is one run of a pod's teardown.
type ending struct {
	done chan struct{}
	err  error // valid when done is closed
}

func (e *ending) wait(ctx context.Context) error {
	select {
	case <-e.done:
		return e.err
	case <-ctx.Done():
		return fmt.Errorf("gave up waiting for the pod's end, which goes on: %w", ctx.Err())
	}
}

// journalLocked writes the record, unless it belongs to the daemon that will manage the pod again.
// The caller holds p.mu.
func (p *Pod) journalLocked() error {
	if p.held != nil {
		return nil
	}
	return p.rec.write(p.dir)
}

// note changes the record and writes it.
func (p *Pod) note(change func(*record)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(&p.rec)
	return p.journalLocked()
}

// journalContainers keeps the containers' records. A full disk must not stop containers, so a
// failure is logged only: the journal then is older than the truth, never torn.
func (p *Pod) journalContainers(records json.RawMessage) {
	if err := p.note(func(r *record) { r.Containers = records }); err != nil {
		p.log.Error("the pod's journal is out of date", "error", err)
	}
}

// fail ends the pod because of err, which is not its client's doing.
func (p *Pod) fail(err error) {
	if p.m.closing.Load() {
		return // the next daemon finds it
	}
	p.mu.Lock()
	state, recovering := p.rec.State, p.recovering
	if (state == Starting || recovering) && p.broken == nil {
		p.broken = err
	}
	p.mu.Unlock()
	if state == Ready && !recovering { // an end that was begun needs no second reason
		p.end(err, 0)
	}
}

// end begins to tear the pod down, or joins the teardown that is under way. Cause is why, if nobody
// asked for it; grace is how long the containers have to end by themselves. It must not be called
// while the pod is starting.
func (p *Pod) end(cause error, grace time.Duration) *ending {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e := p.ending; e != nil {
		select {
		case <-e.done:
			if e.err == nil {
				return e
			}
			// The last attempt left something behind: try again.
		default:
			return e
		}
	}
	e := &ending{done: make(chan struct{})}
	p.ending = e
	wasReady := p.rec.State == Ready
	p.rec.State = Stopping
	if cause != nil {
		p.rec.Reason = clip(cause.Error(), 1024)
		p.rec.ExitStatus = crashed
	}
	if err := p.journalLocked(); err != nil {
		p.log.Warn("the pod's journal is out of date", "error", err)
	}
	go func() {
		if wasReady {
			if cause != nil {
				p.log.Error("the pod is stopped", "reason", cause)
			} else {
				p.powerOff(grace)
			}
		}
		e.err = p.teardown()
		close(e.done)
	}()
	return e
}

// powerOff lets the guest end its containers, if it has any and if it cooperates. What it says does
// not matter: the machine is stopped next.
func (p *Pod) powerOff(grace time.Duration) {
	p.mu.Lock()
	guest, machine, containers := p.guest, p.machine, p.containers
	p.mu.Unlock()
	if guest == nil || machine == nil || containers == nil || containers.Len() == 0 {
		return
	}
	if grace <= 0 || grace > maxGrace {
		grace = maxGrace
	}
	ctx, cancel := context.WithTimeout(context.Background(), grace+time.Second)
	defer cancel()
	_, err := guest.sandbox.PowerOff(ctx, &protocol.PowerOffRequest{GraceMillis: uint32(grace.Milliseconds())})
	if err != nil {
		p.log.Debug("the guest did not power off", "error", err)
		return
	}
	select {
	case <-machine.Exited():
	case <-ctx.Done():
	}
}

// maxGrace bounds how long containers have to end when the pod is stopped; clients stop the
// containers before the pod, so there is seldom one left.
const maxGrace = 2 * time.Second

// teardown undoes everything but what a client still reads from a stopped pod.
func (p *Pod) teardown() error {
	err := p.undo.run(context.Background(), machineTier)

	p.mu.Lock()
	if p.rec.ExitedAt.IsZero() {
		p.rec.ExitedAt = time.Now()
		if p.machine != nil {
			select {
			case <-p.machine.Exited():
				p.rec.ExitedAt = p.machine.Exit().Time
			default:
			}
		}
	}
	if err == nil {
		p.rec.State = Stopped
		p.rec.Network, p.rec.Virtiofsd, p.rec.Machine = nil, nil, nil
		p.rec.LateNetwork = false
		p.network, p.late = nil, nil
		p.machine, p.link, p.guest, p.cgroup, p.share, p.virtiofsd = nil, nil, nil, nil, nil, nil
		p.pid = 0
	}
	if jerr := p.journalLocked(); jerr != nil {
		p.log.Warn("the pod's journal is out of date", "error", jerr)
	}
	select {
	case <-p.exited:
	default:
		close(p.exited)
	}
	p.mu.Unlock()
	if err != nil {
		p.log.Error("the pod could not be torn down completely; it is tried again at the next request", "error", err)
		return fmt.Errorf("cannot tear down pod %s: %w", p.id, err)
	}
	p.log.Info("pod stopped")
	return nil
}

// discard tears down whatever is left of the pod, in any state but Starting, and removes its last
// traces. The pod stays known, as abandoned, if that fails.
func (p *Pod) discard(ctx context.Context) error {
	if err := p.end(nil, 0).wait(ctx); err != nil {
		return err
	}
	if err := p.undo.run(ctx, recordTier); err != nil {
		return fmt.Errorf("cannot remove pod %s: %w", p.id, err)
	}
	p.m.forget(p)
	return nil
}

// asked is why a boot or a recovery is cancelled when a client asks for the pod's end.
type asked string

func (a asked) Error() string { return string(a) }

// settle cancels a boot or a recovery that is under way for the given reason and waits until it has
// ended: the pod then is forgotten, stopped or, if the boot was faster, ready.
func (p *Pod) settle(ctx context.Context, reason error) error {
	p.mu.Lock()
	unsettled := p.rec.State == Starting || p.recovering
	cancel, booted := p.cancelBoot, p.booted
	p.mu.Unlock()
	if !unsettled {
		return nil
	}
	cancel(reason)
	select {
	case <-booted:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("gave up waiting for the boot or the recovery of pod %s to end: %w", p.id, ctx.Err())
	}
}

var errHandedOver = errors.New("the daemon is stopping: the next one goes on with the pod's containers")

// handOver lets go of the containers, unless they are forgotten already.
func (p *Pod) handOver() error {
	p.mu.Lock()
	containers, late := p.containers, p.late
	p.mu.Unlock()
	if late != nil {
		late.end()
	}
	p.tasks.Lock()
	defer p.tasks.Unlock()
	if containers == nil || p.tasks.closed || p.tasks.handedOver {
		return nil
	}
	p.tasks.handedOver = true
	return containers.HandOver()
}

// closeTasks forgets the containers and removes the task socket.
func (p *Pod) closeTasks(containers Containers, l net.Listener, path string) error {
	p.tasks.Lock()
	defer p.tasks.Unlock()
	if p.tasks.handedOver {
		return errHandedOver
	}
	p.tasks.closed = true
	return errors.Join(containers.Close(), p.m.opts.Runtime.unlisten(p.id), closeListener(l, path))
}

// guestGone tells the containers that their guest has ended.
func (p *Pod) guestGone(containers Containers, at time.Time) error {
	p.tasks.Lock()
	defer p.tasks.Unlock()
	if p.tasks.handedOver {
		return errHandedOver
	}
	containers.GuestGone(at)
	return nil
}

var errShareLost = errors.New("the file system daemon of the pod's share ended")

// watch ends the pod when its machine, its agent's link or its file system daemon ends.
func (p *Pod) watch() {
	p.mu.Lock()
	machine, link, virtiofsd := p.machine, p.link, p.virtiofsd
	p.mu.Unlock()
	if machine == nil || link == nil {
		return // the pod was stopped already
	}
	var served <-chan struct{}
	if virtiofsd != nil {
		served = virtiofsd.Exited()
	}
	select {
	case <-p.exited:
	case <-machine.Exited():
		p.fail(exitError(machine))
	case <-link.Broken():
		p.lost(machine, errors.New("the connection to the agent broke"))
	case <-served:
		p.lost(machine, errShareLost)
	}
}

// lost ends the pod for the given reason, unless the machine's own end turns out to be the reason.
func (p *Pod) lost(machine vm.Machine, reason error) {
	select {
	case <-p.exited:
	case <-machine.Exited():
		p.fail(exitError(machine))
	case <-time.After(time.Second):
		p.fail(reason)
	}
}

// guestLost is called when the connection for calls ends without having been closed.
func (p *Pod) guestLost(reason error) {
	p.mu.Lock()
	machine := p.machine
	if (p.rec.State == Starting || p.recovering) && p.broken == nil {
		p.broken = reason
	}
	p.mu.Unlock()
	if machine != nil {
		go p.lost(machine, reason)
	}
}

func exitError(m vm.Machine) error {
	e := m.Exit()
	if e.Reason == "" {
		return fmt.Errorf("the virtual machine ended with status %d", e.Code)
	}
	return fmt.Errorf("the virtual machine ended: %s", clip(e.Reason, 512))
}

const taskSocket = "task.sock"

// Status is what is known of a pod; it costs no round trip to the guest.
type Status struct {
	ID         string
	Client     Client
	State      State
	PID        int // of the hypervisor; 0 when there is none
	CreatedAt  time.Time
	ExitedAt   time.Time // zero while the pod lives
	ExitStatus uint32
	Reason     string // why the pod ended, if nobody asked for it
	Held       string // why this daemon cannot manage the pod, which runs; empty for all others
	Address    string
	Version    uint32
	NetNS      string
	Hypervisor string
	Stages     []StageTime
	Config     json.RawMessage // the CRI's PodSandboxConfig
	CNI        json.RawMessage
}

func (p *Pod) status() Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := Status{
		ID: p.id, Client: p.rec.Client, State: p.rec.State, PID: p.pid, CreatedAt: p.rec.CreatedAt,
		ExitedAt: p.rec.ExitedAt, ExitStatus: p.rec.ExitStatus, Reason: p.rec.Reason,
		NetNS: p.rec.NetNS, Hypervisor: p.m.opts.Runtime.Driver.Name(),
		Stages: p.rec.Stages, Config: p.rec.Config, CNI: p.rec.CNI,
	}
	if p.held != nil && p.rec.State == Ready {
		s.Held = clip(p.held.Error(), 1024)
	}
	if p.rec.Address != "" {
		s.Address, s.Version = p.rec.Address, p.rec.Client.taskVersion()
	}
	return s
}

// wait blocks until the pod has ended.
func (p *Pod) wait(ctx context.Context) (Status, error) {
	select {
	case <-p.exited:
		return p.status(), nil
	case <-ctx.Done():
		return Status{}, ctx.Err()
	}
}

// setClock sets the guest's clock to the host's, once.
func (p *Pod) setClock(ctx context.Context) {
	p.mu.Lock()
	guest, state := p.guest, p.rec.State
	p.mu.Unlock()
	if state != Ready || guest == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if _, err := guest.sandbox.SetClock(ctx, &protocol.SetClockRequest{UnixNanos: time.Now().UnixNano()}); err != nil {
		p.log.Debug("cannot set the guest's clock", "error", err)
	}
}

func notFound(id string) error {
	return fmt.Errorf("pod %q does not exist: %w", clip(id, maxID), errdefs.ErrNotFound)
}
