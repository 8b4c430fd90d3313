// Package console is the debug console: a shell in the guest, outside of all containers, for the
// administrator of the host. It is served only with the kernel parameter task.debug.
//
// A connection whose first line is "KSR_MODE exec" gets a shell without a terminal, that runs the
// lines that follow; everyone else gets an interactive one.
package console

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/agent/shutdown"
)

// Archive is where the initrd keeps the console's tools: a gzip-compressed cpio archive with
// bin/sh in it. It is unpacked when the console is first opened, so that it costs little before.
const Archive = "/usr/lib/kuasar/console.cpio.gz"

const (
	// dir is where the tools are unpacked to.
	dir = "/run/kuasar/console"
	// modeTime is how long a connection has to say that it wants no terminal.
	modeTime = 100 * time.Millisecond
	modeExec = "KSR_MODE exec"
	// maxMode bounds the first line, in bytes.
	maxMode = 1024
	// maxSessions bounds the shells that run at the same time.
	maxSessions = 16
	// quiet is how long the console waits for more output once the shell has ended: background
	// jobs may hold its output open for ever.
	quiet = 100 * time.Millisecond
	// hangup is what a shell gets between SIGHUP and SIGKILL.
	hangup = time.Second
)

// Console serves the debug console.
type Console struct {
	// Shell is an absolute path; empty, or a file that does not exist, stands for the shell of the
	// archive.
	Shell string
	Log   *slog.Logger

	unpack   sync.Mutex
	unpacked bool
	sessions chan struct{}
}

// Serve accepts connections until the listener fails, and returns why.
func (c *Console) Serve(l net.Listener) error {
	c.sessions = make(chan struct{}, maxSessions)
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer shutdown.Guard()
			defer conn.Close()
			select {
			case c.sessions <- struct{}{}:
				defer func() { <-c.sessions }()
			default:
				fmt.Fprintf(conn, "cannot open the console: %d sessions are open\n", maxSessions)
				return
			}
			if err := c.serve(conn); err != nil {
				c.Log.Warn("debug console", "error", err)
				fmt.Fprintln(conn, err)
			}
		}()
	}
}

func (c *Console) serve(conn net.Conn) error {
	// While the mode is awaited, the tools can be unpacked.
	type shell struct {
		path string
		err  error
	}
	ready := make(chan shell, 1)
	go func() {
		path, err := c.prepare()
		ready <- shell{path, err}
	}()
	script, head, err := readMode(conn)
	if err != nil {
		return err
	}
	sh := <-ready
	if sh.err != nil {
		return sh.err
	}
	input := io.MultiReader(bytes.NewReader(head), conn)
	if script {
		return c.script(conn, input, sh.path)
	}
	return c.interactive(conn, input, sh.path)
}

// readMode reads the first line if it comes in time. head is what belongs to the shell.
func readMode(conn net.Conn) (script bool, head []byte, err error) {
	conn.SetReadDeadline(time.Now().Add(modeTime))
	defer conn.SetReadDeadline(time.Time{})
	buf := make([]byte, 0, maxMode)
	for len(buf) < maxMode {
		n, err := conn.Read(buf[len(buf):maxMode])
		buf = buf[:len(buf)+n]
		if line, rest, ok := bytes.Cut(buf, []byte("\n")); ok {
			if string(bytes.TrimRight(line, "\r ")) == modeExec {
				return true, rest, nil
			}
			return false, buf, nil
		}
		if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, io.EOF) {
			break
		}
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			break
		}
		if err != nil {
			return false, nil, err
		}
	}
	return false, buf, nil
}

// prepare unpacks the tools at the first call and returns the shell.
func (c *Console) prepare() (string, error) {
	if c.Shell != "" {
		if _, err := os.Stat(c.Shell); err == nil {
			return c.Shell, nil
		}
	}
	c.unpack.Lock()
	defer c.unpack.Unlock()
	if !c.unpacked {
		if err := c.unpackArchive(); err != nil {
			return "", fmt.Errorf("cannot open the console: cannot unpack its tools: %w", err)
		}
		c.unpacked = true
	}
	if c.Shell != "" {
		if inside := dir + c.Shell; fileExists(inside) {
			return inside, nil
		}
		c.Log.Warn("the shell of task.debug_shell does not exist, taking the console's own", "shell", c.Shell)
	}
	return dir + "/bin/sh", nil
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func (c *Console) unpackArchive() (err error) {
	archive, err := os.Open(Archive)
	if err != nil {
		return err
	}
	defer archive.Close()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	// A file system of its own, so that what half a failure left is gone with it.
	if err := unix.Mount("console", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("mode=0755,size=%d", maxUnpacked)); err != nil {
		return fmt.Errorf("cannot mount %s: %w", dir, err)
	}
	defer func() {
		if err != nil {
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	}()
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return unpack(archive, root)
}

func environment() []string {
	env := []string{"PATH=" + dir + "/bin:" + os.Getenv("PATH"), "HOME=/root", "TERM=xterm"}
	return append(env, "USER=root", "SHELL="+dir+"/bin/sh")
}

// script runs a shell without a terminal. Its output has no prompt and no echo. The client's end
// of input ends the shell once it has done what it was told.
func (c *Console) script(conn net.Conn, input io.Reader, shell string) error {
	output, stdout, err := os.Pipe()
	if err != nil {
		return err
	}
	defer output.Close()
	stdin, lines, err := os.Pipe()
	if err != nil {
		stdout.Close()
		return err
	}
	defer lines.Close()
	cmd := exec.Command(shell)
	cmd.Env = append(environment(), "PS1=")
	cmd.Dir = "/"
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, stdout, stdout
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	stdin.Close()
	stdout.Close()
	if err != nil {
		return fmt.Errorf("cannot start the console's shell: %w", err)
	}
	feed := func() error {
		_, err := io.Copy(lines, input)
		lines.Close() // the client has said everything; the shell ends when it has done everything
		return err
	}
	return c.run(conn, cmd, output, feed)
}

// interactive runs a shell on a terminal.
func (c *Console) interactive(conn net.Conn, input io.Reader, shell string) error {
	master, slave, err := openTerminal()
	if err != nil {
		return fmt.Errorf("cannot open a terminal for the console: %w", err)
	}
	defer master.Close()
	over := make(chan struct{})
	defer close(over)
	cmd := exec.Command(shell)
	cmd.Env = environment()
	cmd.Dir = "/"
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	err = cmd.Start()
	slave.Close()
	if err != nil {
		return fmt.Errorf("cannot start the console's shell: %w", err)
	}
	feed := func() error {
		_, err := io.Copy(master, input)
		if err != nil {
			return err
		}
		// What a person does to end a shell; a terminal has no end of file of its own. A client
		// whose input was a file reads on while the shell does what the file says. But if the client
		// has gone, and something else than the shell is listening, nobody is left to end it.
		master.Write([]byte{4})
		for {
			select {
			case <-over:
				return nil
			case <-time.After(hangup):
			}
			if !reads(conn) {
				return io.EOF
			}
		}
	}
	return c.run(conn, cmd, master, feed)
}

// reads tells whether a client that sends nothing more still receives. Of a connection that is not a
// socket of the kernel that cannot be known; then it does not.
func reads(conn net.Conn) bool {
	socket, ok := conn.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return false
	}
	// Sending nothing sends nothing, but fails when the other end is closed for both directions.
	var sendErr error
	err = raw.Control(func(fd uintptr) {
		_, sendErr = unix.SendmsgN(int(fd), nil, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
	})
	return err == nil && sendErr == nil
}

// run relays a session until the shell ends or the client is gone. Then nothing of it is left but
// background jobs that detached themselves.
func (c *Console) run(conn net.Conn, cmd *exec.Cmd, output *os.File, feed func() error) error {
	gone := make(chan struct{})
	var once sync.Once
	lost := func() { once.Do(func() { close(gone) }) }
	go func() {
		defer shutdown.Guard()
		if feed() != nil {
			lost()
		}
	}()
	relayed := make(chan struct{})
	ending := make(chan struct{})
	go func() {
		defer shutdown.Guard()
		defer close(relayed)
		if relay(conn, output, ending) != nil {
			lost()
		}
	}()
	ended := make(chan struct{})
	go func() {
		defer shutdown.Guard()
		cmd.Wait()
		close(ended)
	}()
	pid := cmd.Process.Pid
	select {
	case <-ended:
	case <-gone:
		// The session's own processes: the shell leads their group, and jobs follow their shell.
		unix.Kill(-pid, unix.SIGHUP)
		unix.Kill(-pid, unix.SIGCONT)
		select {
		case <-ended:
		case <-time.After(hangup):
		}
		unix.Kill(-pid, unix.SIGKILL)
		<-ended
	}
	close(ending)
	output.SetReadDeadline(time.Now().Add(quiet))
	<-relayed
	return nil
}

// relay copies output to the client. After ending is closed it stops at the first silence.
func relay(conn net.Conn, output *os.File, ending <-chan struct{}) error {
	buf := make([]byte, 16<<10)
	for {
		n, err := output.Read(buf)
		if n > 0 {
			if _, err := conn.Write(buf[:n]); err != nil {
				return err
			}
		}
		if err != nil {
			return nil // the end, or silence
		}
		select {
		case <-ending:
			output.SetReadDeadline(time.Now().Add(quiet))
		default:
		}
	}
}

// openTerminal opens both ends of a new pseudo terminal.
func openTerminal() (master, slave *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	master = os.NewFile(uintptr(fd), "/dev/ptmx")
	defer func() {
		if err != nil {
			master.Close()
		}
	}()
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, nil, err
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		return nil, nil, err
	}
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 80}); err != nil {
		return nil, nil, err
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	return master, slave, err
}
