// Package controller serves the sandbox API, gRPC service containerd.services.sandbox.v1.Controller,
// for all pods of the node.
//
// What arrives on the wire is kept apart from what it means: the server hands raw messages to a
// dialect, which decodes them into requests and encodes results, and Controller does the work. The
// service name is shared by clients that number the fields of its messages differently: containerd 2.x,
// iSulad 2.1.3 to 2.1.5, and iSulad from 2.1.6 on. Which one asks is told from the bytes of each request
// (see rules), so that all of them can use one socket at the same time.
package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/sandboxer/pod"
)

// Pods is what the controller needs; *pod.Manager has it.
type Pods interface {
	Create(ctx context.Context, req pod.CreateRequest) error
	Start(ctx context.Context, id string) (pod.Status, error)
	Stop(ctx context.Context, id string, grace time.Duration) error
	Shutdown(ctx context.Context, id string) error
	Status(id string) (pod.Status, error)
	Wait(ctx context.Context, id string) (pod.Status, error)
	Metrics(id string) (proto.Message, error)
}

// method is a call of the service.
type method string

const (
	create   method = "Create"
	start    method = "Start"
	platform method = "Platform"
	stop     method = "Stop"
	wait     method = "Wait"
	state    method = "Status"
	shutdown method = "Shutdown"
	measure  method = "Metrics"
	update   method = "Update"

	// Methods of iSulad 2.1.3 to 2.1.5 alone.
	prepare         method = "Prepare"
	purge           method = "Purge"
	updateResources method = "UpdateResources"
)

var methods = []method{
	create, start, platform, stop, wait, state, shutdown, measure, update, prepare, purge, updateResources,
}

// request is a decoded call; fields that a method does not have are zero.
type request struct {
	id      string
	client  pod.Client
	netns   string
	config  *cri.PodSandboxConfig
	cni     json.RawMessage
	timeout time.Duration
	verbose bool

	// tasks is the complete list of the pod's containers; nil unless an Update brings one.
	tasks []task
	// task is what Prepare announces: a container, or its only process.
	task *task
	// container and exec name what Purge withdraws.
	container, exec string
}

// result is what a call returns; a dialect encodes what its method's response has.
type result struct {
	pod.Status
	info    map[string]string
	metrics proto.Message
}

// Controller carries out the calls.
type Controller struct {
	pods       Pods
	containers Containers // nil if the pods do not have it
	snapshots  locks      // by pod: snapshots are followed one after the other
	log        *slog.Logger
}

// New returns a controller of pods. Pods that are Containers too are told what iSulad announces.
func New(pods Pods, log *slog.Logger) *Controller {
	containers, _ := pods.(Containers)
	return &Controller{pods: pods, containers: containers, log: log}
}

func (c *Controller) do(ctx context.Context, m method, req request) (result, error) {
	if req.id == "" && m != platform {
		return result{}, fmt.Errorf("sandbox_id is empty: %w", errdefs.ErrInvalidArgument)
	}
	res := result{Status: pod.Status{ID: req.id}}
	var err error
	switch m {
	case create:
		err = c.pods.Create(ctx, pod.CreateRequest{ID: req.id, Client: req.client, NetNS: req.netns, Config: req.config, CNI: req.cni})
	case start:
		res.Status, err = c.pods.Start(ctx, req.id)
	case stop:
		err = c.pods.Stop(ctx, req.id, req.timeout)
	case shutdown:
		err = c.pods.Shutdown(ctx, req.id)
	case wait:
		res.Status, err = c.pods.Wait(ctx, req.id)
	case state:
		res.Status, err = c.pods.Status(req.id)
		if err == nil && req.verbose {
			res.info, err = info(res.Status)
		}
	case measure:
		res.metrics, err = c.pods.Metrics(req.id)
	case update:
		if req.tasks != nil {
			err = c.follow(ctx, req.id, req.tasks)
		}
		// Other updates carry nothing that a running machine could follow, and clients make no
		// difference between a success and a refusal.
	case prepare:
		err = c.prepare(ctx, req.id, req.task)
	case purge:
		err = c.withdraw(ctx, req.id, req.container, req.exec)
	case platform, updateResources:
		// The platform is the same for all pods, and what asks for it wants to know whether the daemon
		// is there. Nothing is known to call the other.
	}
	return res, err
}

// info is what a verbose status tells beyond the plain one. The entry "info" is a JSON object whose
// keys CRI clients know; the other is for people.
func info(s pod.Status) (map[string]string, error) {
	known, err := json.Marshal(struct {
		PID           int             `json:"pid"`
		ProcessStatus string          `json:"processStatus"`
		NetNSClosed   bool            `json:"netNamespaceClosed"`
		Config        json.RawMessage `json:"config,omitempty"`
		CNIResult     json.RawMessage `json:"cniResult,omitempty"`
	}{s.PID, string(s.State), !s.ExitedAt.IsZero(), s.Config, s.CNI})
	if err != nil {
		return nil, fmt.Errorf("cannot encode the pod's status: %w", err)
	}
	stages := make(map[string]string, len(s.Stages))
	for _, t := range s.Stages {
		stages[t.Stage] = t.Duration.Round(time.Microsecond).String()
	}
	own, err := json.Marshal(struct {
		Hypervisor string            `json:"hypervisor"`
		NetNS      string            `json:"netns"`
		Stages     map[string]string `json:"bootStages"`
		Reason     string            `json:"reason,omitempty"`
		Held       string            `json:"held,omitempty"`
	}{s.Hypervisor, s.NetNS, stages, s.Reason, s.Held})
	if err != nil {
		return nil, fmt.Errorf("cannot encode the pod's status: %w", err)
	}
	return map[string]string{"info": string(known), "kuasar": string(own)}, nil
}

// maxMessage bounds the text of an error on the wire, in bytes: it travels in HTTP/2 headers.
const maxMessage = 4 << 10

// waitError is the error of a Wait that failed. Clients take any status of Wait as the pod's end,
// except for Unavailable, upon which they ask again; so that is the status of whatever says nothing of
// the pod.
func waitError(err error) error {
	switch s := status.Convert(rpcError(err)); s.Code() {
	case codes.OK, codes.NotFound, codes.InvalidArgument, codes.Unavailable:
		return s.Err()
	default:
		return status.Error(codes.Unavailable, s.Message())
	}
}

// rpcError gives err the status code of its class. The text crosses unchanged: it is what the user
// of crictl and the events of Kubernetes see.
func rpcError(err error) error {
	if err == nil {
		return nil
	}
	var code codes.Code
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		code = codes.ResourceExhausted
	default:
		code = status.Code(errgrpc.ToGRPC(errdefs.Resolve(err)))
		if code == codes.Unknown {
			code = codes.Internal
		}
	}
	text := strings.ToValidUTF8(err.Error(), "�")
	if len(text) > maxMessage {
		text = strings.ToValidUTF8(text[:maxMessage], "") + "…"
	}
	return status.Error(code, text)
}
