package containers

import (
	"context"
	"io"

	"kuasar.io/kuasar/guest/protocol/stdio"
)

// streams are the connections to the host that carry standard streams, found by their tokens.
type streams interface {
	output(token string) output
	input(token string) io.ReadCloser
}

// output is the guest's end of a standard output or error.
type output interface {
	// Write blocks while the host does not take what was written before.
	io.Writer
	// Close sends EOF and returns when the host has taken everything.
	Close(ctx context.Context) error
}

type hubStreams struct{ hub *stdio.Hub }

func (h hubStreams) output(token string) output       { return h.hub.Output(token) }
func (h hubStreams) input(token string) io.ReadCloser { return h.hub.Input(token) }
