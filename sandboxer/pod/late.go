package pod

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"kuasar.io/kuasar/guest/protocol"
)

const (
	// networkLimit bounds one reading of the pod's network namespace and telling the guest.
	networkLimit = 5 * time.Second
	// CNI changes a namespace in bursts: it is read when nothing changed for networkQuiet, and after
	// networkBurst at the latest. Neither says that CNI is complete: only a container does.
	networkQuiet = 50 * time.Millisecond
	networkBurst = 500 * time.Millisecond
)

// lateNetwork gives a running pod the network that CNI makes after its start, as it does for iSulad
// from 2.1.6 on: it follows the pod's network namespace until the first container is announced. CNI is
// complete by then, so that one last look finds all there will be. A namespace that is empty even then
// goes on being followed; until something comes the containers have the loopback interface alone.
//
// Before the first container an interface is taken over only when it has an address: what has none may be
// an interface over which CNI is just asking for one. From then on any is, since CNI asks no more.
//
// The guest's own /etc/hosts is that of the pod's start, and names no address that came later: iSulad
// brings its containers a file of its own.
type lateNetwork struct {
	pod *Pod
	// watching ends with stop, and done is closed when the namespace is not watched any more.
	watching context.Context
	stop     context.CancelFunc
	done     chan struct{}

	// turn holds an element while somebody uses what follows.
	turn    chan struct{}
	network Network
	saved   []byte            // what the journal has of the network
	told    *protocol.Network // what the guest was told last; nil: nothing
	over    bool
	warned  bool
	// complete says that a container was announced since the following began: CNI had its time.
	complete bool
}

// followNetwork begins to follow the namespace of a pod whose machine has no interface of CNI yet. n is
// not used by anybody else until the pod's end, or until handOver.
func (p *Pod) followNetwork(ctx context.Context, n Network) error {
	watching, stop := context.WithCancel(context.Background())
	l := &lateNetwork{
		pod: p, watching: watching, stop: stop, done: make(chan struct{}), turn: make(chan struct{}, 1), network: n,
	}
	p.mu.Lock()
	p.late, l.saved = l, p.rec.Network
	p.mu.Unlock()
	go l.follow(watching)
	// Before the network in the order of undoing: nothing is joined to it from then on.
	return p.undo.add(ctx, undoStep{name: "late network", fn: func(context.Context) error {
		l.end()
		return nil
	}})
}

// settleNetwork returns when the guest has all that CNI made for the pod.
func (p *Pod) settleNetwork(ctx context.Context) error {
	p.mu.Lock()
	l := p.late
	p.mu.Unlock()
	if l == nil {
		return nil
	}
	return l.settle(ctx)
}

func (l *lateNetwork) follow(ctx context.Context) {
	defer close(l.done)
	l.turn <- struct{}{}
	changed, err := l.network.Watch(ctx)
	<-l.turn
	if err != nil {
		l.pod.log.Warn("the pod's network is not followed; it is read when the first container comes", "error", err)
		return
	}
	said := ""
	for {
		// The first time for what came before the watch began.
		if err := l.read(ctx); err != nil && ctx.Err() == nil && err.Error() != said {
			said = err.Error()
			l.pod.log.Warn("the pod's network cannot be taken over; it is tried again when it changes", "error", err)
		}
		if !awaitChange(ctx, changed) {
			return
		}
	}
}

// awaitChange waits for a change and for the burst that it belongs to; false says that there will be
// none any more.
func awaitChange(ctx context.Context, changed <-chan struct{}) bool {
	select {
	case _, ok := <-changed:
		if !ok {
			return false
		}
	case <-ctx.Done():
		return false
	}
	burst := time.NewTimer(networkBurst)
	defer burst.Stop()
	quiet := time.NewTimer(networkQuiet)
	defer quiet.Stop()
	for {
		select {
		case _, ok := <-changed:
			if !ok {
				return false
			}
			quiet.Reset(networkQuiet)
		case <-quiet.C:
			return true
		case <-burst.C:
			return true
		case <-ctx.Done():
			return false
		}
	}
}

// settle reads the namespace for the last time, if it has an interface by now.
func (l *lateNetwork) settle(ctx context.Context) error {
	if err := l.take(ctx); err != nil {
		return err
	}
	defer func() { <-l.turn }()
	if l.over {
		return nil
	}
	l.complete = true
	if err := l.readLocked(ctx); err != nil {
		return err
	}
	if l.told == nil {
		if !l.warned {
			l.warned = true
			l.pod.log.Warn("the pod's network namespace is empty when its first container comes: until CNI makes an interface, "+
				"containers have the loopback interface alone", "netns", l.pod.rec.NetNS)
		}
		return nil
	}
	if err := l.pod.note(func(r *record) { r.LateNetwork = false }); err != nil {
		l.pod.log.Warn("the pod's journal is out of date", "error", err)
	}
	l.over = true
	l.stop()
	return nil
}

// take waits for its turn.
func (l *lateNetwork) take(ctx context.Context) error {
	select {
	case l.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("gave up waiting for the pod's network: %w", context.Cause(ctx))
	}
}

func (l *lateNetwork) read(ctx context.Context) error {
	if err := l.take(ctx); err != nil {
		return err
	}
	defer func() { <-l.turn }()
	if l.over {
		return nil
	}
	return l.readLocked(ctx)
}

// readLocked joins what CNI has made by now and tells the guest what is new. It is the caller's turn.
func (l *lateNetwork) readLocked(ctx context.Context) error {
	p := l.pod
	if p.m.closing.Load() {
		return errStopping
	}
	ctx, cancel := context.WithTimeoutCause(ctx, networkLimit, fmt.Errorf("not done within %v", networkLimit))
	defer cancel()
	// The pod's end does not wait for a guest that does not answer.
	defer context.AfterFunc(l.watching, cancel)()
	network, err := l.network.Adopt(ctx, l.complete)
	saved, serr := l.network.Saved()
	if serr == nil && !bytes.Equal(saved, l.saved) {
		if serr = p.note(func(r *record) { r.Network = saved }); serr == nil {
			l.saved = saved
		}
	}
	if err := errors.Join(err, serr); err != nil {
		return err
	}
	if network == nil || proto.Equal(network, l.told) {
		return nil
	}
	p.mu.Lock()
	guest := p.guest
	p.mu.Unlock()
	if guest == nil {
		return errors.New("the pod's agent is gone")
	}
	if _, err := guest.sandbox.UpdateNetwork(ctx, &protocol.UpdateNetworkRequest{Network: network}); err != nil {
		return fmt.Errorf("the agent cannot take the pod's network over: %w", err)
	}
	p.log.Info("the pod has a network that was made after its start", "interfaces", len(network.GetInterfaces()),
		"addresses", addresses(network), "routes", len(network.GetRoutes()))
	l.told = proto.CloneOf(network)
	return nil
}

func addresses(n *protocol.Network) []string {
	var all []string
	for _, i := range n.GetInterfaces() {
		all = append(all, i.GetAddresses()...)
	}
	return all
}

// end returns when nothing is read any more. It changes nothing in the journal.
func (l *lateNetwork) end() {
	l.stop()
	<-l.done
	l.turn <- struct{}{}
	l.over = true
	<-l.turn
}
