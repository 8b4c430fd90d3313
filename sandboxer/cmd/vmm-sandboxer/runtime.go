package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/config"
	"kuasar.io/kuasar/sandboxer/container"
	"kuasar.io/kuasar/sandboxer/guestlink"
	"kuasar.io/kuasar/sandboxer/handover"
	"kuasar.io/kuasar/sandboxer/network"
	"kuasar.io/kuasar/sandboxer/pod"
	"kuasar.io/kuasar/sandboxer/storage"
	"kuasar.io/kuasar/sandboxer/task"
	"kuasar.io/kuasar/sandboxer/vm"
	"kuasar.io/kuasar/sandboxer/vm/qemu"
)

// newRuntime joins the parts that pods are made of.
func newRuntime(cfg *config.Config, dir string, store *handover.Store, log *slog.Logger) (pod.Runtime, error) {
	driver, err := newDriver(cfg, dir, log)
	if err != nil {
		return pod.Runtime{}, err
	}
	sockets := listeners{store: store, log: log}
	cgroups := cgroups{owner: dir}
	rt := pod.Runtime{
		Driver:   driver,
		OpenLink: guestlink.Open,

		Attach: func(ctx context.Context, netns string) (pod.Network, error) {
			a, err := network.Attach(ctx, netns)
			if err != nil {
				return nil, err
			}
			return attachment{a}, nil
		},
		RestoreNetwork: func(saved json.RawMessage) (pod.Network, error) {
			var s network.Saved
			if err := json.Unmarshal(saved, &s); err != nil {
				return nil, err
			}
			return attachment{network.Restore(s)}, nil
		},

		NewShare:    func(dir string) (pod.Share, error) { return orNil[pod.Share](storage.NewShare(dir)) },
		OpenShare:   func(dir string) (pod.Share, error) { return orNil[pod.Share](storage.OpenShare(dir)) },
		RemoveShare: storage.RemoveShare,

		NewCgroup:  cgroups.make,
		LoadCgroup: cgroups.load,
		Cgroups:    cgroups.list,

		NewContainers: func(c pod.ContainersConfig) (pod.Containers, error) { return newContainers(c, store) },

		Listen: func(podID, path string) (net.Listener, error) {
			return sockets.listen(podID, path, pod.ListenUnix)
		},
		Unlisten: func(podID string) error {
			sockets.forget(podID)
			// Of a pod that this daemon could not manage, nobody took these over.
			store.RemoveAll("task/" + podID + "/")
			store.RemoveAll("stdio/" + podID + "/")
			return nil
		},
	}
	if err := unix.Access(pod.VsockDevice, unix.R_OK|unix.W_OK); err == nil {
		rt.Vsock = pod.ClaimVsock
	} else {
		log.Info("this host has no vsock for guests; they are reached through a serial port", "device", pod.VsockDevice, "error", err)
	}
	share, err := shareType(cfg.Hypervisor.KernelParams)
	if err != nil {
		return pod.Runtime{}, err
	}
	var path string
	var kind storage.Kind
	if share != nineP {
		if path, kind, err = storage.FindVirtiofsd(cfg.Hypervisor.Virtiofsd.Path); err != nil {
			return pod.Runtime{}, err
		}
	}
	switch {
	case share == nineP:
		log.Info("pods get their files by 9p, as configured", "key", "hypervisor.kernel_params", "parameter", protocol.ParamShareType+"="+nineP)
	case path == "":
		log.Warn("no virtiofs daemon is installed: pods get their files by 9p, which is slower; install the package virtiofsd")
	default:
		log.Info("virtiofs daemon found", "path", path, "kind", kind)
		rt.StartVirtiofsd = func(ctx context.Context, c pod.VirtiofsdConfig) (pod.Virtiofsd, error) {
			d, err := storage.StartVirtiofsd(ctx, storage.Virtiofsd{
				Path: path, Kind: kind, Share: c.Dir, Socket: c.Socket, CgroupProcs: c.CgroupProcs, Log: c.Log,
			})
			if err != nil {
				return nil, err
			}
			return virtiofsd{d}, nil
		}
	}
	rt.RestoreVirtiofsd = func(saved json.RawMessage) (pod.Virtiofsd, error) {
		var s storage.SavedDaemon
		if err := json.Unmarshal(saved, &s); err != nil {
			return nil, err
		}
		d, err := storage.RestoreVirtiofsd(s)
		if err != nil {
			return nil, err
		}
		return virtiofsd{d}, nil
	}
	return rt, nil
}

// How files get into a guest, as values of protocol.ParamShareType.
const (
	virtiofs = "virtiofs"
	nineP    = "9p"
)

// shareType returns what the kernel's parameters ask for, or empty. As for the guest, the last one
// counts.
func shareType(params string) (string, error) {
	asked, given := "", false
	for param := range strings.FieldsSeq(params) {
		if value, found := strings.CutPrefix(param, protocol.ParamShareType+"="); found {
			asked, given = value, true
		}
	}
	if !given || asked == virtiofs || asked == nineP {
		return asked, nil
	}
	return "", fmt.Errorf("hypervisor.kernel_params: %s=%s: want %s or %s", protocol.ParamShareType, asked, virtiofs, nineP)
}

// newDriver chooses the driver by what the hypervisor's binary says of itself. Another hypervisor
// is another case here.
func newDriver(cfg *config.Config, dir string, log *slog.Logger) (vm.Driver, error) {
	h := cfg.Hypervisor
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, h.Path, "--version").CombinedOutput()
	first, _, _ := strings.Cut(string(bytes.TrimSpace(out)), "\n")
	switch lower := strings.ToLower(first); {
	case strings.Contains(lower, "stratovirt"):
		return nil, fmt.Errorf("hypervisor.path = %q is StratoVirt (%s), and this build of vmm-sandboxer drives QEMU only: "+
			"name a QEMU there, such as /usr/bin/qemu-system-x86_64", h.Path, first)
	case strings.Contains(lower, "qemu"):
		machine, options, _ := strings.Cut(h.MachineType, ",")
		if options != "" && options != "mem-share=on" {
			log.Warn("QEMU gets no options of the machine", "key", "hypervisor.machine_type", "ignored", options)
		}
		return qemu.New(qemu.Config{
			Path: h.Path, MachineType: machine, Accelerator: h.Accelerator,
			Kernel: h.KernelPath, ProbeCache: filepath.Join(dir, ".kvm"), Debug: h.Debug, Log: log,
		})
	case err != nil:
		return nil, fmt.Errorf("hypervisor.path = %q: cannot ask it for its version: %w (it said %.200q)", h.Path, err, first)
	default:
		return nil, fmt.Errorf("hypervisor.path = %q says of itself %.200q; QEMU is expected", h.Path, first)
	}
}

// orNil keeps a nil pointer from becoming an interface that is not nil.
func orNil[I any, T any](v T, err error) (I, error) {
	if err != nil {
		var none I
		return none, err
	}
	return any(v).(I), nil
}

// attachment is *network.Attachment as pods see it.
type attachment struct{ *network.Attachment }

func (a attachment) Saved() (json.RawMessage, error) { return json.Marshal(a.Attachment.Saved()) }

// virtiofsd is *storage.Daemon as pods see it.
type virtiofsd struct{ *storage.Daemon }

func (d virtiofsd) Saved() (json.RawMessage, error) { return json.Marshal(d.Daemon.Saved()) }

// containers joins the set of a pod's containers with the server of its task socket.
type containers struct {
	*container.Set
	server *task.Server
}

var _ container.Guest = (*pod.Guest)(nil)

func newContainers(c pod.ContainersConfig, store *handover.Store) (pod.Containers, error) {
	var records []container.Record
	if c.Records != nil {
		// Before anything is taken over: a daemon that can read them has use for it.
		if err := json.Unmarshal(c.Records, &records); err != nil {
			return nil, fmt.Errorf("%w: cannot decode the containers' records: %w", pod.ErrUnmanageable, err)
		}
	}
	var share container.Storage = noStorage{}
	if s, ok := c.Share.(*storage.Share); ok {
		share = s
	}
	set := container.NewSet(container.Options{
		PodID: c.PodID, Guest: c.Guest, Storage: share, SharedPID: c.SharedPID, Store: store,
		Journal: func(records []container.Record) {
			b, err := json.Marshal(records)
			if err != nil {
				c.Log.Error("cannot encode the containers' records", "error", err)
				return
			}
			c.Journal(b)
		},
		Fail: c.Fail, Log: c.Log,
	})
	server := task.NewServer(task.Options{Set: set, Address: c.Address, PodID: c.PodID, Store: store, Log: c.Log})
	made := &containers{Set: set, server: server}
	ctx, cancel := context.WithTimeout(context.Background(), restoreLimit)
	defer cancel()
	// Before the containers, which look for their streams among the connections.
	if err := server.Adopt(ctx); err != nil {
		return nil, errors.Join(err, made.Close())
	}
	if c.Records != nil {
		if err := set.Restore(ctx, records); err != nil {
			return nil, errors.Join(fmt.Errorf("cannot restore the containers: %w", err), made.Close())
		}
	}
	return made, nil
}

// restoreLimit bounds how long a guest may take to tell a new daemon about its containers.
const restoreLimit = 15 * time.Second

func (c *containers) Serve(l net.Listener) error { return c.server.Serve(l) }

// Close drops the clients before it lets go of the containers, so that no call is answered as if a
// container had ended.
func (c *containers) Close() error {
	err := c.server.Close()
	c.Set.Close()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// HandOver stops the clients' calls before the containers' streams: what a call under way still does
// is in the last records.
func (c *containers) HandOver() error {
	c.server.HandOver()
	c.Set.HandOver()
	return nil
}

// noStorage is the storage of a pod whose machine, and with it its share, is gone.
type noStorage struct{}

var errNoShare = errors.New("the pod's share is gone")

func (noStorage) Rootfs(context.Context, string, []storage.Mount) (string, error) {
	return "", errNoShare
}
func (noStorage) Volume(context.Context, string, string, bool) (string, error) { return "", errNoShare }
func (noStorage) Release(string) error                                         { return nil }
