package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/ci/e2e/cri"
	"kuasar.io/kuasar/ci/e2e/node"
)

func TestExitCodes(t *testing.T) {
	ctx := begin(t)
	p := runPod(ctx, t, podConfig(t), node.Handler)
	for _, test := range []struct {
		name, script string
		code         int32
	}{
		{"success", "true", 0},
		{"a code", "exit 42", 42},
		{"SIGTERM", "kill -TERM $$", 128 + 15},
		{"SIGKILL", "kill -KILL $$", 128 + 9},
	} {
		t.Run(test.name, func(t *testing.T) {
			// As process 1 a shell would be protected from its own signals.
			config := container("sh -c '" + test.script + "'; exit $?")
			id := p.start(ctx, t, config)
			status, err := bed.CRI.WaitExited(ctx, id)
			if err != nil {
				t.Fatal(err)
			}
			if status.ExitCode != test.code {
				t.Errorf("the exit code is %d, not %d", status.ExitCode, test.code)
			}
		})
	}
	t.Run("a program that does not exist", func(t *testing.T) {
		config := container("")
		config.Command = []string{"/no/such/program"}
		id, err := bed.CRI.Create(ctx, p.id, p.config, config)
		if err != nil {
			t.Fatal(err)
		}
		err = bed.CRI.Start(ctx, id)
		if err == nil || !strings.Contains(err.Error(), "/no/such/program") {
			t.Errorf("the error does not name the program: %v", err)
		}
		status, err := bed.CRI.Status(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		if status.ExitCode != 128 || status.Reason != "StartError" {
			t.Errorf("the container's exit is %d %s, not 128 StartError", status.ExitCode, status.Reason)
		}
	})
	t.Run("the pod survives", func(t *testing.T) {
		exec(ctx, t, p.start(ctx, t, container("sleep 1000")), "true")
	})
}

func TestStop(t *testing.T) {
	ctx := begin(t)
	p := runPod(ctx, t, podConfig(t), node.Handler)
	for _, test := range []struct {
		name, script string
		code         int32
	}{
		{"a signal that is handled", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done", 5},
		{"a signal that is ignored", "trap '' TERM; echo ready; while :; do sleep 0.1; done", 128 + 9},
	} {
		t.Run(test.name, func(t *testing.T) {
			config := container(test.script)
			id := p.start(ctx, t, config)
			eventually(ctx, t, "the container sets its trap", func() bool { return p.log(t, config, "stdout") != "" })
			if _, err := bed.CRI.Runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 2}); err != nil {
				t.Fatal(err)
			}
			status, err := bed.CRI.Status(ctx, id)
			if err != nil {
				t.Fatal(err)
			}
			if status.State != runtimeapi.ContainerState_CONTAINER_EXITED || status.ExitCode != test.code {
				t.Errorf("the container is %s with code %d, not exited with %d", status.State, status.ExitCode, test.code)
			}
		})
	}
}

func TestUsersAndPrivileges(t *testing.T) {
	ctx := begin(t)
	p := runPod(ctx, t, podConfig(t), node.Handler)
	config := container("sleep 1000")
	security := config.Linux.SecurityContext
	security.RunAsUser = &runtimeapi.Int64Value{Value: 1000}
	security.RunAsGroup = &runtimeapi.Int64Value{Value: 2000}
	security.SupplementalGroups = []int64{3000}
	security.NoNewPrivs = true
	security.ReadonlyRootfs = true
	security.Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL"}}
	security.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
	security.MaskedPaths = []string{"/proc/timer_list"}
	security.ReadonlyPaths = []string{"/proc/sys"}
	config.WorkingDir = "/tmp"
	config.Envs = []*runtimeapi.KeyValue{{Key: "COLOUR", Value: []byte("green")}}
	id := p.start(ctx, t, config)

	if got := exec(ctx, t, id, "id"); got != "uid=1000 gid=2000 groups=2000,3000\n" {
		t.Errorf("id says %q", got)
	}
	status := exec(ctx, t, id, "cat", "/proc/self/status")
	for _, want := range []string{"CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
		if !strings.Contains(status, want) {
			t.Errorf("/proc/self/status has no %q:\n%s", want, status)
		}
	}
	if got := exec(ctx, t, id, "sh", "-c", "pwd; echo $COLOUR"); got != "/tmp\ngreen\n" {
		t.Errorf("the working directory and the environment are %q", got)
	}
	if result, err := bed.CRI.Exec(ctx, id, "touch", "/tmp/x"); err != nil || !strings.Contains(result.Stderr, "Read-only file system") {
		t.Errorf("the root file system can be written to: %+v, %v", result, err)
	}
}

func TestExec(t *testing.T) {
	ctx := begin(t)
	p := runPod(ctx, t, podConfig(t), node.Handler)
	id := p.start(ctx, t, container("sleep 1000"))
	execTests(ctx, t, id)

	t.Run("a program that does not exist", func(t *testing.T) {
		_, err := bed.CRI.Exec(ctx, id, "/no/such/program")
		if err == nil || !strings.Contains(err.Error(), "/no/such/program") {
			t.Errorf("the error does not name the program: %v", err)
		}
	})
	t.Run("time-out", func(t *testing.T) {
		_, err := bed.CRI.Runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"sleep", "1000"}, Timeout: 1})
		if err == nil {
			t.Error("no error")
		}
		eventually(ctx, t, "the timed-out process is gone", func() bool {
			return !strings.Contains(exec(ctx, t, id, "sh", "-c", "ps -o pid,args | grep -v ' 1 ' "), "sleep 1000")
		})
	})
	t.Run("with a terminal", func(t *testing.T) {
		input, keyboard := io.Pipe()
		screen, output := io.Pipe()
		sizes := make(chan remotecommand.TerminalSize, 2)
		sizes <- remotecommand.TerminalSize{Width: 100, Height: 40}
		done := make(chan error, 1)
		var code int
		go func() {
			var err error
			code, err = bed.CRI.ExecStream(ctx, id, cri.Streams{Stdin: input, Stdout: output, TTY: true, Sizes: sizes},
				"sh", "-c", `tty; until [ "$(stty size)" = "40 100" ]; do sleep 0.1; done; echo first
					until [ "$(stty size)" = "50 200" ]; do sleep 0.1; done; echo second
					read line; echo "read $line"; exit 9`)
			output.Close()
			done <- err
		}()
		lines := bufio.NewScanner(screen)
		next := func(want string) {
			t.Helper()
			if !lines.Scan() {
				t.Fatalf("the terminal ended instead of showing %q: %v", want, lines.Err())
			}
			if got := strings.TrimSpace(lines.Text()); !strings.HasPrefix(got, want) {
				t.Fatalf("the terminal shows %q, not %q", got, want)
			}
		}
		next("/dev/pts/")
		next("first")
		sizes <- remotecommand.TerminalSize{Width: 200, Height: 50}
		next("second")
		io.WriteString(keyboard, "typed\n")
		next("typed") // the terminal's echo
		next("read typed")
		if err := <-done; err != nil || code != 9 {
			t.Errorf("the code is %d and the error %v, not 9 and none", code, err)
		}
		keyboard.Close()
		close(sizes)
	})
}

// execTests are those that hold however the streams are carried.
func execTests(ctx context.Context, t *testing.T, id string) {
	t.Run("output, error output and code", func(t *testing.T) {
		var stdout, stderr bytes.Buffer
		code, err := bed.CRI.ExecStream(ctx, id, cri.Streams{Stdout: &stdout, Stderr: &stderr}, "sh", "-c", "echo out; echo err >&2; exit 3")
		if err != nil {
			t.Fatal(err)
		}
		if code != 3 || stdout.String() != "out\n" || stderr.String() != "err\n" {
			t.Errorf("got code %d, output %q, error output %q", code, &stdout, &stderr)
		}
	})
	t.Run("input that ends", func(t *testing.T) {
		input := make([]byte, 4<<20)
		rand.NewChaCha8([32]byte{}).Read(input)
		var stdout bytes.Buffer
		code, err := bed.CRI.ExecStream(ctx, id, cri.Streams{Stdin: bytes.NewReader(input), Stdout: &stdout}, "cat")
		if err != nil || code != 0 {
			t.Fatalf("code %d, error %v", code, err)
		}
		if !bytes.Equal(input, stdout.Bytes()) {
			t.Errorf("%d bytes went in, %d other ones came out", len(input), stdout.Len())
		}
	})
	t.Run("answer after the input has ended", func(t *testing.T) {
		var stdout bytes.Buffer
		code, err := bed.CRI.ExecStream(ctx, id, cri.Streams{Stdin: strings.NewReader("3\n1\n2\n"), Stdout: &stdout}, "sort")
		if err != nil || code != 0 || stdout.String() != "1\n2\n3\n" {
			t.Errorf("code %d, output %q, error %v", code, &stdout, err)
		}
	})
}

func TestAttach(t *testing.T) {
	ctx := begin(t)
	p := runPod(ctx, t, podConfig(t), node.Handler)

	t.Run("detach and attach again", func(t *testing.T) {
		config := container("while read line; do echo got $line; done")
		config.Stdin = true
		id := p.start(ctx, t, config)
		for _, word := range []string{"one", "two"} {
			attached, detach := context.WithCancel(ctx)
			input, keyboard := io.Pipe()
			screen, output := io.Pipe()
			done := make(chan error, 1)
			go func() {
				done <- bed.CRI.Attach(attached, id, cri.Streams{Stdin: input, Stdout: output})
				output.Close()
			}()
			io.WriteString(keyboard, word+"\n")
			if line, err := bufio.NewReader(screen).ReadString('\n'); err != nil || line != "got "+word+"\n" {
				t.Errorf("attached, %q is answered by %q, %v", word, line, err)
			}
			detach()
			if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			keyboard.Close()
		}
		if status, err := bed.CRI.Status(ctx, id); err != nil || status.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			t.Errorf("after detaching the container is %v, %v", status.GetState(), err)
		}
	})

	t.Run("input that ends ends the container", func(t *testing.T) {
		config := container("cat; exit 6")
		config.Stdin, config.StdinOnce = true, true
		id := p.start(ctx, t, config)
		var stdout bytes.Buffer
		if err := bed.CRI.Attach(ctx, id, cri.Streams{Stdin: strings.NewReader("to the end"), Stdout: &stdout}); err != nil {
			t.Fatal(err)
		}
		status, err := bed.CRI.WaitExited(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		if status.ExitCode != 6 || stdout.String() != "to the end" {
			t.Errorf("the code is %d and the output %q", status.ExitCode, &stdout)
		}
	})

	t.Run("a terminal", func(t *testing.T) {
		config := container("read line; echo read $line; exit 4")
		config.Stdin, config.Tty = true, true
		id := p.start(ctx, t, config)
		input, keyboard := io.Pipe()
		var screen bytes.Buffer
		done := make(chan error, 1)
		go func() { done <- bed.CRI.Attach(ctx, id, cri.Streams{Stdin: input, Stdout: &screen, TTY: true}) }()
		io.WriteString(keyboard, "typed\n")
		status, err := bed.CRI.WaitExited(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		keyboard.Close()
		<-done
		if status.ExitCode != 4 || !strings.Contains(screen.String(), "read typed\r\n") {
			t.Errorf("the code is %d and the screen shows %q", status.ExitCode, &screen)
		}
	})
}

func TestLogs(t *testing.T) {
	ctx := begin(t)
	p := runPod(ctx, t, podConfig(t), node.Handler)
	logTests(ctx, t, p)
}

// logTests are those that hold however the streams are carried.
func logTests(ctx context.Context, t *testing.T, p *pod) {
	t.Run("both streams", func(t *testing.T) {
		config := container("echo out; echo err >&2; printf unfinished")
		if _, err := bed.CRI.WaitExited(ctx, p.start(ctx, t, config)); err != nil {
			t.Fatal(err)
		}
		eventually(ctx, t, "the log is written", func() bool {
			return p.log(t, config, "stdout") == "out\nunfinished" && p.log(t, config, "stderr") == "err\n"
		})
	})
	t.Run("8 MiB just before the end", func(t *testing.T) {
		const size = 8 << 20
		config := container("yes 0123456789abcde | head -c 8388608")
		status, err := bed.CRI.WaitExited(ctx, p.start(ctx, t, config))
		if err != nil {
			t.Fatal(err)
		}
		if status.ExitCode != 0 {
			t.Errorf("the code is %d", status.ExitCode)
		}
		want := sha256.Sum256(bytes.Repeat([]byte("0123456789abcde\n"), size/16))
		deadline := time.Now().Add(5 * time.Second) // containerd writes the log on its own time
		for {
			got := p.log(t, config, "stdout")
			if sha256.Sum256([]byte(got)) == want {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("the log holds %d bytes, not the %d that were printed", len(got), size)
			}
			time.Sleep(50 * time.Millisecond)
		}
	})
}

func TestStreamingIO(t *testing.T) {
	ctx := begin(t)
	p := runPod(ctx, t, podConfig(t), node.HandlerStreaming)
	logTests(ctx, t, p)
	id := p.start(ctx, t, container("sleep 1000"))
	execTests(ctx, t, id)
}
