package container

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
)

// maxSpecs bounds the specs of all announced containers together, in bytes: they are in the pod's
// journal.
const maxSpecs = 24 << 20

// maxOldExecs is how many processes of a container that have ended are kept for a client that does
// not delete them. It withdraws them, unless it has forgotten them.
const maxOldExecs = 64

// withdrawLimit bounds how long the withdrawal of a running container waits for it to die.
const withdrawLimit = 3 * time.Second

// announcement is what a client has said of a container before it makes it, once or several times.
// Without Options.Direct it is what Create takes, until the container is deleted. With it, everything is ready for the container in
// the guest, which makes it without the daemon: the streams run by themselves until the guest ends
// them, and nothing tells when the container begins or ends, only when it was Deleted.
type announcement struct {
	id   string
	busy chan struct{} // holds one while the announcement is made, changed or withdrawn: see hold

	// Guarded by Set.mu.
	making   bool // not announced yet
	request  CreateRequest
	io       *stdio // of a direct container; nil after its end
	released bool   // a client has deleted the container
	// releasing says that somebody is about to see to that.
	releasing bool
	name      string // tells it from earlier ones of the container, to the guest; of a direct one
	execs     map[string]*announcedProcess
}

// announcedProcess is an announcement of a process in a container. Guarded by Set.mu.
type announcedProcess struct {
	execID    string
	io        *stdio        // in a direct container; nil for none, and after their end
	ended     chan struct{} // closed when the streams have ended; nil for none
	withdrawn bool          // it is here for its streams only
}

// streams lists what the announcement carries. Set.mu is held.
func (a *announcement) streams() []*stdio {
	var all []*stdio
	if a.io != nil {
		all = append(all, a.io)
	}
	for _, p := range a.execs {
		if p.io != nil {
			all = append(all, p.io)
		}
	}
	return all
}

// record is called with Set.mu held.
func (a *announcement) record() *AnnouncementRecord {
	r := &AnnouncementRecord{
		Making: a.making, Spec: a.request.Spec, Rootfs: a.request.Rootfs, IO: a.request.IO,
		Released: a.released, Name: a.name,
	}
	if a.io != nil {
		streams := a.io.record()
		r.Streams = &streams
	}
	for _, p := range a.execs {
		var pr ProcessRecord
		if p.io != nil {
			pr = p.io.record()
		}
		pr.ExecID, pr.Withdrawn = p.execID, p.withdrawn
		r.Processes = append(r.Processes, pr)
	}
	slices.SortFunc(r.Processes, func(a, b ProcessRecord) int { return strings.Compare(a.ExecID, b.ExecID) })
	return r
}

// restoredAnnouncement makes an announcement from its record.
func (s *Set) restoredAnnouncement(id string, r AnnouncementRecord) (*announcement, error) {
	a := newAnnouncement(id)
	a.making, a.released, a.name = r.Making, r.Released, r.Name
	a.request = CreateRequest{ID: id, Spec: r.Spec, Rootfs: r.Rootfs, IO: r.IO}
	var err error
	if r.Streams != nil {
		if a.io, err = s.restoredStdio(id, *r.Streams); err != nil {
			return nil, err
		}
	}
	for _, pr := range r.Processes {
		if err := CheckID("exec_id", pr.ExecID); err != nil {
			return nil, err
		}
		p := &announcedProcess{execID: pr.ExecID, withdrawn: pr.Withdrawn}
		if pr.Token != "" {
			if p.io, err = s.restoredStdio(id, pr); err != nil {
				return nil, err
			}
			p.ended = make(chan struct{})
		}
		a.execs[p.execID] = p
	}
	return a, nil
}

// reattachAnnounced goes on with the streams of an earlier daemon's announcement, or undoes one that it
// did not bring to its end.
func (s *Set) reattachAnnounced(ctx context.Context, a *announcement) {
	if a.making {
		s.purge(a.id)
		if err := s.opts.Storage.Release(a.id); err != nil {
			s.log.Error("cannot release the storage of a container whose announcement was cut off", "container", a.id, "error", err)
		}
		s.mu.Lock()
		delete(s.announced, a.id)
		s.mu.Unlock()
		return
	}
	ctx, cancel := s.operation(ctx, controlLimit)
	defer cancel()
	again := func(t *stdio, hold bool) {
		if err := t.reopen(hold, false); err != nil {
			s.log.Warn("a stream of a client is lost", "container", a.id, "exec", t.execID, "error", err)
		}
		t.resume(ctx, s.dial)
		t.pumpOutput(s.streamViolation)
		t.pumpInput(s.streamViolation, s.journal)
	}
	s.mu.Lock()
	first, execs := a.io, make([]*announcedProcess, 0, len(a.execs))
	for _, p := range a.execs {
		if p.io != nil {
			execs = append(execs, p)
		}
	}
	s.mu.Unlock()
	if first != nil {
		again(first, true)
		go s.relayRestored(a, nil, first)
	}
	for _, p := range execs {
		t := p.io
		again(t, false)
		go s.relayRestored(a, p, t)
		if p.withdrawn {
			go s.expire(a, p, t)
		}
	}
}

// relayRestored waits for the end of Restore, as what relay records must be whole.
func (s *Set) relayRestored(a *announcement, p *announcedProcess, t *stdio) {
	select {
	case <-s.streams.restored:
	case <-s.life.Done():
	}
	s.relay(a, p, t)
}

func newAnnouncement(id string) *announcement {
	return &announcement{id: id, busy: make(chan struct{}, 1), execs: map[string]*announcedProcess{}}
}

// hold returns the announcement of a container with nobody else changing it until release. If there is
// none, it makes one that nobody sees yet, or returns nil.
func (s *Set) hold(ctx context.Context, id string, create bool) (a *announcement, release func(), err error) {
	for {
		s.mu.Lock()
		a = s.announced[id]
		if a == nil && !create {
			s.mu.Unlock()
			return nil, func() {}, nil
		}
		if a == nil {
			a = newAnnouncement(id)
			a.making = true
			s.announced[id] = a
			a.busy <- struct{}{} // at once, as nobody else knows it
			s.mu.Unlock()
			return a, func() { <-a.busy }, nil
		}
		s.mu.Unlock()
		select {
		case a.busy <- struct{}{}:
		case <-ctx.Done():
			return nil, nil, fmt.Errorf("container %s is being announced or withdrawn: %w", id, context.Cause(ctx))
		}
		s.mu.Lock()
		current := s.announced[id] == a
		s.mu.Unlock()
		if current {
			return a, func() { <-a.busy }, nil
		}
		<-a.busy
	}
}

// forget removes an announcement.
func (s *Set) forget(a *announcement) {
	s.mu.Lock()
	if s.announced[a.id] == a {
		delete(s.announced, a.id)
	}
	s.mu.Unlock()
	s.journal()
}

// announcements lists all.
func (s *Set) announcements() []*announcement {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*announcement, 0, len(s.announced))
	for _, a := range s.announced {
		all = append(all, a)
	}
	return all
}

// Announced returns the ids of the containers that are announced, and for each those of its processes.
// The caller may change the result.
func (s *Set) Announced() map[string][]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := map[string][]string{}
	for id, a := range s.announced {
		if a.making {
			continue
		}
		all[id] = []string{}
		for execID, p := range a.execs {
			if !p.withdrawn {
				all[id] = append(all[id], execID)
			}
		}
		slices.Sort(all[id])
	}
	return all
}

// begin checks that the client announces at all, and that there is a guest, and adds to s.making, which
// the caller ends.
func (s *Set) begin() error {
	if !s.opts.Announced && !s.opts.Direct {
		return fmt.Errorf("the pod's client makes containers without announcing them: %w", errdefs.ErrNotImplemented)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.life.Err() != nil {
		return context.Cause(s.life)
	}
	s.making.Add(1)
	return nil
}

// AnnounceContainer tells of a container that a client will make by the task API: see
// controller.Containers, whose rules it keeps. Of a container that exists it changes nothing but, with
// Options.Direct unset, what the next Create of its id takes.
func (s *Set) AnnounceContainer(ctx context.Context, req CreateRequest) error {
	if err := CheckID("id", req.ID); err != nil {
		return err
	}
	if err := s.begin(); err != nil {
		return fmt.Errorf("cannot announce container %s: %w", req.ID, err)
	}
	defer s.making.Done()
	log, err := s.checkAnnounced(req)
	if err != nil {
		return fmt.Errorf("cannot announce container %s: %w", req.ID, err)
	}
	if s.opts.Direct {
		req.log = log
		return s.announceDirect(ctx, req)
	}
	if _, err := s.newStdio(req.IO, req.ID, "", s.log); err != nil {
		return fmt.Errorf("cannot announce container %s: %w", req.ID, err)
	}
	ctx, cancel := s.operation(ctx, createTimeout)
	defer cancel()
	a, release, err := s.hold(ctx, req.ID, true)
	if err != nil {
		return fmt.Errorf("cannot announce container %s: %w", req.ID, err)
	}
	defer release()
	s.mu.Lock()
	total := len(req.Spec)
	for id, other := range s.announced {
		if id != req.ID {
			total += len(other.request.Spec)
		}
	}
	fits, first := total <= maxSpecs, a.making
	if fits {
		a.request = CreateRequest{ID: req.ID, Spec: slices.Clone(req.Spec), Rootfs: slices.Clone(req.Rootfs), IO: req.IO}
		a.making = false
	}
	s.mu.Unlock()
	if !fits {
		if first {
			s.forget(a)
		}
		return fmt.Errorf("cannot announce container %s: the specs of the pod's containers have %d bytes together, more than %d: %w",
			req.ID, total, maxSpecs, errdefs.ErrResourceExhausted)
	}
	s.journal()
	return nil
}

// checkAnnounced refuses what cannot be created, and returns where the container's log is to be.
func (s *Set) checkAnnounced(req CreateRequest) (*LogFile, error) {
	if len(req.Spec) == 0 {
		return nil, invalid("it has no spec")
	}
	spec, err := decodeSpec(req.Spec)
	if err != nil {
		return nil, err
	}
	w := &rewriter{id: req.ID, sharedPID: s.opts.SharedPID, terminal: req.IO.Terminal, announced: true, log: s.log}
	if err := w.check(spec); err != nil {
		return nil, err
	}
	if len(req.Rootfs) == 0 {
		return nil, noRootfs(req.ID)
	}
	for _, m := range req.Rootfs {
		if err := checkRootfs(m); err != nil {
			return nil, fmt.Errorf("rootfs: %w", err)
		}
	}
	return logOf(spec, s.log.With("container", req.ID))
}

// checkRootfs refuses what cannot be a part of a root file system. The path itself must lead there: a
// link at its end, unlike those on the way, would be somebody else's word.
func checkRootfs(m Mount) error {
	if m.Type == "overlay" {
		return nil // its directories are in the options
	}
	if strings.ContainsRune(m.Source, 0) || !filepath.IsAbs(m.Source) || filepath.Clean(m.Source) != m.Source || m.Source == "/" {
		return invalid("source %.256q is not an absolute path without detours", m.Source)
	}
	var st unix.Stat_t
	if err := unix.Lstat(m.Source, &st); err != nil {
		return invalidIfAbsent(&os.PathError{Op: "stat", Path: m.Source, Err: err})
	}
	bind := m.Type == "" || m.Type == "bind" || m.Type == "rbind"
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if !bind {
			return invalid("source %s is a directory, which cannot be mounted as %.64q", m.Source, m.Type)
		}
		return nil
	case unix.S_IFBLK:
		major, minor := unix.Major(st.Rdev), unix.Minor(st.Rdev)
		mounted, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
			return uint32(i.Major) != major || uint32(i.Minor) != minor, true
		})
		switch {
		case err != nil:
			return fmt.Errorf("cannot tell whether %s is mounted: %w", m.Source, err)
		case len(mounted) > 0:
			return fmt.Errorf("block device %s is mounted on the host, at %s; two kernels would destroy its file system: %w",
				m.Source, mounted[0].Mountpoint, errdefs.ErrFailedPrecondition)
		case bind:
			return unsupported("source %s is a block device; only its file system can be a root: name its type instead of %.64q", m.Source, m.Type)
		}
		return nil
	case unix.S_IFLNK:
		return invalid("source %s is a symbolic link", m.Source)
	case unix.S_IFREG:
		return invalid("source %s is a regular file, not a directory", m.Source)
	}
	return invalid("source %s is neither a directory nor a block device", m.Source)
}

// announcedRequest completes the request of a client that has announced the container.
func (s *Set) announcedRequest(req CreateRequest) (CreateRequest, error) {
	switch {
	case s.opts.Direct:
		return req, fmt.Errorf("cannot create container %s: the pod's containers are made at the guest's own task address: %w",
			req.ID, errdefs.ErrFailedPrecondition)
	case !s.opts.Announced:
		return req, nil
	}
	s.mu.Lock()
	a := s.announced[req.ID]
	var announced CreateRequest
	if a != nil {
		announced = a.request
	}
	s.mu.Unlock()
	if a == nil || len(announced.Spec) == 0 {
		return req, fmt.Errorf("cannot create container %s: the client has not announced it (Prepare, or Update with extensions.tasks) since it was last deleted: %w",
			req.ID, errdefs.ErrFailedPrecondition)
	}
	req.Spec, req.Rootfs = announced.Spec, announced.Rootfs
	if req.IO.Stdin == "" && req.IO.Stdout == "" && req.IO.Stderr == "" {
		terminal := req.IO.Terminal
		req.IO = announced.IO
		req.IO.Terminal = terminal
	}
	spec, err := decodeSpec(req.Spec)
	if err != nil {
		return req, err
	}
	req.log, err = logOf(spec, s.log.With("container", req.ID))
	return req, err
}

// direct separates the streams that the daemon carries from those for which the guest listens, and
// checks the latter.
func direct(client IO) (carried IO, listening *protocol.Direct, err error) {
	carried, listening = client, &protocol.Direct{}
	for _, n := range []struct {
		field          string
		name, guestEnd *string
	}{{"stdin", &carried.Stdin, &listening.Stdin}, {"stdout", &carried.Stdout, &listening.Stdout}, {"stderr", &carried.Stderr, &listening.Stderr}} {
		address, ok := strings.CutPrefix(*n.name, protocol.VsockScheme)
		if !ok {
			continue
		}
		cid, port, _ := strings.Cut(address, ":")
		for _, number := range []string{cid, port} {
			v, err := strconv.ParseUint(number, 10, 32)
			if err != nil || v == 0 || v == math.MaxUint32 || strconv.FormatUint(v, 10) != number {
				return carried, nil, invalid("%s: %.128q is not %s<context id>:<port>", n.field, *n.name, protocol.VsockScheme)
			}
		}
		*n.guestEnd, *n.name = *n.name, ""
	}
	return carried, listening, nil
}

// announceDirect announces a container to the guest.
func (s *Set) announceDirect(ctx context.Context, req CreateRequest) (err error) {
	carried, names, err := direct(req.IO)
	if err != nil {
		return fmt.Errorf("cannot announce container %s: %w", req.ID, err)
	}
	streams, err := s.newStdio(carried, req.ID, "", s.log.With("container", req.ID))
	if err != nil {
		return fmt.Errorf("cannot announce container %s: %w", req.ID, err)
	}
	if names.Stdout == "" && names.Stderr == "" {
		streams.keepLog(req.log)
	}
	ctx, cancel := s.operation(ctx, createTimeout)
	defer cancel()
	a, release, err := s.hold(ctx, req.ID, true)
	if err != nil {
		return fmt.Errorf("cannot announce container %s: %w", req.ID, err)
	}
	defer release()
	s.mu.Lock()
	known, released, carrying := !a.making, a.released, a.streams()
	s.mu.Unlock()
	if known && !released {
		state, err := s.guestState(ctx, req.ID, "")
		if err != nil {
			return fmt.Errorf("cannot announce container %s again: %w", req.ID, err)
		}
		if state != tasktypes.Status_UNKNOWN && state != tasktypes.Status_STOPPED {
			return nil // it was made
		}
	}
	if known {
		if released {
			s.awaitStreams(ctx, carrying)
		}
		if err := s.dismantle(a); err != nil {
			return fmt.Errorf("cannot announce container %s again: %w", req.ID, err)
		}
		s.mu.Lock()
		a.making, a.released, a.execs = true, false, map[string]*announcedProcess{}
		s.mu.Unlock()
	}
	// Behind this a daemon that dies leaves a trace of it.
	s.journal()
	var undo undoList
	defer func() {
		if err != nil {
			cancel()
			undo.run()
			s.forget(a)
		}
	}()
	addTokens(names, streams)
	names.Announcement = streams.token
	if err := s.prepare(ctx, req, streams, names, &undo); err != nil {
		return err
	}
	s.mu.Lock()
	if err = context.Cause(s.life); err == nil {
		a.making, a.name = false, streams.token
		if streams.any() {
			a.io = streams
		}
	}
	s.mu.Unlock()
	if err != nil {
		return fmt.Errorf("cannot announce container %s: %w", req.ID, err)
	}
	s.journal()
	streams.pumpInput(s.streamViolation, s.journal)
	go s.relay(a, nil, streams)
	return nil
}

// addTokens names the streams that the daemon carries.
func addTokens(names *protocol.Direct, streams *stdio) {
	stdin, stdout, stderr := streams.guestNames()
	if stdin != "" {
		names.Stdin = stdin
	}
	if stdout != "" {
		names.Stdout = stdout
	}
	if stderr != "" {
		names.Stderr = stderr
	}
}

// any tells whether there is a stream.
func (t *stdio) any() bool { return t.input != nil || len(t.outputs) > 0 }

// guestState asks for the state of a process in the guest: UNKNOWN if the guest does not know it.
func (s *Set) guestState(ctx context.Context, id, execID string) (tasktypes.Status, error) {
	ctx, cancel := s.operation(ctx, cleanUpLimit)
	defer cancel()
	answer, err := s.opts.Guest.Task().State(ctx, &task.StateRequest{ID: id, ExecID: execID})
	if err != nil {
		err = s.guestError(ctx, "get the state of container "+id, err)
		if errdefs.IsNotFound(err) {
			return tasktypes.Status_UNKNOWN, nil
		}
		return 0, err
	}
	return answer.GetStatus(), nil
}

// relay waits until the guest has ended the streams of a direct container, or of p in it, and ends them
// for the client.
func (s *Set) relay(a *announcement, p *announcedProcess, t *stdio) {
	t.awaitEnd()
	if s.shelf.left.Load() {
		return // they have not ended; they are another daemon's
	}
	s.mu.Lock()
	withdrawn := p != nil && p.withdrawn
	s.mu.Unlock()
	if withdrawn {
		t.abandonAfter(s.killGrace)
	}
	if !t.drain(drainLimit) {
		return
	}
	t.close()
	s.mu.Lock()
	if p == nil {
		if a.io == t {
			a.io = nil
		}
	} else {
		p.io = nil
		close(p.ended)
		if p.withdrawn && a.execs[p.execID] == p {
			delete(a.execs, p.execID)
		}
	}
	closing := s.life.Err() != nil && !s.gone
	s.mu.Unlock()
	if !closing {
		s.journal()
	}
}

// awaitEnd waits for the guest's end of all outputs; if there are none, for that of the input.
func (t *stdio) awaitEnd() {
	for _, o := range t.outputs {
		if o.done != nil {
			<-o.done
		}
	}
	if len(t.outputs) == 0 && t.input != nil && t.input.done != nil {
		<-t.input.done
	}
}

// AnnounceProcess does the same for a process in an announced container. Of one that exists it changes
// nothing.
func (s *Set) AnnounceProcess(ctx context.Context, req ExecRequest) error {
	if err := errors.Join(CheckID("id", req.ID), CheckID("exec_id", req.ExecID)); err != nil {
		return err
	}
	what := fmt.Sprintf("announce process %s of container %s", req.ExecID, req.ID)
	if err := s.begin(); err != nil {
		return fmt.Errorf("cannot %s: %w", what, err)
	}
	defer s.making.Done()
	ctx, cancel := s.operation(ctx, createTimeout)
	defer cancel()
	a, release, err := s.hold(ctx, req.ID, false)
	if err != nil {
		return fmt.Errorf("cannot %s: %w", what, err)
	}
	defer release()
	if a == nil {
		return fmt.Errorf("cannot %s: the container is not announced: %w", what, errdefs.ErrNotFound)
	}
	p := &announcedProcess{execID: req.ExecID}
	if s.opts.Direct {
		if err := s.announceDirectProcess(ctx, a, p, req); err != nil {
			if errdefs.IsAlreadyExists(err) && s.isAnnounced(a, req.ExecID) {
				return nil
			}
			return fmt.Errorf("cannot %s: %w", what, err)
		}
		return nil
	}
	s.mu.Lock()
	if a.execs[req.ExecID] == nil {
		a.execs[req.ExecID] = p
	}
	s.mu.Unlock()
	s.journal()
	return nil
}

func (s *Set) isAnnounced(a *announcement, execID string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return a.execs[execID] != nil
}

// announceDirectProcess announces a process to the guest, with a held.
func (s *Set) announceDirectProcess(ctx context.Context, a *announcement, p *announcedProcess, req ExecRequest) error {
	carried, names, err := direct(req.IO)
	if err != nil {
		return err
	}
	streams, err := s.newStdio(carried, req.ID, req.ExecID, s.log.With("container", req.ID, "exec", req.ExecID))
	if err != nil {
		return err
	}
	s.mu.Lock()
	old := a.execs[req.ExecID]
	same := old != nil && old.io != nil && !old.withdrawn && old.io.client == carried
	s.mu.Unlock()
	if same {
		return nil // its streams may be in use
	}
	addTokens(names, streams)
	err = streams.open(false)
	if err == nil {
		err = streams.connect(ctx, s.dial)
	}
	if err == nil {
		streams.pumpOutput(s.streamViolation)
		_, err = s.opts.Guest.Sandbox().PrepareProcess(ctx, &protocol.PrepareProcessRequest{ContainerId: req.ID, ExecId: req.ExecID, Direct: names})
	}
	if err != nil {
		streams.close()
		return s.streamError(ctx, "prepare it", err)
	}
	s.mu.Lock()
	err = context.Cause(s.life)
	if err == nil {
		if streams.any() {
			p.io, p.ended = streams, make(chan struct{})
		}
		a.execs[req.ExecID] = p
	}
	var replaced *stdio
	if old != nil {
		replaced = old.io
	}
	s.mu.Unlock()
	if err != nil {
		streams.close()
		return err
	}
	if replaced != nil {
		replaced.cut(0)
	}
	s.journal()
	streams.pumpInput(s.streamViolation, s.journal)
	if p.io != nil {
		go s.relay(a, p, streams)
	}
	return nil
}

// Withdraw takes back the announcement of a container with its processes, or of one process if execID
// is not empty. It waits a few seconds at most for a process to die or a client to read, and needs no
// guest. What is not known is no error.
func (s *Set) Withdraw(ctx context.Context, id, execID string) error {
	if err := CheckID("id", id); err != nil {
		return err
	}
	if execID != "" {
		if err := CheckID("exec_id", execID); err != nil {
			return err
		}
	}
	if !s.opts.Announced && !s.opts.Direct {
		return notFound(id, execID) // what is here, its client deletes
	}
	what := "container " + id
	if execID != "" {
		what = fmt.Sprintf("process %s of container %s", execID, id)
	}
	a, release, err := s.hold(ctx, id, false)
	if err != nil {
		return fmt.Errorf("cannot withdraw %s: %w", what, err)
	}
	defer release()
	switch {
	case execID != "" && s.opts.Direct:
		s.withdrawDirectProcess(a, execID)
	case execID != "":
		s.withdrawProcess(a, id, execID)
	case s.opts.Direct:
		err = s.withdrawDirect(ctx, a)
	default:
		err = s.withdrawContainer(ctx, a, id)
	}
	if err != nil {
		return fmt.Errorf("cannot withdraw %s: %w", what, err)
	}
	return nil
}

// withdrawContainer ends a container that was made here, if it was.
func (s *Set) withdrawContainer(ctx context.Context, a *announcement, id string) error {
	if err := s.endCreate(ctx, id, ""); err != nil {
		return err
	}
	s.mu.Lock()
	c := s.containers[id]
	var deleting, alive bool
	if c != nil {
		deleting, alive = c.init.deleting, c.init.status != Stopped && c.init.ran()
		c.init.deleting = true
	}
	s.mu.Unlock()
	if c != nil && deleting {
		if err := s.awaitDeleted(ctx, c); err != nil {
			return err
		}
	} else if c != nil {
		if alive {
			s.killAndWait(ctx, c.init)
		}
		if err := s.deleteContainer(c); err != nil {
			s.mu.Lock()
			c.init.deleting = false
			s.mu.Unlock()
			return err
		}
	}
	if a == nil {
		s.journal()
	} else {
		s.forget(a)
	}
	return nil
}

// awaitDeleted waits for a client's Delete that is under way.
func (s *Set) awaitDeleted(ctx context.Context, c *container) error {
	ctx, cancel := context.WithTimeout(ctx, 2*cleanUpLimit)
	defer cancel()
	for {
		s.mu.Lock()
		current, deleting := s.containers[c.id] == c, c.init.deleting
		s.mu.Unlock()
		switch {
		case !current:
			return nil
		case !deleting:
			return fmt.Errorf("its deletion failed: %w", errdefs.ErrUnavailable)
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("its deletion takes too long: %w", context.Cause(ctx))
		}
	}
}

// killAndWait kills a container and gives it the time to end with all of its output.
func (s *Set) killAndWait(ctx context.Context, p *process) {
	p.io.abandonAfter(withdrawLimit)
	s.killInGuest(p.container.id)
	select {
	case <-p.exited:
	case <-time.After(withdrawLimit):
	case <-ctx.Done():
	case <-s.life.Done():
	}
}

func (s *Set) killInGuest(id string) {
	s.askGuest("kill container "+id, func(ctx context.Context) error {
		_, err := s.opts.Guest.Task().Kill(ctx, &task.KillRequest{ID: id, Signal: uint32(unix.SIGKILL), All: true})
		return err
	})
}

// withdrawProcess forgets a process that was made here when it has ended, which may be now.
func (s *Set) withdrawProcess(a *announcement, id, execID string) {
	s.mu.Lock()
	if a != nil {
		delete(a.execs, execID)
	}
	var p *process
	if c := s.containers[id]; c != nil {
		p = c.execs[execID]
	}
	drop, ending := false, false
	if p != nil {
		p.withdrawn = true
		ending = p.ending
		drop = p.ready && !p.deleting && (p.status == Stopped || !p.ran() && !p.starting)
	}
	s.mu.Unlock()
	switch {
	case drop:
		s.dropExec(p)
	case ending:
		p.io.abandonAfter(s.killGrace)
		s.journal()
	default:
		s.journal()
	}
}

// dropExec deletes a process that its client will not delete.
func (s *Set) dropExec(p *process) {
	s.mu.Lock()
	c := p.container
	if p.deleting || s.containers[c.id] != c || c.init.deleting || s.life.Err() != nil {
		s.mu.Unlock()
		return
	}
	p.deleting = true
	s.mu.Unlock()
	s.deleteExec(p)
	s.journal()
}

// dropOldExecs deletes the oldest of a container's processes that have ended, if there are too many.
// s.mu is held.
func (s *Set) dropOldExecs(c *container) {
	var old []*process
	for _, p := range c.execs {
		if p.ready && p.status == Stopped && !p.deleting {
			old = append(old, p)
		}
	}
	if len(old) < maxOldExecs {
		return
	}
	slices.SortFunc(old, func(a, b *process) int { return a.exit.At.Compare(b.exit.At) })
	for _, p := range old[:len(old)-maxOldExecs+1] {
		go s.dropExec(p)
	}
}

// withdrawDirect ends a container that the guest may have made.
func (s *Set) withdrawDirect(ctx context.Context, a *announcement) error {
	if a == nil {
		return nil
	}
	s.mu.Lock()
	carrying := a.streams()
	s.mu.Unlock()
	state := tasktypes.Status_UNKNOWN
	if len(carrying) > 0 {
		state, _ = s.guestState(ctx, a.id, "") // of no answer there is nothing to wait for
	}
	s.mu.Lock()
	released := a.released
	s.mu.Unlock()
	// If it was never made there is nothing to wait for.
	if state != tasktypes.Status_UNKNOWN || released {
		// Its output comes to its end only if it is not purged before.
		if state != tasktypes.Status_STOPPED && state != tasktypes.Status_UNKNOWN {
			s.killInGuest(a.id)
		}
		s.awaitStreams(ctx, carrying)
	}
	if err := s.dismantle(a); err != nil {
		return err
	}
	s.forget(a)
	return nil
}

// awaitStreams gives what is on its way the time to arrive.
func (s *Set) awaitStreams(ctx context.Context, carrying []*stdio) {
	limit := time.After(withdrawLimit)
	for _, t := range carrying {
		t.abandonAfter(withdrawLimit)
		ended := make(chan struct{})
		go func() {
			t.awaitEnd()
			close(ended)
		}()
		select {
		case <-ended:
		case <-limit:
			return
		case <-ctx.Done():
			return
		case <-s.life.Done():
			return
		}
	}
}

// dismantle makes the guest forget a direct container, ends its streams, and releases its storage.
func (s *Set) dismantle(a *announcement) error {
	s.purge(a.id)
	s.cutStreams(a)
	if err := s.opts.Storage.Release(a.id); err != nil {
		return fmt.Errorf("cannot release its storage: %w", err)
	}
	return nil
}

// cutStreams ends all streams of a direct container.
func (s *Set) cutStreams(a *announcement) {
	s.mu.Lock()
	carrying := a.streams()
	s.mu.Unlock()
	for _, t := range carrying {
		t.abandonAfter(goneGrace)
	}
	for _, t := range carrying {
		t.cut(goneGrace)
	}
}

// cutAnnounced does it after the guest's end.
func (s *Set) cutAnnounced(a *announcement) {
	// Whoever holds it gives up, as the guest is gone.
	a.busy <- struct{}{}
	defer func() { <-a.busy }()
	s.cutStreams(a)
}

// withdrawDirectProcess leaves a process to itself. What it has written is delivered, and its streams
// end as soon as they can.
func (s *Set) withdrawDirectProcess(a *announcement, execID string) {
	if a == nil {
		return
	}
	s.mu.Lock()
	p := a.execs[execID]
	var t *stdio
	if p != nil {
		p.withdrawn = true
		if t = p.io; t == nil {
			delete(a.execs, execID)
		}
	}
	s.mu.Unlock()
	if p == nil {
		return
	}
	s.askGuest(fmt.Sprintf("purge process %s of container %s", execID, a.id), func(ctx context.Context) error {
		_, err := s.opts.Guest.Sandbox().PurgeProcess(ctx, &protocol.PurgeProcessRequest{ContainerId: a.id, ExecId: execID})
		return err
	})
	s.journal()
	if t != nil {
		go s.expire(a, p, t)
	}
}

// expire ends the streams of a withdrawn process unless it runs, which ends them by itself.
func (s *Set) expire(a *announcement, p *announcedProcess, t *stdio) {
	state, err := s.guestState(context.Background(), a.id, p.execID)
	switch {
	case err != nil || state == tasktypes.Status_RUNNING || state == tasktypes.Status_PAUSED || state == tasktypes.Status_PAUSING:
		return // the guest's end, or the pod's, ends it in any case
	case state == tasktypes.Status_CREATED:
		s.askGuest(fmt.Sprintf("delete process %s of container %s", p.execID, a.id), func(ctx context.Context) error {
			_, err := s.opts.Guest.Task().Delete(ctx, &task.DeleteRequest{ID: a.id, ExecID: p.execID})
			return err
		})
	}
	t.abandonAfter(s.killGrace)
	select {
	case <-p.ended:
	case <-time.After(drainLimit):
		t.cut(goneGrace)
	case <-s.life.Done():
	}
}

// Deleted says that a client has deleted, in the guest, a direct container that was made by the
// announcement of that name (protocol.Direct): what only it used of the host's can go. The announcement
// stands. It may be told again, and of announcements that were replaced meanwhile. It does not wait.
func (s *Set) Deleted(id, name string) {
	if err := s.begin(); err != nil {
		return
	}
	s.mu.Lock()
	a := s.announced[id]
	news := a != nil && a.isNews(name) && !a.releasing
	if news {
		// The guest may say it as often as it likes: one goroutine is enough.
		a.releasing = true
	}
	s.mu.Unlock()
	if !news {
		s.making.Done()
		return
	}
	go func() {
		defer s.making.Done()
		s.release(a, name)
		s.mu.Lock()
		a.releasing = false
		s.mu.Unlock()
	}()
}

// isNews tells whether the storage of the container that was made by the announcement of that name is
// still there. Set.mu is held.
func (a *announcement) isNews(name string) bool {
	return a.name != "" && a.name == name && !a.making && !a.released
}

// release gives back what only a deleted container used, unless it is announced anew meanwhile.
func (s *Set) release(a *announcement, name string) {
	ctx, cancel := s.operation(context.Background(), createTimeout)
	defer cancel()
	held, done, err := s.hold(ctx, a.id, false)
	if err != nil || held == nil {
		return
	}
	defer done()
	s.mu.Lock()
	news := held == a && a.isNews(name)
	a.released = a.released || news
	s.mu.Unlock()
	if !news {
		return
	}
	// The guest may still be delivering its output, and ends the streams after that.
	if err := s.opts.Storage.Release(a.id); err != nil {
		s.log.Error("cannot release the storage of a deleted container", "container", a.id, "error", err)
	}
	s.journal()
}
