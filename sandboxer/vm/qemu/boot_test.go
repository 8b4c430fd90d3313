package qemu_test

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/guestlink"
	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/qemu"
)

// bench is what a test with a real QEMU needs.
type bench struct {
	driver         *qemu.Driver
	kernel, initrd string
}

// needBench skips unless the tests that boot machines are wanted and possible. ARCH=aarch64 boots,
// on x86_64, what "ARCH=aarch64 go tool mage build" makes.
func needBench(t *testing.T, accelerator string) bench {
	t.Helper()
	if os.Getenv("KUASAR_E2E") == "" {
		t.Skip("boots virtual machines; set KUASAR_E2E=1 to run it")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	root, err := filepath.Abs("../../..")
	if err != nil {
		t.Fatal(err)
	}
	out, program := filepath.Join(root, "out"), ""
	if arch := os.Getenv("ARCH"); arch != "" {
		out = filepath.Join(out, arch)
		if program, err = exec.LookPath("qemu-system-" + arch); err != nil {
			t.Skip(err)
		}
	}
	b := bench{kernel: filepath.Join(out, "vmlinux.bin"), initrd: filepath.Join(out, "kuasar.initrd")}
	for _, path := range []string{b.kernel, b.initrd} {
		if _, err := os.Stat(path); err != nil {
			t.Skipf("%v; build it with mage", err)
		}
	}
	b.driver, err = qemu.New(qemu.Config{Path: program, Accelerator: accelerator, Kernel: b.kernel, Log: quiet()})
	if err != nil {
		t.Skip(err)
	}
	return b
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// shortDir is a directory whose path leaves room for the names of sockets.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (b bench) spec(t *testing.T) vm.Spec {
	return vm.Spec{
		PodID: "boot-test", Dir: shortDir(t), Kernel: b.kernel, Initrd: b.initrd,
		KernelParams: []string{protocol.ParamLogLevel + "=info", protocol.ParamDebug},
		VCPUs:        1, MemoryMiB: 256,
	}
}

func deadline(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// up starts a machine and waits for its agent.
func up(t *testing.T, b bench, spec vm.Spec) (vm.Machine, guestlink.Link) {
	t.Helper()
	ctx := deadline(t, 20*time.Second)
	m, err := b.driver.Create(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Stop(context.Background()) })
	begin := time.Now()
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	started := time.Since(begin)
	link, err := guestlink.Open(ctx, m.Endpoint(), quiet())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { link.Close() })
	hello, err := link.Hello(ctx)
	if err != nil {
		t.Fatalf("%v; console: %s", err, strings.Join(m.(*qemu.Machine).ConsoleTail(), " | "))
	}
	t.Logf("%s: QEMU answers after %v, the agent after %v; its uptime then: %v", b.driver.Name(),
		started.Round(time.Millisecond), time.Since(begin).Round(time.Millisecond), time.Duration(hello.UptimeNanos).Round(time.Millisecond))
	return m, link
}

// ask runs a command in the guest's console and returns what it prints.
func ask(t *testing.T, link guestlink.Link, command string) string {
	t.Helper()
	console, err := link.Dial(deadline(t, 10*time.Second), protocol.PortConsole)
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	io.WriteString(console, "KSR_MODE exec\n"+command+"\nexit\n")
	console.SetReadDeadline(time.Now().Add(20 * time.Second))
	out, err := io.ReadAll(console)
	if err != nil {
		t.Errorf("%s: %q, %v", command, out, err)
	}
	return string(out)
}

func TestBootHelloStop(t *testing.T) {
	b := needBench(t, "")
	spec := b.spec(t)
	m, link := up(t, b, spec)
	ctx := deadline(t, 20*time.Second)
	if out := ask(t, link, "echo $((6*7))"); !strings.Contains(out, "42") {
		t.Errorf("the console said %q", out)
	}

	state, err := m.State()
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := m.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("stopped within %v: %+v", time.Since(begin).Round(time.Millisecond), m.Exit())
	if _, err := b.driver.Restore(ctx, state.Saved); !errors.Is(err, vm.ErrGone) {
		t.Errorf("a dead machine was restored: %v", err)
	}
	left, err := os.ReadDir(spec.Dir)
	if err != nil || len(left) != 1 || left[0].Name() != "sandbox-boot-test.log" {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestBootRestoreRunningMachine(t *testing.T) {
	b := needBench(t, "")
	m, link := up(t, b, b.spec(t))
	ctx := deadline(t, 30*time.Second)
	disk := makeDisk(t)
	if err := m.AttachDisk(ctx, vm.Disk{Path: disk, Serial: "kept"}); err != nil {
		t.Fatal(err)
	}
	state, err := m.State()
	if err != nil {
		t.Fatal(err)
	}
	link.Close()
	// Each socket has one client at a time, and the first daemon is supposed to be gone.
	qemu.DropMonitor(m)
	again, err := b.driver.Restore(ctx, state.Saved)
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	link, err = guestlink.Open(ctx, again.Endpoint(), quiet())
	if err != nil {
		t.Fatal(err)
	}
	defer link.Close()
	if _, err := link.Hello(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("the agent answered the new link after %v", time.Since(begin).Round(time.Millisecond))
	if err := again.AttachDisk(ctx, vm.Disk{Path: disk, Serial: "kept"}); err == nil {
		t.Error("the plugged-in disk was forgotten")
	}
	if err := again.DetachDisk(ctx, "kept"); err != nil {
		t.Fatal(err)
	}
	if err := again.AttachDisk(ctx, vm.Disk{Path: disk, Serial: "kept"}); err != nil {
		t.Fatal(err)
	}
	if err := again.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	<-m.Exited()
}

// TestBootShare reads a file of the host in the guest, over each kind of share.
func TestBootShare(t *testing.T) {
	b := needBench(t, "tcg")
	for _, kind := range []string{"9p", "virtiofs"} {
		t.Run(kind, func(t *testing.T) {
			spec := b.spec(t)
			shared := t.TempDir()
			if err := os.WriteFile(filepath.Join(shared, "file"), []byte("from the host\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			spec.KernelParams = append(spec.KernelParams, protocol.ParamShareType+"="+kind)
			if kind == "9p" {
				spec.Share.Dir = shared
			} else {
				spec.Share.Socket = filepath.Join(spec.Dir, "virtiofs.sock")
				startVirtiofsd(t, spec.Share.Socket, shared)
			}
			_, link := up(t, b, spec)
			if out := ask(t, link, "cat "+protocol.SharePath+"/file"); !strings.Contains(out, "from the host") {
				t.Errorf("the guest reads %q", out)
			}
		})
	}
}

// startVirtiofsd runs the daemon that comes with QEMU 7 until the test ends.
func startVirtiofsd(t *testing.T, socket, dir string) {
	t.Helper()
	const path = "/usr/lib/qemu/virtiofsd"
	if _, err := os.Stat(path); err != nil {
		t.Skip(err)
	}
	cmd := exec.Command(path, "--socket-path="+socket, "-o", "source="+dir)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for range 500 {
		if _, err := os.Stat(socket); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("virtiofsd makes no socket")
}

// TestBootReconnectUnderLoad breaks the transport while the guest sends as much as it can, and reconnects
// at once, as a daemon does that was killed.
func TestBootReconnectUnderLoad(t *testing.T) {
	b := needBench(t, "tcg")
	m, link := up(t, b, b.spec(t))
	ctx := deadline(t, 120*time.Second)
	e := m.Endpoint()
	e.Restored = true
	for round := range 10 {
		console, err := link.Dial(ctx, protocol.PortConsole)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(console, "KSR_MODE exec\ncat /dev/zero\n")
		n, err := io.CopyN(io.Discard, console, 8<<20)
		if err != nil {
			t.Fatalf("after %d bytes: %v", n, err)
		}
		link.Close()
		begin := time.Now()
		if link, err = guestlink.Open(ctx, e, quiet()); err != nil {
			t.Fatal(err)
		}
		if _, err := link.Hello(ctx); err != nil {
			t.Fatal(err)
		}
		t.Logf("round %d: the agent answered after %v", round, time.Since(begin).Round(time.Millisecond))
	}
	link.Close()
}

func makeDisk(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	content := make([]byte, 1<<20)
	rand.Read(content)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestBootDisksComeAndGo(t *testing.T) {
	b := needBench(t, "")
	m, link := up(t, b, b.spec(t))
	ctx := deadline(t, 60*time.Second)
	disk := makeDisk(t)
	pid, err := m.State()
	if err != nil {
		t.Fatal(err)
	}
	var before int
	for round := range 3 {
		for _, serial := range []string{"a", "b"} {
			begin := time.Now()
			if err := m.AttachDisk(ctx, vm.Disk{Path: disk, Serial: serial, ReadOnly: true}); err != nil {
				t.Fatal(err)
			}
			t.Logf("round %d: %s attached within %v", round, serial, time.Since(begin).Round(time.Millisecond))
		}
		// The guest names disks in the order in which it finds them.
		if out := ask(t, link, "until [ -e /sys/block/vda/serial -a -e /sys/block/vdb/serial ]; do sleep 0.05; done; cat /sys/block/vd?/serial"); !strings.Contains(out, "ab") && !strings.Contains(out, "ba") {
			t.Errorf("the guest sees the disks %q", out)
		}
		for _, serial := range []string{"a", "b", "never"} {
			begin := time.Now()
			if err := m.DetachDisk(ctx, serial); err != nil {
				t.Fatal(err)
			}
			t.Logf("round %d: %s detached within %v", round, serial, time.Since(begin).Round(time.Millisecond))
		}
		count := func() int {
			fds, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(pid.PID), "fd"))
			if err != nil {
				t.Fatal(err)
			}
			return len(fds)
		}
		if round == 0 {
			before = count()
			continue
		}
		for count() > before {
			if ctx.Err() != nil {
				t.Fatalf("QEMU holds %d descriptors after round %d, %d after the first", count(), round, before)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	if err := m.Stop(ctx); err != nil {
		t.Fatal(err)
	}
}

// TestBootSCSIDiskComesAndGoes: on the controller, the guest knows a disk by its serial number, too.
func TestBootSCSIDiskComesAndGoes(t *testing.T) {
	b := needBench(t, "")
	var err error
	if b.driver, err = qemu.New(qemu.Config{Accelerator: "tcg", BlockDeviceDriver: "virtio-scsi", Log: quiet()}); err != nil {
		t.Skip(err)
	}
	m, link := up(t, b, b.spec(t))
	ctx := deadline(t, 60*time.Second)
	disk := makeDisk(t)
	for round := range 2 {
		begin := time.Now()
		if err := m.AttachDisk(ctx, vm.Disk{Path: disk, Serial: "scsi-disk", ReadOnly: true}); err != nil {
			t.Fatal(err)
		}
		if out := ask(t, link, "until [ -e /sys/block/sda/device/vpd_pg80 ]; do sleep 0.05; done; cat /sys/block/sda/device/vpd_pg80"); !strings.Contains(out, "scsi-disk") {
			t.Errorf("the guest sees the disk %q", out)
		}
		seen := time.Since(begin)
		if err := m.DetachDisk(ctx, "scsi-disk"); err != nil {
			t.Fatal(err)
		}
		t.Logf("round %d: in the guest after %v, out of it after %v", round, seen.Round(time.Millisecond), (time.Since(begin) - seen).Round(time.Millisecond))
		if out := ask(t, link, "for i in 1 2 3 4 5 6 7 8 9 10; do [ -e /sys/block/sda ] || break; sleep 0.2; done; ls /sys/block"); strings.Contains(out, "sda\n") {
			t.Errorf("the guest still has the disk: %q", out)
		}
	}
}
