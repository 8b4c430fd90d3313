// Package guestlink is the connection from the daemon to the agent of one guest. Whatever carries
// it (vsock, or one virtio-serial port with a multiplexer on it), the rest of the daemon sees the
// same: wait for the hello, then Dial ports.
package guestlink

import (
	"context"
	"net"

	"kuasar.io/kuasar/guest/protocol"
)

// Link is the connection to one guest. Close ends it and everything dialled through it.
type Link interface {
	// Hello waits until the agent has called home and returns what it said. It returns early
	// with an error when ctx ends or the link is closed. The caller must watch the machine's
	// Exited at the same time: a link cannot tell a slow boot from a dead one.
	Hello(ctx context.Context) (*protocol.Hello, error)
	// Dial opens a stream to a port of the guest (protocol.Port*). The caller closes it.
	// CloseWrite is a method of the returned connection's dynamic type.
	Dial(ctx context.Context, port uint32) (net.Conn, error)
	// Broken is closed when the transport has failed for good; pods treat it as the death of
	// the agent.
	Broken() <-chan struct{}
	Close() error
}
