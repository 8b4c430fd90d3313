// Package e2e runs pods in virtual machines through a stock containerd. Every test ends with a
// census of the node that must equal the one taken before it.
//
// The tests need root, the outputs of "go tool mage build", QEMU and minutes; they run if
// KUASAR_E2E=1 is in the environment, as "go tool mage test" sets it, and are skipped otherwise.
package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	osexec "os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/ci/e2e/census"
	"kuasar.io/kuasar/ci/e2e/image"
	"kuasar.io/kuasar/ci/e2e/node"
)

// The node that the tests share, and the sandboxer of its pods.
var (
	bed       *node.Node
	sandboxer *node.Sandboxer
	config    node.Config
)

// cgroupParent holds the cgroups of the tests' pods, so that no other pod of the machine is
// counted among them.
var cgroupParent = fmt.Sprintf("/kuasar-e2e-%d", os.Getpid())

func TestMain(m *testing.M) {
	if os.Getenv("KUASAR_E2E") == "" {
		os.Exit(m.Run())
	}
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	if os.Getuid() != 0 {
		return 1, errors.New("the end-to-end tests need root: for network namespaces, mounts and cgroups")
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		return 1, err
	}
	out := filepath.Join(root, "out")
	config = node.Config{
		Root:      root,
		Sandboxer: filepath.Join(out, "bin", "vmm-sandboxer"),
		Kernel:    filepath.Join(out, "vmlinux.bin"),
		Initrd:    filepath.Join(out, "kuasar.initrd"),
		Progress:  os.Stderr,
	}
	if config.Supervisor, err = supervisor(root); err != nil {
		return 1, err
	}
	defer os.RemoveAll(filepath.Dir(config.Supervisor))
	if err := census.Adopt(); err != nil {
		return 1, err
	}
	if bed, err = node.Start(ctx, config); err != nil {
		return 1, err
	}
	defer func() {
		removeCgroups(cgroupParent)
		err = errors.Join(err, bed.Close())
	}()
	if sandboxer, err = bed.StartSupervised(ctx, node.Plugin, nil); err != nil {
		return 1, err
	}
	if err := warm(ctx); err != nil {
		return 1, err
	}
	interrupted := make(chan struct{})
	go func() {
		<-ctx.Done()
		close(interrupted)
	}()
	finished := make(chan int, 1)
	go func() { finished <- m.Run() }()
	select {
	case code = <-finished:
		return code, nil
	case <-interrupted:
		return 1, errors.New("interrupted")
	}
}

// supervisor builds the service manager of the tests in a directory of its own.
func supervisor(root string) (string, error) {
	dir, err := os.MkdirTemp("", "supervisor")
	if err != nil {
		return "", err
	}
	program := filepath.Join(dir, "supervisor")
	build := osexec.Command("go", "build", "-o", program, "./ci/supervisor")
	build.Dir = root
	if output, err := build.CombinedOutput(); err != nil {
		os.RemoveAll(dir)
		return "", fmt.Errorf("cannot build the supervisor: %w\n%s", err, output)
	}
	return program, nil
}

// warm runs a first pod: containerd and the CNI plugins make some directories with it that stay.
func warm(ctx context.Context) error {
	logs, err := os.MkdirTemp(bed.Dir, "logs")
	if err != nil {
		return err
	}
	podConfig, containerConfig := newPodConfig("warm", logs), container("true")
	pod, err := bed.CRI.RunPod(ctx, podConfig, node.HandlerDualStack)
	if err != nil {
		return fmt.Errorf("cannot run a first pod: %w\n%s", err, node.Tail(sandboxer.Log, 12))
	}
	id, err := bed.CRI.Create(ctx, pod, podConfig, containerConfig)
	if err == nil {
		err = bed.CRI.Start(ctx, id)
	}
	if err != nil {
		return fmt.Errorf("cannot run a first container: %w\n%s", err, node.Tail(sandboxer.Log, 12))
	}
	return bed.CRI.RemovePod(ctx, pod)
}

// removeCgroups removes the empty parents, in every hierarchy, that the sandboxer was told to use.
func removeCgroups(parent string) {
	paths, _ := filepath.Glob(filepath.Join("/sys/fs/cgroup", "*", parent))
	for _, path := range append(paths, filepath.Join("/sys/fs/cgroup", parent)) {
		os.Remove(path)
	}
}

// begin is the first call of every test. It returns a context that bounds the test, and arranges
// for the census and, on a failure, for the logs to be kept.
func begin(t *testing.T) context.Context {
	t.Helper()
	if bed == nil {
		t.Skip("needs root, the built outputs and QEMU; \"go tool mage test\" provides them and sets KUASAR_E2E=1")
	}
	scope := census.Scope{
		Dirs:          []string{sandboxer.Dir, filepath.Join(bed.Dir, node.PluginFaulty), filepath.Join(bed.Dir, "state"), filepath.Join(bed.Dir, "ipam", bed.Bridge)},
		Mounts:        bed.Dir,
		Bridge:        bed.Bridge,
		CgroupParents: []string{cgroupParent},
		Daemons:       map[string]int{"vmm-sandboxer": sandboxer.PID(), "supervisor": sandboxer.Supervisor()},
		Metrics:       sandboxer.Metrics(),
	}
	before, err := census.Take(scope)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		scope.Daemons["vmm-sandboxer"] = sandboxer.PID()
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		difference, err := census.Settle(ctx, scope, before)
		if err != nil {
			t.Error(err)
		}
		if len(difference) > 0 {
			t.Errorf("the census after the test differs from the one before:\n%s", strings.Join(difference, "\n"))
		}
		if t.Failed() {
			keepLogs(t)
			t.Logf("the sandboxer's last lines:\n%s", lastLines(sandboxer.Log))
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// keepLogs copies the logs of the daemons and the consoles to out/e2e/<test>.
func keepLogs(t *testing.T) {
	dir := filepath.Join(config.Root, "out", "e2e", strings.ReplaceAll(t.Name(), "/", "-"))
	if err := bed.KeepLogs(dir); err != nil {
		t.Errorf("cannot keep the logs: %v", err)
		return
	}
	t.Logf("the logs are in %s", dir)
}

// lastLines returns what a sandboxer logged last that is worth reading among the results of a test;
// all of it is in the file.
func lastLines(log string) string {
	var lines []string
	for line := range strings.Lines(node.Tail(log, 200)) {
		if !strings.Contains(line, "level=DEBUG") {
			lines = append(lines, fmt.Sprintf("%.600s", strings.TrimSuffix(line, "\n")))
		}
	}
	return strings.Join(lines[max(0, len(lines)-8):], "\n")
}

// pod is a running pod of a test.
type pod struct {
	id     string
	config *runtimeapi.PodSandboxConfig
}

// number makes the names of pods and containers unique.
var number int

// podConfig returns the configuration of a pod with the test's name.
func podConfig(t *testing.T) *runtimeapi.PodSandboxConfig {
	return newPodConfig(strings.ToLower(strings.ReplaceAll(t.Name(), "/", "-")), t.TempDir())
}

func newPodConfig(name, logs string) *runtimeapi.PodSandboxConfig {
	number++
	return &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: fmt.Sprint(name, "-", number)},
		LogDirectory: logs,
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent: cgroupParent,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{
				Network: runtimeapi.NamespaceMode_POD, Pid: runtimeapi.NamespaceMode_CONTAINER, Ipc: runtimeapi.NamespaceMode_POD,
			}},
		},
	}
}

// runPod runs a pod which the end of the test removes.
func runPod(ctx context.Context, t *testing.T, config *runtimeapi.PodSandboxConfig, handler string) *pod {
	t.Helper()
	id, err := bed.CRI.RunPod(ctx, config, handler)
	if err != nil {
		t.Fatalf("cannot run the pod: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if t.Failed() {
			keepLogs(t)
			// Below the directory of whichever sandboxer it is.
			logs, _ := filepath.Glob(filepath.Join(bed.Dir, "*", id, "sandbox-"+id+".log"))
			for _, log := range logs {
				t.Logf("the last lines of the guest's console:\n%s", node.Tail(log, 15))
			}
		}
		if err := bed.CRI.RemovePod(ctx, id); err != nil {
			t.Error(err)
		}
	})
	return &pod{id, config}
}

// container returns the configuration of a container that runs a shell script.
func container(script string) *runtimeapi.ContainerConfig {
	number++
	name := fmt.Sprint("c", number)
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: image.Name},
		Command:  []string{"/bin/sh", "-c", script},
		LogPath:  name + ".log",
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{
				Network: runtimeapi.NamespaceMode_POD, Pid: runtimeapi.NamespaceMode_CONTAINER, Ipc: runtimeapi.NamespaceMode_POD,
			},
		}},
	}
}

// start creates and starts a container.
func (p *pod) start(ctx context.Context, t *testing.T, config *runtimeapi.ContainerConfig) string {
	t.Helper()
	id, err := bed.CRI.Create(ctx, p.id, p.config, config)
	if err != nil {
		t.Fatalf("cannot create container %s: %v", config.Metadata.Name, err)
	}
	if err := bed.CRI.Start(ctx, id); err != nil {
		t.Fatalf("cannot start container %s: %v", config.Metadata.Name, err)
	}
	return id
}

// log returns what a container has written to one of its streams, from the log that CRI keeps.
func (p *pod) log(t *testing.T, config *runtimeapi.ContainerConfig, stream string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(p.config.LogDirectory, config.LogPath))
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for line := range strings.Lines(string(data)) {
		// <time> <stream> <F for a full line, P for a part> <text>
		fields := strings.SplitN(line, " ", 4)
		if len(fields) != 4 || fields[1] != stream {
			continue
		}
		if fields[2] == "P" {
			fields[3] = strings.TrimSuffix(fields[3], "\n")
		}
		text.WriteString(fields[3])
	}
	return text.String()
}

// exec runs a command in a container and returns its output; it must end with code 0.
func exec(ctx context.Context, t *testing.T, container string, command ...string) string {
	t.Helper()
	result, err := bed.CRI.Exec(ctx, container, command...)
	if err != nil {
		t.Fatalf("cannot execute %q: %v", command, err)
	}
	if result.ExitCode != 0 {
		t.Fatalf("%q ended with code %d: %s%s", command, result.ExitCode, result.Stdout, result.Stderr)
	}
	return result.Stdout
}

// eventually polls until done says true.
func eventually(ctx context.Context, t *testing.T, what string, done func() bool) {
	t.Helper()
	for !done() {
		select {
		case <-ctx.Done():
			t.Fatalf("it does not happen that %s: %v", what, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}
