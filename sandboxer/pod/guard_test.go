package pod

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"kuasar.io/kuasar/guest/protocol"
)

func header(length, stream uint32, kind byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, length)
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(b, kind, 0)
}

// rawLink is a link to an agent that answers with bytes of its own.
type rawLink struct{ conn net.Conn }

func (l rawLink) Hello(context.Context) (*protocol.Hello, error) { return nil, errors.New("no") }
func (l rawLink) Dial(context.Context, uint32) (net.Conn, error) { return l.conn, nil }
func (l rawLink) Broken() <-chan struct{}                        { return nil }
func (l rawLink) Close() error                                   { return nil }

func TestHostileFrames(t *testing.T) {
	for name, c := range map[string]struct {
		answer []byte
		want   string
	}{
		"too long":        {header(1<<32-1, 1, frameResponse), "claims 4294967295 bytes"},
		"just too long":   {header(maxAnswer+1, 1, frameResponse), "more than"},
		"never called":    {header(0, 3, frameResponse), "call 3, which was never made"},
		"even stream":     {header(0, 0, frameResponse), "never made"},
		"request":         {header(0, 1, 1), "type 1"},
		"behind a proper": {append(header(0, 1, frameData), header(0, 99, frameResponse)...), "call 99"},
	} {
		t.Run(name, func(t *testing.T) {
			near, far := net.Pipe()
			lost := make(chan error, 1)
			g, err := connectGuest(t.Context(), rawLink{near}, nil, func(err error) { lost <- err })
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				// The call has to be there before it can be answered.
				io.ReadFull(far, make([]byte, frameHeader))
				go io.Copy(io.Discard, far)
				for _, b := range c.answer { // in the smallest pieces
					if _, err := far.Write([]byte{b}); err != nil {
						return
					}
				}
			}()
			if _, err := g.Sandbox().SetClock(t.Context(), &protocol.SetClockRequest{}); err == nil {
				t.Error("the call succeeded")
			}
			select {
			case err := <-lost:
				if !strings.Contains(err.Error(), c.want) {
					t.Errorf("lost for %v, want %q", err, c.want)
				}
			case <-time.After(10 * time.Second):
				t.Fatal("the connection goes on")
			}
		})
	}
}

func TestFramesInAnyPieces(t *testing.T) {
	var stream []byte
	for i := range uint32(20) {
		stream = append(stream, header(i, 2*i+1, frameResponse)...)
		stream = append(stream, make([]byte, i)...)
	}
	for size := 1; size <= len(stream); size++ {
		var s frames
		var n uint32
		for rest := stream; len(rest) > 0; {
			piece := rest[:min(size, len(rest))]
			rest = rest[len(piece):]
			if err := s.scan(piece, func(f frame) error {
				if f.length != n || f.stream != 2*n+1 || f.kind != frameResponse {
					t.Fatalf("pieces of %d: frame %d is %+v", size, n, f)
				}
				n++
				return nil
			}); err != nil {
				t.Fatal(err)
			}
		}
		if n != 20 {
			t.Errorf("pieces of %d: %d frames", size, n)
		}
	}
}
