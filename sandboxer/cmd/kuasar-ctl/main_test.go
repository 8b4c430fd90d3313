package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"kuasar.io/kuasar/sandboxer/container"
	"kuasar.io/kuasar/sandboxer/pod"
)

// shipped is where the package takes its files from.
const shipped = "../../../defaults"

// ctl runs a command line and returns what it says.
func ctl(t *testing.T, args ...string) (out, errs string, status int) {
	t.Helper()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	var o, e bytes.Buffer
	status = run(t.Context(), args, streams{null, &o, &e})
	return o.String(), e.String(), status
}

// state makes the state directory of a pod that was ready; fields replaces parts of its journal.
func state(t *testing.T, base, id string, fields map[string]any) string {
	t.Helper()
	boot, err := pod.BootID()
	if err != nil {
		t.Fatal(err)
	}
	started, err := pod.StartTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	journal := map[string]any{
		"schema": 1, "boot_id": boot, "id": id, "state": "ready", "created_at": time.Unix(1e9, 0),
		"config":  map[string]any{"metadata": map[string]any{"name": "name-" + id, "namespace": "space", "uid": "u", "attempt": 1}},
		"machine": map[string]any{"PID": os.Getpid(), "Saved": map[string]any{"start_time": started}},
	}
	for k, v := range fields {
		journal[k] = v
	}
	text, err := json.Marshal(journal)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(base, id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "sandbox.json"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestUsage(t *testing.T) {
	dir := t.TempDir()
	for _, args := range [][]string{
		{}, {"nonsense"}, {"inspect"}, {"inspect", "a", "b"}, {"list", "x"}, {"list", "--nonsense"}, {"-o", "xml", "list"},
		{"gc"}, {"gc", "--dry-run", "--yes"}, {"setup", "docker"}, {"setup"}, {"completion", "fish"}, {"--nonsense"},
		{"console", "-o", "json", "x"}, {"console", "-e", "x", "x"}, {"logs", "-n", "-2", "x"}, {"logs", "-n", "x", "x"}, {"inspect", ""},
		{"completion", "bash", "-o", "json"},
	} {
		if out, errs, status := ctl(t, append([]string{"--dir", dir}, args...)...); status != exitUsage || out != "" || errs == "" {
			t.Errorf("%q: status %d, %q, %q", args, status, out, errs)
		}
	}
	for _, args := range [][]string{{"--help"}, {"help"}, {"help", "gc"}, {"gc", "-h"}, {"--version"}, {"version"}} {
		if out, errs, status := ctl(t, args...); status != 0 || out == "" || errs != "" {
			t.Errorf("%q: status %d, %q, %q", args, status, out, errs)
		}
	}
}

func TestFlagsAnywhere(t *testing.T) {
	base := t.TempDir()
	state(t, base, "abc", nil)
	want, _, _ := ctl(t, "--dir", base, "-o", "json", "inspect", "abc")
	for _, args := range [][]string{
		{"inspect", "abc", "--dir", base, "-o", "json"}, {"inspect", "-o=json", "abc", "-dir=" + base}, {"--dir=" + base, "inspect", "-o", "json", "--", "abc"},
		{"-o", "text", "inspect", "-o", "json", "--dir", base, "a"},
	} {
		if got, errs, status := ctl(t, args...); got != want || status != 0 {
			t.Errorf("%q: status %d, %q", args, status, errs)
		}
	}
	if _, errs, status := ctl(t, "--dir", base, "inspect", "--", "-o"); status != exitFailed || !strings.Contains(errs, `"-o"`) {
		t.Errorf("an id behind --: status %d, %s", status, errs)
	}
}

func TestList(t *testing.T) {
	base := t.TempDir()
	dead := map[string]any{"PID": os.Getpid(), "Saved": map[string]any{"start_time": 1}}
	state(t, base, "ready", nil)
	state(t, base, "dead", map[string]any{"machine": dead, "created_at": time.Unix(1e9+1, 0)})
	state(t, base, "stale", map[string]any{"boot_id": "x", "created_at": time.Unix(1e9+2, 0)})
	state(t, base, "stopped", map[string]any{"state": "stopped", "machine": nil, "created_at": time.Unix(1e9+3, 0)})
	state(t, base, "broken", map[string]any{"schema": "x"})
	out, errs, status := ctl(t, "--dir", base, "list", "-o", "json")
	var got []podSummary
	if err := json.Unmarshal([]byte(out), &got); err != nil || status != 0 || errs != "" {
		t.Fatalf("status %d, %s, %v", status, errs, err)
	}
	states := ""
	for _, s := range got {
		states += s.ID + "=" + s.State + " "
		if (s.PID == os.Getpid()) != (s.State == "ready") {
			t.Errorf("%s has the hypervisor %d", s.ID, s.PID)
		}
	}
	// The one without a readable time comes first.
	if states != "broken=unreadable ready=ready dead=dead stale=stale stopped=stopped " {
		t.Errorf("%s", states)
	}
	if s := got[1]; s.Name != "name-ready" || s.Namespace != "space" || s.UID != "u" || s.Attempt != 1 || !s.Created.Equal(time.Unix(1e9, 0)) {
		t.Errorf("%+v", s)
	}
	out, errs, _ = ctl(t, "--dir", base, "list")
	if strings.Count(out, "\n") != 6 || !strings.Contains(errs, "No vmm-sandboxer runs") {
		t.Errorf("%s%s", out, errs)
	}
	if out, _, _ := ctl(t, "--dir", base, "list", "-q"); out != "broken\nready\ndead\nstale\nstopped\n" {
		t.Errorf("ids %q", out)
	}
	if out, _, _ := ctl(t, "--dir", t.TempDir(), "list", "-o", "json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("no pods: %q", out)
	}
}

func TestInspectNamesTheClient(t *testing.T) {
	base := t.TempDir()
	state(t, base, "a", map[string]any{"client": pod.ISulad213, "address": "vsock://7:1024"})
	state(t, base, "b", nil)
	out, _, _ := ctl(t, "--dir", base, "inspect", "a")
	for _, want := range []string{"iSulad 2.1.3 to 2.1.5", "vsock://7:1024"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in %s", want, out)
		}
	}
	for id, want := range map[string]string{"a": "iSulad 2.1.3 to 2.1.5", "b": "containerd"} {
		var got podDetails
		out, _, _ := ctl(t, "--dir", base, "-o", "json", "inspect", id)
		if err := json.Unmarshal([]byte(out), &got); err != nil || got.Client != want {
			t.Errorf("%s: client %q, %v", id, got.Client, err)
		}
	}
}

func TestPrefix(t *testing.T) {
	base := t.TempDir()
	for _, id := range []string{"abc1", "abc2", "abc", "xyz"} {
		state(t, base, id, nil)
	}
	for prefix, want := range map[string]string{"x": "xyz", "abc1": "abc1", "abc": "abc"} {
		out, errs, _ := ctl(t, "--dir", base, "-o", "json", "inspect", prefix)
		var got podDetails
		if err := json.Unmarshal([]byte(out), &got); err != nil || got.ID != want {
			t.Errorf("%s: %s, %s", prefix, got.ID, errs)
		}
	}
	if _, errs, status := ctl(t, "--dir", base, "inspect", "ab"); status != exitFailed || !strings.Contains(errs, "abc1 space/name-abc1") || !strings.Contains(errs, "abc2") || strings.Contains(errs, "xyz") {
		t.Errorf("ambiguous: status %d, %s", status, errs)
	}
	if _, errs, status := ctl(t, "--dir", base, "inspect", "q"); status != exitFailed || !strings.Contains(errs, `"q"`) {
		t.Errorf("unknown: status %d, %s", status, errs)
	}
}

// The containers' records are read as package container writes them.
func TestContainerRecords(t *testing.T) {
	at := time.Unix(1e9, 0).UTC()
	records := []container.Record{{
		ID: "c1", Bundle: "/b", OOMKills: 3,
		Processes: []container.ProcessRecord{
			{Status: container.Running}, {ExecID: "e1", Status: container.Stopped, Exit: container.Exit{Status: 7, At: at}},
			{ExecID: "e2", Status: container.Created}, {ExecID: "e3", Status: container.Paused},
			{ExecID: "e4", Status: container.Stopped, Deleted: true},
		},
	}, {ID: "c2", Processes: []container.ProcessRecord{{Status: container.Stopped, Deleted: true}}}}
	text, err := json.Marshal(records)
	if err != nil {
		t.Fatal(err)
	}
	got := containersOf(&pod.Inspection{Containers: text})
	want := []containerDetails{{ID: "c1", Bundle: "/b", OOMKills: 3, Process: []processOutcome{
		{Status: "running"}, {ExecID: "e1", Status: "stopped", ExitCode: 7, Exited: at}, {ExecID: "e2", Status: "created"}, {ExecID: "e3", Status: "paused"},
	}}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v", got)
	}
	for s := container.Created; s <= container.Stopped; s++ {
		if name := strings.ToLower(s.String()); processStates[s] != name {
			t.Errorf("%s is called %s", name, processStates[s])
		}
	}
}

func TestMetrics(t *testing.T) {
	base := t.TempDir()
	if _, errs, status := ctl(t, "--dir", base, "metrics"); status != exitFailed || !strings.Contains(errs, "systemctl start kuasar-vmm") {
		t.Errorf("without a daemon: status %d, %s", status, errs)
	}
	l, err := net.Listen("unix", filepath.Join(base, metricsSocket))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	text := "# HELP a b\na 1\nb{x=\"1,\\\"}\",y=\"2\"} 2.5\nc{le=\"+Inf\"} 3\n"
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(conn, text)
			conn.Close()
		}
	}()
	if out, _, _ := ctl(t, "--dir", base, "metrics"); out != text {
		t.Errorf("%q", out)
	}
	out, _, _ := ctl(t, "--dir", base, "-o", "json", "metrics")
	var got []sample
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatal(err)
	}
	want := []sample{{"a", map[string]string{}, 1}, {"b", map[string]string{"x": `1,"}`, "y": "2"}, 2.5}, {"c", map[string]string{"le": "+Inf"}, 3}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
}

func TestSetupCommand(t *testing.T) {
	path := filepath.Join(t.TempDir(), "daemon.json")
	if err := os.WriteFile(path, []byte("{\n  \"a\": 1\n}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"setup", "isulad", "--config", path, "--listen", "unix:///s", "-o", "json"}
	step := func(extra ...string) setupResult {
		t.Helper()
		out, errs, status := ctl(t, append(args, extra...)...)
		var r setupResult
		if err := json.Unmarshal([]byte(out), &r); err != nil || status != 0 {
			t.Fatalf("status %d, %s, %v", status, errs, err)
		}
		return r
	}
	if r := step("--dry-run"); !r.Changed || !r.DryRun || len(r.Files) != 1 || r.Files[0].Backup != "" || !strings.Contains(r.Files[0].Diff, `"/s"`) {
		t.Errorf("%+v", r)
	}
	r := step()
	if !r.Changed || r.DryRun || len(r.Files) != 1 || r.Next[0] != "systemctl restart isulad" {
		t.Errorf("%+v", r)
	} else if b, err := os.ReadFile(r.Files[0].Backup); err != nil || string(b) != "{\n  \"a\": 1\n}\n" {
		t.Errorf("backup %q, %v", b, err)
	}
	if r := step(); r.Changed || len(r.Files)+len(r.Next) != 0 {
		t.Errorf("%+v", r)
	}
	if _, errs, status := ctl(t, "setup", "isulad", "--config", path, "--listen", "/other"); status != exitFailed || !strings.Contains(errs, "cri-sandboxers.vmm") {
		t.Errorf("a conflict: status %d, %s", status, errs)
	}
}

// The script that is shipped is the one that the table of commands makes.
func TestCompletionIsShipped(t *testing.T) {
	path := filepath.Join(shipped, "kuasar-ctl.bash")
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want, bashCompletion()) {
		t.Errorf("%s is out of date: go run ./sandboxer/cmd/kuasar-ctl completion bash > defaults/kuasar-ctl.bash", path)
	}
}

func TestCompletionInBash(t *testing.T) {
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("no bash is installed:", err)
	}
	// Pods are completed by calling the command, which here is a function.
	script := `kuasar-ctl() { echo "$*" > "$CALLED"; printf 'pod1\npod2\n'; }
. "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _kuasar_ctl; printf '%s ' "${COMPREPLY[@]}"`
	called := filepath.Join(t.TempDir(), "called")
	for _, test := range []struct{ line, want, called string }{
		{"kuasar-ctl ins", "inspect", ""},
		{"kuasar-ctl setup ", "isulad containerd", ""},
		{"kuasar-ctl setup con", "containerd", ""},
		{"kuasar-ctl setup isulad ", "", ""},
		{"kuasar-ctl gc --", "--dir --dry-run --records --yes --help", ""},
		{"kuasar-ctl -o ", "text json", ""},
		{"kuasar-ctl list -o j", "json", ""},
		{"kuasar-ctl logs ", "pod1 pod2", "list -q"},
		{"kuasar-ctl logs -n 5 ", "pod1 pod2", "list -q"},
		{"kuasar-ctl logs -n ", "", ""},
		{"kuasar-ctl --dir /x console pod2", "pod2", "--dir /x list -q"},
		{"kuasar-ctl setup --handler ", "", ""},
		{"kuasar-ctl completion ", "bash", ""},
		{"kuasar-ctl help ver", "version", ""},
	} {
		_ = os.Remove(called)
		words := strings.Split(test.line, " ")
		cmd := exec.Command(bash, append([]string{"-c", script, "bash", filepath.Join(shipped, "kuasar-ctl.bash")}, words...)...)
		cmd.Env = append(os.Environ(), "CALLED="+called)
		out, err := cmd.CombinedOutput()
		got, _ := os.ReadFile(called)
		if err != nil || strings.TrimSpace(string(out)) != test.want || strings.TrimSpace(string(got)) != test.called {
			t.Errorf("%q: %q, called with %q, %v", test.line, out, got, err)
		}
	}
}

// manual is the text of the manual page without its markup.
func manual(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(shipped, "man/kuasar-ctl.1"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.NewReplacer(`\-`, "-", `\e`, `\`).Replace(string(text))
}

// section is what the manual says of a command.
func section(t *testing.T, name string) string {
	t.Helper()
	for s := range strings.SplitSeq(manual(t), "\n.SS ") {
		if first, _, _ := strings.Cut(s, "\n"); first == name || strings.HasPrefix(first, name+" ") {
			return s
		}
	}
	t.Fatalf("the manual has no section on %s", name)
	return ""
}

func TestManualHasEverything(t *testing.T) {
	for _, cmd := range commands() {
		text := section(t, cmd.name)
		f, _ := cmd.flags(&call{})
		f.VisitAll(func(fl *flag.Flag) {
			if fl.Name != "dir" && fl.Name != "o" && !strings.Contains(text, dashes(fl.Name)) {
				t.Errorf("the manual does not have %s of %s", dashes(fl.Name), cmd.name)
			}
		})
	}
	for name, value := range map[string]any{
		"check": checkResult{}, "setup": setupResult{}, "list": podSummary{}, "inspect": podDetails{}, "logs": logLine{},
		"gc": gcResult{}, "metrics": sample{}, "version": versionResult{},
	} {
		text := section(t, name)
		if name == "inspect" {
			text += section(t, "list")
		}
		names(reflect.TypeOf(value), func(field string) {
			if !strings.Contains(text, field) {
				t.Errorf("the manual does not promise %q in the JSON of %s", field, name)
			}
		})
	}
}

// names calls seen with the name in JSON of every field.
func names(t reflect.Type, seen func(string)) {
	switch t.Kind() {
	case reflect.Slice, reflect.Pointer:
		names(t.Elem(), seen)
	case reflect.Struct:
		if t == reflect.TypeFor[time.Time]() {
			return
		}
		for f := range t.Fields() {
			if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); name != "" {
				seen(name)
			}
			names(f.Type, seen)
		}
	}
}
