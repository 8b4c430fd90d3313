package census

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestDifference(t *testing.T) {
	before := Census{"a": 1, "b": 2, "c": 1}
	after := Census{"a": 1, "b": 3, "d": 1}
	want := []string{"left behind: b (1 more)", "left behind: d (1 more)", "missing: c (1 less)"}
	if got := Difference(before, after); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestSettleSeesWhatIsLeft(t *testing.T) {
	dir := t.TempDir()
	scope := Scope{Dirs: []string{dir}, Daemons: map[string]int{"self": os.Getpid()}}
	before, err := Take(scope)
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.Create(filepath.Join(dir, "left"))
	if err != nil {
		t.Fatal(err)
	}
	child := exec.Command("sleep", "1000")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	difference, err := Settle(ended, scope, before)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"file " + file.Name(), "process sleep", "descriptor of self on " + file.Name()} {
		if !strings.Contains(strings.Join(difference, "\n"), want) {
			t.Errorf("%q is not found: %q", want, difference)
		}
	}

	file.Close()
	os.Remove(file.Name())
	child.Process.Kill()
	child.Wait()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if difference, err := Settle(ctx, scope, before); err != nil || len(difference) > 0 {
		t.Errorf("afterwards: %q, %v", difference, err)
	}
}
