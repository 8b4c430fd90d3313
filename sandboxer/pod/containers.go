package pod

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"kuasar.io/kuasar/sandboxer/container"
)

// What clients announce is kept by the pod's Containers; the manager finds those, and sees to it that
// the pod has its network before the first container.

// Announced returns the ids of the containers that are announced, and for each those of its processes;
// the caller may change the result. It fails with NotFound, and with FailedPrecondition for a pod that
// is starting or that this daemon cannot manage; a pod that has ended may have announcements left.
func (m *Manager) Announced(id string) (map[string][]string, error) {
	p := m.find(id)
	if p == nil {
		return nil, notFound(id)
	}
	p.mu.Lock()
	containers, over := p.containers, p.overLocked()
	err := p.unmanagedLocked()
	p.mu.Unlock()
	switch {
	case containers != nil && (err == nil || over):
		if announced := containers.Announced(); announced != nil {
			return announced, nil
		}
		return map[string][]string{}, nil
	case over:
		return map[string][]string{}, nil
	}
	return nil, fmt.Errorf("cannot tell what is announced of pod %s: %w", p.id, err)
}

// AnnounceContainer tells of a container that a client will make in the pod. It fails with NotFound, and
// with FailedPrecondition unless the pod is ready and its client is of those that announce.
func (m *Manager) AnnounceContainer(ctx context.Context, id string, c container.CreateRequest) error {
	p := m.find(id)
	if p == nil {
		return notFound(id)
	}
	containers, err := p.announcing()
	if err == nil {
		// The container's first instruction may need it.
		err = p.settleNetwork(ctx)
	}
	if err != nil {
		return fmt.Errorf("cannot announce container %s in pod %s: %w", c.ID, p.id, err)
	}
	return containers.AnnounceContainer(ctx, c)
}

// AnnounceProcess does the same for a process in an announced container.
func (m *Manager) AnnounceProcess(ctx context.Context, id string, r container.ExecRequest) error {
	p := m.find(id)
	if p == nil {
		return notFound(id)
	}
	containers, err := p.announcing()
	if err != nil {
		return fmt.Errorf("cannot announce process %s of container %s in pod %s: %w", r.ExecID, r.ID, p.id, err)
	}
	return containers.AnnounceProcess(ctx, r)
}

// Withdraw takes back the announcement of a container with its processes, or of one process if exec is
// not empty. It succeeds for pods that have ended, and takes 10 s at most: what it leaves is the pod's,
// and goes with that. It fails with NotFound for unknown pods.
func (m *Manager) Withdraw(ctx context.Context, id, containerID, exec string) error {
	p := m.find(id)
	if p == nil {
		return notFound(id)
	}
	p.mu.Lock()
	containers, over := p.containers, p.overLocked()
	err := p.unmanagedLocked()
	p.mu.Unlock()
	if containers == nil && over {
		return nil
	}
	if containers == nil || err != nil && !over {
		return fmt.Errorf("cannot withdraw container %s of pod %s: %w", containerID, p.id, err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, m.withdrawLimit, fmt.Errorf("not done within %v", m.withdrawLimit))
	defer cancel()
	err = containers.Withdraw(ctx, containerID, exec)
	if err == nil || errdefs.IsNotFound(err) {
		return err
	}
	p.mu.Lock()
	over = p.overLocked()
	p.mu.Unlock()
	if over {
		p.log.Debug("a withdrawal failed in a pod that has ended", "container", containerID, "exec", exec, "error", err)
		return nil
	}
	return err
}

// announcing returns the containers of a pod in which a client may announce some.
func (p *Pod) announcing() (Containers, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.unmanagedLocked(); err != nil {
		return nil, err
	}
	if !p.rec.Client.Announces() {
		return nil, fmt.Errorf("the pod was created by a client (%s) that does not announce containers: %w",
			p.rec.Client, errdefs.ErrFailedPrecondition)
	}
	return p.containers, nil
}

// overLocked says that the pod has ended, or is about to.
func (p *Pod) overLocked() bool { return p.rec.State == Stopping || p.rec.State == Stopped }

// unmanagedLocked is why nothing can be made in the pod now. If it is nil, the pod has containers.
func (p *Pod) unmanagedLocked() error {
	switch {
	case p.held != nil:
		return fmt.Errorf("this daemon cannot manage the pod, which runs: %w: %w", p.held, errdefs.ErrFailedPrecondition)
	case p.recovering:
		return fmt.Errorf("the daemon was restarted and is still looking for the pod's agent; try again: %w", errdefs.ErrUnavailable)
	case p.rec.State != Ready || p.containers == nil:
		return fmt.Errorf("the pod is %s, not %s: %w", p.rec.State, Ready, errdefs.ErrFailedPrecondition)
	}
	return nil
}
