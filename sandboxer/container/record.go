package container

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	guestio "kuasar.io/kuasar/guest/protocol/stdio"
)

// Record is what a new daemon must know of a container to take it over.
type Record struct {
	ID        string          `json:"id"`
	Bundle    string          `json:"bundle,omitempty"`
	OOMKills  uint64          `json:"oomKills,omitempty"`
	Processes []ProcessRecord `json:"processes"` // the first one first
}

// ProcessRecord is what it must know of a process.
type ProcessRecord struct {
	ExecID   string    `json:"execID,omitempty"`
	PID      uint32    `json:"pid"`
	Status   Status    `json:"status"`
	Exit     Exit      `json:"exit,omitzero"`
	Born     time.Time `json:"born"`
	IO       IO        `json:"io"`
	Token    string    `json:"token"`
	Consumed []uint64  `json:"consumed,omitempty"` // bytes of each output, as far as known
}

// Records describes all containers that are not just being created, in the order of their ids.
func (s *Set) Records() []Record {
	s.mu.Lock()
	defer s.mu.Unlock()
	var records []Record
	for _, c := range s.containers {
		if !c.init.ready {
			continue
		}
		r := Record{ID: c.id, Bundle: c.bundle, OOMKills: c.stats.oomKills, Processes: []ProcessRecord{c.init.record()}}
		for _, e := range c.execs {
			if e.ready {
				r.Processes = append(r.Processes, e.record())
			}
		}
		slices.SortFunc(r.Processes, func(a, b ProcessRecord) int { return strings.Compare(a.ExecID, b.ExecID) })
		records = append(records, r)
	}
	slices.SortFunc(records, func(a, b Record) int { return strings.Compare(a.ID, b.ID) })
	return records
}

// record is called with Set.mu held.
func (p *process) record() ProcessRecord {
	r := ProcessRecord{ExecID: p.execID, PID: p.pid, Status: p.status, Exit: p.exit, Born: p.born, IO: p.io.client, Token: p.io.token}
	for _, o := range p.io.outputs {
		consumed := o.offset
		if o.reader != nil {
			consumed = o.reader.Offset()
		}
		r.Consumed = append(r.Consumed, consumed)
	}
	return r
}

// journal reports the records, in order.
func (s *Set) journal() {
	if s.opts.Journal == nil {
		return
	}
	s.journaling.Lock()
	defer s.journaling.Unlock()
	s.opts.Journal(s.Records())
}

// Restore takes over what an earlier daemon has recorded. It asks the guest for the state of each
// process, resumes the streams, and waits for the exits again. A stream that cannot be resumed
// costs its output, not the container. Records that are not valid are an error; nothing is
// restored then. It is called once, on an empty Set.
func (s *Set) Restore(ctx context.Context, records []Record) error {
	var all []*process
	containers := map[string]*container{}
	for _, r := range records {
		if err := CheckID("id", r.ID); err != nil {
			return err
		}
		if containers[r.ID] != nil {
			return fmt.Errorf("container %s is recorded twice: %w", r.ID, errdefs.ErrInvalidArgument)
		}
		c := &container{id: r.ID, bundle: r.Bundle, execs: map[string]*process{}, creating: make(chan struct{}), cancelCreate: func() {}}
		close(c.creating)
		c.stats.oomKills = r.OOMKills
		for i, pr := range r.Processes {
			p, err := s.restored(c, pr)
			if err != nil {
				return fmt.Errorf("container %s: %w", r.ID, err)
			}
			switch {
			case (i == 0) != (pr.ExecID == ""):
				return fmt.Errorf("container %s: its first process must be the first record: %w", r.ID, errdefs.ErrInvalidArgument)
			case i == 0:
				c.init = p
			case c.execs[pr.ExecID] != nil:
				return fmt.Errorf("process %s of container %s is recorded twice: %w", pr.ExecID, r.ID, errdefs.ErrInvalidArgument)
			default:
				c.execs[pr.ExecID] = p
			}
			all = append(all, p)
		}
		if c.init == nil {
			return fmt.Errorf("container %s is recorded without a process: %w", r.ID, errdefs.ErrInvalidArgument)
		}
		containers[r.ID] = c
	}
	s.mu.Lock()
	for _, p := range all {
		s.lastPID = max(s.lastPID, p.pid)
	}
	for id, c := range containers {
		s.containers[id] = c
	}
	s.mu.Unlock()

	var wg sync.WaitGroup
	for _, p := range all {
		wg.Go(func() { s.reattach(ctx, p) })
	}
	wg.Wait()
	s.journal()
	return nil
}

// restored makes a process from its record.
func (s *Set) restored(c *container, r ProcessRecord) (*process, error) {
	if r.ExecID != "" {
		if err := CheckID("exec_id", r.ExecID); err != nil {
			return nil, err
		}
	}
	if r.Status < Created || r.Status > Stopped {
		return nil, fmt.Errorf("%v is recorded: %w", r.Status, errdefs.ErrInvalidArgument)
	}
	streams, err := newStdio(r.IO, &s.streams, s.log.With("container", c.id))
	if err != nil {
		return nil, err
	}
	streams.token = r.Token
	for i, o := range streams.outputs {
		if i < len(r.Consumed) {
			o.offset = r.Consumed[i]
		}
	}
	p := &process{
		container: c, execID: r.ExecID, pid: r.PID, born: r.Born, io: streams,
		status: r.Status, exit: r.Exit, ready: true, exited: make(chan struct{}),
	}
	p.watching, p.unwatch = context.WithCancel(s.life)
	if r.Status == Stopped {
		p.finishing.Do(func() {})
		p.unwatch()
		close(p.exited)
	}
	return p, nil
}

// reattach connects a restored process with its client and the guest.
func (s *Set) reattach(ctx context.Context, p *process) {
	s.mu.Lock()
	ended := p.status == Stopped
	s.mu.Unlock()
	if err := p.io.reopen(p.execID == ""); err != nil {
		s.log.Warn("a stream of a client is lost", "process", p.String(), "error", err)
	}
	if ended {
		p.io.cut(0)
		return
	}
	ctx, cancel := s.operation(ctx, controlLimit)
	defer cancel()
	p.io.resume(ctx, s.dial)
	p.io.pump(s.streamViolation)
	answer, err := s.opts.Guest.Task().State(ctx, &task.StateRequest{ID: p.container.id, ExecID: p.execID})
	switch {
	case err == nil && (answer.GetID() != p.container.id || answer.GetExecID() != p.execID):
		s.misbehaved(fmt.Errorf("asked for the state of %v, it told that of another one", p))
		return
	case err == nil:
		s.mu.Lock()
		switch answer.GetStatus() {
		case tasktypes.Status_RUNNING:
			p.status = Running
		case tasktypes.Status_PAUSED, tasktypes.Status_PAUSING:
			p.status = Paused
		}
		s.mu.Unlock()
	case status.Code(err) == codes.NotFound:
		// Wait, below, comes to the same and ends it.
	default:
		s.log.Warn("the recorded state is kept", "process", p.String(), "error", s.guestError(ctx, "get the state", err))
	}
	go s.watch(p)
}

// reopen opens the client's ends again, as far as they are there.
func (t *stdio) reopen(holdInput bool) error {
	var errs []error
	for _, o := range t.outputs {
		one := &stdio{client: t.client, streams: t.streams, log: t.log, outputs: []*output{o}}
		if err := one.open(holdInput); err != nil {
			o.sink = discard{}
			errs = append(errs, err)
		}
	}
	if t.input != nil {
		one := &stdio{client: t.client, streams: t.streams, log: t.log, input: t.input}
		if err := one.open(holdInput); err != nil {
			t.input = nil
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// resume opens the streams in the guest again, as far as the guest still has them.
func (t *stdio) resume(ctx context.Context, dial guestio.Dialer) {
	for _, o := range t.outputs {
		one := &stdio{token: t.token, log: t.log, outputs: []*output{o}}
		if err := one.connect(ctx, dial); err != nil {
			t.log.Warn("output cannot be resumed", "stream", o.kind.String(), "error", err)
		}
	}
	if t.input != nil {
		one := &stdio{token: t.token, log: t.log, input: t.input}
		if err := one.connect(ctx, dial); err != nil {
			t.log.Warn("input cannot be resumed", "error", err)
		}
	}
}

// discard is the sink of a client that is gone.
type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }
func (discard) abandon()                    {}
func (discard) detach()                     {}
func (discard) finish()                     {}
func (discard) close()                      {}
