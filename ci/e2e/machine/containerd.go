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

// HandlerStreaming is a runtime handler of the machine's containerd, which carries the containers'
// streams by containerd's streaming service.
const HandlerStreaming = "vmm-streaming"

// Containerd is where a machine must have containerd, for it to be a service there.
const Containerd = "/usr/bin/containerd"

// ContainerdSocket is where the machine's containerd listens, and ContainerdConfig its configuration.
const (
	ContainerdSocket = "/run/containerd/containerd.sock"
	ContainerdConfig = "/etc/containerd/config.toml"
)

const containerdUnit = `[Unit]
Description=containerd container runtime
After=network.target dbus.service

[Service]
Type=notify
ExecStart=` + Containerd + `
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
imports = ['/etc/containerd/streaming.toml']
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

// ConfigureContainerd makes containerd a service, with the network of a file of the machine. It has the
// handler HandlerStreaming, but neither the handler vmm nor what both need: to add these is up to who
// installs the appliance.
func (m *Machine) ConfigureContainerd(network string) error {
	conflist, err := os.ReadFile(m.Path(network))
	if err != nil {
		return fmt.Errorf("cannot configure containerd: %w", err)
	}
	for path, text := range map[string]string{
		"/etc/systemd/system/containerd.service":      containerdUnit,
		ContainerdConfig:                              containerdConfig,
		"/etc/containerd/streaming.toml":              streamingConfig,
		"/etc/cni/net.d/10-" + filepath.Base(network): string(conflist),
	} {
		if err := m.Write(path, text); err != nil {
			return fmt.Errorf("cannot configure containerd: %w", err)
		}
	}
	return nil
}

// StartContainerd starts containerd and returns a client once the image of package image is there. The
// caller closes the client.
func (m *Machine) StartContainerd(ctx context.Context) (*cri.Client, error) {
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
