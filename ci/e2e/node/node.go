// Package node makes a node for the tests: a stock containerd with its CNI plugins and a
// vmm-sandboxer, all of whose files are in one scratch directory. What it changes outside of that
// directory is a bridge of its own and the forwarding of packets, and Close takes both back.
package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	"kuasar.io/kuasar/ci/e2e/cri"
	"kuasar.io/kuasar/ci/e2e/image"
	"kuasar.io/kuasar/ci/e2e/peers"
)

// Runtime handlers that the node's containerd knows.
const (
	// Handler is the guide's, with IPv4 and FIFOs.
	Handler = "vmm"
	// HandlerStreaming has the containers' streams carried by containerd's streaming service.
	HandlerStreaming = "vmm-streaming"
	// HandlerDualStack has a network with IPv4 and IPv6.
	HandlerDualStack = "vmm-dual"
	// HandlerFaulty leads to the sandboxer behind PluginFaulty.
	HandlerFaulty = "vmm-faulty"
)

// Plugins are the proxy plugins of the node's containerd: the sandboxer of the pods, and one that
// tests start with a configuration of their own.
const (
	Plugin       = "vmm"
	PluginFaulty = "faulty"
)

// Config says what the node is made of. All paths are absolute.
type Config struct {
	// Root is the source tree of the project.
	Root string
	// Sandboxer, Kernel and Initrd are what was built from it.
	Sandboxer, Kernel, Initrd string
	// Supervisor is the program ci/supervisor; empty if no sandboxer is to be supervised.
	Supervisor string
	// Progress is told what takes long.
	Progress io.Writer `json:"-"`
}

// Node is a running node.
type Node struct {
	// Dir is the scratch directory.
	Dir string
	// CRI is the client of the node's containerd, and Socket where that listens.
	CRI    *cri.Client
	Socket string
	// Bridge is the bridge of the pods, and Gateway its IPv4 address.
	Bridge, Gateway string

	config     Config
	peers      string
	containerd *process
	sandboxers []*Sandboxer
	before     map[string]string // switches of the kernel that pods' networks change: path, value
}

// Start makes a node and starts its containerd; StartSandboxer does the rest. If it fails, nothing
// is left.
func Start(ctx context.Context, config Config) (_ *Node, err error) {
	for what, path := range map[string]string{"sandboxer": config.Sandboxer, "guest kernel": config.Kernel, "initrd": config.Initrd} {
		if _, err := os.Stat(path); err != nil {
			return nil, fmt.Errorf("the %s is missing: %w; \"go tool mage build\" makes it", what, err)
		}
	}
	n := &Node{config: config}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	if n.peers, err = peers.Build(ctx, config.Root, config.Progress); err != nil {
		return nil, err
	}
	// The path is short: the sockets below it must fit into 107 bytes beside a pod's id.
	if n.Dir, err = os.MkdirTemp("/tmp", "ksr"); err != nil {
		return nil, err
	}
	if err := n.network(); err != nil {
		return nil, err
	}
	if err := n.configure(); err != nil {
		return nil, err
	}
	n.Socket = filepath.Join(n.Dir, "state", "containerd.sock")
	if n.CRI, err = cri.Dial(n.Socket); err != nil {
		return nil, err
	}
	if err := n.StartContainerd(ctx); err != nil {
		return nil, err
	}
	busybox, err := image.Busybox()
	if err != nil {
		return nil, err
	}
	if err := busybox.Import(ctx, n.CRI.Conn); err != nil {
		return nil, err
	}
	waiting, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := n.CRI.WaitImage(waiting, busybox.Name); err != nil {
		return nil, err
	}
	return n, nil
}

// Close stops the daemons and takes back what the node made. Pods that are left are killed; that
// there were any is an error.
func (n *Node) Close() error {
	var errs []error
	if n.CRI != nil && n.containerd != nil {
		errs = append(errs, n.removePods())
	}
	errs = append(errs, n.StopContainerd())
	for _, s := range n.sandboxers {
		if s.Running() {
			errs = append(errs, s.Stop())
		}
	}
	if n.CRI != nil {
		errs = append(errs, n.CRI.Close())
	}
	for path, value := range n.before {
		if now, err := os.ReadFile(path); err != nil || string(now) != value {
			errs = append(errs, os.WriteFile(path, []byte(value), 0))
		}
	}
	if n.Bridge != "" {
		if output, err := exec.Command("ip", "link", "delete", n.Bridge).CombinedOutput(); err != nil {
			errs = append(errs, fmt.Errorf("cannot remove the bridge %s: %w: %s", n.Bridge, err, output))
		}
	}
	if n.Dir != "" {
		errs = append(errs, os.RemoveAll(n.Dir))
	}
	return errors.Join(errs...)
}

func (n *Node) removePods() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	pods, err := n.CRI.Pods(ctx)
	if err != nil {
		return fmt.Errorf("cannot remove the pods that are left: %w", err)
	}
	var errs []error
	for _, pod := range pods {
		errs = append(errs, n.CRI.RemovePod(ctx, pod.Id))
	}
	return errors.Join(errs...)
}

// StartContainerd starts containerd and returns when it is ready for pods.
func (n *Node) StartContainerd(ctx context.Context) error {
	bin := filepath.Join(n.Dir, "bin")
	p, err := start(n.Dir, "containerd", []string{"PATH=" + bin + ":" + os.Getenv("PATH")},
		filepath.Join(n.peers, "containerd"), "--config", filepath.Join(n.Dir, "containerd.toml"))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	n.containerd = p
	if err := p.waitFor(ctx, n.Socket+" appears", func() bool { return isSocket(n.Socket) }); err != nil {
		return err
	}
	if err := n.CRI.WaitReady(ctx); err != nil {
		return fmt.Errorf("%w\n%s", err, Tail(p.log, 20))
	}
	return nil
}

// StopContainerd stops containerd. The pods live on.
func (n *Node) StopContainerd() error {
	if n.containerd == nil {
		return nil
	}
	err := n.containerd.stop()
	n.containerd = nil
	return err
}

// ContainerdLog is the file that containerd writes to.
func (n *Node) ContainerdLog() string { return filepath.Join(n.Dir, "containerd.log") }

// KeepLogs copies the daemons' logs and the consoles of the pods into a directory, which it makes.
func (n *Node) KeepLogs(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	logs, _ := filepath.Glob(filepath.Join(n.Dir, "*.log"))
	consoles, _ := filepath.Glob(filepath.Join(n.Dir, "*", "*", "sandbox-*.log"))
	var errs []error
	for _, log := range append(logs, consoles...) {
		data, err := os.ReadFile(log)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, filepath.Base(log)), data, 0o644)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (n *Node) socket(plugin string) string { return filepath.Join(n.Dir, plugin+".sock") }

// network makes the bridge in a subnet that is not in use.
func (n *Node) network() error {
	used, err := exec.Command("ip", "-o", "addr", "show").CombinedOutput()
	if err != nil {
		return fmt.Errorf("cannot list the addresses of this machine: %w: %s", err, used)
	}
	links, err := exec.Command("ip", "-o", "link", "show").CombinedOutput()
	if err != nil {
		return fmt.Errorf("cannot list the interfaces of this machine: %w: %s", err, links)
	}
	for third := 1; third < 255; third++ {
		subnet, bridge := fmt.Sprintf("10.88.%d.", third), fmt.Sprintf("ksr%d", third)
		if bytes.Contains(used, []byte(" "+subnet)) || bytes.Contains(links, []byte(" "+bridge+":")) {
			continue
		}
		// Made here already, and not by the plugin with the first pod, so that two nodes that start
		// at the same time do not choose the same.
		if output, err := exec.Command("ip", "link", "add", bridge, "type", "bridge").CombinedOutput(); err != nil {
			return fmt.Errorf("cannot make the bridge %s: %w: %s", bridge, err, output)
		}
		n.Bridge, n.Gateway = bridge, subnet+"1"
		break
	}
	if n.Bridge == "" {
		return errors.New("all of 10.88.0.0/16 is in use on this machine")
	}
	// The CNI plugin switches forwarding on for the whole machine.
	n.before = map[string]string{}
	for _, path := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"} {
		if value, err := os.ReadFile(path); err == nil { // a kernel may lack the protocol
			n.before[path] = string(value)
		}
	}
	return nil
}

// configure writes the configuration of containerd and of the networks.
func (n *Node) configure() error {
	values := struct {
		Dir, Bridge, IPv4, IPv6                 string
		Plugin, PluginFaulty                    string
		Handler, Streaming, DualStack, Faulty   string
		PluginSocket, PluginFaultySocket, Peers string
	}{
		Dir: n.Dir, Bridge: n.Bridge, Peers: n.peers,
		IPv4:   strings.TrimSuffix(n.Gateway, ".1") + ".0/24",
		IPv6:   fmt.Sprintf("fd88:%s::/64", strings.Split(n.Gateway, ".")[2]),
		Plugin: Plugin, PluginFaulty: PluginFaulty,
		PluginSocket: n.socket(Plugin), PluginFaultySocket: n.socket(PluginFaulty),
		Handler: Handler, Streaming: HandlerStreaming, DualStack: HandlerDualStack, Faulty: HandlerFaulty,
	}
	for _, dir := range []string{"bin", "cni", "cni-dual", "certs.d"} {
		if err := os.Mkdir(filepath.Join(n.Dir, dir), 0o755); err != nil {
			return err
		}
	}
	// containerd looks for the runtime's program, though it has nothing to do.
	if err := os.Symlink(n.config.Sandboxer, filepath.Join(n.Dir, "bin", "containerd-shim-vmm-v1")); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"containerd.toml":             containerdConfig,
		"cni/10-kuasar.conflist":      cniConfig,
		"cni-dual/10-kuasar.conflist": cniDualConfig,
	} {
		var out bytes.Buffer
		if err := template.Must(template.New(name).Parse(text)).Execute(&out, values); err != nil {
			return fmt.Errorf("cannot write %s: %w", name, err)
		}
		if err := os.WriteFile(filepath.Join(n.Dir, name), out.Bytes(), 0o644); err != nil {
			return err
		}
	}
	return nil
}

const containerdConfig = `version = 3
root  = '{{.Dir}}/root'
state = '{{.Dir}}/state'
imports = []
[debug]
  level = 'debug'
[plugins.'io.containerd.server.v1.grpc']
  address = '{{.Dir}}/state/containerd.sock'
[plugins.'io.containerd.server.v1.ttrpc']
  address = '{{.Dir}}/state/containerd.sock.ttrpc'
[plugins.'io.containerd.server.v1.debug']
  address = ''
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = '{{.Dir}}/certs.d'
[plugins.'io.containerd.cri.v1.runtime']
  # Without CAP_SYS_RESOURCE scores cannot be lowered.
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  cdi_spec_dirs = []
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ['{{.Peers}}']
    conf_dir = '{{.Dir}}/cni'
[plugins.'io.containerd.nri.v1.nri']
  disable = true
[plugins.'io.containerd.internal.v1.opt']
  path = '{{.Dir}}/opt'
[plugins.'io.containerd.shim.v1.manager']
  socket_dir = '{{.Dir}}/state/s'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{{.Handler}}]
  runtime_type = 'io.containerd.vmm.v1'
  sandboxer = '{{.Plugin}}'
  disable_pause_image_pull = true
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{{.Streaming}}]
  runtime_type = 'io.containerd.vmm.v1'
  sandboxer = '{{.Plugin}}'
  disable_pause_image_pull = true
  io_type = 'streaming'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{{.DualStack}}]
  runtime_type = 'io.containerd.vmm.v1'
  sandboxer = '{{.Plugin}}'
  disable_pause_image_pull = true
  cni_conf_dir = '{{.Dir}}/cni-dual'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{{.Faulty}}]
  runtime_type = 'io.containerd.vmm.v1'
  sandboxer = '{{.PluginFaulty}}'
  disable_pause_image_pull = true
[proxy_plugins.{{.Plugin}}]
  type = 'sandbox'
  address = '{{.PluginSocket}}'
[proxy_plugins.{{.PluginFaulty}}]
  type = 'sandbox'
  address = '{{.PluginFaultySocket}}'
`

const cniConfig = `{
  "cniVersion": "1.0.0", "name": "{{.Bridge}}",
  "plugins": [
    {"type": "bridge", "bridge": "{{.Bridge}}", "isGateway": true, "hairpinMode": true,
     "ipam": {"type": "host-local", "dataDir": "{{.Dir}}/ipam",
      "ranges": [[{"subnet": "{{.IPv4}}"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`

const cniDualConfig = `{
  "cniVersion": "1.0.0", "name": "{{.Bridge}}",
  "plugins": [
    {"type": "bridge", "bridge": "{{.Bridge}}", "isGateway": true, "hairpinMode": true, "enabledad": false,
     "ipam": {"type": "host-local", "dataDir": "{{.Dir}}/ipam",
      "ranges": [[{"subnet": "{{.IPv4}}"}], [{"subnet": "{{.IPv6}}"}]],
      "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}}
  ]
}
`

// Root is the source tree of the project; Kernel and Initrd are what the pods boot.
func (n *Node) Root() string   { return n.config.Root }
func (n *Node) Kernel() string { return n.config.Kernel }
func (n *Node) Initrd() string { return n.config.Initrd }
