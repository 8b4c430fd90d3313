// Bench measures what the appliance promises to be: how fast a pod starts, how small it is. It
// prints a table of medians beside what they must reach, and keeps every sample in out/bench/.
// "go tool mage bench" builds what it needs and runs it in ci/e2e. Arguments, if any, name the parts
// to run: pods, memory, boots, builds.
//
// What is compared is compared in the same run, one sample of each in turn, so that whatever else
// the machine does meets both.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"text/tabwriter"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/ci/e2e/census"
	"kuasar.io/kuasar/ci/e2e/image"
	"kuasar.io/kuasar/ci/e2e/node"
)

// runs is how often each thing is measured.
const runs = 7

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	if err := bench(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "The benchmark failed:", err)
		os.Exit(1)
	}
}

// row is a line of the table.
type row struct {
	Measure string
	// Samples are in Unit, in the order in which they were taken.
	Samples map[string][]float64
	Unit    string
	// Result is what is compared with Limit, in Unit; no limit if that is 0.
	Result, Limit float64
	Detail        string
}

// report collects the table.
type report struct {
	Time        time.Time
	Cores       int
	Memory      string
	Accelerator string
	Rows        []row
}

func (r *report) add(rows ...row) {
	for _, row := range rows {
		fmt.Printf("   %s: %s\n", row.Measure, row.result())
	}
	r.Rows = append(r.Rows, rows...)
}

func (r row) result() string {
	if r.Unit == "×" {
		return fmt.Sprintf("%.2f×", r.Result)
	}
	return fmt.Sprintf("%.4g %s", r.Result, r.Unit)
}

func median(samples []float64) float64 {
	sorted := slices.Sorted(slices.Values(samples))
	if len(sorted)%2 == 1 {
		return sorted[len(sorted)/2]
	}
	return (sorted[len(sorted)/2-1] + sorted[len(sorted)/2]) / 2
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func bench(ctx context.Context) (err error) {
	root, err := filepath.Abs("../..")
	if err != nil {
		return err
	}
	if err := census.Adopt(); err != nil {
		return err
	}
	config := node.Config{
		Root:      root,
		Sandboxer: filepath.Join(root, "out", "bin", "vmm-sandboxer"),
		Kernel:    filepath.Join(root, "out", "vmlinux.bin"),
		Initrd:    filepath.Join(root, "out", "kuasar.initrd"),
		Progress:  os.Stdout,
	}
	n, err := node.Start(ctx, config)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Close()) }()
	// As it is shipped: no debugging.
	sandboxer, err := n.StartSandboxer(ctx, node.Plugin, node.Settings{
		"kernel_params": `"task.log_level=info task.sharefs_type=virtiofs"`, "log_level": `"info"`, "debug": "false",
	})
	if err != nil {
		return err
	}
	m := &measurer{node: n, sandboxer: sandboxer, config: config}
	r := &report{Time: time.Now(), Cores: runtime.NumCPU(), Memory: memory()}
	for _, part := range []struct {
		name, title string
		run         func(context.Context, *report) error
	}{
		{"pods", "pods: start, containers, exec", m.pods},
		{"memory", "memory", m.memory},
		{"boots", "boots with two kernels", m.boots},
		{"builds", "builds", m.builds},
	} {
		if len(os.Args) > 1 && !slices.Contains(os.Args[1:], part.name) {
			continue
		}
		fmt.Printf("measuring %s\n", part.title)
		if err := part.run(ctx, r); err != nil {
			return fmt.Errorf("measuring %s: %w", part.title, err)
		}
	}
	path, err := r.keep(filepath.Join(root, "out", "bench"))
	if err != nil {
		return err
	}
	r.print()
	fmt.Println("samples:", path)
	return nil
}

func memory() string {
	var info syscall.Sysinfo_t
	if syscall.Sysinfo(&info) != nil {
		return "unknown"
	}
	return fmt.Sprintf("%d GiB", uint64(info.Totalram)*uint64(info.Unit)>>30)
}

// keep writes the report and returns where.
func (r *report) keep(dir string) (string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	data, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, r.Time.UTC().Format("20060102T150405Z")+".json")
	return path, os.WriteFile(path, append(data, '\n'), 0o644)
}

func (r *report) print() {
	fmt.Printf("\n%d cores, %s, accelerator %s; medians of at least %d runs\n\n", r.Cores, r.Memory, r.Accelerator, min(runs, 5))
	out := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(out, "measure\tresult\tmust reach\t\t")
	for _, row := range r.Rows {
		limit, verdict := "", ""
		if row.Limit > 0 {
			of := row
			of.Result = row.Limit
			limit, verdict = "≤ "+of.result(), "ok"
			if row.Result > row.Limit {
				verdict = "MISSED"
			}
		}
		fmt.Fprintf(out, "%s\t%s\t%s\t%s\t%s\n", row.Measure, row.result(), limit, verdict, row.Detail)
	}
	out.Flush()
}

// measurer holds what the measurements need.
type measurer struct {
	node      *node.Node
	sandboxer *node.Sandboxer
	config    node.Config
	made      int

	// Of a pod that ran: how its machine was started.
	commandLine []string
}

// podConfig returns the configuration of a new pod.
func (m *measurer) podConfig() *runtimeapi.PodSandboxConfig {
	m.made++
	name := fmt.Sprint("bench-", m.made)
	return &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: name},
		LogDirectory: filepath.Join(m.node.Dir, "logs"),
		Linux:        &runtimeapi.LinuxPodSandboxConfig{},
	}
}

func (m *measurer) container(ctx context.Context, pod string, config *runtimeapi.PodSandboxConfig) (string, error) {
	m.made++
	name := fmt.Sprint("c", m.made)
	id, err := m.node.CRI.Create(ctx, pod, config, &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: image.Name},
		Command:  []string{"sleep", "100000"},
		LogPath:  name + ".log",
		Linux:    &runtimeapi.LinuxContainerConfig{},
	})
	if err != nil {
		return "", err
	}
	return id, m.node.CRI.Start(ctx, id)
}
