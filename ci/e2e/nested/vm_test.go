package nested

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// machineOf is a run of a shell script in the place of the emulator. It knows the files as $console and
// $transcript.
func machineOf(t *testing.T, script string) (*vm, *bytes.Buffer) {
	t.Helper()
	dir := t.TempDir()
	for name, file := range map[string]string{"console": consoleFile, "transcript": transcriptFile} {
		t.Setenv(name, filepath.Join(dir, file))
	}
	var shown bytes.Buffer
	return &vm{dir: dir, progress: &shown, silence: time.Minute, program: "/bin/sh", args: []string{"-c", script}}, &shown
}

func TestScenariosThatEnd(t *testing.T) {
	for script, want := range map[string]int{
		`echo hello >>"$transcript"; echo "node: the scenarios ended with status 0" >>"$transcript"`:         0,
		`echo hello >>"$transcript"; echo "node: the scenarios ended with status 3" >>"$transcript"; exit 1`: 3,
		`printf 'hello\r\nnode: the scenarios ended with status 7\r\n' >>"$transcript"; echo x >>"$console"`: 7,
	} {
		v, shown := machineOf(t, script)
		status, err := v.run(t.Context())
		if err != nil || status != want {
			t.Errorf("%s: %d, %v", script, status, err)
		}
		if !strings.HasPrefix(shown.String(), "hello") {
			t.Errorf("%s: shown is %q", script, shown)
		}
	}
}

// A machine that ends before the scenarios do, or says nothing any more, is lost; that of a time-out is not.
func TestNodeThatIsLost(t *testing.T) {
	v, _ := machineOf(t, `echo "node: alive" >>"$console"; echo "Kernel panic" >>"$console"; echo cannot >&2; exit 1`)
	if _, err := v.run(t.Context()); !errors.Is(err, errLost) || !strings.Contains(err.Error(), "Kernel panic") || !strings.Contains(err.Error(), "cannot") || strings.Contains(err.Error(), "alive") {
		t.Errorf("of a machine that ends by itself: %v", err)
	}
	v, _ = machineOf(t, `echo last >>"$console"; exec sleep 1000`)
	v.silence = time.Second
	if _, err := v.run(t.Context()); !errors.Is(err, errLost) || !strings.Contains(err.Error(), "last") {
		t.Errorf("of a machine that says nothing: %v", err)
	}
	v, _ = machineOf(t, `while echo alive >>"$console"; do sleep 0.1; done`)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for {
			if text, err := os.ReadFile(filepath.Join(v.dir, consoleFile)); err == nil && len(text) > 0 {
				cancel()
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	if _, err := v.run(ctx); errors.Is(err, errLost) || !errors.Is(err, context.Canceled) {
		t.Errorf("of a machine that is not waited for: %v", err)
	}
	v, _ = machineOf(t, "")
	v.program = "/nowhere/qemu"
	if _, err := v.run(t.Context()); err == nil || errors.Is(err, errLost) {
		t.Errorf("of a machine that does not start: %v", err)
	}
}

func TestFollower(t *testing.T) {
	var shown bytes.Buffer
	f := &follower{path: filepath.Join(t.TempDir(), "transcript"), to: &shown}
	for i, want := range []string{"", "one", "one two", "one two"} {
		if err := os.WriteFile(f.path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := f.copy(); err != nil || shown.String() != want {
			t.Errorf("%d: %q, %v", i, shown.String(), err)
		}
	}
}
