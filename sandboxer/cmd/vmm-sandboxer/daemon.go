package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/guest/protocol/version"
	"kuasar.io/kuasar/sandboxer/config"
	"kuasar.io/kuasar/sandboxer/controller"
	"kuasar.io/kuasar/sandboxer/handover"
	"kuasar.io/kuasar/sandboxer/metrics"
	"kuasar.io/kuasar/sandboxer/pod"
)

// gcPercent trades processor time, of which the daemon uses next to none, for memory, of which
// every node has as many idle pods' worth: the heap may outgrow what lives in it by half instead
// of doubling. There is no hard limit: reaching one would cost all pods at once.
const gcPercent = 50

// serve runs the daemon until ctx ends. The pods live on. From when it is ready on, it runs reload
// beside it.
func serve(ctx context.Context, s settings, cfg *config.Config, service *service, reload func(context.Context), log *slog.Logger) error {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	dir, err := prepareDir(s.dir)
	if err != nil {
		return err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	store := handover.Open(log)
	if !store.Lasting() {
		log.Warn("no service manager keeps descriptors for this daemon: when it restarts, the pods live on, " +
			"but their clients' connections break, and engines report running containers as exited; run it as kuasar-vmm.service")
	}
	sockets := listeners{store: store, log: log}
	// Before anything is touched: is another daemon serving there?
	l := sockets.kept(apiOwner, s.listen)
	if l == nil {
		if err := checkSocket(s.listen); err != nil {
			return err
		}
	}
	bootID, err := pod.BootID()
	if err != nil {
		return err
	}
	rt, err := newRuntime(cfg, dir, store, log)
	if err != nil {
		return err
	}
	registry := new(metrics.Registry)
	h := cfg.Hypervisor
	// Who writes the guest's own parameter means the console as much as who sets the key.
	console := h.Debug || slices.Contains(strings.Fields(h.KernelParams), protocol.ParamDebug)
	manager := pod.NewManager(pod.Options{
		Dir: dir, BootID: bootID, Runtime: rt,
		Kernel: h.KernelPath, Initrd: h.InitrdPath, Image: h.ImagePath, KernelParams: h.KernelParams,
		Size:           pod.Size{VCPUs: h.VCPUs, MemoryMiB: h.MemoryInMB},
		MaxSize:        pod.Size{VCPUs: h.MaxVCPUs, MemoryMiB: h.MaxMemoryInMB},
		MemoryPrealloc: h.EnableMemPrealloc, Debug: console,
		ISuladAddress: cfg.Sandbox.ISuladTaskAddress,
		BootLimit:     time.Duration(cfg.Sandbox.BootTimeoutInS) * time.Second,
		Metrics:       service.recovery(dir, registry), Log: log,
	})
	began := time.Now()
	if err := manager.Recover(ctx); err != nil {
		manager.Close()
		if ctx.Err() != nil {
			log.Info("stopping during the recovery; the pods live on, and the next daemon finds them")
			return nil
		}
		return err
	}

	metricsPath := filepath.Join(dir, metricsSocket)
	counters, err := listen(metricsPath)
	if err != nil {
		return err
	}
	defer func() {
		counters.Close()
		_ = os.Remove(metricsPath)
	}()
	go serveMetrics(counters, registry)
	store.Sweep(func(name string) bool { return belongsToPod(dir, name) })
	if l == nil {
		if l, err = sockets.listen(apiOwner, s.listen, listen); err != nil {
			return err
		}
	}
	server := controller.NewServer(controller.New(manager, log))
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	go manager.Run(ctx)
	log.Info("ready", "version", version.String(), "hypervisor", rt.Driver.Name(), "dir", dir, "listen", s.listen,
		"recovery", time.Since(began).Round(time.Millisecond))
	go service.follow(ctx, manager.Count)
	service.ready()
	go service.watch(ctx, liveness(s.listen, manager.Count))
	go reload(ctx)

	select {
	case <-ctx.Done():
		log.Info("stopping; the pods live on")
		err = nil
	case err = <-served:
		err = fmt.Errorf("cannot serve on %s any more: %w", s.listen, err)
	}
	service.stopping()
	// First the connections, so that no call gets an answer that would end a pod at the client.
	server.Close()
	manager.Close()
	if !store.Lasting() {
		_ = os.Remove(s.listen)
	}
	return err
}

// apiOwner owns the listener of the sandbox API. No pod has this id.
const apiOwner = "."

// metricsSocket, in the base directory, yields the daemon's counters in Prometheus' text format to
// whoever connects. Its name cannot be a pod's.
const metricsSocket = ".metrics.sock"

func serveMetrics(l net.Listener, registry *metrics.Registry) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		_, _ = registry.WriteTo(conn)
		conn.Close()
	}
}

// prepareDir makes the base directory and returns its path without symbolic links, as the kernel
// will name the mounts below it.
func prepareDir(dir string) (string, error) {
	if !filepath.IsAbs(dir) {
		return "", fmt.Errorf("--dir %s: the path must be absolute", dir)
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return "", fmt.Errorf("--dir: cannot make the directory: %w", err)
	}
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return "", fmt.Errorf("--dir: %w", err)
	}
	if err := pod.CheckDir(real); err != nil {
		return "", fmt.Errorf("--dir: %w", err)
	}
	return real, nil
}

// lockDir makes this daemon the only one of the directory. The lock ends with the process; the name
// of its file cannot be a pod's. The file stays: if it were removed, a daemon that had opened it
// before could lock it beside one that makes it anew.
func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, ".lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("--dir: cannot take the lock: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		f.Close()
		return nil, fmt.Errorf("--dir %s: another vmm-sandboxer uses this directory (it holds the lock on %s)", dir, path)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("--dir: cannot lock %s: %w", path, err)
	}
	return f, nil
}

// checkSocket fails if somebody serves on path, or if what is there is no socket.
func checkSocket(path string) error {
	if len(path) > 107 {
		return fmt.Errorf("cannot listen on %s: the path has %d bytes, and the kernel takes 107", path, len(path))
	}
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	if info.Mode()&os.ModeSocket == 0 {
		return fmt.Errorf("cannot listen on %s: there is something that is no socket", path)
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		conn.Close()
		return fmt.Errorf("cannot listen on %s: somebody is serving there already", path)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("cannot listen on %s: cannot tell whether somebody is serving there: %w", path, err)
	}
	return nil
}

// listen replaces a stale socket by one of its own, for root only.
func listen(path string) (net.Listener, error) {
	if err := checkSocket(path); err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cannot listen on %s: cannot remove the stale socket: %w", path, err)
	}
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	return l, nil
}
