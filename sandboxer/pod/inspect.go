package pod

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// What follows reads what daemons left on disk, without a daemon. It changes nothing and never
// blocks on one.

// Inspection is what the state directory of a pod says. It is a snapshot: the daemon may write a new
// journal at any time.
type Inspection struct {
	ID  string
	Dir string
	// Err is why the journal could not be read. Nothing below is known then.
	Err error

	// Schema is the journal's; that of a newer daemon is read as far as it is understood.
	Schema int
	// Stale says that the journal is of another boot of the node: no process it names lives.
	Stale bool
	// State is what the daemon last wrote. Only the processes tell whether it still holds.
	State      State
	Stage      string
	CreatedAt  time.Time
	ExitedAt   time.Time // zero while the pod has not ended
	ExitStatus uint32
	Reason     string

	// Client is who created the pod.
	Client       Client
	NetNS        string
	CgroupParent string
	Address      string
	Stages       []StageTime
	Config       *cri.PodSandboxConfig // never nil
	CNI          json.RawMessage
	// Network is what package network saved, Containers what package container did.
	Network    json.RawMessage
	Containers json.RawMessage

	// Hypervisor and Virtiofsd are nil where the journal names none.
	Hypervisor *Process
	Virtiofsd  *Process
	// VsockCID is the context id of the pod's machine, 0 if it has none.
	VsockCID uint32
}

// DebugSocket is the path of the socket that leads to the guest's debug console. It exists only in
// pods that were made with the console.
func (i *Inspection) DebugSocket() string { return filepath.Join(i.Dir, debugSocket) }

// ConsoleLog is the path of the log of the guest's console.
func (i *Inspection) ConsoleLog() string { return filepath.Join(i.Dir, "sandbox-"+i.ID+".log") }

// Inspect reads the state directory of one pod in the base directory. Its error wraps fs.ErrNotExist
// if there is none, and fs.ErrPermission if it may not be looked at; a journal that cannot be read is
// no error but Inspection.Err.
func Inspect(base, id string) (*Inspection, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	dir := filepath.Join(base, id)
	info, err := os.Lstat(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot look at pod %s: %w", id, err)
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("%s is no directory: it is not a pod's state", dir)
	}
	i := &Inspection{ID: id, Dir: dir, Config: &cri.PodSandboxConfig{}}
	content, err := os.ReadFile(filepath.Join(dir, journalName))
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("cannot read the journal of pod %s: %w", id, err)
	}
	if err != nil {
		i.Err = err
		return i, nil
	}
	i.Err = i.decode(content)
	return i, nil
}

func (i *Inspection) decode(content []byte) error {
	var r record
	if err := json.Unmarshal(content, &r); err != nil {
		return fmt.Errorf("cannot decode %s: %w", filepath.Join(i.Dir, journalName), err)
	}
	if r.ID != i.ID {
		return fmt.Errorf("%s is the journal of another pod, %q", filepath.Join(i.Dir, journalName), clip(r.ID, maxID))
	}
	boot, err := BootID()
	if err != nil {
		return err
	}
	i.Schema, i.Stale = r.Schema, r.BootID != boot
	i.State, i.Stage = r.State, r.Stage
	i.CreatedAt, i.ExitedAt, i.ExitStatus, i.Reason = r.CreatedAt, r.ExitedAt, r.ExitStatus, r.Reason
	i.Client = r.Client
	i.NetNS, i.CgroupParent, i.Address, i.Stages = r.NetNS, r.CgroupParent, r.Address, r.Stages
	i.CNI, i.Network, i.Containers = r.CNI, r.Network, r.Containers
	if len(r.Config) > 0 {
		if err := json.Unmarshal(r.Config, i.Config); err != nil {
			return fmt.Errorf("cannot decode the pod's configuration in %s: %w", filepath.Join(i.Dir, journalName), err)
		}
	}
	if r.Machine != nil {
		// What a driver saves is its own business but for this: the number of its process, when
		// that started, and the context id. A driver that says nothing of the start leaves open
		// whether the process is still the same.
		var saved struct {
			Start uint64 `json:"start_time"`
			CID   uint32 `json:"vsock_cid"`
		}
		_ = json.Unmarshal(r.Machine.Saved, &saved)
		i.Hypervisor, i.VsockCID = &Process{PID: r.Machine.PID, Started: saved.Start, stale: i.Stale}, saved.CID
	}
	if len(r.Virtiofsd) > 0 {
		var saved struct {
			PID     int    `json:"pid"`
			Started uint64 `json:"started"`
		}
		if json.Unmarshal(r.Virtiofsd, &saved) == nil && saved.PID > 0 {
			i.Virtiofsd = &Process{PID: saved.PID, Started: saved.Started, stale: i.Stale}
		}
	}
	return nil
}

// Directories lists what is in the base directory: the ids of pods, and the names of what can be
// none, which no daemon made. The daemon's own files, whose names begin with a dot, are in neither.
// A base directory that does not exist has no pods.
func Directories(base string) (ids, others []string, err error) {
	entries, err := os.ReadDir(base)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("cannot list the pods: %w", err)
	}
	for _, e := range entries {
		switch {
		case strings.HasPrefix(e.Name(), "."):
		case e.IsDir() && CheckID(e.Name()) == nil:
			ids = append(ids, e.Name())
		default:
			others = append(others, e.Name())
		}
	}
	return ids, others, nil
}

// Life says whether a process lives.
type Life string

const (
	Alive Life = "alive"
	Dead  Life = "dead"
	// Unknown is a process that may live: what would prove the opposite cannot be read.
	Unknown Life = "unknown"
)

// Process is a process that a journal names.
type Process struct {
	PID int
	// Started is when, in clock ticks after the node's boot; 0 if the journal does not say. With it
	// another process is never taken for this one.
	Started uint64

	stale bool
}

// Life proves that the process lives, or that it does not.
func (p *Process) Life() Life {
	if p.stale || p.PID <= 0 {
		return Dead
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return Dead // EINVAL: a thread has that number
	}
	if err != nil {
		return Unknown
	}
	defer unix.Close(fd)
	// The descriptor keeps the number from being given to another process while it is looked at.
	started, err := StartTime(p.PID)
	switch {
	case pidfdEnded(fd):
		return Dead
	case err != nil:
		return Unknown
	case p.Started == 0:
		return Unknown
	case started != p.Started:
		return Dead
	}
	return Alive
}

// pidfdEnded says whether the process behind the descriptor has ended; a zombie has.
func pidfdEnded(fd int) bool {
	set := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(set, 0)
		if err != unix.EINTR {
			return err == nil && n > 0
		}
	}
}

// StartTime is when a process started, in clock ticks after the node's boot.
func StartTime(pid int) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The name in parentheses may hold anything; the start is the 22nd field, the 20th after it.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 20 {
		return 0, fmt.Errorf("cannot understand /proc/%d/stat", pid)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// LockName is the file in the base directory that the daemon holds locked as long as it lives.
const LockName = ".lock"

// LockHolder returns the process that holds the lock of the base directory, 0 if there is none. It
// does not touch the lock, so it never gets in the way of a daemon that is about to start.
func LockHolder(base string) (pid int, err error) {
	base, err = filepath.EvalSymlinks(base)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("cannot tell whether a daemon runs: %w", err)
	}
	path := filepath.Join(base, LockName)
	var st unix.Stat_t
	if err := unix.Stat(path, &st); errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	} else if err != nil {
		return 0, fmt.Errorf("cannot tell whether a daemon runs: %w", &fs.PathError{Op: "stat", Path: path, Err: err})
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		return 0, fmt.Errorf("cannot tell whether a daemon runs: %w", err)
	}
	device := fmt.Sprintf("%02x:%02x", unix.Major(st.Dev), unix.Minor(st.Dev))
	for line := range strings.Lines(string(locks)) {
		// 1: FLOCK  ADVISORY  WRITE 4242 00:19:1234 0 EOF
		f := strings.Fields(line)
		if len(f) < 6 || f[1] != "FLOCK" {
			continue
		}
		i := strings.LastIndexByte(f[5], ':')
		holder, err := strconv.Atoi(f[4])
		if i < 0 || err != nil || f[5][i+1:] != strconv.FormatUint(st.Ino, 10) {
			continue
		}
		// Some file systems have other device numbers in that list than stat(2) tells.
		if f[5][:i] == device || holds(holder, path) {
			return holder, nil
		}
	}
	return 0, nil
}

// holds says whether the process has path open.
func holds(pid int, path string) bool {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if target, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil && target == path {
			return true
		}
	}
	return false
}
