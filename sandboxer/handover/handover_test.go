package handover_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/sandboxer/handover"
	"kuasar.io/kuasar/sandboxer/handover/handovertest"
)

const relayRole = "HANDOVER_TEST_RELAY"

func TestMain(m *testing.M) {
	if os.Getenv(relayRole) != "" {
		if err := relay(); err != nil {
			fmt.Fprintln(os.Stderr, "relay:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func pair(t testing.TB) (a, b *os.File) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	a, b = os.NewFile(uintptr(fds[0]), "a"), os.NewFile(uintptr(fds[1]), "b")
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func fifo(t testing.TB) (read, write *os.File) {
	path := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	open := func(flag int) *os.File {
		f, err := os.OpenFile(path, flag|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	read = open(unix.O_RDONLY)
	return read, open(unix.O_WRONLY)
}

func fdOf(t testing.TB, f *os.File) int {
	raw, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	fd := -1
	_ = raw.Control(func(n uintptr) { fd = int(n) })
	return fd
}

// copyOf is what another daemon has of a file: the same open file under another descriptor.
func copyOf(t testing.TB, f *os.File) *os.File {
	fd, err := unix.FcntlInt(uintptr(fdOf(t, f)), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), f.Name())
}

func reopenOutbox(t testing.TB, b *handover.Outbox) *handover.Outbox {
	again, err := handover.OpenOutbox(copyOf(t, b.Files()["out"]))
	if err != nil {
		t.Fatal(err)
	}
	b.Close()
	return again
}

func reopenInbox(t testing.TB, b *handover.Inbox) *handover.Inbox {
	again, err := handover.OpenInbox(copyOf(t, b.Files()["in"]), copyOf(t, b.Files()["pipe"]))
	if err != nil {
		t.Fatal(err)
	}
	b.Close()
	return again
}

// TestOutbox sends a stream through outboxes that change hands, and reads slowly, so that bytes wait
// in the socket or FIFO while their pages are given back and new ones are written.
func TestOutbox(t *testing.T) {
	for _, kind := range []string{"socket", "fifo"} {
		t.Run(kind, func(t *testing.T) {
			random := rand.New(rand.NewPCG(1, 2))
			var sink, client *os.File
			if kind == "fifo" {
				client, sink = fifo(t)
			} else {
				sink, client = pair(t)
			}
			box, err := handover.NewOutbox()
			if err != nil {
				t.Fatal(err)
			}
			defer func() { box.Close() }()
			var want, got []byte
			buffer := make([]byte, 100_000)
			for len(want) < 8<<20 {
				piece := make([]byte, 1+random.IntN(40_000))
				for i := range piece {
					piece[i] = byte(random.Uint32())
				}
				want = append(want, piece...)
				if err := box.Append(piece, uint64(len(want))); err != nil {
					t.Fatal(err)
				}
				if random.IntN(4) == 0 {
					box = reopenOutbox(t, box)
				}
				if box.Count() != uint64(len(want)) {
					t.Fatalf("count %d after %d bytes", box.Count(), len(want))
				}
				if _, err := box.FlushTo(fdOf(t, sink), kind == "fifo"); err != nil && !errors.Is(err, unix.EAGAIN) {
					t.Fatal(err)
				}
				for random.IntN(3) > 0 || box.Pending() > 256<<10 {
					n, err := unix.Read(fdOf(t, client), buffer[:1+random.IntN(len(buffer)-1)])
					if n > 0 {
						got = append(got, buffer[:n]...)
					}
					if err != nil && !errors.Is(err, unix.EAGAIN) {
						t.Fatal(err)
					}
					if _, err := box.FlushTo(fdOf(t, sink), kind == "fifo"); err != nil && !errors.Is(err, unix.EAGAIN) {
						t.Fatal(err)
					}
				}
			}
			for box.Pending() > 0 || len(got) < len(want) {
				if _, err := box.FlushTo(fdOf(t, sink), kind == "fifo"); err != nil && !errors.Is(err, unix.EAGAIN) {
					t.Fatal(err)
				}
				n, err := unix.Read(fdOf(t, client), buffer)
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, buffer[:n]...)
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("%d bytes arrived that differ from the %d that were sent", len(got), len(want))
			}
			var st unix.Stat_t
			if err := unix.Fstat(fdOf(t, box.Files()["out"]), &st); err != nil {
				t.Fatal(err)
			}
			if used := st.Blocks * 512; used > 64<<10 {
				t.Errorf("an empty outbox holds %d bytes of memory", used)
			}
		})
	}
}

// TestOutboxUndoesHalfAnAppend cuts an append between its two steps, and in the middle of the second.
func TestOutboxUndoesHalfAnAppend(t *testing.T) {
	sink, client := pair(t)
	box, err := handover.NewOutbox()
	if err != nil {
		t.Fatal(err)
	}
	if err := box.Append([]byte("first"), 5); err != nil {
		t.Fatal(err)
	}
	file := box.Files()["out"]
	info, err := file.Stat()
	if err != nil {
		t.Fatal(err)
	}
	for _, written := range []int{0, 3} {
		later := copyOf(t, file)
		if err := box.Append([]byte("second"), 11); err != nil {
			t.Fatal(err)
		}
		if err := later.Truncate(info.Size() + int64(written)); err != nil {
			t.Fatal(err)
		}
		later.Close()
		box = reopenOutbox(t, box)
		file = box.Files()["out"]
		if box.Count() != 5 || box.Pending() != 5 {
			t.Fatalf("after %d bytes of the second piece: count %d, pending %d", written, box.Count(), box.Pending())
		}
	}
	if err := box.Append([]byte("third"), 10); err != nil {
		t.Fatal(err)
	}
	if _, err := box.FlushTo(fdOf(t, sink), false); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 100)
	n, err := client.Read(got)
	if err != nil || string(got[:n]) != "firstthird" {
		t.Errorf("%q arrived: %v", got[:n], err)
	}
	box.Close()
}

func TestInbox(t *testing.T) {
	for _, kind := range []string{"socket", "fifo"} {
		t.Run(kind, func(t *testing.T) {
			var source, client *os.File
			if kind == "fifo" {
				source, client = fifo(t)
			} else {
				source, client = pair(t)
			}
			box, err := handover.NewInbox()
			if err != nil {
				t.Fatal(err)
			}
			defer func() { box.Close() }()
			if _, err := box.FillFrom(fdOf(t, source), kind == "fifo"); !errors.Is(err, unix.EAGAIN) {
				t.Fatalf("nothing was sent: %v", err)
			}
			random := rand.New(rand.NewPCG(3, 4))
			var want []byte
			pins := map[int][2]int{} // slot: begin and end in want
			taken := 0
			for len(want) < 4<<20 {
				piece := make([]byte, 1+random.IntN(30_000))
				for i := range piece {
					piece[i] = byte(random.Uint32())
				}
				n, err := unix.Write(fdOf(t, client), piece)
				if err != nil {
					t.Fatal(err)
				}
				want = append(want, piece[:n]...)
				for box.End() < handover.First+int64(len(want)) {
					if _, err := box.FillFrom(fdOf(t, source), kind == "fifo"); err != nil {
						t.Fatal(err)
					}
				}
				if random.IntN(3) == 0 {
					box = reopenInbox(t, box)
				}
				if m := box.Mark(); m.At != handover.First+int64(taken) || m.Count != uint64(taken) || m.Credit != uint64(taken)*2 {
					t.Fatalf("mark %+v after %d bytes", m, taken)
				}
				if length := random.IntN(5000); length > 0 && taken+length < len(want) && len(pins) < 50 {
					slot, err := box.Pin(handover.First+int64(taken), length)
					if err != nil {
						t.Fatal(err)
					}
					pins[slot] = [2]int{taken, taken + length}
				}
				next := taken + random.IntN(len(want)-taken+1)
				read := make([]byte, next-taken)
				if _, err := box.ReadAt(read, handover.First+int64(taken)); err != nil || !bytes.Equal(read, want[taken:next]) {
					t.Fatalf("other bytes at %d to %d: %v", taken, next, err)
				}
				taken = next
				if err := box.SetMark(handover.Mark{At: handover.First + int64(taken), Count: uint64(taken), Credit: 2 * uint64(taken)}); err != nil {
					t.Fatal(err)
				}
				if len(pins) != len(box.Pinned()) {
					t.Fatalf("%d pins, want %d", len(box.Pinned()), len(pins))
				}
				for _, p := range box.Pinned() {
					at := pins[p.Slot]
					read := make([]byte, p.Len)
					if _, err := box.ReadAt(read, p.Off); err != nil || !bytes.Equal(read, want[at[0]:at[1]]) {
						t.Fatalf("pin %+v has other bytes: %v", p, err)
					}
					if random.IntN(10) == 0 {
						if err := box.Unpin(p.Slot); err != nil {
							t.Fatal(err)
						}
						delete(pins, p.Slot)
					}
				}
			}
			for _, p := range box.Pinned() {
				if err := box.Unpin(p.Slot); err != nil {
					t.Fatal(err)
				}
			}
			m := box.Mark()
			m.At = box.End()
			if err := box.SetMark(m); err != nil {
				t.Fatal(err)
			}
			var st unix.Stat_t
			if err := unix.Fstat(fdOf(t, box.Files()["in"]), &st); err != nil {
				t.Fatal(err)
			}
			if used := st.Blocks * 512; used > 64<<10 {
				t.Errorf("an empty inbox holds %d bytes of memory", used)
			}
			client.Close()
			if _, err := box.FillFrom(fdOf(t, source), kind == "fifo"); err != io.EOF {
				t.Errorf("after the client has closed: %v", err)
			}
		})
	}
}

func TestInboxRefuses(t *testing.T) {
	box, err := handover.NewInbox()
	if err != nil {
		t.Fatal(err)
	}
	defer box.Close()
	if err := box.SetMark(handover.Mark{At: handover.First + 1}); err == nil {
		t.Error("a mark passes the end")
	}
	if err := box.SetMark(handover.Mark{At: handover.First - 1}); err == nil {
		t.Error("a mark goes back")
	}
	if _, err := box.Pin(handover.First, 1); err == nil {
		t.Error("bytes are pinned that never came")
	}
	if _, err := box.ReadAt(make([]byte, 1), handover.First); err == nil {
		t.Error("bytes are read that never came")
	}
	source, client := pair(t)
	if _, err := client.Write(make([]byte, handover.MaxPins+1)); err != nil {
		t.Fatal(err)
	}
	if _, err := box.FillFrom(fdOf(t, source), false); err != nil {
		t.Fatal(err)
	}
	for i := range handover.MaxPins {
		if _, err := box.Pin(handover.First+int64(i), 1); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := box.Pin(handover.First, 1); !errors.Is(err, handover.ErrFull) {
		t.Errorf("one pin too many: %v", err)
	}
	again := reopenInbox(t, box)
	if n := len(again.Pinned()); n != handover.MaxPins {
		t.Errorf("%d pins are found again", n)
	}
	again.Close()
	if _, err := handover.OpenOutbox(copyOf(t, mustInbox(t).Files()["in"])); err == nil {
		t.Error("an inbox is taken for an outbox")
	}
}

func mustInbox(t testing.TB) *handover.Inbox {
	box, err := handover.NewInbox()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { box.Close() })
	return box
}

func TestStore(t *testing.T) {
	m, err := handovertest.NewManager()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}()
	var warnings bytes.Buffer
	log := slog.New(slog.NewTextHandler(&warnings, nil))
	s := handover.New(m.Address(), nil, log)
	a, b := pair(t)
	for _, name := range []string{"x/1", "x/2", "y/1"} {
		if err := s.Put(name, a); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"x/1", "", "a:b", "a b", strings.Repeat("x", 256)} {
		if err := s.Put(name, a); err == nil {
			t.Errorf("%q is kept", name)
		}
	}
	s.Remove("x/2", "never")
	next, err := m.Store(log)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(next.Names("x/")); got != "[x/1]" {
		t.Errorf("left: %s", got)
	}
	f := next.Take("x/1")
	if f == nil || next.Take("x/1") != nil || next.Take("x/2") != nil {
		t.Fatal("taken wrongly")
	}
	a.Close()
	if _, err := f.Write([]byte("still there")); err != nil {
		t.Error(err)
	}
	got := make([]byte, 20)
	if n, err := b.Read(got); err != nil || string(got[:n]) != "still there" {
		t.Errorf("%q: %v", got[:n], err)
	}
	if err := next.Put("x/1", f); err == nil {
		t.Error("a taken descriptor is kept twice")
	}
	f.Close()
	next.Sweep(func(name string) bool { return name == "x/2" })
	if err := m.Sync(); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(m.Names()); got != "[x/1]" {
		t.Errorf("after the sweep: %s", got)
	}
	next.RemoveAll("x")
	if err := m.Sync(); err != nil {
		t.Fatal(err)
	}
	if got := m.Names(); len(got) != 0 {
		t.Errorf("in the end: %s", got)
	}

	alone := handover.New("", nil, log)
	if alone.Lasting() {
		t.Error("files last without a service manager")
	}
	if err := alone.Put("x", b); err != nil {
		t.Errorf("without a service manager: %v", err)
	}
	var none *handover.Store
	none.Remove("x")
	none.Sweep(func(string) bool { return false })
	if none.Lasting() || none.Take("x") != nil {
		t.Error("a nil store keeps something")
	}
}

// TestStoreOfManyDescriptors starts a daemon with so many descriptors that their names would not fit
// into one environment variable.
func TestStoreOfManyDescriptors(t *testing.T) {
	const kept = 2000
	m, err := handovertest.NewManager()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}()
	log := slog.New(slog.DiscardHandler)
	a, _ := pair(t)
	s := handover.New(m.Address(), nil, log)
	name := func(i int) string { return fmt.Sprintf("task/%064d/%08x/conn", i, i) }
	for i := range kept {
		if err := s.Put(name(i), a); err != nil {
			t.Fatal(err)
		}
	}
	for i := kept / 8; i < kept; i++ {
		s.Remove(name(i))
	}
	for i := kept / 8; i < kept; i++ { // the table is replaced meanwhile, and no number is used twice
		if err := s.Put(name(i), a); err != nil {
			t.Fatal(err)
		}
	}
	daemon := exec.Command("true")
	if err := m.Start(daemon); err != nil {
		t.Fatal(err)
	}
	if err := daemon.Wait(); err != nil {
		t.Errorf("the daemon does not start with %d descriptors: %v", kept, err)
	}
	next, err := m.Store(log)
	if err != nil {
		t.Fatal(err)
	}
	if got := len(next.Names("")); got != kept {
		t.Errorf("%d of %d are found again", got, kept)
	}
	for _, i := range []int{0, kept / 2, kept - 1} {
		if f := next.Take(name(i)); f == nil {
			t.Errorf("%s is not found again", name(i))
		} else {
			f.Close()
		}
	}
	next.RemoveAll("")
	if err := m.Sync(); err != nil {
		t.Fatal(err)
	}
	if names := m.Names(); len(names) > 0 {
		t.Errorf("still kept: %v", names)
	}
}

// TestKilledAtAnyMoment kills a process that carries bytes from one socket to another again and
// again. Its successors go on, and no byte is lost or doubled.
func TestKilledAtAnyMoment(t *testing.T) {
	m, err := handovertest.NewManager()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}()
	store := handover.New(m.Address(), nil, slog.New(slog.DiscardHandler))
	writer, source := pair(t)
	sink, reader := pair(t)
	if err := errors.Join(store.Put("source", source), store.Put("sink", sink)); err != nil {
		t.Fatal(err)
	}
	source.Close()
	sink.Close()

	const total = 6 << 20
	want := make([]byte, total)
	pieces, random := rand.New(rand.NewPCG(5, 6)), rand.New(rand.NewPCG(7, 8))
	for i := range want {
		want[i] = byte(random.Uint32())
	}
	go func() {
		for rest := want; len(rest) > 0; {
			n := min(len(rest), 1+pieces.IntN(20_000))
			if _, err := writer.Write(rest[:n]); err != nil {
				return
			}
			rest = rest[n:]
		}
		writer.Close()
	}()
	received := make(chan []byte, 1)
	var arrived atomic.Int64
	go func() {
		var all bytes.Buffer
		_, _ = io.Copy(io.MultiWriter(&all, counter{&arrived}), reader)
		received <- all.Bytes()
	}()
	kills := 0
	for ended := false; !ended; {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), relayRole+"=1")
		cmd.Stderr = os.Stderr
		began, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Start(cmd); err != nil {
			t.Fatal(err)
		}
		// Most are killed while they carry, some before.
		if random.IntN(8) > 0 {
			_, _ = began.Read(make([]byte, 1))
		}
		exited := make(chan error, 1)
		go func() { exited <- cmd.Wait() }()
		select {
		case err := <-exited:
			if err != nil {
				t.Fatal(err)
			}
			ended = true
		case <-time.After(time.Duration(random.IntN(3000)) * time.Microsecond):
			if arrived.Load() >= total { // it only has to end
				if err := <-exited; err != nil {
					t.Fatal(err)
				}
				ended = true
				break
			}
			_ = cmd.Process.Kill()
			<-exited
			kills++
		}
		if kills > 5000 {
			t.Fatalf("it does not get on: %d bytes arrived", arrived.Load())
		}
	}
	store.RemoveAll("") // the sink's last copy
	select {
	case got := <-received:
		if !bytes.Equal(got, want) {
			at := 0
			for at < min(len(got), len(want)) && got[at] == want[at] {
				at++
			}
			t.Errorf("%d bytes arrived of %d; they differ from offset %d on", len(got), len(want), at)
		}
	case <-time.After(time.Minute):
		t.Fatal("the sink is not closed")
	}
	t.Logf("%d processes were killed", kills)
	if kills == 0 {
		t.Error("no process was killed: the test shows nothing")
	}
}

type counter struct{ *atomic.Int64 }

func (c counter) Write(p []byte) (int, error) {
	c.Add(int64(len(p)))
	return len(p), nil
}

// relay is the process of TestKilledAtAnyMoment. It carries bytes from "source" to "sink", in pieces
// as they come, until the source ends and the sink has everything.
func relay() error {
	s := handover.Open(slog.New(slog.DiscardHandler))
	source, sink := s.Take("source"), s.Take("sink")
	in, pipe, out := s.Take("in"), s.Take("pipe"), s.Take("out")
	var inbox *handover.Inbox
	var outbox *handover.Outbox
	var err error
	// An earlier process may have died between making and keeping them: nothing was moved then.
	if in != nil && pipe != nil && out != nil {
		if inbox, err = handover.OpenInbox(in, pipe); err != nil {
			return err
		}
		if outbox, err = handover.OpenOutbox(out); err != nil {
			return err
		}
	} else {
		s.Remove("in", "pipe", "out")
		if inbox, err = handover.NewInbox(); err != nil {
			return err
		}
		if outbox, err = handover.NewOutbox(); err != nil {
			return err
		}
		files := inbox.Files()
		files["out"] = outbox.Files()["out"]
		if err := s.PutAll("", files); err != nil {
			return err
		}
	}
	sourceFD, sinkFD := int(rawFD(source)), int(rawFD(sink))
	fmt.Println() // it begins
	ended := false
	buffer := make([]byte, 8<<10)
	for {
		// What an earlier process appended, and could not mark as done any more.
		copied := handover.First + int64(outbox.Count())
		if m := inbox.Mark(); copied > m.At {
			if err := inbox.SetMark(handover.Mark{At: copied}); err != nil {
				return err
			}
		}
		if n := min(int64(len(buffer)), inbox.End()-copied); n > 0 && outbox.Pending() < 256<<10 {
			if _, err := inbox.ReadAt(buffer[:n], copied); err != nil {
				return err
			}
			if err := outbox.Append(buffer[:n], outbox.Count()+uint64(n)); err != nil {
				return err
			}
			if err := inbox.SetMark(handover.Mark{At: copied + n}); err != nil {
				return err
			}
		}
		if _, err := outbox.FlushTo(sinkFD, false); err != nil && !errors.Is(err, unix.EAGAIN) {
			return err
		}
		if !ended && inbox.End()-inbox.Mark().At < 256<<10 {
			_, err := inbox.FillFrom(sourceFD, false)
			switch {
			case err == io.EOF:
				ended = true
			case err != nil && !errors.Is(err, unix.EAGAIN):
				return err
			}
		}
		if ended && inbox.End() == inbox.Mark().At && outbox.Pending() == 0 {
			return nil
		}
	}
}

func rawFD(f *os.File) (fd uintptr) {
	raw, err := f.SyscallConn()
	if err != nil {
		return ^uintptr(0)
	}
	_ = raw.Control(func(n uintptr) { fd = n })
	return fd
}
