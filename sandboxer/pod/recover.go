package pod

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/sandboxer/vm"
)

// recoveries is how many pods are recovered at once.
const recoveries = 32

// adoptLimit bounds how long the agent of a running machine may take to answer a new daemon.
const adoptLimit = 20 * time.Second

// Recover finds the pods that another daemon left in the base directory and takes over those that
// run, with proof; it cleans up after the others. It is called once, before the first request.
// What cannot be cleaned up is logged, and its state directory stays.
func (m *Manager) Recover(ctx context.Context) error {
	entries, err := os.ReadDir(m.opts.Dir)
	if err != nil {
		return fmt.Errorf("cannot look for pods in %s: %w", m.opts.Dir, err)
	}
	var wg sync.WaitGroup
	slots := make(chan struct{}, recoveries)
	for _, e := range entries {
		if !e.IsDir() || CheckID(e.Name()) != nil {
			continue
		}
		p := m.newPod(e.Name())
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			outcome := p.recover(ctx)
			m.opts.Metrics.Recovered(outcome)
		})
	}
	wg.Wait()
	return nil
}

// Outcomes of a recovery.
const (
	adopted = "adopted" // the pod is known again, running or stopped
	cleaned = "cleaned" // nothing is left of it
	kept    = "kept"    // something could not be undone; its directory stays and it is tried again
)

func (p *Pod) recover(ctx context.Context) string {
	rec, err := readRecord(p.dir)
	switch {
	case err != nil:
		p.log.Warn("the journal of a pod cannot be read; whatever is left of the pod is removed", "error", err)
		rec = &record{Schema: journalSchema, ID: p.id, BootID: p.m.opts.BootID, State: Created}
		p.rec = *rec
		return p.cleanUp(ctx)
	case rec.ID != p.id:
		p.log.Warn("the journal is that of another pod; whatever is left of this one is removed", "journal", rec.ID)
		rec.ID, rec.State = p.id, Created
		rec.Network, rec.Machine, rec.Virtiofsd, rec.Containers = nil, nil, nil, nil
		p.rec = *rec
		return p.cleanUp(ctx)
	case rec.BootID != p.m.opts.BootID:
		p.log.Info("the pod is from before the node's last boot; it is removed")
		// No process, tap or mount of it can live, and a pid or name in its journal may be
		// somebody else's by now.
		rec.State, rec.Network, rec.Machine, rec.Virtiofsd, rec.Containers = Created, nil, nil, nil, nil
		p.rec = *rec
		return p.cleanUp(ctx)
	}
	p.rec = *rec
	switch rec.State {
	case Ready:
		if err := p.adopt(ctx); err != nil {
			return p.keepRecord(ctx, err)
		}
		return adopted
	case Stopping, Stopped:
		return p.keepRecord(ctx, nil)
	default:
		p.log.Info("the pod was not completely started; it is removed", "stage", rec.Stage)
		return p.cleanUp(ctx)
	}
}

// reclaim fills the undo list with what the journal and the kernel know of the pod, without trusting
// that any of it is there. It makes nothing.
func (p *Pod) reclaim(ctx context.Context) error {
	rt := p.m.opts.Runtime
	var errs []error
	add := func(s undoStep) { errs = append(errs, p.undo.add(ctx, s)) }

	add(p.directoryUndo())
	// The leaf holds every process of the pod, whether or not the journal knows it.
	if g, err := rt.LoadCgroup(p.rec.CgroupParent, p.id); err != nil {
		// Without the leaf nobody knows what still runs: the directory must stay.
		add(undoStep{name: StageCgroup, fn: func(context.Context) error {
			g, err := rt.LoadCgroup(p.rec.CgroupParent, p.id)
			if err != nil {
				return err
			}
			return p.deleteCgroup(ctx, g)
		}})
	} else {
		p.cgroup = g
		add(undoStep{name: StageCgroup, fn: func(ctx context.Context) error { return p.deleteCgroup(ctx, g) }})
	}
	if saved := p.rec.Network; saved != nil {
		if n, err := rt.RestoreNetwork(saved); err != nil {
			p.log.Warn("the pod's network cannot be found again; it goes with its namespace", "error", err)
		} else {
			add(undoStep{name: StageNetwork, fn: func(context.Context) error { return n.Close() }})
		}
	}
	add(undoStep{name: StageShare, fn: func(context.Context) error { return rt.RemoveShare(p.dir) }})
	if saved := p.rec.Virtiofsd; saved != nil && rt.RestoreVirtiofsd != nil {
		if d, err := rt.RestoreVirtiofsd(saved); err != nil {
			p.log.Warn("the pod's file system daemon cannot be found again; it goes with its cgroup", "error", err)
		} else {
			p.virtiofsd = d
			add(undoStep{name: "virtiofsd", fn: func(context.Context) error { return d.Stop() }})
		}
	}
	errs = append(errs, p.addContainersUndo(ctx))
	if state := p.rec.Machine; state != nil {
		machine, err := rt.Driver.Restore(ctx, state.Saved)
		switch {
		case errors.Is(err, vm.ErrGone):
		case err != nil:
			p.log.Warn("the pod's machine cannot be taken over; it goes with its cgroup", "error", err)
		default:
			p.machine, p.pid = machine, state.PID
			errs = append(errs, p.addMachineUndo(ctx, machine))
		}
	}
	return errors.Join(errs...)
}

func (p *Pod) deleteCgroup(ctx context.Context, g Cgroup) error {
	ctx, cancel := context.WithTimeout(ctx, teardownLimit)
	defer cancel()
	return g.Delete(ctx)
}

// cleanUp removes whatever is left of a pod that no client knows.
func (p *Pod) cleanUp(ctx context.Context) string {
	err := p.reclaim(ctx)
	p.abandoned = true
	if err == nil {
		err = p.discard(ctx)
	}
	if err != nil {
		p.log.Error("the pod cannot be removed; it is tried again", "error", err)
		p.m.insert(p)
		return kept
	}
	return cleaned
}

// adopt takes over a running pod, or says why that cannot be.
func (p *Pod) adopt(ctx context.Context) error {
	if err := p.reclaim(ctx); err != nil {
		return err
	}
	if p.machine == nil {
		return errors.New("the virtual machine ended while no daemon was there")
	}
	if p.rec.Virtiofsd != nil {
		if p.virtiofsd == nil {
			return errors.New("the file system daemon of the pod's share is gone")
		}
		select {
		case <-p.virtiofsd.Exited():
			return errors.New("the file system daemon of the pod's share ended while no daemon was there")
		default:
		}
	}
	share, err := p.m.opts.Runtime.OpenShare(p.dir)
	if err != nil {
		return err
	}
	p.share = share
	ctx, cancel := context.WithTimeoutCause(ctx, adoptLimit, fmt.Errorf("the agent did not answer the new daemon within %v", adoptLimit))
	defer cancel()
	link, err := p.m.opts.Runtime.OpenLink(ctx, p.machine.Endpoint(), p.log)
	if err != nil {
		return fmt.Errorf("cannot reach the agent again: %w", err)
	}
	p.link = link
	if err := p.undo.add(ctx, undoStep{name: "link", fn: func(context.Context) error { return link.Close() }}); err != nil {
		return err
	}
	hello, err := link.Hello(ctx)
	if err != nil {
		return fmt.Errorf("the agent does not call again: %w", err)
	}
	if err := hello.Check(); err != nil {
		return err
	}
	guest, err := connectGuest(ctx, link, hello, p.guestLost)
	if err != nil {
		return err
	}
	p.guest = guest
	if err := p.undo.add(ctx, undoStep{name: StageSetup, fn: func(context.Context) error { return guest.close() }}); err != nil {
		return err
	}
	if err := p.openTasks(ctx, p.shared()); err != nil {
		return err
	}
	p.m.insert(p)
	p.log.Info("pod adopted", "hypervisor", p.pid)
	go p.watch()
	return nil
}

// keepRecord finishes the end of a pod whose client still has to learn of it. Cause is why it ended,
// nil if it was asked to.
func (p *Pod) keepRecord(ctx context.Context, cause error) string {
	if cause != nil {
		p.log.Error("the pod is not adopted; it is stopped", "reason", cause)
	}
	var err error
	if len(p.undo.steps) == 0 {
		err = p.reclaim(ctx)
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
		err = errors.Join(err, p.openTasks(ctx, p.shared()))
	}
	p.mu.Lock()
	p.rec.State = Stopping
	p.mu.Unlock()
	err = errors.Join(err, p.end(cause, 0).wait(ctx))
	p.m.insert(p)
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
