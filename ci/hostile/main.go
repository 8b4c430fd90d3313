// Hostile is an agent for the tests, PID 1 of a guest that was taken over. It calls home like the
// real agent and then breaks the rules, in the way that the kernel parameter "hostile" names:
//
//	hello-too-long    its hello claims a megabyte
//	hello-garbage     its hello is no message
//	answer-too-long   the answer to Setup claims four gigabytes
//	frame-too-long    after Setup, a frame that claims four gigabytes
//	wrong-stream      after Setup, an answer to a call that was never made
//	wrong-container   after Setup, an event about a container with a path for its id
//	multiplex         after Setup, bytes on the link that are no multiplex
package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/agent/devices"
	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/guest/protocol/mux"
)

func main() {
	if err := run(context.Background()); err != nil {
		fmt.Println("hostile:", err)
	}
	// The end of PID 1 would be a panic, which is another test.
	select {}
}

func run(ctx context.Context) error {
	for dir, kind := range map[string]string{"/proc": "proc", "/sys": "sysfs", "/dev": "devtmpfs"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(kind, dir, kind, 0, ""); err != nil && err != unix.EBUSY {
			return fmt.Errorf("cannot mount %s: %w", dir, err)
		}
	}
	if console, err := os.OpenFile("/dev/console", os.O_WRONLY, 0); err == nil {
		os.Stdout = console
	}
	parameters, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	mode := ""
	for _, word := range strings.Fields(string(parameters)) {
		if value, found := strings.CutPrefix(word, "hostile="); found {
			mode = value
		}
	}
	path, err := devices.Wait(ctx, "", func() (string, bool) { return devices.SerialPort(protocol.SerialPort) })
	if err != nil {
		return err
	}
	// The multiplex needs the runtime's poller, hence the descriptor opened without blocking.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot open %s: %w", path, err)
	}
	port := os.NewFile(uintptr(fd), path)
	fmt.Println("hostile agent ready:", mode)
	return mux.Serve(ctx, port, func(s *mux.Session) {
		if err := attack(ctx, s, mode, port); err != nil {
			fmt.Println("hostile:", err)
		}
	})
}

// attack serves one session of the host's.
func attack(ctx context.Context, s *mux.Session, mode string, port *os.File) error {
	a := &agent{mode: mode, port: port}
	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	protocol.RegisterSandboxService(server, a)
	go a.serve(ctx, s, server)

	home, err := s.Open(ctx, protocol.PortHello)
	if err != nil {
		return err
	}
	defer home.Close()
	switch mode {
	case "hello-too-long":
		_, err = home.Write(binary.BigEndian.AppendUint32(nil, 1<<20))
	case "hello-garbage":
		_, err = home.Write(append(binary.BigEndian.AppendUint32(nil, 16), "\xff\xff\xff\xff not a message"...))
	default:
		err = protocol.WriteMessage(home, &protocol.Hello{ProtocolVersion: protocol.Version, AgentVersion: "hostile", KernelRelease: "0"})
		if err == nil {
			err = protocol.ReadMessage(home, &protocol.HelloReply{})
		}
	}
	if err != nil {
		return err
	}
	<-s.Done()
	return nil
}

// agent is the Sandbox service, as far as a boot needs it.
type agent struct {
	protocol.SandboxService // the calls that no boot makes
	mode                    string
	port                    *os.File

	mu    sync.Mutex
	conns []net.Conn // the host's connections to the task port
}

// serve accepts the host's streams; all but those to the task port are left alone.
func (a *agent) serve(ctx context.Context, s *mux.Session, server *ttrpc.Server) {
	listener := &streams{conns: make(chan net.Conn), done: s.Done()}
	go server.Serve(ctx, listener)
	for {
		conn, port, err := s.Accept()
		if err != nil {
			return
		}
		if port != protocol.PortTask {
			continue
		}
		a.mu.Lock()
		a.conns = append(a.conns, conn)
		a.mu.Unlock()
		listener.conns <- conn
	}
}

// frame is the head of a ttrpc message: the length of its data, the stream, its type (2 is an
// answer) and flags.
func frame(length, stream uint32) []byte {
	head := binary.BigEndian.AppendUint32(nil, length)
	return append(binary.BigEndian.AppendUint32(head, stream), 2, 0)
}

// send writes bytes past the ttrpc server on all of the host's connections.
func (a *agent) send(data []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, conn := range a.conns {
		conn.Write(data)
	}
}

func (a *agent) Setup(context.Context, *protocol.SetupRequest) (*protocol.SetupResponse, error) {
	switch a.mode {
	case "answer-too-long":
		a.send(frame(0xffffffff, 1))
		select {} // never the true answer
	case "frame-too-long":
		a.later(func() { a.send(frame(0xffffffff, 1)) })
	case "wrong-stream":
		a.later(func() { a.send(frame(0, 0x7ffffff1)) })
	case "multiplex":
		a.later(func() { a.port.Write(make([]byte, 4096)) })
	}
	return &protocol.SetupResponse{}, nil
}

// later lets the pod become ready before the attack.
func (a *agent) later(attack func()) {
	go func() {
		time.Sleep(500 * time.Millisecond)
		fmt.Println("hostile agent attacks:", a.mode)
		attack()
	}()
}

func (a *agent) UpdateNetwork(context.Context, *protocol.UpdateNetworkRequest) (*protocol.UpdateNetworkResponse, error) {
	return &protocol.UpdateNetworkResponse{}, nil
}

func (a *agent) SetClock(context.Context, *protocol.SetClockRequest) (*protocol.SetClockResponse, error) {
	return &protocol.SetClockResponse{}, nil
}

func (a *agent) Events(ctx context.Context, _ *protocol.EventsRequest, stream protocol.Sandbox_EventsServer) error {
	if a.mode == "wrong-container" {
		time.Sleep(500 * time.Millisecond)
		fmt.Println("hostile agent attacks:", a.mode)
		return stream.Send(&protocol.Event{Event: &protocol.Event_OomContainerId{OomContainerId: "../../../etc/passwd"}})
	}
	<-ctx.Done()
	return nil
}

// streams is a net.Listener of the streams that were opened to one port.
type streams struct {
	conns chan net.Conn
	done  <-chan struct{}
}

func (s *streams) Accept() (net.Conn, error) {
	select {
	case conn := <-s.conns:
		return conn, nil
	case <-s.done:
		return nil, net.ErrClosed
	}
}

func (s *streams) Close() error   { return nil }
func (s *streams) Addr() net.Addr { return &net.UnixAddr{Name: "task", Net: "unix"} }
