package controller

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/anypb"

	"kuasar.io/kuasar/sandboxer/container"
)

// Bounds of a snapshot: its JSON in bytes, how deep that nests, and how many containers and how many
// processes, of all containers together, it may list. A pod has a handful of containers, but iSulad lists
// those that ended by themselves, with their specs, for as long as the pod lives: a container that is
// restarted every five minutes adds 288 a day.
const (
	maxSnapshot  = 32 << 20
	maxNesting   = 64
	maxTasks     = 32 << 10
	maxProcesses = 8192
	maxMounts    = 128 // of a rootfs
	maxOptions   = 256 // of a mount
)

// task is a container as a client announces it, with the processes in it besides its first.
type task struct {
	container.CreateRequest
	processes []container.ExecRequest
}

// snapshot decodes the complete list of a pod's containers. Every key may be missing; but what is
// listed needs an id. The result is not nil.
func snapshot(extension *anypb.Any) ([]task, error) {
	if extension == nil {
		return nil, fmt.Errorf("the field mask has %s, and sandbox.extensions has no tasks: %w", tasksField, errdefs.ErrInvalidArgument)
	}
	tasks, err := decodeSnapshot(extension.GetValue())
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", tasksField, err, errdefs.ErrInvalidArgument)
	}
	return tasks, nil
}

func decodeSnapshot(text []byte) ([]task, error) {
	if len(text) > maxSnapshot {
		return nil, fmt.Errorf("the JSON has %d bytes, more than %d", len(text), maxSnapshot)
	}
	// Before anything that recurses sees it.
	if err := checkNesting(text); err != nil {
		return nil, err
	}
	if !utf8.Valid(text) {
		return nil, errors.New("the JSON is not UTF-8")
	}
	var all struct {
		Tasks json.RawMessage `json:"tasks"`
	}
	if err := json.Unmarshal(text, &all); err != nil {
		return nil, jsonError(err)
	}
	tasks := []task{}
	seen := map[string]bool{}
	processes := 0
	err := eachOf("tasks", all.Tasks, maxTasks, func(raw json.RawMessage) error {
		t, err := decodeTask(raw, maxProcesses-processes)
		if err != nil {
			return err
		}
		if seen[t.ID] {
			return fmt.Errorf("container %s is listed twice", t.ID)
		}
		seen[t.ID] = true
		processes += len(t.processes)
		tasks = append(tasks, t)
		return nil
	})
	return tasks, err
}

// decodeTask decodes a container with at most the given number of processes.
func decodeTask(raw json.RawMessage, processes int) (task, error) {
	var j struct {
		ID                    string          `json:"task_id"`
		Spec                  json.RawMessage `json:"spec"`
		Rootfs                json.RawMessage `json:"rootfs"`
		Stdin, Stdout, Stderr string
		Processes             json.RawMessage `json:"processes"`
	}
	if err := json.Unmarshal(raw, &j); err != nil {
		return task{}, jsonError(err)
	}
	if err := container.CheckID("task_id", j.ID); err != nil {
		return task{}, err
	}
	fail := func(err error) (task, error) { return task{}, fmt.Errorf("container %s: %w", j.ID, err) }
	if err := checkSpec(j.Spec); err != nil {
		return fail(err)
	}
	var spec struct {
		Process struct{ Terminal bool } `json:"process"`
	}
	if err := unmarshalSpec(j.Spec, &spec); err != nil {
		return fail(err)
	}
	t := task{CreateRequest: container.CreateRequest{
		ID: j.ID, Spec: present(j.Spec),
		IO: container.IO{Stdin: j.Stdin, Stdout: j.Stdout, Stderr: j.Stderr, Terminal: spec.Process.Terminal},
	}}
	err := eachOf("rootfs", j.Rootfs, maxMounts, func(raw json.RawMessage) error {
		var m struct {
			Type, Source string
			Options      json.RawMessage
		}
		if err := json.Unmarshal(raw, &m); err != nil {
			return jsonError(err)
		}
		mount := container.Mount{Type: m.Type, Source: m.Source}
		err := eachOf("options", m.Options, maxOptions, func(raw json.RawMessage) error {
			var option string
			if err := json.Unmarshal(raw, &option); err != nil {
				return jsonError(err)
			}
			mount.Options = append(mount.Options, option)
			return nil
		})
		t.Rootfs = append(t.Rootfs, mount)
		return err
	})
	if err != nil {
		return fail(err)
	}
	seen := map[string]bool{}
	err = eachOf("processes", j.Processes, processes, func(raw json.RawMessage) error {
		p, err := decodeProcess(j.ID, raw)
		if err != nil {
			return err
		}
		if seen[p.ExecID] {
			return fmt.Errorf("process %s is listed twice", p.ExecID)
		}
		seen[p.ExecID] = true
		t.processes = append(t.processes, p)
		return nil
	})
	if err != nil {
		return fail(err)
	}
	return t, nil
}

func decodeProcess(id string, raw json.RawMessage) (container.ExecRequest, error) {
	var j struct {
		ExecID                string          `json:"exec_id"`
		Spec                  json.RawMessage `json:"spec"`
		Stdin, Stdout, Stderr string
	}
	if err := json.Unmarshal(raw, &j); err != nil {
		return container.ExecRequest{}, jsonError(err)
	}
	if err := container.CheckID("exec_id", j.ExecID); err != nil {
		return container.ExecRequest{}, err
	}
	if err := checkSpec(j.Spec); err != nil {
		return container.ExecRequest{}, fmt.Errorf("process %s: %w", j.ExecID, err)
	}
	var spec struct{ Terminal bool }
	if err := unmarshalSpec(j.Spec, &spec); err != nil {
		return container.ExecRequest{}, fmt.Errorf("process %s: %w", j.ExecID, err)
	}
	return container.ExecRequest{
		ID: id, ExecID: j.ExecID, Spec: present(j.Spec),
		IO: container.IO{Stdin: j.Stdin, Stdout: j.Stdout, Stderr: j.Stderr, Terminal: spec.Terminal},
	}, nil
}

// eachOf calls do for the elements of a JSON array, at most limit; a missing one and null have none.
// Elements are decoded one by one, so that the limit holds before memory is taken for all.
func eachOf(key string, array json.RawMessage, limit int, do func(json.RawMessage) error) error {
	if present(array) == nil {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(array))
	if open, err := d.Token(); err != nil || open != json.Delim('[') {
		return fmt.Errorf("%s is not an array", key)
	}
	for n := 0; d.More(); n++ {
		if n == limit {
			return fmt.Errorf("%s has more than %d elements", key, limit)
		}
		var raw json.RawMessage
		if err := d.Decode(&raw); err != nil {
			return jsonError(err)
		}
		if err := do(raw); err != nil {
			return fmt.Errorf("%s[%d]: %w", key, n, err)
		}
	}
	return nil
}

// present is nil for what is missing or null.
func present(raw json.RawMessage) []byte {
	if text := bytes.TrimSpace(raw); len(text) > 0 && string(text) != "null" {
		return raw
	}
	return nil
}

// checkSpec checks that a spec, unless it is missing, is a JSON object that does not nest too deep.
// What it says is for the pod to judge.
func checkSpec(spec []byte) error {
	if present(spec) == nil {
		return nil
	}
	err := checkNesting(spec)
	if err == nil && (!json.Valid(spec) || bytes.TrimSpace(spec)[0] != '{') {
		err = errors.New("it is not a JSON object")
	}
	if err != nil {
		return fmt.Errorf("spec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// unmarshalSpec decodes the few keys of a spec that matter here.
func unmarshalSpec(spec []byte, into any) error {
	if present(spec) == nil {
		return nil
	}
	if err := json.Unmarshal(spec, into); err != nil {
		return fmt.Errorf("spec: %w", jsonError(err))
	}
	return nil
}

// checkNesting refuses JSON that nests deeper than maxNesting. It tells nothing else of its form.
func checkNesting(text []byte) error {
	depth, quoted := 0, false
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			if depth++; depth > maxNesting {
				return fmt.Errorf("the JSON nests deeper than %d levels, at byte %d", maxNesting, i)
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	return nil
}

// jsonError tells where the text is wrong, as far as that is known.
func jsonError(err error) error {
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		return fmt.Errorf("cannot decode the JSON at byte %d: %w", syntax.Offset, err)
	}
	return fmt.Errorf("cannot decode the JSON: %w", err)
}
