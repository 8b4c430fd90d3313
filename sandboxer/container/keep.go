package container

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	guestio "kuasar.io/kuasar/guest/protocol/stdio"
	"kuasar.io/kuasar/sandboxer/handover"
)

// shelf is what the service manager keeps of one pod's standard streams for another daemon:
//
//	stdio/POD/TOKEN-KIND/fifo      the client's FIFO; of an output with both ends, of an input with
//	                               the writing end only if the client's writers do not end it
//	stdio/POD/TOKEN-KIND/read      an output that has ended: what the client has not read yet
//	stdio/POD/TOKEN-KIND/out       an output's Outbox
//	stdio/POD/TOKEN-KIND/{in,pipe} an input's Inbox
//	stdio/POD/TOKEN-KIND/log       how far a log is: see logFile
type shelf struct {
	store  *handover.Store
	prefix string
	// left says that everything stays as it is for another daemon.
	left atomic.Bool
}

func newShelf(store *handover.Store, podID string) *shelf {
	return &shelf{store: store, prefix: "stdio/" + podID + "/"}
}

// inherited tells whether an earlier daemon has left anything.
func (s *shelf) inherited() bool { return len(s.store.Names(s.prefix)) > 0 }

// clear forgets all.
func (s *shelf) clear() { s.store.RemoveAll(s.prefix) }

// newToken names the streams of one process, in the guest and on the shelf. A second one for the same
// process differs, but siblings finds what the first has left.
func newToken(id, execID string) string {
	var random [8]byte
	rand.Read(random[:])
	return hex.EncodeToString(random[:]) + processHash(id, execID)
}

func processHash(id, execID string) string {
	sum := sha256.Sum256([]byte(id + "/" + execID))
	return "." + hex.EncodeToString(sum[:4])
}

// niche is the place of one stream on the shelf.
type niche struct {
	*shelf
	prefix string
}

func (s *shelf) niche(token string, kind guestio.Kind) niche {
	return niche{shelf: s, prefix: fmt.Sprintf("%s%s-%d/", s.prefix, token, kind)}
}

// siblings are the niches, for one kind of stream, that were filled under other tokens of a process.
func (s *shelf) siblings(id, execID, token string, kind guestio.Kind) []niche {
	var found []niche
	tail, own := fmt.Sprintf("%s-%d", processHash(id, execID), kind), s.niche(token, kind).prefix
	for _, name := range s.store.Names(s.prefix) {
		dir, _, _ := strings.Cut(strings.TrimPrefix(name, s.prefix), "/")
		prefix := s.prefix + dir + "/"
		if strings.HasSuffix(dir, tail) && prefix != own && (len(found) == 0 || found[len(found)-1].prefix != prefix) {
			found = append(found, niche{shelf: s, prefix: prefix})
		}
	}
	return found
}

// dropAllBut forgets the niches of all tokens but some.
func (s *shelf) dropAllBut(tokens map[string]bool) {
	for _, name := range s.store.Names(s.prefix) {
		dir, _, _ := strings.Cut(strings.TrimPrefix(name, s.prefix), "/")
		// A token has no hyphen; what stands behind the one is the kind.
		if token, _, _ := strings.Cut(dir, "-"); !tokens[token] {
			s.store.Remove(name)
		}
	}
}

// put keeps all of the files or none.
func (n niche) put(files map[string]*os.File) error { return n.store.PutAll(n.prefix, files) }

// holds tells whether an earlier daemon has left something, and nobody has taken it.
func (n niche) holds(suffix string) bool { return len(n.store.Names(n.prefix+suffix)) > 0 }

func (n niche) take(suffix string) *os.File { return n.store.Take(n.prefix + suffix) }

func (n niche) remove(suffixes ...string) {
	if n.left.Load() {
		return
	}
	for _, suffix := range suffixes {
		n.store.Remove(n.prefix + suffix)
	}
}

// clear forgets all.
func (n niche) clear() { n.remove("fifo", "read", "out", "in", "pipe", "log") }

// inbox is what a client has written and its process has not consumed. Offsets are those of the
// stream. Its methods may be called from several goroutines.
type inbox struct {
	niche niche

	mu     sync.Mutex
	box    *handover.Inbox // nil when closed
	pipe   int
	sent   uint64
	closed bool
}

// openInbox goes on with what an earlier daemon has left in the niche, or makes a new one.
func openInbox(n niche) (*inbox, error) {
	b := &inbox{niche: n, pipe: -1}
	if file, pipe := n.take("in"), n.take("pipe"); file != nil && pipe != nil {
		var err error
		if b.box, err = handover.OpenInbox(file, pipe); err != nil {
			n.remove("in", "pipe")
			return nil, err
		}
	} else {
		for _, f := range []*os.File{file, pipe} {
			if f != nil {
				f.Close()
			}
		}
		n.remove("in", "pipe")
		var err error
		if b.box, err = handover.NewInbox(); err != nil {
			return nil, err
		}
		if err := n.put(b.box.Files()); err != nil {
			b.close()
			return nil, err
		}
	}
	raw, err := b.box.Files()["pipe"].SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { b.pipe = int(fd) })
	}
	if err != nil {
		b.close()
		return nil, err
	}
	return b, nil
}

// resume says that the guest has consumed the stream up to an offset, from which it is sent on. lost
// is what it did not get and will not: what had arrived is gone.
func (b *inbox) resume(consumed uint64) (lost uint64, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return 0, os.ErrClosed
	}
	m := b.box.Mark()
	switch end := m.Count + uint64(b.box.End()-m.At); {
	case consumed < m.Count:
		lost = m.Count - consumed
		m.Count = consumed
	case consumed <= end:
		m.At += int64(consumed - m.Count)
		m.Count = consumed
	default:
		// It was fed by a daemon that left nothing here.
		m.At, m.Count = b.box.End(), consumed
	}
	b.sent = consumed
	return lost, b.box.SetMark(m)
}

// advance moves the mark. b.mu is held.
func (b *inbox) advance(consumed uint64) error {
	m := b.box.Mark()
	if consumed <= m.Count {
		return nil
	}
	m.At += int64(consumed - m.Count)
	m.Count = consumed
	return b.box.SetMark(m)
}

// consumed says that the guest has consumed the stream up to an offset.
func (b *inbox) consumed(offset uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.closed {
		// A mark that could not be moved costs memory; the guest tells the offset again.
		_ = b.advance(min(offset, b.sent))
	}
}

// end is the offset behind what has arrived.
func (b *inbox) end() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return b.sent
	}
	m := b.box.Mark()
	return m.Count + uint64(b.box.End()-m.At)
}

// fill takes what a FIFO has, without waiting.
func (b *inbox) fill(fifo int) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return 0, os.ErrClosed
	}
	return b.box.FillFrom(fifo, true)
}

// add puts p behind what has arrived, piece by piece. However far it comes, end tells.
func (b *inbox) add(p []byte) error {
	const piece = 64 << 10
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(p) > 0 {
		if b.closed {
			return os.ErrClosed
		}
		// The inbox's own pipe is empty between two calls, and what is in it is not lost.
		n, err := unix.Write(b.pipe, p[:min(len(p), piece)])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("cannot keep input: %w", err)
		}
		for rest := n; rest > 0; {
			moved, err := b.box.FillFrom(b.pipe, true)
			if err != nil {
				return fmt.Errorf("cannot keep input: %w", err)
			}
			rest -= moved
		}
		p = p[n:]
	}
	return nil
}

// next copies what is to be sent, as much as fits, and counts it as sent. 0 means that there is none.
func (b *inbox) next(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return 0, os.ErrClosed
	}
	m := b.box.Mark()
	at := m.At + int64(b.sent-m.Count)
	n := int(min(int64(len(p)), b.box.End()-at))
	if n == 0 {
		return 0, nil
	}
	if _, err := b.box.ReadAt(p[:n], at); err != nil && err != io.EOF {
		return 0, err
	}
	b.sent += uint64(n)
	return n, nil
}

// close closes the files. What is kept of them goes, unless everything is left for another daemon.
func (b *inbox) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return
	}
	b.closed = true
	b.box.Close()
	b.niche.remove("in", "pipe")
}
