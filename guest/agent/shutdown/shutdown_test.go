package shutdown

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// TestMain lets the test binary play an agent that panics or fails: it is not PID 1, so it exits
// where the agent would power the machine off.
func TestMain(m *testing.M) {
	switch os.Getenv("SHUTDOWN_TEST") {
	case "panic":
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer Guard()
			panic("on purpose")
		}()
		<-done
		select {}
	case "fatal":
		Fatal(os.ErrPermission)
	}
	os.Exit(m.Run())
}

func TestLastWords(t *testing.T) {
	for mode, want := range map[string]string{
		"panic": "vmm-task: panic: on purpose",
		"fatal": "vmm-task: permission denied",
	} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "SHUTDOWN_TEST="+mode)
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.HasPrefix(string(out), want) {
			t.Errorf("%s: %v, %q", mode, err, out)
		}
	}
}

func TestQuiesceIsBoundedAndHappensOnce(t *testing.T) {
	released := 0
	release = func(*slog.Logger) { released++ }
	calls := 0
	m := &Machine{
		Stop: func(ctx context.Context, grace time.Duration) {
			calls++
			if grace != MaxGrace {
				t.Errorf("grace %v", grace)
			}
			if d, ok := ctx.Deadline(); !ok || time.Until(d) > MaxGrace+killTime {
				t.Error("stopping is not bounded")
			}
		},
		Log: slog.New(slog.DiscardHandler),
	}
	m.Quiesce(time.Hour)
	m.Quiesce(time.Hour)
	if calls != 1 || released != 1 {
		t.Errorf("stopped %d times, released %d times", calls, released)
	}
	start := time.Now()
	bounded(time.Millisecond, func(context.Context) { select {} })
	if time.Since(start) > 10*time.Second {
		t.Error("waited for what never ends")
	}
}
