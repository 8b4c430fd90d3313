package container

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
)

// Announced returns the ids of the containers that are announced, and for each those of its processes.
// The caller may change the result.
func (s *Set) Announced() map[string][]string { return nil }

// AnnounceContainer tells of a container that a client will make by the task API: see
// controller.Containers, whose rules it keeps.
func (s *Set) AnnounceContainer(context.Context, CreateRequest) error {
	return fmt.Errorf("cannot announce a container: %w", errdefs.ErrNotImplemented)
}

// AnnounceProcess does the same for a process in an announced container.
func (s *Set) AnnounceProcess(context.Context, ExecRequest) error {
	return fmt.Errorf("cannot announce a process: %w", errdefs.ErrNotImplemented)
}

// Withdraw takes back the announcement of a container with its processes, or of one process if execID
// is not empty.
func (s *Set) Withdraw(ctx context.Context, id, execID string) error {
	return fmt.Errorf("cannot withdraw an announcement: %w", errdefs.ErrNotImplemented)
}

// Deleted says that a client has deleted a direct container in the guest: what only it used of the
// host's can go. The announcement stands.
func (s *Set) Deleted(id string) {}
