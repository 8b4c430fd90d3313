package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"kuasar.io/kuasar/ci/e2e/node"
)

// pods measures the life of a pod through CRI.
func (m *measurer) pods(ctx context.Context, r *report) error {
	var total, hello, beyond, container, exec []float64
	perStage := map[string][]float64{}
	for range runs {
		config := m.podConfig()
		began := time.Now()
		pod, err := m.node.CRI.RunPod(ctx, config, node.Handler)
		if err != nil {
			return err
		}
		took := milliseconds(time.Since(began))
		stages, err := m.stages(pod)
		if err != nil {
			return err
		}
		boot := stages["hypervisor"] + stages["agent hello"]
		for name, took := range stages {
			perStage[name] = append(perStage[name], took)
		}
		total, hello, beyond = append(total, took), append(hello, boot), append(beyond, took-boot)
		if m.commandLine == nil {
			if _, m.commandLine, err = m.sandboxer.VMM(pod); err != nil {
				return err
			}
			r.Accelerator = m.accelerator()
		}

		// The first container warms the guest: its pages, and under TCG its translated code.
		if _, err := m.container(ctx, pod, config); err != nil {
			return err
		}
		began = time.Now()
		id, err := m.container(ctx, pod, config)
		if err != nil {
			return err
		}
		container = append(container, milliseconds(time.Since(began)))

		for try := range 4 {
			began = time.Now()
			result, err := m.node.CRI.Exec(ctx, id, "true")
			if err != nil {
				return err
			}
			if result.ExitCode != 0 {
				return fmt.Errorf("exec of true ended with %+v", result)
			}
			if try > 0 { // the first is the guest's first
				exec = append(exec, milliseconds(time.Since(began)))
			}
		}
		if err := m.node.CRI.RemovePod(ctx, pod); err != nil {
			return err
		}
	}
	r.add(
		row{Measure: "boot: exec of the hypervisor to the agent's hello", Unit: "ms", Result: median(hello),
			Samples: perStage},
		row{Measure: "RunPodSandbox with CNI, beyond that boot", Unit: "ms", Result: median(beyond), Limit: 150,
			Samples: map[string][]float64{"total": total, "beyond": beyond}, Detail: fmt.Sprintf("in all %.0f ms; share %.0f, network %.0f, guest setup %.0f ms",
				median(total), median(perStage["share"]), median(perStage["network"]), median(perStage["guest setup"]))},
		row{Measure: "create + start of a second container", Unit: "ms", Result: median(container), Limit: 450,
			Samples: map[string][]float64{"container": container}},
		row{Measure: "exec round trip of true", Unit: "ms", Result: median(exec), Limit: 300,
			Samples: map[string][]float64{"exec": exec}},
	)
	return nil
}

// stages is how long the stages of a pod's boot took, in milliseconds, from the sandboxer's own
// journal. Those from the exec of the hypervisor to the agent's hello are among them.
func (m *measurer) stages(pod string) (map[string]float64, error) {
	data, err := os.ReadFile(filepath.Join(m.sandboxer.Dir, pod, "sandbox.json"))
	if err != nil {
		return nil, err
	}
	var journal struct {
		Stages []struct {
			Stage    string        `json:"stage"`
			Duration time.Duration `json:"duration_ns"`
		} `json:"stages"`
	}
	if err := json.Unmarshal(data, &journal); err != nil {
		return nil, fmt.Errorf("cannot read the journal of pod %s: %w", pod, err)
	}
	stages := map[string]float64{}
	for _, stage := range journal.Stages {
		stages[stage.Stage] = milliseconds(stage.Duration)
	}
	for _, needed := range []string{"hypervisor", "agent hello"} {
		if stages[needed] == 0 {
			return nil, fmt.Errorf("the journal of pod %s has no time of the stage %q: %+v", pod, needed, journal.Stages)
		}
	}
	return stages, nil
}

// option returns the value of an option on the machine's command line.
func (m *measurer) option(name string) string {
	if at := slices.Index(m.commandLine, name); at >= 0 && at+1 < len(m.commandLine) {
		return m.commandLine[at+1]
	}
	return ""
}

func (m *measurer) accelerator() string {
	accelerator, _, _ := strings.Cut(m.option("-accel"), ",")
	if accelerator == "" {
		for part := range strings.SplitSeq(m.option("-machine"), ",") {
			if value, found := strings.CutPrefix(part, "accel="); found {
				accelerator = value
			}
		}
	}
	return accelerator
}
