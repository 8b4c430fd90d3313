package main

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/config"
	"kuasar.io/kuasar/sandboxer/guestlink"
	"kuasar.io/kuasar/sandboxer/handover"
	"kuasar.io/kuasar/sandboxer/network"
	"kuasar.io/kuasar/sandboxer/pod"
	"kuasar.io/kuasar/sandboxer/storage"
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
		if form := cfg.Sandbox.ISuladTaskAddress; form != config.TaskAddressAuto && form != config.TaskAddressUnix {
			log.Warn("without vsock iSulad's pods get Unix sockets as task addresses, whatever is configured",
				"key", "sandbox.isulad_task_address", "configured", form)
		}
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
		if configured := cfg.Hypervisor.Virtiofsd.Path; configured != "" && configured != path {
			log.Warn("the configured virtiofs daemon is not there or not usable; another one is used", "key", "hypervisor.virtiofsd_conf.path", "configured", configured, "path", path)
		}
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
