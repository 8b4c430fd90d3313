package pod

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/vm"
)

// The stages of a boot, in their order.
const (
	StageDirectory  = "state directory"
	StageCgroup     = "cgroup"
	StageNetwork    = "network"
	StageShare      = "share"
	StageSlot       = "boot slot"
	StageHypervisor = "hypervisor"
	StageHello      = "agent hello"
	StageSetup      = "guest setup"
	StageTask       = "task socket"
)

// StageTime is how long a stage of the boot took.
type StageTime struct {
	Stage    string        `json:"stage"`
	Duration time.Duration `json:"duration_ns"`
}

// BootError is why a pod did not start.
type BootError struct {
	Stage   string
	Err     error
	Console []string // the last lines of the guest's console, if there was one
}

func (e *BootError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "cannot start the pod's virtual machine: stage %q: %v", e.Stage, e.Err)
	if len(e.Console) > 0 {
		fmt.Fprintf(&b, "; the guest's console ends with: %s", strings.Join(e.Console, " | "))
	}
	return b.String()
}

func (e *BootError) Unwrap() error { return e.Err }

// tailMargin is kept of the caller's time for undoing a failed boot and for telling why it failed.
const tailMargin = time.Second

// boot takes the pod from Created to Ready. If it fails everything is undone and the pod forgotten,
// because no client asks for the end of a pod whose start failed.
func (p *Pod) boot(ctx context.Context) error {
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) > 2*tailMargin {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadlineCause(ctx, deadline.Add(-tailMargin),
			errors.New("the caller's time-out came first"))
		defer cancel()
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	booted := make(chan struct{})
	p.mu.Lock()
	if p.m.closing.Load() {
		p.mu.Unlock()
		return errStopping
	}
	if p.rec.State != Created {
		state := p.rec.State
		p.mu.Unlock()
		return fmt.Errorf("cannot start pod %s: it is %s already: %w", p.id, state, errdefs.ErrFailedPrecondition)
	}
	p.rec.State = Starting
	p.cancelBoot, p.booted = cancel, booted
	p.mu.Unlock()
	defer close(booted)

	b := &boot{Pod: p}
	err := b.run(ctx)
	if err == nil {
		return nil
	}
	p.mu.Lock()
	p.abandoned = true
	p.rec.State = Stopping
	p.mu.Unlock()
	if derr := p.discard(context.WithoutCancel(ctx)); derr != nil {
		p.log.Error("a pod that failed to start left something behind; it is tried again", "error", derr)
	}
	return err
}

// boot is the state of one boot.
type boot struct {
	*Pod
	config  cri.PodSandboxConfig
	fsSock  string
	hello   *protocol.Hello
	release func() // gives the boot slot back
}

type stage struct {
	name string
	run  func(context.Context) error
}

func (b *boot) run(ctx context.Context) error {
	began := time.Now()
	if err := json.Unmarshal(b.rec.Config, &b.config); err != nil {
		return &BootError{Stage: StageDirectory, Err: err}
	}
	defer func() {
		if b.release != nil {
			b.release()
		}
	}()

	limit := b.m.opts.BootLimit
	prepare, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not done within %v", limit))
	defer cancel()
	for _, s := range []stage{
		{StageDirectory, b.stateDirectory},
		{StageCgroup, b.makeCgroup},
		{StageNetwork, b.attachNetwork},
		{StageShare, b.makeShare},
	} {
		if err := b.stage(prepare, s); err != nil {
			return err
		}
	}
	used := time.Since(began)

	if err := b.stage(ctx, stage{StageSlot, b.takeSlot}); err != nil {
		return err
	}

	clock := &budget{limit: limit - used}
	running, cancel := clock.start(ctx)
	defer cancel()
	for _, s := range []stage{
		{StageHypervisor, func(ctx context.Context) error { return b.startMachine(ctx, clock) }},
		{StageHello, b.awaitHello},
		{StageSetup, b.setUpGuest},
		{StageTask, b.serveTasks},
	} {
		if err := b.stage(running, s); err != nil {
			return err
		}
	}

	b.mu.Lock()
	if err := cmp.Or(b.broken, context.Cause(running)); err != nil {
		b.mu.Unlock()
		return &BootError{Stage: StageTask, Err: err}
	}
	b.rec.State = Ready
	b.rec.Address = b.addressLocked()
	err := b.journalLocked()
	if err != nil {
		b.rec.State = Starting
	}
	b.mu.Unlock()
	if err != nil {
		return &BootError{Stage: StageTask, Err: err}
	}

	attrs := []any{slog.Duration("total", time.Since(began)), slog.Int("pid", b.pid)}
	for _, s := range b.rec.Stages {
		attrs = append(attrs, slog.Duration(s.Stage, s.Duration))
	}
	b.log.Info("pod started", attrs...)
	b.m.changed.Store(true)
	go b.watch()
	return nil
}

// stage runs one stage and journals that it was completed.
func (b *boot) stage(ctx context.Context, s stage) error {
	began := time.Now()
	err := s.run(ctx)
	if err == nil {
		err = context.Cause(ctx)
	}
	if err == nil && b.machine != nil {
		select {
		case <-b.machine.Exited():
			err = exitError(b.machine)
		default:
		}
	}
	took := time.Since(began)
	if err == nil {
		err = b.note(func(r *record) {
			r.Stage = s.name
			r.Stages = append(r.Stages, StageTime{s.name, took})
		})
	}
	b.m.opts.Metrics.Stage(s.name, took, err)
	if err == nil {
		if b.m.afterStage != nil {
			b.m.afterStage(b.id, s.name)
		}
		return nil
	}
	// What ended the context says more than "context canceled".
	if cause := context.Cause(ctx); cause != nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)) {
		if !errors.Is(err, cause) {
			err = cause
		}
	}
	failed := &BootError{Stage: s.name, Err: err}
	if b.machine != nil {
		failed.Console = consoleTail(b.machine, b.dir, b.id)
	}
	b.log.Error("the pod failed to start", "stage", s.name, "after", took, "error", err, "console", failed.Console)
	return failed
}

// stateDirectory finds the directory that Create made; its journal shows that it can be written.
func (b *boot) stateDirectory(context.Context) error {
	if _, err := os.Stat(b.dir); err != nil {
		return fmt.Errorf("the pod's state directory is gone: %w", err)
	}
	return nil
}

func (b *boot) makeCgroup(ctx context.Context) error {
	g, err := b.m.opts.Runtime.NewCgroup(b.rec.CgroupParent, b.id)
	if err != nil {
		return err
	}
	b.mu.Lock()
	b.cgroup = g
	b.mu.Unlock()
	return b.undo.add(ctx, undoStep{name: StageCgroup, fn: func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, teardownLimit)
		defer cancel()
		return g.Delete(ctx)
	}})
}

func (b *boot) attachNetwork(ctx context.Context) error {
	n, err := b.m.opts.Runtime.Attach(ctx, b.rec.NetNS)
	if err != nil {
		return err
	}
	b.mu.Lock()
	b.network = n
	b.mu.Unlock()
	if err := b.undo.add(ctx, undoStep{name: StageNetwork, fn: func(context.Context) error { return n.Close() }}); err != nil {
		return err
	}
	saved, err := n.Saved()
	if err != nil {
		return err
	}
	return b.note(func(r *record) {
		r.Network = saved
		r.LateNetwork = r.Client.Announces() && !n.Adopted()
	})
}

func (b *boot) makeShare(ctx context.Context) error {
	rt := b.m.opts.Runtime
	s, err := rt.NewShare(b.dir)
	if err != nil {
		return err
	}
	b.mu.Lock()
	b.share = s
	b.mu.Unlock()
	if err := b.undo.add(ctx, undoStep{name: StageShare, fn: func(context.Context) error { return s.Close() }}); err != nil {
		return err
	}
	if rt.StartVirtiofsd != nil {
		sock := filepath.Join(b.dir, "virtiofsd.sock")
		d, err := rt.StartVirtiofsd(ctx, VirtiofsdConfig{
			Dir: s.Exported(), Socket: sock, CgroupProcs: b.cgroup.Procs(), Log: b.log,
		})
		if err != nil {
			return err
		}
		b.fsSock = sock
		b.mu.Lock()
		b.virtiofsd = d
		b.mu.Unlock()
		if err := b.undo.add(ctx, undoStep{name: "virtiofsd", fn: func(context.Context) error { return d.Stop() }}); err != nil {
			return err
		}
		saved, err := d.Saved()
		if err != nil {
			return err
		}
		if err := b.note(func(r *record) { r.Virtiofsd = saved }); err != nil {
			return err
		}
	}
	// Between the machine and the share in the undo list: when the machine is dead, and not before,
	// the containers are over and what they had mounted can go.
	return b.addContainersUndo(ctx)
}

// addContainersUndo makes the end of the machine the end of the containers.
func (p *Pod) addContainersUndo(ctx context.Context) error {
	return p.undo.add(ctx, undoStep{name: "containers", fn: func(context.Context) error {
		p.mu.Lock()
		containers, machine := p.containers, p.machine
		p.mu.Unlock()
		if containers == nil {
			return nil
		}
		at := time.Now()
		if machine != nil {
			select {
			case <-machine.Exited():
				at = machine.Exit().Time
			default:
			}
		}
		return p.guestGone(containers, at)
	}})
}

// takeSlot waits until this boot is one of as many as the node has CPUs, so that each keeps its
// pace however many pods are started at once.
func (b *boot) takeSlot(ctx context.Context) error {
	select {
	case b.m.slots <- struct{}{}:
		b.release = func() { <-b.m.slots }
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%d other pods are booting: %w", cap(b.m.slots), context.Cause(ctx))
	}
}

func (b *boot) startMachine(ctx context.Context, clock *budget) error {
	rt, opts := b.m.opts.Runtime, b.m.opts
	size, err := machineSize(opts.Size, opts.MaxSize, &b.config)
	if err != nil {
		return err
	}
	spec := vm.Spec{
		PodID: b.id, Dir: b.dir,
		Kernel: opts.Kernel, Initrd: opts.Initrd, Image: opts.Image,
		KernelParams: b.kernelParams(),
		VCPUs:        size.VCPUs, MemoryMiB: size.MemoryMiB, MemoryPrealloc: opts.MemoryPrealloc,
		Share:       vm.Share{Dir: b.share.Exported(), Socket: b.fsSock},
		CgroupProcs: b.cgroup.Procs(),
	}
	if rt.Vsock != nil {
		v, err := rt.Vsock()
		if err != nil {
			return err
		}
		spec.Vsock = v
	}
	spec.NICs = b.network.NICs()
	machine, err := rt.Driver.Create(spec)
	if err != nil {
		for _, nic := range spec.NICs {
			_ = nic.Tap.Close()
		}
		if spec.Vsock != nil {
			_ = spec.Vsock.FD.Close()
		}
		return err
	}
	b.mu.Lock()
	b.machine = machine
	b.mu.Unlock()
	if err := machine.Start(ctx); err != nil {
		return err
	}
	if err := b.addMachineUndo(ctx, machine); err != nil {
		return err
	}
	state, err := machine.State()
	if err != nil {
		return err
	}
	clock.pid.Store(int64(state.PID))
	return b.note(func(r *record) {
		r.Machine = &state
		b.pid = state.PID
	})
}

func (p *Pod) addMachineUndo(ctx context.Context, machine vm.Machine) error {
	return p.undo.add(ctx, undoStep{name: StageHypervisor, fn: func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, teardownLimit)
		defer cancel()
		return machine.Stop(ctx)
	}})
}

// kernelParams are the configured ones, with the type of the share as it really is.
func (b *boot) kernelParams() []string {
	var params []string
	for _, f := range strings.Fields(b.m.opts.KernelParams) {
		if !strings.HasPrefix(f, protocol.ParamShareType+"=") && f != protocol.ParamDebug {
			params = append(params, f)
		}
	}
	fs := "9p"
	if b.fsSock != "" {
		fs = "virtiofs"
	}
	params = append(params, protocol.ParamShareType+"="+fs)
	if b.m.opts.Debug {
		params = append(params, protocol.ParamDebug)
	}
	return params
}

// awaitHello waits at once for the agent's call, for the end of the machine, whose reason tells of a
// panic of the guest's kernel, and for that of the share.
func (b *boot) awaitHello(ctx context.Context) error {
	type answer struct {
		hello *protocol.Hello
		err   error
	}
	waiting, cancel := context.WithCancel(ctx)
	answered := make(chan answer, 1)
	var listening sync.WaitGroup
	// Nothing of this may come into being after the boot was undone.
	defer listening.Wait()
	defer cancel()
	listening.Go(func() {
		ctx := waiting
		link, err := b.m.opts.Runtime.OpenLink(ctx, b.machine.Endpoint(), b.log)
		if err != nil {
			answered <- answer{err: err}
			return
		}
		b.mu.Lock()
		b.link = link
		b.mu.Unlock()
		if err := b.undo.add(ctx, undoStep{name: "link", fn: func(context.Context) error { return link.Close() }}); err != nil {
			answered <- answer{err: err}
			return
		}
		hello, err := link.Hello(ctx)
		answered <- answer{hello, err}
	})
	var served <-chan struct{}
	if b.virtiofsd != nil {
		served = b.virtiofsd.Exited()
	}
	select {
	case a := <-answered:
		if a.err != nil {
			return b.endedOr(fmt.Errorf("the agent did not call: %w", a.err))
		}
		if err := a.hello.Check(); err != nil {
			return fmt.Errorf("%w: install the initrd (its agent is %s) and the daemon from one package, and restart the daemon",
				err, clip(plain(a.hello.GetAgentVersion()), 64))
		}
		b.hello = a.hello
		b.log.Debug("the agent called", "agent", clip(plain(a.hello.GetAgentVersion()), 64),
			"kernel", clip(plain(a.hello.GetKernelRelease()), 64), "uptime", time.Duration(a.hello.GetUptimeNanos()))
		return nil
	case <-b.machine.Exited():
		return exitError(b.machine)
	case <-served:
		// The daemon ends when the hypervisor does, and may be faster.
		return b.endedOr(errShareLost)
	case <-ctx.Done():
		return fmt.Errorf("the agent did not call: %w", context.Cause(ctx))
	}
}

func (b *boot) setUpGuest(ctx context.Context) error {
	guest, err := connectGuest(ctx, b.link, b.hello, b.guestLost)
	if err != nil {
		return b.endedOr(err)
	}
	b.mu.Lock()
	b.guest = guest
	b.mu.Unlock()
	if err := b.undo.add(ctx, undoStep{name: StageSetup, fn: func(context.Context) error { return guest.close() }}); err != nil {
		return err
	}
	req, err := setupRequest(&b.config, b.network.Guest())
	if err != nil {
		return err
	}
	req.Entropy = make([]byte, 64)
	rand.Read(req.Entropy)
	req.UnixNanos = time.Now().UnixNano()
	if _, err := guest.sandbox.Setup(ctx, req); err != nil {
		return b.endedOr(fmt.Errorf("the agent refused: %w", err))
	}
	return nil
}

// endedOr prefers what caused err, if that is known: the end of the machine, or of the connection.
func (b *boot) endedOr(err error) error {
	select {
	case <-b.machine.Exited():
		return exitError(b.machine)
	case <-time.After(500 * time.Millisecond):
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return cmp.Or(b.broken, err)
}

func (b *boot) serveTasks(ctx context.Context) error {
	if err := b.openTasks(ctx, sharedPID(&b.config)); err != nil {
		return err
	}
	return b.takeLateNetwork(ctx)
}

// takeLateNetwork follows the pod's network namespace, if its network is still to come.
func (p *Pod) takeLateNetwork(ctx context.Context) error {
	p.mu.Lock()
	late, network := p.rec.LateNetwork, p.network
	p.mu.Unlock()
	if !late || network == nil {
		return nil
	}
	return p.followNetwork(ctx, network)
}

// openTasks makes the host's side of the containers and serves it on the task socket, together with
// the debug console if that is configured.
func (p *Pod) openTasks(ctx context.Context, sharedPID bool) error {
	p.mu.Lock()
	guest, share, records, address := p.guest, p.share, p.rec.Containers, p.addressLocked()
	client := p.rec.Client
	p.mu.Unlock()
	alive := guest != nil
	if !alive {
		guest = goneGuest()
	}
	containers, err := p.m.opts.Runtime.NewContainers(ContainersConfig{
		PodID: p.id, Dir: p.dir, Address: address, Client: client, Direct: direct(address), Guest: guest, Share: share, SharedPID: sharedPID,
		Records: records, Journal: p.journalContainers, Fail: p.fail, Log: p.log,
	})
	if err != nil {
		return err
	}
	l, err := p.listen()
	if err != nil {
		_ = containers.Close()
		return err
	}
	path := filepath.Join(p.dir, taskSocket)
	p.mu.Lock()
	p.containers, p.listening = containers, nil
	p.mu.Unlock()
	if err := p.undo.add(ctx, undoStep{name: StageTask, tier: recordTier, fn: func(context.Context) error {
		return p.closeTasks(containers, l, path)
	}}); err != nil {
		return err
	}
	go func() {
		if err := containers.Serve(l); err != nil {
			p.log.Debug("the task socket is closed", "error", err)
		}
	}()
	if !alive {
		return nil
	}
	go func() {
		if err := guest.events(context.Background(), containers); err != nil {
			p.fail(err)
		}
	}()
	if p.m.opts.Debug {
		end, err := serveDebug(p.dir, guest)
		if err != nil {
			return err
		}
		return p.undo.add(ctx, undoStep{name: "debug socket", fn: func(context.Context) error { return end() }})
	}
	return nil
}

// listen lets clients connect to the task socket, and wait.
func (p *Pod) listen() (net.Listener, error) {
	if p.listening == nil {
		l, err := p.m.opts.Runtime.listen(p.id, filepath.Join(p.dir, taskSocket))
		if err != nil {
			return nil, err
		}
		p.listening = l
	}
	return p.listening, nil
}
