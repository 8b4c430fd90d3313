package controller

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	containerdtypes "github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	goruntime "runtime"

	"kuasar.io/kuasar/sandboxer/pod"
)

// containerd is the dialect of containerd 2.x.
type containerd struct{}

func (containerd) client() pod.Client { return pod.Containerd }

// States of a sandbox; every other text counts as not ready.
const (
	stateReady    = "SANDBOX_READY"
	stateNotReady = "SANDBOX_NOTREADY"
)

func (containerd) decode(m method, raw []byte) (request, error) {
	switch m {
	case create:
		var r sandboxapi.ControllerCreateRequest
		if err := unmarshal(m, raw, &r); err != nil {
			return request{}, err
		}
		config, err := podConfig(r.GetOptions())
		if err != nil {
			return request{}, err
		}
		return request{
			id: r.GetSandboxID(), netns: r.GetNetnsPath(), config: config,
			cni: cniResult(r.GetSandbox().GetExtensions()["metadata"]),
		}, nil
	case start:
		var r sandboxapi.ControllerStartRequest
		err := unmarshal(m, raw, &r)
		return request{id: r.GetSandboxID()}, err
	case platform:
		var r sandboxapi.ControllerPlatformRequest
		err := unmarshal(m, raw, &r)
		return request{id: r.GetSandboxID()}, err
	case stop:
		var r sandboxapi.ControllerStopRequest
		err := unmarshal(m, raw, &r)
		return request{id: r.GetSandboxID(), timeout: time.Duration(r.GetTimeoutSecs()) * time.Second}, err
	case wait:
		var r sandboxapi.ControllerWaitRequest
		err := unmarshal(m, raw, &r)
		return request{id: r.GetSandboxID()}, err
	case state:
		var r sandboxapi.ControllerStatusRequest
		err := unmarshal(m, raw, &r)
		return request{id: r.GetSandboxID(), verbose: r.GetVerbose()}, err
	case shutdown:
		var r sandboxapi.ControllerShutdownRequest
		err := unmarshal(m, raw, &r)
		return request{id: r.GetSandboxID()}, err
	case measure:
		var r sandboxapi.ControllerMetricsRequest
		err := unmarshal(m, raw, &r)
		return request{id: r.GetSandboxID()}, err
	case update:
		var r sandboxapi.ControllerUpdateRequest
		if err := unmarshal(m, raw, &r); err != nil {
			return request{}, err
		}
		req := request{id: r.GetSandboxID()}
		var err error
		if slices.Contains(r.GetFields(), tasksField) {
			req.tasks, err = snapshot(r.GetSandbox().GetExtensions()["tasks"])
		}
		return req, err
	}
	return request{}, fmt.Errorf("method %s: %w", m, errdefs.ErrNotImplemented)
}

func unmarshal(m method, raw []byte, message proto.Message) error {
	if err := proto.Unmarshal(raw, message); err != nil {
		return fmt.Errorf("cannot decode the request of %s (%s): %w: %w",
			m, message.ProtoReflect().Descriptor().Name(), err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// podConfig decodes the field options of Create.
func podConfig(options *anypb.Any) (*cri.PodSandboxConfig, error) {
	config := new(cri.PodSandboxConfig)
	if options == nil {
		return config, nil
	}
	const want = "runtime.v1.PodSandboxConfig"
	url := options.GetTypeUrl()
	if name := url[strings.LastIndexByte(url, '/')+1:]; name != "" && name != want {
		return nil, fmt.Errorf("options: type_url is %.100q, not %s: %w", url, want, errdefs.ErrInvalidArgument)
	}
	if err := proto.Unmarshal(options.GetValue(), config); err != nil {
		return nil, fmt.Errorf("options: cannot decode %s: %w: %w", want, err, errdefs.ErrInvalidArgument)
	}
	return config, nil
}

// cniResult picks the CNI result out of what containerd's CRI keeps of the sandbox. It is shown to
// people only; nothing depends on it, and its form is no promise of containerd's, so whatever cannot
// be understood is left out.
func cniResult(metadata *anypb.Any) json.RawMessage {
	var m struct {
		Metadata struct{ CNIResult json.RawMessage }
	}
	if err := json.Unmarshal(metadata.GetValue(), &m); err != nil {
		return nil
	}
	return m.Metadata.CNIResult
}

func (containerd) encode(m method, r result) ([]byte, error) {
	var message proto.Message
	switch m {
	case create:
		message = &sandboxapi.ControllerCreateResponse{SandboxID: r.ID}
	case start:
		message = &sandboxapi.ControllerStartResponse{
			SandboxID: r.ID, Pid: uint32(r.PID), CreatedAt: timestamp(r.CreatedAt), Address: r.Address, Version: r.Version,
		}
	case platform:
		message = &sandboxapi.ControllerPlatformResponse{
			Platform: &containerdtypes.Platform{OS: "linux", Architecture: goruntime.GOARCH},
		}
	case stop:
		message = &sandboxapi.ControllerStopResponse{}
	case wait:
		message = &sandboxapi.ControllerWaitResponse{ExitStatus: r.ExitStatus, ExitedAt: timestamp(r.ExitedAt)}
	case state:
		s := stateNotReady
		if r.State == pod.Ready {
			s = stateReady
		}
		message = &sandboxapi.ControllerStatusResponse{
			SandboxID: r.ID, Pid: uint32(r.PID), State: s, Info: r.info,
			CreatedAt: timestamp(r.CreatedAt), ExitedAt: timestamp(r.ExitedAt), Address: r.Address, Version: r.Version,
		}
	case shutdown:
		message = &sandboxapi.ControllerShutdownResponse{}
	case measure:
		data, err := typeurl.MarshalAnyToProto(r.metrics)
		if err != nil {
			return nil, fmt.Errorf("cannot encode the pod's metrics: %w", err)
		}
		message = &sandboxapi.ControllerMetricsResponse{Metrics: &containerdtypes.Metric{
			Timestamp: timestamppb.Now(), ID: r.ID, Data: data,
		}}
	case update:
		message = &sandboxapi.ControllerUpdateResponse{}
	default:
		return nil, errors.New("no response for method " + string(m))
	}
	return proto.Marshal(message)
}

// timestamp is nil for the zero time.
func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
