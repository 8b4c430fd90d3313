package machine

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"kuasar.io/kuasar/ci/e2e/cri"
	"kuasar.io/kuasar/ci/e2e/image"
)

// Runtime handlers of the machine's containerd, beside those of the files it imports.
const HandlerStreaming = "vmm-streaming"

// PeersAt is where a machine with containerd must have the directory of package peers.
const PeersAt = "/opt/cni/bin"

// ContainerdSocket is where the machine's containerd listens.
const ContainerdSocket = "/run/containerd/containerd.sock"

const containerdUnit = `[Unit]
Description=containerd container runtime
After=network.target dbus.service

[Service]
Type=notify
ExecStart=` + PeersAt + `/containerd
Delegate=yes
KillMode=process
Restart=always
RestartSec=1
LimitNOFILE=1048576
TasksMax=infinity

[Install]
WantedBy=multi-user.target
`

const containerdConfig = `version = 3
imports = [%q, '/etc/containerd/streaming.toml']
[debug]
  level = 'debug'
[plugins.'io.containerd.cri.v1.runtime']
  # Without CAP_SYS_RESOURCE scores cannot be lowered.
  restrict_oom_score_adj = true
  disable_apparmor = true
[plugins.'io.containerd.nri.v1.nri']
  disable = true
`

const streamingConfig = `version = 3
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.` + HandlerStreaming + `]
  runtime_type = 'io.containerd.vmm.v1'
  sandboxer = 'vmm'
  disable_pause_image_pull = true
  io_type = 'streaming'
`

// StartContainerd sets up containerd as a service whose configuration imports a file of the machine,
// with the network of another one, starts it, and returns a client once the image of package image
// is there. The caller closes the client.
func (m *Machine) StartContainerd(ctx context.Context, imported, network string) (*cri.Client, error) {
	conflist, err := os.ReadFile(m.Path(network))
	if err != nil {
		return nil, fmt.Errorf("cannot start containerd: %w", err)
	}
	for path, text := range map[string]string{
		"/etc/systemd/system/containerd.service":           containerdUnit,
		"/etc/containerd/config.toml":                      fmt.Sprintf(containerdConfig, imported),
		"/etc/containerd/streaming.toml":                   streamingConfig,
		"/etc/cni/net.d/" + "10-" + filepath.Base(network): string(conflist),
	} {
		if err := m.Write(path, text); err != nil {
			return nil, fmt.Errorf("cannot start containerd: %w", err)
		}
	}
	for _, command := range [][]string{{"systemctl", "daemon-reload"}, {"systemctl", "start", "containerd"}} {
		if _, err := m.Run(ctx, command...); err != nil {
			log, _ := m.Run(ctx, "journalctl", "--no-pager", "--lines=20", "--unit=containerd")
			return nil, fmt.Errorf("cannot start containerd: %w\n%s", err, log)
		}
	}
	client, err := cri.Dial(m.Path(ContainerdSocket))
	if err != nil {
		return nil, err
	}
	if err := m.prepare(ctx, client); err != nil {
		client.Close()
		return nil, err
	}
	return client, nil
}

// prepare waits for containerd and gives it the image.
func (m *Machine) prepare(ctx context.Context, client *cri.Client) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := client.WaitReady(ctx); err != nil {
		return err
	}
	busybox, err := image.Busybox()
	if err != nil {
		return err
	}
	if err := busybox.Import(ctx, client.Conn); err != nil {
		return err
	}
	return client.WaitImage(ctx, busybox.Name)
}
