package task

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	streaming "github.com/containerd/containerd/api/services/streaming/v1"
	"github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"kuasar.io/kuasar/sandboxer/container"
	"kuasar.io/kuasar/sandboxer/handover"
	"kuasar.io/kuasar/sandboxer/handover/handovertest"
)

// The daemon of TestKill is this program again. It finds in its environment the directory that it
// shares with the test, and after how many steps it is to kill itself.
const (
	daemonDir  = "KUASAR_TEST_TASK_DIR"
	daemonStep = "KUASAR_TEST_TASK_STEP"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(daemonDir); dir != "" {
		if err := runDaemon(dir); err != nil {
			fmt.Fprintln(os.Stderr, "daemon:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// killer dies at the nth step. Steps are before and after everything that is durable.
type killer struct{ left atomic.Int64 }

func (k *killer) step() {
	if k.left.Add(-1) == 0 {
		unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	}
}

type mortalInbox struct {
	inbox
	*killer
}

func (b mortalInbox) FillFrom(fd int, fifo bool) (int, error) {
	b.step()
	defer b.step()
	return b.inbox.FillFrom(fd, fifo)
}

func (b mortalInbox) SetMark(m handover.Mark) error {
	b.step()
	defer b.step()
	return b.inbox.SetMark(m)
}

func (b mortalInbox) Pin(off int64, length int) (int, error) {
	b.step()
	defer b.step()
	return b.inbox.Pin(off, length)
}

func (b mortalInbox) Unpin(slot int) error {
	b.step()
	defer b.step()
	return b.inbox.Unpin(slot)
}

type mortalOutbox struct {
	outbox
	*killer
}

func (b mortalOutbox) Append(p []byte, count uint64) error {
	b.step()
	defer b.step()
	return b.outbox.Append(p, count)
}

func (b mortalOutbox) SetBase(base uint64) error {
	b.step()
	defer b.step()
	return b.outbox.SetBase(base)
}

func (b mortalOutbox) FlushTo(fd int, fifo bool) (int, error) {
	b.step()
	defer b.step()
	return b.outbox.FlushTo(fd, fifo)
}

// runDaemon is one life of a daemon. What is to happen is asked of the test, by its socket; what has
// happened is in files, as a daemon's records are.
func runDaemon(dir string) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	store := handover.Open(log)
	var l net.Listener
	var err error
	if f := store.Take("listen/task"); f != nil {
		l, err = net.FileListener(f)
		f.Close()
	} else {
		os.Remove(filepath.Join(dir, "t"))
		if l, err = net.Listen("unix", filepath.Join(dir, "t")); err == nil {
			var f *os.File
			if f, err = l.(*net.UnixListener).File(); err == nil {
				err = store.Put("listen/task", f)
			}
		}
	}
	if err != nil {
		return err
	}
	k := &killer{}
	if n, err := strconv.Atoi(os.Getenv(daemonStep)); err == nil {
		k.left.Store(int64(n))
	}
	set := func() (*container.Set, error) { return nil, nil }
	options := Options{PodID: "pod", Store: store, Log: log}
	var s *Server
	if _, err := os.Stat(filepath.Join(dir, "guest")); err == nil {
		if options.Set, set, err = mortalSet(dir, store, log); err != nil {
			return err
		}
		options.Address = podAddress(dir)
		s = NewServer(options)
	} else {
		s = newServer(durable{dir}, options)
		s.replay = markReplay
	}
	s.wrap = func(in inbox, out outbox) (inbox, outbox) { return mortalInbox{in, k}, mortalOutbox{out, k} }
	if err := s.Adopt(context.Background()); err != nil {
		return err
	}
	restored, err := set()
	if err != nil {
		return err
	}
	store.Sweep(func(string) bool { return false })
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)
	ended := make(chan struct{})
	go func() {
		<-term
		s.HandOver()
		if restored != nil {
			restored.HandOver()
		}
		close(ended)
	}()
	if err := s.Serve(l); err != nil {
		return err
	}
	<-ended
	return nil
}

// durable is the backend of a daemon. Its calls are answered by the test; its streams carry a
// pattern in which every byte depends on its offset.
type durable struct{ dir string }

// Call sends one line and gets one: the call's text, and whether it is a replay.
func (d durable) Call(ctx context.Context, method string, payload []byte) ([]byte, error) {
	conn, err := net.Dial("unix", filepath.Join(d.dir, "oracle"))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	fmt.Fprintf(conn, "%s %v %x\n", method, isReplay(ctx), payload)
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil || line != "done\n" {
		return nil, fmt.Errorf("the test answers %q, %w", line, err)
	}
	return payload, nil
}

// number is a counter in a file, changed by one write.
func (d durable) number(name string) (*os.File, uint64, error) {
	f, err := os.OpenFile(filepath.Join(d.dir, name), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, 0, err
	}
	var b [8]byte
	if n, err := f.ReadAt(b[:], 0); n != 0 && n != 8 || err != nil && err != io.EOF {
		f.Close()
		return nil, 0, fmt.Errorf("%s: %d bytes, %v", name, n, err)
	}
	return f, binary.LittleEndian.Uint64(b[:]), nil
}

func (d durable) ServeStream(ctx context.Context, id string, s container.ClientStream) (err error) {
	defer func() {
		if errors.Is(err, errPattern) {
			os.WriteFile(filepath.Join(d.dir, "broken"), []byte(id+": "+err.Error()), 0o600)
		}
	}()
	if err := s.Accept(); err != nil {
		return err
	}
	if strings.HasPrefix(id, "in") {
		return d.input(id, s)
	}
	return d.output(ctx, id, s)
}

var errPattern = errors.New("the bytes are wrong")

// pattern is the bytes of every stream from an offset on.
func pattern(p []byte, offset uint64) []byte {
	for i := range p {
		at := offset + uint64(i)
		p[i] = byte(at>>(8*(at%3))) ^ byte(at%251)
	}
	return p
}

// output sends until the test has seen enough; where it ends is remembered before it ends.
func (d durable) output(ctx context.Context, id string, s container.ClientStream) error {
	end, total, err := d.number(id + ".end")
	if err != nil {
		return err
	}
	defer end.Close()
	offset, ok := s.Delivered()
	if !ok {
		offset = firstOutput
	}
	for total == 0 || offset < total {
		n := uint64(1 + rand.IntN(3*streamPiece))
		if total == 0 {
			if _, err := os.Stat(filepath.Join(d.dir, "enough")); err == nil {
				total = offset + n
				if _, err := end.WriteAt(binary.LittleEndian.AppendUint64(nil, total), 0); err != nil {
					return err
				}
			}
		}
		if total > 0 {
			n = total - offset
		}
		sent, err := s.Send(ctx, pattern(make([]byte, n), offset), offset)
		offset += uint64(sent)
		if err != nil {
			return err
		}
	}
	return nil
}

// firstOutput and firstInput are where streams begin: an earlier connection may have carried more.
const (
	firstOutput = 1000
	firstInput  = 70000
)

// input checks what comes, and remembers how far it got before it says so.
func (d durable) input(id string, s container.ClientStream) error {
	taken, g, err := d.number(id + ".taken")
	if err != nil {
		return err
	}
	defer taken.Close()
	g = max(g, firstInput)
	at := s.Begin(firstInput)
	if at > g {
		return fmt.Errorf("%w: the connection goes on at %d, only %d were consumed", errPattern, at, g)
	}
	for {
		p, err := s.Receive(context.Background())
		if err == io.EOF {
			if f, err := os.Create(filepath.Join(d.dir, id+".eof")); err == nil {
				f.Close()
			}
			return nil
		}
		if err != nil {
			return err
		}
		if !bytes.Equal(p, pattern(make([]byte, len(p)), at)) {
			return fmt.Errorf("%w: %d bytes at %d", errPattern, len(p), at)
		}
		at += uint64(len(p))
		if at > g {
			g = at
			if _, err := taken.WriteAt(binary.LittleEndian.AppendUint64(nil, g), 0); err != nil {
				return err
			}
		}
		if rand.IntN(3) > 0 {
			s.Consumed(g)
		}
	}
}

// oracle answers the daemons' calls, and knows which ones were begun before.
type oracle struct {
	mu      sync.Mutex
	begun   map[string]bool
	enough  chan struct{} // ends all that wait
	replays int
	errs    []error
}

func (o *oracle) serve(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			line, err := bufio.NewReader(conn).ReadString('\n')
			if err != nil {
				return // killed before it was asked
			}
			var method, key string
			var replay bool
			fmt.Sscanf(line, "%s %t %s", &method, &replay, &key)
			o.mu.Lock()
			if o.begun[key] && !replay {
				o.errs = append(o.errs, fmt.Errorf("a call was made again, and not as a replay: %s", line))
			}
			o.begun[key] = true
			if replay {
				o.replays++
			}
			o.mu.Unlock()
			if method == "Wait" {
				<-o.enough
			}
			fmt.Fprintln(conn, "done")
		}()
	}
}

// TestKill kills a daemon again and again, at every step that it makes and between them, or stops it
// in order, while clients call, wait, read and write. They must notice nothing.
func TestKill(t *testing.T) {
	lives := 200
	if testing.Short() {
		lives = 40
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("KUASAR_TEST_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	dir := t.TempDir()
	manager, err := handovertest.NewManager()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := manager.Close(); err != nil {
			t.Error(err)
		}
	}()
	asked, err := net.Listen("unix", filepath.Join(dir, "oracle"))
	if err != nil {
		t.Fatal(err)
	}
	defer asked.Close()
	o := &oracle{begun: map[string]bool{}, enough: make(chan struct{})}
	go o.serve(asked)

	m := &mortals{t: t, manager: manager, dir: dir, random: random}
	m.first()
	w := &work{dir: dir, socket: filepath.Join(dir, "t"), oracle: o}
	var cancel context.CancelFunc
	w.ctx, cancel = context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := w.start(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	m.live(lives, func() bool { return w.ctx.Err() == nil && !w.failed.Load() })
	took := time.Since(began)
	if err := w.finish(); err != nil {
		t.Error(err)
	}
	if broken, err := os.ReadFile(filepath.Join(dir, "broken")); err == nil {
		t.Error(string(broken))
	}
	m.last()
	o.mu.Lock()
	defer o.mu.Unlock()
	t.Logf("%d daemons in %v: %d calls, %d of them again; %d bytes of output, %d of input on %d streams; %d connections lost while they were accepted",
		lives, took.Round(time.Millisecond), len(o.begun), o.replays, w.read.Load(), w.written.Load(), w.streams.Load(), w.unlucky.Load())
	if err := errors.Join(o.errs...); err != nil {
		t.Error(err)
	}
}

// mortals are the daemons.
type mortals struct {
	t       *testing.T
	manager *handovertest.Manager
	dir     string
	random  *rand.Rand
	stderr  lockedBuffer
	daemon  *exec.Cmd
}

func (m *mortals) start(step int) {
	m.t.Helper()
	m.daemon = exec.Command(os.Args[0])
	m.daemon.Env = append(os.Environ(), daemonDir+"="+m.dir, daemonStep+"="+strconv.Itoa(step))
	m.daemon.Stderr = &m.stderr
	if err := m.manager.Start(m.daemon); err != nil {
		m.t.Fatal(err)
	}
}

// wait returns when a daemon has ended as it was told to.
func (m *mortals) wait() {
	m.t.Helper()
	if m.daemon.Wait(); m.daemon.ProcessState.ExitCode() > 0 {
		m.t.Fatalf("a daemon failed: %s", m.stderr.String())
	}
}

// first starts the daemon that makes the socket. Until that is kept, it is not to be killed.
func (m *mortals) first() {
	m.t.Helper()
	m.start(0)
	eventually(m.t, "the daemon listens", func() bool { return m.manager.Sync() == nil && len(m.manager.Names()) > 0 })
	m.t.Cleanup(func() { m.daemon.Process.Kill() })
}

// live has daemons end in all ways, while goOn, and leaves the last one alive.
func (m *mortals) live(lives int, goOn func() bool) {
	m.t.Helper()
	m.daemon.Process.Kill()
	m.wait()
	for range lives {
		moment := time.Duration(m.random.IntN(40000)) * time.Microsecond
		var stop *time.Timer
		switch m.random.IntN(6) {
		case 0: // in order
			m.start(0)
			stop = time.AfterFunc(moment, func() { m.daemon.Process.Signal(unix.SIGTERM) })
		case 1, 2: // at any moment
			m.start(0)
			stop = time.AfterFunc(moment, func() { m.daemon.Process.Kill() })
		default: // at a step
			m.start(1 + m.random.IntN(150))
			stop = time.AfterFunc(patience, func() { m.daemon.Process.Kill() })
		}
		m.wait()
		stop.Stop()
		if !goOn() {
			break
		}
	}
	m.start(0)
}

// last ends the last one, which has nothing left.
func (m *mortals) last() {
	m.t.Helper()
	if m.t.Failed() {
		m.t.Log(m.stderr.String())
		return
	}
	eventually(m.t, "nothing but the socket is kept", func() bool {
		return m.manager.Sync() == nil && len(m.manager.Names()) == 1
	})
	m.daemon.Process.Signal(unix.SIGTERM)
	m.wait()
	for line := range strings.Lines(m.stderr.String()) {
		if !strings.Contains(line, "ttrpc: ") { // the client library's: of answers that came too late
			m.t.Errorf("the daemons complain: %s", line)
		}
	}
}

// work is the clients. Their connections last as long as they want, whatever happens to daemons.
type work struct {
	ctx         context.Context
	dir, socket string
	oracle      *oracle
	group       sync.WaitGroup
	failed      atomic.Bool
	shared      *ttrpc.Client

	mu   sync.Mutex
	errs []error
	sent map[string]uint64 // inputs that were left behind, and where they end

	read, written, streams, processes, unlucky atomic.Int64
}

// start returns when the connections that last were accepted.
func (w *work) start() error {
	w.sent = map[string]uint64{}
	w.shared = w.dial()
	if err := w.call(w.shared, "State", "first"); err != nil {
		return err
	}
	for _, stream := range []struct {
		id    string
		carry func(string, streaming.TTRPCStreaming_StreamClient) error
	}{{"out-0", w.output}, {"out-1", w.output}, {"in-0", w.input}, {"in-1", w.input}} {
		c, s, err := w.open(stream.id)
		if err != nil {
			return err
		}
		w.do(stream.id, func(id string) error {
			defer c.Close()
			return stream.carry(id, s)
		})
	}
	for i := range 4 {
		w.again(fmt.Sprintf("call-%d", i), func(id string) error { return w.call(w.shared, "State", id) })
	}
	for i := range 2 {
		w.again(fmt.Sprintf("quick-%d", i), func(id string) error {
			c := w.dial()
			defer c.Close()
			return w.call(c, "State", id)
		})
		w.again(fmt.Sprintf("in-left-%d", i), w.leave)
		w.again(fmt.Sprintf("in-closed-%d", i), func(id string) error {
			c, s, err := w.open(id)
			if err != nil {
				return err
			}
			defer c.Close()
			return w.inputOf(id, s, uint64(1+rand.IntN(100)))
		})
	}
	for i := range 10 {
		w.do(fmt.Sprintf("wait-%d", i), func(id string) error { return w.call(w.shared, "Wait", id) })
	}
	return nil
}

// finish lets everything end, and checks what is left to check.
func (w *work) finish() error {
	if err := os.WriteFile(filepath.Join(w.dir, "enough"), nil, 0o600); err != nil {
		return err
	}
	close(w.oracle.enough)
	w.group.Wait()
	w.shared.Close()
	for id, end := range w.sent {
		for {
			f, taken, err := durable{w.dir}.number(id + ".taken")
			if err != nil {
				return err
			}
			f.Close()
			if taken == end {
				break
			}
			if err := w.ctx.Err(); err != nil || w.failed.Load() {
				return errors.Join(append(w.errs, fmt.Errorf("stream %s: %d of %d bytes were consumed", id, taken-firstInput, end-firstInput))...)
			}
		}
	}
	return errors.Join(w.errs...)
}

func (w *work) enough() bool {
	select {
	case <-w.oracle.enough:
		return true
	default:
		return w.failed.Load()
	}
}

func (w *work) do(id string, f func(id string) error) {
	w.group.Go(func() {
		if err := f(id); err != nil {
			w.failed.Store(true)
			w.mu.Lock()
			defer w.mu.Unlock()
			w.errs = append(w.errs, fmt.Errorf("%s: %w", id, err))
		}
	})
}

// again does something with new connections until there is enough. The channel is closed then.
func (w *work) again(id string, f func(id string) error) <-chan struct{} {
	ended := make(chan struct{})
	w.do(id, func(string) error {
		defer close(ended)
		for n := 0; !w.enough(); n++ {
			err := f(fmt.Sprintf("%s-%d", id, n))
			if errors.Is(err, errUnlucky) {
				w.unlucky.Add(1)
				continue
			}
			if err != nil {
				return fmt.Errorf("%d: %w", n, err)
			}
		}
		return nil
	})
	return ended
}

func (w *work) dial() *ttrpc.Client {
	conn, err := net.Dial("unix", w.socket)
	if err != nil {
		panic(err)
	}
	return ttrpc.NewClient(conn)
}

// errUnlucky is a connection that was lost before anything came back on it: a daemon that dies
// between accepting and keeping it takes it along.
var errUnlucky = errors.New("lost while it was accepted")

func (w *work) call(c *ttrpc.Client, method, id string) error {
	got, err := ask(w.ctx, c, method, id)
	switch {
	case errors.Is(err, ttrpc.ErrClosed) && strings.HasPrefix(id, "quick"):
		return errUnlucky
	case err != nil:
		return err
	case got != id:
		return fmt.Errorf("the answer is that of %s", got)
	}
	return nil
}

// open begins a stream.
func (w *work) open(id string) (*ttrpc.Client, streaming.TTRPCStreaming_StreamClient, error) {
	c := w.dial()
	s, err := streaming.NewTTRPCStreamingClient(c).Stream(w.ctx)
	if err == nil {
		err = sendMessage(s, &streaming.StreamInit{ID: id})
	}
	if err == nil {
		var ack *anypb.Any
		if ack, err = s.Recv(); err == nil && ack.GetTypeUrl() != "google.protobuf.Empty" {
			err = fmt.Errorf("a %s is no acknowledgement", ack.GetTypeUrl())
		}
	}
	if err != nil {
		c.Close()
		if errors.Is(err, ttrpc.ErrClosed) {
			err = errUnlucky
		}
		return nil, nil, err
	}
	w.streams.Add(1)
	return c, s, nil
}

// openedStream is a stream with its connection.
type openedStream struct {
	client *ttrpc.Client
	stream streaming.TTRPCStreaming_StreamClient
}

func sendMessage(s streaming.TTRPCStreaming_StreamClient, m proto.Message) error {
	a, err := pack(m)
	if err != nil {
		return err
	}
	return s.Send(a)
}

// output reads all of a stream.
func (w *work) output(id string, s streaming.TTRPCStreaming_StreamClient) error {
	at := uint64(firstOutput)
	for window := 1 + rand.IntN(inputWindow); ; {
		if window > 0 {
			if err := sendMessage(s, &transfer.WindowUpdate{Update: int32(window)}); err != nil {
				return err
			}
		}
		a, err := s.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("after %d bytes: %w", at-firstOutput, err)
		}
		d := &transfer.Data{}
		if err := unpack(a, d); err != nil {
			return err
		}
		if !bytes.Equal(d.Data, pattern(make([]byte, len(d.Data)), at)) {
			return fmt.Errorf("%w: %d bytes at %d", errPattern, len(d.Data), at)
		}
		at += uint64(len(d.Data))
		window = len(d.Data)
		w.read.Add(int64(len(d.Data)))
	}
	f, end, err := durable{w.dir}.number(id + ".end")
	if err != nil {
		return err
	}
	f.Close()
	if at != end {
		return fmt.Errorf("the output ends at %d, not at %d", at, end)
	}
	return nil
}

// write writes to a stream until it has written so much, or there is enough.
func (w *work) write(s streaming.TTRPCStreaming_StreamClient, most uint64) (end uint64, err error) {
	end = firstInput
	for window := 0; end < firstInput+most && (most < 1<<20 || !w.enough()); {
		for window == 0 {
			a, err := s.Recv()
			if err != nil {
				return end, fmt.Errorf("after %d bytes: %w", end-firstInput, err)
			}
			u := &transfer.WindowUpdate{}
			if err := unpack(a, u); err != nil {
				return end, err
			}
			window += int(u.Update)
		}
		if window > inputWindow {
			return end, fmt.Errorf("a window of %d bytes was granted", window)
		}
		n := min(1+rand.IntN(20000), window, int(firstInput+most-end))
		if err := sendMessage(s, &transfer.Data{Data: pattern(make([]byte, n), end)}); err != nil {
			return end, err
		}
		end, window = end+uint64(n), window-n
		w.written.Add(int64(n))
	}
	return end, nil
}

// input writes all the time, closes, and sees the end.
func (w *work) input(id string, s streaming.TTRPCStreaming_StreamClient) error {
	return w.inputOf(id, s, 1<<40)
}

func (w *work) inputOf(id string, s streaming.TTRPCStreaming_StreamClient, most uint64) error {
	end, err := w.write(s, most)
	if err != nil {
		return err
	}
	w.mu.Lock()
	w.sent[id] = end
	w.mu.Unlock()
	if err := s.CloseSend(); err != nil {
		return err
	}
	for {
		if _, err := s.Recv(); err == io.EOF {
			break
		} else if err != nil {
			return fmt.Errorf("at the end: %w", err)
		}
	}
	if _, err := os.Stat(filepath.Join(w.dir, id+".eof")); err != nil {
		return err
	}
	return nil
}

// leave writes a little, and is gone.
func (w *work) leave(id string) error {
	c, s, err := w.open(id)
	if err != nil {
		return err
	}
	defer c.Close()
	end, err := w.write(s, uint64(1+rand.IntN(200<<10)))
	if err != nil {
		return err
	}
	w.mu.Lock()
	w.sent[id] = end
	w.mu.Unlock()
	if rand.IntN(2) == 0 {
		return s.CloseSend()
	}
	return nil
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
