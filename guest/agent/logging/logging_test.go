package logging

import (
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"kuasar.io/kuasar/guest/agent/cmdline"
)

// gate is a console that stands still until it is opened.
type gate struct {
	open chan struct{}
	mu   sync.Mutex
	text strings.Builder
}

func (g *gate) Write(p []byte) (int, error) {
	<-g.open
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.text.Write(p)
}

func (g *gate) String() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.text.String()
}

func TestLog(t *testing.T) {
	g := &gate{open: make(chan struct{})}
	close(g.open)
	l := New(g)
	l.Debug("hidden")
	l.Info("shown", "pod", "p1")
	l.SetLevel(cmdline.LevelTrace)
	l.Log(t.Context(), cmdline.LevelTrace, "traced")
	l.Flush()
	if got, want := g.String(), "level=INFO msg=shown pod=p1\nlevel=TRACE msg=traced\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestFloodIsCutOffAndCounted(t *testing.T) {
	now := time.Unix(1000, 0)
	g := &gate{open: make(chan struct{})}
	close(g.open)
	l := &lines{queue: make(chan []byte, 10*burst), now: func() time.Time { return now }, tokens: burst}
	log := slog.New(slog.NewTextHandler(l, nil))
	for range 3 * burst {
		log.Info("noise")
	}
	now = now.Add(time.Second)
	log.Info("after the flood")
	go l.run(g)
	l.wait(10 * time.Second)
	close(l.queue)
	got := g.String()
	if n := strings.Count(got, "noise"); n != burst {
		t.Errorf("%d lines of the flood were written, want %d", n, burst)
	}
	if !strings.Contains(got, "dropped\" count=200") || !strings.Contains(got, "after the flood") {
		t.Errorf("the end is %q", got[max(0, len(got)-200):])
	}
}

func TestConsoleThatStandsStillBlocksNobody(t *testing.T) {
	g := &gate{open: make(chan struct{})}
	l := New(g)
	for range 2 * queued {
		l.Info(strings.Repeat("x", 2*maxLine))
	}
	close(g.open)
	l.Flush()
	for line := range strings.Lines(g.String()) {
		if len(line) > maxLine {
			t.Errorf("a line of %d bytes", len(line))
		}
	}
}
