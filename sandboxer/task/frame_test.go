package task

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
)

// recorded is what the ttrpc client sends for a call with an empty request.
var recorded = []byte("\x00\x00\x00\x1f\x00\x00\x00\x01\x01\x00" + "\x0a\x17containerd.task.v3.Task\x12\x04Wait")

func TestFrame(t *testing.T) {
	near, far := net.Pipe()
	client := ttrpc.NewClient(near)
	go client.Call(context.Background(), ServiceNames[0], "Wait", &emptypb.Empty{}, &emptypb.Empty{})
	sent := make([]byte, len(recorded))
	if _, err := io.ReadFull(far, sent); err != nil || !bytes.Equal(sent, recorded) {
		t.Errorf("the client sends %q, %v", sent, err)
	}
	client.Close()
	far.Close()

	f, ok, err := readFrame(bytes.NewReader(recorded), 0, int64(len(recorded)))
	if err != nil || !ok || f.stream != 1 || f.kind != kindRequest || f.flags != 0 || f.end() != int64(len(recorded)) {
		t.Fatalf("%+v, %v, %v", f, ok, err)
	}
	request := &ttrpc.Request{}
	if err := proto.Unmarshal(f.payload, request); err != nil || request.Service != ServiceNames[0] || request.Method != "Wait" {
		t.Errorf("%v, %v", request, err)
	}
	if !bytes.Equal(f.encode(), recorded) {
		t.Errorf("%q became %q", recorded, f.encode())
	}
	for n := range recorded {
		if _, ok, err := readFrame(bytes.NewReader(recorded[:n]), 0, int64(n)); ok || err != nil {
			t.Errorf("%d of %d bytes: %v, %v", n, len(recorded), ok, err)
		}
	}
	huge := []byte{0x00, 0x40, 0x00, 0x01, 0, 0, 0, 9, 1, 0}
	oversize := (*oversizeError)(nil)
	if _, _, err := readFrame(bytes.NewReader(huge), 0, headerSize); !errors.As(err, &oversize) || oversize.stream != 9 {
		t.Errorf("a frame of 4 MiB and a byte: %v", err)
	}
	huge[3] = 0
	if _, ok, err := readFrame(bytes.NewReader(huge), 0, headerSize); ok || err != nil {
		t.Errorf("the header of a frame of 4 MiB: %v, %v", ok, err)
	}
}

// FuzzFrame decodes anything: frames are what was put in, in order, or nothing.
func FuzzFrame(f *testing.F) {
	f.Add(recorded)
	f.Add(bytes.Repeat(recorded, 3))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 3, 5})
	f.Fuzz(func(t *testing.T, log []byte) {
		at, end := int64(0), int64(len(log))
		for {
			f, ok, err := readFrame(bytes.NewReader(log), at, end)
			if err != nil && log[at] == 0 && log[at+1] < 0x40 {
				t.Fatalf("a frame of %#x... at %d is refused: %v", log[at:at+4], at, err)
			}
			if err != nil || !ok {
				return
			}
			if !bytes.Equal(f.encode(), log[at:f.end()]) {
				t.Fatalf("%q became %+v", log[at:f.end()], f)
			}
			at = f.end()
		}
	})
}

// FuzzConnection sends anything to a server, and leaves. Whatever it was, the answers are frames, and
// nothing of the connection stays.
func FuzzConnection(f *testing.F) {
	request := func(stream uint32, service, method string) []byte {
		payload, _ := proto.Marshal(&ttrpc.Request{Service: service, Method: method})
		return frame{stream: stream, kind: kindRequest, payload: payload}.encode()
	}
	f.Add(recorded)
	f.Add(append(request(1, ServiceNames[0], "State"), request(3, ServiceNames[1], "Delete")...))
	f.Add(append(request(1, streamingService, streamMethod), frame{stream: 1, kind: kindData, payload: []byte("x")}.encode()...))
	f.Add(append(request(2, ServiceNames[0], "State"), frame{stream: 7, kind: kindData, flags: flagClosed | flagEmpty}.encode()...))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 3, 5})
	p := newPod(f)
	f.Fuzz(func(t *testing.T, sent []byte) {
		conn, err := net.Dial("unix", p.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		go func() {
			conn.Write(sent)
			conn.(*net.UnixConn).CloseWrite()
		}()
		var answers bytes.Buffer
		if _, err := answers.ReadFrom(conn); err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Fatal(err)
		}
		eventually(t, "the connection is forgotten", func() bool { return p.server.connections() == 0 })
		for at, end := int64(0), int64(answers.Len()); at < end; {
			f, ok, err := readFrame(bytes.NewReader(answers.Bytes()), at, end)
			if err != nil || !ok || f.kind != kindResponse && f.kind != kindData {
				t.Fatalf("%q was answered with %q: %v", sent, answers.Bytes()[at:], err)
			}
			at = f.end()
		}
	})
}
