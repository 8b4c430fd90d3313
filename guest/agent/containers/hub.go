package containers

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/guest/protocol/stdio"
)

// streams are the connections to the host that carry standard streams, found by their names.
type streams interface {
	// check says why there can be no stream of that name, which is not empty. The others are called
	// with names only that it has accepted.
	check(name string) error
	output(name string) output
	input(name string) io.ReadCloser
	// expect has the host's end of a stream wait for its process until done is called.
	expect(name string) (done func())
}

// output is the guest's end of a standard output or error.
type output interface {
	// Write blocks while the host does not take what was written before.
	io.Writer
	// Close sends EOF and returns when the host has taken everything.
	Close(ctx context.Context) error
}

// hubStreams are those of the names stdio://<token>. Without a hub there are none.
type hubStreams struct{ hub *stdio.Hub }

func (h hubStreams) check(name string) error {
	if _, err := token(name); err != nil {
		return err
	}
	if h.hub == nil {
		return fmt.Errorf("standard stream %q: the agent has no connection for streams: %w", name, errdefs.ErrUnavailable)
	}
	return nil
}

func (h hubStreams) output(name string) output {
	t, _ := token(name)
	return h.hub.Output(t)
}

func (h hubStreams) input(name string) io.ReadCloser {
	t, _ := token(name)
	return h.hub.Input(t)
}

func (h hubStreams) expect(name string) func() {
	t, _ := token(name)
	return h.hub.Expect(t)
}

// token returns the token in the name of a stream.
func token(name string) (string, error) {
	t, ok := strings.CutPrefix(name, protocol.StdioScheme)
	if !ok || t == "" {
		return "", fmt.Errorf("standard stream %q is not of the form %s<token>: %w", name, protocol.StdioScheme, errdefs.ErrInvalidArgument)
	}
	return t, nil
}

// endStreams ends the streams of a process that will not be: readers get EOF.
func endStreams(s streams, names stdioNames) {
	for i, name := range names.all() {
		switch {
		case name == "" || s.check(name) != nil:
		case i == 0:
			s.input(name).Close()
		default:
			endOutput(s.output(name))
		}
	}
}
