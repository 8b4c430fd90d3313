package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/sandboxer/cgroup"
	"kuasar.io/kuasar/sandboxer/network"
	"kuasar.io/kuasar/sandboxer/pod"
	"kuasar.io/kuasar/sandboxer/storage"
)

// What no live pod owns any more:
//
//   - The daemon owns every state directory, and all that belongs to a pod with one, as long as it
//     runs: it is the one that cleans up there. What is left for others are processes, cgroups and
//     taps of pods that have no state directory.
//   - Where no daemon runs, a pod with a process that lives, or of which that cannot be told, is
//     left to the next daemon, which adopts or ends it. Of the others goes what the next daemon
//     would remove, under the lock that keeps a daemon from starting meanwhile. Records of pods that
//     ended stay: engines ask the next daemon for them.
//   - A process is killed only if it is the hypervisor or file system daemon of a pod that has no
//     state directory, which its command line and its cgroup or name prove.

// Kinds of Garbage.
const (
	KindPod     = "pod"     // a state directory, with the mounts, cgroup and redirections of its pod
	KindProcess = "process" // a hypervisor or virtiofs daemon without a pod
	KindCgroup  = "cgroup"
	KindTap     = "tap"
	KindMount   = "mount"
)

// Garbage is something that was made for a pod.
type Garbage struct {
	Kind string
	Pod  string // the id, if it is known
	// What names it: a path, a process id, an interface in a namespace.
	What string
	// Reason is why nobody owns it or, of what is kept, who does.
	Reason string

	remove func(context.Context) error
}

// Collection is what was found.
type Collection struct {
	// Daemon is the process that holds the base directory, 0 if none does.
	Daemon  int
	Garbage []Garbage
	Kept    []Garbage
}

// Outcome says what became of a piece of garbage.
type Outcome struct {
	Garbage
	Err error // nil if it is gone
}

// Collector finds what no live pod owns below a base directory.
type Collector struct {
	// Dir is the daemon's base directory.
	Dir string
	// Records also counts the records of pods that ended, where no daemon runs.
	Records bool

	world world
}

// world is the machine. Tests replace parts of it.
type world struct {
	proc       string // where the processes are listed
	leaves     func() ([]string, error)
	leaf       func(parent, id string) (leaf, error)
	namespaces func() ([]string, error)
	taps       func(netns string) ([]tap, error)
	others     func(own string) []string
	lockHolder func(dir string) (int, error)
}

// leaf is a pod's cgroup.
type leaf interface {
	PIDs() ([]int, error)
	Procs() []string
	Path() string
	Delete(context.Context) error
}

// NewCollector returns a collector of this machine.
func NewCollector(dir string, records bool) *Collector {
	return &Collector{Dir: dir, Records: records, world: world{
		proc:       "/proc",
		leaves:     defaultLeaves,
		leaf:       loadLeaf,
		namespaces: boundNamespaces,
		taps:       leftTaps,
		others:     otherDaemons,
		lockHolder: pod.LockHolder,
	}}
}

// Find looks and changes nothing.
func (c *Collector) Find(ctx context.Context) (*Collection, error) {
	daemon, err := c.world.lockHolder(c.Dir)
	if err != nil {
		return nil, err
	}
	return c.find(ctx, daemon)
}

// Remove finds and removes. Where no daemon runs it holds the directory's lock meanwhile: a daemon
// that starts now ends with an error and is started again by systemd.
func (c *Collector) Remove(ctx context.Context) (*Collection, []Outcome, error) {
	daemon, err := c.world.lockHolder(c.Dir)
	if err != nil {
		return nil, nil, err
	}
	if daemon == 0 {
		lock, err := lockDir(c.Dir)
		if err != nil {
			return nil, nil, err
		}
		defer lock.Close()
	}
	found, err := c.find(ctx, daemon)
	if err != nil {
		return nil, nil, err
	}
	var outcomes []Outcome
	for _, g := range found.Garbage {
		if err := ctx.Err(); err != nil {
			return found, outcomes, err
		}
		outcomes = append(outcomes, Outcome{g, g.remove(ctx)})
	}
	return found, outcomes, nil
}

// lockDir takes the daemon's lock. A directory that does not exist has nothing to lock.
func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, pod.LockName)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // Close of a nil file only fails
	}
	if err != nil {
		return nil, fmt.Errorf("cannot keep daemons from starting meanwhile: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("cannot lock %s, a daemon has just started; try again: %w", path, err)
	}
	return f, nil
}

// search is one look.
type search struct {
	*Collector
	*Collection
	dir  string // without symbolic links, as in mounts and command lines
	pods map[string]bool
	// mounts are those below the directory.
	mounts []*mountinfo.Info
	// orphans are processes of pods without a state directory, and owned those of pods with one.
	orphans map[string][]process
	owned   map[string][]process
	// netns are the namespaces of pods that are kept.
	netns map[string]bool
}

func (c *Collector) find(ctx context.Context, daemon int) (*Collection, error) {
	dir := c.Dir
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	s := &search{
		Collector: c, Collection: &Collection{Daemon: daemon}, dir: dir,
		pods: map[string]bool{}, orphans: map[string][]process{}, owned: map[string][]process{}, netns: map[string]bool{},
	}
	// The directories last: a pod's is there before all else of it and goes after all else. So what
	// is seen now and has no directory then, has lost it.
	leaves, err := c.world.leaves()
	if err != nil {
		return nil, err
	}
	processes, err := s.processes()
	if err != nil {
		return nil, err
	}
	if s.mounts, err = mountinfo.GetMounts(mountinfo.PrefixFilter(dir)); err != nil {
		return nil, fmt.Errorf("cannot read the mounts: %w", err)
	}
	ids, others, err := pod.Directories(dir)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		s.pods[id] = true
	}
	for _, p := range processes {
		if s.pods[p.pod] {
			s.owned[p.pod] = append(s.owned[p.pod], p)
		} else {
			s.orphans[p.pod] = append(s.orphans[p.pod], p)
		}
	}
	for _, id := range ids {
		s.lookAtPod(id)
	}
	for _, name := range others {
		s.keep(KindPod, "", filepath.Join(dir, name), "it is no state directory; no daemon made it")
	}
	s.lookAtProcesses()
	s.lookAtLeaves(leaves)
	s.lookAtMounts()
	s.lookAtTaps()
	return s.Collection, ctx.Err()
}

func (s *search) drop(kind, id, what, reason string, remove func(context.Context) error) {
	s.Garbage = append(s.Garbage, Garbage{Kind: kind, Pod: id, What: what, Reason: reason, remove: remove})
}

func (s *search) keep(kind, id, what, reason string) {
	s.Kept = append(s.Kept, Garbage{Kind: kind, Pod: id, What: what, Reason: reason})
}

// lookAtPod decides about a pod with a state directory.
func (s *search) lookAtPod(id string) {
	dir := filepath.Join(s.dir, id)
	i, err := pod.Inspect(s.dir, id)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		s.keep(KindPod, id, dir, err.Error())
		return
	}
	if i.NetNS != "" {
		s.netns[i.NetNS] = true
	}
	if s.Daemon != 0 {
		s.keep(KindPod, id, dir, fmt.Sprintf("it is the daemon's (process %d)", s.Daemon))
		return
	}
	if alive := s.alive(i); alive != "" {
		s.keep(KindPod, id, dir, alive+"; the next daemon takes the pod over, or ends it")
		return
	}
	reason := ""
	switch {
	case i.Err != nil:
		reason = "its journal cannot be read, and no process of it lives"
	case i.Stale:
		reason = "it is from before the node's last boot"
	case i.State == pod.Created || i.State == pod.Starting:
		reason = "it was not started completely, and no process of it lives"
	case s.Records:
		reason = "it ended"
	default:
		s.keep(KindPod, id, dir, "it is the record of a pod that ended, for which its engine may ask the next daemon; --records removes it")
		return
	}
	if i.NetNS != "" {
		delete(s.netns, i.NetNS)
	}
	if n := s.mountsBelow(dir); n > 0 {
		reason += fmt.Sprintf("; %d mounts", n)
	}
	s.drop(KindPod, id, dir, reason, func(ctx context.Context) error { return s.removePod(ctx, id) })
}

// alive says which process of the pod lives, or may live; empty if that is proven of none.
func (s *search) alive(i *pod.Inspection) string {
	for _, p := range []struct {
		role    string
		process *pod.Process
	}{{"hypervisor", i.Hypervisor}, {"virtiofs daemon", i.Virtiofsd}} {
		if p.process == nil {
			continue
		}
		switch p.process.Life() {
		case pod.Alive:
			return fmt.Sprintf("its %s, process %d, lives", p.role, p.process.PID)
		case pod.Unknown:
			return fmt.Sprintf("whether process %d is its %s cannot be told", p.process.PID, p.role)
		}
	}
	if owned := s.owned[i.ID]; len(owned) > 0 {
		return fmt.Sprintf("process %d (%s) is its own and lives", owned[0].pid, owned[0].name)
	}
	g, err := s.world.leaf(i.CgroupParent, i.ID)
	if errors.Is(err, fs.ErrNotExist) {
		return ""
	}
	if err == nil {
		var pids []int
		if pids, err = g.PIDs(); err == nil && len(pids) == 0 {
			return ""
		} else if err == nil {
			return fmt.Sprintf("process %d lives in its cgroup %s", pids[0], g.Path())
		}
	}
	return "whether a process of it lives cannot be told: " + err.Error()
}

func (s *search) mountsBelow(dir string) int {
	n := 0
	for _, m := range s.mounts {
		if m.Mountpoint == dir || strings.HasPrefix(m.Mountpoint, dir+"/") {
			n++
		}
	}
	return n
}

// removePod removes everything of a pod whose processes are dead, the directory last. It looks again
// first, now that no daemon can start.
func (s *search) removePod(ctx context.Context, id string) error {
	i, err := pod.Inspect(s.dir, id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if alive := s.alive(i); alive != "" {
		return fmt.Errorf("it is left alone: %s", alive)
	}
	if !i.Stale && len(i.Network) > 0 {
		var saved network.Saved
		if err := json.Unmarshal(i.Network, &saved); err != nil {
			return fmt.Errorf("cannot understand what is saved of its network: %w", err)
		}
		if err := network.Restore(saved).Close(); err != nil {
			return err
		}
	}
	if err := storage.RemoveShare(i.Dir); err != nil {
		return err
	}
	g, err := s.world.leaf(i.CgroupParent, id)
	if err == nil {
		err = removeLeaf(ctx, g)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return removeDirectory(i.Dir)
}

// removeDirectory deletes a state directory, unless anything is mounted below it: what is reached
// through a mount belongs to somebody else.
func removeDirectory(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return fmt.Errorf("cannot read the mounts below %s: %w", dir, err)
	}
	if len(mounts) > 0 {
		return fmt.Errorf("cannot remove %s: %s is still mounted", dir, mounts[0].Mountpoint)
	}
	return os.RemoveAll(dir)
}

// removeLeaf removes an empty cgroup, never one with a process in it: the kernel refuses that.
func removeLeaf(ctx context.Context, g leaf) error {
	for _, procs := range g.Procs() {
		dir := filepath.Dir(procs)
		err := unix.Rmdir(dir)
		// A process that was killed leaves its cgroup a moment after its end.
		for tries := 0; errors.Is(err, unix.EBUSY) && tries < 200 && ctx.Err() == nil; tries++ {
			time.Sleep(10 * time.Millisecond)
			err = unix.Rmdir(dir)
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("cannot remove the cgroup %s: %w", dir, err)
		}
	}
	// Nothing of it is left to kill; this takes away the empty parents that a daemon made.
	return g.Delete(ctx)
}

// process is one that was started for a pod.
type process struct {
	pid     int
	started uint64
	pod     string
	name    string // of the program
}

// processes lists those that were started for a pod of this directory: their command lines name
// files in the pod's state directory, and they are in the pod's cgroup or named after the pod.
// Neither a viewer of such a file nor a shell in the directory is.
func (s *search) processes() ([]process, error) {
	entries, err := os.ReadDir(s.world.proc)
	if err != nil {
		return nil, fmt.Errorf("cannot list the processes: %w", err)
	}
	var found []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		text, err := os.ReadFile(filepath.Join(s.world.proc, e.Name(), "cmdline"))
		if err != nil || len(text) == 0 {
			continue
		}
		args := strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")
		id := podOf(args, s.dir)
		if id == "" {
			continue
		}
		if !named(args, "sandbox-"+id) && !s.inLeaf(pid, id) {
			continue
		}
		started, err := pod.StartTime(pid)
		if err != nil {
			continue // it has ended
		}
		found = append(found, process{pid: pid, started: started, pod: id, name: filepath.Base(args[0])})
	}
	return found, nil
}

// podOf returns the pod into whose state directory below dir an argument leads.
func podOf(args []string, dir string) string {
	for _, a := range args[1:] {
		for rest := a; ; {
			i := strings.Index(rest, dir+"/")
			if i < 0 {
				break
			}
			before := i == 0 || strings.ContainsRune("=,: ", rune(rest[i-1]))
			rest = rest[i+len(dir)+1:]
			id, _, below := strings.Cut(rest, "/")
			if before && below && pod.CheckID(id) == nil {
				return id
			}
		}
	}
	return ""
}

// named says whether the arguments name the process so, as hypervisors are.
func named(args []string, name string) bool {
	for i := range len(args) - 1 {
		if args[i] == "-name" && args[i+1] == name {
			return true
		}
	}
	return false
}

// inLeaf says whether the process is in a cgroup of the pod's name.
func (s *search) inLeaf(pid int, id string) bool {
	text, _ := os.ReadFile(filepath.Join(s.world.proc, strconv.Itoa(pid), "cgroup"))
	for line := range strings.Lines(string(text)) {
		// 4:memory:/kuasar-vmm/<id>
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 && path.Base(f[2]) == id {
			return true
		}
	}
	return false
}

func (s *search) lookAtProcesses() {
	for _, id := range sortedKeys(s.orphans) {
		for _, p := range s.orphans[id] {
			s.drop(KindProcess, id, fmt.Sprintf("%d (%s)", p.pid, p.name), "its pod has no state directory",
				func(ctx context.Context) error { return s.kill(ctx, p) })
		}
	}
}

// killTimeout bounds the wait for a killed process, which only the kernel can hold up.
const killTimeout = 10 * time.Second

// kill ends a process, if its pod still has no state directory, and waits for its end.
func (s *search) kill(ctx context.Context, p process) error {
	if _, err := os.Lstat(filepath.Join(s.dir, p.pod)); !errors.Is(err, fs.ErrNotExist) {
		return errors.New("it is left alone: its pod has a state directory now")
	}
	fd, err := unix.PidfdOpen(p.pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot watch process %d: %w", p.pid, err)
	}
	defer unix.Close(fd)
	// The descriptor keeps the number from being given to another process while it is compared.
	if started, err := pod.StartTime(p.pid); err != nil || started != p.started {
		return nil // that process has ended
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("cannot kill process %d: %w", p.pid, err)
	}
	for deadline := time.Now().Add(killTimeout); ctx.Err() == nil; {
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("process %d does not end after SIGKILL", p.pid)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(min(left, 100*time.Millisecond).Milliseconds()))
		if n > 0 && err == nil {
			return nil
		}
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("cannot wait for process %d: %w", p.pid, err)
		}
	}
	return ctx.Err()
}

// lookAtLeaves decides about cgroups of pods without a state directory.
func (s *search) lookAtLeaves(names []string) {
	seen := map[string]bool{}
	for _, id := range append(slices.Clone(names), sortedKeys(s.orphans)...) {
		if s.pods[id] || seen[id] {
			continue
		}
		seen[id] = true
		g, err := s.world.leaf("", id)
		if err != nil {
			continue
		}
		pids, err := g.PIDs()
		if err != nil {
			s.keep(KindCgroup, id, g.Path(), err.Error())
			continue
		}
		foreign := slices.DeleteFunc(pids, func(pid int) bool {
			return slices.ContainsFunc(s.orphans[id], func(p process) bool { return p.pid == pid })
		})
		owner := s.ownerElsewhere(id)
		switch {
		case len(foreign) > 0:
			s.keep(KindCgroup, id, g.Path(), fmt.Sprintf("it holds process %d, which is none of this directory's pods", foreign[0]))
		case owner != "":
			s.keep(KindCgroup, id, g.Path(), "its pod is in "+owner)
		default:
			s.drop(KindCgroup, id, g.Path(), "its pod has no state directory", func(ctx context.Context) error {
				if _, err := os.Lstat(filepath.Join(s.dir, id)); !errors.Is(err, fs.ErrNotExist) {
					return errors.New("it is left alone: its pod has a state directory now")
				}
				return removeLeaf(ctx, g)
			})
		}
	}
}

// ownerElsewhere finds the pod in the base directory of another daemon: all share one parent cgroup.
func (s *search) ownerElsewhere(id string) string {
	for _, dir := range s.world.others(s.dir) {
		if _, err := os.Lstat(filepath.Join(dir, id)); !errors.Is(err, fs.ErrNotExist) {
			return filepath.Join(dir, id)
		}
	}
	return ""
}

// lookAtMounts reports mounts that belong to no state directory. Whose they are cannot be told.
func (s *search) lookAtMounts() {
	for _, m := range s.mounts {
		rest, below := strings.CutPrefix(m.Mountpoint, s.dir+"/")
		id, _, _ := strings.Cut(rest, "/")
		if below && !s.pods[id] {
			s.keep(KindMount, "", m.Mountpoint, "it is in no pod's state directory; if it is not yours: umount "+m.Mountpoint)
		}
	}
}

// tap is a device that no process uses.
type tap struct {
	name   string
	reason string // why it is to be kept, empty if it is not
	remove func() error
}

func (s *search) lookAtTaps() {
	namespaces, err := s.world.namespaces()
	if err != nil {
		s.keep(KindTap, "", "network namespaces", err.Error())
		return
	}
	for _, ns := range namespaces {
		if s.netns[ns] {
			continue // the pod's own
		}
		taps, err := s.world.taps(ns)
		if err != nil {
			continue // gone meanwhile
		}
		for _, t := range taps {
			what := t.name + " in " + ns
			if t.reason != "" {
				s.keep(KindTap, "", what, t.reason)
				continue
			}
			s.drop(KindTap, "", what, "no process uses it, and no pod is in its namespace", func(context.Context) error { return t.remove() })
		}
	}
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// defaultLeaves lists the names of the cgroups below the daemon's own parent, in any hierarchy.
// Cgroups below an engine's parents look like the engine's own and are found only by the processes
// in them.
func defaultLeaves() ([]string, error) {
	parent, err := cgroup.Load("/", strings.Trim(cgroup.DefaultParent, "/"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, procs := range parent.Procs() {
		entries, err := os.ReadDir(filepath.Dir(procs))
		if err != nil {
			continue
		}
		for _, e := range entries {
			if e.IsDir() && pod.CheckID(e.Name()) == nil && !slices.Contains(names, e.Name()) {
				names = append(names, e.Name())
			}
		}
	}
	slices.Sort(names)
	return names, nil
}

// loadLeaf finds a pod's cgroup; without a parent, wherever it is.
func loadLeaf(parent, id string) (leaf, error) {
	g, err := cgroup.Load(parent, id)
	if errors.Is(err, fs.ErrNotExist) {
		g, err = cgroup.Find(id)
	}
	if err != nil {
		return nil, err
	}
	return g, nil
}

// otherDaemons are the base directories of daemons that run, but for own.
func otherDaemons(own string) []string {
	var dirs []string
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, l := range links {
		target, err := os.Readlink(l)
		if err != nil || filepath.Base(target) != pod.LockName {
			continue
		}
		if dir := filepath.Dir(target); dir != own && !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}
