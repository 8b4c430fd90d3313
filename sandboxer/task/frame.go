package task

import (
	"encoding/binary"
	"fmt"
	"io"
)

const (
	// headerSize is the size of a frame's header: length of the payload and stream, 4 bytes each
	// in network order, kind and flags.
	headerSize = 10
	// maxPayload is the most that one frame may carry.
	maxPayload = 4 << 20
)

// Kinds of frames.
const (
	kindRequest  = 1
	kindResponse = 2
	kindData     = 3
)

// Flags of data frames.
const (
	flagClosed = 1 // the sender's last one
	flagEmpty  = 4 // carries no message, which is not the same as an empty one
)

// frame is one message of ttrpc.
type frame struct {
	stream  uint32
	kind    uint8
	flags   uint8
	at      int64 // where the header begins
	payload []byte
}

// end is the offset behind the frame.
func (f frame) end() int64 { return f.at + int64(f.size()) }

func (f frame) size() int { return headerSize + len(f.payload) }

// oversizeError is a frame that is larger than any may be.
type oversizeError struct {
	stream, length uint32
}

func (e *oversizeError) Error() string {
	return fmt.Sprintf("a frame's payload of %d bytes is too large, the most is %d", e.length, maxPayload)
}

// readFrame reads the frame that begins at offset at of a log that ends at end. ok is false as long
// as it is not there as a whole. The error is the log's, or an *oversizeError, which shows before
// the payload is there.
func readFrame(log io.ReaderAt, at, end int64) (f frame, ok bool, err error) {
	if end-at < headerSize {
		return frame{}, false, nil
	}
	var header [headerSize]byte
	if _, err := log.ReadAt(header[:], at); err != nil {
		return frame{}, false, err
	}
	length := binary.BigEndian.Uint32(header[0:])
	f = frame{stream: binary.BigEndian.Uint32(header[4:]), kind: header[8], flags: header[9], at: at}
	if length > maxPayload {
		return f, false, &oversizeError{stream: f.stream, length: length}
	}
	if end-at-headerSize < int64(length) {
		return frame{}, false, nil
	}
	if length > 0 {
		f.payload = make([]byte, length)
		if _, err := log.ReadAt(f.payload, at+headerSize); err != nil {
			return frame{}, false, err
		}
	}
	return f, true, nil
}

// encode returns the frame's bytes.
func (f frame) encode() []byte {
	b := make([]byte, headerSize, f.size())
	binary.BigEndian.PutUint32(b[0:], uint32(len(f.payload)))
	binary.BigEndian.PutUint32(b[4:], f.stream)
	b[8], b[9] = f.kind, f.flags
	return append(b, f.payload...)
}
