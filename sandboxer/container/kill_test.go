package container

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
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
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/container/guesttest"
	"kuasar.io/kuasar/sandboxer/handover"
	"kuasar.io/kuasar/sandboxer/handover/handovertest"
)

// daemonDir, in the environment, makes the test's binary a daemon.
const daemonDir = "CONTAINER_TEST_DAEMON"

func TestMain(m *testing.M) {
	if dir := os.Getenv(daemonDir); dir != "" {
		if err := serveDaemon(dir); err != nil {
			fmt.Fprintln(os.Stderr, "daemon:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// order is a call to a daemon, and the answer.
type order struct {
	Seq    int
	Replay bool `json:",omitempty"`
	Verb   string
	ID     string
	ExecID string   `json:",omitempty"`
	Args   []string `json:",omitempty"`
	IO     IO
	Signal uint32 `json:",omitempty"`
	Log    string `json:",omitempty"`

	PID   uint32 `json:",omitempty"`
	Exit  Exit   `json:",omitzero"`
	Error string `json:",omitempty"`
}

// farGuest is a guest in another process.
type farGuest struct {
	client  *ttrpc.Client
	streams string
}

func (g farGuest) Task() task.TTRPCTaskService { return task.NewTTRPCTaskClient(g.client) }
func (g farGuest) Sandbox() protocol.SandboxService {
	return farSandbox{protocol.NewSandboxClient(g.client)}
}
func (g farGuest) Dial(ctx context.Context, _ uint32) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "unix", g.streams)
}

type farSandbox struct{ protocol.SandboxClient }

func (farSandbox) Events(context.Context, *protocol.EventsRequest, protocol.Sandbox_EventsServer) error {
	return errors.ErrUnsupported
}

// serveDaemon runs a Set until it is killed, or hands over when it gets SIGTERM.
func serveDaemon(dir string) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	store := handover.Open(log)
	streams, err := os.ReadFile(filepath.Join(dir, "streams"))
	if err != nil {
		return err
	}
	conn, err := net.Dial("unix", filepath.Join(dir, "guest"))
	if err != nil {
		return err
	}
	records := filepath.Join(dir, "records")
	mode, _ := os.ReadFile(filepath.Join(dir, "mode"))
	set := NewSet(Options{
		Announced: len(mode) > 0, Direct: string(mode) == "direct",
		PodID: "pod", Guest: farGuest{ttrpc.NewClient(conn), string(streams)}, Storage: &fakeStorage{}, Store: store, Log: log,
		Journal: func(r []Record) {
			text, err := json.Marshal(r)
			if err == nil {
				err = errors.Join(os.WriteFile(records+".new", text, 0o600), os.Rename(records+".new", records))
			}
			if err != nil {
				log.Error("journal", "error", err)
			}
		},
		Fail: func(err error) { log.Error("violation", "error", err) },
	})
	if text, err := os.ReadFile(records); err == nil {
		var r []Record
		if err := json.Unmarshal(text, &r); err != nil {
			return err
		}
		if err := set.Restore(context.Background(), r); err != nil {
			return err
		}
	}
	var out sync.Mutex
	terminate := make(chan os.Signal, 1)
	signal.Notify(terminate, unix.SIGTERM)
	go func() {
		<-terminate
		out.Lock() // nothing is answered any more: the orders are left to the next daemon
		set.HandOver()
		os.Exit(0)
	}()

	fmt.Println("ready")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var o order
		if err := json.Unmarshal(in.Bytes(), &o); err != nil {
			return err
		}
		go func() {
			if err := o.perform(set); err != nil {
				o.Error = err.Error()
			}
			answer, _ := json.Marshal(o)
			out.Lock()
			defer out.Unlock()
			fmt.Printf("%s\n", answer)
		}()
	}
	return nil // the test is gone, and nobody else would end this
}

func (o *order) perform(set *Set) error {
	ctx := context.Background()
	if o.Replay {
		ctx = Replay(ctx)
	}
	var err error
	switch o.Verb {
	case "announce":
		text, _ := json.Marshal(logged(o.Log, o.Args...))
		err = set.AnnounceContainer(ctx, CreateRequest{ID: o.ID, Spec: text, Rootfs: []Mount{{Type: "bind", Source: "/tmp"}}})
	case "announce exec":
		err = set.AnnounceProcess(ctx, ExecRequest{ID: o.ID, ExecID: o.ExecID, IO: o.IO})
	case "withdraw":
		err = set.Withdraw(ctx, o.ID, o.ExecID)
	case "create":
		text, _ := json.Marshal(spec(o.Args...))
		o.PID, err = set.Create(ctx, CreateRequest{ID: o.ID, Spec: text, Rootfs: rootfs(), IO: o.IO})
	case "exec":
		text, _ := json.Marshal(specs.Process{Args: o.Args})
		err = set.Exec(ctx, ExecRequest{ID: o.ID, ExecID: o.ExecID, Spec: text, IO: o.IO})
	case "start":
		o.PID, err = set.Start(ctx, o.ID, o.ExecID)
	case "wait":
		o.Exit, err = set.Wait(ctx, o.ID, o.ExecID)
	case "kill":
		err = set.Kill(ctx, o.ID, o.ExecID, o.Signal, false)
	case "closeIO":
		err = set.CloseIO(ctx, o.ID, o.ExecID, true)
	case "delete":
		var st State
		st, err = set.Delete(ctx, o.ID, o.ExecID)
		o.Exit = st.Exit
	default:
		err = fmt.Errorf("%q is no order", o.Verb)
	}
	return err
}

// mortal is a pod whose daemon is killed and started again.
type mortal struct {
	t       testing.TB
	guest   *guesttest.Guest
	manager *handovertest.Manager
	dir     string
	log     lockedBuffer

	mu      sync.Mutex
	seq     int
	pending map[int]*pendingOrder
	cmd     *exec.Cmd
	ready   <-chan struct{} // closed when it takes orders
	in      io.WriteCloser
}

type pendingOrder struct {
	order
	sent bool
	done chan order
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newMortal(t testing.TB) *mortal { return newMortalMode(t, "") }

// newMortalMode is newMortal for clients that announce: mode is announced or direct.
func newMortalMode(t testing.TB, mode string) *mortal {
	dir, err := os.MkdirTemp("", "ct")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	m := &mortal{t: t, guest: guesttest.New(t), dir: dir, pending: map[int]*pendingOrder{}}
	if m.manager, err = handovertest.NewManager(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.manager.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "mode"), []byte(mode), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "streams"), []byte(m.guest.Streams()), 0o600); err != nil {
		t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	task.RegisterTTRPCTaskService(server, m.guest.Task())
	protocol.RegisterSandboxService(server, m.guest.Sandbox())
	l, err := net.Listen("unix", filepath.Join(dir, "guest"))
	if err != nil {
		t.Fatal(err)
	}
	go server.Serve(context.Background(), l)
	t.Cleanup(func() { server.Close() })
	m.start()
	t.Cleanup(func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		_ = m.cmd.Process.Kill()
		_ = m.cmd.Wait()
		if t.Failed() {
			t.Log(m.log.String())
		}
	})
	return m
}

// start starts a daemon and repeats to it what was not answered. m.mu is held, or nobody else is
// there.
func (m *mortal) start() {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), daemonDir+"="+m.dir)
	cmd.Stderr = &m.log
	in, err := cmd.StdinPipe()
	if err == nil {
		m.in = in
	}
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err, err2, m.manager.Start(cmd)); err != nil {
		panic(err)
	}
	m.cmd = cmd
	answers := bufio.NewScanner(out)
	ready := make(chan struct{})
	m.ready = ready
	go func() {
		if answers.Scan() {
			close(ready)
		}
		for answers.Scan() {
			var o order
			if err := json.Unmarshal(answers.Bytes(), &o); err != nil {
				continue // cut in the middle by the kill
			}
			m.mu.Lock()
			if p := m.pending[o.Seq]; p != nil {
				delete(m.pending, o.Seq)
				p.done <- o
			}
			m.mu.Unlock()
		}
	}()
	var seqs []int
	for seq := range m.pending {
		seqs = append(seqs, seq)
	}
	slices.Sort(seqs)
	for _, seq := range seqs {
		m.send(m.pending[seq])
	}
}

// send gives an order to the daemon, which may be dying. m.mu is held.
func (m *mortal) send(p *pendingOrder) {
	o := p.order
	o.Replay = p.sent
	p.sent = true
	text, _ := json.Marshal(o)
	_, _ = m.in.Write(append(text, '\n'))
}

// next ends the daemon, with a kill or in order, and starts another.
func (m *mortal) next(kill bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if kill {
		_ = m.cmd.Process.Kill()
	} else {
		_ = m.cmd.Process.Signal(unix.SIGTERM)
	}
	stuck := time.AfterFunc(patience, func() {
		m.t.Error("a daemon does not end")
		_ = m.cmd.Process.Signal(unix.SIGQUIT)
	})
	_ = m.cmd.Wait()
	stuck.Stop()
	m.start()
}

// harass ends so many daemons, one after the other: most of them at work, some while they are
// restoring. The channel is closed when that is done.
func (m *mortal) harass(seed uint64, daemons int) (over <-chan struct{}) {
	random := rand.New(rand.NewPCG(seed, 7))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range daemons {
			m.mu.Lock()
			ready := m.ready
			m.mu.Unlock()
			if random.IntN(6) > 0 {
				select {
				case <-ready:
				case <-time.After(patience):
					m.t.Error("a daemon does not get ready")
					return
				}
			}
			time.Sleep(time.Duration(random.IntN(60)) * time.Millisecond)
			m.next(random.IntN(4) > 0)
		}
	}()
	return done
}

// do has an order performed, by as many daemons as it takes.
func (m *mortal) do(o order) order {
	m.mu.Lock()
	m.seq++
	o.Seq = m.seq
	p := &pendingOrder{order: o, done: make(chan order, 1)}
	m.pending[o.Seq] = p
	m.send(p)
	m.mu.Unlock()
	select {
	case answer := <-p.done:
		if answer.Error != "" {
			m.t.Errorf("%s %s %s: %s", o.Verb, o.ID, o.ExecID, answer.Error)
		}
		return answer
	case <-time.After(patience):
		m.t.Errorf("%s %s %s is not answered", o.Verb, o.ID, o.ExecID)
		return order{}
	}
}

// stream is n bytes that show where each of them belongs.
func stream(n int, seed uint64) []byte {
	b := make([]byte, 0, n+8)
	for i := uint64(0); len(b) < n; i++ {
		b = binary.BigEndian.AppendUint64(b, i<<8|seed)
	}
	return b[:n]
}

// writeUntil writes a stream in pieces of random sizes until it is over, and returns its length.
func writeUntil(over <-chan struct{}, w io.Writer, seed uint64) (int, error) {
	random := rand.New(rand.NewPCG(seed, 8))
	var ahead []byte
	total, next := 0, uint64(0)
	for !isDone(over) {
		for len(ahead) < 10_000 {
			ahead = binary.BigEndian.AppendUint64(ahead, next<<8|seed)
			next++
		}
		n := 1 + random.IntN(9000)
		if random.IntN(3) > 0 {
			n = 1 + n%200
		}
		n, err := w.Write(ahead[:n])
		total += n
		if err != nil {
			return total, err
		}
		ahead = append(ahead[:0], ahead[n:]...)
	}
	return total, nil
}

func sameBytes(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	at := 0
	for at < min(len(got), len(want)) && got[at] == want[at] {
		at++
	}
	t.Errorf("%s: %d bytes, want %d; they differ from offset %d on: % x, want % x", what, len(got), len(want), at,
		got[at:min(len(got), at+16)], want[at:min(len(want), at+16)])
}

// TestKilledDaemons kills daemons, and lets others hand over, while a process writes to both of its
// outputs and another one reads its input; the processes and their client must not notice.
func TestKilledDaemons(t *testing.T) {
	m := newMortal(t)
	begin := make(chan struct{})
	var over <-chan struct{}
	var out, errs int
	m.guest.Programs["talk"] = func(_ context.Context, p *guesttest.Process) uint32 {
		<-begin
		var wg sync.WaitGroup
		var failed, failed2 error
		wg.Go(func() { errs, failed = writeUntil(over, p.Stderr, 2) })
		out, failed2 = writeUntil(over, p.Stdout, 1)
		wg.Wait()
		if failed != nil || failed2 != nil {
			return 1
		}
		return 7
	}
	talker, echoer := newFIFOs(t, false), newFIFOs(t, true)
	m.do(order{Verb: "create", ID: "talk", IO: talker.IO, Args: []string{"talk"}})
	m.do(order{Verb: "create", ID: "cat", IO: echoer.IO, Args: []string{"cat"}})
	talker.collect()
	echoer.open(t)
	echoer.collect()
	over = m.harass(1, 12)
	close(begin)
	var in int
	var wg sync.WaitGroup
	wg.Go(func() {
		m.do(order{Verb: "start", ID: "talk"})
		<-over
		if exit := m.do(order{Verb: "wait", ID: "talk"}).Exit; exit.Status != 7 {
			t.Errorf("talk: exit status %d", exit.Status)
		}
	})
	wg.Go(func() {
		m.do(order{Verb: "start", ID: "cat"})
		var err error
		if in, err = writeUntil(over, echoer.in, 3); err != nil {
			t.Error(err)
		}
		m.do(order{Verb: "closeIO", ID: "cat"})
		if exit := m.do(order{Verb: "wait", ID: "cat"}).Exit; exit.Status != 0 {
			t.Errorf("cat: exit status %d", exit.Status)
		}
	})
	wg.Wait()
	talker.ends(t)
	echoer.ends(t)
	sameBytes(t, "stdout", talker.stdout.Bytes(), stream(out, 1))
	sameBytes(t, "stderr", talker.stderr.Bytes(), stream(errs, 2))
	sameBytes(t, "echo", echoer.stdout.Bytes(), stream(in, 3))
	for _, id := range []string{"talk", "cat"} {
		m.do(order{Verb: "delete", ID: id})
	}
	m.nothingLeft()
	t.Logf("%d, %d and %d bytes went through", out, errs, in)
}

// TestExitWithoutDaemon lets a process end while no daemon is there: the next one delivers the rest
// of its output and then tells of the exit, also if it gets killed in the middle of that.
func TestExitWithoutDaemon(t *testing.T) {
	m := newMortal(t)
	down, wrote := make(chan struct{}), make(chan struct{})
	want := stream(200<<10, 4)
	m.guest.Programs["late"] = func(_ context.Context, p *guesttest.Process) uint32 {
		<-down
		p.Stdout.Write(want)
		close(wrote)
		return 9
	}
	f := newFIFOs(t, false)
	m.do(order{Verb: "create", ID: "c", IO: f.IO, Args: []string{"late"}})
	m.do(order{Verb: "start", ID: "c"})
	m.mu.Lock()
	_ = m.cmd.Process.Kill()
	_ = m.cmd.Wait()
	close(down)
	<-wrote
	m.start()
	m.mu.Unlock()
	// Nobody reads, so this one cannot finish it.
	<-m.ready
	m.next(true)
	f.collect()
	if exit := m.do(order{Verb: "wait", ID: "c"}).Exit; exit.Status != 9 {
		t.Errorf("exit status %d", exit.Status)
	}
	f.ends(t)
	sameBytes(t, "stdout", f.stdout.Bytes(), want)
	m.next(true)
	if exit := m.do(order{Verb: "wait", ID: "c"}).Exit; exit.Status != 9 {
		t.Errorf("exit status %d after the restart", exit.Status)
	}
	m.do(order{Verb: "delete", ID: "c"})
	m.nothingLeft()
}

// nothingLeft checks that no descriptor of a stream is kept.
func (m *mortal) nothingLeft() {
	m.t.Helper()
	if err := m.manager.Sync(); err != nil {
		m.t.Fatal(err)
	}
	var left []string
	for _, name := range m.manager.Names() {
		if strings.HasPrefix(name, "stdio/") {
			left = append(left, name)
		}
	}
	if left != nil {
		m.t.Errorf("still kept: %v", left)
	}
}

// TestKilledDaemonsWithExecs does the same to processes that live shorter than a daemon, so that the
// calls about them are cut in the middle, too.
func TestKilledDaemonsWithExecs(t *testing.T) {
	m := newMortal(t)
	m.do(order{Verb: "create", ID: "c", Args: []string{"sleep"}})
	m.do(order{Verb: "start", ID: "c"})
	over := m.harass(2, 20)
	var execs atomic.Int32
	var wg sync.WaitGroup
	for worker := range 3 {
		wg.Go(func() {
			for i := 0; !isDone(over) && !t.Failed(); i++ {
				m.execOnce(fmt.Sprintf("e%d-%d", worker, i), uint64(worker*50+i%50))
				execs.Add(1)
			}
		})
	}
	wg.Wait()
	m.do(order{Verb: "kill", ID: "c", Signal: 9})
	if exit := m.do(order{Verb: "wait", ID: "c"}).Exit; exit.Status != 137 {
		t.Errorf("exit status %d", exit.Status)
	}
	m.do(order{Verb: "delete", ID: "c"})
	m.nothingLeft()
	t.Logf("%d execs", execs.Load())
}

// execOnce runs one exec with all that belongs to it.
func (m *mortal) execOnce(execID string, seed uint64) {
	dir, err := os.MkdirTemp(m.dir, "io")
	if err != nil {
		m.t.Error(err)
		return
	}
	var o order
	paths := map[string]*string{"stdin": &o.IO.Stdin, "stdout": &o.IO.Stdout}
	for name, path := range paths {
		*path = filepath.Join(dir, name)
		if err := unix.Mkfifo(*path, 0o600); err != nil {
			m.t.Error(err)
			return
		}
	}
	// Both ends, as some clients have them: the end of the output then shows in nothing but the exit.
	out, err := os.OpenFile(o.IO.Stdout, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		m.t.Error(err)
		return
	}
	defer out.Close()
	in, err := os.OpenFile(o.IO.Stdin, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		m.t.Error(err)
		return
	}
	text := stream(20_000, seed)
	var wg sync.WaitGroup
	opened := make(chan struct{})
	wg.Go(func() {
		if _, err := in.Write(text); err != nil {
			m.t.Error(err)
		}
		<-opened // nothing would be left of it otherwise
		in.Close()
	})
	o.ID, o.ExecID = "c", execID
	do := func(verb string, args ...string) order {
		o.Verb, o.Args = verb, args
		return m.do(o)
	}
	do("exec", "cat")
	close(opened)
	var got bytes.Buffer
	wg.Go(func() { io.Copy(&got, out) })
	do("start")
	if exit := do("wait").Exit; exit.Status != 0 || exit.At.IsZero() {
		m.t.Errorf("%s: exit %+v", execID, exit)
	}
	if exit := do("delete").Exit; exit.Status != 0 || exit.At.IsZero() {
		m.t.Errorf("%s: exit %+v from delete", execID, exit)
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
		sameBytes(m.t, execID, got.Bytes(), text)
	case <-time.After(patience):
		m.t.Errorf("%s: its output does not end", execID)
	}
}

// lines is n bytes of numbered lines, the last of which may be cut.
func lines(n int, seed uint64) []byte {
	var b bytes.Buffer
	for i := 0; b.Len() < n; i++ {
		fmt.Fprintf(&b, "%d:%d %s\n", seed, i, strings.Repeat("x", i*i%97))
	}
	return b.Bytes()[:n]
}

// lastLine is the last one that is whole, without its newline.
func lastLine(text []byte) []byte {
	whole := bytes.Split(text, []byte("\n"))
	return whole[max(0, len(whole)-2)]
}

// writeLines writes such lines in pieces of random sizes until it is over, and returns how many bytes.
func writeLines(over <-chan struct{}, w io.Writer, seed uint64) (int, error) {
	random := rand.New(rand.NewPCG(seed, 9))
	text := lines(8<<20, seed)
	total := 0
	for !isDone(over) && total < len(text) {
		n, err := w.Write(text[total:min(len(text), total+1+random.IntN(700))])
		total += n
		if err != nil {
			return total, err
		}
		time.Sleep(time.Duration(random.IntN(2)) * time.Millisecond)
	}
	return total, nil
}

// TestKilledDaemonsWithLog kills daemons while a container writes both of its outputs to a log, made
// here or by the client itself, and while execs with FIFOs come and go in the latter: nothing is lost
// and nothing is doubled.
func TestKilledDaemonsWithLog(t *testing.T) {
	for _, mode := range []string{"announced", "direct"} {
		t.Run(mode, func(t *testing.T) {
			m := newMortalMode(t, mode)
			begin := make(chan struct{})
			var over <-chan struct{}
			var out, errs int
			m.guest.Programs["talk"] = func(_ context.Context, p *guesttest.Process) uint32 {
				<-begin
				var wg sync.WaitGroup
				var failed, failed2 error
				wg.Go(func() { errs, failed = writeLines(over, p.Stderr, 2) })
				out, failed2 = writeLines(over, p.Stdout, 1)
				wg.Wait()
				if failed != nil || failed2 != nil {
					return 1
				}
				return 7
			}
			file := filepath.Join(m.dir, "log")
			m.do(order{Verb: "announce", ID: "c", Log: file, Args: []string{"talk"}})
			guest := &pod{t: t, guest: m.guest}
			if mode == "direct" {
				guest.direct("c", "")
			} else {
				m.do(order{Verb: "create", ID: "c"})
				m.do(order{Verb: "start", ID: "c"})
			}
			over = m.harass(11, 12)
			close(begin)
			execs := 0
			for ; mode == "direct" && !isDone(over) && !t.Failed(); execs++ {
				m.directExecOnce(guest, fmt.Sprintf("e%d", execs))
			}
			<-over
			if mode == "direct" {
				if status := guest.directWait("c", ""); status != 7 {
					t.Errorf("exit status %d", status)
				}
			} else if exit := m.do(order{Verb: "wait", ID: "c"}).Exit; exit.Status != 7 {
				t.Errorf("exit status %d", exit.Status)
			}
			// A withdrawal does not wait for a log for ever, and this machine may be slow.
			for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
				text, err := os.ReadFile(file)
				if err == nil && bytes.Contains(text, lastLine(lines(out, 1))) && bytes.Contains(text, lastLine(lines(errs, 2))) {
					break
				}
			}
			m.do(order{Verb: "withdraw", ID: "c"})
			got := logText(t, file)
			sameBytes(t, "stdout", []byte(got["stdout"]), lines(out, 1))
			sameBytes(t, "stderr", []byte(got["stderr"]), lines(errs, 2))
			m.nothingLeft()
			t.Logf("%d and %d bytes were logged, and there were %d execs", out, errs, execs)
		})
	}
}

// directExecOnce runs one exec as a client does that reaches the guest.
func (m *mortal) directExecOnce(guest *pod, execID string) {
	m.t.Helper()
	o := order{ID: "c", ExecID: execID}
	dir, err := os.MkdirTemp(m.dir, "io")
	if err != nil {
		m.t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	o.IO.Stdout = filepath.Join(dir, "out")
	if err := unix.Mkfifo(o.IO.Stdout, 0o600); err != nil {
		m.t.Fatal(err)
	}
	out, err := os.OpenFile(o.IO.Stdout, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		m.t.Fatal(err)
	}
	defer out.Close()
	o.Verb = "announce exec"
	m.do(o)
	var got []byte
	read := make(chan struct{})
	go func() {
		got, _ = io.ReadAll(out)
		close(read)
	}()
	guest.direct("c", execID, "echo", execID)
	guest.directWait("c", execID)
	o.Verb = "withdraw"
	m.do(o)
	select {
	case <-read:
	case <-time.After(patience):
		m.t.Fatalf("%s: its output does not end", execID)
	}
	if string(got) != execID+"\n" {
		m.t.Errorf("%s said %q", execID, got)
	}
}
