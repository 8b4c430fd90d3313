package pod

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync/atomic"

	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/guestlink"
)

// Guest is the agent of one pod.
type Guest struct {
	link    guestlink.Link
	client  *ttrpc.Client
	task    taskv3.TTRPCTaskService
	sandbox protocol.SandboxClient
	closing atomic.Bool
	gone    atomic.Bool // the connection for calls ended, whoever ended it
	hello   *protocol.Hello
}

// connectGuest opens the connection for calls to the agent that said hello. lost is called once if it ends without Close.
func connectGuest(ctx context.Context, link guestlink.Link, hello *protocol.Hello, lost func(error)) (*Guest, error) {
	conn, err := link.Dial(ctx, protocol.PortTask)
	if err != nil {
		return nil, fmt.Errorf("cannot connect to the agent's task port: %w", err)
	}
	g := &Guest{link: link, hello: hello}
	guarded := &guard{Conn: conn}
	g.client = ttrpc.NewClient(guarded, ttrpc.WithOnClose(func() {
		g.gone.Store(true)
		if err := guarded.broken(); err != nil {
			lost(err)
		} else if !g.closing.Load() {
			lost(errors.New("the connection for calls to the agent was lost"))
		}
	}))
	g.task = taskv3.NewTTRPCTaskClient(g.client)
	g.sandbox = protocol.NewSandboxClient(g.client)
	return g, nil
}

// Task is the agent's task API, version 3.
func (g *Guest) Task() taskv3.TTRPCTaskService { return g.task }

// Has tells whether the agent announced a feature beyond its version of the protocol. Agents of pods
// that were booted by an older daemon lack those that are new.
func (g *Guest) Has(feature string) bool { return slices.Contains(g.hello.GetFeatures(), feature) }

// Sandbox is the agent's private service. Its Events belong to the pod.
func (g *Guest) Sandbox() protocol.SandboxService { return sandboxService{g.sandbox} }

// sandboxService makes the client's side look like the server's.
type sandboxService struct{ protocol.SandboxClient }

func (sandboxService) Events(context.Context, *protocol.EventsRequest, protocol.Sandbox_EventsServer) error {
	return errdefs.ErrNotImplemented
}

// Dial opens a stream to a port of the guest; the caller closes it. The error wraps net.ErrClosed
// when the guest is gone.
func (g *Guest) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	if g.closing.Load() {
		return nil, fmt.Errorf("cannot dial port %d of the guest: the pod is stopped: %w", port, net.ErrClosed)
	}
	conn, err := g.link.Dial(ctx, port)
	if err == nil || errors.Is(err, net.ErrClosed) {
		return conn, err
	}
	gone := g.gone.Load() // over vsock nothing else tells
	select {
	case <-g.link.Broken():
		gone = true
	default:
	}
	if gone {
		err = fmt.Errorf("%w: %w", err, net.ErrClosed)
	}
	return nil, err
}

// close ends the connection for calls. Calls that are under way fail.
func (g *Guest) close() error {
	g.closing.Store(true)
	return g.client.Close()
}

// goneGuest stands for the guest of a pod whose machine has ended: every call fails.
func goneGuest() *Guest {
	near, far := net.Pipe()
	far.Close()
	g := &Guest{client: ttrpc.NewClient(near)}
	g.task = taskv3.NewTTRPCTaskClient(g.client)
	g.sandbox = protocol.NewSandboxClient(g.client)
	_ = g.close()
	return g
}

// events hands the guest's events to containers until the connection ends or the guest sends
// something that makes no sense, which is returned.
func (g *Guest) events(ctx context.Context, containers Containers) error {
	// A stream that breaks is no news: the loss of the connection is noticed by connectGuest.
	stream, err := g.sandbox.Events(ctx, &protocol.EventsRequest{})
	if err != nil {
		return nil
	}
	for {
		event, err := stream.Recv()
		if err != nil {
			return nil
		}
		if id := event.GetOomContainerId(); id != "" {
			if err := CheckID(id); err != nil {
				return errors.New("the guest reported an OOM kill of a container with an impossible id")
			}
			containers.OOM(id)
		}
		if d := event.GetDeleted(); d != nil {
			if err := CheckID(d.GetContainerId()); err != nil {
				return errors.New("the guest reported the deletion of a container with an impossible id")
			}
			containers.Deleted(d.GetContainerId(), d.GetAnnouncement())
		}
	}
}
