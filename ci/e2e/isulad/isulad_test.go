package isulad

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// start returns an iSulad of the version with a pod p that runs, and what its sandboxer saw.
func start(t *testing.T, v Version) (*Daemon, *fake) {
	t.Helper()
	address, shim := "vsock://7:1024", ShimVsock
	if v == V216 {
		address, shim = "ttrpc+vsock://7:1024", ShimTTRPC
	}
	f := newFake(t, address)
	d, err := New(Config{
		Version: v, Shim: shim, Sandboxer: "vmm", Socket: "unix://" + f.socket(), State: t.TempDir(), DialVsock: f.dial,
		PlatformInterval: time.Millisecond, WaitTick: 4 * time.Millisecond, VsockRetry: 300 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	if err := d.RunPod(thePod(f, nil)); err != nil {
		t.Fatal(err)
	}
	return d, f
}

func thePod(f *fake, annotations map[string]string) Pod {
	return Pod{
		ID: "p", NetNS: "/net", Network: func() error { f.note("network"); return nil },
		Config: &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: "web"}, Annotations: annotations},
	}
}

func startContainer(t *testing.T, d *Daemon, id string) {
	t.Helper()
	spec, err := Spec(SpecConfig{Container: id, Pod: "p", PodPID: 42, RootFS: "/base/" + id, Args: []string{"/bin/sh"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.CreateContainer("p", Container{ID: id, RootFS: "/base/" + id, Spec: spec}); err != nil {
		t.Fatal(err)
	}
	if err := d.StartContainer(id); err != nil {
		t.Fatal(err)
	}
}

// soon is a context that ends a test that hangs.
func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestRequestBytes(t *testing.T) {
	config := string(editedBytes(t))
	length := func(n int) string { return string(protowire.AppendVarint(nil, uint64(n))) }
	const url = "\x0a\x2ftype.googleapis.com/runtime.v1.PodSandboxConfig"
	value := "\x12" + length(len(config)) + config
	for _, test := range []struct {
		version   Version
		want      map[string]string
		log       []string
		authority string
	}{
		{V213, map[string]string{
			"Create": "\x0a\x03vmm\x12\x01p\x22" + length(len(url+value)) + url + value + "\x2a\x04/net",
			"Start":  "\x0a\x03vmm\x12\x01p", "Wait": "\x0a\x03vmm\x12\x01p",
			"Stop": "\x0a\x03vmm\x12\x01p\x18\x0a", "Shutdown": "\x0a\x03vmm\x12\x01p",
		}, []string{"network", "Create", "Start", "Stop", "Stop", "Shutdown"}, "localhost"},
		{V216, map[string]string{
			"Create": "\x0a\x01p\x1a" + length(len(value)) + value + "\x22\x04/net\x52\x03vmm",
			"Start":  "\x0a\x01p\x52\x03vmm", "Wait": "\x0a\x01p\x52\x03vmm",
			"Stop": "\x0a\x01p\x10\x0a\x52\x03vmm", "Shutdown": "\x0a\x01p\x52\x03vmm",
		}, []string{"Create", "Start", "network", "Stop", "Shutdown"}, "[::]"},
	} {
		d, f := start(t, test.version)
		answer := <-f.waits
		if err := d.StopPod("p"); err != nil {
			t.Fatal(err)
		}
		answer <- nil
		if err := d.WaitPod(soon(t), "p", Stopped); err != nil {
			t.Fatal(err)
		}
		if _, _, code := d.PodState("p"); code != 9 {
			t.Errorf("exit status %d, want 9", code)
		}
		if err := d.RemovePod("p"); err != nil {
			t.Fatal(err)
		}
		for method, want := range test.want {
			if got := string(f.last(method)); got != want {
				t.Errorf("version %d: %s is\n%q, want\n%q", test.version, method, got, want)
			}
			md := f.metadata[method]
			if got := md.Get(":authority"); !slices.Equal(got, []string{test.authority}) {
				t.Errorf("version %d: %s has the authority %q", test.version, method, got)
			}
			if got := md.Get("content-type"); !slices.Equal(got, []string{"application/grpc"}) {
				t.Errorf("version %d: %s has the content type %q", test.version, method, got)
			}
			if md.Get("containerd-namespace") != nil {
				t.Errorf("version %d: %s names a namespace", test.version, method)
			}
		}
		if log := f.take(); !slices.Equal(log, test.log) {
			t.Errorf("version %d: the order is %q, want %q", test.version, log, test.log)
		}
		if f.deadline {
			t.Errorf("version %d: a call has a deadline", test.version)
		}
	}
}

// editedBytes is the configuration of thePod as iSulad sends it, put together here by hand.
func editedBytes(t *testing.T) []byte {
	t.Helper()
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(&runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "web"},
		Hostname: "p",
		Labels:   map[string]string{"cri.isulad.type": "podsandbox", "io.kubernetes.container.name": "POD"},
		Annotations: map[string]string{
			"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-namespace": "",
			"io.kubernetes.cri.sandbox-name": "web", "io.kubernetes.cri.sandbox-uid": "", "io.kubernetes.cri.sandbox-attempt": "0",
			"cri.sandbox.isulad.checkpoint": `{"version":"v1","name":"web","data":{}}`,
		},
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			Resources: &runtimeapi.LinuxContainerResources{CpuShares: 2, OomScoreAdj: -998},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What kubelet has set stays, and its own message is not touched.
func TestEditedConfig(t *testing.T) {
	kubelets := &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "web", Namespace: "shop", Uid: "u", Attempt: 2}, Hostname: "box",
		Labels: map[string]string{"app": "web"}, Annotations: map[string]string{"a": "b"},
		PortMappings: []*runtimeapi.PortMapping{{Protocol: runtimeapi.Protocol_UDP, ContainerPort: 53, HostPort: 5353}},
		Linux:        &runtimeapi.LinuxPodSandboxConfig{Resources: &runtimeapi.LinuxContainerResources{CpuQuota: 5}},
	}
	before := proto.CloneOf(kubelets)
	p := Pod{ID: "p", Config: kubelets}
	got, err := p.edited()
	if err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(kubelets, before) {
		t.Error("kubelet's configuration is changed")
	}
	if got.Hostname != "box" || got.Labels["app"] != "web" || got.Annotations["a"] != "b" ||
		got.Linux.Resources.CpuQuota != 5 || got.Linux.Resources.CpuShares != 0 || got.Linux.Resources.OomScoreAdj != -998 ||
		got.Annotations["io.kubernetes.cri.sandbox-attempt"] != "2" ||
		got.Annotations["cri.sandbox.isulad.checkpoint"] != `{"version":"v1","name":"web","namespace":"shop","data":{"port_mappings":[{"protocol":"udp","container_port":53,"host_port":5353}]}}` {
		t.Errorf("it becomes %v", got)
	}
	if name := sandboxName(kubelets.Metadata); name != "k8s_POD_web_shop_u_2" {
		t.Errorf("the pod's name is %s", name)
	}
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	p.Config = &runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
		NamespaceOptions: &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE},
	}}}
	if got, err := p.edited(); err != nil || got.Hostname != host {
		t.Errorf("with the host's network the name is %q, %v", got.GetHostname(), err)
	}
}

func TestContainerAndExec(t *testing.T) {
	const process = "types.containerd.io/opencontainers/runtime-spec/1/Process"
	const bundle = "/var/lib/isulad/engines/io.containerd.vmm.v1/c"
	for _, version := range []Version{V213, V214, V216} {
		d, f := start(t, version)
		f.take()
		announce, purge := "Prepare", "Purge"
		if version == V216 {
			announce, purge = "Update", "Update"
		}
		startContainer(t, d, "c")
		if version == V213 {
			if got := string(f.last("Prepare")); !strings.HasPrefix(got, "\x0a\x03vmm\x12\x01p\x1a\x01c\x2a") ||
				!strings.HasSuffix(got, "\x32\x0f\x0a\x04bind\x12\x07/base/c") {
				t.Errorf("Prepare is %q", got)
			}
		}
		var out, errs bytes.Buffer
		code, err := d.Exec("c", ExecConfig{Args: []string{"x"}, Stdin: &endless{data: "hello"}, Stdout: &out, Stderr: &errs})
		if err != nil || code != 7 || out.String() != "helloout" || errs.String() != "err" {
			t.Errorf("version %d: exec returns %d, %v, %q, %q", version, code, err, &out, &errs)
		}
		for _, e := range f.execs {
			if vsock := strings.HasPrefix(e.Stdout, "vsock://"); vsock != (version == V214) {
				t.Errorf("version %d: stdout is %q", version, e.Stdout)
			}
			if version == V214 && (e.Stdin != "vsock://7:2000" || e.Stdout != "vsock://7:2001" || e.Stderr != "vsock://7:2002") {
				t.Errorf("the ports are %q, %q, %q", e.Stdin, e.Stdout, e.Stderr)
			}
		}
		if version == V216 {
			if list := tasksOf(t, f.last("Update")); !strings.Contains(list, `"processes": []`) {
				t.Errorf("the list after an exec is %s", list)
			}
		}
		if err := d.StopContainer(soon(t), "c", time.Minute); err != nil {
			t.Fatal(err)
		}
		if code, err := d.WaitContainer(soon(t), "c"); code != 143 || err != nil {
			t.Errorf("the container's exit status is %d, %v", code, err)
		}
		want := []string{
			announce, "create c " + bundle + ` ""`, "start c", announce, "exec c " + process, "start exec", purge,
			"kill c 15", "kill c 0", "delete c", "shutdown c", purge,
		}
		if log := f.take(); !slices.Equal(log, want) {
			t.Errorf("version %d: the order is\n%q, want\n%q", version, log, want)
		}
		if f.dials != 1 {
			t.Errorf("version %d: %d connections to the task service, want one", version, f.dials)
		}
		if f.deadline {
			t.Errorf("version %d: a call has a deadline", version)
		}
	}
}

// endless is a stdin that brings some data and then never anything, nor an end.
type endless struct{ data string }

func (e *endless) Read(b []byte) (int, error) {
	if e.data == "" {
		select {}
	}
	n := copy(b, e.data)
	e.data = e.data[n:]
	return n, nil
}

func tasksOf(t *testing.T, update []byte) string {
	t.Helper()
	at := update
	for _, n := range []int32{3, 7, 2, 2} {
		f, err := fields(at)
		if err != nil {
			t.Fatal(err)
		}
		for number, found := range f {
			if int32(number) == n {
				at = last(found).bytes
			}
		}
	}
	return string(at)
}

func TestSnapshot(t *testing.T) {
	d, f := start(t, V216)
	startContainer(t, d, "c2")
	startContainer(t, d, "c1")
	update := string(f.last("Update"))
	if !strings.HasPrefix(update, "\x0a\x01p\x12\x03vmm\x1a") || !strings.HasSuffix(update, "\x52\x03vmm\x22\x10extensions.tasks") {
		t.Errorf("Update is %q", update)
	}
	for _, want := range []string{
		"\x12\x16\x0a\x14io.containerd.vmm.v1", "\x22\x17\x0a\x04name\x12\x0fk8s_POD_web___0", "\x2a\x04\x08\x64\x10\x05",
		"\x0a\x05tasks\x12", "\x0a\x26github.com/containerd/containerd/Tasks\x12",
	} {
		if !strings.Contains(update, want) {
			t.Errorf("Update lacks %q", want)
		}
	}
	list := tasksOf(t, []byte(update))
	var got struct {
		Tasks []map[string]any `json:"tasks"`
	}
	if err := json.Unmarshal([]byte(list), &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Tasks) != 2 || got.Tasks[0]["task_id"] != "c1" || got.Tasks[1]["task_id"] != "c2" {
		t.Fatalf("the list is %s", list)
	}
	if _, ok := got.Tasks[0]["processes"]; ok || got.Tasks[0]["stdin"] != "" || got.Tasks[0]["terminal"] != nil {
		t.Errorf("the task is %s", list)
	}
	if empty, err := snapshot(nil); err != nil || string(empty) != "{\n    \"tasks\": []\n}" {
		t.Errorf("the empty list is %q, %v", empty, err)
	}

	// One that exits by itself, and its removal, is not announced.
	f.take()
	f.end("c1") <- 3
	if code, err := d.WaitContainer(soon(t), "c1"); code != 3 || err != nil {
		t.Errorf("the exit status is %d, %v", code, err)
	}
	if err := errors.Join(d.StopContainer(soon(t), "c1", time.Minute), d.RemoveContainer("c1")); err != nil {
		t.Fatal(err)
	}
	if log := f.take(); slices.Contains(log, "Update") {
		t.Errorf("an exit is announced: %q", log)
	}
}

func TestFailedStart(t *testing.T) {
	for version, want := range map[Version][]string{V213: {"Prepare"}, V216: {"Update", "Update"}} {
		d, f := start(t, version)
		f.take()
		f.mu.Lock()
		f.fail["create"] = status.Error(codes.Internal, "no")
		f.mu.Unlock()
		if err := d.CreateContainer("p", Container{ID: "c", Spec: []byte("{}"), RootFS: "/base"}); err != nil {
			t.Fatal(err)
		}
		if err := d.StartContainer("c"); err == nil {
			t.Errorf("version %d: a task that cannot be created starts", version)
		}
		log := f.take()
		if !slices.Contains(log, "kill c 9") {
			t.Errorf("version %d: no SIGKILL in %q", version, log)
		}
		log = slices.DeleteFunc(log, func(s string) bool { return strings.Contains(s, " ") })
		if !slices.Equal(log, want) {
			t.Errorf("version %d: announced by %q, want %q", version, log, want)
		}
	}
}

func TestWaitMeanings(t *testing.T) {
	for _, test := range []struct {
		version Version
		code    codes.Code
		want    int64
	}{{V213, codes.NotFound, -1}, {V213, codes.Canceled, -1}, {V216, codes.NotFound, 5}, {V216, codes.Canceled, 1}, {V216, codes.Internal, 13}} {
		d, f := start(t, test.version)
		<-f.waits <- status.Error(test.code, "ended")
		if err := d.WaitPod(soon(t), "p", Stopped); err != nil {
			t.Fatal(err)
		}
		if _, _, got := d.PodState("p"); got != test.want {
			t.Errorf("version %d, %s: exit status %d, want %d", test.version, test.code, got, test.want)
		}
	}
}

func TestPendingAndReady(t *testing.T) {
	for _, version := range []Version{V213, V216} {
		d, f := start(t, version)
		<-f.waits
		f.mu.Lock()
		f.fail["Platform"] = status.Error(codes.Unavailable, "not yet")
		f.mu.Unlock()
		f.server.Stop()
		if err := d.WaitPod(soon(t), "p", Pending); err != nil {
			t.Fatal(err)
		}
		err := d.CreateContainer("p", Container{ID: "c"})
		if refused := err != nil; refused != (version == V216) {
			t.Errorf("version %d: a container of a pending pod: %v", version, err)
		}
		f.take()
		if err := d.StopPod("p"); err != nil {
			t.Error(err)
		}
		f.serve()
		f.mu.Lock()
		delete(f.fail, "Platform")
		f.mu.Unlock()
		if err := d.WaitPod(soon(t), "p", Running); err != nil {
			t.Fatal(err)
		}
		<-f.waits <- nil
		if err := d.WaitPod(soon(t), "p", Stopped); err != nil {
			t.Fatal(err)
		}
		log := f.take()
		if slices.Contains(log, "Stop") || slices.Contains(log, "Platform") != (version == V216) {
			t.Errorf("version %d: while pending %q was called", version, log)
		}
	}
}

func TestRestart(t *testing.T) {
	for _, version := range []Version{V213, V216} {
		d, f := start(t, version)
		startContainer(t, d, "c")
		f.take()
		if err := d.Restart(); err != nil {
			t.Fatal(err)
		}
		if log := f.take(); !slices.Equal(log, []string{"Status", "state c"}) || f.dials != 2 {
			t.Errorf("version %d: %q and %d connections after a restart", version, log, f.dials)
		}
		if state, address, _ := d.PodState("p"); state != Running || address != f.address {
			t.Errorf("version %d: the pod is %q at %q", version, state, address)
		}
		f.mu.Lock()
		f.fail["state"] = status.Error(codes.NotFound, "gone")
		f.fail["Status"] = status.Error(codes.NotFound, "gone")
		f.mu.Unlock()
		if err := d.Restart(); err == nil {
			t.Errorf("version %d: nothing is said of a pod that is gone", version)
		}
		state, _, _ := d.PodState("p")
		if want := map[Version]State{V213: "", V216: Stopped}[version]; state != want {
			t.Errorf("version %d: the pod that is gone is %q, want %q", version, state, want)
		}
		if code := d.containers["c"].code; code != 255 {
			t.Errorf("version %d: the container's exit status is %d, want 255", version, code)
		}
	}
}

// TestGuestDies: what iSulad cannot learn it takes for 0, and what follows fails with warnings only.
func TestGuestDies(t *testing.T) {
	d, f := start(t, V216)
	startContainer(t, d, "c")
	f.die()
	if code, err := d.WaitContainer(soon(t), "c"); code != 0 || err != nil {
		t.Fatalf("the exit status is %d, %v", code, err)
	}
	if _, err := d.Exec("c", ExecConfig{Args: []string{"x"}}); err == nil {
		t.Error("an exec in a container that has exited succeeds")
	}
	if err := errors.Join(d.StopPod("p"), d.RemovePod("p")); err != nil {
		t.Error(err)
	}
}

// TestFailedExec: an exec that never started is purged too, and its streams do not hold it.
func TestFailedExec(t *testing.T) {
	for version, want := range map[Version][]string{V213: {"Prepare", "Purge"}, V214: {"Prepare", "Purge"}, V216: {"Update", "Update"}} {
		d, f := start(t, version)
		startContainer(t, d, "c")
		f.take()
		f.mu.Lock()
		f.fail["exec"] = status.Error(codes.Internal, "no")
		f.mu.Unlock()
		var out bytes.Buffer
		if _, err := d.Exec("c", ExecConfig{Args: []string{"x"}, Stdin: &endless{}, Stdout: &out}); err == nil {
			t.Errorf("version %d: an exec that is refused succeeds", version)
		}
		log := slices.DeleteFunc(f.take(), func(s string) bool { return strings.Contains(s, " ") })
		if !slices.Equal(log, want) {
			t.Errorf("version %d: announced by %q, want %q", version, log, want)
		}
		if len(d.pods["p"].ports) != 0 {
			t.Errorf("version %d: the ports %v are not given back", version, d.pods["p"].ports)
		}
	}
}

// TestNoListener: after ten tries for the first stream iSulad gives up silently on all of them.
func TestNoListener(t *testing.T) {
	tries := 0
	c := Config{VsockRetry: time.Nanosecond, DialVsock: func(cid, port uint32) (net.Conn, error) {
		if cid != 7 || port != 2001 {
			t.Errorf("a connection to %d:%d", cid, port)
		}
		tries++
		return nil, errors.New("refused")
	}}
	s := c.dialStreams(7, [3]uint32{0, 2001, 2002}, ExecConfig{})
	s.join()
	if tries != vsockTries {
		t.Errorf("%d tries, want %d", tries, vsockTries)
	}
	if want := (stdio{stdout: "vsock://7:2001", stderr: "vsock://7:2002"}); s.stdio != want {
		t.Errorf("the streams are %+v, want %+v", s.stdio, want)
	}
}

// TestDetachedExec: Gen-B does not wait for an exec without streams, and purges it at once.
func TestDetachedExec(t *testing.T) {
	for version, want := range map[Version]uint32{V213: 7, V216: 0} {
		d, _ := start(t, version)
		startContainer(t, d, "c")
		if code, err := d.Exec("c", ExecConfig{Args: []string{"x"}}); code != want || err != nil {
			t.Errorf("version %d: an exec without streams returns %d, %v, want %d", version, code, err, want)
		}
	}
}

// TestLostTasks: the list goes on after a restart from the file, and from nothing where that is lost.
func TestLostTasks(t *testing.T) {
	for _, lost := range []bool{false, true} {
		d, f := start(t, V216)
		startContainer(t, d, "c1")
		if lost {
			if err := os.Remove(d.tasksFile(d.pods["p"])); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.Restart(); err != nil {
			t.Fatal(err)
		}
		startContainer(t, d, "c2")
		if list := tasksOf(t, f.last("Update")); strings.Contains(list, `"c1"`) == lost || !strings.Contains(list, `"c2"`) {
			t.Errorf("with the file lost (%v) the list is %s", lost, list)
		}
	}
}

// TestSerialised: Gen-B holds its one lock for the whole of a unary call, but not while it waits.
func TestSerialised(t *testing.T) {
	for _, version := range []Version{V213, V216} {
		d, f := start(t, version)
		answer := <-f.waits // Wait is pending
		free := func() bool {
			if !d.client.unary.TryLock() {
				return false
			}
			d.client.unary.Unlock()
			return true
		}
		arrived, release := make(chan struct{}), make(chan struct{})
		f.mu.Lock()
		f.hold = func() { arrived <- struct{}{}; <-release }
		f.mu.Unlock()
		done := make(chan error)
		go func() { _, err := d.call("Platform", "p", nil); done <- err }()
		<-arrived
		if free() != (version == V213) {
			t.Errorf("version %d: another call may be made during one: %v", version, version != V213)
		}
		close(release)
		if err := <-done; err != nil {
			t.Error(err)
		}
		if !free() {
			t.Errorf("version %d: no call can be made while Wait is pending", version)
		}
		answer <- nil
	}
}

func TestAddresses(t *testing.T) {
	for _, test := range []struct {
		shim    Shim
		address string
		want    endpoint
		fails   bool
	}{
		{ShimVsock, "vsock://7:1024", endpoint{cid: 7, port: 1024}, false},
		{ShimVsock, "vsock://7:1024:1", endpoint{}, true},
		{ShimVsock, "vsock://0x7:1024", endpoint{}, true},
		{ShimVsock, "vsock://4294967296:1", endpoint{}, true},
		{ShimVsock, "ttrpc+vsock://7:1024", endpoint{unix: "@/ttrpc+vsock://7:1024"}, false},
		{ShimTTRPCVsock, "vsock://7:1024", endpoint{unix: "@/vsock://7:1024"}, false},
		{ShimTTRPCVsock, "ttrpc+vsock://7:1024", endpoint{cid: 7, port: 1024}, false},
		{ShimTTRPCVsock, "ttrpc+unix:///s", endpoint{unix: "@/ttrpc+unix:///s"}, false},
		{ShimTTRPC, "ttrpc+unix:///s", endpoint{unix: "/s"}, false},
		{ShimTTRPC, "unix:///s", endpoint{unix: "/s"}, false},
		{ShimVsock, "unix:///s", endpoint{unix: "/s"}, false},
	} {
		got, err := test.shim.parse(test.address)
		if got != test.want || (err != nil) != test.fails {
			t.Errorf("shim %d: %s leads to %+v, %v", test.shim, test.address, got, err)
		}
	}
}

func TestRelayEnds(t *testing.T) {
	for _, test := range []struct {
		name string
		gap  time.Duration
		want string
	}{{"a short gap", drainGap / 2, "ab"}, {"a long gap", drainGap * 2, "a"}} {
		synctest.Test(t, func(t *testing.T) {
			var out bytes.Buffer
			chunks, done := make(chan chunk), make(chan struct{})
			go func() { relay(t.Context(), nil, chunks); close(done) }()
			chunks <- chunk{to: &out, data: []byte("a")}
			chunks <- chunk{end: true}
			time.Sleep(test.gap) // the fake clock's
			select {
			case chunks <- chunk{to: &out, data: []byte("b")}:
				chunks <- chunk{to: &out, end: true} // the second end is the last
			case <-done:
			}
			<-done
			if out.String() != test.want {
				t.Errorf("%s: %q is relayed, want %q", test.name, &out, test.want)
			}
		})
	}
}

func TestSpec(t *testing.T) {
	got, err := Spec(SpecConfig{Container: "c", Pod: "p", PodPID: 42, RootFS: "/base", Args: []string{"/bin/sh", "-c", "true"},
		Name: "c1", Metadata: &runtimeapi.PodSandboxMetadata{Name: "web", Namespace: "shop"}, Mounts: map[string]string{"/data": "/srv/data"},
		LogFile: "/var/log/pods/c.log", LogSize: "30KB", LogFiles: 7, Env: []string{"A=b"}})
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile("testdata/spec.json", append(got, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile("testdata/spec.json")
	if err != nil {
		t.Fatal(err)
	}
	if string(got)+"\n" != string(want) {
		t.Errorf("the spec is\n%s", got)
	}
}
