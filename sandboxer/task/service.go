package task

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	apitypes "github.com/containerd/containerd/api/types"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"kuasar.io/kuasar/sandboxer/container"
)

// ServiceNames are the services that a Service answers. Versions 2 and 3 of the Task API have the
// same messages on the wire.
var ServiceNames = []string{"containerd.task.v3.Task", "containerd.task.v2.Task"}

// Service answers the calls of the Task API for one pod, whatever carries them.
type Service struct {
	set     *container.Set
	address string
	log     *slog.Logger
}

// NewService returns the Service of a pod's containers. address is where clients reach the pod,
// with which streaming stdio must begin.
func NewService(set *container.Set, address string, log *slog.Logger) *Service {
	return &Service{set: set, address: address, log: log}
}

// method is one call: its request's type and what answers it.
type method struct {
	request func() proto.Message
	answer  func(*Service, context.Context, proto.Message) (proto.Message, error)
}

// pointer is a message of type *T.
type pointer[T any] interface {
	*T
	proto.Message
}

func unary[T any, Q pointer[T], A proto.Message](answer func(*Service, context.Context, Q) (A, error)) method {
	return method{
		request: func() proto.Message { return Q(new(T)) },
		answer: func(s *Service, ctx context.Context, request proto.Message) (proto.Message, error) {
			a, err := answer(s, ctx, request.(Q))
			if err != nil {
				return nil, err
			}
			return a, nil
		},
	}
}

var methods = map[string]method{
	"State":      unary((*Service).state),
	"Create":     unary((*Service).create),
	"Start":      unary((*Service).start),
	"Delete":     unary((*Service).delete),
	"Pids":       unary((*Service).pids),
	"Pause":      unary((*Service).pause),
	"Resume":     unary((*Service).resume),
	"Checkpoint": unary((*Service).checkpoint),
	"Kill":       unary((*Service).kill),
	"Exec":       unary((*Service).exec),
	"ResizePty":  unary((*Service).resizePty),
	"CloseIO":    unary((*Service).closeIO),
	"Update":     unary((*Service).update),
	"Wait":       unary((*Service).wait),
	"Stats":      unary((*Service).stats),
	"Connect":    unary((*Service).connect),
	"Shutdown":   unary((*Service).shutdown),
}

// Call answers one call: it decodes payload as the method's request and returns the encoded
// answer. Errors are gRPC statuses.
func (s *Service) Call(ctx context.Context, name string, payload []byte) ([]byte, error) {
	answer, err := s.call(ctx, name, payload)
	if err != nil {
		return nil, err
	}
	encoded, err := proto.Marshal(answer)
	if err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("cannot encode the answer of %s: %w: %w", name, err, errdefs.ErrInternal))
	}
	return encoded, nil
}

func (s *Service) call(ctx context.Context, name string, payload []byte) (proto.Message, error) {
	m, ok := methods[name]
	if !ok {
		return nil, errgrpc.ToGRPC(fmt.Errorf("method %s of the Task API: %w", name, errdefs.ErrNotImplemented))
	}
	request := m.request()
	if err := proto.Unmarshal(payload, request); err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("cannot decode the request of %s: %s: %w", name, err, errdefs.ErrInvalidArgument))
	}
	began := time.Now()
	answer, err := m.answer(s, ctx, request)
	s.report(name, request, time.Since(began), err)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return answer, nil
}

// ServeStream lends a client's connection to the process that names the id; see
// container.Set.ServeStream.
func (s *Service) ServeStream(ctx context.Context, id string, stream container.ClientStream) error {
	return s.set.ServeStream(ctx, id, stream)
}

// report logs a call. What clients do as a matter of course, such as deleting twice, is no news.
func (s *Service) report(name string, request proto.Message, took time.Duration, err error) {
	level := slog.LevelDebug
	if err != nil && !errdefs.IsNotFound(err) && !errors.Is(err, context.Canceled) {
		level = slog.LevelWarn
	}
	if !s.log.Enabled(context.Background(), level) {
		return
	}
	attrs := []slog.Attr{slog.String("call", name), slog.Duration("took", took)}
	if r, ok := request.(interface{ GetID() string }); ok {
		attrs = append(attrs, slog.String("container", bounded(r.GetID())))
	}
	if r, ok := request.(interface{ GetExecID() string }); ok && r.GetExecID() != "" {
		attrs = append(attrs, slog.String("exec", bounded(r.GetExecID())))
	}
	if err != nil {
		attrs = append(attrs, slog.Any("error", err))
	}
	s.log.LogAttrs(context.Background(), level, "task call", attrs...)
}

func bounded(text string) string { return text[:min(len(text), 128)] }

// checkIDs checks the ids of a request; an empty exec id is the container's first process.
func checkIDs(id, execID string) error {
	if err := container.CheckID("id", id); err != nil {
		return err
	}
	if execID == "" {
		return nil
	}
	return container.CheckID("exec_id", execID)
}

func (s *Service) state(_ context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	if err := checkIDs(r.GetID(), r.GetExecID()); err != nil {
		return nil, err
	}
	st, err := s.set.State(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	a := &task.StateResponse{
		ID: st.ID, ExecID: st.ExecID, Bundle: st.Bundle, Pid: st.PID,
		Stdin: st.IO.Stdin, Stdout: st.IO.Stdout, Stderr: st.IO.Stderr, Terminal: st.IO.Terminal,
	}
	switch st.Status {
	case container.Created:
		a.Status = tasktypes.Status_CREATED
	case container.Running:
		a.Status = tasktypes.Status_RUNNING
	case container.Paused:
		a.Status = tasktypes.Status_PAUSED
	case container.Stopped:
		a.Status = tasktypes.Status_STOPPED
		a.ExitStatus = st.Exit.Status
		a.ExitedAt = timestamppb.New(st.Exit.At)
	}
	return a, nil
}

func (s *Service) create(ctx context.Context, r *task.CreateTaskRequest) (*task.CreateTaskResponse, error) {
	if err := checkIDs(r.GetID(), ""); err != nil {
		return nil, err
	}
	if !filepath.IsAbs(r.GetBundle()) {
		return nil, fmt.Errorf("bundle: %q is not an absolute path: %w", bounded(r.GetBundle()), errdefs.ErrInvalidArgument)
	}
	if r.GetCheckpoint() != "" || r.GetParentCheckpoint() != "" {
		return nil, fmt.Errorf("checkpoint: restoring a container from a checkpoint is not supported in a virtual machine: %w", errdefs.ErrNotImplemented)
	}
	io, err := s.clientIO(r.GetStdin(), r.GetStdout(), r.GetStderr(), r.GetTerminal())
	if err != nil {
		return nil, err
	}
	rootfs, err := mounts(r.GetRootfs())
	if err != nil {
		return nil, err
	}
	pid, err := s.set.Create(ctx, container.CreateRequest{ID: r.GetID(), Bundle: r.GetBundle(), Rootfs: rootfs, IO: io})
	if err != nil {
		return nil, err
	}
	return &task.CreateTaskResponse{Pid: pid}, nil
}

func mounts(list []*apitypes.Mount) ([]container.Mount, error) {
	var result []container.Mount
	for i, m := range list {
		switch {
		case m.GetType() == "":
			return nil, fmt.Errorf("rootfs[%d].type: it is empty: %w", i, errdefs.ErrInvalidArgument)
		case m.GetTarget() != "" && m.GetTarget() != "/":
			return nil, fmt.Errorf("rootfs[%d].target: a mount at %q below the root is not supported: %w", i, bounded(m.GetTarget()), errdefs.ErrNotImplemented)
		}
		result = append(result, container.Mount{Type: m.GetType(), Source: m.GetSource(), Options: m.GetOptions()})
	}
	return result, nil
}

// clientIO refuses streams of another server: nobody would ever connect them here.
func (s *Service) clientIO(stdin, stdout, stderr string, terminal bool) (container.IO, error) {
	for _, n := range []struct{ field, name string }{{"stdin", stdin}, {"stdout", stdout}, {"stderr", stderr}} {
		address, query, found := strings.Cut(n.name, "?")
		if found && strings.Contains(query, "streaming_id=") && address != s.address {
			return container.IO{}, fmt.Errorf("%s: %q is not this pod's address, %s: %w", n.field, bounded(address), s.address, errdefs.ErrInvalidArgument)
		}
	}
	return container.IO{Stdin: stdin, Stdout: stdout, Stderr: stderr, Terminal: terminal}, nil
}

func (s *Service) start(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	if err := checkIDs(r.GetID(), r.GetExecID()); err != nil {
		return nil, err
	}
	pid, err := s.set.Start(ctx, r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	return &task.StartResponse{Pid: pid}, nil
}

func (s *Service) delete(ctx context.Context, r *task.DeleteRequest) (*task.DeleteResponse, error) {
	if err := checkIDs(r.GetID(), r.GetExecID()); err != nil {
		return nil, err
	}
	st, err := s.set.Delete(ctx, r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	return &task.DeleteResponse{Pid: st.PID, ExitStatus: st.Exit.Status, ExitedAt: timestamppb.New(st.Exit.At)}, nil
}

func (s *Service) pids(_ context.Context, r *task.PidsRequest) (*task.PidsResponse, error) {
	if err := checkIDs(r.GetID(), ""); err != nil {
		return nil, err
	}
	pids, err := s.set.Pids(r.GetID())
	if err != nil {
		return nil, err
	}
	a := &task.PidsResponse{}
	for _, pid := range pids {
		a.Processes = append(a.Processes, &tasktypes.ProcessInfo{Pid: pid})
	}
	return a, nil
}

func (s *Service) pause(ctx context.Context, r *task.PauseRequest) (*emptypb.Empty, error) {
	if err := checkIDs(r.GetID(), ""); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, s.set.Pause(ctx, r.GetID())
}

func (s *Service) resume(ctx context.Context, r *task.ResumeRequest) (*emptypb.Empty, error) {
	if err := checkIDs(r.GetID(), ""); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, s.set.Resume(ctx, r.GetID())
}

func (s *Service) checkpoint(_ context.Context, r *task.CheckpointTaskRequest) (*emptypb.Empty, error) {
	if err := checkIDs(r.GetID(), ""); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("checkpointing a container in a virtual machine: %w", errdefs.ErrNotImplemented)
}

func (s *Service) kill(ctx context.Context, r *task.KillRequest) (*emptypb.Empty, error) {
	if err := checkIDs(r.GetID(), r.GetExecID()); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, s.set.Kill(ctx, r.GetID(), r.GetExecID(), r.GetSignal(), r.GetAll())
}

func (s *Service) exec(ctx context.Context, r *task.ExecProcessRequest) (*emptypb.Empty, error) {
	if err := container.CheckID("id", r.GetID()); err != nil {
		return nil, err
	}
	if err := container.CheckID("exec_id", r.GetExecID()); err != nil {
		return nil, err
	}
	spec, err := jsonOf("spec", r.GetSpec(), "Process")
	if err != nil {
		return nil, err
	}
	io, err := s.clientIO(r.GetStdin(), r.GetStdout(), r.GetStderr(), r.GetTerminal())
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, s.set.Exec(ctx, container.ExecRequest{ID: r.GetID(), ExecID: r.GetExecID(), Spec: spec, IO: io})
}

// jsonOf returns the JSON of an OCI type in an Any. Clients differ in the type's URL, of which
// some send none; only a wrong name is refused.
func jsonOf(field string, a *anypb.Any, want string) ([]byte, error) {
	if len(a.GetValue()) == 0 {
		return nil, fmt.Errorf("%s: it is missing: %w", field, errdefs.ErrInvalidArgument)
	}
	url := a.GetTypeUrl()
	if name := url[strings.LastIndexByte(url, '/')+1:]; name != "" && name != want {
		return nil, fmt.Errorf("%s: it has type %q, want an OCI %s: %w", field, bounded(url), want, errdefs.ErrInvalidArgument)
	}
	return a.GetValue(), nil
}

func (s *Service) resizePty(ctx context.Context, r *task.ResizePtyRequest) (*emptypb.Empty, error) {
	if err := checkIDs(r.GetID(), r.GetExecID()); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, s.set.ResizePty(ctx, r.GetID(), r.GetExecID(), r.GetWidth(), r.GetHeight())
}

func (s *Service) closeIO(ctx context.Context, r *task.CloseIORequest) (*emptypb.Empty, error) {
	if err := checkIDs(r.GetID(), r.GetExecID()); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, s.set.CloseIO(ctx, r.GetID(), r.GetExecID(), r.GetStdin())
}

func (s *Service) update(ctx context.Context, r *task.UpdateTaskRequest) (*emptypb.Empty, error) {
	if err := checkIDs(r.GetID(), ""); err != nil {
		return nil, err
	}
	resources, err := jsonOf("resources", r.GetResources(), "LinuxResources")
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, s.set.Update(ctx, r.GetID(), resources)
}

func (s *Service) wait(ctx context.Context, r *task.WaitRequest) (*task.WaitResponse, error) {
	if err := checkIDs(r.GetID(), r.GetExecID()); err != nil {
		return nil, err
	}
	exit, err := s.set.Wait(ctx, r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	return &task.WaitResponse{ExitStatus: exit.Status, ExitedAt: timestamppb.New(exit.At)}, nil
}

func (s *Service) stats(ctx context.Context, r *task.StatsRequest) (*task.StatsResponse, error) {
	if err := checkIDs(r.GetID(), ""); err != nil {
		return nil, err
	}
	metrics, err := s.set.Stats(ctx, r.GetID())
	if err != nil {
		return nil, err
	}
	packed, err := pack(metrics)
	if err != nil {
		return nil, err
	}
	return &task.StatsResponse{Stats: packed}, nil
}

// connect tells no process ids of this daemon: a client might take it for the container's shim.
func (s *Service) connect(_ context.Context, r *task.ConnectRequest) (*task.ConnectResponse, error) {
	if err := checkIDs(r.GetID(), ""); err != nil {
		return nil, err
	}
	st, err := s.set.State(r.GetID(), "")
	if err != nil {
		return nil, err
	}
	return &task.ConnectResponse{TaskPid: st.PID, Version: "v3"}, nil
}

// shutdown comes once for every container after its Delete. It does nothing: the pod goes on.
func (s *Service) shutdown(context.Context, *task.ShutdownRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// pack wraps a message the way containerd does: the URL is the bare name.
func pack(m proto.Message) (*anypb.Any, error) {
	value, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("cannot encode %T: %w: %w", m, err, errdefs.ErrInternal)
	}
	return &anypb.Any{TypeUrl: string(m.ProtoReflect().Descriptor().FullName()), Value: value}, nil
}
