package isulad

import (
	"bytes"
	"encoding/hex"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var update = flag.Bool("update", false, "write what the tests compare with")

// controllerData is where the sandboxer's own tests find the requests of each dialect.
const controllerData = "../../../sandboxer/controller/testdata"

// The requests that the sandboxer's tests decode are the ones that this client sends; with -update they
// are written.
func TestRecordedRequests(t *testing.T) {
	for version, folder := range map[Version]string{V213: "client213", V215: "client215", V216: "client216"} {
		got := record(t, version)
		if *update {
			if err := os.MkdirAll(filepath.Join(controllerData, folder), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for name, request := range got {
			path, text := filepath.Join(controllerData, folder, name+".hex"), []byte(hexText(t, request))
			if *update {
				if err := os.WriteFile(path, text, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if recorded, err := os.ReadFile(path); err != nil || !bytes.Equal(recorded, text) {
				t.Errorf("%s is not what is sent, %v; run this test with -update", path, err)
			}
		}
		files, err := filepath.Glob(filepath.Join(controllerData, folder, "*.hex"))
		if err != nil || len(files) != len(got) {
			t.Errorf("%s has %d requests, not %d: %v", folder, len(files), len(got), err)
		}
	}
}

// record runs a pod with a container and an exec in it from beginning to end, and returns the first
// request of each kind. Requests about a process end in Exec, a list of tasks without any in Empty.
func record(t *testing.T, v Version) map[string][]byte {
	podID, ctrID := strings.Repeat("5ab1", 16), strings.Repeat("c0de", 16)
	address, shim := "vsock://7:1024", ShimVsock
	if v == V216 {
		address, shim = "ttrpc+vsock://7:1024", ShimTTRPC
	}
	f := newFake(t, address)
	var mu sync.Mutex
	all := make(map[string][]byte)
	d, err := New(Config{
		Version: v, Shim: shim, Sandboxer: "vmm", Socket: f.socket(), State: t.TempDir(), DialVsock: f.dial,
		PlatformInterval: time.Millisecond, WaitTick: 4 * time.Millisecond, VsockRetry: 300 * time.Millisecond,
		now:    func() time.Time { return time.Unix(1700000000, 0) },
		execID: func() string { return strings.Repeat("e8ec", 16) },
		Record: func(method string, request []byte) {
			mu.Lock()
			defer mu.Unlock()
			switch {
			case (method == "Prepare" || method == "Purge") && bytes.Contains(request, []byte("e8ece8ec")):
				method += "Exec"
			case method == "Update" && bytes.Contains(request, []byte("e8ece8ec")):
				method += "Exec"
			case method == "Update" && !bytes.Contains(request, []byte("task_id")):
				method += "Empty"
			}
			if all[method] == nil {
				all[method] = bytes.Clone(request)
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	metadata := &runtimeapi.PodSandboxMetadata{Name: "busybox", Namespace: "default", Uid: "f1f2e3d"}
	must(d.RunPod(Pod{
		ID: podID, NetNS: "/var/run/netns/isulacni-5ab15ab15ab15ab1",
		Config: &runtimeapi.PodSandboxConfig{
			Metadata: metadata, Hostname: "box", LogDirectory: "/var/log/pods/busybox",
			DnsConfig: &runtimeapi.DNSConfig{Servers: []string{"10.0.0.10"}, Searches: []string{"cluster.local"}},
			Linux: &runtimeapi.LinuxPodSandboxConfig{CgroupParent: "/kubepods", SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
			}},
		},
	}))
	rootfs := "/var/lib/isulad/storage/overlay/" + ctrID + "/merged"
	spec, err := Spec(SpecConfig{
		Container: ctrID, Pod: podID, PodPID: 42, RootFS: rootfs, Args: []string{"/bin/sh", "-c", "echo hello"},
		Name: "busybox", Metadata: metadata, LogFile: "/var/log/pods/busybox/0.log", LogSize: "30KB", LogFiles: 7,
	})
	must(err)
	must(d.CreateContainer(podID, Container{ID: ctrID, RootFS: rootfs, Spec: spec}))
	must(d.StartContainer(ctrID))
	e := ExecConfig{Args: []string{"ls", "-l"}, Stdin: &endless{data: "hello"}, Stdout: new(bytes.Buffer), Stderr: new(bytes.Buffer)}
	if v != V215 {
		// The names of FIFOs differ from one run to the next.
		e.Stdin, e.Stdout, e.Stderr = nil, nil, nil
	}
	_, err = d.Exec(ctrID, e)
	must(err)
	must(d.Restart())
	f.server.Stop()
	must(d.WaitPod(soon(t), podID, Pending))
	f.serve()
	must(d.WaitPod(soon(t), podID, Running))
	must(d.StopContainer(soon(t), ctrID, time.Minute))
	must(d.StopPod(podID))
	must(d.RemovePod(podID))
	return all
}

// hexText writes a message as hexadecimal digits, with the number of each field before it.
func hexText(t *testing.T, message []byte) string {
	t.Helper()
	var text strings.Builder
	for len(message) > 0 {
		number, _, n := protowire.ConsumeField(message)
		if n < 0 {
			t.Fatal(protowire.ParseError(n))
		}
		fmt.Fprintf(&text, "# field %d\n", number)
		for digits := range slices.Chunk([]byte(hex.EncodeToString(message[:n])), 96) {
			fmt.Fprintf(&text, "%s\n", digits)
		}
		message = message[n:]
	}
	return text.String()
}

// The kinds of requests that iSulad sends in the life of a pod.
func TestRecordIsComplete(t *testing.T) {
	for version, want := range map[Version][]string{
		V213: {"Create", "Prepare", "PrepareExec", "Purge", "PurgeExec", "Shutdown", "Start", "Status", "Stop", "Wait"},
		V216: {"Create", "Platform", "Shutdown", "Start", "Status", "Stop", "Update", "UpdateEmpty", "UpdateExec", "Wait"},
	} {
		if got := slices.Sorted(maps.Keys(record(t, version))); !slices.Equal(got, want) {
			t.Errorf("version %d sends %q, not %q", version, got, want)
		}
	}
}
