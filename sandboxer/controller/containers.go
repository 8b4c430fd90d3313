package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"

	"kuasar.io/kuasar/sandboxer/container"
	"kuasar.io/kuasar/sandboxer/pod"
)

// Containers is what the controller needs of the Pods to serve iSulad, which announces containers, and
// processes in them, before it makes them by the task API. Pods may have it or not; if they have not,
// announcements are refused as not implemented.
//
// An announcement lasts until it is withdrawn or the pod is shut down, also over the daemon's end and
// whatever became of the container meanwhile: iSulad says nothing when a container ends by itself, and
// goes on listing it. To make a container again that was deleted takes another announcement. All methods fail with NotFound for unknown pods, and their errors say what could not
// be done to which container: a snapshot names several.
type Containers interface {
	// Announced returns the ids of the containers that are announced, and for each those of its
	// processes. The caller may change the result.
	Announced(pod string) (map[string][]string, error)
	// AnnounceContainer tells of a container that will be made: its Bundle is empty, its Spec may be nil
	// and its Rootfs empty, and the mounts of the Rootfs and the FIFOs of its IO are the node's. If the
	// container is announced already, and not made, this replaces what was said of it. If it fails,
	// nothing is announced.
	AnnounceContainer(ctx context.Context, pod string, c container.CreateRequest) error
	// AnnounceProcess does the same for a process in an announced container.
	AnnounceProcess(ctx context.Context, pod string, p container.ExecRequest) error
	// Withdraw takes back the announcement of a container with its processes, or of one process if exec
	// is not empty. A process that still runs goes on, and its output is drained; of a container nothing
	// is left. NotFound counts as success; it succeeds for pods that have ended.
	Withdraw(ctx context.Context, pod, id, exec string) error
}

var _ Containers = (*pod.Manager)(nil)

// errNoContainers is why announcements are refused.
var errNoContainers = fmt.Errorf("this daemon does not take announcements of containers (Prepare, Purge, Update with %s), "+
	"so that iSulad cannot run containers with it: use containerd 2.x, or a version of kuasar that takes them: %w",
	tasksField, errdefs.ErrNotImplemented)

// prepare announces a container, or the only process of t.
func (c *Controller) prepare(ctx context.Context, pod string, t *task) error {
	if c.containers == nil {
		return errNoContainers
	}
	if len(t.processes) > 0 {
		return c.containers.AnnounceProcess(ctx, pod, t.processes[0])
	}
	return c.containers.AnnounceContainer(ctx, pod, t.CreateRequest)
}

// withdraw succeeds for what is not known: the client asks again until it does.
func (c *Controller) withdraw(ctx context.Context, pod, id, exec string) error {
	if c.containers == nil {
		return errNoContainers
	}
	if err := c.containers.Withdraw(ctx, pod, id, exec); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// follow makes what is announced of a pod equal to a snapshot. It goes on after errors: a container
// that cannot be removed is no reason not to announce another. What failed is different again when the
// next snapshot comes.
func (c *Controller) follow(ctx context.Context, pod string, tasks []task) error {
	if c.containers == nil {
		return errNoContainers
	}
	unlock, err := c.snapshots.lock(ctx, pod)
	if err != nil {
		return fmt.Errorf("cannot follow the snapshot of pod %s: another one is being followed: %w", pod, err)
	}
	defer unlock()
	announced, err := c.containers.Announced(pod)
	if errdefs.IsNotFound(err) && len(tasks) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	d := differenceOf(announced, tasks)
	var errs []error
	for _, w := range d.withdraw {
		if err := c.withdraw(ctx, pod, w.id, w.exec); err != nil {
			errs = append(errs, err)
		}
	}
	failed := map[string]bool{}
	for _, t := range d.containers {
		if err := c.containers.AnnounceContainer(ctx, pod, t); err != nil {
			failed[t.ID] = true
			errs = append(errs, err)
		}
	}
	for _, p := range d.processes {
		if failed[p.ID] {
			continue
		}
		if err := c.containers.AnnounceProcess(ctx, pod, p); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// difference is what has to happen for a snapshot, in this order.
type difference struct {
	withdraw   []named
	containers []container.CreateRequest
	processes  []container.ExecRequest
}

// named is a container, or a process if exec is not empty.
type named struct{ id, exec string }

// differenceOf compares by ids alone: what a snapshot says of a container that is announced was said
// before.
func differenceOf(announced map[string][]string, tasks []task) difference {
	var d difference
	listed := make(map[string]bool, len(tasks))
	for _, t := range tasks {
		listed[t.ID] = true
		known, ok := announced[t.ID]
		if !ok {
			d.containers = append(d.containers, t.CreateRequest)
		}
		old := make(map[string]bool, len(known))
		for _, exec := range known {
			old[exec] = true
		}
		for _, p := range t.processes {
			if !old[p.ExecID] {
				d.processes = append(d.processes, p)
			}
			delete(old, p.ExecID)
		}
		for exec := range old {
			d.withdraw = append(d.withdraw, named{t.ID, exec})
		}
	}
	for id := range announced {
		if !listed[id] {
			d.withdraw = append(d.withdraw, named{id: id})
		}
	}
	slices.SortFunc(d.withdraw, func(a, b named) int {
		return slices.Compare([]string{a.id, a.exec}, []string{b.id, b.exec})
	})
	return d
}
