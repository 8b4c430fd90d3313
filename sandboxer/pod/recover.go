package pod

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/sandboxer/guestlink"
	"kuasar.io/kuasar/sandboxer/vm"
)

// recoveries is how many pods are recovered at once.
const recoveries = 32

// callLimit bounds one attempt to reach the agent of a running machine.
const callLimit = 20 * time.Second

// Recover finds the pods that another daemon left in the base directory, takes over those that run,
// with proof, and cleans up after the others. It is called once, before the first request; ctx is
// the daemon's life.
//
// Every pod is known from the beginning, in the state of its journal. Recover returns when it is
// decided what becomes of each, or after Options.RecoverLimit: the recovery of those that hang then
// goes on beside the daemon's work. Until it is decided, Wait of such a pod waits; Stop and Shutdown
// decide it. When ctx ends before, Recover returns its error and leaves the undecided pods as they
// are.
//
// What cannot be cleaned up is logged, its state directory stays, and it is tried again.
func (m *Manager) Recover(ctx context.Context) error {
	entries, err := os.ReadDir(m.opts.Dir)
	if err != nil {
		return fmt.Errorf("cannot look for pods in %s: %w", m.opts.Dir, err)
	}
	var pods []*Pod
	names := map[string]bool{}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			continue // the daemon's own
		}
		names[e.Name()] = true
		if !e.IsDir() || CheckID(e.Name()) != nil {
			m.opts.Log.Warn("there is something in the base directory that is no state directory of a pod; it is left alone",
				"path", filepath.Join(m.opts.Dir, e.Name()), "type", e.Type().String())
			continue
		}
		pods = append(pods, m.newPod(e.Name()))
	}
	for _, name := range m.cgroups() {
		if !names[name] && CheckID(name) == nil {
			pods = append(pods, m.newPod(name))
		}
	}

	found := make([]*recovery, 0, len(pods))
	claims := map[string]int{}
	for _, p := range pods {
		found = append(found, p.recovery(ctx))
		claims[p.rec.NetNS]++
	}
	for _, r := range found {
		r.sharedNetNS = claims[r.rec.NetNS] > 1
		m.insert(r.Pod)
	}
	m.recoverAll(ctx, found)
	return ctx.Err()
}

// cgroups lists the leaves of this daemon's pods.
func (m *Manager) cgroups() []string {
	if m.opts.Runtime.Cgroups == nil {
		return nil
	}
	names, err := m.opts.Runtime.Cgroups()
	if err != nil {
		m.opts.Log.Warn("cannot look for the processes of pods that have no state directory any more", "error", err)
	}
	return names
}

func (m *Manager) recoverAll(ctx context.Context, found []*recovery) {
	slots := make(chan struct{}, recoveries)
	var wg sync.WaitGroup
	for _, r := range found {
		wg.Go(func() { r.run(ctx, slots) })
	}
	all := make(chan struct{})
	go func() {
		wg.Wait()
		close(all)
	}()
	limit := time.NewTimer(m.opts.RecoverLimit)
	defer limit.Stop()
	select {
	case <-all:
	case <-ctx.Done():
	case <-limit.C:
		var hanging []string
		for _, r := range found {
			r.mu.Lock()
			if r.recovering {
				hanging = append(hanging, r.id)
			}
			r.mu.Unlock()
		}
		m.opts.Log.Error("not all pods are recovered; the daemon begins to serve, and their recovery goes on",
			"after", m.opts.RecoverLimit, "pods", len(hanging), "ids", clip(strings.Join(hanging, ","), 1024))
	}
}

// recovery is what is to be done with a pod that another daemon left.
type recovery struct {
	*Pod
	ctx context.Context
	// decide does it and tells the outcome.
	decide func(context.Context) string
}

// Outcomes of a recovery.
const (
	adopted = "adopted" // the pod is known again, running or stopped
	cleaned = "cleaned" // nothing is left of it
	kept    = "kept"    // something could not be undone; its directory stays and it is tried again
	held    = "held"    // it runs, and this daemon cannot manage it
	left    = "left"    // the daemon ended before it was decided
)

// run carries the recovery out, when it is its turn. One that hangs gives its turn up.
func (r *recovery) run(ctx context.Context, slots chan struct{}) {
	outcome := left
	select {
	case slots <- struct{}{}:
		release := sync.OnceFunc(func() { <-slots })
		hanging := time.AfterFunc(r.m.slotLimit, release)
		outcome = r.decide(r.ctx)
		hanging.Stop()
		release()
	case <-ctx.Done():
	}
	r.m.opts.Metrics.Recovered(outcome)
	r.mu.Lock()
	r.recovering = false
	r.mu.Unlock()
	r.cancelBoot(nil)
	close(r.booted)
}

// recovery reads the pod's journal and plans what to do with the pod. Nobody else knows the pod yet.
func (p *Pod) recovery(ctx context.Context) *recovery {
	r := &recovery{Pod: p, decide: p.cleanUp}
	r.ctx, p.cancelBoot = context.WithCancelCause(ctx)
	p.booted, p.recovering = make(chan struct{}), true

	rec, err := readRecord(p.dir)
	foreign := errors.Is(err, errForeign)
	switch {
	case rec == nil:
		// Whatever is found by its name, such as processes in its cgroup, nobody can manage any more.
		if _, serr := os.Lstat(p.dir); errors.Is(serr, fs.ErrNotExist) {
			p.log.Warn("a pod's cgroup has no state directory any more; whatever is left of the pod is removed")
		} else {
			p.log.Warn("the journal of a pod cannot be read; whatever is left of the pod is removed", "error", err)
		}
		rec = &record{}
	case rec.ID != p.id && (!foreign || rec.ID != ""):
		p.log.Warn("the journal is that of another pod; whatever is left of this one is removed", "journal", clip(rec.ID, maxID))
		rec.NetNS, rec.Network, rec.Machine, rec.Virtiofsd, rec.Containers = "", nil, nil, nil, nil
	case rec.BootID != p.m.opts.BootID && (!foreign || rec.BootID != ""):
		p.log.Info("the pod is from before the node's last boot; it is removed")
		// No process, tap or mount of it can live, and a pid or name in its journal may be somebody
		// else's by now.
		rec.Network, rec.Machine, rec.Virtiofsd, rec.Containers = nil, nil, nil, nil
	case foreign:
		state := rec.State
		r.decide = func(ctx context.Context) string { return p.recoverForeign(ctx, state, err) }
	case rec.State == Ready:
		r.decide = p.recoverReady
	case rec.State == Stopping, rec.State == Stopped:
		r.decide = func(ctx context.Context) string { return p.keepRecord(ctx, nil) }
	default:
		p.log.Info("the pod was not completely started; it is removed", "stage", rec.Stage)
	}
	rec.ID, rec.BootID = p.id, p.m.opts.BootID
	if rec.State != Ready && rec.State != Stopped {
		rec.State = Stopping
	}
	p.rec = *rec
	return r
}

func (p *Pod) recoverReady(ctx context.Context) string {
	err := p.adopt(ctx)
	if err == nil {
		return adopted
	}
	p.mu.Lock()
	if p.broken != nil {
		err = p.broken
	}
	p.mu.Unlock()
	var request asked
	switch cause := context.Cause(ctx); {
	case errors.As(cause, &request):
		return p.keepRecord(ctx, nil)
	case cause != nil:
		p.hangUp()
		return left
	case errors.Is(err, ErrUnmanageable) && p.alive():
		return p.hold(err)
	}
	return p.keepRecord(ctx, err)
}

// recoverForeign leaves a pod alone of whose journal this daemon understands too little, as long as
// it lives. Its journal is not written.
func (p *Pod) recoverForeign(ctx context.Context, state State, cause error) string {
	// What these say is not understood. Whatever they name is found again by the pod's name, or goes
	// with its namespace.
	p.mu.Lock()
	p.rec.Machine, p.rec.Virtiofsd, p.rec.Containers = nil, nil, nil
	p.held = cause
	p.mu.Unlock()
	switch state {
	case Created, Starting:
		return p.cleanUp(ctx)
	case Stopping, Stopped:
		return p.keepRecord(ctx, nil)
	}
	g, err := p.m.opts.Runtime.LoadCgroup(p.rec.CgroupParent, p.id)
	if err == nil {
		var pids []int
		if pids, err = g.PIDs(); err == nil && len(pids) == 0 {
			p.log.Info("the pod is of another version of the daemon and does not run any more; it is removed", "reason", cause)
			return p.cleanUp(ctx)
		}
	}
	if err := p.reclaim(ctx); err != nil {
		p.log.Warn("not all of the pod is found again", "error", err)
	}
	return p.hold(cause)
}

// reclaim fills the undo list with what the journal and the kernel know of the pod, without trusting
// that any of it is there. It makes nothing.
func (p *Pod) reclaim(ctx context.Context) error {
	rt := p.m.opts.Runtime
	var errs []error
	add := func(s undoStep) { errs = append(errs, p.undo.add(ctx, s)) }

	add(p.directoryUndo())
	// The leaf holds every process of the pod, whether or not the journal knows it.
	g, err := rt.LoadCgroup(p.rec.CgroupParent, p.id)
	deleteLeaf := func(ctx context.Context) error { return p.deleteCgroup(ctx, g) }
	if err != nil {
		// Without the leaf nobody knows what still runs: the directory must stay.
		deleteLeaf = func(ctx context.Context) error {
			g, err := rt.LoadCgroup(p.rec.CgroupParent, p.id)
			if err != nil {
				return err
			}
			return p.deleteCgroup(ctx, g)
		}
	} else {
		p.mu.Lock()
		p.cgroup = g
		p.mu.Unlock()
	}
	add(undoStep{name: StageCgroup, fn: deleteLeaf})
	machine := p.rec.Machine
	if machine != nil && !p.proves(g, machine.PID) {
		p.log.Warn("the process that the journal names is not the pod's: it is not in the pod's cgroup, and its command line "+
			"does not name the pod's directory; it is left alone", "pid", machine.PID)
		machine = nil
	}
	switch saved := p.rec.Network; {
	case saved == nil:
	case p.sharedNetNS && machine == nil:
		p.log.Warn("another pod's journal names the same network namespace; it is left alone", "netns", p.rec.NetNS)
	default:
		if n, err := rt.RestoreNetwork(saved); err != nil {
			p.log.Warn("the pod's network cannot be found again; it goes with its namespace", "error", err)
		} else {
			p.mu.Lock()
			p.network = n
			p.mu.Unlock()
			add(undoStep{name: StageNetwork, fn: func(context.Context) error { return n.Close() }})
		}
	}
	add(undoStep{name: StageShare, fn: func(context.Context) error { return rt.RemoveShare(p.dir) }})
	if saved := p.rec.Virtiofsd; saved != nil && rt.RestoreVirtiofsd != nil {
		if d, err := rt.RestoreVirtiofsd(saved); err != nil {
			p.log.Warn("the pod's file system daemon cannot be found again; it goes with its cgroup", "error", err)
		} else if pids := d.PIDs(); len(pids) > 0 && !p.proves(g, pids[0]) {
			p.log.Warn("the journal names a file system daemon that is not the pod's; it is left alone", "pid", pids[0])
		} else {
			p.mu.Lock()
			p.virtiofsd = d
			p.mu.Unlock()
			add(undoStep{name: "virtiofsd", fn: func(context.Context) error { return d.Stop() }})
		}
	}
	errs = append(errs, p.addContainersUndo(ctx))
	if machine != nil {
		m, err := rt.Driver.Restore(ctx, machine.Saved)
		switch {
		case errors.Is(err, vm.ErrGone):
		case err != nil:
			p.log.Warn("the pod's machine cannot be taken over", "error", err)
			errs = append(errs, fmt.Errorf("%w: the virtual machine cannot be taken over: %w", ErrUnmanageable, err))
		default:
			p.mu.Lock()
			p.machine, p.pid = m, machine.PID
			p.mu.Unlock()
			errs = append(errs, p.addMachineUndo(ctx, m))
			return errors.Join(errs...)
		}
	}
	// What runs without being known has to end before what it uses can be removed.
	add(undoStep{name: StageHypervisor, fn: deleteLeaf})
	return errors.Join(errs...)
}

// proves says whether the process is one of the pod's, whatever journals say. A process that does not
// live proves nothing else: whoever looks for it finds that out.
func (p *Pod) proves(g Cgroup, pid int) bool {
	if g != nil {
		if pids, err := g.PIDs(); err == nil && slices.Contains(pids, pid) {
			return true
		}
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	// Somebody may have moved the pod's processes elsewhere.
	return bytes.Contains(line, []byte(p.dir+"/"))
}

// alive says whether processes of the pod live, or may live.
func (p *Pod) alive() bool {
	p.mu.Lock()
	machine, g := p.machine, p.cgroup
	p.mu.Unlock()
	if machine != nil {
		select {
		case <-machine.Exited():
			return false
		default:
			return true
		}
	}
	if g == nil {
		return true
	}
	pids, err := g.PIDs()
	return err != nil || len(pids) > 0
}

func (p *Pod) deleteCgroup(ctx context.Context, g Cgroup) error {
	ctx, cancel := context.WithTimeout(ctx, teardownLimit)
	defer cancel()
	return g.Delete(ctx)
}

// cleanUp removes whatever is left of a pod that no client knows.
func (p *Pod) cleanUp(ctx context.Context) string {
	ctx = context.WithoutCancel(ctx)
	p.mu.Lock()
	p.abandoned, p.rec.State = true, Stopping
	p.mu.Unlock()
	// What cannot be taken over cannot be kept either.
	if err := p.reclaim(ctx); err != nil {
		p.log.Warn("not all of the pod is found again", "error", err)
	}
	if err := p.discard(ctx); err != nil {
		p.log.Error("the pod cannot be removed; it is tried again", "error", err)
		return kept
	}
	return cleaned
}

// adopt takes over a running pod, or says why that cannot be; the error wraps ErrUnmanageable if
// another daemon could. ctx ends the attempt.
func (p *Pod) adopt(ctx context.Context) error {
	if err := p.reclaim(ctx); err != nil {
		return err
	}
	if p.machine == nil {
		return errors.New("the virtual machine ended while no daemon was there")
	}
	var served <-chan struct{}
	if p.rec.Virtiofsd != nil {
		if p.virtiofsd == nil {
			return errors.New("the file system daemon of the pod's share is gone")
		}
		served = p.virtiofsd.Exited()
	}
	share, err := p.m.opts.Runtime.OpenShare(p.dir)
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.share = share
	p.mu.Unlock()
	if _, err := p.listen(); err != nil {
		return err
	}
	if err := p.reach(ctx, served); err != nil {
		return err
	}
	if err := p.openTasks(ctx, p.shared()); err != nil {
		return err
	}
	if err := p.takeLateNetwork(ctx); err != nil {
		return err
	}
	p.mu.Lock()
	err = p.broken
	if err == nil {
		// From here on what befalls the pod is an end like any other.
		p.recovering = false
	}
	pid := p.pid
	p.mu.Unlock()
	if err != nil {
		return err
	}
	p.log.Info("pod adopted", "hypervisor", pid)
	go p.watch()
	return nil
}

// reach calls the agent until it answers. A guest that is short of time, on a node whose pods are all
// recovered at once, is not to pay for it with its life: there is time until Options.AdoptLimit.
func (p *Pod) reach(ctx context.Context, served <-chan struct{}) error {
	limit := p.m.opts.AdoptLimit
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the agent did not answer the new daemon within %v", limit))
	defer cancel()
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	machine := p.machine
	go func() {
		select {
		case <-machine.Exited():
			end(exitError(machine))
		case <-served:
			end(errShareLost)
		case <-ctx.Done():
		}
	}()
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		err := p.call(ctx)
		if err == nil || errors.Is(err, ErrUnmanageable) {
			return err
		}
		if cause := context.Cause(ctx); cause != nil {
			return fmt.Errorf("cannot reach the agent again: %w (%w)", cause, err)
		}
		p.log.Warn("the agent does not answer the new daemon; it is called again", "error", err)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return fmt.Errorf("cannot reach the agent again: %w (%w)", context.Cause(ctx), err)
		}
	}
}

// call is one attempt to reach the agent.
func (p *Pod) call(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	link, err := p.m.opts.Runtime.OpenLink(ctx, p.machine.Endpoint(), p.log)
	if err != nil {
		return err
	}
	guest, err := p.greet(ctx, link)
	if err != nil {
		_ = link.Close()
		return err
	}
	p.mu.Lock()
	p.link, p.guest = link, guest
	p.mu.Unlock()
	return p.undo.add(ctx, undoStep{name: "link", fn: func(context.Context) error {
		return errors.Join(guest.close(), link.Close())
	}})
}

func (p *Pod) greet(ctx context.Context, link guestlink.Link) (*Guest, error) {
	hello, err := link.Hello(ctx)
	if err != nil {
		return nil, fmt.Errorf("the agent does not call again: %w", err)
	}
	if err := hello.Check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnmanageable, err)
	}
	return connectGuest(ctx, link, hello, p.guestLost)
}

// hangUp ends the conversation with the agent, so that another daemon can begin one, and the one with
// the clients, if any can have begun.
func (p *Pod) hangUp() {
	p.mu.Lock()
	guest, link := p.guest, p.link
	p.guest, p.link = nil, nil
	p.mu.Unlock()
	if guest != nil {
		_ = guest.close()
	}
	if link != nil {
		_ = link.Close()
	}
	if p.listening != nil {
		_ = p.listening.Close() // what is kept of it is not affected
		p.listening = nil
	}
}

// hold lets a pod run that another version of the daemon can manage and this one cannot: a downgrade
// with pods running must not cost them their lives. Such a pod counts as ready. Its journal and what
// is kept of its task socket are left to that other daemon, so its containers' clients wait for an
// answer. Stop and Shutdown end it like any other, and so does the end of its processes.
func (p *Pod) hold(cause error) string {
	p.hangUp()
	p.log.Error("this daemon cannot manage a pod that runs; it is left running until it is stopped or a daemon is started that can", "reason", cause)
	// When the pod ends there will be no answer.
	if err := p.undo.add(context.Background(), undoStep{name: StageTask, fn: p.forgetTasks}); err != nil {
		p.log.Warn("the task socket of the pod is not removed", "error", err)
	}
	p.mu.Lock()
	p.held, p.recovering, p.rec.State = cause, false, Ready
	machine, g := p.machine, p.cgroup
	p.mu.Unlock()
	if machine != nil {
		go func() {
			select {
			case <-p.exited:
			case <-machine.Exited():
				p.fail(exitError(machine))
			}
		}()
	} else if g != nil {
		go p.watchCgroup(g)
	}
	return held
}

// forgetTasks removes the task socket of a pod whose containers this daemon does not have.
func (p *Pod) forgetTasks(context.Context) error {
	err := os.Remove(filepath.Join(p.dir, taskSocket))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, p.m.opts.Runtime.unlisten(p.id))
}

// watchCgroup ends the pod when its last process has ended.
func (p *Pod) watchCgroup(g Cgroup) {
	tick := time.NewTicker(p.m.heldInterval)
	defer tick.Stop()
	for {
		if pids, err := g.PIDs(); err == nil && len(pids) == 0 {
			p.fail(errors.New("the virtual machine ended"))
			return
		}
		select {
		case <-p.exited:
			return
		case <-tick.C:
		}
	}
}

// keepRecord finishes the end of a pod whose client still has to learn of it. Cause is why it ended,
// nil if it was asked to.
func (p *Pod) keepRecord(ctx context.Context, cause error) string {
	ctx = context.WithoutCancel(ctx)
	if cause != nil {
		p.log.Error("the pod is not adopted; it is stopped", "reason", cause)
	}
	var err error
	if len(p.undo.steps) == 0 {
		// A machine that cannot be taken over ends with its cgroup.
		if err = p.reclaim(ctx); errors.Is(err, ErrUnmanageable) {
			err = nil
		}
	}
	if p.containers == nil {
		// The containers' exits are read on the task socket until Shutdown.
		p.mu.Lock()
		guest := p.guest
		p.guest = nil
		p.mu.Unlock()
		if guest != nil {
			_ = guest.close()
		}
		if terr := p.openTasks(ctx, p.shared()); terr != nil {
			p.log.Warn("the ends of the pod's containers cannot be told any more", "error", terr)
			p.hangUp()
			err = errors.Join(err, p.undo.add(ctx, undoStep{name: StageTask, tier: recordTier, fn: p.forgetTasks}))
		}
	}
	p.mu.Lock()
	p.rec.State = Stopping
	p.mu.Unlock()
	err = errors.Join(err, p.end(cause, 0).wait(ctx))
	if err != nil {
		p.log.Error("the pod could not be stopped completely; it is tried again at the next request", "error", err)
		return kept
	}
	return adopted
}

func (p *Pod) shared() bool {
	var config cri.PodSandboxConfig
	if err := json.Unmarshal(p.rec.Config, &config); err != nil {
		return false
	}
	return sharedPID(&config)
}

func (m *Manager) insert(p *Pod) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pods[p.id] = p
	m.changed.Store(true)
}
