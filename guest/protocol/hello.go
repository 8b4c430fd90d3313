package protocol

import (
	"encoding/binary"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"
)

// maxHello bounds a Hello or HelloReply on the wire, in bytes.
const maxHello = 4096

// Check says why a host of this build cannot manage the agent that said hello, or returns nil.
func (x *Hello) Check() error { return check(x, Version, OldestAgent) }

func check(h *Hello, host, oldestAgent uint32) error {
	agent := h.GetProtocolVersion()
	oldestHost := h.GetOldestHost()
	if oldestHost == 0 {
		oldestHost = agent
	}
	switch {
	case agent < oldestAgent:
		return fmt.Errorf("the agent speaks version %d of the protocol, and this daemon manages agents from version %d on", agent, oldestAgent)
	case host < oldestHost:
		return fmt.Errorf("the agent speaks version %d of the protocol with daemons from version %d on, and this one is of version %d", agent, oldestHost, host)
	}
	return nil
}

// WriteMessage sends m as one frame: its length in bytes as a big-endian uint32, then m in
// protobuf's wire format. It is used for Hello and HelloReply only.
func WriteMessage(w io.Writer, m proto.Message) error {
	body, err := proto.Marshal(m)
	if err != nil {
		return fmt.Errorf("cannot encode %T: %w", m, err)
	}
	if len(body) > maxHello {
		return fmt.Errorf("cannot send %T: %d bytes are more than %d", m, len(body), maxHello)
	}
	frame := binary.BigEndian.AppendUint32(nil, uint32(len(body)))
	_, err = w.Write(append(frame, body...))
	return err
}

// ReadMessage reads one frame of WriteMessage into m. A frame longer than 4096 bytes is an error
// before any of its body is read.
func ReadMessage(r io.Reader, m proto.Message) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxHello {
		return fmt.Errorf("cannot read %T: its frame claims %d bytes, more than %d", m, n, maxHello)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return err
	}
	if err := proto.Unmarshal(body, m); err != nil {
		return fmt.Errorf("cannot decode %T: %w", m, err)
	}
	return nil
}
