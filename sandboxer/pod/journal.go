package pod

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"

	"kuasar.io/kuasar/sandboxer/vm"
)

// journalName is the file in a pod's state directory from which another daemon finds the pod again.
const journalName = "sandbox.json"

// journalSchema is raised when the meaning of a field changes; a daemon cleans up pods of a schema
// that it does not know instead of guessing.
const journalSchema = 1

// record is the content of the journal. It is written whole on every change.
//
// It is replaced atomically but never synced to the disk: the death of the daemon loses nothing that
// it wrote, and after the death of the node the boot id says that nothing in it holds any more.
type record struct {
	Schema int    `json:"schema"`
	BootID string `json:"boot_id"`
	ID     string `json:"id"`
	State  State  `json:"state"`
	// Stage is the last boot stage that was completed.
	Stage string `json:"stage,omitempty"`

	CreatedAt  time.Time `json:"created_at"`
	ExitedAt   time.Time `json:"exited_at,omitzero"`
	ExitStatus uint32    `json:"exit_status,omitempty"`
	Reason     string    `json:"reason,omitempty"`

	NetNS string `json:"netns"`
	// CgroupParent is where the engine wants the pod's processes counted; empty: nowhere special.
	CgroupParent string `json:"cgroup_parent,omitempty"`
	// Config is the CRI's PodSandboxConfig, CNI the result that came with it.
	Config json.RawMessage `json:"config,omitempty"`
	CNI    json.RawMessage `json:"cni,omitempty"`

	Network   json.RawMessage `json:"network,omitempty"`
	Virtiofsd json.RawMessage `json:"virtiofsd,omitempty"`
	Machine   *vm.State       `json:"machine,omitempty"`
	// Containers belongs to package container.
	Containers json.RawMessage `json:"containers,omitempty"`
	Address    string          `json:"address,omitempty"`
	Stages     []StageTime     `json:"stages,omitempty"`
}

// writeFile replaces dir's journal; a variable for the sake of the tests that fill the disk.
var writeFile = func(dir string, content []byte) error {
	temp := filepath.Join(dir, "."+journalName)
	if err := os.WriteFile(temp, content, 0o600); err != nil {
		_ = os.Remove(temp)
		return err
	}
	return os.Rename(temp, filepath.Join(dir, journalName))
}

func (r *record) write(dir string) error {
	content, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return fmt.Errorf("cannot encode the journal of pod %s: %w", r.ID, err)
	}
	if err := writeFile(dir, append(content, '\n')); err != nil {
		return fmt.Errorf("cannot write the journal of pod %s: %w", r.ID, err)
	}
	return nil
}

func readRecord(dir string) (*record, error) {
	content, err := os.ReadFile(filepath.Join(dir, journalName))
	if err != nil {
		return nil, err
	}
	var r record
	if err := json.Unmarshal(content, &r); err != nil {
		return nil, fmt.Errorf("cannot decode %s: %w", filepath.Join(dir, journalName), err)
	}
	if r.Schema != journalSchema {
		return nil, fmt.Errorf("%s has schema %d, this daemon knows %d", filepath.Join(dir, journalName), r.Schema, journalSchema)
	}
	return &r, nil
}

// removeDir deletes a pod's state directory. It refuses while anything is mounted below it: what is
// reached through a mount belongs to somebody else.
func removeDir(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return fmt.Errorf("cannot read the mounts below %s: %w", dir, err)
	}
	if len(mounts) > 0 {
		var points []string
		for _, m := range mounts {
			points = append(points, m.Mountpoint)
		}
		return fmt.Errorf("cannot remove %s: still mounted: %s", dir, clip(strings.Join(points, ", "), 400))
	}
	if err := os.RemoveAll(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot remove the state directory: %w", err)
	}
	return nil
}

// BootID identifies this boot of the node.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("cannot tell this boot of the node from others: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}
