package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"
	"unicode/utf8"
)

func logs(c *call, f *flag.FlagSet) func(context.Context, []string) error {
	follow := f.Bool("f", false, "go on with what the guest prints, until the pod is removed")
	lines := f.Int("n", -1, "begin with the last `lines`; -1: all there is")
	raw := f.Bool("raw", false, "do not drop control characters, which the guest may send to trick a terminal")
	return func(ctx context.Context, args []string) error {
		if *lines < -1 {
			return usagef("logs: -n %d: the number of lines cannot be negative", *lines)
		}
		i, err := c.pod(args[0])
		if err != nil {
			return err
		}
		var out io.Writer = c.out
		if c.json() {
			out = &jsonLines{call: c, pod: i.ID}
		}
		if !*raw || c.json() {
			out = &cleaner{w: out}
		}
		t := &tail{path: i.ConsoleLog(), out: out}
		if err := t.begin(*lines); errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("pod %s has no console log: its virtual machine has not been started (state %s)", short(i.ID), stateOf(i))
		} else if err != nil {
			return asRoot(err)
		}
		if *follow {
			err = t.follow(ctx, func() bool {
				select {
				case <-ctx.Done():
					return false
				case <-time.After(pollInterval):
					return true
				}
			})
			if errors.Is(err, context.Canceled) {
				err = nil // that is how following ends
			}
		}
		if j, ok := out.(*cleaner); ok {
			err = errors.Join(err, j.flush())
		}
		return err
	}
}

// pollInterval is how often a log is looked at that is followed.
const pollInterval = 200 * time.Millisecond

// anchorSize is how much of what was shown is remembered, in bytes, to find the place again after
// the log was shortened.
const anchorSize = 1 << 10

// tail shows a log that grows and now and then is shortened from its beginning, in place: by then
// the second half is written anew behind a line that says so.
type tail struct {
	path string
	out  io.Writer

	file   *os.File
	offset int64
	anchor []byte // the last of what was shown
	head   []byte // how the file begins, as far as it was looked at
	size   int64  // at the last look, while the place is searched
	lost   bool   // the file was shortened and the place has not been found yet
}

// begin shows the last lines of what there is, all if lines is negative.
func (t *tail) begin(lines int) error {
	f, err := os.Open(t.path)
	if err != nil {
		return fmt.Errorf("cannot read the console log: %w", err)
	}
	t.file = f
	// A log has at most a mebibyte.
	content, err := io.ReadAll(f)
	if err != nil {
		return fmt.Errorf("cannot read the console log: %w", err)
	}
	t.offset, t.head = int64(len(content)), bytes.Clone(content[:min(headSize, len(content))])
	start := 0
	if lines >= 0 {
		start = len(content)
		if start > 0 && content[start-1] == '\n' {
			start--
		}
		for range lines {
			if start < 0 {
				break
			}
			start = bytes.LastIndexByte(content[:start], '\n')
		}
		if start++; lines == 0 {
			start = len(content)
		}
	}
	return t.show(content[max(0, start):], content)
}

// show prints p; seen is what has been read up to its end.
func (t *tail) show(p, seen []byte) error {
	t.anchor = append(t.anchor, seen...)
	t.anchor = append([]byte(nil), t.anchor[max(0, len(t.anchor)-anchorSize):]...)
	_, err := t.out.Write(p)
	return err
}

// follow shows what comes until wait returns false, which makes it return ctx's error, or the file
// is removed, and then nil.
func (t *tail) follow(ctx context.Context, wait func() bool) error {
	defer func() { t.file.Close() }()
	for {
		gone, err := t.look()
		if err != nil || gone {
			return err
		}
		if !wait() {
			return ctx.Err()
		}
	}
}

// look shows what is new.
func (t *tail) look() (gone bool, err error) {
	info, err := t.file.Stat()
	if err != nil {
		return false, fmt.Errorf("cannot follow the console log: %w", err)
	}
	if !t.lost && (info.Size() < t.offset || !t.sameHead()) {
		t.lost, t.size, t.head = true, -1, nil
	}
	if t.lost {
		err = t.findPlace(info.Size())
	} else {
		err = t.rest()
	}
	if err != nil {
		return false, err
	}
	// Another file of that name, or none: what is in this one has been shown.
	now, err := os.Stat(t.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return !t.lost, t.rest()
	case err != nil:
		return false, fmt.Errorf("cannot follow the console log: %w", err)
	case os.SameFile(info, now):
		return false, nil
	}
	next, err := os.Open(t.path)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("cannot follow the console log: %w", err)
	}
	t.file.Close()
	t.file, t.offset, t.anchor, t.head, t.lost = next, 0, nil, nil, false
	return false, t.rest()
}

// headSize is how much of the beginning of a log tells it from what it was before it was shortened.
const headSize = 512

// sameHead says whether the file still begins as it did. A log that was shortened may have grown
// beyond its old length since the last look.
func (t *tail) sameHead() bool {
	head := make([]byte, headSize)
	n, _ := t.file.ReadAt(head, 0)
	if head = head[:n]; !bytes.HasPrefix(head, t.head) {
		return false
	}
	t.head = head
	return true
}

// rest shows what stands behind the offset.
func (t *tail) rest() error {
	buf := make([]byte, 32<<10)
	for {
		n, err := t.file.ReadAt(buf, t.offset)
		t.offset += int64(n)
		if n > 0 {
			if err := t.show(buf[:n], buf[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("cannot follow the console log: %w", err)
		}
	}
}

// findPlace looks for what was shown last in the shortened file. The writer may not have written the
// kept part yet, so only a file that has not grown since the last look is one that lacks it.
func (t *tail) findPlace(size int64) error {
	content, err := io.ReadAll(io.NewSectionReader(t.file, 0, size))
	if err != nil {
		return fmt.Errorf("cannot follow the console log: %w", err)
	}
	at := -1
	if len(t.anchor) > 0 {
		if at = bytes.LastIndex(content, t.anchor); at >= 0 {
			at += len(t.anchor)
		}
	}
	if at < 0 {
		if size == 0 || size != t.size {
			t.size = size
			return nil
		}
		at = 0 // more was printed in between than the log keeps
	}
	t.lost, t.offset = false, int64(len(content))
	t.anchor = nil
	return t.show(content[at:], content)
}

// cleaner passes on what cannot disturb a terminal: no escape sequences, no control characters but
// the ends of lines and tabs. What is cut off at the end of one Write is completed by the next.
type cleaner struct {
	w     io.Writer
	state int
	part  []byte // of a character
}

const (
	inText = iota
	afterEscape
	inSequence // ESC [ up to its final byte
	inString   // ESC ] and the like, up to BEL or ESC \
)

func (c *cleaner) Write(p []byte) (int, error) {
	out := make([]byte, 0, len(p))
	for _, b := range p {
		switch c.state {
		case afterEscape:
			switch b {
			case '[':
				c.state = inSequence
			case ']', 'P', '_', '^', 'X':
				c.state = inString
			default:
				c.state = inText
			}
			continue
		case inSequence:
			if b >= 0x40 && b <= 0x7e || b == '\n' {
				c.state = inText
			}
			if b != '\n' {
				continue
			}
		case inString:
			if b == 0x07 || b == '\n' {
				c.state = inText
			} else if b == 0x1b {
				c.state = afterEscape
			}
			if b != '\n' {
				continue
			}
		}
		if b >= 0x80 {
			c.part = append(c.part, b)
			if utf8.FullRune(c.part) {
				if r, n := utf8.DecodeRune(c.part); r != utf8.RuneError && r >= 0xa0 && n == len(c.part) {
					out = append(out, c.part...)
				}
				c.part = c.part[:0]
			}
			continue
		}
		c.part = c.part[:0]
		switch {
		case b == 0x1b:
			c.state = afterEscape
		case b == '\n' || b == '\t' || b >= ' ' && b < 0x7f:
			out = append(out, b)
		}
	}
	if _, err := c.w.Write(out); err != nil {
		return 0, err
	}
	return len(p), nil
}

// flush ends the output.
func (c *cleaner) flush() error {
	if f, ok := c.w.(*jsonLines); ok {
		return f.flush()
	}
	return nil
}

// jsonLines prints an object for every line. Its names are promised in kuasar-ctl(1).
type jsonLines struct {
	call *call
	pod  string
	part []byte
}

// maxLine bounds a line, in bytes; a longer one is broken.
const maxLine = 64 << 10

type logLine struct {
	Pod  string `json:"pod"`
	Line string `json:"line"`
}

func (j *jsonLines) Write(p []byte) (int, error) {
	j.part = append(j.part, p...)
	for {
		i := bytes.IndexByte(j.part, '\n')
		if i < 0 && len(j.part) < maxLine {
			return len(p), nil
		}
		line, next := j.part, len(j.part)
		if i >= 0 {
			line, next = j.part[:i], i+1
		}
		if err := j.call.line(logLine{j.pod, string(line)}); err != nil {
			return 0, err
		}
		j.part = append([]byte(nil), j.part[next:]...)
	}
}

func (j *jsonLines) flush() error {
	if len(j.part) == 0 {
		return nil
	}
	err := j.call.line(logLine{j.pod, string(j.part)})
	j.part = nil
	return err
}
