package process

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	// LogLimit bounds the console's log in bytes; the guest decides how much it prints.
	LogLimit = 1 << 20
	// tailSize is how much of the last output is kept in memory, in bytes.
	tailSize = 2 << 10
	// consoleRate is how much output is taken per consolePeriod, in bytes. A guest that prints
	// more is slowed down by its own serial line.
	consoleRate   = 256 << 10
	consolePeriod = 100 * time.Millisecond

	panicMark = "Kernel panic"
)

// consoleBuffers are lent to consoles that have something to read: most are silent.
var consoleBuffers = sync.Pool{New: func() any { return new(consoleBuffer) }}

type consoleBuffer [1 << 10]byte

// Console drains the guest's serial line into the pod's log. It is the only reader of the socket.
type Console struct {
	conn     *net.UnixConn
	file     *os.File // nil if it cannot be written any more
	size     int64
	log      *slog.Logger
	panicked chan<- string
	done     chan struct{}

	mu   sync.Mutex
	tail []byte
}

// OpenConsole connects to the socket and drains it as NewConsole does.
func OpenConsole(ctx context.Context, socket, path string, panicked chan<- string, log *slog.Logger) (*Console, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("cannot connect to the guest's console: %w", err)
	}
	return NewConsole(conn.(*net.UnixConn), path, panicked, log), nil
}

// NewConsole takes over a connection to the guest's console and appends to the log at path. A log that
// cannot be opened is not fatal: the output is drained and its end is kept in memory all the same. A
// kernel's panic goes to panicked, if that has room.
func NewConsole(conn *net.UnixConn, path string, panicked chan<- string, log *slog.Logger) *Console {
	c := &Console{conn: conn, log: log, panicked: panicked, done: make(chan struct{})}
	var err error
	c.file, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		log.Warn("the guest's console is not logged", "error", err)
		c.file = nil
	} else if fi, err := c.file.Stat(); err == nil {
		c.size = fi.Size()
	}
	go c.drain()
	return c
}

// Done is closed when the hypervisor's end of the console is gone and all of it is in the log.
func (c *Console) Done() <-chan struct{} { return c.done }

// Close ends the reading.
func (c *Console) Close() error { return c.conn.Close() }

func (c *Console) drain() {
	defer close(c.done)
	raw, err := c.conn.SyscallConn()
	if err != nil {
		return
	}
	begin, taken := time.Now(), 0
	for {
		var buf *consoleBuffer
		var n int
		err := raw.Read(func(fd uintptr) bool {
			buf = consoleBuffers.Get().(*consoleBuffer)
			var again bool
			n, again = ReadNow(int(fd), buf[:])
			if again {
				consoleBuffers.Put(buf)
			}
			return !again
		})
		if err != nil || n <= 0 {
			break
		}
		c.write(buf[:n])
		consoleBuffers.Put(buf)
		if since := time.Since(begin); since >= consolePeriod {
			begin, taken = time.Now(), 0
		} else if taken += n; taken >= consoleRate {
			time.Sleep(consolePeriod - since)
		}
	}
	c.conn.Close()
	if c.file != nil {
		c.file.Close()
	}
}

func (c *Console) write(p []byte) {
	c.mu.Lock()
	if c.tail == nil {
		c.tail = make([]byte, 0, tailSize+len(consoleBuffer{}))
	}
	c.tail = append(c.tail, p...)
	if i := bytes.LastIndex(c.tail, []byte(panicMark)); i >= 0 && bytes.IndexByte(c.tail[i:], '\n') > 0 {
		select {
		case c.panicked <- panicLine(c.tail[i:]):
		default: // it is known
		}
	}
	if extra := len(c.tail) - tailSize; extra > 0 {
		c.tail = append(c.tail[:0], c.tail[extra:]...)
	}
	c.mu.Unlock()
	if c.file == nil {
		return
	}
	if c.size+int64(len(p)) > LogLimit {
		c.shorten()
	}
	n, err := c.file.Write(p)
	c.size += int64(n)
	if err != nil {
		c.log.Warn("the guest's console is not logged any more", "error", err)
		c.file.Close()
		c.file = nil
	}
}

// shorten keeps the second half of the log. The file stays the same one, for whoever follows it.
func (c *Console) shorten() {
	half := make([]byte, LogLimit/2)
	n, err := c.file.ReadAt(half, max(0, c.size-int64(len(half))))
	if n == 0 {
		c.log.Warn("cannot shorten the log of the guest's console", "error", err)
	}
	if err := c.file.Truncate(0); err != nil {
		return
	}
	kept := half[:n]
	if i := bytes.IndexByte(kept, '\n'); i >= 0 {
		kept = kept[i+1:]
	}
	n, _ = c.file.Write(append([]byte("[earlier output was dropped]\n"), kept...))
	c.size = int64(n)
}

// Lines returns the last lines of the output, at most limit.
func (c *Console) Lines(limit int) []string {
	c.mu.Lock()
	tail := string(c.tail)
	c.mu.Unlock()
	return LastLines(tail, limit)
}

// PanicLine returns the guest kernel's last words, or "".
func (c *Console) PanicLine() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := bytes.LastIndex(c.tail, []byte(panicMark))
	if i < 0 {
		return ""
	}
	return panicLine(c.tail[i:])
}

func panicLine(output []byte) string {
	line, _, _ := bytes.Cut(output, []byte("\n"))
	return Printable(bytes.TrimSpace(line), 200)
}

// LastLines cleans output for people: no control characters, no empty lines, no overlong ones.
func LastLines(output string, limit int) []string {
	var lines []string
	for line := range strings.Lines(output) {
		if line = strings.TrimSpace(Printable([]byte(line), 200)); line != "" {
			lines = append(lines, line)
		}
	}
	return lines[max(0, len(lines)-limit):]
}
