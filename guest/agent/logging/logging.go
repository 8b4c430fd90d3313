// Package logging writes the agent's log to the guest's console.
//
// The console is a serial line: slow, shared with the kernel, and it may stand still while nobody
// reads it on the host. So the log never blocks the agent: lines wait in a bounded queue, and a
// flood is cut off and counted.
package logging

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"kuasar.io/kuasar/guest/agent/cmdline"
)

const (
	maxLine = 2 << 10 // bytes; longer lines are cut
	queued  = 64      // lines

	// A burst of lines is written, then rate lines per second.
	burst = 100
	rate  = 10
)

// Log is a logger and the writer behind it.
type Log struct {
	*slog.Logger
	level *slog.LevelVar
	lines *lines
}

// New starts a log on w, at level info. Its goroutine lives as long as the process.
func New(w io.Writer) *Log {
	l := &Log{level: new(slog.LevelVar), lines: &lines{queue: make(chan []byte, queued), now: time.Now, tokens: burst}}
	l.Logger = slog.New(slog.NewTextHandler(l.lines, &slog.HandlerOptions{
		Level: l.level,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) > 0 {
				return a
			}
			switch {
			case a.Key == slog.TimeKey:
				// The host stamps what it reads; the guest's clock is not set yet.
				return slog.Attr{}
			case a.Key == slog.LevelKey && a.Value.Any() == cmdline.LevelTrace:
				return slog.String(slog.LevelKey, "TRACE")
			}
			return a
		},
	}))
	go l.lines.run(w)
	return l
}

// SetLevel sets the level from which on lines are written.
func (l *Log) SetLevel(level slog.Level) { l.level.Set(level) }

// Flush waits until everything logged so far is written, but not for long.
func (l *Log) Flush() {
	l.lines.wait(time.Second)
}

// lines is the queue in front of the console.
type lines struct {
	queue chan []byte
	now   func() time.Time

	mu      sync.Mutex
	tokens  float64
	last    time.Time
	dropped int
	pending int
	idle    chan struct{} // closed when pending becomes 0
}

// Write takes one line. It never blocks and never fails.
func (l *lines) Write(line []byte) (int, error) {
	n := len(line)
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	l.tokens = min(burst, l.tokens+rate*now.Sub(l.last).Seconds())
	l.last = now
	if l.tokens < 1 {
		l.dropped++
		return n, nil
	}
	if len(line) > maxLine {
		line = append(line[:maxLine-4:maxLine-4], "...\n"...)
	}
	line = bytes.Clone(line)
	if l.dropped > 0 {
		line = append(fmt.Appendf(nil, "level=WARN msg=\"log lines were dropped\" count=%d\n", l.dropped), line...)
	}
	select {
	case l.queue <- line:
		l.tokens--
		l.dropped = 0
		l.pending++
	default:
		l.dropped++
	}
	return n, nil
}

func (l *lines) run(w io.Writer) {
	for line := range l.queue {
		w.Write(line)
		l.mu.Lock()
		l.pending--
		if l.pending == 0 && l.idle != nil {
			close(l.idle)
			l.idle = nil
		}
		l.mu.Unlock()
	}
}

func (l *lines) wait(limit time.Duration) {
	l.mu.Lock()
	if l.pending == 0 {
		l.mu.Unlock()
		return
	}
	if l.idle == nil {
		l.idle = make(chan struct{})
	}
	idle := l.idle
	l.mu.Unlock()
	select {
	case <-idle:
	case <-time.After(limit):
	}
}
