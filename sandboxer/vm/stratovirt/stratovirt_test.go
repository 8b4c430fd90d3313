package stratovirt_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/stratovirt"
	"kuasar.io/kuasar/sandboxer/vm/vmtest"
)

func TestMain(m *testing.M) {
	vmtest.RunStandIn()
	os.Exit(m.Run())
}

var versions = []string{"2.2.0", "2.3.0", "2.4.0", "2.5.0"}

// works is a KVM that does.
func works() error { return nil }

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func deadline(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// emptyFile is a file whose content nobody reads.
func emptyFile(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func newDriver(t *testing.T, version, machine string, b vmtest.Behaviour) *stratovirt.Driver {
	t.Helper()
	cfg := stratovirt.Config{Path: vmtest.StratoVirtStandIn(t, version, b), MachineType: machine, Log: quiet(), CheckKVM: works}
	if strings.HasPrefix(machine, "q35") {
		cfg.Firmware = emptyFile(t, "OVMF_CODE.fd")
	}
	d, err := stratovirt.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// erofs is an image with nothing but what tells what it is.
func erofs(t *testing.T) string {
	t.Helper()
	b := make([]byte, 4096)
	copy(b[1024:], "\xe2\xe1\xf5\xe0")
	path := emptyFile(t, "kuasar.img")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// descriptor is some file that can be handed over.
func descriptor(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// fullSpec uses everything that a pod may have.
func fullSpec(t *testing.T) vm.Spec {
	t.Helper()
	dir, err := os.MkdirTemp("", "vm") // whose path leaves room for the names of sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	share, err := os.MkdirTemp("", "fs")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(share) })
	l, err := net.Listen("unix", share+"/virtiofs.sock")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return vm.Spec{
		PodID: "pod-1", Dir: dir, VCPUs: 2, MemoryMiB: 256,
		Kernel: emptyFile(t, "vmlinux.bin"), Initrd: emptyFile(t, "kuasar.initrd"),
		KernelParams: []string{"task.log_level=debug"},
		Share:        vm.Share{Dir: dir, Socket: share + "/virtiofs.sock"},
		Vsock:        &vm.Vsock{CID: 1234, FD: descriptor(t)},
		NICs: []vm.NIC{
			{Tap: descriptor(t), MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}},
			{Tap: descriptor(t), MAC: net.HardwareAddr{2, 0, 0, 0, 0, 2}, MTU: 1400},
		},
	}
}

func start(t *testing.T, version, machine string, b vmtest.Behaviour, spec vm.Spec) (*stratovirt.Driver, vm.Machine) {
	t.Helper()
	d := newDriver(t, version, machine, b)
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
	firmware := emptyFile(t, "OVMF_CODE.fd")
	for name, c := range map[string]struct {
		version string
		config  stratovirt.Config
		want    string
	}{
		"another program":     {"", stratovirt.Config{MachineType: "virt", Path: vmtest.StandIn(t, vmtest.Behaviour{})}, `is no StratoVirt: it says "QEMU emulator`},
		"an old one":          {"StratoVirt 2.1.0", stratovirt.Config{MachineType: "virt"}, "at least 2.2"},
		"its machine type":    {"", stratovirt.Config{MachineType: "pc"}, "machine type"},
		"its option":          {"", stratovirt.Config{MachineType: "virt,kernel_irqchip=on"}, "has no option"},
		"no firmware":         {"", stratovirt.Config{MachineType: "q35"}, "edk2-ovmf"},
		"firmware for micro":  {"", stratovirt.Config{MachineType: "microvm", Firmware: firmware}, "takes no firmware"},
		"comma in a path":     {"", stratovirt.Config{MachineType: "q35", Firmware: "/a,b"}, "has a comma"},
		"program that is not": {"", stratovirt.Config{MachineType: "virt", Path: "/nonexistent/stratovirt"}, "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			if c.config.Path == "" {
				c.config.Path = vmtest.StratoVirtStandIn(t, "2.3.0", vmtest.Behaviour{Version: c.version})
			}
			c.config.Log = quiet()
			if c.config.CheckKVM == nil {
				c.config.CheckKVM = works
			}
			if _, err := stratovirt.New(c.config); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v", err)
			}
		})
	}
}

func TestCreateRefuses(t *testing.T) {
	for name, spoil := range map[string]func(*vm.Spec){
		"path as id":      func(s *vm.Spec) { s.PodID = "../x" },
		"comma in id":     func(s *vm.Spec) { s.PodID = "a,b" },
		"no CPU":          func(s *vm.Spec) { s.VCPUs = 0 },
		"too many CPUs":   func(s *vm.Spec) { s.VCPUs = 255 },
		"little memory":   func(s *vm.Spec) { s.MemoryMiB = 127 },
		"no kernel":       func(s *vm.Spec) { s.Kernel = "" },
		"no initrd":       func(s *vm.Spec) { s.Initrd = "" },
		"both":            func(s *vm.Spec) { s.Image = s.Initrd },
		"unknown image":   func(s *vm.Spec) { s.Image, s.Initrd = s.Initrd, "" },
		"no daemon":       func(s *vm.Spec) { s.Share.Socket = "" },
		"relative kernel": func(s *vm.Spec) { s.Kernel = "-kernel" },
		"equals in a dir": func(s *vm.Spec) { s.Dir = "/run/a=b" },
		"long path":       func(s *vm.Spec) { s.Dir = "/" + strings.Repeat("d", 100) },
		"no tap":          func(s *vm.Spec) { s.NICs[0].Tap = nil },
		"long parameter":  func(s *vm.Spec) { s.KernelParams = []string{"a=" + strings.Repeat("b", 256)} },
		"line break":      func(s *vm.Spec) { s.KernelParams = []string{"a\nb"} },
	} {
		s := fullSpec(t)
		spoil(&s)
		if _, err := newDriver(t, "2.3.0", "virt", vmtest.Behaviour{}).Create(s); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestStartAndStop: every version runs every machine type that it has, with all that a pod may have.
func TestStartAndStop(t *testing.T) {
	for _, version := range versions {
		for _, machine := range []string{"virt,mem-share=on", "q35", "microvm"} {
			for _, image := range []bool{false, true} {
				kind, _, _ := strings.Cut(machine, ",")
				t.Run(fmt.Sprint(version, " ", kind, map[bool]string{false: " initrd", true: " image"}[image]), func(t *testing.T) {
					t.Parallel()
					spec := fullSpec(t)
					spec.MemoryPrealloc = image
					if image {
						spec.Image, spec.Initrd = erofs(t), ""
					}
					d, m := start(t, version, machine, vmtest.Behaviour{Console: "booting\r\nready\r\n"}, spec)
					if d.Name() != "StratoVirt "+version+" ("+kind+")" {
						t.Errorf("name %q", d.Name())
					}
					for _, f := range []*os.File{spec.Vsock.FD, spec.NICs[0].Tap, spec.NICs[1].Tap} {
						if _, err := f.Stat(); !errors.Is(err, os.ErrClosed) {
							t.Error("a descriptor that was handed over is still open here")
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
					if e := m.Endpoint(); e != (vm.Endpoint{VsockCID: 1234}) {
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
					if e := m.Exit(); e.Code != 0 || e.Reason != "the virtual machine was stopped" {
						t.Errorf("%+v", e)
					}
					onlyLog(t, spec)
					if tail := m.(*stratovirt.Machine).ConsoleTail(); !slices.Equal(tail, []string{"booting", "ready"}) {
						t.Errorf("%q", tail)
					}
					if err := m.AttachDisk(deadline(t, time.Second), vm.Disk{Path: spec.Kernel, Serial: "x"}); !errors.Is(err, vm.ErrGone) {
						t.Errorf("AttachDisk after the end: %v", err)
					}
				})
			}
		}
	}
}

// TestCommandLine pins what the administrator sees with ps.
func TestCommandLine(t *testing.T) {
	args := strings.Join(stratovirt.CommandLine(newDriver(t, "2.3.0", "virt", vmtest.Behaviour{}), fullSpec(t)), " ")
	for _, want := range []string{
		"-name sandbox-pod-1 -machine virt,mem-share=on ",
		" -device vhost-vsock-pci,id=vsock-1234,guest-cid=1234,bus=pcie.0,addr=0x3,vhostfd=3 ",
		",tag=kuasar,bus=pcie.0,addr=0x4 ",
		" -device pcie-root-port,id=pcie.1,port=0x5,bus=pcie.0,addr=0x5 ",
		" -netdev tap,id=net1,fd=5 ",
	} {
		if !strings.Contains(args, want) {
			t.Errorf("%q is not in %s", want, args)
		}
	}
	for _, unwanted := range []string{"-daemonize", "-disable-seccomp", "-pidfile"} {
		if strings.Contains(args, unwanted) {
			t.Errorf("%s is in %s", unwanted, args)
		}
	}
}

// TestStandInRefuses what StratoVirt refuses, so that the driver's tests mean something.
func TestStandInRefuses(t *testing.T) {
	driver := newDriver(t, "2.3.0", "virt", vmtest.Behaviour{})
	spec := fullSpec(t)
	good := stratovirt.CommandLine(driver, spec)
	parse := func(minor int, args []string) error {
		_, err := vmtest.ParseStratoVirt(vmtest.Release{Major: 2, Minor: minor}, args)
		return err
	}
	for minor := 2; minor <= 5; minor++ {
		if err := parse(minor, good); err != nil {
			t.Fatalf("2.%d: %v", minor, err)
		}
	}
	for old, replacement := range map[string]string{
		",server,nowait":       ",server=on,wait=off",
		"mem-share=on":         "mem-share=off",
		"addr=0x3":             "addr=0x0",
		"addr=0x4":             "addr=0x3",
		"fd=5":                 "fd=4",
		"bus=pcie.0,addr=0x1":  "bus=pcie.0",
		"guest-cid=1234":       "guest-cid=2",
		"virtio-rng-pci":       "virtio-rng-device",
		"cpus=2":               "cpus=255",
		"256M":                 "64M",
		"-D":                   "-no-reboot",
		"rng=rng0,":            "rng=rng1,",
		",mac=02:00:00:00:00:": ",mac=2:0:0:0:0:",
		"id=nic1":              "id=nic0",
		"task.log_level=debug": "a=" + strings.Repeat("b", 256),
	} {
		args := slices.Clone(good)
		changed := false
		for i := range args {
			if with := strings.Replace(args[i], old, replacement, 1); with != args[i] {
				args[i], changed = with, true
			}
		}
		if err := parse(3, args); err == nil || !changed {
			t.Errorf("%s for %s was accepted (replaced: %v)", replacement, old, changed)
		}
	}
	if err := parse(3, append(slices.Clone(good), "-append", "x")); err == nil {
		t.Error("a second -append was accepted")
	}
	// A path with an equals sign: the older parsers take it, the newest does not.
	image := append(slices.Clone(good), "-drive", "id=d,file="+emptyFile(t, "a=b")+",readonly=on,direct=off")
	if err := parse(4, image); err != nil {
		t.Errorf("2.4: %v", err)
	}
	if parse(5, image) == nil {
		t.Error("2.5 took a second equals sign")
	}
	// A request for a disk as 2.2 wants it fails on 2.3, and the other way round.
	if _, err := vmtest.ParseBlockdevAdd(vmtest.Release{Major: 2, Minor: 3}, stratovirt.Blockdev(newDriver(t, "2.2.0", "virt", vmtest.Behaviour{}), true)); err == nil {
		t.Error("2.3 took direct without aio")
	}
	if _, err := vmtest.ParseBlockdevAdd(vmtest.Release{Major: 2, Minor: 2}, stratovirt.Blockdev(driver, true)); err == nil {
		t.Error("2.2 took aio")
	}
}

func TestBlockdevByVersion(t *testing.T) {
	for _, version := range versions {
		release, err := vmtest.ParseRelease(version)
		if err != nil {
			t.Fatal(err)
		}
		for _, block := range []bool{false, true} {
			a, err := vmtest.ParseBlockdevAdd(release, stratovirt.Blockdev(newDriver(t, version, "virt", vmtest.Behaviour{}), block))
			if err != nil {
				t.Errorf("%s, block %v: %v", version, block, err)
			} else if *a.Cache.Direct != block {
				t.Errorf("%s, block %v: direct is %v", version, block, *a.Cache.Direct)
			}
		}
	}
}

// TestFailedStart: whatever goes wrong, the error says it, wherever the version does, and nothing is left.
func TestFailedStart(t *testing.T) {
	for name, c := range map[string]struct {
		version   string // if not all
		behaviour vmtest.Behaviour
		spoil     func(*testing.T, *vm.Spec)
		limit     time.Duration
		want      string
	}{
		"no monitor":     {behaviour: vmtest.Behaviour{FailAt: "monitor"}, want: "failed at monitor, as told"},
		"no devices":     {behaviour: vmtest.Behaviour{FailAt: "realize"}, want: "failed at realize, as told"},
		"does not serve": {behaviour: vmtest.Behaviour{FailAt: "run"}, want: "failed at run, as told"},
		"greets oddly":   {behaviour: vmtest.Behaviour{Greeting: "HTTP/1.1 400 Bad Request\r\n"}, limit: 10 * time.Second, want: "did not greet"},
		"answers oddly":  {behaviour: vmtest.Behaviour{GarbageOn: "query-status"}, limit: 10 * time.Second, want: "the connection to the monitor is lost"},
		"answers never":  {behaviour: vmtest.Behaviour{Greeting: `{"QMP":{"version":{},"capabilities":[]}}` + "\r\n" + `{"event":"STOP"}` + "\r\n", GarbageOn: "qmp_capabilities"}, limit: 10 * time.Second, want: "connection to the monitor is lost"},
		"exits at once":  {behaviour: vmtest.Behaviour{Exit: 3, Stderr: "no KVM\n"}, want: "exited with status 3: no KVM"},
		"says nothing":   {behaviour: vmtest.Behaviour{Exit: 1}, want: "exited with status 1"},
		"lacks vsock":    {version: "2.5.0", behaviour: vmtest.Behaviour{Exit: 1, Stderr: "unsupported device: vhost-vsock-pci\n"}, want: "built with its features vhost_vsock"},
		"never greets":   {behaviour: vmtest.Behaviour{Silent: true, Stderr: "waiting"}, limit: 5 * time.Second, want: "did not greet"},
		"its words then": {behaviour: vmtest.Behaviour{Silent: true, Stderr: "waiting"}, limit: 5 * time.Second, want: "it said: waiting"},
		"killed":         {behaviour: vmtest.Behaviour{DieAfter: 1}, want: "killed by SIGKILL"},
		"refuses":        {behaviour: vmtest.Behaviour{Refuse: "query-status"}, want: "refused, as told"},
		"does not run":   {behaviour: vmtest.Behaviour{Status: "paused"}, want: "paused"},
		"panics":         {behaviour: vmtest.Behaviour{Silent: true, Panic: true, Console: "Kernel panic - not syncing: no init\r\n"}, want: "panicked: Kernel panic - not syncing: no init"},
		"no kernel":      {spoil: func(t *testing.T, s *vm.Spec) { s.Kernel = "/nonexistent" }, want: "no such file"},
		"no daemon":      {spoil: func(t *testing.T, s *vm.Spec) { s.Share.Socket += "x" }, want: "virtiofs daemon does not listen"},
		"dead daemon": {spoil: func(t *testing.T, s *vm.Spec) {
			s.Share.Socket += "x"
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.Share.Socket, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			l.SetUnlinkOnClose(false)
			l.Close()
		}, want: "cannot connect to the vhost-user daemon"},
		"no cgroup": {spoil: func(t *testing.T, s *vm.Spec) { s.CgroupProcs = []string{t.TempDir() + "/cgroup.procs"} }, want: "cannot enter the cgroup"},
	} {
		for _, version := range versions {
			if c.version != "" && c.version != version {
				continue
			}
			t.Run(name+" "+version, func(t *testing.T) {
				t.Parallel()
				spec := fullSpec(t)
				if c.spoil != nil {
					c.spoil(t, &spec)
				}
				limit := cmp.Or(c.limit, 20*time.Second)
				m, err := newDriver(t, version, "virt", c.behaviour).Create(spec)
				if err != nil {
					t.Fatal(err)
				}
				if err := m.Start(deadline(t, limit)); err == nil || !strings.Contains(err.Error(), c.want) {
					t.Fatalf("got %v", err)
				}
				<-m.Exited()
				if _, err := spec.Vsock.FD.Stat(); !errors.Is(err, os.ErrClosed) {
					t.Error("the context id is still held")
				}
				onlyLog(t, spec)
			})
		}
	}
}

// TestStaleSockets: what a killed StratoVirt has left does not hinder the next, not even 2.2.
func TestStaleSockets(t *testing.T) {
	for _, version := range versions {
		spec := fullSpec(t)
		for _, name := range []string{"qmp.sock", "console.sock", "sandbox-pod-1.pid"} {
			if err := os.WriteFile(filepath.Join(spec.Dir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		start(t, version, "virt", vmtest.Behaviour{}, spec)
	}
}

func TestStopKills(t *testing.T) {
	spec := fullSpec(t)
	_, m := start(t, "2.4.0", "virt", vmtest.Behaviour{IgnoreQuit: true}, spec)
	if err := m.Stop(deadline(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	if e := m.Exit(); e.Code != 128+int(syscall.SIGKILL) {
		t.Errorf("%+v", e)
	}
	onlyLog(t, spec)
}

// TestResetIsTheEnd: a guest that reboots is not booted again.
func TestResetIsTheEnd(t *testing.T) {
	spec := fullSpec(t)
	_, m := start(t, "2.3.0", "virt", vmtest.Behaviour{ResetOn: "blockdev-add"}, spec)
	// Whether the disk is accepted before the end does not matter.
	m.AttachDisk(deadline(t, 10*time.Second), vm.Disk{Path: spec.Kernel, Serial: "x"})
	if e := ended(t, m); e.Reason != "the guest rebooted" {
		t.Errorf("%+v", e)
	}
}

// ended waits for a machine's end.
func ended(t *testing.T, m vm.Machine) vm.Exit {
	t.Helper()
	select {
	case <-m.Exited():
	case <-time.After(10 * time.Second):
		t.Fatal("it lives on")
	}
	return m.Exit()
}

// survived is an error that StratoVirt logs in its life and that is not the reason of any end.
const survived = "2024-01-01T00:00:00.000000000: [7][7][virtio/src/device/serial.rs: 512]:ERROR: Failed to get output fd\n"

// TestPowerOff is an end for which nothing that was logged before is the reason.
func TestPowerOff(t *testing.T) {
	for _, version := range versions {
		spec := fullSpec(t)
		_, m := start(t, version, "virt", vmtest.Behaviour{Stderr: survived, PowerOffOn: "blockdev-add"}, spec)
		// Whether the disk is accepted before the end does not matter.
		m.AttachDisk(deadline(t, 10*time.Second), vm.Disk{Path: spec.Kernel, Serial: "x"})
		if e := ended(t, m); e.Code != 0 || e.Reason != "the guest powered off" {
			t.Errorf("%s: %+v", version, e)
		}
	}
}

// TestSignalled: an end by a signal is no power-off, even where its status is 0, and what StratoVirt cannot
// have said of it is not given as its reason.
func TestSignalled(t *testing.T) {
	for i, version := range versions {
		for _, c := range []struct {
			signal syscall.Signal
			status [4]int // by version
			want   string
		}{
			{syscall.SIGTERM, [4]int{1, 0, 0, 0}, "Received kill signal, signal number: 15"},
			{syscall.SIGSYS, [4]int{1, 1, 0, 0}, "Received a bad system call, number: 0"},
			{syscall.SIGKILL, [4]int{137, 137, 137, 137}, "StratoVirt was killed by SIGKILL; it said: 2024-"},
		} {
			_, m := start(t, version, "virt", vmtest.Behaviour{Stderr: survived}, fullSpec(t))
			state, err := m.State()
			if err != nil {
				t.Fatal(err)
			}
			syscall.Kill(state.PID, c.signal)
			e := ended(t, m)
			if e.Code != c.status[i] || !strings.Contains(e.Reason, c.want) {
				t.Errorf("%s, %v: %+v", version, c.signal, e)
			}
			if e.Code == 0 && e.Reason != "StratoVirt exited with status 0: "+c.want {
				t.Errorf("%s, %v: more than its reason: %q", version, c.signal, e.Reason)
			}
		}
	}
}

func TestDisks(t *testing.T) {
	for _, version := range versions {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			spec := fullSpec(t)
			_, m := start(t, version, "virt", vmtest.Behaviour{}, spec)
			path := emptyFile(t, "disk")
			ctx := deadline(t, 20*time.Second)
			// More than there are ports: each is free again when its disk is gone.
			for i := range 2 * stratovirt.RootPorts {
				serial := fmt.Sprint("disk", i)
				if err := m.AttachDisk(ctx, vm.Disk{Path: path, Serial: serial}); err != nil {
					t.Fatal(err)
				}
				if err := m.DetachDisk(ctx, serial); err != nil {
					t.Fatal(err)
				}
			}
			for i := range stratovirt.RootPorts {
				if err := m.AttachDisk(ctx, vm.Disk{Path: path, Serial: fmt.Sprint(i), ReadOnly: true}); err != nil {
					t.Fatal(err)
				}
			}
			for serial, want := range map[string]string{"0": "plugged in already", "more": "slots for disks are taken", "a,b": "a serial is"} {
				if err := m.AttachDisk(ctx, vm.Disk{Path: path, Serial: serial}); err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("serial %s: %v", serial, err)
				}
			}
			if err := m.DetachDisk(ctx, "unknown"); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestRefusedDisk: a disk that is refused leaves its port and its node free.
func TestRefusedDisk(t *testing.T) {
	spec := fullSpec(t)
	_, m := start(t, "2.3.0", "virt", vmtest.Behaviour{Refuse: "device_add"}, spec)
	for range 2 * stratovirt.RootPorts {
		err := m.AttachDisk(deadline(t, 10*time.Second), vm.Disk{Path: spec.Kernel, Serial: "x"})
		if err == nil || !strings.Contains(err.Error(), "refused, as told") || strings.Contains(err.Error(), "and then") {
			t.Fatalf("got %v", err)
		}
	}
}

func TestMicroVMTakesNoDisks(t *testing.T) {
	spec := fullSpec(t)
	_, m := start(t, "2.3.0", "microvm", vmtest.Behaviour{}, spec)
	if err := m.AttachDisk(deadline(t, time.Second), vm.Disk{Path: spec.Kernel, Serial: "x"}); err == nil || !strings.Contains(err.Error(), "microvm") {
		t.Errorf("got %v", err)
	}
	if err := m.DetachDisk(deadline(t, time.Second), "x"); err != nil {
		t.Error(err)
	}
}

func TestUnplugIsBounded(t *testing.T) {
	spec := fullSpec(t)
	_, m := start(t, "2.3.0", "virt", vmtest.Behaviour{IgnoreUnplug: true}, spec)
	if err := m.AttachDisk(deadline(t, 10*time.Second), vm.Disk{Path: spec.Kernel, Serial: "x"}); err != nil {
		t.Fatal(err)
	}
	// The second call meets the first one's request, which the guest still considers.
	for range 2 {
		if err := m.DetachDisk(deadline(t, 200*time.Millisecond), "x"); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v", err)
		}
	}
}

func TestUnplugIsAskedAgain(t *testing.T) {
	stratovirt.AskAgainAfter(t, 10*time.Millisecond)
	spec := fullSpec(t)
	_, m := start(t, "2.3.0", "virt", vmtest.Behaviour{DeafToUnplug: 2}, spec)
	if err := m.AttachDisk(deadline(t, 10*time.Second), vm.Disk{Path: spec.Kernel, Serial: "x"}); err != nil {
		t.Fatal(err)
	}
	if err := m.DetachDisk(deadline(t, 10*time.Second), "x"); err != nil {
		t.Fatal(err)
	}
}

// TestRestore: the next daemon has the machine, its console and its disks, whatever is installed by
// then.
func TestRestore(t *testing.T) {
	spec := fullSpec(t)
	_, m := start(t, "2.2.0", "virt", vmtest.Behaviour{}, spec)
	ctx := deadline(t, 20*time.Second)
	if err := m.AttachDisk(ctx, vm.Disk{Path: spec.Kernel, Serial: "one"}); err != nil {
		t.Fatal(err)
	}
	state, err := m.State()
	if err != nil {
		t.Fatal(err)
	}
	stratovirt.DropMonitor(m)
	later := newDriver(t, "2.5.0", "q35", vmtest.Behaviour{})
	restored, err := later.Restore(ctx, state.Saved)
	if err != nil {
		t.Fatal(err)
	}
	if e := restored.Endpoint(); e != (vm.Endpoint{VsockCID: 1234, Restored: true}) {
		t.Errorf("%+v", e)
	}
	if err := restored.AttachDisk(ctx, vm.Disk{Path: spec.Kernel, Serial: "one"}); err == nil || !strings.Contains(err.Error(), "plugged in already") {
		t.Errorf("the disk is forgotten: %v", err)
	}
	if err := restored.AttachDisk(ctx, vm.Disk{Path: spec.Kernel, Serial: "two"}); err != nil {
		t.Error(err)
	}
	for _, serial := range []string{"one", "two"} {
		if err := restored.DetachDisk(ctx, serial); err != nil {
			t.Error(err)
		}
	}
	if err := restored.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	<-m.Exited()
	onlyLog(t, spec)
	if _, err := later.Restore(ctx, state.Saved); !errors.Is(err, vm.ErrGone) {
		t.Errorf("restored a dead machine: %v", err)
	}
	if _, err := later.Restore(ctx, []byte(`{"schema":2}`)); err == nil {
		t.Error("restored a record that it does not understand")
	}
}

// onLine is a log that tells whether a line has been there.
type onLine struct {
	part string
	seen chan<- struct{}
}

func (o onLine) Write(line []byte) (int, error) {
	if strings.Contains(string(line), o.part) {
		select {
		case o.seen <- struct{}{}:
		default:
		}
	}
	return len(line), nil
}

// TestMessagesAreBounded: what StratoVirt says does not fill the host's memory.
func TestMessagesAreBounded(t *testing.T) {
	stratovirt.BoundMessagesEvery(t, time.Millisecond)
	flood := strings.Repeat("the guest misbehaves\n", stratovirt.MessagesLimit/20)
	for _, version := range versions {
		t.Run(version, func(t *testing.T) {
			spec := fullSpec(t)
			emptied := make(chan struct{}, 1)
			d, err := stratovirt.New(stratovirt.Config{
				Path: vmtest.StratoVirtStandIn(t, version, vmtest.Behaviour{Stderr: flood}), MachineType: "virt", CheckKVM: works,
				Log: slog.New(slog.NewTextHandler(onLine{"says more than can be kept", emptied}, nil)),
			})
			if err != nil {
				t.Fatal(err)
			}
			m, err := d.Create(spec)
			if err != nil {
				t.Fatal(err)
			}
			if err := m.Start(deadline(t, 20*time.Second)); err != nil {
				t.Fatal(err)
			}
			defer m.Stop(context.Background())
			select {
			case <-emptied:
			case <-time.After(10 * time.Second):
				t.Error("what it says is not kept at all")
			}
			limit := time.After(10 * time.Second)
			tick := time.NewTicker(time.Millisecond)
			defer tick.Stop()
			for {
				fi, err := os.Stat(filepath.Join(spec.Dir, "stratovirt.log"))
				if err != nil {
					t.Fatal(err)
				}
				if fi.Size() <= stratovirt.MessagesLimit {
					return
				}
				select {
				case <-tick.C:
				case <-limit:
					t.Fatalf("%d bytes are kept", fi.Size())
				}
			}
		})
	}
}

// TestVersionIsAskedAsItAnswers: StratoVirt refuses the usual --version, and one whose -version tells
// nothing is asked by its monitor.
func TestVersionIsAskedAsItAnswers(t *testing.T) {
	for _, version := range versions {
		path := vmtest.StratoVirtStandIn(t, version, vmtest.Behaviour{Version: "unknown"})
		if err := exec.Command(path, "--version").Run(); err == nil {
			t.Error("the stand-in takes --version")
		}
		said, err := stratovirt.Version(deadline(t, 10*time.Second), path)
		if err != nil || said != "StratoVirt-"+version {
			t.Errorf("%s: %q, %v", version, said, err)
		}
		d, err := stratovirt.New(stratovirt.Config{Path: path, MachineType: "virt", CheckKVM: works, Log: quiet()})
		if err != nil || d.Name() != "StratoVirt "+version+" (virt)" {
			t.Errorf("%s: %v, %v", version, d, err)
		}
	}
	// Neither tells: the error has what it said.
	mute := vmtest.StratoVirtStandIn(t, "2.3.0", vmtest.Behaviour{Version: "unknown", Greeting: "hello\r\n"})
	if _, err := stratovirt.New(stratovirt.Config{Path: mute, MachineType: "virt", CheckKVM: works, Log: quiet()}); err == nil || !strings.Contains(err.Error(), `"unknown"`) {
		t.Errorf("got %v", err)
	}
}

func TestAccelerator(t *testing.T) {
	broken := func() error { return errors.New("no KVM here") }
	real := vmtest.StratoVirtStandIn(t, "2.4.0", vmtest.Behaviour{})
	emulated := vmtest.StratoVirtStandIn(t, "2.4.0", vmtest.Behaviour{Version: "StratoVirt 2.4.0 on QEMU (tcg)"})
	for name, c := range map[string]struct {
		path, accelerator, fail string
		check                   func() error
	}{
		"KVM that works":       {real, "auto", "", works},
		"KVM that does not":    {real, "auto", "config_qemu.toml", broken},
		"asked for":            {real, "kvm", "no KVM here", broken},
		"no emulation":         {real, "tcg", "needs KVM", works},
		"emulation":            {emulated, "tcg", "", broken},
		"emulation not wanted": {emulated, "auto", "no KVM here", broken},
		"something else":       {real, "hvf", "unknown accelerator", works},
	} {
		_, err := stratovirt.New(stratovirt.Config{Path: c.path, MachineType: "virt", Accelerator: c.accelerator, CheckKVM: c.check, Log: quiet()})
		if c.fail == "" && err != nil || c.fail != "" && (err == nil || !strings.Contains(err.Error(), c.fail)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSerialTransport: on a host without vsock the agent is reached through a port, where the version and
// the machine have one.
func TestSerialTransport(t *testing.T) {
	for _, version := range versions {
		for _, machine := range []string{"virt", "q35", "microvm"} {
			spec := fullSpec(t)
			spec.Vsock = nil
			d := newDriver(t, version, machine, vmtest.Behaviour{Agent: true})
			m, err := d.Create(spec)
			if version == "2.2.0" || machine == "microvm" {
				if err == nil || !strings.Contains(err.Error(), "vhost_vsock") {
					t.Errorf("%s %s: %v", version, machine, err)
				}
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := m.Start(deadline(t, 20*time.Second)); err != nil {
				t.Fatal(err)
			}
			if e := m.Endpoint(); e != (vm.Endpoint{SerialSocket: filepath.Join(spec.Dir, "agent.sock")}) {
				t.Errorf("%+v", e)
			}
			conn, err := net.Dial("unix", m.Endpoint().SerialSocket)
			if err != nil {
				t.Error(err)
			} else {
				conn.Close()
			}
			if err := m.Stop(deadline(t, 10*time.Second)); err != nil {
				t.Error(err)
			}
			onlyLog(t, spec)
			args := strings.Join(stratovirt.CommandLine(d, spec), " ")
			if !strings.Contains(args, "task.transport=serial") || !strings.Contains(args, "nr=1") {
				t.Errorf("the guest is not told: %s", args)
			}
		}
	}
}

// TestMonitorAnswersGarbage: a hypervisor that goes mad under a running pod is an error, and can be stopped.
func TestMonitorAnswersGarbage(t *testing.T) {
	spec := fullSpec(t)
	_, m := start(t, "2.3.0", "virt", vmtest.Behaviour{GarbageOn: "device_add"}, spec)
	err := m.AttachDisk(deadline(t, 10*time.Second), vm.Disk{Path: spec.Kernel, Serial: "x"})
	if err == nil || !strings.Contains(err.Error(), "monitor is lost") {
		t.Errorf("got %v", err)
	}
	if err := m.Stop(deadline(t, 10*time.Second)); err != nil {
		t.Error(err)
	}
	onlyLog(t, spec)
}
