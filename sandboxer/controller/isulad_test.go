package controller

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/anypb"

	"kuasar.io/kuasar/sandboxer/container"
	"kuasar.io/kuasar/sandboxer/pod"
)

// The ids in testdata.
var (
	podID  = strings.Repeat("5ab1", 16)
	ctrID  = strings.Repeat("c0de", 16)
	execID = strings.Repeat("e8ec", 16)
)

// recorded returns a request of testdata: hexadecimal digits, and comments that say what they are.
func recorded(t testing.TB, file string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", file+".hex"))
	if err != nil {
		t.Fatal(err)
	}
	var digits strings.Builder
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "#") {
			digits.WriteString(strings.TrimSpace(line))
		}
	}
	b, err := hex.DecodeString(digits.String())
	if err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	return b
}

// methodOf is the method of a file of testdata.
func methodOf(file string) method {
	name := strings.TrimSuffix(filepath.Base(file), ".hex")
	return method(strings.TrimSuffix(strings.TrimSuffix(name, "Exec"), "Empty"))
}

func recordedFiles(t testing.TB) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/*/*.hex")
	if err != nil || len(files) < 30 {
		t.Fatalf("files %v, %v", files, err)
	}
	for i, f := range files {
		files[i] = strings.TrimSuffix(strings.TrimPrefix(f, "testdata/"), ".hex")
	}
	return files
}

// podWithContainers are pods that take announcements.
type podWithContainers struct {
	fakePods
	mu     sync.Mutex
	known  map[string][]string
	calls  []string
	ctrs   map[string]container.CreateRequest
	execs  map[string]container.ExecRequest
	errs   map[string]error // by call
	gone   bool             // the pod is not known
	during func()           // called by AnnounceContainer
}

func (p *podWithContainers) did(format string, args ...any) error {
	call := strings.TrimSpace(fmt.Sprintf(format, args...))
	call = strings.NewReplacer(ctrID, "ctr", execID, "exec", podID, "pod").Replace(call)
	p.calls = append(p.calls, call)
	return p.errs[call]
}

func (p *podWithContainers) Announced(id string) (map[string][]string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gone {
		return nil, fmt.Errorf("pod %s: %w", id, errdefs.ErrNotFound)
	}
	known := map[string][]string{}
	for id, execs := range p.known {
		known[id] = slices.Clone(execs)
	}
	return known, nil
}

func (p *podWithContainers) AnnounceContainer(_ context.Context, id string, c container.CreateRequest) error {
	if p.during != nil {
		p.during()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.did("announce %s", c.ID); err != nil {
		return err
	}
	if p.known == nil {
		p.known, p.ctrs, p.execs = map[string][]string{}, map[string]container.CreateRequest{}, map[string]container.ExecRequest{}
	}
	p.known[c.ID], p.ctrs[c.ID] = nil, c
	return nil
}

func (p *podWithContainers) AnnounceProcess(_ context.Context, id string, e container.ExecRequest) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.did("announce %s %s", e.ID, e.ExecID); err != nil {
		return err
	}
	p.known[e.ID] = append(p.known[e.ID], e.ExecID)
	p.execs[e.ExecID] = e
	return nil
}

func (p *podWithContainers) Withdraw(_ context.Context, _, id, exec string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.did("withdraw %s %s", id, exec); err != nil {
		return err
	}
	execs, ok := p.known[id]
	switch {
	case !ok || exec != "" && !slices.Contains(execs, exec):
		return fmt.Errorf("%s %s: %w", id, exec, errdefs.ErrNotFound)
	case exec == "":
		delete(p.known, id)
	default:
		p.known[id] = slices.DeleteFunc(execs, func(e string) bool { return e == exec })
	}
	return nil
}

// took returns what the pods were told since the last time.
func (p *podWithContainers) took() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	calls := p.calls
	p.calls = nil
	return calls
}

// ask sends a request's bytes and returns the fields of the answer: bytes as text, numbers in decimal.
func ask(t *testing.T, conn *grpc.ClientConn, m method, b []byte) (map[protowire.Number]string, error) {
	t.Helper()
	var reply []byte
	if err := conn.Invoke(t.Context(), "/"+serviceName+"/"+string(m), b, &reply, grpc.ForceCodecV2(rawCodec{})); err != nil {
		return nil, err
	}
	got := map[protowire.Number]string{}
	for len(reply) > 0 {
		number, kind, n := protowire.ConsumeTag(reply)
		if n < 0 {
			t.Fatal(protowire.ParseError(n))
		}
		reply = reply[n:]
		if kind == protowire.VarintType {
			v, n := protowire.ConsumeVarint(reply)
			if n < 0 {
				t.Fatal(protowire.ParseError(n))
			}
			got[number], reply = fmt.Sprint(v), reply[n:]
			continue
		}
		v, n := protowire.ConsumeBytes(reply)
		if n < 0 {
			t.Fatal(protowire.ParseError(n))
		}
		got[number], reply = string(v), reply[n:]
	}
	return got, nil
}

func TestDialectOf(t *testing.T) {
	for _, file := range recordedFiles(t) {
		m := methodOf(file)
		want := dialect(containerd{})
		switch dir := filepath.Dir(file); {
		case dir == "isulad213", dir == "client213", dir == "client215":
			want = isulad213{}
		case (dir == "isulad216" || dir == "client216") && (m == create || m == update):
			want = isulad216{}
		}
		if got := dialectOf(m, recorded(t, file)); got != want {
			t.Errorf("%s was taken for %T, want %T", file, got, want)
		}
	}
	text := func(n protowire.Number, s string) []byte {
		return protowire.AppendString(protowire.AppendTag(nil, n, protowire.BytesType), s)
	}
	number := func(n protowire.Number) []byte {
		return protowire.AppendVarint(protowire.AppendTag(nil, n, protowire.VarintType), 1)
	}
	for _, tc := range []struct {
		name string
		m    method
		raw  []byte
		want dialect
	}{
		{"nothing", start, nil, containerd{}},
		{"an id alone", start, text(1, "a"), containerd{}},
		{"containerd's Stop without a sandboxer", stop, slices.Concat(text(1, "a"), number(2)), containerd{}},
		{"containerd's Status without a sandboxer", state, slices.Concat(text(1, "a"), number(2)), containerd{}},
		{"a rootfs from containerd without a sandboxer", create, slices.Concat(text(1, "a"), text(2, "m"), text(6, "s")), containerd{}},
		{"a rootfs from iSulad 2.1.6", create, slices.Concat(text(1, "a"), text(2, "m"), text(10, "vmm")), isulad216{}},
		{"typed options", create, slices.Concat(text(1, "a"), text(3, string(text(1, "url"))), text(10, "vmm")), containerd{}},
		{"a rootfs and typed options", create, slices.Concat(text(1, "a"), text(2, "m"), text(3, string(text(1, "url"))), text(10, "vmm")), containerd{}},
		{"no sandboxer's name", start, text(2, "a"), isulad213{}},
		{"an empty sandboxer in field 10", start, slices.Concat(text(1, "vmm"), text(2, "a"), text(10, "")), isulad213{}},
		{"unknown fields", start, slices.Concat(text(1, "vmm"), text(2, "a"), text(99, "x"), number(100)), isulad213{}},
		{"the terminal flag is no sandboxer", prepare, slices.Concat(text(1, "vmm"), text(2, "a"), number(10)), isulad213{}},
		{"an update of other things", update, slices.Concat(text(1, "a"), text(2, "vmm"), text(4, "extensions")), containerd{}},
		{"fields in another order", start, slices.Concat(text(10, "vmm"), text(1, "a")), containerd{}},
		{"a torn end", start, slices.Concat(text(1, "vmm"), text(2, "a"), []byte{0xff}), isulad213{}},
	} {
		if got := dialectOf(tc.m, tc.raw); got != tc.want {
			t.Errorf("%s: %T, want %T", tc.name, got, tc.want)
		}
	}
}

// All dialects on one socket at the same time, each with its own numbers in the answers.
func TestDialectsTogether(t *testing.T) {
	born := time.Unix(1700000000, 0)
	pods := &podWithContainers{fakePods: fakePods{status: pod.Status{
		ID: podID, State: pod.Ready, PID: 42, CreatedAt: born, Address: "vsock://7:1024", Version: 2,
		ExitStatus: 9, ExitedAt: born,
	}}}
	conn, _, _ := serve(t, pods)
	at := "\x08\x80\xe2\xcf\xaa\x06"
	client := map[string]pod.Client{"isulad213": pod.ISulad213, "isulad216": pod.ISulad216, "containerd": pod.Containerd}
	for dir, want := range map[string]map[method]map[protowire.Number]string{
		"isulad213": {
			create: {1: podID},
			start:  {1: podID, 2: "42", 3: at, 5: "vsock://7:1024"},
			state:  {1: podID, 2: "42", 3: "SANDBOX_READY", 4: "vsock://7:1024", 6: at, 7: at},
			wait:   {1: "9", 2: at}, stop: {}, shutdown: {}, updateResources: {},
		},
		"isulad216": {
			create: {1: podID},
			start:  {1: podID, 2: "42", 3: at, 5: "vsock://7:1024", 6: "2"},
			state:  {1: podID, 2: "42", 3: "SANDBOX_READY", 5: at, 6: at, 8: "vsock://7:1024", 9: "2"},
			wait:   {1: "9", 2: at}, stop: {}, shutdown: {},
		},
		"containerd": {
			create: {1: podID},
			start:  {1: podID, 2: "42", 3: at, 5: "vsock://7:1024", 6: "2"},
			wait:   {1: "9", 2: at}, stop: {}, shutdown: {}, update: {},
		},
	} {
		t.Run(dir, func(t *testing.T) {
			// fakePods keep what they were asked for, so that only reading calls may run together.
			for m, fields := range want {
				got, err := ask(t, conn, m, recorded(t, dir+"/"+string(m)))
				if err != nil || !maps.Equal(got, fields) {
					t.Errorf("%s: %q, %v; want %q", m, got, err, fields)
				}
				switch {
				case m == create && (pods.created.ID != podID || pods.created.Config.GetHostname() != "box" ||
					pods.created.Client != client[dir] || !strings.HasPrefix(pods.created.NetNS, "/var/run/netns/")):
					t.Errorf("created %+v", pods.created)
				case m == stop && dir != "containerd" && pods.grace != 10*time.Second:
					t.Errorf("grace %v", pods.grace)
				}
			}
			p, err := ask(t, conn, platform, recorded(t, dir+"/Platform"))
			if err != nil || !strings.Contains(p[1], "linux") {
				t.Errorf("platform: %q, %v", p, err)
			}
		})
	}
	// At once.
	var wg sync.WaitGroup
	for range 20 {
		for dir, field := range map[string]protowire.Number{"isulad213": 4, "isulad216": 8} {
			wg.Go(func() {
				got, err := ask(t, conn, state, recorded(t, dir+"/Status"))
				if err != nil || got[field] != "vsock://7:1024" {
					t.Errorf("%s: %q, %v", dir, got, err)
				}
			})
		}
	}
	wg.Wait()
	// Not ready has another text, in both.
	pods.status.State = pod.Stopped
	for _, dir := range []string{"isulad213", "isulad216"} {
		if got, err := ask(t, conn, state, recorded(t, dir+"/Status")); err != nil || got[3] != "SANDBOX_NOTREADY" {
			t.Errorf("%s: %q, %v", dir, got, err)
		}
	}
	// Platform answers whatever becomes of pods, as clients ask it whether the daemon is there.
	pods.err = errors.New("no pods")
	for _, dir := range []string{"isulad213", "isulad216", "containerd"} {
		if _, err := ask(t, conn, platform, recorded(t, dir+"/Platform")); err != nil {
			t.Errorf("%s: platform: %v", dir, err)
		}
	}
}

func TestPrepareAndPurge(t *testing.T) {
	pods := &podWithContainers{}
	conn, _, _ := serve(t, pods)
	for _, step := range []struct {
		file string
		want []string
	}{
		{"Prepare", []string{"announce ctr"}},
		{"Prepare", []string{"announce ctr"}}, // a start that failed is not purged
		{"PrepareExec", []string{"announce ctr exec"}},
		{"PurgeExec", []string{"withdraw ctr exec"}},
		{"PurgeExec", []string{"withdraw ctr exec"}}, // not known any more
		{"Purge", []string{"withdraw ctr"}},
		{"Purge", []string{"withdraw ctr"}},
	} {
		_, err := ask(t, conn, methodOf(step.file), recorded(t, "isulad213/"+step.file))
		if got := pods.took(); err != nil || !slices.Equal(got, step.want) {
			t.Errorf("%s: %q, %v; want %q", step.file, got, err, step.want)
		}
	}
	c, e := pods.ctrs[ctrID], pods.execs[execID]
	if len(c.Rootfs) != 1 || c.Rootfs[0].Type != "bind" || !strings.HasSuffix(c.Rootfs[0].Source, "/merged") ||
		c.IO != (container.IO{Stdin: "/run/i/in", Stdout: "/run/i/out", Terminal: true}) || !json.Valid(c.Spec) || c.Bundle != "" {
		t.Errorf("container %+v", c)
	}
	if e.IO != (container.IO{Stdout: "vsock://7:2000", Stderr: "vsock://7:2001"}) || !strings.Contains(string(e.Spec), `"ls"`) {
		t.Errorf("process %+v", e)
	}
	pods.errs = map[string]error{"announce ctr": fmt.Errorf("no pod: %w", errdefs.ErrNotFound), "withdraw ctr": errors.New("busy")}
	if _, err := ask(t, conn, prepare, recorded(t, "isulad213/Prepare")); status.Code(err) != codes.NotFound {
		t.Errorf("prepare: %v", err)
	}
	if _, err := ask(t, conn, purge, recorded(t, "isulad213/Purge")); status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "busy") {
		t.Errorf("purge: %v", err)
	}
}

func TestUpdateFollowsSnapshots(t *testing.T) {
	pods := &podWithContainers{}
	conn, _, _ := serve(t, pods)
	for _, step := range []struct {
		file string
		want []string
	}{
		{"Update", []string{"announce ctr"}},
		{"Update", nil},
		{"UpdateExec", []string{"announce ctr exec"}},
		{"UpdateExec", nil},
		{"Update", []string{"withdraw ctr exec"}},
		{"UpdateEmpty", []string{"withdraw ctr"}},
		{"UpdateEmpty", nil},
		{"UpdateExec", []string{"announce ctr", "announce ctr exec"}},
	} {
		_, err := ask(t, conn, update, recorded(t, "isulad216/"+step.file))
		if got := pods.took(); err != nil || !slices.Equal(got, step.want) {
			t.Errorf("%s: %q, %v; want %q", step.file, got, err, step.want)
		}
	}
	c, e := pods.ctrs[ctrID], pods.execs[execID]
	if len(c.Rootfs) != 1 || c.Rootfs[0].Type != "bind" || c.IO != (container.IO{Stdin: "/run/i/in", Stdout: "/run/i/out", Terminal: true}) {
		t.Errorf("container %+v", c)
	}
	if e.IO != (container.IO{Stdout: "/run/i/exec-out", Stderr: "/run/i/exec-err"}) || e.ID != ctrID {
		t.Errorf("process %+v", e)
	}
	// A pod that is not known has nothing to withdraw, and takes nothing.
	pods.gone = true
	if _, err := ask(t, conn, update, recorded(t, "isulad216/UpdateEmpty")); err != nil {
		t.Error(err)
	}
	if _, err := ask(t, conn, update, recorded(t, "isulad216/Update")); status.Code(err) != codes.NotFound {
		t.Errorf("update of an unknown pod: %v", err)
	}
}

func TestFollowGoesOnAfterErrors(t *testing.T) {
	pods := &podWithContainers{
		known: map[string][]string{"old": nil, "stuck": nil}, ctrs: map[string]container.CreateRequest{}, execs: map[string]container.ExecRequest{},
		errs: map[string]error{
			"withdraw stuck": errors.New("cannot withdraw container stuck: in use"), "withdraw old": fmt.Errorf("old: %w", errdefs.ErrNotFound),
			"announce bad": fmt.Errorf("cannot announce container bad: no such directory: %w", errdefs.ErrInvalidArgument),
		},
	}
	c := New(pods, nil)
	tasks := []task{
		{CreateRequest: container.CreateRequest{ID: "bad"}, processes: []container.ExecRequest{{ID: "bad", ExecID: "p"}}},
		{CreateRequest: container.CreateRequest{ID: "good"}, processes: []container.ExecRequest{{ID: "good", ExecID: "p"}}},
	}
	err := c.follow(t.Context(), podID, tasks)
	want := []string{"withdraw old", "withdraw stuck", "announce bad", "announce good", "announce good p"}
	if got := pods.took(); !slices.Equal(got, want) {
		t.Errorf("calls %q, want %q", got, want)
	}
	if err == nil || !strings.Contains(err.Error(), "cannot withdraw container stuck: in use") ||
		!strings.Contains(err.Error(), "cannot announce container bad: no such directory") || strings.Contains(err.Error(), "old") {
		t.Errorf("error %v", err)
	}
	// What failed is tried again with the next snapshot.
	pods.errs = nil
	delete(pods.known, "old")
	if err := c.follow(t.Context(), podID, tasks); err != nil {
		t.Error(err)
	}
	if got, want := pods.took(), []string{"withdraw stuck", "announce bad", "announce bad p"}; !slices.Equal(got, want) {
		t.Errorf("calls %q, want %q", got, want)
	}
}

// Two snapshots of one pod are followed one after the other, those of others meanwhile.
func TestFollowOneAtATime(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	pods := &podWithContainers{during: func() { entered <- struct{}{}; <-leave }}
	c := New(pods, nil)
	tasks := []task{{CreateRequest: container.CreateRequest{ID: "a"}}}
	first := make(chan error, 1)
	go func() { first <- c.follow(context.Background(), "one", tasks) }()
	<-entered
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("the client left"))
	if err := c.follow(ctx, "one", tasks); err == nil || !strings.Contains(err.Error(), "the client left") {
		t.Errorf("a second snapshot of the pod: %v", err)
	}
	if err := c.follow(t.Context(), "two", nil); err != nil {
		t.Errorf("a snapshot of another pod: %v", err)
	}
	close(leave)
	if err := <-first; err != nil {
		t.Error(err)
	}
	if len(c.snapshots.names) != 0 {
		t.Errorf("locks are left: %v", c.snapshots.names)
	}
}

func TestAnnouncementsNeedContainers(t *testing.T) {
	conn, _, _ := serve(t, &fakePods{})
	for _, file := range []string{
		"isulad213/Prepare", "isulad213/PrepareExec", "isulad213/Purge", "isulad213/PurgeExec", "isulad216/Update", "isulad216/UpdateEmpty",
	} {
		_, err := ask(t, conn, methodOf(file), recorded(t, file))
		if status.Code(err) != codes.Unimplemented || !strings.Contains(status.Convert(err).Message(), "containers") {
			t.Errorf("%s: %v", file, err)
		}
	}
}

// A status of Wait says that the pod has ended, so that only what says so may have one.
func TestWaitErrors(t *testing.T) {
	pods := &fakePods{}
	conn, _, _ := serve(t, pods)
	for _, dir := range []string{"isulad213", "isulad216", "containerd"} {
		for _, tc := range []struct {
			err  error
			want codes.Code
		}{
			{fmt.Errorf("no pod: %w", errdefs.ErrNotFound), codes.NotFound},
			{errors.New("disk on fire"), codes.Unavailable},
			{context.Canceled, codes.Unavailable},
			{fmt.Errorf("later: %w", errdefs.ErrFailedPrecondition), codes.Unavailable},
			{fmt.Errorf("stopping: %w", errdefs.ErrUnavailable), codes.Unavailable},
		} {
			pods.err = tc.err
			_, err := ask(t, conn, wait, recorded(t, dir+"/Wait"))
			if status.Code(err) != tc.want || status.Convert(err).Message() != tc.err.Error() {
				t.Errorf("%s: %v crossed as %v", dir, tc.err, err)
			}
		}
	}
}

// cleartextHTTPS makes requests say https although nothing is encrypted.
type cleartextHTTPS struct {
	credentials.TransportCredentials
}

func (c cleartextHTTPS) Clone() credentials.TransportCredentials { return c }
func (c cleartextHTTPS) Info() credentials.ProtocolInfo {
	info := c.TransportCredentials.Info()
	info.SecurityProtocol = "tls"
	return info
}

// The client library of iSulad 2.1.6 sends ":scheme: https" and ":authority: [::]" on the plain socket.
func TestHeadersOfISulad216(t *testing.T) {
	plain, _, _ := serve(t, &fakePods{status: pod.Status{ID: podID, Address: "a"}})
	conn, err := grpc.NewClient(plain.Target(), grpc.WithAuthority("[::]"),
		grpc.WithTransportCredentials(cleartextHTTPS{insecure.NewCredentials()}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got, err := ask(t, conn, start, recorded(t, "isulad216/Start")); err != nil || got[5] != "a" {
		t.Errorf("start: %q, %v", got, err)
	}
}

// brokenPods have a defect in Wait.
type brokenPods struct{ fakePods }

func (*brokenPods) Wait(context.Context, string) (pod.Status, error) { panic("a defect") }

func TestPanicDoesNotEndPods(t *testing.T) {
	conn, _, log := serve(t, &brokenPods{})
	_, err := ask(t, conn, wait, recorded(t, "isulad216/Wait"))
	if status.Code(err) != codes.Unavailable || !strings.Contains(log.String(), "brokenPods") {
		t.Errorf("wait: %v; the log: %s", err, log)
	}
}

func TestSnapshot(t *testing.T) {
	for _, tc := range []struct{ name, text, want string }{
		{"no tasks", `{}`, `[]`},
		{"null", `{"tasks":null}`, `[]`},
		{"an id alone", `{"tasks":[{"task_id":"a"}]}`, `[a]`},
		{"nulls", `{"tasks":[{"task_id":"a","spec":null,"rootfs":null,"processes":null,"stdin":null}]}`, `[a]`},
		{"empty lists, unknown keys", `{"x":[{}],"tasks":[{"task_id":"a","named":1,"rootfs":[],"processes":[]}]}`, `[a]`},
		{"a process", `{"tasks":[{"task_id":"a","processes":[{"exec_id":"p","spec":{"terminal":true}}]},{"task_id":"b"}]}`, `[a[p tty] b]`},
		{"a terminal", `{"tasks":[{"task_id":"a","spec":{"process":{"terminal":true}}}]}`, `[a tty]`},
		{"no process in the spec", `{"tasks":[{"task_id":"a","spec":{"process":null}}]}`, `[a]`},
		{"brackets in text", `{"tasks":[{"task_id":"a","spec":{"hostname":"` + strings.Repeat(`[\"{\\`, 99) + `"}}]}`, `[a]`},
	} {
		tasks, err := snapshot(&anypb.Any{Value: []byte(tc.text)})
		if err != nil || tasks == nil {
			t.Errorf("%s: %v, %v", tc.name, tasks, err)
		}
		var got []string
		for _, task := range tasks {
			s := task.ID
			if task.IO.Terminal {
				s += " tty"
			}
			for _, p := range task.processes {
				s += "[" + p.ExecID
				if p.IO.Terminal {
					s += " tty"
				}
				s += "]"
			}
			got = append(got, s)
		}
		if fmt.Sprint(got) != tc.want {
			t.Errorf("%s: %v, want %s", tc.name, got, tc.want)
		}
	}
	for _, tc := range []struct{ name, text, want string }{
		{"nothing", ``, "cannot decode"},
		{"torn", `{"tasks":[{"task_id":"a"`, "cannot decode the JSON at byte"},
		{"not an object", `[]`, "cannot decode"},
		{"not an array", `{"tasks":{}}`, "tasks is not an array"},
		{"no id", `{"tasks":[{}]}`, `tasks[0]: task_id ""`},
		{"a path for an id", `{"tasks":[{"task_id":"../x"}]}`, `task_id "../x"`},
		{"a path for a process", `{"tasks":[{"task_id":"a","processes":[{"exec_id":"/p"}]}]}`, `container a: processes[0]: exec_id "/p"`},
		{"twice", `{"tasks":[{"task_id":"a"},{"task_id":"a"}]}`, "container a is listed twice"},
		{"a process twice", `{"tasks":[{"task_id":"a","processes":[{"exec_id":"p"},{"exec_id":"p"}]}]}`, "process p is listed twice"},
		{"a spec that is text", `{"tasks":[{"task_id":"a","spec":"x"}]}`, "spec: it is not a JSON object"},
		{"a process that is text", `{"tasks":[{"task_id":"a","spec":{"process":"x"}}]}`, "container a: spec"},
		{"a terminal that is text", `{"tasks":[{"task_id":"a","processes":[{"exec_id":"p","spec":{"terminal":"x"}}]}]}`, "process p: spec"},
		{"an option that is none", `{"tasks":[{"task_id":"a","rootfs":[{"options":[{}]}]}]}`, "rootfs[0]: options[0]"},
		{"deep", `{"tasks":[{"task_id":"a","spec":` + strings.Repeat(`{"a":`, 100) + `1` + strings.Repeat(`}`, 100) + `}]}`, "deeper than 64"},
		{"very deep", strings.Repeat(`[`, maxSnapshot), "deeper than 64"},
		{"not UTF-8", "{\"tasks\":[{\"task_id\":\"a\",\"stdin\":\"\xff\"}]}", "not UTF-8"},
		{"too long", strings.Repeat(" ", maxSnapshot+1), "bytes, more than"},
		{"too many", `{"tasks":[` + repeated(maxTasks+1, `{"task_id":"c%d"}`) + `]}`, "tasks has more than"},
		{"too many processes", `{"tasks":[{"task_id":"a","processes":[` + repeated(maxProcesses, `{"exec_id":"p%d"}`) + `]},` +
			`{"task_id":"b","processes":[{"exec_id":"p"}]}]}`, "container b: processes has more than 0"},
	} {
		tasks, err := snapshot(&anypb.Any{Value: []byte(tc.text)})
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %d tasks, %v; want %q", tc.name, len(tasks), err, tc.want)
		}
	}
	if _, err := snapshot(nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no extension: %v", err)
	}
}

// repeated is n texts with their numbers, with commas in between.
func repeated(n int, format string) string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprintf(format, i)
	}
	return strings.Join(all, ",")
}

// Updates may be longer than other requests.
func TestLongUpdate(t *testing.T) {
	pods := &podWithContainers{}
	conn, _, _ := serve(t, pods)
	text := `{"tasks":[{"task_id":"a","spec":{"hostname":"` + strings.Repeat("x", 20<<20) + `"}}]}`
	bytesField := func(b []byte, n protowire.Number, v []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), v)
	}
	entry := bytesField(bytesField(nil, 1, []byte("tasks")), 2, bytesField(nil, 2, []byte(text)))
	long := bytesField(bytesField(bytesField(nil, 1, []byte(podID)), 3, bytesField(nil, 7, entry)), 4, []byte(tasksField))
	if _, err := ask(t, conn, update, long); err != nil || len(pods.ctrs["a"].Spec) < 20<<20 {
		t.Errorf("20 MiB: %v", err)
	}
	long = bytesField(long, 99, make([]byte, 14<<20))
	if _, err := ask(t, conn, update, long); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("34 MiB: %v", err)
	}
}

// FuzzRequest decodes anything as any method, the way serve does.
func FuzzRequest(f *testing.F) {
	for _, file := range recordedFiles(f) {
		f.Add(uint8(slices.Index(methods, methodOf(file))), recorded(f, file))
	}
	f.Fuzz(func(t *testing.T, which uint8, raw []byte) {
		m := methods[int(which)%len(methods)]
		d := dialectOf(m, raw)
		req, err := d.decode(m, raw)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Fatalf("%s %s: %v", d.client(), m, err)
			}
			return
		}
		tasks := req.tasks
		if req.task != nil {
			tasks = append(tasks, *req.task)
		}
		if m == prepare && len(tasks) != 1 {
			t.Fatalf("%s: %d announcements", d.client(), len(tasks))
		}
		announced := map[string][]string{}
		for _, task := range tasks {
			if container.CheckID("", task.ID) != nil || announced[task.ID] != nil {
				t.Fatalf("container %q got through", task.ID)
			}
			announced[task.ID] = []string{}
			for _, p := range task.processes {
				if container.CheckID("", p.ExecID) != nil || p.ID != task.ID {
					t.Fatalf("process %q of %q got through", p.ExecID, p.ID)
				}
				announced[task.ID] = append(announced[task.ID], p.ExecID)
			}
		}
		if d := differenceOf(announced, tasks); len(d.withdraw)+len(d.containers)+len(d.processes) > 0 {
			t.Fatalf("a snapshot differs from itself: %+v", d)
		}
		if m == measure {
			return // its answer has what the pod measured
		}
		if _, err := d.encode(m, result{Status: pod.Status{ID: "a", Address: "b"}}); err != nil {
			t.Fatalf("%s %s: %v", d.client(), m, err)
		}
	})
}
