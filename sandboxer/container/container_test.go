package container

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"kuasar.io/kuasar/sandboxer/container/guesttest"
)

// TestLifecycle follows the calls that containerd makes from start to removal.
func TestLifecycle(t *testing.T) {
	p := newPod(t)
	f := newFIFOs(t, false)
	pid, err := p.Create(testContext(t), CreateRequest{ID: "c1", Bundle: bundle(t, spec("echo", "hello")), Rootfs: rootfs(), IO: f.IO})
	if err != nil {
		t.Fatal(err)
	}
	if pid <= maxGuestPID {
		t.Errorf("pid %d could be a process of the host", pid)
	}
	f.collect()
	if got := p.status("c1", ""); got != Created {
		t.Errorf("after create: %v", got)
	}
	if _, err := p.Create(testContext(t), CreateRequest{ID: "c1", Bundle: "/x", Rootfs: rootfs()}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second create: %v", err)
	}
	waiting := make(chan Exit, 1)
	go func() {
		exit, _ := p.Wait(testContext(t), "c1", "") // before Start
		waiting <- exit
	}()
	started, err := p.Start(testContext(t), "c1", "")
	if err != nil || started != pid {
		t.Fatalf("start: pid %d, %v", started, err)
	}
	if exit := <-waiting; exit.Status != 0 || time.Since(exit.At) > patience {
		t.Errorf("exit %+v", exit)
	}
	f.ends(t)
	if f.stdout.String() != "hello\n" || f.stderr.Len() != 0 {
		t.Errorf("stdout %q, stderr %q", f.stdout.String(), f.stderr.String())
	}
	p.wait("c1", "") // again, after the exit
	st, err := p.State("c1", "")
	if err != nil || st.Status != Stopped || st.PID != pid || st.IO != f.IO {
		t.Errorf("state %+v, %v", st, err)
	}
	if err := p.Kill(testContext(t), "c1", "", 9, true); !errdefs.IsNotFound(err) {
		t.Errorf("kill of a finished container: %v", err)
	}
	if err := p.Kill(testContext(t), "c1", "", 0, false); !errdefs.IsNotFound(err) {
		t.Errorf("signal 0 of a finished container: %v", err)
	}
	if pids, err := p.Pids("c1"); err != nil || len(pids) != 1 {
		t.Errorf("pids %v, %v", pids, err)
	}
	if _, err := p.Start(testContext(t), "c1", ""); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("second start: %v", err)
	}
	if len(p.storage.holds("c1")) == 0 {
		t.Error("the storage is released before the delete")
	}
	gone, err := p.Delete(testContext(t), "c1", "")
	if err != nil || gone.Exit.At.IsZero() {
		t.Errorf("delete: %+v, %v", gone, err)
	}
	if _, err := p.Delete(testContext(t), "c1", ""); !errdefs.IsNotFound(err) {
		t.Errorf("second delete: %v", err)
	}
	if _, err := p.State("c1", ""); !errdefs.IsNotFound(err) {
		t.Errorf("state after delete: %v", err)
	}
	if held := p.storage.holds("c1"); held != nil {
		t.Errorf("storage is left: %v", held)
	}
	left := p.journalled()
	if p.guest.Known("c1") || p.Len() != 0 || len(left) != 1 || !left[0].Processes[0].Deleted {
		t.Error("something remembers the container")
	}
	if got := p.failures(); got != nil {
		t.Errorf("violations: %v", got)
	}
}

func TestUnknown(t *testing.T) {
	p := newPod(t)
	p.run("c1", IO{}, "sleep")
	ctx := testContext(t)
	calls := map[string]func(id, execID string) error{
		"State":  func(id, e string) error { _, err := p.State(id, e); return err },
		"Wait":   func(id, e string) error { _, err := p.Wait(ctx, id, e); return err },
		"Start":  func(id, e string) error { _, err := p.Start(ctx, id, e); return err },
		"Kill":   func(id, e string) error { return p.Kill(ctx, id, e, 15, false) },
		"Delete": func(id, e string) error { _, err := p.Delete(ctx, id, e); return err },
		"Resize": func(id, e string) error { return p.ResizePty(ctx, id, e, 1, 1) },
		"Close":  func(id, e string) error { return p.CloseIO(t.Context(), id, e, true) },
	}
	for name, call := range calls {
		if err := call("nope", ""); !errdefs.IsNotFound(err) {
			t.Errorf("%s of an unknown container: %v", name, err)
		}
		if err := call("c1", "nope"); !errdefs.IsNotFound(err) {
			t.Errorf("%s of an unknown process: %v", name, err)
		}
	}
	if _, err := p.Delete(ctx, "c1", ""); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("delete of a running container: %v", err)
	}
	if err := p.Kill(ctx, "c1", "", 65, false); !errdefs.IsInvalidArgument(err) {
		t.Errorf("signal 65: %v", err)
	}
}

func TestSignals(t *testing.T) {
	p := newPod(t)
	p.run("c1", IO{}, "sleep")
	if err := p.Kill(testContext(t), "c1", "", 0, false); err != nil {
		t.Errorf("signal 0 of a running container: %v", err)
	}
	if err := p.Kill(testContext(t), "c1", "", 15, false); err != nil {
		t.Fatal(err)
	}
	if exit := p.wait("c1", ""); exit.Status != 128+15 {
		t.Errorf("exit status %d", exit.Status)
	}
	if got := p.guest.Signals(); !slices.Equal(got, []uint32{0, 15}) {
		t.Errorf("signals %v", got)
	}
}

// TestKillCreated kills a container that was never started.
func TestKillCreated(t *testing.T) {
	p := newPod(t)
	p.create("c1", IO{}, "sleep")
	if err := p.Kill(testContext(t), "c1", "", 9, true); err != nil {
		t.Fatal(err)
	}
	if exit := p.wait("c1", ""); exit.Status != 137 {
		t.Errorf("exit status %d", exit.Status)
	}
	if _, err := p.Delete(testContext(t), "c1", ""); err != nil {
		t.Error(err)
	}
}

// TestDeleteCreated deletes a container that was never started, while somebody waits for it.
func TestDeleteCreated(t *testing.T) {
	p := newPod(t)
	p.create("c1", IO{}, "sleep")
	done := make(chan error, 1)
	go func() {
		_, err := p.Wait(testContext(t), "c1", "")
		done <- err
	}()
	if _, err := p.Delete(testContext(t), "c1", ""); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil && !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if p.guest.Known("c1") || p.storage.holds("c1") != nil {
		t.Error("something is left")
	}
}

func TestPause(t *testing.T) {
	p := newPod(t)
	p.run("c1", IO{}, "sleep")
	if err := p.Resume(testContext(t), "c1"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("resume of a running container: %v", err)
	}
	if err := p.Pause(testContext(t), "c1"); err != nil || p.status("c1", "") != Paused {
		t.Errorf("pause: %v", err)
	}
	if _, err := p.Delete(testContext(t), "c1", ""); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("delete of a paused container: %v", err)
	}
	if err := p.Resume(testContext(t), "c1"); err != nil || p.status("c1", "") != Running {
		t.Errorf("resume: %v", err)
	}
}

func TestStartFails(t *testing.T) {
	p := newPod(t)
	p.create("c1", IO{}, "no-such-program")
	_, err := p.Start(testContext(t), "c1", "")
	if err == nil || !strings.Contains(err.Error(), `cannot start container c1: exec: "no-such-program": executable file not found`) {
		t.Errorf("start: %v", err)
	}
	if got := p.status("c1", ""); got != Created {
		t.Errorf("status %v", got)
	}
	if _, err := p.Delete(testContext(t), "c1", ""); err != nil || p.storage.holds("c1") != nil {
		t.Errorf("delete: %v", err)
	}
}

// TestCreateFails lets each step of a create fail; nothing may be left behind.
func TestCreateFails(t *testing.T) {
	boom := errors.New("boom")
	refuse := func(method string) func(*pod, *CreateRequest) {
		return func(p *pod, _ *CreateRequest) {
			p.guest.Intercept(func(_ context.Context, m, _, _ string) error {
				if m == method {
					return status.Error(codes.Internal, "boom")
				}
				return nil
			})
		}
	}
	tests := map[string]struct {
		break_ func(*pod, *CreateRequest)
		want   error // class
	}{
		"id":            {func(_ *pod, r *CreateRequest) { r.ID = "../x" }, errdefs.ErrInvalidArgument},
		"no rootfs":     {func(_ *pod, r *CreateRequest) { r.Rootfs = nil }, errdefs.ErrInvalidArgument},
		"no bundle":     {func(_ *pod, r *CreateRequest) { r.Bundle = "/nonexistent/bundle" }, errdefs.ErrInvalidArgument},
		"bad JSON":      {func(_ *pod, r *CreateRequest) { r.Spec = []byte("{") }, errdefs.ErrInvalidArgument},
		"no process":    {func(_ *pod, r *CreateRequest) { r.Spec = []byte("{}") }, errdefs.ErrInvalidArgument},
		"long spec":     {func(_ *pod, r *CreateRequest) { r.Spec = make([]byte, maxSpec+1) }, errdefs.ErrInvalidArgument},
		"file scheme":   {func(_ *pod, r *CreateRequest) { r.IO.Stdout = "file:///tmp/log" }, errdefs.ErrNotImplemented},
		"binary scheme": {func(_ *pod, r *CreateRequest) { r.IO.Stdout = "binary:///bin/logger?x=y" }, errdefs.ErrNotImplemented},
		"relative FIFO": {func(_ *pod, r *CreateRequest) { r.IO.Stdout = "out" }, errdefs.ErrInvalidArgument},
		"lost FIFO":     {func(_ *pod, r *CreateRequest) { r.IO.Stdout = "/nonexistent/fifo" }, errdefs.ErrNotFound},
		"no FIFO":       {func(_ *pod, r *CreateRequest) { r.IO.Stdout = "/dev/null" }, errdefs.ErrInvalidArgument},
		"rootfs":        {func(p *pod, _ *CreateRequest) { p.storage.failRoot = boom }, boom},
		"volume":        {func(p *pod, _ *CreateRequest) { p.storage.failVolume = boom }, boom},
		"prepare":       {refuse("PrepareContainer"), errdefs.ErrInternal},
		"create":        {refuse("Create"), errdefs.ErrInternal},
		"stream":        {func(p *pod, _ *CreateRequest) { p.guest.Die() }, nil},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			p := newPod(t)
			s := spec("true")
			s.Mounts = volumeMounts()
			f := newFIFOs(t, false)
			req := CreateRequest{ID: "c1", Bundle: bundle(t, s), Rootfs: rootfs(), IO: f.IO}
			test.break_(p, &req)
			_, err := p.Create(testContext(t), req)
			if err == nil || test.want != nil && !errors.Is(err, test.want) {
				t.Errorf("error %v, want %v", err, test.want)
			}
			if p.Len() != 0 || p.storage.held["c1"] != nil || p.guest.Known("c1") {
				t.Errorf("left: %d containers, storage %v, guest %v", p.Len(), p.storage.held, p.guest.Known("c1"))
			}
			if got := p.failures(); got != nil {
				t.Errorf("violations: %v", got)
			}
		})
	}
}

// TestCreateCancelled deletes a container whose create hangs in the guest.
func TestCreateCancelled(t *testing.T) {
	p := newPod(t)
	hanging := make(chan struct{})
	p.guest.Intercept(func(ctx context.Context, m, _, _ string) error {
		if m == "Create" {
			close(hanging)
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	})
	created := make(chan error, 1)
	go func() {
		_, err := p.Create(testContext(t), CreateRequest{ID: "c1", Spec: encode(t, spec("true")), Rootfs: rootfs()})
		created <- err
	}()
	<-hanging
	if _, err := p.State("c1", ""); !errdefs.IsUnavailable(err) {
		t.Errorf("state while being created: %v", err)
	}
	if _, err := p.Delete(testContext(t), "c1", ""); !errdefs.IsNotFound(err) {
		t.Errorf("delete: %v", err)
	}
	if err := <-created; err == nil {
		t.Error("the create succeeded")
	}
	if p.Len() != 0 || p.storage.holds("c1") != nil {
		t.Error("something is left")
	}
}

// TestDeleteNeedsNoGuest deletes while the guest hangs; the storage must be free all the same.
func TestDeleteNeedsNoGuest(t *testing.T) {
	p := newPod(t)
	p.run("c1", IO{}, "true")
	p.wait("c1", "")
	p.guest.Intercept(func(_ context.Context, m, _, _ string) error { return status.Error(codes.Unavailable, "wedged") })
	if _, err := p.Delete(testContext(t), "c1", ""); err != nil {
		t.Fatal(err)
	}
	if p.storage.holds("c1") != nil || p.Len() != 0 {
		t.Error("something is left")
	}
}

// TestDeleteRetried keeps a container whose storage cannot be released yet.
func TestDeleteRetried(t *testing.T) {
	p := newPod(t)
	p.run("c1", IO{}, "true")
	p.wait("c1", "")
	p.storage.failFree = errors.New("busy")
	if _, err := p.Delete(testContext(t), "c1", ""); err == nil || p.Len() != 1 {
		t.Errorf("delete: %v", err)
	}
	p.storage.failFree = nil
	if _, err := p.Delete(testContext(t), "c1", ""); err != nil || p.Len() != 0 {
		t.Errorf("second delete: %v", err)
	}
}

// TestBurst writes 8 MiB at exit; the exit is reported after they are in the client's FIFO.
func TestBurst(t *testing.T) {
	p := newPod(t)
	want := bytes.Repeat([]byte("0123456789abcde\n"), 8<<20/16)
	p.guest.Programs["burst"] = func(_ context.Context, pr *guesttest.Process) uint32 {
		pr.Stdout.Write(want)
		pr.Stderr.Write([]byte("done"))
		return 3
	}
	f := newFIFOs(t, false)
	p.create("c1", f.IO, "burst")
	f.collect()
	p.start("c1", "")
	if exit := p.wait("c1", ""); exit.Status != 3 {
		t.Errorf("exit status %d", exit.Status)
	}
	f.ends(t)
	if !bytes.Equal(f.stdout.Bytes(), want) || f.stderr.String() != "done" {
		t.Errorf("%d of %d bytes, stderr %q", f.stdout.Len(), len(want), f.stderr.String())
	}
}

// TestBrokenStreams breaks the connections to the guest again and again: no byte is lost or
// doubled.
func TestBrokenStreams(t *testing.T) {
	p := newPod(t)
	want := bytes.Repeat([]byte("0123456789abcde\n"), 2<<20/16)
	p.guest.Programs["burst"] = func(_ context.Context, pr *guesttest.Process) uint32 {
		for i := 0; i < len(want); i += 64 << 10 {
			pr.Stdout.Write(want[i : i+64<<10])
			if i%(256<<10) == 0 {
				p.guest.CutStreams()
			}
		}
		return 0
	}
	f := newFIFOs(t, false)
	p.create("c1", f.IO, "burst")
	f.collect()
	p.start("c1", "")
	p.wait("c1", "")
	f.ends(t)
	if !bytes.Equal(f.stdout.Bytes(), want) {
		t.Errorf("%d of %d bytes arrived, or other ones", f.stdout.Len(), len(want))
	}
}

// TestClientRestart lets the reader of a FIFO go away and come back: nothing is lost, and the
// exit waits.
func TestClientRestart(t *testing.T) {
	p := newPod(t)
	want := bytes.Repeat([]byte("0123456789abcde\n"), 400<<10/16)
	wrote := make(chan struct{})
	p.guest.Programs["burst"] = func(_ context.Context, pr *guesttest.Process) uint32 {
		pr.Stdout.Write(want)
		close(wrote)
		return 0
	}
	f := newFIFOs(t, false)
	p.create("c1", f.IO, "burst")
	f.out.Close()
	p.start("c1", "")
	<-wrote // more than the FIFO takes, but not more than is kept on the way
	if got := p.status("c1", ""); got != Running {
		t.Errorf("%v while output is undelivered", got)
	}
	f.out = openEnd(t, f.Stdout, os.O_RDONLY)
	f.collect()
	p.wait("c1", "")
	f.ends(t)
	if !bytes.Equal(f.stdout.Bytes(), want) {
		t.Errorf("%d of %d bytes", f.stdout.Len(), len(want))
	}
}

// TestOutputOutlivesExit reads a FIFO that nobody had open at the exit.
func TestOutputOutlivesExit(t *testing.T) {
	p := newPod(t)
	f := newFIFOs(t, false)
	p.create("c1", f.IO, "echo", "last", "words")
	f.out.Close()
	p.start("c1", "")
	p.wait("c1", "")
	late := openEnd(t, f.Stdout, os.O_RDONLY)
	got, err := io.ReadAll(late)
	if string(got) != "last words\n" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

// TestKilledWithStuckClient kills a process whose client does not read: its exit comes.
func TestKilledWithStuckClient(t *testing.T) {
	p := newPod(t)
	p.Set.killGrace = 10 * time.Millisecond
	full := make(chan struct{})
	p.guest.Programs["yes"] = func(ctx context.Context, pr *guesttest.Process) uint32 {
		pr.Stdout.Write(make([]byte, 400<<10))
		close(full)
		<-ctx.Done()
		return 0
	}
	f := newFIFOs(t, false)
	p.run("c1", f.IO, "yes")
	<-full
	if err := p.Kill(testContext(t), "c1", "", 9, false); err != nil {
		t.Fatal(err)
	}
	if exit := p.wait("c1", ""); exit.Status != 137 {
		t.Errorf("exit status %d", exit.Status)
	}
}

func TestExecHalfClose(t *testing.T) {
	p := newPod(t)
	p.run("c1", IO{}, "sleep")
	f := newFIFOs(t, true)
	p.exec("c1", "e1", f.IO, "cat")
	f.open(t)
	f.collect()
	if st, _ := p.State("c1", "e1"); st.Status != Created || st.PID != 0 {
		t.Errorf("state before start: %+v", st)
	}
	p.start("c1", "e1")
	want := bytes.Repeat([]byte("0123456789abcde\n"), 1<<20/16)
	if _, err := f.in.Write(want); err != nil {
		t.Fatal(err)
	}
	f.in.Close() // the end of an exec's input, without CloseIO
	if exit := p.wait("c1", "e1"); exit.Status != 0 {
		t.Errorf("exit status %d", exit.Status)
	}
	f.ends(t)
	if !bytes.Equal(f.stdout.Bytes(), want) {
		t.Errorf("%d of %d bytes came back", f.stdout.Len(), len(want))
	}
	if err := p.Exec(testContext(t), ExecRequest{ID: "c1", ExecID: "e1", Spec: encode(t, spec("true").Process)}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("same exec again: %v", err)
	}
	if _, err := p.Delete(testContext(t), "c1", "e1"); err != nil {
		t.Fatal(err)
	}
	if _, err := p.State("c1", "e1"); !errdefs.IsNotFound(err) {
		t.Errorf("state after delete: %v", err)
	}
	if p.status("c1", "") != Running {
		t.Error("the container ended with its exec")
	}
}

// TestExecLateWriter opens the client's end of an exec's input only after the exec has started:
// the lack of a writer is not the end of the input.
func TestExecLateWriter(t *testing.T) {
	p := newPod(t)
	p.run("c1", IO{}, "sleep")
	f := newFIFOs(t, true)
	p.exec("c1", "e1", f.IO, "cat")
	f.collect()
	p.start("c1", "e1")
	f.open(t)
	f.in.WriteString("late")
	f.in.Close()
	p.wait("c1", "e1")
	f.ends(t)
	if f.stdout.String() != "late" {
		t.Errorf("stdout %q", f.stdout.String())
	}
}

// TestContainerInput keeps the input of a container open while its client restarts, until CloseIO.
func TestContainerInput(t *testing.T) {
	p := newPod(t)
	f := newFIFOs(t, true)
	p.create("c1", f.IO, "cat")
	f.open(t)
	f.collect()
	p.start("c1", "")
	f.in.WriteString("one ")
	f.in.Close()
	f.open(t)
	f.in.WriteString("two")
	if err := p.CloseIO(t.Context(), "c1", "", true); err != nil {
		t.Fatal(err)
	}
	p.wait("c1", "")
	f.ends(t)
	if f.stdout.String() != "one two" {
		t.Errorf("stdout %q", f.stdout.String())
	}
}

// TestRefusedInput lets a process close its input: the client sees a closed pipe.
func TestRefusedInput(t *testing.T) {
	p := newPod(t)
	p.guest.Programs["deaf"] = func(ctx context.Context, pr *guesttest.Process) uint32 {
		pr.Stdin.Close()
		<-ctx.Done()
		return 0
	}
	p.run("c1", IO{}, "sleep")
	f := newFIFOs(t, true)
	p.exec("c1", "e1", f.IO, "deaf")
	f.open(t)
	p.start("c1", "e1")
	f.in.SetDeadline(time.Now().Add(patience))
	var err error
	for err == nil {
		_, err = f.in.Write(make([]byte, 4096))
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the client writes into the void")
	}
	p.Kill(testContext(t), "c1", "e1", 9, false)
	p.wait("c1", "e1")
}

func TestTerminal(t *testing.T) {
	p := newPod(t)
	f := newFIFOs(t, true)
	f.Terminal = true // with a stderr, as containerd sends
	p.create("c1", f.IO, "cat")
	if spec, _ := p.guest.Spec("c1"); !spec.Process.Terminal {
		t.Error("the guest's spec has no terminal")
	}
	if err := p.ResizePty(testContext(t), "c1", "", 80, 25); err != nil {
		t.Error(err)
	}
	if err := p.ResizePty(testContext(t), "c1", "", 80, 1<<16); !errdefs.IsInvalidArgument(err) {
		t.Errorf("absurd size: %v", err)
	}
	f.open(t)
	f.collecting.Go(func() { io.Copy(&f.stdout, f.out) })
	p.start("c1", "")
	f.in.WriteString("typed")
	p.CloseIO(t.Context(), "c1", "", true)
	p.wait("c1", "")
	f.ends(t)
	if f.stdout.String() != "typed" {
		t.Errorf("%q", f.stdout.String())
	}
	p.run("c2", IO{}, "sleep")
	if err := p.ResizePty(testContext(t), "c2", "", 80, 25); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("resize without a terminal: %v", err)
	}
}

func TestExecRefused(t *testing.T) {
	p := newPod(t)
	p.run("c1", IO{}, "sleep")
	for name, req := range map[string]ExecRequest{
		"bad id":  {ID: "c1", ExecID: "a/b", Spec: encode(t, spec("true").Process)},
		"no spec": {ID: "c1", ExecID: "e"},
		"no args": {ID: "c1", ExecID: "e", Spec: []byte("{}")},
		"scheme":  {ID: "c1", ExecID: "e", Spec: encode(t, spec("true").Process), IO: IO{Stdin: "tcp://x"}},
	} {
		if err := p.Exec(testContext(t), req); !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	lost := IO{Stdout: filepath.Join(t.TempDir(), "gone")}
	err := p.Exec(testContext(t), ExecRequest{ID: "c1", ExecID: "e", Spec: encode(t, spec("true").Process), IO: lost})
	if !errdefs.IsNotFound(err) {
		t.Errorf("vanished FIFO: %v", err)
	}
	p.guest.Intercept(func(_ context.Context, m, _, _ string) error {
		if m == "Exec" {
			return status.Error(codes.Internal, "boom")
		}
		return nil
	})
	if err := p.Exec(testContext(t), ExecRequest{ID: "c1", ExecID: "e", Spec: encode(t, spec("true").Process)}); !errdefs.IsInternal(err) {
		t.Errorf("refused by the guest: %v", err)
	}
	if _, err := p.State("c1", "e"); !errdefs.IsNotFound(err) {
		t.Errorf("a failed exec is left: %v", err)
	}
}

// TestGuestGone ends everything at once.
func TestGuestGone(t *testing.T) {
	p := newPod(t)
	f := newFIFOs(t, false)
	p.create("c1", f.IO, "sleep")
	f.collect()
	p.start("c1", "")
	p.run("c2", IO{}, "true")
	p.wait("c2", "")
	p.exec("c1", "e1", IO{}, "sleep")
	p.start("c1", "e1")
	type result struct {
		exit Exit
		err  error
	}
	waits := make(chan result, 2)
	for _, e := range []string{"", "e1"} {
		go func() {
			exit, err := p.Wait(testContext(t), "c1", e)
			waits <- result{exit, err}
		}()
	}
	died := time.Now()
	p.guest.Die()
	p.GuestGone(died)
	for range 2 {
		if r := <-waits; r.err != nil || r.exit.Status != ExitLost || !r.exit.At.Equal(died) {
			t.Errorf("wait: %+v", r)
		}
	}
	f.ends(t)
	if exit := p.wait("c2", ""); exit.Status != 0 {
		t.Errorf("an earlier exit became %d", exit.Status)
	}
	if p.storage.holds("c1") != nil || p.storage.holds("c2") != nil {
		t.Error("storage is left")
	}
	_, err := p.Create(testContext(t), CreateRequest{ID: "c3", Spec: encode(t, spec("true")), Rootfs: rootfs()})
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "virtual machine has ended") {
		t.Errorf("create after the end: %v", err)
	}
	calls := len(p.guest.Calls())
	for _, e := range []string{"e1", ""} {
		if st, err := p.Delete(testContext(t), "c1", e); err != nil || st.Exit.Status != ExitLost {
			t.Errorf("delete: %+v, %v", st, err)
		}
	}
	if got := p.guest.Calls(); len(got) != calls {
		t.Errorf("a dead guest was called: %v", got[calls:])
	}
}

// TestGuestGoneWhileCreating ends the guest under a create.
func TestGuestGoneWhileCreating(t *testing.T) {
	p := newPod(t)
	hanging := make(chan struct{})
	p.guest.Intercept(func(ctx context.Context, m, _, _ string) error {
		if m == "PrepareContainer" {
			close(hanging)
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	})
	created := make(chan error, 1)
	go func() {
		_, err := p.Create(testContext(t), CreateRequest{ID: "c1", Spec: encode(t, spec("true")), Rootfs: rootfs()})
		created <- err
	}()
	<-hanging
	p.GuestGone(time.Now())
	if err := <-created; !errdefs.IsUnavailable(err) {
		t.Errorf("create: %v", err)
	}
	if p.Len() != 0 || p.storage.holds("c1") != nil {
		t.Error("something is left")
	}
}

func packed(t testing.TB, m proto.Message) *task.StatsResponse {
	value, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return &task.StatsResponse{Stats: &anypb.Any{TypeUrl: string(m.ProtoReflect().Descriptor().FullName()), Value: value}}
}

// TestOOM asks for statistics the way containerd does after an exit with 137.
func TestOOM(t *testing.T) {
	answers := map[string]func(oom uint64) proto.Message{
		"v1": func(n uint64) proto.Message {
			return &cgroup1.Metrics{Memory: &cgroup1.MemoryStat{TotalRSS: 7}, MemoryOomControl: &cgroup1.MemoryOomControl{OomKill: n}}
		},
		"v2": func(n uint64) proto.Message {
			return &cgroup2.Metrics{Memory: &cgroup2.MemoryStat{Usage: 7}, MemoryEvents: &cgroup2.MemoryEvents{OomKill: n}}
		},
		"none": nil,
	}
	oomOf := func(m proto.Message) uint64 {
		switch m := m.(type) {
		case *cgroup1.Metrics:
			return m.GetMemoryOomControl().GetOomKill()
		case *cgroup2.Metrics:
			return m.GetMemoryEvents().GetOomKill()
		}
		return 0
	}
	for name, answer := range answers {
		for _, from := range []string{"event", "counter"} {
			if answer == nil && from == "counter" {
				continue
			}
			t.Run(name+" by "+from, func(t *testing.T) {
				p := newPod(t)
				var mu sync.Mutex
				counter := uint64(0)
				if answer != nil {
					p.guest.AnswerStats(func(string) (*task.StatsResponse, error) {
						mu.Lock()
						defer mu.Unlock()
						return packed(t, answer(counter)), nil
					})
				}
				p.run("c1", IO{}, "sleep")
				if answer != nil {
					if m, err := p.Stats(testContext(t), "c1"); err != nil || oomOf(m) != 0 {
						t.Errorf("before: %v, %v", m, err)
					}
				}
				if from == "event" {
					p.OOM("c1")
				} else {
					mu.Lock()
					counter = 1
					mu.Unlock()
				}
				p.OOM("unknown")
				p.Kill(testContext(t), "c1", "", 9, true)
				p.wait("c1", "")
				p.guest.AnswerStats(nil) // its cgroup is gone
				m, err := p.Stats(testContext(t), "c1")
				if err != nil || oomOf(m) != 1 {
					t.Errorf("after the exit: %v, %v", m, err)
				}
			})
		}
	}
}

// TestStatsOfSlowGuest answers with the last values, and asks the guest no more often than once
// at a time.
func TestStatsOfSlowGuest(t *testing.T) {
	p := newPod(t)
	p.run("c1", IO{}, "sleep")
	if _, err := p.Stats(testContext(t), "c1"); err == nil {
		t.Error("statistics from nowhere")
	}
	p.guest.AnswerStats(func(string) (*task.StatsResponse, error) {
		return packed(t, &cgroup2.Metrics{Memory: &cgroup2.MemoryStat{Usage: 7}}), nil
	})
	if _, err := p.Stats(testContext(t), "c1"); err != nil {
		t.Fatal(err)
	}
	calls := func() int {
		n := 0
		for _, c := range p.guest.Calls() {
			if c == "Stats c1" {
				n++
			}
		}
		return n
	}
	before := calls()
	for range 10 {
		p.Stats(testContext(t), "c1")
	}
	if n := calls() - before; n > 0 {
		t.Errorf("%d calls within the age of the last answer", n)
	}
	release := make(chan struct{})
	defer close(release)
	p.guest.AnswerStats(func(string) (*task.StatsResponse, error) {
		<-release
		return nil, errors.New("late")
	})
	p.Set.mu.Lock()
	p.Set.containers["c1"].stats.at = time.Time{} // long ago
	p.Set.mu.Unlock()
	m, err := p.Stats(testContext(t), "c1")
	if err != nil || m.(*cgroup2.Metrics).GetMemory().GetUsage() != 7 {
		t.Errorf("%v, %v", m, err)
	}
	p.Stats(testContext(t), "c1")
	if n := calls() - before; n != 1 {
		t.Errorf("%d calls to a guest that has not answered", n)
	}
}

func TestUpdate(t *testing.T) {
	p := newPod(t)
	p.run("c1", IO{}, "sleep")
	err := p.Update(testContext(t), "c1", []byte(`{"memory":{"limit":67108864},"cpu":{"shares":512,"cpus":"0-3","mems":"0"},"unified":{"memory.high":"1","cpuset.cpus":"3"}}`))
	if err != nil {
		t.Fatal(err)
	}
	want := `{"memory":{"limit":67108864},"cpu":{"shares":512},"unified":{"memory.high":"1"}}`
	if got := p.guest.Updates(); len(got) != 1 || string(got[0]) != want {
		t.Errorf("%s", got)
	}
	if err := p.Update(testContext(t), "c1", []byte("[")); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad JSON: %v", err)
	}
}

// TestHostileGuest lets the guest answer what no honest one does. The pod is failed, once.
func TestHostileGuest(t *testing.T) {
	tests := map[string]func(t *testing.T, p *pod){
		"exit status": func(t *testing.T, p *pod) {
			p.guest.Exited = func(w *task.WaitResponse) { w.ExitStatus = 1 << 20 }
			p.run("c1", IO{}, "true")
		},
		"stats type": func(t *testing.T, p *pod) {
			p.guest.AnswerStats(func(string) (*task.StatsResponse, error) {
				return &task.StatsResponse{Stats: &anypb.Any{TypeUrl: "kuasar.Evil"}}, nil
			})
			p.run("c1", IO{}, "sleep")
			if _, err := p.Stats(testContext(t), "c1"); err == nil {
				t.Error("accepted")
			}
		},
		"stats bytes": func(t *testing.T, p *pod) {
			p.guest.AnswerStats(func(string) (*task.StatsResponse, error) {
				r := packed(t, &cgroup1.Metrics{})
				r.Stats.Value = []byte{0xff}
				return r, nil
			})
			p.run("c1", IO{}, "sleep")
			if _, err := p.Stats(testContext(t), "c1"); err == nil {
				t.Error("accepted")
			}
		},
		"long frame": func(t *testing.T, p *pod) {
			p.run("c1", IO{}, "sleep")
			p.guest.Intercept(func(_ context.Context, m, _, _ string) error {
				// What the ttrpc client makes of such a frame.
				return status.Error(codes.ResourceExhausted, "message length 4194305 exceed maximum message size of 4194304")
			})
			if err := p.Pause(testContext(t), "c1"); err == nil {
				t.Error("accepted")
			}
			p.Pause(testContext(t), "c1")
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			p := newPod(t)
			test(t, p)
			for deadline := time.Now().Add(patience); len(p.failures()) == 0 && time.Now().Before(deadline); {
				time.Sleep(time.Millisecond)
			}
			got := p.failures()
			if len(got) != 1 || !strings.Contains(got[0].Error(), "the guest misbehaves") {
				t.Errorf("violations: %v", got)
			}
			p.GuestGone(time.Now())
			if exit := p.wait("c1", ""); exit.Status != ExitLost {
				t.Errorf("exit status %d", exit.Status)
			}
		})
	}
}

// TestAbsurdTime clamps the guest's clock.
func TestAbsurdTime(t *testing.T) {
	for _, at := range []*timestamppb.Timestamp{nil, {Seconds: 1}, {Seconds: 1 << 40}, {Seconds: 1 << 62}, {Nanos: -5}} {
		p := newPod(t)
		p.guest.Exited = func(w *task.WaitResponse) { w.ExitedAt = at }
		before := time.Now()
		p.run("c1", IO{}, "true")
		if exit := p.wait("c1", ""); exit.At.Before(before) || exit.At.After(time.Now()) {
			t.Errorf("%v became %v", at, exit.At)
		}
		if got := p.failures(); got != nil {
			t.Errorf("violations: %v", got)
		}
	}
}

// TestLongMessage bounds an error text of the guest and makes it printable.
func TestLongMessage(t *testing.T) {
	p := newPod(t)
	p.guest.Intercept(func(_ context.Context, m, _, _ string) error {
		return status.Error(codes.Internal, "\x1b[31m"+strings.Repeat("x", 1<<20))
	})
	_, err := p.Create(testContext(t), CreateRequest{ID: "c1", Spec: encode(t, spec("true")), Rootfs: rootfs()})
	if err == nil || len(err.Error()) > 2*maxMessage || strings.Contains(err.Error(), "\x1b") {
		t.Errorf("%d bytes: %.80q", len(fmt.Sprint(err)), err)
	}
}

// TestConcurrency runs whole lives in parallel, for the race detector.
func TestConcurrency(t *testing.T) {
	p := newPod(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			id := fmt.Sprintf("c%d", i)
			for range 5 {
				f := newFIFOs(t, false)
				p.create(id, f.IO, "echo", id)
				f.collect()
				p.start(id, "")
				p.exec2(id)
				p.Records()
				p.wait(id, "")
				f.ends(t)
				if f.stdout.String() != id+"\n" {
					t.Errorf("%s: %q", id, f.stdout.String())
				}
				if _, err := p.Delete(testContext(t), id, ""); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if p.Len() != 0 || len(p.storage.held) != 0 {
		t.Errorf("%d containers, storage %v", p.Len(), p.storage.held)
	}
}

// exec2 execs into a container that may be ending.
func (p *pod) exec2(id string) {
	err := p.Exec(testContext(p.t), ExecRequest{ID: id, ExecID: "e", Spec: encode(p.t, spec("true").Process)})
	if err != nil {
		return
	}
	if _, err := p.Start(testContext(p.t), id, "e"); err == nil {
		p.wait(id, "e")
	}
	p.Delete(testContext(p.t), id, "e")
}

// TestRestore hands a running pod from one Set to the next.
func TestRestore(t *testing.T) {
	p := newPod(t)
	p.guest.Programs["talk"] = func(ctx context.Context, pr *guesttest.Process) uint32 {
		pr.Stdout.Write([]byte("one "))
		<-ctx.Done()
		pr.Stdout.Write([]byte("two"))
		return 0
	}
	f := newFIFOs(t, false)
	p.create("c1", f.IO, "talk")
	p.start("c1", "")
	p.run("c2", IO{}, "false")
	p.wait("c2", "")
	buffer := make([]byte, 4)
	f.out.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.ReadFull(f.out, buffer); err != nil || string(buffer) != "one " {
		t.Fatalf("%q, %v", buffer, err)
	}
	f.out.SetReadDeadline(time.Time{})
	st, _ := p.State("c1", "")
	p.Set.HandOver()

	records := p.journalled()
	next := &pod{t: t, guest: p.guest, storage: p.storage}
	next.Set = NewSet(next.options())
	defer next.Set.Close()
	if err := next.Restore(testContext(t), records); err != nil {
		t.Fatal(err)
	}
	if got, err := next.State("c1", ""); err != nil || got != st {
		t.Errorf("%+v, %v, was %+v", got, err, st)
	}
	if exit := next.wait("c2", ""); exit.Status != 1 {
		t.Errorf("an old exit became %d", exit.Status)
	}
	f.collect()
	next.Kill(testContext(t), "c1", "", 15, false)
	if exit := next.wait("c1", ""); exit.Status != 128+15 {
		t.Errorf("exit status %d", exit.Status)
	}
	f.ends(t)
	if f.stdout.String() != "two" {
		t.Errorf("%q", f.stdout.String())
	}
	for _, id := range []string{"c1", "c2"} {
		if _, err := next.Delete(testContext(t), id, ""); err != nil {
			t.Error(err)
		}
	}
	for name, bad := range map[string]Record{
		"id":         {ID: "../x", Processes: []ProcessRecord{{Status: Running}}},
		"no process": {ID: "c"},
		"status":     {ID: "c", Processes: []ProcessRecord{{Status: 9}}},
		"exec first": {ID: "c", Processes: []ProcessRecord{{ExecID: "e", Status: Running}}},
	} {
		if err := next.Restore(testContext(t), []Record{bad}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRestoreLies lets the guest answer for another container.
func TestRestoreLies(t *testing.T) {
	p := newPod(t)
	p.run("c1", IO{}, "sleep")
	records := p.journalled()
	p.Set.HandOver()
	next := &pod{t: t, guest: p.guest, storage: p.storage}
	opts := next.options()
	opts.Guest = liar{p.guest}
	next.Set = NewSet(opts)
	defer next.Set.Close()
	if err := next.Restore(testContext(t), records); err != nil {
		t.Fatal(err)
	}
	if got := next.failures(); len(got) != 1 {
		t.Errorf("violations: %v", got)
	}
}

type liar struct{ *guesttest.Guest }

func (l liar) Task() task.TTRPCTaskService { return lyingTask{l.Guest.Task()} }

type lyingTask struct{ task.TTRPCTaskService }

func (l lyingTask) State(ctx context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	a, err := l.TTRPCTaskService.State(ctx, r)
	if a != nil {
		a.ID = "another"
	}
	return a, err
}

// TestCloseKeepsUnread closes a Set while a write to the client blocks: what the client did not
// get counts as not consumed.
func TestCloseKeepsUnread(t *testing.T) {
	p := newPod(t)
	want := bytes.Repeat([]byte("0123456789abcde\n"), 400<<10/16)
	full := make(chan struct{})
	p.guest.Programs["burst"] = func(_ context.Context, pr *guesttest.Process) uint32 {
		pr.Stdout.Write(want)
		close(full)
		return 0
	}
	f := newFIFOs(t, false)
	p.run("c1", f.IO, "burst")
	<-full
	p.Set.HandOver()
	// The client reads what it has got before the next daemon comes, and goes on after it.
	got := make([]byte, 0, len(want))
	chunk := make([]byte, 4096)
	for {
		n, err := f.out.Read(chunk)
		got = append(got, chunk[:n]...)
		if err != nil {
			break
		}
	}
	records := p.journalled()
	if consumed := records[0].Processes[0].Consumed[0]; consumed != uint64(len(got)) {
		t.Errorf("%d bytes are consumed, the client has %d", consumed, len(got))
	}
	next := &pod{t: t, guest: p.guest, storage: p.storage}
	next.Set = NewSet(next.options())
	defer next.Set.Close()
	if err := next.Restore(testContext(t), records); err != nil {
		t.Fatal(err)
	}
	f.out = openEnd(t, f.Stdout, os.O_RDONLY)
	f.collect()
	next.wait("c1", "")
	f.ends(t)
	if !bytes.Equal(append(got, f.stdout.Bytes()...), want) {
		t.Errorf("%d and %d of %d bytes", len(got), f.stdout.Len(), len(want))
	}
}

// TestLongFrame answers a call with a frame that is longer than ttrpc allows, on the wire.
func TestLongFrame(t *testing.T) {
	p := newPod(t)
	p.run("c1", IO{}, "sleep")
	host, guest := net.Pipe()
	client := ttrpc.NewClient(host)
	defer client.Close()
	go func() {
		head := make([]byte, 10) // length u32, stream id u32, type, flags
		if _, err := io.ReadFull(guest, head); err != nil {
			return
		}
		io.CopyN(io.Discard, guest, int64(binary.BigEndian.Uint32(head)))
		const long = 4<<20 + 1
		binary.BigEndian.PutUint32(head, long)
		head[8] = 2 // a response
		guest.Write(head)
		guest.Write(make([]byte, long))
	}()
	next := &pod{t: t, guest: p.guest, storage: p.storage}
	opts := next.options()
	opts.Guest = wired{p.guest, task.NewTTRPCTaskClient(client)}
	next.Set = NewSet(opts)
	defer next.Set.Close()
	_, err := next.Create(testContext(t), CreateRequest{ID: "c2", Spec: encode(t, spec("true")), Rootfs: rootfs()})
	if err == nil {
		t.Error("accepted")
	}
	if got := next.failures(); len(got) != 1 || !strings.Contains(got[0].Error(), "too long") {
		t.Errorf("violations: %v", got)
	}
}

// wired is a guest whose Task service is somewhere else.
type wired struct {
	*guesttest.Guest
	service task.TTRPCTaskService
}

func (w wired) Task() task.TTRPCTaskService { return w.service }

// TestRestoreAfterKill restores from records that are older than what the client has got and
// sent, as after a SIGKILL of the daemon.
func TestRestoreAfterKill(t *testing.T) {
	p := newPod(t)
	f := newFIFOs(t, true)
	p.create("c1", f.IO, "cat")
	f.open(t)
	p.start("c1", "")
	records := p.Records() // nothing was written yet
	say := func(text string) (before string) {
		t.Helper()
		f.in.WriteString(text)
		f.out.SetReadDeadline(time.Now().Add(patience))
		var got []byte
		for !strings.HasSuffix(string(got), text) {
			buffer := make([]byte, 64)
			n, err := f.out.Read(buffer)
			if err != nil && n == 0 && err != io.EOF {
				t.Fatalf("%q came back as %q, %v", text, got, err)
			}
			got = append(got, buffer[:n]...)
		}
		return strings.TrimSuffix(string(got), text)
	}
	say("before")
	p.Set.HandOver()
	next := &pod{t: t, guest: p.guest, storage: p.storage}
	next.Set = NewSet(next.options())
	defer next.Set.Close()
	if err := next.Restore(testContext(t), records); err != nil {
		t.Fatal(err)
	}
	// An acknowledgement that was under way is lost with the daemon: its bytes come again.
	if again := say("after"); again != "" && again != "before" {
		t.Errorf("%q came, too", again)
	}
	next.CloseIO(t.Context(), "c1", "", true)
	if exit := next.wait("c1", ""); exit.Status != 0 {
		t.Errorf("exit status %d", exit.Status)
	}
}
