package container

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"kuasar.io/kuasar/guest/protocol"
)

// maxSpec bounds an OCI spec in bytes. It has to fit into one message to the guest.
const maxSpec = 3 << 20

// processURL is the type of a process spec, on the wire of clients and of the guest alike.
const processURL = "types.containerd.io/opencontainers/runtime-spec/1/Process"

// CreateRequest describes a container.
type CreateRequest struct {
	ID string
	// Bundle is the directory that holds the container's config.json on the host.
	Bundle string
	// Spec is the OCI spec as JSON; nil means the bundle's config.json.
	Spec []byte
	// Rootfs are the mounts that make the root file system. They are not done yet.
	Rootfs []Mount
	IO     IO

	log *LogFile // for what IO does not name
}

// Create makes a container whose process waits for Start. If it fails, nothing is left of it, in
// the guest as far as that can be reached.
func (s *Set) Create(ctx context.Context, req CreateRequest) (pid uint32, err error) {
	if err := CheckID("id", req.ID); err != nil {
		return 0, err
	}
	req, err = s.announcedRequest(req)
	if err != nil {
		return 0, err
	}
	if len(req.Rootfs) == 0 {
		return 0, noRootfs(req.ID)
	}
	streams, err := s.newStdio(req.IO, req.ID, "", s.log.With("container", req.ID))
	if err != nil {
		return 0, err
	}
	streams.keepLog(req.log)
	ctx, cancel := s.operation(ctx, createTimeout)
	defer cancel()

	replay := replayed(ctx)
	s.mu.Lock()
	if c := s.containers[req.ID]; c != nil {
		defer s.mu.Unlock()
		if replay && c.init.ready {
			return c.init.pid, nil
		}
		return 0, fmt.Errorf("container %s: %w", req.ID, errdefs.ErrAlreadyExists)
	}
	if s.life.Err() != nil {
		s.mu.Unlock()
		return 0, fmt.Errorf("cannot create container %s: %w", req.ID, context.Cause(s.life))
	}
	c := &container{
		id: req.ID, bundle: req.Bundle, execs: map[string]*process{},
		creating: make(chan struct{}), cancelCreate: cancel,
	}
	c.init = s.newProcess(c, "")
	c.init.io = streams
	s.containers[req.ID] = c
	s.making.Add(1)
	defer s.making.Done()
	s.mu.Unlock()

	var undo undoList
	defer func() {
		if err != nil {
			undo.run()
			c.init.unwatch()
			s.mu.Lock()
			delete(s.containers, req.ID)
			s.mu.Unlock()
		}
		close(c.creating)
	}()
	if replay {
		// What an earlier daemon did of it.
		s.purge(req.ID)
		if err := s.opts.Storage.Release(req.ID); err != nil {
			return 0, fmt.Errorf("cannot create container %s: cannot release the storage of the first attempt: %w", req.ID, err)
		}
	}

	if err := s.prepare(ctx, req, streams, nil, &undo); err != nil {
		return 0, err
	}
	stdin, stdout, stderr := streams.guestNames()
	answer, err := s.opts.Guest.Task().Create(ctx, &task.CreateTaskRequest{
		ID: req.ID, Terminal: req.IO.Terminal, Stdin: stdin, Stdout: stdout, Stderr: stderr,
	})
	if err == nil {
		err = s.checkPID(c.init, answer.GetPid())
	}
	if err != nil {
		return 0, s.guestError(ctx, "create container "+req.ID, err)
	}
	if err := s.admit(c.init); err != nil {
		return 0, fmt.Errorf("cannot create container %s: %w", req.ID, err)
	}
	streams.pumpInput(s.streamViolation, s.journal)
	return c.init.pid, nil
}

// undoList is what was made, to be undone in reverse when anything fails.
type undoList []func()

func (u *undoList) add(f func()) { *u = append(*u, f) }

func (u *undoList) run() {
	for i := len(*u) - 1; i >= 0; i-- {
		(*u)[i]()
	}
	*u = nil
}

func noRootfs(id string) error {
	return fmt.Errorf("rootfs: container %s has none: %w", id, errdefs.ErrInvalidArgument)
}

// prepare does all for a container but to make it: its streams carry output, its storage is there, and
// the guest has its spec.
func (s *Set) prepare(ctx context.Context, req CreateRequest, streams *stdio, direct *protocol.Direct, undo *undoList) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	undo.add(streams.close)
	if err := streams.open(true); err != nil {
		return fmt.Errorf("cannot create container %s: %w", req.ID, err)
	}
	connected := make(chan error, 1)
	go func() { connected <- streams.connect(ctx, s.dial) }()
	// Nothing may be closed while the connections are being made.
	undo.add(func() {
		cancel()
		if connected != nil {
			<-connected
		}
	})

	undo.add(func() {
		if err := s.opts.Storage.Release(req.ID); err != nil {
			s.log.Error("cannot release the storage of a container that could not be created", "container", req.ID, "error", err)
		}
	})
	spec, err := s.guestSpec(ctx, req)
	if err != nil {
		return fmt.Errorf("cannot create container %s: %w", req.ID, err)
	}
	undo.add(func() { s.purge(req.ID) })
	_, err = s.opts.Guest.Sandbox().PrepareContainer(ctx, &protocol.PrepareContainerRequest{ContainerId: req.ID, Spec: spec, Direct: direct})
	if err != nil {
		return s.guestError(ctx, "prepare container "+req.ID, err)
	}
	err = <-connected
	connected = nil
	if err != nil {
		return s.streamError(ctx, "create container "+req.ID, err)
	}
	streams.pumpOutput(s.streamViolation)
	return nil
}

// ExecRequest describes a process in a container.
type ExecRequest struct {
	ID, ExecID string
	// Spec is the OCI process as JSON.
	Spec []byte
	IO   IO
}

// Exec makes a process in a container, which waits for Start. If it fails, nothing is left of it.
func (s *Set) Exec(ctx context.Context, req ExecRequest) (err error) {
	if err := CheckID("exec_id", req.ExecID); err != nil {
		return err
	}
	spec, err := rewriteProcess(req.Spec, req.IO.Terminal)
	if err != nil {
		return err
	}
	log := s.log.With("container", req.ID, "exec", req.ExecID)
	streams, err := s.newStdio(req.IO, req.ID, req.ExecID, log)
	if err != nil {
		return err
	}
	ctx, cancel := s.operation(ctx, createTimeout)
	defer cancel()

	replay := replayed(ctx)
	s.mu.Lock()
	if p, err := s.find(req.ID, req.ExecID); err == nil && replay {
		s.log.Debug("an earlier daemon has made it", "process", p.String())
		s.mu.Unlock()
		return nil
	}
	p, err := s.addExec(req, streams)
	s.mu.Unlock()
	if err != nil {
		return err
	}
	defer s.making.Done()
	what := fmt.Sprintf("create %v", p)
	forget := func() {
		s.askGuest(fmt.Sprintf("delete %v", p), func(ctx context.Context) error {
			_, err := s.opts.Guest.Task().Delete(ctx, &task.DeleteRequest{ID: req.ID, ExecID: req.ExecID})
			return err
		})
	}
	asked := false
	defer func() {
		if err == nil {
			return
		}
		cancel()
		if asked {
			forget()
		}
		streams.close()
		p.unwatch()
		s.mu.Lock()
		delete(p.container.execs, req.ExecID)
		s.mu.Unlock()
	}()
	if replay {
		forget() // what an earlier daemon did of it
	}
	// The end of an exec's input is the end of the client's FIFO: unlike a container, it does not
	// outlive its client.
	if err := streams.open(false); err != nil {
		return fmt.Errorf("cannot %s: %w", what, err)
	}
	if err := streams.connect(ctx, s.dial); err != nil {
		return s.streamError(ctx, what, err)
	}
	streams.pumpOutput(s.streamViolation)
	stdin, stdout, stderr := streams.guestNames()
	asked = true
	_, err = s.opts.Guest.Task().Exec(ctx, &task.ExecProcessRequest{
		ID: req.ID, ExecID: req.ExecID, Terminal: req.IO.Terminal, Stdin: stdin, Stdout: stdout, Stderr: stderr,
		Spec: &anypb.Any{TypeUrl: processURL, Value: spec},
	})
	if err != nil {
		return s.guestError(ctx, what, err)
	}
	if err := s.admit(p); err != nil {
		return fmt.Errorf("cannot %s: %w", what, err)
	}
	streams.pumpInput(s.streamViolation, s.journal)
	return nil
}

// addExec adds a process that nobody can find yet, and to s.making. s.mu is held.
func (s *Set) addExec(req ExecRequest, streams *stdio) (*process, error) {
	first, err := s.find(req.ID, "")
	if err != nil {
		return nil, err
	}
	c := first.container
	switch {
	case s.life.Err() != nil:
		return nil, fmt.Errorf("cannot create a process in container %s: %w", c.id, context.Cause(s.life))
	case c.execs[req.ExecID] != nil:
		return nil, fmt.Errorf("%v: %w", c.execs[req.ExecID], errdefs.ErrAlreadyExists)
	case first.deleting || first.status == Stopped:
		return nil, fmt.Errorf("cannot create a process in container %s: it is %v: %w", c.id, first.status, errdefs.ErrFailedPrecondition)
	}
	if s.opts.Announced {
		s.dropOldExecs(c)
	}
	p := s.newProcess(c, req.ExecID)
	p.io = streams
	c.execs[req.ExecID] = p
	s.making.Add(1)
	return p, nil
}

// admit makes a created process visible, unless its container or the guest has ended meanwhile.
func (s *Set) admit(p *process) error {
	s.mu.Lock()
	c := p.container
	switch {
	case s.life.Err() != nil:
		s.mu.Unlock()
		return context.Cause(s.life)
	case s.containers[c.id] != c || c.init.deleting:
		s.mu.Unlock()
		return fmt.Errorf("its container is being deleted: %w", errdefs.ErrFailedPrecondition)
	}
	p.ready = true
	p.born = time.Now()
	s.mu.Unlock()
	go s.watch(p)
	s.journal()
	return nil
}

// dial opens a connection for a standard stream.
func (s *Set) dial(ctx context.Context) (net.Conn, error) {
	if s.life.Err() != nil {
		return nil, fmt.Errorf("%w: %w", context.Cause(s.life), net.ErrClosed)
	}
	return s.opts.Guest.Dial(ctx, protocol.PortStdio)
}

// streamError says why the streams of a process could not be opened in the guest.
func (s *Set) streamError(ctx context.Context, what string, err error) error {
	if isProtocolViolation(err) {
		err = s.misbehaved(err)
	}
	return s.guestError(ctx, what, err)
}

func (s *Set) streamViolation(err error) { s.misbehaved(err) }

// guestSpec makes the container's spec for the guest, and with it its storage.
func (s *Set) guestSpec(ctx context.Context, req CreateRequest) ([]byte, error) {
	text := req.Spec
	if text == nil {
		var err error
		if text, err = readBundle(req.Bundle); err != nil {
			return nil, err
		}
	}
	spec, err := decodeSpec(text)
	if err != nil {
		return nil, err
	}
	// What cannot be run is refused before anything is mounted for it.
	w := &rewriter{
		id: req.ID, sharedPID: s.opts.SharedPID, terminal: req.IO.Terminal, log: s.log.With("container", req.ID),
		volume: func(source string, readOnly bool) (string, error) {
			return s.opts.Storage.Volume(ctx, req.ID, source, readOnly)
		},
	}
	if err := w.check(spec); err != nil {
		return nil, err
	}
	rootfs, err := s.opts.Storage.Rootfs(ctx, req.ID, req.Rootfs)
	if err != nil {
		return nil, err
	}
	if err := w.rewrite(spec, rootfs); err != nil {
		return nil, err
	}
	rewritten, err := json.Marshal(spec)
	if err != nil {
		return nil, fmt.Errorf("cannot encode its OCI spec: %w", err)
	}
	if len(rewritten) > maxSpec {
		return nil, fmt.Errorf("its spec has %d bytes for the guest, more than %d: %w", len(rewritten), maxSpec, errdefs.ErrInvalidArgument)
	}
	return rewritten, nil
}

func decodeSpec(text []byte) (*specs.Spec, error) {
	if len(text) > maxSpec {
		return nil, fmt.Errorf("its spec has %d bytes, more than %d: %w", len(text), maxSpec, errdefs.ErrInvalidArgument)
	}
	spec := &specs.Spec{}
	if err := json.Unmarshal(text, spec); err != nil {
		return nil, fmt.Errorf("cannot decode its OCI spec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return spec, nil
}

// readBundle reads a bundle's config.json.
func readBundle(bundle string) ([]byte, error) {
	if !filepath.IsAbs(bundle) {
		return nil, fmt.Errorf("bundle: %q is not an absolute path: %w", bundle, errdefs.ErrInvalidArgument)
	}
	root, err := os.OpenRoot(bundle)
	if err != nil {
		return nil, fmt.Errorf("bundle: %w", invalidIfAbsent(err))
	}
	defer root.Close()
	// Without O_NONBLOCK a FIFO of that name would block.
	file, err := root.OpenFile("config.json", os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("bundle %s: %w", bundle, invalidIfAbsent(err))
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, fmt.Errorf("bundle %s: %w", bundle, err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("bundle %s: config.json is not a regular file: %w", bundle, errdefs.ErrInvalidArgument)
	}
	text, err := io.ReadAll(io.LimitReader(file, maxSpec+1))
	if err != nil {
		return nil, fmt.Errorf("bundle %s: cannot read config.json: %w", bundle, err)
	}
	return text, nil
}

func invalidIfAbsent(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}
