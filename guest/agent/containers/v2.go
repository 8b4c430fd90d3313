package containers

import (
	"context"

	taskv2 "github.com/containerd/containerd/api/runtime/task/v2"
	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	"google.golang.org/protobuf/types/known/emptypb"
)

// V2 serves the same containers by version 2 of the Task API, whose messages are those of
// version 3 under another name.
func (s *Service) V2() taskv2.TTRPCTaskService { return v2{s} }

type v2 struct{ *Service }

func (s v2) State(ctx context.Context, r *taskv2.StateRequest) (*taskv2.StateResponse, error) {
	a, err := s.Service.State(ctx, &taskv3.StateRequest{ID: r.ID, ExecID: r.ExecID})
	if err != nil {
		return nil, err
	}
	return &taskv2.StateResponse{
		ID: a.ID, Bundle: a.Bundle, Pid: a.Pid, Status: a.Status, Stdin: a.Stdin, Stdout: a.Stdout, Stderr: a.Stderr,
		Terminal: a.Terminal, ExitStatus: a.ExitStatus, ExitedAt: a.ExitedAt, ExecID: a.ExecID,
	}, nil
}

func (s v2) Create(ctx context.Context, r *taskv2.CreateTaskRequest) (*taskv2.CreateTaskResponse, error) {
	a, err := s.Service.Create(ctx, &taskv3.CreateTaskRequest{
		ID: r.ID, Bundle: r.Bundle, Rootfs: r.Rootfs, Terminal: r.Terminal, Stdin: r.Stdin, Stdout: r.Stdout,
		Stderr: r.Stderr, Checkpoint: r.Checkpoint, ParentCheckpoint: r.ParentCheckpoint, Options: r.Options,
	})
	if err != nil {
		return nil, err
	}
	return &taskv2.CreateTaskResponse{Pid: a.Pid}, nil
}

func (s v2) Start(ctx context.Context, r *taskv2.StartRequest) (*taskv2.StartResponse, error) {
	a, err := s.Service.Start(ctx, &taskv3.StartRequest{ID: r.ID, ExecID: r.ExecID})
	if err != nil {
		return nil, err
	}
	return &taskv2.StartResponse{Pid: a.Pid}, nil
}

func (s v2) Delete(ctx context.Context, r *taskv2.DeleteRequest) (*taskv2.DeleteResponse, error) {
	a, err := s.Service.Delete(ctx, &taskv3.DeleteRequest{ID: r.ID, ExecID: r.ExecID})
	if err != nil {
		return nil, err
	}
	return &taskv2.DeleteResponse{Pid: a.Pid, ExitStatus: a.ExitStatus, ExitedAt: a.ExitedAt}, nil
}

func (s v2) Pids(ctx context.Context, r *taskv2.PidsRequest) (*taskv2.PidsResponse, error) {
	a, err := s.Service.Pids(ctx, &taskv3.PidsRequest{ID: r.ID})
	if err != nil {
		return nil, err
	}
	return &taskv2.PidsResponse{Processes: a.Processes}, nil
}

func (s v2) Pause(ctx context.Context, r *taskv2.PauseRequest) (*emptypb.Empty, error) {
	return s.Service.Pause(ctx, &taskv3.PauseRequest{ID: r.ID})
}

func (s v2) Resume(ctx context.Context, r *taskv2.ResumeRequest) (*emptypb.Empty, error) {
	return s.Service.Resume(ctx, &taskv3.ResumeRequest{ID: r.ID})
}

func (s v2) Checkpoint(ctx context.Context, r *taskv2.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return s.Service.Checkpoint(ctx, &taskv3.CheckpointTaskRequest{ID: r.ID, Path: r.Path, Options: r.Options})
}

func (s v2) Kill(ctx context.Context, r *taskv2.KillRequest) (*emptypb.Empty, error) {
	return s.Service.Kill(ctx, &taskv3.KillRequest{ID: r.ID, ExecID: r.ExecID, Signal: r.Signal, All: r.All})
}

func (s v2) Exec(ctx context.Context, r *taskv2.ExecProcessRequest) (*emptypb.Empty, error) {
	return s.Service.Exec(ctx, &taskv3.ExecProcessRequest{
		ID: r.ID, ExecID: r.ExecID, Terminal: r.Terminal, Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Spec: r.Spec,
	})
}

func (s v2) ResizePty(ctx context.Context, r *taskv2.ResizePtyRequest) (*emptypb.Empty, error) {
	return s.Service.ResizePty(ctx, &taskv3.ResizePtyRequest{ID: r.ID, ExecID: r.ExecID, Width: r.Width, Height: r.Height})
}

func (s v2) CloseIO(ctx context.Context, r *taskv2.CloseIORequest) (*emptypb.Empty, error) {
	return s.Service.CloseIO(ctx, &taskv3.CloseIORequest{ID: r.ID, ExecID: r.ExecID, Stdin: r.Stdin})
}

func (s v2) Update(ctx context.Context, r *taskv2.UpdateTaskRequest) (*emptypb.Empty, error) {
	return s.Service.Update(ctx, &taskv3.UpdateTaskRequest{ID: r.ID, Resources: r.Resources, Annotations: r.Annotations})
}

func (s v2) Wait(ctx context.Context, r *taskv2.WaitRequest) (*taskv2.WaitResponse, error) {
	a, err := s.Service.Wait(ctx, &taskv3.WaitRequest{ID: r.ID, ExecID: r.ExecID})
	if err != nil {
		return nil, err
	}
	return &taskv2.WaitResponse{ExitStatus: a.ExitStatus, ExitedAt: a.ExitedAt}, nil
}

func (s v2) Stats(ctx context.Context, r *taskv2.StatsRequest) (*taskv2.StatsResponse, error) {
	a, err := s.Service.Stats(ctx, &taskv3.StatsRequest{ID: r.ID})
	if err != nil {
		return nil, err
	}
	return &taskv2.StatsResponse{Stats: a.Stats}, nil
}

func (s v2) Connect(ctx context.Context, r *taskv2.ConnectRequest) (*taskv2.ConnectResponse, error) {
	a, err := s.Service.Connect(ctx, &taskv3.ConnectRequest{ID: r.ID})
	if err != nil {
		return nil, err
	}
	return &taskv2.ConnectResponse{ShimPid: a.ShimPid, TaskPid: a.TaskPid, Version: "v2"}, nil
}

func (s v2) Shutdown(ctx context.Context, r *taskv2.ShutdownRequest) (*emptypb.Empty, error) {
	return s.Service.Shutdown(ctx, &taskv3.ShutdownRequest{ID: r.ID, Now: r.Now})
}
