package isulad

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/cgroups/v3/cgroup1/stats"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"google.golang.org/protobuf/proto"
)

// A Size of a terminal, in characters.
type Size struct{ Width, Height uint32 }

// Result is how a process that ExecSync ran ended.
type Result struct {
	Stdout, Stderr string
	ExitCode       uint32
}

// ExecSync runs a command in a container to its end: without stdin and terminal, with stdout and
// stderr.
func (d *Daemon) ExecSync(id string, command ...string) (Result, error) {
	var out, errs bytes.Buffer
	code, err := d.Exec(id, ExecConfig{Args: command, Stdout: &out, Stderr: &errs})
	return Result{out.String(), errs.String(), code}, err
}

// resize hands on the sizes of a terminal until there are no more or the process has ended.
func resize(c *container, exec string, sizes <-chan Size, ended <-chan struct{}) {
	for {
		select {
		case size, more := <-sizes:
			if !more {
				return
			}
			// iSulad only logs that it fails.
			_, _ = c.task().ResizePty(context.Background(), &taskapi.ResizePtyRequest{
				ID: c.ID, ExecID: exec, Width: size.Width, Height: size.Height,
			})
		case <-ended:
			return
		}
	}
}

// running returns a container that is running as far as iSulad knows, with its connection.
func (d *Daemon) running(id string) (*container, error) {
	c, err := d.container(id)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !c.running || c.conn == nil {
		return nil, fmt.Errorf("container %s is not running", id)
	}
	return c, nil
}

// Pid returns the process id of a container's first process. It fails where iSulad's library would
// panic: the list of processes is empty.
func (d *Daemon) Pid(id string) (uint32, error) {
	c, err := d.running(id)
	if err != nil {
		return 0, err
	}
	answer, err := c.task().Pids(context.Background(), &taskapi.PidsRequest{ID: id})
	if err != nil {
		return 0, fmt.Errorf("cannot list the processes of container %s: %w", id, err)
	}
	if len(answer.Processes) == 0 {
		return 0, fmt.Errorf("the list of the processes of container %s is empty, at which iSulad dies", id)
	}
	return answer.Processes[0].Pid, nil
}

// Stats are what iSulad reads of a container's statistics. Sizes are in bytes, times in ns.
type Stats struct {
	Pids                            uint64
	CPUTotal, CPUKernel             uint64
	MemoryUsage, MemoryLimit, RSS   uint64
	PageFaults, MajorPageFaults     uint64
	KernelUsage, KernelLimit        uint64
	TotalInactiveFile               uint64
	SwapUsage, SwapLimit            uint64
	BlockReadBytes, BlockWriteBytes uint64
}

// Stats asks for a container's statistics. It fails where iSulad's library would panic: the answer is
// not one of cgroup v1.
func (d *Daemon) Stats(id string) (Stats, error) {
	c, err := d.running(id)
	if err != nil {
		return Stats{}, err
	}
	answer, err := c.task().Stats(context.Background(), &taskapi.StatsRequest{ID: id})
	if err != nil {
		return Stats{}, fmt.Errorf("cannot ask for the statistics of container %s: %w", id, err)
	}
	return parseStats(answer.GetStats().GetValue())
}

// parseStats takes the bytes for statistics of cgroup v1, whatever type they are said to be of.
func parseStats(b []byte) (Stats, error) {
	var m stats.Metrics
	if err := proto.Unmarshal(b, &m); err != nil {
		return Stats{}, fmt.Errorf("the statistics are none of cgroup v1, at which iSulad dies: %w", err)
	}
	// Those of cgroup v2 decode, too, but their fields are others.
	if len(m.ProtoReflect().GetUnknown()) > 0 || m.CPU == nil || m.Memory == nil {
		return Stats{}, errors.New("the statistics have no processor or memory where cgroup v1 has them")
	}
	s := Stats{
		Pids:     m.GetPids().GetCurrent(),
		CPUTotal: m.GetCPU().GetUsage().GetTotal(), CPUKernel: m.GetCPU().GetUsage().GetKernel(),
		MemoryUsage: m.GetMemory().GetUsage().GetUsage(), MemoryLimit: m.GetMemory().GetUsage().GetLimit(),
		RSS: m.GetMemory().GetRSS(), PageFaults: m.GetMemory().GetPgFault(), MajorPageFaults: m.GetMemory().GetPgMajFault(),
		KernelUsage: m.GetMemory().GetKernel().GetUsage(), KernelLimit: m.GetMemory().GetKernel().GetLimit(),
		TotalInactiveFile: m.GetMemory().GetTotalInactiveFile(),
		SwapUsage:         m.GetMemory().GetSwap().GetUsage(), SwapLimit: m.GetMemory().GetSwap().GetLimit(),
	}
	for _, entry := range m.GetBlkio().GetIoServiceBytesRecursive() {
		if entry.GetOp() == "read" {
			s.BlockReadBytes += entry.GetValue()
		} else {
			s.BlockWriteBytes += entry.GetValue()
		}
	}
	return s, nil
}

// Pause freezes a container's processes, Resume thaws them.
func (d *Daemon) Pause(id string) error {
	c, err := d.running(id)
	if err == nil {
		_, err = c.task().Pause(context.Background(), &taskapi.PauseRequest{ID: id})
	}
	return err
}

// Resume is the reverse of Pause.
func (d *Daemon) Resume(id string) error {
	c, err := d.running(id)
	if err == nil {
		_, err = c.task().Resume(context.Background(), &taskapi.ResumeRequest{ID: id})
	}
	return err
}

// TaskStatus asks the task service for the state of a container.
func (d *Daemon) TaskStatus(id string) (tasktypes.Status, error) {
	c, err := d.running(id)
	if err != nil {
		return tasktypes.Status_UNKNOWN, err
	}
	answer, err := c.task().State(context.Background(), &taskapi.StateRequest{ID: id})
	return answer.GetStatus(), err
}

// Alive says whether the task service takes a signal 0 for a container: by that iSulad tells whether
// its first process lives.
func (d *Daemon) Alive(id string) bool {
	c, err := d.container(id)
	if err != nil {
		return false
	}
	d.mu.Lock()
	conn := c.conn
	d.mu.Unlock()
	if conn == nil {
		return false
	}
	_, err = c.task().Kill(context.Background(), &taskapi.KillRequest{ID: id})
	return err == nil
}

// killContainers ends the containers of a pod that still run, as before a pod is stopped.
func (d *Daemon) killContainers(p *pod) error {
	var errs []error
	d.mu.Lock()
	var ids []string
	for id, c := range d.containers {
		if c.pod == p && c.running {
			ids = append(ids, id)
		}
	}
	d.mu.Unlock()
	for _, id := range ids {
		errs = append(errs, d.StopContainer(context.Background(), id, 0))
	}
	return errors.Join(errs...)
}

// killWait is how long iSulad waits for a container that it has sent SIGKILL.
const killWait = 90 * time.Second
