// Package vmtest is for tests of the hypervisor drivers and of what stands on them: a QMP server on a
// real Unix socket that is as strict as the strictest hypervisor, and a stand-in for QEMU's program
// that checks the command line it is given and fails wherever it is told to.
package vmtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// maxRequest is the longest request that the server takes, in bytes; StratoVirt's limit.
const maxRequest = 8192

// maxPerSecond is how many requests StratoVirt takes in a second.
const maxPerSecond = 100

// Refusal is an error answer of a Handler. Any other error is sent as a GenericError.
type Refusal struct{ Class, Desc string }

func (r *Refusal) Error() string { return r.Desc }

// Handler runs one command. file is the descriptor that came with it, or nil; the handler owns it.
// The result is encoded as the answer; nil stands for an empty object.
type Handler func(args json.RawMessage, file *os.File) (any, error)

// Server is a QMP server for one client at a time. It takes requests as StratoVirt does: what one
// read returns must be exactly one JSON document with no unknown key, and ids must be strings.
type Server struct {
	// Silent makes the server accept connections and never greet.
	Silent bool
	// Greeting is sent instead of one, if it is not nil.
	Greeting []byte
	// GarbageOn is a command that is answered with what is no JSON.
	GarbageOn string
	// Commands are what it knows beside qmp_capabilities. Set them before Serve.
	Commands map[string]Handler
	// StratoVirt is the version of StratoVirt whose greeting it has, and who does not name the id of a
	// request that it cannot parse, which includes unknown commands; empty means QEMU's.
	StratoVirt string
	// DieAfter makes OnDie be called instead of answering the n-th command after
	// qmp_capabilities; 0 means never.
	DieAfter int
	OnDie    func()

	mu       sync.Mutex
	conn     *net.UnixConn
	executed []string
}

type request struct {
	Execute   string          `json:"execute"`
	Arguments json.RawMessage `json:"arguments,omitempty"`
	ID        *string         `json:"id"`
}

// Serve accepts clients, one after the other, until l is closed.
func (s *Server) Serve(l *net.UnixListener) error {
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		s.mu.Lock()
		s.conn = conn
		s.mu.Unlock()
		s.serve(conn)
		s.mu.Lock()
		s.conn = nil
		s.mu.Unlock()
		conn.Close()
	}
}

// Executed returns the commands that were understood, in their order.
func (s *Server) Executed() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.executed...)
}

// Emit sends an event to the client, if one is connected.
func (s *Server) Emit(name string, data any) {
	s.send(map[string]any{
		"event": name, "data": data,
		"timestamp": map[string]int64{"seconds": 1, "microseconds": 2},
	})
}

// Raw sends bytes as they are.
func (s *Server) Raw(b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != nil {
		s.conn.Write(b)
	}
}

func (s *Server) send(v any) {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // a Handler returned what JSON cannot say
	}
	s.Raw(append(b, '\r', '\n'))
}

func (s *Server) serve(conn *net.UnixConn) {
	if s.Silent {
		io.Copy(io.Discard, conn)
		return
	}
	release, name, capabilities := map[string]int{"micro": 22, "minor": 2, "major": 7}, "stand-in", []string{"oob"}
	if s.StratoVirt != "" {
		release, name, capabilities = map[string]int{"micro": 1, "minor": 0, "major": 5}, "StratoVirt-"+s.StratoVirt, []string{}
	}
	if s.Greeting != nil {
		s.Raw(s.Greeting)
	} else {
		s.send(map[string]any{"QMP": map[string]any{
			"version":      map[string]any{"qemu": release, "package": name},
			"capabilities": capabilities,
		}})
	}
	buf := make([]byte, maxRequest+1)
	oob := make([]byte, syscall.CmsgSpace(4*8))
	count := 0
	var second time.Time // in which there were requests, and how many
	requests := 0
	for {
		n, oobn, _, _, err := conn.ReadMsgUnix(buf, oob)
		if err != nil || n == 0 {
			return
		}
		file := receivedFile(oob[:oobn])
		if now := time.Now(); now.Sub(second) >= time.Second {
			second, requests = now, 0
		}
		if requests++; s.StratoVirt != "" && requests > maxPerSecond {
			s.send(refusal(nil, &Refusal{"OperationThrottled", "more than 100 requests in a second"}))
			if file != nil {
				file.Close()
			}
			continue
		}
		req, err := parseRequest(buf[:n])
		if err != nil {
			// Without the id, as StratoVirt.
			s.send(refusal(nil, err))
			if file != nil {
				file.Close()
			}
			continue
		}
		if req.Execute != "qmp_capabilities" {
			if count++; count == s.DieAfter {
				s.OnDie()
				return
			}
		}
		s.answer(req, file)
	}
}

func (s *Server) answer(req *request, file *os.File) {
	if req.Execute == s.GarbageOn {
		s.Raw([]byte("\x00\xff{{{ garbage\r\n"))
		return
	}
	s.mu.Lock()
	s.executed = append(s.executed, req.Execute)
	s.mu.Unlock()
	var result any
	var err error
	if handler := s.Commands[req.Execute]; handler != nil {
		result, err = handler(req.Arguments, file)
	} else {
		if file != nil {
			file.Close()
		}
		if req.Execute != "qmp_capabilities" {
			err = &Refusal{"CommandNotFound", fmt.Sprintf("The command %s has not been found", req.Execute)}
		}
	}
	if err != nil {
		id := req.ID
		var parse *unparsed
		if s.StratoVirt != "" && (errors.As(err, &parse) || s.Commands[req.Execute] == nil) {
			id = nil
		}
		s.send(refusal(id, err))
		return
	}
	if result == nil {
		result = struct{}{}
	}
	reply := map[string]any{"return": result}
	if req.ID != nil {
		reply["id"] = *req.ID
	}
	s.send(reply)
}

func refusal(id *string, err error) map[string]any {
	var r *Refusal
	if !errors.As(err, &r) {
		r = &Refusal{"GenericError", err.Error()}
	}
	reply := map[string]any{"error": map[string]string{"class": r.Class, "desc": r.Desc}}
	if id != nil {
		reply["id"] = *id
	}
	return reply
}

func parseRequest(b []byte) (*request, error) {
	if len(b) > maxRequest {
		return nil, errors.New("the request is too long")
	}
	var req request
	if err := DecodeStrictly(b, &req); err != nil {
		return nil, err
	}
	if req.Execute == "" {
		return nil, errors.New("no command")
	}
	return &req, nil
}

// unparsed is the error of arguments that are none of the command's.
type unparsed struct{ error }

// DecodeStrictly decodes exactly one JSON document with no unknown key into v.
func DecodeStrictly(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("more than one document")
	}
	return nil
}

// receivedFile returns the last descriptor in a control message, as StratoVirt keeps it.
func receivedFile(oob []byte) (file *os.File) {
	messages, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for _, m := range messages {
		fds, err := syscall.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			if file != nil {
				file.Close()
			}
			syscall.CloseOnExec(fd)
			file = os.NewFile(uintptr(fd), "received")
		}
	}
	return file
}
