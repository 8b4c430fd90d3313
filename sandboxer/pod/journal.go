package pod

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/sandboxer/vm"
)

// journalName is the file in a pod's state directory from which another daemon finds the pod again.
const journalName = "sandbox.json"

// Daemons before and behind this one read its journals, and it reads theirs: pods outlive upgrades
// and downgrades.
//
// A field may be added without further ado if a daemon that does not know it can manage the pod
// without, and keep the field as it found it: it is written back unchanged, and may be out of date.
// This holds for what the other packages save below network, virtiofsd, machine and containers too,
// but for the writing back. No field is ever used again for something else.
//
// Otherwise journalSchema is raised, and readableBy with it unless daemons of lower schemas manage
// such pods rightly after all. A daemon does not touch a pod whose journal it does not understand
// and which lives; see Pod.hold. What is decoded leniently then, such as the boot id, the state and
// the parent of the cgroup, keeps its name and form.
const (
	// journalSchema is what this daemon writes.
	journalSchema = 1
	// announcedSchema is what it writes of pods whose client announces containers, and daemons that
	// know of no announcements cannot go on with those: their journals are readable from it on.
	announcedSchema = 2
	// readableBy is the lowest schema of daemons that understand what this one writes.
	readableBy = 1
	// oldestSchema is the lowest schema of journals that this daemon understands.
	oldestSchema = 1
)

// maxJournal bounds a journal that is read, in bytes.
const maxJournal = 64 << 20

// record is the content of the journal. It is written whole on every change.
//
// It is replaced atomically but never synced to the disk: the death of the daemon loses nothing that
// it wrote, and after the death of the node the boot id says that nothing in it holds any more.
type record struct {
	Schema int `json:"schema"`
	// ReadableBy is the lowest schema of daemons that understand the journal; 0 means Schema.
	ReadableBy int    `json:"readable_by,omitempty"`
	BootID     string `json:"boot_id"`
	ID         string `json:"id"`
	// Client is who created the pod.
	Client Client `json:"client,omitempty"`
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

	Network json.RawMessage `json:"network,omitempty"`
	// LateNetwork says that CNI may still make the network: no container was announced yet.
	LateNetwork bool `json:"late_network,omitempty"`

	Virtiofsd json.RawMessage `json:"virtiofsd,omitempty"`
	Machine   *vm.State       `json:"machine,omitempty"`
	// Containers belongs to package container.
	Containers json.RawMessage `json:"containers,omitempty"`
	Address    string          `json:"address,omitempty"`
	Stages     []StageTime     `json:"stages,omitempty"`

	// unknown are the fields of a newer daemon.
	unknown map[string]json.RawMessage
}

// recordFields are the indexes of record's fields by their names in the journal.
var recordFields = func() map[string]int {
	fields := map[string]int{}
	t := reflect.TypeFor[record]()
	for i := range t.NumField() {
		if name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ","); name != "" {
			fields[name] = i
		}
	}
	return fields
}()

// UnmarshalJSON keeps what it does not know.
func (r *record) UnmarshalJSON(content []byte) error {
	type plain record
	var p plain
	if err := json.Unmarshal(content, &p); err != nil {
		return err
	}
	if err := json.Unmarshal(content, &p.unknown); err != nil {
		return err
	}
	for name := range recordFields {
		delete(p.unknown, name)
	}
	*r = record(p)
	return nil
}

// MarshalJSON writes what UnmarshalJSON did not know behind what it knew.
func (r *record) MarshalJSON() ([]byte, error) {
	type plain record
	known, err := json.Marshal((*plain)(r))
	if err != nil || len(r.unknown) == 0 {
		return known, err
	}
	unknown, err := json.Marshal(r.unknown)
	if err != nil {
		return nil, err
	}
	return append(append(known[:len(known)-1], ','), unknown[1:]...), nil
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
	r.Schema, r.ReadableBy = journalSchema, readableBy
	if r.Client.Announces() {
		r.Schema, r.ReadableBy = announcedSchema, announcedSchema
	}
	content, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return fmt.Errorf("cannot encode the journal of pod %s: %w", r.ID, err)
	}
	if err := writeFile(dir, append(content, '\n')); err != nil {
		return fmt.Errorf("cannot write the journal of pod %s: %w", r.ID, err)
	}
	return nil
}

// errForeign says that a journal is whole, but that this daemon does not understand it.
var errForeign = errors.New("the journal is of a daemon that this one does not understand")

// readRecord reads dir's journal. If that is damaged, one that a daemon had written and not yet put
// in its place is taken instead. With an error that wraps errForeign it returns what it could make
// out; with one that wraps fs.ErrNotExist and a nil record there is no journal at all.
func readRecord(dir string) (*record, error) {
	r, err := readJournal(filepath.Join(dir, journalName))
	if r != nil {
		return r, err
	}
	if next, nerr := readJournal(filepath.Join(dir, "."+journalName)); next != nil {
		return next, nerr
	}
	return nil, err
}

func readJournal(path string) (*record, error) {
	content, err := readRegular(path, maxJournal)
	if err != nil {
		return nil, err
	}
	r, err := decodeRecord(content)
	if err != nil {
		err = fmt.Errorf("cannot decode %s: %w", path, err)
	}
	return r, err
}

func decodeRecord(content []byte) (*record, error) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(content, &fields); err != nil {
		return nil, err
	}
	var schema, readable int
	if err := json.Unmarshal(fields["schema"], &schema); err != nil || schema <= 0 {
		return nil, errors.New("it has no schema")
	}
	if json.Unmarshal(fields["readable_by"], &readable) != nil || readable <= 0 {
		readable = schema
	}
	r := new(record)
	if schema >= oldestSchema && readable <= announcedSchema {
		if err := json.Unmarshal(content, r); err != nil {
			return nil, err
		}
		return r, nil
	}
	v := reflect.ValueOf(r).Elem()
	for name, i := range recordFields {
		if json.Unmarshal(fields[name], v.Field(i).Addr().Interface()) != nil {
			v.Field(i).SetZero()
		}
	}
	return r, fmt.Errorf("%w: it has schema %d, readable by daemons from schema %d on, and this one has schema %d and reads from %d on",
		errForeign, schema, readable, announcedSchema, oldestSchema)
}

// readRegular reads a regular file of at most limit bytes, and nothing else that has its name.
func readRegular(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is no regular file", path)
	case info.Size() > limit:
		return nil, fmt.Errorf("%s has %d bytes, more than %d", path, info.Size(), limit)
	}
	return io.ReadAll(io.LimitReader(f, limit))
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
