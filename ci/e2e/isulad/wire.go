package isulad

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// The messages of the sandbox controller are written by hand: both generations use one service
// name and one set of message names for different fields, so no one set of generated types can
// speak both.

// A message is built field by field, in the order in which the real clients write them. As in
// proto3, zero values are left out.
type message []byte

func (m message) text(n protowire.Number, s string) message {
	if s == "" {
		return m
	}
	return protowire.AppendString(protowire.AppendTag(m, n, protowire.BytesType), s)
}

func (m message) number(n protowire.Number, v uint64) message {
	if v == 0 {
		return m
	}
	return protowire.AppendVarint(protowire.AppendTag(m, n, protowire.VarintType), v)
}

// sub writes an embedded message, also an empty one: present and empty is not the same as absent.
func (m message) sub(n protowire.Number, inner message) message {
	return protowire.AppendBytes(protowire.AppendTag(m, n, protowire.BytesType), inner)
}

func (m message) value(n protowire.Number, b []byte) message {
	if len(b) == 0 {
		return m
	}
	return m.sub(n, b)
}

func (m message) time(n protowire.Number, t time.Time) message {
	return m.sub(n, message(nil).number(1, uint64(t.Unix())).number(2, uint64(t.Nanosecond())))
}

func anyOf(typeURL string, value []byte) message {
	return message(nil).text(1, typeURL).value(2, value)
}

// A field is one field of a received message.
type field struct {
	varint uint64
	bytes  []byte
}

// fields takes a message apart. Of a field that occurs more than once, all are kept in order.
func fields(b []byte) (map[protowire.Number][]field, error) {
	all := make(map[protowire.Number][]field)
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return nil, fmt.Errorf("cannot decode the sandboxer's message: %w", protowire.ParseError(n))
		}
		b = b[n:]
		var f field
		switch kind {
		case protowire.VarintType:
			f.varint, n = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			f.bytes, n = protowire.ConsumeBytes(b)
		default:
			n = protowire.ConsumeFieldValue(number, kind, b)
		}
		if n < 0 {
			return nil, fmt.Errorf("cannot decode field %d of the sandboxer's message: %w", number, protowire.ParseError(n))
		}
		b = b[n:]
		all[number] = append(all[number], f)
	}
	return all, nil
}

// last is the field that counts where a message should have one.
func last(f []field) field {
	if len(f) == 0 {
		return field{}
	}
	return f[len(f)-1]
}

func timeOf(b []byte) (time.Time, error) {
	f, err := fields(b)
	if err != nil || len(b) == 0 {
		return time.Time{}, err
	}
	return time.Unix(int64(last(f[1]).varint), int64(last(f[2]).varint)), nil
}

// request puts the two fields that every request of the controller has around its own, where the
// generation has them. Update is the exception.
func (g Generation) request(sandboxer, id string, own message) message {
	if g == GenA {
		return append(message(nil).text(1, sandboxer).text(2, id), own...)
	}
	return append(message(nil).text(1, id), own...).text(10, sandboxer)
}

func (g Generation) createRequest(sandboxer, id, netns string, config []byte) message {
	if g == GenA {
		return g.request(sandboxer, id, message(nil).
			sub(4, anyOf("type.googleapis.com/runtime.v1.PodSandboxConfig", config)).text(5, netns))
	}
	// No type URL here: iSulad hands the plain bytes on.
	return g.request(sandboxer, id, message(nil).sub(3, anyOf("", config)).text(4, netns))
}

func (g Generation) stopRequest(sandboxer, id string, seconds uint32) message {
	n := protowire.Number(2)
	if g == GenA {
		n = 3
	}
	return g.request(sandboxer, id, message(nil).number(n, uint64(seconds)))
}

// started is what iSulad reads of the answer to Start.
type started struct {
	pid     uint32
	created time.Time
	address string
}

func decodeStarted(b []byte) (started, error) {
	f, err := fields(b)
	if err != nil {
		return started{}, err
	}
	created, err := timeOf(last(f[3]).bytes)
	return started{pid: uint32(last(f[2]).varint), created: created, address: string(last(f[5]).bytes)}, err
}

// podStatus is what iSulad reads of the answer to Status.
type podStatus struct {
	pid     uint32
	state   string
	address string
}

func (g Generation) decodeStatus(b []byte) (podStatus, error) {
	f, err := fields(b)
	n := protowire.Number(8)
	if g == GenA {
		n = 4
	}
	return podStatus{
		pid: uint32(last(f[2]).varint), state: string(last(f[3]).bytes), address: string(last(f[n]).bytes),
	}, err
}

// updateRequest is Gen-B's announcement of all tasks of a pod.
func updateRequest(sandboxer, id, runtime, name string, created, updated time.Time, tasks []byte) message {
	sandbox := message(nil).text(1, id).
		sub(2, message(nil).text(1, runtime)).
		sub(4, message(nil).text(1, "name").text(2, name)).
		time(5, created).time(6, updated).
		sub(7, message(nil).text(1, "tasks").
			sub(2, anyOf("github.com/containerd/containerd/Tasks", tasks))).
		text(10, sandboxer)
	// Update alone has the sandboxer's name in field 2.
	return message(nil).text(1, id).text(2, sandboxer).sub(3, sandbox).text(4, "extensions.tasks")
}

// prepareRequest is Gen-A's announcement of one container (exec is empty) or one exec.
func prepareRequest(sandboxer, id, container, exec string, spec []byte, rootfs string, io stdio) message {
	terminal := uint64(0)
	if io.terminal {
		terminal = 1
	}
	return message(nil).text(1, sandboxer).text(2, id).text(3, container).text(4, exec).
		sub(5, anyOf("", spec)).
		sub(6, message(nil).text(1, "bind").text(2, rootfs)).
		text(7, io.stdin).text(8, io.stdout).text(9, io.stderr).number(10, terminal)
}

func purgeRequest(sandboxer, id, container, exec string) message {
	return message(nil).text(1, sandboxer).text(2, id).text(3, container).text(4, exec)
}
