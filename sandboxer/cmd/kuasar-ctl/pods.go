package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"kuasar.io/kuasar/sandboxer/cgroup"
	"kuasar.io/kuasar/sandboxer/node"
	"kuasar.io/kuasar/sandboxer/pod"
)

// base is the directory with the pods' state: the one that was given, else the one that the daemon's
// options name.
func (c *call) base() (string, error) {
	dir := c.dir
	if dir == "" {
		dir = node.Settings(node.SysconfigPath).Dir
	}
	return filepath.Abs(dir)
}

// The states that list and inspect show. Those of a pod that lives are the journal's own; these are
// the ones in which the journal does not say how things are.
const (
	stateDead       = "dead"       // the journal says that the pod runs, and its machine does not
	stateStale      = "stale"      // from before the node's last boot
	stateUnreadable = "unreadable" // the journal cannot be read
)

func stateOf(i *pod.Inspection) string {
	switch {
	case i.Err != nil:
		return stateUnreadable
	case i.Stale:
		return stateStale
	case i.State == pod.Ready && (i.Hypervisor == nil || i.Hypervisor.Life() == pod.Dead):
		return stateDead
	}
	return string(i.State)
}

// podSummary is a line of list. Its names in JSON are promised in kuasar-ctl(1).
type podSummary struct {
	ID         string    `json:"id"`
	Name       string    `json:"name"`
	Namespace  string    `json:"namespace"`
	UID        string    `json:"uid"`
	Attempt    uint32    `json:"attempt"`
	State      string    `json:"state"`
	PID        int       `json:"pid"`
	Created    time.Time `json:"created,omitzero"`
	Containers int       `json:"containers"`
}

func summarize(i *pod.Inspection) podSummary {
	m := i.Config.GetMetadata()
	s := podSummary{
		ID: i.ID, Name: m.GetName(), Namespace: m.GetNamespace(), UID: m.GetUid(), Attempt: m.GetAttempt(),
		State: stateOf(i), Created: i.CreatedAt,
	}
	if i.Hypervisor != nil && i.Hypervisor.Life() != pod.Dead {
		s.PID = i.Hypervisor.PID
	}
	s.Containers = len(containersOf(i))
	return s
}

// inspections reads all pods of the base directory, the oldest first. One that vanishes meanwhile is
// left out.
func (c *call) inspections() (pods []*pod.Inspection, others []string, err error) {
	base, err := c.base()
	if err != nil {
		return nil, nil, err
	}
	ids, others, err := pod.Directories(base)
	if err != nil {
		return nil, nil, asRoot(err)
	}
	for _, id := range ids {
		i, err := pod.Inspect(base, id)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, nil, asRoot(err)
		}
		pods = append(pods, i)
	}
	slices.SortFunc(pods, func(a, b *pod.Inspection) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), strings.Compare(a.ID, b.ID))
	})
	return pods, others, nil
}

func list(c *call, f *flag.FlagSet) func(context.Context, []string) error {
	quiet := f.Bool("q", false, "print the ids only")
	return func(context.Context, []string) error {
		pods, others, err := c.inspections()
		if err != nil {
			return err
		}
		if *quiet && !c.json() {
			for _, p := range pods {
				fmt.Fprintln(c.out, p.ID)
			}
			return nil
		}
		summaries := []podSummary{}
		for _, p := range pods {
			summaries = append(summaries, summarize(p))
		}
		if *quiet {
			ids := []string{}
			for _, s := range summaries {
				ids = append(ids, s.ID)
			}
			return c.print(ids)
		}
		if c.json() {
			return c.print(summaries)
		}
		rows := [][]string{{"POD ID", "NAME", "NAMESPACE", "STATE", "PID", "CONTAINERS", "AGE"}}
		for _, s := range summaries {
			rows = append(rows, []string{
				short(s.ID), dash(s.Name), dash(s.Namespace), s.State, dash(number(s.PID)), strconv.Itoa(s.Containers), age(s.Created),
			})
		}
		if err := table(c.out, rows); err != nil {
			return err
		}
		for _, name := range others {
			fmt.Fprintf(c.err, "%s is no pod's: no daemon made it\n", name)
		}
		c.noteDaemon(len(pods))
		return nil
	}
}

// noteDaemon says on standard error that nobody manages the pods, if so.
func (c *call) noteDaemon(pods int) {
	base, err := c.base()
	if err != nil {
		return
	}
	holder, err := pod.LockHolder(base)
	if err != nil || holder != 0 {
		return
	}
	what := ""
	if pods > 0 {
		what = ", so nobody manages these pods; what lives, lives on"
	}
	fmt.Fprintf(c.err, "No vmm-sandboxer runs on %s%s: systemctl start kuasar-vmm\n", base, what)
}

// idLength is how much of an id tables show, as in crictl.
const idLength = 13

func short(id string) string { return id[:min(len(id), idLength)] }

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func number(n int) string {
	if n == 0 {
		return ""
	}
	return strconv.Itoa(n)
}

// age is how long ago t was, in the one or two largest units.
func age(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	d := time.Since(t)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", max(0, int(d.Seconds())))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	default:
		return fmt.Sprintf("%dd%dh", int(d.Hours())/24, int(d.Hours())%24)
	}
}

// pod finds the pod whose id begins with prefix.
func (c *call) pod(prefix string) (*pod.Inspection, error) {
	base, err := c.base()
	if err != nil {
		return nil, err
	}
	id, err := c.resolve(base, prefix)
	if err != nil {
		return nil, err
	}
	i, err := pod.Inspect(base, id)
	return i, asRoot(err)
}

func (c *call) resolve(base, prefix string) (string, error) {
	if prefix == "" {
		return "", usagef("the id of a pod is empty")
	}
	ids, _, err := pod.Directories(base)
	if errors.Is(err, fs.ErrPermission) {
		return "", asRoot(err)
	}
	if err != nil {
		return "", err
	}
	var matching []string
	for _, id := range ids {
		if id == prefix {
			return id, nil
		}
		if strings.HasPrefix(id, prefix) {
			matching = append(matching, id)
		}
	}
	switch len(matching) {
	case 1:
		return matching[0], nil
	case 0:
		return "", fmt.Errorf("no pod below %s has an id that begins with %q; see kuasar-ctl list", base, prefix)
	}
	var b strings.Builder
	for _, id := range matching {
		name := ""
		if i, err := pod.Inspect(base, id); err == nil && i.Config.GetMetadata() != nil {
			name = i.Config.Metadata.Namespace + "/" + i.Config.Metadata.Name
		}
		fmt.Fprintf(&b, "\n  %s %s", id, name)
	}
	return "", fmt.Errorf("the id %q is ambiguous; it may be:%s", prefix, b.String())
}

// podDetails is what inspect shows. Its names in JSON are promised in kuasar-ctl(1).
type podDetails struct {
	podSummary
	Directory    string             `json:"directory"`
	Error        string             `json:"error,omitempty"`
	Schema       int                `json:"schema"`
	JournalState string             `json:"journal_state"`
	Stage        string             `json:"stage,omitempty"`
	Exited       time.Time          `json:"exited,omitzero"`
	ExitStatus   uint32             `json:"exit_status"`
	Reason       string             `json:"reason,omitempty"`
	Client       string             `json:"client,omitempty"` // who created it
	NetNS        string             `json:"netns"`
	CgroupParent string             `json:"cgroup_parent"`
	TaskAddress  string             `json:"task_address"`
	Console      string             `json:"console"` // how the debug console is reached: socket, vsock, or empty
	VsockCID     uint32             `json:"vsock_cid"`
	ConsoleLog   string             `json:"console_log"`
	Processes    []processDetails   `json:"processes"`
	Stages       []stageDetails     `json:"stages"`
	Tasks        []containerDetails `json:"tasks"`
	CNI          json.RawMessage    `json:"cni,omitempty"`
	Network      json.RawMessage    `json:"network,omitempty"`
	Config       any                `json:"config,omitempty"`
}

type processDetails struct {
	PID int `json:"pid"`
	// Role is hypervisor, virtiofsd, or cgroup for one that is only in the pod's cgroup.
	Role string `json:"role"`
	Life string `json:"life"`
}

type stageDetails struct {
	Stage   string  `json:"stage"`
	Seconds float64 `json:"seconds"`
}

type containerDetails struct {
	ID       string           `json:"id"`
	OOMKills uint64           `json:"oom_kills"`
	Bundle   string           `json:"bundle"`
	Process  []processOutcome `json:"processes"`
}

type processOutcome struct {
	ExecID   string    `json:"exec_id,omitempty"`
	Status   string    `json:"status"`
	ExitCode uint32    `json:"exit_code"`
	Exited   time.Time `json:"exited,omitzero"`
}

// containerRecord is what of package container's records in the journal is shown. A test compares
// the two; importing the package would bring half the daemon along.
type containerRecord struct {
	ID        string `json:"id"`
	Bundle    string `json:"bundle"`
	OOMKills  uint64 `json:"oomKills"`
	Processes []struct {
		ExecID string `json:"execID"`
		Status int    `json:"status"`
		Exit   struct {
			Status uint32
			At     time.Time
		} `json:"exit"`
		// Deleted is what is only remembered for a client whose answer may have got lost.
		Deleted bool `json:"deleted"`
	} `json:"processes"`
}

// processStates are the names of the records' states of a process, by their numbers.
var processStates = []string{"unknown", "created", "running", "paused", "stopped"}

func containersOf(i *pod.Inspection) []containerDetails {
	var records []containerRecord
	if len(i.Containers) == 0 || json.Unmarshal(i.Containers, &records) != nil {
		return nil
	}
	var all []containerDetails
	for _, r := range records {
		d := containerDetails{ID: r.ID, OOMKills: r.OOMKills, Bundle: r.Bundle, Process: []processOutcome{}}
		for _, p := range r.Processes {
			if p.Deleted {
				continue
			}
			status := processStates[0]
			if p.Status > 0 && p.Status < len(processStates) {
				status = processStates[p.Status]
			}
			d.Process = append(d.Process, processOutcome{ExecID: p.ExecID, Status: status, ExitCode: p.Exit.Status, Exited: p.Exit.At})
		}
		if len(d.Process) > 0 {
			all = append(all, d)
		}
	}
	return all
}

func details(i *pod.Inspection) podDetails {
	d := podDetails{
		podSummary: summarize(i), Directory: i.Dir, Schema: i.Schema, JournalState: string(i.State), Stage: i.Stage,
		Exited: i.ExitedAt, ExitStatus: i.ExitStatus, Reason: i.Reason, NetNS: i.NetNS, CgroupParent: i.CgroupParent,
		TaskAddress: i.Address, VsockCID: i.VsockCID, ConsoleLog: i.ConsoleLog(),
		Processes: []processDetails{}, Stages: []stageDetails{}, Tasks: containersOf(i), CNI: i.CNI, Network: i.Network,
	}
	if i.Err != nil {
		d.Error = i.Err.Error()
	} else {
		d.Client, d.Config = i.Client.String(), i.Config
	}
	switch {
	case isSocket(i.DebugSocket()):
		d.Console = "socket"
	case i.VsockCID != 0 && d.PID != 0:
		d.Console = "vsock"
	}
	if d.Tasks == nil {
		d.Tasks = []containerDetails{}
	}
	for _, s := range i.Stages {
		d.Stages = append(d.Stages, stageDetails{s.Stage, s.Duration.Seconds()})
	}
	known := map[int]bool{}
	for _, p := range []struct {
		process *pod.Process
		role    string
	}{{i.Hypervisor, "hypervisor"}, {i.Virtiofsd, "virtiofsd"}} {
		if p.process != nil {
			d.Processes = append(d.Processes, processDetails{p.process.PID, p.role, string(p.process.Life())})
			known[p.process.PID] = true
		}
	}
	if leaf, err := cgroup.Load(i.CgroupParent, i.ID); err == nil {
		if pids, err := leaf.PIDs(); err == nil {
			for _, pid := range pids {
				if !known[pid] {
					d.Processes = append(d.Processes, processDetails{pid, "cgroup", string(pod.Alive)})
				}
			}
		}
	}
	return d
}

func isSocket(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.Mode().Type() == fs.ModeSocket
}

func inspect(c *call, _ *flag.FlagSet) func(context.Context, []string) error {
	return func(_ context.Context, args []string) error {
		i, err := c.pod(args[0])
		if err != nil {
			return err
		}
		d := details(i)
		if c.json() {
			return c.print(d)
		}
		rows := [][]string{}
		line := func(key, value string) {
			if value != "" && value != "0" {
				rows = append(rows, []string{key + ":", value})
			}
		}
		line("pod", d.ID)
		line("name", d.Namespace+"/"+d.Name)
		line("uid", d.UID)
		line("state", d.State)
		if d.State != d.JournalState {
			line("journal says", d.JournalState)
		}
		line("error", d.Error)
		line("reason", d.Reason)
		if !d.Created.IsZero() {
			line("created", d.Created.Local().Format(time.RFC3339)+" ("+age(d.Created)+" ago)")
		}
		if !d.Exited.IsZero() {
			line("exited", fmt.Sprintf("%s with status %d", d.Exited.Local().Format(time.RFC3339), d.ExitStatus))
		}
		line("client", d.Client)
		line("directory", d.Directory)
		line("network namespace", d.NetNS)
		line("cgroup parent", d.CgroupParent)
		line("task address", d.TaskAddress)
		line("vsock cid", strconv.FormatUint(uint64(d.VsockCID), 10))
		line("debug console", d.Console)
		line("console log", d.ConsoleLog)
		for _, p := range d.Processes {
			line("process", fmt.Sprintf("%d %s, %s", p.PID, p.Role, p.Life))
		}
		for _, t := range d.Tasks {
			for _, p := range t.Process {
				what := "container " + short(t.ID)
				if p.ExecID != "" {
					what = "exec " + short(p.ExecID) + " in " + short(t.ID)
				}
				status := p.Status
				if !p.Exited.IsZero() {
					status += fmt.Sprintf(" with exit code %d at %s", p.ExitCode, p.Exited.Local().Format(time.RFC3339))
				}
				line(what, status)
			}
		}
		for _, s := range d.Stages {
			line("boot: "+s.Stage, fmt.Sprintf("%.3f s", s.Seconds))
		}
		return table(c.out, rows)
	}
}
