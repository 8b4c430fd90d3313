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
	// Announced is what the pod's client has announced, if it did. A daemon that knows no announcements
	// sees of a container that is not made one that was deleted.
	Announced *AnnouncementRecord `json:"announced,omitempty"`
}

// AnnouncementRecord is what a client has said of a container, or of processes in it, that it makes
// later.
type AnnouncementRecord struct {
	// Making says that the daemon was about to announce it to the guest, and had not answered.
	Making bool `json:"making,omitempty"`

	// What Create takes. Of a direct container the guest has it.
	Spec   []byte  `json:"spec,omitempty"`
	Rootfs []Mount `json:"rootfs,omitempty"`
	IO     IO      `json:"io,omitzero"`

	// Streams are those of a direct container; nil if they have ended.
	Streams *ProcessRecord `json:"streams,omitempty"`
	// Released says that a client has deleted the container.
	Released bool `json:"released,omitempty"`
	// Name tells a direct container's announcement from earlier ones, in what the guest says.
	Name string `json:"name,omitempty"`
	// Processes have streams only if they are in a direct container, and only until those end.
	Processes []ProcessRecord `json:"processes,omitempty"`
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
	// InputEnded says that the standard input ends after what the client has written.
	InputEnded bool `json:"inputEnded,omitempty"`
	// Log is where output goes that IO does not name.
	Log *LogFile `json:"log,omitempty"`
	// Withdrawn says that the client has no use for the process any more.
	Withdrawn bool `json:"withdrawn,omitempty"`
	// Deleted says that the process is no more, with its container if it was the first one: all that
	// is left is how it ended, for a client that has asked and got no answer.
	Deleted bool `json:"deleted,omitempty"`
}

// Deletions are remembered for as long as the answer to a client may be on its way.
const (
	maxDeletions = 64
	deletionAge  = 10 * time.Second
)

// deletion is what is left of a process.
type deletion struct {
	id, execID, bundle string
	pid                uint32
	exit               Exit
	at                 time.Time // monotonic
}

// remember keeps what is left of a process. s.mu is held.
func (s *Set) remember(p *process) {
	s.deletions = append(s.deletions, deletion{
		id: p.container.id, execID: p.execID, bundle: p.container.bundle, pid: p.pid, exit: p.exit, at: time.Now(),
	})
	s.prune()
}

// prune forgets old deletions. s.mu is held.
func (s *Set) prune() {
	drop := max(0, len(s.deletions)-maxDeletions)
	for drop < len(s.deletions) && time.Since(s.deletions[drop].at) > deletionAge {
		drop++
	}
	s.deletions = slices.Delete(s.deletions, 0, drop)
}

// deleted finds the last deletion of a process. s.mu is held.
func (s *Set) deleted(id, execID string) (deletion, bool) {
	for _, d := range slices.Backward(s.deletions) {
		if d.id == id && d.execID == execID {
			return d, true
		}
	}
	return deletion{}, false
}

func (d deletion) record() ProcessRecord {
	return ProcessRecord{ExecID: d.execID, PID: d.pid, Status: Stopped, Exit: d.exit, Deleted: true}
}

// Records describes all containers that are not just being created, in the order of their ids. The
// first process of one that was just deleted is Deleted.
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
	s.prune()
	for _, d := range s.deletions {
		i := slices.IndexFunc(records, func(r Record) bool { return r.ID == d.id })
		switch {
		case i < 0 && d.execID == "":
			records = append(records, Record{ID: d.id, Bundle: d.bundle, Processes: []ProcessRecord{d.record()}})
		case i >= 0 && d.execID != "" && !slices.ContainsFunc(records[i].Processes, func(p ProcessRecord) bool { return p.ExecID == d.execID }):
			records[i].Processes = append(records[i].Processes, d.record())
		}
	}
	for _, a := range s.announced {
		i := slices.IndexFunc(records, func(r Record) bool { return r.ID == a.id })
		if i < 0 {
			i = len(records)
			records = append(records, Record{ID: a.id, Processes: []ProcessRecord{{Status: Stopped, Deleted: true}}})
		}
		records[i].Announced = a.record()
	}
	slices.SortFunc(records, func(a, b Record) int { return strings.Compare(a.ID, b.ID) })
	return records
}

// record is called with Set.mu held.
func (p *process) record() ProcessRecord {
	r := p.io.record()
	r.ExecID, r.PID, r.Status, r.Exit, r.Born, r.Withdrawn = p.execID, p.pid, p.status, p.exit, p.born, p.withdrawn
	if p.ended != nil {
		r.Status, r.Exit = Stopped, *p.ended
	}
	return r
}

// record is what is to be known of streams.
func (t *stdio) record() ProcessRecord {
	r := ProcessRecord{IO: t.client, Token: t.token, InputEnded: t.inputEnded.Load(), Log: t.logTo}
	for _, o := range t.outputs {
		r.Consumed = append(r.Consumed, o.position())
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
// restored then. It is called once, on an empty Set, which clients' streams may be served to already.
func (s *Set) Restore(ctx context.Context, records []Record) error {
	var all []*process
	var deletions []deletion
	containers, seen := map[string]*container{}, map[string]bool{}
	announced := map[string]*announcement{}
	for _, r := range records {
		if err := CheckID("id", r.ID); err != nil {
			return err
		}
		if seen[r.ID] {
			return fmt.Errorf("container %s is recorded twice: %w", r.ID, errdefs.ErrInvalidArgument)
		}
		seen[r.ID] = true
		if r.Announced != nil {
			a, err := s.restoredAnnouncement(r.ID, *r.Announced)
			if err != nil {
				return fmt.Errorf("container %s: %w", r.ID, err)
			}
			announced[r.ID] = a
		}
		c := &container{id: r.ID, bundle: r.Bundle, execs: map[string]*process{}, creating: make(chan struct{}), cancelCreate: func() {}}
		close(c.creating)
		c.stats.oomKills = r.OOMKills
		for i, pr := range r.Processes {
			if pr.Deleted && pr.PID == 0 {
				continue // it is only announced
			}
			if pr.Deleted {
				deletions = append(deletions, deletion{id: r.ID, execID: pr.ExecID, bundle: r.Bundle, pid: pr.PID, exit: pr.Exit, at: time.Now()})
				s.lastPID = max(s.lastPID, pr.PID)
				continue
			}
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
		if c.init == nil && len(r.Processes) > 0 && r.Processes[0].Deleted {
			continue
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
	for id, a := range announced {
		s.announced[id] = a
	}
	s.deletions = deletions
	s.mu.Unlock()

	var wg sync.WaitGroup
	for _, a := range announced {
		wg.Go(func() { s.reattachAnnounced(ctx, a) })
	}
	for _, p := range all {
		wg.Go(func() { s.reattach(ctx, p) })
	}
	wg.Wait()
	if s.opts.Direct {
		s.dropOrphans()
	}
	s.streams.allRestored()
	s.journal()
	return nil
}

// dropOrphans forgets the streams of announcements that an earlier daemon had begun and not recorded: they
// end for their clients, whose calls have failed with that daemon. Other clients' calls are kept with
// their connections and done again, which takes up what there is.
func (s *Set) dropOrphans() {
	known := map[string]bool{}
	s.mu.Lock()
	for _, a := range s.announced {
		for _, t := range a.streams() {
			known[t.token] = true
		}
	}
	s.mu.Unlock()
	s.shelf.dropAllBut(known)
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
	streams, err := s.restoredStdio(c.id, r)
	if err != nil {
		return nil, err
	}
	p := &process{
		container: c, execID: r.ExecID, pid: r.PID, born: r.Born, io: streams,
		status: r.Status, exit: r.Exit, withdrawn: r.Withdrawn, ready: true, exited: make(chan struct{}),
	}
	p.watching, p.unwatch = context.WithCancel(s.life)
	if r.Status == Stopped {
		p.finishing.Do(func() {})
		p.unwatch()
		close(p.exited)
	}
	return p, nil
}

func (s *Set) restoredStdio(id string, r ProcessRecord) (*stdio, error) {
	streams, err := s.newStdio(r.IO, id, r.ExecID, s.log.With("container", id))
	if err != nil {
		return nil, err
	}
	streams.keepLog(r.Log)
	streams.token = r.Token
	streams.inputEnded.Store(r.InputEnded)
	for i, o := range streams.outputs {
		if i < len(r.Consumed) {
			o.offset = r.Consumed[i]
		}
	}
	return streams, nil
}

// reattach connects a restored process with its client and the guest.
func (s *Set) reattach(ctx context.Context, p *process) {
	s.mu.Lock()
	ended := p.status == Stopped
	s.mu.Unlock()
	if err := p.io.reopen(p.execID == "", ended); err != nil {
		s.log.Warn("a stream of a client is lost", "process", p.String(), "error", err)
	}
	if ended {
		// Usually there is nothing left to write.
		p.io.cut(goneGrace)
		if p.withdrawn {
			go s.dropExec(p)
		}
		return
	}
	ctx, cancel := s.operation(ctx, controlLimit)
	defer cancel()
	p.io.resume(ctx, s.dial)
	p.io.pumpOutput(s.streamViolation)
	p.io.pumpInput(s.streamViolation, s.journal)
	answer, err := s.opts.Guest.Task().State(ctx, &task.StateRequest{ID: p.container.id, ExecID: p.execID})
	switch {
	case err == nil && (answer.GetID() != p.container.id || answer.GetExecID() != p.execID):
		s.misbehaved(fmt.Errorf("asked for the state of %v, it told that of another one", p))
		return
	case err == nil:
		s.mu.Lock()
		// One that has ended meanwhile is Stopped when its output is delivered.
		p.started = answer.GetStatus() == tasktypes.Status_STOPPED
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

// reopen opens the client's ends again, as far as they are there. Of a process that has ended the
// input is of no use.
func (t *stdio) reopen(holdInput, ended bool) error {
	var errs []error
	for _, o := range t.outputs {
		if ended && o.logged && !t.logLeft() {
			o.sink = discard{o} // its last line was written
			continue
		}
		if err := t.openOutput(o); err != nil {
			o.sink = discard{o}
			errs = append(errs, err)
		}
	}
	if t.input == nil {
		return errors.Join(errs...)
	}
	if ended {
		t.shelf.niche(t.token, guestio.Stdin).clear()
		if _, id, _ := parseStream(t.input.name); id == "" {
			t.input = nil
			return errors.Join(errs...)
		}
	}
	if err := t.openInput(holdInput); err != nil {
		errs = append(errs, err)
		t.input.close()
		t.input = nil
	}
	return errors.Join(errs...)
}

// resume opens the streams in the guest again, as far as the guest still has them.
func (t *stdio) resume(ctx context.Context, dial guestio.Dialer) {
	for _, o := range t.outputs {
		if err := t.connectOutput(ctx, dial, o); err != nil {
			t.log.Warn("output cannot be resumed", "stream", o.kind.String(), "error", err)
		}
	}
	if in := t.input; in != nil {
		if err := t.connectInput(ctx, dial); err != nil {
			// A process that has read all of its input, or takes no more, is nothing special.
			if !errors.Is(err, guestio.ErrRefused) {
				t.log.Warn("input cannot be resumed", "error", err)
			}
			in.close()
		}
	}
}

// close frees the client's end of the input.
func (in *input) close() {
	if in.source != nil {
		in.source.finish()
	}
	if in.box != nil {
		in.box.close()
	}
}

// discard is the sink of a client that is gone.
type discard struct{ o *output }

func (discard) Write(p []byte) (int, error) { return len(p), nil }
func (d discard) position() uint64 {
	if d.o.reader == nil {
		return d.o.offset
	}
	return d.o.reader.Offset()
}
func (discard) resume(uint64)               {}
func (discard) flush(context.Context) error { return nil }
func (discard) abandon()                    {}
func (discard) detach()                     {}
func (discard) finish()                     {}
func (discard) close()                      {}
