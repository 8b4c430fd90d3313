package stratovirt_test

import (
	"context"
	"crypto/rand"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/guestlink"
	"kuasar.io/kuasar/sandboxer/storage"
	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/stratovirt"
)

// bench is what a test that boots guests needs. OUT is where the kernel and the images are if that is not
// out/. The StratoVirt is one whose work QEMU does.
type bench struct{ out, program string }

func needBench(t *testing.T, version string) bench {
	t.Helper()
	if os.Getenv("KUASAR_E2E") == "" {
		t.Skip("boots virtual machines; set KUASAR_E2E=1 to run it")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	if runtime.GOARCH != "amd64" {
		t.Skip("boots the machine type q35")
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip(err)
	}
	b := bench{out: os.Getenv("OUT"), program: filepath.Join(t.TempDir(), "stratovirt-"+version)}
	if b.out == "" {
		b.out, _ = filepath.Abs("../../../out")
	}
	for _, name := range []string{"vmlinux.bin", "kuasar.initrd"} {
		if _, err := os.Stat(filepath.Join(b.out, name)); err != nil {
			t.Skipf("%v; build it with mage", err)
		}
	}
	if out, err := exec.Command("go", "build", "-o", b.program, "../vmtest/stratovirt").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return b
}

func (b bench) driver(t *testing.T) *stratovirt.Driver {
	t.Helper()
	d, err := stratovirt.New(stratovirt.Config{
		Path: b.program, MachineType: "q35", Firmware: emptyFile(t, "OVMF_CODE.fd"), Accelerator: "tcg", Log: quiet(),
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// spec is that of a pod with a share, on a host without vsock.
func (b bench) spec(t *testing.T) vm.Spec {
	t.Helper()
	dir, err := os.MkdirTemp("", "vm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	spec := vm.Spec{
		PodID: "boot-test", Dir: dir, Kernel: filepath.Join(b.out, "vmlinux.bin"), Initrd: filepath.Join(b.out, "kuasar.initrd"),
		KernelParams: []string{protocol.ParamLogLevel + "=info", protocol.ParamDebug},
		VCPUs:        1, MemoryMiB: 256,
	}
	path, kind, err := storage.FindVirtiofsd("")
	if err != nil || path == "" {
		t.Logf("without a share: no virtiofs daemon is installed (%v)", err)
		return spec
	}
	share := t.TempDir()
	if err := os.WriteFile(filepath.Join(share, "greeting"), []byte("from the host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	spec.Share = vm.Share{Dir: share, Socket: filepath.Join(dir, "fs.sock")}
	d, err := storage.StartVirtiofsd(t.Context(), storage.Virtiofsd{Path: path, Kind: kind, Share: share, Socket: spec.Share.Socket})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Stop() })
	return spec
}

func up(t *testing.T, d *stratovirt.Driver, spec vm.Spec) (vm.Machine, guestlink.Link) {
	t.Helper()
	m, err := d.Create(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Stop(context.Background()) })
	begin := time.Now()
	if err := m.Start(deadline(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	return m, meet(t, d, m, begin)
}

// meet waits for the agent.
func meet(t *testing.T, d *stratovirt.Driver, m vm.Machine, begin time.Time) guestlink.Link {
	t.Helper()
	ctx := deadline(t, 60*time.Second)
	link, err := guestlink.Open(ctx, m.Endpoint(), quiet())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { link.Close() })
	hello, err := link.Hello(ctx)
	if err != nil {
		t.Fatalf("%v; console: %s", err, strings.Join(m.(*stratovirt.Machine).ConsoleTail(), " | "))
	}
	t.Logf("%s: the agent answers after %v, its uptime then: %v", d.Name(), time.Since(begin).Round(time.Millisecond), time.Duration(hello.UptimeNanos).Round(time.Millisecond))
	return link
}

// ask runs a command in the guest's console and returns what it prints.
func ask(t *testing.T, link guestlink.Link, command string) string {
	t.Helper()
	var console net.Conn
	console, err := link.Dial(deadline(t, 10*time.Second), protocol.PortConsole)
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	io.WriteString(console, "KSR_MODE exec\n"+command+"\nexit\n")
	console.SetReadDeadline(time.Now().Add(30 * time.Second))
	out, err := io.ReadAll(console)
	if err != nil {
		t.Errorf("%s: %q, %v", command, out, err)
	}
	return string(out)
}

// TestBootOnQEMU: a guest that boots by StratoVirt's command line is reached through the nameless port, has
// the host's files, takes disks that come and go by StratoVirt's requests, and survives the daemon.
func TestBootOnQEMU(t *testing.T) {
	for _, version := range []string{"2.5.0"} {
		t.Run(version, func(t *testing.T) {
			b := needBench(t, version)
			d, spec := b.driver(t), b.spec(t)
			m, link := up(t, d, spec)
			if spec.Share.Socket != "" {
				if out := ask(t, link, "mkdir -p /tmp/s && mount -t virtiofs "+protocol.ShareTag+" /tmp/s && cat /tmp/s/greeting"); !strings.Contains(out, "from the host") {
					t.Errorf("the share: %q", out)
				}
			}
			// Twice, so that a slot is used again.
			path := filepath.Join(t.TempDir(), "disk")
			content := make([]byte, 1<<20)
			rand.Read(content)
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			for i := range 2 {
				serial := "disk" + strconv.Itoa(i)
				begin := time.Now()
				if err := m.AttachDisk(deadline(t, 10*time.Second), vm.Disk{Path: path, Serial: serial}); err != nil {
					t.Fatal(err)
				}
				out := ask(t, link, "for i in $(seq 100); do [ -e /sys/block/vda/serial ] && break; sleep 0.1; done; cat /sys/block/vda/serial; echo; cat /sys/block/vda/size")
				if !strings.Contains(out, serial) || !strings.Contains(out, "2048") {
					t.Fatalf("the guest has no such disk: %q; it says %s", out, ask(t, link, "dmesg | grep -i 'pcie\\|hotplug\\|virtio' | tail -40; ls /sys/bus/pci/devices /sys/bus/pci/slots; cat /proc/cmdline"))
				}
				seen := time.Since(begin)
				if err := m.DetachDisk(deadline(t, 30*time.Second), serial); err != nil {
					t.Fatal(err)
				}
				t.Logf("the disk was in the guest after %v and out of it after %v", seen.Round(time.Millisecond), (time.Since(begin) - seen).Round(time.Millisecond))
			}

			state, err := m.State()
			if err != nil {
				t.Fatal(err)
			}
			link.Close()
			stratovirt.DropMonitor(m)
			again, err := d.Restore(deadline(t, 10*time.Second), state.Saved)
			if err != nil {
				t.Fatal(err)
			}
			link = meet(t, d, again, time.Now())
			if out := ask(t, link, "echo $((6*7))"); !strings.Contains(out, "42") {
				t.Errorf("the restored guest said %q", out)
			}
			if err := again.Stop(deadline(t, 10*time.Second)); err != nil {
				t.Fatal(err)
			}
			<-m.Exited()
		})
	}
}

// TestBootThenReboot: a guest that reboots is the end of its machine, whose process would go on.
func TestBootThenReboot(t *testing.T) {
	b := needBench(t, "2.4.0")
	m, link := up(t, b.driver(t), b.spec(t))
	console, err := link.Dial(deadline(t, 10*time.Second), protocol.PortConsole)
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	io.WriteString(console, "KSR_MODE exec\necho b > /proc/sysrq-trigger || reboot -f\n")
	select {
	case <-m.Exited():
	case <-time.After(30 * time.Second):
		t.Fatal("it lives on")
	}
	if e := m.Exit(); e.Reason != "the guest rebooted" {
		t.Errorf("%+v", e)
	}
}

// TestBootImage boots from a read-only image.
func TestBootImage(t *testing.T) {
	b := needBench(t, "2.4.0")
	spec := b.spec(t)
	spec.Initrd, spec.Image = "", filepath.Join(b.out, "kuasar-erofs.img")
	if _, err := os.Stat(spec.Image); err != nil {
		t.Skipf("%v; build it with mage image", err)
	}
	_, link := up(t, b.driver(t), spec)
	if out := ask(t, link, "grep ' / ' /proc/mounts; cat /proc/cmdline"); !strings.Contains(out, "erofs") || !strings.Contains(out, "root=/dev/vda") {
		t.Errorf("its root: %q", out)
	}
}
