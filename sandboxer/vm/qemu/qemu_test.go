package qemu_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/qemu"
	"kuasar.io/kuasar/sandboxer/vm/vmtest"
)

func TestMain(m *testing.M) {
	vmtest.RunStandIn()
	os.Exit(m.Run())
}

func newDriver(t *testing.T, b vmtest.Behaviour) *qemu.Driver {
	t.Helper()
	d, err := qemu.New(qemu.Config{Path: vmtest.StandIn(t, b), MachineType: "q35", Accelerator: "tcg", Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// plainSpec is the least that boots; its kernel and initrd are empty files.
func plainSpec(t *testing.T) vm.Spec {
	t.Helper()
	dir := shortDir(t)
	files := t.TempDir()
	s := vm.Spec{
		PodID: "pod-1", Dir: dir, VCPUs: 1, MemoryMiB: 128,
		Kernel: filepath.Join(files, "vmlinux.bin"), Initrd: filepath.Join(files, "kuasar.initrd"),
	}
	for _, f := range []string{s.Kernel, s.Initrd} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// tap is some descriptor that can be handed over.
func tap(t *testing.T) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	return r
}

func start(t *testing.T, b vmtest.Behaviour, spec vm.Spec) (*qemu.Driver, vm.Machine) {
	t.Helper()
	d := newDriver(t, b)
	m, err := d.Create(spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Start(deadline(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return d, m
}

// onlyLog checks that a machine has left nothing but its log.
func onlyLog(t *testing.T, spec vm.Spec) {
	t.Helper()
	entries, err := os.ReadDir(spec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != "sandbox-"+spec.PodID+".log" {
			t.Errorf("%s was left behind", e.Name())
		}
	}
}

func TestNewRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		version string
		config  qemu.Config
		want    string
	}{
		"another program":  {"StratoVirt 2.3.0", qemu.Config{}, "is no QEMU"},
		"an old QEMU":      {"QEMU emulator version 2.12.0", qemu.Config{}, "at least 6.0"},
		"its accelerator":  {"", qemu.Config{Accelerator: "hvf"}, "unknown accelerator"},
		"its machine type": {"", qemu.Config{Accelerator: "tcg", MachineType: "pc"}, "machine type"},
	} {
		t.Run(name, func(t *testing.T) {
			c.config.Path, c.config.Log = vmtest.StandIn(t, vmtest.Behaviour{Version: c.version}), quiet()
			if _, err := qemu.New(c.config); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v", err)
			}
		})
	}
	if _, err := qemu.New(qemu.Config{Path: "/nonexistent/qemu", Accelerator: "tcg"}); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("got %v", err)
	}
}

func TestName(t *testing.T) {
	d := newDriver(t, vmtest.Behaviour{Version: "QEMU emulator version 8.2.1 (Debian 1:8.2)\nCopyright"})
	if got := d.Name(); got != "QEMU 8.2.1 (tcg)" {
		t.Fatalf("%q", got)
	}
}

func TestKVMIsBelievedWhenAKernelSpeaks(t *testing.T) {
	kernel := plainSpec(t).Kernel
	for name, c := range map[string]struct {
		behaviour vmtest.Behaviour
		want      string // of the error, or "" for none
	}{
		"works":         {vmtest.Behaviour{Console: "junk\r\nLinux version 6.1", Silent: true}, ""},
		"ends silently": {vmtest.Behaviour{Stderr: "failed to initialize kvm: Operation not permitted\n"}, "Operation not permitted"},
		"only firmware": {vmtest.Behaviour{Console: "SeaBIOS (version 1.16)\n"}, "ended before"},
		"hangs":         {vmtest.Behaviour{Silent: true}, "said nothing within"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := qemu.TryKVM(newDriver(t, c.behaviour), kernel)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Fatalf("got %v", err)
			}
		})
	}
}

func TestKVMProbeIsKept(t *testing.T) {
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		t.Skip("without /dev/kvm nothing is tried: ", err)
	} else {
		f.Close()
	}
	cache := filepath.Join(t.TempDir(), "kvm.json")
	config := qemu.Config{Path: vmtest.StandIn(t, vmtest.Behaviour{Stderr: "no\n", Exit: 1}), MachineType: "q35", Kernel: plainSpec(t).Kernel, ProbeCache: cache, Log: quiet()}
	d, err := qemu.New(config)
	if err != nil {
		t.Fatal(err)
	}
	if d.Accelerator() != "tcg" {
		t.Fatal("KVM is believed to run a kernel that says nothing")
	}
	kept := map[string]any{}
	b, err := os.ReadFile(cache)
	if err != nil || json.Unmarshal(b, &kept) != nil || kept["KVM"] != false {
		t.Fatalf("%s, %v", b, err)
	}
	// What was kept is believed as long as it is about the same kernel.
	kept["KVM"] = true
	b, _ = json.Marshal(kept)
	os.WriteFile(cache, b, 0o600)
	if d, err = qemu.New(config); err != nil || d.Accelerator() != "kvm" {
		t.Fatalf("the kept outcome was ignored: %v", err)
	}
	os.WriteFile(config.Kernel, []byte("another one"), 0o600)
	if d, err = qemu.New(config); err != nil || d.Accelerator() != "tcg" {
		t.Fatalf("the outcome of another kernel was used: %v", err)
	}
}

func TestCreateRefuses(t *testing.T) {
	d := newDriver(t, vmtest.Behaviour{})
	for name, spoil := range map[string]func(*vm.Spec){
		"empty id":    func(s *vm.Spec) { s.PodID = "" },
		"path as id":  func(s *vm.Spec) { s.PodID = "../x" },
		"comma in id": func(s *vm.Spec) { s.PodID = "a,b" },
		"no CPU":      func(s *vm.Spec) { s.VCPUs = 0 },
		"no memory":   func(s *vm.Spec) { s.MemoryMiB = 8 },
		"no kernel":   func(s *vm.Spec) { s.Kernel = "" },
		"no initrd":   func(s *vm.Spec) { s.Initrd = "" },
		"long path":   func(s *vm.Spec) { s.Dir = "/" + strings.Repeat("d", 100) },
		"no tap":      func(s *vm.Spec) { s.NICs = []vm.NIC{{MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}}} },
		"line break":  func(s *vm.Spec) { s.KernelParams = []string{"a\nb"} },
	} {
		s := plainSpec(t)
		spoil(&s)
		if _, err := d.Create(s); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestStartAndStop(t *testing.T) {
	spec := plainSpec(t)
	spec.NICs = []vm.NIC{
		{Tap: tap(t), MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, MTU: 1500},
		{Tap: tap(t), MAC: net.HardwareAddr{2, 0, 0, 0, 0, 2}, MTU: 1400},
	}
	spec.Share.Dir = filepath.Join(t.TempDir(), "with,comma")
	if err := os.Mkdir(spec.Share.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	_, m := start(t, vmtest.Behaviour{Console: "booting\x1b[2J\r\nready\r\n"}, spec)
	for _, n := range spec.NICs {
		if _, err := n.Tap.Stat(); !errors.Is(err, os.ErrClosed) {
			t.Error("a tap is still open here")
		}
	}
	for _, name := range []string{"console.sock", "sandbox-pod-1.log", "sandbox-pod-1.pid"} {
		if _, err := os.Stat(filepath.Join(spec.Dir, name)); err != nil {
			t.Error(err)
		}
	}
	state, err := m.State()
	if err != nil {
		t.Fatal(err)
	}
	pid, err := os.ReadFile(filepath.Join(spec.Dir, "sandbox-pod-1.pid"))
	if err != nil || string(pid) != fmt.Sprintf("%d\n", state.PID) {
		t.Errorf("pid file %q, state %d, %v", pid, state.PID, err)
	}
	if sid, err := unix.Getsid(state.PID); err != nil || sid != state.PID {
		t.Errorf("session %d, %v", sid, err)
	}
	if e := m.Endpoint(); e.SerialSocket != filepath.Join(spec.Dir, "agent.sock") || e.Restored {
		t.Errorf("%+v", e)
	}
	if err := m.Start(deadline(t, time.Second)); !errors.Is(err, vm.ErrGone) {
		t.Errorf("a second start: %v", err)
	}
	for range 2 {
		if err := m.Stop(deadline(t, 10*time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	<-m.Exited()
	if e := m.Exit(); e.Code != 0 || e.Time.IsZero() || e.Reason != "the virtual machine was stopped" {
		t.Errorf("%+v", e)
	}
	onlyLog(t, spec)
	log, _ := os.ReadFile(filepath.Join(spec.Dir, "sandbox-pod-1.log"))
	if !strings.Contains(string(log), "ready") {
		t.Errorf("the console's log is %q", log)
	}
	if tail := m.(*qemu.Machine).ConsoleTail(); !slices.Equal(tail, []string{"booting[2J", "ready"}) {
		t.Errorf("%q", tail)
	}
	if _, err := m.State(); !errors.Is(err, vm.ErrGone) {
		t.Errorf("State after the end: %v", err)
	}
	if err := m.AttachDisk(deadline(t, time.Second), vm.Disk{Path: spec.Kernel, Serial: "x"}); !errors.Is(err, vm.ErrGone) {
		t.Errorf("AttachDisk after the end: %v", err)
	}
}

func TestStopBeforeStart(t *testing.T) {
	spec := plainSpec(t)
	spec.NICs = []vm.NIC{{Tap: tap(t), MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}}}
	m, err := newDriver(t, vmtest.Behaviour{}).Create(spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Stop(deadline(t, time.Second)); err != nil {
		t.Fatal(err)
	}
	<-m.Exited()
	if _, err := spec.NICs[0].Tap.Stat(); !errors.Is(err, os.ErrClosed) {
		t.Error("the tap is still open")
	}
	if err := m.Start(deadline(t, time.Second)); !errors.Is(err, vm.ErrGone) {
		t.Errorf("started after Stop: %v", err)
	}
}

// TestFailedStart: whatever goes wrong, the error says it and nothing is left.
func TestFailedStart(t *testing.T) {
	for name, c := range map[string]struct {
		behaviour vmtest.Behaviour
		spoil     func(*testing.T, *vm.Spec)
		limit     time.Duration
		want      string
	}{
		"exits at once":   {behaviour: vmtest.Behaviour{Exit: 3, Stderr: "qemu: no such machine\n"}, want: "exited with status 3: qemu: no such machine"},
		"says nothing":    {behaviour: vmtest.Behaviour{Exit: 1}, want: "exited with status 1"},
		"never greets":    {behaviour: vmtest.Behaviour{Silent: true, Stderr: "waiting for a disk"}, limit: 5 * time.Second, want: "did not greet"},
		"its words then":  {behaviour: vmtest.Behaviour{Silent: true, Stderr: "waiting for a disk"}, limit: 5 * time.Second, want: "waiting for a disk"},
		"killed":          {behaviour: vmtest.Behaviour{DieAfter: 1}, want: "killed by SIGKILL"},
		"refuses":         {behaviour: vmtest.Behaviour{Refuse: "query-status"}, want: "refused, as told"},
		"does not run":    {behaviour: vmtest.Behaviour{Status: "prelaunch"}, want: "prelaunch"},
		"no kernel there": {spoil: func(_ *testing.T, s *vm.Spec) { s.Kernel = "/nonexistent" }, want: "no such file"},
		"no virtiofs daemon": {spoil: func(_ *testing.T, s *vm.Spec) { s.Share.Socket = s.Dir + "/nobody.sock" },
			want: "no socket there"},
		"no cgroup": {spoil: func(t *testing.T, s *vm.Spec) { s.CgroupProcs = []string{t.TempDir() + "/cgroup.procs"} }, want: "cannot enter the cgroup"},
		"file as cgroup": {spoil: func(_ *testing.T, s *vm.Spec) { s.CgroupProcs = []string{s.Kernel} },
			want: "on no cgroup file system"},
		"no directory": {spoil: func(_ *testing.T, s *vm.Spec) { os.Remove(s.Dir) }, want: "cannot make a socket"},
		"socket taken": {spoil: func(t *testing.T, s *vm.Spec) {
			if err := os.WriteFile(s.Dir+"/agent.sock", nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, want: "cannot make a socket"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			spec := plainSpec(t)
			spec.NICs = []vm.NIC{{Tap: tap(t), MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}}}
			if c.spoil != nil {
				c.spoil(t, &spec)
			}
			m, err := newDriver(t, c.behaviour).Create(spec)
			if err != nil {
				t.Fatal(err)
			}
			if c.limit == 0 {
				c.limit = 20 * time.Second
			}
			err = m.Start(deadline(t, c.limit))
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "pod-1") {
				t.Errorf("got %v", err)
			}
			<-m.Exited()
			if _, err := spec.NICs[0].Tap.Stat(); !errors.Is(err, os.ErrClosed) {
				t.Error("the tap is still open")
			}
			if _, err := os.Stat(spec.Dir); err == nil {
				onlyLog(t, spec)
			}
			if err := m.Stop(deadline(t, time.Second)); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestPanic(t *testing.T) {
	spec := plainSpec(t)
	m, err := newDriver(t, vmtest.Behaviour{
		Console: "Freeing memory\r\nKernel panic - not syncing: No working init found.\r\n---[ end", Panic: true,
	}).Create(spec)
	if err != nil {
		t.Fatal(err)
	}
	// The panic may come before or after the monitor's greeting.
	startErr := m.Start(deadline(t, 20*time.Second))
	<-m.Exited()
	const want = "Kernel panic - not syncing: No working init found."
	if reason := m.Exit().Reason; !strings.HasSuffix(reason, want) {
		t.Errorf("%q", reason)
	}
	if startErr != nil && !strings.Contains(startErr.Error(), want) {
		t.Errorf("%v", startErr)
	}
	select {
	case line := <-m.(*qemu.Machine).Panicked():
		if line != want {
			t.Errorf("%q", line)
		}
	default:
		t.Error("the panic was not noticed")
	}
	if err := m.Stop(deadline(t, time.Second)); err != nil {
		t.Error(err)
	}
	onlyLog(t, spec)
}

func TestKilledFromOutside(t *testing.T) {
	_, m := start(t, vmtest.Behaviour{}, plainSpec(t))
	state, err := m.State()
	if err != nil {
		t.Fatal(err)
	}
	syscall.Kill(state.PID, syscall.SIGKILL)
	<-m.Exited()
	if e := m.Exit(); e.Code != 128+9 || e.Reason != "QEMU was killed by SIGKILL" {
		t.Errorf("%+v", e)
	}
}

// TestPowerOff is an end for which nothing that was said before is the reason.
func TestPowerOff(t *testing.T) {
	spec := plainSpec(t)
	_, m := start(t, vmtest.Behaviour{Stderr: "qemu-system-x86_64: warning: TCG doesn't support requested feature\n", PowerOffOn: "add-fd"}, spec)
	// Whether the disk is accepted before the end does not matter.
	m.AttachDisk(deadline(t, 10*time.Second), vm.Disk{Path: spec.Kernel, Serial: "x"})
	<-m.Exited()
	if e := m.Exit(); e.Code != 0 || e.Reason != "the guest powered off or rebooted" {
		t.Errorf("%+v", e)
	}
}

// TestTerminated is an end with status 0 as well, and no power-off.
func TestTerminated(t *testing.T) {
	_, m := start(t, vmtest.Behaviour{Stderr: "qemu-system-x86_64: warning: something else\n"}, plainSpec(t))
	state, err := m.State()
	if err != nil {
		t.Fatal(err)
	}
	syscall.Kill(state.PID, syscall.SIGTERM)
	<-m.Exited()
	if e := m.Exit(); e.Code != 0 || !strings.HasPrefix(e.Reason, "QEMU exited with status 0: terminating on signal 15 from pid ") {
		t.Errorf("%+v", e)
	}
}

func TestQuitIgnored(t *testing.T) {
	_, m := start(t, vmtest.Behaviour{IgnoreQuit: true}, plainSpec(t))
	// The caller's patience is shorter than the machine's.
	if err := m.Stop(deadline(t, 50*time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if e := m.Exit(); e.Code != 128+9 {
		t.Errorf("%+v", e)
	}
}

func TestStopDuringStart(t *testing.T) {
	spec := plainSpec(t)
	m, err := newDriver(t, vmtest.Behaviour{Silent: true}).Create(spec)
	if err != nil {
		t.Fatal(err)
	}
	started := make(chan error, 1)
	go func() { started <- m.Start(deadline(t, 20*time.Second)) }()
	for {
		if _, err := os.Stat(filepath.Join(spec.Dir, "sandbox-pod-1.pid")); err == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err := m.Stop(deadline(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := <-started; err == nil {
		t.Error("Start succeeded after Stop")
	}
	onlyLog(t, spec)
}

func TestUnwritableLogIsNotFatal(t *testing.T) {
	spec := plainSpec(t)
	if err := os.Mkdir(filepath.Join(spec.Dir, "sandbox-pod-1.log"), 0o700); err != nil {
		t.Fatal(err)
	}
	_, m := start(t, vmtest.Behaviour{Console: "last words\n"}, spec)
	if err := m.Stop(deadline(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	if tail := m.(*qemu.Machine).ConsoleTail(); !slices.Equal(tail, []string{"last words"}) {
		t.Errorf("%q", tail)
	}
}

func TestCommandLine(t *testing.T) {
	spec := plainSpec(t)
	spec.KernelParams = []string{"task.log_level=debug", "quiet"}
	listen := func(name string) { // stands for a virtiofs daemon
		l, err := net.Listen("unix", name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
	}
	spec.Share.Socket = spec.Dir + "/virtiofs.sock"
	listen(spec.Share.Socket)
	spec.MemoryPrealloc = true
	_, m := start(t, vmtest.Behaviour{}, spec) // accepts it
	if err := m.Stop(deadline(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}

	d := newDriver(t, vmtest.Behaviour{})
	line := strings.Join(qemu.CommandLine(d, spec), " ")
	for _, want := range []string{
		"-name sandbox-pod-1 ", "-machine q35,memory-backend=mem ", "memory-backend-memfd,id=mem,share=on,size=128M,prealloc=on",
		"name=" + protocol.SerialPort, "tag=" + protocol.ShareTag, "no_timer_check noapictimer tsc_early_khz=", "reboot=t", "task.log_level=debug quiet ",
	} {
		if !strings.Contains(line, want) {
			t.Errorf("%q is missing in %s", want, line)
		}
	}
	spec.Share.Socket, spec.MemoryPrealloc = "", false
	spec.Vsock = &vm.Vsock{CID: 77}
	spec.VCPUs = 2
	spec.Initrd, spec.Image = "", "/images/a,b.img"
	spec.NICs = []vm.NIC{{MAC: net.HardwareAddr{2, 0, 0, 0, 0, 0xa}, MTU: 9000}, {MAC: net.HardwareAddr{2, 0, 0, 0, 0, 0xb}, MTU: 1500}}
	line = strings.Join(qemu.CommandLine(d, spec), " ")
	for _, want := range []string{"guest-cid=77,vhostfd=5", "a,,b.img", "root=/dev/vda ro", "fd=6,vhost=off", "mac=02:00:00:00:00:0a,romfile=,host_mtu=9000"} {
		if !strings.Contains(line, want) {
			t.Errorf("%q is missing in %s", want, line)
		}
	}
	for _, not := range []string{"memory-backend", "virtserialport", "9p", "host_mtu=1500", "-initrd", "noapictimer"} {
		if strings.Contains(line, not) {
			t.Errorf("%q is in %s", not, line)
		}
	}
}

// TestVhostNet: each NIC gets a device of its own, and without the device there is none at all.
func TestVhostNet(t *testing.T) {
	device := filepath.Join(t.TempDir(), "vhost-net")
	config := qemu.Config{Path: vmtest.StandIn(t, vmtest.Behaviour{}), MachineType: "q35", Accelerator: "tcg", VhostNet: device, Log: quiet()}
	spec := plainSpec(t)
	spec.NICs = []vm.NIC{{MAC: net.HardwareAddr{2, 0, 0, 0, 0, 0xa}}, {MAC: net.HardwareAddr{2, 0, 0, 0, 0, 0xb}}}
	for there, want := range map[bool]string{false: "vhost=off", true: "vhost=on,vhostfd="} {
		if there {
			if err := os.WriteFile(device, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		d, err := qemu.New(config)
		if err != nil {
			t.Fatal(err)
		}
		line := strings.Join(qemu.CommandLine(d, spec), " ")
		if n := strings.Count(line, want); n != 2 {
			t.Errorf("device there: %v: %q is %d times in %s", there, want, n, line)
		}
		os.Remove(device)
	}
}

func TestCommandLineOfVirt(t *testing.T) {
	d, err := qemu.New(qemu.Config{Path: vmtest.StandIn(t, vmtest.Behaviour{}), MachineType: "virt", Accelerator: "tcg", Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	line := strings.Join(qemu.CommandLine(d, plainSpec(t)), " ")
	for _, want := range []string{"-machine virt,gic-version=max ", "-cpu max,pauth-impdef=on ", "console=ttyAMA0 "} {
		if !strings.Contains(line, want) {
			t.Errorf("%q is missing in %s", want, line)
		}
	}
	for _, not := range []string{"-bios", "tsc", "noapictimer", "no_timer_check", "reboot=t"} {
		if strings.Contains(line, not) {
			t.Errorf("%q is in %s", not, line)
		}
	}
}

func TestQuickFirmwareIsUsedIfThere(t *testing.T) {
	path := vmtest.StandIn(t, vmtest.Behaviour{})
	config := qemu.Config{Path: path, MachineType: "q35", Accelerator: "tcg", Log: quiet()}
	for _, there := range []bool{false, true} {
		if there {
			if err := os.WriteFile(filepath.Join(filepath.Dir(path), "qboot.rom"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		d, err := qemu.New(config)
		if err != nil {
			t.Fatal(err)
		}
		spec := plainSpec(t)
		if used := slices.Contains(qemu.CommandLine(d, spec), "qboot.rom"); used != there {
			t.Errorf("there: %v, used: %v", there, used)
		}
		m, err := d.Create(spec)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Start(deadline(t, 20*time.Second)); err != nil {
			t.Error(err)
		}
		if err := m.Stop(deadline(t, 10*time.Second)); err != nil {
			t.Error(err)
		}
	}
	// What is configured comes before it.
	config.Firmware = "/fw"
	d, err := qemu.New(config)
	if err != nil {
		t.Fatal(err)
	}
	if line := strings.Join(qemu.CommandLine(d, plainSpec(t)), " "); !strings.Contains(line, "-bios /fw ") || strings.Contains(line, "qboot") {
		t.Error(line)
	}
}

func TestDisks(t *testing.T) {
	_, m := start(t, vmtest.Behaviour{}, plainSpec(t))
	ctx := deadline(t, 20*time.Second)
	disk := makeDisk(t)
	for range 2 * qemu.RootPorts { // no slot leaks
		if err := m.AttachDisk(ctx, vm.Disk{Path: disk, Serial: "vol", ReadOnly: true}); err != nil {
			t.Fatal(err)
		}
		if err := m.DetachDisk(ctx, "vol"); err != nil {
			t.Fatal(err)
		}
	}
	for i := range qemu.RootPorts {
		if err := m.AttachDisk(ctx, vm.Disk{Path: disk, Serial: fmt.Sprint(i)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.AttachDisk(ctx, vm.Disk{Path: disk, Serial: "more"}); err == nil || !strings.Contains(err.Error(), "slots") {
		t.Errorf("one too many: %v", err)
	}
	if err := m.AttachDisk(ctx, vm.Disk{Path: disk, Serial: "0"}); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("the same serial twice: %v", err)
	}
	if err := m.DetachDisk(ctx, "unknown"); err != nil {
		t.Error(err)
	}
}

// TestSCSIDisks: the disks of a machine with a controller come and go on it, also for a daemon that is
// configured otherwise by then.
func TestSCSIDisks(t *testing.T) {
	path := vmtest.StandIn(t, vmtest.Behaviour{})
	d, err := qemu.New(qemu.Config{Path: path, Accelerator: "tcg", BlockDeviceDriver: "virtio-scsi", Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	spec := plainSpec(t)
	m, err := d.Create(spec)
	if err != nil {
		t.Fatal(err)
	}
	ctx := deadline(t, 20*time.Second)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	defer m.Stop(context.Background())
	disk := makeDisk(t)
	for i := range qemu.RootPorts {
		if err := m.AttachDisk(ctx, vm.Disk{Path: disk, Serial: fmt.Sprint("d", i), ReadOnly: true}); err != nil {
			t.Fatal(err)
		}
	}
	state, err := m.State()
	if err != nil {
		t.Fatal(err)
	}
	qemu.DropMonitor(m)
	later, err := qemu.New(qemu.Config{Path: path, Accelerator: "tcg", Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	restored, err := later.Restore(ctx, state.Saved)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := restored.DetachDisk(ctx, "d1"); err != nil {
			t.Fatal(err)
		}
		if err := restored.AttachDisk(ctx, vm.Disk{Path: disk, Serial: "d1", ReadOnly: true}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := qemu.New(qemu.Config{Path: path, Accelerator: "tcg", BlockDeviceDriver: "floppy", Log: quiet()}); err == nil {
		t.Error("a floppy is no driver")
	}
}

func TestDisksRefused(t *testing.T) {
	_, m := start(t, vmtest.Behaviour{}, plainSpec(t))
	ctx := deadline(t, 20*time.Second)
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		dir:                "directory",
		fifo:               "neither a block device",
		"/dev/null":        "neither a block device",
		dir + "/not-there": "no such file",
	} {
		if err := m.AttachDisk(ctx, vm.Disk{Path: path, Serial: "x"}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
	for _, serial := range []string{"", "a/b", "a b", strings.Repeat("x", 21)} {
		if err := m.AttachDisk(ctx, vm.Disk{Path: makeDisk(t), Serial: serial}); err == nil {
			t.Errorf("the serial %q was accepted", serial)
		}
	}
}

func TestMountedDiskRefused(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount")
	}
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", disk).CombinedOutput(); err != nil {
		t.Skipf("needs mkfs.ext4: %v: %s", err, out)
	}
	out, err := exec.Command("losetup", "--find", "--show", disk).CombinedOutput()
	if err != nil {
		t.Skipf("needs a loop device: %v: %s", err, out)
	}
	loop := strings.TrimSpace(string(out))
	defer exec.Command("losetup", "--detach", loop).Run()
	mnt := t.TempDir()
	if err := unix.Mount(loop, mnt, "ext4", 0, ""); err != nil {
		t.Skipf("needs to mount: %v", err)
	}
	defer unix.Unmount(mnt, unix.MNT_DETACH)

	_, m := start(t, vmtest.Behaviour{}, plainSpec(t))
	ctx := deadline(t, 20*time.Second)
	if err := m.AttachDisk(ctx, vm.Disk{Path: loop, Serial: "device"}); err == nil || !strings.Contains(err.Error(), "mounted") {
		t.Errorf("the mounted device: %v", err)
	}
	if err := m.AttachDisk(ctx, vm.Disk{Path: disk, Serial: "file"}); err == nil || !strings.Contains(err.Error(), "mounted") {
		t.Errorf("the file of a mounted device: %v", err)
	}
	if err := unix.Unmount(mnt, 0); err != nil {
		t.Fatal(err)
	}
	if err := m.AttachDisk(ctx, vm.Disk{Path: loop, Serial: "device"}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(loop, mnt, "ext4", 0, ""); !errors.Is(err, unix.EBUSY) {
		t.Errorf("the host mounted a disk of the guest: %v", err)
	}
	if err := m.DetachDisk(ctx, "device"); err != nil {
		t.Fatal(err)
	}
}

func TestFailedAttachIsUndone(t *testing.T) {
	for _, command := range []string{"add-fd", "blockdev-add", "remove-fd", "device_add"} {
		_, m := start(t, vmtest.Behaviour{Refuse: command}, plainSpec(t))
		for range qemu.RootPorts + 1 { // neither slots nor names leak
			err := m.AttachDisk(deadline(t, 5*time.Second), vm.Disk{Path: makeDisk(t), Serial: "vol"})
			if err == nil || !strings.Contains(err.Error(), "as told") || strings.Contains(err.Error(), "and then") {
				t.Errorf("%s: %v", command, err)
			}
		}
	}
}

func TestGuestKeepsDisk(t *testing.T) {
	_, m := start(t, vmtest.Behaviour{IgnoreUnplug: true}, plainSpec(t))
	if err := m.AttachDisk(deadline(t, 5*time.Second), vm.Disk{Path: makeDisk(t), Serial: "vol"}); err != nil {
		t.Fatal(err)
	}
	err := m.DetachDisk(deadline(t, 50*time.Millisecond), "vol")
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "does not let it go") {
		t.Fatalf("got %v", err)
	}
}

func TestGuestOverhearsThatADiskIsToGo(t *testing.T) {
	_, m := start(t, vmtest.Behaviour{DeafToUnplug: 1}, plainSpec(t))
	ctx := deadline(t, 20*time.Second)
	if err := m.AttachDisk(ctx, vm.Disk{Path: makeDisk(t), Serial: "vol"}); err != nil {
		t.Fatal(err)
	}
	qemu.AskAgainAfter(t, 10*time.Millisecond)
	if err := m.DetachDisk(ctx, "vol"); err != nil {
		t.Fatal(err)
	}
}

func TestRestore(t *testing.T) {
	spec := plainSpec(t)
	d, first := start(t, vmtest.Behaviour{Agent: true}, spec)
	ctx := deadline(t, 20*time.Second)
	disk := makeDisk(t)
	if err := first.AttachDisk(ctx, vm.Disk{Path: disk, Serial: "kept"}); err != nil {
		t.Fatal(err)
	}
	state, err := first.State()
	if err != nil {
		t.Fatal(err)
	}
	qemu.DropMonitor(first)

	var record map[string]any
	for key, value := range map[string]any{
		"start_time": 1, "pid": os.Getpid(), "pod_id": "pod-2", "executable": "/bin/true", "boot_id": "x",
	} {
		if err := json.Unmarshal(state.Saved, &record); err != nil {
			t.Fatal(err)
		}
		record[key] = value
		b, _ := json.Marshal(record)
		if _, err := d.Restore(ctx, b); !errors.Is(err, vm.ErrGone) {
			t.Errorf("another process was taken for the machine (%s): %v", key, err)
		}
	}
	for _, damaged := range []string{"", "{", `{"schema":9}`, `{"schema":1,"pid":1,"pod_id":"x"}`} {
		if _, err := d.Restore(ctx, json.RawMessage(damaged)); err == nil {
			t.Errorf("%q was restored", damaged)
		}
	}

	m, err := d.Restore(ctx, state.Saved)
	if err != nil {
		t.Fatal(err)
	}
	if e := m.Endpoint(); !e.Restored || e.SerialSocket != first.Endpoint().SerialSocket {
		t.Errorf("%+v", e)
	}
	if err := m.AttachDisk(ctx, vm.Disk{Path: disk, Serial: "kept"}); err == nil {
		t.Error("the disk was forgotten")
	}
	if err := m.DetachDisk(ctx, "kept"); err != nil {
		t.Error(err)
	}
	again, err := m.State()
	if err != nil || again.PID != state.PID || string(again.Saved) != string(state.Saved) {
		t.Errorf("%s, %v", again.Saved, err)
	}
	if err := m.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	<-first.Exited()
	if _, err := d.Restore(ctx, state.Saved); !errors.Is(err, vm.ErrGone) {
		t.Errorf("a dead machine was restored: %v", err)
	}
	onlyLog(t, spec)
}

func TestRestoredMachineWithoutMonitorCanBeStopped(t *testing.T) {
	spec := plainSpec(t)
	d, first := start(t, vmtest.Behaviour{}, spec)
	state, err := first.State()
	if err != nil {
		t.Fatal(err)
	}
	// first keeps its connection, so nobody answers the second client.
	m, err := d.Restore(deadline(t, 200*time.Millisecond), state.Saved)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.AttachDisk(deadline(t, 50*time.Millisecond), vm.Disk{Path: makeDisk(t), Serial: "x"}); err == nil {
		t.Error("a disk was attached without a monitor")
	}
	if err := m.Stop(deadline(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	<-first.Exited()
	onlyLog(t, spec)
}

// TestConsoleIsBounded: the guest decides how much it prints, not how much of the disk that takes.
func TestConsoleIsBounded(t *testing.T) {
	dir := shortDir(t)
	l, err := net.Listen("unix", dir+"/c")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	log := filepath.Join(dir, "log")
	tail, _, err := qemu.Drain(deadline(t, time.Second), dir+"/c", log, quiet())
	if err != nil {
		t.Fatal(err)
	}
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	line := strings.Repeat("x", 99) + "\n"
	for range qemu.LogLimit/len(line) + 1000 {
		io.WriteString(conn, line)
	}
	io.WriteString(conn, "the end\n")
	conn.Close()
	lines := tail()
	if len(lines) != 10 || lines[9] != "the end" {
		t.Errorf("%q", lines)
	}
	b, err := os.ReadFile(log)
	if err != nil || len(b) > qemu.LogLimit {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	if !strings.HasPrefix(string(b), "[earlier output was dropped]\nxxx") || !strings.HasSuffix(string(b), "\nthe end\n") {
		t.Errorf("begins %.60q, ends %q", b, b[len(b)-20:])
	}
}
