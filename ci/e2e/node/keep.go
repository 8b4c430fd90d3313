package node

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"kuasar.io/kuasar/ci/e2e/cri"
)

// kept is what Keep leaves for Open, in the file node.json of the scratch directory.
type kept struct {
	Config     Config
	Peers      string
	Bridge     string
	Before     map[string]string
	Containerd int
	Sandboxer  int // behind Plugin
}

// Keep leaves the node running when this process ends. Open finds it again by its Dir.
func (n *Node) Keep() error {
	state := kept{Config: n.config, Peers: n.peers, Bridge: n.Bridge, Before: n.before, Containerd: n.containerd.pid}
	for _, s := range n.sandboxers {
		if s.name == Plugin {
			state.Sandboxer = s.PID()
		}
	}
	data, err := json.Marshal(state)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(n.Dir, "node.json"), data, 0o600)
}

// Open takes over a node that Keep left.
func Open(dir string) (*Node, error) {
	data, err := os.ReadFile(filepath.Join(dir, "node.json"))
	if err != nil {
		return nil, fmt.Errorf("%s is not the directory of a node that was kept: %w", dir, err)
	}
	var state kept
	if err := json.Unmarshal(data, &state); err != nil {
		return nil, fmt.Errorf("cannot read what was kept of the node: %w", err)
	}
	n := &Node{
		Dir: dir, Bridge: state.Bridge, Socket: filepath.Join(dir, "state", "containerd.sock"),
		config: state.Config, peers: state.Peers, before: state.Before,
		containerd: adopt(dir, "containerd", state.Containerd, filepath.Join(state.Peers, "containerd")),
	}
	if !n.containerd.is(filepath.Join(state.Peers, "containerd")) {
		n.containerd = nil // it has ended meanwhile; there is nobody to ask about pods
	}
	n.sandboxers = []*Sandboxer{{
		Dir: filepath.Join(dir, Plugin), Socket: n.socket(Plugin), node: n, name: Plugin,
		process: adopt(dir, Plugin, state.Sandboxer, state.Config.Sandboxer),
	}}
	n.CRI, err = cri.Dial(n.Socket)
	return n, err
}
