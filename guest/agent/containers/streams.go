package containers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"
)

const (
	// descendantGrace is how long after a process's exit its output is read on when a descendant
	// still holds the pipe open, such as a daemon that an exec left in the background. All that
	// the process itself wrote is delivered however long that takes; the grace is only for what
	// such descendants write in addition, and without a bound the exit would never be reported.
	descendantGrace = 2 * time.Second
	// lastOutput bounds what is read after the grace: the most that a pipe can hold by default
	// limits, so that a descendant that writes without end does not hold up the exit.
	lastOutput = 1 << 20
	// closeIOGrace is how long CloseIO waits for the EOF that the host sends on the stream
	// itself, which may be overtaken by the request, before it cuts the input off.
	closeIOGrace = time.Second
)

// eofTimeout bounds how long the host may take to hear of the end of a stream whose process was
// never started, so that nothing waits for a host that has given up on it.
const eofTimeout = 30 * time.Second

// endOutput sends EOF in the background.
func endOutput(out output) {
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), eofTimeout)
		defer cancel()
		out.Close(ctx)
	}()
}

// stdioNames are the standard streams of a process as the host named them.
type stdioNames struct {
	stdin, stdout, stderr string
	terminal              bool
}

// all lists the names in the order of their descriptors; empty ones stand for no stream.
func (n stdioNames) all() []string { return []string{n.stdin, n.stdout, n.stderr} }

// processIO joins the standard streams of one process with the host's. It is opened before the
// process starts, then either begun or aborted; once begun, finish must be called at the exit.
type processIO struct {
	terminal bool
	child    []*os.File // the process's ends; closed by begin and abort
	console  *os.File   // our end of the socket that brings the terminal

	in   io.ReadCloser // from the host; nil for none
	outs [2]output     // to the host: stdout and stderr; nil for none

	pipes  [3]*os.File // our ends, without a terminal
	master *os.File    // the terminal, once begun

	input   *inputPump
	outputs []*outputPump
}

// openIO makes pipes or the socket for a terminal and puts their ends into lp. Pipes belong to
// the user of the process, so that it can open /dev/stdout again.
func openIO(names stdioNames, s streams, lp *libcontainer.Process, uid, gid int) (_ *processIO, err error) {
	p := &processIO{terminal: names.terminal}
	for _, name := range names.all() {
		if name == "" {
			continue
		}
		if err := s.check(name); err != nil {
			return nil, err
		}
	}
	// From here on the host's streams are ours to end, also in failure.
	if names.stdin != "" {
		p.in = s.input(names.stdin)
	}
	for i, name := range names.all()[1:] {
		if name != "" {
			p.outs[i] = s.output(name)
		}
	}
	defer func() {
		if err != nil {
			p.abort()
		}
	}()

	if names.terminal {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("cannot make socket for terminal: %w", err)
		}
		p.console = os.NewFile(uintptr(pair[0]), "console")
		lp.ConsoleSocket = os.NewFile(uintptr(pair[1]), "console")
		p.child = append(p.child, lp.ConsoleSocket)
		return p, nil
	}
	pipe := func(i int) (*os.File, error) {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, fmt.Errorf("cannot make pipe for standard stream %d: %w", i, err)
		}
		ours, theirs := r, w
		if i == 0 {
			ours, theirs = w, r
		}
		p.pipes[i] = ours
		p.child = append(p.child, theirs)
		// Fd makes a file blocking, so it is taken of the process's end, which shall be.
		if err := unix.Fchown(int(theirs.Fd()), uid, gid); err != nil {
			return nil, fmt.Errorf("cannot give standard stream %d to user %d: %w", i, uid, err)
		}
		return theirs, nil
	}
	// Each assignment stands alone: a nil *os.File in these interfaces would not be nil.
	if p.in != nil {
		f, err := pipe(0)
		if err != nil {
			return nil, err
		}
		lp.Stdin = f
	}
	if p.outs[0] != nil {
		f, err := pipe(1)
		if err != nil {
			return nil, err
		}
		lp.Stdout = f
	}
	if p.outs[1] != nil {
		f, err := pipe(2)
		if err != nil {
			return nil, err
		}
		lp.Stderr = f
	}
	return p, nil
}

// abort ends everything of a process that did not start; the host gets EOF.
func (p *processIO) abort() {
	p.closeChild()
	for _, f := range append(p.pipes[:], p.console, p.master) {
		if f != nil {
			f.Close()
		}
	}
	if p.in != nil {
		p.in.Close()
	}
	for _, out := range p.outs {
		if out != nil {
			endOutput(out)
		}
	}
}

func (p *processIO) closeChild() {
	for _, f := range p.child {
		f.Close()
	}
	p.child = nil
}

// begin moves bytes from and to a process that has been started. ctx ends when its output is
// given up. After an error the caller aborts.
func (p *processIO) begin(ctx context.Context) error {
	p.closeChild()
	if p.terminal {
		master, err := receiveTerminal(p.console)
		if err != nil {
			return err
		}
		p.console.Close()
		p.console, p.master = nil, master
		if p.outs[1] != nil {
			// A terminal has one output.
			endOutput(p.outs[1])
		}
		p.outputs = append(p.outputs, newOutputPump(master, p.outs[0]))
		if p.in != nil {
			p.input = &inputPump{src: p.in, dst: master, keep: true, eof: make(chan struct{})}
		}
	} else {
		for i, out := range p.outs {
			if out != nil {
				p.outputs = append(p.outputs, newOutputPump(p.pipes[i+1], out))
			}
		}
		if p.in != nil {
			p.input = &inputPump{src: p.in, dst: p.pipes[0], eof: make(chan struct{})}
		}
	}
	for _, pump := range p.outputs {
		go pump.run(ctx)
	}
	if p.input != nil {
		go p.input.run()
	}
	return nil
}

// finish is called when the process has exited: it returns when its output is at the host, or is
// given up because the context of begin ended.
func (p *processIO) finish() {
	if p.input != nil {
		p.input.stop()
	}
	hurry := time.AfterFunc(descendantGrace, func() {
		for _, pump := range p.outputs {
			pump.src.SetReadDeadline(time.Now())
		}
	})
	defer hurry.Stop()
	for _, pump := range p.outputs {
		<-pump.done
	}
	if p.master != nil {
		p.master.Close()
	}
}

// receiveTerminal takes the terminal that libcontainer has sent before it reported the process
// as started.
func receiveTerminal(socket *os.File) (*os.File, error) {
	var name [256]byte
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(int(socket.Fd()), name[:], oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot receive terminal: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return nil, fmt.Errorf("cannot receive terminal: %d control messages: %w", len(messages), errors.Join(err, unix.EBADMSG))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("cannot receive terminal: %d descriptors: %w", len(fds), errors.Join(err, unix.EBADMSG))
	}
	// Non-blocking, so that reads of it wait in the poller and deadlines work.
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		return nil, fmt.Errorf("cannot receive terminal: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "terminal"), nil
}

// outputPump moves a process's output to the host. A process whose host is gone is not stopped
// by that: its output is then discarded.
type outputPump struct {
	src  *os.File
	dst  output // nil discards
	done chan struct{}
}

func newOutputPump(src *os.File, dst output) *outputPump {
	return &outputPump{src: src, dst: dst, done: make(chan struct{})}
}

// buffers are only held while there is something to move, so that idle containers have none.
var buffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

func (p *outputPump) run(ctx context.Context) {
	defer close(p.done)
	if p.dst != nil {
		// A host that takes nothing keeps Write waiting; closing the stream ends that as well.
		defer context.AfterFunc(ctx, func() { p.dst.Close(ctx) })()
	}
	broken := p.dst == nil
	deliver := func(b []byte) {
		if broken {
			return
		}
		if _, err := p.dst.Write(b); err != nil {
			broken = true
		}
	}
	err := p.pump(deliver, false)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		p.src.SetReadDeadline(time.Time{})
		p.pump(deliver, true)
	}
	p.src.Close()
	if p.dst != nil {
		p.dst.Close(ctx)
	}
}

// pump reads until EOF, or with last until nothing is there any more.
func (p *outputPump) pump(deliver func([]byte), last bool) error {
	raw, err := p.src.SyscallConn()
	if err != nil {
		return err
	}
	for total := 0; !last || total < lastOutput; {
		var buf *[32 << 10]byte
		var n int
		var readErr error
		err := raw.Read(func(fd uintptr) bool {
			buf = buffers.Get().(*[32 << 10]byte)
			for {
				n, readErr = unix.Read(int(fd), buf[:])
				if readErr != unix.EINTR {
					break
				}
			}
			if readErr == unix.EAGAIN && !last {
				buffers.Put(buf)
				buf = nil
				return false
			}
			return true
		})
		if n > 0 {
			deliver(buf[:n])
			total += n
		}
		if buf != nil {
			buffers.Put(buf)
		}
		switch {
		case err != nil:
			return err
		case readErr != nil: // EIO is how a terminal ends
			return readErr
		case n == 0:
			return nil
		}
	}
	return nil
}

// inputPump moves the host's input to a process.
type inputPump struct {
	src  io.ReadCloser
	dst  *os.File
	keep bool // a terminal stays open at EOF
	eof  chan struct{}
	once sync.Once
}

func (p *inputPump) run() {
	defer close(p.eof)
	_, err := io.Copy(struct{ io.Writer }{p.dst}, p.src)
	if err != nil {
		// The process does not read any more, or stop was called.
		p.src.Close()
	}
	p.close()
}

func (p *inputPump) close() {
	if !p.keep {
		p.once.Do(func() { p.dst.Close() })
	}
}

// stop refuses further input.
func (p *inputPump) stop() {
	p.src.Close()
	p.close()
}

// closeSoon gives the input a moment to end by itself and then stops it.
func (p *inputPump) closeSoon() {
	if p.keep {
		return
	}
	go func() {
		select {
		case <-p.eof:
		case <-time.After(closeIOGrace):
			p.stop()
		}
	}()
}
