package controller

import (
	"errors"
	"fmt"
	goruntime "runtime"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"kuasar.io/kuasar/sandboxer/container"
	"kuasar.io/kuasar/sandboxer/controller/isulad"
	"kuasar.io/kuasar/sandboxer/pod"
)

// isulad216 is the dialect of iSulad 2.1.6 and later: the numbers of containerd 2.x, and updates that
// tell of the pod's containers.
type isulad216 struct{ containerd }

func (isulad216) client() pod.Client { return pod.ISulad216 }

// isulad213 is the dialect of iSulad 2.1.3 to 2.1.5, which has numbers and methods of its own.
type isulad213 struct{}

func (isulad213) client() pod.Client { return pod.ISulad213 }

func (isulad213) decode(m method, raw []byte) (request, error) {
	switch m {
	case create:
		var r isulad.ControllerCreateRequest
		if err := unmarshal(m, raw, &r); err != nil {
			return request{}, err
		}
		config, err := podConfig(r.GetOptions())
		return request{id: r.GetSandboxId(), netns: r.GetNetnsPath(), config: config}, err
	case start:
		var r isulad.ControllerStartRequest
		err := unmarshal(m, raw, &r)
		return request{id: r.GetSandboxId()}, err
	case platform:
		var r isulad.ControllerPlatformRequest
		err := unmarshal(m, raw, &r)
		return request{id: r.GetSandboxId()}, err
	case stop:
		var r isulad.ControllerStopRequest
		err := unmarshal(m, raw, &r)
		return request{id: r.GetSandboxId(), timeout: time.Duration(r.GetTimeoutSecs()) * time.Second}, err
	case wait:
		var r isulad.ControllerWaitRequest
		err := unmarshal(m, raw, &r)
		return request{id: r.GetSandboxId()}, err
	case state:
		var r isulad.ControllerStatusRequest
		err := unmarshal(m, raw, &r)
		return request{id: r.GetSandboxId(), verbose: r.GetVerbose()}, err
	case shutdown:
		var r isulad.ControllerShutdownRequest
		err := unmarshal(m, raw, &r)
		return request{id: r.GetSandboxId()}, err
	case prepare:
		var r isulad.ControllerPrepareRequest
		if err := unmarshal(m, raw, &r); err != nil {
			return request{}, err
		}
		t, err := prepared(&r)
		return request{id: r.GetSandboxId(), task: t}, err
	case purge:
		var r isulad.ControllerPurgeRequest
		if err := unmarshal(m, raw, &r); err != nil {
			return request{}, err
		}
		return request{id: r.GetSandboxId(), container: r.GetContainerId(), exec: r.GetExecId()},
			checkIDs(r.GetContainerId(), r.GetExecId())
	case updateResources:
		var r isulad.ControllerUpdateResourcesRequest
		if err := unmarshal(m, raw, &r); err != nil {
			return request{}, err
		}
		return request{id: r.GetSandboxId(), container: r.GetContainerId()}, checkIDs(r.GetContainerId(), "")
	}
	return request{}, fmt.Errorf("method %s: %w", m, errdefs.ErrNotImplemented)
}

// prepared is the container, or the process in one, that r announces.
func prepared(r *isulad.ControllerPrepareRequest) (*task, error) {
	if err := checkIDs(r.GetContainerId(), r.GetExecId()); err != nil {
		return nil, err
	}
	spec := r.GetSpec().GetValue()
	if err := checkSpec(spec); err != nil {
		return nil, fmt.Errorf("container %s: %w", r.GetContainerId(), err)
	}
	io := container.IO{Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(), Terminal: r.GetTerminal()}
	if r.GetExecId() != "" {
		return &task{
			CreateRequest: container.CreateRequest{ID: r.GetContainerId()},
			processes:     []container.ExecRequest{{ID: r.GetContainerId(), ExecID: r.GetExecId(), Spec: spec, IO: io}},
		}, nil
	}
	t := &task{CreateRequest: container.CreateRequest{ID: r.GetContainerId(), Spec: spec, IO: io}}
	for _, m := range r.GetRootfs() {
		t.Rootfs = append(t.Rootfs, container.Mount{Type: m.GetType(), Source: m.GetSource(), Options: m.GetOptions()})
	}
	return t, nil
}

// checkIDs checks the id of a container and, unless it is empty, of a process.
func checkIDs(id, exec string) error {
	if err := container.CheckID("container_id", id); err != nil {
		return err
	}
	if exec == "" {
		return nil
	}
	return container.CheckID("exec_id", exec)
}

func (isulad213) encode(m method, r result) ([]byte, error) {
	var message proto.Message
	switch m {
	case create:
		message = &isulad.ControllerCreateResponse{SandboxId: r.ID}
	case start:
		message = &isulad.ControllerStartResponse{
			SandboxId: r.ID, Pid: uint32(r.PID), CreatedAt: timestamp(r.CreatedAt), TaskAddress: r.Address,
		}
	case platform:
		message = &isulad.ControllerPlatformResponse{Platform: &isulad.Platform{Os: "linux", Architecture: goruntime.GOARCH}}
	case stop:
		message = &isulad.ControllerStopResponse{}
	case wait:
		message = &isulad.ControllerWaitResponse{ExitStatus: r.ExitStatus, ExitedAt: timestamp(r.ExitedAt)}
	case state:
		s := stateNotReady
		if r.State == pod.Ready {
			s = stateReady
		}
		message = &isulad.ControllerStatusResponse{
			SandboxId: r.ID, Pid: uint32(r.PID), State: s, TaskAddress: r.Address, Info: r.info,
			CreatedAt: timestamp(r.CreatedAt), ExitedAt: timestamp(r.ExitedAt),
		}
	case shutdown:
		message = &isulad.ControllerShutdownResponse{}
	case prepare:
		message = &isulad.ControllerPrepareResponse{}
	case purge:
		message = &isulad.ControllerPurgeResponse{}
	case updateResources:
		message = &isulad.ControllerUpdateResourcesResponse{}
	default:
		return nil, errors.New("no response for method " + string(m))
	}
	return proto.Marshal(message)
}
