package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"kuasar.io/kuasar/sandboxer/cgroup"
	"kuasar.io/kuasar/sandboxer/network"
	"kuasar.io/kuasar/sandboxer/pod"
	"kuasar.io/kuasar/sandboxer/vm/kvm"
	"kuasar.io/kuasar/sandboxer/vm/qemu"
)

// probeMountAttrs finds out whether the kernel knows the call, by one that must fail.
func probeMountAttrs() error {
	err := unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	if errors.Is(err, unix.ENOSYS) {
		return err
	}
	return nil
}

func debianArch() string { return runtime.GOARCH }

// kvmProbe says what to try KVM with. Without a QEMU no guest can be tried.
type kvmProbe struct {
	QEMU, Machine, Kernel string
	// Cache is where the daemon keeps what it found out; it is read and not written.
	Cache string
}

// probeKVM finds out whether KVM runs a guest: that the device opens proves nothing, for nested hosts
// offer it and stop at the guest's first instruction.
func probeKVM(_ context.Context, p kvmProbe) (works bool, reason string) {
	if err := kvm.Check(); err != nil || p.QEMU == "" {
		if err != nil {
			return false, err.Error()
		}
		if !kvm.Executes {
			return true, "/dev/kvm makes virtual machines"
		}
		return true, "/dev/kvm runs a guest of a few instructions"
	}
	dir, err := os.MkdirTemp("", "kuasar-kvm-")
	if err != nil {
		return false, err.Error()
	}
	defer os.RemoveAll(dir)
	cache := filepath.Join(dir, "kvm")
	if kept, err := os.ReadFile(p.Cache); err == nil {
		_ = os.WriteFile(cache, kept, 0o600)
	}
	said := &reasons{}
	d, err := qemu.New(qemu.Config{Path: p.QEMU, MachineType: p.Machine, Kernel: p.Kernel, ProbeCache: cache, Log: slog.New(said)})
	switch {
	case err != nil:
		return false, err.Error()
	case d.Accelerator() == "kvm":
		return true, "/dev/kvm boots the guest kernel"
	case said.last == "":
		return false, "QEMU does not take it"
	}
	return false, said.last
}

// reasons keeps the last reason that the driver logs.
type reasons struct{ last string }

func (*reasons) Enabled(context.Context, slog.Level) bool { return true }
func (r *reasons) WithAttrs([]slog.Attr) slog.Handler     { return r }
func (r *reasons) WithGroup(string) slog.Handler          { return r }
func (r *reasons) Handle(_ context.Context, record slog.Record) error {
	record.Attrs(func(a slog.Attr) bool {
		if a.Key == "reason" {
			r.last = clip(a.Value.String())
		}
		return true
	})
	return nil
}

// tunGetFeatures is an ioctl of linux/if_tun.h.
const tunGetFeatures = 0x800454cf

// probeVsock claims a context id and gives it back.
func probeVsock() error {
	if _, err := os.Stat(pod.VsockDevice); errors.Is(err, fs.ErrNotExist) {
		return errors.New("there is no " + pod.VsockDevice)
	}
	v, err := pod.ClaimVsock()
	if err != nil {
		return err
	}
	return v.FD.Close()
}

// probeVhostNet opens the device, which loads its driver where that is a module.
func probeVhostNet() error {
	f, err := os.OpenFile(qemu.VhostNet, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// probeTun asks the driver what it can do; a device file whose driver is missing does not answer.
func probeTun() error {
	const path = "/dev/net/tun"
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("cannot use the tun device: %w", err)
	}
	defer f.Close()
	features, err := unix.IoctlGetInt(int(f.Fd()), tunGetFeatures)
	if err != nil {
		return fmt.Errorf("cannot use %s: %w", path, err)
	}
	if features&unix.IFF_VNET_HDR == 0 {
		return fmt.Errorf("cannot use %s: it lacks IFF_VNET_HDR", path)
	}
	return nil
}

// probeRedirect joins an interface to a tap as for a pod, in a network namespace that ends with it.
func probeRedirect(ctx context.Context) error {
	made, done := make(chan scratch, 1), make(chan struct{})
	defer close(done)
	go makeScratch(made, done)
	s := <-made
	if s.err != nil {
		return s.err
	}
	a, err := network.Attach(ctx, fmt.Sprintf("/proc/self/task/%d/ns/net", s.thread))
	if err != nil {
		return err
	}
	for _, nic := range a.NICs() {
		nic.Tap.Close()
	}
	return a.Close()
}

// scratch is a network namespace that the thread has entered.
type scratch struct {
	thread int
	err    error
}

// makeScratch makes a namespace with an interface in it and holds it until done is closed. The thread
// is not given back: it ends with the goroutine, and the namespace with it.
func makeScratch(made chan<- scratch, done <-chan struct{}) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The main thread lives on, so another one has to do it: while this one is locked, a new
		// goroutine gets another thread.
		defer runtime.UnlockOSThread()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			makeScratch(made, done)
		}()
		<-ended
		return
	}
	err := func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("cannot make a network namespace: %w", err)
		}
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("cannot open netlink: %w", err)
		}
		defer h.Close()
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "eth0"
		if err := h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "peer0"}); err != nil {
			return fmt.Errorf("cannot make a veth: %w", err)
		}
		link, err := h.LinkByName("eth0")
		if err == nil {
			err = h.LinkSetUp(link)
		}
		if err != nil {
			return fmt.Errorf("cannot use a veth: %w", err)
		}
		return nil
	}()
	made <- scratch{unix.Gettid(), err}
	<-done
}

// probeCgroup says which hierarchy the daemon will use.
func probeCgroup() (string, error) {
	// Whether there is such a group does not matter, only whether it could be looked for.
	if _, err := cgroup.Load("/", strings.Trim(cgroup.DefaultParent, "/")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	var st unix.Statfs_t
	if unix.Statfs("/sys/fs/cgroup", &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
		return "v2", nil
	}
	return "v1", nil
}

// daemonTimeout bounds the daemon's answer.
const daemonTimeout = 3 * time.Second

// probeDaemon asks the daemon at the socket for its platform, which it answers at once.
func probeDaemon(ctx context.Context, socket string) error {
	// gRPC would tell a missing file, a missing right and a dead socket alike.
	conn, err := net.DialTimeout("unix", socket, daemonTimeout)
	switch {
	case err == nil:
		conn.Close()
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("the socket %s does not exist", socket)
	case errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("nobody serves on the socket %s", socket)
	default:
		return fmt.Errorf("cannot connect to the daemon: %w", err)
	}
	client, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("cannot connect to the daemon: %w", err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, daemonTimeout)
	defer cancel()
	if _, err := sandboxapi.NewControllerClient(client).Platform(ctx, &sandboxapi.ControllerPlatformRequest{}); err != nil {
		return fmt.Errorf("the daemon at %s does not answer: %w", socket, err)
	}
	return nil
}

// unitState asks systemd for the state of a service; known is false where systemd does not run.
func unitState(ctx context.Context, unit string) (state string, known bool) {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		return "", false
	}
	path, err := exec.LookPath("systemctl")
	if err != nil {
		return "", false
	}
	out, _ := output(ctx, path, "is-active", unit+".service") // it fails for all but active
	if state = firstLine(out); state == "" {
		return "unknown", true
	}
	return state, true
}
