package container

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/sandboxer/container/guesttest"
)

// patience bounds what a test waits for; it is never reached unless something hangs.
const patience = time.Minute

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// fakeStorage remembers what is held for whom.
type fakeStorage struct {
	mu         sync.Mutex
	held       map[string][]string
	failVolume error
	failRoot   error
	failFree   error
}

func (f *fakeStorage) add(id, what string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.held == nil {
		f.held = map[string][]string{}
	}
	f.held[id] = append(f.held[id], what)
	return len(f.held[id]) - 1
}

func (f *fakeStorage) Rootfs(_ context.Context, id string, mounts []Mount) (string, error) {
	f.add(id, "rootfs")
	return "/run/kuasar/state/" + id + "/rootfs", f.failRoot
}

func (f *fakeStorage) Volume(_ context.Context, id, source string, readOnly bool) (string, error) {
	n := f.add(id, fmt.Sprintf("%s ro=%v", source, readOnly))
	return fmt.Sprintf("/run/kuasar/state/%s/vol%d", id, n), f.failVolume
}

func (f *fakeStorage) Release(id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failFree != nil {
		return f.failFree
	}
	delete(f.held, id)
	return nil
}

func (f *fakeStorage) holds(id string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.held[id])
}

// pod is a Set with its fakes.
type pod struct {
	*Set
	t       testing.TB
	guest   *guesttest.Guest
	storage *fakeStorage

	mu      sync.Mutex
	failed  []error
	records []Record
}

func newPod(t testing.TB) *pod {
	p := &pod{t: t, guest: guesttest.New(t), storage: &fakeStorage{}}
	p.Set = NewSet(p.options())
	t.Cleanup(p.Set.Close)
	return p
}

func (p *pod) options() Options {
	return Options{
		PodID: "pod", Guest: p.guest, Storage: p.storage,
		Fail: func(err error) {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.failed = append(p.failed, err)
		},
		Journal: func(records []Record) {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.records = records
		},
	}
}

func (p *pod) failures() []error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.failed)
}

func (p *pod) journalled() []Record {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.records)
}

// spec is a minimal one that runs args.
func spec(args ...string) *specs.Spec {
	return &specs.Spec{
		Version: "1.3.0",
		Process: &specs.Process{Args: args, Cwd: "/"},
		Root:    &specs.Root{Path: "rootfs"},
		Linux:   &specs.Linux{},
	}
}

func encode(t testing.TB, v any) []byte {
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// bundle writes a bundle and returns its path.
func bundle(t testing.TB, s *specs.Spec) string {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "config.json"), encode(t, s), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func rootfs() []Mount {
	return []Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/host/lower"}}}
}

func (p *pod) create(id string, io IO, args ...string) {
	p.t.Helper()
	_, err := p.Create(testContext(p.t), CreateRequest{ID: id, Bundle: bundle(p.t, spec(args...)), Rootfs: rootfs(), IO: io})
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *pod) start(id, execID string) {
	p.t.Helper()
	if _, err := p.Start(testContext(p.t), id, execID); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pod) run(id string, io IO, args ...string) {
	p.t.Helper()
	p.create(id, io, args...)
	p.start(id, "")
}

func (p *pod) exec(id, execID string, io IO, args ...string) {
	p.t.Helper()
	err := p.Exec(testContext(p.t), ExecRequest{ID: id, ExecID: execID, Spec: encode(p.t, specs.Process{Args: args}), IO: io})
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *pod) wait(id, execID string) Exit {
	p.t.Helper()
	exit, err := p.Wait(testContext(p.t), id, execID)
	if err != nil {
		p.t.Fatal(err)
	}
	return exit
}

func (p *pod) status(id, execID string) Status {
	p.t.Helper()
	st, err := p.State(id, execID)
	if err != nil {
		p.t.Fatal(err)
	}
	return st.Status
}

// fifos are a client's FIFOs, opened as containerd does.
type fifos struct {
	IO
	in         *os.File
	out, err   *os.File
	collecting sync.WaitGroup
	stdout     bytes.Buffer
	stderr     bytes.Buffer
}

func mkfifo(t testing.TB, name string) string {
	path := filepath.Join(t.TempDir(), name)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func openEnd(t testing.TB, path string, flag int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flag|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// newFIFOs makes FIFOs with their reading ends open; open must be called once the server has its
// end of the input open.
func newFIFOs(t testing.TB, stdin bool) *fifos {
	f := &fifos{}
	f.Stdout, f.Stderr = mkfifo(t, "stdout"), mkfifo(t, "stderr")
	f.out, f.err = openEnd(t, f.Stdout, os.O_RDONLY), openEnd(t, f.Stderr, os.O_RDONLY)
	if stdin {
		f.Stdin = mkfifo(t, "stdin")
	}
	return f
}

func (f *fifos) open(t testing.TB) { f.in = openEnd(t, f.Stdin, os.O_WRONLY) }

// collect reads the outputs to their ends. It must start after the server has opened them.
func (f *fifos) collect() {
	f.collecting.Go(func() { io.Copy(&f.stdout, f.out) })
	f.collecting.Go(func() { io.Copy(&f.stderr, f.err) })
}

// ends waits for the ends of the outputs.
func (f *fifos) ends(t testing.TB) {
	t.Helper()
	done := make(chan struct{})
	go func() { f.collecting.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("the outputs do not end")
	}
}
