package isulad

import (
	"bytes"
	"encoding/json"
	"maps"
	"slices"
)

// mount, process and task are Gen-B's description of a pod's containers. Keys that have no
// omitempty are always there in what iSulad writes, also when they are empty.
type mount struct {
	Type   string `json:"type,omitempty"`
	Source string `json:"source,omitempty"`
}

type process struct {
	ExecID string          `json:"exec_id"`
	Spec   json.RawMessage `json:"spec"`
	Stdin  string          `json:"stdin"`
	Stdout string          `json:"stdout"`
	Stderr string          `json:"stderr"`
}

type task struct {
	TaskID string          `json:"task_id"`
	Spec   json.RawMessage `json:"spec"`
	RootFS []mount         `json:"rootfs"`
	Stdin  string          `json:"stdin"`
	Stdout string          `json:"stdout"`
	Stderr string          `json:"stderr"`
	// Processes is absent until the first exec, and stays, possibly empty, from then on.
	Processes *[]process `json:"processes,omitempty"`
}

// snapshot writes the complete list of tasks as iSulad does: in ascending order of the ids,
// pretty-printed, without a final line break.
func snapshot(tasks map[string]*task) ([]byte, error) {
	list := struct {
		Tasks []*task `json:"tasks"`
	}{Tasks: []*task{}}
	for _, id := range slices.Sorted(maps.Keys(tasks)) {
		list.Tasks = append(list.Tasks, tasks[id])
	}
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "    ")
	if err := encoder.Encode(list); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(out.Bytes(), []byte("\n")), nil
}

// parseSnapshot is the reverse of snapshot.
func parseSnapshot(b []byte) (map[string]*task, error) {
	var list struct {
		Tasks []*task `json:"tasks"`
	}
	if err := json.Unmarshal(b, &list); err != nil {
		return nil, err
	}
	tasks := make(map[string]*task, len(list.Tasks))
	for _, t := range list.Tasks {
		tasks[t.TaskID] = t
	}
	return tasks, nil
}
