package controller

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
)

// serviceName is shared by all dialects.
const serviceName = "containerd.services.sandbox.v1.Controller"

// maxRequest bounds a request, in bytes: 16 MiB and what goes around it. An Update may be as long as
// maxUpdate, a snapshot and what goes around that, because it may carry the specs of all containers of a
// pod. Longer ones are refused with ResourceExhausted, naming both sizes; beyond maxUpdate before they
// are read.
const (
	maxRequest = 16<<20 + 64<<10
	maxUpdate  = maxSnapshot + 1<<20
)

// Server serves a Controller.
type Server struct {
	grpc *grpc.Server
}

// NewServer returns a server of c.
func NewServer(c *Controller) *Server {
	s := grpc.NewServer(
		grpc.ForceServerCodecV2(rawCodec{}),
		grpc.MaxRecvMsgSize(maxUpdate),
	)
	desc := &grpc.ServiceDesc{ServiceName: serviceName}
	for _, m := range methods {
		desc.Methods = append(desc.Methods, grpc.MethodDesc{
			MethodName: string(m),
			Handler: func(_ any, ctx context.Context, receive func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
				var raw []byte
				if err := receive(&raw); err != nil {
					return nil, err
				}
				return c.serve(ctx, m, raw)
			},
		})
	}
	s.RegisterService(desc, nil)
	return &Server{grpc: s}
}

// Serve accepts connections on l until Close; it closes l.
func (s *Server) Serve(l net.Listener) error {
	err := s.grpc.Serve(l)
	if errors.Is(err, grpc.ErrServerStopped) {
		return nil
	}
	return err
}

// Close drops the listener and all connections at once. Calls that are under way get no answer,
// and that is meant so: to a client of Wait a broken connection says that the daemon is gone, while
// every answer, whatever its code, says that the pod is.
func (s *Server) Close() { s.grpc.Stop() }

// serve carries out one call in the dialect of its bytes. A panic becomes an error of this call, the
// other calls go on.
func (c *Controller) serve(ctx context.Context, m method, raw []byte) (reply any, err error) {
	defer func() {
		if r := recover(); r != nil {
			c.log.Error("a request made the daemon panic", "method", m, "panic", r, "stack", string(debug.Stack()))
			reply, err = nil, fmt.Errorf("%s: a defect of the daemon; its log has the details", m)
		}
		if m == wait {
			err = waitError(err)
		} else {
			err = rpcError(err)
		}
	}()
	if n := len(raw); n > maxRequest && m != update {
		return nil, fmt.Errorf("%s: the request is larger than max (%d vs. %d bytes): %w", m, n, maxRequest, errdefs.ErrResourceExhausted)
	}
	d := dialectOf(m, raw)
	req, err := d.decode(m, raw)
	if err != nil {
		return nil, err
	}
	req.client = d.client()
	res, err := c.do(ctx, m, req)
	if err != nil {
		return nil, err
	}
	return d.encode(m, res)
}

// rawCodec hands messages through as bytes, so that malformed ones reach a dialect, which can tell
// what is wrong with them.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	b, ok := v.([]byte)
	if !ok {
		return nil, fmt.Errorf("cannot send a %T", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(b)}, nil
}

func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	b, ok := v.(*[]byte)
	if !ok {
		return fmt.Errorf("cannot receive into a %T", v)
	}
	*b = data.Materialize()
	return nil
}
