package nested

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// qemu is the emulator.
const qemu = "qemu-system-x86_64"

// processor is one of x86-64-v2 with SVM and nested paging. It has no XSAVE, and so no AVX: the guests of
// KVM on an emulated processor cannot use it, and take a second to say so on their consoles.
const processor = "qemu64,+svm,+npt,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+lahf-lm,+rdrand,+x2apic"

// silence is how long a node may say nothing on its console before it is taken for lost. It says that
// it is alive every three seconds.
const silence = 60 * time.Second

// Files of a node's run, in the directory that a vm is given.
const (
	consoleFile    = "console.log"    // the kernel's messages and the signs of life
	transcriptFile = "transcript.txt" // what the scenarios print
	collectedFile  = "collected.tar"  // logs that the node sends at its end
)

// errLost is wrapped by the errors of a node that was lost: its machine stopped, which the emulation
// does now and then, and which says nothing of what was tried on it.
var errLost = errors.New("the node is lost")

// A vm is one run of a node.
type vm struct {
	bootable string // see function bootable
	payload  string // the second disk
	dir      string // for its files
	progress io.Writer
	silence  time.Duration
	program  string   // qemu if empty
	args     []string // instead of those of commandLine; for tests
}

// commandLine is the machine. One processor: with two, the emulation loses guests that change their own
// code, which a kernel does whenever the first KVM machine is made and the last one goes.
func (v *vm) commandLine() []string {
	at := func(name string) string { return filepath.Join(v.dir, name) }
	return []string{
		"-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", processor, "-smp", "1", "-m", "4096",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-kernel", filepath.Join(v.bootable, kernelFile), "-initrd", filepath.Join(v.bootable, initrdFile),
		"-append", "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check tsc=reliable",
		"-drive", "file=" + filepath.Join(v.bootable, rootFile) + ",format=raw,if=none,id=root,snapshot=on,cache=unsafe",
		"-device", "virtio-blk-pci,drive=root",
		"-drive", "file=" + v.payload + ",format=raw,if=none,id=payload,readonly=on",
		"-device", "virtio-blk-pci,drive=payload",
		"-chardev", "file,id=console,path=" + at(consoleFile), "-serial", "chardev:console",
		"-device", "virtio-serial-pci",
		"-chardev", "file,id=transcript,path=" + at(transcriptFile), "-device", "virtserialport,chardev=transcript,name=transcript",
		"-chardev", "file,id=collected,path=" + at(collectedFile), "-device", "virtserialport,chardev=collected,name=collected",
	}
}

// ended is the last line of a transcript.
var ended = regexp.MustCompile(`(?m)^node: the scenarios ended with status (\d+)\r?$`)

// run boots the node and returns the exit status of the scenarios once they have ended and the node has
// powered itself off. What they print goes to progress while they do. It fails with errLost if the node
// stops to live before. No process is left in any case.
func (v *vm) run(ctx context.Context) (status int, err error) {
	for _, name := range []string{consoleFile, transcriptFile, collectedFile} {
		if err := os.WriteFile(filepath.Join(v.dir, name), nil, 0o644); err != nil {
			return 0, err
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var said bytes.Buffer
	exited, err := v.start(ctx, &said)
	if err != nil {
		return 0, fmt.Errorf("cannot boot the node: %w", err)
	}
	transcript := &follower{path: filepath.Join(v.dir, transcriptFile), to: v.progress}
	heard, size := time.Now(), int64(-1)
	for running := true; running; {
		select {
		case err = <-exited:
			running = false
		case <-time.After(200 * time.Millisecond):
		}
		if err := transcript.copy(); err != nil {
			cancel(err)
		}
		if info, err := os.Stat(filepath.Join(v.dir, consoleFile)); err == nil && info.Size() != size {
			heard, size = time.Now(), info.Size()
		}
		if time.Since(heard) > v.silence {
			cancel(fmt.Errorf("%w: nothing on its console for %s", errLost, v.silence))
		}
	}
	text, rerr := os.ReadFile(transcript.path)
	if rerr != nil {
		return 0, rerr
	}
	if found := ended.FindSubmatch(text); found != nil {
		return strconv.Atoi(string(found[1]))
	}
	if cause := context.Cause(ctx); cause != nil {
		return 0, fmt.Errorf("%w; the end of its console:\n%s", cause, v.lastLines())
	}
	return 0, fmt.Errorf("%w: its machine has ended by itself (%v) %s; the end of its console:\n%s",
		errLost, err, bytes.TrimSpace(said.Bytes()), v.lastLines())
}

// start starts the emulator, which is killed when ctx ends, or this process does. The channel yields how
// it ended.
func (v *vm) start(ctx context.Context, said io.Writer) (<-chan error, error) {
	args := v.args
	if args == nil {
		args = v.commandLine()
	}
	cmd := exec.CommandContext(ctx, cmp.Or(v.program, qemu), args...)
	cmd.Stdout, cmd.Stderr = said, said
	cmd.WaitDelay = 5 * time.Second
	// A group of its own, so that the interrupt of a terminal does not reach it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started, exited := make(chan error), make(chan error, 1)
	go func() {
		// The signal comes when the thread that started it ends.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			exited <- cmd.Wait()
		}
	}()
	return exited, <-started
}

// lastLines returns the end of the console without the signs of life.
func (v *vm) lastLines() string {
	text, _ := os.ReadFile(filepath.Join(v.dir, consoleFile))
	var lines []string
	for line := range strings.Lines(string(text)) {
		if !strings.Contains(line, "node: alive") {
			lines = append(lines, "    "+strings.TrimRight(line, "\r\n"))
		}
	}
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}

// A follower copies what is appended to a file.
type follower struct {
	path   string
	to     io.Writer
	offset int64
}

// copy copies what was appended since the last call.
func (f *follower) copy() error {
	file, err := os.Open(f.path)
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := file.Seek(f.offset, io.SeekStart); err != nil {
		return err
	}
	n, err := io.Copy(f.to, file)
	f.offset += n
	return err
}
