package controller

import (
	"context"
	"sync"
)

// locks is a lock for each of any number of names; one that nobody holds or waits for takes no memory.
// The zero value is ready.
type locks struct {
	mu    sync.Mutex
	names map[string]*lock
}

type lock struct {
	held  chan struct{} // holds one element while somebody has the lock
	users int           // who holds it or waits for it
}

// lock waits for the lock of a name, or fails with why ctx ended.
func (l *locks) lock(ctx context.Context, name string) (unlock func(), err error) {
	l.mu.Lock()
	one := l.names[name]
	if one == nil {
		one = &lock{held: make(chan struct{}, 1)}
		if l.names == nil {
			l.names = map[string]*lock{}
		}
		l.names[name] = one
	}
	one.users++
	l.mu.Unlock()
	leave := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if one.users--; one.users == 0 {
			delete(l.names, name)
		}
	}
	select {
	case one.held <- struct{}{}:
		return func() { <-one.held; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, context.Cause(ctx)
	}
}
