package containers

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"

	"kuasar.io/kuasar/guest/protocol"
)

// limits bound what waits for somebody outside of the guest on account of direct containers.
type limits struct {
	// report is how long after its exit a process is reported as ended at the latest, while a daemon
	// that is away has not taken its output. The output is still delivered.
	report time.Duration
	// deliver is how long after a container was deleted its output is kept for such a daemon.
	deliver time.Duration
	// connect is how long the peer of a stream is awaited, from the announcement on. iSulad tries
	// each of three streams for ten seconds, one after the other. A process without its peer then
	// reads EOF, and what it writes is discarded.
	connect time.Duration
	// drain is how long after the exit of a process its peers may take to read its output.
	drain time.Duration
	// lateWait is how long an exec can be asked for after it has ended and was purged.
	lateWait time.Duration
}

var defaultLimits = limits{
	report:   5 * time.Second,
	deliver:  10 * time.Minute,
	connect:  35 * time.Second,
	drain:    10 * time.Minute,
	lateWait: time.Minute,
}

// announcement is what is known of a process before its client makes it.
type announcement struct {
	name    string     // the daemon's, of a container's
	names   stdioNames // without terminal, which the client's request tells
	streams streams
	peers   *peers // nil if the guest listens for none of the streams
	// expected are to be called when the process is being made or never will be.
	expected []func()
}

// announce opens what the guest has to open for a process.
func (s *Service) announce(d *protocol.Direct) (*announcement, error) {
	s.announcing.Lock()
	defer s.announcing.Unlock()
	return s.announceLocked(d)
}

// announceLocked is announce with s.announcing held.
func (s *Service) announceLocked(d *protocol.Direct) (*announcement, error) {
	names := stdioNames{stdin: d.GetStdin(), stdout: d.GetStdout(), stderr: d.GetStderr()}
	peers, err := s.openPeers(names)
	if err != nil {
		return nil, err
	}
	a := &announcement{name: d.GetAnnouncement(), names: names, streams: announcedStreams{s.streams, peers}, peers: peers}
	for _, name := range names.all() {
		if name == "" {
			continue
		}
		if err := a.streams.check(name); err != nil {
			peers.abort()
			return nil, err
		}
	}
	// A client may take any time between the announcement and the process.
	for _, name := range names.all() {
		if name != "" {
			a.expected = append(a.expected, a.streams.expect(name))
		}
	}
	return a, nil
}

// settle is called when the announcement is not waited upon any more.
func (a *announcement) settle() {
	for _, done := range a.expected {
		done()
	}
}

// deleted tells that the container of this announcement was deleted.
func (a *announcement) deleted(id string) *protocol.Deleted {
	return &protocol.Deleted{ContainerId: id, Announcement: a.name}
}

// end ends the streams of a process that will not be made.
func (a *announcement) end() {
	endStreams(a.streams, a.names)
	a.replaced()
}

// replaced ends the streams for which the guest listens. The daemon's may be named again in the
// announcement that comes instead.
func (a *announcement) replaced() {
	a.settle()
	if a.peers != nil {
		go a.peers.finish(func() {})
	}
}

// unmade lists the announcements of processes that were not made. Service.mu is held.
func (p *preparation) unmade() []*announcement {
	all := slices.Collect(maps.Values(p.execs))
	if p.main != nil && !p.made {
		all = append(all, p.main)
	}
	return all
}

// serveDirectly makes the container that of a client, with streams as announced. It is called before
// anyone else can see the container.
func (c *container) serveDirectly(a *announcement) {
	c.direct = true
	terminal := c.init.stdio.terminal
	c.init.stdio, c.init.streams, c.init.peers = a.names, a.streams, a.peers
	c.init.stdio.terminal = terminal
	a.settle()
}

// PrepareProcess announces an exec of a direct container; from here on the guest listens for its
// streams that are named so. Before the exec is made, a second call with other streams replaces the
// first, and one with the same changes nothing. Afterwards it fails with ErrAlreadyExists until the
// exec has ended and was purged.
func (s *Service) PrepareProcess(_ context.Context, r *protocol.PrepareProcessRequest) error {
	id, execID := r.GetContainerId(), r.GetExecId()
	fail := func(err error) error {
		return fmt.Errorf("cannot prepare exec %.160s of container %.160s: %w", execID, id, err)
	}
	if err := checkID("exec", execID); err != nil {
		return fail(err)
	}
	s.announcing.Lock()
	defer s.announcing.Unlock()

	s.mu.Lock()
	p, c := s.prepared[id], s.containers[id]
	var old *announcement
	direct := false
	if p != nil {
		old, direct = p.execs[execID], p.main != nil
	}
	s.mu.Unlock()
	switch {
	case p == nil:
		return fail(fmt.Errorf("the container was not announced: %w", errdefs.ErrNotFound))
	case !direct:
		return fail(fmt.Errorf("the container is not a direct one: %w", errdefs.ErrFailedPrecondition))
	case c != nil && !c.dropPurged(execID):
		return fail(fmt.Errorf("it was made: %w", errdefs.ErrAlreadyExists))
	}
	d := r.GetDirect()
	if old != nil {
		if old.names == (stdioNames{stdin: d.GetStdin(), stdout: d.GetStdout(), stderr: d.GetStderr()}) {
			// A peer may have connected already.
			return nil
		}
		s.mu.Lock()
		taken := p.execs[execID] != old
		delete(p.execs, execID)
		s.mu.Unlock()
		if taken {
			return fail(fmt.Errorf("it is being made: %w", errdefs.ErrAlreadyExists))
		}
		old.replaced()
	}
	a, err := s.announceLocked(d)
	if err != nil {
		return fail(err)
	}
	s.mu.Lock()
	current := s.prepared[id] == p
	if current {
		if p.execs == nil {
			p.execs = map[string]*announcement{}
		}
		p.execs[execID] = a
	}
	s.mu.Unlock()
	if !current {
		a.end()
		return fail(fmt.Errorf("the container is being purged: %w", errdefs.ErrFailedPrecondition))
	}
	return nil
}

// PurgeProcess takes the announcement of an exec back. One that was never started is dropped. One
// that runs goes on, and its output is delivered; it is forgotten some time after its end. Unknown
// ids succeed.
func (s *Service) PurgeProcess(_ context.Context, r *protocol.PurgeProcessRequest) error {
	id, execID := r.GetContainerId(), r.GetExecId()
	s.announcing.Lock()
	defer s.announcing.Unlock()
	s.mu.Lock()
	c := s.containers[id]
	var a *announcement
	if p := s.prepared[id]; p != nil {
		a = p.execs[execID]
		delete(p.execs, execID)
	}
	s.mu.Unlock()
	if a != nil {
		a.end()
	}
	if c != nil && c.direct && execID != "" {
		c.purgeExec(execID)
	}
	return nil
}

// takeExec returns what is announced of an exec that is about to be made. Nobody else gets it.
func (s *Service) takeExec(c *container, execID string) (*announcement, error) {
	s.mu.Lock()
	p := s.prepared[c.id]
	var a *announcement
	if p != nil {
		a = p.execs[execID]
		delete(p.execs, execID)
	}
	s.mu.Unlock()
	if a != nil {
		a.settle()
		return a, nil
	}
	if _, err := c.process(execID); err == nil {
		return nil, fmt.Errorf("exec %s exists: %w", execID, errdefs.ErrAlreadyExists)
	}
	return nil, fmt.Errorf("exec %s was not announced with PrepareProcess: %w", execID, errdefs.ErrFailedPrecondition)
}

// deleted notes that a container was deleted, or could not be created. A direct one is not created again as it was announced,
// and its announcement may stand for as long as the pod lives: what it needs is given back now.
func (s *Service) deleted(c *container) {
	if !c.direct {
		s.forget(c)
		return
	}
	s.mu.Lock()
	p := s.prepared[c.id]
	s.mu.Unlock()
	var err error
	if p != nil {
		if err = p.mounts.unmount(); err != nil {
			c.log.Error("cannot give the storage of a deleted container back before it is purged", "err", err)
		}
	}
	s.mu.Lock()
	current := s.containers[c.id] == c && s.prepared[c.id] == p && p != nil
	if s.containers[c.id] == c {
		delete(s.containers, c.id)
	}
	var freed *protocol.Deleted
	if current {
		p.spec = nil
		p.deleted, p.freed = c, err == nil
		if p.freed {
			freed = p.main.deleted(c.id)
		}
	}
	s.mu.Unlock()
	if freed != nil {
		s.onDelete(freed)
	}
}

// Deleted lists the direct containers that were deleted by their clients, use nothing of the host's
// any more, and were not purged since.
func (s *Service) Deleted() []*protocol.Deleted {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*protocol.Deleted
	for id, p := range s.prepared {
		if p.freed {
			all = append(all, p.main.deleted(id))
		}
	}
	return all
}

// giveUp ends the delivery of output of a container that is removed. Clients delete direct containers
// without regard to the daemon that takes the output, so that one gets more time.
func (c *container) giveUp() {
	if !c.direct || c.ctx.Err() != nil {
		c.cancel()
		return
	}
	c.mu.Lock()
	all := []*process{c.init}
	for _, p := range c.execs {
		all = append(all, p)
	}
	c.mu.Unlock()
	go func() {
		defer c.cancel()
		ctx, cancel := context.WithTimeout(c.ctx, c.service.limits.deliver)
		defer cancel()
		for _, p := range all {
			await(ctx, p.delivered)
		}
	}()
}

// purgeExec drops an exec that was never started, and has one that was forgotten after its end.
func (c *container) purgeExec(execID string) {
	p, err := c.process(execID)
	if err != nil {
		return
	}
	if p.claim() {
		endStreams(p.streams, p.stdio)
		p.fail()
		go c.execExited(p)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	ended := false
	for _, e := range c.exitedExecs {
		ended = ended || e == p
	}
	if ended && !p.purged {
		c.forgetSoon(p)
	}
	p.purged = true
}

// forgetSoon forgets an exec that has ended when nobody asks for it any more.
func (c *container) forgetSoon(p *process) {
	time.AfterFunc(c.service.limits.lateWait, func() { c.forgetExec(p) })
}

func (c *container) forgetExec(p *process) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, e := range c.exitedExecs {
		if e == p {
			c.exitedExecs = append(c.exitedExecs[:i:i], c.exitedExecs[i+1:]...)
			break
		}
	}
	if c.execs[p.execID] == p {
		delete(c.execs, p.execID)
	}
}

// dropPurged makes room for an exec of that id, and returns false if there is one.
func (c *container) dropPurged(execID string) bool {
	p, err := c.process(execID)
	if err != nil {
		return true
	}
	c.mu.Lock()
	purged := p.purged
	c.mu.Unlock()
	if !purged || p.statusNow() != task.Status_STOPPED {
		return false
	}
	c.forgetExec(p)
	return true
}
