package pod

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// tier says how long a resource outlives the virtual machine.
type tier int

const (
	// machineTier goes when the pod stops.
	machineTier tier = iota
	// recordTier goes with Shutdown: what a client still reads from a stopped pod.
	recordTier
)

type undoStep struct {
	name string
	tier tier
	// last steps run only when nothing else is left to undo.
	last bool
	fn   func(context.Context) error
}

// undoList is what has to be undone for one pod. A step is added the moment its resource exists.
// Steps run in reverse; one that fails stays in the list and is tried again by the next run.
type undoList struct {
	running sync.Mutex // one run at a time

	mu    sync.Mutex
	steps []undoStep
	ended map[tier]bool // tiers that were run: what is added to them now is undone at once
}

// add appends a step, or runs it at once if its tier has been undone already.
func (u *undoList) add(ctx context.Context, s undoStep) error {
	u.mu.Lock()
	if u.ended[s.tier] {
		u.mu.Unlock()
		if err := s.fn(context.WithoutCancel(ctx)); err != nil {
			u.mu.Lock()
			u.steps = append(u.steps, s)
			u.mu.Unlock()
			return fmt.Errorf("cannot undo %s: %w", s.name, err)
		}
		return nil
	}
	u.steps = append(u.steps, s)
	u.mu.Unlock()
	return nil
}

// run undoes the steps up to and including the given tier in reverse order. The cancellation of ctx
// does not stop it; its values and nothing else are used.
func (u *undoList) run(ctx context.Context, upTo tier) error {
	u.running.Lock()
	defer u.running.Unlock()
	ctx = context.WithoutCancel(ctx)

	u.mu.Lock()
	if u.ended == nil {
		u.ended = make(map[tier]bool)
	}
	for t := machineTier; t <= upTo; t++ {
		u.ended[t] = true
	}
	steps := u.steps
	u.steps = nil
	u.mu.Unlock()

	var errs []error
	var left []undoStep // in reverse
	for i := len(steps) - 1; i >= 0; i-- {
		s := steps[i]
		if s.tier > upTo || s.last && len(left) > 0 {
			left = append(left, s)
			continue
		}
		if err := s.fn(ctx); err != nil {
			errs = append(errs, fmt.Errorf("cannot undo %s: %w", s.name, err))
			left = append(left, s)
		}
	}

	u.mu.Lock()
	keep := make([]undoStep, 0, len(left)+len(u.steps))
	for i := len(left) - 1; i >= 0; i-- {
		keep = append(keep, left[i])
	}
	u.steps = append(keep, u.steps...)
	u.mu.Unlock()
	return errors.Join(errs...)
}
