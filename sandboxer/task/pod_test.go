package task

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/ttrpc"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/container"
	"kuasar.io/kuasar/sandboxer/container/guesttest"
	"kuasar.io/kuasar/sandboxer/handover"
	"kuasar.io/kuasar/sandboxer/handover/handovertest"
)

func podAddress(dir string) string { return "ttrpc+unix://" + filepath.Join(dir, "t") }

// farGuest is a guest in the test's process.
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

// mortalSet is a daemon's containers, and how to restore them.
func mortalSet(dir string, store *handover.Store, log *slog.Logger) (*container.Set, func() (*container.Set, error), error) {
	streams, err := os.ReadFile(filepath.Join(dir, "streams"))
	if err != nil {
		return nil, nil, err
	}
	conn, err := net.Dial("unix", filepath.Join(dir, "guest"))
	if err != nil {
		return nil, nil, err
	}
	records := filepath.Join(dir, "records")
	set := container.NewSet(container.Options{
		PodID: "pod", Guest: farGuest{ttrpc.NewClient(conn), string(streams)}, Storage: noStorage{}, SharedPID: true, Store: store, Log: log,
		Journal: func(r []container.Record) {
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
	return set, func() (*container.Set, error) {
		text, err := os.ReadFile(records)
		if errors.Is(err, os.ErrNotExist) {
			return set, nil
		}
		var r []container.Record
		if err == nil {
			err = json.Unmarshal(text, &r)
		}
		if err == nil {
			err = set.Restore(context.Background(), r)
		}
		return set, err
	}, nil
}

// TestKillPod kills the daemon of a pod while clients use its containers as containerd does with
// streaming: nothing is lost, doubled, or answered wrongly.
func TestKillPod(t *testing.T) {
	lives := 60
	if testing.Short() {
		lives = 20
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("KUASAR_TEST_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("seed %d", seed)

	dir, err := os.MkdirTemp("", "tk") // short, for the sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	manager, err := handovertest.NewManager()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := manager.Close(); err != nil {
			t.Error(err)
		}
	}()
	guest := guesttest.New(t)
	guest.Programs["report"] = func(_ context.Context, p *guesttest.Process) uint32 {
		n, _ := strconv.Atoi(p.Spec.Args[1])
		p.Stdout.Write(pattern(make([]byte, n), 0))
		return uint32(n % 256)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	task.RegisterTTRPCTaskService(server, guest.Task())
	protocol.RegisterSandboxService(server, guest.Sandbox())
	if err := os.WriteFile(filepath.Join(dir, "streams"), []byte(guest.Streams()), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "guest"))
	if err != nil {
		t.Fatal(err)
	}
	go server.Serve(context.Background(), l)
	t.Cleanup(func() { server.Close() })

	m := &mortals{t: t, manager: manager, dir: dir, random: rand.New(rand.NewPCG(seed, 0))}
	m.first()
	w := &work{dir: dir, socket: filepath.Join(dir, "t"), oracle: &oracle{enough: make(chan struct{})}}
	var cancel context.CancelFunc
	w.ctx, cancel = context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	w.shared = w.dial()
	cats := make([]*cat, 2)
	for i := range cats {
		if cats[i], err = w.startCat(t, fmt.Sprintf("cat-%d", i)); err != nil {
			t.Fatal(err)
		}
	}
	for i, c := range cats {
		c.execs = w.again(fmt.Sprintf("exec-%d", i), func(id string) error { return w.exec(t, c, id) })
		w.do(fmt.Sprintf("cat-in-%d", i), func(string) error { return c.write(w) })
		w.do(fmt.Sprintf("cat-out-%d", i), func(string) error { return c.read(w) })
		w.again(fmt.Sprintf("task-%d", i), func(id string) error { return w.cycle(t, id) })
	}
	began := time.Now()
	m.live(lives, func() bool { return w.ctx.Err() == nil && !w.failed.Load() })
	took := time.Since(began)
	if err := w.finish(); err != nil {
		t.Error(err)
	}
	m.last()
	t.Logf("%d daemons in %v: %d bytes of input, %d of output on %d streams, %d processes; %d connections lost while they were accepted",
		lives, took.Round(time.Millisecond), w.written.Load(), w.read.Load(), w.streams.Load(), w.processes.Load(), w.unlucky.Load())
}

func (w *work) url(id string) string { return podAddress(w.dir) + "?streaming_id=" + id }

// luckily opens a stream, another connection if the first was lost.
func (w *work) luckily(id string) (*openedStream, error) {
	for {
		c, s, err := w.open(id)
		if errors.Is(err, errUnlucky) && w.ctx.Err() == nil {
			w.unlucky.Add(1)
			continue
		}
		return &openedStream{c, s}, err
	}
}

// cat is a container that copies its input to its output.
type cat struct {
	id      string
	client  task.TTRPCTaskService
	in, out *openedStream
	total   chan uint64
	execs   <-chan struct{} // closed when there will be no more in it
}

func (w *work) startCat(t testing.TB, id string) (c *cat, err error) {
	c = &cat{id: id, client: task.NewTTRPCTaskClient(w.shared), total: make(chan uint64, 1)}
	if c.in, err = w.luckily(id + "-stdin"); err != nil {
		return nil, err
	}
	if c.out, err = w.luckily(id + "-stdout"); err != nil {
		return nil, err
	}
	r := createRequest(t, id, "cat")
	r.Stdin, r.Stdout = w.url(id+"-stdin"), w.url(id+"-stdout")
	if _, err := c.client.Create(w.ctx, r); err != nil {
		return nil, err
	}
	_, err = c.client.Start(w.ctx, &task.StartRequest{ID: id})
	return c, err
}

func (c *cat) write(w *work) error {
	defer c.in.client.Close()
	end, err := w.write(c.in.stream, 1<<40)
	c.total <- end - firstInput
	if err != nil {
		return err
	}
	<-c.execs
	if err := c.in.stream.CloseSend(); err != nil {
		return err
	}
	exit, err := c.client.Wait(w.ctx, &task.WaitRequest{ID: c.id})
	if err == nil && exit.ExitStatus != 0 {
		err = fmt.Errorf("it exited with %d", exit.ExitStatus)
	}
	if err == nil {
		_, err = c.client.Delete(w.ctx, &task.DeleteRequest{ID: c.id})
	}
	return err
}

func (c *cat) read(w *work) error {
	defer c.out.client.Close()
	n, err := w.readAll(c.out, firstInput)
	if err != nil {
		return err
	}
	if want := <-c.total; n != want {
		return fmt.Errorf("%d of %d bytes came back", n, want)
	}
	return nil
}

// readAll reads a stream's pattern to its end.
func (w *work) readAll(s *openedStream, offset uint64) (n uint64, err error) {
	for window := inputWindow; ; {
		if window > 0 {
			if err := sendMessage(s.stream, &transfer.WindowUpdate{Update: int32(window)}); err != nil {
				return n, err
			}
		}
		a, err := s.stream.Recv()
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, fmt.Errorf("after %d bytes: %w", n, err)
		}
		d := &transfer.Data{}
		if err := unpack(a, d); err != nil {
			return n, err
		}
		if !bytes.Equal(d.Data, pattern(make([]byte, len(d.Data)), offset+n)) {
			return n, fmt.Errorf("%w: %d bytes at %d", errPattern, len(d.Data), n)
		}
		n += uint64(len(d.Data))
		window = len(d.Data)
		w.read.Add(int64(len(d.Data)))
	}
}

// exec runs a process in a container, as ExecSync does.
func (w *work) exec(t testing.TB, c *cat, id string) error {
	out, err := w.luckily(id + "-stdout")
	if err != nil {
		return err
	}
	defer out.client.Close()
	want := 1 + rand.IntN(150<<10)
	if _, err := c.client.Exec(w.ctx, &task.ExecProcessRequest{ID: c.id, ExecID: id, Spec: process(t, "report", strconv.Itoa(want)), Stdout: w.url(id + "-stdout")}); err != nil {
		return fmt.Errorf("exec: %w", err)
	}
	return w.finishProcess(c.client, c.id, id, out, want)
}

// cycle is the life of a container.
func (w *work) cycle(t testing.TB, id string) error {
	out, err := w.luckily(id + "-stdout")
	if err != nil {
		return err
	}
	defer out.client.Close()
	want := 1 + rand.IntN(150<<10)
	client := task.NewTTRPCTaskClient(w.shared)
	r := createRequest(t, id, "report", strconv.Itoa(want))
	r.Stdout = w.url(id + "-stdout")
	if _, err := client.Create(w.ctx, r); err != nil {
		return fmt.Errorf("create: %w", err)
	}
	return w.finishProcess(client, id, "", out, want)
}

func (w *work) finishProcess(client task.TTRPCTaskService, id, execID string, out *openedStream, want int) error {
	w.processes.Add(1)
	if _, err := client.Start(w.ctx, &task.StartRequest{ID: id, ExecID: execID}); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	n, err := w.readAll(out, 0)
	if err != nil || n != uint64(want) {
		return fmt.Errorf("%d of %d bytes of output, %w", n, want, err)
	}
	exit, err := client.Wait(w.ctx, &task.WaitRequest{ID: id, ExecID: execID})
	if err != nil {
		return fmt.Errorf("wait: %w", err)
	}
	if exit.ExitStatus != uint32(want%256) {
		return fmt.Errorf("it exited with %d, not %d", exit.ExitStatus, want%256)
	}
	deleted, err := client.Delete(w.ctx, &task.DeleteRequest{ID: id, ExecID: execID})
	if err != nil {
		return fmt.Errorf("delete: %w", err)
	}
	if deleted.ExitStatus != exit.ExitStatus {
		return fmt.Errorf("its deletion says that it exited with %d, not %d", deleted.ExitStatus, exit.ExitStatus)
	}
	return nil
}
