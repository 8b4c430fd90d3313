package e2e

import (
	"bytes"
	"context"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/cpio"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/ci/e2e/node"
)

// limit8s is how long a pod may take to fail, whatever is wrong with it.
const limit8s = 8 * time.Second

// startFaulty starts a second sandboxer, with the settings, for the duration of the test. begin
// comes first: the census is to find whatever it leaves.
func startFaulty(ctx context.Context, t *testing.T, settings node.Settings) *node.Sandboxer {
	t.Helper()
	s, err := bed.StartSandboxer(ctx, node.PluginFaulty, settings)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the faulty sandboxer's last lines:\n%s", lastLines(s.Log))
		}
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(s.Socket); err == nil {
			t.Errorf("the sandboxer left its socket %s", s.Socket)
		}
		// Two files are meant to stay: what is known of KVM, for the next start, and the lock's,
		// which cannot be removed without a moment in which two daemons hold it. Whatever else
		// there is, the census finds.
		for _, name := range []string{".kvm", ".lock"} {
			os.Remove(filepath.Join(s.Dir, name))
		}
	})
	return s
}

// failToRun runs a pod that must fail within the limit, with an error that holds all the texts.
func failToRun(ctx context.Context, t *testing.T, handler string, texts ...string) {
	t.Helper()
	config := podConfig(t)
	// The first call may meet containerd's back-off from when the sandboxer was not there yet; it
	// has no part in the limit.
	id, took, err := "", time.Duration(0), error(nil)
	for deadline := time.Now().Add(5 * time.Second); ; {
		began := time.Now()
		var answer *runtimeapi.RunPodSandboxResponse
		answer, err = bed.CRI.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config, RuntimeHandler: handler})
		id, took = answer.GetPodSandboxId(), time.Since(began)
		if err == nil || !strings.Contains(err.Error(), "connection error") || time.Now().After(deadline) {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err == nil {
		if err := bed.CRI.RemovePod(ctx, id); err != nil {
			t.Error(err)
		}
		t.Fatal("the pod runs")
	}
	// While others use the processors a boot may take longer; the error says by how much.
	starved := time.Duration(0)
	if match := regexp.MustCompile(`([0-9.]+m?s) of which the hypervisor waited for a CPU`).FindStringSubmatch(err.Error()); match != nil {
		starved, _ = time.ParseDuration(match[1])
	}
	if took-starved > limit8s {
		t.Errorf("the failure took %v, more than %v: %v", took, limit8s, err)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("the error has no %q: %v", text, err)
		}
	}
}

// initrd writes an initrd with these files, by path, executable.
func initrd(t *testing.T, files map[string][]byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "initrd")
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	archive := cpio.Newc.Writer(file)
	records := []cpio.Record{
		cpio.Directory("dev", 0o755), cpio.Directory("proc", 0o755), cpio.Directory("sys", 0o755), cpio.Directory("bin", 0o755),
		cpio.CharDev("dev/console", 0o600, 5, 1),
	}
	for name, data := range files {
		records = append(records, cpio.StaticFile(name, string(data), 0o755))
	}
	if err := cpio.WriteRecords(archive, records); err != nil {
		t.Fatal(err)
	}
	if err := cpio.WriteTrailer(archive); err != nil {
		t.Fatal(err)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// script is an initrd whose PID 1 is a shell script.
func script(t *testing.T, text string) string {
	t.Helper()
	path, err := osexec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	busybox, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return initrd(t, map[string][]byte{"bin/busybox": busybox, "init": []byte("#!/bin/busybox sh\n" + text)})
}

func TestInitrdWithoutInit(t *testing.T) {
	ctx := begin(t)
	startFaulty(ctx, t, node.Settings{"initrd_path": strconv.Quote(initrd(t, map[string][]byte{"README": []byte("nothing\n")}))})
	failToRun(ctx, t, node.HandlerFaulty, "agent hello", "Kernel panic - not syncing")
}

func TestKernelThatPanics(t *testing.T) {
	ctx := begin(t)
	startFaulty(ctx, t, node.Settings{"initrd_path": strconv.Quote(script(t,
		"/bin/busybox mount -t proc proc /proc; echo about to crash; echo c > /proc/sysrq-trigger"))})
	failToRun(ctx, t, node.HandlerFaulty, "agent hello", "Kernel panic - not syncing: sysrq triggered crash")
}

func TestKernelThatIsNone(t *testing.T) {
	ctx := begin(t)
	kernel := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(kernel, bytes.Repeat([]byte("no kernel\n"), 1000), 0o644); err != nil {
		t.Fatal(err)
	}
	startFaulty(ctx, t, node.Settings{"kernel_path": strconv.Quote(kernel)})
	failToRun(ctx, t, node.HandlerFaulty, "stage")
}

func TestAgentThatNeverSaysHello(t *testing.T) {
	ctx := begin(t)
	startFaulty(ctx, t, node.Settings{"initrd_path": strconv.Quote(script(t, "echo the agent sleeps; exec /bin/busybox sleep 1000"))})
	failToRun(ctx, t, node.HandlerFaulty, "agent hello", "the agent sleeps")
}

func TestMachineThatExitsAtOnce(t *testing.T) {
	ctx := begin(t)
	// What the sandboxer asks of the hypervisor before it starts is answered truly.
	wrapper := filepath.Join(t.TempDir(), "qemu-system-x86_64")
	text := `#!/bin/sh
case "$*" in *sandbox-*) echo "out of luck" >&2; exit 3;; esac
exec /usr/bin/qemu-system-x86_64 "$@"
`
	if err := os.WriteFile(wrapper, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	startFaulty(ctx, t, node.Settings{"path": strconv.Quote(wrapper)})
	failToRun(ctx, t, node.HandlerFaulty, "hypervisor", "out of luck")
}

// The machine is killed at the points of a boot that can be seen from outside.
func TestMachineThatIsKilledDuringItsBoot(t *testing.T) {
	consoleHas := func(text string) func(dir, pod string) bool {
		return func(dir, pod string) bool {
			log, _ := os.ReadFile(filepath.Join(dir, pod, "sandbox-"+pod+".log"))
			return strings.Contains(string(log), text)
		}
	}
	exists := func(name string) func(dir, pod string) bool {
		return func(dir, pod string) bool {
			_, err := os.Stat(filepath.Join(dir, pod, strings.ReplaceAll(name, "<pod>", pod)))
			return err == nil
		}
	}
	for _, test := range []struct {
		name  string
		stage func(dir, pod string) bool
	}{
		{"when its process is there", func(string, string) bool { return true }},
		{"when its console is there", exists("console.sock")},
		{"when its pid file is there", exists("sandbox-<pod>.pid")},
		{"when its kernel runs", consoleHas("Linux version")},
		{"when its agent is ready", consoleHas("agent ready")},
		{"when its task socket is there", exists("task.sock")},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx := begin(t)
			type outcome struct {
				id  string
				err error
			}
			done := make(chan outcome, 1)
			config := podConfig(t)
			go func() {
				id, err := bed.CRI.RunPod(ctx, config, node.Handler)
				done <- outcome{id, err}
			}()
			var result *outcome
			var at time.Time // when it was killed
			for killed := false; !killed && result == nil; {
				select {
				case ended := <-done:
					result = &ended
				default:
				}
				time.Sleep(time.Millisecond)
				entries, _ := os.ReadDir(sandboxer.Dir)
				for _, entry := range entries {
					pid, _, err := sandboxer.VMM(entry.Name())
					if err != nil || !test.stage(sandboxer.Dir, entry.Name()) {
						continue
					}
					if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
						t.Error(err)
					}
					killed, at = true, time.Now()
				}
			}
			if result == nil {
				ended := <-done
				result = &ended
			}
			if result.err != nil {
				if took := time.Since(at); took > limit8s {
					t.Errorf("the failure took %v, more than %v", took, limit8s)
				}
				if !strings.Contains(result.err.Error(), "stage") || !strings.Contains(result.err.Error(), "killed") {
					t.Errorf("the error names no stage or not the cause: %v", result.err)
				}
				return
			}
			// It was ready before it was killed; then it must not stay so.
			if pid, _, err := sandboxer.VMM(result.id); err == nil {
				syscall.Kill(pid, syscall.SIGKILL)
			}
			eventually(ctx, t, "the pod is not ready any more", func() bool {
				answer, err := bed.CRI.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: result.id})
				return err == nil && answer.Status.State == runtimeapi.PodSandboxState_SANDBOX_NOTREADY
			})
			if err := bed.CRI.RemovePod(ctx, result.id); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestStateDirectoryThatIsFull(t *testing.T) {
	ctx := begin(t)
	dir := filepath.Join(bed.Dir, node.PluginFaulty)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("kuasar-test", dir, "tmpfs", 0, "size=64k,nr_inodes=64"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("something still uses the full state directory: %v", err)
		}
	})
	startFaulty(ctx, t, nil)
	filler, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = filler.Write(make([]byte, 4096))
	}
	filler.Close()
	failToRun(ctx, t, node.HandlerFaulty, "no space left on device")
	if entries, err := filepath.Glob(filepath.Join(dir, "[^.]*")); err != nil || !slices.Equal(entries, []string{filler.Name()}) {
		t.Errorf("besides the filler, the state directory holds %v, %v", entries, err)
	}

	// With room again, the same daemon runs pods.
	if err := os.Remove(filler.Name()); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT, "size=4m,nr_inodes=0"); err != nil {
		t.Fatal(err)
	}
	id, err := bed.CRI.RunPod(ctx, podConfig(t), node.HandlerFaulty)
	if err != nil {
		t.Fatal(err)
	}
	if err := bed.CRI.RemovePod(ctx, id); err != nil {
		t.Error(err)
	}
}

func TestHostileGuest(t *testing.T) {
	if bed == nil {
		begin(t)
	}
	program := filepath.Join(t.TempDir(), "hostile")
	build := osexec.Command("go", "build", "-o", program, "./ci/hostile")
	build.Dir, build.Env = bed.Root(), append(os.Environ(), "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		t.Fatalf("cannot build the hostile agent: %v\n%s", err, output)
	}
	data, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	agent := strconv.Quote(initrd(t, map[string][]byte{"init": data}))
	mode := func(name string) node.Settings {
		return node.Settings{"initrd_path": agent, "kernel_params": strconv.Quote("hostile=" + name)}
	}
	for _, name := range []string{"hello-too-long", "hello-garbage"} {
		t.Run(name, func(t *testing.T) {
			ctx := begin(t)
			startFaulty(ctx, t, mode(name))
			failToRun(ctx, t, node.HandlerFaulty, "agent hello", "hostile agent ready")
		})
	}
	t.Run("answer-too-long", func(t *testing.T) {
		ctx := begin(t)
		startFaulty(ctx, t, mode("answer-too-long"))
		failToRun(ctx, t, node.HandlerFaulty, "guest setup")
	})
	for _, name := range []string{"frame-too-long", "wrong-stream", "wrong-container", "multiplex"} {
		t.Run(name, func(t *testing.T) {
			ctx := begin(t)
			faulty := startFaulty(ctx, t, mode(name))
			id, err := bed.CRI.RunPod(ctx, podConfig(t), node.HandlerFaulty)
			if err != nil {
				t.Fatal(err)
			}
			eventually(ctx, t, "the hostile pod is stopped", func() bool {
				answer, err := bed.CRI.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id})
				return err == nil && answer.Status.State == runtimeapi.PodSandboxState_SANDBOX_NOTREADY
			})
			eventually(ctx, t, "its virtual machine ends", func() bool {
				_, _, err := faulty.VMM(id)
				return err != nil
			})
			if !faulty.Running() {
				t.Fatal("the sandboxer has ended")
			}
			if err := bed.CRI.RemovePod(ctx, id); err != nil {
				t.Error(err)
			}
		})
	}
}

// A daemon whose configuration is wrong says so at its start and does not start.
func TestConfigurationsThatAreRefused(t *testing.T) {
	ctx := begin(t)
	for _, test := range []struct {
		name     string
		settings node.Settings
		texts    []string
	}{
		{"hypervisor", node.Settings{"path": `"/no/such/qemu-system-x86_64"`}, []string{"hypervisor.path", "/no/such/qemu-system-x86_64", "install"}},
		{"kernel", node.Settings{"kernel_path": `"/no/such/kernel"`}, []string{"hypervisor.kernel_path", "/no/such/kernel"}},
		{"initrd", node.Settings{"initrd_path": `"/no/such/initrd"`}, []string{"hypervisor.initrd_path", "/no/such/initrd"}},
		{"type", node.Settings{"vcpus": `"two"`}, []string{"hypervisor.vcpus"}},
		{"key", node.Settings{"vcpus": "1\nvcpu = 2"}, []string{"vcpu", "vcpus"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s, err := bed.StartSandboxer(ctx, node.PluginFaulty, test.settings)
			if err == nil {
				s.Stop()
				t.Fatal("the sandboxer starts")
			}
			for _, text := range test.texts {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("the error has no %q: %v", text, err)
				}
			}
		})
	}
	t.Run("no file", func(t *testing.T) {
		output, err := osexec.CommandContext(ctx, config.Sandboxer, "--config", "/no/such/file.toml", "--dir", t.TempDir(),
			"--listen", filepath.Join(t.TempDir(), "s")).CombinedOutput()
		if err == nil || !strings.Contains(string(output), "/no/such/file.toml") {
			t.Errorf("%v: %s", err, output)
		}
	})
}
